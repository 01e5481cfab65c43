"""cuda_src/fused.cu, compiled by g++: right, free of bad accesses and of races."""

from __future__ import annotations

import pytest

import cpu_kernels
from cpu_kernels import HarnessError, fused_call
from cupy_nsa_meta import reference_fused
from fused_cases import BY_NAME, CASES, FUNCTIONS, case, random_cases
from operations import OPERATIONS
from planted import Patch

pytestmark = pytest.mark.skipif(not cpu_kernels.has_compiler, reason="g++ is not installed")


def run_cases(executable, cases, tiled=False, num_sms=None):
    items = [cpu_kernels.fused_job(case, tiled, num_sms=num_sms) for case in cases]
    results = cpu_kernels.run(executable, [item.job for item in items])
    for item, buffers in zip(items, results, strict=True):
        cpu_kernels.check_fused(item, buffers)


def run_cut_up_both_ways(executable, item):
    """With several items of a row for a thread, and with one."""
    for num_sms in (None, 132):
        run_cases(executable, [item], num_sms=num_sms)


def random_batches(seed):
    return [
        item for op in FUNCTIONS for item in random_cases(op, 12, seed, max_bs=12, max_width=400)
    ]


def test_named_cases_in_the_two_launch_form():
    run_cases(cpu_kernels.build("plain", stem="fused"), CASES, tiled=True)


@pytest.mark.parametrize("sanitizer", ["plain", "address"])
def test_table_blocks_of_a_device_with_many_multiprocessors(sanitizer):
    """A thread has one item of a row then, and a table more blocks than one."""
    cases = [case for case in CASES if fused_call(case).bs <= 40]
    run_cases(cpu_kernels.build(sanitizer, stem="fused"), cases, num_sms=132)


@pytest.mark.parametrize("num_sms", [1, 2, 132])
def test_many_blocks_of_a_row(num_sms):
    """Of which a thread takes four items, two, or one."""
    cases = [
        case("decode", "long", "9 blocks", [9001], width=9001, token_width=9004),
        case("verify", "longer", "13 blocks", [12_300, 4000], next_n=2, width=12_300),
        case("draft_extend", "longer", "13 blocks", [700, 12_300], (3, 2), width=12_300),
    ]
    run_cases(cpu_kernels.build("plain", stem="fused"), cases, num_sms=num_sms)


def test_a_total_that_only_bounds_the_rows():
    cases = [case for case in CASES if case.op in ("draft_extend", "extend")]
    items = [cpu_kernels.fused_job(case, total_is_capacity=True) for case in cases]
    results = cpu_kernels.run(
        cpu_kernels.build("plain", stem="fused"), [item.job for item in items]
    )
    for item, buffers in zip(items, results, strict=True):
        cpu_kernels.check_fused(item, buffers)
    by_name = {item.case.name: int(reference_fused.metadata(item.call)) for item in items}
    assert by_name["draft_extend_total_long"] == 0
    assert by_name["draft_extend_total_short"] == 4
    assert by_name["draft_extend_extend_negative"] == 2


def test_two_launch_form_under_address_sanitizer():
    names = ["draft_extend_bs_600", "extend_bs_257", "extend_flattened_unaligned", "decode_empty"]
    run_cases(
        cpu_kernels.build("address", stem="fused"), [BY_NAME[name] for name in names], tiled=True
    )


def test_two_launch_form_under_thread_sanitizer():
    names = OPERATIONS["fused"].race_cases
    run_cases(
        cpu_kernels.build("thread", stem="fused"), [BY_NAME[name] for name in names], tiled=True
    )


def test_random_batches_under_address_sanitizer():
    run_cases(cpu_kernels.build("address", stem="fused"), random_batches(21))
    run_cases(cpu_kernels.build("address", stem="fused"), random_batches(22), num_sms=132)


# ---- Planted faults: a check that cannot fail is not one ----------------------------------------


