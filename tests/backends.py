"""How a case is run on one backend and compared, byte for byte."""

from __future__ import annotations

import pytest
import torch

from cases import Case, Outputs
from cupy_nsa_meta._status import FATAL


def check_case(fill, case: Case, device: str | torch.device, **options: object) -> None:
    """Run a synchronous function; rows, untouched bytes, returned total or error."""
    extend, seq = case.lengths(device)
    outputs = Outputs(case, device)
    expected = case.expected()
    arguments = (extend, seq, case.topk, outputs.expanded, outputs.clamped)
    if case.total_tokens is not None:
        assert fill(*arguments, total_tokens=case.total_tokens, **options) == case.total_tokens
    elif expected.status in FATAL:
        with pytest.raises(ValueError, match="extend_seq_lens|seq_lens"):
            fill(*arguments, **options)
    else:
        total = fill(*arguments, **options)
        assert type(total) is int
        assert total == expected.total
    outputs.check(expected)


def check_case_async(fill, case: Case, device: str | torch.device) -> None:
    """Run an asynchronous function; rows, untouched bytes, total and status on the device."""
    extend, seq = case.lengths(device)
    outputs = Outputs(case, device)
    expected = case.expected()
    given = torch.full((2,), -5, dtype=torch.int32, device=device)
    for out_total in (None, given):
        outputs.poison()
        outcome = fill(
            extend,
            seq,
            case.topk,
            outputs.expanded,
            outputs.clamped,
            total_tokens=case.total_tokens,
            out_total=out_total,
        )
        assert out_total is None or outcome is out_total
        assert outcome.dtype == torch.int32
        assert outcome.shape == (2,)
        assert outcome.tolist() == [expected.total, expected.status]
        outputs.check(expected)
