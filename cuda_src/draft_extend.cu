// draft_extend: per-token KV lengths of a batch whose requests extend by several query tokens.
//
//   row, j                     the request that owns output row r; the position of r inside it
//   seqlens_expanded[r]      = max(seq_lens[row] - extend_seq_lens[row] + 1 + j, 0)
//   nsa_cache_seqlens[r]     = min(seqlens_expanded[r], topk)
//
// With `end` = the sum of the extend lengths up to and including `row`, the row r = end - 1 sees
// seq_lens[row] tokens, so the first line is max(seq_lens[row] + 1 - end + r, 0): one number per
// request, `base` = seq_lens[row] + 1 - end, serves all of its rows.
//
//   extend_seq_lens       [bs]        int32 or int64, any stride      read
//   seq_lens              [bs]        int32 or int64, any stride      read
//   out_seqlens_expanded  [>= rows]   int32, contiguous               written: [0, rows)
//   out_nsa_cache_seqlens [>= rows]   int32, contiguous               written: [0, rows)
//   out_total             [2]         int32 or null                   written: total, status
//   result                [1]         mapped host memory or null      written: see report()
//   rows = min(T, max_rows), or 0 where the status forbids rows; T = sum of the extend lengths
//
// Plan: every block adds up the extend lengths of the whole batch, so it knows T, the status and
// where each request ends without any traffic between blocks; then its threads search the requests
// of their rows. How the sums are held depends on the number of requests:
//
//   draft_extend_warp    <= 32       in the registers of every warp: no barrier, search by shuffles
//   draft_extend_block   <= 1,024    up to 4 per thread, ends and bases in shared memory
//   draft_extend_large   <= 16,384   ends of entries of 1 or 4 requests in shared memory
//   draft_extend_tiles, then draft_extend_tiled: above; the first launch sums tiles of requests
//
// Python twin: cupy_nsa_meta/draft_extend.py; specification: cupy_nsa_meta/reference.py
#include "common.cuh"

