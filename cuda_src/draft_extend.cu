// draft_extend: per-token KV lengths of a batch whose requests extend by several query tokens.
//
//   row, j                     the request that owns output row r; the position of r inside it
//   seqlens_expanded[r]      = max(seq_lens[row] - extend_seq_lens[row] + 1 + j, 0)
//   nsa_cache_seqlens[r]     = min(seqlens_expanded[r], topk)
//
// With `end` = the prefix sum of the extend lengths up to and including `row`, the row r = end - 1
// sees seq_lens[row] tokens, so the first line is max(seq_lens[row] + 1 - end + r, 0): one number
// per request, `base` = seq_lens[row] + 1 - end, serves all of its rows.
//
//   extend_seq_lens       [bs]        int32 or int64, any stride      read
//   seq_lens              [bs]        int32 or int64, any stride      read
//   out_seqlens_expanded  [>= rows]   int32, contiguous               written: [0, rows)
//   out_nsa_cache_seqlens [>= rows]   int32, contiguous               written: [0, rows)
//   out_total             [2]         int32 or null                   written: total, status
//   result                [1]         mapped host memory or null      written: see report()
//   rows = min(T, max_rows), or 0 where the status forbids rows; T = sum of the extend lengths
//
// Plan, up to 16,384 requests (draft_extend): every block adds up the extend lengths of the whole
// batch in shared memory, so every block knows T, the status and where each request ends, without
// any traffic between blocks. Then each thread searches the request of its first row and writes
// four rows with one 16-byte store per output.
// Above that (draft_extend_tiles, then draft_extend_tiled): the first launch sums tiles of requests,
// the second does the same work over the tile totals and searches inside a tile.
//
// Python twin: cupy_nsa_meta/draft_extend.py; specification: cupy_nsa_meta/reference.py
#include "common.cuh"

