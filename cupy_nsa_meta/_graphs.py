"""Captured launches: a launch recorded once as a CUDA graph, replayed for a third of its host cost.

A plan owns one. ``Cache`` is that behind the drop-in call, per calling thread and stream, keyed by
everything that the launch depends on (pointers, sizes, strides, topk): the recorded launch holds no
memory of the caller's, and a freed and reused address means the same launch. What a graph reads
(the lengths) it reads at each replay.

Capturing costs as much as a dozen launches. A key is captured when it is met the second time, and
only while earlier captures have been paid back by their hits, so that a caller whose sizes change
all the time pays for plain launches and a lookup.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any

from ._known import MetOnce
from ._launch import (
    EPOCH_MASK,
    Arguments,
    DeviceState,
    Launches,
    PackedLaunch,
    Slot,
    is_forked,
    relaxed_capture,
)

MAX_GRAPHS = 64  # per thread
MAX_MET = 1024  # packed launches, forms; per thread
FREE_CAPTURES = 16  # per thread
HITS_PER_CAPTURE = 16  # that pay for a further one: 56 us against about 4 us saved by each


class CapturedLaunch:
    """One launch as a CUDA graph."""

    __slots__ = ("__weakref__", "graph", "last_used", "state")

    def __init__(self, state: DeviceState, arguments: Arguments, launches: Launches) -> None:
        self.state = state
        self.graph = 0  # the executable one
        self.last_used = 0
        runtime = state.runtime
        with state.make_current(), relaxed_capture():
            stream = _capture_stream(state)
            runtime.streamBeginCapture(stream.ptr, runtime.streamCaptureModeRelaxed)
            try:
                state.launch(arguments, stream.ptr, launches)
            except BaseException:
                with suppress(Exception):
                    runtime.graphDestroy(runtime.streamEndCapture(stream.ptr))
                raise
            graph = runtime.streamEndCapture(stream.ptr)
            try:
                self.graph = runtime.graphInstantiate(graph)
            finally:
                runtime.graphDestroy(graph)

    def launch(self, stream: int) -> None:
        """Enqueue."""
        self.state.launch_graph(self.graph, stream)

    def __del__(self) -> None:
        if sys is None or sys.is_finalizing() or is_forked():
            return  # a process that ends takes graphs and slots with it; a forked one has none
        self._release()

    def _release(self) -> None:
        """Also of an object that was not finished."""
        if getattr(self, "graph", 0):
            with self.state.make_current(), relaxed_capture():
                self.state.runtime.graphExecDestroy(self.graph)


class AnsweringLaunch(CapturedLaunch):
    """One launch as a CUDA graph whose kernels answer in a result slot of its own.

    Its launches run one after another and answer in one slot: one thread and stream at a time.
    ``pack`` packs the slot's arguments and returns kernels and grids.
    """

    __slots__ = ("slot",)

    def __init__(self, state: DeviceState, pack: Callable[[Slot], Launches]) -> None:
        self.state = state
        self.slot = slot = state.take_slot()
        # The slot's launches so far were counted on the host, from here on the graph counts them.
        slot.epoch = 0
        state.words[slot.index] = 0
        with state.make_current(), relaxed_capture():
            stream = _capture_stream(state)
            state.runtime.memsetAsync(slot.count_ptr, 0, 4, stream.ptr)
            stream.synchronize()
        super().__init__(state, slot, pack(slot))

    def launch(self, stream: int) -> None:
        self.slot.next_epoch()
        self.state.launch_graph(self.graph, stream)

    def run(self, stream: int) -> int:
        """Enqueue and wait; the result word less its epoch."""
        slot, state = self.slot, self.state
        slot.epoch = slot.epoch % EPOCH_MASK + 1
        state.launch_graph(self.graph, stream)
        return state.wait(slot, stream)

    def _release(self) -> None:
        super()._release()
        slot = getattr(self, "slot", None)
        if slot is None:
            return
        # A launch that has not answered yet would answer in somebody else's slot.
        if slot.epoch == 0 or self.state.has_answered(slot):
            self.state.give_slot(slot)
        else:
            self.state.retire_slot(slot)


def captured_or_none(
    capture: Callable[..., CapturedLaunch], *arguments: Any
) -> CapturedLaunch | None:
    """A captured launch; None where there is no memory for one: plain launches need none."""
    try:
        return capture(*arguments)
    except Exception:  # what is wrong with the device is what the launch will say
        return None


class Cache:
    """The captured launches of one thread."""

    def __init__(self) -> None:
        #: Of the seed operation ``AnsweringLaunch``, by keys of its own.
        self.graphs: dict[Hashable, Any] = {}
        self.met = MetOnce(MAX_GRAPHS)
        self.streams: dict[int, Any] = {}
        self.hits = self.misses = self.captures = 0

    def lookup(
        self, key: Hashable, capture: Callable[..., CapturedLaunch], *arguments: Any
    ) -> CapturedLaunch | None:
        """The captured launch of a key; None where a plain launch is due.

        Met the second time, a key is captured by ``capture(*arguments)``.
        """
        captured: CapturedLaunch | None = self.graphs.get(key)
        if captured is not None:
            self.hits = captured.last_used = self.hits + 1
            return captured
        if not self.is_due(key):
            return None
        captured = captured_or_none(capture, *arguments)
        if captured is not None:
            self.keep(key, captured)
        return captured

    def is_due(self, key: Hashable) -> bool:
        """Note a key that has no captured launch; whether it is worth one now."""
        self.misses += 1
        if not self.met.is_again(key):
            return False
        if self.captures >= FREE_CAPTURES + self.hits // HITS_PER_CAPTURE:
            return False
        self.met.forget(key)
        return True

    def keep(self, key: Hashable, captured: CapturedLaunch) -> None:
        """From now on the captured launch of a key; the one used least recently makes room."""
        if len(self.graphs) >= MAX_GRAPHS:  # a copy: a signal handler may call us in between
            oldest, _ = min(list(self.graphs.items()), key=lambda item: item[1].last_used)
            self.graphs.pop(oldest, None)
        self.graphs[key] = captured
        self.captures += 1
        captured.last_used = self.hits

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
        self.packed: OrderedDict[Hashable, PackedLaunch] = OrderedDict()
        self.met_packed = MetOnce(MAX_MET)
        self.met_forms = MetOnce(MAX_MET)


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
