"""The specification against hand-written numbers, and its laws on random batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import BY_NAME, CASES, Outputs
from cupy_nsa_meta import reference
from cupy_nsa_meta._status import INT32_MAX

HAND_WRITTEN = {
    "contract": ([8, 9, 10, 3, 4], [8, 9, 10, 3, 4]),
    "ends_meet": ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
    "zero_middle": ([6, 7, 8, 9, 8, 9], [6, 7, 8, 9, 8, 9]),
    "padding_rows": (
        [97, 98, 99, 100] + [0, 0, 0, 1] * 3,
        [64, 64, 64, 64] + [0, 0, 0, 1] * 3,
    ),
    "kv_below_extend": ([0, 0, 0, 0, 0, 1, 2, 3, 0, 0, 0, 1, 2, 3, 4, 5],) * 2,
    "kv_negative": ([0] * 7 + [8, 9],) * 2,
    "topk_one": ([3, 4, 5, 6, 7, 8, 0, 0, 0, 1, 2, 3], [1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1]),
    "topk_edge": ([2046, 2047, 2048, 2049, 2050], [2046, 2047, 2048, 2048, 2048]),
    "kv_int32_max": ([INT32_MAX - 3, INT32_MAX - 2, INT32_MAX - 1, INT32_MAX, INT32_MAX - 1, INT32_MAX],) * 2,
    "total_short": ([7, 8, 9, 6, 7],) * 2,
    "total_over_given": (list(range(61, 91)) + list(range(51, 71)),) * 2,
}  # fmt: skip


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written_numbers(name):
    expected = BY_NAME[name].expected()
    expanded, clamped = HAND_WRITTEN[name]
    assert expected.expanded.tolist() == expanded
    assert expected.clamped.tolist() == clamped
    assert expected.expanded.dtype == expected.clamped.dtype == torch.int32


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("empty", (0, 0)),
        ("contract", (5, 0)),
        ("over_capacity", (13, 1)),
        ("negative_extend", (-1, 2)),
        ("negative_hidden", (-1, 2)),
        ("negative_wins", (-1, 2)),
        ("extend_outside", (-1, 3)),
        ("seq_outside", (-1, 3)),
        ("seq_below", (-1, 3)),
        ("seq_outside_no_rows", (-1, 3)),
        ("sum_outside", (-1, 3)),
        ("sum_wraps", (-1, 3)),
        ("total_given", (7, 0)),
        ("total_short", (7, 4)),
        ("total_long", (7, 4)),
        ("total_over_given", (70, 4)),
        ("total_negative", (-1, 2)),
    ],
)
def test_hand_written_outcomes(name, outcome):
    expected = BY_NAME[name].expected()
    assert (expected.total, expected.status) == outcome


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_draft_extend_into_equals_the_definition(case):
    extend, seq = case.lengths()
    outputs = Outputs(case)
    limit = case.capacity if case.total_tokens is None else case.total_tokens
    outcome = reference.draft_extend_into(
        extend,
        seq,
        case.topk,
        outputs.expanded,
        outputs.clamped,
        limit,
        case.total_tokens is not None,
    )
    expected = case.expected()
    outputs.check(expected)
    assert outcome.tolist() == [expected.total, expected.status]
    assert outcome.dtype == torch.int32


batches = st.lists(st.tuples(st.integers(0, 60), st.integers(-70, 3000)), max_size=40)


@given(batches, st.integers(1, 4096))
@settings(max_examples=300, deadline=None)
def test_laws(batch, topk):
    extend = torch.tensor([q for q, _ in batch], dtype=torch.int64)
    seq = torch.tensor([s for _, s in batch], dtype=torch.int64)
    expanded, clamped = reference.draft_extend(extend, seq, topk)
    assert len(expanded) == len(clamped) == sum(q for q, _ in batch)
    assert torch.equal(clamped, expanded.clamp(max=topk))
    assert (expanded >= 0).all()
    at = 0
    for q, s in batch:
        rows = expanded[at : at + q]
        if q:
            assert rows[-1] == max(s, 0)  # the last query token sees the whole request
            assert ((rows[1:] - rows[:-1] == 1) | (rows[1:] == 0)).all()  # rises by 1, once above 0
        at += q
    # Appending a request changes no row before it.
    longer, _ = reference.draft_extend(
        torch.cat((extend, torch.tensor([3]))), torch.cat((seq, torch.tensor([9]))), topk
    )
    assert torch.equal(longer[:at], expanded)
