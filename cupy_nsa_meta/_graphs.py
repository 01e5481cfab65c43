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

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from ._launch import EPOCH_MASK, DeviceState, Slot, relaxed_capture

MAX_GRAPHS = 64  # per thread
FREE_CAPTURES = 16  # per thread
HITS_PER_CAPTURE = 16  # that pay for a further one: 56 us against about 4 us saved by each

#: Packs ``slot.buffer`` for the captured launch; returns its kernels and grids.
Pack = Callable[[Slot], "tuple[tuple[str, int], ...]"]


class CapturedLaunch:
    """One launch as a CUDA graph with a result slot of its own.

    Its launches run one after another and answer in one slot: one thread and stream at a time.
    """

    __slots__ = ("_graph", "slot", "state")

    def __init__(self, state: DeviceState, pack: Pack) -> None:
        self.state = state
        self.slot = slot = state.take_slot()
        # The slot's launches so far were counted on the host, from here on the graph counts them.
        slot.epoch = 0
        state.words[slot.index] = 0
        with state.cupy.cuda.Device(state.device), relaxed_capture():
            stream = _capture_stream(state)
            state.runtime.memsetAsync(slot.count_ptr, 0, 4, stream.ptr)
            stream.synchronize()
            launches = pack(slot)
            stream.begin_capture(state.runtime.streamCaptureModeRelaxed)
            try:
                state.launch(slot, stream.ptr, launches)
            finally:
                self._graph = stream.end_capture()

    def launch(self, stream: int) -> None:
        """Enqueue on ``stream``."""
        slot, state = self.slot, self.state
        if state.runtime.getDevice() != state.device:
            with state.cupy.cuda.Device(state.device):
                self.launch(stream)
            return
        slot.ptr = stream
        slot.epoch = slot.epoch % EPOCH_MASK + 1
        self._graph.launch(slot)

    def run(self, stream: int) -> int:
        """Enqueue, then wait for the result word."""
        self.launch(stream)
        return self.state.wait(self.slot)

    def __del__(self) -> None:
        slot = getattr(self, "slot", None)
        if slot is None:
            return
        # A launch that has not answered yet would answer in somebody else's slot.
        if slot.epoch == 0 or self.state.has_answered(slot):
            self.state.give_slot(slot)
        else:
            self.state.retire_slot(slot)


class _Cache:
    """The captured launches of one thread."""

    def __init__(self) -> None:
        self.graphs: OrderedDict[Hashable, CapturedLaunch] = OrderedDict()
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
        self.graphs[key] = captured
        self.captures += 1
        if len(self.graphs) > MAX_GRAPHS:
            self.graphs.popitem(last=False)


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
        cache.hits += 1
        cache.graphs.move_to_end(key)
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
