"""The processor core that calls are timed on.

On a shared machine a core whose sibling serves somebody else runs Python at half the speed, and
which cores those are changes by the second. So a comparison is timed on one core, the quickest that
the process may use when it begins; another one takes over where it becomes slow between two rounds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter_ns

PROBES = 3  # of a core; the quickest counts
SLOWER = 1.15  # than the quickest core so far: time to look for another one


def probe() -> int:
    """Nanoseconds of what the host path of a call is made of: tuples, numbers, a dictionary."""
    quickest = 0
    for _ in range(PROBES):
        begin = perf_counter_ns()
        table = {}
        for number in range(1500):
            table[number, number + 1] = (number,)
        elapsed = perf_counter_ns() - begin
        quickest = min(quickest or elapsed, elapsed)
    return quickest


class QuickestCore:
    """Keeps the calling thread on a quick core."""

    def __init__(self, allowed: set[int]) -> None:
        self.allowed = sorted(allowed)
        self.best = 0  # of all probes so far

    def look(self) -> None:
        """Stay, or move to the quickest core."""
        here = probe()
        self.best = min(self.best or here, here)
        if len(os.sched_getaffinity(0)) == 1 and here <= SLOWER * self.best:
            return
        speeds = {}
        for core in self.allowed:
            os.sched_setaffinity(0, {core})
            speeds[core] = probe()
        self.best = min(self.best, *speeds.values())
        os.sched_setaffinity(0, {min(speeds, key=speeds.__getitem__)})


_chosen: QuickestCore | None = None  # of the process: it knows how quick cores can be


@contextmanager
def quickest_core() -> Iterator[Callable[[], None]]:
    """Hold this thread, and processes that it starts, on a quick core.

    Gives a function that looks again. Where threads cannot be held, nothing happens.
    """
    global _chosen
    if not hasattr(os, "sched_setaffinity"):
        yield lambda: None
        return
    allowed = os.sched_getaffinity(0)
    if _chosen is None or _chosen.allowed != sorted(allowed):
        _chosen = QuickestCore(allowed)
    try:
        _chosen.look()
        yield _chosen.look
    finally:
        os.sched_setaffinity(0, allowed)
