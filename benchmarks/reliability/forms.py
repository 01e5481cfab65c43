"""The ways of calling a function on one batch, for the parts that mix them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import cupy_nsa_meta
from cases import Case, Outputs
from cupy_nsa_meta import _launch
from cupy_nsa_meta._status import FATAL
from fused_cases import FUNCTIONS, Built, FusedCase
from fused_plans import batch_of, plan_of

from .placing import Block, tensors_of

OUTCOME_POISON = -77  # in an out_total that no call has filled


@dataclass
class SeedBatch:
    """A batch of the seed operation: CPU tensors, their block, and what it holds afterwards."""

    case: Case
    tensors: dict[str, Any]
    block: Block
    before: torch.Tensor  # contents of the block, poisoned outputs included
    after: torch.Tensor  # with the rows
    after_async: torch.Tensor  # with the rows and out_total
    total: int  # T; -1 where the status says so
    status: int


def seed_batch(case: Case) -> SeedBatch:
    extend, seq = case.lengths()
    outputs = Outputs(case)
    tensors = {
        "extend_seq_lens": extend,
        "seq_lens": seq,
        "out_seqlens_expanded": outputs.expanded,
        "out_nsa_cache_seqlens": outputs.clamped,
        "out_total": torch.full((2,), OUTCOME_POISON, dtype=torch.int32),
    }
    block = Block(tensors.values())
    before = block.contents()
    expected = case.expected()
    outputs.expanded[: len(expected.expanded)] = expected.expanded
    outputs.clamped[: len(expected.clamped)] = expected.clamped
    after = block.contents()
    tensors["out_total"].copy_(torch.tensor([expected.total, expected.status]))
    return SeedBatch(
        case, tensors, block, before, after, block.contents(), expected.total, expected.status
    )


def seed_arguments(batch: SeedBatch, tensors: dict[str, Any]) -> tuple[Any, ...]:
    return (
        tensors["extend_seq_lens"],
        tensors["seq_lens"],
        batch.case.topk,
        tensors["out_seqlens_expanded"],
        tensors["out_nsa_cache_seqlens"],
    )


def call_seed(form: str, batch: SeedBatch, tensors: dict[str, Any]) -> int | None:
    """One call; the total where it returns one. Raises where a good batch is refused."""
    arguments = seed_arguments(batch, tensors)
    given = batch.case.total_tokens
    if form == "async":
        cupy_nsa_meta.fill_draft_extend_metadata_async(
            *arguments, total_tokens=given, out_total=tensors["out_total"]
        )
        return None
    if form == "plan" and given is None:
        return cupy_nsa_meta.plan_draft_extend_metadata(*arguments).run()
    total = cupy_nsa_meta.fill_draft_extend_metadata(*arguments, total_tokens=given)
    return None if given is not None else total


def returns_total(batch: SeedBatch, form: str) -> bool:
    return form != "async" and batch.case.total_tokens is None and batch.status not in FATAL


@dataclass
class FusedBatch:
    """A batch of the fused family, as ``SeedBatch``."""

    case: FusedCase
    built: Built
    block: Block
    before: torch.Tensor
    after: torch.Tensor
    status: int


def fused_batch(case: FusedCase) -> FusedBatch:
    built = Built(case)
    # The outputs with their guards; inputs last. A view brings its whole allocation along.
    block = Block(tensors_of(built.arguments))
    before = block.contents()
    cupy_nsa_meta.last_status("cpu")
    built.run()
    status = cupy_nsa_meta.last_status("cpu")
    return FusedBatch(case, built, block, before, block.contents(), status)


def call_fused(form: str, batch: FusedBatch, block: torch.Tensor) -> int:
    """One call on the tensors in ``block``; the status that it met."""
    device = block.device
    arguments = batch.block.arguments(block, batch.built.arguments)
    if form == "plan":
        plan = plan_at(batch, arguments)
        plan.launch(**batch_of(batch.built))
        return plan.status()
    FUNCTIONS[batch.case.op](**arguments)
    return cupy_nsa_meta.last_status(device)


def plan_at(batch: FusedBatch, arguments: dict[str, Any]) -> Any:
    """The plan of a batch whose tensors are ``arguments``."""
    own = batch.built.arguments
    batch.built.arguments = arguments
    try:
        return plan_of(batch.built)
    finally:
        batch.built.arguments = own


def record_kernels() -> set[str]:
    """The set that from now on collects the names of the kernels that are launched or captured."""
    names: set[str] = set()
    launch: Callable[..., None] = _launch.DeviceState.launch

    def recorded(self: Any, slot: Any, stream: int, launches: Any) -> None:
        names.update(name for name, _ in launches)
        launch(self, slot, stream, launches)

    _launch.DeviceState.launch = recorded  # type: ignore[method-assign]
    return names
