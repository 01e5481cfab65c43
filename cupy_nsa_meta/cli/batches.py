"""The batches of ``selftest`` and their expected results, by the definition, in plain Python.

The wheel has no ``tests/``: this is the short list of what an installation can get wrong. Nothing
in here calls the package, so that the reference is tested like every other form.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

POISON = -1234567  # no length is negative, so no row equals it
SLACK = 9  # elements behind each output, which must keep their bytes
DTYPES = {"int32": torch.int32, "int64": torch.int64}
PAGE_SIZE = 4
WIDTH = 37  # columns of a page table: not a multiple of a page or of a vector
POOL_SPARE = 2  # rows of req_to_token that no request owns


class Batch(NamedTuple):
    """Lengths, and how they lie in memory."""

    name: str
    extend: tuple[int, ...]
    seq: tuple[int, ...]
    topk: int = 2048
    dtypes: tuple[str, str] = ("int32", "int64")  # extend, seq: as upstream hands them
    stride: int = 1

    @property
    def bs(self) -> int:
        return len(self.extend)

    @property
    def total(self) -> int:
        return sum(self.extend)

    def lengths(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """extend_seq_lens and seq_lens on a device."""
        return (
            strided(self.extend, self.dtypes[0], self.stride, device),
            strided(self.seq, self.dtypes[1], self.stride, device),
        )

    def reversed(self) -> Batch:
        """The same requests in the opposite order: other lengths for the same buffers."""
        return self._replace(extend=self.extend[::-1], seq=self.seq[::-1])


def strided(values: Sequence[int], dtype: str, stride: int, device: torch.device) -> torch.Tensor:
    """A column of a wider tensor; what lies between the elements is not 0."""
    wide = torch.full((len(values), stride), -99, dtype=DTYPES[dtype])
    wide[:, 0] = torch.tensor(values, dtype=DTYPES[dtype])
    return wide.to(device)[:, 0]


def _random(name: str, bs: int, longest: int, **options: object) -> Batch:
    """Extend lengths 0..longest, a sixth of them 0; KV lengths from below the extend to 9,000."""
    rng = np.random.default_rng(bs)
    extend = rng.integers(0, longest + 1, bs) * (rng.random(bs) > 1 / 6)
    seq = np.maximum(extend + rng.integers(-3, 9000, bs), 0)
    return Batch(name, tuple(extend.tolist()), tuple(seq.tolist()), **options)  # type: ignore[arg-type]


BATCHES = (
    Batch("one row", (1,), (1,)),
    Batch("zero-length requests", (0, 0, 4, 0, 2, 0), (9, 1, 9, 2, 9, 5)),
    Batch("nothing to do", (0, 0), (7, 8)),
    Batch("padding rows", (4, 4, 4), (100, 1, 1), topk=64),
    Batch("fewer KV than query tokens", (8, 8), (3, 5)),
    Batch("top-k inside a request", (9, 5), (2052, 2050)),
    Batch("top-k of one", (6, 6), (8, 3), topk=1),
    Batch("int32 lengths", (3, 0, 5), (7, 8, 9), dtypes=("int32", "int32")),
    Batch("int64 lengths", (3, 0, 5), (7, 8, 9), dtypes=("int64", "int64")),
    Batch("types swapped", (3, 0, 5), (7, 8, 9), dtypes=("int64", "int32")),
    Batch("long requests", (1023, 1, 1024, 3000), (5000, 1, 1024, 9000)),
    _random("strided", 100, 5, stride=3),
    _random("bs 16, last linear search", 16, 40),
    _random("bs 17, first binary search", 17, 40),
    _random("bs 32, a warp", 32, 40),
    _random("bs 33, more than a warp", 33, 40),
    _random("bs 256, a block", 256, 5),
    _random("bs 257, more than a block", 257, 5),
    _random("bs 1024", 1024, 5),
    _random("bs 1025", 1025, 5),
    _random("bs 16385, two launches", 16385, 3),
)
#: Batches that the seed operation refuses: nothing may be written.
REFUSED = (
    (Batch("negative extend length", (3, -1, 2), (9, 9, 9)), 2),
    (Batch("length outside int32", (3, 2), (9, 2**31)), 3),
)


def expansion(batch: Batch) -> tuple[list[int], list[int]]:
    """seqlens_expanded and nsa_cache_seqlens by the definition."""
    expanded = [
        max(kv - q + 1 + j, 0)
        for q, kv in zip(batch.extend, batch.seq, strict=True)
        for j in range(q)
    ]
    return expanded, [min(length, batch.topk) for length in expanded]


# ---- The fused family ---------------------------------------------------------------------------

NEXT_N = 3  # query tokens per request of target-verify
OPS = ("decode", "verify", "draft_extend", "extend")
ARRAYS = {  # beside the page tables
    "decode": ("cache_seqlens", "cu_seqlens_k", "dsa_cache_seqlens", "dsa_cu_seqlens_k"),
    "verify": ("cache_seqlens", "cu_seqlens_k", "seqlens_expanded", "dsa_cache_seqlens",
               "dsa_cu_seqlens_k"),
    "draft_extend": ("cache_seqlens", "cu_seqlens_k", "seqlens_expanded", "dsa_cache_seqlens",
                     "dsa_cu_seqlens_k"),
    "extend": ("cache_seqlens", "cu_seqlens_k", "cu_seqlens_q", "extend_start_loc",
               "seqlens_expanded", "dsa_cache_seqlens", "dsa_cu_seqlens_k", "token_to_batch_idx",
               "ks", "ke", "topk_indices_offset", "positions"),
}  # fmt: skip
TABLES = ("page_table_1", "real_page_table")
#: The last one again with as many rows in either order, which a replay with other lengths needs.
FUSED_BATCHES = (
    *BATCHES[:-1],
    Batch(BATCHES[-1].name, (1,) * 16385, tuple(1 + i % 50 for i in range(16385))),
)


class FusedBuffers:
    """Inputs and poisoned outputs of one fused call, and what they must hold afterwards."""

    def __init__(self, op: str, batch: Batch, device: torch.device) -> None:
        self.op, self.batch = op, batch
        bs = batch.bs
        self.query = {"decode": (1,) * bs, "verify": (NEXT_N,) * bs}.get(op, batch.extend)
        self.rows = sum(self.query)
        rng = np.random.default_rng(7)
        self._pool = rng.permutation(bs + POOL_SPARE)[:bs].tolist()
        self._tokens = torch.from_numpy(
            rng.integers(0, 2**31 - 1, (bs + POOL_SPARE, WIDTH + 1), dtype=np.int32)
        )
        self.extend, self.seq = batch.lengths(device)
        self.pool = torch.tensor(self._pool, dtype=torch.int64, device=device)
        self.tokens = self._tokens.to(device)
        self.outputs = {
            name: torch.full(
                (len(values) + SLACK,), POISON, device=device,
                dtype=torch.int64 if name == "positions" else torch.int32,
            )
            for name, values in self._arrays().items()
        }  # fmt: skip
        self.table_rows = bs if op in ("decode", "extend") else self.rows
        for name, size in zip(TABLES, (1, PAGE_SIZE), strict=True):
            columns = -(-WIDTH // size)
            wide = torch.full((self.table_rows + 1, columns + 3), POISON, dtype=torch.int32)
            self.outputs[name] = wide.to(device)[:, :columns]

    def poison(self) -> None:
        for tensor in self.outputs.values():
            tensor.fill_(POISON)

    def refill(self, batch: Batch) -> None:
        """Other lengths in the same buffers, with the same number of rows."""
        self.batch = batch
        if self.op in ("draft_extend", "extend"):
            self.query = batch.extend
        for tensor, values in ((self.extend, batch.extend), (self.seq, batch.seq)):
            tensor.copy_(torch.tensor(values))

    def difference(self) -> str | None:
        """The first output that differs from the definition, in any element of its buffer."""
        arrays = self._arrays()
        for name, tensor in self.outputs.items():
            got = tensor.cpu()
            wanted = torch.full_like(got, POISON)
            if name in TABLES:
                self._fill_table(wanted, 1 if name == "page_table_1" else PAGE_SIZE)
            else:
                wanted[: len(arrays[name])] = torch.tensor(arrays[name], dtype=got.dtype)
            message = first_difference(name, got, wanted)
            if message is not None:
                return message
        return None

    def _arrays(self) -> dict[str, list[int]]:
        """The 1-D arrays by their definitions."""
        add = NEXT_N if self.op == "verify" else 0
        kv = [length + add for length in self.batch.seq]
        ks = [0, *accumulate(kv)]
        start = [0, *accumulate(self.query)]
        of_row = [i for i, q in enumerate(self.query) for _ in range(q)]
        last = [kv[i] - self.query[i] + row - start[i] for row, i in enumerate(of_row)]
        expanded = [max(position + 1, 0) for position in last]
        clipped = [min(length, self.batch.topk) for length in expanded]
        arrays = {
            "cache_seqlens": kv,
            "cu_seqlens_k": ks,
            "cu_seqlens_q": start,
            "extend_start_loc": start[:-1],
            "seqlens_expanded": expanded,
            "dsa_cache_seqlens": clipped,
            "dsa_cu_seqlens_k": [0, *accumulate(clipped)],
            "token_to_batch_idx": of_row,
            "ks": [ks[i] for i in of_row],
            "ke": [ks[i] + length for i, length in zip(of_row, expanded, strict=True)],
            "topk_indices_offset": [ks[i] for i in of_row],
            "positions": last,
        }
        return {name: arrays[name] for name in ARRAYS[self.op]}

    def _fill_table(self, table: torch.Tensor, page_size: int) -> None:
        """Row of request i: ``req_to_token[pool_i, ::page_size] // page_size`` up to its length."""
        add = NEXT_N if self.op == "verify" else 0
        requests = torch.arange(self.batch.bs)
        if self.op not in ("decode", "extend"):  # a row for each query token
            requests = requests.repeat_interleave(torch.tensor(self.query))
        pages = self._tokens[torch.tensor(self._pool)[requests], :WIDTH:page_size] // page_size
        lengths = torch.tensor(self.batch.seq)[requests] + add
        live = torch.arange(0, WIDTH, page_size) < lengths[:, None]
        rows = table[: len(requests)]
        rows.copy_(torch.where(live, pages, rows))


def first_difference(name: str, got: torch.Tensor, wanted: torch.Tensor) -> str | None:
    """One line about the first element that differs; None where all are equal."""
    if torch.equal(got, wanted):
        return None
    at = torch.nonzero(got != wanted)[0].tolist()
    index = ", ".join(map(str, at))
    return f"{name}[{index}]: expected {int(wanted[tuple(at)])}, got {int(got[tuple(at)])}"
