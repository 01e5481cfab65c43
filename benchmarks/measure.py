"""Timing: what a provider offers, how providers take turns, and what one number stands for.

Nothing in here knows the operation. A suite makes a case (lengths that change, buffers, a check)
and binds providers to it; ``Contest`` checks each of them, then times those that were right:

    end_to_end_us  a call that the host waits for: it returns the total, from an idle device
    host_us        a call that only enqueues, from an idle device
    gpu_us         many launches in one CUDA graph, by events, divided by their number

The lengths are others at every call and the device is idle before it. Providers take turns in short
blocks, so that a slow moment of a shared machine meets all of them.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter_ns
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch

END_TO_END = "end_to_end_us"
HOST = "host_us"
GPU = "gpu_us"
FIRST_CALL = "first_call_s"
BANDWIDTH = "gb_per_s"
METRICS = (END_TO_END, HOST, GPU, FIRST_CALL, BANDWIDTH)

CHECKS = 3  # batches on which a provider is checked before it is timed
BLOCK_WARMUP = 5  # calls at the start of each block that are not counted
SLOW_US = 150.0  # a call longer than this gets shorter blocks
SHORTEST_BLOCK = 5


class Absent(Exception):
    """A provider cannot run here, or not this case; the message says why."""


@dataclass
class Bound:
    """A provider bound to the buffers of a case; what is None it does not offer."""

    run: Callable[[], int] | None = None  # returns the total
    enqueue: Callable[[int], object] | None = None  # is told the total, waits for nothing
    record: Callable[[], object] | None = None  # enqueues what a CUDA graph can capture
    prepare: Callable[[], object] | None = None  # before each call, outside the time
    outputs: Callable[[], tuple[torch.Tensor, ...]] | None = None  # where not those of the case
    environ: Mapping[str, str] = field(default_factory=dict)  # set while this provider has its turn
    checked: bool = True  # False: not the operation itself, but a bound of it
    writes_more: bool = False  # than the operation asks for; what it asks for is compared


#: A provider, bound to a case of its operation; what it needs of a device, loaded once.
Binder = Callable[[Any], Bound]
Loader = Callable[[torch.device], Binder]


class Case(Protocol):
    """One batch shape with changing lengths."""

    op: str
    labels: dict[str, Any]  # the "case" of a stored row
    name: str  # in remarks
    total: int  # of the lengths that the buffers hold after advance()

    def advance(self) -> None:
        """Enqueue the next lengths."""

    def poison(self, outputs: tuple[torch.Tensor, ...] | None) -> None:
        """Enqueue sentinels in the outputs (None: those of the case)."""

    def difference(
        self, total: object, outputs: tuple[torch.Tensor, ...] | None, poisoned: bool
    ) -> str | None:
        """None where total and outputs are right, else the first fault.

        ``poisoned``: what is not to be written must still hold the sentinel.
        """


# ---- Statistics ---------------------------------------------------------------------------------


def summary(samples: Sequence[float]) -> dict[str, float | int]:
    """Median, p20, p80 and number of samples."""
    median, p20, p80 = np.percentile(np.asarray(samples, dtype=np.float64), (50, 20, 80))
    return {
        "median": round(float(median), 4),
        "p20": round(float(p20), 4),
        "p80": round(float(p80), 4),
        "count": len(samples),
    }


def turns(count: int, round_idx: int) -> list[int]:
    """The order of ``count`` providers in a round: another one begins, every other round reversed.

    A rotation alone would leave each provider behind the same neighbour all the time.
    """
    first = round_idx // 2 % count if count else 0
    order = [(first + position) % count for position in range(count)]
    return order[::-1] if round_idx % 2 else order


# ---- Devices ------------------------------------------------------------------------------------


class Device:
    """The CPU: nothing to wait for, no graphs."""

    is_gpu = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        pass

    def graph(self, record: Callable[[], object], count: int) -> Callable[[], object]:
        raise Absent("GPU time needs a GPU")

    def time_us(self, replay: Callable[[], object]) -> float:
        raise Absent("GPU time needs a GPU")


class Graph:
    """Launches as a CUDA graph, made by the driver and replayed on torch's current stream.

    Not torch's ``CUDAGraph``, each of which takes two streams: a process in which work has run on
    eight streams pays 0.18 us more for each node of every graph, until it ends.
    """

    _RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED: torch may allocate

    def __init__(self, record: Callable[[], object], count: int, stream: Any) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._device = stream.device
        self._executable = ctypes.c_void_p()
        cuda: Any = torch.cuda
        self._pool = cuda.MemPool()  # what is allocated in the graph is its own until it ends
        graph, handle = ctypes.c_void_p(), ctypes.c_void_p(stream.cuda_stream)
        with cuda.stream(stream), cuda.use_mem_pool(self._pool, stream.device):
            self._call("cuStreamBeginCapture_v2", handle, self._RELAXED)
            try:
                for _ in range(count):
                    record()
            except BaseException:
                self._driver.cuStreamEndCapture(handle, ctypes.byref(graph))
                self._driver.cuGraphDestroy(graph)
                raise
            self._call("cuStreamEndCapture", handle, ctypes.byref(graph))
        try:
            executable = ctypes.byref(self._executable)
            self._call("cuGraphInstantiateWithFlags", executable, graph, ctypes.c_ulonglong(0))
        finally:
            self._call("cuGraphDestroy", graph)

    def __call__(self) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._call("cuGraphLaunch", self._executable, ctypes.c_void_p(stream))

    def __del__(self) -> None:
        if self._executable:
            self._driver.cuGraphExecDestroy(self._executable)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with CUDA error {status}")


class Gpu(Device):
    """A CUDA device."""

    is_gpu = True
    #: About 250 us: the host has enqueued a whole graph before the GPU gets to the first event.
    HOLD_CYCLES = 500_000

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        cuda: Any = torch.cuda
        self._begin = cuda.Event(enable_timing=True)
        self._end = cuda.Event(enable_timing=True)
        self._stream = cuda.Stream(device)
        self._hold = cuda._sleep

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def graph(self, record: Callable[[], object], count: int) -> Callable[[], object]:
        self.synchronize()
        return Graph(record, count, self._stream)

    def time_us(self, replay: Callable[[], object]) -> float:
        self._hold(self.HOLD_CYCLES)
        self._begin.record()
        replay()
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) * 1000.0


def device_of(device: torch.device) -> Device:
    return Gpu(device) if device.type == "cuda" else Device(device)


# ---- Results ------------------------------------------------------------------------------------


class Results:
    """Rows and remarks of a run, as they are stored."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.absent: dict[str, str] = {}
        self.notes: list[str] = []
        self.left_out: list[tuple[str, str, str]] = []
        self.mismatches = 0
        self.first_mismatches: dict[str, str] = {}
        self.launch_cache: list[dict[str, Any]] = []
        self.extra: dict[str, Any] = {}
        self.stopped: str | None = None

    def add(
        self,
        op: str,
        suite: str,
        case: Mapping[str, Any],
        provider: str,
        metric: str,
        samples: Sequence[float],
    ) -> None:
        if samples:
            self.rows.append(
                {
                    "op": op,
                    "suite": suite,
                    "case": dict(case),
                    "provider": provider,
                    "metric": metric,
                    **summary(samples),
                }
            )

    def leave_out(self, where: str, provider: str, reason: object) -> None:
        """A provider that could not be measured: absent where it has no row at all, else a note."""
        text = one_line(reason)
        self.left_out.append((where, provider, text))
        self.absent.setdefault(provider, text)

    def mismatch(self, where: str, provider: str, what: str) -> None:
        self.mismatches += 1
        self.first_mismatches.setdefault(provider, f"{where}: {what}")

    def really_absent(self) -> dict[str, str]:
        """Providers without any row, and why."""
        measured = {row["provider"] for row in self.rows}
        return {name: reason for name, reason in self.absent.items() if name not in measured}

    def all_notes(self) -> list[str]:
        """Remarks, and what providers that are not absent could not do."""
        absent = self.really_absent()
        return self.notes + [
            f"{where}: {provider}: {text}"
            for where, provider, text in self.left_out
            if provider not in absent
        ]


