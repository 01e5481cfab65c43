"""Seed table: the batches of speculative decoding, every provider, every column."""

from __future__ import annotations

from ..draft_extend import serving_case
from ..session import Session

NAME = "seed"
BATCH_SIZES = (4, 16, 32, 64)
QUICK_BATCH_SIZES = (32,)
PROVIDERS = (
    "cuda-plan",
    "cuda",
    "cuda-fresh",
    "cuda-uncached",
    "cuda-total-tokens",
    "cuda-async",
    "triton",
    "python",
    "torch",
    "torch-compile",
    "aot-extension",
    "sglang",
    "seed-triton",
    "seed-cuda",
    "bare-graph",
    "bare-launch",
)


def run(session: Session) -> None:
    batch_sizes = QUICK_BATCH_SIZES if session.quick else BATCH_SIZES
    effort = session.effort
    per_case = 2 * effort.rounds + effort.replays
    with session.progress(len(batch_sizes) * per_case, "seed table") as tick:
        for bs in batch_sizes:
            session.run_floor(NAME)
            case = serving_case(bs, session.topk, session.device, seed=session.seed)
            contest = session.contest(NAME, case, PROVIDERS, tick)
            contest.end_to_end()
            contest.host()
            contest.gpu()
    session.run_floor(NAME)
    session.release()
