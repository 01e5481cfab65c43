"""One list of named batches, each with its reason, for every backend and every way of running it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from cupy_nsa_meta import reference
from cupy_nsa_meta._status import FATAL, INT32_MAX

POISON = -1234567  # no length is negative, so no row equals it
DTYPES = {"int32": torch.int32, "int64": torch.int64}
#: Quad mode begins at a million rows; where rows are slow, it is shown with fewer.
QUADS_MIN_ROWS = 20_000


@dataclass(frozen=True)
class Case:
    """A batch, its buffers, and nothing about how it is run."""

    name: str
    reason: str
    extend: np.ndarray
    seq: np.ndarray
    topk: int = 2048
    slack: int = 37  # rows of the out buffers behind T (negative: too few)
    total_tokens: int | None = None
    dtypes: tuple[str, str] = ("int32", "int64")  # extend, seq: as upstream hands them
    stride: int = 1
    offsets: tuple[int, int] = (0, 0)  # elements between the start of an allocation and an out

    @property
    def bs(self) -> int:
        return len(self.extend)

    @property
    def total(self) -> int:
        """T as a plain integer sum, whatever it is."""
        return sum(int(q) for q in self.extend)

    @property
    def capacity(self) -> int:
        """Elements of the out buffers; batches that may write nothing do not get memory for T rows."""
        writable = self.total if self.total <= INT32_MAX else 0
        return max(0, writable + self.slack)

    def lengths(self, device: str | torch.device = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """extend_seq_lens and seq_lens with the case's dtypes and stride."""
        return (
            strided(self.extend, self.dtypes[0], self.stride, device),
            strided(self.seq, self.dtypes[1], self.stride, device),
        )

    def expected(self) -> Expected:
        """Outcome by the reference, on the CPU."""
        extend, seq = (torch.from_numpy(a.astype(np.int64)) for a in (self.extend, self.seq))
        total, status = reference.draft_extend_total(
            extend, seq, capacity=self.capacity, total_tokens=self.total_tokens
        ).tolist()
        if status in FATAL:
            none = torch.empty(0, dtype=torch.int32)
            return Expected(total, status, none, none)
        rows = total if self.total_tokens is None else min(total, self.total_tokens)
        expanded, clamped = reference.draft_extend(extend, seq, self.topk)
        return Expected(total, status, expanded[:rows], clamped[:rows])


@dataclass(frozen=True)
class Expected:
    total: int
    status: int
    expanded: torch.Tensor  # the rows that are written, from row 0
    clamped: torch.Tensor


def strided(
    values: np.ndarray, dtype: str, stride: int, device: str | torch.device
) -> torch.Tensor:
    """`values` as a 1-D tensor with the given stride; what lies between the elements is not 0."""
    if stride == 0:
        return torch.full((1,), int(values[0]), dtype=DTYPES[dtype], device=device).expand(
            len(values)
        )
    spread = torch.full((len(values), stride), -99, dtype=DTYPES[dtype])
    spread[:, 0] = torch.from_numpy(values.astype(dtype))
    return spread.to(device)[:, 0]


class Outputs:
    """Two out buffers inside poisoned allocations, and the check of every element of both."""

    GUARD = 16  # elements behind each buffer

    def __init__(self, case: Case, device: str | torch.device = "cpu") -> None:
        self.case = case
        self.allocations = [
            torch.full(
                (case.capacity + offset + self.GUARD,), POISON, dtype=torch.int32, device=device
            )
            for offset in case.offsets
        ]
        self.expanded, self.clamped = (
            allocation[offset : offset + case.capacity]
            for allocation, offset in zip(self.allocations, case.offsets, strict=True)
        )

    def poison(self) -> None:
        for allocation in self.allocations:
            allocation.fill_(POISON)

    def check(self, expected: Expected) -> None:
        for allocation, offset, rows in zip(
            self.allocations,
            self.case.offsets,
            (expected.expanded, expected.clamped),
            strict=True,
        ):
            wanted = torch.full(allocation.shape, POISON, dtype=torch.int32)
            wanted[offset : offset + len(rows)] = rows
            got = allocation.cpu()
            if not torch.equal(got, wanted):
                wrong = torch.nonzero(got != wanted).flatten().tolist()
                at = wrong[0]
                raise AssertionError(
                    f"{self.case.name}: {len(wrong)} elements differ, first at row {at - offset}: "
                    f"expected {int(wanted[at])}, got {int(got[at])}"
                )


