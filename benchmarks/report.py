"""What a run prints and writes: the environment, a plain table, a JSON file."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cupy_nsa_meta import _module

from . import build
from .floor import median_for
from .measure import (
    BANDWIDTH,
    END_TO_END,
    FIRST_CALL,
    GPU,
    HOST,
    Results,
    describe,
)
from .replay import Replay, Result
from .workload import Summary

ROOT = Path(__file__).resolve().parent.parent
COMMIT_VARIABLE = "BENCH_COMMIT"

#: metric -> the provider that bounds it from below, and the unit
FLOORS = {END_TO_END: "floor-graph", HOST: "floor-graph", GPU: "floor-empty", BANDWIDTH: "fill"}
TITLES = {
    END_TO_END: "end-to-end, us",
    HOST: "enqueue, us",
    GPU: "GPU time, us",
    FIRST_CALL: "first call, s",
    BANDWIDTH: "bandwidth, GB/s",
}
SIDE_BY_SIDE = ("fused",)  # suites of many cases: a line for each, not for each provider


def environment(device: torch.device, command: str) -> dict[str, Any]:
    """Hardware, versions, commit, date and command line of a run; None for what is not there."""
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": _driver() if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cupy": _version("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        "nvrtc": _module.versions()["nvrtc_version"] if on_gpu else None,
        "nvcc": build.nvcc_version(),
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def command_line(program: str, argv: Sequence[str], path_options: Sequence[str]) -> str:
    """The command for a report, with the names of files, not their folders."""
    words = [program]
    for word in argv:
        option, equals, value = word.partition("=")
        if equals and option in path_options:
            word = f"{option}={Path(value).name}"
        elif words[-1] in path_options:
            word = Path(word).name
        words.append(word)
    return shlex.join(words)


def _driver() -> str | None:
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return _output(query).partition("\n")[0].strip() or None


def _commit() -> str | None:
    known = os.environ.get(COMMIT_VARIABLE)  # of a copy, whose history may be missing or older
    if known or not (ROOT / ".git").exists():
        return known
    git = ("git", "--no-optional-locks", "-C", str(ROOT))
    return _output((*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")) or None


def _output(command: Sequence[str]) -> str:
    """Standard output of a command, "" where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def workload(source: str, summary: Summary, options: dict[str, Any]) -> dict[str, Any]:
    """The ``workload`` part of the JSON file."""
    return {"source": source, **asdict(summary), "options": options}


def document(
    environment: dict[str, Any],
    workload: dict[str, Any],
    replay: Replay,
    absent: dict[str, str],
) -> dict[str, Any]:
    """Everything that ``--json`` writes. A backend with a mismatch has null times."""
    return {
        "environment": environment,
        "workload": workload,
        "backends": [_row(result) for result in replay.results],
        "absent": absent,
        "mismatches": replay.mismatches,
        "stopped": replay.stopped,
    }


