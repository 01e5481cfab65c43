"""Status words of a batch: what only the device knows, and the error each becomes on the host.

The numbers are those of ``enum Status`` in ``cuda_src/common.cuh``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

INT32_MAX = 2**31 - 1
INT32_MIN = -(2**31)


class Status(IntEnum):
    """Outcome of one launch, as the device saw it."""

    OK = 0
    OVER_CAPACITY = 1
    NEGATIVE_EXTEND = 2
    OUTSIDE_INT32 = 3
    TOTAL_MISMATCH = 4


#: Statuses with which the seed operation writes no row and the total is undefined or unusable.
FATAL = (Status.OVER_CAPACITY, Status.NEGATIVE_EXTEND, Status.OUTSIDE_INT32)


def draft_extend_error(
    status: int,
    total: int,
    limit: int,
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
) -> ValueError:
    """The ``ValueError`` for a draft-extend status other than 0; the same text on every backend.

    ``limit`` is the capacity (status 1) or the given ``total_tokens`` (status 4). For statuses 2
    and 3 the lengths are read back to name the request, which only a raised exception pays.
    """
    if status == Status.OVER_CAPACITY:
        return ValueError(
            "out_seqlens_expanded, out_nsa_cache_seqlens: expected room for "
            f"sum(extend_seq_lens) = {total} rows, got capacity {limit}"
        )
    if status == Status.TOTAL_MISMATCH:
        return ValueError(
            f"total_tokens: expected sum(extend_seq_lens) = {total}, got {limit}; "
            f"rows [0, {min(total, limit)}) were written"
        )
    running = 0
    for request, (extend, seq) in enumerate(
        zip(extend_seq_lens.tolist(), seq_lens.tolist(), strict=True)
    ):
        if status == Status.NEGATIVE_EXTEND:
            if extend < 0:
                return ValueError(f"extend_seq_lens[{request}]: expected >= 0, got {extend}")
            continue
        for name, value in (("extend_seq_lens", extend), ("seq_lens", seq)):
            if not INT32_MIN <= value <= INT32_MAX:
                return ValueError(f"{name}[{request}]: expected a value within int32, got {value}")
        running += extend
        if running > INT32_MAX:
            return ValueError(
                f"extend_seq_lens: expected sums within int32 (<= {INT32_MAX}), "
                f"got {running} after request {request}"
            )
    return ValueError(
        f"extend_seq_lens, seq_lens: the device found status {status} ({Status(status).name}), "
        "but the buffers have changed since"
    )
