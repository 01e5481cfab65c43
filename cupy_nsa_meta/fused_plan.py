"""Plans: an operation of the fused family bound to its buffers, checked and packed once.

A plan is checked at its capacities, so that every smaller batch fits too. Two launches differ in a
few numbers of ``struct FusedArgs`` (requests, rows, grid), packed into a copy of the rest, which is
kept for batches of the same size.
"""

from __future__ import annotations

import struct
from contextlib import nullcontext
from typing import Any

import torch
from torch.compiler import is_compiling

from . import _check, _env, _fused_args, _launch, _traced, fused, reference_fused
from ._check import FusedCall, FusedOutputs
from ._fused_args import Numbers, PlainNumbers, Template
from ._graphs import CapturedLaunch, captured_or_none
from ._known import NEVER
from ._launch import PackedLaunch, current_raw_stream
from ._status import INT32_MAX, Status, fused_error

_PLAIN = frozenset((int, type(None)))
_POINTER = struct.Struct("<Q")
MAX_REMEMBERED = 1024  # batch sizes
MAX_GRAPHS = 64  # captured launches, each of one batch size


class FusedPlan:
    """An operation of the fused family on fixed buffers; made by ``plan_fused_dsa_*_metadata``.

    Launches read the lengths that the buffers hold when they run, and use torch's current stream at
    the call. The plan keeps its tensors alive; their memory must stay where it is (no ``resize_``
    to more, no ``set_``). Not thread-safe: one plan per thread and stream.
    """

    def __init__(
        self,
        name: str,
        call: FusedCall,
        width_name: str,
        max_extend_len: int | None = None,
    ) -> None:
        self._name = name
        self._call = call = _check.fused(call, width_name)
        self._device = call.device
        self._state: _launch.DeviceState | None = None
        if self._is_capturing():
            raise RuntimeError(f"{name}: a plan is made before a CUDA graph is captured")
        self._max_extend_len = max_extend_len  # None: the number of rows follows from bs
        with _launch.relaxed_capture() if call.device >= 0 else nullcontext(), _launch.lasting():
            self._status = torch.zeros(1, dtype=torch.int32, device=call.seq_lens.device)
            if call.device >= 0:  # the first launch may be on another stream
                torch.cuda.current_stream(call.device).synchronize()
        #: 0; None while a run is on its way, and after one that was interrupted, whose launch may
        #: still write its word.
        self._run_status: torch.Tensor | None = None
        #: By the numbers of a batch and their types.
        self._packed: dict[Any, PackedLaunch | None] = {}  # None: met once
        self._captured: dict[Any, CapturedLaunch] = {}
        if not fused._runs_cuda(call.device):
            return
        self._state = state = _launch.device_state(call.device, "fused")
        tiles = _fused_args.num_tiles(call.bs) if call.bs > _fused_args.ONE_LAUNCH_MAX_BS else 0
        self._scratch = torch.empty(
            _fused_args.NUM_TILE_SUMS * tiles, dtype=torch.int64, device=call.seq_lens.device
        )
        self._template = Template(call, state.num_sms, self._status.data_ptr())

    def launch(
        self, bs: int | None = None, total_len: int | None = None, *, pad_to: int | None = None
    ) -> None:
        """Enqueue for a batch; nothing is waited for and nothing is read back.

        Args:
            bs: requests, at most the plan's ``max_bs``, which is the default.
            total_len: rows, of draft-extend and EXTEND: T as the host knows it, another T on the
                device is status 4. Default: T is what the lengths on the device add up to, bounded
                by the capacity; rows beyond are dropped, status 4.
            pad_to: of EXTEND, as in ``fused_dsa_extend_metadata``, at most ``max_pad_to``.

        Raises:
            TypeError, ValueError: a number over the plan's capacity. Nothing is written.

        Can be captured; replay takes bs, total_len and pad_to of the capture, and the lengths of
        its own time. Under CUPY_NSA_META_DEBUG_SYNC=1 it is ``run`` outside of captures.
        """
        try:
            captured = self._captured.get((bs, total_len, pad_to))
        except TypeError:  # a number that cannot be hashed; the check raises
            captured = None
        if _env.DEBUG_SYNC in _env.variables and _env.debug_sync() and not self._is_capturing():
            self.run(bs, total_len, pad_to=pad_to)
            return
        if (
            captured is not None
            and (bs is None or bs.__class__ is int)  # 4.0 and True are not 4 and 1
            and (total_len is None or total_len.__class__ is int)
            and (pad_to is None or pad_to.__class__ is int)
        ):
            stream = current_raw_stream(self._device)
            state = captured.state
            if not (stream and state.is_capturing(stream)):
                state.launch_graph(captured.graph, stream)
                return
        self._enqueue(bs, total_len, pad_to, self._status)

    def run(
        self, bs: int | None = None, total_len: int | None = None, *, pad_to: int | None = None
    ) -> None:
        """``launch``, wait for it, and raise by its status.

        Raises:
            TypeError, ValueError: as ``launch``; ``ValueError`` for a status other than 0, with the
                text that CUPY_NSA_META_DEBUG_SYNC=1 gives. What the status allows is written then.
            RuntimeError: a CUDA graph is being captured.
        """
        if self._is_capturing():
            raise RuntimeError(
                f"{self._name}: run() waits, which is not allowed while a CUDA graph is being "
                "captured; launch() only enqueues"
            )
        with _launch.relaxed_capture() if self._call.device >= 0 else nullcontext():
            word, self._run_status = self._run_status, None
            if word is None:
                with _launch.lasting():
                    word = torch.zeros_like(self._status)
            self._enqueue(bs, total_len, pad_to, word)
            met = int(word.item())
            if met:
                word.zero_()
            self._run_status = word
            if met:
                raise fused_error(met, self._batch(bs, total_len, pad_to))

    def status(self, reset: bool = True) -> int:
        """The largest status that launches, and replays of them, have met since it was reset.

        The numbers are those of ``last_status``. ``run`` leaves no trace here. Waits for torch's
        current stream; not during capture (``RuntimeError``).
        """
        _check.boolean("reset", reset)
        if self._is_capturing():
            raise RuntimeError(f"{self._name}: status() is not allowed during a capture")
        with _launch.relaxed_capture() if self._call.device >= 0 else nullcontext():
            status = int(self._status.item())
            if status and reset:
                self._status.zero_()
        return Status(status)

    def _is_capturing(self) -> bool:
        if self._state is not None:  # whatever device is the current one
            return self._state.is_capturing(_launch.current_raw_stream(self._call.device))
        return self._call.device >= 0 and torch.cuda.is_current_stream_capturing()

    def __reduce__(self) -> Any:
        raise _launch.not_movable(self._name)

    def _enqueue(self, bs: Any, total_len: Any, pad_to: Any, status: torch.Tensor) -> None:
        """Launch for a batch."""
        if is_compiling():
            _traced.untraced(self._enqueue, bs, total_len, pad_to, status)
            return
        state = self._state
        if state is None:
            met = reference_fused.metadata(self._batch(bs, total_len, pad_to))
            torch.maximum(status, met, out=status)
            return
        types = type(bs), type(total_len), type(pad_to)
        key = bs, total_len, pad_to, *types
        try:
            packed = self._packed.get(key, NEVER)
        except TypeError:  # a number that cannot be hashed
            self._numbers(bs, total_len, pad_to)  # raises
            raise
        stream = current_raw_stream(state.device)
        if packed is NEVER:
            self._launch_once(self._numbers(bs, total_len, pad_to), stream, status)
            if len(self._packed) >= MAX_REMEMBERED:
                self._packed.clear()
            self._packed[key] = None  # met once
            return
        if packed is None:
            numbers = self._numbers(bs, total_len, pad_to)
            packed = self._packed[key] = self._template.pack(numbers, self._tile_sums(numbers))
        if status is not self._status:  # of run(), which captures nothing
            packed = PackedLaunch(packed.buffer, packed.launches)
            _POINTER.pack_into(packed.buffer, _fused_args.STATUS_AT, status.data_ptr())
        elif (
            _PLAIN.issuperset(types)
            and len(self._captured) < MAX_GRAPHS
            and not state.is_capturing(stream)
        ):
            captured = captured_or_none(fused.capture, state, packed)
            if captured is not None:
                self._captured[key[:3]] = captured
                captured.launch(stream)
                return
        state.launch(packed, stream, packed.launches)

    def _launch_once(self, numbers: PlainNumbers, stream: int, status: torch.Tensor) -> None:
        """Launch for a batch of which nothing is kept."""
        assert self._state is not None
        arguments = _launch.take_arguments()
        try:
            buffer = arguments.buffer
            launches = self._template.fill(buffer, numbers, self._tile_sums(numbers))
            if status is not self._status:
                _POINTER.pack_into(buffer, _fused_args.STATUS_AT, status.data_ptr())
            self._state.launch(arguments, stream, launches)
        finally:
            _launch.give_arguments(arguments)

    def _tile_sums(self, numbers: PlainNumbers) -> int:
        """Address of the scratch where a batch needs it."""
        return self._scratch.data_ptr() if numbers[0] > _fused_args.ONE_LAUNCH_MAX_BS else 0

    def _batch(self, bs: Any, total_len: Any, pad_to: Any) -> FusedCall:
        """The plan's call with the numbers of one batch."""
        numbers = Numbers(*self._numbers(bs, total_len, pad_to))
        return self._call._replace(**numbers._asdict())

    def _numbers(self, bs: Any, total_len: Any, pad_to: Any) -> PlainNumbers:
        """The numbers of one batch, checked against the capacities."""
        call = self._call
        if bs is None:
            bs = call.bs
        elif bs.__class__ is not int or not 0 <= bs <= call.bs:
            bs = _check.integer("bs", bs, 0, call.bs)
        if self._max_extend_len is None:
            for name, value in (("total_len", total_len), ("pad_to", pad_to)):
                if value is not None:
                    raise TypeError(f"{name}: expected None ({self._name}), got {value}")
            return bs, bs * call.uniform_q, call.pad_to, False
        rows = bound = min(call.total_len, bs * self._max_extend_len)
        if total_len is not None:
            fits = total_len.__class__ is int and 0 <= total_len <= bound
            if not fits and _check.integer("total_len", total_len, 0) > bound:
                raise ValueError(
                    f"total_len: expected <= {bound} (max_total_len {call.total_len}, bs {bs} * "
                    f"max_extend_len {self._max_extend_len}), got {total_len}"
                )
            rows = int(total_len)
        if pad_to is None:
            pad_to = 0
        elif not call.pad_to and pad_to != 0:  # 0 pads no row
            raise ValueError(f"pad_to: expected None (a plan without max_pad_to), got {pad_to}")
        else:
            pad_to = _check.integer("pad_to", pad_to, 0 if total_len is None else rows, call.pad_to)
            if total_len is None:
                rows = min(rows, pad_to)
        return bs, rows, pad_to, total_len is None


