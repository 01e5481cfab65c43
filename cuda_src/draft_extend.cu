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
//   draft_extend_warp    <= 32       in the registers of every warp: no barrier; ends counted by bits
//   draft_extend_block   <= 256      one per thread, ends and bases in shared memory
//   draft_extend_block4  <= 1,024    four per thread
//   draft_extend_large   <= 16,384   ends of groups of four requests in shared memory; blocks twice as
//                                    large, as every block loads the whole batch
//   draft_extend_tiles, then draft_extend_tiled: above; the first launch sums tiles of requests
//
// A batch of a few rows is a matter of latency: one row per thread, and no instruction that is not
// needed. From 2^20 rows of capacity the variants with quads write 16 bytes per thread and store.
//
// Python twin: cupy_nsa_meta/draft_extend.py; specification: cupy_nsa_meta/reference.py
#include "common.cuh"

namespace nsa {

constexpr int kWarpMaxBs = 32;
constexpr int kMaxItems = 4;       // requests per thread of draft_extend_block4
constexpr int kMaxEntries = 4096;  // sums held in shared memory by draft_extend_large and _tiled
constexpr int kGroup = 4;          // requests per entry of draft_extend_large
constexpr int kLargeBatch = 4;     // groups per thread and step, loaded together
constexpr int kOneLaunchMaxBs = 16384;
constexpr int kLargeThreads = 512;  // of a block of draft_extend_large; of all others kBlockThreads
constexpr int kQuad = 4;            // rows per thread and step in quad mode: one 16-byte store per output
template <int kThreads>
constexpr int kQuadTileRows = kQuad * kThreads;
// Quad mode pays where most quads lie inside one request; else one row per thread is quicker.
constexpr u32 kQuadModeRowsPerRequest = 4 * kQuad;

enum DraftExtendFlags : u32 {
  kExtendIsInt64 = 1,
  kSeqIsInt64 = 2,
  kLinearSearch = 4,  // bs <= 16
  kTotalIsGiven = 8,  // max_rows is the caller's total_tokens, not a capacity
  kQuads = 16,        // large capacity, both outputs on 16-byte boundaries
};

// Packed by cupy_nsa_meta/draft_extend.py, field by field in this order: by first use in a small batch,
// whose first loads need one line of constants. From sm_90 on they begin 16 bytes into a 64-byte line.
struct DraftExtendArgs {
  // Line 0: the first loads.
  const void* extend_seq_lens;
  const void* seq_lens;
  i64 extend_stride;
  i64 seq_stride;
  int bs;
  u32 flags;
  u32* launch_count;  // [1] device memory or null: launches of a captured graph, the last one's epoch
  // Line 1: the report and the rows.
  int* out_seqlens_expanded;
  int* out_nsa_cache_seqlens;
  u64* result;
  int* out_total;
  int max_rows;
  int topk;
  u32 epoch;               // of the launch where launch_count is null: 29 bits, not 0
  u32 tiles_per_block;     // in quad mode; the grid covers max_rows
  int num_entries;         // ceil(bs / requests_per_entry), <= kMaxEntries
  int requests_per_entry;  // kGroup; a multiple of kBlockThreads in the two-launch form
  u32* request_ends;       // [bs] scratch of the two-launch form: inclusive sums inside a tile
  // Line 2.
  u32* tile_totals;  // [num_entries] scratch of the two-launch form: total of a tile, or a mark
};
static_assert(sizeof(DraftExtendArgs) == 120, "cupy_nsa_meta/draft_extend.py packs 120 bytes");
static_assert(kMaxEntries * kGroup == kOneLaunchMaxBs, "one launch serves this many requests");
static_assert(kGroup == 4 && kMaxItems == 4, "load_four");
static_assert(kWarpMaxBs == kWarpThreads, "a lane holds a request");

__device__ __forceinline__ Lengths extend_lengths(const DraftExtendArgs& args) {
  return {static_cast<const int*>(args.extend_seq_lens), args.extend_stride,
          (args.flags & kExtendIsInt64) != 0};
}

__device__ __forceinline__ Lengths seq_lengths(const DraftExtendArgs& args) {
  return {static_cast<const int*>(args.seq_lens), args.seq_stride, (args.flags & kSeqIsInt64) != 0};
}

// Row r of the request that ends at `end` sees max(base + r, 0) tokens, and base + r <= seq. A negative
// KV length counts as 0: no row of such a request sees a token either way.
__device__ __forceinline__ int request_base(int seq, u32 end) {
  return static_cast<int>(static_cast<u32>(max(seq, 0)) + 1 - end);
}

// ---- Outcome ------------------------------------------------------------------------------------

// What the total may be.
struct Limits {
  bool is_given;
  u32 least;
  u32 range;  // max_rows - least

