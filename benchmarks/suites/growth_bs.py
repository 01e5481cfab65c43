"""Growth in the number of requests, buffers of T and of 16 T rows."""

from __future__ import annotations

from dataclasses import replace

from ..draft_extend import serving_case, sizes
from ..session import Session

NAME = "growth-bs"
#: Both sides of every size where the kernel changes.
POINTS = (
    *(1, 2, 4, 8, 16, 32, 33, 64, 128, 256, 257, 512, 1024, 1025, 2048, 4096, 4097, 8192),
    *(16384, 16385, 32768, 65536, 131072, 262144, 524288, 1_000_000),
)
QUICK_POINTS = (1, 32, 256, 1024, 16384, 1_000_000)
CAPACITY_FACTORS = (1, 16)
PROVIDERS = ("cuda", "empty-node", "triton", "aot-extension", "torch")
WITH_ROOM = (
    "cuda",
    "empty-node",
    "triton",
)  # the others' work is that of the capacity, or of a smaller batch
SLOW_FROM_BS = 65536


def run(session: Session) -> None:
    points = sizes(POINTS, QUICK_POINTS, session.quick)
    effort = replace(
        session.effort,
        rounds=max(session.effort.rounds // 4, 1),
        replays=max(session.effort.replays // 2, 5),
    )
    if not session.quick:
        session.run_floor(NAME)
    with session.progress(len(points) * len(CAPACITY_FACTORS), "growth in bs") as tick:
        for bs in points:
            for factor in CAPACITY_FACTORS:
                case = serving_case(
                    bs,
                    session.topk,
                    session.device,
                    factor,
                    session.seed,
                    {"capacity_factor": factor},
                )
                names = PROVIDERS if factor == 1 else WITH_ROOM
                contest = session.contest(NAME, case, names, effort=effort)
                contest.gpu()
                contest.bounds = {n: b for n, b in contest.bounds.items() if n == "cuda"}
                contest.end_to_end()
                tick()
            if bs >= SLOW_FROM_BS:
                session.release()
    session.run_floor(NAME)
    session.release()