namespace nsa {

constexpr int kWarpMaxBs = 32;
constexpr int kItems = 4;  // requests per thread of draft_extend_block
constexpr int kBlockMaxBs = kBlockThreads * kItems;
constexpr int kMaxEntries = 4096;  // sums held in shared memory by draft_extend_large and _tiled
constexpr int kGroup = 4;          // requests per entry above kMaxEntries requests
constexpr int kOneLaunchMaxBs = 16384;
constexpr int kLoadBatch = 8;  // requests that a thread of draft_extend_large loads at once
constexpr int kQuad = 4;       // rows per thread and step in quad mode: one 16-byte store per output
// Quad mode pays where a thread writes several quads; below, one row per thread is quicker.
constexpr u32 kQuadModeRows = 4 * kQuad * kBlockThreads;  // per block

enum DraftExtendFlags : u32 {
  kExtendIsInt64 = 1,
  kSeqIsInt64 = 2,
  kLinearSearch = 4,  // bs <= 16
  kTotalIsGiven = 8,  // max_rows is the caller's total_tokens, not a capacity
};

// Packed by cupy_nsa_meta/draft_extend.py, field by field in this order.
struct DraftExtendArgs {
  const void* extend_seq_lens;
  const void* seq_lens;
  int* out_seqlens_expanded;
  int* out_nsa_cache_seqlens;
  int* out_total;
  u64* result;
  u32* request_ends;  // [bs] scratch of the two-launch form: inclusive sums inside a tile
  u32* tile_totals;   // [num_entries] scratch of the two-launch form: sum of a tile, or a mark
  i64 extend_stride;
  i64 seq_stride;
  int bs;
  int num_entries;         // ceil(bs / requests_per_entry), <= kMaxEntries
  int requests_per_entry;  // 1 or kGroup; a multiple of kBlockThreads in the two-launch form
  int max_rows;
  int topk;
  u32 flags;
  u32 epoch;  // 29 bits, not 0
  u32 padding;
};
static_assert(sizeof(DraftExtendArgs) == 112, "cupy_nsa_meta/draft_extend.py packs 112 bytes");
static_assert(kMaxEntries * kGroup == kOneLaunchMaxBs, "one launch serves this many requests");
static_assert(kGroup == 4, "two shuffles add up the requests of an entry");
static_assert(kWarpMaxBs == kWarpThreads, "a lane holds a request");

// A tile that cannot be added up; both are above every good sum.
constexpr u32 kTileOutside = 0x80000000u;
constexpr u32 kTileNegative = 0xffffffffu;

__device__ __forceinline__ Lengths extend_lengths(const DraftExtendArgs& args) {
  return {static_cast<const int*>(args.extend_seq_lens), args.extend_stride,
          (args.flags & kExtendIsInt64) != 0};
}

__device__ __forceinline__ Lengths seq_lengths(const DraftExtendArgs& args) {
  return {static_cast<const int*>(args.seq_lens), args.seq_stride, (args.flags & kSeqIsInt64) != 0};
}

// base + row <= seq for every row of the request that ends at `end`. Where base would leave int32 at
// the bottom all rows of the request are 0, and so they are with the lowest int32.
__device__ __forceinline__ int request_base(i64 seq, u32 end) {
  const i64 base = seq + 1 - static_cast<i64>(end);
  return static_cast<int>(base < kInt32Min ? kInt32Min : base);
}

// ---- Outcome ------------------------------------------------------------------------------------

__device__ __forceinline__ Status batch_status(const BlockSum& sum, const DraftExtendArgs& args) {
  if (sum.flags != 0) return (sum.flags & kFlagNegative) != 0 ? kNegativeExtend : kOutsideInt32;
  const u64 max_rows = static_cast<u32>(args.max_rows);
  if ((args.flags & kTotalIsGiven) != 0) return sum.total == max_rows ? kOk : kTotalMismatch;
  return sum.total > max_rows ? kOverCapacity : kOk;
}

// One 8-byte word, so that the host never sees half a result:
// bits 0-31 total (-1 where it is not defined), 32-34 status, 35-63 epoch of the launch.
__device__ __forceinline__ void report(const BlockSum& sum, Status status, const DraftExtendArgs& args) {
  const u32 reported = sum.flags != 0 ? 0xffffffffu : static_cast<u32>(sum.total);
  if (args.result != nullptr) {
    const u64 word = reported | static_cast<u64>(status) << 32 | static_cast<u64>(args.epoch) << 35;
    *static_cast<volatile u64*>(args.result) = word;
  }
  if (args.out_total != nullptr) {
    args.out_total[0] = static_cast<int>(reported);
    args.out_total[1] = status;
  }
}

// Reports once per grid. Returns the number of rows to write.
__device__ __forceinline__ u32 settle(const BlockSum& sum, const DraftExtendArgs& args) {
  const Status status = batch_status(sum, args);
  if (blockIdx.x == 0 && threadIdx.x == 0) report(sum, status, args);
  if (status != kOk && status != kTotalMismatch) return 0;
  return min(static_cast<u32>(sum.total), static_cast<u32>(args.max_rows));
}

// ---- Rows ---------------------------------------------------------------------------------------

__device__ __forceinline__ void store_row(const DraftExtendArgs& args, u32 row, int base) {
  const int expanded = max(base + static_cast<int>(row), 0);
  args.out_seqlens_expanded[row] = expanded;
  args.out_nsa_cache_seqlens[row] = min(expanded, args.topk);
}

__device__ __forceinline__ void store_quad(int* out, u32 row, int4 values) {
  int* const at = out + row;
  if ((reinterpret_cast<u64>(at) & 15) == 0) {
    *reinterpret_cast<int4*>(at) = values;
  } else {
    at[0] = values.x;
    at[1] = values.y;
    at[2] = values.z;
    at[3] = values.w;
  }
}

// Four rows of one request.
__device__ __forceinline__ void store_rows(const DraftExtendArgs& args, u32 row, int base) {
  const int first = base + static_cast<int>(row);  // first + 3 <= seq
  const int topk = args.topk;
  const int4 expanded = make_int4(max(first, 0), max(first + 1, 0), max(first + 2, 0), max(first + 3, 0));
  const int4 clamped =
      make_int4(min(expanded.x, topk), min(expanded.y, topk), min(expanded.z, topk), min(expanded.w, topk));
  store_quad(args.out_seqlens_expanded, row, expanded);
  store_quad(args.out_nsa_cache_seqlens, row, clamped);
}

// The run of quads that a block writes in quad mode: [begin, end), in units of kQuad * kBlockThreads
// rows. Runs, so that a thread mostly stays inside the request it found last.
struct TileRun {
  u32 begin;
  u32 end;
};

__device__ __forceinline__ TileRun quad_tiles(u32 rows) {
  constexpr u32 kTileRows = kQuad * kBlockThreads;
  const u32 num_tiles = (rows + kTileRows - 1) / kTileRows;
  const u32 per_block = (num_tiles + gridDim.x - 1) / gridDim.x;
  const u32 begin = blockIdx.x * per_block;
  return {begin, min(begin + per_block, num_tiles)};
}

__device__ __forceinline__ bool use_quads(u32 rows) { return rows / kQuadModeRows >= gridDim.x; }

struct Found {
  u32 end;
  int base;
  int entry;  // where the next search may start
};

// Writes the rows of this block. find(row, first_entry) -> Found, for rows below T; no entry before
// first_entry ends behind the row.
template <class Find>
__device__ __forceinline__ void write_rows(const DraftExtendArgs& args, u32 rows, const Find& find) {
  if (!use_quads(rows)) {
    for (u32 row = blockIdx.x * kBlockThreads + threadIdx.x; row < rows; row += gridDim.x * kBlockThreads) {
      store_row(args, row, find(row, 0).base);
    }
    return;
  }
  const TileRun run = quad_tiles(rows);
  Found found = {0, 0, 0};
  for (u32 tile = run.begin; tile < run.end; ++tile) {
    const u32 first_row = (tile * kBlockThreads + threadIdx.x) * kQuad;
    if (first_row >= rows) return;
    if (first_row >= found.end) found = find(first_row, found.entry);
    if (first_row + kQuad <= min(found.end, rows)) {
      store_rows(args, first_row, found.base);
      continue;
    }
    const u32 last_row = min(first_row + kQuad, rows);
#pragma unroll 1
    for (u32 row = first_row; row < last_row; ++row) {
      if (row >= found.end) found = find(row, found.entry);
      store_row(args, row, found.base);
    }
  }
}

// ---- draft_extend_warp --------------------------------------------------------------------------

// Every lane's row looks for its request among the ends that the lanes hold. All lanes take part.
__device__ __forceinline__ int find_lane(u32 end, u32 row, int bs, bool linear) {
  int lane = 0;
  if (linear) {  // up to 16 shuffles that do not wait for each other
    for (int other = 0; other < bs - 1; ++other) {
      lane += __shfl_sync(kFullWarp, end, other) <= row ? 1 : 0;
    }
  } else {
#pragma unroll
    for (int step = kWarpThreads / 2; step > 0; step /= 2) {
      if (__shfl_sync(kFullWarp, end, lane + step - 1) <= row) lane += step;
    }
  }
  return lane;
}

__device__ __forceinline__ void draft_extend_warp_body(const DraftExtendArgs& args) {
  const int lane = threadIdx.x % kWarpThreads;
  const bool exists = lane < args.bs;
  const i64 seq = exists ? seq_lengths(args)[lane] : 0;
  const i64 extend = exists ? extend_lengths(args)[lane] : 0;
  u32 flags = 0;
  const u32 end = warp_inclusive_scan(request_rows(extend, seq, &flags), &flags);
  const int base = request_base(seq, end);
  const BlockSum sum = {__shfl_sync(kFullWarp, end, kWarpThreads - 1), warp_flags(flags)};
  const u32 rows = settle(sum, args);
  const bool linear = (args.flags & kLinearSearch) != 0;

  // Whole warps stay in the loops, for the shuffles.
  if (!use_quads(rows)) {
    for (u32 first = blockIdx.x * kBlockThreads + threadIdx.x - lane; first < rows;
         first += gridDim.x * kBlockThreads) {
      const u32 row = first + lane;
      const int row_base = __shfl_sync(kFullWarp, base, find_lane(end, row, args.bs, linear));
      if (row < rows) store_row(args, row, row_base);
    }
    return;
  }
  const TileRun run = quad_tiles(rows);
  u32 found_end = 0;
  int found_base = 0;
  for (u32 tile = run.begin; tile < run.end; ++tile) {
    const u32 first_row = (tile * kBlockThreads + threadIdx.x) * kQuad;
    if (__any_sync(kFullWarp, first_row >= found_end)) {
      const int found = find_lane(end, first_row, args.bs, linear);
      found_end = __shfl_sync(kFullWarp, end, found);
      found_base = __shfl_sync(kFullWarp, base, found);
    }
    const bool whole = first_row + kQuad <= min(found_end, rows);
    if (whole) store_rows(args, first_row, found_base);
    if (__any_sync(kFullWarp, !whole)) {
#pragma unroll 1
      for (int k = 0; k < kQuad; ++k) {
        const u32 row = first_row + k;
        const int row_base = __shfl_sync(kFullWarp, base, find_lane(end, row, args.bs, linear));
        if (!whole && row < rows) store_row(args, row, row_base);
      }
    }
  }
}

// ---- draft_extend_block -------------------------------------------------------------------------

struct BlockPrefix {
  u32 ends[kBlockMaxBs];
  int bases[kBlockMaxBs];
  WarpSums sums;
};

__device__ __forceinline__ void draft_extend_block_body(const DraftExtendArgs& args) {
  __shared__ BlockPrefix shared;
  const Lengths extend = extend_lengths(args);
  const Lengths seq = seq_lengths(args);
  const int bs = args.bs;
  const int items = (bs + kBlockThreads - 1) / kBlockThreads;  // consecutive requests per thread
  const int first = threadIdx.x * items;
  i64 seqs[kItems];
  i64 extends[kItems];
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const bool exists = k < items && first + k < bs;
    seqs[k] = exists ? seq[first + k] : 0;
    extends[k] = exists ? extend[first + k] : 0;
  }
  u32 flags = 0;
  u32 ends[kItems];  // inside the thread
  u32 mine = 0, all_sums = 0;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    mine += request_rows(extends[k], seqs[k], &flags);
    all_sums |= mine;
    ends[k] = mine;
  }
  flags |= outside_flag(all_sums);
  BlockSum sum;
  const u32 before = block_exclusive_scan(mine, flags, shared.sums, &sum);
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    if (k < items && first + k < bs) {
      shared.ends[first + k] = before + ends[k];
      shared.bases[first + k] = request_base(seqs[k], before + ends[k]);
    }
  }
  const u32 rows = settle(sum, args);
  __syncthreads();
  write_rows(args, rows, [&](u32 row, int first_entry) -> Found {
    // The sums of the warps are at hand: they leave the requests of one warp to search.
    int warp = 0;
    u32 warp_end = 0;
#pragma unroll
    for (int w = 0; w < kBlockWarps - 1; ++w) {
      warp_end += shared.sums.totals[w];
      warp += warp_end <= row ? 1 : 0;
    }
    const int warp_begin = warp * kWarpThreads * items;
    const int entry = upper_bound(shared.ends, max(warp_begin, first_entry),
                                  min(warp_begin + kWarpThreads * items, bs) - 1, row);
    return {shared.ends[entry], shared.bases[entry], entry};
  });
}

