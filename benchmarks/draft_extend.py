"""Batches of the seed operation for ``measure.Contest``: changing lengths, buffers, the check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cupy_nsa_meta import reference

from . import measure

INT32_MAX = 2**31 - 1
SENTINEL = -559038737  # 0xdeadbeef; no length is negative
REFERENCE_MAX_ROWS = 1 << 20  # above, rows are checked in chunks by the same arithmetic
CHUNK_ROWS = 1 << 24
MAX_EXTEND = 5  # query tokens per request: one and up to four accepted draft tokens
MAX_KV = 9000


class DraftExtendCase:
    """One batch size and capacity; the lengths go round in a pool on the device.

    Upstream's dtypes: int32 extend lengths, int64 KV lengths.
    """

    op = "draft_extend"

    def __init__(
        self,
        extends: npt.NDArray[np.int64],  # [pool, bs]
        seqs: npt.NDArray[np.int64],  # [pool, bs]
        topk: int,
        device: torch.device,
        capacity_factor: int = 1,
        labels: dict[str, Any] | None = None,
    ) -> None:
        totals = [int(total) for total in extends.sum(axis=1, dtype=np.int64)]
        self.bs = extends.shape[1]
        self.max_rows = max(totals)
        self.capacity = min(self.max_rows * capacity_factor, INT32_MAX)
        self.topk = topk
        self.device = device
        self.labels = {
            "bs": self.bs,
            "rows": int(np.median(totals)),
            "capacity": self.capacity,
            **(labels or {}),
        }
        self.name = measure.describe(self.labels)
        self._totals = totals
        self._extends = list(torch.from_numpy(extends.astype(np.int32)).to(device).unbind())
        self._seqs = list(torch.from_numpy(seqs.astype(np.int64)).to(device).unbind())
        self.extend = torch.empty(self.bs, dtype=torch.int32, device=device)
        self.seq = torch.empty(self.bs, dtype=torch.int64, device=device)
        self.out_expanded, self.out_clamped = (
            torch.empty(self.capacity, dtype=torch.int32, device=device) for _ in range(2)
        )
        self._current = -1
        self.total = 0
        self.advance()

    def advance(self) -> None:
        self._current = current = (self._current + 1) % len(self._totals)
        self.extend.copy_(self._extends[current])
        self.seq.copy_(self._seqs[current])
        self.total = self._totals[current]

    def poison(self, outputs: tuple[torch.Tensor, ...] | None = None) -> None:
        for out in outputs or (self.out_expanded, self.out_clamped):
            out.fill_(SENTINEL)

    def difference(
        self,
        total: object,
        outputs: tuple[torch.Tensor, ...] | None = None,
        poisoned: bool = True,
    ) -> str | None:
        if type(total) is not int or total != self.total:
            return f"returned total: expected {self.total}, got {total!r}"
        for name, tensor, held in (
            ("extend_seq_lens", self.extend, self._extends[self._current]),
            ("seq_lens", self.seq, self._seqs[self._current]),
        ):
            if not torch.equal(tensor, held):
                return f"{name}, an input: expected no write"
        outs = outputs or (self.out_expanded, self.out_clamped)
        names = ("out_seqlens_expanded", "out_nsa_cache_seqlens")
        for begin, expected in self._expected():
            for name, out, rows in zip(names, outs, expected, strict=True):
                got = out[begin : begin + rows.numel()]
                if not torch.equal(got, rows):
                    idx = int((got != rows).nonzero()[0])
                    return f"{name}[{begin + idx}]: expected {int(rows[idx])}, got {int(got[idx])}"
        if poisoned:
            for name, out in zip(names, outs, strict=True):
                behind = out[self.total :]
                if behind.numel() and not bool((behind == SENTINEL).all()):
                    return f"{name}: expected no write behind row {self.total - 1}"
        return None

    def _expected(self) -> Any:
        """Runs of expected rows: (first row, (expanded, clamped))."""
        if self.total <= REFERENCE_MAX_ROWS:
            yield 0, reference.draft_extend(self.extend, self.seq, self.topk)
            return
        ends = torch.cumsum(self.extend, 0, dtype=torch.int64)
        base = self.seq + 1 - ends
        for begin in range(0, self.total, CHUNK_ROWS):
            rows = torch.arange(begin, min(begin + CHUNK_ROWS, self.total), device=self.device)
            request = torch.searchsorted(ends, rows, right=True)
            expanded = base[request].add_(rows).clamp_(min=0).to(torch.int32)
            yield begin, (expanded, expanded.clamp(max=self.topk))


def serving_case(
    bs: int,
    topk: int,
    device: torch.device,
    capacity_factor: int = 1,
    seed: int = 0,
    labels: dict[str, Any] | None = None,
) -> DraftExtendCase:
    """Speculative decoding: 1 to 5 query tokens per request, up to 9,000 KV tokens."""
    pool = 16 if bs <= 16384 else 4
    random = np.random.default_rng([seed, bs])
    extends = random.integers(1, MAX_EXTEND + 1, (pool, bs))
    seqs = np.maximum(random.integers(1, MAX_KV + 1, (pool, bs)), extends)
    return DraftExtendCase(extends, seqs, topk, device, capacity_factor, labels)


def long_case(
    bs: int, rows: int, topk: int, device: torch.device, seed: int = 0
) -> DraftExtendCase:
    """Exactly ``rows`` rows over ``bs`` requests of changing lengths, no room behind them."""
    pool = 4
    random = np.random.default_rng([seed, bs, rows])
    extends = np.full((pool, bs), rows // bs)
    extends[:, : rows % bs] += 1
    half = bs // 2
    if half:  # what one request gains another loses: the sum stays
        moved = random.integers(0, rows // bs // 2 + 1, (pool, half))
        extends[:, :half] += moved
        extends[:, half : 2 * half] -= moved
    # Of the longest KV lengths some are below the extend length: rows clamped at 0.
    seqs = np.minimum(extends, INT32_MAX - MAX_KV) + random.integers(0, MAX_KV, (pool, bs))
    return DraftExtendCase(extends, seqs, topk, device)


def bytes_needed(rows: int) -> int:
    """Device memory of a ``long_case`` and its check."""
    chunk = min(rows, CHUNK_ROWS)
    return 8 * rows + 64 * chunk + (1 << 28)


def fits(rows: int, free: int) -> bool:
    return bytes_needed(rows) <= free


def sizes(points: Sequence[int], quick: Sequence[int], is_quick: bool) -> tuple[int, ...]:
    return tuple(quick if is_quick else points)
