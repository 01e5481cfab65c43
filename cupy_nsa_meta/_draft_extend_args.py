"""``struct DraftExtendArgs``: how a call of the seed operation is cut up, and how it is packed."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from . import _launch, _module
from ._check import Addresses, DraftExtendArrays, DraftExtendKey
from ._launch import Launches

#: ``struct DraftExtendArgs`` of draft_extend.cu.
LAYOUT = _launch.Layout(
    ("Q", "extend_seq_lens seq_lens"),
    ("q", "extend_stride seq_stride"),
    ("i", "bs"),
    ("I", "flags"),
    ("Q", "launch_count out_seqlens_expanded out_nsa_cache_seqlens result out_total"),
    ("i", "max_rows topk"),
    ("I", "epoch tiles_per_block"),
    ("i", "num_entries requests_per_entry"),
    ("Q", "request_ends tile_totals"),
)
ARGS = LAYOUT.struct
assert ARGS.size == 120

BLOCK_THREADS = _launch.BLOCK_THREADS
LARGE_THREADS = _module.block_threads("draft_extend_large")
WARP_MAX_BS = 32  # kWarpMaxBs
MAX_ITEMS = 4  # kMaxItems
MAX_ENTRIES = 4096  # kMaxEntries
GROUP = 4  # kGroup: requests per entry
ONE_LAUNCH_MAX_BS = 16384  # kOneLaunchMaxBs
LINEAR_SEARCH_MAX_BS = 16
#: Capacity from which rows are written in quads; below, a launch is a matter of latency.
QUADS_MIN_ROWS = 1 << 20  # short-lived blocks write faster than resident ones: 16 or 32 KB each
QUAD = 4  # kQuad: rows per thread and step in quad mode
QUAD_ROWS_PER_REQUEST = 16  # kQuadModeRowsPerRequest
LARGE_BLOCKS_PER_SM = 2
BLOCKS_PER_SM = 8  # 2,048 threads
TILED_BLOCKS_PER_SM = 4  # each reads the totals of all tiles
#: Every block reads the whole batch: with many requests, blocks that write few rows cost more than
#: they save.
FEW_REQUESTS = 1024
FEW_ROWS = 1 << 16

# Flags, next to those that _check.py sets.
LINEAR_SEARCH = 4
QUADS = 16


class Geometry(NamedTuple):
    """How a batch is cut up; depends on host-known sizes alone."""

    launches: Launches
    num_entries: int
    requests_per_entry: int
    flags: int  # LINEAR_SEARCH | QUADS
    tiles_per_block: int  # in quad mode, else 0


def alignment_bits(limit: int) -> int:
    """The bits of the outputs' addresses that decide how a call is cut up."""
    return 15 if limit >= QUADS_MIN_ROWS else 0


def shape_of(key: DraftExtendKey, num_sms: int) -> Geometry:
    """Kernels and blocks of a call. The host does not know T: the blocks follow the capacity."""
    bits = alignment_bits(key.limit)
    has_quads = bits != 0 and not (key.expanded_ptr | key.clamped_ptr) & bits
    return geometry(key.bs, key.limit, has_quads, key.use_adaptive, num_sms)


