"""The targets as ratios inside one stored run: ``python -m benchmarks.targets FILE.json``.

Exit status: 0; 1 a target is missed or was not measured; 2 bad input.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import BenchError
from .floor import median_for
from .fused_results import Point, geometric_mean, medians, ratios
from .measure import BANDWIDTH, END_TO_END, FIRST_CALL, GPU, HOST
from .report import align, number
from .stored import Document, read_document

Row = dict[str, Any]

LATER_CALL_S = 0.05  # a compilation takes longer, loading a kernel's code does not
LARGE_ROWS = 1 << 26
STEP_LIMIT = 2.0
ABOUT = 1.1  # "about 4 us": a tenth more is still about that
#: EXTEND: requests -> times as fast as the loop over the requests
LOOP_RATIOS = {1: 15, 16: 60, 64: 200, 256: 700}
DROP_IN, GRAPH, LAUNCH = "cuda", "floor-graph", "floor-launch"
#: What, metric, provider, what it is compared with, the limit of the ratio (to the drop-in call at
#: least, to a floor at most), the provider that no call from Python can be quicker than.
HOST_TARGETS = (
    ("plan.run() / floor-graph", END_TO_END, "cuda-plan", GRAPH, 1.15, "bare-graph"),
    ("plan.launch() / floor-graph enqueue", HOST, "cuda-plan", GRAPH, 1.4, "bare-graph"),
    ("drop-in, buffers met before / floor-graph", END_TO_END, DROP_IN, GRAPH, 1.7, "bare-graph"),
    ("seed-triton / drop-in", END_TO_END, "seed-triton", DROP_IN, 10, None),
    ("seed-cuda / drop-in", END_TO_END, "seed-cuda", DROP_IN, 7, None),
    ("python / drop-in", END_TO_END, "python", DROP_IN, 50, None),
    ("drop-in, fresh buffers / floor-launch", END_TO_END, "cuda-fresh", LAUNCH, 1.6, "bare-launch"),
    (
        "drop-in, total_tokens= / floor-launch enqueue",
        *(HOST, "cuda-total-tokens", LAUNCH, 2.0, "bare-launch"),
    ),
    ("async / floor-launch enqueue", HOST, "cuda-async", LAUNCH, 2.0, None),
)


@dataclass(frozen=True)
class Outcome:
    """One line: what, the bound on it, what was measured (None: nothing)."""

    what: str
    limit: float
    measured: float | None
    at_most: bool = True
    detail: str = ""

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        if self.at_most:
            return self.measured <= self.limit
        return self.measured >= self.limit


def targets(document: Document) -> list[Outcome]:
    """All targets, measured or not."""
    rows: list[Row] = document["rows"]
    outcomes = [_host_time(rows, *target) for target in HOST_TARGETS]
    outcomes += _gpu_times(rows)
    outcomes += _bandwidths(rows)
    outcomes += _cold(document)
    outcomes += _growth(rows)
    outcomes += _fused(rows)
    outcomes += _fused_extend(rows)
    return outcomes


def _host_time(
    rows: Sequence[Row],
    what: str,
    metric: str,
    over: str,
    under: str,
    limit: float,
    bound: str | None,
) -> Outcome:
    """One of ``HOST_TARGETS``."""

    def median(provider: str) -> float | None:
        return _median(rows, provider, metric, bs=32, beside="seed")

    top, bottom = median(over), median(under)
    measured = top / bottom if top is not None and bottom else None
    detail = f"{number(top)} / {number(bottom)} us" if measured is not None else ""
    lowest = median(bound) if bound else None
    if detail and lowest is not None and bottom:
        detail += f"; {bound} {number(lowest)} us, {lowest / bottom:.3g}"
    return Outcome(what, limit, measured, at_most=under != DROP_IN, detail=detail)


def _median(
    rows: Iterable[Row],
    provider: str,
    metric: str,
    suites: Sequence[str] = (),
    beside: str = "",
    **labels: Any,
) -> float | None:
    """``beside``: the suite that is compared with the floor."""
    for row in rows:
        if (
            row["provider"] == provider
            and row["metric"] == metric
            and (row["suite"] in suites or (not suites and row["suite"] in ("seed", "floor")))
            and all(row["case"].get(name) == value for name, value in labels.items())
        ):
            return median_for(row, beside)
    return None


def _gpu_times(rows: Sequence[Row]) -> list[Outcome]:
    floor = _median(rows, "floor-empty", GPU, beside="growth-bs") or 0.0
    outcomes = []
    for factor in (1, 16):
        ours, empty_nodes = (
            dict(series(rows, "growth-bs", provider, "bs", capacity_factor=factor))
            for provider in ("cuda", "empty-node")
        )
        capacity = "T" if factor == 1 else f"{factor} T"
        for where, bounds in (
            ("empty node", dict.fromkeys(ours, floor)),
            ("empty node beside it", empty_nodes),
        ):
            for text, inside, limit in (
                ("bs 1 - 256", lambda bs: bs <= 256, 3.0),
                ("bs 1024", lambda bs: bs == 1024, 4.0),
                ("bs 16384", lambda bs: bs == 16384, 12.0),
            ):
                what = f"GPU time / {where}, {text}, capacity {capacity}"
                ratios = {bs: ours[bs] / bounds[bs] for bs in ours if inside(bs) and bounds.get(bs)}
                if not ratios:
                    outcomes.append(Outcome(what, limit, None))
                    continue
                worst = max(ratios, key=lambda bs: ratios[bs])
                detail = f"{number(ours[worst])} / {number(bounds[worst])} us at bs {worst}"
                outcomes.append(Outcome(what, limit, ratios[worst], detail=detail))
    return outcomes


def _bandwidths(rows: Sequence[Row]) -> list[Outcome]:
    outcomes = []
    for bs in (1, 1024):
        ours, fill = (
            dict(series(rows, "growth-t", provider, "rows", BANDWIDTH, bs=bs))
            for provider in ("cuda", "fill")
        )
        ratios = {n: ours[n] / fill[n] for n in ours if n >= LARGE_ROWS and fill.get(n)}
        what = f"bandwidth / torch fill, >= 64M rows, bs {bs}"
        worst = min(ratios, key=lambda n: ratios[n], default=None)
        if worst is None:
            outcomes.append(Outcome(what, 0.97, None, at_most=False))
            continue
        detail = f"{number(ours[worst])} / {number(fill[worst])} GB/s at {worst:,} rows"
        outcomes.append(Outcome(what, 0.97, ratios[worst], at_most=False, detail=detail))
    return outcomes


def _cold(document: Document) -> list[Outcome]:
    rows: list[Row] = document["rows"]
    outcomes = [
        Outcome(
            f"first call, {cache} kernel cache, s",
            limit,
            _median(rows, "cuda", FIRST_CALL, ("cold",), cache=cache, call="first"),
        )
        for cache, limit in (("empty", 0.8), ("warm", 0.3))
    ]
    later = [
        row
        for row in rows
        if (row["suite"], row["provider"], row["case"].get("call")) == ("cold", "cuda", "later")
    ]
    slowest = max(later, key=lambda row: float(row["median"]), default=None)
    outcomes.append(
        Outcome(
            "slowest first call at a later size, s",
            LATER_CALL_S,
            None if slowest is None else float(slowest["median"]),
            detail="" if slowest is None else f"bs {slowest['case']['bs']}",
        )
    )
    compiled = [
        part["files_compiled_later"]
        for part in document.get("cold", [])
        if part["provider"] == "cuda"
    ]
    outcomes.append(
        Outcome("kernels compiled after the first call", 0, sum(compiled) if compiled else None)
    )
    return outcomes


def _growth(rows: Sequence[Row]) -> list[Outcome]:
    outcomes = []
    for what, points in (
        (
            "growth in bs, capacity T",
            series(rows, "growth-bs", "cuda", "bs", capacity_factor=1),
        ),
        (
            "growth in bs, capacity 16 T",
            series(rows, "growth-bs", "cuda", "bs", capacity_factor=16),
        ),
        ("growth in T, bs 1", series(rows, "growth-t", "cuda", "rows", bs=1)),
        ("growth in T, bs 1024", series(rows, "growth-t", "cuda", "rows", bs=1024)),
    ):
        worst, where = largest_step(points)
        detail = "" if where is None else f"at {where[0]:,} -> {where[1]:,}"
        outcomes.append(Outcome(f"{what}: step / trend", STEP_LIMIT, worst, detail=detail))
    return outcomes


def _fused(rows: Sequence[Row]) -> list[Outcome]:
    """The suite ``fused``, but for EXTEND."""
    gpu, host = ((medians(rows, "cuda", m), medians(rows, "sglang", m)) for m in (GPU, HOST))
    outcomes = [_worst("fused: GPU / SGLang's, every case", 1.0, *gpu)]
    for page_table_1, limit in ((False, 0.25), (True, 0.6)):
        text = "with" if page_table_1 else "without"
        outcomes.append(
            _mean(
                f"fused: GPU / SGLang's, geometric mean, {text} page_table_1",
                limit,
                *gpu,
                lambda point, wanted=page_table_1: point.page_table_1 is wanted,
            )
        )
    outcomes += [
        _worst("fused: enqueue / SGLang's, every case", 0.25, *host),
        _mean("fused: enqueue / SGLang's, geometric mean", 0.25, *host),
    ]
    for op, bs, width, us in (("draft_extend_fused", 256, 4096, 4), ("decode", 1024, 8192, 5)):
        named = {p: us for p, us in gpu[0].items() if p[:4] == (op, bs, width, False)}
        what = f"fused: {op} bs {bs} W {width}, no page_table_1: GPU, us"
        worst = max(named, key=lambda point: named[point], default=None)
        theirs = gpu[1].get(worst) if worst is not None else None
        detail = f"SGLang {number(theirs)} us" if theirs else ""
        outcomes.append(
            Outcome(what, us * ABOUT, None if worst is None else named[worst], detail=detail)
        )
    ours, copied = (medians(rows, provider, BANDWIDTH) for provider in ("cuda", "copy"))
    what = "fused: bandwidth / torch copy of the same bytes, large tables"
    outcomes.append(_worst(what, 0.85, ours, copied, at_most=False, unit="GB/s"))
    plan, not_told, bare = (
        medians(rows, provider, HOST)
        for provider in ("cuda-plan", "cuda-plan-device", "bare-graph")
    )
    floor = _median(rows, "floor-graph", HOST, beside="fused", bs=32)
    floors = dict.fromkeys(plan, floor) if floor else {}
    lowest = geometric_mean(ratios(bare, floors).values())
    # Rows that do not vary follow from bs: there is one way.
    for whose, enqueue in (("told T", plan), ("T from the device", plan | not_told)):
        what = f"fused: plan enqueue, {whose} / floor-graph enqueue"
        outcomes.append(_worst(f"{what}, every case", 1.5, enqueue, floors))
        mean = _mean(f"{what}, geometric mean", 1.5, enqueue, floors)
        if lowest is not None:
            mean = replace(mean, detail=f"{mean.detail}; bare-graph {lowest:.3g} of {len(bare)}")
        outcomes.append(mean)
    return outcomes


def _fused_extend(rows: Sequence[Row]) -> list[Outcome]:
    ours, plan, loop, torch = (
        medians(rows, provider, END_TO_END, "extend")
        for provider in ("cuda", "cuda-plan", "loop", "torch")
    )

    def times_quicker(
        what: str, limit: float, other: dict[Point, float], bs: int | None = None
    ) -> Outcome:
        def wanted(point: Point) -> bool:
            return bs in (None, point.bs)

        outcome = _worst(what, limit, other, ours, wanted, at_most=False)
        planned = min(ratios(other, plan, wanted).values(), default=None)
        return replace(outcome, detail=f"{outcome.detail}; its plan {number(planned)}")

    outcomes = [
        times_quicker(f"fused: EXTEND, loop / ours, bs {bs}", limit, loop, bs)
        for bs, limit in LOOP_RATIOS.items()
    ]
    outcomes.append(times_quicker("fused: EXTEND, torch / ours", 15, torch))
    slowest = max(ours, key=lambda point: ours[point], default=None)
    planned = number(max(plan.values(), default=None))
    outcomes.append(
        Outcome(
            "fused: EXTEND, call and wait, us",
            12 * ABOUT,
            None if slowest is None else ours[slowest],
            detail="" if slowest is None else f"bs {slowest.bs}; its plan {planned} at most",
        )
    )
    return outcomes


def _worst(
    what: str,
    limit: float,
    over: dict[Point, float],
    under: dict[Point, float],
    wanted: Callable[[Point], bool] = lambda point: True,
    at_most: bool = True,
    unit: str = "us",
) -> Outcome:
    """The ratio that is furthest on the wrong side."""
    found = ratios(over, under, wanted)
    pick = max if at_most else min
    worst = pick(found, key=lambda point: found[point], default=None)
    if worst is None:
        return Outcome(what, limit, None, at_most)
    detail = f"{number(over[worst])} / {number(under[worst])} {unit} at {worst}"
    if len(found) > 1:
        missed = sum(r > limit if at_most else r < limit for r in found.values())
        detail += f"; {missed} of {len(found)} missed"
    return Outcome(what, limit, found[worst], at_most, detail)


def _mean(
    what: str,
    limit: float,
    over: dict[Point, float],
    under: dict[Point, float],
    wanted: Callable[[Point], bool] = lambda point: True,
) -> Outcome:
    found = ratios(over, under, wanted)
    detail = f"{len(found)} cases" if found else ""
    return Outcome(what, limit, geometric_mean(found.values()), detail=detail)


def largest_step(
    points: Sequence[tuple[int, float]],
) -> tuple[float | None, tuple[int, int] | None]:
    """The largest step of a curve over what the steps beside it lead to expect.

    Slopes are those of the logarithms, kept to [0, 1]: constant to proportional. A step is expected
    to follow the steeper of its neighbours.
    """
    points = sorted(points)
    if len(points) < 3:
        return None, None
    widths = [math.log(b[0] / a[0]) for a, b in pairwise(points)]
    steps = [math.log(b[1] / a[1]) for a, b in pairwise(points)]
    slopes = [min(max(step / width, 0.0), 1.0) for step, width in zip(steps, widths, strict=True)]
    worst, where = -math.inf, None
    for idx, (step, width) in enumerate(zip(steps, widths, strict=True)):
        beside = slopes[max(idx - 1, 0) : idx] + slopes[idx + 1 : idx + 2]
        over = math.exp(step - max(beside) * width)
        if over > worst:
            worst, where = over, (points[idx][0], points[idx + 1][0])
    return worst, where


def series(
    rows: Iterable[Row], suite: str, provider: str, axis: str, metric: str = GPU, **labels: Any
) -> list[tuple[int, float]]:
    """(axis value, median) of a provider's rows with these labels."""
    return sorted(
        (row["case"][axis], float(row["median"]))
        for row in rows
        if (row["suite"], row["provider"], row["metric"]) == (suite, provider, metric)
        and all(row["case"].get(name) == value for name, value in labels.items())
    )


def text(outcomes: Sequence[Outcome]) -> str:
    """A plain table: target, measured, met."""
    lines: list[Sequence[str]] = [("target", "limit", "measured", "met?", "from")]
    for outcome in outcomes:
        measured = "-" if outcome.measured is None else f"{outcome.measured:.4g}"
        met = {True: "yes", False: "NO", None: "not measured"}[outcome.met]
        limit = f"{'<=' if outcome.at_most else '>='} {outcome.limit:g}"
        lines.append((outcome.what, limit, measured, met, outcome.detail))
    return align(lines)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        if len(argv) != 1 or argv[0].startswith("-"):
            raise BenchError("expected one file: python -m benchmarks.targets FILE.json")
        outcomes = targets(read_document(Path(argv[0])))
    except BenchError as error:
        print(f"targets: error: {error}", file=sys.stderr)
        return 2
    print(text(outcomes))
    return 0 if all(outcome.met for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