namespace nsa {

constexpr int kRowsPerThread = 4;  // one 16-byte store per output
constexpr int kRowsPerTile = kBlockThreads * kRowsPerThread;
// Entries of the prefix held in shared memory. An entry is one request up to kMaxEntries requests,
// kGroup neighbouring requests above, a tile of requests in the two-launch form.
constexpr int kMaxEntries = 4096;
constexpr int kGroup = 4;
constexpr int kOneLaunchMaxBs = 16384;

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
  Sum* request_ends;  // [bs] scratch of the two-launch form: inclusive sums inside a tile
  Sum* tile_totals;   // [num_entries] scratch of the two-launch form
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
static_assert(2 * kMaxEntries * 4 + kBlockWarps * 4 <= 48 * 1024, "static shared memory limit");

// The rows of one request: [begin, end), and base as above.
struct RequestRows {
  u32 begin;
  u32 end;
  int base;
  int entry;
};

struct SharedPrefix {
  Sum ends[kMaxEntries];      // entry e covers rows [e ? ends[e - 1] : 0, ends[e])
  int seq_lens[kMaxEntries];  // of the entry's request; requests_per_entry == 1 only
  Sum warp_totals[kBlockWarps];
};

__device__ __forceinline__ Lengths extend_lengths(const DraftExtendArgs& args) {
  return {static_cast<const int*>(args.extend_seq_lens), args.extend_stride,
          (args.flags & kExtendIsInt64) != 0};
}

__device__ __forceinline__ Lengths seq_lengths(const DraftExtendArgs& args) {
  return {static_cast<const int*>(args.seq_lens), args.seq_stride, (args.flags & kSeqIsInt64) != 0};
}

// What request `idx` adds to the prefix: its extend length, or the mark of its status.
__device__ __forceinline__ Sum request_sum(i64 extend, i64 seq) {
  if (extend < 0) return kSumNegative;
  if (extend > kInt32Max || !fits_int32(seq)) return kSumOutside;
  return static_cast<Sum>(extend);
}

// Loads every request into shared.ends, added up by entry, neighbouring threads on neighbouring
// requests. Whole warps take part in each step, for the shuffles.
__device__ __forceinline__ void load_entries(const DraftExtendArgs& args, SharedPrefix& shared) {
  const Lengths extend = extend_lengths(args);
  const Lengths seq = seq_lengths(args);
  const int lane = threadIdx.x % kWarpThreads;
  const bool grouped = args.requests_per_entry != 1;
#pragma unroll 4
  for (int first = threadIdx.x - lane; first < args.bs; first += kBlockThreads) {
    const int idx = first + lane;
    const bool exists = idx < args.bs;
    const i64 seq_len = exists ? seq[idx] : 0;
    Sum sum = exists ? request_sum(extend[idx], seq_len) : 0;
    if (grouped) {
      sum = sum_add(sum, __shfl_xor_sync(kFullWarp, sum, 1));
      sum = sum_add(sum, __shfl_xor_sync(kFullWarp, sum, 2));
      if (exists && idx % kGroup == 0) shared.ends[idx / kGroup] = sum;
    } else if (exists) {
      shared.ends[idx] = sum;
      shared.seq_lens[idx] = static_cast<int>(seq_len);
    }
  }
}

// Fills shared.ends and returns the sum over the whole batch, the same in every thread.
template <bool kTiled>
__device__ __forceinline__ Sum build_prefix(const DraftExtendArgs& args, SharedPrefix& shared) {
  const int thread = threadIdx.x;
  const int num_entries = args.num_entries;
  if (kTiled) {
    for (int entry = thread; entry < num_entries; entry += kBlockThreads) {
      shared.ends[entry] = args.tile_totals[entry];
    }
  } else {
    load_entries(args, shared);
  }
  // Added up with each thread on consecutive entries; an odd count per thread spreads those over
  // all shared-memory banks. Up to kBlockThreads requests a thread owns the entry it has loaded.
  const int per_thread = ((num_entries + kBlockThreads - 1) / kBlockThreads) | 1;
  if (per_thread > 1) __syncthreads();
  const int begin = min(thread * per_thread, num_entries);
  const int end = min(begin + per_thread, num_entries);
  Sum mine = 0;
  for (int entry = begin; entry < end; ++entry) mine = sum_add(mine, shared.ends[entry]);
  Sum total;
  Sum before = block_exclusive_scan(mine, shared.warp_totals, &total);
  for (int entry = begin; entry < end; ++entry) {
    before = sum_add(before, shared.ends[entry]);
    shared.ends[entry] = before;
  }
  __syncthreads();
  return total;
}

// The request that owns `row`, which is below T. Entries before `first_entry` end at or before it.
template <bool kTiled>
__device__ __forceinline__ RequestRows find_request(const DraftExtendArgs& args, const SharedPrefix& shared,
                                                    u32 row, int first_entry) {
  RequestRows found;
  found.entry = (args.flags & kLinearSearch) != 0
                    ? upper_bound_linear(shared.ends, first_entry, args.num_entries, row)
                    : upper_bound(shared.ends, first_entry, args.num_entries, row);
  found.begin = found.entry > 0 ? shared.ends[found.entry - 1] : 0;
  found.end = shared.ends[found.entry];
  i64 seq_len;
  if (!kTiled && args.requests_per_entry == 1) {
    seq_len = shared.seq_lens[found.entry];
  } else {
    int idx = found.entry * args.requests_per_entry;
    const int idx_end = min(idx + args.requests_per_entry, args.bs);
    if (kTiled) {
      const int tile_begin = idx;
      idx = upper_bound(args.request_ends, tile_begin, idx_end - 1, row - found.begin);
      found.end = found.begin + args.request_ends[idx];
      if (idx > tile_begin) found.begin += args.request_ends[idx - 1];
    } else {
      const Lengths extend = extend_lengths(args);
      found.end = found.begin + static_cast<u32>(extend[idx]);
      while (row >= found.end && idx + 1 < idx_end) {
        ++idx;
        found.begin = found.end;
        found.end += static_cast<u32>(extend[idx]);
      }
    }
    seq_len = seq_lengths(args)[idx];
  }
  // base + row <= seq_len for every row of the request; where base would leave int32 at the bottom
  // all of its rows are 0, and so they are with the lowest int32.
  const i64 base = seq_len + 1 - static_cast<i64>(found.end);
  found.base = static_cast<int>(base < kInt32Min ? kInt32Min : base);
  return found;
}

__device__ __forceinline__ Status batch_status(Sum total, const DraftExtendArgs& args) {
  if (total == kSumNegative) return kNegativeExtend;
  if (total == kSumOutside) return kOutsideInt32;
  const u32 max_rows = static_cast<u32>(args.max_rows);
  if ((args.flags & kTotalIsGiven) != 0) return total == max_rows ? kOk : kTotalMismatch;
  return total > max_rows ? kOverCapacity : kOk;
}

// One 8-byte word, so that the host never sees half a result:
// bits 0-31 total (-1 where it is not defined), 32-34 status, 35-63 epoch of the launch.
__device__ __forceinline__ void report(Sum total, Status status, const DraftExtendArgs& args) {
  const u32 reported = sum_is_marked(total) ? 0xffffffffu : total;
  if (args.result != nullptr) {
    const u64 word = reported | static_cast<u64>(status) << 32 | static_cast<u64>(args.epoch) << 35;
    *static_cast<volatile u64*>(args.result) = word;
  }
  if (args.out_total != nullptr) {
    args.out_total[0] = static_cast<int>(reported);
    args.out_total[1] = status;
  }
}

__device__ __forceinline__ void store_rows(int* out, u32 row, int4 values, int count) {
  int* const at = out + row;
  if (count == kRowsPerThread && (reinterpret_cast<u64>(at) & 15) == 0) {
    *reinterpret_cast<int4*>(at) = values;
  } else {
    at[0] = values.x;
    if (count > 1) at[1] = values.y;
    if (count > 2) at[2] = values.z;
    if (count > 3) at[3] = values.w;
  }
}

template <bool kTiled>
__device__ __forceinline__ void draft_extend_block(const DraftExtendArgs& args) {
  __shared__ SharedPrefix shared;
  const Sum total = build_prefix<kTiled>(args, shared);
  const Status status = batch_status(total, args);
  if (blockIdx.x == 0 && threadIdx.x == 0) report(total, status, args);
  if (status != kOk && status != kTotalMismatch) return;

  // Blocks take runs of tiles, so that a thread mostly stays inside the request it found last.
  const u32 rows = min(total, static_cast<u32>(args.max_rows));
  const u32 num_tiles = (rows + kRowsPerTile - 1) / kRowsPerTile;
  const u32 tiles_per_block = num_tiles <= gridDim.x ? 1 : (num_tiles + gridDim.x - 1) / gridDim.x;
  const u32 tile_begin = blockIdx.x * tiles_per_block;
  const u32 tile_end = min(tile_begin + tiles_per_block, num_tiles);
  RequestRows request = {0, 0, 0, 0};
  for (u32 tile = tile_begin; tile < tile_end; ++tile) {
    const u32 first_row = tile * kRowsPerTile + threadIdx.x * kRowsPerThread;
    if (first_row >= rows) return;
    const int count = static_cast<int>(min(rows - first_row, static_cast<u32>(kRowsPerThread)));
    // A rolled loop that shifts the rows through one register quad: the search is compiled once.
    int4 expanded = make_int4(0, 0, 0, 0);
#pragma unroll 1
    for (int k = 0; k < kRowsPerThread; ++k) {
      const u32 row = first_row + k;
      if (k < count && row >= request.end) {
        request = find_request<kTiled>(args, shared, row, request.entry);
      }
      const int value = k < count ? max(request.base + static_cast<int>(row), 0) : 0;
      expanded = make_int4(expanded.y, expanded.z, expanded.w, value);
    }
    const int topk = args.topk;
    const int4 clamped =
        make_int4(min(expanded.x, topk), min(expanded.y, topk), min(expanded.z, topk), min(expanded.w, topk));
    store_rows(args.out_seqlens_expanded, first_row, expanded, count);
    store_rows(args.out_nsa_cache_seqlens, first_row, clamped, count);
  }
}

}  // namespace nsa

