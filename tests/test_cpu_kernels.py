"""The files of cuda_src/, compiled by g++: right, free of bad accesses and of races."""

from __future__ import annotations

import dataclasses

import pytest

import cpu_kernels
from cases import BY_NAME, CASES, random_batches
from cpu_kernels import HarnessError
from planted import Patch

pytestmark = pytest.mark.skipif(not cpu_kernels.has_compiler, reason="g++ is not installed")

SMALL = [case for case in CASES if (case.bs <= 300 and case.total <= 6000) or case.total < 0]
FATAL_SUMS = [case for case in CASES if case.total > 2**27]


def run_cases(executable, cases, use_adaptive=True):
    jobs = [cpu_kernels.draft_extend_job(case, use_adaptive) for case in cases]
    for case, buffers in zip(cases, cpu_kernels.run(executable, jobs), strict=True):
        cpu_kernels.check_draft_extend(case, case.expected(), buffers)


def test_quads_need_aligned_outputs():
    """16-byte stores to the unaligned outputs of a case would be seen by the sanitizer."""
    case = BY_NAME["quads_unaligned"]
    aligned = dataclasses.replace(case, offsets=(0, 0))
    (kernel, _), *_ = cpu_kernels.draft_extend_job(aligned).launches
    assert kernel.endswith("_quads")
    assert cpu_kernels.draft_extend_job(case).launches[0][0] == kernel.removesuffix("_quads")
    job = dataclasses.replace(
        cpu_kernels.draft_extend_job(case),
        args=cpu_kernels.draft_extend_job(aligned).args,
        launches=cpu_kernels.draft_extend_job(aligned).launches,
    )
    with pytest.raises(HarnessError, match="misaligned"):
        cpu_kernels.run(cpu_kernels.build("address", stem="draft_extend"), [job])


def test_binary_search_everywhere():
    cases = [case for case in SMALL if case.bs <= 16]
    assert len(cases) > 20
    run_cases(cpu_kernels.build("plain", stem="draft_extend"), cases, use_adaptive=False)


def test_a_captured_launch_counts_its_epochs():
    """The word that a graph writes carries the count of its launches, which wraps past 29 bits."""
    case = BY_NAME["bs_33"]
    for name in ("contract", "bs_33", "bs_4097", "bs_16385", "negative_extend"):
        case = BY_NAME[name]
        job = cpu_kernels.draft_extend_job(case, counted=True)
        (buffers,) = cpu_kernels.run(cpu_kernels.build("plain", stem="draft_extend"), [job])
        cpu_kernels.check_draft_extend(case, case.expected(), buffers)
        assert buffers[cpu_kernels.COUNT] == cpu_kernels.EPOCH.to_bytes(4, "little")
    job.buffers[cpu_kernels.COUNT].data = (2**29 - 1).to_bytes(4, "little")
    (buffers,) = cpu_kernels.run(cpu_kernels.build("plain", stem="draft_extend"), [job])
    assert buffers[cpu_kernels.COUNT] == (1).to_bytes(4, "little")
    assert int.from_bytes(buffers[cpu_kernels.RESULT], "little") >> 35 == 1


def test_random_batches_under_address_sanitizer():
    run_cases(cpu_kernels.build("address", stem="draft_extend"), random_batches(60, seed=20))


def test_device_data_that_points_nowhere_writes_nothing():
    """A launch without result and out_total (null pointers) is legal: total_tokens= uses it."""
    case = BY_NAME["total_given"]
    job = cpu_kernels.draft_extend_job(case)
    args = bytearray(job.args)
    kept = [p for p in job.pointers if p[1] not in (cpu_kernels.OUT_TOTAL, cpu_kernels.RESULT)]
    for at, *_ in set(job.pointers) - set(kept):
        args[at : at + 8] = bytes(8)
    job = dataclasses.replace(job, args=bytes(args), pointers=kept)
    (buffers,) = cpu_kernels.run(cpu_kernels.build("address", stem="draft_extend"), [job])
    assert buffers[cpu_kernels.OUT_TOTAL] == buffers[cpu_kernels.RESULT] == b"\x55" * 8
    assert buffers[cpu_kernels.EXPANDED][:4] == int(case.expected().expanded[0]).to_bytes(
        4, "little"
    )


