"""A machine with several GPUs that are not there: what CuPy and torch.cuda do for the launch path.

Tensors lie in host memory and say that they are on a device; kernels run in Python, at the launch,
or, where ``delayed``, when their stream is waited for. What would be a fault on real devices is
one here: a launch on a device that is not current, a pointer into another device's memory, a call
that ends the captures of other threads unless it is made in the relaxed mode.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cupy_nsa_meta import (
    _check,
    _draft_extend_args,
    _fused_args,
    _known,
    _launch,
    _module,
    dispatch,
)
from cupy_nsa_meta._status import INT32_MAX, Status
from fake_device import FakeDriverError, forget_calls, set_stream

NUM_SMS = 132
_zeros, _empty = torch.zeros, torch.empty


class GpuTensor(torch.Tensor):
    """Host memory that claims to be on a CUDA device."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = True
    is_cpu = False

    def get_device(self) -> int:
        return self.index

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)


class FakeRuntimeError(RuntimeError):
    """In the place of ``cupy.cuda.runtime.CUDARuntimeError``."""


#: Of each thread, whichever devices it works with: graphs of one test may be destroyed in the next.
_capture = threading.local()


def _exchange_capture_mode(mode: Any) -> int:
    """``cuThreadExchangeStreamCaptureMode``; ``mode``: what ``ctypes.byref`` gives."""
    before = getattr(_capture, "mode", 0)
    _capture.mode, mode._obj.value = mode._obj.value, before
    return 0


def _relaxed(function):
    """A call that a capture of the default mode, in any thread, does not survive."""

    def call(*arguments, **options):
        if getattr(_capture, "mode", 0) != 2:
            raise FakeRuntimeError("cudaErrorStreamCaptureUnsupported")
        return function(*arguments, **options)

    return call


