#!/usr/bin/env python3
"""Replay LLM serving steps on every backend, each checked against the reference, then timed.

    python bench.py                                a short synthetic run
    python bench.py --trace requests.csv           every step that serves the trace
    python bench.py --backend cuda,python --json results.json
    python bench.py --suite all --json results.json --plot pictures
    python bench.py --suite seed,growth-bs --quick

With --suite it measures every provider that can run here, each checked against the reference first:
ours, what a user would pick instead, the recipes it replaces, and the floor of a C++ program, which
nvcc builds where it exists (benchmarks/suites/, benchmarks/providers.py). The suite fused compares
SGLang's kernels where SGLang is installed, or CUPY_NSA_META_SGLANG_SOURCE names a folder with an
unpacked sglang/.

A trace is a CSV file with the columns TIMESTAMP, ContextTokens, GeneratedTokens. A simulation of
continuous batching with chunked prefill and speculative decoding turns it into draft-extend batches
(benchmarks/workload.py); benchmarks/replay.py says what is checked and timed.

Exit status: 0; 1 a wrong result or a failed device; 2 bad options or input.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn

from benchmarks import BenchError, workload
from benchmarks.suites import SUITES

if TYPE_CHECKING:
    import torch

    from benchmarks.replay import Replay

DEFAULT_STEPS = 300  # of a synthetic workload
QUICK_STEPS = 100
DEFAULT_REQUESTS = 2000
BACKENDS = ("cuda", "triton", "python", "reference", "all")
PROVIDERS = (  # benchmarks/providers.py and fused_providers.py, which import torch
    *("cuda-plan", "cuda", "cuda-fresh", "cuda-uncached", "cuda-total-tokens", "cuda-async"),
    *("triton", "python", "torch", "torch-compile", "aot-extension", "sglang"),
    *("seed-triton", "seed-cuda", "loop", "copy", "fill", "empty-node", "floor"),
    *("cuda-views", "cuda-plan-device", "bare-graph", "bare-launch"),
)
PATH_OPTIONS = ("--trace", "--json", "--plot")


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


def names_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: names between commas."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(
                    f"expected one of {', '.join(allowed)}, got {name!r}"
                )
        return names

    return parse


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
        type=names_of(BACKENDS),
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

    suites = parser.add_argument_group("suites")
    suites.add_argument(
        "--suite",
        action="append",
        type=names_of((*SUITES, "all")),
        metavar="NAME[,NAME]",
        help=f"{', '.join(SUITES)} or all; can be repeated; default: the replay alone",
    )
    suites.add_argument(
        "--provider",
        action="append",
        type=names_of(PROVIDERS),
        metavar="NAME[,NAME]",
        help="measure these only (floor: the C++ floor program); default: all that can run",
    )
    suites.add_argument("--quick", action="store_true", help="fewer sizes and calls: a minute")
    suites.add_argument("--plot", type=Path, metavar="DIR", help="draw pictures into this folder")

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


def check_plot_path(path: Path) -> None:
    """Refuse a folder that cannot be drawn into before the run."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError(
            "--plot: expected matplotlib, got none; pip install 'cupy-nsa-meta[bench]'"
        )
    if not (path if path.exists() else path.absolute().parent).is_dir():
        raise BenchError(f"--plot: expected a folder, or one to be made in a folder, got {path}")


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


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Refuse bad options, then replay, or run the suites."""
    suites = suite_names(args)
    if args.json is not None:
        check_json_path(args.json)
    if args.plot is not None:
        check_plot_path(args.plot)
    requests = None
    if not suites or "trace" in suites:
        requests = read_requests(args)

    from benchmarks import replay, report  # torch is imported here

    device = replay.pick_device(args.device)
    command = report.command_line("bench.py", argv, PATH_OPTIONS)
    environment = report.environment(device, command)
    if suites:
        return run_suites(args, suites, requests, device, environment)
    assert requests is not None
    outcome, document = replay_steps(args, requests, device, environment)
    if args.json is not None:
        report.write_json(args.json, document)
    return 1 if outcome.mismatches or outcome.stopped is not None else 0


def suite_names(args: argparse.Namespace) -> list[str]:
    """The suites in the order of a run; options that need others are refused."""
    given = {name for names in args.suite or [] for name in names}
    names = [name for name in SUITES if name in given or "all" in given]
    if not names:
        for option in ("quick", "plot", "provider"):
            if getattr(args, option):
                raise BenchError(f"--{option}: expected with --suite, got none")
    elif "trace" not in names:
        for option in ("trace", "backend", "steps", "requests", "rate"):
            if getattr(args, option) is not None:
                raise BenchError(
                    f"--{option}: expected with the suite trace, got {', '.join(names)}"
                )
    return names


def replay_steps(
    args: argparse.Namespace,
    requests: workload.Requests,
    device: torch.device,
    environment: dict[str, Any],
) -> tuple[Replay, dict[str, Any]]:
    """Simulate, replay, print. Returns the outcome and the document of it."""
    from benchmarks import progress, replay, report

    names = [name for names in args.backend or [["all"]] for name in names]
    selection = replay.select(names, device)
    for name, reason in selection.absent.items():
        print(f"{name}: not run: {reason}")

    options = replace(
        workload.Options(), **{name: getattr(args, name) for name in asdict(workload.Options())}
    )
    limit = args.steps
    if limit is None:
        limit = (QUICK_STEPS if args.quick else DEFAULT_STEPS) if args.trace is None else 0
    steps = list(islice(workload.simulate(requests, options), limit or None))
    summary = workload.summarize(steps)

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
    options_json = {"topk": args.topk, "device": str(device), "max_steps": limit}
    options_json |= asdict(options)
    if args.trace is None:
        options_json |= {
            "requests": len(requests),
            "rate": workload.SYNTHETIC_RATE if args.rate is None else args.rate,
        }
    part = report.workload(requests.source, summary, options_json)
    return outcome, report.document(environment, part, outcome, selection.absent)


def run_suites(
    args: argparse.Namespace,
    names: Sequence[str],
    requests: workload.Requests | None,
    device: torch.device,
    environment: dict[str, Any],
) -> int:
    """Run suites one after the other; what was measured is stored after each of them."""
    import gc

    import torch

    from benchmarks import measure, plot, replay, report, suites
    from benchmarks.session import Session

    if args.backend is not None:  # one that cannot run is refused before anything is measured
        replay.select([name for names in args.backend for name in names], device)

    replayed: dict[str, Any] = {}

    def replay_trace(session: Session) -> None:
        assert requests is not None
        outcome, document = replay_steps(args, requests, device, environment)
        replayed.update(document)
        counts = {name: document["workload"][name] for name in ("source", "steps", "rows")}
        for result in outcome.results:
            if result.percentiles_us() is not None:
                times = [time / 1000.0 for time in result.times_ns]
                session.results.add(
                    "draft_extend", "trace", counts, result.backend, measure.END_TO_END, times
                )

    wanted = [name for names in args.provider or [] for name in names] or None
    session = Session(device, args.topk, args.quick, args.seed, wanted, replay_trace)
    results = session.results
    if device.type != "cuda":
        torch.set_num_threads(1)  # the batches are small: threads would wait for each other
    gc.freeze()
    print(f"device: {environment['gpu'] or 'CPU'}; suites: {', '.join(names)}")
    for name in names:
        begin = monotonic()
        try:
            suites.load(name).run(session)
        except measure.DeviceLost as error:
            results.stopped = str(error)
        except BenchError:
            raise
        except Exception as error:
            results.stopped = f"{name}: {measure.one_line(measure.failure(error))}"
            session.release()
        session.floor_samples.store(results)
        tables = report.suite_tables(results.rows, name)
        if tables:
            print(f"\n{tables}")
        print(f"{name}: {monotonic() - begin:.0f} s", flush=True)
        document = report.suites_document(environment, results, replayed)
        if args.json is not None:
            report.write_json(args.json, document)
        if results.stopped is not None:
            break
    print(report.remarks(document))
    if args.plot is not None:
        for path in plot.draw(document, args.plot):
            print(f"drawn: {path.name}")
    return 1 if document["mismatches"] or document["stopped"] is not None else 0


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
