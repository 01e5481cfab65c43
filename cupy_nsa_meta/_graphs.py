"""Captured launches: a launch recorded once as a CUDA graph, replayed for a third of its host cost.

``CapturedLaunch`` is what a plan owns. ``lookup`` is the cache behind the drop-in call, per calling
thread and stream, keyed by everything that the launch depends on (pointers, sizes, strides, topk):
the recorded launch holds no memory of the caller's, and a freed and reused address means the same
launch. What a graph reads (the lengths) it reads at each replay.

Capturing costs as much as a dozen launches. A key is captured when it is met the second time, and
only while earlier captures have been paid back by their hits, so that a caller whose sizes change
all the time pays for plain launches and a lookup.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from ._known import KnownCalls
from ._launch import (
    EPOCH_MASK,
    EPOCH_SHIFT,
    STATUS_SHIFT,
    WORD_MASK,
    DeviceState,
    Slot,
    is_forked,
    relaxed_capture,
)

if TYPE_CHECKING:
    from .draft_extend import KnownCall

MAX_GRAPHS = 64  # per thread
MAX_KNOWN = 64  # per thread
FREE_CAPTURES = 16  # per thread
QUICK_LOOKS = range(200)  # at the result word, some 10 us, before the clock is looked at as well
HITS_PER_CAPTURE = 16  # that pay for a further one: 56 us against about 4 us saved by each

#: Packs ``slot.buffer`` for the captured launch; returns its kernels and grids.
Pack = Callable[[Slot], "tuple[tuple[str, int], ...]"]


class CapturedLaunch:
    """One launch as a CUDA graph, with a result slot of its own where its kernels answer.

    Its launches run one after another and answer in one slot: one thread and stream at a time.
    ``launch(stream)`` enqueues; ``run(stream)`` waits, too, and returns the result word less its
    epoch. Both are closures: the look-ups of a method cost a tenth of what the launch does.
    """

    __slots__ = ("__weakref__", "_exec", "last_used", "launch", "run", "slot", "state")

    launch: Callable[[int], None]
    run: Callable[[int], int]

    def __init__(self, state: DeviceState, pack: Pack, answers: bool = True) -> None:
        self.state = state
        self._exec = 0
        self.last_used = 0
        slot = state.take_slot()
        self.slot: Slot | None = slot
        # The slot's launches so far were counted on the host, from here on the graph counts them.
        slot.epoch = 0
        state.words[slot.index] = 0
        runtime = state.runtime
        with state.cupy.cuda.Device(state.device), relaxed_capture():
            stream = _capture_stream(state)
            runtime.memsetAsync(slot.count_ptr, 0, 4, stream.ptr)
            stream.synchronize()
            launches = pack(slot)
            runtime.streamBeginCapture(stream.ptr, runtime.streamCaptureModeRelaxed)
            try:
                state.launch(slot, stream.ptr, launches)
            finally:
                graph = runtime.streamEndCapture(stream.ptr)
            try:
                self._exec = runtime.graphInstantiate(graph)
            finally:
                runtime.graphDestroy(graph)
        if answers:
            self.launch, self.run = _launchers(state, self._exec, slot)
        else:  # its kernels have no word to write: the slot was for packing, and is another's now
            self.launch = _launcher(state, self._exec)
            self.slot = None
            state.give_slot(slot)

    def __del__(self) -> None:
        state, slot = getattr(self, "state", None), getattr(self, "slot", None)
        if state is None or sys is None or sys.is_finalizing() or is_forked():
            return  # a process that ends takes graphs and slots with it; a forked one has none
        if self._exec:
            state.runtime.graphExecDestroy(self._exec)
        if slot is None:
            return
        # A launch that has not answered yet would answer in somebody else's slot.
        if slot.epoch == 0 or state.has_answered(slot):
            state.give_slot(slot)
        else:
            state.retire_slot(slot)


def _launcher(state: DeviceState, graph: int) -> Callable[[int], None]:
    """Enqueues a graph. Reads an attribute of the state, which raises in a forked process."""
    get_device, graph_launch = state.runtime.getDevice, state.runtime.graphLaunch
    on_device = state.cupy.cuda.Device

    def launch(stream: int) -> None:
        if state.device == get_device():
            graph_launch(graph, stream)
        else:
            with on_device(state.device):
                graph_launch(graph, stream)

    return launch


def _launchers(
    state: DeviceState, graph: int, slot: Slot
) -> tuple[Callable[[int], None], Callable[[int], int]]:
    """``launch`` and ``run`` of a captured launch whose kernels answer in ``slot``."""
    get_device, graph_launch = state.runtime.getDevice, state.runtime.graphLaunch
    words, index, halves, high = state.words, slot.index, state.halves, 2 * slot.index + 1
    wait, launch_anywhere = state.wait, _launcher(state, graph)
    shift = EPOCH_SHIFT - STATUS_SHIFT  # of the epoch in the high half

    def launch(stream: int) -> None:
        slot.epoch = slot.epoch % EPOCH_MASK + 1
        if state.device == get_device():
            graph_launch(graph, stream)
        else:
            launch_anywhere(stream)

    def run(stream: int) -> int:
        epoch = slot.epoch = slot.epoch % EPOCH_MASK + 1
        if state.device == get_device():
            graph_launch(graph, stream)
        else:
            launch_anywhere(stream)
        fine = epoch << shift  # status 0; another one is met by the wait
        for _ in QUICK_LOOKS:
            if halves[high] == fine:
                return words[index] & WORD_MASK
        return wait(slot, stream)

    return launch, run


class Cache:
    """The captured launches of one thread."""

    def __init__(self) -> None:
        self.graphs: dict[Hashable, CapturedLaunch] = {}
        self.met_once: OrderedDict[int, None] = OrderedDict()  # by hash
        self.streams: dict[int, Any] = {}
        self.hits = self.misses = self.captures = 0

    def lookup(
        self, key: Hashable, capture: Callable[..., CapturedLaunch], *arguments: Any
    ) -> CapturedLaunch | None:
        """The captured launch of a key; None where a plain launch is due.

        Met the second time, a key is captured by ``capture(*arguments)``.
        """
        captured = self.graphs.get(key)
        if captured is not None:
            self.hits = captured.last_used = self.hits + 1
            return captured
        self.misses += 1
        if not self._should_capture(hash(key)):
            return None
        captured = capture(*arguments)
        if len(self.graphs) >= MAX_GRAPHS:
            del self.graphs[min(self.graphs, key=lambda old: self.graphs[old].last_used)]
        self.graphs[key] = captured
        self.captures += 1
        captured.last_used = self.hits
        return captured

    def _should_capture(self, number: int) -> bool:
        """Note a key that has no captured launch; whether it is worth one now."""
        met_once = self.met_once
        if number not in met_once:
            met_once[number] = None
            if len(met_once) > MAX_GRAPHS:
                met_once.popitem(last=False)
            return False
        if self.captures >= FREE_CAPTURES + self.hits // HITS_PER_CAPTURE:
            return False
        del met_once[number]
        return True

    def launch(self, captured: CapturedLaunch, stream: int) -> None:
        """Replay, and wait for nothing; one that fails is not used again."""
        try:
            captured.launch(stream)
        except BaseException:
            self.discard(captured)
            raise

    def discard(self, captured: CapturedLaunch) -> None:
        """Forget a captured launch, after an error or an interrupted wait."""
        for key, other in list(self.graphs.items()):
            if other is captured:
                del self.graphs[key]


class _Thread(threading.local):
    """What belongs to the calling thread."""

    def __init__(self) -> None:
        self.cache = Cache()
        self.known: KnownCalls[KnownCall] = KnownCalls(MAX_KNOWN)


thread = _Thread()


def cache_info() -> dict[str, int]:
    """Counters of the calling thread's launch cache."""
    cache = thread.cache
    return {
        "hits": cache.hits,
        "misses": cache.misses,
        "captures": cache.captures,
        "size": len(cache.graphs),
        "max_size": MAX_GRAPHS,
    }


def _capture_stream(state: DeviceState) -> Any:
    """A stream of this thread that nothing else runs on."""
    streams = thread.cache.streams
    stream = streams.get(state.device)
    if stream is None:
        stream = streams[state.device] = state.cupy.cuda.Stream(non_blocking=True)
    return stream