class FakeCuda:
    """The devices; ``log`` holds (what, current device, detail) in order."""

    def __init__(self, num_devices: int = 2) -> None:
        self.num_devices = num_devices
        self._thread = threading.local()
        self.switches: list[int] = []  # every device that a thread was set to, which has a context
        self.delayed = False
        self.streams: dict[int, int] = {}  # torch's current stream of each device
        self.log: list[tuple[str, int, object]] = []
        self.memory: list[tuple[int, int, int]] = []  # begin, end, device
        self.pinned: list[ctypes.Array[ctypes.c_char]] = []
        self.queues: dict[tuple[int, int], list] = defaultdict(list)
        self.capture: list | None = None
        self.capturing_stream = -1
        self.graphs: dict[int, list] = {}
        self.numbers = itertools.count(1000)
        self.kernels: dict[int, tuple[str, int]] = {}  # handle: name, device
        self.cupy = self._cupy()

    @property
    def current(self) -> int:
        """The current device: each thread has its own, at first 0."""
        return getattr(self._thread, "current", 0)

    @current.setter
    def current(self, device: int) -> None:
        self._thread.current = device
        self._thread.has_context = True
        self.switches.append(device)

    def go_back_to(self, device: int) -> None:
        """As torch does, which remembers a device without a context and sets it when it is used."""
        if device in self.switches:
            self.current = device
        else:
            self._thread.current = device

    # ---- torch --------------------------------------------------------------------------------

    def tensor(self, values: object, device: int, dtype: torch.dtype = torch.int32) -> GpuTensor:
        return self._place(torch.tensor(values, dtype=dtype), device)

    def _place(self, tensor: torch.Tensor, device: int) -> GpuTensor:
        placed = tensor.as_subclass(GpuTensor)
        placed.index = device
        begin = tensor.data_ptr()
        self.memory.append((begin, begin + tensor.numel() * tensor.element_size(), device))
        self.log.append(("alloc", self.current, device))
        return placed

    def allocator(self, function):
        def allocate(*size, device=None, **options):
            device = torch.device("cpu") if device is None else torch.device(device)
            tensor = function(*size, device="cpu", **options)
            if device.type == "cpu":
                return tensor
            return self._place(tensor, self.current if device.index is None else device.index)

        return allocate

    def device(self, device: object) -> _Current:
        return _Current(self, torch.device("cuda", device) if isinstance(device, int) else device)

    # ---- CuPy ---------------------------------------------------------------------------------

    def _cupy(self) -> SimpleNamespace:
        runtime = SimpleNamespace(
            CUDARuntimeError=FakeRuntimeError,
            hostAllocMapped=2,
            hostAllocPortable=1,
            streamCaptureModeRelaxed=2,
            getDevice=lambda: self.current,
            getDeviceCount=lambda: self.num_devices,
            setDevice=self._set_device,
            hostAlloc=_relaxed(self._host_alloc),
            memsetAsync=lambda ptr, value, size, stream: ctypes.memset(ptr, value, size),
            streamIsCapturing=lambda stream: stream == self.capturing_stream,
            streamSynchronize=_relaxed(self.synchronize),
            streamBeginCapture=self._begin_capture,
            streamEndCapture=self._end_capture,
            graphInstantiate=_relaxed(lambda graph: graph),
            graphDestroy=lambda graph: None,
            graphExecDestroy=_relaxed(
                lambda graph: self.log.append(("destroy", self.current, graph))
            ),
            graphLaunch=self._graph_launch,
        )
        driver = SimpleNamespace(CUDADriverError=FakeDriverError, launchKernel=self._launch)
        cuda = SimpleNamespace(
            runtime=runtime,
            driver=driver,
            Device=lambda device: SimpleNamespace(use=lambda: self._set_device(device)),
            Stream=_relaxed(
                lambda non_blocking: SimpleNamespace(
                    ptr=next(self.numbers), synchronize=_relaxed(lambda: None)
                )
            ),
            nvrtc=SimpleNamespace(getVersion=lambda: (12, 9)),
        )
        return SimpleNamespace(cuda=cuda, RawModule=self._module, __version__="14.2.0")

    def _set_device(self, device: int) -> None:
        self.current = device

    def _host_alloc(self, size: int, flags: int) -> int:
        self.pinned.append(ctypes.create_string_buffer(size))
        self.log.append(("pin", self.current, size))
        return ctypes.addressof(self.pinned[-1])

    def _module(self, code: str, options: object, backend: str) -> SimpleNamespace:
        self.log.append(("load", self.current, hash(code)))
        device = self.current

        def get_function(name: str) -> SimpleNamespace:
            handle = next(self.numbers)
            self.kernels[handle] = name, device
            return SimpleNamespace(kernel=SimpleNamespace(ptr=handle))

        return SimpleNamespace(get_function=get_function)

    def _launch(self, handle, *dimensions_and_arguments) -> None:
        *_, stream, params, _ = dimensions_and_arguments
        name, device = self.kernels[handle]
        if not getattr(self._thread, "has_context", False):  # the driver makes none, unlike CuPy
            error = FakeDriverError("CUDA_ERROR_INVALID_CONTEXT")
            error.status = _launch.INVALID_CONTEXT
            raise error
        if device != self.current:
            raise FakeDriverError("CUDA_ERROR_INVALID_HANDLE: a kernel of another device")
        at = ctypes.c_void_p.from_address(params).value
        args = ctypes.string_at(at, _launch.ARGS_BYTES)
        if self.capture is not None:
            self.capture.append((name, device, args))
            return
        self._enqueue(stream, [(name, device, args)])

    def _enqueue(self, stream: int, launches: list) -> None:
        self.log.append(("launch", self.current, launches[0][0]))
        for launch in launches:
            if launch[1] != self.current:
                raise FakeRuntimeError("cudaErrorInvalidResourceHandle: launched elsewhere")
        if self.delayed:
            self.queues[self.current, stream] += launches
        else:
            for launch in launches:
                self.run(*launch)

    def _begin_capture(self, stream: int, mode: int) -> None:
        self.capture = []

    def _end_capture(self, stream: int) -> int:
        graph = next(self.numbers)
        self.graphs[graph], self.capture = self.capture, None
        return graph

    def _graph_launch(self, graph: int, stream: int) -> None:
        self._thread.has_context = True
        self._enqueue(stream, self.graphs[graph])

    def synchronize(self, stream: int) -> None:
        """Wait for a stream; 0 is the default stream of the current device."""
        self.log.append(("wait", self.current, stream))
        waiting = self.queues.pop((self.current, stream), [])
        for launch in waiting:
            self.run(*launch)

    # ---- Kernels ------------------------------------------------------------------------------

    def run(self, name: str, device: int, args: bytes) -> None:
        is_seed = name.startswith("draft_extend")
        module = _draft_extend_args if is_seed else _fused_args
        numbers = module.ARGS.unpack_from(args)
        formats = module.LAYOUT.formats.values()
        for pointer in (n for n, format in zip(numbers, formats, strict=True) if format == "Q"):
            for begin, end, owner in self.memory:
                if begin <= pointer < end and owner != device:
                    raise FakeRuntimeError(f"cudaErrorIllegalAddress: {name} reads cuda:{owner}")
        if is_seed and not name.endswith("tiles"):
            self._expand(numbers)

    @staticmethod
    def _expand(numbers: tuple[int, ...]) -> None:
        extend_ptr, seq_ptr, extend_stride, seq_stride, bs, flags, count = numbers[:7]
        expanded, clamped, result, out_total, limit, topk, epoch, *_ = numbers[7:]

        def read(pointer: int, stride: int, is_int64: int) -> list[int]:
            kind = ctypes.c_int64 if is_int64 else ctypes.c_int32
            size = ctypes.sizeof(kind)
            return [kind.from_address(pointer + i * stride * size).value for i in range(bs)]

        extend = read(extend_ptr, extend_stride, flags & _check.EXTEND_IS_INT64)
        seq = read(seq_ptr, seq_stride, flags & _check.SEQ_IS_INT64)
        total, status = sum(extend), Status.OK
        if min(extend, default=0) < 0:
            total, status = -1, Status.NEGATIVE_EXTEND
        elif total > INT32_MAX or max(map(abs, seq), default=0) > INT32_MAX:
            total, status = -1, Status.OUTSIDE_INT32
        elif flags & _check.TOTAL_IS_GIVEN:
            status = Status.OK if total == limit else Status.TOTAL_MISMATCH
        elif total > limit:
            status = Status.OVER_CAPACITY
        rows = [max(kv - q + 1 + j, 0) for q, kv in zip(extend, seq, strict=True) for j in range(q)]
        if status in (Status.OK, Status.TOTAL_MISMATCH):
            for row, value in enumerate(rows[:limit]):
                ctypes.c_int32.from_address(expanded + 4 * row).value = value
                ctypes.c_int32.from_address(clamped + 4 * row).value = min(value, topk)
        if out_total:
            (ctypes.c_int32 * 2).from_address(out_total)[:] = [total, status]
        if result:
            if count:
                counter = ctypes.c_int32.from_address(count)
                counter.value = epoch = counter.value % _launch.EPOCH_MASK + 1
            word = epoch << _launch.EPOCH_SHIFT | status << 32 | total & 0xFFFFFFFF
            ctypes.c_uint64.from_address(result).value = word


