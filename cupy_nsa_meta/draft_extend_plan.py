"""A plan: the seed operation bound to its buffers, checked once and captured once."""

from __future__ import annotations

from typing import Any

import torch

from . import _check, _env, _graphs, _launch, dispatch, draft_extend
from ._draft_extend_args import ONE_LAUNCH_MAX_BS, shape_of
from ._launch import EPOCH_MASK, current_raw_stream
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
        self._outcome = torch.zeros(2, dtype=torch.int32, device=device)
        # A thread is inside while it holds the one token: quicker to take than a lock.
        self._tokens = [None]
        self._enter = self._tokens.pop
        self._leave = self._tokens.append
        self._device = self._key.device
        self._captured: _graphs.AnsweringLaunch | None = None
        self._state: _launch.DeviceState | None = None
        self._backend = dispatch.choose(self._key.device)
        if self._backend is not dispatch.CUDA:
            return
        self._state = _launch.device_state(self._key.device)
        # The scratch of the two-launch form belongs to the plan.
        words = 0
        if self._key.bs > ONE_LAUNCH_MAX_BS:
            shape = shape_of(self._key, self._state.num_sms)
            words = self._key.bs + shape.num_entries
        self._scratch = torch.empty(words, dtype=torch.int32, device=device)
        stream = current_raw_stream(self._key.device)
        if self._state.is_capturing(stream):
            raise RuntimeError(
                "plan_draft_extend_metadata: a plan is made before a CUDA graph is captured"
            )
        with self._state.make_current(), _launch.relaxed_capture():
            self._state.runtime.streamSynchronize(stream)  # the first launch may be on another one
        self._captured = self._capture()

    def _capture(self) -> _graphs.AnsweringLaunch:
        assert self._state is not None
        return draft_extend.capture(
            self._state, self._key, self._outcome.data_ptr(), self._scratch.data_ptr()
        )

    def _capture_anew(self) -> _graphs.AnsweringLaunch:
        """After an error or an interrupted wait."""
        assert self._state is not None
        if self._state.is_capturing(current_raw_stream(self._device)):
            raise capture_error()
        self._captured = captured = self._capture()
        return captured

    def run(self) -> int:
        """Launch on torch's current stream, wait for the total and return it.

        Reads the lengths that the buffers hold when the launch runs.

        Raises:
            ValueError: as in ``fill_draft_extend_metadata_cuda``; nothing is written.
            RuntimeError: another thread is inside this plan, or a CUDA graph is being captured.
        """
        try:
            token = self._enter()
        except IndexError:
            raise _entered_twice() from None
        try:
            captured = self._captured
            if captured is None:
                if self._state is None:
                    return self._backend.fill(*self._arguments())
                captured = self._capture_anew()
            stream = current_raw_stream(self._device)
            state, slot = captured.state, captured.slot
            if stream and state.is_capturing(stream):
                raise capture_error()
            try:  # AnsweringLaunch.run, less its calls
                slot.epoch = slot.epoch % EPOCH_MASK + 1
                state.launch_graph(captured.graph, stream)
                word = state.wait(slot, stream)
            except BaseException:
                self._captured = None  # with its slot, whose late word nobody shall read
                raise
        finally:
            self._leave(token)
        if word > TOTAL_MASK:
            raise status_error(word >> 32, word & TOTAL_MASK, self._tensors, self._key)
        return word

    def launch(self) -> None:
        """Enqueue on torch's current stream; nothing is waited for and nothing is read back.

        (With CUPY_NSA_META_DEBUG_SYNC=1 the status is read, and raised as in ``run``.)

        While a CUDA graph is being captured, the plain kernel is recorded into it.
        """
        try:
            token = self._enter()
        except IndexError:
            raise _entered_twice() from None
        try:
            captured = self._captured
            if captured is None:
                if self._state is None:
                    self._backend.fill_async(*self._arguments(), out_total=self._outcome)
                    return
                if self._state.is_capturing(current_raw_stream(self._device)):
                    self._record()
                    return
                captured = self._capture_anew()
            stream = current_raw_stream(self._device)
            state, slot = captured.state, captured.slot
            if stream and state.is_capturing(stream):
                self._record()
                return
            try:  # AnsweringLaunch.launch, less its calls
                slot.epoch = slot.epoch % EPOCH_MASK + 1
                state.launch_graph(captured.graph, stream)
            except BaseException:
                self._captured = None
                raise
        finally:
            self._leave(token)
        if _env.DEBUG_SYNC in _env.variables and _env.debug_sync():
            raise_for_status(self._outcome, self._tensors, self._key)

    def status(self) -> int:
        """The status word of the last launch (0: fine); waits for torch's current stream.

        1: T over the capacity, 2: a negative extend length, 3: a length or sum outside int32.
        """
        if self._state is None:
            return int(self._outcome[1])
        if self._state.is_capturing(current_raw_stream(self._key.device)):
            raise RuntimeError("DraftExtendPlan.status: not while a CUDA graph is being captured")
        with _launch.relaxed_capture():
            return int(self._outcome[1])

    def __reduce__(self) -> Any:
        raise _launch.not_movable("plan_draft_extend_metadata")

    def _record(self) -> None:
        """Launch the plain kernels on torch's current stream."""
        assert self._state is not None
        draft_extend.enqueue(
            self._state,
            current_raw_stream(self._device),
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
