"""Threads with streams of their own: eager calls, plans, captures, replays, every result checked.

Each of 8 threads has 8 lanes: a stream, one batch of one function with its buffers, plan and graph.
A round starts one operation on each lane, then looks at all of them. Totals that a call returns,
and every byte of a lane's memory, are compared on the device.

Captures run in the mode "thread_local", so that the others may wait and allocate meanwhile, and one
at a time: torch keeps the random number generators of captures in a table without a lock.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import cupy_nsa_meta
from cases import case
from cases import random_case as random_seed_case
from fused_cases import FUNCTIONS, FusedCase, lengths, shuffled
from fused_cases import case as fused_case
from fused_plans import batch_of

from . import Result, Save, Settings
from .forms import (
    FusedBatch,
    SeedBatch,
    fused_batch,
    plan_at,
    seed_arguments,
    seed_batch,
)

THREADS = 8
STREAMS = 8  # of each thread
SECONDS = 60.0
QUICK_SECONDS = 5.0
CAPTURE_EVERY = 8  # operations of a lane between captures; replays take the graph in between
KINDS = ("eager", "plan", "capture", "replay")
MAX_REPORTS = 5
PATIENCE = 30  # seconds that a round may take before the thread counts as hung

_capture_lock = threading.Lock()


# ---- What a lane works on -----------------------------------------------------------------------


def seed_variants(bs: int, seed: int) -> list[SeedBatch]:
    """Batches of one size and capacity with other lengths and totals, for the same buffers."""
    first = random_seed_case("first", "", bs, 5, seed)
    rng = np.random.default_rng(seed)
    extend = np.minimum(rng.permutation(first.extend), 4)  # another total, no larger
    second = case("second", "", extend, first.seq + 3, slack=first.capacity - int(extend.sum()))
    return [seed_batch(first), seed_batch(second)]


class SeedLane:
    """The seed operation on one batch size; alternates between its forms."""

    def __init__(self, variants: list[SeedBatch], device: str) -> None:
        self.variants = variants
        self.befores = [batch.before.to(device) for batch in variants]
        self.afters = [batch.after.to(device) for batch in variants]
        self.afters_async = [batch.after_async.to(device) for batch in variants]
        self.block = variants[0].before.to(device, copy=True)
        self.tensors = variants[0].block.arguments(self.block, variants[0].tensors)
        self.arguments = seed_arguments(variants[0], self.tensors)
        self.plan = cupy_nsa_meta.plan_draft_extend_metadata(*self.arguments)

    def eager(self, variant: int, turn: int) -> tuple[int | None, torch.Tensor]:
        """Enqueue one of the forms; the total if it returns one, and what the block shall hold."""
        if turn % 3 == 0:
            return self._async(variant)
        given = self.variants[variant].total if turn % 3 == 1 else None
        total = cupy_nsa_meta.fill_draft_extend_metadata(*self.arguments, total_tokens=given)
        return total, self.afters[variant]

    def planned(self, variant: int, turn: int) -> tuple[int | None, torch.Tensor]:
        if turn % 2:
            self.plan.launch()
            return None, self.afters[variant]
        return self.plan.run(), self.afters[variant]

    def enqueue(self, turn: int) -> list[torch.Tensor]:
        """What a graph records; what the block holds after a replay with each variant."""
        if turn % 3 == 0:
            self._async(0)
            return self.afters_async
        if turn % 3 == 1:
            capacity = self.tensors["out_seqlens_expanded"].numel()
            cupy_nsa_meta.fill_draft_extend_metadata(*self.arguments, total_tokens=capacity)
        else:
            self.plan.launch()
        return self.afters

    def _async(self, variant: int) -> tuple[int | None, torch.Tensor]:
        cupy_nsa_meta.fill_draft_extend_metadata_async(
            *self.arguments, out_total=self.tensors["out_total"]
        )
        return None, self.afters_async[variant]

    def total(self, variant: int) -> int:
        return self.variants[variant].total


class FusedLane:
    """A function of the fused family on one batch size."""

    def __init__(self, variants: list[FusedBatch], device: str) -> None:
        first = variants[0]
        self.op = first.case.op
        self.befores = [batch.before.to(device) for batch in variants]
        self.afters = [batch.after.to(device) for batch in variants]
        self.block = first.before.to(device, copy=True)
        self.arguments = first.block.arguments(self.block, first.built.arguments)
        self.plan = plan_at(first, self.arguments)
        self.batch = batch_of(first.built)

    def eager(self, variant: int, turn: int) -> tuple[int | None, torch.Tensor]:
        FUNCTIONS[self.op](**self.arguments)
        return None, self.afters[variant]

    def planned(self, variant: int, turn: int) -> tuple[int | None, torch.Tensor]:
        (self.plan.launch if turn % 2 else self.plan.run)(**self.batch)
        return None, self.afters[variant]

    def enqueue(self, turn: int) -> list[torch.Tensor]:
        if turn % 2:
            self.plan.launch(**self.batch)
        else:
            FUNCTIONS[self.op](**self.arguments)
        return self.afters

    def total(self, variant: int) -> int:
        raise AssertionError("the fused family returns no total")


FUSED_CASES: tuple[FusedCase, ...] = (
    fused_case("decode", "lane", "", lengths(40, 0, 500, 1), width=512),
    fused_case("verify", "lane", "", lengths(40, 0, 500, 1), next_n=4, width=512),
    fused_case("draft_extend", "lane", "", lengths(40, 0, 500, 1), lengths(40, 0, 6, 2), width=512),
    fused_case("extend", "lane", "", lengths(300, 0, 90, 1), lengths(300, 0, 9, 2), width=96),
    fused_case("decode", "lane_tiles", "", lengths(17_000, 0, 500, 1), tables=(), pool_rows=1),
)
SEED_SIZES = (20, 200, 3000)
assert len(FUSED_CASES) + len(SEED_SIZES) == STREAMS


def lanes_of(number: int, device: str) -> list[SeedLane | FusedLane]:
    """The work of a thread; its lengths are its own."""
    lanes: list[SeedLane | FusedLane] = []
    for size in SEED_SIZES:
        lanes.append(SeedLane(seed_variants(size, 10 * number + size), device))
    for item in FUSED_CASES:
        variants = [fused_batch(shuffled(item, 2 * number + k)) for k in (0, 1)]
        lanes.append(FusedLane(variants, device))
    return lanes


# ---- One thread ---------------------------------------------------------------------------------


class Lane:
    """A stream and the operation that was started on it."""

    def __init__(self, work: SeedLane | FusedLane, stream: Any) -> None:
        self.work = work
        self.stream = stream
        self.turn = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_afters: list[torch.Tensor] = []
        self.expected: torch.Tensor | None = None

    def start(self, counts: Counter[str]) -> str | None:
        """Start the next operation; what is wrong with the total that it returned."""
        self.turn += 1
        variant = (self.turn + self.turn // 4) % 2  # either one for each kind
        self.work.block.copy_(self.work.befores[variant])
        if self.turn % CAPTURE_EVERY == 1 and self.stream is not None:
            self.capture(self.turn // CAPTURE_EVERY)
            counts["capture"] += 1
        if self.graph is not None and self.turn % 4 in (1, 2):
            self.graph.replay()
            self.expected = self.graph_afters[variant]
            counts["replay"] += 1
            return None
        kind = "plan" if self.turn % 4 == 3 else "eager"
        run = self.work.planned if kind == "plan" else self.work.eager
        total, self.expected = run(variant, self.turn // 4)
        counts[kind] += 1
        if total is not None and total != self.work.total(variant):
            return f"{kind}: total {total}, expected {self.work.total(variant)}"
        return None

    def capture(self, turn: int) -> None:
        with _capture_lock:
            self.graph = None  # the old one ends here: its table is torch's, too
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self.graph_afters = self.work.enqueue(turn)
            finally:
                graph.capture_end()
            self.graph = graph

    def is_right(self) -> bool:
        """Wait, and compare every byte."""
        assert self.expected is not None
        return torch.equal(self.work.block, self.expected)


@contextmanager
def on(stream: Any) -> Iterator[None]:
    if stream is None:
        yield
    else:
        with torch.cuda.stream(stream):
            yield


class Record:
    """What the threads have done and met."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.checked = self.mismatches = 0
        self.reports: list[str] = []

    def add(self, counts: Counter[str], checked: int, reports: list[str]) -> None:
        with self.lock:
            self.counts += counts
            self.checked += checked
            self.mismatches += len(reports)
            self.reports = (self.reports + reports)[:MAX_REPORTS]


