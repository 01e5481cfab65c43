"""What a run prints and writes: the environment, a plain table, a JSON file."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .replay import Replay, Result
from .workload import Summary

ROOT = Path(__file__).resolve().parent.parent


def environment(device: torch.device, command: str) -> dict[str, Any]:
    """Hardware, versions, commit, date and command line of a run; None for what is not there."""
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": _driver() if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cupy": _version("cupy-cuda13x", "cupy-cuda12x", "cupy"),
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


def _driver() -> str | None:
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return _output(query).partition("\n")[0].strip() or None


def _commit() -> str | None:
    if not (ROOT / ".git").exists():
        return None
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
        "absent": [{"backend": name, "reason": reason} for name, reason in absent.items()],
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
    lines = [header]
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
            )  # type: ignore[arg-type]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
