"""compute-sanitizer over the named cases, and one planted fault for each of its tools.

A clean run shows nothing unless the tool sees the kernels: for each tool a copy of the package with
one line changed has to be reported. racecheck looks at shared memory only; there is no tool for
races in global memory (tests/test_cpu_kernels.py has ThreadSanitizer for both).
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cupy_nsa_meta import _module
from planted import Patch

from .. import BenchError
from . import ROOT, Result, processes
from .processes import Say

SANITIZER_VARIABLE = "COMPUTE_SANITIZER"
GRACE = 60  # seconds that a tool gets to end by itself after the budget of the cases
PLANTED_SECONDS = 120
PRINT_LIMIT = 20
LAUNCH_TIMEOUT = (
    120  # seconds until the first CUDA call: importing torch from a cold disk takes some
)

SCOPES = {
    "memcheck": "global, shared and local accesses; allocations end where the tensors end",
    "racecheck": "shared memory only",
    "initcheck": "reads of global memory; outputs hold nothing before the call",
    "synccheck": "barriers",
}
#: Of the watched program: each tensor is one cudaMalloc, and only the kernels will do.
VARIABLES = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUPY_NSA_META_BACKEND": "cuda"}
OPTIONS = {
    # A failed cuGetProcAddress of some library is no access of a kernel.
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": (),
    # Outputs are left unwritten on purpose, and copied back all the same.
    "initcheck": ("--check-api-memory-access", "no"),
    "synccheck": (),
}


@dataclass(frozen=True)
class Planted:
    """A fault that a tool has to see in one case, and the beginning of what it calls it."""

    what: str
    case: str
    report: str
    patch: Patch


PLANTED = {
    "memcheck": Planted(
        "a row stored one element late, past the end of the output",
        "no_slack",
        "Invalid __global__ write",
        Patch(
            "draft_extend.cu",
            "*expanded_at = expanded;",
            "expanded_at[1] = expanded;",
        ),
    ),
    "racecheck": Planted(
        "the barrier between the warps' totals and their readers removed",
        "bs_129",
        "Error: Race reported",
        Patch("common.cuh", "  __syncthreads();\n  BlockSums sums;", "  BlockSums sums;"),
    ),
    "initcheck": Planted(
        "the total of the first tile of requests never written",
        "bs_16385",
        "Uninitialized __global__ memory read",
        Patch(
            "draft_extend.cu",
            "if (threadIdx.x == 0) args.tile_totals[blockIdx.x] =",
            "if (threadIdx.x == 0 && blockIdx.x != 0) args.tile_totals[blockIdx.x] =",
        ),
    ),
    # The first warp meets the next barrier while the others wait at this one: nothing hangs.
    "synccheck": Planted(
        "a barrier that the first warp skips",
        "bs_1025",
        "Barrier error detected",
        Patch(
            "common.cuh",
            "  __syncthreads();\n  const u32 word =",
            "  if (threadIdx.x >= kWarpThreads) __syncthreads();\n  const u32 word =",
        ),
    ),
}


# ---- What a tool says ---------------------------------------------------------------------------

_SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: *(.*)$", re.MULTILINE)
_COUNT = re.compile(r"(\d+) (error|warning)s?")
_RECORD = re.compile(
    r"^=+ (Invalid |Uninitialized |Barrier error|(?:Error|Warning): Race reported|"
    r"(?:Error|Warning): .*hazard|Misaligned |Out-of-range |Warp |Host API uninit)"
)
_REFUSAL = re.compile(r"not supported|Internal Sanitizer|Unable to initialize|unable to init", re.I)


@dataclass(frozen=True)
class Report:
    """A tool's log in numbers. ``errors`` is None where it ended without a summary."""

    errors: int | None
    warnings: int
    summary: str | None
    first: str | None  # the first record, in one line
    refused: str | None  # the words with which the tool refuses the machine


def parse(log: str) -> Report:
    summaries = _SUMMARY.findall(log)
    summary = summaries[-1].strip() if summaries else None
    counts = {kind: int(number) for number, kind in _COUNT.findall(summary or "")}
    lines = log.splitlines()
    first = None
    for number, line in enumerate(lines):
        if _RECORD.match(line):
            first = _text(line)
            for further in lines[number + 1 : number + 4]:
                if _text(further).startswith(("at ", "and ", "by thread")):
                    first += f" {_text(further)}"
            break
    refused = next((_text(line) for line in lines if _REFUSAL.search(line)), None)
    return Report(
        None if summary is None else counts.get("error", 0),
        counts.get("warning", 0),
        summary,
        first,
        refused,
    )


def _text(line: str) -> str:
    return line.lstrip("=").strip()


# ---- Running a tool -----------------------------------------------------------------------------


def find() -> str:
    """The path of compute-sanitizer."""
    named = os.environ.get(SANITIZER_VARIABLE)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for candidate in (
        named,
        shutil.which("compute-sanitizer"),
        os.path.join(home, "bin", "compute-sanitizer"),
        os.path.join(home, "compute-sanitizer", "compute-sanitizer"),
    ):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise BenchError(
        f"compute-sanitizer: expected on the PATH, in {home} or named by {SANITIZER_VARIABLE}, "
        "got none"
    )