def _row(result: Result) -> dict[str, Any]:
    median, p20, p80 = result.percentiles_us() or (None, None, None)
    return {
        "backend": result.backend,
        "steps": result.steps,
        "requests": result.requests,
        "rows": result.rows,
        "median_us": median,
        "p20_us": p20,
        "p80_us": p80,
        "mismatches": result.mismatches,
        "first_mismatch": result.first_mismatch,
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write the whole document at once."""
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def table(results: Sequence[Result]) -> str:
    """One line per backend; MISMATCH in place of the times of a backend with a wrong result."""
    header = ("backend", "steps", "requests", "rows", "us/step", "p20", "p80", "mismatches")
    lines: list[tuple[str, ...]] = [header]
    for result in results:
        times = result.percentiles_us()
        if times is not None:
            cells = tuple(f"{time:,.1f}" for time in times)
        else:
            cells = ("MISMATCH" if result.mismatches else "-", "", "")
        counts = (result.steps, result.requests, result.rows)
        lines.append(
            (
                result.backend,
                *(f"{count:,}" for count in counts),
                *cells,
                f"{result.mismatches:,}",
            )
        )
    return align(lines)


def align(lines: Sequence[Sequence[str]]) -> str:
    """Columns under each other: the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


# ---- Suites -------------------------------------------------------------------------------------

Row = dict[str, Any]


def suites_document(
    environment: dict[str, Any], results: Results, replay: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Everything that ``--json`` writes of a run of suites; ``replay`` is ``document`` of one."""
    absent = results.really_absent()
    replayed = dict(replay or {})
    for name, reason in replayed.pop("absent", {}).items():
        absent.setdefault(name, reason)
    replayed.pop("environment", None)
    return {
        "environment": environment,
        "rows": results.rows,
        "absent": absent,
        "launch_cache": results.launch_cache,
        "notes": results.notes,
        **results.extra,
        **replayed,
        "mismatches": results.mismatches + replayed.get("mismatches", 0),
        "first_mismatches": results.first_mismatches,
        "stopped": results.stopped or replayed.get("stopped"),
    }


def floor_of(rows: Sequence[Row], metric: str, labels: dict[str, Any] | None = None) -> Row | None:
    """The floor's row for a metric; that of fill is the one of the same case."""
    provider = FLOORS.get(metric)
    for row in rows:
        if row["provider"] == provider and row["metric"] == metric:
            if metric == BANDWIDTH and row["case"] != labels:
                continue
            return row
    return None


def suite_tables(rows: Sequence[Row], suite: str) -> str:
    """A table per metric of a suite: floor and ratio in columns of their own, or all providers."""
    own = [row for row in rows if row["suite"] == suite]
    tables = []
    for metric in TITLES:
        measured = [row for row in own if row["metric"] == metric]
        if measured and suite in SIDE_BY_SIDE:
            for op in dict.fromkeys(row["op"] for row in measured):
                lines = _by_provider([row for row in measured if row["op"] == op])
                tables.append(f"{suite}, {op}: {TITLES[metric]}\n{align(lines)}")
        elif measured:
            lines = _with_floor(rows, measured, metric)
            tables.append(f"{suite}: {TITLES[metric]}\n{align(lines)}")
    return "\n\n".join(tables)


def _by_provider(measured: Sequence[Row]) -> list[Sequence[str]]:
    """A line for each case, a column for each provider's median."""
    names = list(dict.fromkeys(row["provider"] for row in measured))
    medians: dict[str, dict[str, float]] = {}
    for row in measured:
        medians.setdefault(describe(row["case"]), {})[row["provider"]] = row["median"]
    lines: list[Sequence[str]] = [("case", *names)]
    for case, of_case in medians.items():
        lines.append((case, *(number(of_case.get(name)) for name in names)))
    return lines


def _with_floor(rows: Sequence[Row], measured: Sequence[Row], metric: str) -> list[Sequence[str]]:
    lines: list[Sequence[str]] = [("case", "provider", "median", "p20", "p80", "floor", "x floor")]
    for row in measured:
        floor = floor_of(rows, metric, row["case"])
        us = None if floor is None else median_for(floor, row["suite"])
        lines.append(
            (
                describe(row["case"]),
                row["provider"],
                *(number(row[name]) for name in ("median", "p20", "p80")),
                number(us),
                f"{row['median'] / us:.2f}" if us and floor is not row else "-",
            )
        )
    return lines


def number(value: float | None) -> str:
    """Three significant digits or more, thousands separated."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def remarks(document: dict[str, Any]) -> str:
    """What a run left out, found wrong, and how often the launch cache was hit."""
    lines = [f"{name}: absent: {reason}" for name, reason in document["absent"].items()]
    lines += document["notes"]
    for part in document["launch_cache"]:
        if part["suite"] == "seed" and part["hit_rate"] is not None:
            counts = ", ".join(
                f"{part[n]:,} {n}" for n in ("hits", "misses", "captures") if n in part
            )
            lines.append(
                f"launch cache, {describe(part['case'])}, {part['provider']} {part['metric']}: "
                f"hit rate {part['hit_rate']:.1%} ({counts})"
            )
    lines += [
        f"{name}: MISMATCH, first in {what}" for name, what in document["first_mismatches"].items()
    ]
    if document["stopped"] is not None:
        lines.append(f"stopped: {document['stopped']}")
    return "\n".join(lines)
