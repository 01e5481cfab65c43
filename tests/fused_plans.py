"""The plan of a fused case, and how a launch names its batch."""

from __future__ import annotations

from typing import Any

import cupy_nsa_meta
from cupy_nsa_meta.fused_plan import FusedPlan
from fused_cases import Built

PLANS = {
    "decode": cupy_nsa_meta.plan_fused_dsa_decode_metadata,
    "verify": cupy_nsa_meta.plan_fused_dsa_target_verify_metadata,
    "draft_extend": cupy_nsa_meta.plan_fused_dsa_draft_extend_metadata,
    "extend": cupy_nsa_meta.plan_fused_dsa_extend_metadata,
}


def plan_arguments(built: Built) -> dict[str, Any]:
    """Arguments of a plan whose capacities are the sizes of the case."""
    arguments = dict(built.arguments)
    op = built.case.op
    if op == "extend":
        arguments["max_total_len"] = arguments.pop("total_len")
        arguments["max_pad_to"] = arguments.pop("pad_to")
    else:
        arguments["max_bs"] = arguments.pop("bs")
    if op == "draft_extend":
        arguments["max_total_len"] = arguments.pop("total_len")
    return arguments


def plan_of(built: Built, **changes: Any) -> FusedPlan:
    return PLANS[built.case.op](**plan_arguments(built) | changes)


def batch_of(built: Built) -> dict[str, Any]:
    """The numbers that a launch of the case gives."""
    numbers: dict[str, Any] = {"bs": built.case.bs}
    if built.case.op in ("draft_extend", "extend"):
        numbers["total_len"] = built.case.rows
    if built.case.op == "extend":
        numbers["pad_to"] = built.case.pad_to
    return numbers
