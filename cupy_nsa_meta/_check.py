"""Host-side checks: what types, shapes, devices, layouts and capacities can tell before a launch.

One line per error: the argument's name, what was expected, what came. ``TypeError`` for types and
dtypes, ``ValueError`` for shape, device, layout and overlap. Nothing has been written when one of
these is raised. What only the device knows becomes a status word instead (``_status.py``).
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy
import torch

from ._known import Guard, guard, is_like
from ._status import INT32_MAX

_Tensor = torch.Tensor
_int32 = torch.int32
_int64 = torch.int64
_CONTIGUOUS = (1,)


DraftExtendArrays = (
    "extend_seq_lens",
    "seq_lens",
    "out_seqlens_expanded",
    "out_nsa_cache_seqlens",
)
DraftExtendTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Addresses = tuple[int, int, int, int]  # of these four

EXTEND_IS_INT64 = 1
SEQ_IS_INT64 = 2
TOTAL_IS_GIVEN = 8


class DraftExtendKey(NamedTuple):
    """A seed-operation call as integers: calls with equal keys are the same launch."""

    device: int  # CUDA device index, -1 for the CPU
    bs: int
    limit: int  # total_tokens where given, else the capacity of the out buffers
    topk: int  # clamped to int32: lengths never pass that
    extend_ptr: int
    seq_ptr: int
    expanded_ptr: int
    clamped_ptr: int
    extend_stride: int
    seq_stride: int
    flags: int  # EXTEND_IS_INT64 | SEQ_IS_INT64 | TOTAL_IS_GIVEN
    use_adaptive: bool

    def with_total(self, total_tokens: int) -> DraftExtendKey:
        """The key of the call with ``total_tokens`` given."""
        return self._with(total_tokens, self.flags | TOTAL_IS_GIVEN)

    def without_total(self, room: int) -> DraftExtendKey:
        """The key of the call without a total, its outputs having ``room``."""
        return self._with(room, self.flags & ~TOTAL_IS_GIVEN)

    def _with(self, limit: int, flags: int) -> DraftExtendKey:
        device, bs, _, *others, _, use_adaptive = self
        return DraftExtendKey._make((device, bs, limit, *others, flags, use_adaptive))


def draft_extend(
    extend_seq_lens: Any,
    seq_lens: Any,
    nsa_index_topk: Any,
    out_seqlens_expanded: Any,
    out_nsa_cache_seqlens: Any,
    use_adaptive: Any,
    total_tokens: Any,
) -> tuple[DraftExtendTensors, DraftExtendKey]:
    """Check the arguments of the seed operation; every backend and plan goes through here.

    A call lasts a few microseconds and an attribute of a tensor costs 0.05 to 0.1: tensors of the
    layout of an earlier call are compared at once, and only sizes and addresses are read.
    """
    tensors = (extend_seq_lens, seq_lens, out_seqlens_expanded, out_nsa_cache_seqlens)
    layout = _last_layout
    if not is_like(layout.guard, tensors):
        tensors = _draft_extend_tensors(*tensors)
        extend_seq_lens, seq_lens, out_seqlens_expanded, out_nsa_cache_seqlens = tensors
        layout = _layout_of(tensors)
    _, device, extend_stride, seq_stride, extend_is_int64, seq_is_int64 = layout
    bs = extend_seq_lens.numel()
    if seq_lens.numel() != bs:
        _explain_draft_extend(*tensors)
    if type(nsa_index_topk) is not int or not 1 <= nsa_index_topk <= INT32_MAX:
        nsa_index_topk = min(integer("nsa_index_topk", nsa_index_topk, 1), INT32_MAX)
    if use_adaptive is not True and use_adaptive is not False:
        use_adaptive = boolean("use_adaptive", use_adaptive)

    room_expanded = out_seqlens_expanded.numel()
    room_clamped = out_nsa_cache_seqlens.numel()
    limit = room_expanded if room_expanded < room_clamped else room_clamped
    if limit > INT32_MAX:
        limit = INT32_MAX
    flags = extend_is_int64 * EXTEND_IS_INT64 | seq_is_int64 * SEQ_IS_INT64
    if total_tokens is not None:
        limit = given_total(total_tokens, limit, out_seqlens_expanded, out_nsa_cache_seqlens)
        flags += TOTAL_IS_GIVEN

    try:
        addresses = (
            extend_seq_lens.data_ptr(),
            seq_lens.data_ptr(),
            out_seqlens_expanded.data_ptr(),
            out_nsa_cache_seqlens.data_ptr(),
        )
    except RuntimeError:
        for name, tensor in zip(DraftExtendArrays, tensors, strict=True):
            has_memory(name, tensor)
        raise
    spans = (
        (8 if extend_is_int64 else 4) * ((bs - 1) * extend_stride + 1),
        (8 if seq_is_int64 else 4) * ((bs - 1) * seq_stride + 1),
        4 * room_expanded,
        4 * room_clamped,
    )
    if not are_apart(addresses, spans):  # exact positions only where two spans meet
        for name, tensor in zip(DraftExtendArrays, tensors, strict=True):
            has_memory(name, tensor)
        outside_input("out_nsa_cache_seqlens", tensors[3], "out_seqlens_expanded", tensors[2])
        for name, out in (
            ("out_seqlens_expanded", tensors[2]),
            ("out_nsa_cache_seqlens", tensors[3]),
        ):
            outside_input(name, out, "extend_seq_lens", tensors[0])
            outside_input(name, out, "seq_lens", tensors[1])
    return tensors, tuple.__new__(
        DraftExtendKey,
        (
            device,
            bs,
            limit,
            nsa_index_topk,
            *addresses,
            extend_stride,
            seq_stride,
            flags,
            use_adaptive,
        ),
    )


def are_apart(addresses: Addresses, spans: tuple[int, ...]) -> bool:
    """Whether all tensors have memory and no output's span of bytes meets that of another tensor.

    Where not, no element has to: two tensors may lie between each other's elements.
    """
    extend_ptr, seq_ptr, expanded_ptr, clamped_ptr = addresses
    extend_bytes, seq_bytes, expanded_bytes, clamped_bytes = spans
    expanded_end = expanded_ptr + expanded_bytes
    clamped_end = clamped_ptr + clamped_bytes
    return not (
        extend_ptr < MIN_ADDRESS
        or seq_ptr < MIN_ADDRESS
        or expanded_ptr < MIN_ADDRESS
        or clamped_ptr < MIN_ADDRESS
        or (expanded_ptr < clamped_end and clamped_ptr < expanded_end)
        or (extend_ptr < expanded_end and expanded_ptr < extend_ptr + extend_bytes)
        or (extend_ptr < clamped_end and clamped_ptr < extend_ptr + extend_bytes)
        or (seq_ptr < expanded_end and expanded_ptr < seq_ptr + seq_bytes)
        or (seq_ptr < clamped_end and clamped_ptr < seq_ptr + seq_bytes)
    )


def given_total(
    total_tokens: Any, limit: int, expanded: torch.Tensor, clamped: torch.Tensor
) -> int:
    """The total that a caller gives, at most ``limit``, what both outputs have room for."""
    if type(total_tokens) is not int or total_tokens < 0:
        total_tokens = integer("total_tokens", total_tokens, 0)
    if total_tokens > limit:
        raise ValueError(
            f"total_tokens: expected <= {limit}, the capacity of the out buffers "
            f"(out_seqlens_expanded [{expanded.numel()}], out_nsa_cache_seqlens "
            f"[{clamped.numel()}]), got {total_tokens}"
        )
    return total_tokens  # type: ignore[no-any-return]


class _Layout(NamedTuple):
    """Of the tensors of an earlier call: all but their sizes and addresses."""

    guard: Guard
    device: int
    extend_stride: int
    seq_stride: int
    extend_is_int64: bool
    seq_is_int64: bool


def _fits_nothing(*tensors: Any) -> bool:
    """The guard of a layout that is right for its own tensors alone."""
    return False


_layouts: dict[tuple[Any, ...], _Layout] = {}
_last_layout = _Layout(_fits_nothing, -1, 1, 1, False, False)
_MAX_LAYOUTS = 64


def _layout_of(tensors: DraftExtendTensors) -> _Layout:
    """The layout of tensors that were checked; the next call is compared with it first."""
    global _last_layout
    extend, seq, *outs = tensors
    key = (extend.dtype, seq.dtype, extend.get_device(), extend.stride(), seq.stride())
    layout = _layouts.get(key)
    if layout is not None and is_like(layout.guard, tensors):
        _last_layout = layout
        return layout
    # An output of one element may have any stride; that of more may not, and the guard does not
    # look at sizes.
    is_plain = all(out.stride() == (1,) for out in outs)
    layout_guard = guard(tensors, any_size=True) if is_plain else None
    layout = _Layout(
        layout_guard or _fits_nothing,
        key[2], key[3][0], key[4][0], key[0] is _int64, key[1] is _int64,
    )  # fmt: skip
    if layout_guard is not None:
        if len(_layouts) >= _MAX_LAYOUTS:
            _layouts.clear()
        _last_layout = _layouts[key] = layout
    return layout


def _draft_extend_tensors(
    extend_seq_lens: Any, seq_lens: Any, out_seqlens_expanded: Any, out_nsa_cache_seqlens: Any
) -> DraftExtendTensors:
    """The arrays as tensors; raise for type, dtype, shape, layout or device."""
    extend_seq_lens = as_tensor("extend_seq_lens", extend_seq_lens)
    seq_lens = as_tensor("seq_lens", seq_lens)
    out_seqlens_expanded = as_tensor("out_seqlens_expanded", out_seqlens_expanded, True)
    out_nsa_cache_seqlens = as_tensor("out_nsa_cache_seqlens", out_nsa_cache_seqlens, True)
    tensors = (extend_seq_lens, seq_lens, out_seqlens_expanded, out_nsa_cache_seqlens)
    _explain_draft_extend(*tensors)
    return tensors


def _explain_draft_extend(
    extend_seq_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    out_seqlens_expanded: torch.Tensor,
    out_nsa_cache_seqlens: torch.Tensor,
) -> None:
    """Raise for dtype, shape, layout or device; return where the tensors are good (on the CPU)."""
    bs = lengths("extend_seq_lens", extend_seq_lens)
    num_seq_lens = lengths("seq_lens", seq_lens)
    if num_seq_lens != bs:
        raise ValueError(f"seq_lens: expected [{bs}] like extend_seq_lens, got [{num_seq_lens}]")
    output("out_seqlens_expanded", out_seqlens_expanded)
    output("out_nsa_cache_seqlens", out_nsa_cache_seqlens)
    same_device(
        extend_seq_lens=extend_seq_lens,
        seq_lens=seq_lens,
        out_seqlens_expanded=out_seqlens_expanded,
        out_nsa_cache_seqlens=out_nsa_cache_seqlens,
    )


def out_total(array: Any, tensors: DraftExtendTensors, key: DraftExtendKey) -> torch.Tensor:
    """Check the ``out_total`` [2] of an asynchronous call against its other arguments."""
    tensor = array if isinstance(array, _Tensor) else as_tensor("out_total", array, writable=True)
    if not (
        tensor.dtype is _int32
        and not tensor.is_nested
        and tensor.numel() == 2
        and tensor.stride() == (1,)
        and tensor.get_device() == key.device
        and key.device >= 0
    ):
        room = output("out_total", tensor)
        if room != 2:
            raise ValueError(f"out_total: expected shape [2] (total, status), got [{room}]")
        same_device(extend_seq_lens=tensors[0], out_total=tensor)
    begin = tensor.data_ptr()
    if begin < MIN_ADDRESS:
        has_memory("out_total", tensor)
    end = begin + 8
    for name, other in zip(DraftExtendArrays, tensors, strict=True):
        at = other.data_ptr()
        if at < end and begin < at + span(other):
            outside_input("out_total", tensor, name, other)
    return tensor


class FusedOutputs(NamedTuple):
    """The outputs of the fused family; None: not wanted."""

    cache_seqlens: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    extend_start_loc: torch.Tensor | None = None
    seqlens_expanded: torch.Tensor | None = None
    dsa_cache_seqlens: torch.Tensor | None = None
    dsa_cu_seqlens_k: torch.Tensor | None = None
    token_to_batch_idx: torch.Tensor | None = None
    ks: torch.Tensor | None = None
    ke: torch.Tensor | None = None
    topk_indices_offset: torch.Tensor | None = None
    positions: torch.Tensor | None = None  # int64
    paged_mqa_ctx_lens_2d: torch.Tensor | None = None
    page_table_1: torch.Tensor | None = None
    real_page_table: torch.Tensor | None = None
    page_table_1_flattened: torch.Tensor | None = None


class FusedCall(NamedTuple):
    """The checked arguments of one call of the fused family."""

    seq_lens: torch.Tensor
    extend_seq_lens: torch.Tensor | None
    req_pool_indices: torch.Tensor | None
    req_to_token: torch.Tensor | None
    outputs: FusedOutputs  # at page size 1 a single page table is page_table_1
    bs: int
    total_len: int  # rows
    width: int  # W
    topk: int  # clamped to int32
    page_size: int
    uniform_q: int  # query tokens of every request; -1: extend_seq_lens says
    kv_add: int  # cache_seqlens - seq_lens
    pad_to: int  # 0: no padding
    one_row_per_request: bool  # of the page tables; else one for each row
    device: int  # CUDA device index, -1 for the CPU
    total_is_capacity: bool = False  # total_len bounds T, which only the device knows
    max_extend_len: int = INT32_MAX  # query tokens of a request, as the host announces them


# How the outputs are laid out: 1-D outputs [0, 12) by the room that they need, then the tables.
_PER_REQUEST, _PER_REQUEST_CU, _PER_ROW, _PER_ROW_CU, _CACHE, _CACHE_CU = range(6)
_FUSED_ROOMS = (
    _PER_REQUEST, _PER_REQUEST_CU, _PER_REQUEST_CU, _PER_REQUEST,
    _PER_ROW, _CACHE, _CACHE_CU, _PER_ROW, _PER_ROW, _PER_ROW, _PER_ROW, _PER_ROW,
)  # fmt: skip
_POSITIONS = FusedOutputs._fields.index("positions")
_MAX_PAGE_SIZE = 256


def fused(call: FusedCall, width_name: str) -> FusedCall:
    """Check the tensors and sizes of a call of the fused family against each other.

    ``width_name`` is what the caller knows W as. ``topk``, ``page_size`` and the aliasing of the
    two page tables at page size 1 come back settled, the device index filled in.
    """
    seq_lens, extend, pool, tokens, out, bs, total_len, width = call[:8]
    topk, page_size, uniform_q = call.topk, call.page_size, call.uniform_q
    if type(bs) is not int or bs < 0 or bs > INT32_MAX:
        bs = integer("bs", bs, 0, INT32_MAX)
    if type(total_len) is not int or total_len < 0 or total_len > INT32_MAX:
        total_len = integer("total_len", total_len, 0, INT32_MAX)
    if type(width) is not int or width < 0:
        width = integer(width_name, width, 0)
    if type(topk) is not int or topk < 1:
        topk = integer("dsa_index_topk", topk, 1)
    if type(page_size) is not int or page_size not in _PAGE_SIZES:
        page_size = integer("physical_page_size", page_size, 1)
        if page_size not in _PAGE_SIZES:
            raise ValueError(
                f"physical_page_size: expected a power of two in [1, {_MAX_PAGE_SIZE}], "
                f"got {page_size}"
            )

    _require_tensor("seq_lens", seq_lens)
    device = seq_lens.get_device()
    # Memory that is read, and memory that is written: (begin, end) in bytes.
    begins, ends = [], []
    for name, tensor in (
        ("seq_lens", seq_lens),
        ("extend_seq_lens", extend),
        ("req_pool_indices", pool),
    ):
        if tensor is None:
            continue
        _require_tensor(name, tensor)
        if lengths(name, tensor) < bs:
            raise ValueError(f"{name}: expected [>= {bs}] (bs), got [{tensor.numel()}]")
        if tensor.get_device() != device:
            same_device(seq_lens=seq_lens, **{name: tensor})
        begins.append(begin := tensor.data_ptr())
        ends.append(begin + span(tensor))

    padded = call.pad_to or total_len
    rooms = (bs, bs + 1, total_len, total_len + 1, padded, padded + 1)
    position = -1
    for tensor, room in zip(out, _FUSED_ROOMS, strict=False):
        position += 1
        if tensor is None:
            continue
        if (
            not isinstance(tensor, _Tensor)
            or tensor.dtype is not (_int32 if position != _POSITIONS else _int64)
            or tensor.dim() != 1
            or not tensor.is_contiguous()
            or (elements := tensor.numel()) < rooms[room]
            or tensor.get_device() != device
        ):
            _explain_output(position, tensor, rooms[room], seq_lens)
        begins.append(begin := tensor.data_ptr())
        ends.append(begin + (elements << (2 if position != _POSITIONS else 3)))

    page_1, real_page, flattened = out[13:]
    if out.paged_mqa_ctx_lens_2d is not None:
        table("paged_mqa_ctx_lens_2d", out.paged_mqa_ctx_lens_2d, bs, uniform_q, "next_n")
        _place("paged_mqa_ctx_lens_2d", out.paged_mqa_ctx_lens_2d, seq_lens, device, begins, ends)
    if flattened is not None:
        _require_tensor("page_table_1_flattened", flattened)
        output("page_table_1_flattened", flattened)
        _place("page_table_1_flattened", flattened, seq_lens, device, begins, ends)
    if tokens is not None:
        table("req_to_token", tokens, 0, width, width_name, written=False)
        _place("req_to_token", tokens, seq_lens, device, begins, ends)
    if page_1 is not None or real_page is not None:
        rows = bs if call.one_row_per_request else total_len
        if page_1 is not None:
            table("page_table_1", page_1, rows, width, width_name)
            _place("page_table_1", page_1, seq_lens, device, begins, ends)
        if real_page is not None:
            pages = -(-width // page_size)
            table("real_page_table", real_page, rows, pages, f"{width_name} / physical_page_size")
            if (
                page_size == 1
                and page_1 is not None
                and page_1.data_ptr() == real_page.data_ptr()
                and (
                    page_1.stride(0) == real_page.stride(0)
                    or page_1.size(0) == real_page.size(0) == 1
                )
            ):
                out = out._replace(real_page_table=None)
            elif page_size == 1 and page_1 is None:
                out = out._replace(page_table_1=real_page, real_page_table=None)
                _place("real_page_table", real_page, seq_lens, device, begins, ends)
            else:
                _place("real_page_table", real_page, seq_lens, device, begins, ends)
    if device < 0:  # the CPU, or anything that has no index
        named = {"seq_lens": seq_lens, "extend_seq_lens": extend, "req_pool_indices": pool}
        named |= {"req_to_token": tokens} | call.outputs._asdict()
        same_device(**{name: tensor for name, tensor in named.items() if tensor is not None})
    elif not seq_lens.is_cuda:
        same_device(seq_lens=seq_lens)

    # Spans apart from each other: each ends before the next begins.
    by_begin, by_end = sorted(begins), sorted(ends)
    if by_begin[0] < MIN_ADDRESS:
        named = {"seq_lens": seq_lens, "extend_seq_lens": extend, "req_pool_indices": pool}
        named |= {"req_to_token": tokens} | call.outputs._asdict()
        for name, tensor in named.items():
            if tensor is not None:
                has_memory(name, tensor)
    for end, begin in zip(by_end, by_begin[1:], strict=False):
        if end > begin:
            _explain_overlap(seq_lens, extend, pool, tokens, out)
            break
    return FusedCall(
        seq_lens, extend, pool, tokens, out, bs, total_len,
        width if width <= INT32_MAX else INT32_MAX,  # as are lengths
        topk if topk <= INT32_MAX else INT32_MAX, page_size, uniform_q, call.kv_add, call.pad_to,
        call.one_row_per_request, device, call.total_is_capacity, call.max_extend_len,
    )  # fmt: skip


_PAGE_SIZES = frozenset(1 << shift for shift in range(_MAX_PAGE_SIZE.bit_length()))


def _require_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, _Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")


def _explain_output(position: int, tensor: Any, room: int, seq_lens: torch.Tensor) -> None:
    """Raise for what is wrong with a 1-D output."""
    name = FusedOutputs._fields[position]
    _require_tensor(name, tensor)
    elements = output(name, tensor, _int64 if position == _POSITIONS else _int32)
    if elements < room:
        raise ValueError(f"{name}: expected [>= {room}], got [{elements}]")
    same_device(seq_lens=seq_lens, **{name: tensor})


def table(
    name: str, tensor: Any, rows: int, columns: int, columns_name: str, written: bool = True
) -> None:
    """An int32 table with unit column stride and room for ``rows`` x ``columns``."""
    _require_tensor(name, tensor)
    if tensor.dtype is not _int32:
        raise TypeError(f"{name}: expected dtype torch.int32, got {tensor.dtype}")
    dense(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected a 2-D tensor, got shape {list(tensor.shape)}")
    num_rows, num_columns = tensor.shape
    if num_rows < rows or num_columns < columns:
        raise ValueError(
            f"{name}: expected [>= {rows}, >= {columns}] (columns: {columns_name}), "
            f"got [{num_rows}, {num_columns}]"
        )
    row_stride, column_stride = tensor.stride()
    if column_stride != 1 and num_columns > 1 and num_rows:
        raise ValueError(f"{name}: expected column stride 1, got {column_stride}")
    if written and row_stride < columns and rows > 1:
        raise ValueError(
            f"{name}: expected rows that do not overlap (row stride >= {columns}), "
            f"got row stride {row_stride}"
        )


def span(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if not tensor.numel():
        return 0
    last = 0
    for size, step in zip(tensor.shape, tensor.stride(), strict=True):
        last += (size - 1) * step
    return (last + 1) * tensor.element_size()


def _place(
    name: str,
    tensor: torch.Tensor,
    seq_lens: torch.Tensor,
    device: int,
    begins: list[int],
    ends: list[int],
) -> None:
    if tensor.get_device() != device:
        same_device(seq_lens=seq_lens, **{name: tensor})
    begin = tensor.data_ptr()
    begins.append(begin)
    ends.append(begin + span(tensor))


def _explain_overlap(
    seq_lens: torch.Tensor,
    extend: torch.Tensor | None,
    pool: torch.Tensor | None,
    tokens: torch.Tensor | None,
    out: FusedOutputs,
) -> None:
    """Raise where an output shares a byte with another tensor; inputs may share with each other."""
    inputs = {
        "seq_lens": seq_lens,
        "extend_seq_lens": extend,
        "req_pool_indices": pool,
        "req_to_token": tokens,
    }
    others = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    for name, tensor in out._asdict().items():
        if tensor is None:
            continue
        for other_name, other in others.items():
            if shares_bytes(tensor, other):
                raise overlap_error(name, other_name)
        others[name] = tensor


def shares_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two 1-D or 2-D tensors have a byte in common; exact for any strides."""
    if not a.numel() or not b.numel():
        return False  # no elements, no overlap: zero-size tensors may share a pointer
    if a.data_ptr() + span(a) <= b.data_ptr() or b.data_ptr() + span(b) <= a.data_ptr():
        return False
    a_begin, a_size = _pieces(a)
    b_begin, b_size = _pieces(b)
    # The last piece of b that begins before each piece of a ends: b's pieces all have one length.
    before = numpy.searchsorted(b_begin, a_begin + a_size, side="left") - 1
    return bool(numpy.any((before >= 0) & (b_begin[before] + b_size > a_begin)))


