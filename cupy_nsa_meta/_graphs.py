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
from typing import Any

from ._launch import (
    EPOCH_MASK,
    EPOCH_SHIFT,
    WORD_MASK,
    DeviceState,
    Slot,
    is_forked,
    relaxed_capture,
)

MAX_GRAPHS = 64  # per thread
FREE_CAPTURES = 16  # per thread
QUICK_LOOKS = 128  # at the result word, some 10 us, before the clock is looked at as well
HITS_PER_CAPTURE = 16  # that pay for a further one: 56 us against about 4 us saved by each

#: Packs ``slot.buffer`` for the captured launch; returns its kernels and grids.
Pack = Callable[[Slot], "tuple[tuple[str, int], ...]"]


class CapturedLaunch:
    """One launch as a CUDA graph with a result slot of its own.

    Its launches run one after another and answer in one slot: one thread and stream at a time.
    """

    __slots__ = ("_exec", "_get_device", "_graph_launch", "last_used", "slot", "state")

    def __init__(self, state: DeviceState, pack: Pack) -> None:
        self.state = state
        self.last_used = 0
        runtime = state.runtime
        self._get_device = runtime.getDevice
        self._graph_launch = runtime.graphLaunch
        self._exec = 0
        self.slot = slot = state.take_slot()
        # The slot's launches so far were counted on the host, from here on the graph counts them.
        slot.epoch = 0
        state.words[slot.index] = 0
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

    def launch(self, stream: int) -> None:
        """Enqueue on ``stream``."""
        slot, state = self.slot, self.state
        if self._get_device() != state.device:
            with state.cupy.cuda.Device(state.device):
                self.launch(stream)
            return
        slot.ptr = stream
        slot.epoch = slot.epoch % EPOCH_MASK + 1
        self._graph_launch(self._exec, stream)

    def run(self, stream: int) -> int:
        """Enqueue, then wait for the result word."""
        self.launch(stream)
        slot, words = self.slot, self.state.words
        index, epoch = slot.index, slot.epoch
        for _ in range(QUICK_LOOKS):
            word = words[index]
            if word >> EPOCH_SHIFT == epoch:
                return word & WORD_MASK
        return self.state.wait(slot)

    def __del__(self) -> None:
        slot = getattr(self, "slot", None)
        if slot is None or sys is None or sys.is_finalizing() or is_forked():
            return  # a process that ends takes graphs and slots with it; a forked one has none
        if self._exec:
            self.state.runtime.graphExecDestroy(self._exec)
        # A launch that has not answered yet would answer in somebody else's slot.
        if slot.epoch == 0 or self.state.has_answered(slot):
            self.state.give_slot(slot)
        else:
            self.state.retire_slot(slot)


class _Cache:
    """The captured launches of one thread."""

    def __init__(self) -> None:
        self.graphs: dict[Hashable, CapturedLaunch] = {}
        self.met_once: OrderedDict[Hashable, None] = OrderedDict()
        self.streams: dict[int, Any] = {}
        self.hits = self.misses = self.captures = 0

    def should_capture(self, key: Hashable) -> bool:
        """Note a key that has no captured launch; whether it is worth one now."""
        earned = FREE_CAPTURES + self.hits // HITS_PER_CAPTURE
        if key in self.met_once and self.captures < earned:
            del self.met_once[key]
            return True
        self.met_once[key] = None
        if len(self.met_once) > MAX_GRAPHS:
            self.met_once.popitem(last=False)
        return False

    def insert(self, key: Hashable, captured: CapturedLaunch) -> None:
        if len(self.graphs) >= MAX_GRAPHS:
            del self.graphs[min(self.graphs, key=lambda old: self.graphs[old].last_used)]
        self.graphs[key] = captured
        self.captures += 1
        captured.last_used = self.hits


class _Thread(threading.local):
    def __init__(self) -> None:
        self.cache = _Cache()


_thread = _Thread()


def lookup(
    key: Hashable, capture: Callable[..., CapturedLaunch], *arguments: Any
) -> CapturedLaunch | None:
    """The captured launch of a key; None where a plain launch is due.

    Met the second time, a key is captured by ``capture(*arguments)``.
    """
    cache = _thread.cache
    captured = cache.graphs.get(key)
    if captured is not None:
        cache.hits = captured.last_used = cache.hits + 1
        return captured
    cache.misses += 1
    if not cache.should_capture(key):
        return None
    captured = capture(*arguments)
    cache.insert(key, captured)
    return captured


def discard(key: Hashable) -> None:
    """Forget a captured launch, after an error or an interrupted wait."""
    _thread.cache.graphs.pop(key, None)


def cache_info() -> dict[str, int]:
    """Counters of the calling thread's launch cache."""
    cache = _thread.cache
    return {
        "hits": cache.hits,
        "misses": cache.misses,
        "captures": cache.captures,
        "size": len(cache.graphs),
        "max_size": MAX_GRAPHS,
    }


def _capture_stream(state: DeviceState) -> Any:
    """A stream of this thread that nothing else runs on."""
    streams = _thread.cache.streams
    stream = streams.get(state.device)
    if stream is None:
        stream = streams[state.device] = state.cupy.cuda.Stream(non_blocking=True)
    return stream