  __device__ __forceinline__ explicit Limits(const DraftExtendArgs& args)
      : is_given((args.flags & kTotalIsGiven) != 0),
        least(is_given ? static_cast<u32>(args.max_rows) : 0),
        range(static_cast<u32>(args.max_rows) - least) {}

  __device__ __forceinline__ Status status(u32 total) const {
    if (total - least <= range) return kOk;  // a mark is above any max_rows
    if (total >= kMarked) return total == kMarkedNegative ? kNegativeExtend : kOutsideInt32;
    return is_given ? kTotalMismatch : kOverCapacity;
  }

  // How many rows to write.
  __device__ __forceinline__ u32 rows(u32 total) const {
    if (total <= least + range) return total;
    return total < kMarked ? least : 0;
  }
};

// The last warp of block 0 reports: the first one has rows to write meanwhile.
template <int kThreads = kBlockThreads>
__device__ __forceinline__ bool is_reporter() {
  return blockIdx.x == 0 && threadIdx.x == kThreads - 1;
}

// The epoch of the previous launch, loaded before the lengths are waited for. A captured graph cannot be
// given another one at each launch, so it counts its launches itself; they run one after another.
template <int kThreads = kBlockThreads>
__device__ __forceinline__ u32 previous_epoch(const DraftExtendArgs& args) {
  const bool counts =
      static_cast<int>(args.launch_count != nullptr) & static_cast<int>(is_reporter<kThreads>());
  return counts ? *args.launch_count : 0;
}

// The epoch of this launch: args.epoch is not asked for before it is needed.
__device__ __forceinline__ u32 launch_epoch(u32 previous, const DraftExtendArgs& args) {
  constexpr u32 kMaxEpoch = (1u << 29) - 1;
  if (args.launch_count == nullptr) return args.epoch;
  return previous >= kMaxEpoch ? 1 : previous + 1;
}

// One 8-byte word, so that the host never sees half a result:
// bits 0-31 total (-1 where it is not defined), 32-34 status, 35-63 epoch of the launch.
__device__ __forceinline__ void report(u32 total, const Limits& limits, u32 previous,
                                       const DraftExtendArgs& args) {
  const u32 status = limits.status(total);
  const u32 epoch = launch_epoch(previous, args);
  const u32 reported = total >= kMarked ? 0xffffffffu : total;
  if (args.result != nullptr) {
    const u64 word = reported | static_cast<u64>(status) << 32 | static_cast<u64>(epoch) << 35;
    *static_cast<volatile u64*>(args.result) = word;
  }
  if (args.launch_count != nullptr) *args.launch_count = epoch;
  if (args.out_total != nullptr) {
    args.out_total[0] = static_cast<int>(reported);
    args.out_total[1] = static_cast<int>(status);
  }
}

// Reports once per grid. Returns the number of rows to write.
template <int kThreads>
__device__ __forceinline__ u32 settle(u32 total, u32 previous, const DraftExtendArgs& args) {
  const Limits limits(args);
  if (unlikely(is_reporter<kThreads>())) report(total, limits, previous, args);
  return limits.rows(total);
}

// ---- Rows ---------------------------------------------------------------------------------------

__device__ __forceinline__ void store_clamped(int* expanded_at, int* clamped_at, int tokens, int topk) {
  const int expanded = max(tokens, 0);
  *expanded_at = expanded;
  *clamped_at = min(expanded, topk);
}

__device__ __forceinline__ void store_row(const DraftExtendArgs& args, u32 row, int base) {
  store_clamped(args.out_seqlens_expanded + row, args.out_nsa_cache_seqlens + row,
                base + static_cast<int>(row), args.topk);
}

// Four rows of one request.
__device__ __forceinline__ void store_rows(const DraftExtendArgs& args, u32 row, int base) {
  const int first = base + static_cast<int>(row);  // first + 3 <= seq
  const int topk = args.topk;
  const int4 expanded = make_int4(max(first, 0), max(first + 1, 0), max(first + 2, 0), max(first + 3, 0));
  const int4 clamped =
      make_int4(min(expanded.x, topk), min(expanded.y, topk), min(expanded.z, topk), min(expanded.w, topk));
  *reinterpret_cast<int4*>(args.out_seqlens_expanded + row) = expanded;
  *reinterpret_cast<int4*>(args.out_nsa_cache_seqlens + row) = clamped;
}

__device__ __forceinline__ bool use_quads(const DraftExtendArgs& args, u32 rows) {
  return (args.flags & kQuads) != 0 && rows / kQuadModeRowsPerRequest >= static_cast<u32>(args.bs);
}

// The rows of a block, [begin, end).
struct RowRange {
  u32 begin;
  u32 end;
};

__device__ __forceinline__ RowRange row_range(u32 rows, u64 rows_per_block) {
  const u64 begin = blockIdx.x * rows_per_block;
  return {static_cast<u32>(min(begin, static_cast<u64>(rows))),
          static_cast<u32>(min(begin + rows_per_block, static_cast<u64>(rows)))};
}

// In quad mode: tiles_per_block tiles side by side.
template <int kThreads = kBlockThreads>
__device__ __forceinline__ RowRange quad_rows(const DraftExtendArgs& args, u32 rows) {
  return row_range(rows, static_cast<u64>(args.tiles_per_block) * kQuadTileRows<kThreads>);
}

struct Found {
  u32 end;
  int base;
  int entry;  // where the next search may start
};

// Writes the rows of this block. find(row, first_entry) -> Found, for any row; right for rows below
// T, where no entry before first_entry ends behind the row.
template <bool kWithQuads, int kThreads, class Find>
__device__ __forceinline__ void write_rows(const DraftExtendArgs& args, u32 total, u32 previous,
                                           const Find& find) {
  if constexpr (!kWithQuads) {
    // The report goes first: a host waits for it.
    const u32 rows = settle<kThreads>(total, previous, args);
    u32 row = blockIdx.x * kThreads + threadIdx.x;
    const int base = find(row, 0).base;
    if (row >= rows) return;
    store_row(args, row, base);
    const u32 step = gridDim.x * kThreads;
#pragma unroll 1
    for (row += step; unlikely(row < rows); row += step) store_row(args, row, find(row, 0).base);
  } else {
    const u32 rows = settle<kThreads>(total, previous, args);
    // One loop for both modes, so that the search is compiled once. A block has rows side by side, so
    // that its searches stay in a small part of a large batch.
    const bool quads = use_quads(args, rows);
    const RowRange range =
        quads ? quad_rows<kThreads>(args, rows) : row_range(rows, (rows + gridDim.x - 1) / gridDim.x);
    const u32 at_once = quads ? kQuad : 1;
    const u32 step = at_once * kThreads;
    Found found = {0, 0, 0};
#pragma unroll 1
    for (u32 first = range.begin + threadIdx.x * at_once; first < range.end; first += step) {
      const u32 last = min(first + at_once, range.end);
#pragma unroll 1
      for (u32 row = first; row < last; ++row) {
        if (row >= found.end) found = find(row, found.entry);
        if (row + kQuad <= min(found.end, last)) {
          store_rows(args, row, found.base);
          break;
        }
        store_row(args, row, found.base);
      }
    }
  }
}

// ---- draft_extend_warp --------------------------------------------------------------------------

// Every lane looks for the request of its row among the ends that the lanes hold; lanes without a
// request hold the total. All lanes take part, those with a row at or past T find anything.
__device__ __forceinline__ int find_lane(u32 end, u32 row, bool linear) {
  int lane = 0;
  if (unlikely(linear)) {  // up to 16 requests: shuffles that do not wait for each other
#pragma unroll
    for (int other = 0; other < 15; ++other) lane += __shfl_sync(kFullWarp, end, other) <= row ? 1 : 0;
  } else {
#pragma unroll
    for (int step = kWarpThreads / 2; step > 0; step /= 2) {
      if (__shfl_sync(kFullWarp, end, lane + step - 1) <= row) lane += step;
    }
  }
  return lane;
}

// The same in a few steps for the rows of a warp side by side, if no two requests end at one row other
// than the last: a vote for the ends before these rows, a bit for each row where a request ends.
__device__ __forceinline__ int count_ends(u32 end, u32 row) {
  const u32 lane = threadIdx.x % kWarpThreads;
  const u32 first_row = row - lane;
  const u32 before = __ballot_sync(kFullWarp, end <= first_row);
  const u32 ahead = end - first_row;
  const u32 ends = warp_or(ahead - 1 < kWarpThreads - 1 ? 1u << ahead : 0);
  return (__popc(before) + __popc(ends << (kWarpThreads - 1 - lane))) % kWarpThreads;
}

template <bool kWithQuads>
__device__ __forceinline__ void draft_extend_warp_body(const DraftExtendArgs& args) {
  const int lane = threadIdx.x % kWarpThreads;
  // The loads lie in no branch, and nothing but them waits for a constant.
  LengthWords extend_words = extend_lengths(args).words_of(lane);
  LengthWords seq_words = seq_lengths(args).words_of(lane);
  extend_words.at = made_here(extend_words.at);
  seq_words.at = made_here(seq_words.at);
  const bool exists = lane < args.bs;
  extend_words.load(exists);
  seq_words.load(exists);
  const u32 previous = previous_epoch(args);
  const bool reports = __any_sync(kFullWarp, is_reporter());  // by a vote: a warp does not part here
  const u32 row_step = made_here(gridDim.x * kBlockThreads);
  u32 row = blockIdx.x * kBlockThreads + threadIdx.x;
  // Made here, not behind a latency where they are used; so the next line of constants is there by then.
  int* const expanded_at = made_here(args.out_seqlens_expanded + row);
  int* const clamped_at = made_here(args.out_nsa_cache_seqlens + row);
  Limits limits(args);
  limits.least = made_here(limits.least);
  limits.range = made_here(limits.range);
  // Block 0 reports: these are what they were. A bare constant would be asked for where it is used.
  DraftExtendArgs near = args;
  near.result = made_here(args.result + blockIdx.x);
  near.launch_count = made_here(args.launch_count + blockIdx.x);
  near.epoch = made_here(args.epoch + blockIdx.x);
  const Length extend = extend_words.value(), seq = seq_words.value();
  // The report goes first, before the scan: a host waits for it. Other warps go on meanwhile.
  if (unlikely(reports)) {
    const u32 total = warp_total(extend, seq);
    if (is_reporter()) report(total, limits, previous, near);
  }
  Marks known;  // by the total
  const u32 end = warp_inclusive_scan(static_cast<u32>(extend.low), known);
  // Whole warps stay in the loops, for the shuffles.
  const u32 rows = limits.rows(warp_total(extend, seq));
  const int base = request_base(seq.low, end);
  const bool linear = (args.flags & kLinearSearch) != 0;
  if (!kWithQuads || !use_quads(args, rows)) {
    // Requests without query tokens do no harm where they are the last: rows end before them.
    const u32 with_rows = __ballot_sync(kFullWarp, extend.low != 0);
    if ((with_rows & (with_rows + 1)) == 0) {
      const int tokens = __shfl_sync(kFullWarp, base, count_ends(end, row)) + static_cast<int>(row);
      if (row < rows) store_clamped(expanded_at, clamped_at, tokens, args.topk);
      row += row_step;
    }
#pragma unroll 1
    for (; unlikely(row - lane < rows); row += row_step) {
      const int row_base = __shfl_sync(kFullWarp, base, find_lane(end, row, linear));
      if (row < rows) store_row(args, row, row_base);
    }
    return;
  }
  if constexpr (kWithQuads) {
    const RowRange range = quad_rows(args, rows);
    u32 found_end = 0;
    int found_base = 0;
#pragma unroll 1
    for (u32 first = range.begin + threadIdx.x * kQuad; first - lane * kQuad < range.end;
         first += kQuadTileRows<kBlockThreads>) {
      if (__any_sync(kFullWarp, first >= found_end)) {
        const int found = find_lane(end, first, linear);
        found_end = __shfl_sync(kFullWarp, end, found);
        found_base = __shfl_sync(kFullWarp, base, found);
      }
      const bool whole = first + kQuad <= min(found_end, range.end);
      if (whole) store_rows(args, first, found_base);
      if (unlikely(__any_sync(kFullWarp, !whole))) {
#pragma unroll 1
        for (int k = 0; k < kQuad; ++k) {
          row = first + k;
          const int row_base = __shfl_sync(kFullWarp, base, find_lane(end, row, linear));
          if (!whole && row < range.end) store_row(args, row, row_base);
        }
      }
    }
  }
}

// ---- draft_extend_block, draft_extend_block4 ----------------------------------------------------

template <int kItems>
struct BlockPrefix {
  u32 ends[kBlockThreads * kItems];   // counted from the first row of the request's warp
  int bases[kBlockThreads * kItems];  // for rows counted so
  WarpWords<> words;
};

template <int kItems, bool kWithQuads>
__device__ __forceinline__ void draft_extend_block_body(const DraftExtendArgs& args) {
  __shared__ BlockPrefix<kItems> shared;
  const int bs = args.bs;
  const int first = threadIdx.x * kItems;  // consecutive requests of this thread
  const Lengths extend = extend_lengths(args);
  const Lengths seq = seq_lengths(args);
  const u32 previous = previous_epoch(args);  // behind the lengths, its load waited for them
  Length extends[kItems], seqs[kItems];
  if constexpr (kItems == 1) {
    // As in draft_extend_warp.
    LengthWords extend_words = extend.words_of(first), seq_words = seq.words_of(first);
    extend_words.at = made_here(extend_words.at);
    seq_words.at = made_here(seq_words.at);
    extend_words.load(first < bs);
    seq_words.load(first < bs);
    extends[0] = extend_words.value();
    seqs[0] = seq_words.value();
  } else {
    load_four(seq, first, bs, seqs);
    load_four(extend, first, bs, extends);
  }
  Marks marks;
  u32 mine = 0, all_sums = 0;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    marks.check(extends[k], seqs[k]);
    mine += static_cast<u32>(extends[k].low);
    all_sums |= mine;
  }
  marks.check_sums(all_sums);
  const u32 inclusive = warp_inclusive_scan(mine, marks);
  u32 end = inclusive - mine;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    end += static_cast<u32>(extends[k].low);
    shared.ends[first + k] = end;
    shared.bases[first + k] = request_base(seqs[k].low, end);
  }
  const u32 warp_total = __shfl_sync(kFullWarp, inclusive, kWarpThreads - 1);
  const BlockSums sums = block_sums(warp_word(warp_total, marks), shared.words);
  write_rows<kWithQuads, kBlockThreads>(args, sums.total, previous, [&](u32 row, int) -> Found {
    // The ends of the warps are in registers: they leave the requests of one warp to search.
    int entry = 0;
    u32 begin = 0;
#pragma unroll
    for (int w = 0; w < kBlockWarps - 1; ++w) {
      if (sums.warp_ends[w] <= row) {
        entry += kWarpThreads * kItems;
        begin = sums.warp_ends[w];
      }
    }
    const u32 local_row = row - begin;
#pragma unroll
    for (int step = kWarpThreads * kItems / 2; step > 0; step /= 2) {
      if (shared.ends[entry + step - 1] <= local_row) entry += step;
    }
    return {begin + shared.ends[entry], static_cast<int>(static_cast<u32>(shared.bases[entry]) - begin),
            entry};
  });
}

