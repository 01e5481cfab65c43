"""Processes that are watched: what they print is passed on, and none outlives its time."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import ROOT, TESTS

LAST_WORDS = 600  # characters of the output that are kept
LOOK_EVERY = 0.3  # seconds

Say = Callable[[str], None]


def run(
    command: Sequence[str],
    seconds: float,
    say: Say,
    package: Path = ROOT,
    variables: dict[str, str] | None = None,
) -> tuple[int | None, str]:
    """Run a command with the package in ``package``: exit status (None: killed), last words."""
    path = os.pathsep.join(map(str, (package, ROOT, TESTS)))
    with tempfile.TemporaryDirectory(prefix="reliability_") as folder:
        log = Path(folder) / "log"
        with log.open("w") as out:
            process = subprocess.Popen(
                command,
                cwd=package,  # in front of the path
                env=os.environ | (variables or {}) | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            deadline = time.monotonic() + seconds
            shown = 0
            killed = False
            try:
                while True:
                    has_ended = process.poll() is not None
                    text = log.read_text(errors="replace")
                    if text[shown:].strip():
                        say(text[shown:].rstrip())
                        shown = len(text)
                    if has_ended:
                        break
                    if time.monotonic() > deadline:
                        killed = True
                        os.killpg(process.pid, signal.SIGKILL)  # with what it has started
                        process.wait()
                    time.sleep(LOOK_EVERY)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return None if killed else process.returncode, text[-LAST_WORDS:].strip()
