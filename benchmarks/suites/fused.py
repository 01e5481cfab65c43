"""The fused family beside SGLang's kernels; EXTEND beside a loop over the requests and torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby, product

from .. import fused, fused_providers
from ..fused import FusedCase, Shape
from ..measure import BANDWIDTH, Effort
from ..session import Session

NAME = "fused"
OPS = ("decode", "target_verify", "draft_extend_fused")
BATCH_SIZES = (1, 8, 32, 64, 256, 1024)
WIDTHS = (4096, 32768, 131072)
EXTEND_BATCH_SIZES = (1, 16, 64, 256)
#: Beyond the grid: a named target.
FURTHER = (("decode", 8192, False, 1024),)
QUICK_BATCH_SIZES = (32, 256)
QUICK_WIDTHS = (4096,)
QUICK_EXTEND_BATCH_SIZES = (16,)
PROVIDERS = ("sglang", "cuda", "cuda-views", "cuda-plan", "bare-graph")
ROWS_VARY_PROVIDERS = (*PROVIDERS, "cuda-plan-device")
EXTEND_PROVIDERS = ("loop", "torch", "cuda", "cuda-plan", "cuda-plan-device")
#: From here on the bytes are several times the L2 cache, and time is that of the memory.
LARGE_BYTES = 1 << 27


def shapes(quick: bool, seed: int) -> list[Shape]:
    """With page tables, by width."""
    widths, batch_sizes = (QUICK_WIDTHS, QUICK_BATCH_SIZES) if quick else (WIDTHS, BATCH_SIZES)
    grid = [
        (op, width, page_table_1, bs)
        for width, op, page_table_1, bs in product(widths, OPS, (False, True), batch_sizes)
    ]
    if not quick:
        grid += FURTHER
    kinds = fused.KV[:1] if quick else fused.KV
    return [
        Shape(op, bs, width, page_table_1, kv, seed)
        for op, width, page_table_1, bs in grid
        for kv in kinds
    ]


def run(session: Session) -> None:
    effort = less(session.effort)
    batch_sizes = QUICK_EXTEND_BATCH_SIZES if session.quick else EXTEND_BATCH_SIZES
    chosen = shapes(session.quick, session.seed) if session.timing.is_gpu else []
    if not chosen:
        for name in ROWS_VARY_PROVIDERS:
            session.results.leave_out(NAME, name, "it takes CUDA tensors")
    with session.progress(len(chosen) + len(batch_sizes), "fused family") as tick:
        for bs in batch_sizes:
            _extend(session, bs, effort)
            tick()
        for _, of_width in groupby(chosen, key=lambda shape: shape.width):
            if not session.quick:
                session.run_floor(NAME)
            for _ in _of_one_width(session, list(of_width), effort):
                tick()
    if not session.quick:
        session.run_floor(NAME)
    session.release()


def less(effort: Effort) -> Effort:
    """A share for each of the cases: there are hundreds."""
    return replace(
        effort,
        rounds=max(effort.rounds // 6, 1),
        block=max(effort.block // 3, 5),
        replays=max(effort.replays // 3, 4),
        graph_us=effort.graph_us * 0.4,
        max_nodes=max(effort.max_nodes * 2 // 5, 4),
    )


def _extend(session: Session, bs: int, effort: Effort) -> None:
    case = FusedCase(Shape("extend", bs, seed=session.seed), session.topk, session.device)
    contest = session.contest(
        NAME, case, EXTEND_PROVIDERS, effort=effort, loaders=fused_providers.PROVIDERS
    )
    contest.end_to_end()
    contest.host()
    case.keep_total()
    contest.gpu()


def _of_one_width(session: Session, chosen: list[Shape], effort: Effort) -> Iterator[None]:
    """Measure shapes that share their tokens and the memory of their tables; yields after each."""
    session.release()
    free = session.free_bytes()
    fitting = [shape for shape in chosen if shape.bytes_needed <= free]
    for shape in chosen:
        if shape not in fitting:
            session.results.notes.append(
                f"{NAME}: {shape.op} bs {shape.bs} width {shape.width} "
                f"page_table_1 {shape.page_table_1} does not fit the memory"
            )
            yield
    if not fitting:
        return
    tables = fused.tables_of(fitting, session.device)
    for shape in fitting:
        _with_tables(session, FusedCase(shape, session.topk, session.device, tables), effort)
        yield


def _with_tables(session: Session, case: FusedCase, effort: Effort) -> None:
    is_large = case.shape.page_table_1 and case.moved_bytes >= LARGE_BYTES
    names = ROWS_VARY_PROVIDERS if case.has_extend else PROVIDERS
    if is_large:
        names = (*names, "copy")
    contest = session.contest(NAME, case, names, effort=effort, loaders=fused_providers.PROVIDERS)
    contest.host()
    case.keep_total()
    measured = contest.gpu()
    if is_large:
        for provider, samples in measured.items():
            bandwidths = [case.moved_bytes / 1000.0 / us for us in samples]  # bytes per ns
            session.results.add(case.op, NAME, case.labels, provider, BANDWIDTH, bandwidths)