def case(name: str, reason: str, extend: object, seq: object, **options: object) -> Case:
    return Case(
        name,
        reason,
        np.asarray(extend, dtype=np.int64).reshape(-1),
        np.asarray(seq, dtype=np.int64).reshape(-1),
        **options,  # type: ignore[arg-type]
    )


def random_case(
    name: str, reason: str, bs: int, max_extend: int, seed: int, **options: object
) -> Case:
    """Extend lengths 0..max_extend, a sixth of them 0; KV lengths from below the extend to 9,000."""
    rng = np.random.default_rng(seed)
    extend = rng.integers(0, max_extend + 1, bs) * (rng.random(bs) > 1 / 6)
    seq = np.maximum(extend + rng.integers(-3, 9000, bs), 0)
    return case(name, reason, extend, seq, **options)


def _zeros(bs: int, *ones: int) -> np.ndarray:
    extend = np.zeros(bs, dtype=np.int64)
    extend[list(ones)] = 3
    return extend


def _nines(bs: int, at: int = 0, *values: int) -> np.ndarray:
    """``values`` from ``at`` on, the rest 9."""
    lengths = np.full(bs, 9, dtype=np.int64)
    lengths[at : at + len(values)] = values
    return lengths


_EDGE_SIZES = {
    1: "one request",
    2: "smallest batch with a boundary",
    15: "below the linear-search limit",
    16: "last batch with linear search",
    17: "first batch with binary search",
    31: "a warp less one",
    32: "a full warp",
    33: "a warp and one",
    127: "below a shifted Blelloch scan's trap",
    128: "the Blelloch trap: totals off by one request",
    129: "above the Blelloch trap",
    255: "a block less one",
    256: "one request per thread",
    257: "first batch with several entries per thread",
    1023: "below the 1024-thread trap",
    1024: "more threads per block would fail to launch",
    1025: "above the 1024-thread trap",
    4096: "every entry of the shared prefix is one request",
    4097: "first batch with grouped entries, the last one partly filled",
    16384: "last batch in one launch",
    16385: "first batch in two launches",
}

