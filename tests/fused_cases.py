"""One list of named batches of the fused family, each with its reason, for every way of running it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import cupy_nsa_meta
from cases import DTYPES, POISON, strided
from cupy_nsa_meta._status import INT32_MAX, INT32_MIN

FUNCTIONS = {
    "decode": cupy_nsa_meta.fused_dsa_decode_metadata,
    "verify": cupy_nsa_meta.fused_dsa_target_verify_metadata,
    "draft_extend": cupy_nsa_meta.fused_dsa_draft_extend_metadata,
    "extend": cupy_nsa_meta.fused_dsa_extend_metadata,
}
GUARD = 16  # elements in front of and behind each output
EXTEND_ROW_OUTPUTS = (
    "seqlens_expanded", "dsa_cache_seqlens", "dsa_cu_seqlens_k", "token_to_batch_idx", "ks", "ke",
    "topk_indices_offset", "positions",
)  # fmt: skip
EXTEND_REQUEST_OUTPUTS = ("cache_seqlens", "cu_seqlens_k", "cu_seqlens_q", "extend_start_loc")
TABLES = ("page_table_1", "real_page_table")


@dataclass(frozen=True)
class FusedCase:
    """A batch, its buffers, and nothing about how it is run."""

    op: str
    name: str
    reason: str
    seq: tuple[int, ...]
    extend: tuple[int, ...] = ()
    next_n: int = 1
    topk: int = 2048
    page_size: int = 64
    width: int = 64  # W
    token_width: int | None = None  # columns of req_to_token; default W + 5
    table_gap: int = 3  # columns between the rows of a page table
    pool_rows: int | None = None  # default bs + 3
    pool: tuple[int, ...] | None = None  # default: a permutation
    tables: tuple[str, ...] = TABLES
    outputs: tuple[str, ...] = EXTEND_REQUEST_OUTPUTS + EXTEND_ROW_OUTPUTS  # of EXTEND
    flattened: int | None = None  # capacity of page_table_1_flattened
    mqa: bool = True
    total_len: int | None = None  # default: the sum of extend
    static: bool = False
    pad_to: int | None = None
    slack: int = 5  # elements of each 1-D output behind its array
    dtypes: tuple[str, str, str] = ("int64", "int32", "int64")  # seq, extend, pool: as upstream
    stride: int = 1
    offset: int = 0  # elements between a 16-byte boundary and the start of each output
    status: int = 0
    tags: frozenset[str] = field(default_factory=frozenset)

    @property
    def bs(self) -> int:
        return len(self.seq)

    @property
    def query(self) -> list[int]:
        """Query tokens of each request as they count, whatever the lengths hold."""
        if self.op in ("decode", "verify"):
            return [self.next_n] * self.bs
        return [max(q, 0) for q in self.extend]

    @property
    def rows(self) -> int:
        if self.op in ("decode", "verify"):
            return self.bs * self.next_n
        return sum(self.extend) if self.total_len is None else self.total_len

    @property
    def table_rows(self) -> int:
        return self.bs if self.op in ("decode", "extend") else self.rows

    @property
    def indices(self) -> tuple[int, ...]:
        if self.pool is not None:
            return self.pool
        return tuple(
            int(i) for i in np.random.default_rng(self.bs).permutation(self.bs + 3)[: self.bs]
        )


class Built:
    """The tensors of a case: inputs, and outputs inside poisoned allocations."""

    def __init__(self, case: FusedCase, device: str | torch.device = "cpu") -> None:
        self.case = case
        self.device = device
        self.allocations: dict[str, torch.Tensor] = {}
        bs, rows = case.bs, case.rows
        arguments: dict[str, Any] = {
            "seq_lens": self._lengths(case.seq, 0),
            "req_pool_indices": self._lengths(case.indices, 2),
            "req_to_token": self._tokens(),
        }
        if case.extend or case.op in ("draft_extend", "extend"):
            arguments["extend_seq_lens"] = self._lengths(case.extend, 1)
        rooms = {
            "cache_seqlens": bs, "cu_seqlens_k": bs + 1, "cu_seqlens_q": bs + 1, "extend_start_loc": bs,
            **dict.fromkeys(EXTEND_ROW_OUTPUTS, rows),
            "dsa_cache_seqlens": case.pad_to or rows, "dsa_cu_seqlens_k": (case.pad_to or rows) + 1,
        }  # fmt: skip
        wanted: tuple[str, ...] = (
            "cache_seqlens",
            "cu_seqlens_k",
            "dsa_cache_seqlens",
            "dsa_cu_seqlens_k",
        )
        if case.op in ("verify", "draft_extend"):
            wanted += ("seqlens_expanded",)
        if case.op == "extend":
            wanted = case.outputs
        for name in wanted:
            arguments[name] = self._output(name, rooms[name] + case.slack)
        pages = -(-case.width // case.page_size)
        for name, columns in (("page_table_1", case.width), ("real_page_table", pages)):
            arguments[name] = (
                self._table(name, case.table_rows + 1, columns) if name in case.tables else None
            )
        if case.page_size == 1 and len(case.tables) == 2 and "two_tables" not in case.tags:
            del self.allocations["real_page_table"]
            arguments["real_page_table"] = arguments["page_table_1"]
        width = "max_len" if case.op == "decode" else "max_seqlen_k"
        arguments |= {
            width: case.width, "dsa_index_topk": case.topk, "physical_page_size": case.page_size,
        }  # fmt: skip
        if case.op != "extend":
            arguments["bs"] = bs
        if case.op == "verify":
            arguments["next_n"] = case.next_n
            if case.mqa:
                arguments["paged_mqa_ctx_lens_2d"] = self._table("mqa", bs, case.next_n)
        if case.op == "draft_extend":
            longest = max([*case.extend, -(-rows // max(bs, 1)), 0])
            arguments |= {
                "total_len": rows, "max_extend_len": longest, "max_total_len": rows + 9,
                "static_extend_len": case.static,
            }  # fmt: skip
        if case.op == "extend":
            arguments |= {"total_len": rows, "pad_to": case.pad_to}
            if case.flattened is not None:
                arguments["page_table_1_flattened"] = self._output("flattened", case.flattened)
        self.arguments = arguments

    def run(self) -> None:
        FUNCTIONS[self.case.op](**self.arguments)

    def poison(self) -> None:
        for allocation in self.allocations.values():
            allocation.fill_(POISON)

    def _lengths(self, values: tuple[int, ...], which: int) -> torch.Tensor:
        array = np.asarray(values, dtype=np.int64).reshape(-1)
        return strided(array, self.case.dtypes[which], self.case.stride, self.device)

    def _tokens(self) -> torch.Tensor:
        case = self.case
        columns = case.width + 5 if case.token_width is None else case.token_width
        rows = case.bs + 3 if case.pool_rows is None else case.pool_rows
        rng = np.random.default_rng(7)
        tokens = torch.from_numpy(rng.integers(0, INT32_MAX, (rows, columns), dtype=np.int32))
        return tokens.to(self.device)

    def _allocate(self, name: str, elements: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        front = GUARD + self.case.offset
        allocation = torch.full(
            (front + elements + GUARD,), POISON, dtype=dtype, device=self.device
        )
        self.allocations[name] = allocation
        return allocation[front : front + elements]

    def _output(self, name: str, elements: int) -> torch.Tensor:
        return self._allocate(name, elements, torch.int64 if name == "positions" else torch.int32)

    def _table(self, name: str, rows: int, columns: int) -> torch.Tensor:
        wide = columns + self.case.table_gap
        return self._allocate(name, rows * wide).view(rows, wide)[:, :columns]

    def check(self, expected: dict[str, torch.Tensor]) -> None:
        """Every element of every allocation, in front of, inside and behind the outputs."""
        assert self.allocations.keys() == expected.keys()
        for name, allocation in self.allocations.items():
            got, wanted = allocation.cpu(), expected[name]
            if not torch.equal(got, wanted):
                wrong = torch.nonzero(got != wanted).flatten().tolist()
                at = wrong[0]
                raise AssertionError(
                    f"{self.case.name}: {name}: {len(wrong)} elements differ, first at "
                    f"{at - GUARD - self.case.offset}: expected {int(wanted[at])}, got {int(got[at])}"
                )


def expected(case: FusedCase) -> dict[str, torch.Tensor]:
    """All allocations after the reference has run, on the CPU."""
    built = Built(case)
    built.run()
    return built.allocations


def naive(case: FusedCase) -> dict[str, torch.Tensor]:
    """The contract once more, request by request and token by token: the reference's own oracle."""
    built = Built(case)
    out = {name: tensor for name, tensor in built.arguments.items() if name not in (
        "seq_lens", "extend_seq_lens", "req_pool_indices", "req_to_token")}  # fmt: skip
    tokens = built.arguments["req_to_token"]

    def put(name: str, at: Any, value: int) -> None:
        if out.get(name) is not None:
            out[name][at] = min(max(value, INT32_MIN), INT32_MAX)

    for name in ("cu_seqlens_k", "cu_seqlens_q", "dsa_cu_seqlens_k"):
        put(name, 0, 0)
    row = kv_sum = clipped_sum = joined = q_sum = 0
    for i, (seq, q) in enumerate(zip(case.seq, case.query, strict=True)):
        seq, q = (min(max(value, INT32_MIN), INT32_MAX) for value in (seq, q))
        kv = seq + (case.next_n if case.op == "verify" else 0)
        ks = kv_sum
        kv_sum += kv
        put("cache_seqlens", i, kv)
        put("cu_seqlens_k", i + 1, kv_sum)
        put("extend_start_loc", i, q_sum)
        q_sum += q
        put("cu_seqlens_q", i + 1, q_sum)
        pool = case.indices[i]
        exists = 0 <= pool < tokens.size(0)
        live = min(kv, case.width)

        def page_rows(at: int, pool: int = pool, live: int = live) -> None:
            if out.get("page_table_1") is not None:
                out["page_table_1"][at, : max(live, 0)] = tokens[pool, : max(live, 0)]
            if out.get("real_page_table") is not None:
                pages = tokens[pool, : max(live, 0)][:: case.page_size] // case.page_size
                out["real_page_table"][at, : len(pages)] = pages

        if case.op in ("decode", "extend") and exists:
            page_rows(i)
        if case.op == "verify" and case.mqa:
            for j in range(case.next_n):
                put("paged_mqa_ctx_lens_2d", (i, j), kv)
        for j in range(q):
            if row >= case.rows:
                break
            expanded = max(kv - q + 1 + j, 0)
            clipped_sum += min(expanded, case.topk)
            put("seqlens_expanded", row, expanded)
            put("dsa_cache_seqlens", row, min(expanded, case.topk))
            put("dsa_cu_seqlens_k", row + 1, clipped_sum)
            put("token_to_batch_idx", row, i)
            put("ks", row, ks)
            put("topk_indices_offset", row, ks)
            put("ke", row, ks + expanded)
            if out.get("positions") is not None:
                out["positions"][row] = kv - q + j
            if case.op in ("verify", "draft_extend") and exists:
                page_rows(row)
            row += 1
        if case.flattened is not None:
            n = min(max(seq, 0), tokens.size(1), max(case.flattened - joined, 0))
            if exists:
                out["page_table_1_flattened"][joined : joined + n] = tokens[pool, :n]
            joined += max(seq, 0)
    for padding in range(row, case.pad_to or 0):
        put("dsa_cache_seqlens", padding, 0)
        put("dsa_cu_seqlens_k", padding + 1, clipped_sum)
    return built.allocations


