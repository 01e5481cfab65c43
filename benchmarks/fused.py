"""Batches of the fused family for ``measure.Contest``: changing lengths, buffers, the check.

The KV lengths are ``cache_seqlens``, so those after the step. Two kinds of them:

    half    uniform from W / 2 to W
    1024    1024 tokens each, whatever W is

What is right is said by the reference: the public function on a second set of buffers, where
``CUPY_NSA_META_BACKEND=python`` makes it plain torch, on the GPU too. Both sets are poisoned
before, and no right value is negative, so that an element of the second set that still holds the
sentinel is one that nobody may write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

import cupy_nsa_meta

from . import measure
from .draft_extend import MAX_EXTEND, SENTINEL

#: op of a stored row -> function; the plan's has ``plan_`` in front
FUNCTIONS = {
    "decode": "fused_dsa_decode_metadata",
    "target_verify": "fused_dsa_target_verify_metadata",
    "draft_extend_fused": "fused_dsa_draft_extend_metadata",
    "extend": "fused_dsa_extend_metadata",
}
HALF, SHORT = "half", "1024"
KV = (HALF, SHORT)
PAGE_SIZE = 64
NEXT_N = 4
EXTEND_ROWS = (8192, 16384)  # T of a prefill step
EXTEND_WIDTH = 32768  # bounds its KV lengths: half of it holds the longest extend length
MAX_BS = 1024
TOKEN_ROWS = MAX_BS + 1  # of req_to_token; row 0 is the padding row
TABLE_GAP = 64  # columns behind W
POOL = 16  # batches of a case
GUARD = 4  # elements behind each output, at least

#: 1-D outputs; what their sizes follow from: requests, rows; one more for running sums
REQUESTS, ROWS = "requests", "rows"
_COMMON: dict[str, tuple[str, int]] = {
    "cache_seqlens": (REQUESTS, 0),
    "cu_seqlens_k": (REQUESTS, 1),
    "dsa_cache_seqlens": (ROWS, 0),
    "dsa_cu_seqlens_k": (ROWS, 1),
}
_EXPANDED = {**_COMMON, "seqlens_expanded": (ROWS, 0)}
_EXTEND = {
    **_EXPANDED,
    "cu_seqlens_q": (REQUESTS, 1),
    "extend_start_loc": (REQUESTS, 0),
    "token_to_batch_idx": (ROWS, 0),
    "ks": (ROWS, 0),
    "ke": (ROWS, 0),
    "topk_indices_offset": (ROWS, 0),
    "positions": (ROWS, 0),
}
OUTPUTS = {
    "decode": _COMMON,
    "target_verify": _EXPANDED,
    "draft_extend_fused": _EXPANDED,
    "extend": _EXTEND,
}
POSITIONS = "positions"  # int64

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shape:
    """What is measured: an operation, sizes, kinds of lengths."""

    op: str
    bs: int
    width: int = EXTEND_WIDTH  # W
    page_table_1: bool = False
    kv: str = HALF
    seed: int = 0

    @property
    def has_tables(self) -> bool:
        return self.op != "extend"

    @property
    def max_rows(self) -> int:
        """Rows that the outputs have to hold."""
        if self.op == "extend":
            return EXTEND_ROWS[1]
        return self.bs * {"decode": 1, "target_verify": NEXT_N}.get(self.op, MAX_EXTEND)

    @property
    def bytes_needed(self) -> int:
        """Device memory of the case, its check and a copy of the same bytes."""
        tokens = TOKEN_ROWS * (self.width + TABLE_GAP) * 4 if self.has_tables else 0
        # Both sets of buffers, the reference's intermediates, the copy; or a 64th of that.
        tables = 8 if self.page_table_1 else 8 / PAGE_SIZE
        return int(tokens + tables * self.max_rows * (self.width + TABLE_GAP) * 4) + (1 << 26)


# ---- Lengths ------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Lengths of one call, on the device and on the host."""

    seq: torch.Tensor  # int64 [bs]
    extend: torch.Tensor  # int32 [bs]
    pool: torch.Tensor  # int64 [bs]
    total: int
    seqs: torch.Tensor  # on the host
    extends: list[int]
    moved_bytes: int  # that tables with page_table_1 cannot do without