// Grid: any; the rows are dealt out over the blocks that there are.
extern "C" __global__ void __launch_bounds__(nsa::kBlockThreads)
    draft_extend(const nsa::DraftExtendArgs args) {
  nsa::draft_extend_block<false>(args);
}

// Grid: num_entries blocks, one per tile of requests_per_entry requests.
extern "C" __global__ void __launch_bounds__(nsa::kBlockThreads)
    draft_extend_tiles(const nsa::DraftExtendArgs args) {
  __shared__ nsa::Sum warp_totals[nsa::kBlockWarps];
  const nsa::Lengths extend = nsa::extend_lengths(args);
  const nsa::Lengths seq = nsa::seq_lengths(args);
  const int begin = static_cast<int>(blockIdx.x) * args.requests_per_entry;
  const int end = min(begin + args.requests_per_entry, args.bs);
  nsa::Sum before_chunk = 0;
  for (int chunk = begin; chunk < end; chunk += nsa::kBlockThreads) {
    const int idx = chunk + static_cast<int>(threadIdx.x);
    const nsa::Sum mine = idx < end ? nsa::request_sum(extend[idx], seq[idx]) : 0;
    nsa::Sum chunk_total;
    const nsa::Sum before = nsa::block_exclusive_scan(mine, warp_totals, &chunk_total);
    if (idx < end) args.request_ends[idx] = nsa::sum_add(before_chunk, nsa::sum_add(before, mine));
    before_chunk = nsa::sum_add(before_chunk, chunk_total);
    __syncthreads();
  }
  if (threadIdx.x == 0) args.tile_totals[blockIdx.x] = before_chunk;
}

// Grid: any, after draft_extend_tiles on the same stream.
extern "C" __global__ void __launch_bounds__(nsa::kBlockThreads)
    draft_extend_tiled(const nsa::DraftExtendArgs args) {
  nsa::draft_extend_block<true>(args);
}
