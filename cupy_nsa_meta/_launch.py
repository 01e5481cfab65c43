"""The launch path: loaded kernels and result slots per device, enqueue, and the wait for a result.

A kernel takes one struct by value and may answer with one 64-bit word in mapped host memory, which
the host reads without any CUDA call:

    bits 0-31 total (-1 as 0xffffffff)   bits 32-34 status   bits 35-63 epoch

A result slot (that word, a packing buffer, a launch counter in device memory) belongs to one call,
or to one captured graph, at a time. Its epoch counts its launches, so a word left by an earlier
launch is never taken for an answer; a slot whose wait was interrupted is not used again until its
late word has come.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from time import perf_counter_ns
from typing import Any

import torch

from . import _module

NUM_SLOTS = 8192  # calls that wait and graphs that are held at the same time, per device
SLOT_BYTES = 64  # a cache line each: no two waiting threads share one
QUICK_LOOKS = range(200)  # at a result word, some 10 us, before the clock is looked at as well
SPIN_NS = (
    50_000  # the GPU work of a call is a few microseconds; behind queued work the GIL is freed
)
STATUS_SHIFT = 32
EPOCH_SHIFT = 35
EPOCH_MASK = (1 << 29) - 1
WORD_MASK = (1 << EPOCH_SHIFT) - 1  # a word less its epoch
ARGS_BYTES = 512  # room for the largest argument struct; the driver copies what a kernel declares
Launches = tuple[tuple[str, int], ...]  # kernels and grids, in order
BLOCK_THREADS = _module.BLOCK_THREADS
INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT

#: Raw handle of torch's current stream of a device; absent from CPU builds of torch.
current_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # type: ignore[assignment]


class Layout:
    """The fields of an argument struct in its order: format characters of ``struct``, names."""

    def __init__(self, *fields: tuple[str, str]) -> None:
        self.formats = {name: format for format, names in fields for name in names.split()}
        self.struct = struct.Struct("<" + "".join(self.formats.values()))
        assert self.struct.size <= ARGS_BYTES

    def at(self, name: str) -> int:
        """Offset of a field."""
        before = list(self.formats).index(name)
        return struct.calcsize("<" + "".join([*self.formats.values()][:before]))

    def run_of(self, names: str) -> tuple[struct.Struct, int]:
        """Packer and offset of fields that follow each other."""
        wanted = names.split()
        begin = list(self.formats).index(wanted[0])
        assert list(self.formats)[begin : begin + len(wanted)] == wanted
        return struct.Struct("<" + "".join(map(self.formats.__getitem__, wanted))), self.at(
            wanted[0]
        )


class Arguments:
    """An argument struct where a launch finds it; the driver copies what the kernel declares."""

    __slots__ = ("_args", "_params", "buffer", "params")

    def __init__(self) -> None:
        self.buffer = bytearray(ARGS_BYTES)
        self._args = (ctypes.c_char * ARGS_BYTES).from_buffer(self.buffer)
        self._params = (ctypes.c_void_p * 1)(ctypes.addressof(self._args))
        self.params = ctypes.addressof(self._params)  # void** kernelParams


#: For launches that are not kept: as many as threads that make one at the same time.
_spare_arguments: deque[Arguments] = deque()


def take_arguments() -> Arguments:
    """Arguments that nobody else uses; give them back after the launch."""
    try:
        return _spare_arguments.pop()
    except IndexError:
        return Arguments()


give_arguments = _spare_arguments.append


class PackedLaunch(Arguments):
    """A launch that can be made again, by any thread: arguments, kernels and grids in order."""

    __slots__ = ("launches",)

    def __init__(self, arguments: bytes | bytearray, launches: Launches) -> None:
        super().__init__()
        self.buffer[: len(arguments)] = arguments
        self.launches = launches


class Slot(Arguments):
    """One result word, the argument struct of the launches that answer in it, and their count."""

    __slots__ = (
        "address", "count_ptr", "epoch", "index", "packed", "struct_halves", "struct_words",
    )  # fmt: skip

    def __init__(self, index: int, address: int, count_ptr: int) -> None:
        super().__init__()
        self.struct_words = memoryview(self.buffer).cast("Q")
        self.struct_halves = memoryview(self.buffer).cast("I")
        #: What the struct holds, for whoever takes a slot from ``free_slots`` to pack the same.
        self.packed: object = None
        self.index = index  # of the word, in 8-byte units
        self.address = address
        self.count_ptr = count_ptr  # device memory, int32: launches of a captured graph
        self.epoch = 0  # of the last launch

    def next_epoch(self) -> int:
        """The epoch of the next launch, never 0: a fresh word is 0."""
        self.epoch = epoch = self.epoch % EPOCH_MASK + 1
        return epoch


class DeviceState:
    """What the launch path keeps for one device. Made by ``device_state``."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.cupy = cupy = _module.import_cupy()
        self.runtime = cupy.cuda.runtime
        self._get_device = self.runtime.getDevice
        #: The only device of the process, hence the current one of every thread.
        self._is_only = self.runtime.getDeviceCount() == 1
        #: Enqueue a captured launch: (executable graph, stream).
        self.launch_graph: Callable[[int, int], None] = (
            self.runtime.graphLaunch if self._is_only else self._launch_graph_on_device
        )
        self._launch_kernel = cupy.cuda.driver.launchKernel
        self._driver_error = cupy.cuda.driver.CUDADriverError
        self.num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.stems: set[str] = set()  # of the source files whose kernels are loaded
        self._kernels: dict[str, Any] = {}  # kept: a function handle dies with its module
        self._functions: dict[str, tuple[int, int]] = {}  # handles, threads of a block
        with torch.cuda.device(device), relaxed_capture():
            num_bytes = NUM_SLOTS * SLOT_BYTES
            flags = self.runtime.hostAllocMapped | self.runtime.hostAllocPortable
            try:
                self._base = self.runtime.hostAlloc(num_bytes, flags)  # until the process ends
            except self.runtime.CUDARuntimeError as error:
                what = f"{num_bytes >> 10} KiB of pinned memory for the results of cuda:{device}"
                raise _module.explain(f"cannot allocate {what}", error) from error
            self._counts = torch.zeros(NUM_SLOTS, dtype=torch.int32, device=f"cuda:{device}")
            self._counts_ptr = self._counts.data_ptr()
            torch.cuda.synchronize(device)  # zero for every stream
        memory = (ctypes.c_char * num_bytes).from_address(self._base)
        ctypes.memset(self._base, 0, num_bytes)
        self._share_words(memoryview(memory).cast("B"))
        self.sticky_status = status_word(device).data_ptr()
        self._next_slot = count()
        self.slots_made = 0
        self.free_slots: deque[Slot] = deque()
        self._retired: deque[Slot] = deque()

    def _share_words(self, memory: memoryview) -> None:
        """The result words; also as halves, low and high, of which a high one is quicker to ask."""
        self.words = memory.cast("Q")
        self.halves = memory.cast("I")

    def make_current(self) -> Any:
        """The device as the current one of this thread, for a while.

        By torch: leaving CuPy's sets the device before, which makes a context on it, half a GB on
        a GPU 0 that is not used.
        """
        return torch.cuda.device(self.device)

    def load(self, stem: str) -> None:
        """Compile and load the kernels of ``cuda_src/<stem>.cu``, once."""
        kernels = _module.load(stem, self.device)
        self._kernels.update(kernels)
        self._functions.update(
            (name, (kernel.ptr, _module.block_threads(name))) for name, kernel in kernels.items()
        )
        self.stems.add(stem)

    def kernel(self, name: str) -> tuple[int, int]:
        """The function handle of a kernel that is loaded, and the threads of its blocks."""
        return self._functions[name]

    def take_slot(self) -> Slot:
        """A slot that no other call uses; give it back only once its word has been read."""
        try:
            slot = self.free_slots.pop()
        except IndexError:
            number = next(self._next_slot)
        else:
            slot.packed = None
            return slot
        if number < NUM_SLOTS:
            self.slots_made = number + 1
            return Slot(
                number * (SLOT_BYTES // 8),
                self._base + number * SLOT_BYTES,
                self._counts_ptr + 4 * number,
            )
        for _ in range(len(self._retired)):
            try:
                slot = self._retired.popleft()
            except IndexError:
                break
            if self.has_answered(slot):  # its late word has come
                slot.packed = None
                return slot
            self._retired.append(slot)
        raise RuntimeError(
            f"cupy_nsa_meta: all {NUM_SLOTS} result slots of cuda:{self.device} are waiting for "
            "their kernels; wait for earlier calls, or use total_tokens= or the async form"
        )

    def give_slot(self, slot: Slot) -> None:
        self.free_slots.append(slot)

    def retire_slot(self, slot: Slot) -> None:
        """Keep a slot away from later calls until the launch that it waited for has answered."""
        self._retired.append(slot)

    def leave_slot(self, slot: Slot, error: BaseException) -> None:
        """Give back the slot of a call that failed, at once where its launch was refused."""
        # Either is raised before anything that answers has been enqueued.
        if isinstance(error, (self._driver_error, torch.OutOfMemoryError)):
            self.give_slot(slot)
        else:
            self.retire_slot(slot)

    def has_answered(self, slot: Slot) -> bool:
        """The word of the slot's last launch has come."""
        return self.words[slot.index] >> EPOCH_SHIFT == slot.epoch

    def launch(self, arguments: Arguments, stream: int, launches: Launches) -> None:
        """Enqueue kernels (name, grid) in order, each with the same argument struct."""
        if not self._is_only and self._get_device() != self.device:
            with self.make_current():
                self.launch(arguments, stream, launches)
            return
        # The driver's call, 1 us less than that of CuPy's kernel objects.
        launch, params = self._launch_kernel, arguments.params
        for name, grid in launches:
            function, threads = self._functions[name]
            try:
                launch(function, grid, 1, 1, threads, 1, 1, 0, stream, params, 0)
            except self._driver_error as error:
                if error.status != INVALID_CONTEXT:
                    raise
                self.runtime.setDevice(self.device)  # a thread that has not used CUDA yet
                launch(function, grid, 1, 1, threads, 1, 1, 0, stream, params, 0)

    def _launch_graph_on_device(self, graph: int, stream: int) -> None:
        if self._get_device() == self.device:
            self.runtime.graphLaunch(graph, stream)
        else:
            with self.make_current():
                self.runtime.graphLaunch(graph, stream)

    def is_capturing(self, stream: int) -> bool:
        """Whether a CUDA graph is being captured on ``stream``; the legacy stream 0 never is."""
        return stream != 0 and bool(self.runtime.streamIsCapturing(stream))

    def wait(self, slot: Slot, stream: int) -> int:
        """The word that the slot's last launch writes: spin briefly, then wait without the GIL.

        Returns the word less its epoch. An error of the context is raised as CuPy raises it.
        """
        words, index, epoch = self.words, slot.index, slot.epoch
        halves, low = self.halves, 2 * index
        high = low + 1
        fine = epoch << EPOCH_SHIFT - STATUS_SHIFT  # the high half with status 0
        for _ in QUICK_LOOKS:
            if halves[high] == fine:
                return halves[low]
        deadline = 0
        while True:
            word = words[index]
            if word >> EPOCH_SHIFT == epoch:
                return word & WORD_MASK
            if not deadline:
                deadline = perf_counter_ns() + SPIN_NS
            elif perf_counter_ns() > deadline:
                break
        # The default stream, 0, is that of the current device.
        with self.make_current(), relaxed_capture():
            self.runtime.streamSynchronize(stream)
        word = words[index]
        # A captured launch may have been made again meanwhile, by a signal handler: a later answer.
        if word >> EPOCH_SHIFT not in (epoch, slot.epoch):
            raise RuntimeError(
                "cupy_nsa_meta: the stream has finished, but the kernel's result did not arrive"
            )
        return word & WORD_MASK


class relaxed_capture:
    """Let this thread wait, load and allocate while another thread captures a CUDA graph.

    With a capture of the default mode under way anywhere in the process, the driver refuses such
    calls to every thread that has not asked for the relaxed mode.
    """

    def __enter__(self) -> None:
        self._mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED
        _libcuda().cuThreadExchangeStreamCaptureMode(ctypes.byref(self._mode))

    def __exit__(self, *exc_info: object) -> None:
        _libcuda().cuThreadExchangeStreamCaptureMode(ctypes.byref(self._mode))


_libcuda_handle: ctypes.CDLL | None = None


def _libcuda() -> ctypes.CDLL:
    global _libcuda_handle
    if _libcuda_handle is None:
        _libcuda_handle = ctypes.CDLL("libcuda.so.1")
    return _libcuda_handle


def lasting() -> Any:
    """For tensors that outlive a call: made in ``torch.inference_mode`` they could not be written
    outside of it."""
    return torch.inference_mode(mode=False)


_status_words: dict[int, torch.Tensor] = {}
_status_lock = threading.Lock()


def status_word(device: int) -> torch.Tensor:
    """The sticky status of a device (-1: the CPU), int32 [1]; kept until the process ends."""
    word = _status_words.get(device)
    if word is None:
        if device >= 0:
            refuse_forked()
        if device >= 0 and _is_capturing_on(device):
            raise RuntimeError(
                "cupy_nsa_meta: nothing has run on this device yet, and its status word cannot be "
                "allocated while a CUDA graph is being captured; make one call before"
            )
        with _status_lock:
            word = _status_words.get(device)
            if word is None:
                place = torch.device("cuda", device) if device >= 0 else torch.device("cpu")
                with relaxed_capture() if device >= 0 else nullcontext(), lasting():
                    word = torch.zeros(1, dtype=torch.int32, device=place)
                    if device >= 0:  # the first user may be on another stream
                        torch.cuda.current_stream(device).synchronize()
                _status_words[device] = word
    return word


_states: dict[int, DeviceState] = {}
_states_lock = threading.Lock()


def device_state(device: int, stem: str = "draft_extend") -> DeviceState:
    """The state of a device, with the kernels of one source file loaded.

    The first call of a device allocates, the first of a file compiles.
    """
    state = _states.get(device)
    if state is None or stem not in state.stems:
        refuse_forked()
        if _is_capturing_on(device):
            raise RuntimeError(
                "cupy_nsa_meta: the kernels are not compiled yet, and compiling is not allowed "
                f"while a CUDA graph is being captured; call cupy_nsa_meta.warmup({device}) before"
            )
        with _states_lock:
            state = _states.get(device)
            if state is None:
                state = _states[device] = DeviceState(device)
            if stem not in state.stems:
                state.load(stem)
    return state


def _is_capturing_on(device: int) -> bool:
    """Whether a CUDA graph is captured on the current stream of a device, or of the current one."""
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return True
    return bool(torch.cuda.is_current_stream_capturing())


# ---- After a fork -------------------------------------------------------------------------------

FORKED = (
    "cupy_nsa_meta: this process was forked after CUDA was in use, which CUDA does not survive; "
    "start processes with the method spawn (multiprocessing.set_start_method('spawn')), or fork "
    "before the first CUDA call"
)


class _ForkedState(DeviceState):
    """What a device's state is in a forked child: whatever is asked of it raises.

    Every launch, of calls, plans and captured graphs, asks the state of its device for something,
    so that the poison costs the other processes nothing.
    """

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        raise RuntimeError(FORKED)


def not_movable(name: str) -> TypeError:
    """For a plan that is to be pickled or copied."""
    return TypeError(
        f"{name}: a plan is bound to its buffers, device and process and cannot be pickled or "
        "copied; send the tensors and make a plan there"
    )


_is_forked = False
_left_behind: list[torch.Tensor] = []  # GPU memory of the parent, never freed from here


def is_forked() -> bool:
    """Whether this process is the forked child of one that used CUDA."""
    return _is_forked or bool(torch.cuda._is_in_bad_fork())


def refuse_forked() -> None:
    if is_forked():
        raise RuntimeError(FORKED)


def _after_fork_in_child() -> None:
    global _is_forked, _states_lock, _status_lock
    # A thread of the parent may have held one of them; it does not exist here.
    _states_lock, _status_lock = threading.Lock(), threading.Lock()
    _is_forked = _is_forked or bool(_states) or any(device >= 0 for device in _status_words)
    for state in _states.values():
        state.__class__ = _ForkedState
    for device in [device for device in _status_words if device >= 0]:
        _left_behind.append(_status_words.pop(device))


os.register_at_fork(after_in_child=_after_fork_in_child)
