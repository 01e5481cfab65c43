"""What the public functions do while ``torch.compile`` or ``torch.export`` traces them.

Each calls one operator of ``_ops.py``, which is not imported here: it imports those functions.
Dynamo traces these few lines; what follows them in a public function reads pointers, and it cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_ops = torch.ops.nsa_meta

#: Refused by the operators with an error that names ``total_tokens=``. It ends the tracing; an
#: exception raised here would be taken for a graph break.
NOT_GIVEN = -1


def untraced(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call what Dynamo must not look into, where a graph break has left it half traced."""
    return torch._dynamo.disable(function)(*arguments)  # type: ignore[no-untyped-call]


def fill(
    backend: str,
    extend_seq_lens: Any,
    seq_lens: Any,
    nsa_index_topk: Any,
    out_seqlens_expanded: Any,
    out_nsa_cache_seqlens: Any,
    use_adaptive: Any,
    total_tokens: Any,
) -> int:
    _ops.fill_draft_extend_metadata(
        extend_seq_lens,
        seq_lens,
        nsa_index_topk,
        out_seqlens_expanded,
        out_nsa_cache_seqlens,
        use_adaptive,
        total_tokens=NOT_GIVEN if total_tokens is None else total_tokens,
        backend=backend,
    )
    return total_tokens  # type: ignore[no-any-return]


def fill_async(
    extend_seq_lens: Any,
    seq_lens: Any,
    nsa_index_topk: Any,
    out_seqlens_expanded: Any,
    out_nsa_cache_seqlens: Any,
    use_adaptive: Any,
    total_tokens: Any,
    out_total: Any,
) -> torch.Tensor:
    if out_total is None:
        out_total = torch.empty(2, dtype=torch.int32, device=extend_seq_lens.device)
    _ops.fill_draft_extend_metadata_async(
        extend_seq_lens,
        seq_lens,
        nsa_index_topk,
        out_seqlens_expanded,
        out_nsa_cache_seqlens,
        use_adaptive,
        total_tokens=total_tokens,
        out_total=out_total,
    )
    return out_total  # type: ignore[no-any-return]


def second_table(page_table_1: Any, real_page_table: Any, page_size: Any) -> Any:
    """``real_page_table``, or None where it is ``page_table_1``: written once, through that."""
    if real_page_table is page_table_1 and page_size == 1:
        return None
    return real_page_table


def seqlens_expand(
    extend_seq_lens: Any, seq_lens: Any, total_len: Any, max_q_len: Any
) -> torch.Tensor:
    return _ops.seqlens_expand(extend_seq_lens, seq_lens, total_len, max_q_len)  # type: ignore[no-any-return]


def fused_simple(
    extend_seq_lens: Any, seq_lens: Any, nsa_index_topk: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Always refused: the function has no ``total_tokens``, the operator has."""
    return _ops.draft_extend_metadata(  # type: ignore[no-any-return]
        extend_seq_lens, seq_lens, nsa_index_topk, total_tokens=NOT_GIVEN
    )
