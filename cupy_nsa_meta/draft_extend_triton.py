"""The seed operation as a Triton kernel: the fallback where CuPy or NVRTC is missing.

Every program adds up the whole batch into scratch of its own, then searches the request of each of
its rows there, so that one launch serves up to 16,384 requests; above that, one program builds the
sums in a first launch. Sizes are run-time values: nothing recompiles with the batch.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch.compiler import is_compiling
from triton import knobs

from . import _check, _env, _traced, reference
from ._check import DraftExtendKey, DraftExtendTensors
from ._draft_extend_args import ONE_LAUNCH_MAX_BS
from ._status import FATAL, draft_extend_error
from .draft_extend import capture_error, raise_for_status

BLOCK = 1024  # requests per step of the sum, and rows per step of the expansion
MAX_PROGRAMS = 128  # each owns bs * 8 bytes of scratch

_SIZES = [
    "scratch_stride",
    "extend_stride",
    "seq_stride",
    "bs",
    "search_steps",
    "max_rows",
    "topk",
    "total_is_given",
]


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=_SIZES,
    do_not_specialize_on_alignment=[
        "extend_seq_lens",
        "seq_lens",
        "out_seqlens_expanded",
        "out_nsa_cache_seqlens",
        "out_total",
        "scratch",
    ],
)
def draft_extend_kernel(  # type: ignore[no-untyped-def]
    extend_seq_lens,
    seq_lens,
    out_seqlens_expanded,
    out_nsa_cache_seqlens,
    out_total,  # [2] int32: total, status
    scratch,  # [programs, scratch_stride] int64: inclusive sums of the extend lengths
    scratch_stride,
    extend_stride,
    seq_stride,
    bs,
    search_steps,  # bit length of bs
    max_rows,
    topk,
    total_is_given,
    BUILD: tl.constexpr,  # add up the batch
    EXPAND: tl.constexpr,  # write the rows
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    ends = scratch
    if BUILD and EXPAND:
        ends = scratch + program.to(tl.int64) * scratch_stride
    lane = tl.arange(0, BLOCK)
    total = tl.full((), 0, tl.int64)
    status = tl.full((), 0, tl.int32)

    if BUILD:
        negative = tl.full((), 0, tl.int32)
        outside = tl.full((), 0, tl.int32)
        for begin in range(0, bs, BLOCK):
            idx = (begin + lane).to(tl.int64)
            inside = idx < bs
            extend = tl.load(extend_seq_lens + idx * extend_stride, mask=inside, other=0).to(
                tl.int64
            )
            seq = tl.load(seq_lens + idx * seq_stride, mask=inside, other=0).to(tl.int64)
            beyond = (extend > 2147483647) | (seq > 2147483647) | (seq < -2147483648)
            negative = tl.maximum(negative, tl.max((extend < 0).to(tl.int32), 0))
            outside = tl.maximum(outside, tl.max(beyond.to(tl.int32), 0))
            # Clamped: the sum of a million values stays far inside int64.
            extend = tl.minimum(tl.maximum(extend, 0), 2147483648)
            tl.store(ends + idx, tl.cumsum(extend, 0) + total, mask=inside)
            total += tl.sum(extend, 0)
        outside = tl.where(total > 2147483647, 1, outside)
        if total_is_given != 0:
            status = tl.where(total != max_rows, 4, 0)
        else:
            status = tl.where(total > max_rows, 1, 0)
        status = tl.where(outside != 0, 3, status)
        status = tl.where(negative != 0, 2, status)
        total = tl.where((status == 2) | (status == 3), -1, total)
        if program == 0:
            tl.store(out_total, total.to(tl.int32))
            tl.store(out_total + 1, status)
        tl.debug_barrier()  # the sums are read below by other threads of this program
    else:
        total = tl.load(out_total).to(tl.int64)
        status = tl.load(out_total + 1)

    if EXPAND:
        rows = tl.where((status == 0) | (status == 4), tl.minimum(total, max_rows), 0)
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for begin in range(program.to(tl.int64) * BLOCK, rows, step):
            row = begin + lane
            inside = row < rows
            # The first request that ends behind the row.
            low = tl.zeros([BLOCK], tl.int32)
            high = tl.zeros([BLOCK], tl.int32) + bs
            for _ in range(search_steps):
                middle = low + (high - low) // 2
                open_ = inside & (low < high)
                end = tl.load(ends + middle, mask=open_, other=0)
                low = tl.where(open_ & (end <= row), middle + 1, low)
                high = tl.where(open_ & (end > row), middle, high)
            request = low.to(tl.int64)
            end = tl.load(ends + request, mask=inside, other=0)
            seq = tl.load(seq_lens + request * seq_stride, mask=inside, other=0).to(tl.int64)
            expanded = tl.maximum(seq + 1 - end + row, 0).to(tl.int32)
            tl.store(out_seqlens_expanded + row, expanded, mask=inside)
            tl.store(out_nsa_cache_seqlens + row, tl.minimum(expanded, topk), mask=inside)


def _enqueue(tensors: DraftExtendTensors, key: DraftExtendKey, out_total: torch.Tensor) -> None:
    extend, seq, out_expanded, out_clamped = tensors
    bs = key.bs
    programs = max(1, min(-(-key.limit // BLOCK), MAX_PROGRAMS))
    builders = programs if bs <= ONE_LAUNCH_MAX_BS else 1
    scratch = torch.empty(builders * max(bs, 1), dtype=torch.int64, device=extend.device)
    with torch.cuda.device(extend.device) if key.device >= 0 else nullcontext():
        steps = ((True, True),) if builders == programs else ((True, False), (False, True))
        for build, expand in steps:
            draft_extend_kernel[(programs if expand else 1,)](
                extend,
                seq,
                out_expanded,
                out_clamped,
                out_total,
                scratch,
                bs,
                key.extend_stride,
                key.seq_stride,
                bs,
                bs.bit_length(),
                key.limit,
                key.topk,
                key.flags & _check.TOTAL_IS_GIVEN,
                BUILD=build,
                EXPAND=expand,
                BLOCK=BLOCK,
            )


def _runs_triton(key: DraftExtendKey) -> bool:
    """CUDA tensors, or CPU tensors in Triton's interpreter; others go to the reference."""
    return key.device >= 0 or knobs.runtime.interpret


