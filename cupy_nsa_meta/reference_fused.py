"""The specification of the fused family, in plain torch: what the kernels must equal, bit for bit.

``metadata`` is decode, target-verify, draft-extend and EXTEND at once; the four differ in what
``_check.FusedCall`` holds. It runs on any device and reads nothing back, so that it can be enqueued
and captured. Every value is computed exactly in 64 bits from lengths limited to int32, and cut to
int32 only where it is written; a cut is status 3.
"""

from __future__ import annotations

import torch

from ._check import FusedCall
from ._status import INT32_MAX, INT32_MIN, Status

__all__ = ["metadata"]


def metadata(call: FusedCall) -> torch.Tensor:
    """Fill the outputs that are not None; return the status, int32 [1] on the call's device.

    With kv_i = seq_lens[i] + kv_add and q_i the query tokens of request i, row r = (i, j)::

        seqlens_expanded[r]  = max(kv_i - q_i + 1 + j, 0)
        dsa_cache_seqlens[r] = min(seqlens_expanded[r], topk)

    for r in [0, R), R = min(T, total_len), T = sum of q. Of several errors the largest status
    counts.
    """
    out, bs, total_len = call.outputs, call.bs, call.total_len
    device = call.seq_lens.device
    writer = _Writer(device)

    seq = writer.limited(call.seq_lens[:bs].to(torch.int64))
    kv = seq + call.kv_add
    q = _query_tokens(call, writer)
    q_end = torch.cumsum(q, 0)
    kv_end = torch.cumsum(kv, 0)
    total = q_end[-1] if bs else q.sum()
    writer.meet(total > INT32_MAX, Status.OUTSIDE_INT32)
    differs = total > total_len if call.total_is_capacity else total != total_len
    writer.meet(differs, Status.TOTAL_MISMATCH)

    writer.write(out.cache_seqlens, 0, kv)
    for cu, ends in ((out.cu_seqlens_k, kv_end), (out.cu_seqlens_q, q_end)):
        writer.zero_first(cu)
        writer.write(cu, 1, ends)
    writer.write(out.extend_start_loc, 0, q_end - q)
    writer.zero_first(out.dsa_cu_seqlens_k)

    # Rows [0, total_len) are computed, those below T are written.
    rows = torch.arange(total_len if bs else 0, device=device)
    request = torch.searchsorted(q_end, rows, right=True).clamp_(max=max(bs - 1, 0))
    is_row = rows < total
    j = rows - (q_end - q)[request]
    expanded = (kv[request] - q[request] + 1 + j).clamp_(min=0)
    clipped = torch.where(is_row, expanded.clamp(max=call.topk), 0)
    writer.write(out.seqlens_expanded, 0, expanded, is_row)
    writer.write(out.dsa_cache_seqlens, 0, clipped, is_row)
    writer.write(out.dsa_cu_seqlens_k, 1, torch.cumsum(clipped, 0), is_row)
    writer.write(out.token_to_batch_idx, 0, request, is_row)
    ks = (kv_end - kv)[request]
    writer.write(out.ks, 0, ks, is_row)
    writer.write(out.ke, 0, ks + expanded, is_row)
    writer.write(out.topk_indices_offset, 0, ks, is_row)
    if out.positions is not None:
        positions = kv[request] - q[request] + j
        kept = out.positions[: len(rows)]
        kept.copy_(torch.where(is_row, positions, kept))
    if out.paged_mqa_ctx_lens_2d is not None and bs:
        lengths = kv[:, None].expand(bs, call.uniform_q)
        writer.write(out.paged_mqa_ctx_lens_2d[:bs, : call.uniform_q], 0, lengths)
    if call.pad_to:
        padding = torch.arange(call.pad_to, device=device)
        is_padding = padding >= total.clamp(max=total_len)
        writer.write(out.dsa_cache_seqlens, 0, torch.zeros_like(padding), is_padding)
        writer.write(out.dsa_cu_seqlens_k, 1, clipped.sum().expand(call.pad_to), is_padding)

    if call.req_to_token is not None and bs:
        _tables(call, writer, seq, kv, request, is_row)
    return writer.status