@pytest.mark.parametrize(
    ("sanitizer", "case", "old", "new", "report"),
    [
        pytest.param(
            "thread", "draft_extend_bs_257",
            "    shared.clipped_before[kRequestsPerTile] = upto.clipped;\n  }\n  __syncthreads();",
            "    shared.clipped_before[kRequestsPerTile] = upto.clipped;\n  }",
            "data race", id="removed_barrier_before_the_rows",
        ),
        pytest.param(
            "thread", "decode_bs_257",
            "    if (lane == 0) shared.warp_before[warp] = before;\n  }\n  __syncthreads();",
            "    if (lane == 0) shared.warp_before[warp] = before;\n  }",
            "data race", id="removed_barrier_in_the_scan",
        ),
        pytest.param(
            "thread", "draft_extend_tables_bs_40_long",
            "warp_sums[threadIdx.x / kWarpThreads] = warp_total;\n  __syncthreads();",
            "warp_sums[threadIdx.x / kWarpThreads] = warp_total;",
            "data race", id="removed_barrier_in_the_sum_of_warps",
        ),
        pytest.param(
            "thread", "draft_extend_bs_33",
            "shared.unusual[warp] = is_unusual ? 1 : 0;\n      }\n      __syncthreads();",
            "shared.unusual[warp] = is_unusual ? 1 : 0;\n      }",
            "data race", id="removed_barrier_of_the_direct_sums",
        ),
        pytest.param(
            "thread", "draft_extend_tables_bs_40",
            "warp_sums[thread / kWarpThreads] = sum;\n      __syncthreads();",
            "warp_sums[thread / kWarpThreads] = sum;",
            "data race", id="removed_barrier_in_the_direct_sum_of_warps",
        ),
        pytest.param(
            "address", "draft_extend_total_short",
            "total - least_total > total_len - least_total", "total < least_total",
            "heap-buffer-overflow", id="direct_rows_past_total_len",
        ),
        pytest.param(
            "address", "decode_outside_pool",
            "static_cast<u32>(pool.low) < static_cast<u32>(args.pool_rows)", "true",
            "heap-buffer-overflow|SEGV", id="direct_request_outside_the_pool",
        ),
        pytest.param(
            "address", "decode_over_width",
            "min(max(min(seq_cut, width) + args.kv_add, 0), width)", "max(seq_cut + args.kv_add, 0 * width)",
            "heap-buffer-overflow", id="direct_kv_over_the_width",
        ),
        pytest.param(
            "address", "draft_extend_total_short",
            "rows.count = min(rows.count, args.total_len - row_begin);", "",
            "heap-buffer-overflow", id="direct_table_rows_past_total_len",
        ),
        pytest.param(
            "address", "decode_unaligned", "shift == 0 && (args.flags & kHasVectors) != 0", "shift == 0",
            "misaligned", id="direct_vector_store_to_unaligned_memory",
        ),
        pytest.param(
            "address", "extend_outside_pool",
            "if (pool < 0 || pool >= args.pool_rows)", "if (pool < 0)",
            "heap-buffer-overflow|SEGV", id="request_outside_the_pool",
        ),
        pytest.param(
            "address", "extend_over_width",
            "static_cast<u32>(min(kv, static_cast<i64>(width)))",
            "static_cast<u32>(max(kv, static_cast<i64>(width)))",
            "heap-buffer-overflow", id="kv_over_the_width",
        ),
        pytest.param(
            "address", "draft_extend_total_short_long",
            "static_cast<int>(min(static_cast<i64>(q), args.total_len - row_begin))", "q",
            "heap-buffer-overflow", id="table_rows_past_total_len",
        ),
        pytest.param(
            "address", "draft_extend_total_short",
            "min(row_end, total_len) - row_begin", "row_end - row_begin",
            "heap-buffer-overflow", id="rows_past_total_len",
        ),
        pytest.param(
            "address", "extend_flattened_short",
            "items = min(items, static_cast<u32>(min(room, kInt32Max)));", "",
            "heap-buffer-overflow", id="tokens_past_the_flattened_table",
        ),
        pytest.param(
            "address", "extend_unaligned", "shift == 0 && misaligned == 0", "shift == 0 && misaligned < 16",
            "misaligned", id="vector_store_to_unaligned_memory",
        ),
        pytest.param(
            "address", "verify_rows_unaligned_long",
            "(row.num_rows > 1 ? static_cast<u64>(row.stride) * sizeof(int) : 0)", "0",
            "misaligned", id="second_row_unaligned",
        ),
    ],
)  # fmt: skip
def test_sanitizers_catch_planted_faults(sanitizer, case, old, new, report):
    executable = cpu_kernels.build(sanitizer, Patch("fused.cu", old, new))
    with pytest.raises(HarnessError, match=report):
        run_cases(executable, [BY_NAME[case]])