// ---- draft_extend_large, draft_extend_tiled -----------------------------------------------------

struct LargePrefix {
  u32 ends[kMaxEntries];  // entry e covers rows [e ? ends[e - 1] : 0, ends[e])
  int seqs[kMaxEntries];  // of the entry's request; requests_per_entry == 1 only
  WarpSums sums;
};
static_assert(sizeof(LargePrefix) <= 48 * 1024, "static shared memory limit");

// Loads every request into shared.ends, added up by entry, neighbouring threads on neighbouring
// requests, kLoadBatch loads of each array in flight. Whole warps take part, for the shuffles.
__device__ __forceinline__ u32 load_entries(const DraftExtendArgs& args, LargePrefix& shared) {
  const Lengths extend = extend_lengths(args);
  const Lengths seq = seq_lengths(args);
  const int bs = args.bs;
  const bool grouped = args.requests_per_entry != 1;
  u32 flags = 0;
  for (int batch = 0; batch < bs; batch += kLoadBatch * kBlockThreads) {
    i64 extends[kLoadBatch];
    i64 seqs[kLoadBatch];
    extend.load(extends, batch + threadIdx.x, bs);
    seq.load(seqs, batch + threadIdx.x, bs);
#pragma unroll
    for (int k = 0; k < kLoadBatch; ++k) {
      const int idx = batch + k * kBlockThreads + threadIdx.x;
      u32 sum = request_rows(extends[k], seqs[k], &flags);
      if (grouped) {
        u32 all_sums = sum;
        sum += __shfl_xor_sync(kFullWarp, sum, 1);
        all_sums |= sum;
        sum += __shfl_xor_sync(kFullWarp, sum, 2);
        flags |= outside_flag(all_sums | sum);
        if (idx < bs && idx % kGroup == 0) shared.ends[idx / kGroup] = sum;
      } else if (idx < bs) {
        shared.ends[idx] = sum;
        shared.seqs[idx] = static_cast<int>(seqs[k]);
      }
    }
  }
  return flags;
}

