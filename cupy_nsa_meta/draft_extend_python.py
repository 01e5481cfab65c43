"""The seed operation in plain torch: the loop that servers run today, kept as the baseline.

The vectorised form is ``reference.py``; it serves the calls that must not read anything back.
"""

from __future__ import annotations

import torch
from torch.compiler import is_compiling

from . import _check, _env, _traced
from ._check import DraftExtendKey, DraftExtendTensors
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
    if is_compiling():
        return _traced.fill(
            "python", extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded,
            out_nsa_cache_seqlens, use_adaptive, total_tokens,
        )  # fmt: skip
    tensors, key = _check.draft_extend(
        extend_seq_lens,
        seq_lens,
        nsa_index_topk,
        out_seqlens_expanded,
        out_nsa_cache_seqlens,
        use_adaptive,
        total_tokens,
    )
    capturing = key.device >= 0 and torch.cuda.is_current_stream_capturing()
    if total_tokens is not None:
        outcome = _enqueue(tensors, key)
        if _env.debug_sync() and not capturing:
            raise_for_status(outcome, tensors, key)
        return key.limit
    if capturing:
        raise capture_error()
    extend, seq, out_expanded, out_clamped = tensors
    q_lens = extend.tolist()
    kv_lens = seq.tolist()
    total, status = _outcome(q_lens, kv_lens, key.limit)
    if status:
        raise draft_extend_error(status, total, key.limit, extend, seq)
    if not total:
        return 0
    seqlens_expanded = torch.cat(
        [
            torch.arange(kv - q + 1, kv + 1, device=extend.device)
            for q, kv in zip(q_lens, kv_lens, strict=True)
        ]
    ).clamp_(min=0)
    out_expanded[:total] = seqlens_expanded
    out_clamped[:total] = seqlens_expanded.clamp_(max=key.topk)
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
    tensors, key = _check.draft_extend(
        extend_seq_lens,
        seq_lens,
        nsa_index_topk,
        out_seqlens_expanded,
        out_nsa_cache_seqlens,
        use_adaptive,
        total_tokens,
    )
    if out_total is not None:
        out_total = _check.out_total(out_total, tensors, key)
    outcome = _enqueue(tensors, key)
    if out_total is not None:
        outcome = out_total.copy_(outcome)
    if _env.debug_sync() and not (key.device >= 0 and torch.cuda.is_current_stream_capturing()):
        raise_for_status(outcome, tensors, key)
    return outcome


def _enqueue(tensors: DraftExtendTensors, key: DraftExtendKey) -> torch.Tensor:
    extend, seq, out_expanded, out_clamped = tensors
    total_is_given = bool(key.flags & _check.TOTAL_IS_GIVEN)
    return draft_extend_into(
        extend, seq, key.topk, out_expanded, out_clamped, key.limit, total_is_given
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