def _outcome(tensors: DraftExtendTensors, key: DraftExtendKey) -> torch.Tensor:
    if not _runs_triton(key):
        extend, seq, out_expanded, out_clamped = tensors
        total_is_given = bool(key.flags & _check.TOTAL_IS_GIVEN)
        return reference.draft_extend_into(
            extend, seq, key.topk, out_expanded, out_clamped, key.limit, total_is_given
        )
    out_total = torch.empty(2, dtype=torch.int32, device=tensors[0].device)
    _enqueue(tensors, key, out_total)
    return out_total


def fill_draft_extend_metadata_inplace(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
    use_adaptive: bool = True,
    *,
    total_tokens: int | None = None,
) -> int:
    """The contract of ``fill_draft_extend_metadata_cuda`` as a Triton kernel.

    Always a binary search; ``use_adaptive`` changes nothing. CPU tensors are computed by the
    reference, or in Triton's interpreter under TRITON_INTERPRET=1.
    """
    if is_compiling():
        return _traced.fill(
            "triton", extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded,
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
    if total_tokens is None and capturing:
        raise capture_error()
    outcome = _outcome(tensors, key)
    if total_tokens is None:
        return raise_for_status(outcome, tensors, key)
    if _env.debug_sync() and not capturing:
        raise_for_status(outcome, tensors, key)
    return key.limit


def fill_draft_extend_metadata_triton_async(
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
    """``fill_draft_extend_metadata_async`` as a Triton kernel."""
    tensors, key = _check.draft_extend(
        extend_seq_lens,
        seq_lens,
        nsa_index_topk,
        out_seqlens_expanded,
        out_nsa_cache_seqlens,
        use_adaptive,
        total_tokens,
    )
    if out_total is None:
        out_total = torch.empty(2, dtype=torch.int32, device=tensors[0].device)
    else:
        out_total = _check.out_total(out_total, tensors, key)
    if _runs_triton(key):
        _enqueue(tensors, key, out_total)
    else:
        out_total.copy_(_outcome(tensors, key))
    if _env.debug_sync() and not (key.device >= 0 and torch.cuda.is_current_stream_capturing()):
        raise_for_status(out_total, tensors, key)
    return out_total


def fill_draft_extend_metadata_fused_simple(
    extend_seq_lens: torch.Tensor, seq_lens: torch.Tensor, nsa_index_topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate and return (seqlens_expanded, nsa_cache_seqlens), int32 [T] each.

    A first launch without room for rows yields T, a second one writes the rows: it waits for the
    total and cannot be captured. Arguments and errors as in ``fill_draft_extend_metadata_cuda``.
    """
    if is_compiling():
        return _traced.fused_simple(extend_seq_lens, seq_lens, nsa_index_topk)
    if not isinstance(extend_seq_lens, torch.Tensor):
        extend_seq_lens = _check.as_tensor("extend_seq_lens", extend_seq_lens)
    no_rows = torch.empty((2, 0), dtype=torch.int32, device=extend_seq_lens.device)
    tensors, key = _check.draft_extend(
        extend_seq_lens, seq_lens, nsa_index_topk, no_rows[0], no_rows[1], True, None
    )
    if key.device >= 0 and torch.cuda.is_current_stream_capturing():
        raise capture_error()
    # Without room every batch with rows is over capacity; the other statuses come through.
    total, status = _outcome(tensors, key).tolist()
    extend, seq, *_ = tensors
    if status in FATAL and total < 0:
        raise draft_extend_error(status, total, 0, extend, seq)
    out_expanded, out_clamped = (
        torch.empty(total, dtype=torch.int32, device=extend.device) for _ in range(2)
    )
    if total:
        fill_draft_extend_metadata_inplace(
            extend, seq, key.topk, out_expanded, out_clamped, total_tokens=total
        )
    return out_expanded, out_clamped
