"""A plan: the seed operation bound to its buffers, checked once and captured once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _check, _env, _graphs, _launch, dispatch, draft_extend
from ._check import DraftExtendKey, DraftExtendTensors
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
        #: Total and status of the last launch, on the device.
        self._outcome = torch.zeros(2, dtype=torch.int32, device=self._tensors[0].device)
        # A thread is inside while it holds the one token: quicker to take than a lock.
        self._tokens: list[None] = [None]
        self._backend = dispatch.choose(self._key.device)
        self._on_cuda: _OnCuda | None = None
        if self._backend is dispatch.CUDA:
            self._on_cuda = on_cuda = _OnCuda(self._tensors, self._key, self._outcome)
            self.run = _run_of(on_cuda, self._tokens)  # type: ignore[method-assign]
            self.launch = _launch_of(on_cuda, self._tokens)  # type: ignore[method-assign]

    def run(self) -> int:
        """Launch on torch's current stream, wait for the total and return it.

        Reads the lengths that the buffers hold when the launch runs.

        Raises:
            ValueError: as in ``fill_draft_extend_metadata_cuda``; nothing is written.
            RuntimeError: another thread is inside this plan, or a CUDA graph is being captured.
        """
        _take(self._tokens)
        try:
            return self._backend.fill(*self._arguments())
        finally:
            self._tokens.append(None)

    def launch(self) -> None:
        """Enqueue on torch's current stream; nothing is waited for and nothing is read back.

        (With CUPY_NSA_META_DEBUG_SYNC=1 the status is read, and raised as in ``run``.)

        While a CUDA graph is being captured, the plain kernel is recorded into it.
        """
        _take(self._tokens)
        try:
            self._backend.fill_async(*self._arguments(), out_total=self._outcome)
        finally:
            self._tokens.append(None)

    def status(self) -> int:
        """The status word of the last launch (0: fine); waits for torch's current stream.

        1: T over the capacity, 2: a negative extend length, 3: a length or sum outside int32.
        """
        if self._on_cuda is None:
            return int(self._outcome[1])
        if self._on_cuda.is_capturing():
            raise RuntimeError("DraftExtendPlan.status: not while a CUDA graph is being captured")
        with _launch.relaxed_capture():
            return int(self._outcome[1])

    def __reduce__(self) -> Any:
        raise _launch.not_movable("plan_draft_extend_metadata")

    def _arguments(self) -> tuple[Any, ...]:
        extend, seq, out_expanded, out_clamped = self._tensors
        key = self._key
        return extend, seq, key.topk, out_expanded, out_clamped, key.use_adaptive


class _OnCuda:
    """What ``run`` and ``launch`` of a plan on the CUDA backend share."""

    __slots__ = ("captured", "key", "outcome", "scratch", "state", "tensors")

    def __init__(
        self, tensors: DraftExtendTensors, key: DraftExtendKey, outcome: torch.Tensor
    ) -> None:
        self.tensors = tensors
        self.key = key
        self.outcome = outcome
        self.state = state = _launch.device_state(key.device)
        # The scratch of the two-launch form belongs to the plan.
        words = key.bs + shape_of(key, state.num_sms).num_entries
        self.scratch = torch.empty(
            words if key.bs > ONE_LAUNCH_MAX_BS else 0, dtype=torch.int32, device=outcome.device
        )
        if self.is_capturing():
            raise RuntimeError(
                "plan_draft_extend_metadata: a plan is made before a CUDA graph is captured"
            )
        with state.make_current(), _launch.relaxed_capture():
            # The first launch may be on another stream.
            state.runtime.streamSynchronize(current_raw_stream(key.device))
        #: None after an error or an interrupted wait.
        self.captured: _graphs.AnsweringLaunch | None = self._capture()

    def is_capturing(self) -> bool:
        return self.state.is_capturing(current_raw_stream(self.key.device))

    def capture_anew(self) -> _graphs.AnsweringLaunch:
        self.captured = captured = self._capture()
        return captured

    def _capture(self) -> _graphs.AnsweringLaunch:
        return draft_extend.capture(
            self.state, self.key, self.outcome.data_ptr(), self.scratch.data_ptr()
        )

    def record(self, stream: int) -> None:
        """Launch the plain kernels."""
        draft_extend.enqueue(
            self.state,
            stream,
            self.key,
            out_total=self.outcome.data_ptr(),
            scratch=self.scratch.data_ptr(),
        )


# Functions, not methods: what a method looks up at each call costs 0.1 to 0.2 us, 3 % of a run.


def _run_of(plan: _OnCuda, tokens: list[None]) -> Callable[[], int]:
    """``DraftExtendPlan.run`` on the CUDA backend."""
    state, device, halves = plan.state, plan.key.device, plan.state.halves
    enter, leave = tokens.pop, tokens.append

    def run() -> int:
        try:
            enter()
        except IndexError:
            raise _entered_twice() from None
        try:
            stream = current_raw_stream(device)
            if stream and state.is_capturing(stream):
                raise capture_error()
            captured = plan.captured
            if captured is None:
                captured = plan.capture_anew()
            slot = captured.slot
            try:  # AnsweringLaunch.run and the quick part of DeviceState.wait, less their calls
                slot.epoch = epoch = slot.epoch % EPOCH_MASK + 1
                state.launch_graph(captured.graph, stream)
                fine = epoch << EPOCH_SHIFT - STATUS_SHIFT
                low = 2 * slot.index
                high = low + 1
                for _ in QUICK_LOOKS:
                    if halves[high] == fine:
                        return halves[low]
                word = state.wait(slot, stream)
            except BaseException:
                plan.captured = None  # with its slot, whose late word nobody shall read
                raise
        finally:
            leave(None)
        if word > TOTAL_MASK:
            raise status_error(word >> 32, word & TOTAL_MASK, plan.tensors, plan.key)
        return word

    run.__doc__ = DraftExtendPlan.run.__doc__
    return run


def _launch_of(plan: _OnCuda, tokens: list[None]) -> Callable[[], None]:
    """``DraftExtendPlan.launch`` on the CUDA backend."""
    state, device = plan.state, plan.key.device
    enter, leave = tokens.pop, tokens.append

    def launch() -> None:
        try:
            enter()
        except IndexError:
            raise _entered_twice() from None
        try:
            stream = current_raw_stream(device)
            if stream and state.is_capturing(stream):
                plan.record(stream)
                return
            captured = plan.captured
            if captured is None:
                captured = plan.capture_anew()
            slot = captured.slot
            try:  # AnsweringLaunch.launch, less its calls
                slot.epoch = slot.epoch % EPOCH_MASK + 1
                state.launch_graph(captured.graph, stream)
            except BaseException:
                plan.captured = None
                raise
        finally:
            leave(None)
        if _env.DEBUG_SYNC in _env.variables and _env.debug_sync():
            raise_for_status(plan.outcome, plan.tensors, plan.key)

    launch.__doc__ = DraftExtendPlan.launch.__doc__
    return launch


def _take(tokens: list[None]) -> None:
    try:
        tokens.pop()
    except IndexError:
        raise _entered_twice() from None


def _entered_twice() -> RuntimeError:
    return RuntimeError(
        "cupy_nsa_meta: this plan is running in another thread; make one plan per thread and stream"
    )


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
