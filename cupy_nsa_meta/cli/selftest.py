"""``selftest``: run every function on this machine and compare it with its definition, exactly.

One row per function and backend. Exit status 1 where a result is wrong, a call fails, or torch sees
a GPU that the CUDA backend cannot use. A backend that cannot run is named with its reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import torch

import cupy_nsa_meta

from .. import _env, dispatch, reference
from . import FAILED, OK, batches
from .batches import BATCHES, FUSED_BATCHES, OPS, POISON, REFUSED, SLACK, Batch, FusedBuffers
from .terminal import Painter, columns, describe, one_line, print_json

COLOURS = {"ok": "green", "WRONG": "red", "not run": "yellow"}
INTERPRETER_MAX_BS = 33  # Triton's interpreter is slow
INTERPRETER_MAX_ROWS = 700
REPLAY_BATCHES = ("padding rows", "bs 33, more than a warp", "bs 16385, two launches")


class Wrong(Exception):
    """A result that is not the definition's."""


class Row(NamedTuple):
    """One function on one backend."""

    function: str
    backend: str
    state: str  # ok, WRONG, not run
    num_batches: int
    ms: float
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="where the tensors are; default: the GPU where torch sees one",
    )  # fmt: skip
    parser.epilog = (
        "Exit status: 0 every result is right; 1 a wrong result, a failed call, or a GPU that the "
        "CUDA backend cannot use; 2 bad options."
    )


def run(args: argparse.Namespace) -> int:
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    if args.device == "cuda" and not on_gpu:
        print(
            "cupy_nsa_meta selftest: --device cuda: torch sees no CUDA device; doctor says more",
            file=sys.stderr,
        )
        return FAILED
    begin = perf_counter()
    rows = examine(torch.device("cuda", torch.cuda.current_device()) if on_gpu else CPU)
    seconds = perf_counter() - begin
    passed = not any(row.state == "WRONG" for row in rows)
    if args.json:
        print_json(
            {
                "command": "selftest",
                "version": cupy_nsa_meta.__version__,
                "ok": passed,
                "device": torch.cuda.get_device_name() if on_gpu else "cpu",
                "seconds": round(seconds, 3),
                "rows": [row._asdict() for row in rows],
            }
        )
    else:
        print(report(rows, seconds))
    return OK if passed else FAILED


CPU = torch.device("cpu")


def report(rows: Sequence[Row], seconds: float) -> str:
    """The rows as a table."""
    paint = Painter()
    cells = [("function", "backend", "batches", "ms", "result")]
    cells += [
        (row.function, row.backend, str(row.num_batches), f"{row.ms:.0f}", row.state)
        if row.state != "not run"
        else (row.function, row.backend, "-", "-", row.state)
        for row in rows
    ]
    header, *lines = columns(cells, right=(2, 3))
    out = [paint(header, "dim")]
    for row, line in zip(rows, lines, strict=True):
        out.append(line[: -len(row.state)] + paint(row.state, COLOURS[row.state]))
        if row.detail:
            out.append(f"    {row.detail}")
    wrong = sum(row.state == "WRONG" for row in rows)
    not_run = sum(row.state == "not run" for row in rows)
    out.append("")
    text = f"{wrong} wrong" if wrong else "every result is right"
    text += f", {not_run} not run" if not_run else ""
    out.append(paint(f"{text}, {seconds:.1f} s", "red" if wrong else "green"))
    return "\n".join(out)