def plan_fused_dsa_decode_metadata(
    seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    page_table_1: torch.Tensor | None,
    dsa_cache_seqlens: torch.Tensor,
    dsa_cu_seqlens_k: torch.Tensor,
    real_page_table: torch.Tensor | None,
    max_bs: int,
    max_len: int,
    dsa_index_topk: int,
    physical_page_size: int = fused.REQUIRED,
    *,
    real_page_size: int | None = None,
) -> FusedPlan:
    """``fused_dsa_decode_metadata`` bound to its buffers, for batches of up to ``max_bs`` requests.

    ``plan.launch(bs)`` enqueues, ``plan.run(bs)`` also waits and raises by status, and
    ``plan.status()`` tells what launches have met. Where the CUDA kernels do not run, plain torch
    does.

    Args:
        max_bs: what the buffers have to hold, in the place of ``bs``.
        The others as in ``fused_dsa_decode_metadata``.

    Raises:
        TypeError, ValueError: bad arguments.
        RuntimeError: a CUDA graph is being captured, or a backend asked for by name cannot run.
    """
    physical_page_size = fused._page_size(physical_page_size, real_page_size)
    fused._required(
        seq_lens=seq_lens,
        req_pool_indices=req_pool_indices,
        req_to_token=req_to_token,
        cache_seqlens=cache_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        dsa_cache_seqlens=dsa_cache_seqlens,
        dsa_cu_seqlens_k=dsa_cu_seqlens_k,
    )
    max_bs = _check.integer("max_bs", max_bs, 0, INT32_MAX)
    outputs = FusedOutputs(
        cache_seqlens=cache_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        dsa_cache_seqlens=dsa_cache_seqlens,
        dsa_cu_seqlens_k=dsa_cu_seqlens_k,
        page_table_1=page_table_1,
        real_page_table=real_page_table,
    )
    call = FusedCall(
        seq_lens, None, req_pool_indices, req_to_token, outputs, max_bs, max_bs, max_len,
        dsa_index_topk, physical_page_size, 1, 0, 0, True, -1,
    )  # fmt: skip
    return FusedPlan("plan_fused_dsa_decode_metadata", call, "max_len")


