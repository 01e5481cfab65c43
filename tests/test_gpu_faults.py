"""A kernel that faults in between, and a call that waits behind a busy GPU."""

from __future__ import annotations

import pytest

import faults

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("delay_ms", [0, 5], ids=["fault_before", "fault_while_waiting"])
@pytest.mark.parametrize("form", faults.CALLS)
def test_a_fault_in_between_is_raised_by_the_waiting_call(form, delay_ms):
    found = faults.fault_in_between(form, delay_ms)
    assert found["result"] is None, found
    assert "illegal" in found["message"].lower(), found
    assert found["again"], "the context stays ill"
    assert found["seconds"] < 1, found


@pytest.mark.parametrize("form", ["call", "plan"])
def test_a_second_thread_runs_while_a_call_waits(form):
    found = faults.gil_is_free(form)
    assert found["error"] is None, found
    assert found["result"] == 5
    assert found["seconds"] > 0.05, "the call has waited for the work in front of it"
    assert found["ticks"] >= 20, found
    assert found["longest_gap_seconds"] < 0.05, found
