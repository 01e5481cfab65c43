"""A plan: the seed operation bound to its buffers, checked once and captured once."""

from __future__ import annotations

from typing import Any

import torch

from . import _check, _env, _graphs, _launch, dispatch, draft_extend
from ._draft_extend_args import ONE_LAUNCH_MAX_BS, shape_of
from ._launch import EPOCH_MASK, EPOCH_SHIFT, QUICK_LOOKS, STATUS_SHIFT, current_raw_stream
from .draft_extend import (
    TOTAL_MASK,
    capture_error,
    raise_for_status,
    status_error,
)


class DraftExtendPlan:
    """The seed operation on fixed buffers; made by ``plan_draft_extend_metadata``.

    A plan is one captured graph with one result slot: its launches run one after another, and it is
    not thread-safe. Use one plan per thread and stream. A second thread that enters a plan while it
    runs gets a ``RuntimeError``.
    """

    def __init__(
        self,
        extend_seq_lens: torch.Tensor,
        seq_lens: torch.Tensor,
        nsa_index_topk: int,
        out_seqlens_expanded: torch.Tensor,
        out_nsa_cache_seqlens: torch.Tensor,
        use_adaptive: bool = True,
    ) -> None:
        self._tensors, self._key = _check.draft_extend(
            extend_seq_lens,
            seq_lens,
            nsa_index_topk,
            out_seqlens_expanded,
            out_nsa_cache_seqlens,
            use_adaptive,
            None,
        )
        device = self._tensors[0].device
        #: Total and status of the last launch, on the device.
        with _launch.lasting():
            self._outcome = torch.zeros(2, dtype=torch.int32, device=device)
        #: A thread is inside while it holds the one token: quicker to take than a lock.
        self._tokens: list[None] = [None]
        self._device = self._key.device
        #: None after an error or an interrupted wait.
        self._captured: _graphs.AnsweringLaunch | None = None
        self._state: _launch.DeviceState | None = None
        self._backend = dispatch.choose(self._device)
        if self._backend is not dispatch.CUDA:
            return
        self._state = state = _launch.device_state(self._device)
        # The scratch of the two-launch form belongs to the plan.
        words = 0
        if self._key.bs > ONE_LAUNCH_MAX_BS:
            words = self._key.bs + shape_of(self._key, state.num_sms).num_entries
        self._scratch = torch.empty(words, dtype=torch.int32, device=device)
        stream = current_raw_stream(self._device)
        if state.is_capturing(stream):
            raise RuntimeError(
                "plan_draft_extend_metadata: a plan is made before a CUDA graph is captured"
            )
        with state.make_current(), _launch.relaxed_capture():
            state.runtime.streamSynchronize(stream)  # the first launch may be on another one
        self._capture()

    def _capture(self) -> _graphs.AnsweringLaunch:
        assert self._state is not None
        self._captured = captured = draft_extend.capture(
            self._state, self._key, self._outcome.data_ptr(), self._scratch.data_ptr()
        )
        return captured

    def run(self) -> int:
        """Launch on torch's current stream, wait for the total and return it.

        Reads the lengths that the buffers hold when the launch runs.

        Raises:
            ValueError: as in ``fill_draft_extend_metadata_cuda``; nothing is written.
            RuntimeError: another thread is inside this plan, or a CUDA graph is being captured.
        """
        tokens = self._tokens
        try:  # a call would let an interrupt in between token and try
            del tokens[0]
        except IndexError:
            raise _entered_twice() from None
        try:
            state = self._state
            if state is None:
                return self._backend.fill(*self._arguments())
            stream = current_raw_stream(self._device)
            if stream and state.is_capturing(stream):
                raise capture_error()
            captured = self._captured or self._capture()
            slot = captured.slot
            try:  # AnsweringLaunch.run and the quick part of DeviceState.wait, less their calls
                slot.epoch = epoch = slot.epoch % EPOCH_MASK + 1
                state.launch_graph(captured.graph, stream)
                halves, low = state.halves, 2 * slot.index
                high = low + 1
                fine = epoch << EPOCH_SHIFT - STATUS_SHIFT
                for _ in QUICK_LOOKS:
                    if halves[high] == fine:
                        return halves[low]
                word = state.wait(slot, stream)
            except BaseException:
                self._captured = None  # with its slot, whose late word nobody shall read
                raise
        finally:
            tokens.append(None)
        if word > TOTAL_MASK:
            raise status_error(word >> 32, word & TOTAL_MASK, self._tensors, self._key)
        return word

    def launch(self) -> None:
        """Enqueue on torch's current stream; nothing is waited for and nothing is read back.

        (With CUPY_NSA_META_DEBUG_SYNC=1 the status is read, and raised as in ``run``.)

        While a CUDA graph is being captured, the plain kernel is recorded into it.
        """
        tokens = self._tokens
        try:
            del tokens[0]
        except IndexError:
            raise _entered_twice() from None
        try:
            state = self._state
            if state is None:
                self._backend.fill_async(*self._arguments(), out_total=self._outcome)
                return
            stream = current_raw_stream(self._device)
            if stream and state.is_capturing(stream):
                self._record(state, stream)
                return
            captured = self._captured or self._capture()
            slot = captured.slot
            try:  # AnsweringLaunch.launch, less its calls
                slot.epoch = slot.epoch % EPOCH_MASK + 1
                state.launch_graph(captured.graph, stream)
            except BaseException:
                self._captured = None
                raise
        finally:
            tokens.append(None)
        if _env.DEBUG_SYNC in _env.variables and _env.debug_sync():
            raise_for_status(self._outcome, self._tensors, self._key)

    def status(self) -> int:
        """The status word of the last launch (0: fine); waits for torch's current stream.

        1: T over the capacity, 2: a negative extend length, 3: a length or sum outside int32.
        """
        if self._state is None:
            return int(self._outcome[1])
        if self._state.is_capturing(current_raw_stream(self._device)):
            raise RuntimeError("DraftExtendPlan.status: not while a CUDA graph is being captured")
        with _launch.relaxed_capture():
            return int(self._outcome[1])

    def __reduce__(self) -> Any:
        raise _launch.not_movable("plan_draft_extend_metadata")

    def _record(self, state: _launch.DeviceState, stream: int) -> None:
        """Launch the plain kernels."""
        draft_extend.enqueue(
            state,
            stream,
            self._key,
            out_total=self._outcome.data_ptr(),
            scratch=self._scratch.data_ptr(),
        )

    def _arguments(self) -> tuple[Any, ...]:
        extend, seq, out_expanded, out_clamped = self._tensors
        key = self._key
        return extend, seq, key.topk, out_expanded, out_clamped, key.use_adaptive


def plan_draft_extend_metadata(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
    use_adaptive: bool = True,
) -> DraftExtendPlan:
    """Bind the seed operation to its buffers: checked, shared and captured once, run many times.

    The arguments and errors are those of ``fill_draft_extend_metadata``; ``plan.run()`` returns
    the total, ``plan.launch()`` only enqueues, ``plan.status()`` reads the last status. All use
    torch's current stream at the call and the lengths that the buffers hold when the launch runs.
    The plan holds the tensors; batches of another size need another plan.

    On the CPU, or where the chosen backend is not CUDA, the plan calls that backend.

    Raises:
        TypeError, ValueError: bad arguments.
        RuntimeError: a CUDA graph is being captured, or a backend asked for by name cannot run.
    """
    return DraftExtendPlan(
        extend_seq_lens,
        seq_lens,
        nsa_index_topk,
        out_seqlens_expanded,
        out_nsa_cache_seqlens,
        use_adaptive,
    )


def _entered_twice() -> RuntimeError:
    return RuntimeError(
        "cupy_nsa_meta: this plan is running in another thread; make one plan per thread and stream"
    )
