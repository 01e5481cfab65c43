"""SGLang's own kernels as a second oracle: where both are defined, both have to agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import cupy_nsa_meta
from cupy_nsa_meta._status import INT32_MAX
from fused_cases import Built, FusedCase

NAMES = {
    "decode": "fused_dsa_decode_metadata",
    "verify": "fused_dsa_target_verify_metadata",
    "draft_extend": "fused_dsa_draft_extend_metadata",
}
#: SGLang compiles anew for every batch size, for minutes where a batch is large.
MAX_BS = 1024


def is_defined(item: FusedCase) -> bool:
    """SGLang's kernel has a defined result for a case."""
    if item.op not in NAMES or item.status or item.bs > MAX_BS or item.topk > INT32_MAX:
        return False
    if item.op != "draft_extend" and any(n < 0 for n in item.seq):
        return False  # it does not clamp there
    if item.op == "draft_extend" and item.rows != sum(item.extend):
        return False
    if item.static and len(set(item.extend)) > 1:
        return False  # it takes the promise at its word
    return (
        "page_table_1" in item.tables if item.page_size == 1 else item.tables != ("page_table_1",)
    )


def check(item: FusedCase, theirs: Any, device: str, run: Any = None) -> None:
    """Run a case both ways; compare rows below T and the live prefixes of the page tables."""
    ours, given = Built(item, device), Built(item, device)
    ours.run()
    arguments = dict(given.arguments)
    bs, rows = item.bs, item.rows
    rooms = {
        "cache_seqlens": bs, "cu_seqlens_k": bs + 1, "seqlens_expanded": rows,
        "dsa_cache_seqlens": rows, "dsa_cu_seqlens_k": rows + 1,
    }  # fmt: skip
    for name, room in rooms.items():
        if name in arguments:
            arguments[name] = arguments[name][:room]
    if not item.tables:  # it always writes one: a table without columns
        width = "max_len" if item.op == "decode" else "max_seqlen_k"
        arguments |= {
            width: 0,
            "real_page_table": torch.empty((1, 1), dtype=torch.int32, device=device),
        }
        arguments["page_table_1"] = arguments["real_page_table"] if item.page_size == 1 else None
    (run or (lambda function, given: function(**given)))(theirs, arguments)

    for name, room in rooms.items():
        if name in arguments and (bs or name.startswith("cu") or name == "dsa_cu_seqlens_k"):
            expect_equal(item, name, ours.arguments[name][:room], arguments[name])
    if ours.arguments.get("paged_mqa_ctx_lens_2d") is not None and bs:
        name = "paged_mqa_ctx_lens_2d"
        expect_equal(item, name, ours.arguments[name], arguments[name])
    if not bs or not rows:
        return
    kv = np.asarray(item.seq) + (item.next_n if item.op == "verify" else 0)
    owner = np.arange(bs) if item.op == "decode" else np.repeat(np.arange(bs), item.query)
    live = torch.from_numpy(kv[owner].clip(0, item.width)).to(device)[:, None]
    for name in item.tables:
        page_size = item.page_size if name == "real_page_table" else 1
        if name == "real_page_table" and page_size == 1:
            continue  # it is page_table_1 to SGLang
        ours_table, table = (a[name][: len(owner)] for a in (ours.arguments, arguments))
        columns = torch.arange(table.size(1), device=device) * page_size
        is_live = columns[None, :] < live
        expect_equal(item, name, ours_table[is_live], table[is_live])


def expect_equal(item: FusedCase, name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape, f"{item.name}: {name}"
    wrong = torch.nonzero(ours != theirs)
    assert not len(wrong), (
        f"{item.name}: {name}: {len(wrong)} elements differ from SGLang's, first at "
        f"{wrong[0].tolist()}: {int(ours[tuple(wrong[0])])} and {int(theirs[tuple(wrong[0])])}"
    )


def has_expansion(item: FusedCase) -> bool:
    """``seqlens_expand_triton`` has a defined result for a case."""
    return (
        item.op in ("draft_extend", "extend")
        and not item.status
        and 0 < item.bs <= MAX_BS
        and item.rows > 0
        and item.rows == sum(item.extend)
    )


def check_expansion(item: FusedCase, theirs: Any, device: str, run: Any = None) -> None:
    """``seqlens_expand`` against ``seqlens_expand_triton``."""
    arguments = {
        "extend_seq_lens": torch.tensor(item.extend, dtype=torch.int32, device=device),
        "seq_lens": torch.tensor(item.seq, dtype=torch.int32, device=device),
        "total_len": item.rows,
        "max_q_len": max(item.extend),
    }
    ours = cupy_nsa_meta.seqlens_expand(**arguments)
    result = (run or (lambda function, given: function(**given)))(theirs, arguments)
    expect_equal(item, "seqlens_expand", ours, result)