def one_line(text: object, longest: int = 300) -> str:
    line = " ".join(str(text).split()) or "no message"
    return line if len(line) <= longest else f"{line[:longest]} ..."


def describe(labels: Mapping[str, Any]) -> str:
    return " ".join(f"{name} {value}" for name, value in labels.items())


# ---- The contest --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int = 60
    block: int = 50  # calls per provider and round, less for slow ones
    replays: int = 30  # of each graph
    graph_us: float = 800.0  # GPU time that one graph should take
    max_nodes: int = 500


QUICK = Effort(rounds=10, block=30, replays=10, graph_us=400.0, max_nodes=200)


class DeviceLost(Exception):
    """The device fails even without a provider: nothing more can be measured."""


class _WrongResult(Exception):
    pass


class Contest:
    """Check providers bound to one case, then time them by turns."""

    def __init__(
        self,
        case: Case,
        bounds: Mapping[str, Bound],
        device: Device,
        results: Results,
        suite: str,
        effort: Effort,
        tick: Callable[[], None] = lambda: None,
        cache_info: Callable[[], Mapping[str, int] | None] = lambda: None,
    ) -> None:
        self.case = case
        self.bounds = bounds
        self.device = device
        self.results = results
        self.suite = suite
        self.effort = effort
        self.tick = tick
        self.cache_info = cache_info
        self.where = f"{suite}, {case.name}"

    # -- calls timed by the host

    def end_to_end(self) -> dict[str, list[float]]:
        """Microseconds of the calls that return the total."""
        return self._calls(END_TO_END, {n: b for n, b in self.bounds.items() if b.run is not None})

    def host(self) -> dict[str, list[float]]:
        """Microseconds of the calls that enqueue."""
        offering = {n: b for n, b in self.bounds.items() if b.enqueue is not None}
        if not self.device.is_gpu:
            return self._without_gpu(HOST, offering)
        return self._calls(HOST, offering)

    def _calls(self, metric: str, offering: dict[str, Bound]) -> dict[str, list[float]]:
        entered = self._entered(metric, offering, self._check_call)
        blocks: dict[str, int] = {}
        for name in list(entered):
            length = self._guard(metric, name, partial(self._block_length, metric, entered[name]))
            if length is None:
                del entered[name]
            else:
                blocks[name] = length
        samples: dict[str, list[float]] = {name: [] for name in entered}
        counts: dict[str, dict[str, int]] = {}
        names = list(entered)
        was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()  # a collection inside one provider's call is not that provider's time
        try:
            for round_idx in range(self.effort.rounds):
                for turn in turns(len(names), round_idx):
                    name = names[turn]
                    if name not in entered:
                        continue
                    before = self.cache_info()
                    block = partial(self._block, metric, entered[name], blocks[name])
                    taken = self._guard(metric, name, block)
                    if taken is None:
                        del entered[name], samples[name]
                        counts.pop(name, None)
                    else:
                        samples[name] += taken
                        _add_counts(counts.setdefault(name, {}), before, self.cache_info())
                self.tick()
        finally:
            if was_enabled:
                gc.enable()
        for name, values in samples.items():
            self.results.add(self.case.op, self.suite, self.case.labels, name, metric, values)
            self._store_cache(metric, name, counts.get(name, {}))
        return samples

    def _block_length(self, metric: str, bound: Bound) -> int:
        elapsed = min(self._block(metric, bound, 3, warmup=2))
        length = int(self.effort.block * min(1.0, SLOW_US / max(elapsed, 1.0)))
        return max(min(SHORTEST_BLOCK, self.effort.block), length)

    def _block(
        self, metric: str, bound: Bound, count: int, warmup: int = BLOCK_WARMUP
    ) -> list[float]:
        """Times of ``count`` calls; the rows of the last one are checked, and every total."""
        case, prepare, synchronize = self.case, bound.prepare, self.device.synchronize
        clock = perf_counter_ns
        times: list[float] = []
        with environment(bound.environ):
            for idx in range(-warmup, count):
                case.advance()
                if prepare is not None:
                    prepare()
                synchronize()
                known = case.total
                if metric == END_TO_END:
                    run = bound.run
                    assert run is not None
                    begin = clock()
                    total = run()
                    end = clock()
                    if total != known:
                        raise _WrongResult(f"returned total: expected {known}, got {total!r}")
                else:
                    enqueue = bound.enqueue
                    assert enqueue is not None
                    begin = clock()
                    enqueue(known)
                    end = clock()
                if idx >= 0:
                    times.append((end - begin) / 1000.0)
        synchronize()
        self._compare(bound, case.total, poisoned=False)
        return times

    # -- launches timed by the GPU

    def gpu(self) -> dict[str, list[float]]:
        """Microseconds per launch, of launches in one graph."""
        offering = {n: b for n, b in self.bounds.items() if b.record is not None}
        if not self.device.is_gpu:
            return self._without_gpu(GPU, offering)
        entered = self._entered(GPU, offering, self._check_record)
        graphs: dict[str, tuple[Callable[[], object], int]] = {}
        for name, bound in entered.items():
            graph = self._guard(GPU, name, partial(self._graph, bound))
            if graph is not None:
                graphs[name] = graph
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        names = list(graphs)
        for round_idx in range(self.effort.replays):
            for turn in turns(len(names), round_idx):
                replay, count = graphs[names[turn]]
                self.case.advance()
                self.device.synchronize()
                samples[names[turn]].append(self.device.time_us(replay) / count)
            self.tick()
        for name, values in samples.items():
            self.results.add(self.case.op, self.suite, self.case.labels, name, GPU, values)
        return samples

    def _graph(self, bound: Bound) -> tuple[Callable[[], object], int]:
        record = bound.record
        assert record is not None
        pilot_nodes = 4
        pilot = self.device.graph(record, pilot_nodes)
        estimate = min(self.device.time_us(pilot) for _ in range(3)) / pilot_nodes
        count = int(self.effort.graph_us / max(estimate, 0.1))
        count = max(1, min(count, self.effort.max_nodes))
        replay = self.device.graph(record, count)
        self._checked_call(bound, replay)
        self.device.time_us(replay)
        return replay, count

    # -- correctness

    def _check_call(self, metric: str, bound: Bound) -> None:
        for _ in range(CHECKS):
            if metric == END_TO_END:
                assert bound.run is not None
                self._checked_call(bound, bound.run, returns_total=True)
            else:
                enqueue = bound.enqueue
                assert enqueue is not None
                self._checked_call(bound, partial(self._enqueue_known, enqueue))

    def _enqueue_known(self, enqueue: Callable[[int], object]) -> None:
        enqueue(self.case.total)

    def _check_record(self, metric: str, bound: Bound) -> None:
        assert bound.record is not None
        for _ in range(CHECKS):
            self._checked_call(bound, bound.record)

    def _checked_call(
        self, bound: Bound, call: Callable[[], object], returns_total: bool = False
    ) -> None:
        self.case.advance()
        with environment(bound.environ):
            if bound.prepare is not None:
                bound.prepare()
            if bound.checked:
                self.case.poison(bound.outputs() if bound.outputs is not None else None)
            self.device.synchronize()
            total = call()
        self.device.synchronize()
        self._compare(bound, total if returns_total else self.case.total, poisoned=True)

    def _compare(self, bound: Bound, total: object, poisoned: bool) -> None:
        if not bound.checked:
            return
        outputs = bound.outputs() if bound.outputs is not None else None
        difference = self.case.difference(total, outputs, poisoned and not bound.writes_more)
        if difference is not None:
            raise _WrongResult(difference)

    def _entered(
        self,
        metric: str,
        offering: Mapping[str, Bound],
        check: Callable[[str, Bound], None],
    ) -> dict[str, Bound]:
        """The providers that are right."""

        def passes(bound: Bound) -> bool:
            check(metric, bound)
            return True

        return {
            name: bound
            for name, bound in offering.items()
            if self._guard(metric, name, partial(passes, bound))
        }

    def _guard(self, metric: str, name: str, action: Callable[[], Any]) -> Any:
        """The action's result; None where the provider was wrong or failed, which is recorded."""
        where = f"{self.where}, {metric}"
        try:
            return action()
        except _WrongResult as error:
            self.results.mismatch(where, name, str(error))
        except DeviceLost:
            raise
        except Exception as error:
            self.results.leave_out(where, name, failure(error))
            self._still_alive(name)
        return None

    def _still_alive(self, name: str) -> None:
        try:
            self.device.synchronize()
        except Exception as error:
            raise DeviceLost(f"the device failed under {name}: {one_line(error)}") from error

    def _without_gpu(self, metric: str, offering: Mapping[str, Bound]) -> dict[str, list[float]]:
        for name, bound in offering.items():
            if bound.run is None:
                self.results.leave_out(f"{self.where}, {metric}", name, "needs a GPU")
        return {}

    def _store_cache(self, metric: str, name: str, counts: Mapping[str, int]) -> None:
        calls = counts.get("hits", 0) + counts.get("misses", 0)
        if calls:  # of a provider that asks the cache
            rate = round(counts.get("hits", 0) / calls, 4)
            self.results.launch_cache.append(
                {
                    "suite": self.suite,
                    "case": dict(self.case.labels),
                    "provider": name,
                    "metric": metric,
                    **counts,
                    "hit_rate": rate,
                }
            )


def _add_counts(
    counts: dict[str, int], before: Mapping[str, int] | None, after: Mapping[str, int] | None
) -> None:
    if before is None or after is None:
        return
    for name in ("hits", "misses", "captures"):
        if name in before and name in after:
            counts[name] = counts.get(name, 0) + after[name] - before[name]


def failure(error: BaseException) -> str:
    """Why a provider is left out, on one line."""
    return str(error) if isinstance(error, Absent) else f"raised {type(error).__name__}: {error}"


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """End a Python computation that takes too long; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expired(signum: int, frame: FrameType | None) -> None:
        raise Absent(f"{what} took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