def plan_fused_dsa_target_verify_metadata(
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
    max_bs: int,
    max_seqlen_k: int,
    dsa_index_topk: int,
    physical_page_size: int = fused.REQUIRED,
    next_n: int = fused.REQUIRED,
    paged_mqa_ctx_lens_2d: torch.Tensor | None = None,
    *,
    real_page_size: int | None = None,
) -> FusedPlan:
    """``fused_dsa_target_verify_metadata`` bound to its buffers, for up to ``max_bs`` requests.

    Arguments as there, with ``max_bs`` in the place of ``bs``; plan and errors as in
    ``plan_fused_dsa_decode_metadata``.
    """
    physical_page_size = fused._page_size(physical_page_size, real_page_size)
    fused._required(
        next_n=next_n,
        seq_lens=seq_lens,
        req_pool_indices=req_pool_indices,
        req_to_token=req_to_token,
        cache_seqlens=cache_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        seqlens_expanded=seqlens_expanded,
        dsa_cache_seqlens=dsa_cache_seqlens,
        dsa_cu_seqlens_k=dsa_cu_seqlens_k,
    )
    next_n = _check.integer("next_n", next_n, 1, INT32_MAX)
    max_bs = _check.integer("max_bs", max_bs, 0, INT32_MAX // next_n)
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
        seq_lens, None, req_pool_indices, req_to_token, outputs, max_bs, max_bs * next_n,
        max_seqlen_k, dsa_index_topk, physical_page_size, next_n, next_n, 0, False, -1,
    )  # fmt: skip
    return FusedPlan("plan_fused_dsa_target_verify_metadata", call, "max_seqlen_k")


