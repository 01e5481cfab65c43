"""How the named cases of each source file in ``cuda_src/`` are run: one line for each of them here.

``test_operations.py`` takes it from there: the kernels on the CPU, plain and under sanitizers, and
the public function on the CPU and on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cases
import cpu_kernels
import cupy_nsa_meta
import fused_cases
from backends import check_case
from cpu_kernels import Job


@dataclass(frozen=True)
class Operation:
    """The cases of one source file."""

    cases: Sequence[Any]  # each with a unique ``name``
    #: The launches that the package would make for a case, and the check of the buffers after them.
    job: Callable[[Any], tuple[Job, Callable[[list[bytes]], None]]]
    #: Call the public function on a device and compare everything that it may touch.
    run: Callable[[Any, str], None]
    #: Under ThreadSanitizer a block costs a quarter of a second: the cases that differ in barriers.
    race_cases: Sequence[str] = ()


def draft_extend_job(case: cases.Case) -> tuple[Job, Callable[[list[bytes]], None]]:
    check = partial(cpu_kernels.check_draft_extend, case, case.expected())
    return cpu_kernels.draft_extend_job(case), check


def run_draft_extend(case: cases.Case, device: str) -> None:
    check_case(cupy_nsa_meta.fill_draft_extend_metadata, case, device)


def fused_job(case: fused_cases.FusedCase) -> tuple[Job, Callable[[list[bytes]], None]]:
    item = cpu_kernels.fused_job(case)
    return item.job, partial(cpu_kernels.check_fused, item)


def run_fused(case: fused_cases.FusedCase, device: str) -> None:
    built = fused_cases.Built(case, device)
    built.run()
    built.check(fused_cases.naive(case))


OPERATIONS: dict[str, Operation] = {
    "draft_extend": Operation(
        cases.CASES, draft_extend_job, run_draft_extend,
        ("one_row", "zero_middle", "quads_warp", "quads_block", "bs_33", "bs_257", "bs_4096",
         "bs_4097", "bs_16385", "total_short", "negative_tiled"),
    ),
    "fused": Operation(
        fused_cases.CASES, fused_job, run_fused,
        ("decode_bs_33", "verify_bs_257", "draft_extend_bs_257", "extend_padded_cut",
         "extend_flattened_unaligned", "draft_extend_zero_runs", "verify_aligned",
         "draft_extend_outside_pool", "draft_extend_static"),
    ),
}  # fmt: skip