def _pieces(tensor: torch.Tensor) -> tuple[Any, int]:
    """The pieces that a tensor is made of: their sorted begins in bytes, and the bytes of each.

    A piece is a row where the last stride is 1, else an element.
    """
    size = tensor.element_size()
    dims = [(n, step * size) for n, step in zip(tensor.shape, tensor.stride(), strict=True)]
    piece = size
    if dims[-1][1] == size:
        piece = dims.pop()[0] * size
    begins = numpy.array([tensor.data_ptr()], dtype=numpy.int64)
    for n, step in dims:
        begins = (begins[:, None] + numpy.arange(n, dtype=numpy.int64) * step).ravel()
    return numpy.sort(begins), piece


def lengths(name: str, tensor: torch.Tensor) -> int:
    """An input of lengths: 1-D, int32 or int64, any stride. Returns its number of elements."""
    dtype = tensor.dtype
    if dtype is not _int32 and dtype is not _int64:
        raise TypeError(f"{name}: expected dtype torch.int32 or torch.int64, got {dtype}")
    dense(name, tensor)
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected a 1-D tensor, got shape {list(tensor.shape)}")
    return tensor.numel()


def output(name: str, tensor: torch.Tensor, dtype: torch.dtype = _int32) -> int:
    """An output: 1-D, int32 mostly, contiguous. Returns its number of elements."""
    if tensor.dtype is not dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    dense(name, tensor)
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected a 1-D tensor, got shape {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor, got stride {tensor.stride(0)} "
            f"(shape {list(tensor.shape)}); it is written in place, so a copy would lose the result"
        )
    return tensor.numel()