CASES: list[Case] = [
    case("empty", "no request at all", [], []),
    case("one_row", "smallest result", [1], [1]),
    case("ends_meet", "kv == extend: the expansion starts at 1", [5], [5]),
    case("contract", "hand-checked in test_reference", [3, 2], [10, 4]),
    case("all_zero", "T == 0: nothing is written", [0, 0, 0], [7, 8, 9]),
    case("zero_front", "zero-length requests first", [0, 0, 4, 2], [9, 9, 9, 9]),
    case("zero_middle", "zero-length requests between", [4, 0, 0, 0, 2], [9, 1, 2, 3, 9]),
    case("zero_end", "zero-length requests last", [4, 2, 0, 0], [9, 9, 9, 9]),
    case("zero_runs", "long runs of zeros inside one quad of rows", _zeros(4096, 0, 2000, 4095),
         np.arange(4096) + 5),
    case("zero_runs_grouped", "the same over grouped entries", _zeros(16384, 1, 9001, 16383),
         np.arange(16384) + 5),
    case("zero_runs_tiled", "the same over tiles", _zeros(20000, 300, 19999), np.arange(20000) + 5),
    case("padding_rows", "CUDA-graph padding: seq 1, extend N, the raw value is negative",
         [4, 4, 4, 4], [100, 1, 1, 1], topk=64),
    case("kv_below_extend", "fewer KV tokens than query tokens", [8, 8], [3, 5]),
    case("kv_negative", "a negative seq_lens counts as 0", [3, 4, 2], [-5, -(2**31), 9]),
    case("topk_one", "the smallest clamp", [6, 6], [8, 3], topk=1),
    case("topk_edge", "lengths around topk", [5], [2050], topk=2048),
    case("topk_4096", "the larger model's topk", [600, 7], [4300, 5000], topk=4096),
    case("topk_huge", "topk beyond int32 clamps nothing", [3], [9], topk=2**40),
    case("kv_int32_max", "the largest KV length", [4, 2], [INT32_MAX, INT32_MAX], topk=INT32_MAX),
    case("kv_million", "1M context", [5, 3, 2], [1_000_000, 999_999, 17]),
    case("one_long", "one request over many tiles of rows", [5000], [8192]),
    case("long_and_short", "tile boundaries inside and between requests",
         [1023, 1, 1024, 3, 1025, 2, 1, 1], [5000, 1, 1024, 9, 9999, 2, 4, 1]),
    case("tile_exact", "T is a whole tile", [1024], [1024]),
    case("tile_plus_one", "one row in the last tile", [1025], [2000]),
    case("quad_tails", "T not a multiple of four", [1, 1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6, 7]),
    case("quads_warp", "enough rows for 16-byte stores, up to 32 requests",
         [9000, 0, 1, 2, 3, 23000, 5, 7001], [9500, 4, 1, 7, 3, 22990, 100, 7002]),
    case("quads_warp_binary", "the same with binary search", [1] * 12 + [9001, 0, 2, 3, 24000, 5],
         [7] * 12 + [9500, 4, 9, 3, 22990, 100]),
    case("quads_block", "the same in shared memory",
         [9000, 0, 1, 2, 3, 23000, 5, 7001] + [0, 3, 1] * 20, np.arange(68) * 311),
    case("quads_exact", "the last quad is cut, and the buffers end there",
         [9001, 0, 1, 2, 3, 23000, 5, 7001], [9500, 4, 1, 7, 3, 22990, 100, 7002], slack=0),
    case("quads_unaligned", "quad mode with outs that no 16-byte store may touch",
         [9001, 0, 1, 2, 3, 23000, 5, 7001], [9500, 4, 1, 7, 3, 22990, 100, 7002], offsets=(1, 3),
         slack=0),
    case("int32_int32", "both inputs int32", [3, 0, 5], [7, 8, 9], dtypes=("int32", "int32")),
    case("int64_int32", "types swapped", [3, 0, 5], [7, 8, 9], dtypes=("int64", "int32")),
    case("int64_int64", "both inputs int64", [3, 0, 5], [7, 8, 9], dtypes=("int64", "int64")),
    random_case("strided", "inputs are columns of a wider tensor", 100, 5, 1, stride=3),
    random_case("strided_wide", "rows of a pool, int64", 300, 5, 2, stride=65, dtypes=("int64", "int64")),
    case("stride_zero", "expanded tensors", [4] * 9, [77] * 9, stride=0),
    random_case("unaligned", "outs 4 and 8 bytes off a 16-byte boundary", 40, 9, 3, offsets=(1, 2)),
    random_case("unaligned_one", "one out unaligned", 40, 9, 4, offsets=(0, 3)),
    case("no_slack", "capacity is T: the last store ends at the buffer's end", [7, 6, 4], [9, 9, 9],
         slack=0),
    case("over_capacity", "status 1: nothing is written", [7, 6], [9, 9], slack=-1),
    case("over_capacity_zero", "status 1 without any room", [2], [9], slack=-2),
    case("negative_extend", "status 2", [3, -1, 2], [9, 9, 9]),
    case("negative_last", "status 2 in the last request", [3, 2, -2], [9, 9, 9]),
    case("negative_hidden", "status 2, though the sum looks right", [5, -3, 6], [9, 9, 9]),
    case("negative_wins", "status 2 before status 3", [2**40, -1], [9, 9], dtypes=("int64", "int64"),
         slack=64),
    case("extend_outside", "status 3: a length outside int32", [2**31], [9], dtypes=("int64", "int64")),
    case("seq_outside", "status 3: a KV length outside int32", [3, 2], [9, 2**31]),
    case("seq_below", "status 3: a KV length below int32", [3, 2], [9, -(2**31) - 1]),
    case("seq_outside_no_rows", "status 3 though the request has no rows", [3, 0], [9, 2**40]),
    case("sum_outside", "status 3: lengths fit, their sum does not", [2**30, 2**30], [9, 9]),
    case("sum_wraps", "status 3: the sum is 2^32 + 3", [INT32_MAX, INT32_MAX, 5], [9, 9, 9]),
    case("sum_wraps_block", "the same in a block of threads", [INT32_MAX, INT32_MAX, 5] + [0] * 37,
         [9] * 40),
    case("sum_like_a_mark", "status 3: the sum is 2^31 + 1", [2**30, 2**30 + 1], [9, 9]),
    case("total_given", "total_tokens == T", [3, 4], [9, 9], total_tokens=7),
    case("total_short", "status 4: rows are cut at total_tokens", [3, 4], [9, 9], total_tokens=5),
    case("total_long", "status 4: rows end at T", [3, 4], [9, 9], total_tokens=11),
    case("total_zero", "status 4: no rows at all", [3, 4], [9, 9], total_tokens=0),
    case("total_over_given", "T over the capacity, total_tokens within: status 4, not 1",
         [30, 40], [90, 90], slack=-20, total_tokens=50),
    case("total_negative", "status 2 with total_tokens writes nothing", [3, -4], [9, 9],
         total_tokens=5, slack=16),
    case("negative_grouped", "status 2 found in a grouped entry", -_zeros(5000, 4999) // 3,
         np.full(5000, 9)),
    case("negative_grouped_int64", "the same in the high word", _nines(2051, 1999, -(2**31)),
         _nines(2051), dtypes=("int64", "int64")),
    case("extend_outside_grouped", "status 3 by a high word alone", _nines(2051, 1999, 2**32 + 1),
         _nines(2051), dtypes=("int64", "int32"), slack=64 - 2**32),
    case("seq_outside_grouped", "status 3 in a whole group", _nines(5000), _nines(5000, 2049, 2**31)),
    *(
        case(f"seq_outside_grouped_{k}", "the same at another place of its group", _nines(1100),
             _nines(1100, 500 + k, 2**31))
        for k in (0, 2, 3)
    ),
    *(
        case(f"kv_negative_grouped{name}", "negative int64 KV lengths are inside int32", np.ones(1101, int),
             np.where(np.arange(1101) % 3, 9, -5), stride=stride)
        for name, stride in (("", 1), ("_strided", 2))
    ),
    case("seq_outside_grouped_last", "status 3 in the last, partly filled group", _nines(1501),
         _nines(1501, 1500, -(2**31) - 1)),
    case("sum_wraps_group", "status 3: the sum of a group is 2^32 + 3",
         _nines(1300, 800, INT32_MAX, INT32_MAX, 5), _nines(1300)),
    case("sum_outside_grouped", "status 3 by the sum over groups", np.full(2100, 2**20), _nines(2100)),
    random_case("large_int32", "KV lengths that need no check", 3001, 5, 20,
                dtypes=("int32", "int32")),
    random_case("large_int64", "two vectors of each for a group", 2050, 5, 21,
                dtypes=("int64", "int64")),
    random_case("large_swapped", "two vectors of extend lengths", 1503, 5, 22,
                dtypes=("int64", "int32")),
    case("negative_tiled", "status 2 found in a tile", -_zeros(17000, 16999) // 3, np.full(17000, 9)),
    case("sum_outside_tiled", "status 3 by the sum over tiles", np.full(17000, 2**20),
         np.full(17000, 9)),
    *(
        random_case(f"bs_{bs}", reason, bs, 5 if bs > 100 else 40, 100 + bs)
        for bs, reason in _EDGE_SIZES.items()
    ),
    random_case("bs_1024_int64", "the largest common batch with both int64", 1024, 5, 5,
                dtypes=("int64", "int64")),
    random_case("bs_16384_strided", "grouped entries from strided inputs", 16384, 3, 6, stride=2),
    random_case("bs_16385_strided", "tiles from strided inputs", 16385, 3, 7, stride=2,
                dtypes=("int64", "int32")),
    random_case("bs_20000_cut", "two launches with total_tokens", 20000, 3, 8, total_tokens=777),
]  # fmt: skip

MILLION = random_case("bs_1000000", "the largest batch promised", 1_000_000, 5, 9)

BY_NAME = {item.name: item for item in CASES}
assert len(BY_NAME) == len(CASES), "case names are unique"


def random_batches(count: int, seed: int) -> list[Case]:
    """Random batches of every shape that the named cases do not think of."""
    rng = np.random.default_rng(seed)
    batches = []
    for number in range(count):
        bs = int(rng.choice([rng.integers(1, 20), rng.integers(1, 300), rng.integers(1, 3000)]))
        max_extend = int(rng.choice([1, 5, 70, 2000])) if bs < 50 else int(rng.choice([1, 5, 9]))
        item = random_case(
            f"random_{seed}_{number}",
            "random",
            bs,
            max_extend,
            seed * 1_000_003 + number,
            topk=int(rng.choice([1, 64, 2048, 4096])),
            slack=int(rng.choice([0, 1, 37])),
            dtypes=(str(rng.choice(list(DTYPES))), str(rng.choice(list(DTYPES)))),
            stride=int(rng.choice([1, 1, 2, 7])),
            offsets=(int(rng.integers(0, 4)), int(rng.integers(0, 4))),
        )
        if rng.random() < 0.3:
            cut = int(rng.integers(0, item.capacity + 1))
            item = dataclasses.replace(item, total_tokens=cut)
        batches.append(item)
    return batches
