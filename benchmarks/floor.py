"""The floor program (``native/floor.cu``): build it, run it, merge its samples."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from . import build
from .measure import Absent, Results, one_line, summary

PROVIDERS = ("floor-graph", "floor-launch", "floor-empty")
SUITE = "floor"
ITERATIONS = {False: (2000, 300), True: (600, 100)}  # calls and warm-up by ``quick``
TIMEOUT = 120

Key = tuple[str, str, tuple[tuple[str, Any], ...]]
BY_SUITE = "medians_by_suite"  # of a stored row: the samples taken before, in and after a suite


def median_for(row: dict[str, Any], suite: str) -> float:
    """Of a stored row: the median of what was taken for a suite, which a machine's drift spoils
    least; of a row that is not the floor's, its median.
    """
    return float(row.get(BY_SUITE, {}).get(suite, row["median"]))


class Samples:
    """All samples of all runs of the program."""

    def __init__(self) -> None:
        self.samples: dict[Key, dict[str, list[float]]] = {}  # by suite
        self.medians: dict[Key, list[float]] = {}  # of each run: the drift
        self.reason: str | None = None

    def take(self, device: torch.device, quick: bool, suite: str) -> None:
        """Run the program once, for a suite; after a failure never again."""
        if self.reason is not None:
            return
        try:
            if device.type != "cuda":
                raise Absent("the floor is a CUDA program")
            program = build.floor_program(build.architecture(device))
            self.read(run(program, *ITERATIONS[quick]), suite)
        except Absent as absent:
            self.reason = str(absent)
        except Exception as error:
            self.reason = one_line(f"raised {type(error).__name__}: {error}")

    def read(self, output: str, suite: str) -> None:
        """Take over the lines of one run."""
        for line in output.splitlines():
            row = json.loads(line)
            key = (row["provider"], row["metric"], tuple(row["case"].items()))
            by_suite = self.samples.setdefault(key, {})
            by_suite.setdefault(suite, []).extend(row["samples"])
            self.medians.setdefault(key, []).append(row["median"])

    def store(self, results: Results) -> None:
        """Put the rows of all samples so far in place of those stored before."""
        results.rows = [row for row in results.rows if row["suite"] != SUITE]
        for (provider, metric, case), by_suite in self.samples.items():
            samples = [sample for part in by_suite.values() for sample in part]
            results.add("draft_extend", SUITE, dict(case), provider, metric, samples)
            results.rows[-1]["medians_of_runs"] = self.medians[provider, metric, case]
            results.rows[-1][BY_SUITE] = {
                suite: summary(part)["median"] for suite, part in by_suite.items()
            }
        if self.reason is not None:
            for provider in PROVIDERS:
                if provider not in results.absent:
                    results.leave_out(SUITE, provider, self.reason)


def run(program: Path, iterations: int, warmup: int) -> str:
    """The program's output."""
    words = [str(program), str(iterations), str(warmup)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.SubprocessError) as error:
        raise Absent(f"the floor program did not run: {one_line(error)}") from error
    if done.returncode:
        raise Absent(f"the floor program failed ({done.returncode}): {one_line(done.stderr)}")
    return done.stdout