def batches(
    shape: Shape, random: np.random.Generator, same_total: bool, device: torch.device
) -> list[Batch]:
    """POOL batches; with ``same_total`` all have as many rows, as a captured launch needs."""
    query = _query_tokens(shape, random, same_total)
    if shape.kv == HALF:
        kv = random.integers(shape.width // 2, shape.width + 1, query.shape)
    else:
        kv = np.full(query.shape, min(int(SHORT), shape.width))
    seqs = kv - NEXT_N if shape.op == "target_verify" else kv
    order = np.tile(np.arange(TOKEN_ROWS), (POOL, 1))
    pools = random.permuted(order, axis=1)[:, : shape.bs]
    rows = np.ones_like(query) if shape.op == "decode" else query
    pages = -(-kv // PAGE_SIZE)
    moved = 4 * (kv * (1 + rows) + pages * rows).sum(axis=1)
    parts = (seqs, query.astype(np.int32), pools)
    on_device = [torch.from_numpy(part).to(device).unbind() for part in parts]
    return [
        Batch(
            *(lengths[idx] for lengths in on_device),
            int(query[idx].sum()),
            torch.from_numpy(seqs[idx]),
            query[idx].tolist(),
            int(moved[idx]),
        )
        for idx in range(POOL)
    ]


def _query_tokens(shape: Shape, random: np.random.Generator, same_total: bool) -> IntArray:
    """Query tokens of each request, [POOL, bs]."""
    size = (POOL, shape.bs)
    if shape.op == "decode":
        return np.ones(size, dtype=np.int64)
    if shape.op == "target_verify":
        return np.full(size, NEXT_N)
    if shape.op == "draft_extend_fused":
        query = random.integers(1, MAX_EXTEND + 1, size)
        return random.permuted(np.tile(query[0], (POOL, 1)), axis=1) if same_total else query
    lowest, highest = EXTEND_ROWS
    totals = random.integers(lowest, highest + 1, POOL)
    if same_total:
        totals[:] = (lowest + highest) // 2
    return np.stack([1 + random.multinomial(n - shape.bs, _shares(shape, random)) for n in totals])


def _shares(shape: Shape, random: np.random.Generator) -> npt.NDArray[np.float64]:
    """Parts of a prefill step: short prompts and long ones."""
    return random.dirichlet(np.ones(shape.bs))


# ---- Buffers ------------------------------------------------------------------------------------


class Tables:
    """The tokens of one W, and room for the page tables of all of its cases."""

    def __init__(
        self, width: int, rows: int, page_table_1_rows: int, device: torch.device, seed: int
    ) -> None:
        random = torch.Generator(device).manual_seed(seed)
        columns = width + TABLE_GAP
        shape = (TOKEN_ROWS, columns)
        self.tokens = torch.randint(
            2**31 - 1, shape, generator=random, dtype=torch.int32, device=device
        )

        def two(rows: int, columns: int) -> list[torch.Tensor]:
            shape = (rows + 1, columns)  # a row behind, which nobody may write
            return [torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2)]

        self.page_table_1 = two(page_table_1_rows, columns)
        self.real_page_table = two(rows, columns // PAGE_SIZE)


def tables_of(shapes: list[Shape], device: torch.device) -> Tables:
    """Room for any of these shapes, which have one W."""
    rows = max(shape.max_rows for shape in shapes)
    wide = max((shape.max_rows for shape in shapes if shape.page_table_1), default=0)
    return Tables(shapes[0].width, rows, wide, device, shapes[0].seed)


class Outputs:
    """A set of output buffers: the views that are passed, and the blocks that hold them."""

    def __init__(self, shape: Shape, tables: Tables | None, idx: int, device: torch.device) -> None:
        counts = {REQUESTS: shape.bs, ROWS: shape.max_rows}
        sizes = {name: counts[of] + more for name, (of, more) in OUTPUTS[shape.op].items()}
        self.views: dict[str, torch.Tensor] = {}
        self.blocks: list[torch.Tensor] = []
        if POSITIONS in sizes:
            size = sizes.pop(POSITIONS)
            block = torch.empty(size + GUARD, dtype=torch.int64, device=device)
            self.blocks.append(block)
            self.views[POSITIONS] = block[:size]
        rooms = {name: -(-size // GUARD) * GUARD + GUARD for name, size in sizes.items()}
        block = torch.empty(sum(rooms.values()), dtype=torch.int32, device=device)
        self.blocks.append(block)
        parts = block.split(list(rooms.values()))  # each on a 16-byte boundary
        for (name, size), part in zip(sizes.items(), parts, strict=True):
            self.views[name] = part[:size]
        if tables is not None:
            for name, room, columns, wanted in (
                ("page_table_1", tables.page_table_1[idx], shape.width, shape.page_table_1),
                (
                    "real_page_table",
                    tables.real_page_table[idx],
                    -(-shape.width // PAGE_SIZE),
                    True,
                ),
            ):
                if wanted:
                    block = room[: shape.max_rows + 1]
                    self.blocks.append(block)
                    self.views[name] = block[:-1, :columns]

    def poison(self) -> None:
        for block in self.blocks:
            block.fill_(SENTINEL)


# ---- The case -----------------------------------------------------------------------------------


class FusedCase:
    """One shape; the lengths go round in a pool on the device."""

    def __init__(
        self, shape: Shape, topk: int, device: torch.device, tables: Tables | None = None
    ) -> None:
        self.shape = shape
        self.op = shape.op
        self.topk = topk
        self.device = device
        self.tables = tables
        key = [shape.seed, list(FUNCTIONS).index(shape.op), KV.index(shape.kv), shape.bs]
        random = np.random.default_rng([*key, shape.width])
        self._batches = batches(shape, random, False, device)
        self._same_total = batches(shape, random, True, device)
        self.labels = self._labels()
        self.name = f"{shape.op} {measure.describe(self.labels)}"
        self.seq, self.extend, self.pool = (
            torch.empty_like(lengths) for lengths in self._batches[0][:3]
        )
        self.out, self._expected = (Outputs(shape, tables, idx, device) for idx in range(2))
        self._current = -1
        self._expected_of: Batch | None = None
        self.advance()

    def _labels(self) -> dict[str, Any]:
        shape = self.shape
        labels: dict[str, Any] = {
            "bs": shape.bs,
            "width": shape.width,
            "page_table_1": shape.page_table_1,
            "kv": shape.kv,
        }
        if shape.op == "target_verify":
            labels["next_n"] = NEXT_N
        elif shape.op == "draft_extend_fused":
            labels["max_extend"] = MAX_EXTEND
        elif shape.op == "extend":
            labels["max_extend"] = max(max(batch.extends) for batch in self._batches)
        rows = int(np.median([batch.total for batch in self._batches]))
        return {**labels, "rows": rows, "seed": shape.seed}

    @property
    def batch(self) -> Batch:
        return self._batches[self._current]

    @property
    def total(self) -> int:
        return self.batch.total

    @property
    def moved_bytes(self) -> float:
        """Bytes of a call with page_table_1: live tokens read once, live table elements written."""
        return float(np.mean([batch.moved_bytes for batch in self._batches]))

    def advance(self) -> None:
        self._current = (self._current + 1) % len(self._batches)
        batch = self.batch
        self.seq.copy_(batch.seq)
        if self.has_extend:
            self.extend.copy_(batch.extend)
        if self.tables is not None:
            self.pool.copy_(batch.pool)

    def keep_total(self) -> None:
        """From here on other lengths of one total: a captured launch holds the one it was told."""
        self._batches = self._same_total
        self.advance()

    def wait(self) -> None:
        """Until the device is idle: part of what is timed, so without torch's change of devices,
        which costs as much as the wait."""
        if self.device.type == "cuda":
            torch._C._cuda_synchronize()

    # -- calls

    @property
    def has_extend(self) -> bool:
        return self.op in ("draft_extend_fused", "extend")

    def _arguments(self, outputs: Outputs) -> dict[str, Any]:
        """Of the function and of its plan; without the numbers that name a batch."""
        arguments: dict[str, Any] = {"seq_lens": self.seq, "dsa_index_topk": self.topk}
        if self.has_extend:
            arguments["extend_seq_lens"] = self.extend
        arguments |= outputs.views
        if self.tables is not None:
            arguments |= {
                "req_pool_indices": self.pool,
                "req_to_token": self.tables.tokens,
                "page_table_1": outputs.views.get("page_table_1"),
                "max_len" if self.op == "decode" else "max_seqlen_k": self.shape.width,
                "physical_page_size": PAGE_SIZE,
            }
        if self.op == "target_verify":
            arguments["next_n"] = NEXT_N
        elif self.op == "draft_extend_fused":
            arguments |= {"max_extend_len": MAX_EXTEND, "max_total_len": self.shape.max_rows}
        return arguments

    def call(self, function: Callable[..., object]) -> Callable[[int], object]:
        """A call with the same tensors every time."""
        return self._call(function, self._arguments_of_call(self.out))

    def call_on_views(
        self, function: Callable[..., object]
    ) -> tuple[Callable[[int], object], Callable[[], None]]:
        """The same call, and what puts new tensors of the same memory in the place of its tensors,
        as a server does that cuts ``seq_lens[:bs]`` at every step."""
        arguments = self._arguments_of_call(self.out)
        names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]

        def renew() -> None:
            for name in names:
                arguments[name] = arguments[name].view(arguments[name].shape)

        return self._call(function, arguments), renew

    def _arguments_of_call(self, outputs: Outputs) -> dict[str, Any]:
        """Those of the function; total_len is left to the call."""
        arguments = self._arguments(outputs)
        if self.op != "extend":
            arguments["bs"] = self.shape.bs
        return arguments

    def _call(
        self, function: Callable[..., object], arguments: dict[str, Any]
    ) -> Callable[[int], object]:
        """A call by keyword as SGLang calls, its line written out as there: to unpack a dict of 12
        to 17 arguments would take 0.4 us of everybody's time. ``arguments`` are the variables of
        that line, looked up at each call."""
        keywords = [f"{name}={name}" for name in arguments]
        if self.has_extend:
            keywords.append("total_len=total")
        arguments["function"] = function
        line = f"lambda total: function({', '.join(keywords)})"
        call: Callable[[int], object] = eval(line, arguments)
        return call

    def make_plan(self, make: Callable[..., Any]) -> Any:
        arguments = self._arguments(self.out)
        if self.op == "extend":
            arguments["max_total_len"] = self.shape.max_rows
        else:
            arguments["max_bs"] = self.shape.bs
        return make(**arguments)

    def plan(self, make: Callable[..., Any], tells_total: bool = True) -> Callable[[int], object]:
        """The launch of a plan of the case, which is told T or leaves it to the device."""
        launch, bs = self.make_plan(make).launch, self.shape.bs
        if self.has_extend and tells_total:
            return lambda total: launch(bs, total)
        return lambda total: launch(bs)

    # -- the check

    def poison(self, outputs: tuple[torch.Tensor, ...] | None = None) -> None:
        if outputs is None:
            self.out.poison()
        for output in outputs or ():
            output.fill_(SENTINEL)

    def difference(
        self,
        total: object,
        outputs: tuple[torch.Tensor, ...] | None = None,
        poisoned: bool = True,
    ) -> str | None:
        if type(total) is not int or total != self.total:
            return f"returned total: expected {self.total}, got {total!r}"
        inputs = {"seq_lens": (self.seq, self.batch.seq)}
        if self.has_extend:
            inputs["extend_seq_lens"] = (self.extend, self.batch.extend)
        if self.tables is not None:
            inputs["req_pool_indices"] = (self.pool, self.batch.pool)
        for name, (tensor, held) in inputs.items():
            if not torch.equal(tensor, held):
                return f"{name}, an input: expected no write"
        self._compute_expected()
        if outputs is not None:
            named = dict(zip(OUTPUTS[self.op], outputs, strict=True))
            return _first_fault(named, self._expected.views, everywhere=False)
        blocks = zip(self.out.blocks, self._expected.blocks, strict=True)
        if all(_agree(got, expected, poisoned) for got, expected in blocks):
            return None
        fault = _first_fault(self.out.views, self._expected.views, poisoned)
        return fault or "expected no write behind the outputs"

    def _compute_expected(self) -> None:
        batch = self.batch
        if self._expected_of is batch:
            return
        self._expected.poison()
        function = getattr(cupy_nsa_meta, FUNCTIONS[self.op])
        with measure.environment({"CUPY_NSA_META_BACKEND": "python"}):
            self._call(function, self._arguments_of_call(self._expected))(batch.total)
        self._expected_of = batch


def _agree(got: torch.Tensor, expected: torch.Tensor, everywhere: bool) -> bool:
    """Whether two blocks are equal, everywhere or where something is to be written."""
    if everywhere:
        return torch.equal(got, expected)
    return bool(((got == expected) | (expected == SENTINEL)).all())


def _first_fault(
    outputs: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], everywhere: bool
) -> str | None:
    """The first element that is wrong; ``outputs`` may be shorter than the buffers expected."""
    for name, got in outputs.items():
        rows = expected[name]
        if got.dtype is not rows.dtype:
            return f"{name}: expected {rows.dtype}, got {got.dtype}"
        if len(got) > len(rows) or bool((rows[len(got) :] != SENTINEL).any()):
            live = int((rows != SENTINEL).sum())
            return f"{name}: expected {live} elements, got {len(got)}"
        rows = rows[: len(got)]
        wrong = got != rows
        if not everywhere:
            wrong &= rows != SENTINEL
        if not bool(wrong.any()):
            continue
        place = np.unravel_index(int(wrong.to(torch.uint8).argmax()), tuple(wrong.shape))
        at = tuple(int(idx) for idx in place)
        value = int(rows[at])
        text = "no write" if value == SENTINEL else str(value)
        return f"{name}[{', '.join(map(str, at))}]: expected {text}, got {int(got[at])}"
    return None


def plan_maker(op: str) -> Callable[..., Any]:
    maker: Callable[..., Any] = getattr(cupy_nsa_meta, f"plan_{FUNCTIONS[op]}")
    return maker
