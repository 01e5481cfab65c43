"""One part of the measurement in a process of its own: ``python -m benchmarks.reliability.worker``.

The result is written as it grows, so that a fault of the device leaves what was known before it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from . import Result, Save, Settings


def _part(name: str) -> Callable[[Settings, Save], Result]:
    from . import hostility, random_batches, soak, threads

    return {
        "random-gpu": random_batches.on_gpu,
        "random-cpu": random_batches.on_cpu,
        "threads": threads.run,
        "hang": hostility.hang,
        "bad_input": hostility.bad_input,
        "soak": soak.run,
    }[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--share", default="0/1", help="number of this process / processes")
    args = parser.parse_args()
    number, shares = (int(n) for n in args.share.split("/"))

    def save(result: Result) -> None:
        beside = args.result.with_suffix(".part")
        beside.write_text(json.dumps(result))
        beside.replace(args.result)

    settings = Settings(args.device, args.budget, args.quick, (number, shares))
    status = 0
    try:
        save(_part(args.part)(settings, save))
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a thread or a device that hangs does not hold the process up


if __name__ == "__main__":
    main()
