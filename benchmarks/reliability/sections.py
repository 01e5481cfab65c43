"""Which processes measure a section, for how long, and what becomes of their results."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import KEYS, TOOLS, Result, processes, random_batches, sanitizer
from .processes import Say

#: Names for --only: the keys, and the two halves of "random".
PARTS = (*TOOLS, "random-gpu", "random-cpu", *KEYS[len(TOOLS) + 1 :])
BUDGETS = {
    **dict.fromkeys(TOOLS, 150.0),
    "random-gpu": 150.0,
    "random-cpu": 420.0,
    "threads": 60.0,
    "hang": 90.0,
    "bad_input": 60.0,
    "soak": 60.0,
}
#: Another backend would give the same results there, and nobody would notice.
OF_THE_KERNELS = ("random-gpu", "threads", "soak")
START = 60  # seconds beyond the budget: imports, compiling, the last batch
MAX_PROCESSES = 8  # of random-gpu, on one GPU


def parts_of(only: str | None) -> list[str]:
    """The parts that --only names; all of them without it.

    Raises:
        ValueError: a name that is none.
    """
    if only is None:
        return list(PARTS)
    parts: list[str] = []
    for name in only.split(","):
        wanted = ["random-gpu", "random-cpu"] if name == "random" else [name]
        if wanted[0] not in PARTS:
            raise ValueError(f"--only: expected names of {', '.join(KEYS)}, got {name!r}")
        parts += [part for part in wanted if part not in parts]
    return parts


# ---- Processes ----------------------------------------------------------------------------------


def run_worker(
    part: str,
    device: str,
    budget: float,
    quick: bool,
    share: tuple[int, int] = (0, 1),
    say: Say = print,
) -> Result:
    """One process: its result, and with a failure what it had saved and its last words."""
    with tempfile.TemporaryDirectory(prefix="reliability_") as folder:
        stored = Path(folder) / "result"
        command = [
            *(sys.executable, "-m", "benchmarks.reliability.worker", part),
            *("--result", str(stored), "--device", device, "--budget", str(budget)),
            *("--share", f"{share[0]}/{share[1]}", *(["--quick"] if quick else [])),
        ]
        variables = {}
        if device != "cpu" and part in OF_THE_KERNELS:
            variables["CUPY_NSA_META_BACKEND"] = "cuda"
        status, words = processes.run(command, budget + START, say, variables=variables)
        result: Result = json.loads(stored.read_text()) if stored.exists() else {}
    if status != 0:
        how = "stopped" if status is None else f"exit status {status}"
        result |= {"ok": False, "failed": f"{how}: {words}"}
    return result


def random_gpu(device: str, budget: float, quick: bool, say: Say) -> Result:
    """The work in several processes that share the GPU; {function: {"gpu": counts}}."""
    count = max(1, min(MAX_PROCESSES, (os.cpu_count() or 1) // 2))
    with ThreadPoolExecutor(count) as pool:
        shares = list(
            pool.map(
                lambda n: run_worker("random-gpu", device, budget, quick, (n, count), say),
                range(count),
            )
        )
    failed = [share.pop("failed") for share in shares if "failed" in share]
    for share in shares:
        share.pop("ok", None)
    return _as_random(random_batches.joined(shares), "gpu", failed)


def _as_random(counts: Result, which: str, failed: Sequence[str]) -> Result:
    section: Result = {
        function: {which: own | {"ok": not own["mismatches"] and own["batches"] > 0}}
        for function, own in counts.items()
    }
    missing = [name for name in random_batches.FUNCTIONS if name not in counts]
    if failed or missing:
        section["failed"] = failed[0] if failed else f"not run: {', '.join(missing)}"
    return section


def measure(part: str, device: str, budget: float | None, quick: bool, say: Say = print) -> Result:
    """The result of one part; of random-gpu and random-cpu one half of each function's."""
    budget = BUDGETS[part] if budget is None else budget
    if part in TOOLS:
        return sanitizer.run(part, budget, quick, say)
    if part == "random-gpu":
        return random_gpu(device, budget, quick, say)
    result = run_worker(part, device, budget, quick, say=say)
    if part == "random-cpu":
        result.pop("ok", None)
        return _as_random(
            {k: v for k, v in result.items() if k != "failed"},
            "cpu_sanitized",
            [result["failed"]] if "failed" in result else [],
        )
    return result
