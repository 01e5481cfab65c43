"""Faults and load: what ``benchmarks/reliability.json`` holds, and how each part is measured.

The batches are those of the tests: ``tests/`` has to lie beside ``benchmarks/``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))

Result = dict[str, Any]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: Top-level keys of the file, in its order, beside "environment".
KEYS = (*TOOLS, "random", "threads", "hang", "bad_input", "soak")


@dataclass(frozen=True)
class Settings:
    """What a part is told."""

    device: str  # "cuda" or "cpu"
    budget: float  # seconds; what is not done by then is left out, and the result says so
    quick: bool = False
    share: tuple[int, int] = (0, 1)  # this process's number, and how many share the work


#: Stores what is known so far, so that a fault leaves it.
Save = Callable[[Result], None]