@pytest.mark.parametrize(
    ("case", "old", "new"),
    [
        pytest.param("decode_bs_257", "if (w == warp) before_warp", "if (w == 0) before_warp", id="scan_without_the_warps_before"),
        pytest.param("verify_bs_257", "tile_before = add(tile_before, shared.warp_before[w]);", ";",
                     id="tile_without_what_lies_before"),
        pytest.param("extend_kv_below_extend", "max(first + j, static_cast<Int>(0))", "(first + j)",
                     id="no_clamp_at_zero"),
        pytest.param("draft_extend_kv_in_extend", "int expanded = max(first + j, 0);", "int expanded = first + j;",
                     id="direct_no_clamp_at_zero"),
        pytest.param("decode_bs_33", "if (w == warp) {", "if (w == 0) {", id="direct_warp_without_those_before"),
        pytest.param("verify_sum_outside", "bool is_unusual = unusual != 0",
                     "bool is_unusual = (unusual & 0) != 0", id="direct_sum_that_wraps"),
        pytest.param("decode_negative", "bool is_unusual = unusual != 0",
                     "bool is_unusual = (unusual & 0) != 0", id="direct_negative_length"),
        pytest.param("extend_bs_33", "i64 rise_end = min(max(topk - first, rise_begin), count)", "i64 rise_end = count",
                     id="series_that_passes_topk"),
        pytest.param("draft_extend_topk_inside_short", "int rise_end = min(max(topk - first, rise_begin), count)",
                     "int rise_end = count", id="direct_series_that_passes_topk"),
        pytest.param("decode_sum_outside", "static_cast<int>(value < 0 ? kInt32Min : kInt32Max)",
                     "static_cast<int>(static_cast<u32>(value))", id="sum_that_wraps"),
        pytest.param("extend_small_sum_of_warps", "if (w < warp) before", "if (w <= warp) before",
                     id="large_scan_shifted_by_a_warp"),
        pytest.param("extend_small_beyond", "< kSmall;", "< 4 * kSmall;", id="sum_of_a_warp_that_wraps"),
        pytest.param("extend_small_negative", "(sums.kv | sums.q | sums.clipped) >= 0 &&", "",
                     id="negative_length_taken_for_a_small_one"),
        pytest.param("extend_small_clipped_request", "(sums.kv | sums.q | sums.clipped) < kSmall", "(sums.kv | sums.q) < kSmall",
                     id="clipped_sum_taken_for_a_small_one"),
        pytest.param("extend_small_sum_of_warps", "marks |= tile_total.kv | ", "marks |= ",
                     id="sum_over_warps_that_wraps"),
        pytest.param("extend_small_clipped_sum", "tile_total.q | tile_total.clipped |", "tile_total.q |",
                     id="clipped_sum_over_warps_that_wraps"),
        pytest.param("extend_small_beyond", " | shared.warp_marks[w];", ";", id="warp_that_is_not_small"),
        pytest.param("extend_small_sum_of_tiles", "static_cast<u64>(ends) <= kInt32Max", "static_cast<u64>(ends) <= ~0ull",
                     id="sum_over_tiles_that_wraps"),
        pytest.param("extend_padded_cut", "row_begin <= total_len && total_len < row_end", "false",
                     id="no_padding_behind_a_cut"),
        pytest.param("verify_aligned", "reinterpret_cast<int4*>(out)[k * kBlockThreads] = values[k];\n      }\n      out += row.stride;",
                     "reinterpret_cast<int4*>(out)[k * kBlockThreads] = values[k];\n      }", id="one_row_written_n_times"),
        pytest.param("draft_extend_total_long", "row_end != total_len) meet(&status, kTotalMismatch)", "false) meet(&status, 0)",
                     id="mismatch_not_reported"),
        pytest.param("extend_outside_pool",
                     "if (block == 0 && threadIdx.x == 0) atomicMax(args.status, kRequestOutsidePool);", "",
                     id="request_outside_the_pool_not_reported"),
        pytest.param("decode_outside_pool",
                     "if (block_first == 0 && thread == 0) atomicMax(args.status, kRequestOutsidePool);", "",
                     id="direct_request_outside_the_pool_not_reported"),
        pytest.param("draft_extend_tables_bs_40", "other < request ? query", "other <= request ? query",
                     id="direct_rows_shifted_by_a_request"),
        pytest.param("verify_wide", "(threadIdx.x / kWarpThreads) * blocks * kWarpThreads", "(threadIdx.x / kWarpThreads) * kWarpThreads",
                     id="chunks_of_a_row_left_out"),
        pytest.param("draft_extend_wide_unaligned", "(by_warps ? kWarpThreads : per", "(by_warps ? 2 * kWarpThreads : per",
                     id="block_gone_before_its_first_chunk"),
        pytest.param("extend_empty", "      if (args.cu_seqlens_q != nullptr) args.cu_seqlens_q[0] = 0;\n", "",
                     id="first_element_forgotten"),
    ],
)  # fmt: skip
def test_cases_catch_planted_mistakes(case, old, new):
    executable = cpu_kernels.build("plain", Patch("fused.cu", old, new))
    with pytest.raises(AssertionError, match=case):
        run_cut_up_both_ways(executable, BY_NAME[case])