def _query_tokens(call: FusedCall, writer: _Writer) -> torch.Tensor:
    """Query tokens of each request, >= 0, int64 [bs]."""
    if call.extend_seq_lens is None:
        return torch.full((call.bs,), call.uniform_q, device=call.seq_lens.device)
    extend = call.extend_seq_lens[: call.bs].to(torch.int64)
    writer.meet((extend < 0).any(), Status.NEGATIVE_EXTEND)
    return writer.limited(extend).clamp(min=0)


def _tables(
    call: FusedCall,
    writer: _Writer,
    seq: torch.Tensor,
    kv: torch.Tensor,
    request: torch.Tensor,
    is_row: torch.Tensor,
) -> None:
    out, tokens, width = call.outputs, call.req_to_token, call.width
    assert tokens is not None
    assert call.req_pool_indices is not None
    if all(
        table is None
        for table in (out.page_table_1, out.real_page_table, out.page_table_1_flattened)
    ):
        return
    pool = call.req_pool_indices[: call.bs].to(torch.int64)
    exists = (pool >= 0) & (pool < tokens.size(0))
    writer.meet((~exists).any(), Status.REQUEST_OUTSIDE_POOL)
    if not tokens.numel():
        return
    pool = torch.where(exists, pool, 0)
    if call.one_row_per_request:
        request = torch.arange(call.bs, device=seq.device)
        is_row = torch.ones_like(exists)
    has_tokens = (is_row & exists[request])[:, None]
    for table, page_size in ((out.page_table_1, 1), (out.real_page_table, call.page_size)):
        if table is None:
            continue
        columns = torch.arange(0, width, page_size, device=seq.device)
        pages = tokens[:, :width:page_size][pool[request]] // page_size
        written = has_tokens & (columns < kv[request][:, None])
        kept = table[: len(request), : len(columns)]
        kept.copy_(torch.where(written, pages, kept))
    flattened = out.page_table_1_flattened
    if flattened is not None:
        length = seq.clamp(min=0)
        end = torch.cumsum(length, 0)
        writer.meet((exists & (length > 0) & (end > len(flattened))).any(), Status.OVER_CAPACITY)
        at = torch.arange(len(flattened), device=seq.device)
        owner = torch.searchsorted(end, at, right=True).clamp_(max=call.bs - 1)
        column = at - (end - length)[owner]
        written = (at < end[-1]) & exists[owner] & (column < tokens.size(1))
        values = tokens[pool[owner], column.clamp(max=tokens.size(1) - 1)]
        flattened.copy_(torch.where(written, values, flattened))


class _Writer:
    """Writes int64 values into int32 outputs and remembers the status."""

    def __init__(self, device: torch.device) -> None:
        self.status = torch.zeros(1, dtype=torch.int32, device=device)

    def meet(self, condition: torch.Tensor, status: Status) -> None:
        self.status = torch.maximum(self.status, (condition * int(status)).to(torch.int32))

    def limited(self, values: torch.Tensor) -> torch.Tensor:
        self.meet(((values > INT32_MAX) | (values < INT32_MIN)).any(), Status.OUTSIDE_INT32)
        return values.clamp(INT32_MIN, INT32_MAX)

    def zero_first(self, out: torch.Tensor | None) -> None:
        if out is not None:
            out[:1].zero_()

    def write(
        self,
        out: torch.Tensor | None,
        begin: int,
        values: torch.Tensor,
        written: torch.Tensor | None = None,
    ) -> None:
        """out[begin + i] = values[i] where ``written``, cut to int32."""
        if out is None:
            return
        kept = out[begin : begin + len(values)]
        if written is not None:
            values = torch.where(written, values, kept)
        kept.copy_(self.limited(values))
