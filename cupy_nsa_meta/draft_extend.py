"""The seed operation on the CUDA backend: check, pack one struct, launch, read one word.

Device twin: ``cuda_src/draft_extend.cu``. Specification: ``reference.draft_extend``.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import nullcontext
from typing import Any

import torch
from torch.compiler import is_compiling, is_dynamo_compiling

from . import _check, _env, _form, _launch, _traced
from ._check import Addresses, DraftExtendKey, DraftExtendTensors
from ._draft_extend_args import (
    BLOCK_THREADS,
    MAX_ITEMS,
    ONE_LAUNCH_MAX_BS,
    QUADS_MIN_ROWS,
    WARP_MAX_BS,
    addresses_of,
    constants_of,
    pack,
    pack_answering,
    shape_of,
)
from ._form import Form
from ._graphs import AnsweringLaunch, captured_or_none, thread
from ._launch import EPOCH_MASK, Launches, PackedLaunch, current_raw_stream
from ._status import INT32_MAX, draft_extend_error

TOTAL_MASK = 0xFFFFFFFF  # of a result word without its epoch; above, the status
MAX_PACKED = 256  # per thread


def capture(
    state: _launch.DeviceState, key: DraftExtendKey, out_total: int = 0, scratch: int = 0
) -> AnsweringLaunch:
    """The launch of a key as a graph that answers in a slot of its own."""
    shape = shape_of(key, state.num_sms)

    def pack_slot(slot: _launch.Slot) -> Launches:
        pack(
            slot.buffer,
            constants_of(key, shape),
            addresses_of(key),
            result=slot.address,
            launch_count=slot.count_ptr,
            out_total=out_total,
            scratch=scratch,
        )
        return shape.launches

    return AnsweringLaunch(state, pack_slot)


def pack_call(
    buffer: bytearray, state: _launch.DeviceState, key: DraftExtendKey, **pointers: int
) -> tuple[Launches, torch.Tensor | None]:
    """Pack a call; its kernels and grids, and the scratch that it needs above ONE_LAUNCH_MAX_BS
    where none is given.

    The scratch may be freed after the launch: torch reuses it in stream order.
    """
    shape = shape_of(key, state.num_sms)
    scratch = None
    if key.bs > ONE_LAUNCH_MAX_BS and not pointers.get("scratch"):
        scratch = torch.empty(
            key.bs + shape.num_entries, dtype=torch.int32, device=f"cuda:{key.device}"
        )
        pointers["scratch"] = scratch.data_ptr()
    pack(buffer, constants_of(key, shape), addresses_of(key), **pointers)
    return shape.launches, scratch


def enqueue(state: _launch.DeviceState, stream: int, key: DraftExtendKey, **pointers: int) -> None:
    """Launch the kernels themselves, which do not answer."""
    arguments = _launch.take_arguments()
    try:
        launches, _scratch = pack_call(arguments.buffer, state, key, **pointers)
        state.launch(arguments, stream, launches)
    finally:
        _launch.give_arguments(arguments)


def run_plainly(state: _launch.DeviceState, stream: int, key: DraftExtendKey) -> int:
    """Launch the kernels themselves and wait for the result word."""
    slot = state.take_slot()
    try:
        launches, _scratch = pack_call(
            slot.buffer, state, key, epoch=slot.next_epoch(), result=slot.address
        )
        state.launch(slot, stream, launches)
        word = state.wait(slot, stream)
    except BaseException as error:
        state.leave_slot(slot, error)
        raise
    state.give_slot(slot)
    return word


# ---- Calls of a form ----------------------------------------------------------------------------


def _look(
    extend: Any,
    seq: Any,
    topk: Any,
    expanded: Any,
    clamped: Any,
    use_adaptive: Any,
    total_tokens: Any,
) -> tuple[DraftExtendTensors, DraftExtendKey, int | None, Form | None]:
    """Look at every argument of a call: tensors, the key without a total, the total, the form."""
    tensors, key = _check.draft_extend(
        extend, seq, topk, expanded, clamped, use_adaptive, total_tokens
    )
    if key.device < 0:
        raise _check.not_on_cuda()
    if total_tokens is not None:
        total_tokens = key.limit
        room = min(tensors[2].numel(), tensors[3].numel(), INT32_MAX)
        key = key.without_total(room)
    form = _form.form_of(tensors, key, topk, use_adaptive, may_be_the_only=total_tokens is not None)
    return tensors, key, total_tokens, form


def _run(
    form: Form, stream: int, addresses: Addresses, tensors: DraftExtendTensors, caches: bool
) -> int:
    """Launch the kernels of a call without a captured launch and wait for the result word.

    Where ``caches`` the call is noted, and captured where it is met again.
    """
    form.check(tensors, addresses)
    state = form.state
    constants, launches = form.only_cut or form.cut(addresses)
    is_due = False
    try:  # take_slot, less its call, and with what the slot holds
        slot = state.free_slots.pop()
    except IndexError:
        slot = state.take_slot()
    try:
        slot.epoch = epoch = slot.epoch % EPOCH_MASK + 1
        pack_answering(slot, constants, addresses, epoch)
        state.launch(slot, stream, launches)
        if caches:  # while the GPU works
            key = form.number, stream, addresses
            is_due = thread.cache.is_due(key)
        word = state.wait(slot, stream)
    except BaseException as error:
        state.leave_slot(slot, error)
        raise
    state.free_slots.append(slot)
    if is_due:
        _keep_captured(key, form, addresses)
    return word


def _keep_captured(key: Hashable, form: Form, addresses: Addresses, out_total: int = 0) -> None:
    """Capture a call that has been made, for the next one."""
    captured = captured_or_none(capture, form.state, form.key_at(addresses), out_total)
    if captured is not None:
        thread.cache.keep(key, captured)


def _launch_packed(
    key: Hashable,
    form: Form,
    stream: int,
    addresses: Addresses,
    tensors: DraftExtendTensors,
    total_tokens: int | None,
    out_total: torch.Tensor | None = None,
) -> None:
    """A launch that does not answer and is not among the thread's packed ones.

    Met again, it is kept there under ``key``.
    """
    form.check(tensors, addresses)
    out_ptr = 0
    if out_total is not None:
        _check.out_total(out_total, tensors, form.key)
        out_ptr = out_total.data_ptr()
    constants, launches = form.cut(addresses, total_tokens)
    if thread.met_packed.is_again(key):
        packed = PackedLaunch(b"", launches)
        pack(packed.buffer, constants, addresses, out_total=out_ptr)
        if len(thread.packed) >= MAX_PACKED:
            thread.packed.popitem(last=False)
        thread.packed[key] = packed
        form.state.launch(packed, stream, launches)
        return
    arguments = _launch.take_arguments()
    try:
        pack(arguments.buffer, constants, addresses, out_total=out_ptr)
        form.state.launch(arguments, stream, launches)
    finally:
        _launch.give_arguments(arguments)


def _enqueue(
    form: Form,
    addresses: Addresses,
    tensors: DraftExtendTensors,
    total_tokens: int | None,
    out_total: torch.Tensor,
) -> None:
    """A call that leaves total and status in ``out_total``."""
    state = form.state
    stream = current_raw_stream(form.device)
    out_ptr = out_total.data_ptr()
    caches = (  # with total_tokens the launch changes at every step
        total_tokens is None
        and (_env.GRAPH_CACHE not in _env.variables or _env.graph_cache())
        and not (stream and state.is_capturing(stream))
    )
    if caches:
        cache, graph_key = thread.cache, (form.number, stream, addresses, out_ptr)
        captured = cache.graphs.get(graph_key)
        if captured is not None:
            cache.hits = captured.last_used = cache.hits + 1
            cache.launch(captured, stream)
            return
    key = form.number, total_tokens, addresses, out_ptr
    packed = thread.packed.get(key)
    if packed is None:
        _launch_packed(key, form, stream, addresses, tensors, total_tokens, out_total)
    else:
        state.launch(packed, stream, packed.launches)
    if caches and cache.is_due(graph_key):
        _keep_captured(graph_key, form, addresses, out_ptr)


def _fill_apart(key: DraftExtendKey, tensors: DraftExtendTensors, total_tokens: int | None) -> int:
    """A checked call, launched without what is kept of others."""
    state = _launch.device_state(key.device)
    stream = current_raw_stream(key.device)
    is_capturing = state.is_capturing(stream)
    if total_tokens is not None:
        key = key.with_total(total_tokens)
        if is_capturing or not _env.debug_sync():
            enqueue(state, stream, key)
            return total_tokens
    elif is_capturing:
        raise capture_error()
    word = run_plainly(state, stream, key)
    if word > TOTAL_MASK:
        raise status_error(word >> 32, word & TOTAL_MASK, tensors, key)
    return word


# ---- The public functions -----------------------------------------------------------------------


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
        use_adaptive: where the requests of rows have to be searched, linear search up to 16
            requests, binary above; False: always binary. The result is the same.
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
    if is_dynamo_compiling():
        return _traced.fill(
            "cuda", extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded,
            out_nsa_cache_seqlens, use_adaptive, total_tokens,
        )  # fmt: skip
    form = _form.find(
        extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded, out_nsa_cache_seqlens,
        use_adaptive,
    )  # fmt: skip
    if form is None:
        if is_compiling():  # an export, which runs this code with tensors that no guard lets in
            return _traced.fill(
                "cuda", extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded,
                out_nsa_cache_seqlens, use_adaptive, total_tokens,
            )  # fmt: skip
        tensors, checked, total_tokens, form = _look(
            extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded, out_nsa_cache_seqlens,
            use_adaptive, total_tokens,
        )  # fmt: skip
        if not checked.bs and not (total_tokens and _env.debug_sync()):
            return total_tokens or 0
        if form is None:
            return _fill_apart(checked, tensors, total_tokens)
        extend_seq_lens, seq_lens, out_seqlens_expanded, out_nsa_cache_seqlens = tensors
    else:
        tensors = extend_seq_lens, seq_lens, out_seqlens_expanded, out_nsa_cache_seqlens
    addresses = (
        extend_seq_lens.data_ptr(),
        seq_lens.data_ptr(),
        out_seqlens_expanded.data_ptr(),
        out_nsa_cache_seqlens.data_ptr(),
    )
    stream = current_raw_stream(form.device)
    if total_tokens is not None:
        total_tokens = _check.given_total(
            total_tokens, form.key.limit, out_seqlens_expanded, out_nsa_cache_seqlens
        )
        if _env.DEBUG_SYNC in _env.variables and _env.debug_sync():
            form.check(tensors, addresses)
            return _fill_apart(form.key_at(addresses), tensors, total_tokens)
        key = form.number, total_tokens, addresses
        packed = thread.packed.get(key)
        if packed is None:
            _launch_packed(key, form, stream, addresses, tensors, total_tokens)
        else:
            form.state.launch(packed, stream, packed.launches)
        return total_tokens
    if stream and form.state.is_capturing(stream):
        raise capture_error()
    caches = _env.GRAPH_CACHE not in _env.variables or _env.graph_cache()
    cache = thread.cache
    captured = cache.graphs.get((form.number, stream, addresses)) if caches else None
    if captured is None:
        word = _run(form, stream, addresses, tensors, caches)
    else:
        cache.hits = captured.last_used = cache.hits + 1
        try:
            word = captured.run(stream)
        except BaseException:  # its late word must not answer a later call
            cache.discard(captured)
            raise
    if word > TOTAL_MASK:
        raise status_error(word >> 32, word & TOTAL_MASK, tensors, form.key)
    return word


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
    form = _form.find(
        extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded, out_nsa_cache_seqlens,
        use_adaptive,
    )  # fmt: skip
    if form is None:
        tensors, checked, total_tokens, form = _look(
            extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded, out_nsa_cache_seqlens,
            use_adaptive, total_tokens,
        )  # fmt: skip
        extend_seq_lens, seq_lens, out_seqlens_expanded, out_nsa_cache_seqlens = tensors
    else:
        tensors = extend_seq_lens, seq_lens, out_seqlens_expanded, out_nsa_cache_seqlens
        checked = form.key
    if total_tokens is not None:
        total_tokens = _check.given_total(
            total_tokens, checked.limit, out_seqlens_expanded, out_nsa_cache_seqlens
        )
    if out_total is None:
        out_total = torch.empty(2, dtype=torch.int32, device=f"cuda:{checked.device}")
    elif form is None or not form.knows_total(out_total):
        out_total = _check.out_total(out_total, tensors, checked)
        if form is not None:
            form.know_total(out_total)
    if form is None:
        key = checked if total_tokens is None else checked.with_total(total_tokens)
        state = _launch.device_state(checked.device)
        stream = current_raw_stream(checked.device)
        enqueue(state, stream, key, out_total=out_total.data_ptr())
    else:
        addresses = (
            extend_seq_lens.data_ptr(),
            seq_lens.data_ptr(),
            out_seqlens_expanded.data_ptr(),
            out_nsa_cache_seqlens.data_ptr(),
        )
        _enqueue(form, addresses, tensors, total_tokens, out_total)
    if _env.DEBUG_SYNC in _env.variables and _env.debug_sync():
        state = _launch.device_state(checked.device)
        if not state.is_capturing(current_raw_stream(checked.device)):
            key = checked if total_tokens is None else checked.with_total(total_tokens)
            raise_for_status(out_total, tensors, key)
    return out_total


#: Batch sizes and capacities that reach every kernel between them.
WARM_SIZES = tuple(
    (bs, rows)
    for bs in (
        WARP_MAX_BS,
        BLOCK_THREADS,
        BLOCK_THREADS * MAX_ITEMS,
        ONE_LAUNCH_MAX_BS,
        ONE_LAUNCH_MAX_BS + 1,
    )
    for rows in (1, QUADS_MIN_ROWS)
)


def warm(device: int) -> None:
    """Launch every kernel once, without rows: the driver loads code at the first launch."""
    state = _launch.device_state(device)
    with torch.cuda.device(device):
        lengths = torch.zeros(ONE_LAUNCH_MAX_BS + 1, dtype=torch.int32, device="cuda")
        outs = torch.empty((2, QUADS_MIN_ROWS), dtype=torch.int32, device="cuda")
        for bs, rows in WARM_SIZES:
            of_batch = lengths[:bs]
            _, key = _check.draft_extend(
                of_batch, of_batch, 1, outs[0, :rows], outs[1, :rows], True, None
            )
            run_plainly(state, _launch.current_raw_stream(device), key)


def raise_for_status(
    out_total: torch.Tensor, tensors: DraftExtendTensors, key: DraftExtendKey
) -> int:
    """Read a (total, status) pair back and raise for a status other than 0. Returns the total."""
    total, status = out_total.tolist()
    if status:
        raise status_error(status, total, tensors, key)
    return int(total)


def status_error(
    status: int, total: int, tensors: DraftExtendTensors, key: DraftExtendKey
) -> ValueError:
    """The error of a status other than 0."""
    # The lengths may be read back to name a request, also while another thread captures.
    with _launch.relaxed_capture() if key.device >= 0 else nullcontext():
        return draft_extend_error(status, total, key.limit, tensors[0], tensors[1])


def capture_error() -> RuntimeError:
    """For a call that has to return a total while a CUDA graph is being captured."""
    return RuntimeError(
        "cupy_nsa_meta: a total cannot be returned while a CUDA graph is being captured; pass "
        "total_tokens=, or use fill_draft_extend_metadata_async, which leaves it on the device"
    )
