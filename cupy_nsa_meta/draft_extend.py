"""The seed operation on the CUDA backend: check, pack one struct, launch, read one word.

Device twin: ``cuda_src/draft_extend.cu``. Specification: ``reference.draft_extend``.
"""

from __future__ import annotations

import functools
import struct
from contextlib import nullcontext
from typing import NamedTuple

import torch

from . import _check, _env, _launch
from ._check import DraftExtendCall
from ._status import draft_extend_error

#: ``struct DraftExtendArgs``: 8 pointers, 2 strides, 5 ints, flags, epoch, padding.
ARGS = struct.Struct("<8Q2q5i2I4x")
assert ARGS.size <= _launch.ARGS_BYTES

BLOCK_THREADS = _launch.BLOCK_THREADS
WARP_MAX_BS = 32  # kWarpMaxBs
MAX_ITEMS = 4  # kMaxItems
MAX_ENTRIES = 4096  # kMaxEntries
GROUP = 4  # kGroup
ONE_LAUNCH_MAX_BS = 16384  # kOneLaunchMaxBs
LINEAR_SEARCH_MAX_BS = 16
#: Capacity from which rows are written in quads; below, a launch is a matter of latency.
QUADS_MIN_ROWS = 1 << 20
BLOCKS_PER_SM = 6  # resident blocks, bounded by 33 KB of shared memory each
#: Every block reads the whole batch. More blocks than multiprocessors read it for few rows, or
#: write this many rows for every request (or tile) that they read.
ROWS_PER_ENTRY_READ = 8
FEW_REQUESTS = 2048

EXTEND_IS_INT64 = 1
SEQ_IS_INT64 = 2
LINEAR_SEARCH = 4
TOTAL_IS_GIVEN = 8
QUADS = 16


class Geometry(NamedTuple):
    """How a batch is cut up; depends on host-known sizes alone."""

    launches: tuple[tuple[str, int], ...]  # kernels and grids, in order
    num_entries: int
    requests_per_entry: int
    quads: bool