// ---- draft_extend_large, draft_extend_tiled -----------------------------------------------------

template <int kThreads>
struct LargePrefix {
  u32 ends[kMaxEntries];  // entry e covers rows [e ? ends[e - 1] : 0, ends[e])
  WarpWords<kThreads / kWarpThreads> words;
};
static_assert(sizeof(LargePrefix<kLargeThreads>) <= 48 * 1024, "static shared memory limit");

// What the lengths of many groups have in their words, ORed together: few instructions for each.
struct GroupWords {
  u32 lows = 0;   // of extend lengths
  u32 sums = 0;   // inside a group
  u32 highs = 0;  // of extend lengths that are int64, not 0: one is outside int32
  u32 seqs = 0;   // not 0: a KV length is outside int32

  // Four extend lengths. Returns their sum.
  __device__ __forceinline__ u32 add(const int4& words, u32 high_words) {
    const u32 front = static_cast<u32>(words.x) + static_cast<u32>(words.y);
    const u32 back = static_cast<u32>(words.z) + static_cast<u32>(words.w);
    lows |= words.x | words.y | words.z | words.w;
    sums |= front | back | (front + back);
    highs |= high_words;
    return front + back;
  }

  __device__ __forceinline__ Marks marks(bool extend_is_int64) const {
    const u32 signs = extend_is_int64 ? highs : lows;
    Marks marks;
    marks.bad = highs | seqs | (lows | sums) >> 31;
    marks.signs = static_cast<int>(signs);
    return marks;
  }
};