def plan_fused_dsa_draft_extend_metadata(
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
    max_bs: int,
    max_seqlen_k: int,
    dsa_index_topk: int,
    physical_page_size: int = fused.REQUIRED,
    max_extend_len: int = fused.REQUIRED,
    max_total_len: int = fused.REQUIRED,
    static_extend_len: bool = False,
    *,
    real_page_size: int | None = None,
) -> FusedPlan:
    """``fused_dsa_draft_extend_metadata`` bound to its buffers, for up to ``max_bs`` requests.

    ``plan.launch(bs, total_len)``; without ``total_len`` the lengths on the device tell the rows,
    of which at most min(max_total_len, bs * max_extend_len) are written.

    Args:
        max_bs: in the place of ``bs``.
        max_extend_len: bound of the extend lengths.
        max_total_len: rows that the buffers have to hold.
        The others as in ``fused_dsa_draft_extend_metadata``; plan and errors as in
        ``plan_fused_dsa_decode_metadata``.
    """
    physical_page_size = fused._page_size(physical_page_size, real_page_size)
    fused._required(
        max_extend_len=max_extend_len,
        max_total_len=max_total_len,
        seq_lens=seq_lens,
        extend_seq_lens=extend_seq_lens,
        req_pool_indices=req_pool_indices,
        req_to_token=req_to_token,
        cache_seqlens=cache_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        seqlens_expanded=seqlens_expanded,
        dsa_cache_seqlens=dsa_cache_seqlens,
        dsa_cu_seqlens_k=dsa_cu_seqlens_k,
    )
    max_bs = _check.integer("max_bs", max_bs, 0, INT32_MAX)
    max_extend_len = _check.integer("max_extend_len", max_extend_len, 0)
    max_total_len = _check.integer("max_total_len", max_total_len, 0, INT32_MAX)
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
        seq_lens, extend_seq_lens, req_pool_indices, req_to_token, outputs, max_bs, max_total_len,
        max_seqlen_k, dsa_index_topk, physical_page_size, -1, 0, 0, False, -1,
        False, min(max_extend_len, INT32_MAX),
    )  # fmt: skip
    name = "plan_fused_dsa_draft_extend_metadata"
    return FusedPlan(name, call, "max_seqlen_k", max_extend_len)


