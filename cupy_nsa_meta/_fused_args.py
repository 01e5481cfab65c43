"""``struct FusedArgs`` of ``cuda_src/fused.cu``, and how a call of the fused family is cut up.

What depends on tensors is packed once, into a ``Template``; the numbers of a call follow.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from . import _launch
from ._check import FusedCall
from ._launch import Launches, PackedLaunch
from ._status import INT32_MAX

#: ``struct FusedArgs`` of fused.cu.
LAYOUT = _launch.Layout(
    ("Q", "seq_lens req_pool_indices"),
    ("i", "bs uniform_q"),
    ("I", "flags"),
    ("i", "page_1_blocks real_page_blocks"),
    ("I", "blocks_inverse"),
    ("i", "seq_step pool_step"),
    ("Q", "extend_seq_lens req_to_token"),
    ("q", "token_stride pool_rows"),
    ("i", "extend_step table_items total_len kv_add topk width page_shift token_width"),
    ("Q", "cache_seqlens cu_seqlens_k dsa_cache_seqlens dsa_cu_seqlens_k"),
    ("Q", "page_table_1"),
    ("q", "page_1_stride"),
    ("Q", "real_page_table"),
    ("q", "real_page_stride"),
    ("Q", "seqlens_expanded paged_mqa_ctx_lens_2d"),
    ("q", "mqa_stride"),
    ("Q", "status tile_sums"),
    ("i", "pad_to num_tiles row_parts flattened_blocks"),
    ("Q", "cu_seqlens_q extend_start_loc token_to_batch_idx ks ke topk_indices_offset positions"),
    ("Q", "page_table_1_flattened"),
    ("q", "flattened_size seq_stride extend_stride pool_stride"),
)
ARGS = LAYOUT.struct
assert ARGS.size == 328

REQUESTS_PER_TILE = _launch.BLOCK_THREADS  # kRequestsPerTile
VECTOR_COLUMNS = 4  # kVectorColumns
MAX_ITEMS_PER_THREAD = 4  # kUnroll
NUM_TILE_SUMS = 4  # kTileSums
ONE_LAUNCH_MAX_BS = 16384
DIRECT_MAX_WIDTH = 1 << 30  # columns that its 32-bit arithmetic stays below
DIRECT_MAX_EXTEND_LEN = 8  # query tokens of a request that fused_direct serves
#: Table blocks per multiprocessor: below the first number a thread takes one item rather than
#: several, so that small batches spread; above the second a block goes on along its row, so that
#: long tables with short requests do not launch blocks that only find nothing to do.
SPREAD_BLOCKS_PER_SM = 2
MAX_BLOCKS_PER_SM = 32
ROW_BLOCKS_PER_SM = 2

SEQ_IS_INT64 = 1
EXTEND_IS_INT64 = 2
POOL_IS_INT64 = 4
HAS_ROW_OUTPUTS = 8
ONE_ROW_PER_REQUEST = 16
TOTAL_IS_CAPACITY = 32
HAS_VECTORS = 64
MAX_SHAPES = 128  # kept by a template


class Geometry(NamedTuple):
    """How a call is cut up; depends on host-known sizes alone."""

    num_tiles: int
    row_parts: int  # blocks of 1-D arrays for each tile of requests
    page_1_blocks: int  # for each request; 0: the table is not wanted
    real_page_blocks: int
    flattened_blocks: int
    table_items: int  # vectors or tokens that a thread has in flight

    @property
    def table_blocks(self) -> int:
        return self.page_1_blocks + self.real_page_blocks + self.flattened_blocks

    def grid(self, bs: int) -> int:
        return self.num_tiles * self.row_parts + bs * self.table_blocks


class TableUnits(NamedTuple):
    """Blocks that each table of a request would take with one item for each thread."""

    page_1: int = 0
    real_page: int = 0
    flattened: int = 0


def table_units(call: FusedCall) -> TableUnits:
    out = call.outputs
    page_1 = real_page = flattened = 0
    if out.page_table_1 is not None:
        page_1 = _blocks(call.width, VECTOR_COLUMNS)
    if out.real_page_table is not None:
        real_page = _blocks(call.width, call.page_size)
    if out.page_table_1_flattened is not None:
        assert call.req_to_token is not None
        flattened = _blocks(call.req_to_token.size(1), VECTOR_COLUMNS)
    return TableUnits(page_1, real_page, flattened)


def direct_kernel(call: FusedCall) -> str | None:
    """The kernel for few requests that knows the tensors of a call, those of decode and speculative
    steps of a few query tokens each; None where there is none."""
    out = call.outputs
    if (
        out.cache_seqlens is None
        or out.cu_seqlens_k is None
        or out.dsa_cache_seqlens is None
        or out.dsa_cu_seqlens_k is None
        or out.page_table_1_flattened is not None
        or not _are_none(out[2:4])  # cu_seqlens_q, extend_start_loc
        or not _are_none(out[7:12])  # token_to_batch_idx .. positions
        or (call.max_extend_len if call.uniform_q < 0 else call.uniform_q) > DIRECT_MAX_EXTEND_LEN
        or max(_steps(call)) > INT32_MAX
        or call.width >= DIRECT_MAX_WIDTH
        or (call.req_to_token is not None and call.req_to_token.size(0) > INT32_MAX)
        or any(  # bytes between rows
            table is not None and table.stride(0) > INT32_MAX // 4
            for table in (call.req_to_token, out.page_table_1, out.real_page_table)
        )
    ):
        return None
    return "fused_direct_uniform" if call.extend_seq_lens is None else "fused_direct"


def _steps(call: FusedCall) -> tuple[int, int, int]:
    """Bytes between lengths of seq_lens, extend_seq_lens and req_pool_indices."""
    seq, extend, pool = [
        0 if tensor is None else tensor.stride(0) * tensor.element_size() for tensor in call[:3]
    ]
    return seq, extend, pool


def _are_none(tensors: Iterable[torch.Tensor | None]) -> bool:
    """By identity: a tensor takes several microseconds to say that it does not equal None."""
    return all(tensor is None for tensor in tensors)


def num_tiles(bs: int) -> int:
    """Tiles of requests, at least one."""
    return max(1, -(-bs // REQUESTS_PER_TILE))


def parts_of_rows(bs: int, rows: int) -> int:
    """Blocks for the rows of a tile of requests that there is work for."""
    return max(1, -(-rows // (num_tiles(bs) * REQUESTS_PER_TILE)))


def cut_up(bs: int, parts: int, units: TableUnits, num_sms: int) -> Geometry:
    """How to cut up a batch with work for so many ``parts_of_rows``."""
    tiles = num_tiles(bs)
    row_parts = max(1, min(parts, ROW_BLOCKS_PER_SM * num_sms // tiles))
    if not bs or not any(units):
        return Geometry(tiles, row_parts, 0, 0, 0, 1)
    items = bs * sum(units) // (SPREAD_BLOCKS_PER_SM * num_sms)
    items = max(1, min(items, MAX_ITEMS_PER_THREAD))
    most = max(1, MAX_BLOCKS_PER_SM * num_sms // bs)
    page_1, real_page, flattened = (min(-(-blocks // items), most) for blocks in units)
    return Geometry(tiles, row_parts, page_1, real_page, flattened, items)


def _blocks(columns: int, columns_per_item: int) -> int:
    return max(1, -(-columns // (columns_per_item * _launch.BLOCK_THREADS)))


def launches_of(bs: int, shape: Geometry, direct: str | None, tiled: bool) -> Launches:
    """Tiles of requests, blocks over their rows (of which a ``direct`` kernel has one), blocks over
    the columns of each table row."""
    last = (direct or "fused", shape.grid(bs))
    return (("fused_tiles", shape.num_tiles), last) if tiled else (last,)


def _constant_flags(call: FusedCall) -> int:
    """The flags of a call but for TOTAL_IS_CAPACITY."""
    seq, extend, pool, tokens, out = call[:5]
    page_1, real_page = out.page_table_1, out.real_page_table
    flags = SEQ_IS_INT64 if seq.dtype is torch.int64 else 0
    if extend is not None and extend.dtype is torch.int64:
        flags |= EXTEND_IS_INT64
    if pool is not None and pool.dtype is torch.int64:
        flags |= POOL_IS_INT64
    if not _are_none(out[4:13]):  # seqlens_expanded .. paged_mqa_ctx_lens_2d
        flags |= HAS_ROW_OUTPUTS
    if call.one_row_per_request:
        flags |= ONE_ROW_PER_REQUEST
    if page_1 is not None and tokens is not None:
        # At page size 1 a second table is copied by vectors, too.
        second = (real_page,) if real_page is not None and call.page_size == 1 else ()
        places = 0
        for table in (tokens, page_1, *second):
            places |= table.data_ptr() | 4 * table.stride(0)
        if places & 15 == 0:
            flags |= HAS_VECTORS
    return flags


def _pack_constants(call: FusedCall, status: int) -> bytes:
    """``struct FusedArgs`` with 0 for what a ``Template`` packs by the numbers of a call."""
    seq, extend, pool, tokens, out = call[:5]
    page_1, real_page, mqa, flattened = (
        out.page_table_1,
        out.real_page_table,
        out.paged_mqa_ctx_lens_2d,
        out.page_table_1_flattened,
    )
    has_tables = not _are_none(out[13:])
    seq_step, extend_step, pool_step = (min(step, INT32_MAX) for step in _steps(call))
    (
        cache, cu_k, cu_q, starts, expanded, dsa, dsa_cu, *others, mqa_at, page_1_at, real_page_at,
        flattened_at,
    ) = [0 if tensor is None else tensor.data_ptr() for tensor in out]  # fmt: skip
    return ARGS.pack(
        seq.data_ptr(),
        pool.data_ptr() if has_tables and pool is not None else 0,
        *[0] * 6,  # bs .. blocks_inverse
        seq_step,
        pool_step,
        0 if extend is None else extend.data_ptr(),
        tokens.data_ptr() if has_tables and tokens is not None else 0,
        0 if tokens is None else tokens.stride(0),
        0 if tokens is None else tokens.size(0),
        extend_step,
        0,  # table_items
        0,  # total_len
        call.kv_add,
        call.topk,
        call.width,
        call.page_size.bit_length() - 1,
        0 if tokens is None else tokens.size(1),
        cache,
        cu_k,
        dsa,
        dsa_cu,
        page_1_at,
        0 if page_1 is None else page_1.stride(0),
        real_page_at,
        0 if real_page is None else real_page.stride(0),
        expanded,
        mqa_at,
        0 if mqa is None else mqa.stride(0),
        status,
        *[0] * 5,  # tile_sums .. flattened_blocks
        cu_q,
        starts,
        *others,  # token_to_batch_idx .. positions
        flattened_at,
        0 if flattened is None else flattened.numel(),
        seq.stride(0),
        0 if extend is None else extend.stride(0),
        0 if pool is None else pool.stride(0),
    )


# The fields of ``ARGS`` that differ between calls on the same tensors.
STATUS_AT = LAYOUT.at("status")
_FRONT, _FRONT_AT = LAYOUT.run_of(
    "bs uniform_q flags page_1_blocks real_page_blocks blocks_inverse"
)
_ITEMS, _ITEMS_AT = LAYOUT.run_of("table_items total_len")
_TILES, _TILES_AT = LAYOUT.run_of("tile_sums pad_to num_tiles row_parts flattened_blocks")
_ARGS_SIZE = ARGS.size
_TOTAL_LEN, _TOTAL_LEN_AT = LAYOUT.run_of("total_len")
_PAD_TO, _PAD_TO_AT = LAYOUT.run_of("pad_to")


def _inverse(divisor: int) -> int:
    """ceil(2^32 / divisor): n * inverse >> 32 is n // divisor for n * divisor < 2^32."""
    return -(-(1 << 32) // divisor) if divisor > 1 else 0


class Numbers(NamedTuple):
    """What may differ between calls on the same tensors: those of a ``FusedCall``."""

    bs: int
    total_len: int
    pad_to: int
    total_is_capacity: bool = False


#: ``Numbers``, or the same without names, which take longer to give than to use.
PlainNumbers = tuple[int, int, int, bool]


def numbers_of(call: FusedCall) -> Numbers:
    return Numbers(call.bs, call.total_len, call.pad_to, call.total_is_capacity)


class Template:
    """Checked tensors, top-k, page size and width, packed once for any numbers.

    Keeps no tensor alive. Threads may share one.
    """

    def __init__(self, call: FusedCall, num_sms: int, status: int) -> None:
        self._num_sms = num_sms
        self._units = table_units(call)
        self._direct = direct_kernel(call)
        self._uniform_q = call.uniform_q
        self._flags = _constant_flags(call)
        self._base = _pack_constants(call, status)
        #: By what the grid depends on, rows in tiles: the arguments without total_len and pad_to,
        #: kernels, grids. A bytearray, since bytes take 0.25 us more to copy into one.
        self._shapes: dict[tuple[Any, ...], tuple[bytearray, Launches]] = {}

    def fill(self, buffer: bytearray, numbers: PlainNumbers, tile_sums: int = 0) -> Launches:
        """Pack the arguments of a launch; its kernels and grids."""
        bs, total_len, pad_to, total_is_capacity = numbers
        # The grid depends on rows by whole tiles alone, and on padding by its presence.
        tiles_of_rows = -(-(total_len if total_len > pad_to else pad_to) // REQUESTS_PER_TILE)
        key = bs, tiles_of_rows, pad_to == 0, tile_sums, total_is_capacity
        found = self._shapes.get(key)
        if found is None:
            if len(self._shapes) >= MAX_SHAPES:
                self._shapes.clear()
            found = self._shapes[key] = self._shape(numbers, tile_sums)
        arguments, launches = found
        buffer[:_ARGS_SIZE] = arguments
        _TOTAL_LEN.pack_into(buffer, _TOTAL_LEN_AT, total_len)
        if pad_to:
            _PAD_TO.pack_into(buffer, _PAD_TO_AT, pad_to)
        return launches

    def pack(self, numbers: PlainNumbers, tile_sums: int = 0) -> PackedLaunch:
        """A launch that can be made again."""
        arguments = bytearray(ARGS.size)
        launches = self.fill(arguments, numbers, tile_sums)
        return PackedLaunch(arguments, launches)

    def _shape(self, numbers: PlainNumbers, tile_sums: int) -> tuple[bytearray, Launches]:
        bs, total_len, pad_to, total_is_capacity = numbers
        is_small = bs <= REQUESTS_PER_TILE and not tile_sums and pad_to == 0
        direct = self._direct if is_small else None
        row_parts = 1 if direct else parts_of_rows(bs, max(total_len, pad_to))
        shape = cut_up(bs, row_parts, self._units, self._num_sms)
        arguments = bytearray(self._base)
        tiles, parts, page_1, real_page, flattened, items = shape
        flags = self._flags | (TOTAL_IS_CAPACITY if total_is_capacity else 0)
        _FRONT.pack_into(
            arguments, _FRONT_AT, bs, self._uniform_q, flags, page_1, real_page,
            _inverse(shape.table_blocks),
        )  # fmt: skip
        _ITEMS.pack_into(arguments, _ITEMS_AT, items, 0)
        _TILES.pack_into(arguments, _TILES_AT, tile_sums, 0, tiles, parts, flattened)
        return arguments, launches_of(bs, shape, direct, tile_sums != 0)