@functools.lru_cache(maxsize=1024)
def geometry(bs: int, limit: int, num_sms: int, aligned: bool) -> Geometry:
    """Kernels, blocks by capacity (the host does not know T), entries of the shared prefix.

    ``aligned``: both out buffers begin on 16-byte boundaries.
    """
    requests_per_entry = 1
    if MAX_ENTRIES < bs <= ONE_LAUNCH_MAX_BS:
        requests_per_entry = GROUP
    elif bs > ONE_LAUNCH_MAX_BS:  # whole chunks of a block: 1,000,000 requests make 3,907 tiles
        requests_per_entry = -(-bs // (MAX_ENTRIES * BLOCK_THREADS)) * BLOCK_THREADS
    num_entries = -(-bs // requests_per_entry)

    grid = max(-(-limit // BLOCK_THREADS), 1)
    if grid > num_sms:
        read = max(num_entries if bs > ONE_LAUNCH_MAX_BS else bs, 1)
        per_sm = max(FEW_REQUESTS // read, limit // (num_sms * ROWS_PER_ENTRY_READ * read), 1)
        grid = min(grid, num_sms * min(per_sm, BLOCKS_PER_SM))

    quads = aligned and limit >= QUADS_MIN_ROWS
    suffix = "_quads" if quads else ""
    launches: tuple[tuple[str, int], ...]
    if bs <= WARP_MAX_BS:
        launches = ((f"draft_extend_warp{suffix}", grid),)
    elif bs <= BLOCK_THREADS and not quads:
        launches = (("draft_extend_block", grid),)
    elif bs <= BLOCK_THREADS * MAX_ITEMS:
        launches = ((f"draft_extend_block4{suffix}", grid),)
    elif bs <= ONE_LAUNCH_MAX_BS:
        launches = (("draft_extend_large", grid),)
    else:
        launches = (("draft_extend_tiles", num_entries), ("draft_extend_tiled", grid))
    return Geometry(launches, num_entries, requests_per_entry, quads)


def pack(
    buffer: bytearray,
    call: DraftExtendCall,
    shape: Geometry,
    use_adaptive: bool,
    total_is_given: bool,
    epoch: int,
    result: int,
    out_total: int,
    scratch: int,
) -> None:
    """Pack ``struct DraftExtendArgs``; ``scratch`` is 0 in the one-launch form."""
    extend, seq = call.extend_seq_lens, call.seq_lens
    flags = (
        (EXTEND_IS_INT64 if extend.dtype is torch.int64 else 0)
        | (SEQ_IS_INT64 if seq.dtype is torch.int64 else 0)
        | (LINEAR_SEARCH if use_adaptive and call.bs <= LINEAR_SEARCH_MAX_BS else 0)
        | (TOTAL_IS_GIVEN if total_is_given else 0)
        | (QUADS if shape.quads else 0)
    )
    ARGS.pack_into(
        buffer,
        0,
        call.extend_ptr,
        call.seq_ptr,
        call.expanded_ptr,
        call.clamped_ptr,
        out_total,
        result,
        scratch,
        scratch and scratch + 4 * call.bs,
        extend.stride(0),
        seq.stride(0),
        call.bs,
        shape.num_entries,
        shape.requests_per_entry,
        call.limit,
        call.topk,
        flags,
        epoch,
    )


def enqueue(
    state: _launch.DeviceState,
    slot: _launch.Slot,
    stream: int,
    call: DraftExtendCall,
    use_adaptive: bool,
    total_is_given: bool,
    wants_result: bool,
    out_total: int,
) -> None:
    """Launch on ``stream``. The argument bytes are taken over at the launch."""
    bs = call.bs
    aligned = (call.expanded_ptr | call.clamped_ptr) & 15 == 0
    shape = geometry(bs, call.limit, state.num_sms, aligned)
    scratch = None
    if bs > ONE_LAUNCH_MAX_BS:  # freed at return, reused by torch in stream order
        scratch = torch.empty(
            bs + shape.num_entries, dtype=torch.int32, device=call.extend_seq_lens.device
        )
    pack(
        slot.buffer,
        call,
        shape,
        use_adaptive,
        total_is_given,
        slot.next_epoch() if wants_result else 0,
        slot.address if wants_result else 0,
        out_total,
        0 if scratch is None else scratch.data_ptr(),
    )
    state.launch(slot, stream, shape.launches)


def fill_draft_extend_metadata_cuda(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
    use_adaptive: bool = True,
    *,
    total_tokens: int | None = None,
) -> int:
    """KV length of every query token, and the same clamped to top-k, in one CUDA launch.

    With ``row`` the request that owns output row r, and j the position of r inside it::

        out_seqlens_expanded[r]  = max(seq_lens[row] - extend_seq_lens[row] + 1 + j, 0)
        out_nsa_cache_seqlens[r] = min(out_seqlens_expanded[r], nsa_index_topk)

    for r in [0, T), T = sum(extend_seq_lens). Everything behind T keeps its bytes. Two launches
    above 16,384 requests.

    Args:
        extend_seq_lens: [bs] int32 or int64, any stride: query tokens of each request, >= 0.
        seq_lens: [bs] int32 or int64, any stride: KV length of each request.
        nsa_index_topk: KV tokens kept per query, >= 1.
        out_seqlens_expanded: [>= T] int32, contiguous.
        out_nsa_cache_seqlens: [>= T] int32, contiguous.
        use_adaptive: linear search up to 16 requests, binary above; False: always binary. The
            result is the same.
        total_tokens: T, where the host knows it. Nothing is read back then, and rows
            [0, min(T, total_tokens)) are written.

        Any object with ``__dlpack__`` on the device is taken in place of a tensor (memory shared,
        outputs must be writable); ordering against its producer's stream is the caller's.

    Returns:
        T; with ``total_tokens``, that number.

    Raises:
        TypeError, ValueError: bad arguments, before the launch.
        ValueError: T over the capacity of the outputs, a negative extend length, a length or sum
            outside int32. Nothing is written. Not seen with ``total_tokens`` (see
            ``fill_draft_extend_metadata_async`` and CUPY_NSA_META_DEBUG_SYNC).
        RuntimeError: a CUDA graph is being captured and ``total_tokens`` is not given, or the
            kernels were never compiled (``warmup``), or CUDA is unavailable.

    Stream: torch's current stream of the tensors' device. Without ``total_tokens`` the host waits
    for the total (not for the rows). With it, the call can be captured; replay reads the lengths
    that the buffers hold then.

    Source: the layout is that of SGLang's draft-extend metadata for NSA/DSA attention.
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
    _check.on_cuda(call)
    if not call.bs:
        return 0 if total_tokens is None else call.limit
    state = _launch.device_state(call.device)
    stream = _launch.current_raw_stream(call.device)
    reads = total_tokens is None
    if reads:
        if state.is_capturing(stream):
            raise capture_error()
    elif _env.debug_sync():
        reads = not state.is_capturing(stream)
    slot = state.take_slot()
    if not reads:
        enqueue(state, slot, stream, call, use_adaptive, True, False, 0)
        state.give_slot(slot)
        return call.limit
    try:
        enqueue(state, slot, stream, call, use_adaptive, total_tokens is not None, True, 0)
        word = state.wait(slot)
    except BaseException:
        state.retire_slot(slot)
        raise
    state.give_slot(slot)
    total = word & 0xFFFFFFFF
    status = word >> 32
    if status:
        raise _error(status, total, call)
    return total


def fill_draft_extend_metadata_cuda_async(
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
    """``fill_draft_extend_metadata_async`` on the CUDA backend."""
    call = _check.draft_extend(
        extend_seq_lens,
        seq_lens,
        nsa_index_topk,
        out_seqlens_expanded,
        out_nsa_cache_seqlens,
        use_adaptive,
        total_tokens,
    )
    _check.on_cuda(call)
    state = _launch.device_state(call.device)
    if out_total is None:
        out_total = torch.empty(2, dtype=torch.int32, device=call.extend_seq_lens.device)
    else:
        out_total = _check.out_total(out_total, call)
    stream = _launch.current_raw_stream(call.device)
    slot = state.take_slot()
    enqueue(
        state,
        slot,
        stream,
        call,
        use_adaptive,
        total_tokens is not None,
        False,
        out_total.data_ptr(),
    )
    state.give_slot(slot)
    if _env.debug_sync() and not state.is_capturing(stream):
        raise_for_status(out_total, call)
    return out_total


def warm(device: int) -> None:
    """Launch every kernel once, without rows: the driver loads code at the first launch."""
    with torch.cuda.device(device):
        lengths = torch.zeros(ONE_LAUNCH_MAX_BS + 1, dtype=torch.int32, device="cuda")
        outs = torch.empty((2, 1), dtype=torch.int32, device="cuda")
        for bs in (WARP_MAX_BS, BLOCK_THREADS, 1024, ONE_LAUNCH_MAX_BS, ONE_LAUNCH_MAX_BS + 1):
            fill_draft_extend_metadata_cuda(lengths[:bs], lengths[:bs], 1, outs[0], outs[1])


def raise_for_status(out_total: torch.Tensor, call: DraftExtendCall) -> int:
    """Read a (total, status) pair back and raise for a status other than 0. Returns the total."""
    total, status = out_total.tolist()
    if status:
        raise _error(status, total, call)
    return int(total)


def _error(status: int, total: int, call: DraftExtendCall) -> ValueError:
    # The lengths may be read back to name a request, also while another thread captures.
    with _launch.relaxed_capture() if call.device >= 0 else nullcontext():
        return draft_extend_error(status, total, call.limit, call.extend_seq_lens, call.seq_lens)


def capture_error() -> RuntimeError:
    """For a call that has to return a total while a CUDA graph is being captured."""
    return RuntimeError(
        "cupy_nsa_meta: a total cannot be returned while a CUDA graph is being captured; pass "
        "total_tokens=, or use fill_draft_extend_metadata_async, which leaves it on the device"
    )