def version(executable: str) -> str:
    done = subprocess.run([executable, "--version"], capture_output=True, text=True, timeout=60)
    found = re.search(r"Version (\S+)", done.stdout)
    return found[1] if found else done.stdout.strip()


def command(executable: str, tool: str, log: Path, program: list[str]) -> list[str]:
    """The command line: only our kernels are checked, named by the stems of their files."""
    filters = [word for stem in _module.KERNELS for word in ("--kernel-name", f"kns={stem}")]
    return [
        *(executable, "--tool", tool, *filters, *OPTIONS[tool]),
        *("--print-limit", str(PRINT_LIMIT), "--launch-timeout", str(LAUNCH_TIMEOUT)),
        *("--log-file", str(log)),
        *program,
    ]


def copy_package(folder: Path, patch: Patch | None = None) -> None:
    """The package and its sources in ``folder``, a fault planted."""
    package = Path(_module.__file__).resolve().parent
    hidden = shutil.ignore_patterns("__pycache__", "cuda_src")
    shutil.copytree(package, folder / package.name, ignore=hidden)
    shutil.copytree(_module.source_dir(), folder / "cuda_src")
    if patch is not None:
        patch.apply(folder / "cuda_src")


def watch(
    executable: str, tool: str, package: Path, arguments: list[str], seconds: float, say: Say
) -> tuple[Report, Result, str]:
    """Run cases of a package under a tool: the report, the program's result, its last words."""
    with tempfile.TemporaryDirectory(prefix="reliability_") as name:
        log, stored = Path(name) / "log", Path(name) / "result"
        program = [
            *(sys.executable, "-m", "benchmarks.reliability.sanitized"),
            *("--result", str(stored), *(["--fresh"] if tool == "initcheck" else []), *arguments),
        ]
        status, words = processes.run(
            command(executable, tool, log, program), seconds, say, package, VARIABLES
        )
        if status is None:
            words += f"\nstopped after {seconds:.0f} s"
        text = log.read_text(errors="replace") if log.exists() else words
        report = parse(text)
        if report.summary is None:
            words += text[-processes.LAST_WORDS :]
        result = json.loads(stored.read_text()) if stored.exists() else {"cases": 0}
    return report, result, words


def planted_fault(executable: str, tool: str, say: Say) -> Result:
    """Whether the tool reports the fault that is planted for it."""
    planted = PLANTED[tool]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="planted_") as name:
        copy_package(Path(name), planted.patch)
        report, result, words = watch(
            executable, tool, Path(name), ["--cases", planted.case], PLANTED_SECONDS, say
        )
    # Whatever else goes wrong is no proof that the tool looks at our kernels, the only ones it is
    # told to check.
    caught = bool(report.errors) and (report.first or "").startswith(planted.report)
    fault: Result = {
        "what": planted.what,
        "file": planted.patch.file,
        "case": planted.case,
        "caught": caught,
        "errors": report.errors,
        "report": report.first,
        "seconds": round(time.monotonic() - begin, 1),
    }
    if not caught:
        fault["words"] = report.refused or words
        fault["result"] = result
    return fault


def run(tool: str, budget: float, quick: bool, say: Say = print) -> Result:
    """One tool: the named cases, then its planted fault."""
    executable = find()
    begin = time.monotonic()
    arguments = ["--budget", str(budget), *(["--quick"] if quick else [])]
    report, result, words = watch(executable, tool, ROOT, arguments, budget + GRACE, say)
    seconds = round(time.monotonic() - begin, 1)
    section: Result = {
        "ok": False,
        "tool": version(executable),
        "scope": SCOPES[tool],
        "errors": report.errors,
        "warnings": report.warnings,
        "summary": report.summary,
        "seconds": seconds,
    }
    section |= {
        name: result.get(name)
        for name in ("cases", "of_cases", "kernels", "mismatches", "first_mismatch")
    }
    if report.refused is not None and not result["cases"]:
        section |= {"ok": None, "refused": report.refused, "runtime": runtime()}
        return section
    whole = result.get("cases") == result.get("of_cases") and not quick
    missed = sorted(set(all_kernels()) - set(result.get("kernels", ()))) if whole else []
    if missed:
        section["kernels_missed"] = missed
    if report.first is not None:
        section["first_report"] = report.first
    section["planted_fault"] = planted_fault(executable, tool, say)
    clean = report.errors == 0 and result["cases"] > 0 and result.get("mismatches") == 0
    section["ok"] = clean and not missed and section["planted_fault"]["caught"]
    if report.errors is None or not result["cases"]:
        section["words"] = words
    return section


def all_kernels() -> list[str]:
    return [name for names in _module.KERNELS.values() for name in names]


def runtime() -> str:
    """The kernel that the machine runs on, which decides what a tool may do."""
    return " ".join(platform.uname()[i] for i in (0, 2, 3))
