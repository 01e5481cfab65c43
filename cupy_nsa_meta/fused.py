"""Everything a DSA forward pass needs, in one launch: decode, target-verify, draft-extend, EXTEND.

Device twin: ``cuda_src/fused.cu``, whose arguments ``_fused_args.py`` packs. Specification:
``reference_fused.metadata``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch.compiler import is_compiling

from . import _check, _env, _known, _launch, _traced, reference_fused
from ._check import FusedCall, FusedOutputs
from ._fused_args import (
    NUM_TILE_SUMS,
    ONE_LAUNCH_MAX_BS,
    Numbers,
    PlainNumbers,
    Template,
    num_tiles,
    numbers_of,
)
from ._graphs import CapturedLaunch, thread
from ._launch import PackedLaunch
from ._status import INT32_MAX, Status, fused_error
from .dispatch import cuda_unavailable_reason


class Required:
    """Stands for "not given" where an alias keyword or a later default forbids leaving it out."""

    def __repr__(self) -> str:
        return "<required>"


class Default(int):
    """An int that can be told from the same number given by the caller."""


REQUIRED: Any = Required()
PAGE_SIZE_64 = Default(64)


def capture(state: _launch.DeviceState, packed: PackedLaunch) -> CapturedLaunch:
    """The launch as a graph."""
    return CapturedLaunch(state, packed, packed.launches)


# ---- Calls on known tensors ---------------------------------------------------------------------


class _Checked(NamedTuple):
    """A call on known tensors that was checked: no larger one is checked again."""

    template: Template
    most: Numbers
    #: Of its scalars those that have to be the same; (): smaller ones are checked, too.
    constants: tuple[Any, ...]


class _KnownCall:
    """What is kept for calls on known tensors, of which none is kept alive."""

    __slots__ = ("calls", "checked", "packed", "state")

    def __init__(
        self, calls: _known.KnownCalls[_KnownCall], state: _launch.DeviceState, checked: _Checked
    ) -> None:
        self.calls = calls  # those of the operation, which share the room for packed launches
        self.state = state
        #: By the scalars of a call; None: met once, not yet packed for good.
        self.packed: dict[tuple[Any, ...], PackedLaunch | None] = {}
        #: Of the last call that was checked. Threads share this object: it is read once by whoever
        #: packs with it, and replaced as a whole.
        self.checked = checked

    def keep(self, scalars: tuple[Any, ...], packed: PackedLaunch | None) -> None:
        kept = self.packed
        size = len(kept)
        if size >= MIN_PACKED and size * (len(self.calls.of_memory) or 1) >= MAX_PACKED:
            kept.clear()
        kept[scalars] = packed

    def meet(
        self, scalars: tuple[Any, ...], numbers: PlainNumbers, template: Template, is_again: bool
    ) -> None:
        """Launch with scalars that were not met before, or once: the second time packs for good."""
        state = self.state
        stream = _launch.current_raw_stream(state.device)
        if is_again:
            packed = template.pack(numbers)
            self.keep(scalars, packed)
            state.launch(packed, stream, packed.launches)
            return
        arguments = _launch.take_arguments()
        try:
            state.launch(arguments, stream, template.fill(arguments.buffer, numbers))
        finally:
            _launch.give_arguments(arguments)
        self.keep(scalars, None)


MAX_KNOWN = 256  # calls of one operation
#: Of one known call, alone and beside many: a packed launch takes 2 KB, and a call that was known
#: by its memory may never come back.
MAX_PACKED, MIN_PACKED = 1024, 16
_CUDA_BACKENDS = ("auto", "cuda")


class _Op(NamedTuple):
    """How the numbers of a call follow from its scalars, of which the first few may vary."""

    num_varying: int
    #: From scalars and the numbers of the call checked before; None: to be checked, being larger,
    #: or wrong.
    numbers: Callable[[tuple[Any, ...], PlainNumbers], PlainNumbers | None]
    known: _known.KnownCalls[_KnownCall]


def _decode_numbers(scalars: tuple[Any, ...], most: PlainNumbers) -> PlainNumbers | None:
    bs = scalars[0]
    return (bs, bs, 0, False) if 0 <= bs <= most[0] else None


def _verify_numbers(scalars: tuple[Any, ...], most: PlainNumbers) -> PlainNumbers | None:
    bs, next_n = scalars[0], scalars[4]
    return (bs, bs * next_n, 0, False) if 0 <= bs <= most[0] else None


def _draft_extend_numbers(scalars: tuple[Any, ...], most: PlainNumbers) -> PlainNumbers | None:
    bs, total_len, max_extend_len = scalars[0], scalars[1], scalars[5]
    if 0 <= bs <= most[0] and 0 <= total_len <= most[1] and total_len <= bs * max_extend_len:
        return bs, total_len, 0, False
    return None


def _extend_numbers(scalars: tuple[Any, ...], most: PlainNumbers) -> PlainNumbers | None:
    total_len, pad_to = scalars[0], scalars[1]
    if 0 <= total_len <= most[1]:
        if pad_to is None:
            return most[0], total_len, 0, False
        if total_len <= pad_to <= most[2]:
            return most[0], total_len, pad_to, False
    return None


_DECODE = _Op(1, _decode_numbers, _known.KnownCalls(MAX_KNOWN))
_VERIFY = _Op(1, _verify_numbers, _known.KnownCalls(MAX_KNOWN))
_DRAFT_EXTEND = _Op(2, _draft_extend_numbers, _known.KnownCalls(MAX_KNOWN))
_EXTEND = _Op(2, _extend_numbers, _known.KnownCalls(MAX_KNOWN))


class _Met(NamedTuple):
    """A call that was not launched by what is known of it."""

    op: _Op
    tensors: tuple[Any, ...]
    memory: _known.Memory | None
    scalars: tuple[Any, ...]
    known: _KnownCall | None  # of its tensors


def _again(op: _Op, tensors: tuple[Any, ...], scalars: tuple[Any, ...]) -> _Met | None:
    """Launch a call that is known; None when that was done."""
    known, memory = op.known.find(tensors)
    variables = _env.variables
    if (
        known is None
        or (_env.BACKEND in variables and _env.backend() not in _CUDA_BACKENDS)
        or (_env.DEBUG_SYNC in variables and _env.debug_sync())
    ):
        return _Met(op, tensors, memory, scalars, None)
    try:
        packed = known.packed.get(scalars, _known.NEVER)
    except TypeError:  # a number that cannot be hashed; the check raises
        return _Met(op, tensors, memory, scalars, None)
    if packed is None or packed is _known.NEVER:
        template, most, constants = known.checked
        if scalars[op.num_varying :] == constants:
            numbers = op.numbers(scalars, most)
            if numbers is not None:
                known.meet(scalars, numbers, template, packed is None)
                return None
        return _Met(op, tensors, memory, scalars, known)
    # From the second time on as a captured launch. Cache.lookup and Cache.launch would do the same
    # where there is one; the two calls cost 0.1 us.
    state = known.state
    stream = _launch.current_raw_stream(state.device)
    if (_env.GRAPH_CACHE not in variables or _env.graph_cache()) and not (
        stream and state.is_capturing(stream)
    ):
        cache = thread.cache
        captured = cache.graphs.get((stream, packed))
        if captured is not None:
            cache.hits = captured.last_used = cache.hits + 1
        else:
            captured = cache.lookup((stream, packed), capture, state, packed)
        if captured is not None:
            try:
                state.launch_graph(captured.graph, stream)
            except BaseException:
                cache.discard(captured)
                raise
            return None
    state.launch(packed, stream, packed.launches)
    return None


def _keep(
    template: Template,
    numbers: Numbers,
    packed: PackedLaunch,
    state: _launch.DeviceState,
    met: _Met,
) -> None:
    """Keep what is known of a call that was checked, when its memory is met again."""
    op, tensors, memory, scalars, known = met
    try:
        hash(scalars)
    except TypeError:  # an int of a class of its own
        return
    is_plain = _PLAIN_TYPES.issuperset(map(type, scalars))
    checked = _Checked(template, numbers, scalars[op.num_varying :] if is_plain else ())
    if known is not None:
        known.checked = checked
        known.keep(scalars, packed)
        return
    if memory is not None and op.known.is_due(memory):
        known = _KnownCall(op.known, state, checked)
        known.keep(scalars, packed)
        op.known.keep(memory, tensors, known)


_PLAIN_TYPES = frozenset((int, bool, type(None)))  # not those of ``_typed``


def _typed(*scalars: Any) -> tuple[Any, ...]:
    """Scalars of other types than expected, which may be right or wrong, and equal right ones: 4.0
    and True are not 4 and 1. The types come first: a comparison ends there, before it asks a tensor
    whether it equals a number."""
    return (*map(type, scalars), *scalars)


def _enqueue(
    template: Template,
    numbers: Numbers,
    state: _launch.DeviceState,
    stream: int,
    device: torch.device,
) -> PackedLaunch:
    """Launch a checked call."""
    scratch = None
    if numbers.bs > ONE_LAUNCH_MAX_BS:  # freed at return, reused by torch in stream order
        scratch = torch.empty(
            NUM_TILE_SUMS * num_tiles(numbers.bs), dtype=torch.int64, device=device
        )
    packed = template.pack(numbers, 0 if scratch is None else scratch.data_ptr())
    state.launch(packed, stream, packed.launches)
    return packed


def _runs_cuda(device: int) -> bool:
    """CUDA tensors go to the kernels where those can run; this family has no Triton form."""
    if device < 0:
        return False
    wanted = _env.backend()
    if wanted not in ("auto", "cuda"):
        return False
    reason = cuda_unavailable_reason(device)
    if reason is not None and wanted == "cuda":
        raise RuntimeError(f"CUPY_NSA_META_BACKEND=cuda cannot run: {reason}")
    return reason is None


def _run(call: FusedCall, width_name: str, met: _Met) -> None:
    """Check and enqueue; under CUPY_NSA_META_DEBUG_SYNC=1 read the status and raise."""
    call = _check.fused(call, width_name)
    device = call.device
    if _runs_cuda(device):
        state = _launch.device_state(device, "fused")
        stream = _launch.current_raw_stream(device)
        numbers = numbers_of(call)
        if not (_env.debug_sync() and not state.is_capturing(stream)):
            template = Template(call, state.num_sms, state.sticky_status)
            packed = _enqueue(template, numbers, state, stream, call.seq_lens.device)
            if call.bs <= ONE_LAUNCH_MAX_BS:
                _keep(template, numbers, packed, state, met)
            return
        status = torch.zeros(1, dtype=torch.int32, device=call.seq_lens.device)
        template = Template(call, state.num_sms, status.data_ptr())
        _enqueue(template, numbers, state, stream, status.device)
    else:
        capturing = device >= 0 and torch.cuda.is_current_stream_capturing()
        status = reference_fused.metadata(call)
        if not _env.debug_sync() or capturing:
            sticky = _launch.status_word(device)
            torch.maximum(sticky, status, out=sticky)
            return
    # The lengths may be read back to name a request, also while another thread captures.
    with _launch.relaxed_capture() if device >= 0 else nullcontext():
        found = int(status.item())
        if found:
            raise fused_error(found, call)


def last_status(device: int | torch.device | str | None = None, reset: bool = True) -> int:
    """The largest status that calls of the fused family, and replays of them, have met on a device.

    0 fine; 1 ``page_table_1_flattened`` is too short; 2 a negative extend length; 3 a length
    outside int32, or a result that was cut to int32; 4 the extend lengths do not add up to
    ``total_len``; 5 a request without a row in ``req_to_token``. Calls under
    CUPY_NSA_META_DEBUG_SYNC=1 raise and leave no trace here.

    Args:
        device: a CUDA device or "cpu"; default: the current CUDA device, without CUDA the CPU.
        reset: set the status back to 0.

    Waits for torch's current stream of the device; synchronise others before. Not during capture
    (``RuntimeError``).
    """
    if device is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else -1
    else:
        index = _check.device_index(device, takes_cpu=True)
    _check.boolean("reset", reset)
    if index >= 0:
        _launch.refuse_forked()
    if index >= 0 and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "cupy_nsa_meta.last_status: not allowed while a CUDA graph is being captured"
        )
    with _launch.relaxed_capture() if index >= 0 else nullcontext():
        word = _launch.status_word(index)
        status = int(word.item())
        if status and reset:
            word.zero_()
    return Status(status)


_WARM_DEVICE = "cuda"


def warm(device: int) -> None:
    """Launch every kernel once, on batches without rows: the first launch loads the code."""
    bs = ONE_LAUNCH_MAX_BS + 1
    with torch.cuda.device(device):
        zeros, out = torch.zeros((2, bs), dtype=torch.int32, device=_WARM_DEVICE)
        for count in (1, bs):
            fused_dsa_extend_metadata(
                zeros[:count], zeros[:count], total_len=0, dsa_index_topk=1, cache_seqlens=out
            )
        one, outs = zeros[:1], out[:5].unsqueeze(1)
        fused_dsa_decode_metadata(
            one, one, one.unsqueeze(0), outs[0], outs[1], None, outs[2], outs[3], None,
            bs=0, max_len=0, dsa_index_topk=1, physical_page_size=1,
        )  # fmt: skip
        fused_dsa_draft_extend_metadata(
            one, one, one, one.unsqueeze(0), outs[0], outs[1], None, outs[2], outs[3], outs[4],
            None, bs=0, total_len=0, max_seqlen_k=0, dsa_index_topk=1, physical_page_size=1,
            max_extend_len=1, max_total_len=0,
        )  # fmt: skip


# ---- The public functions -----------------------------------------------------------------------


def _page_size(physical_page_size: Any, real_page_size: Any) -> Any:
    """The page size by either of its names; ``torch.compile`` traces types, not identities."""
    if isinstance(physical_page_size, Default):
        return 64 if real_page_size is None else real_page_size
    if real_page_size is None:
        if isinstance(physical_page_size, Required):
            raise TypeError("physical_page_size: expected an int, got nothing")
        return physical_page_size
    if not isinstance(physical_page_size, Required):
        raise TypeError(
            "physical_page_size, real_page_size: expected one of the two names of the page size, "
            f"got both ({physical_page_size} and {real_page_size})"
        )
    return real_page_size


_LATE_INTS = ("next_n", "max_extend_len", "max_total_len")  # of them None is a wrong type


def _required(**arguments: Any) -> None:
    """Raise for the first argument that is None; called once it is known that one is."""
    for name, value in arguments.items():
        is_missing = isinstance(value, Required)
        if is_missing or (value is None and name not in _LATE_INTS):
            got = "nothing" if is_missing else "None"
            kind = "an int" if is_missing else "a torch.Tensor"
            raise TypeError(f"{name}: expected {kind}, got {got}")


def fused_dsa_decode_metadata(
    seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    page_table_1: torch.Tensor | None,
    dsa_cache_seqlens: torch.Tensor,
    dsa_cu_seqlens_k: torch.Tensor,
    real_page_table: torch.Tensor | None,
    bs: int,
    max_len: int,
    dsa_index_topk: int,
    physical_page_size: int = REQUIRED,
    *,
    real_page_size: int | None = None,
) -> None:
    """Metadata of a decode step, one query token for each request, in one launch.

    With W = max_len, ps = physical_page_size, n = min(cache_seqlens[i], W)::

        cache_seqlens[i]       = seq_lens[i]
        cu_seqlens_k           = [0, inclusive sum of cache_seqlens]
        dsa_cache_seqlens[i]   = min(max(cache_seqlens[i], 0), dsa_index_topk)
        dsa_cu_seqlens_k       = [0, inclusive sum of dsa_cache_seqlens]
        page_table_1[i, c]     = req_to_token[req_pool_indices[i], c]         c < n
        real_page_table[i, p]  = req_to_token[req_pool_indices[i], p * ps] // ps    p * ps < n

    Everything else keeps its bytes: rows from ``bs`` on, columns from n on. Two launches above
    16,384 requests.

    Args:
        seq_lens: [>= bs] int32 or int64, any stride: KV length of each request.
        req_pool_indices: [>= bs] int32 or int64, any stride: row of each request in req_to_token.
        req_to_token: [pool, >= W] int32, unit column stride: token slot of each position, >= 0.
        cache_seqlens, dsa_cache_seqlens: [>= bs] int32, contiguous.
        cu_seqlens_k, dsa_cu_seqlens_k: [>= bs + 1] int32, contiguous.
        page_table_1: [>= bs, >= W] int32, unit column stride; None: not wanted, and only every
            ps-th token is read.
        real_page_table: [>= bs, >= ceil(W / ps)] int32, unit column stride; at ps 1 it may be
            page_table_1.
        bs: requests. With 0, element 0 of the cu arrays becomes 0 and nothing else is written.
        max_len: W, columns to fill; a longer request is cut there.
        dsa_index_topk: KV tokens kept per query, >= 1.
        physical_page_size: ps, a power of two up to 256. ``real_page_size`` is its older name.

    Raises:
        TypeError, ValueError: bad arguments, before the launch; nothing is written.
        RuntimeError: a CUDA graph is being captured, but the kernels were never compiled
            (``warmup``).

    What only the device knows never raises here: a request whose ``req_pool_indices`` is no row of
    ``req_to_token`` gets no table row, a sum beyond int32 is cut to 2^31 - 1; ``last_status``
    tells, and CUPY_NSA_META_DEBUG_SYNC=1 turns it into ``ValueError``.

    Stream: torch's current stream of the tensors' device; no synchronisation. Can be captured after
    ``warmup``; replay reads the lengths that the buffers hold then.

    Source: names and layout are those of SGLang's fused metadata for NSA/DSA attention.
    """
    if is_compiling():
        page_size = _page_size(physical_page_size, real_page_size)
        pages = _traced.second_table(page_table_1, real_page_table, page_size)
        torch.ops.nsa_meta.fused_dsa_decode_metadata(
            seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k, page_table_1,
            dsa_cache_seqlens, dsa_cu_seqlens_k, pages, bs, max_len, dsa_index_topk, page_size,
        )  # fmt: skip
        return
    if physical_page_size is REQUIRED or real_page_size is not None:
        physical_page_size = _page_size(physical_page_size, real_page_size)
    scalars: tuple[Any, ...] = (bs, max_len, dsa_index_topk, physical_page_size)
    if not (
        bs.__class__ is max_len.__class__ is int
        and dsa_index_topk.__class__ is physical_page_size.__class__ is int
    ):
        scalars = _typed(*scalars)
    met = _again(
        _DECODE,
        (
            seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k, page_table_1,
            dsa_cache_seqlens, dsa_cu_seqlens_k, real_page_table,
        ),
        scalars,
    )  # fmt: skip
    if met is None:
        return
    if (
        req_pool_indices is None
        or req_to_token is None
        or cache_seqlens is None
        or cu_seqlens_k is None
        or dsa_cache_seqlens is None
        or dsa_cu_seqlens_k is None
    ):
        _required(
            req_pool_indices=req_pool_indices,
            req_to_token=req_to_token,
            cache_seqlens=cache_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            dsa_cache_seqlens=dsa_cache_seqlens,
            dsa_cu_seqlens_k=dsa_cu_seqlens_k,
        )
    outputs = FusedOutputs(
        cache_seqlens=cache_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        dsa_cache_seqlens=dsa_cache_seqlens,
        dsa_cu_seqlens_k=dsa_cu_seqlens_k,
        page_table_1=page_table_1,
        real_page_table=real_page_table,
    )
    call = FusedCall(
        seq_lens, None, req_pool_indices, req_to_token, outputs, bs, bs, max_len,
        dsa_index_topk, physical_page_size, 1, 0, 0, True, -1,
    )  # fmt: skip
    _run(call, "max_len", met)


def fused_dsa_target_verify_metadata(
    seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    page_table_1: torch.Tensor | None,
    seqlens_expanded: torch.Tensor,
    dsa_cache_seqlens: torch.Tensor,
    dsa_cu_seqlens_k: torch.Tensor,
    real_page_table: torch.Tensor | None,
    bs: int,
    max_seqlen_k: int,
    dsa_index_topk: int,
    physical_page_size: int = REQUIRED,
    next_n: int = REQUIRED,
    paged_mqa_ctx_lens_2d: torch.Tensor | None = None,
    *,
    real_page_size: int | None = None,
) -> None:
    """Metadata of a target-verify step, N = next_n query tokens for each request, in one launch.

    ::

        cache_seqlens[i]            = seq_lens[i] + N
        cu_seqlens_k                = [0, inclusive sum of cache_seqlens]
        seqlens_expanded[i * N + j] = max(seq_lens[i] + j + 1, 0)             0 <= j < N
        dsa_cache_seqlens           = min(seqlens_expanded, dsa_index_topk)
        dsa_cu_seqlens_k            = [0, inclusive sum of dsa_cache_seqlens]
        paged_mqa_ctx_lens_2d[i, j] = seq_lens[i] + N

    The page tables are those of ``fused_dsa_decode_metadata`` with W = max_seqlen_k, each row N
    times: rows i * N + j.

    Args:
        seqlens_expanded, dsa_cache_seqlens: [>= bs * N] int32, contiguous.
        dsa_cu_seqlens_k: [>= bs * N + 1] int32, contiguous.
        page_table_1, real_page_table: [>= bs * N, ...], else as in decode.
        next_n: N >= 1.
        paged_mqa_ctx_lens_2d: [>= bs, >= N] int32, unit column stride, or None.
        The others, errors, stream and source: as in ``fused_dsa_decode_metadata``.
    """
    if is_compiling():
        _required(next_n=next_n)
        page_size = _page_size(physical_page_size, real_page_size)
        pages = _traced.second_table(page_table_1, real_page_table, page_size)
        torch.ops.nsa_meta.fused_dsa_target_verify_metadata(
            seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k, page_table_1,
            seqlens_expanded, dsa_cache_seqlens, dsa_cu_seqlens_k, pages, bs, max_seqlen_k,
            dsa_index_topk, page_size, next_n, paged_mqa_ctx_lens_2d,
        )  # fmt: skip
        return
    if physical_page_size is REQUIRED or real_page_size is not None:
        physical_page_size = _page_size(physical_page_size, real_page_size)
    scalars: tuple[Any, ...] = (bs, max_seqlen_k, dsa_index_topk, physical_page_size, next_n)
    if not (
        bs.__class__ is max_seqlen_k.__class__ is next_n.__class__ is int
        and dsa_index_topk.__class__ is physical_page_size.__class__ is int
    ):
        scalars = _typed(*scalars)
    met = _again(
        _VERIFY,
        (
            seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k, page_table_1,
            seqlens_expanded, dsa_cache_seqlens, dsa_cu_seqlens_k, real_page_table,
            paged_mqa_ctx_lens_2d,
        ),
        scalars,
    )  # fmt: skip
    if met is None:
        return
    if (
        next_n is REQUIRED
        or req_pool_indices is None
        or req_to_token is None
        or cache_seqlens is None
        or cu_seqlens_k is None
        or seqlens_expanded is None
        or dsa_cache_seqlens is None
        or dsa_cu_seqlens_k is None
    ):
        _required(
            next_n=next_n,
            req_pool_indices=req_pool_indices,
            req_to_token=req_to_token,
            cache_seqlens=cache_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            seqlens_expanded=seqlens_expanded,
            dsa_cache_seqlens=dsa_cache_seqlens,
            dsa_cu_seqlens_k=dsa_cu_seqlens_k,
        )
    if type(next_n) is not int or not 1 <= next_n <= INT32_MAX:
        next_n = _check.integer("next_n", next_n, 1, INT32_MAX)
    if type(bs) is not int or bs < 0 or bs * next_n > INT32_MAX:
        bs = _check.integer("bs", bs, 0, INT32_MAX // next_n)
    outputs = FusedOutputs(
        cache_seqlens=cache_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        seqlens_expanded=seqlens_expanded,
        dsa_cache_seqlens=dsa_cache_seqlens,
        dsa_cu_seqlens_k=dsa_cu_seqlens_k,
        paged_mqa_ctx_lens_2d=paged_mqa_ctx_lens_2d,
        page_table_1=page_table_1,
        real_page_table=real_page_table,
    )
    call = FusedCall(
        seq_lens, None, req_pool_indices, req_to_token, outputs, bs, bs * next_n,
        max_seqlen_k, dsa_index_topk, physical_page_size, next_n, next_n, 0, False, -1,
    )  # fmt: skip
    _run(call, "max_seqlen_k", met)


def fused_dsa_draft_extend_metadata(
    seq_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    page_table_1: torch.Tensor | None,
    seqlens_expanded: torch.Tensor,
    dsa_cache_seqlens: torch.Tensor,
    dsa_cu_seqlens_k: torch.Tensor,
    real_page_table: torch.Tensor | None,
    bs: int,
    total_len: int,
    max_seqlen_k: int,
    dsa_index_topk: int,
    physical_page_size: int = REQUIRED,
    max_extend_len: int = REQUIRED,
    max_total_len: int = REQUIRED,
    static_extend_len: bool = False,
    *,
    real_page_size: int | None = None,
) -> None:
    """Metadata of a draft-extend step, q_i = extend_seq_lens[i] query tokens each, in one launch.

    With row r the j-th query token of request i, in the order of the requests::

        cache_seqlens[i]     = seq_lens[i]
        cu_seqlens_k         = [0, inclusive sum of cache_seqlens]
        seqlens_expanded[r]  = max(seq_lens[i] - q_i + 1 + j, 0)
        dsa_cache_seqlens[r] = min(seqlens_expanded[r], dsa_index_topk)
        dsa_cu_seqlens_k     = [0, inclusive sum of dsa_cache_seqlens]

    for r in [0, R), R = min(T, total_len), T = sum of q. The page tables are those of
    ``fused_dsa_decode_metadata`` with W = max_seqlen_k, the row of request i for each of its q_i
    output rows. Rows at or past R keep their bytes.

    Args:
        extend_seq_lens: [>= bs] int32 or int64, any stride: query tokens of each request, >= 0.
        seqlens_expanded, dsa_cache_seqlens: [>= total_len] int32, contiguous.
        dsa_cu_seqlens_k: [>= total_len + 1] int32, contiguous.
        page_table_1, real_page_table: [>= total_len, ...], else as in decode.
        total_len: T as the host knows it. Another T on the device is status 4.
        max_extend_len, max_total_len: bounds, total_len <= max_total_len and
            total_len <= bs * max_extend_len.
        static_extend_len: a promise that all extend lengths are equal, which SGLang's kernel needs.
            It changes no result, and here no time: the lengths are read either way.
        The others, errors, stream and source: as in ``fused_dsa_decode_metadata``.
    """
    if is_compiling():
        _required(max_extend_len=max_extend_len, max_total_len=max_total_len)
        page_size = _page_size(physical_page_size, real_page_size)
        pages = _traced.second_table(page_table_1, real_page_table, page_size)
        torch.ops.nsa_meta.fused_dsa_draft_extend_metadata(
            seq_lens, extend_seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k,
            page_table_1, seqlens_expanded, dsa_cache_seqlens, dsa_cu_seqlens_k, pages, bs,
            total_len, max_seqlen_k, dsa_index_topk, page_size, max_extend_len, max_total_len,
            static_extend_len,
        )  # fmt: skip
        return
    if physical_page_size is REQUIRED or real_page_size is not None:
        physical_page_size = _page_size(physical_page_size, real_page_size)
    scalars: tuple[Any, ...] = (
        bs, total_len, max_seqlen_k, dsa_index_topk, physical_page_size, max_extend_len,
        max_total_len, static_extend_len,
    )  # fmt: skip
    if not (
        bs.__class__ is total_len.__class__ is max_seqlen_k.__class__ is int
        and dsa_index_topk.__class__ is physical_page_size.__class__ is int
        and max_extend_len.__class__ is max_total_len.__class__ is int
        and static_extend_len.__class__ is bool
    ):
        scalars = _typed(*scalars)
    met = _again(
        _DRAFT_EXTEND,
        (
            seq_lens, extend_seq_lens, req_pool_indices, req_to_token, cache_seqlens, cu_seqlens_k,
            page_table_1, seqlens_expanded, dsa_cache_seqlens, dsa_cu_seqlens_k, real_page_table,
        ),
        scalars,
    )  # fmt: skip
    if met is None:
        return
    if (
        max_extend_len is REQUIRED
        or max_total_len is REQUIRED
        or extend_seq_lens is None
        or req_pool_indices is None
        or req_to_token is None
        or cache_seqlens is None
        or cu_seqlens_k is None
        or seqlens_expanded is None
        or dsa_cache_seqlens is None
        or dsa_cu_seqlens_k is None
    ):
        _required(
            max_extend_len=max_extend_len,
            max_total_len=max_total_len,
            extend_seq_lens=extend_seq_lens,
            req_pool_indices=req_pool_indices,
            req_to_token=req_to_token,
            cache_seqlens=cache_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            seqlens_expanded=seqlens_expanded,
            dsa_cache_seqlens=dsa_cache_seqlens,
            dsa_cu_seqlens_k=dsa_cu_seqlens_k,
        )
    bs, total_len = _extend_sizes(bs, total_len, "max_extend_len", max_extend_len)
    max_extend_len = int(max_extend_len)
    if type(max_total_len) is not int or max_total_len < total_len:
        max_total_len = _check.integer("max_total_len", max_total_len, 0)
        if total_len > max_total_len:
            raise ValueError(
                f"total_len: expected <= {max_total_len} (max_total_len), got {total_len}"
            )
    _check.boolean("static_extend_len", static_extend_len)
    outputs = FusedOutputs(
        cache_seqlens=cache_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        seqlens_expanded=seqlens_expanded,
        dsa_cache_seqlens=dsa_cache_seqlens,
        dsa_cu_seqlens_k=dsa_cu_seqlens_k,
        page_table_1=page_table_1,
        real_page_table=real_page_table,
    )
    call = FusedCall(
        seq_lens, extend_seq_lens, req_pool_indices, req_to_token, outputs, bs, total_len,
        max_seqlen_k, dsa_index_topk, physical_page_size, -1, 0, 0, False, -1, False,
        min(max_extend_len, INT32_MAX),
    )  # fmt: skip
    _run(call, "max_seqlen_k", met)


def _extend_sizes(
    bs: Any, total_len: Any, bound_name: str = "", bound: Any = INT32_MAX
) -> tuple[int, int]:
    """Check bs and total_len against the longest extend length, where the call has a bound."""
    if type(bs) is not int or bs < 0:
        bs = _check.integer("bs", bs, 0, INT32_MAX)
    if type(total_len) is not int or total_len < 0:
        total_len = _check.integer("total_len", total_len, 0, INT32_MAX)
    if type(bound) is not int or bound < 0:
        bound = _check.integer(bound_name, bound, 0)
    if total_len > bs * bound:
        product = f" * {bound_name} {bound}" if bound_name else ""
        raise ValueError(f"total_len: expected <= {bs * bound} (bs {bs}{product}), got {total_len}")
    return bs, total_len


def fused_dsa_extend_metadata(
    seq_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor | None = None,
    req_to_token: torch.Tensor | None = None,
    *,
    total_len: int,
    dsa_index_topk: int,
    max_seqlen_k: int | None = None,
    physical_page_size: int = PAGE_SIZE_64,
    pad_to: int | None = None,
    real_page_size: int | None = None,
    cache_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    seqlens_expanded: torch.Tensor | None = None,
    dsa_cache_seqlens: torch.Tensor | None = None,
    dsa_cu_seqlens_k: torch.Tensor | None = None,
    token_to_batch_idx: torch.Tensor | None = None,
    ks: torch.Tensor | None = None,
    ke: torch.Tensor | None = None,
    topk_indices_offset: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    extend_start_loc: torch.Tensor | None = None,
    page_table_1: torch.Tensor | None = None,
    real_page_table: torch.Tensor | None = None,
    page_table_1_flattened: torch.Tensor | None = None,
) -> None:
    """Metadata of an EXTEND (prefill) step in one launch; an output that is None is not computed.

    With row r the j-th of the q_i = extend_seq_lens[i] query tokens of request i::

        cache_seqlens[i], cu_seqlens_k     seq_lens[i], [0, inclusive sum]
        extend_start_loc[i], cu_seqlens_q  exclusive sum of q, [0, inclusive sum of q]
        seqlens_expanded[r]                max(seq_lens[i] - q_i + 1 + j, 0)
        dsa_cache_seqlens[r]               min(seqlens_expanded[r], dsa_index_topk)
        dsa_cu_seqlens_k                   [0, inclusive sum of dsa_cache_seqlens]
        token_to_batch_idx[r]              i
        ks[r], topk_indices_offset[r]      exclusive sum of seq_lens at i
        ke[r]                              ks[r] + seqlens_expanded[r]
        positions[r]                       seq_lens[i] - q_i + j
        page_table_1, real_page_table      as in decode: one row for each request
        page_table_1_flattened             req_to_token[req_pool_indices[i], :seq_lens[i]], joined

    for r in [0, R), R = min(T, total_len), T = sum of q. Example: extend [3, 2], seq [10, 4] give
    seqlens_expanded 8 9 10 3 4, ks 0 0 0 10 10, ke 8 9 10 13 14.

    Args:
        seq_lens, extend_seq_lens: [bs] int32 or int64, any stride.
        req_pool_indices, req_to_token: as in decode; needed for a page table only.
        total_len: T as the host knows it. Another T on the device is status 4.
        dsa_index_topk: KV tokens kept per query, >= 1.
        max_seqlen_k: W of page_table_1 and real_page_table; default: the widest that req_to_token
            and the given tables hold.
        physical_page_size: a power of two up to 256. ``real_page_size`` is its older name.
        pad_to: n >= total_len: dsa_cache_seqlens continues with 0 in rows [R, n), and
            dsa_cu_seqlens_k with its last sum up to element n.
        cache_seqlens, extend_start_loc: [>= bs]. cu_seqlens_k, cu_seqlens_q: [>= bs + 1].
        seqlens_expanded, token_to_batch_idx, ks, ke, topk_indices_offset: [>= total_len].
        dsa_cache_seqlens, dsa_cu_seqlens_k: [>= total_len], [>= total_len + 1], or of pad_to.
        positions: [>= total_len] int64; all others are int32, contiguous.
        page_table_1_flattened: a token past its end is dropped (status 1). The places of tokens
            past the width of req_to_token keep their bytes.
        Tables, errors, stream and source: as in ``fused_dsa_decode_metadata``; a page table without
        ``req_pool_indices`` and ``req_to_token`` is a ``ValueError``.
    """
    if is_compiling():
        page_size = _page_size(physical_page_size, real_page_size)
        pages = _traced.second_table(page_table_1, real_page_table, page_size)
        torch.ops.nsa_meta.fused_dsa_extend_metadata(
            seq_lens, extend_seq_lens, req_pool_indices, req_to_token, total_len=total_len,
            dsa_index_topk=dsa_index_topk, max_seqlen_k=max_seqlen_k, physical_page_size=page_size,
            pad_to=pad_to, cache_seqlens=cache_seqlens, cu_seqlens_k=cu_seqlens_k,
            cu_seqlens_q=cu_seqlens_q, seqlens_expanded=seqlens_expanded,
            dsa_cache_seqlens=dsa_cache_seqlens, dsa_cu_seqlens_k=dsa_cu_seqlens_k,
            token_to_batch_idx=token_to_batch_idx, ks=ks, ke=ke,
            topk_indices_offset=topk_indices_offset, positions=positions,
            extend_start_loc=extend_start_loc, page_table_1=page_table_1, real_page_table=pages,
            page_table_1_flattened=page_table_1_flattened,
        )  # fmt: skip
        return
    if real_page_size is not None:
        physical_page_size = _page_size(physical_page_size, real_page_size)
    elif physical_page_size is PAGE_SIZE_64:
        physical_page_size = 64
    scalars: tuple[Any, ...] = (total_len, pad_to, dsa_index_topk, max_seqlen_k, physical_page_size)
    if not (
        total_len.__class__ is dsa_index_topk.__class__ is physical_page_size.__class__ is int
        and (pad_to is None or pad_to.__class__ is int)
        and (max_seqlen_k is None or max_seqlen_k.__class__ is int)
    ):
        scalars = _typed(*scalars)
    tensors: tuple[Any, ...] = (
        seq_lens, extend_seq_lens, cache_seqlens, cu_seqlens_k, cu_seqlens_q, extend_start_loc,
        seqlens_expanded, dsa_cache_seqlens, dsa_cu_seqlens_k, token_to_batch_idx, ks, ke,
        topk_indices_offset, positions,
    )  # fmt: skip
    if (  # most calls have none of these, and to recognise a tensor costs 0.2 us
        req_pool_indices is not None
        or req_to_token is not None
        or page_table_1 is not None
        or real_page_table is not None
        or page_table_1_flattened is not None
    ):
        tensors += (
            req_pool_indices, req_to_token, page_table_1, real_page_table, page_table_1_flattened,
        )  # fmt: skip
    met = _again(_EXTEND, tensors, scalars)
    if met is None:
        return
    outputs = FusedOutputs(
        cache_seqlens, cu_seqlens_k, cu_seqlens_q, extend_start_loc, seqlens_expanded,
        dsa_cache_seqlens, dsa_cu_seqlens_k, token_to_batch_idx, ks, ke, topk_indices_offset,
        positions, None, page_table_1, real_page_table, page_table_1_flattened,
    )  # fmt: skip
    if not isinstance(seq_lens, torch.Tensor):
        seq_lens = _check.as_tensor("seq_lens", seq_lens)
    if not isinstance(extend_seq_lens, torch.Tensor):
        extend_seq_lens = _check.as_tensor("extend_seq_lens", extend_seq_lens)
    bs = _check.lengths("seq_lens", seq_lens)
    if _check.lengths("extend_seq_lens", extend_seq_lens) != bs:
        raise ValueError(
            f"extend_seq_lens: expected [{bs}] like seq_lens, got [{extend_seq_lens.numel()}]"
        )
    bs, total_len = _extend_sizes(bs, total_len)
    if pad_to is None:
        pad_to = 0
    elif type(pad_to) is not int or not total_len <= pad_to < INT32_MAX:
        pad_to = _check.integer("pad_to", pad_to, total_len, INT32_MAX - 1)
    width = _extend_width(outputs, req_pool_indices, req_to_token, max_seqlen_k, physical_page_size)
    call = FusedCall(
        seq_lens, extend_seq_lens, req_pool_indices, req_to_token, outputs, bs, total_len,
        width, dsa_index_topk, physical_page_size, -1, 0, pad_to, True, -1,
    )  # fmt: skip
    _run(call, "max_seqlen_k", met)


def _extend_width(
    outputs: FusedOutputs, req_pool_indices: Any, req_to_token: Any, width: Any, page_size: Any
) -> Any:
    """W of an EXTEND call: as given, else what all of its tables hold."""
    for name in ("page_table_1", "real_page_table", "page_table_1_flattened"):
        if getattr(outputs, name) is not None and (
            req_to_token is None or req_pool_indices is None
        ):
            missing = "req_to_token" if req_to_token is None else "req_pool_indices"
            raise ValueError(f"{name}: expected {missing} to fill it from, got None")
    if width is not None:
        return width
    widths = [
        (table.shape[-1] if table.dim() else 0) * scale
        for table, scale in (
            (req_to_token, 1),
            (outputs.page_table_1, 1),
            (outputs.real_page_table, page_size),
        )
        if isinstance(table, torch.Tensor)
    ]
    return min(widths, default=0)


def seqlens_expand(
    extend_seq_lens: torch.Tensor, seq_lens: torch.Tensor, total_len: int, max_q_len: int
) -> torch.Tensor:
    """KV length that each query token sees: ``seqlens_expanded`` of draft-extend, allocated here.

    With row r the j-th of the q_i = extend_seq_lens[i] query tokens of request i::

        result[r] = max(seq_lens[i] - q_i + 1 + j, 0)

    for r in [0, min(T, total_len)), T = sum of q, and 0 behind.

    Args:
        extend_seq_lens, seq_lens: [bs] int32 or int64, any stride.
        total_len: T as the host knows it, <= bs * max_q_len. Another T on the device is status 4.
        max_q_len: bound of the extend lengths.

    Returns:
        int32 [total_len] on the inputs' device.

    Errors, stream and graph behaviour: as in ``fused_dsa_decode_metadata``.

    Source: the contract of SGLang's ``seqlens_expand_triton``, clamped at 0.
    """
    if is_compiling():
        return _traced.seqlens_expand(extend_seq_lens, seq_lens, total_len, max_q_len)
    if not isinstance(extend_seq_lens, torch.Tensor):
        extend_seq_lens = _check.as_tensor("extend_seq_lens", extend_seq_lens)
    bs = _check.lengths("extend_seq_lens", extend_seq_lens)
    bs, total_len = _extend_sizes(bs, total_len, "max_q_len", max_q_len)
    expanded = torch.empty(total_len, dtype=torch.int32, device=extend_seq_lens.device)
    # Without a top-k that cuts, dsa_cache_seqlens is seqlens_expanded, and can be padded with 0.
    fused_dsa_extend_metadata(
        seq_lens,
        extend_seq_lens,
        total_len=total_len,
        dsa_index_topk=INT32_MAX,
        pad_to=total_len,
        dsa_cache_seqlens=expanded,
    )
    return expanded