def case(op: str, name: str, reason: str, seq: Any, extend: Any = (), **options: Any) -> FusedCase:
    return FusedCase(
        op,
        f"{op}_{name}",
        reason,
        tuple(int(n) for n in seq),
        tuple(int(n) for n in extend),
        **options,
    )


def lengths(bs: int, low: int, high: int, seed: int) -> list[int]:
    return [int(n) for n in np.random.default_rng(seed).integers(low, high, bs)]


_KV = [1, 7, 65, 513]
_WIDE: dict[str, Any] = {"width": 769, "topk": 64}

CASES: list[FusedCase] = [
    *(
        case(op, f"basic_ps{page_size}{'' if len(tables) == 2 else '_pages_only'}",
             "short, page-crossing and long requests, columns left over",
             _KV, extend, next_n=next_n, page_size=page_size, tables=tables, static=static, **_WIDE)
        for op, extend, next_n, static in (
            ("decode", (), 1, False), ("verify", (), 4, False), ("draft_extend", (1, 3, 2, 5), 1, False),
            ("extend", (1, 3, 2, 5), 1, False),
        )
        for page_size in (1, 64)
        for tables in (TABLES, ("real_page_table",))
    ),
    case("draft_extend", "static", "equal lengths, promised", _KV, (3, 3, 3, 3), static=True, **_WIDE),
    case("draft_extend", "static_not_promised", "the same without the promise", _KV, (3, 3, 3, 3), **_WIDE),
    case("draft_extend", "static_uneven_total", "a promise that cannot hold", _KV,
         (3, 2, 3, 3), static=True, **_WIDE),
    case("draft_extend", "static_broken", "a promise that could hold and does not", _KV,
         (3, 2, 4, 3), static=True, **_WIDE),
    *(
        case("draft_extend", f"static_total_{total_len}", "equal lengths of another total: status 4", _KV,
             (3, 3, 3, 3), static=True, total_len=total_len, status=4, **_WIDE)
        for total_len in (8, 16)
    ),
    *(
        case(op, "empty", "bs 0: element 0 of the cu arrays and nothing else", [])
        for op in ("decode", "verify", "draft_extend", "extend")
    ),
    case("extend", "empty_padded", "bs 0 on a rank that has to keep up with others", [], pad_to=5),
    case("draft_extend", "no_rows", "T 0: the [bs] arrays are written", [7, 8, 9], (0, 0, 0)),
    case("extend", "no_rows", "T 0: the [bs] arrays and the page tables are written", [7, 8, 9], (0, 0, 0)),
    case("extend", "no_rows_padded", "T 0, padded", [7, 8, 9], (0, 0, 0), pad_to=4),
    case("extend", "contract", "the example of the contract", [10, 4], (3, 2), flattened=14),
    case("extend", "padded", "pad_to behind T", [10, 4], (3, 2), pad_to=9, topk=6),
    case("extend", "padded_none", "pad_to == T", [10, 4], (3, 2), pad_to=5),
    case("extend", "padded_mismatch", "status 4: padding begins at T", [10, 4], (3, 2), total_len=6,
         pad_to=9, status=4),
    case("extend", "padded_cut", "status 4: padding begins at total_len, inside a request", [10, 40, 9],
         (3, 7, 4), total_len=6, pad_to=11, status=4),
    case("extend", "padded_cut_between", "status 4: the rows end between requests", [10, 40, 9],
         (3, 0, 4), total_len=3, pad_to=11, status=4),
    case("extend", "flattened_unaligned", "requests begin at any column of the flattened table",
         [5, 0, 130, 64, 3], (1, 0, 1, 2, 3), width=40, token_width=150, flattened=202),
    case("extend", "flattened_over_width", "kv over the table: the tail keeps its bytes", [50, 9], (1, 1),
         width=30, token_width=40, flattened=59),
    case("extend", "flattened_short", "status 1: the buffer ends inside a request", [50, 40, 9], (1, 1, 1),
         flattened=70, status=1, width=64),
    case("extend", "flattened_only", "no page table, no 1-D output but one", [50, 40], (1, 1), tables=(),
         flattened=95, outputs=("cache_seqlens",)),
    case("extend", "arrays_only", "no table at all", [500, 40], (70, 3), tables=()),
    case("extend", "one_output", "a single output", [500, 40], (70, 3), tables=(), outputs=("ke",)),
    case("extend", "long", "several row blocks over one request", [9000], (1500,), tables=(), topk=8000),
    case("extend", "zero_runs", "zero-length requests everywhere", [9, 8, 40, 1, 2, 30, 7],
         (0, 0, 4, 0, 0, 5, 0), flattened=97),
    case("draft_extend", "zero_runs", "zero-length requests everywhere", [9, 8, 40, 1, 2, 30, 7],
         (0, 0, 4, 0, 0, 5, 0)),
    case("verify", "padding_rows", "CUDA-graph padding: seq 1, row 0 of the pool", [100, 1, 1], next_n=4,
         pool=(2, 0, 0), width=128),
    case("draft_extend", "padding_rows", "CUDA-graph padding: seq 1, extend N, row 0 of the pool",
         [100, 1, 1], (4, 4, 4), pool=(2, 0, 0), width=128, topk=99),
    case("decode", "over_width", "kv over W: 1-D arrays keep it, the table is cut", [1000, 63, 64, 65],
         width=64, topk=70),
    case("verify", "over_width", "the N tokens pass W", [62, 61, 60], next_n=3, width=64, page_size=16),
    case("extend", "over_width", "the same by the general kernel", [1000, 63, 64, 65], (1, 2, 3, 4), width=64),
    case("decode", "width_zero", "no column at all", [5, 6], width=0),
    case("decode", "width_one", "one column", [5, 0, 1], width=1),
    case("decode", "unaligned", "outputs off 16-byte boundaries: scalar copies", [70, 300, 5], offset=1,
         width=300),
    case("extend", "unaligned", "the same by the general kernel", [70, 300, 5], (1, 1, 1), offset=1, width=300),
    case("decode", "aligned", "16-byte copies, row tails of 0 to 3 columns", [70, 301, 6, 303, 100],
         width=304, token_width=304, table_gap=4),
    case("verify", "aligned", "16-byte copies, each row 3 times", [70, 301, 5, 1100], width=1024,
         next_n=3, token_width=1024, table_gap=0, page_size=4),
    *(
        case(op, name, reason, [2500, 129, 4000, 384, 1, 128], extend, next_n=next_n, width=2500,
             token_width=2500, table_gap=gap, page_size=2)
        for op, extend, next_n in (
            ("decode", (), 1), ("verify", (), 3), ("draft_extend", (5, 1, 0, 3, 2, 8), 1))
        for name, gap, reason in (
            ("wide", 0, "chunks of a row by warps of several blocks in turn"),
            ("wide_unaligned", 1, "the same token by token"))
    ),
    case("decode", "aligned_ps2", "two pages in 16 bytes", [70, 301], width=304, token_width=304,
         table_gap=4, page_size=2),
    case("verify", "rows_unaligned", "the first row is aligned, the second is not", [301, 77], width=304,
         token_width=304, table_gap=1, next_n=2),
    case("verify", "rows_unaligned_long", "the same by the general kernel", [301, 77], width=304,
         token_width=304, table_gap=1, next_n=9),
    case("decode", "two_tables_ps1", "page size 1 with tables of their own", [70, 30], page_size=1,
         width=80, tags=frozenset({"two_tables"})),
    case("decode", "ps256", "the largest page", [1000, 256, 257], page_size=256, width=1024),
    case("decode", "page_table_1_only", "without real_page_table", [70, 30], width=80,
         tables=("page_table_1",)),
    case("decode", "topk_one", "the smallest clamp", [5, 9, 0], topk=1),
    case("decode", "topk_huge", "topk beyond int32 clamps nothing", [5, 9], topk=2**40),
    case("decode", "sum_at_the_edge_of_a_warp", "lengths that fused_direct takes, a sum below 2^31",
         [2**26 - 1] * 32, tables=(), pool_rows=1, topk=2**31 - 1),
    case("decode", "sum_outside_by_a_warp", "such lengths, and a sum of two warps outside int32",
         [2**26 - 1] * 40, tables=(), pool_rows=1, topk=2**27, status=3),
    case("decode", "just_unusual", "a length that fused_direct leaves to the general way",
         [2**26, 5, 2**26 - 1], tables=(), pool_rows=1, topk=2**26 + 1),
    case("decode", "negative", "a negative length has no columns and counts 0 in rows", [5, -7, 9]),
    case("verify", "negative", "rows are clamped at 0", [5, -2, -9], next_n=4),
    case("draft_extend", "kv_below_extend", "rows are clamped at 0", [3, 5, -4], (8, 8, 2)),
    case("draft_extend", "kv_in_extend", "the same without an unusual length", [3, 5, 4], (8, 8, 2)),
    case("extend", "kv_below_extend", "rows are clamped at 0", [3, 5, -4], (8, 8, 2)),
    case("draft_extend", "topk_inside", "the series meets topk inside a request", [50, 2100], (20, 90),
         topk=45),
    case("draft_extend", "topk_inside_short", "the same with the rows of a speculative step", [50, 2100, 46],
         (8, 3, 2), topk=45),
    case("decode", "outside_pool", "status 5: no table row, 1-D arrays as ever", [5, 6, 7, 8],
         pool=(1, -1, 7, 2**40), pool_rows=7, status=5),
    case("extend", "outside_pool", "status 5 by the general kernel", [5, 6, 7, 8], (1, 1, 1, 1),
         pool=(1, -1, 7, 2**40), pool_rows=7, status=5),
    case("draft_extend", "outside_pool", "status 5", [5, 6, 7], (2, 1, 3), pool=(1, 6, -(2**31)),
         pool_rows=6, status=5),
    case("decode", "empty_pool", "status 5: a pool without rows", [5], pool=(0,), pool_rows=0, status=5),
    case("draft_extend", "total_short", "status 4: rows past total_len are dropped", [50, 60, 70],
         (3, 5, 4), total_len=6, status=4),
    case("draft_extend", "total_short_long", "the same by the general kernel", [50, 60, 70],
         (3, 15, 4), total_len=6, status=4),
    case("draft_extend", "total_short_boundary", "status 4: cut between two requests", [50, 60, 70],
         (3, 5, 4), total_len=8, status=4),
    case("draft_extend", "total_long", "status 4: rows at and past T keep their bytes", [50, 60, 70],
         (3, 5, 4), total_len=15, status=4),
    case("draft_extend", "total_zero", "status 4: no row at all", [50, 60], (3, 5), total_len=0, status=4),
    case("draft_extend", "extend_huge", "status 4: sums of hostile lengths stay in bounds", [50, 60, 70],
         (3, INT32_MAX, INT32_MAX), total_len=7, status=4),
    case("draft_extend", "extend_outside", "lengths outside int32 are cut", [50, 60, 70],
         (3, 2**40, -(2**40)), total_len=7, status=4, dtypes=("int64", "int64", "int64")),
    case("draft_extend", "extend_negative", "status 2: counts as 0", [50, 60, 70], (3, -5, 4), total_len=7,
         status=2),
    case("decode", "seq_outside", "status 3: a length outside int32 is cut", [5, 2**31, -(2**35)],
         status=3),
    case("decode", "sum_outside", "status 3: the sum is cut, not wrapped",
         [2**30, 2**30, 7, -(2**30)], status=3),
    case("verify", "sum_outside", "status 3: kv + N passes int32", [INT32_MAX - 1, 3], next_n=4, status=3),
    case("extend", "sum_outside", "status 3: ks and ke are cut", [INT32_MAX, 5, 9], (2, 1, 2), status=3,
         topk=INT32_MAX),
    case("extend", "topk_sum_outside", "status 3: the sum over rows is cut", [2**30] * 3, (2, 1, 2),
         topk=2**30, status=3, pad_to=8),
    case("extend", "sum_at_the_edge", "sums of exactly 2^31 - 1", [INT32_MAX - 3, 3], (1, 1),
         topk=INT32_MAX),
    # The general kernel counts in 32 bits where lengths are below 2^26 and their sums below 2^31.
    case("extend", "small_at_the_edge", "the largest lengths that are small, their sums just so", [2**26 - 1] * 32,
         (1,) * 32, topk=INT32_MAX, tables=()),
    case("extend", "small_beyond", "lengths that are not small, their sum 2^32", [2**27] * 32, (1,) * 32,
         topk=INT32_MAX, tables=(), status=3),
    case("extend", "small_sum_of_warps", "small lengths, their sum over warps beyond 2^32", [2**26 - 1] * 66,
         (1, 2, 0) * 22, tables=(), status=3),
    case("extend", "small_sum_of_tiles", "small lengths, a tile that fits, a sum over tiles that does not",
         [2**22] * 600, (2, 1, 0) * 200, topk=2**21, tables=(), status=3),
    case("extend", "small_clipped_sum", "small lengths, the sum of clipped rows alone beyond 2^32",
         [2**24] * 87, (3,) * 87, topk=2**24, tables=(), status=3),
    case("extend", "small_clipped_request", "two requests whose sums of clipped rows are outside int32",
         [2**24, 40, 2**24], (140, 3, 140), topk=2**24, tables=(), status=3),
    case("extend", "small_negative", "the longest negative lengths, their sum -2^32", [50, -(2**31), -(2**31), 30],
         (3, 2, 0, 4), tables=(), status=3),
    case("extend", "small_padding", "KV lengths below their extend lengths", [50, 1, 30, 2] * 70, (3, 4, 0, 5) * 70,
         topk=40, tables=(), pad_to=900),
    case("extend", "small_long", "rows by the thousand", [9000, 12, 70_000], (5000, 12, 700), topk=2048, tables=()),
    *(
        case(op, f"dtypes_{number}", "int32 and int64 inputs, strided", _KV, extend, next_n=next_n,
             dtypes=dtypes, stride=stride, **_WIDE)
        for op, extend, next_n in (("verify", (), 2), ("draft_extend", (1, 3, 2, 5), 1))
        for number, (dtypes, stride) in enumerate(
            ((("int32", "int64", "int32"), 1), (("int64", "int64", "int64"), 3),
             (("int32", "int32", "int32"), 2)))
    ),
    case("decode", "stride_zero", "expanded tensors", [9, 9, 9], pool=(2, 2, 2), stride=0),
    *(
        case(op, f"bs_{bs}", reason, lengths(bs, 0, 5000, bs), extend, next_n=next_n, tables=(),
             pool_rows=1, topk=900)
        for bs, reason in {32: "a full warp", 33: "a warp and one", 256: "one tile of requests",
                           257: "a second tile with one request", 600: "a third tile"}.items()
        for op, extend, next_n in (
            ("decode", (), 1), ("verify", (), 3), ("draft_extend", lengths(bs, 0, 6, bs + 1), 1),
            ("extend", lengths(bs, 0, 20, bs + 2), 1))
    ),
    case("draft_extend", "tables_bs_40", "the sum before a table row passes a warp", lengths(40, 0, 70, 3),
         lengths(40, 0, 4, 4), width=64),
    case("draft_extend", "tables_bs_40_long", "the same by the general kernel", lengths(40, 0, 70, 3),
         (9, *lengths(39, 0, 4, 4)), width=64),
]  # fmt: skip