def dense(name: str, tensor: torch.Tensor) -> None:
    """A tensor of plain memory: neither sparse nor nested."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise ValueError(f"{name}: expected a dense tensor (torch.strided), got {kind}")


#: No memory lies below (vm.mmap_min_addr): the pointer of a FakeTensor is its offset.
MIN_ADDRESS = 1 << 16


def has_memory(name: str, tensor: torch.Tensor) -> None:
    """A tensor whose elements lie somewhere: no FakeTensor, no functional wrapper."""
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # what torch announces for a FakeTensor
        address = 0
    if address < MIN_ADDRESS and tensor.numel():
        kind = type(tensor).__name__
        raise ValueError(f"{name}: expected a tensor with memory, got a {kind} without")


def integer(name: str, value: Any, lowest: int, highest: int | None = None) -> int:
    """A Python or NumPy integer in [lowest, highest]; a bool is not an int here."""
    if isinstance(value, bool) or not isinstance(value, (int, numpy.integer)):
        raise TypeError(f"{name}: expected an int >= {lowest}, got {type(value).__name__}")
    if value < lowest:
        raise ValueError(f"{name}: expected an int >= {lowest}, got {value}")
    if highest is not None and value > highest:
        raise ValueError(f"{name}: expected an int <= {highest}, got {value}")
    return int(value)


def boolean(name: str, value: Any) -> bool:
    """A Python or NumPy bool."""
    if not isinstance(value, (bool, numpy.bool_)):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return bool(value)


def device_index(device: Any, takes_cpu: bool = False) -> int:
    """Index of the CUDA device that an argument ``device`` names; -1: the CPU."""
    wanted = "a CUDA device or the CPU" if takes_cpu else "a CUDA device"
    if isinstance(device, bool) or not isinstance(device, (int, str, torch.device)):
        raise TypeError(f"device: expected {wanted}, got {type(device).__name__}")
    if not isinstance(device, int):
        try:
            named = torch.device(device)
        except RuntimeError:  # no name of a device; torch lists all that there are
            raise ValueError(f"device: expected {wanted}, got {device!r}") from None
        if named.type == "cpu" and takes_cpu:
            return -1
        if named.type != "cuda":
            raise ValueError(f"device: expected {wanted}, got {named}")
        device = torch.cuda.current_device() if named.index is None else named.index
    count = torch.cuda.device_count()
    if not 0 <= device < count:
        raise ValueError(f"device: expected the index of one of {count} CUDA devices, got {device}")
    return int(device)


def same_device(**tensors: torch.Tensor) -> None:
    """All tensors on one device, which is a CUDA device or the CPU."""
    (first_name, first), *others = tensors.items()
    if not (first.is_cuda or first.is_cpu):
        raise ValueError(f"{first_name}: expected a CUDA or CPU tensor, got {first.device}")
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(
                f"{name}: expected device {first.device} like {first_name}, got {tensor.device}"
            )


def not_on_cuda() -> ValueError:
    """For CPU tensors given to the CUDA function."""
    return ValueError(
        "extend_seq_lens, seq_lens, out_seqlens_expanded, out_nsa_cache_seqlens: expected CUDA "
        "tensors, got cpu (fill_draft_extend_metadata takes tensors of either device)"
    )


def outside_input(out_name: str, out: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise where a contiguous output shares bytes with a 1-D tensor of any stride."""
    if not out.numel() or not other.numel():
        return  # no elements, no overlap: zero-size tensors may share a pointer
    size, step = other.element_size(), other.element_size() * other.stride(0)
    out_begin = out.data_ptr() - other.data_ptr()
    out_end = out_begin + out.element_size() * out.numel()
    # The first element of `other` that ends behind out_begin overlaps if it begins before out_end.
    first = 0 if step == 0 else max(0, (out_begin - size) // step + 1)
    begin = first * step
    if first < other.numel() and begin < out_end and begin + size > out_begin:
        raise overlap_error(out_name, other_name)


def overlap_error(out_name: str, other_name: str) -> ValueError:
    return ValueError(f"{out_name}: expected memory of its own, got an overlap with {other_name}")


# ---- Foreign arrays -----------------------------------------------------------------------------

_DLPACK_CUDA_DEVICES = (2, 13)  # kDLCUDA, kDLCUDAManaged
_DLPACK_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY


class _DLTensor(ctypes.Structure):
    """DLPack's ``DLTensor``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint32),  # code, bits, lanes
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # null: compact
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensorVersioned(ctypes.Structure):
    """DLPack 1.0; the older ``DLManagedTensor`` begins with its DLTensor."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


def as_tensor(name: str, array: Any, writable: bool = False) -> torch.Tensor:
    """Share the memory of any object with ``__dlpack__`` as a torch tensor, without a copy.

    The exporter is asked not to synchronise (stream -1): ordering against the stream that produced
    the array is the caller's.
    """
    if isinstance(array, _Tensor):
        return array
    export = getattr(type(array), "__dlpack__", None)
    if export is None or not hasattr(array, "__dlpack_device__"):
        raise TypeError(
            f"{name}: expected a torch.Tensor or an object with __dlpack__, "
            f"got {type(array).__name__}"
        )
    try:
        capsule = _export(array)
        tensor, flags = _look_into(capsule)
        strides = [tensor.strides[k] for k in range(tensor.ndim)] if tensor.strides else []
        if min(strides, default=0) < 0:  # torch ends the process over one
            raise ValueError(f"{name}: expected strides >= 0, got {strides}")
        if writable and (flags & _DLPACK_READ_ONLY or _is_immutable(array)):
            raise ValueError(
                f"{name}: expected a writable array, got a read-only {type(array).__name__}"
            )
        return torch.utils.dlpack.from_dlpack(capsule)
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(
            f"{name}: expected an array that DLPack can share, got {type(array).__name__} ({error})"
        ) from error


def _export(array: Any) -> Any:
    stream = -1 if array.__dlpack_device__()[0] in _DLPACK_CUDA_DEVICES else None
    try:
        return array.__dlpack__(stream=stream, max_version=(1, 0))
    except TypeError:  # an exporter from before DLPack 1.0
        pass
    except RuntimeError:  # JAX does not know the stream -1
        return array.__dlpack__()
    return array.__dlpack__(stream=stream)


def _look_into(capsule: Any) -> tuple[_DLTensor, int]:
    """The DLTensor of a capsule, and its flags (0 before DLPack 1.0)."""
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.argtypes = (ctypes.py_object,)
    get_name.restype = ctypes.c_char_p
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    get_pointer.restype = ctypes.c_void_p
    kind = get_name(capsule)
    pointer = get_pointer(capsule, kind)
    if kind == b"dltensor_versioned":
        managed = _DLManagedTensorVersioned.from_address(pointer)
        return managed.tensor, managed.flags
    return _DLTensor.from_address(pointer), 0


def _is_immutable(array: Any) -> bool:
    """Exporters that cannot say so through DLPack: JAX arrays, read-only NumPy arrays."""
    if type(array).__module__.partition(".")[0] in ("jax", "jaxlib"):
        return True
    flags = getattr(array, "flags", None)
    return getattr(flags, "writeable", True) is False
