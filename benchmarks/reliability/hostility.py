"""Faults made on purpose and hostile arguments, as ``tests/`` has them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import Result, Save, Settings

MIN_KINDS = 40  # of hostile arguments
RAISED_WITHIN = 1.0  # seconds in which a waiting call tells of a fault
#: A second thread that wakes every millisecond, while a call waits behind 100 ms of GPU work.
MIN_TICKS = 20
LONGEST_GAP = 0.05  # seconds
GIL_FORMS = ("call", "plan")


def is_raised(found: dict[str, Any]) -> bool:
    """The call raised the error of the device in time, and returned no total."""
    return (
        found["error"] not in (None, "hang", "ended")
        and found["result"] is None
        and found["seconds"] < RAISED_WITHIN
    )


def ran_meanwhile(found: dict[str, Any]) -> bool:
    return (
        found["error"] is None
        and found["ticks"] >= MIN_TICKS
        and found["longest_gap_seconds"] < LONGEST_GAP
    )


def hang(settings: Settings, save: Save) -> Result:
    """A kernel that faults in between; and whether Python goes on while a call waits.

    Each way of waiting is a process of its own.
    """
    faults = importlib.import_module("faults")
    result: Result = {"ok": False, "gil_is_free": {}}
    for form in GIL_FORMS:  # alone: they measure time
        result["gil_is_free"][form] = faults.gil_is_free(form)
        save(result)
    forms: Sequence[str] = tuple(faults.CALLS)
    with ThreadPoolExecutor(len(forms)) as pool:
        found = pool.map(faults.fault_in_between, forms)
        result["fault_in_between"] = dict(zip(forms, found, strict=True))
    result["ok"] = all(map(is_raised, result["fault_in_between"].values())) and all(
        map(ran_meanwhile, result["gil_is_free"].values())
    )
    print(f"hang: {result}", flush=True)
    return result


def bad_input(settings: Settings, save: Save) -> Result:
    outcome = importlib.import_module("hostile").run(settings.device)
    good = not outcome["failures"] and outcome["cases"] >= outcome["kinds"] >= MIN_KINDS
    print(f"bad_input: {outcome['cases']} cases of {outcome['kinds']} kinds", flush=True)
    return {"ok": good, **outcome}