BY_NAME = {item.name: item for item in CASES}
assert len(BY_NAME) == len(CASES), "case names are unique"

#: For the GPU: too large for one thread per CUDA thread, and for one line per token.
LARGE_CASES: list[FusedCase] = [
    *(
        case(op, f"bs_{bs}", reason, lengths(bs, 0, 200, bs), extend, next_n=next_n, width=128,
             topk=64)
        for bs, reason in {1024: "several tiles with tables", 16384: "last batch in one launch",
                           16385: "first batch in two launches"}.items()
        for op, extend, next_n in (
            ("decode", (), 1), ("verify", (), 2), ("draft_extend", lengths(bs, 0, 3, bs + 1), 1),
            ("extend", lengths(bs, 0, 5, bs + 2), 1))
    ),
    case("extend", "flattened_bs_16385", "sums over tiles for the flattened table",
         lengths(16385, 0, 60, 5), lengths(16385, 0, 3, 6), flattened=16385 * 30 + 1000),
    case("decode", "kv_million", "1M context", [1_000_000, 999_999, 17], width=1_000_000),
    case("verify", "kv_million", "1M context, pages only", [1_000_000, 999_990, 17], next_n=4,
         width=1_000_004, tables=("real_page_table",)),
    case("decode", "width_1000003", "an odd width: rows are not aligned", [1_000_003, 1, 600_000],
         width=1_000_003, token_width=1_000_003, table_gap=0),
    case("draft_extend", "long_rows", "several blocks along a row, uneven rows",
         lengths(64, 1, 33_000, 8), lengths(64, 0, 6, 9), width=32_768, token_width=32_832,
         table_gap=0),
    case("extend", "prefill", "16,384 rows over 64 requests", lengths(64, 256, 9000, 10), [256] * 64,
         width=8192, flattened=64 * 9000),
]  # fmt: skip


