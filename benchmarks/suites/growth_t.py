"""Growth in rows, up to 2^31 - 1 where memory allows, beside torch's fill of the same bytes."""

from __future__ import annotations

from dataclasses import replace

from ..draft_extend import INT32_MAX, fits, long_case, sizes
from ..measure import BANDWIDTH, Effort
from ..session import Session

NAME = "growth-t"
POINTS = (*(1 << exponent for exponent in range(10, 31, 2)), INT32_MAX)
QUICK_POINTS = (1 << 10, 1 << 18, 1 << 26)
BATCH_SIZES = (1, 1024)
PROVIDERS = ("cuda", "triton", "fill")
OUTPUT_BYTES = 8  # of a row: two int32


def run(session: Session) -> None:
    points = sizes(POINTS, QUICK_POINTS, session.quick)
    effort = replace(session.effort, graph_us=2000.0)
    with session.progress(len(points) * len(BATCH_SIZES), "growth in rows") as tick:
        for rows in points:
            for bs in BATCH_SIZES:
                session.release()
                if not fits(rows, session.free_bytes()):
                    session.results.notes.append(f"{NAME}: {rows:,} rows do not fit the memory")
                else:
                    _point(session, bs, rows, effort)
                tick()
    session.release()


def _point(session: Session, bs: int, rows: int, effort: Effort) -> None:
    case = long_case(bs, rows, session.topk, session.device, session.seed)
    contest = session.contest(NAME, case, PROVIDERS, effort=effort)
    for provider, samples in contest.gpu().items():
        bandwidths = [OUTPUT_BYTES * rows / 1000.0 / us for us in samples]  # bytes per ns
        session.results.add(case.op, NAME, case.labels, provider, BANDWIDTH, bandwidths)