def examine(device: torch.device) -> list[Row]:
    """All rows for tensors on a device."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the batches are small: threads would wait for each other
    try:
        return _examine(device)
    finally:
        torch.set_num_threads(threads)


def _examine(device: torch.device) -> list[Row]:
    rows = [_row("reference.draft_extend", "torch", check_reference, BATCHES)]
    rows += _seed_rows(device)
    for place in dict.fromkeys((device, CPU)):
        rows += _fused_rows(place)
    if device.type == "cuda" and dispatch.cuda_unavailable_reason(device.index) is None:
        rows += _replay_rows(device)
    return rows


def _row(function: str, backend: str, check: Callable[[Any], None], items: Sequence[Any]) -> Row:
    """Run a check on every batch; the first that fails is told."""
    begin = perf_counter()
    wrong: list[str] = []
    for item in items:
        name = item.name if isinstance(item, Batch) else str(item)
        try:
            check(item)
        except Wrong as error:
            wrong.append(f"{name}: {error}")
        except Exception as error:  # a failed call is a result
            wrong.append(f"{name}: {describe(error)}")
    ms = 1e3 * (perf_counter() - begin)
    more = f" (and {len(wrong) - 1} more batches)" if len(wrong) > 1 else ""
    detail = one_line(wrong[0]) + more if wrong else ""
    return Row(function, backend, "WRONG" if wrong else "ok", len(items), ms, detail)


# ---- The seed operation -------------------------------------------------------------------------


class Outputs:
    """The two out buffers of a batch, poisoned, with room behind."""

    def __init__(self, batch: Batch, device: torch.device, capacity: int | None = None) -> None:
        room = max(batch.total, 0) + SLACK if capacity is None else capacity
        self.expanded, self.clamped = (
            torch.full((room,), POISON, dtype=torch.int32, device=device) for _ in range(2)
        )

    def check(self, batch: Batch | None) -> None:
        """Every element is what the definition says; None: nothing was written."""
        rows: tuple[list[int], list[int]] = ([], []) if batch is None else batches.expansion(batch)
        for name, tensor, values in (
            ("out_seqlens_expanded", self.expanded, rows[0]),
            ("out_nsa_cache_seqlens", self.clamped, rows[1]),
        ):
            got = tensor.cpu()
            wanted = torch.full_like(got, POISON)
            wanted[: len(values)] = torch.tensor(values, dtype=torch.int32)
            message = batches.first_difference(name, got, wanted)
            if message is not None:
                raise Wrong(message)


def equal(what: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise Wrong(f"{what}: expected {wanted}, got {got}")


def check_reference(batch: Batch) -> None:
    got = reference.draft_extend(*batch.lengths(CPU), batch.topk)
    for name, tensor, values in zip(
        ("seqlens_expanded", "nsa_cache_seqlens"), got, batches.expansion(batch), strict=True
    ):
        equal(name, tensor.tolist(), values)


def check_fill(fill: Callable[..., Any], device: torch.device, batch: Batch) -> None:
    """Total and rows, with and without the adaptive search, and with the total given."""
    ways: tuple[dict[str, Any], ...] = (
        {},
        {"use_adaptive": False},
        {"total_tokens": batch.total},
    )
    extend, seq = batch.lengths(device)
    for options in ways:
        outputs = Outputs(batch, device)
        # On a GPU a call that is met again is captured, and replayed from then on.
        for _ in range(3 if device.type == "cuda" else 1):
            total = fill(extend, seq, batch.topk, outputs.expanded, outputs.clamped, **options)
            equal("total", total, batch.total)
        outputs.check(batch)


def check_refusals(fill: Callable[..., Any], device: torch.device) -> None:
    """Errors are raised and nothing is written."""
    too_many = Batch("over capacity", (7, 6), (9, 9))
    for batch, capacity in [(batch, None) for batch, _ in REFUSED] + [(too_many, 12)]:
        extend, seq = batch.lengths(device)
        outputs = Outputs(batch, device, capacity)
        try:
            total = fill(extend, seq, batch.topk, outputs.expanded, outputs.clamped)
        except ValueError:
            outputs.check(None)
        else:
            raise Wrong(f"{batch.name}: expected a ValueError, got the total {total}")


def check_async(fill: Callable[..., Any], device: torch.device, batch: Batch) -> None:
    extend, seq = batch.lengths(device)
    given = torch.full((2,), POISON, dtype=torch.int32, device=device)
    for out_total in (None, given):
        outputs = Outputs(batch, device)
        outcome = fill(
            extend, seq, batch.topk, outputs.expanded, outputs.clamped, out_total=out_total
        )
        equal("total and status", outcome.tolist(), [batch.total, 0])
        outputs.check(batch)


def check_plan(device: torch.device, batch: Batch) -> None:
    """``run``, ``launch`` and ``status``, and other lengths in the same buffers."""
    extend, seq = batch.lengths(device)
    outputs = Outputs(batch, device)
    plan = cupy_nsa_meta.plan_draft_extend_metadata(
        extend, seq, batch.topk, outputs.expanded, outputs.clamped
    )
    equal("total", plan.run(), batch.total)
    outputs.check(batch)
    other = batch.reversed()
    extend.copy_(torch.tensor(other.extend))
    seq.copy_(torch.tensor(other.seq))
    plan.launch()
    equal("status", plan.status(), 0)
    outputs.check(other)


def check_fused_simple(device: torch.device, batch: Batch) -> None:
    got = cupy_nsa_meta.fill_draft_extend_metadata_fused_simple(*batch.lengths(device), batch.topk)
    for name, tensor, values in zip(
        ("seqlens_expanded", "nsa_cache_seqlens"), got, batches.expansion(batch), strict=True
    ):
        equal(name, tensor.tolist(), values)


def check_kernel_info() -> None:
    info = cupy_nsa_meta.get_kernel_info()
    equal("available", info["available"], cupy_nsa_meta.is_cuda_kernel_available())
    equal("reason is None", info["reason"] is None, info["available"])


def _seed_rows(device: torch.device) -> Iterator[Row]:
    """Each backend by its own functions, then what the choosing functions take."""
    for name, reason, items in (
        ("cuda", _cuda_reason(device), BATCHES),
        ("triton", dispatch.triton_unavailable_reason(), _for_triton(device)),
        ("python", None, BATCHES),
    ):
        names = SEED_FUNCTIONS[name]
        if reason is not None:
            # Torch sees a GPU: the CUDA backend is what it is for.
            broken = name == "cuda" and device.type == "cuda"
            state = "WRONG" if broken else "not run"
            yield Row(", ".join(names), name, state, 0, 0.0, one_line(reason))
            continue
        yield from _functions_of(name, device, items)
    yield _row("get_kernel_info", "-", lambda _: check_kernel_info(), ("this machine",))
    chosen = f"chosen: {_chosen(device)}"
    yield from _fill_rows("fill_draft_extend_metadata", chosen, device, BATCHES)
    yield _row(
        "fill_draft_extend_metadata_async", chosen,
        lambda batch: check_async(cupy_nsa_meta.fill_draft_extend_metadata_async, device, batch),
        BATCHES,
    )  # fmt: skip
    yield _row(
        "plan_draft_extend_metadata", chosen, lambda batch: check_plan(device, batch), BATCHES
    )


SEED_FUNCTIONS = {
    "cuda": ("fill_draft_extend_metadata_cuda",),
    "triton": ("fill_draft_extend_metadata_inplace", "fill_draft_extend_metadata_fused_simple"),
    "python": ("fill_draft_extend_metadata_python",),
}


def _functions_of(backend: str, device: torch.device, items: Sequence[Batch]) -> Iterator[Row]:
    fill, *others = SEED_FUNCTIONS[backend]
    yield from _fill_rows(fill, backend, device, items)
    for name in others:
        yield _row(name, backend, lambda batch: check_fused_simple(device, batch), items)


def _fill_rows(
    name: str, backend: str, device: torch.device, items: Sequence[Batch]
) -> Iterator[Row]:
    def fill(*arguments: Any, **options: Any) -> Any:
        return getattr(cupy_nsa_meta, name)(*arguments, **options)

    yield _row(name, backend, lambda batch: check_fill(fill, device, batch), items)
    yield _row(
        f"{name}, bad input", backend, lambda _: check_refusals(fill, device), ("refused batches",)
    )


def _cuda_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "the tensors of this run are on the CPU"
    return dispatch.cuda_unavailable_reason(device.index)


def _for_triton(device: torch.device) -> tuple[Batch, ...]:
    if device.type == "cuda":
        return BATCHES
    return tuple(
        batch
        for batch in BATCHES
        if batch.bs <= INTERPRETER_MAX_BS and batch.total <= INTERPRETER_MAX_ROWS
    )


def _chosen(device: torch.device) -> str:
    try:
        return dispatch.choose(-1 if device.index is None else device.index).name
    except (RuntimeError, ValueError):  # CUPY_NSA_META_BACKEND: the calls say it as well
        return "none"


# ---- The fused family ---------------------------------------------------------------------------

NAMES = {
    "decode": "fused_dsa_decode_metadata",
    "verify": "fused_dsa_target_verify_metadata",
    "draft_extend": "fused_dsa_draft_extend_metadata",
    "extend": "fused_dsa_extend_metadata",
}


def fused_arguments(buffers: FusedBuffers, plan: bool = False) -> dict[str, Any]:
    """The arguments of a fused function, or of its plan, by name."""
    op, batch = buffers.op, buffers.batch
    arguments: dict[str, Any] = {
        "seq_lens": buffers.seq,
        "req_pool_indices": buffers.pool,
        "req_to_token": buffers.tokens,
        "dsa_index_topk": batch.topk,
        "physical_page_size": batches.PAGE_SIZE,
        "max_len" if op == "decode" else "max_seqlen_k": batches.WIDTH,
        **buffers.outputs,
    }
    if op != "extend":
        arguments["max_bs" if plan else "bs"] = batch.bs
    if op == "verify":
        arguments["next_n"] = batches.NEXT_N
    if op in ("draft_extend", "extend"):
        arguments["extend_seq_lens"] = buffers.extend
        if not plan:
            arguments["total_len"] = buffers.rows
        if plan or op == "draft_extend":
            arguments["max_total_len"] = buffers.rows
    if op == "draft_extend":
        arguments["max_extend_len"] = max(batch.extend, default=0)
    return arguments


def check_fused(op: str, device: torch.device, batch: Batch) -> None:
    """Twice into the same buffers: the second call finds its facts known."""
    buffers = FusedBuffers(op, batch, device)
    for _ in range(2):
        buffers.poison()
        getattr(cupy_nsa_meta, NAMES[op])(**fused_arguments(buffers))
        _check_buffers(buffers)
    equal("last_status()", int(cupy_nsa_meta.last_status(device)), 0)


def check_fused_plan(op: str, device: torch.device, batch: Batch) -> None:
    buffers = FusedBuffers(op, batch, device)
    plan = getattr(cupy_nsa_meta, f"plan_{NAMES[op]}")(**fused_arguments(buffers, plan=True))
    plan.run()
    _check_buffers(buffers)
    buffers.refill(batch.reversed())
    buffers.poison()
    plan.launch()
    equal("status", int(plan.status()), 0)
    _check_buffers(buffers)


def check_seqlens_expand(device: torch.device, batch: Batch) -> None:
    got = cupy_nsa_meta.seqlens_expand(
        *batch.lengths(device), batch.total, max(batch.extend, default=0)
    )
    equal("result", got.tolist(), batches.expansion(batch)[0])


def check_last_status(device: torch.device) -> None:
    """A total that is not that of the lengths leaves status 4, once; in debug mode it raises."""
    batch = Batch("wrong total", (3, 2), (10, 4))
    cupy_nsa_meta.last_status(device)
    try:
        cupy_nsa_meta.seqlens_expand(*batch.lengths(device), 4, 3)
    except ValueError:
        if not _env.debug_sync():
            raise
        return
    equal("last_status()", int(cupy_nsa_meta.last_status(device)), 4)
    equal("last_status() after it was read", int(cupy_nsa_meta.last_status(device)), 0)


def _check_buffers(buffers: FusedBuffers) -> None:
    message = buffers.difference()
    if message is not None:
        raise Wrong(message)


def _fused_rows(device: torch.device) -> Iterator[Row]:
    for op in OPS:
        for name, check in ((NAMES[op], check_fused), (f"plan_{NAMES[op]}", check_fused_plan)):
            yield _row(
                name, device.type, lambda batch, op=op, check=check: check(op, device, batch),  # type: ignore[misc]
                FUSED_BATCHES,
            )  # fmt: skip
    yield _row(
        "seqlens_expand", device.type, lambda batch: check_seqlens_expand(device, batch), BATCHES
    )
    yield _row("last_status", device.type, lambda _: check_last_status(device), ("wrong total",))


# ---- CUDA graphs --------------------------------------------------------------------------------


def _replay_rows(device: torch.device) -> Iterator[Row]:
    items = [batch for batch in BATCHES if batch.name in REPLAY_BATCHES]
    yield _row("warmup", "cuda", lambda _: cupy_nsa_meta.warmup(device), ("every kernel",))
    yield _row(
        "fill_draft_extend_metadata_async, replay", "cuda",
        lambda batch: check_replay(device, batch), items,
    )  # fmt: skip
    fused_items = [batch for batch in FUSED_BATCHES if batch.name in REPLAY_BATCHES]
    for op in OPS:
        yield _row(
            f"{NAMES[op]}, replay", "cuda",
            lambda batch, op=op: check_fused_replay(op, device, batch),  # type: ignore[misc]
            fused_items,
        )  # fmt: skip


@contextmanager
def captured(device: torch.device) -> Iterator[torch.cuda.CUDAGraph]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.device(device), torch.cuda.graph(graph):
        yield graph


def check_replay(device: torch.device, batch: Batch) -> None:
    """A graph, replayed with other lengths in the same buffers."""
    extend, seq = batch.lengths(device)
    outputs = Outputs(batch, device)
    outcome = torch.zeros(2, dtype=torch.int32, device=device)
    with captured(device) as graph:
        cupy_nsa_meta.fill_draft_extend_metadata_async(
            extend, seq, batch.topk, outputs.expanded, outputs.clamped, out_total=outcome
        )
    for lengths in (batch, batch.reversed()):
        extend.copy_(torch.tensor(lengths.extend))
        seq.copy_(torch.tensor(lengths.seq))
        graph.replay()
        equal("total and status", outcome.tolist(), [batch.total, 0])
        outputs.check(lengths)


def check_fused_replay(op: str, device: torch.device, batch: Batch) -> None:
    buffers = FusedBuffers(op, batch, device)
    with captured(device) as graph:
        getattr(cupy_nsa_meta, NAMES[op])(**fused_arguments(buffers))
    for lengths in (batch, batch.reversed()):
        buffers.refill(lengths)
        buffers.poison()
        graph.replay()
        _check_buffers(buffers)
    equal("last_status()", int(cupy_nsa_meta.last_status(device)), 0)
