"""The specification, in plain torch: what every backend must equal, bit for bit.

Everything here runs on any device. ``draft_extend`` is the definition; ``draft_extend_into`` is the
same arithmetic without a host read-back, so that it can be enqueued and captured.
"""

from __future__ import annotations

import torch

from ._status import FATAL, INT32_MAX, INT32_MIN, Status, draft_extend_error

__all__ = ["draft_extend", "draft_extend_into", "draft_extend_total"]


def draft_extend(
    extend_seq_lens: torch.Tensor, seq_lens: torch.Tensor, nsa_index_topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """KV tokens that each query token sees, and the same clamped to top-k.

    With ``row`` the request that owns output row r, and j the position of r inside it::

        seqlens_expanded[r]  = max(seq_lens[row] - extend_seq_lens[row] + 1 + j, 0)
        nsa_cache_seqlens[r] = min(seqlens_expanded[r], nsa_index_topk)

    Args:
        extend_seq_lens: [bs] int32 or int64, query tokens of each request, >= 0.
        seq_lens: [bs] int32 or int64, KV length of each request.
        nsa_index_topk: KV tokens kept per query, >= 1.

    Returns:
        Two int32 tensors [T], T = sum(extend_seq_lens).

    Raises:
        ValueError: a negative extend length, or a length or sum outside int32.
    """
    total, status = draft_extend_total(extend_seq_lens, seq_lens).tolist()
    if status in FATAL:
        raise draft_extend_error(status, total, 0, extend_seq_lens, seq_lens)
    extend = extend_seq_lens.to(torch.int64)
    row = torch.repeat_interleave(
        torch.arange(extend.numel(), device=extend.device), extend, output_size=total
    )
    begin = torch.cumsum(extend, 0) - extend
    j = torch.arange(total, device=extend.device) - begin[row]
    seqlens_expanded = (seq_lens.to(torch.int64)[row] - extend[row] + 1 + j).clamp(min=0)
    nsa_cache_seqlens = seqlens_expanded.clamp(max=nsa_index_topk)
    return seqlens_expanded.to(torch.int32), nsa_cache_seqlens.to(torch.int32)


def draft_extend_total(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    capacity: int = INT32_MAX,
    total_tokens: int | None = None,
) -> torch.Tensor:
    """int32 [2] on the inputs' device: T (-1 with status 2 and 3) and the status word."""
    return _prefix(extend_seq_lens, seq_lens, capacity, total_tokens)[1]


def draft_extend_into(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
    limit: int,
    total_is_given: bool,
) -> torch.Tensor:
    """Write the rows [0, min(T, limit)) and return total and status as an int32 [2] tensor.

    ``limit`` is the caller's ``total_tokens`` where ``total_is_given``, else the capacity: with a
    capacity, T above it writes nothing. Nothing is read back; the work is that of ``limit`` rows.
    """
    ends, outcome = _prefix(
        extend_seq_lens,
        seq_lens,
        capacity=limit,
        total_tokens=limit if total_is_given else None,
    )
    if not extend_seq_lens.numel() or not limit:
        return outcome
    total, status = outcome[0], outcome[1]
    rows = torch.arange(limit, device=ends.device)
    request = torch.searchsorted(ends, rows, right=True).clamp_(max=ends.numel() - 1)
    seqlens_expanded = (seq_lens.to(torch.int64) + 1 - ends)[request].add_(rows).clamp_(min=0)
    # Plain ints: under torch.compile a tensor equals no IntEnum, and nothing would be written.
    is_written = (status == int(Status.OK)) | (status == int(Status.TOTAL_MISMATCH))
    written = (rows < total) & is_written
    for out, values in (
        (out_seqlens_expanded, seqlens_expanded),
        (out_nsa_cache_seqlens, seqlens_expanded.clamp(max=nsa_index_topk)),
    ):
        out[:limit] = torch.where(written, values.to(torch.int32), out[:limit])
    return outcome


def _prefix(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    capacity: int,
    total_tokens: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inclusive sums of the extend lengths [bs] int64, and (total, status) [2] int32."""
    extend = extend_seq_lens.to(torch.int64)
    seq = seq_lens.to(torch.int64)
    # Clamped first: sums of 2^20 lengths of 2^31 stay far inside int64.
    ends = torch.cumsum(extend.clamp(0, INT32_MAX + 1), 0)
    total = ends[-1] if ends.numel() else ends.sum()
    negative = (extend < 0).any()
    outside = (
        (extend > INT32_MAX).any()
        | (seq > INT32_MAX).any()
        | (seq < INT32_MIN).any()
        | (total > INT32_MAX)
    )
    if total_tokens is not None:
        status = (total != total_tokens) * int(Status.TOTAL_MISMATCH)
    else:
        status = (total > capacity) * int(Status.OVER_CAPACITY)
    status = torch.where(outside, int(Status.OUTSIDE_INT32), status)
    status = torch.where(negative, int(Status.NEGATIVE_EXTEND), status)
    total = torch.where(negative | outside, -1, total)
    return ends, torch.stack((total, status)).to(torch.int32)