# ---- Planted faults: a check that cannot fail is not one ---------------------------------------


@pytest.mark.parametrize(
    ("sanitizer", "case", "patch", "report"),
    [
        pytest.param(
            "thread",
            "bs_33",
            Patch("common.cuh", "  __syncthreads();\n  BlockSums sums;", "  BlockSums sums;"),
            "data race",
            id="removed_barrier_of_the_block_sums",
        ),
        pytest.param(
            "thread",
            "bs_4097",
            Patch(
                "draft_extend.cu",
                "  __syncthreads();\n  const u32 total = scan_entries",
                "  const u32 total = scan_entries",
            ),
            "data race",
            id="removed_barrier_before_the_scan",
        ),
        pytest.param(
            "thread",
            "bs_1025",
            Patch("common.cuh", "  __syncthreads();\n  const u32 word = lane", "  const u32 word = lane"),
            "data race",
            id="removed_barrier_of_the_sums_before_warps",
        ),
        pytest.param(
            "address",
            "quads_exact",
            Patch(
                "draft_extend.cu",
                "if (!whole && row < range.end) store_row",
                "if (!whole) store_row",
            ),
            "heap-buffer-overflow",
            id="store_past_the_end",
        ),
        pytest.param(
            "address",
            "bs_17",
            Patch("draft_extend.cu", "exists = lane < args.bs;", "exists = lane <= args.bs;"),
            "heap-buffer-overflow",
            id="load_past_the_end",
        ),
    ],
)  # fmt: skip
def test_sanitizers_catch_planted_faults(sanitizer, case, patch, report):
    executable = cpu_kernels.build(sanitizer, patch)
    with pytest.raises(HarnessError, match=report):
        run_cases(executable, [BY_NAME[case]])


@pytest.mark.parametrize(
    ("case", "patch"),
    [
        pytest.param(
            "bs_128",
            Patch("draft_extend.cu", "if (sums.warp_ends[w] <= row) {", "if (sums.warp_ends[w] < row) {"),
            id="search_one_row_late",
        ),
        pytest.param(
            "padding_rows",
            Patch("draft_extend.cu", "expanded = max(tokens, 0)", "expanded = tokens"),
            id="no_clamp_at_zero",
        ),
        pytest.param(
            "total_given",
            Patch("draft_extend.cu", "? 1u << ahead : 0", "? 2u << ahead : 0"),
            id="end_of_a_request_one_row_late",
        ),
        pytest.param(
            "sum_wraps_block",
            Patch("common.cuh", "bad |= all_sums >> 31;", "bad |= 0 & all_sums;"),
            id="sum_that_wraps",
        ),
        pytest.param(
            "sum_wraps",
            Patch("common.cuh", "warp_sum(low) > kInt32Max ? kMarkedOutside : sum", "sum"),
            id="sum_of_a_warp_that_wraps",
        ),
        pytest.param(
            "sum_wraps_group",
            Patch("draft_extend.cu", "    sums |= front | back | (front + back);\n", ""),
            id="sum_of_a_group_that_wraps",
        ),
        pytest.param(
            "seq_outside_grouped",
            Patch("draft_extend.cu", "      words.seqs |= seq_quads[k].outside_int32();\n", ""),
            id="kv_length_of_a_group_outside_int32",
        ),
        pytest.param(
            "extend_outside_grouped",
            Patch("draft_extend.cu", "highs |= high_words;", "highs |= 0 & high_words;"),
            id="high_word_of_a_group",
        ),
        pytest.param(
            "negative_grouped",
            Patch("common.cuh", "  if (word == kMarkedNegative) marks.signs = -1;\n", ""),
            id="negative_length_in_another_warp",
        ),
        pytest.param(
            "over_capacity",
            Patch("draft_extend.cu", "if (total <= least + range) return total;", "return min(total, least + range);"),
            id="no_capacity_check",
        ),
    ],
)  # fmt: skip
def test_cases_catch_planted_mistakes(case, patch):
    executable = cpu_kernels.build("plain", patch)
    with pytest.raises(AssertionError, match=case):
        run_cases(executable, [BY_NAME[case]])
