#!/usr/bin/env python3
"""Replay LLM serving steps on every backend, each checked against the reference, then timed.

    python bench.py                                a short synthetic run
    python bench.py --trace requests.csv           every step that serves the trace
    python bench.py --backend cuda,python --json results.json

A trace is a CSV file with the columns TIMESTAMP, ContextTokens, GeneratedTokens. A simulation of
continuous batching with chunked prefill and speculative decoding turns it into draft-extend batches
(benchmarks/workload.py); benchmarks/replay.py says what is checked and timed.

Exit status: 0; 1 a backend gave a wrong result; 2 bad options or input.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import NoReturn

from benchmarks import BenchError, workload

DEFAULT_STEPS = 300  # of a synthetic workload
DEFAULT_REQUESTS = 2000
BACKENDS = ("cuda", "triton", "python", "reference", "all")
PATH_OPTIONS = ("--trace", "--json")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BenchError(message)


def integer(lowest: int, highest: int) -> Callable[[str], int]:
    """An argparse type: an integer in [lowest, highest]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(
                f"expected an integer from {lowest} to {highest}, got {text!r}"
            )
        return value

    return parse


def number(lowest: float, highest: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number in [lowest, highest], or (lowest, highest]."""
    bounds = f"{'>' if above else '>='} {lowest:g}"
    if highest < math.inf:
        bounds += f" and <= {highest:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = lowest < value <= highest if above else lowest <= value <= highest
        if not inside or math.isinf(value):
            raise argparse.ArgumentTypeError(f"expected a number {bounds}, got {text!r}")
        return value

    return parse


def backends(text: str) -> list[str]:
    """An argparse type: backend names between commas."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in BACKENDS:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(BACKENDS)}, got {name!r}")
    return names


def parser() -> argparse.ArgumentParser:
    """The command line."""
    defaults = workload.Options()
    parser = Parser(
        prog="bench.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--backend",
        action="append",
        type=backends,
        metavar="NAME[,NAME]",
        help="cuda, triton, python (the loop of aranges), reference (vectorised torch) or all; "
        "can be repeated; default all that can run: cuda, triton, python on a GPU, else python, "
        "reference",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--topk", type=integer(1, 2**31 - 1), default=2048, help="nsa_index_topk; default 2048"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")

    source = parser.add_argument_group("workload")
    source.add_argument("--trace", type=Path, metavar="FILE", help="request trace, CSV")
    source.add_argument(
        "--steps",
        type=integer(0, 2**31 - 1),
        metavar="N",
        help=f"replay the first N steps, 0: all; default all of a trace, else {DEFAULT_STEPS}",
    )
    source.add_argument(
        "--requests",
        type=integer(1, 10**7),
        metavar="N",
        help=f"synthetic requests; default {DEFAULT_REQUESTS}",
    )
    source.add_argument(
        "--rate",
        type=number(0, above=True),
        metavar="R",
        help=f"synthetic requests per second; default {workload.SYNTHETIC_RATE}",
    )
    source.add_argument(
        "--seed", type=integer(0, 2**63 - 1), default=0, help="of every random choice; default 0"
    )

    engine = parser.add_argument_group("simulated engine")
    for name, kind, text in (
        ("max_running", integer(1, 2**20), "requests in one batch"),
        ("draft_tokens", integer(0, 127), "draft tokens per request and step"),
        ("acceptance", number(0, 1), "probability that the next draft token is accepted"),
        ("prefill_budget", integer(1, 2**24), "prompt tokens per step; longer prompts in chunks"),
        ("step_ms", number(0), "duration of a step without tokens, milliseconds"),
        ("token_us", number(0), "added per query token, microseconds"),
    ):
        default = getattr(defaults, name)
        engine.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            default=default,
            metavar="N",
            help=f"{text}; default {default}",
        )
    return parser


def check_json_path(path: Path) -> None:
    """Refuse a file that cannot be written before the run, not after it."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise BenchError(f"--json: expected a file in an existing folder, got {path}")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise BenchError(f"--json: expected a file that can be written, got {path}")


def read_requests(args: argparse.Namespace) -> workload.Requests:
    """The requests of the trace, or synthetic ones."""
    if args.trace is None:
        return workload.synthetic(
            DEFAULT_REQUESTS if args.requests is None else args.requests,
            workload.SYNTHETIC_RATE if args.rate is None else args.rate,
            args.seed,
        )
    for name in ("requests", "rate"):
        if getattr(args, name) is not None:
            raise BenchError(f"--{name}: expected without --trace, got both")
    return workload.read_trace(args.trace)


def command_line(argv: Sequence[str]) -> str:
    """The command for the report, with the names of files, not their folders."""
    words = ["bench.py"]
    for word in argv:
        option, equals, value = word.partition("=")
        if equals and option in PATH_OPTIONS:
            word = f"{option}={Path(value).name}"
        elif words[-1] in PATH_OPTIONS:
            word = Path(word).name
        words.append(word)
    return shlex.join(words)


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Simulate, replay, report."""
    if args.json is not None:
        check_json_path(args.json)
    requests = read_requests(args)

    from benchmarks import progress, replay, report  # torch is imported here

    device = replay.pick_device(args.device)
    names = [name for names in args.backend or [["all"]] for name in names]
    selection = replay.select(names, device)
    for name, reason in selection.absent.items():
        print(f"{name}: not run: {reason}")

    options = replace(
        workload.Options(), **{name: getattr(args, name) for name in asdict(workload.Options())}
    )
    limit = args.steps
    if limit is None:
        limit = DEFAULT_STEPS if args.trace is None else 0
    steps = list(islice(workload.simulate(requests, options), limit or None))
    summary = workload.summarize(steps)

    environment = report.environment(device, command_line(argv))
    if device.type == "cuda":
        print(f"device: {environment['gpu']}")
    else:
        why = "--device cpu" if args.device == "cpu" else "torch sees no CUDA device"
        compared = ", ".join(selection.fills)
        print(f"device: CPU ({why}), one thread; the Python forms are compared: {compared}")
    print(
        f"workload: {requests.source}, {summary.requests:,} of {len(requests):,} requests, "
        f"{summary.steps:,} steps, {summary.rows:,} rows, "
        f"bs median {summary.median_bs:g} max {summary.max_bs}, topk {args.topk}"
    )
    with progress.progress_bar(len(steps), "replay") as update:
        outcome = replay.replay(steps, selection.fills, device, args.topk, update)

    print(report.table(outcome.results))
    for result in outcome.results:
        if result.first_mismatch is not None:
            print(f"{result.backend}: MISMATCH, first in {result.first_mismatch}")
    if outcome.stopped is not None:
        print(f"stopped: {outcome.stopped}")
    if args.json is not None:
        options_json = {"topk": args.topk, "device": str(device), "max_steps": limit}
        options_json |= asdict(options)
        if args.trace is None:
            options_json |= {
                "requests": len(requests),
                "rate": workload.SYNTHETIC_RATE if args.rate is None else args.rate,
            }
        part = report.workload(requests.source, summary, options_json)
        report.write_json(args.json, report.document(environment, part, outcome, selection.absent))
    return 1 if outcome.mismatches or outcome.stopped is not None else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return run(parser().parse_args(argv), argv)
    except BenchError as error:
        message = str(error)
    except OSError as error:  # --json: a full disk
        message = f"{error.filename or 'output'}: {error.strerror or error}"
    print(f"bench.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("bench.py: interrupted", file=sys.stderr)
        sys.exit(130)
