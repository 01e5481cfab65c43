"""A device made of CPU memory: the launch path without a GPU.

``FakeState`` stands where ``_launch.DeviceState`` does. Launches are kept as they come, captures and
replays too; the kernels of the seed operation are computed by the reference from the bytes of their
argument struct, result word, epoch and all, so that a wrong pointer, stride or flag is a wrong
result. Those of the fused family are only kept.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cupy_nsa_meta import (
    _check,
    _draft_extend_args,
    _form,
    _fused_args,
    _graphs,
    _known,
    _launch,
    dispatch,
    draft_extend,
    draft_extend_plan,
    fused,
    fused_plan,
    reference,
)

DEVICE = 0
NUM_SLOTS = 2048  # more than a few threads hold


class FakeDriverError(RuntimeError):
    """In the place of ``cupy.cuda.driver.CUDADriverError``."""

    status = 0


class FakeRuntime:
    """The part of ``cupy.cuda.runtime`` that the launch path uses."""

    streamCaptureModeRelaxed = 2

    def __init__(self, state: FakeState) -> None:
        self._state = state
        self._handles = count(1)
        self.graphs: dict[int, list] = {}
        self.capturing: dict[int, list] = {}
        self.current_device = DEVICE
        self.replays = 0

    def getDevice(self) -> int:
        return self.current_device

    def memsetAsync(self, address: int, value: int, size: int, stream: int) -> None:
        ctypes.memset(address, value, size)

    def streamIsCapturing(self, stream: int) -> bool:
        return stream in self.capturing

    def streamBeginCapture(self, stream: int, mode: int) -> None:
        self.capturing[stream] = []

    def streamEndCapture(self, stream: int) -> int:
        return self._keep(self.capturing.pop(stream))

    def graphInstantiate(self, graph: int) -> int:
        return self._keep(self.graphs[graph])

    def graphDestroy(self, graph: int) -> None:
        del self.graphs[graph]

    graphExecDestroy = graphDestroy

    def graphLaunch(self, graph: int, stream: int) -> None:
        assert self.current_device == DEVICE
        self.replays += 1
        for arguments, launches in self.graphs[graph]:
            self._state.execute(arguments, launches)

    def streamSynchronize(self, stream: int) -> None:
        pass

    def _keep(self, launched: list) -> int:
        handle = next(self._handles)
        self.graphs[handle] = launched
        return handle


class FakeState(_launch.DeviceState):
    """A ``DeviceState`` whose device is the CPU."""

    def __init__(self) -> None:
        self.device = DEVICE
        self.num_sms = 132
        self.stems = {"draft_extend", "fused"}
        self.launched: list = []  # (argument bytes, kernels and grids), as they were executed
        self.runtime = FakeRuntime(self)
        self._get_device = self.runtime.getDevice
        self.launch_graph = self._launch_graph_on_device
        self.cupy = SimpleNamespace(cuda=SimpleNamespace(Stream=self._new_stream))
        self._streams = count(1000)
        self._memory = np.zeros(NUM_SLOTS * _launch.SLOT_BYTES // 8, dtype=np.uint64)
        self._base = self._memory.ctypes.data
        self._counts = torch.zeros(NUM_SLOTS, dtype=torch.int32)
        self._counts_ptr = self._counts.data_ptr()
        self._share_words(memoryview(self._memory).cast("B"))
        self._status = torch.zeros(1, dtype=torch.int32)
        self.sticky_status = self._status.data_ptr()
        self._next_slot = count()
        self.slots_made = 0
        self.free_slots: deque[_launch.Slot] = deque()
        self._retired: deque[_launch.Slot] = deque()
        self._driver_error = FakeDriverError
        self.answers = True  # False: result words do not come

    def make_current(self):
        runtime = self.runtime

        class Context:
            def __enter__(self):
                self.before, runtime.current_device = runtime.current_device, DEVICE

            def __exit__(self, *exc_info):
                runtime.current_device = self.before

        return Context()

    def _new_stream(self, non_blocking: bool) -> SimpleNamespace:
        assert non_blocking
        return SimpleNamespace(ptr=next(self._streams), synchronize=lambda: None)

    def launch(self, arguments, stream, launches) -> None:
        struct = ctypes.c_void_p.from_address(arguments.params).value
        item = ctypes.string_at(struct, _launch.ARGS_BYTES), tuple(launches)
        if stream in self.runtime.capturing:
            self.runtime.capturing[stream].append(item)
        else:
            self.execute(*item)

    def execute(self, arguments: bytes, launches) -> None:
        is_seed = launches[-1][0].startswith("draft_extend")
        size = (_draft_extend_args if is_seed else _fused_args).ARGS.size
        self.launched.append((arguments[:size], launches))
        if is_seed:
            self._draft_extend(arguments)

    def _draft_extend(self, arguments: bytes) -> None:
        (
            extend_ptr, seq_ptr, extend_stride, seq_stride, bs, flags, count_ptr, expanded_ptr,
            clamped_ptr, result_ptr, out_total_ptr, max_rows, topk, epoch, *_,
        ) = _draft_extend_args.ARGS.unpack_from(arguments)  # fmt: skip
        extend = _array(extend_ptr, bs, extend_stride, flags & _check.EXTEND_IS_INT64)
        seq = _array(seq_ptr, bs, seq_stride, flags & _check.SEQ_IS_INT64)
        outs = [_array(pointer, max_rows, 1, False) for pointer in (expanded_ptr, clamped_ptr)]
        outcome = reference.draft_extend_into(
            torch.from_numpy(extend), torch.from_numpy(seq), topk, *map(torch.from_numpy, outs),
            max_rows, bool(flags & _check.TOTAL_IS_GIVEN),
        )  # fmt: skip
        total, status = outcome.tolist()
        if count_ptr:
            launch_count = _array(count_ptr, 1, 1, False)
            epoch = 1 if launch_count[0] >= _launch.EPOCH_MASK else int(launch_count[0]) + 1
            launch_count[0] = epoch
        if result_ptr and self.answers:
            word = (total & 0xFFFFFFFF) | status << 32 | epoch << _launch.EPOCH_SHIFT
            self.words[(result_ptr - self._base) // 8] = word
        if out_total_ptr:
            _array(out_total_ptr, 2, 1, False)[:] = (total, status)


def _array(pointer: int, size: int, stride: int, is_int64: object) -> np.ndarray:
    """Memory at an address as an array."""
    dtype = np.dtype(np.int64 if is_int64 else np.int32)
    if not size:
        return np.empty(0, dtype)
    span = ((size - 1) * stride + 1) * dtype.itemsize
    memory = (ctypes.c_char * span).from_address(pointer)
    return np.ndarray((size,), dtype, memory, strides=(stride * dtype.itemsize,))


#: Names in ``fused.py``.
FUSED_OPS = {
    "decode": "_DECODE", "verify": "_VERIFY", "draft_extend": "_DRAFT_EXTEND", "extend": "_EXTEND",
}  # fmt: skip


def forget_fused_calls(patch: pytest.MonkeyPatch, op: str) -> None:
    known = _known.KnownCalls(fused.MAX_KNOWN)
    patch.setattr(fused, op, getattr(fused, op)._replace(known=known))


def forget_calls(patch: pytest.MonkeyPatch) -> None:
    """No captured launch and no known call."""
    thread = _graphs._Thread()
    for module in (_graphs, _form, draft_extend, fused):
        patch.setattr(module, "thread", thread)
    patch.setattr(_form, "_forms", {})
    patch.setattr(_form, "_likenesses", {})
    patch.setattr(_form, "_last", None)
    for op in FUSED_OPS.values():
        forget_fused_calls(patch, op)


def set_stream(patch: pytest.MonkeyPatch, current: Callable[[int], int]) -> None:
    """Torch's current stream of a device."""
    for module in (_launch, draft_extend, draft_extend_plan, fused_plan):
        patch.setattr(module, "current_raw_stream", current)


@pytest.fixture
def fake_device(monkeypatch) -> FakeState:
    """CPU tensors go the way of CUDA tensors; ``fake_device.stream`` is torch's current stream."""
    state = FakeState()
    state.stream = 0
    set_stream(monkeypatch, lambda device: state.stream)
    monkeypatch.setattr(_launch, "device_state", lambda device, stem="draft_extend": state)
    monkeypatch.setattr(_launch, "relaxed_capture", state.make_current)
    monkeypatch.setattr(_graphs, "relaxed_capture", state.make_current)
    monkeypatch.setattr(fused, "_runs_cuda", lambda device: True)
    monkeypatch.setattr(dispatch, "choose", lambda device: dispatch.CUDA)
    original = _check.draft_extend

    def on_device(*arguments):
        tensors, key = original(*arguments)
        return tensors, key._replace(device=DEVICE)

    monkeypatch.setattr(_check, "draft_extend", on_device)
    forget_calls(
        monkeypatch
    )  # the last: undone first, it destroys graphs while this is their device
    return state