@lru_cache(maxsize=1024)
def geometry(bs: int, limit: int, has_quads: bool, use_adaptive: bool, num_sms: int) -> Geometry:
    """``shape_of`` from numbers; ``has_quads``: rows are many and aligned."""
    is_large = BLOCK_THREADS * MAX_ITEMS < bs <= ONE_LAUNCH_MAX_BS
    threads = LARGE_THREADS if is_large else BLOCK_THREADS
    grid = (limit + threads - 1) // threads or 1
    flags = tiles_per_block = 0
    num_entries, requests_per_entry = bs, 1
    launches: Launches
    if has_quads and limit >= QUAD_ROWS_PER_REQUEST * bs:
        flags = QUADS
        tiles = -(-limit // (QUAD * threads))
        if bs <= WARP_MAX_BS:
            tiles_per_block = 2
        elif is_large:  # a block reads up to 200 KB of lengths before it writes
            tiles_per_block = max(8, -(-tiles // (num_sms * LARGE_BLOCKS_PER_SM)))
        else:
            tiles_per_block = 4
        grid = -(-tiles // tiles_per_block)
    elif bs > ONE_LAUNCH_MAX_BS:
        grid = min(grid, num_sms * TILED_BLOCKS_PER_SM)
    elif is_large:
        grid = min(grid, num_sms)
    elif bs > BLOCK_THREADS:
        grid = min(grid, (num_sms + 1) // 2 if limit <= FEW_ROWS else num_sms)
    elif grid > num_sms:
        grid = min(grid, num_sms * min(FEW_REQUESTS // (bs or 1), BLOCKS_PER_SM))
    if bs <= WARP_MAX_BS:
        if bs <= LINEAR_SEARCH_MAX_BS and use_adaptive:
            flags |= LINEAR_SEARCH
        launches = (("draft_extend_warp_quads" if tiles_per_block else "draft_extend_warp", grid),)
    elif bs <= BLOCK_THREADS and not tiles_per_block:
        launches = (("draft_extend_block", grid),)
    elif bs <= BLOCK_THREADS * MAX_ITEMS:
        launches = (
            ("draft_extend_block4_quads" if tiles_per_block else "draft_extend_block4", grid),
        )
    elif is_large:
        num_entries, requests_per_entry = -(-bs // GROUP), GROUP
        launches = (("draft_extend_large", grid),)
    else:  # tiles of whole chunks of a block: 1,000,000 requests make 3,907 of 256
        requests_per_entry = -(-bs // (MAX_ENTRIES * BLOCK_THREADS)) * BLOCK_THREADS
        num_entries = -(-bs // requests_per_entry)
        launches = (("draft_extend_tiles", num_entries), ("draft_extend_tiled", grid))
    return Geometry(launches, num_entries, requests_per_entry, flags, tiles_per_block)


class Constants(NamedTuple):
    """Of an argument struct what calls on tensors of the same sizes have in common."""

    extend_stride: int
    seq_stride: int
    bs: int
    flags: int
    limit: int
    topk: int
    tiles_per_block: int
    num_entries: int
    requests_per_entry: int


def constants_of(key: DraftExtendKey, shape: Geometry) -> Constants:
    return Constants(
        key.extend_stride,
        key.seq_stride,
        key.bs,
        key.flags | shape.flags,
        key.limit,
        key.topk,
        shape.tiles_per_block,
        shape.num_entries,
        shape.requests_per_entry,
    )


def addresses_of(key: DraftExtendKey) -> Addresses:
    return key.extend_ptr, key.seq_ptr, key.expanded_ptr, key.clamped_ptr


def pack(
    buffer: bytearray,
    constants: Constants,
    addresses: Addresses,
    result: int = 0,
    epoch: int = 0,
    launch_count: int = 0,
    out_total: int = 0,
    scratch: int = 0,
) -> None:
    """Pack ``struct DraftExtendArgs``; pointers that are 0 are not used."""
    extend_ptr, seq_ptr, expanded_ptr, clamped_ptr = addresses
    (
        extend_stride, seq_stride, bs, flags, limit, topk, tiles_per_block, num_entries,
        requests_per_entry,
    ) = constants  # fmt: skip
    ARGS.pack_into(
        buffer,
        0,
        extend_ptr,
        seq_ptr,
        extend_stride,
        seq_stride,
        bs,
        flags,
        launch_count,
        expanded_ptr,
        clamped_ptr,
        result,
        out_total,
        limit,
        topk,
        epoch,
        tiles_per_block,
        num_entries,
        requests_per_entry,
        scratch,
        scratch and scratch + 4 * bs,
    )


_EXTEND, _SEQ, _EXPANDED, _CLAMPED = (LAYOUT.at(name) // 8 for name in DraftExtendArrays)
_EPOCH = LAYOUT.at("epoch") // 4


def pack_answering(
    slot: _launch.Slot, constants: Constants, addresses: Addresses, epoch: int
) -> None:
    """Pack a launch that answers in a slot; over one like it, nothing but addresses and epoch."""
    if slot.packed is constants:
        words = slot.struct_words
        words[_EXTEND], words[_SEQ], words[_EXPANDED], words[_CLAMPED] = addresses
        slot.struct_halves[_EPOCH] = epoch
    else:
        slot.packed = None
        pack(slot.buffer, constants, addresses, slot.address, epoch)
        slot.packed = constants