__device__ __forceinline__ u32 load_tiles(const DraftExtendArgs& args, LargePrefix& shared) {
  u32 flags = 0;
  for (int entry = threadIdx.x; entry < args.num_entries; entry += kBlockThreads) {
    const u32 total = args.tile_totals[entry];
    if (total >= kTileOutside) flags |= total == kTileNegative ? kFlagNegative : kFlagOutside;
    shared.ends[entry] = total;
  }
  return flags;
}

// Turns the sums of the entries into their ends.
__device__ __forceinline__ BlockSum scan_entries(LargePrefix& shared, int num_entries, u32 flags) {
  // Each thread on consecutive entries; an odd count per thread spreads them over all banks.
  const int per_thread = ((num_entries + kBlockThreads - 1) / kBlockThreads) | 1;
  const int begin = min(static_cast<int>(threadIdx.x) * per_thread, num_entries);
  const int end = min(begin + per_thread, num_entries);
  u32 mine = 0, all_sums = 0;
#pragma unroll 4
  for (int entry = begin; entry < end; ++entry) {
    mine += shared.ends[entry];
    all_sums |= mine;
  }
  BlockSum sum;
  u32 running = block_exclusive_scan(mine, flags | outside_flag(all_sums), shared.sums, &sum);
#pragma unroll 4
  for (int entry = begin; entry < end; ++entry) {
    running += shared.ends[entry];
    shared.ends[entry] = running;
  }
  return sum;
}

