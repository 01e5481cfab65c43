"""``bench``: hand the arguments to ``bench.py`` of a checkout."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import FAILED

#: The folder of the package's folder: the root of a checkout, or site-packages.
ROOT = Path(__file__).resolve().parent.parent.parent


def run(arguments: Sequence[str]) -> int:
    """The exit status of ``bench.py``; 1 where this installation has none."""
    script = ROOT / "bench.py"
    if not script.is_file() or not (ROOT / "benchmarks" / "measure.py").is_file():
        print(
            f"cupy_nsa_meta bench: expected bench.py and benchmarks/ in {ROOT}, got none: the "
            "benchmark is part of the source checkout and not of the wheel",
            file=sys.stderr,
        )
        return FAILED
    return subprocess.run([sys.executable, str(script), *arguments]).returncode
