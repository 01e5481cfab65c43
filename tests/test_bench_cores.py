"""The core that calls are timed on, without a slow one."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest

from benchmarks import cores


@pytest.fixture
def machine(monkeypatch):
    """Four cores, of which ``speeds`` tells the time of a probe."""

    class Machine:
        def __init__(self):
            self.speeds = {0: 700, 1: 450, 2: 440, 3: 800}
            self.allowed = {0, 1, 2, 3}
            self.probes = 0

        def probe(self):
            self.probes += 1
            return self.speeds[min(self.allowed)]

        def hold(self, thread, wanted):
            assert thread == 0
            self.allowed = set(wanted)

    machine = Machine()
    monkeypatch.setattr(cores, "probe", machine.probe)
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: set(machine.allowed))
    monkeypatch.setattr(os, "sched_setaffinity", machine.hold)
    monkeypatch.setattr(cores, "_chosen", None)
    return machine


def test_the_quickest_core_is_held_and_given_back(machine):
    with cores.quickest_core():
        assert machine.allowed == {2}
    assert machine.allowed == {0, 1, 2, 3}
    with suppress(KeyError), cores.quickest_core():
        assert machine.allowed == {2}
        raise KeyError
    assert machine.allowed == {0, 1, 2, 3}


def test_a_core_is_left_when_it_becomes_slow(machine):
    with cores.quickest_core() as look_again:
        before = machine.probes
        look_again()
        assert machine.allowed == {2}
        assert machine.probes == before + 1
        machine.speeds[2] = 480  # within the spread
        look_again()
        assert machine.allowed == {2}
        machine.speeds[2] = 600
        look_again()
        assert machine.allowed == {1}


def test_a_platform_that_cannot_hold_threads(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with cores.quickest_core() as look_again:
        look_again()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be held here")
def test_on_this_machine():
    allowed = os.sched_getaffinity(0)
    with cores.quickest_core() as look_again:
        look_again()
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == allowed
    assert cores.probe() > 0
