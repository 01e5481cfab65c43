"""The Triton recipe that this package replaces, step by step.

A cat of a zero and the sums, ``.item()`` of the total, and a kernel that searches the requests of
its rows one by one, compiled per batch size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 256


@triton.jit
def expand_kernel(
    extend_seq_lens,
    seq_lens,
    offsets,
    out_seqlens_expanded,
    out_nsa_cache_seqlens,
    total,
    topk,
    BS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < total
    request = tl.zeros([BLOCK], tl.int32)
    for other in range(BS):
        begin = tl.load(offsets + other)
        request = tl.where(row >= begin, other, request)
    begin = tl.load(offsets + request, mask=inside, other=0)
    extend = tl.load(extend_seq_lens + request, mask=inside, other=0)
    seq = tl.load(seq_lens + request, mask=inside, other=0).to(tl.int32)
    expanded = tl.maximum(seq - extend + 1 + row - begin, 0)
    tl.store(out_seqlens_expanded + row, expanded, mask=inside)
    tl.store(out_nsa_cache_seqlens + row, tl.minimum(expanded, topk), mask=inside)


def fill(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
) -> int:
    device = extend_seq_lens.device
    offsets = torch.cat(
        [
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.cumsum(extend_seq_lens, 0, dtype=torch.int32),
        ]
    )
    total = int(offsets[-1].item())
    if total:
        expand_kernel[(triton.cdiv(total, BLOCK),)](
            extend_seq_lens,
            seq_lens,
            offsets,
            out_seqlens_expanded,
            out_nsa_cache_seqlens,
            total,
            nsa_index_topk,
            BS=extend_seq_lens.numel(),
            BLOCK=BLOCK,
        )
    return total
