"""The fused family without a GPU: the reference against numbers, an oracle and laws; every error."""

from __future__ import annotations

import contextlib
import gc
import inspect
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cupy_nsa_meta
from cases import POISON
from cpu_kernels import fused_call, fused_packed
from cupy_nsa_meta import _check, _fused_args, _launch, _module, fused
from cupy_nsa_meta._status import INT32_MAX
from fake_device import FUSED_OPS, FakeDriverError, forget_fused_calls
from fused_cases import (
    BY_NAME,
    CASES,
    FUNCTIONS,
    LARGE_CASES,
    Built,
    case,
    expected,
    naive,
    random_cases,
)


@pytest.fixture(autouse=True)
def no_status_from_before():
    cupy_nsa_meta.last_status("cpu")


# ---- The reference ------------------------------------------------------------------------------

HAND_WRITTEN = {
    "decode_basic_ps64": {
        "cache_seqlens": [1, 7, 65, 513],
        "cu_seqlens_k": [0, 1, 8, 73, 586],
        "dsa_cache_seqlens": [1, 7, 64, 64],
        "dsa_cu_seqlens_k": [0, 1, 8, 72, 136],
    },
    "verify_padding_rows": {
        "cache_seqlens": [104, 5, 5],
        "cu_seqlens_k": [0, 104, 109, 114],
        "seqlens_expanded": [101, 102, 103, 104, 2, 3, 4, 5, 2, 3, 4, 5],
        "dsa_cu_seqlens_k": [0, 101, 203, 306, 410, 412, 415, 419, 424, 426, 429, 433, 438],
    },
    "draft_extend_padding_rows": {
        "cache_seqlens": [100, 1, 1],
        "seqlens_expanded": [97, 98, 99, 100, 0, 0, 0, 1, 0, 0, 0, 1],
        "dsa_cache_seqlens": [97, 98, 99, 99, 0, 0, 0, 1, 0, 0, 0, 1],
        "dsa_cu_seqlens_k": [0, 97, 195, 294, 393, 393, 393, 393, 394, 394, 394, 394, 395],
    },
    "draft_extend_total_short": {
        "cache_seqlens": [50, 60, 70],
        "cu_seqlens_k": [0, 50, 110, 180],
        "seqlens_expanded": [48, 49, 50, 56, 57, 58],
    },
    "draft_extend_static_total_16": {"seqlens_expanded": [0, 0, 1, 5, 6, 7, 63, 64, 65, 511, 512, 513]},
    "draft_extend_static_total_8": {"seqlens_expanded": [0, 0, 1, 5, 6, 7, 63, 64]},
    "draft_extend_kv_below_extend": {
        "seqlens_expanded": [0, 0, 0, 0, 0, 1, 2, 3, 0, 0, 0, 1, 2, 3, 4, 5, 0, 0],
        "cu_seqlens_k": [0, 3, 8, 4],
    },
    "extend_contract": {
        "cache_seqlens": [10, 4],
        "cu_seqlens_k": [0, 10, 14],
        "cu_seqlens_q": [0, 3, 5],
        "extend_start_loc": [0, 3],
        "seqlens_expanded": [8, 9, 10, 3, 4],
        "dsa_cache_seqlens": [8, 9, 10, 3, 4],
        "dsa_cu_seqlens_k": [0, 8, 17, 27, 30, 34],
        "token_to_batch_idx": [0, 0, 0, 1, 1],
        "ks": [0, 0, 0, 10, 10],
        "ke": [8, 9, 10, 13, 14],
        "topk_indices_offset": [0, 0, 0, 10, 10],
        "positions": [7, 8, 9, 2, 3],
    },
    "extend_padded": {
        "dsa_cache_seqlens": [6, 6, 6, 3, 4, 0, 0, 0, 0],
        "dsa_cu_seqlens_k": [0, 6, 12, 18, 21, 25, 25, 25, 25, 25],
        "seqlens_expanded": [8, 9, 10, 3, 4],
    },
    "extend_padded_cut": {
        "dsa_cache_seqlens": [8, 9, 10, 34, 35, 36, 0, 0, 0, 0, 0],
        "dsa_cu_seqlens_k": [0, 8, 17, 27, 61, 96, 132, 132, 132, 132, 132, 132],
    },
    "extend_empty_padded": {"dsa_cache_seqlens": [0] * 5, "dsa_cu_seqlens_k": [0] * 6, "cu_seqlens_k": [0]},
    "extend_no_rows": {"cache_seqlens": [7, 8, 9], "cu_seqlens_q": [0] * 4, "dsa_cu_seqlens_k": [0]},
    "decode_sum_outside": {"cu_seqlens_k": [0, 2**30, INT32_MAX, INT32_MAX, 2**30 + 7]},
    "decode_seq_outside": {"cache_seqlens": [5, INT32_MAX, -(2**31)]},
    "verify_sum_outside": {
        "cache_seqlens": [INT32_MAX, 7],
        "seqlens_expanded": [INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX, 4, 5, 6, 7],
    },
    "decode_negative": {
        "cache_seqlens": [5, -7, 9],
        "cu_seqlens_k": [0, 5, -2, 7],
        "dsa_cache_seqlens": [5, 0, 9],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written_numbers(name):
    built = Built(BY_NAME[name])
    built.run()
    for array, numbers in HAND_WRITTEN[name].items():
        out = built.arguments[array]
        assert out.tolist() == numbers + [POISON] * (len(out) - len(numbers)), array


def test_hand_written_page_tables():
    tokens = torch.arange(4 * 10, dtype=torch.int32).view(4, 10)
    page_1 = torch.full((3, 7), -1, dtype=torch.int32)
    real = torch.full((3, 4), -1, dtype=torch.int32)
    one = torch.full((4,), -1, dtype=torch.int32)
    flattened = torch.full((12,), -1, dtype=torch.int32)
    cupy_nsa_meta.fused_dsa_extend_metadata(
        torch.tensor([3, 9]), torch.tensor([1, 1]), torch.tensor([2, 1]), tokens, total_len=2,
        dsa_index_topk=8, max_seqlen_k=6, physical_page_size=2, cache_seqlens=one,
        page_table_1=page_1, real_page_table=real, page_table_1_flattened=flattened,
    )  # fmt: skip
    assert page_1.tolist() == [[20, 21, 22, -1, -1, -1, -1], [10, 11, 12, 13, 14, 15, -1], [-1] * 7]
    assert real.tolist() == [[10, 11, -1, -1], [5, 6, 7, -1], [-1] * 4]
    assert flattened.tolist() == [20, 21, 22, 10, 11, 12, 13, 14, 15, 16, 17, 18]


def test_width_defaults_to_what_every_table_holds():
    tokens = torch.arange(40, dtype=torch.int32).view(4, 10)
    real = torch.full((1, 3), -1, dtype=torch.int32)
    cupy_nsa_meta.fused_dsa_extend_metadata(
        torch.tensor([10]), torch.tensor([1]), torch.tensor([1]), tokens, total_len=1,
        dsa_index_topk=8, physical_page_size=2, real_page_table=real,
    )  # fmt: skip
    assert real.tolist() == [[5, 6, 7]]


@pytest.mark.parametrize("item", CASES, ids=lambda item: item.name)
def test_reference_equals_the_oracle(item):
    built = Built(item)
    built.run()
    built.check(naive(item))
    assert cupy_nsa_meta.last_status("cpu") == item.status


@pytest.mark.parametrize(
    "item", [item for item in LARGE_CASES if "bs_1024" in item.name or "prefill" in item.name],
    ids=lambda item: item.name,
)  # fmt: skip
def test_reference_equals_the_oracle_large(item):
    built = Built(item)
    built.run()
    built.check(naive(item))


@pytest.mark.parametrize("op", FUNCTIONS)
def test_reference_equals_the_oracle_on_random_batches(op):
    for item in random_cases(op, 60, seed=3, max_bs=60):
        built = Built(item)
        built.run()
        built.check(naive(item))


batches = st.lists(st.tuples(st.integers(-5, 300), st.integers(0, 9)), min_size=1, max_size=20)


def arrays(item):
    built = Built(item)
    built.run()
    return built.arguments


@given(batches, st.integers(1, 60), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_laws(batch, topk, next_n):
    seq, extend = [s for s, _ in batch], [q for _, q in batch]
    options = {"topk": topk, "width": 96, "slack": 0, "page_size": 16}
    decode = arrays(case("decode", "law", "", seq, **options))
    verify = arrays(case("verify", "law", "", seq, next_n=next_n, **options))
    same = arrays(
        case("draft_extend", "law", "", [s + next_n for s in seq], [next_n] * len(seq), **options)
    )
    ones = arrays(case("draft_extend", "law", "", seq, [1] * len(seq), **options))
    prefill = arrays(case("extend", "law", "", seq, extend, **options))

    # verify(s, N) == draft_extend(s + N, N); decode(s) == draft_extend(s, 1)
    for left, right in ((verify, same), (decode, ones)):
        for name in left.keys() & right.keys() - {"seq_lens", "bs"}:
            if isinstance(left[name], torch.Tensor) and left[name].shape == right[name].shape:
                assert torch.equal(left[name], right[name]), name
    for out in (decode, verify, prefill):
        for cu, of in (
            ("cu_seqlens_k", "cache_seqlens"),
            ("dsa_cu_seqlens_k", "dsa_cache_seqlens"),
        ):
            assert out[cu][0] == 0
            assert torch.equal(out[cu].diff(), out[of])
    assert torch.equal(prefill["ke"] - prefill["ks"], prefill["seqlens_expanded"])
    assert prefill["cu_seqlens_q"].diff().tolist() == extend
    assert torch.equal(prefill["cu_seqlens_q"][:-1], prefill["extend_start_loc"])
    owner = prefill["token_to_batch_idx"].to(torch.int64)
    assert torch.equal(prefill["ks"], prefill["cu_seqlens_k"][owner])
    last = prefill["positions"][prefill["cu_seqlens_q"][1:][torch.tensor(extend) > 0].long() - 1]
    assert last.tolist() == [s - 1 for s, q in batch if q]


@pytest.mark.parametrize("name", [item.name for item in CASES if item.static])
def test_static_extend_len_changes_no_result(name):
    item = BY_NAME[name]
    plain, static = Built(item), Built(item)
    FUNCTIONS["draft_extend"](**plain.arguments | {"static_extend_len": False})
    static.run()
    static.check(plain.allocations)
    assert cupy_nsa_meta.last_status("cpu") == item.status


def test_stale_tails_of_a_larger_batch_stay():
    large, small = Built(BY_NAME["decode_aligned"]), Built(BY_NAME["decode_aligned"])
    large.run()
    small.run()
    small.arguments |= {"bs": 2, "seq_lens": torch.tensor([3, 4])}
    small.run()
    table, before = small.arguments["page_table_1"], large.arguments["page_table_1"]
    assert torch.equal(table, before)  # the same tokens: nothing behind them has moved
    assert small.arguments["cache_seqlens"][:6].tolist() == [3, 4, 6, 303, 100, POISON]


def test_seqlens_expand():
    extend = torch.tensor([3, 0, 2], dtype=torch.int32)
    seq = torch.tensor([10, 5, 1])
    result = cupy_nsa_meta.seqlens_expand(extend, seq, 5, 3)
    assert result.dtype == torch.int32
    assert result.tolist() == [8, 9, 10, 0, 1]
    assert cupy_nsa_meta.seqlens_expand(extend, seq, 7, 3).tolist() == [8, 9, 10, 0, 1, 0, 0]
    assert cupy_nsa_meta.last_status("cpu") == 4
    assert cupy_nsa_meta.seqlens_expand(extend[:0], seq[:0], 0, 0).tolist() == []


# ---- Status -------------------------------------------------------------------------------------


def test_last_status_is_sticky_and_the_largest_wins():
    Built(BY_NAME["decode_outside_pool"]).run()
    Built(BY_NAME["decode_seq_outside"]).run()
    Built(BY_NAME["decode_basic_ps64"]).run()
    assert cupy_nsa_meta.last_status("cpu", reset=False) == 5
    assert cupy_nsa_meta.last_status(torch.device("cpu")) == 5
    assert cupy_nsa_meta.last_status("cpu") == 0


MESSAGES = {
    "decode_outside_pool": r"req_pool_indices\[1\]: expected a row of req_to_token in \[0, 7\), got -1",
    "draft_extend_total_short": r"total_len: expected sum\(extend_seq_lens\) = 12, got 6; rows \[0, 6\)",
    "draft_extend_static_total_16": r"total_len: expected sum\(extend_seq_lens\) = 12, got 16; rows \[0, 12\)",
    "draft_extend_extend_negative": r"extend_seq_lens\[1\]: expected >= 0, got -5",
    "decode_seq_outside": r"seq_lens\[1\]: expected a value within int32, got 2147483648",
    "decode_sum_outside": r"expected sums within int32.*add up to 1073741831",
    "extend_flattened_short": r"page_table_1_flattened: expected room for sum\(seq_lens\) = 99 tokens, got capacity 70",
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_debug_sync_raises(name, monkeypatch):
    monkeypatch.setenv("CUPY_NSA_META_DEBUG_SYNC", "1")
    with pytest.raises(ValueError, match=MESSAGES[name]):
        Built(BY_NAME[name]).run()
    assert cupy_nsa_meta.last_status("cpu") == 0


def test_debug_sync_passes_good_batches(monkeypatch):
    monkeypatch.setenv("CUPY_NSA_META_DEBUG_SYNC", "1")
    Built(BY_NAME["verify_basic_ps64"]).run()
    assert cupy_nsa_meta.last_status("cpu") == 0


# ---- Errors -------------------------------------------------------------------------------------


def changed(**changes):
    """Replace arguments; callables get what is there."""

    def change(given):
        return {name: v(given) if callable(v) else v for name, v in changes.items()}

    return change


def overlap_with(out, other):
    def change(given):
        memory = given[other]
        while memory.dim() > 1:
            memory = memory[0]
        return {out: memory.view(torch.int32)[: given[out].numel()]}

    return change


def interleaved_tables(given):
    wide = torch.zeros((4, 769 + 13), dtype=torch.int32)
    return {"page_table_1": wide[:, :769], "real_page_table": wide[:, 768:781]}


ERRORS = {
    # name: (op, change, error type, message)
    "seq_type": ("decode", changed(seq_lens=[1, 2]), TypeError, "seq_lens: expected a torch.Tensor, got list"),
    "seq_dtype": ("decode", changed(seq_lens=lambda g: g["seq_lens"].float()), TypeError,
                  "seq_lens: expected dtype torch.int32 or torch.int64, got torch.float32"),
    "seq_dim": ("decode", changed(seq_lens=lambda g: g["seq_lens"][None]), ValueError,
                "seq_lens: expected a 1-D tensor, got shape"),
    "seq_short": ("decode", changed(seq_lens=lambda g: g["seq_lens"][:3]), ValueError,
                  "seq_lens: expected [>= 4] (bs), got [3]"),
    "pool_short": ("verify", changed(req_pool_indices=lambda g: g["req_pool_indices"][:3]), ValueError,
                   "req_pool_indices: expected [>= 4] (bs), got [3]"),
    "extend_short": ("draft_extend", changed(extend_seq_lens=lambda g: g["extend_seq_lens"][:3]), ValueError,
                     "extend_seq_lens: expected [>= 4] (bs), got [3]"),
    "pool_none": ("decode", changed(req_pool_indices=None), TypeError,
                  "req_pool_indices: expected a torch.Tensor, got None"),
    "out_none": ("draft_extend", changed(seqlens_expanded=None), TypeError,
                 "seqlens_expanded: expected a torch.Tensor, got None"),
    "out_type": ("decode", changed(cu_seqlens_k=[0]), TypeError,
                 "cu_seqlens_k: expected a torch.Tensor, got list"),
    "out_dtype": ("decode", changed(cache_seqlens=lambda g: g["cache_seqlens"].long()), TypeError,
                  "cache_seqlens: expected dtype torch.int32, got torch.int64"),
    "positions_dtype": ("extend", changed(positions=lambda g: g["positions"].int()), TypeError,
                        "positions: expected dtype torch.int64, got torch.int32"),
    "out_dim": ("decode", changed(cache_seqlens=lambda g: g["cache_seqlens"][None]), ValueError,
                "cache_seqlens: expected a 1-D tensor, got shape"),
    "out_strided": ("decode", changed(cache_seqlens=lambda g: torch.zeros(20, dtype=torch.int32)[::2]),
                    ValueError, "cache_seqlens: expected a contiguous tensor, got stride 2"),
    "cache_short": ("decode", changed(cache_seqlens=lambda g: g["cache_seqlens"][:3]), ValueError,
                    "cache_seqlens: expected [>= 4], got [3]"),
    "cu_short": ("decode", changed(cu_seqlens_k=lambda g: g["cu_seqlens_k"][:4]), ValueError,
                 "cu_seqlens_k: expected [>= 5], got [4]"),
    "rows_short": ("verify", changed(seqlens_expanded=lambda g: g["seqlens_expanded"][:15]), ValueError,
                   "seqlens_expanded: expected [>= 16], got [15]"),
    "rows_cu_short": ("draft_extend", changed(dsa_cu_seqlens_k=lambda g: g["dsa_cu_seqlens_k"][:11]), ValueError,
                      "dsa_cu_seqlens_k: expected [>= 12], got [11]"),
    "padding_short": ("extend", changed(pad_to=60), ValueError,
                      "dsa_cache_seqlens: expected [>= 60], got [16]"),
    "mqa_short": ("verify", changed(paged_mqa_ctx_lens_2d=lambda g: g["paged_mqa_ctx_lens_2d"][:, :3]),
                  ValueError, "paged_mqa_ctx_lens_2d: expected [>= 4, >= 4] (columns: next_n), got [4, 3]"),
    "table_type": ("decode", changed(page_table_1=7), TypeError, "page_table_1: expected a torch.Tensor, got int"),
    "table_dtype": ("decode", changed(page_table_1=lambda g: g["page_table_1"].long()), TypeError,
                    "page_table_1: expected dtype torch.int32, got torch.int64"),
    "table_dim": ("decode", changed(page_table_1=lambda g: g["page_table_1"][0]), ValueError,
                  "page_table_1: expected a 2-D tensor, got shape [769]"),
    "table_rows": ("draft_extend", changed(page_table_1=lambda g: g["page_table_1"][:10]), ValueError,
                   "page_table_1: expected [>= 11, >= 769] (columns: max_seqlen_k), got [10, 769]"),
    "table_width": ("decode", changed(max_len=770), ValueError,
                    "page_table_1: expected [>= 4, >= 770] (columns: max_len), got [5, 769]"),
    "token_width": ("decode", changed(max_len=800), ValueError,
                    "req_to_token: expected [>= 0, >= 800] (columns: max_len), got [7, 774]"),
    "real_width": ("decode", changed(real_page_table=lambda g: g["real_page_table"][:, :12]), ValueError,
                   "real_page_table: expected [>= 4, >= 13] (columns: max_len / physical_page_size), got [5, 12]"),
    "table_column_stride": ("decode", changed(
        page_table_1=lambda g: torch.zeros((5, 2000), dtype=torch.int32)[:, ::2]), ValueError,
        "page_table_1: expected column stride 1, got 2"),
    "table_row_stride": ("decode", changed(
        page_table_1=lambda g: torch.zeros(9000, dtype=torch.int32).as_strided((5, 769), (700, 1))), ValueError,
        "page_table_1: expected rows that do not overlap (row stride >= 769), got row stride 700"),
    "device": ("decode", changed(page_table_1=lambda g: g["page_table_1"].to("meta")), ValueError,
               "page_table_1: expected device cpu like seq_lens, got meta"),
    "device_all": ("decode", lambda g: {n: v.to("meta") for n, v in g.items() if isinstance(v, torch.Tensor)},
                   ValueError, "seq_lens: expected a CUDA or CPU tensor, got meta"),
    "device_1d": ("decode", changed(cache_seqlens=lambda g: g["cache_seqlens"].to("meta")), ValueError,
                  "cache_seqlens: expected device cpu like seq_lens, got meta"),
    "bs_type": ("decode", changed(bs=4.0), TypeError, "bs: expected an int >= 0, got float"),
    "bs_negative": ("verify", changed(bs=-1), ValueError, "bs: expected an int >= 0, got -1"),
    "bs_times_n": ("verify", changed(next_n=2**30), ValueError, "bs: expected an int <= 1, got 4"),
    "width_negative": ("decode", changed(max_len=-1), ValueError, "max_len: expected an int >= 0, got -1"),
    "topk_zero": ("decode", changed(dsa_index_topk=0), ValueError, "dsa_index_topk: expected an int >= 1, got 0"),
    "next_n_zero": ("verify", changed(next_n=0), ValueError, "next_n: expected an int >= 1, got 0"),
    "page_size_three": ("decode", changed(physical_page_size=3), ValueError,
                        "physical_page_size: expected a power of two in [1, 256], got 3"),
    "page_size_bool": ("decode", changed(physical_page_size=True), TypeError,
                       "physical_page_size: expected an int >= 1, got bool"),
    "page_size_both": ("decode", changed(real_page_size=64), TypeError,
                       "physical_page_size, real_page_size: expected one of the two names"),
    "page_size_both_extend": ("extend", changed(real_page_size=64), TypeError,
                              "physical_page_size, real_page_size: expected one of the two names"),
    "total_over_max": ("draft_extend", changed(max_total_len=10), ValueError,
                       "total_len: expected <= 10 (max_total_len), got 11"),
    "total_over_bs": ("draft_extend", changed(max_extend_len=2), ValueError,
                      "total_len: expected <= 8 (bs 4 * max_extend_len 2), got 11"),
    "total_negative": ("draft_extend", changed(total_len=-1), ValueError,
                       "total_len: expected an int >= 0, got -1"),
    "static_type": ("draft_extend", changed(static_extend_len=1), TypeError,
                    "static_extend_len: expected a bool, got int"),
    "pad_short": ("extend", changed(pad_to=10), ValueError, "pad_to: expected an int >= 11, got 10"),
    "extend_lengths_differ": ("extend", changed(extend_seq_lens=lambda g: g["extend_seq_lens"][:3]), ValueError,
                              "extend_seq_lens: expected [4] like seq_lens, got [3]"),
    "extend_no_tokens": ("extend", changed(req_to_token=None), ValueError,
                         "page_table_1: expected req_to_token to fill it from, got None"),
    "extend_no_pool": ("extend", changed(req_pool_indices=None), ValueError,
                       "page_table_1: expected req_pool_indices to fill it from, got None"),
    "extend_total_over_int32": ("extend", changed(total_len=2**31), ValueError,
                                "total_len: expected an int <= 2147483647, got 2147483648"),
    "flattened_dtype": ("extend", changed(page_table_1_flattened=torch.zeros(9)), TypeError,
                        "page_table_1_flattened: expected dtype torch.int32, got torch.float32"),
    "overlap_outputs": ("decode", overlap_with("dsa_cache_seqlens", "cache_seqlens"), ValueError,
                        "dsa_cache_seqlens: expected memory of its own, got an overlap with cache_seqlens"),
    "overlap_input": ("decode", overlap_with("cache_seqlens", "req_to_token"), ValueError,
                      "cache_seqlens: expected memory of its own, got an overlap with req_to_token"),
    "overlap_table": ("decode", overlap_with("cache_seqlens", "page_table_1"), ValueError,
                      "page_table_1: expected memory of its own, got an overlap with cache_seqlens"),
    "overlap_tables": ("decode", changed(real_page_table=lambda g: g["page_table_1"]), ValueError,
                       "real_page_table: expected memory of its own, got an overlap with page_table_1"),
    "overlap_columns": ("decode", interleaved_tables, ValueError,
                        "real_page_table: expected memory of its own, got an overlap with page_table_1"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    op, change, error, message = ERRORS[name]
    built = Built(BY_NAME[f"{op}_basic_ps64"])
    arguments = built.arguments | change(built.arguments)
    with pytest.raises(error) as caught:
        FUNCTIONS[op](**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all((allocation == POISON).all() for allocation in built.allocations.values())


@pytest.mark.parametrize(("op", "name"), [("decode", "physical_page_size"), ("verify", "next_n"),
                                          ("draft_extend", "max_extend_len")])  # fmt: skip
def test_missing_arguments(op, name):
    arguments = Built(BY_NAME[f"{op}_basic_ps64"]).arguments
    del arguments[name]
    with pytest.raises(TypeError, match=f"{name}: expected an int, got nothing"):
        FUNCTIONS[op](**arguments)


def test_legal_layouts():
    """Interleaved tables, inputs that share memory, empty tensors with one pointer."""
    built = Built(BY_NAME["decode_basic_ps64"])
    wide = torch.full((4, 769 + 13), POISON, dtype=torch.int32)
    both = torch.stack((built.arguments["seq_lens"], built.arguments["req_pool_indices"]), 1)
    FUNCTIONS["decode"](
        **built.arguments
        | {"page_table_1": wide[:, :769], "real_page_table": wide[:, 769:]}
        | {"seq_lens": both[:, 0], "req_pool_indices": both[:, 1]}
    )
    wanted = naive(BY_NAME["decode_basic_ps64"])
    assert torch.equal(built.allocations["cu_seqlens_k"], wanted["cu_seqlens_k"])
    expected = Built(BY_NAME["decode_basic_ps64"])
    expected.run()
    assert torch.equal(wide[:, :769], expected.arguments["page_table_1"][:4])
    assert torch.equal(wide[:, 769:], expected.arguments["real_page_table"][:4])
    empty = torch.zeros(0, dtype=torch.int32)
    one = [torch.full((1,), POISON, dtype=torch.int32) for _ in range(2)]
    FUNCTIONS["decode"](
        empty,
        empty,
        empty.view(0, 0),
        empty,
        one[0],
        None,
        empty,
        one[1],
        empty.view(0, 0),
        0,
        0,
        8,
        64,
    )
    assert [int(n) for n in one] == [0, 0]


@pytest.mark.parametrize("op", FUNCTIONS)
def test_real_page_size_is_an_alias(op):
    item = BY_NAME[f"{op}_basic_ps64"]
    built = Built(item)
    arguments = dict(built.arguments)
    arguments["real_page_size"] = arguments.pop("physical_page_size")
    FUNCTIONS[op](**arguments)
    built.check(naive(item))


SIGNATURES = {
    "decode": "seq_lens req_pool_indices req_to_token cache_seqlens cu_seqlens_k page_table_1 dsa_cache_seqlens "
    "dsa_cu_seqlens_k real_page_table bs max_len dsa_index_topk physical_page_size",
    "verify": "seq_lens req_pool_indices req_to_token cache_seqlens cu_seqlens_k page_table_1 seqlens_expanded "
    "dsa_cache_seqlens dsa_cu_seqlens_k real_page_table bs max_seqlen_k dsa_index_topk physical_page_size "
    "next_n paged_mqa_ctx_lens_2d",
    "draft_extend": "seq_lens extend_seq_lens req_pool_indices req_to_token cache_seqlens cu_seqlens_k "
    "page_table_1 seqlens_expanded dsa_cache_seqlens dsa_cu_seqlens_k real_page_table bs total_len "
    "max_seqlen_k dsa_index_topk physical_page_size max_extend_len max_total_len static_extend_len",
    "extend": "seq_lens extend_seq_lens req_pool_indices req_to_token",
}  # fmt: skip


@pytest.mark.parametrize("op", FUNCTIONS)
def test_positional_parameters(op):
    parameters = inspect.signature(FUNCTIONS[op]).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == SIGNATURES[op].split()


def test_geometry_stays_in_bounds():
    for item in CASES + LARGE_CASES:
        call = fused_call(item)
        for num_sms in (1, 20, 132):
            parts = _fused_args.parts_of_rows(call.bs, max(call.total_len, call.pad_to))
            shape = _fused_args.cut_up(call.bs, parts, _fused_args.table_units(call), num_sms)
            assert shape.row_parts >= 1
            assert 1 <= shape.table_items <= _fused_args.MAX_ITEMS_PER_THREAD
            assert shape.num_tiles * _fused_args.REQUESTS_PER_TILE >= call.bs
            has_tables = bool(call.bs) and any(t is not None for t in call.outputs[13:])
            assert (shape.table_blocks > 0) == has_tables
            assert shape.grid(call.bs) < 2**31
            if call.bs <= _fused_args.REQUESTS_PER_TILE and shape.table_blocks > 1:
                last = call.bs * shape.table_blocks - 1
                inverse = _fused_args._inverse(shape.table_blocks)
                for table in (last, last - shape.table_blocks, last + 1 - shape.table_blocks):
                    assert table * inverse >> 32 == table // shape.table_blocks
    assert _fused_args.ARGS.size <= _launch.ARGS_BYTES


# ---- The same call again, without a GPU ---------------------------------------------------------


@pytest.mark.parametrize("op", FUNCTIONS)
def test_a_known_call_is_not_checked_again_and_launches_the_same(op, fake_device, monkeypatch):
    built = Built(BY_NAME[f"{op}_basic_ps64"])
    for _ in range(2):
        built.run()
    monkeypatch.setattr(_check, "fused", None)  # would fail
    for _ in range(4):
        built.run()
    assert len(fake_device.launched) == 6
    assert len(set(fake_device.launched)) == 1
    assert fake_device.runtime.replays == 3, "captured when it was launched again"
    pages_only = Built(BY_NAME[f"{op}_basic_ps64_pages_only"])
    with pytest.raises(TypeError, match="NoneType"):
        pages_only.run()


@pytest.mark.parametrize("op", FUNCTIONS)
def test_smaller_numbers_of_a_known_call_are_not_checked_again(op, fake_device, monkeypatch):
    item = BY_NAME[f"{op}_basic_ps64"]
    built = Built(item)
    for _ in range(2):
        built.run()
    smaller = {"bs": item.bs - 1}
    if "extend" in op:
        smaller = {"total_len": sum(item.extend[:-1]), "bs": item.bs - 1}
    if op == "extend":
        del smaller["bs"]
    numbers = built.arguments | smaller
    with monkeypatch.context() as patch:
        patch.setattr(_check, "fused", None)
        FUNCTIONS[op](**numbers)
    quick = fake_device.launched[-1]
    forget_fused_calls(monkeypatch, FUSED_OPS[op])
    FUNCTIONS[op](**numbers)
    assert fake_device.launched[-1] == quick
    assert quick != fake_device.launched[0]


def test_other_numbers_take_no_result_slot(fake_device, monkeypatch):
    """No fused kernel answers in one, and all of them may be waiting."""
    built = Built(BY_NAME["decode_basic_ps64"])
    for _ in range(2):
        built.run()
    monkeypatch.setattr(fake_device, "take_slot", None)
    before = len(fake_device.launched)
    for bs in (3, 2, 1):
        FUNCTIONS["decode"](**built.arguments | {"bs": bs})
    assert len(fake_device.launched) == before + 3


@pytest.fixture
def outcomes(fake_device, monkeypatch):
    """``(op, arguments)`` -> what a call launches or raises, as it stands and if nothing was known."""

    def outcome(op, arguments):
        before = len(fake_device.launched)
        try:
            FUNCTIONS[op](**arguments)
        except (TypeError, ValueError) as error:
            assert len(fake_device.launched) == before
            return f"{type(error).__name__}: {error}"
        assert len(fake_device.launched) == before + 1
        return fake_device.launched[-1]

    def both(op, arguments):
        known = outcome(op, arguments)
        with monkeypatch.context() as patch:
            forget_fused_calls(patch, FUSED_OPS[op])
            return known, outcome(op, arguments)

    return both


@pytest.mark.parametrize("op", FUNCTIONS)
def test_other_numbers_of_known_calls_launch_or_raise_as_new_calls_do(op, outcomes):
    """A random walk over numbers, right and wrong ones, each beside a call that is not known."""
    random = np.random.default_rng(7)
    built = [
        Built(BY_NAME[f"{op}_{name}"])
        for name in ("basic_ps64", "basic_ps1", "basic_ps64_pages_only")
        if f"{op}_{name}" in BY_NAME
    ]

    kinds = set()
    for _ in range(400):
        arguments = dict(built[random.integers(len(built))].arguments)
        for name in ("bs", "total_len", "pad_to", "max_extend_len", "static_extend_len"):
            if name not in arguments or random.integers(3) == 0:
                continue
            value = int(random.integers(-1, 8)) * int(random.integers(1, 4))
            odd = (True, float(value), np.int64(value), None)
            arguments[name] = odd[random.integers(4)] if random.integers(12) == 0 else value
            if name == "static_extend_len":
                arguments[name] = bool(value % 2)
        if random.integers(8) == 0:
            arguments["dsa_index_topk"] = int(random.integers(0, 5))
        known, new = outcomes(op, arguments)
        assert known == new
        kinds.add(type(new))
    assert kinds == {str, tuple}
    assert getattr(fused, FUSED_OPS[op]).known.of_memory


TABLE_ARGUMENTS = (
    "req_pool_indices", "req_to_token", "page_table_1", "real_page_table", "page_table_1_flattened",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [*(f"{op}_basic_ps64" for op in FUNCTIONS), "extend_zero_runs", "extend_arrays_only"],
)
def test_every_tensor_of_a_known_call_is_looked_at(name, outcomes):
    """Elsewhere, left out, too short and of another dtype; one that was not given: given, or wrong."""
    item = BY_NAME[name]
    op = item.op
    arguments = Built(item).arguments
    if name == "extend_arrays_only":
        arguments = {key: arguments[key] for key in arguments if key not in TABLE_ARGUMENTS}
    for _ in range(4):
        FUNCTIONS[op](**arguments)
    changed = 0
    for key in dict.fromkeys((*arguments, *(TABLE_ARGUMENTS if op == "extend" else ()))):
        tensor = arguments.get(key)
        if isinstance(tensor, torch.Tensor):
            others = [tensor.clone(), None, tensor[:0], tensor.to(torch.float32)]
        elif tensor is None:
            others = [torch.zeros((8, 4096), dtype=torch.int32), torch.zeros(3), 7]
        else:
            continue
        for other in others:
            known, new = outcomes(op, arguments | {key: other})
            assert known == new, key
            changed += 1
    assert changed >= 30
    assert getattr(fused, FUSED_OPS[op]).known.of_memory


def test_bounds_of_a_known_draft_extend(outcomes):
    built = Built(BY_NAME["draft_extend_basic_ps64"])
    roomy = {"max_extend_len": 1000, "max_total_len": 10**6}
    none = {"max_extend_len": 0, "total_len": 0}
    for fixed, bad in (
        (roomy, {"total_len": 3000}),  # beyond the outputs
        (roomy, {"total_len": -1}),
        (roomy, {"bs": -1}),
        ({}, {"bs": 1}),  # the total is more than bs * max_extend_len
        (none, {"bs": -1}),
    ):
        arguments = built.arguments | fixed
        for _ in range(3):
            FUNCTIONS["draft_extend"](**arguments)
        known, new = outcomes("draft_extend", arguments | bad)
        assert known == new
        assert "expected" in new


@pytest.mark.parametrize("op", FUNCTIONS)
def test_a_scalar_that_cannot_be_compared(op, outcomes):
    """On known tensors it raises as on others."""
    built = Built(BY_NAME[f"{op}_basic_ps64"])
    for _ in range(3):
        built.run()
    numbers = [name for name, value in built.arguments.items() if type(value) is int]
    assert numbers
    for name in numbers:
        for value in (torch.tensor([1, 2]), np.zeros(2), torch.tensor(2), ...):
            known, new = outcomes(op, built.arguments | {name: value})
            assert known == new
            assert "expected an int" in new


def test_threads_that_renew_a_known_call_do_not_mix(fake_device, monkeypatch):
    """Another thread checks a call with another top-k between the look at a template and its use."""
    built = Built(BY_NAME["decode_basic_ps64"])
    small = built.arguments | {"bs": 2}
    for _ in range(3):
        built.run()
    op = fused._DECODE
    others = [built.arguments | {"dsa_index_topk": 7}]

    def interrupted(scalars, most):
        if others:
            thread = threading.Thread(target=FUNCTIONS["decode"], kwargs=others.pop())
            thread.start()
            thread.join()
        return op.numbers(scalars, most)

    monkeypatch.setattr(fused, "_DECODE", op._replace(numbers=interrupted))
    FUNCTIONS["decode"](**small)
    assert not others
    monkeypatch.undo()
    again = fake_device.launched[-1]
    topk_at = _fused_args.LAYOUT.at("topk")
    assert int.from_bytes(again[0][topk_at : topk_at + 4], "little") == small["dsa_index_topk"]


@pytest.mark.parametrize("shift", [0, 1])
def test_a_second_table_at_page_size_1_is_aligned_or_copied_by_tokens(shift):
    call = fused_call(BY_NAME["decode_two_tables_ps1"])
    rows, columns = call.outputs.real_page_table.shape
    memory = torch.empty(rows * 128 + shift, dtype=torch.int32)
    second = memory[shift:].view(rows, 128)[:, :columns]
    first = torch.empty((rows, 128), dtype=torch.int32)[:, :columns]
    tokens = torch.empty((call.req_to_token.size(0), 128), dtype=torch.int32)[:, :columns]
    out = call.outputs._replace(page_table_1=first, real_page_table=second)
    packed = fused_packed(call._replace(outputs=out, req_to_token=tokens), 132)
    packer, at = _fused_args.LAYOUT.run_of("flags")
    (flags,) = packer.unpack_from(packed.buffer, at)
    assert packed.launches[0][0] == "fused_direct_uniform"
    assert bool(flags & _fused_args.HAS_VECTORS) == (shift == 0)


def test_rows_beyond_32_bit_arithmetic_are_left_to_the_general_kernel():
    call = fused_call(BY_NAME["decode_basic_ps64"])
    for width, kernel in ((2**30 - 1, "fused_direct_uniform"), (2**30, "fused")):
        packed = fused_packed(call._replace(width=width), 132)
        assert packed.launches[0][0] == kernel


def test_larger_numbers_of_a_known_call_are_checked(fake_device):
    built = Built(BY_NAME["decode_basic_ps64"])
    few = built.arguments | {"bs": 2}
    for _ in range(3):
        FUNCTIONS["decode"](**few)
    with pytest.raises(ValueError, match=r"seq_lens: expected \[>= 9\] \(bs\), got \[4\]"):
        FUNCTIONS["decode"](**few | {"bs": 9})
    built.run()
    for width in (10**6, -1):
        with pytest.raises(ValueError, match="req_to_token|max_len"):
            FUNCTIONS["decode"](**few | {"max_len": width})


def test_another_backend_takes_known_calls(fake_device, monkeypatch):
    item = BY_NAME["decode_basic_ps64"]
    built = Built(item)
    for _ in range(3):
        built.run()
    launched = len(fake_device.launched)
    monkeypatch.setattr(fused, "_runs_cuda", lambda device: False)
    monkeypatch.setenv("CUPY_NSA_META_BACKEND", "python")
    built.poison()
    built.run()
    assert len(fake_device.launched) == launched
    built.check(expected(item))


def test_a_known_call_in_a_capture_is_recorded(fake_device):
    built = Built(BY_NAME["decode_basic_ps64"])
    fake_device.stream = 5
    for _ in range(4):
        built.run()
    replays = fake_device.runtime.replays
    fake_device.runtime.capturing[5] = recorded = []
    built.run()
    assert len(recorded) == 1
    assert fake_device.runtime.replays == replays


def test_no_tensor_of_a_known_call_is_kept_alive(fake_device):
    built = Built(BY_NAME["verify_basic_ps64"])
    for _ in range(4):
        built.run()
    assert fused._VERIFY.known._of_objects
    alive = [weakref.ref(t) for t in built.arguments.values() if isinstance(t, torch.Tensor)]
    del built
    gc.collect()
    assert {ref() for ref in alive} == {None}
    assert not fused._VERIFY.known._of_objects
    assert not fused._VERIFY.known._alive


def views(built: Built) -> dict[str, Any]:
    """The arguments of a call in new objects over the same memory."""
    return {
        name: value.view(value.shape) if isinstance(value, torch.Tensor) else value
        for name, value in built.arguments.items()
    }


@pytest.mark.parametrize("op", FUNCTIONS)
def test_new_tensors_of_known_memory_are_launched_without_a_check(op, fake_device, monkeypatch):
    """As from a server that cuts ``seq_lens[:bs]`` at every step."""
    built = Built(BY_NAME[f"{op}_basic_ps64"])
    function = FUNCTIONS[op]
    for _ in range(3):
        function(**views(built))
    monkeypatch.setattr(_check, "fused", None)
    replays = fake_device.runtime.replays
    for _ in range(2):
        function(**views(built))
    assert fake_device.runtime.replays == replays + 2
    built.run()
    assert len(fake_device.launched) == 6
    assert len(set(fake_device.launched)) == 1, "of the same memory"


@pytest.mark.parametrize("op", FUNCTIONS)
def test_no_tensor_is_asked_whether_it_equals_something(op, fake_device, monkeypatch):
    """It takes torch ten times as long as anything else in a check to say that it is not None."""
    built = Built(BY_NAME[f"{op}_basic_ps64"])

    def refused(*_: object) -> bool:
        raise AssertionError("a tensor was compared by value")

    monkeypatch.setattr(torch.Tensor, "__eq__", refused)
    monkeypatch.setattr(torch.Tensor, "__ne__", refused)
    for _ in range(4):
        built.run()
    assert fake_device.runtime.replays


def test_kinds_of_calls_that_alternate_are_all_known(fake_device, monkeypatch):
    """With one table, another, both, none; of the whole memory and of less; an input given twice."""
    built = Built(BY_NAME["decode_basic_ps64"])
    given = built.arguments
    kinds = [
        given,
        given | {"page_table_1": None},
        given | {"real_page_table": None},
        given | {"page_table_1": None, "real_page_table": None},
        given | {"seq_lens": given["seq_lens"][:3], "bs": 3},
        given | {"req_pool_indices": given["seq_lens"]},
    ]
    for _ in range(4):
        for kind in kinds:
            FUNCTIONS["decode"](**kind)
    first = fake_device.launched[: len(kinds)]
    fake_device.launched.clear()
    forget_fused_calls(monkeypatch, FUSED_OPS["decode"])
    monkeypatch.setenv("CUPY_NSA_META_GRAPH_CACHE", "0")
    for _ in range(3):
        for kind in kinds:
            FUNCTIONS["decode"](**kind)
    monkeypatch.setattr(_check, "fused", None)
    for kind in kinds:
        FUNCTIONS["decode"](**kind)
    assert fake_device.launched == first * 4


def test_sizes_that_alternate_at_one_address(fake_device):
    """What only the guard tells apart: another size of a tensor that is not the first."""
    built = Built(BY_NAME["decode_basic_ps64"])
    given = built.arguments
    short = given | {"cache_seqlens": given["cache_seqlens"][:3]}
    for _ in range(20):
        FUNCTIONS["decode"](**given)
        with pytest.raises(ValueError, match=r"cache_seqlens: expected \[>= 4\], got \[3\]"):
            FUNCTIONS["decode"](**short)


def test_every_kernel_is_warmed_up(fake_device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(fused, "_WARM_DEVICE", "cpu")
    fused.warm(0)
    reached = {name for _, launches in fake_device.launched for name, _ in launches}
    assert reached == set(_module.KERNELS["fused"])


CHANGES = {
    "memory": lambda g: {"cache_seqlens": g["cache_seqlens"].clone()},
    "stride": lambda g: {"seq_lens": torch.stack((g["seq_lens"], g["seq_lens"]), 1)[:, 0]},
    "dtype": lambda g: {"seq_lens": g["seq_lens"].int()},
    "scalar": lambda g: {"max_len": 700},
    "page_size": lambda g: {"physical_page_size": 128},
    "none": lambda g: {"page_table_1": None},
    "other_none": lambda g: {"real_page_table": None},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_call_is_packed_anew(name, fake_device, monkeypatch):
    built = Built(BY_NAME["decode_basic_ps64"])
    for _ in range(3):
        built.run()
    built.arguments |= CHANGES[name](built.arguments)
    built.run()
    after_a_known_call = fake_device.launched[-1]
    assert after_a_known_call != fake_device.launched[0]
    forget_fused_calls(monkeypatch, FUSED_OPS["decode"])
    built.run()
    assert fake_device.launched[-1] == after_a_known_call


def test_a_known_object_that_has_changed_is_checked_again(fake_device):
    built = Built(BY_NAME["decode_basic_ps64"])
    for _ in range(3):
        built.run()
    built.arguments["cache_seqlens"].resize_(3)
    with pytest.raises(ValueError, match=r"cache_seqlens: expected \[>= 4\], got \[3\]"):
        built.run()
    built = Built(BY_NAME["decode_basic_ps64"])
    for _ in range(3):
        built.run()
    for bad, error in ((4.0, TypeError), ([4], TypeError)):
        with pytest.raises(error, match="bs: expected an int"):
            FUNCTIONS["decode"](**built.arguments | {"bs": bad})


def width_beyond_int32() -> Iterator[torch.Tensor]:
    """That no table limits, from a call and a plan."""
    seq, extend = torch.tensor([10, 4]), torch.tensor([3, 2])
    ks = torch.full((5,), -1, dtype=torch.int32)
    sizes = {"dsa_index_topk": 9, "max_seqlen_k": 2**40, "ks": ks}
    for _ in range(3):
        FUNCTIONS["extend"](seq, extend, total_len=5, **sizes)
        yield ks
    cupy_nsa_meta.plan_fused_dsa_extend_metadata(seq, extend, max_total_len=5, **sizes).launch()
    yield ks


def test_a_width_beyond_int32():
    for ks in width_beyond_int32():
        assert ks.tolist() == [0, 0, 0, 10, 10]
        ks.fill_(-1)


def test_a_width_beyond_int32_is_packed(fake_device):
    field = _fused_args.LAYOUT.at("width")
    for number, _ in enumerate(width_beyond_int32(), 1):
        arguments, _ = fake_device.launched[-1]
        assert int.from_bytes(arguments[field : field + 4], "little") == INT32_MAX
        assert len(fake_device.launched) == number


@pytest.mark.parametrize("rows", [1, 2])
def test_tables_of_one_memory_with_other_strides(rows):
    """Where there is one row its stride is none, and they are the same table."""
    built = Built(case("decode", "one_memory", "", [5], page_size=1, width=8))
    memory = torch.full((128,), POISON, dtype=torch.int32)
    tables = {
        "page_table_1": memory.as_strided((rows, 8), (64, 1)),
        "real_page_table": memory.as_strided((rows, 8), (32, 1)),
    }
    if rows == 1:
        FUNCTIONS["decode"](**built.arguments | tables)
        pool, tokens = (built.arguments[name] for name in ("req_pool_indices", "req_to_token"))
        assert torch.equal(memory[:5], tokens[int(pool[0]), :5])
        assert (memory[5:] == POISON).all()
    else:
        with pytest.raises(ValueError, match="an overlap with page_table_1"):
            FUNCTIONS["decode"](**built.arguments | tables)


def test_packed_launches_of_all_known_calls_are_bounded(fake_device, monkeypatch):
    """Those known by memory stay when their tensors have gone, and most of them never come back."""
    monkeypatch.setattr(fused, "MAX_PACKED", 60)
    monkeypatch.setattr(fused, "MIN_PACKED", 2)
    seq, extend = torch.tensor([10, 4]), torch.tensor([3, 2])
    memory = torch.zeros(400, dtype=torch.int32)
    for place in range(30):
        for total_len in [50, *range(50)] * 2:
            FUNCTIONS["extend"](
                seq, extend, total_len=total_len, dsa_index_topk=9, ks=memory[place : place + 50]
            )
    known = fused._EXTEND.known.of_memory.values()
    assert len(known) == 30
    kept = [len(one.value.packed) for one in known]
    assert sum(kept) <= 60 + sum(max(60 // n, 2) for n in range(1, 31))


def test_a_known_object_whose_memory_has_moved(fake_device):
    """Of the same sizes and strides, which the guard looks at: its address is another."""
    built = Built(BY_NAME["decode_basic_ps64"])
    for _ in range(4):
        built.run()
    out = built.arguments["dsa_cache_seqlens"]
    for move in ("data", "set_"):
        before = out.data_ptr()
        other = torch.zeros_like(out)
        if move == "data":
            out.data = other
        else:
            out.set_(other)
        assert out.data_ptr() == other.data_ptr() != before
        built.run()
        arguments, _ = fake_device.launched[-1]
        at = _fused_args.LAYOUT.at("dsa_cache_seqlens")
        assert int.from_bytes(arguments[at : at + 8], "little") == out.data_ptr()


def test_debug_sync_is_asked_for_known_calls(fake_device, monkeypatch):
    built = Built(BY_NAME["decode_basic_ps64"])
    for _ in range(4):
        built.run()
    at = _fused_args.STATUS_AT
    sticky = fake_device.launched[-1][0][at : at + 8]
    monkeypatch.setenv("CUPY_NSA_META_DEBUG_SYNC", "1")
    built.run()
    assert fake_device.launched[-1][0][at : at + 8] != sticky, "it is read at once"


def test_numbers_of_a_launch_that_is_refused_are_not_kept(fake_device, monkeypatch):
    built = Built(BY_NAME["decode_basic_ps64"])
    for _ in range(3):
        built.run()
    (known,) = fused._DECODE.known.of_memory.values()

    def refused(*_: object) -> None:
        raise FakeDriverError(2)

    with monkeypatch.context() as patch:
        patch.setattr(fake_device, "launch", refused)
        with pytest.raises(FakeDriverError):
            FUNCTIONS["decode"](**built.arguments | {"bs": 2})
    assert all(scalars[0] != 2 for scalars in known.value.packed)


def test_an_int_that_cannot_be_hashed(fake_device):
    class Odd(int):
        __hash__ = None  # type: ignore[assignment]

    built = Built(BY_NAME["decode_basic_ps64"])
    for _ in range(6):
        FUNCTIONS["decode"](**built.arguments | {"bs": Odd(4)})
    assert len(set(fake_device.launched)) == 1
    assert len(fake_device.launched) == 6


@pytest.mark.parametrize("inside", [True, False])
def test_inference_mode_comes_and_goes(inside):
    """What is made in one mode is used in the other: the sticky status, plans."""
    cupy_nsa_meta.last_status("cpu")
    seq, extend = torch.tensor([10, 4]), torch.tensor([3, -2])
    ks = torch.zeros(5, dtype=torch.int32)
    numbers = {"dsa_index_topk": 9, "ks": ks}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_launch, "_status_words", {})
        with torch.inference_mode(inside):
            FUNCTIONS["extend"](seq, extend, total_len=3, **numbers)
            plan = cupy_nsa_meta.plan_fused_dsa_extend_metadata(
                seq, extend, max_total_len=3, **numbers
            )
            plan.launch()
            with pytest.raises(ValueError, match=r"extend_seq_lens\[1\]: expected >= 0, got -2"):
                plan.run()
            expanded, clamped = torch.zeros((2, 9), dtype=torch.int32)
            lengths = torch.tensor([3, 2])
            seed = cupy_nsa_meta.plan_draft_extend_metadata(lengths, seq, 9, expanded, clamped)
            seed.launch()
        with torch.inference_mode(not inside):
            FUNCTIONS["extend"](seq, extend, total_len=3, **numbers)
            plan.launch()
            assert plan.status() == cupy_nsa_meta.last_status("cpu") == 2
            with pytest.raises(ValueError, match=r"extend_seq_lens\[1\]: expected >= 0, got -2"):
                plan.run()
            assert seed.status() == 0


def test_few_calls_are_remembered(fake_device, monkeypatch):
    monkeypatch.setattr(fused, "MAX_PACKED", 3)
    monkeypatch.setattr(fused, "MIN_PACKED", 1)
    built = Built(BY_NAME["decode_basic_ps64"])
    for width in (*range(20), *range(20)):
        FUNCTIONS["decode"](**built.arguments | {"max_len": width})
    (known,) = fused._DECODE.known.of_memory.values()
    assert 1 <= len(known.value.packed) <= 3
    assert len(fake_device.launched) == 40