// kBatch whole groups per thread and step, all of their loads in flight together. Only int64 KV lengths
// can be outside int32: others are not loaded.
template <int kThreads, int kBatch>
__device__ __forceinline__ void load_group_batches(const Lengths& extend, const Lengths& seq, int num_whole,
                                                   int& group, u32* sums, GroupWords& words) {
#pragma unroll 1
  for (; group + (kBatch - 1) * kThreads < num_whole; group += kBatch * kThreads) {
    LengthQuad extend_quads[kBatch], seq_quads[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (seq.is_int64) seq_quads[k].load(seq, (group + k * kThreads) * kGroup);
      extend_quads[k].load(extend, (group + k * kThreads) * kGroup);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const LengthQuad& quad = extend_quads[k];
      sums[group + k * kThreads] = words.add(quad.lows(extend.is_int64), quad.highs(extend.is_int64));
      words.seqs |= seq_quads[k].outside_int32();
    }
  }
}

// Loads every request, four per thread and step, and puts the sums of the groups in shared.ends.
template <int kThreads>
__device__ __forceinline__ Marks load_groups(const DraftExtendArgs& args, LargePrefix<kThreads>& shared) {
  const Lengths extend = extend_lengths(args);
  const Lengths seq = seq_lengths(args);
  GroupWords words;
  int group = threadIdx.x;
  if (extend.has_quads() && (seq.has_quads() || !seq.is_int64)) {
    const int num_whole = args.bs / kGroup;
    load_group_batches<kThreads, kLargeBatch>(extend, seq, num_whole, group, shared.ends, words);
    load_group_batches<kThreads, 1>(extend, seq, num_whole, group, shared.ends, words);
  }
#pragma unroll 1
  for (; group * kGroup < args.bs; group += kThreads) {
    Length extends[kGroup], seqs[kGroup] = {};
    if (seq.is_int64) load_four(seq, group * kGroup, args.bs, seqs);
    load_four(extend, group * kGroup, args.bs, extends);
    u32 highs = 0;
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      highs |= extends[k].high;
      words.seqs |= seqs[k].outside_int32();
    }
    shared.ends[group] = words.add({extends[0].low, extends[1].low, extends[2].low, extends[3].low}, highs);
  }
  return words.marks(extend.is_int64);
}