def work(number: int, lanes: list[Lane], is_over: Callable[[], bool], record: Record) -> None:
    """Rounds until the time is over."""
    try:
        while not is_over():
            counts: Counter[str] = Counter()
            reports = []
            for lane in lanes:
                with on(lane.stream):
                    what = lane.start(counts)
                if what is not None:
                    reports.append(f"thread {number}, {type(lane.work).__name__}, {what}")
            for at, lane in enumerate(lanes):
                with on(lane.stream):
                    if not lane.is_right():
                        reports.append(f"thread {number}, lane {at}, turn {lane.turn}: bytes")
            record.add(counts, len(lanes), reports)
    except BaseException as error:
        record.add(Counter(), 0, [f"thread {number}: {type(error).__name__}: {error}"])
        raise


def run(settings: Settings, save: Save, num_threads: int = THREADS) -> Result:
    """All threads until the time is over."""
    device = settings.device
    seconds = min(QUICK_SECONDS if settings.quick else SECONDS, settings.budget)
    streams: list[Any] = [None] * STREAMS
    if device != "cpu":
        cupy_nsa_meta.warmup()
    threads, all_lanes, owners = [], [], []
    for number in range(num_threads):
        if device != "cpu":
            owners.append([_stream() for _ in range(STREAMS)])
            streams = [torch.cuda.ExternalStream(stream.ptr) for stream in owners[-1]]
        works = lanes_of(number, device)
        all_lanes.append([Lane(w, s) for w, s in zip(works, streams, strict=True)])
    if device != "cpu":
        torch.cuda.synchronize()
        cupy_nsa_meta.last_status()
    record = Record()
    begin = time.monotonic()

    def is_over() -> bool:
        return time.monotonic() - begin >= seconds

    for number, lanes in enumerate(all_lanes):
        threads.append(
            threading.Thread(target=work, args=(number, lanes, is_over, record), daemon=True)
        )
        threads[-1].start()
    for thread in threads:
        while thread.is_alive():
            thread.join(5)
            print(f"{time.monotonic() - begin:6.1f} s: {dict(record.counts)}", flush=True)
            save(_result(record, num_threads, time.monotonic() - begin))
            if time.monotonic() - begin > seconds + PATIENCE:
                record.add(Counter(), 0, ["a thread does not end"])
                return _result(record, num_threads, time.monotonic() - begin)
    result = _result(record, num_threads, time.monotonic() - begin)
    if device != "cpu":
        torch.cuda.synchronize()
        result["status"] = cupy_nsa_meta.last_status()
        result["ok"] = result["ok"] and result["status"] == 0
    return result


def _result(record: Record, num_threads: int, seconds: float) -> Result:
    with record.lock:
        return {
            "ok": not record.mismatches and record.checked > 0,
            "threads": num_threads,
            "streams": num_threads * STREAMS,
            "seconds": round(seconds, 1),
            "operations": {kind: record.counts[kind] for kind in KINDS},
            "checked": record.checked,
            "mismatches": record.mismatches,
            "reports": record.reports,
        }


def _stream() -> Any:
    """A stream that is no other's: torch's own pool has 32 and begins anew."""
    import cupy

    return cupy.cuda.Stream(non_blocking=True)