def random_cases(
    op: str, count: int, seed: int, max_bs: int = 300, max_width: int = 700
) -> list[FusedCase]:
    """Random batches of every shape that the named cases do not think of."""
    rng = np.random.default_rng(seed)
    items = []
    for number in range(count):
        bs = int(rng.choice([rng.integers(0, 9), rng.integers(1, max_bs)]))
        width = int(rng.integers(0, max_width))
        page_size = int(rng.choice([1, 2, 4, 16, 64, 256]))
        tables = [TABLES, ("real_page_table",), ("page_table_1",), ()][rng.integers(0, 4)]
        seq = rng.integers(-3, max(width + 40, 50), bs)
        extend = (
            rng.integers(0, int(rng.choice([2, 6, 40])), bs)
            if op in ("draft_extend", "extend")
            else ()
        )
        item = case(
            op,
            f"random_{seed}_{number}",
            "random",
            seq,
            extend,
            next_n=int(rng.integers(1, 6)) if op == "verify" else 1,
            topk=int(rng.choice([1, 20, 64, 2048])),
            page_size=page_size,
            width=width,
            token_width=width + int(rng.choice([0, 1, 4, 7])),
            table_gap=int(rng.choice([0, 1, 4])),
            tables=tables,
            mqa=bool(rng.integers(0, 2)),
            slack=int(rng.choice([0, 1, 9])),
            dtypes=tuple(str(rng.choice(list(DTYPES))) for _ in range(3)),
            stride=int(rng.choice([1, 1, 3])),
            offset=int(rng.choice([0, 0, 1, 2])),
        )
        if op == "draft_extend" and rng.random() < 0.3:
            item = dataclasses.replace(item, extend=(int(rng.integers(0, 6)),) * bs, static=True)
        if op == "extend":
            total = item.rows
            item = dataclasses.replace(
                item,
                pad_to=None if rng.random() < 0.5 else total + int(rng.integers(0, 300)),
                flattened=None if rng.random() < 0.5 else int(sum(max(n, 0) for n in item.seq)),
                outputs=tuple(n for n in FusedCase.outputs if rng.random() < 0.8),
            )
        if op in ("draft_extend", "extend") and rng.random() < 0.2 and item.rows:
            cut = int(rng.integers(0, item.rows + 1))
            pad_to = None if item.pad_to is None else max(item.pad_to, cut)
            item = dataclasses.replace(item, total_len=cut, pad_to=pad_to)
        items.append(item)
    return items


def shuffled(item: FusedCase, seed: int) -> FusedCase:
    """The same sizes with other lengths: KV lengths drawn anew, extend lengths and requests permuted."""
    rng = np.random.default_rng(seed)
    return dataclasses.replace(
        item,
        seq=tuple(int(n) for n in rng.integers(0, item.width + 20, item.bs)),
        extend=tuple(int(n) for n in rng.permutation(item.extend)),
        pool=tuple(int(n) for n in rng.permutation(item.bs + 3)[: item.bs]),
    )