template <int kThreads>
__device__ __forceinline__ Marks load_tiles(const DraftExtendArgs& args, LargePrefix<kThreads>& shared) {
  Marks marks;
  for (int entry = threadIdx.x; entry < args.num_entries; entry += kThreads) {
    const u32 total = args.tile_totals[entry];
    marks.bad |= total >> 31;
    if (total == kMarkedNegative) marks.signs = -1;
    shared.ends[entry] = total;
  }
  return marks;
}

// Turns the sums of the entries into their ends. Returns T or a mark.
template <int kThreads>
__device__ __forceinline__ u32 scan_entries(LargePrefix<kThreads>& shared, int num_entries, Marks marks) {
  // Each thread on consecutive entries; an odd count per thread spreads them over all banks.
  const int per_thread = ((num_entries + kThreads - 1) / kThreads) | 1;
  const int begin = min(static_cast<int>(threadIdx.x) * per_thread, num_entries);
  const int end = min(begin + per_thread, num_entries);
  u32 mine = 0, all_sums = 0;
#pragma unroll 4
  for (int entry = begin; entry < end; ++entry) {
    mine += shared.ends[entry];
    all_sums |= mine;
  }
  marks.check_sums(all_sums);
  const u32 inclusive = warp_inclusive_scan(mine, marks);
  const u32 warp_total = __shfl_sync(kFullWarp, inclusive, kWarpThreads - 1);
  const BeforeWarp before = sum_before_warp(warp_word(warp_total, marks), shared.words);
  u32 running = before.sum + inclusive - mine;
#pragma unroll 4
  for (int entry = begin; entry < end; ++entry) {
    running += shared.ends[entry];
    shared.ends[entry] = running;
  }
  return before.total;
}

