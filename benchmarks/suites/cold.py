"""Cold start: the first call of a fresh process, with an empty kernel cache and with a warm one.

A process per sample (``benchmarks/cold_start.py``). After the first call it calls every other size
once: none of them may compile anything, seen by time and by the files of the kernel cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..measure import FIRST_CALL, Absent, one_line
from ..session import Session

NAME = "cold"
ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT = 180
#: (bs, rows of capacity over T): a size for every kernel variant.
FIRST = (32, 1)
LATER = (
    *((1, 1), (33, 1), (256, 1), (257, 1), (1024, 1), (1025, 1), (4097, 1), (16385, 1)),
    *((32, 16384), (1024, 512), (4097, 128), (16385, 32)),  # capacities over 2^20 rows
)
#: provider -> (samples with an empty cache, samples with a warm one)
SAMPLES = {"cuda": (3, 3), "triton": (1, 1), "seed-triton": (1, 0)}
QUICK_SAMPLES = {"cuda": (1, 1)}


def run(session: Session) -> None:
    chosen = QUICK_SAMPLES if session.quick else SAMPLES
    chosen = {name: counts for name, counts in chosen.items() if session.is_wanted(name)}
    if session.device.type != "cuda":
        for name in chosen:
            session.results.leave_out(NAME, name, "a cold start is measured on a GPU")
        return
    with session.progress(sum(map(sum, chosen.values())), "cold start") as tick:
        for name, counts in chosen.items():
            measure(session, name, counts, str(session.device), tick)


def measure(
    session: Session, name: str, counts: tuple[int, int], device: str, tick: Any = lambda: None
) -> None:
    """The samples of one provider: fresh folders for each of the first kind, one for the second."""
    empty, warm = counts
    first: dict[str, list[float]] = {"empty": [], "warm": []}
    later: dict[tuple[str, int, int, int], list[float]] = {}
    rows = 0
    compiled = 0
    try:
        with tempfile.TemporaryDirectory(prefix="cupy_nsa_meta_cold_") as base:
            caches = [Path(base, str(idx)) for idx in range(empty)]
            runs = [("empty", cache) for cache in caches]
            runs += [("warm", (caches or [Path(base, "0")])[-1])] * warm
            for kind, cache in runs:
                seen = child(name, device, session.topk, cache)
                rows = seen["rows"]
                first[kind].append(seen["first_call_s"])
                compiled += seen["compiled_later"]
                for call in seen["later"]:
                    key = (kind, call["bs"], call["rows"], call["capacity"])
                    later.setdefault(key, []).append(call["first_call_s"])
                if seen["mismatch"] is not None:
                    session.results.mismatch(f"{NAME}, cache {kind}", name, seen["mismatch"])
                    return
                tick()
    except Absent as absent:
        session.results.leave_out(NAME, name, absent)
        return
    for kind, samples in first.items():
        labels = {"bs": FIRST[0], "rows": rows, "cache": kind, "call": "first"}
        session.results.add("draft_extend", NAME, labels, name, FIRST_CALL, samples)
    for (kind, bs, rows, capacity), samples in later.items():
        labels = {"bs": bs, "rows": rows, "capacity": capacity, "cache": kind, "call": "later"}
        session.results.add("draft_extend", NAME, labels, name, FIRST_CALL, samples)
    session.results.extra.setdefault("cold", []).append(
        {"provider": name, "processes": empty + warm, "files_compiled_later": compiled}
    )


def child(name: str, device: str, topk: int, cache: Path) -> dict[str, Any]:
    """One fresh process with its kernel caches in a folder."""
    environ = dict(os.environ)
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environ.get("PYTHONPATH")])])
    for variable, folder in (("CUPY_CACHE_DIR", "cupy"), ("TRITON_CACHE_DIR", "triton")):
        path = cache / folder
        path.mkdir(parents=True, exist_ok=True)
        environ[variable] = str(path)
    sizes = json.dumps([FIRST, *LATER])
    words = [sys.executable, "-m", "benchmarks.cold_start", name, device, str(topk), sizes]
    return read(_output(words, environ))


def read(output: str) -> dict[str, Any]:
    """The last line of the process."""
    lines = output.strip().splitlines()
    try:
        seen: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError) as error:
        raise Absent(f"the process printed no result: {one_line(output)}") from error
    if "absent" in seen:
        raise Absent(seen["absent"])
    return seen


def _output(words: Sequence[str], environ: dict[str, str]) -> str:
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=TIMEOUT, env=environ, cwd=ROOT
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Absent(f"the process did not run: {one_line(error)}") from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise Absent(f"the process failed ({done.returncode}): {one_line(last[0])}")
    return done.stdout
