"""Faults and load, measured: one command makes ``benchmarks/reliability.json``.

    python -m benchmarks.reliability --json benchmarks/reliability.json
    python -m benchmarks.reliability --json FILE --only memcheck,soak   the others stay as they are
    python -m benchmarks.reliability --table FILE                       the table of a stored run
    python -m benchmarks.reliability --table FILE --insert README.md    put it between its markers

memcheck, racecheck, initcheck and synccheck are compute-sanitizer's tools over the named cases,
each with a planted fault that it has to catch; random (random-gpu, random-cpu) compares batches
with the reference; threads, hang, bad_input and soak are what their names say. Each runs in a
process of its own, and the file is written after each. ``--budget`` bounds a part, in seconds: what
is not done by then is left out, and the file says so. Only random-cpu needs no GPU.

Exit status: 0; 1 something failed; 2 bad options or input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from .. import BenchError, readme
from ..progress import progress_bar
from ..report import command_line, environment, write_json
from . import TOOLS, Result, document, sections

BEGIN = "<!-- reliability:begin -->"
END = "<!-- reliability:end -->"
JOBS = 4  # tools at a time


def parser() -> argparse.ArgumentParser:
    made = readme.Parser(
        prog="python -m benchmarks.reliability", allow_abbrev=False, description=__doc__
    )
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--json", type=Path, metavar="FILE", help="write, or update with --only")
    made.add_argument("--only", metavar="NAME,...", help=", ".join(sections.PARTS))
    made.add_argument("--quick", action="store_true", help="few batches, few cases, short times")
    made.add_argument("--budget", type=float, metavar="SECONDS", help="bound of each part")
    made.add_argument(
        "--jobs", type=int, default=JOBS, help=f"sanitizer tools at a time; default {JOBS}"
    )
    made.add_argument("--table", type=Path, metavar="FILE", help="print the table of a file")
    made.add_argument("--insert", type=Path, metavar="README.md", help="with --table")
    return made


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The options, or a BenchError."""
    if (args.json is None) == (args.table is None):
        raise BenchError("expected either --json FILE or --table FILE")
    if args.insert is not None and args.table is None:
        raise BenchError("--insert: expected with --table FILE")
    if args.budget is not None and not args.budget > 0:
        raise BenchError(f"--budget: expected more than 0 seconds, got {args.budget}")
    if args.jobs < 1:
        raise BenchError(f"--jobs: expected 1 or more, got {args.jobs}")
    try:
        args.parts = sections.parts_of(args.only)
    except ValueError as error:
        raise BenchError(str(error)) from error
    return args


def show_table(args: argparse.Namespace) -> None:
    content = document.table(document.read(args.table))
    if args.insert is None:
        print(content)
    else:
        readme.insert(args.insert, content, BEGIN, END)


def measure(args: argparse.Namespace, command: str) -> int:
    """Measure the parts and store each; 1 where one of them has failed."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    if not on_gpu and not set(args.parts) <= document.NEEDS_NO_GPU:
        raise BenchError("torch sees no CUDA device; only --only random-cpu needs none")
    # Without --only, a new file; a part that is measured anew replaces what was there.
    stored = document.read(args.json, missing_is_empty=True) if args.only else {}
    failed = []
    with progress_bar(len(args.parts), "parts") as update:

        def store(part: str, result: Result) -> None:
            nonlocal stored
            about = environment(torch.device(device), command)
            stored = document.merged(stored, about, part, result)
            write_json(args.json, stored)
            key = part.partition("-")[0]
            if key in document.failures(stored):
                failed.append(part)
            print(f"{part}: {'FAILED' if part in failed else 'stored'}", flush=True)
            done.append(part)
            update(len(done))

        done: list[str] = []
        tools = [part for part in args.parts if part in TOOLS]
        with ThreadPoolExecutor(max(1, min(args.jobs, len(tools)))) as pool:
            running = {pool.submit(_measured, tool, device, args): tool for tool in tools}
            for future in as_completed(running):
                store(running[future], future.result())
        for part in args.parts:
            if part not in TOOLS:
                store(part, _measured(part, device, args))
    print(document.table(stored))
    return 1 if failed else 0


def _measured(part: str, device: str, args: argparse.Namespace) -> Result:
    """A part's result; an error of the measurement itself is stored, the others go on."""

    def say(text: str) -> None:
        print("\n".join(f"[{part}] {line}" for line in text.splitlines()), flush=True)

    say("begins")
    try:
        return sections.measure(part, device, args.budget, args.quick, say)
    except Exception as error:
        return {"ok": False, "failed": f"{type(error).__name__}: {error}"}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = checked(parser().parse_args(words))
        if args.table is not None:
            show_table(args)
            return 0
        return measure(args, command_line("benchmarks.reliability", words, ("--json",)))
    except BenchError as error:
        print(f"reliability: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