// The request of a row, among those of the entry that covers it: a group or a tile.
template <bool kTiled>
__device__ __forceinline__ Found find_in_entries(const DraftExtendArgs& args, const u32* ends, u32 row,
                                                 int first_entry) {
  const int entry = upper_bound(ends, first_entry, args.num_entries - 1, row);
  const u32 begin = entry > 0 ? ends[entry - 1] : 0;
  int idx = entry * args.requests_per_entry;
  u32 end;
  if constexpr (kTiled) {
    const int last = min(idx + args.requests_per_entry, args.bs) - 1;
    idx += upper_bound(args.request_ends + idx, 0, last - idx, row - begin);
    end = begin + args.request_ends[idx];
  } else {
    // The KV lengths are loaded beside the extend lengths, before it is known which one is needed.
    Length extends[kGroup], seqs[kGroup];
    load_four(extend_lengths(args), idx, args.bs, extends);
    load_four(seq_lengths(args), idx, args.bs, seqs);
    end = begin;
    int seq = 0;
    bool passed = true;  // the row lies behind the requests so far
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (passed) {
        end += static_cast<u32>(extends[k].low);
        seq = seqs[k].low;
      }
      passed = passed && end <= row;
    }
    return {end, request_base(seq, end), entry};
  }
  return {end, request_base(seq_lengths(args)[idx].low, end), entry};
}

