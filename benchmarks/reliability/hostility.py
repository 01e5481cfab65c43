"""Faults made on purpose and hostile arguments, as ``tests/`` has them."""

from __future__ import annotations

import importlib
from typing import Any

from . import Result, Save, Settings

MIN_KINDS = 40  # of hostile arguments


def is_good(outcome: dict[str, Any]) -> bool:
    """Its own verdict, or that every yes-or-no in it is a yes."""
    if "ok" in outcome:
        return outcome["ok"] is True
    answers = [value for value in outcome.values() if isinstance(value, bool)]
    return bool(answers) and all(answers)


def hang(settings: Settings, save: Save) -> Result:
    """A kernel that faults in between; and whether Python goes on while a call waits."""
    faults = importlib.import_module("faults")
    result: Result = {"ok": True}
    for name in ("gil_is_free", "fault_in_between"):  # the fault last
        outcome = getattr(faults, name)()
        result[name] = outcome
        result["ok"] = result["ok"] and is_good(outcome)
        save(result)
        print(f"{name}: {outcome}", flush=True)
    return result


def bad_input(settings: Settings, save: Save) -> Result:
    outcome = importlib.import_module("hostile").run(settings.device)
    kinds, failures = outcome["kinds"], outcome["failures"]
    num_kinds = kinds if isinstance(kinds, int) else len(kinds)
    good = not failures and outcome["cases"] >= num_kinds >= MIN_KINDS
    print(f"bad_input: {outcome['cases']} cases of {num_kinds} kinds", flush=True)
    return {"ok": good, **outcome}
