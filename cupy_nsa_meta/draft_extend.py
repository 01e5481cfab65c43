"""The seed operation on the CUDA backend: check, pack one struct, launch, read one word.

Device twin: ``cuda_src/draft_extend.cu``. Specification: ``reference.draft_extend``.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.compiler import is_compiling

from . import _check, _env, _graphs, _known, _launch, _traced
from ._check import DraftExtendKey, DraftExtendTensors
from ._graphs import CapturedLaunch, thread
from ._launch import current_raw_stream
from ._status import INT32_MAX, draft_extend_error

#: ``struct DraftExtendArgs`` of draft_extend.cu.
LAYOUT = _launch.Layout(
    ("Q", "extend_seq_lens seq_lens"),
    ("q", "extend_stride seq_stride"),
    ("i", "bs"),
    ("I", "flags"),
    ("Q", "launch_count out_seqlens_expanded out_nsa_cache_seqlens result out_total"),
    ("i", "max_rows topk"),
    ("I", "epoch tiles_per_block"),
    ("i", "num_entries requests_per_entry"),
    ("Q", "request_ends tile_totals"),
)
ARGS = LAYOUT.struct
assert ARGS.size == 120

BLOCK_THREADS = _launch.BLOCK_THREADS
WARP_MAX_BS = 32  # kWarpMaxBs
MAX_ITEMS = 4  # kMaxItems
MAX_ENTRIES = 4096  # kMaxEntries
GROUP = 4  # kGroup: requests per entry
ONE_LAUNCH_MAX_BS = 16384  # kOneLaunchMaxBs
LINEAR_SEARCH_MAX_BS = 16
#: Capacity from which rows are written in quads; below, a launch is a matter of latency.
QUADS_MIN_ROWS = 1 << 20  # short-lived blocks write faster than resident ones: 16 or 32 KB each
QUAD_TILE_ROWS = 4 * BLOCK_THREADS  # kQuadTileRows
QUAD_ROWS_PER_REQUEST = 16  # kQuadModeRowsPerRequest
LARGE_BLOCKS_PER_SM = 2
BLOCKS_PER_SM = 8  # 2,048 threads
#: Every block reads the whole batch: with many requests, blocks that write few rows cost more than
#: they save.
FEW_REQUESTS = 1024
FEW_ROWS = 1 << 16
TOTAL_MASK = 0xFFFFFFFF  # of a result word without its epoch; above, the status
MAX_REMEMBERED = 256  # totals, and streams, of a call on known tensors

# Flags, next to those that _check.py sets.
LINEAR_SEARCH = 4
QUADS = 16


class Geometry(NamedTuple):
    """How a batch is cut up; depends on host-known sizes alone."""

    launches: tuple[tuple[str, int], ...]  # kernels and grids, in order
    num_entries: int
    requests_per_entry: int
    flags: int  # LINEAR_SEARCH | QUADS
    tiles_per_block: int  # in quad mode, else 0


def shape_of(key: DraftExtendKey, num_sms: int) -> Geometry:
    """Kernels and blocks of a call. The host does not know T: the blocks follow the capacity."""
    aligned = (key.expanded_ptr | key.clamped_ptr) & 15 == 0
    has_quads = aligned and key.limit >= QUADS_MIN_ROWS
    return _shape(key.bs, key.limit, has_quads, key.use_adaptive, num_sms)


@lru_cache(maxsize=1024)
def _shape(bs: int, limit: int, has_quads: bool, use_adaptive: bool, num_sms: int) -> Geometry:
    grid = (limit + BLOCK_THREADS - 1) // BLOCK_THREADS or 1
    flags = tiles_per_block = 0
    num_entries, requests_per_entry = bs, 1
    launches: tuple[tuple[str, int], ...]
    if has_quads and limit >= QUAD_ROWS_PER_REQUEST * bs:
        flags = QUADS
        tiles = -(-limit // QUAD_TILE_ROWS)
        if bs <= WARP_MAX_BS:
            tiles_per_block = 2
        elif bs <= BLOCK_THREADS * MAX_ITEMS or bs > ONE_LAUNCH_MAX_BS:
            tiles_per_block = 4
        else:  # a block reads up to 200 KB of lengths before it writes
            tiles_per_block = max(16, -(-tiles // (num_sms * LARGE_BLOCKS_PER_SM)))
        grid = -(-tiles // tiles_per_block)
    elif bs > ONE_LAUNCH_MAX_BS:
        grid = min(grid, num_sms * BLOCKS_PER_SM)  # they read the totals of tiles only
    elif bs > BLOCK_THREADS:
        grid = min(grid, (num_sms + 1) // 2 if limit <= FEW_ROWS else num_sms)
    elif grid > num_sms:
        grid = min(grid, num_sms * min(FEW_REQUESTS // (bs or 1), BLOCKS_PER_SM))
    if bs <= WARP_MAX_BS:
        if bs <= LINEAR_SEARCH_MAX_BS and use_adaptive:
            flags |= LINEAR_SEARCH
        launches = (("draft_extend_warp_quads" if tiles_per_block else "draft_extend_warp", grid),)
    elif bs <= BLOCK_THREADS and not tiles_per_block:
        launches = (("draft_extend_block", grid),)
    elif bs <= BLOCK_THREADS * MAX_ITEMS:
        launches = (
            ("draft_extend_block4_quads" if tiles_per_block else "draft_extend_block4", grid),
        )
    elif bs <= ONE_LAUNCH_MAX_BS:
        num_entries, requests_per_entry = -(-bs // GROUP), GROUP
        launches = (("draft_extend_large", grid),)
    else:  # tiles of whole chunks of a block: 1,000,000 requests make 3,907 of 256
        requests_per_entry = -(-bs // (MAX_ENTRIES * BLOCK_THREADS)) * BLOCK_THREADS
        num_entries = -(-bs // requests_per_entry)
        launches = (("draft_extend_tiles", num_entries), ("draft_extend_tiled", grid))
    return Geometry(launches, num_entries, requests_per_entry, flags, tiles_per_block)


def pack(
    buffer: bytearray,
    key: DraftExtendKey,
    shape: Geometry,
    *,
    epoch: int = 0,
    result: int = 0,
    launch_count: int = 0,
    out_total: int = 0,
    scratch: int = 0,
) -> None:
    """Pack ``struct DraftExtendArgs``; pointers that are 0 are not used."""
    (
        _,
        bs,
        limit,
        topk,
        extend_ptr,
        seq_ptr,
        expanded_ptr,
        clamped_ptr,
        extend_stride,
        seq_stride,
        flags,
        _,
    ) = key
    _, num_entries, requests_per_entry, shape_flags, tiles_per_block = shape
    ARGS.pack_into(
        buffer,
        0,
        extend_ptr,
        seq_ptr,
        extend_stride,
        seq_stride,
        bs,
        flags | shape_flags,
        launch_count,
        expanded_ptr,
        clamped_ptr,
        result,
        out_total,
        limit,
        topk,
        epoch,
        tiles_per_block,
        num_entries,
        requests_per_entry,
        scratch,
        scratch and scratch + 4 * bs,
    )


def pack_call(
    buffer: bytearray, state: _launch.DeviceState, key: DraftExtendKey, **pointers: int
) -> tuple[tuple[tuple[str, int], ...], torch.Tensor | None]:
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
    pack(buffer, key, shape, **pointers)
    return shape.launches, scratch


def capture(
    state: _launch.DeviceState, key: DraftExtendKey, out_total: int = 0, scratch: int = 0
) -> _graphs.CapturedLaunch:
    """The launch of a key as a graph that answers in a slot of its own."""
    shape = shape_of(key, state.num_sms)

    def pack_slot(slot: _launch.Slot) -> tuple[tuple[str, int], ...]:
        pack(
            slot.buffer,
            key,
            shape,
            result=slot.address,
            launch_count=slot.count_ptr,
            out_total=out_total,
            scratch=scratch,
        )
        return shape.launches

    return _graphs.CapturedLaunch(state, pack_slot)


def enqueue(state: _launch.DeviceState, stream: int, key: DraftExtendKey, **pointers: int) -> None:
    """Launch the kernels themselves, which do not answer."""
    slot = state.take_slot()
    try:
        launches, _scratch = pack_call(slot.buffer, state, key, **pointers)
        state.launch(slot, stream, launches)
    finally:
        state.give_slot(slot)


def run_plainly(state: _launch.DeviceState, stream: int, key: DraftExtendKey) -> int:
    """Launch the kernels themselves and wait for the result word."""
    slot = state.take_slot()
    try:
        launches, _scratch = pack_call(
            slot.buffer, state, key, epoch=slot.next_epoch(), result=slot.address
        )
        state.launch(slot, stream, launches)
        word = state.wait(slot, stream)
    except BaseException:
        state.retire_slot(slot)
        raise
    state.give_slot(slot)
    return word


# ---- Calls on known tensors ---------------------------------------------------------------------


class KnownArguments(NamedTuple):
    """Of a known call: what a launch with another ``total_tokens`` is packed from."""

    key: DraftExtendKey
    room: int  # capacity of the outputs
    out_total: int


class KnownCall:
    """What is kept for a call on known tensors.

    Captured launches are the cache's: one that it gave up is not kept alive here.
    """

    __slots__ = ("addresses", "arguments", "captured", "guard", "packed", "state")

    def __init__(
        self,
        guard: _known.Guard,
        addresses: tuple[int, ...],
        state: _launch.DeviceState,
        arguments: KnownArguments,
    ) -> None:
        self.guard = guard
        self.addresses = addresses
        self.state = state
        self.arguments = arguments
        self.captured: dict[int, weakref.ref[CapturedLaunch]] = {}  # by stream
        self.packed: dict[int, _launch.PackedLaunch] = {}  # by total_tokens

    def captured_for(self, stream: int) -> CapturedLaunch | None:
        """The captured launch, if it may be replayed on ``stream`` now."""
        held = self.captured.get(stream)
        if (
            held is None
            or (_env.GRAPH_CACHE in _env.variables and not _env.graph_cache())
            or (stream and self.state.is_capturing(stream))
        ):
            return None
        captured = held()
        if captured is not None:
            cache = thread.cache
            cache.hits = captured.last_used = cache.hits + 1
        return captured

    def launch(self, total_tokens: Any) -> bool:
        """Enqueue with the total given; False where the call has to be looked at again."""
        if total_tokens.__class__ is not int or (
            _env.DEBUG_SYNC in _env.variables and _env.debug_sync()
        ):
            return False
        packed = self.packed.get(total_tokens)
        if packed is None:
            packed = self._pack(total_tokens)
            if packed is None:
                return False
        state = self.state
        state.launch(packed, current_raw_stream(state.device), packed.launches)
        return True

    def _pack(self, total_tokens: int) -> _launch.PackedLaunch | None:
        """The launch with another total; None where the outputs have no room for it."""
        key, room, out_total = self.arguments
        if not 0 <= total_tokens <= room:
            return None
        key = key._replace(limit=total_tokens, flags=key.flags | _check.TOTAL_IS_GIVEN)
        shape = shape_of(key, self.state.num_sms)
        arguments = bytearray(ARGS.size)
        pack(arguments, key, shape, out_total=out_total)
        if len(self.packed) >= MAX_REMEMBERED:
            self.packed.clear()
        packed = self.packed[total_tokens] = _launch.PackedLaunch(arguments, shape.launches)
        return packed


def know(
    known_key: Hashable,
    tensors: Sequence[torch.Tensor],
    key: DraftExtendKey,
    state: _launch.DeviceState,
    out_total: int = 0,
) -> KnownCall | None:
    """The entry of a call in the thread's known calls; None where none is kept.

    ``tensors`` were checked in this call. An entry of the same objects that were otherwise then is
    replaced. Above ONE_LAUNCH_MAX_BS a launch needs scratch of its own.
    """
    if known_key is None or key.bs > ONE_LAUNCH_MAX_BS:
        return None
    calls = thread.known
    known = calls.find(known_key)
    if known is not None and known.addresses == _known.addresses(tensors) and known.guard(*tensors):
        return known
    if not calls.is_due(known_key):
        return None
    guard = _known.guard(tensors)
    if guard is None:
        return None
    room = min(tensors[2].numel(), tensors[3].numel(), INT32_MAX)
    arguments = KnownArguments(key, room, out_total)
    known = KnownCall(guard, _known.addresses(tensors), state, arguments)
    calls.keep(known_key, known, tensors)
    return known


def know_captured(known: KnownCall | None, stream: int, captured: CapturedLaunch) -> None:
    if known is not None:
        if len(known.captured) >= MAX_REMEMBERED:
            known.captured.clear()
        known.captured[stream] = weakref.ref(captured)


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
    if is_compiling():
        return _traced.fill(
            "cuda", extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded,
            out_nsa_cache_seqlens, use_adaptive, total_tokens,
        )  # fmt: skip
    known = known_key = None
    if nsa_index_topk.__class__ is int and use_adaptive.__class__ is bool:
        known_key = (
            id(extend_seq_lens), id(seq_lens), id(out_seqlens_expanded), id(out_nsa_cache_seqlens),
            nsa_index_topk, use_adaptive,
        )  # fmt: skip
        known = thread.known.find(known_key)
    if (
        known is not None
        and known.guard(extend_seq_lens, seq_lens, out_seqlens_expanded, out_nsa_cache_seqlens)
        and known.addresses
        == (
            extend_seq_lens.data_ptr(),
            seq_lens.data_ptr(),
            out_seqlens_expanded.data_ptr(),
            out_nsa_cache_seqlens.data_ptr(),
        )
    ):
        if total_tokens is None:
            stream = current_raw_stream(known.state.device)
            captured = known.captured_for(stream)
            if captured is not None:
                try:
                    word = captured.run(stream)
                except BaseException:  # its late word must not answer a later call
                    thread.cache.discard(captured)
                    raise
                if word <= TOTAL_MASK:
                    return word
                tensors, key = _check.draft_extend(
                    extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded,
                    out_nsa_cache_seqlens, use_adaptive, None,
                )  # fmt: skip
                raise status_error(word >> 32, word & TOTAL_MASK, tensors, key)
        elif known.launch(total_tokens):
            return total_tokens
    return _fill(
        known_key, extend_seq_lens, seq_lens, nsa_index_topk, out_seqlens_expanded,
        out_nsa_cache_seqlens, use_adaptive, total_tokens,
    )  # fmt: skip


def _fill(
    known_key: Hashable,
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
    use_adaptive: bool,
    total_tokens: int | None,
) -> int:
    """A call that is not known: everything is looked at."""
    tensors, key = _check.draft_extend(
        extend_seq_lens,
        seq_lens,
        nsa_index_topk,
        out_seqlens_expanded,
        out_nsa_cache_seqlens,
        use_adaptive,
        total_tokens,
    )
    device = key.device
    if device < 0:
        raise _check.not_on_cuda()
    if not key.bs:
        return 0 if total_tokens is None else key.limit
    state = _launch.device_state(device)
    stream = current_raw_stream(device)
    if total_tokens is None:
        if stream and state.is_capturing(stream):
            raise capture_error()
    elif not _env.debug_sync() or state.is_capturing(stream):
        enqueue(state, stream, key)
        know(known_key, tensors, key, state)
        return key.limit
    captured = None
    if key.bs <= ONE_LAUNCH_MAX_BS and _env.graph_cache():  # above, scratch is per call
        captured = thread.cache.lookup((stream, key), capture, state, key)
    if captured is None:
        word = run_plainly(state, stream, key)
    else:
        if total_tokens is None:  # else this is a call under CUPY_NSA_META_DEBUG_SYNC=1
            know_captured(know(known_key, tensors, key, state), stream, captured)
        try:
            word = captured.run(stream)
        except BaseException:
            thread.cache.discard(captured)
            raise
    if word > TOTAL_MASK:
        raise status_error(word >> 32, word & TOTAL_MASK, tensors, key)
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
    known_key = None
    if out_total is not None and nsa_index_topk.__class__ is int and use_adaptive.__class__ is bool:
        known_key = (
            id(extend_seq_lens), id(seq_lens), id(out_seqlens_expanded), id(out_nsa_cache_seqlens),
            nsa_index_topk, use_adaptive, id(out_total),
        )  # fmt: skip
        known = thread.known.find(known_key)
        if (
            known is not None
            and known.guard(
                extend_seq_lens, seq_lens, out_seqlens_expanded, out_nsa_cache_seqlens, out_total
            )
            and known.addresses
            == (
                extend_seq_lens.data_ptr(),
                seq_lens.data_ptr(),
                out_seqlens_expanded.data_ptr(),
                out_nsa_cache_seqlens.data_ptr(),
                out_total.data_ptr(),
            )
        ):
            if total_tokens is not None:
                if known.launch(total_tokens):
                    return out_total
            elif _env.DEBUG_SYNC not in _env.variables or not _env.debug_sync():
                stream = current_raw_stream(known.state.device)
                captured = known.captured_for(stream)
                if captured is not None:
                    thread.cache.launch(captured, stream)
                    return out_total
    tensors, key = _check.draft_extend(
        extend_seq_lens,
        seq_lens,
        nsa_index_topk,
        out_seqlens_expanded,
        out_nsa_cache_seqlens,
        use_adaptive,
        total_tokens,
    )
    device = key.device
    if device < 0:
        raise _check.not_on_cuda()
    state = _launch.device_state(device)
    if out_total is None:
        out_total = torch.empty(2, dtype=torch.int32, device=f"cuda:{device}")
    else:
        out_total = _check.out_total(out_total, tensors, key)
    out_ptr = out_total.data_ptr()
    stream = current_raw_stream(device)
    captured = None
    if (  # with total_tokens the key changes at every step
        total_tokens is None
        and key.bs <= ONE_LAUNCH_MAX_BS
        and _env.graph_cache()
        and not state.is_capturing(stream)
    ):
        captured = thread.cache.lookup((stream, key, out_ptr), capture, state, key, out_ptr)
    if captured is not None:
        know_captured(know(known_key, (*tensors, out_total), key, state, out_ptr), stream, captured)
        thread.cache.launch(captured, stream)
    else:
        enqueue(state, stream, key, out_total=out_ptr)
        if total_tokens is not None:
            know(known_key, (*tensors, out_total), key, state, out_ptr)
    if _env.debug_sync() and not state.is_capturing(stream):
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