template <bool kTiled, int kThreads>
__device__ __forceinline__ void draft_extend_large_body(const DraftExtendArgs& args) {
  __shared__ LargePrefix<kThreads> shared;
  const Marks marks = kTiled ? load_tiles(args, shared) : load_groups(args, shared);
  const u32 previous = previous_epoch<kThreads>(args);
  __syncthreads();
  const u32 total = scan_entries(shared, args.num_entries, marks);
  __syncthreads();
  write_rows<true, kThreads>(args, total, previous, [&](u32 row, int first_entry) -> Found {
    return find_in_entries<kTiled>(args, shared.ends, row, first_entry);
  });
}

__device__ __forceinline__ void draft_extend_tiles_body(const DraftExtendArgs& args) {
  __shared__ WarpWords<> words;
  const Lengths extend = extend_lengths(args);
  const Lengths seq = seq_lengths(args);
  const int begin = static_cast<int>(blockIdx.x) * args.requests_per_entry;
  const int end = min(begin + args.requests_per_entry, args.bs);
  u32 before_chunk = 0, mark = 0;
  for (int chunk = begin; chunk < end; chunk += kBlockThreads) {
    const int idx = chunk + static_cast<int>(threadIdx.x);
    Marks marks;
    Length extend_len = {0, 0};
    if (idx < end) {
      extend_len = extend[idx];
      marks.check(extend_len, seq[idx]);
    }
    const u32 inclusive = warp_inclusive_scan(static_cast<u32>(extend_len.low), marks);
    const u32 warp_total = __shfl_sync(kFullWarp, inclusive, kWarpThreads - 1);
    const BeforeWarp before = sum_before_warp(warp_word(warp_total, marks), words);
    if (idx < end) args.request_ends[idx] = before_chunk + before.sum + inclusive;
    if (before.total >= kMarked) {
      mark = max(mark, before.total);  // kMarkedNegative is the larger one
    } else {
      before_chunk += before.total;
      if (before_chunk >= kMarked) mark = max(mark, kMarkedOutside);
      before_chunk &= ~kMarked;  // means nothing any more, but cannot wrap around
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) args.tile_totals[blockIdx.x] = mark != 0 ? mark : before_chunk;
}

}  // namespace nsa

