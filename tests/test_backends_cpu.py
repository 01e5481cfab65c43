"""Backends that run without a GPU, over all cases: plain torch, and Triton's interpreter."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import cupy_nsa_meta
from backends import check_case, check_case_async
from cases import BY_NAME, CASES, random_batches
from cupy_nsa_meta._status import Status

needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="Triton is not installed, or runs on the GPU here (then tests/test_gpu.py covers it)",
)
# The interpreter walks a block of 1,024 requests per step, in every program of the launch.
TRITON_CASES = [case for case in CASES if case.bs <= 5000]
TWO_LAUNCHES = [case for case in CASES if case.bs > 16384]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "name", ["fill_draft_extend_metadata_python", "fill_draft_extend_metadata"]
)
def test_python(case, name):
    check_case(getattr(cupy_nsa_meta, name), case, "cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_async_on_the_cpu(case):
    check_case_async(cupy_nsa_meta.fill_draft_extend_metadata_async, case, "cpu")


@needs_interpreter
@pytest.mark.parametrize("case", TRITON_CASES + TWO_LAUNCHES, ids=lambda case: case.name)
def test_triton_interpreter(case):
    check_case(cupy_nsa_meta.fill_draft_extend_metadata_inplace, case, "cpu")


@needs_interpreter
@pytest.mark.parametrize("case", random_batches(20, seed=31), ids=lambda case: case.name)
def test_triton_interpreter_random(case):
    check_case(cupy_nsa_meta.fill_draft_extend_metadata_inplace, case, "cpu")


@needs_interpreter
@pytest.mark.parametrize("name", ["contract", "total_short", "negative_extend", "empty"])
def test_triton_async_interpreter(name):
    from cupy_nsa_meta.draft_extend_triton import fill_draft_extend_metadata_triton_async

    check_case_async(fill_draft_extend_metadata_triton_async, BY_NAME[name], "cpu")


@needs_interpreter
@pytest.mark.parametrize("case", TRITON_CASES, ids=lambda case: case.name)
def test_fused_simple(case):
    extend, seq = case.lengths()
    expected = case.expected()
    if expected.status in (Status.NEGATIVE_EXTEND, Status.OUTSIDE_INT32):
        with pytest.raises(ValueError, match="extend_seq_lens|seq_lens"):
            cupy_nsa_meta.fill_draft_extend_metadata_fused_simple(extend, seq, case.topk)
        return
    expanded, clamped = cupy_nsa_meta.fill_draft_extend_metadata_fused_simple(
        extend, seq, case.topk
    )
    assert expanded.shape == clamped.shape == (case.total,)
    rows = len(expected.expanded)
    assert torch.equal(expanded[:rows], expected.expanded)
    assert torch.equal(clamped[:rows], expected.clamped)