class _Guards:
    """Torch's guards, with the device that a tensor is said to be on."""

    def __init__(self, *tensors: torch.Tensor, **options: Any) -> None:
        self._check = _TENSOR_GUARDS(*tensors, **options).check
        self._devices = [tensor.get_device() for tensor in tensors]

    def check(self, *tensors: Any) -> bool:
        return self._check(*tensors) and self._devices == [t.get_device() for t in tensors]


_TENSOR_GUARDS = _known._TensorGuards


class _Current:
    """``torch.cuda.device``: on leaving, it makes no context where there was none."""

    def __init__(self, cuda: FakeCuda, device: torch.device | str | None) -> None:
        self.cuda = cuda
        self.index = torch.device(device).index if device is not None else cuda.current

    def __enter__(self) -> None:
        self.before = self.cuda.current
        if self.index is not None and self.index >= 0:
            self.cuda.current = self.index

    def __exit__(self, *exc_info: object) -> None:
        self.cuda.go_back_to(self.before)


def install(patch: pytest.MonkeyPatch, num_devices: int = 2) -> FakeCuda:
    """Put the devices in the place of CuPy's and torch's, and forget what the package knows."""
    cuda = FakeCuda(num_devices)
    patch.setattr(torch, "zeros", cuda.allocator(_zeros))
    patch.setattr(torch, "empty", cuda.allocator(_empty))
    for name, function in {
        "is_available": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: num_devices,
        "current_device": lambda: cuda.current,
        "device": cuda.device,
        "get_device_properties": lambda device: SimpleNamespace(multi_processor_count=NUM_SMS),
        "get_device_capability": lambda device: (9, 0),
        "get_device_name": lambda device: f"fake {device}",
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: SimpleNamespace(synchronize=lambda: None),
        "is_current_stream_capturing": lambda: (
            cuda.streams.get(cuda.current, 0) == cuda.capturing_stream
        ),
    }.items():
        patch.setattr(torch.cuda, name, function)
    patch.setattr(_known, "_TensorGuards", _Guards)
    set_stream(patch, lambda device: cuda.streams.get(device, 0))
    exchange = SimpleNamespace(cuThreadExchangeStreamCaptureMode=_exchange_capture_mode)
    patch.setattr(_launch, "_libcuda", lambda: exchange)
    patch.setattr(_module, "import_cupy", lambda: cuda.cupy)
    patch.setattr(_launch, "_states", {})
    patch.setattr(_launch, "_status_words", {})
    patch.setattr(dispatch, "_chosen", {})
    patch.setattr(dispatch, "_cuda_reasons", {})
    forget_calls(patch)
    return cuda