template <bool kTiled>
__device__ __forceinline__ Found find_in_entries(const DraftExtendArgs& args, const LargePrefix& shared,
                                                 u32 row, int first_entry) {
  const int entry = upper_bound(shared.ends, first_entry, args.num_entries - 1, row);
  u32 end = shared.ends[entry];
  if (!kTiled && args.requests_per_entry == 1) return {end, request_base(shared.seqs[entry], end), entry};
  const u32 begin = entry > 0 ? shared.ends[entry - 1] : 0;
  int idx = entry * args.requests_per_entry;
  const int last = min(idx + args.requests_per_entry, args.bs) - 1;
  if (kTiled) {
    idx = upper_bound(args.request_ends, idx, last, row - begin);
    end = begin + args.request_ends[idx];
  } else {
    const Lengths extend = extend_lengths(args);
    u32 lengths[kGroup - 1];
#pragma unroll
    for (int k = 0; k < kGroup - 1; ++k) lengths[k] = idx + k < last ? static_cast<u32>(extend[idx + k]) : 0;
    u32 running = begin;
    int passed = 0;
#pragma unroll
    for (int k = 0; k < kGroup - 1; ++k) {
      running += lengths[k];
      if (idx + k < last && running <= row) {
        passed = k + 1;
      } else if (passed == k) {
        end = running;
      }
    }
    if (passed == kGroup - 1 || idx + passed == last) end = shared.ends[entry];
    idx += passed;
  }
  return {end, request_base(seq_lengths(args)[idx], end), entry};
}