def plan_fused_dsa_extend_metadata(
    seq_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor | None = None,
    req_to_token: torch.Tensor | None = None,
    *,
    max_total_len: int,
    dsa_index_topk: int,
    max_seqlen_k: int | None = None,
    physical_page_size: int = fused.PAGE_SIZE_64,
    max_pad_to: int | None = None,
    real_page_size: int | None = None,
    **outputs: torch.Tensor | None,
) -> FusedPlan:
    """``fused_dsa_extend_metadata`` bound to its buffers, for batches of up to as many requests.

    ``plan.launch(bs, total_len, pad_to=...)``; without ``total_len`` the lengths on the device tell
    the rows, of which at most max_total_len are written, with ``pad_to`` at most that many.

    Args:
        seq_lens, extend_seq_lens: [max_bs]: the capacity of requests.
        max_total_len: rows that the buffers have to hold.
        max_pad_to: the largest ``pad_to`` of a launch, >= max_total_len; default: no padding.
        outputs: any of the outputs of ``fused_dsa_extend_metadata`` by name.
        The others as in ``fused_dsa_extend_metadata``; plan and errors as in
        ``plan_fused_dsa_decode_metadata``.
    """
    physical_page_size = fused._page_size(physical_page_size, real_page_size)
    fused._required(seq_lens=seq_lens, extend_seq_lens=extend_seq_lens)
    names = set(FusedOutputs._fields) - {"paged_mqa_ctx_lens_2d"}
    for name in outputs:
        if name not in names:
            raise TypeError(f"{name}: expected the name of an output ({', '.join(sorted(names))})")
    given = FusedOutputs(**outputs)
    max_bs = _check.lengths("seq_lens", _check.as_tensor("seq_lens", seq_lens))
    max_total_len = _check.integer("max_total_len", max_total_len, 0, INT32_MAX)
    pad_to = 0
    if max_pad_to is not None:
        pad_to = _check.integer("max_pad_to", max_pad_to, max_total_len, INT32_MAX - 1)
    width = fused._extend_width(
        given, req_pool_indices, req_to_token, max_seqlen_k, physical_page_size
    )
    call = FusedCall(
        seq_lens, extend_seq_lens, req_pool_indices, req_to_token, given, max_bs, max_total_len,
        width, dsa_index_topk, physical_page_size, -1, 0, pad_to, True, -1,
    )  # fmt: skip
    return FusedPlan("plan_fused_dsa_extend_metadata", call, "max_seqlen_k", INT32_MAX)
