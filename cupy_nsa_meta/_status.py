"""Status words of a batch: what only the device knows, and the error each becomes on the host.

The numbers are those of ``enum Status`` in ``cuda_src/common.cuh`` and, for the last, of
``cuda_src/fused.cu``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ._check import FusedCall

INT32_MAX = 2**31 - 1
INT32_MIN = -(2**31)


class Status(IntEnum):
    """Outcome of one launch, as the device saw it."""

    OK = 0
    OVER_CAPACITY = 1
    NEGATIVE_EXTEND = 2
    OUTSIDE_INT32 = 3
    TOTAL_MISMATCH = 4
    REQUEST_OUTSIDE_POOL = 5  # a req_pool index that is no row of req_to_token; fused family only


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


def fused_error(status: int, call: FusedCall) -> ValueError:
    """The ``ValueError`` for a status of the fused family other than 0; the same on every backend.

    The lengths are read back to name the request: this runs only on the way to an exception.
    """
    seq_lens = call.seq_lens[: call.bs].tolist()
    extend = [] if call.extend_seq_lens is None else call.extend_seq_lens[: call.bs].tolist()
    if status == Status.REQUEST_OUTSIDE_POOL:
        assert call.req_pool_indices is not None
        assert call.req_to_token is not None
        rows = call.req_to_token.shape[0]
        for request, pool in enumerate(call.req_pool_indices[: call.bs].tolist()):
            if not 0 <= pool < rows:
                return ValueError(
                    f"req_pool_indices[{request}]: expected a row of req_to_token in [0, {rows}), "
                    f"got {pool}; its table rows were not written"
                )
    if status == Status.TOTAL_MISMATCH:
        total = sum(max(length, 0) for length in extend)
        if total != call.total_len:
            return ValueError(
                f"total_len: expected sum(extend_seq_lens) = {total}, got {call.total_len}; "
                f"rows [0, {min(total, call.total_len)}) were written"
            )
    if status == Status.OUTSIDE_INT32:
        for name, values in (("seq_lens", seq_lens), ("extend_seq_lens", extend)):
            for request, value in enumerate(values):
                if not INT32_MIN <= value <= INT32_MAX:
                    return ValueError(
                        f"{name}[{request}]: expected a value within int32, got {value}"
                    )
        total = sum(seq_lens) + call.bs * call.kv_add
        return ValueError(
            "seq_lens, extend_seq_lens: expected sums within int32, got a sum that was cut "
            f"(the KV lengths add up to {total})"
        )
    if status == Status.NEGATIVE_EXTEND:
        for request, length in enumerate(extend):
            if length < 0:
                return ValueError(f"extend_seq_lens[{request}]: expected >= 0, got {length}")
    if status == Status.OVER_CAPACITY and call.outputs.page_table_1_flattened is not None:
        total = sum(max(length, 0) for length in seq_lens)
        room = call.outputs.page_table_1_flattened.numel()
        if total > room:
            return ValueError(
                f"page_table_1_flattened: expected room for sum(seq_lens) = {total} tokens, "
                f"got capacity {room}"
            )
    return ValueError(
        f"seq_lens, extend_seq_lens: the device found status {status} ({Status(status).name}), "
        "but the buffers have changed since"
    )