#define NSA_KERNEL(name, threads, blocks_per_sm, ...)                  \
  extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm) \
      name(const nsa::DraftExtendArgs args) {                          \
    nsa::__VA_ARGS__(args);                                            \
  }
// Grids: any number of blocks that covers max_rows in quad mode, else any number at all; the rows are
// dealt out over those there are. draft_extend_tiles has num_entries blocks, one per tile, and goes
// before draft_extend_tiled on the same stream.
//
// The slowest to compile is a program of its own: the same in PROGRAMS of cupy_nsa_meta/_module.py.
#if NSA_IN_PROGRAM(0)
NSA_KERNEL(draft_extend_large, nsa::kLargeThreads, 1, draft_extend_large_body<false, nsa::kLargeThreads>)
#endif
#if NSA_IN_PROGRAM(1)
NSA_KERNEL(draft_extend_warp, nsa::kBlockThreads, 4, draft_extend_warp_body<false>)
NSA_KERNEL(draft_extend_warp_quads, nsa::kBlockThreads, 4, draft_extend_warp_body<true>)
NSA_KERNEL(draft_extend_block, nsa::kBlockThreads, 4, draft_extend_block_body<1, false>)
NSA_KERNEL(draft_extend_block4, nsa::kBlockThreads, 4, draft_extend_block_body<nsa::kMaxItems, false>)
NSA_KERNEL(draft_extend_block4_quads, nsa::kBlockThreads, 4, draft_extend_block_body<nsa::kMaxItems, true>)
NSA_KERNEL(draft_extend_tiles, nsa::kBlockThreads, 4, draft_extend_tiles_body)
NSA_KERNEL(draft_extend_tiled, nsa::kBlockThreads, 4, draft_extend_large_body<true, nsa::kBlockThreads>)
#endif
#undef NSA_KERNEL