template <bool kTiled>
__device__ __forceinline__ void draft_extend_large_body(const DraftExtendArgs& args) {
  __shared__ LargePrefix shared;
  const u32 flags = kTiled ? load_tiles(args, shared) : load_entries(args, shared);
  __syncthreads();
  const BlockSum sum = scan_entries(shared, args.num_entries, flags);
  const u32 rows = settle(sum, args);
  __syncthreads();
  write_rows(args, rows, [&](u32 row, int first_entry) -> Found {
    return find_in_entries<kTiled>(args, shared, row, first_entry);
  });
}

__device__ __forceinline__ void draft_extend_tiles_body(const DraftExtendArgs& args) {
  __shared__ WarpSums sums;
  const Lengths extend = extend_lengths(args);
  const Lengths seq = seq_lengths(args);
  const int begin = static_cast<int>(blockIdx.x) * args.requests_per_entry;
  const int end = min(begin + args.requests_per_entry, args.bs);
  u64 before_chunk = 0;
  u32 tile_flags = 0;
  for (int chunk = begin; chunk < end; chunk += kBlockThreads) {
    const int idx = chunk + static_cast<int>(threadIdx.x);
    u32 flags = 0;
    const u32 mine = idx < end ? request_rows(extend[idx], seq[idx], &flags) : 0;
    BlockSum sum;
    const u32 before = block_exclusive_scan(mine, flags, sums, &sum);
    if (idx < end) args.request_ends[idx] = static_cast<u32>(before_chunk) + before + mine;
    before_chunk += sum.total;
    tile_flags |= sum.flags;
    __syncthreads();
  }
  if (before_chunk > static_cast<u64>(kInt32Max)) tile_flags |= kFlagOutside;
  if (threadIdx.x == 0) {
    args.tile_totals[blockIdx.x] = (tile_flags & kFlagNegative) != 0 ? kTileNegative
                                   : tile_flags != 0                 ? kTileOutside
                                                                     : static_cast<u32>(before_chunk);
  }
}

}  // namespace nsa

#define NSA_KERNEL(name, body)                                                                             \
  extern "C" __global__ void __launch_bounds__(nsa::kBlockThreads) name(const nsa::DraftExtendArgs args) { \
    nsa::body(args);                                                                                       \
  }
// Grids: any number of blocks; the rows are dealt out over those there are. draft_extend_tiles has
// num_entries blocks, one per tile, and goes before draft_extend_tiled on the same stream.
NSA_KERNEL(draft_extend_warp, draft_extend_warp_body)
NSA_KERNEL(draft_extend_block, draft_extend_block_body)
NSA_KERNEL(draft_extend_large, draft_extend_large_body<false>)
NSA_KERNEL(draft_extend_tiles, draft_extend_tiles_body)
NSA_KERNEL(draft_extend_tiled, draft_extend_large_body<true>)
#undef NSA_KERNEL
