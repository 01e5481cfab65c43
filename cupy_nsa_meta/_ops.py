"""The operators ``torch.ops.nsa_meta.*``: what ``torch.compile`` sees of a call.

Eager calls of the public functions do not come here. While a graph is traced, each begins with
``_traced.py``, which calls one operator; at run time the operator calls the public function, on
CUDA and on CPU tensors. ``SCHEMAS`` below are the signatures; ``(a!)`` marks what is written.

================================  ==========================================  =====================
operator                          writes                                      returns
================================  ==========================================  =====================
fill_draft_extend_metadata        out_seqlens_expanded,                       nothing
                                  out_nsa_cache_seqlens: [0, min(T, total))
fill_draft_extend_metadata_async  the same two, and out_total                 nothing
draft_extend_metadata             nothing                                     (expanded, clamped),
                                                                              int32 [total_tokens]
fused_dsa_decode_metadata         every output tensor                         nothing
fused_dsa_target_verify_metadata  every output tensor                         nothing
fused_dsa_draft_extend_metadata   every output tensor                         nothing
fused_dsa_extend_metadata         every output tensor that is given           nothing
seqlens_expand                    nothing                                     int32 [total_len]
================================  ==========================================  =====================

``draft_extend_metadata`` is the seed operation with outputs of its own; rows from T on are 0. Every
int is a SymInt: a graph is not traced again for another batch size, total or width. ``backend`` is
that of the public function which was traced: auto, cuda, triton or python.

Sizes, dtypes and devices are checked by the fake kernels as far as they are known without a guard
(a symbolic size adds none), and once more at run time with everything else.

Two arguments may share memory in one case: at page size 1 ``real_page_table`` may be
``page_table_1``. Traced from the same tensor, the operator gets None for it. From two views of one
memory it gets both; torch then hands it one memory, or copies that it merges back: both tables hold
the same values, so the result is the same. Any other overlap is refused when the graph runs, or
when it is traced from one and the same tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _check, dispatch, draft_extend, draft_extend_python, fused
from ._check import FusedOutputs
from ._status import INT32_MAX

BACKENDS = ("auto", "cuda", "triton", "python")

SCHEMAS = (
    "fill_draft_extend_metadata(Tensor extend_seq_lens, Tensor seq_lens, SymInt nsa_index_topk, "
    "Tensor(a!) out_seqlens_expanded, Tensor(b!) out_nsa_cache_seqlens, bool use_adaptive=True, *, "
    'SymInt total_tokens, str backend="auto") -> ()',
    "fill_draft_extend_metadata_async(Tensor extend_seq_lens, Tensor seq_lens, "
    "SymInt nsa_index_topk, Tensor(a!) out_seqlens_expanded, Tensor(b!) out_nsa_cache_seqlens, "
    "bool use_adaptive=True, *, SymInt? total_tokens=None, Tensor(c!) out_total) -> ()",
    "draft_extend_metadata(Tensor extend_seq_lens, Tensor seq_lens, SymInt nsa_index_topk, "
    "bool use_adaptive=True, *, SymInt total_tokens) -> (Tensor, Tensor)",
    "fused_dsa_decode_metadata(Tensor seq_lens, Tensor req_pool_indices, Tensor req_to_token, "
    "Tensor(a!) cache_seqlens, Tensor(b!) cu_seqlens_k, Tensor(c!)? page_table_1, "
    "Tensor(d!) dsa_cache_seqlens, Tensor(e!) dsa_cu_seqlens_k, Tensor(f!)? real_page_table, "
    "SymInt bs, SymInt max_len, SymInt dsa_index_topk, SymInt physical_page_size) -> ()",
    "fused_dsa_target_verify_metadata(Tensor seq_lens, Tensor req_pool_indices, "
    "Tensor req_to_token, Tensor(a!) cache_seqlens, Tensor(b!) cu_seqlens_k, "
    "Tensor(c!)? page_table_1, Tensor(d!) seqlens_expanded, Tensor(e!) dsa_cache_seqlens, "
    "Tensor(f!) dsa_cu_seqlens_k, Tensor(g!)? real_page_table, SymInt bs, SymInt max_seqlen_k, "
    "SymInt dsa_index_topk, SymInt physical_page_size, SymInt next_n, "
    "Tensor(h!)? paged_mqa_ctx_lens_2d=None) -> ()",
    "fused_dsa_draft_extend_metadata(Tensor seq_lens, Tensor extend_seq_lens, "
    "Tensor req_pool_indices, Tensor req_to_token, Tensor(a!) cache_seqlens, "
    "Tensor(b!) cu_seqlens_k, Tensor(c!)? page_table_1, Tensor(d!) seqlens_expanded, "
    "Tensor(e!) dsa_cache_seqlens, Tensor(f!) dsa_cu_seqlens_k, Tensor(g!)? real_page_table, "
    "SymInt bs, SymInt total_len, SymInt max_seqlen_k, SymInt dsa_index_topk, "
    "SymInt physical_page_size, SymInt max_extend_len, SymInt max_total_len, "
    "bool static_extend_len=False) -> ()",
    "fused_dsa_extend_metadata(Tensor seq_lens, Tensor extend_seq_lens, "
    "Tensor? req_pool_indices=None, Tensor? req_to_token=None, *, SymInt total_len, "
    "SymInt dsa_index_topk, SymInt? max_seqlen_k=None, SymInt physical_page_size=64, "
    "SymInt? pad_to=None, Tensor(a!)? cache_seqlens=None, Tensor(b!)? cu_seqlens_k=None, "
    "Tensor(c!)? cu_seqlens_q=None, Tensor(d!)? seqlens_expanded=None, "
    "Tensor(e!)? dsa_cache_seqlens=None, Tensor(f!)? dsa_cu_seqlens_k=None, "
    "Tensor(g!)? token_to_batch_idx=None, Tensor(h!)? ks=None, Tensor(i!)? ke=None, "
    "Tensor(j!)? topk_indices_offset=None, Tensor(k!)? positions=None, "
    "Tensor(l!)? extend_start_loc=None, Tensor(m!)? page_table_1=None, "
    "Tensor(n!)? real_page_table=None, Tensor(o!)? page_table_1_flattened=None) -> ()",
    "seqlens_expand(Tensor extend_seq_lens, Tensor seq_lens, SymInt total_len, SymInt max_q_len) "
    "-> Tensor",
)

Int = Any  # int, or torch.SymInt while a graph is traced


# ---- What runs ----------------------------------------------------------------------------------


def _fill_of(backend: str) -> Callable[..., int]:
    if backend == "triton":
        from .draft_extend_triton import fill_draft_extend_metadata_inplace

        return fill_draft_extend_metadata_inplace
    return {
        "auto": dispatch.fill_draft_extend_metadata,
        "cuda": draft_extend.fill_draft_extend_metadata_cuda,
        "python": draft_extend_python.fill_draft_extend_metadata_python,
    }[_backend(backend)]


def _fill(*arguments: Any, total_tokens: int, backend: str = "auto") -> None:
    _fill_of(backend)(*arguments, total_tokens=total_tokens)


def _fill_async(*arguments: Any, total_tokens: int | None = None, out_total: torch.Tensor) -> None:
    dispatch.fill_draft_extend_metadata_async(
        *arguments, total_tokens=total_tokens, out_total=out_total
    )


def _draft_extend(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: int,
    use_adaptive: bool = True,
    *,
    total_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    _total(total_tokens)
    # Zeros: with fewer rows than promised the rest must not be read as lengths.
    expanded, clamped = (
        torch.zeros(total_tokens, dtype=torch.int32, device=extend_seq_lens.device)
        for _ in range(2)
    )
    dispatch.fill_draft_extend_metadata(
        extend_seq_lens,
        seq_lens,
        nsa_index_topk,
        expanded,
        clamped,
        use_adaptive,
        total_tokens=total_tokens,
    )
    return expanded, clamped


# ---- Fake kernels -------------------------------------------------------------------------------
# The errors are those of ``_check.py``, for what can be told without memory and without a guard.


def _known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds for certain; asking puts no guard on symbolic ones."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _at_least(name: str, value: Int, lowest: int) -> None:
    if _known(value < lowest):
        raise ValueError(f"{name}: expected an int >= {lowest}, got {value}")


def _total(total_tokens: Int) -> None:
    """``_traced`` hands on ``NOT_GIVEN`` where the caller gave nothing."""
    if _known(total_tokens < 0):
        raise ValueError(
            "total_tokens: expected an int >= 0; in a compiled graph no total can be read back, so "
            "pass total_tokens= (the sum of extend_seq_lens, as the host knows it), or use "
            "fill_draft_extend_metadata_async, which leaves the total on the device"
        )


def _backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _input(name: str, tensor: torch.Tensor, room: Int) -> None:
    if _known(_check.lengths(name, tensor) < room):
        raise ValueError(f"{name}: expected [>= {room}] (bs), got [{tensor.numel()}]")


def _output(name: str, tensor: torch.Tensor, room: Int, dtype: torch.dtype = torch.int32) -> None:
    if tensor.dtype is not dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    _check.dense(name, tensor)
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected a 1-D tensor, got shape {list(tensor.shape)}")
    if _known(tensor.stride(0) != 1) and _known(tensor.numel() > 1):
        raise ValueError(f"{name}: expected a contiguous tensor, got stride {tensor.stride(0)}")
    if _known(tensor.numel() < room):
        raise ValueError(f"{name}: expected [>= {room}], got [{tensor.numel()}]")


def _table(name: str, tensor: torch.Tensor | None, rows: Int, columns: Int) -> None:
    if tensor is None:
        return
    if tensor.dtype is not torch.int32:
        raise TypeError(f"{name}: expected dtype torch.int32, got {tensor.dtype}")
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected a 2-D tensor, got shape {list(tensor.shape)}")
    if _known(tensor.size(0) < rows) or _known(tensor.size(1) < columns):
        raise ValueError(f"{name}: expected [>= {rows}, >= {columns}], got {list(tensor.shape)}")
    if _known(tensor.stride(1) != 1) and _known(tensor.size(1) > 1):
        raise ValueError(f"{name}: expected column stride 1, got {tensor.stride(1)}")


def _apart(inputs: dict[str, torch.Tensor | None], outputs: dict[str, torch.Tensor | None]) -> None:
    """All on one device, and no output the same tensor as another argument."""
    met: dict[str, torch.Tensor] = {}
    for name, tensor in (inputs | outputs).items():
        if tensor is None:
            continue
        for other_name, other in met.items():
            if tensor.device != other.device:
                raise ValueError(
                    f"{name}: expected device {other.device} like {other_name}, got {tensor.device}"
                )
            if tensor is other and name in outputs:
                raise _check.overlap_error(name, other_name)
        met[name] = tensor


def _seed_inputs(extend_seq_lens: torch.Tensor, seq_lens: torch.Tensor, topk: Int) -> None:
    bs = _check.lengths("extend_seq_lens", extend_seq_lens)
    num_seq_lens = _check.lengths("seq_lens", seq_lens)
    if _known(num_seq_lens != bs):
        raise ValueError(f"seq_lens: expected [{bs}] like extend_seq_lens, got [{num_seq_lens}]")
    _at_least("nsa_index_topk", topk, 1)


def _fake_fill(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: Int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
    use_adaptive: bool = True,
    *,
    total_tokens: Int,
    backend: str = "auto",
) -> None:
    _backend(backend)
    _total(total_tokens)
    _fake_fill_async(
        extend_seq_lens,
        seq_lens,
        nsa_index_topk,
        out_seqlens_expanded,
        out_nsa_cache_seqlens,
        total_tokens=total_tokens,
        out_total=None,
    )


def _fake_fill_async(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: Int,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
    use_adaptive: bool = True,
    *,
    total_tokens: Int | None = None,
    out_total: torch.Tensor | None,
) -> None:
    _seed_inputs(extend_seq_lens, seq_lens, nsa_index_topk)
    outputs: dict[str, torch.Tensor | None] = {
        "out_seqlens_expanded": out_seqlens_expanded,
        "out_nsa_cache_seqlens": out_nsa_cache_seqlens,
    }
    room = 0
    if total_tokens is not None:
        _at_least("total_tokens", total_tokens, 0)
        room = total_tokens
    _output("out_seqlens_expanded", out_seqlens_expanded, room)
    _output("out_nsa_cache_seqlens", out_nsa_cache_seqlens, room)
    if out_total is not None:
        outputs["out_total"] = out_total
        _output("out_total", out_total, 2)
        if _known(out_total.numel() != 2):
            raise ValueError(
                f"out_total: expected shape [2] (total, status), got [{out_total.numel()}]"
            )
    _apart({"extend_seq_lens": extend_seq_lens, "seq_lens": seq_lens}, outputs)


def _fake_draft_extend(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    nsa_index_topk: Int,
    use_adaptive: bool = True,
    *,
    total_tokens: Int,
) -> tuple[torch.Tensor, torch.Tensor]:
    _seed_inputs(extend_seq_lens, seq_lens, nsa_index_topk)
    _total(total_tokens)
    _apart({"extend_seq_lens": extend_seq_lens, "seq_lens": seq_lens}, {})
    return _new(extend_seq_lens, total_tokens), _new(extend_seq_lens, total_tokens)


def _new(like: torch.Tensor, rows: Int) -> torch.Tensor:
    torch._check(rows >= 0)  # type: ignore[no-untyped-call]  # an unbacked size is taken for one
    return like.new_empty(rows, dtype=torch.int32)


def _fake_fused(
    inputs: dict[str, torch.Tensor | None],
    req_to_token: torch.Tensor | None,
    out: FusedOutputs,
    bs: Int,
    total_len: Int,
    width: Int,
    topk: Int,
    page_size: Int,
    *,
    next_n: Int = 1,
    pad_to: Int | None = None,
    one_row_per_request: bool = False,
) -> None:
    """The fused family. ``inputs`` are [>= bs]; ``width`` is W."""
    for name, value, lowest in (
        ("bs", bs, 0),
        ("total_len", total_len, 0),
        ("dsa_index_topk", topk, 1),
        ("physical_page_size", page_size, 1),
        ("next_n", next_n, 1),
        ("pad_to", total_len if pad_to is None else pad_to, 0),
    ):
        _at_least(name, value, lowest)
    if isinstance(page_size, int) and page_size not in _check._PAGE_SIZES:
        raise ValueError(
            f"physical_page_size: expected a power of two in [1, {max(_check._PAGE_SIZES)}], "
            f"got {page_size}"
        )
    for name, tensor in inputs.items():
        if tensor is not None:
            _input(name, tensor, bs)
    padded = total_len if pad_to is None else pad_to
    rooms = (bs, bs + 1, total_len, total_len + 1, padded, padded + 1)
    for name, room in zip(FusedOutputs._fields, _check._FUSED_ROOMS, strict=False):
        tensor = getattr(out, name)
        if tensor is not None:
            dtype = torch.int64 if name == "positions" else torch.int32
            _output(name, tensor, rooms[room], dtype)
    if out.page_table_1_flattened is not None:
        _output("page_table_1_flattened", out.page_table_1_flattened, 0)
    rows = bs if one_row_per_request else total_len
    _table("paged_mqa_ctx_lens_2d", out.paged_mqa_ctx_lens_2d, bs, next_n)
    _table("req_to_token", req_to_token, 0, width)
    _table("page_table_1", out.page_table_1, rows, width)
    _table("real_page_table", out.real_page_table, rows, -(-width // page_size))
    _apart(inputs | {"req_to_token": req_to_token}, out._asdict())


def _fake_decode(
    seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    page_table_1: torch.Tensor | None,
    dsa_cache_seqlens: torch.Tensor,
    dsa_cu_seqlens_k: torch.Tensor,
    real_page_table: torch.Tensor | None,
    bs: Int,
    max_len: Int,
    dsa_index_topk: Int,
    physical_page_size: Int,
) -> None:
    _fake_fused(
        {"seq_lens": seq_lens, "req_pool_indices": req_pool_indices},
        req_to_token,
        FusedOutputs(
            cache_seqlens=cache_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            dsa_cache_seqlens=dsa_cache_seqlens,
            dsa_cu_seqlens_k=dsa_cu_seqlens_k,
            page_table_1=page_table_1,
            real_page_table=real_page_table,
        ),
        bs,
        bs,
        max_len,
        dsa_index_topk,
        physical_page_size,
    )


def _fake_target_verify(
    seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    page_table_1: torch.Tensor | None,
    seqlens_expanded: torch.Tensor,
    dsa_cache_seqlens: torch.Tensor,
    dsa_cu_seqlens_k: torch.Tensor,
    real_page_table: torch.Tensor | None,
    bs: Int,
    max_seqlen_k: Int,
    dsa_index_topk: Int,
    physical_page_size: Int,
    next_n: Int,
    paged_mqa_ctx_lens_2d: torch.Tensor | None = None,
) -> None:
    _fake_fused(
        {"seq_lens": seq_lens, "req_pool_indices": req_pool_indices},
        req_to_token,
        FusedOutputs(
            cache_seqlens=cache_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            seqlens_expanded=seqlens_expanded,
            dsa_cache_seqlens=dsa_cache_seqlens,
            dsa_cu_seqlens_k=dsa_cu_seqlens_k,
            paged_mqa_ctx_lens_2d=paged_mqa_ctx_lens_2d,
            page_table_1=page_table_1,
            real_page_table=real_page_table,
        ),
        bs,
        bs * next_n,
        max_seqlen_k,
        dsa_index_topk,
        physical_page_size,
        next_n=next_n,
    )


def _fake_fused_draft_extend(
    seq_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    page_table_1: torch.Tensor | None,
    seqlens_expanded: torch.Tensor,
    dsa_cache_seqlens: torch.Tensor,
    dsa_cu_seqlens_k: torch.Tensor,
    real_page_table: torch.Tensor | None,
    bs: Int,
    total_len: Int,
    max_seqlen_k: Int,
    dsa_index_topk: Int,
    physical_page_size: Int,
    max_extend_len: Int,
    max_total_len: Int,
    static_extend_len: bool = False,
) -> None:
    _most("total_len", total_len, bs * max_extend_len, "bs * max_extend_len")
    _most("total_len", total_len, max_total_len, "max_total_len")
    _fake_fused(
        {
            "seq_lens": seq_lens,
            "extend_seq_lens": extend_seq_lens,
            "req_pool_indices": req_pool_indices,
        },
        req_to_token,
        FusedOutputs(
            cache_seqlens=cache_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            seqlens_expanded=seqlens_expanded,
            dsa_cache_seqlens=dsa_cache_seqlens,
            dsa_cu_seqlens_k=dsa_cu_seqlens_k,
            page_table_1=page_table_1,
            real_page_table=real_page_table,
        ),
        bs,
        total_len,
        max_seqlen_k,
        dsa_index_topk,
        physical_page_size,
    )


def _most(name: str, value: Int, highest: Int, highest_name: str) -> None:
    if _known(value > highest):
        raise ValueError(f"{name}: expected <= {highest} ({highest_name}), got {value}")


def _fake_extend(
    seq_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    req_pool_indices: torch.Tensor | None = None,
    req_to_token: torch.Tensor | None = None,
    *,
    total_len: Int,
    dsa_index_topk: Int,
    max_seqlen_k: Int | None = None,
    physical_page_size: Int = 64,
    pad_to: Int | None = None,
    **outputs: torch.Tensor | None,
) -> None:
    bs = _check.lengths("seq_lens", seq_lens)
    num_extend_lens = _check.lengths("extend_seq_lens", extend_seq_lens)
    if _known(num_extend_lens != bs):
        raise ValueError(f"extend_seq_lens: expected [{bs}] like seq_lens, got [{num_extend_lens}]")
    out = FusedOutputs(**outputs)
    for name in ("page_table_1", "real_page_table", "page_table_1_flattened"):
        if outputs.get(name) is not None and (req_to_token is None or req_pool_indices is None):
            missing = "req_to_token" if req_to_token is None else "req_pool_indices"
            raise ValueError(f"{name}: expected {missing} to fill it from, got None")
    if pad_to is not None:
        _most("total_len", total_len, pad_to, "pad_to")
    _fake_fused(
        {
            "seq_lens": seq_lens,
            "extend_seq_lens": extend_seq_lens,
            "req_pool_indices": req_pool_indices,
        },
        req_to_token,
        out,
        bs,
        total_len,
        0 if max_seqlen_k is None else max_seqlen_k,
        dsa_index_topk,
        physical_page_size,
        pad_to=pad_to,
        one_row_per_request=True,
    )


def _fake_seqlens_expand(
    extend_seq_lens: torch.Tensor, seq_lens: torch.Tensor, total_len: Int, max_q_len: Int
) -> torch.Tensor:
    bs = _check.lengths("extend_seq_lens", extend_seq_lens)
    _most("total_len", total_len, bs * max_q_len, "bs * max_q_len")
    _fake_extend(
        seq_lens, extend_seq_lens, total_len=total_len, dsa_index_topk=INT32_MAX, pad_to=total_len
    )
    return _new(extend_seq_lens, total_len)


# ---- Registration -------------------------------------------------------------------------------

_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "fill_draft_extend_metadata": (_fill, _fake_fill),
    "fill_draft_extend_metadata_async": (_fill_async, _fake_fill_async),
    "draft_extend_metadata": (_draft_extend, _fake_draft_extend),
    "fused_dsa_decode_metadata": (fused.fused_dsa_decode_metadata, _fake_decode),
    "fused_dsa_target_verify_metadata": (
        fused.fused_dsa_target_verify_metadata,
        _fake_target_verify,
    ),
    "fused_dsa_draft_extend_metadata": (
        fused.fused_dsa_draft_extend_metadata,
        _fake_fused_draft_extend,
    ),
    "fused_dsa_extend_metadata": (fused.fused_dsa_extend_metadata, _fake_extend),
    "seqlens_expand": (fused.seqlens_expand, _fake_seqlens_expand),
}

#: Kept: the operators live as long as this object.
LIBRARY = torch.library.Library("nsa_meta", "DEF")  # type: ignore[no-untyped-call]


def _register() -> None:
    define: Callable[..., Any] = LIBRARY.define
    implement: Callable[..., Any] = LIBRARY.impl
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        kernel, fake = _KERNELS[name]
        define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for device in ("CPU", "CUDA"):
            implement(name, kernel, device)
        torch.library.register_fake(f"nsa_meta::{name}", fake, lib=LIBRARY)


_register()
