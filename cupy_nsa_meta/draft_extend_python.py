"""The seed operation in plain torch: the loop that servers run today, kept as the baseline.

The vectorised form is ``reference.py``; it serves the calls that must not read anything back.
"""

from __future__ import annotations

import torch

from . import _check, _env
from ._check import DraftExtendCall
from ._status import INT32_MAX, INT32_MIN, Status, draft_extend_error
from .draft_extend import capture_error, raise_for_status
from .reference import draft_extend_into


def fill_draft_extend_metadata_python(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
    use_adaptive: bool = True,
    *,
    total_tokens: int | None = None,
) -> int:
    """The contract of ``fill_draft_extend_metadata_cuda`` in plain torch, on any device.

    Without ``total_tokens`` it reads the lengths back and concatenates one ``torch.arange`` per
    request. With it, the vectorised form of ``reference.py`` is enqueued and nothing is read back.
    ``use_adaptive`` changes nothing here.
    """
    call = _check.draft_extend(
        extend_seq_lens,
        seq_lens,
        nsa_index_topk,
        out_seqlens_expanded,
        out_nsa_cache_seqlens,
        use_adaptive,
        total_tokens,
    )
    capturing = call.device >= 0 and torch.cuda.is_current_stream_capturing()
    if total_tokens is not None:
        outcome = _enqueue(call, total_is_given=True)
        if _env.debug_sync() and not capturing:
            raise_for_status(outcome, call)
        return call.limit
    if capturing:
        raise capture_error()
    kv_lens = call.seq_lens.tolist()
    q_lens = call.extend_seq_lens.tolist()
    total, status = _outcome(q_lens, kv_lens, call.limit)
    if status:
        raise draft_extend_error(status, total, call.limit, call.extend_seq_lens, call.seq_lens)
    if not total:
        return 0
    device = call.extend_seq_lens.device
    seqlens_expanded = torch.cat(
        [
            torch.arange(kv - q + 1, kv + 1, device=device)
            for q, kv in zip(q_lens, kv_lens, strict=True)
        ]
    ).clamp_(min=0)
    call.out_seqlens_expanded[:total] = seqlens_expanded
    call.out_nsa_cache_seqlens[:total] = seqlens_expanded.clamp_(max=call.topk)
    return total


def fill_draft_extend_metadata_python_async(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
    use_adaptive: bool = True,
    *,
    total_tokens: int | None = None,
    out_total: torch.Tensor | None = None,
) -> torch.Tensor:
    """``fill_draft_extend_metadata_async`` in plain torch, on any device."""
    call = _check.draft_extend(
        extend_seq_lens,
        seq_lens,
        nsa_index_topk,
        out_seqlens_expanded,
        out_nsa_cache_seqlens,
        use_adaptive,
        total_tokens,
    )
    if out_total is not None:
        out_total = _check.out_total(out_total, call)
    outcome = _enqueue(call, total_is_given=total_tokens is not None)
    if out_total is not None:
        outcome = out_total.copy_(outcome)
    if _env.debug_sync() and not (call.device >= 0 and torch.cuda.is_current_stream_capturing()):
        raise_for_status(outcome, call)
    return outcome


def _enqueue(call: DraftExtendCall, total_is_given: bool) -> torch.Tensor:
    return draft_extend_into(
        call.extend_seq_lens,
        call.seq_lens,
        call.topk,
        call.out_seqlens_expanded,
        call.out_nsa_cache_seqlens,
        call.limit,
        total_is_given,
    )


def _outcome(q_lens: list[int], kv_lens: list[int], capacity: int) -> tuple[int, Status]:
    if not q_lens:
        return 0, Status.OK
    if min(q_lens) < 0:
        return -1, Status.NEGATIVE_EXTEND
    total = sum(q_lens)
    if max(total, max(kv_lens)) > INT32_MAX or min(kv_lens) < INT32_MIN:
        return -1, Status.OUTSIDE_INT32
    return total, Status.OVER_CAPACITY if total > capacity else Status.OK
