// fused: every metadata array that a forward pass needs, from the lengths and the token table.
//
// One program serves decode, target-verify, draft-extend and EXTEND; an output whose pointer is null
// is not computed. Request i has
//   kv_i = seq_lens[i] + kv_add            KV length
//   q_i  = uniform_q, or extend_seq_lens[i] where they are given (uniform_q is -1)  query tokens
//   begin_i = the sum of q before i        its first output row
// and for row r = begin_i + j, 0 <= j < q_i:
//   expanded = max(kv_i - q_i + 1 + j, 0)
//   clipped  = min(expanded, topk)
//
//   per request, [0, bs)               per row, [0, R), R = min(T, total_len)
//   cache_seqlens          kv          seqlens_expanded       expanded
//   cu_seqlens_k   [1 + i] sum of kv   dsa_cache_seqlens      clipped; 0 in [R, pad_to)
//   cu_seqlens_q   [1 + i] sum of q    dsa_cu_seqlens_k [1+r] sum of clipped; flat up to 1 + pad_to
//   extend_start_loc       begin       token_to_batch_idx     i
//   paged_mqa_ctx_lens_2d [i, j] kv    ks, topk_indices_offset   sum of kv before i
//                                      ke                     ks + expanded
//                                      positions (int64)      kv - q + j
//   page_table_1    [row, c]      = req_to_token[req_pool_indices[i], c]           c < min(kv_i, width)
//   real_page_table [row, c / ps] = the same / ps, where c % ps == 0
//   page_table_1_flattened        = the same without gaps, c < min(max(seq, 0), token_width)
// Table rows: one for each row r, or with kOneRowPerRequest one for each request. Element 0 of every
// cu_* array is 0. A value outside int32 is cut to its range and reported.
//
// Plan: inside a request the clipped lengths are an arithmetic series cut at both ends, so their
// running sum is a closed form in j, and only the requests need a prefix sum. The first blocks write
// the 1-D arrays: a tile of kBlockThreads requests each, whose rows are dealt out over `row_parts`
// blocks, each of which adds up what lies before its tile by itself, in 32 bits where lengths and sums
// are small. The other blocks write one table of one request each, with no sum at all where rows are
// uniform. Above kOneLaunchMaxBs requests fused_tiles adds up the tiles in a launch before.
//
// fused_direct is the same for the batches of a speculative step, and fused_direct_uniform for those of
// decode and target-verify: up to kRequestsPerTile requests of few query tokens (the host decides), a
// matter of latency, so of instructions in a chain. The threads that hold a request write its rows, so
// nothing is searched; sums are 32-bit, and up to a warp of requests every warp makes them by itself,
// without a barrier, up to kBlockWarps requests without a scan. Lengths for which 32 bits are not
// enough, and those that are an error, take the general way.
//
// Python twins: cupy_nsa_meta/fused.py, _fused_args.py; specification: cupy_nsa_meta/reference_fused.py
#include "common.cuh"

namespace nsa {

constexpr int kRequestsPerTile = kBlockThreads;
// Resident blocks per multiprocessor that registers are spared for: sm_75 holds four; on sm_80, sm_100 and
// sm_120 the fifth would cost a spill.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ <= 800 || __CUDA_ARCH__ / 10 == 100 || __CUDA_ARCH__ / 10 == 120)
constexpr int kFusedBlocksPerSm = 4;
#else
constexpr int kFusedBlocksPerSm = 5;
#endif
constexpr int kUnroll = 4;         // independent loads in flight per thread of a table block
constexpr int kVectorColumns = 4;  // columns of one 16-byte access
// Sums are exact up to this mark; beyond it they only have to stay above int32.
constexpr i64 kBeyondInt32 = kInt32Max + 1;
constexpr int kRequestOutsidePool = 5;  // status, beside those of common.cuh

enum FusedFlags : u32 {
  kFusedSeqIsInt64 = 1,
  kFusedExtendIsInt64 = 2,
  kFusedPoolIsInt64 = 4,
  kHasRowOutputs = 8,      // some array indexed by rows is wanted
  kOneRowPerRequest = 16,  // page tables have one row for each request
  kTotalIsCapacity = 32,   // total_len bounds T, which only the lengths tell
  kHasVectors = 64,        // of fused_direct: rows of page_table_1 can be copied by 16 bytes
};

// Packed by cupy_nsa_meta/_fused_args.py, field by field in this order: that in which the kernels of small
// batches first need them. The constants of a launch are new to every multiprocessor, and a line of 64
// bytes that is met late in a chain costs a latency there. Parameters begin 16 bytes into a line.
struct FusedArgs {
  // What the addresses of the first loads are made of.
  const void* seq_lens;          // [bs]
  const void* req_pool_indices;  // [bs] or null
  int bs;
  int uniform_q;
  u32 flags;
  int page_1_blocks;  // blocks per request, for each table; 0: not wanted
  int real_page_blocks;
  u32 blocks_inverse;  // of fused_direct: ceil(2^32 / blocks of a request); 0 where there is one
  int seq_step;        // of fused_direct: bytes between lengths
  int pool_step;
  // Line 1: the first loads of fused_direct, then what their values meet.
  const void* extend_seq_lens;  // [bs] or null
  const int* req_to_token;      // [pool_rows, token_width] or null
  i64 token_stride;             // between rows of req_to_token
  i64 pool_rows;
  int extend_step;
  int table_items;  // vectors or tokens of a row that a thread has in flight, 1 .. kUnroll
  int total_len;
  int kv_add;
  int topk;
  int width;       // columns of page_table_1
  int page_shift;  // log2 of the page size
  int token_width;
  // Line 2: where small batches are written to.
  int* cache_seqlens;
  int* cu_seqlens_k;
  int* dsa_cache_seqlens;
  int* dsa_cu_seqlens_k;
  int* page_table_1;
  i64 page_1_stride;
  int* real_page_table;
  i64 real_page_stride;
  // Line 3: what some small batches have, then the rest.
  int* seqlens_expanded;
  int* paged_mqa_ctx_lens_2d;
  i64 mqa_stride;
  int* status;     // [1], raised to the largest status met
  i64* tile_sums;  // [kTileSums, num_tiles] scratch of the two-launch form, else null
  int pad_to;      // 0: no padding
  int num_tiles;   // max(1, ceil(bs / kRequestsPerTile))
  int row_parts;   // blocks per tile
  int flattened_blocks;
  int* cu_seqlens_q;
  int* extend_start_loc;
  int* token_to_batch_idx;
  int* ks;
  int* ke;
  int* topk_indices_offset;
  i64* positions;
  int* page_table_1_flattened;
  i64 flattened_size;
  i64 seq_stride;
  i64 extend_stride;
  i64 pool_stride;
};
static_assert(sizeof(FusedArgs) == 328, "cupy_nsa_meta/_fused_args.py packs 328 bytes");

__device__ __forceinline__ Lengths fused_seq_lens(const FusedArgs& args) {
  return {static_cast<const int*>(args.seq_lens), args.seq_stride, (args.flags & kFusedSeqIsInt64) != 0};
}

__device__ __forceinline__ Lengths fused_extend_lens(const FusedArgs& args) {
  return {static_cast<const int*>(args.extend_seq_lens), args.extend_stride,
          (args.flags & kFusedExtendIsInt64) != 0};
}

__device__ __forceinline__ Lengths fused_pool_indices(const FusedArgs& args) {
  return {static_cast<const int*>(args.req_pool_indices), args.pool_stride,
          (args.flags & kFusedPoolIsInt64) != 0};
}

// Raises *status; every error of the device data ends here, so it is never a barrier's business.
__device__ __forceinline__ void meet(int* status, int met) { *status = max(*status, met); }

// `value` cut to int32, with the status of the cut.
__device__ __forceinline__ int cut(int value, int*) { return value; }

__device__ __forceinline__ int cut(i64 value, int* status) {
  if (fits_int32(value)) return static_cast<int>(value);
  meet(status, kOutsideInt32);
  return static_cast<int>(value < 0 ? kInt32Min : kInt32Max);
}

// Query tokens of an extend length, >= 0.
__device__ __forceinline__ i64 query_tokens(i64 extend, int* status) {
  if (extend < 0) meet(status, kNegativeExtend);
  return max(static_cast<i64>(cut(extend, status)), static_cast<i64>(0));
}

// Sum of min(max(first + j, 0), topk) over j in [0, count). The values 0, then an arithmetic series,
// then topk: with count, topk < 2^31 no product passes 2^63.
__device__ __forceinline__ i64 clipped_sum(i64 first, i64 count, i64 topk) {
  const i64 rise_begin = min(max(-first, static_cast<i64>(0)), count);
  const i64 rise_end = min(max(topk - first, rise_begin), count);
  const i64 rise = (rise_end - rise_begin) * (2 * first + rise_begin + rise_end - 1) / 2;
  return rise + (count - rise_end) * topk;
}

// The same in 32 bits, where the lengths and the result are below 2^28 and 2^31: the sum of the rise is no
// larger than the result.
__device__ __forceinline__ int clipped_sum(int first, int count, int topk) {
  const int rise_begin = min(max(-first, 0), count);
  const int rise_end = min(max(topk - first, rise_begin), count);
  const u32 ends = static_cast<u32>(2 * first + rise_begin + rise_end - 1);
  const u32 rise = static_cast<u32>(rise_end - rise_begin) * ends / 2;
  return static_cast<int>(rise + static_cast<u32>(count - rise_end) * static_cast<u32>(topk));
}

// What the requests before some place add up to.
template <class Int>
struct SumsOf {
  Int kv;  // exact and signed: a negative length counts as what it is, as in a cumsum
  Int q;
  Int clipped;  // of each request at most kBeyondInt32
};
typedef SumsOf<i64> Sums;

template <class Int>
__device__ __forceinline__ SumsOf<Int> add(const SumsOf<Int>& a, const SumsOf<Int>& b) {
  return {a.kv + b.kv, a.q + b.q, a.clipped + b.clipped};
}

// Inclusive sums over the lanes of a warp.
template <class Int>
__device__ __forceinline__ SumsOf<Int> warp_scan(SumsOf<Int> sums) {
  const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
  for (int distance = 1; distance < kWarpThreads; distance *= 2) {
    const SumsOf<Int> below = {__shfl_up_sync(kFullWarp, sums.kv, distance),
                               __shfl_up_sync(kFullWarp, sums.q, distance),
                               __shfl_up_sync(kFullWarp, sums.clipped, distance)};
    if (lane >= distance) sums = add(sums, below);
  }
  return sums;
}

template <class Int, class Other>
__device__ __forceinline__ SumsOf<Int> converted(const SumsOf<Other>& sums) {
  return {static_cast<Int>(sums.kv), static_cast<Int>(sums.q), static_cast<Int>(sums.clipped)};
}

// Below it, a warp's sums fit 31 bits.
constexpr i64 kSmall = 1ll << 26;
static_assert(kWarpThreads * kSmall <= kInt32Max + 1, "sums of a warp");

__device__ __forceinline__ bool is_small(const Sums& sums) {
  return (sums.kv | sums.q | sums.clipped) >= 0 && (sums.kv | sums.q | sums.clipped) < kSmall;
}

__device__ __forceinline__ Sums request_sums(const FusedArgs& args, int idx, int* status) {
  // Both are loaded before either is looked at.
  const Lengths seq_lens = fused_seq_lens(args), extend_lens = fused_extend_lens(args);
  const bool rows_vary = args.extend_seq_lens != nullptr;
  LengthWords seq_words(seq_lens.at(idx), 0, seq_lens.is_int64);
  LengthWords extend_words(extend_lens.at(idx), 0, extend_lens.is_int64);
  seq_words.load(true);
  extend_words.load(rows_vary);
  const i64 q = rows_vary ? query_tokens(extend_words.value().value(), status) : args.uniform_q;
  const i64 kv = static_cast<i64>(cut(seq_words.value().value(), status)) + args.kv_add;
  return {kv, q, min(clipped_sum(kv - q + 1, q, static_cast<i64>(args.topk)), kBeyondInt32)};
}

enum TileSum { kTileKv, kTileQ, kTileClipped, kTileTokens, kTileSums };

// ---- Blocks of 1-D arrays -----------------------------------------------------------------------

// The requests of a tile, as its rows need them.
struct FusedTile {
  u32 ends[kRequestsPerTile];                // rows of the tile up to and with the request; cut to int32
  i64 first[kRequestsPerTile + 1];           // kv - q + 1: the length that row j = 0 would see unclamped
  i64 kv_before[kRequestsPerTile];           // sums over all requests before this one
  i64 clipped_before[kRequestsPerTile + 1];  // entry `count`: with the whole tile
  Sums warp_totals[kBlockWarps];             // of the tile
  Sums warp_before[kBlockWarps];             // of what lies before the tile
  u32 warp_marks[kBlockWarps];               // kMarked: some length is not small
};
static_assert(sizeof(FusedTile) <= 48 * 1024, "static shared memory limit");

// This thread's share of the requests before the tile.
__device__ __forceinline__ Sums sums_before_tile(const FusedArgs& args, int tile) {
  Sums sums = {0, 0, 0};
  if (args.tile_sums != nullptr) {
    const i64 num_tiles = args.num_tiles;
    for (int other = threadIdx.x; other < tile; other += kBlockThreads) {
      sums =
          add(sums, {args.tile_sums[kTileKv * num_tiles + other], args.tile_sums[kTileQ * num_tiles + other],
                     args.tile_sums[kTileClipped * num_tiles + other]});
    }
  } else {
    int ignored = 0;  // the blocks of those tiles report it
#pragma unroll 2
    for (int idx = threadIdx.x; idx < tile * kRequestsPerTile; idx += kBlockThreads) {
      sums = add(sums, request_sums(args, idx, &ignored));
    }
  }
  return sums;
}

// What is behind the barrier of a row block: results of the requests of a tile, then those of its rows,
// [row_begin, row_end), exact, as T may pass int32. `mine` are the lengths of this thread's request, `upto`
// the sums over the batch up to and with it. Int is int where all of these, and all that is made of them,
// fit 32 bits. Returns the status.
template <class Int>
__device__ __forceinline__ int write_tile(const FusedArgs& args, FusedTile& shared, int tile, int part,
                                          const SumsOf<Int>& mine, const SumsOf<Int>& upto, Int row_begin,
                                          Int row_end, int status) {
  const int thread = threadIdx.x;
  const int idx_begin = tile * kRequestsPerTile;
  const int count = min(args.bs - idx_begin, kRequestsPerTile);
  const int idx = idx_begin + thread;
  const bool exists = thread < count;
  if (part == 0) {
    if (exists) {
      if (args.cache_seqlens != nullptr) args.cache_seqlens[idx] = cut(mine.kv, &status);
      if (args.cu_seqlens_k != nullptr) args.cu_seqlens_k[idx + 1] = cut(upto.kv, &status);
      if (args.cu_seqlens_q != nullptr) args.cu_seqlens_q[idx + 1] = cut(upto.q, &status);
      if (args.extend_start_loc != nullptr) args.extend_start_loc[idx] = cut(upto.q - mine.q, &status);
    }
    if (tile == 0 && thread == 0) {
      if (args.cu_seqlens_k != nullptr) args.cu_seqlens_k[0] = 0;
      if (args.cu_seqlens_q != nullptr) args.cu_seqlens_q[0] = 0;
      if (args.dsa_cu_seqlens_k != nullptr) args.dsa_cu_seqlens_k[0] = 0;
    }
  }

  const bool is_last = tile == args.num_tiles - 1;
  const Int total_len = args.total_len;
  // Above every length that fits: no sum of it leaves 32 bits.
  constexpr int kMaxTopk = sizeof(Int) == sizeof(int) ? 2 * kSmall : kInt32Max;
  if (is_last && part == 0 && thread == 0) {
    if (row_end > kInt32Max) meet(&status, kOutsideInt32);
    const bool may_be_less = (args.flags & kTotalIsCapacity) != 0;
    if (may_be_less ? row_end > total_len : row_end != total_len) meet(&status, kTotalMismatch);
  }
  if ((args.flags & kHasRowOutputs) == 0) return status;
  shared.ends[thread] = static_cast<u32>(min(upto.q - row_begin, static_cast<Int>(kInt32Max)));
  shared.first[thread] = mine.kv - mine.q + 1;
  shared.kv_before[thread] = upto.kv - mine.kv;
  shared.clipped_before[thread] = upto.clipped - mine.clipped;
  if (thread == kRequestsPerTile - 1) {
    shared.first[kRequestsPerTile] = 0;
    shared.clipped_before[kRequestsPerTile] = upto.clipped;
  }
  __syncthreads();

  // Rows are counted from row_begin, so that they fit 32 bits: those from total_len on are dropped.
  // The tile in which the rows end, at T or at total_len, goes on with the padding, if any.
  const Int rows = max(min(row_end, total_len) - row_begin, static_cast<Int>(0));
  const bool ends_here = row_end <= total_len ? is_last : row_begin <= total_len && total_len < row_end;
  const Int padded = ends_here ? max(args.pad_to - row_begin, rows) : rows;
  const u32 step = static_cast<u32>(args.row_parts) * kBlockThreads;
#pragma unroll 1
  for (u32 at = static_cast<u32>(part) * kBlockThreads + thread; at < static_cast<u32>(padded); at += step) {
    const i64 row = row_begin + static_cast<i64>(at);
    // A padding row has length 0 and repeats the sum at which the rows end.
    const bool is_padding = at >= static_cast<u32>(rows);
    const u32 key = is_padding ? static_cast<u32>(rows) : at;
    int entry;
    if (args.uniform_q > 0) {
      entry = static_cast<int>(key / static_cast<u32>(args.uniform_q));
    } else {
      entry = upper_bound(shared.ends, 0, count, key);
    }
    const Int j = static_cast<Int>(key - (entry > 0 ? shared.ends[entry - 1] : 0));
    const Int first = static_cast<Int>(shared.first[entry]);
    const Int expanded = is_padding ? 0 : max(first + j, static_cast<Int>(0));
    if (args.dsa_cache_seqlens != nullptr) {
      args.dsa_cache_seqlens[row] = static_cast<int>(min(expanded, static_cast<Int>(args.topk)));
    }
    if (args.dsa_cu_seqlens_k != nullptr) {
      const Int before = static_cast<Int>(shared.clipped_before[entry]);
      const Int topk = min(args.topk, kMaxTopk);
      args.dsa_cu_seqlens_k[row + 1] =
          cut(before + clipped_sum(first, is_padding ? j : j + 1, topk), &status);
    }
    if (is_padding) continue;
    if (args.seqlens_expanded != nullptr) args.seqlens_expanded[row] = cut(expanded, &status);
    if (args.token_to_batch_idx != nullptr) args.token_to_batch_idx[row] = idx_begin + entry;
    const Int ks = static_cast<Int>(shared.kv_before[entry]);
    if (args.ks != nullptr) args.ks[row] = cut(ks, &status);
    if (args.ke != nullptr) args.ke[row] = cut(ks + expanded, &status);
    if (args.topk_indices_offset != nullptr) args.topk_indices_offset[row] = cut(ks, &status);
    if (args.positions != nullptr) args.positions[row] = first - 1 + j;
    if (args.paged_mqa_ctx_lens_2d != nullptr) {
      args.paged_mqa_ctx_lens_2d[(idx_begin + entry) * args.mqa_stride + static_cast<i64>(j)] =
          cut(first - 1 + args.uniform_q, &status);
    }
  }
  return status;
}

// kMayBeSmall: with the way for small lengths. fused_direct comes here with others alone, and code that it
// does not run would change how the rest of it is laid out.
template <bool kMayBeSmall>
__device__ __forceinline__ void row_block(const FusedArgs& args, int tile, int part) {
  __shared__ FusedTile shared;
  const int thread = threadIdx.x;
  const int warp = thread / kWarpThreads;
  const int lane = thread % kWarpThreads;
  const int idx = tile * kRequestsPerTile + thread;
  int status = 0;

  Sums mine = {0, 0, 0};
  if (idx < args.bs) mine = request_sums(args, idx, &status);
  const bool warp_is_small = kMayBeSmall && !__any_sync(kFullWarp, !is_small(mine));
  const Sums upto = warp_is_small ? converted<i64>(warp_scan(converted<int>(mine))) : warp_scan(mine);
  if (lane == kWarpThreads - 1) {
    shared.warp_totals[warp] = upto;
    shared.warp_marks[warp] = warp_is_small ? 0 : kMarked;
  }
  if (tile > 0) {
    Sums before = sums_before_tile(args, tile);
#pragma unroll
    for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
      before = add(before, {__shfl_xor_sync(kFullWarp, before.kv, distance),
                            __shfl_xor_sync(kFullWarp, before.q, distance),
                            __shfl_xor_sync(kFullWarp, before.clipped, distance)});
    }
    if (lane == 0) shared.warp_before[warp] = before;
  }
  __syncthreads();
  Sums tile_before = {0, 0, 0};
  if (tile > 0) {
#pragma unroll 1
    for (int w = 0; w < kBlockWarps; ++w) tile_before = add(tile_before, shared.warp_before[w]);
  }
  // Of lengths that are small, the sums may still be large: two good ones stay below 2^32.
  SumsOf<u32> tile_total = {0, 0, 0}, before_warp = {0, 0, 0};
  u32 marks = 0;
#pragma unroll 2
  for (int w = 0; w < kBlockWarps; ++w) {
    if (w == warp) before_warp = tile_total;
    tile_total = add(tile_total, converted<u32>(shared.warp_totals[w]));
    marks |= tile_total.kv | tile_total.q | tile_total.clipped | shared.warp_marks[w];
  }
  const Sums tile_end = add(tile_before, converted<i64>(tile_total));
  const i64 ends =
      tile_before.kv | tile_before.q | tile_before.clipped | tile_end.kv | tile_end.q | tile_end.clipped;
  if (kMayBeSmall && marks < kMarked && static_cast<u64>(ends) <= kInt32Max) {
    const SumsOf<int> before = add(converted<int>(tile_before), converted<int>(before_warp));
    status = write_tile(args, shared, tile, part, converted<int>(mine), add(converted<int>(upto), before),
                        static_cast<int>(tile_before.q), static_cast<int>(tile_end.q), status);
  } else {
    Sums before = tile_before;
    i64 row_end = tile_before.q;
#pragma unroll 1
    for (int w = 0; w < kBlockWarps; ++w) {
      if (w < warp) before = add(before, shared.warp_totals[w]);
      row_end += shared.warp_totals[w].q;
    }
    status = write_tile(args, shared, tile, part, mine, add(upto, before), tile_before.q, row_end, status);
  }
  if (status != 0) atomicMax(args.status, status);
}

// ---- The block of 1-D arrays of fused_direct ----------------------------------------------------

constexpr int kDirectLengthBits = 26;                         // a KV length
constexpr int kDirectQueryBits = 4;                           // query tokens of a request
constexpr int kDirectMaxTopk = 1 << (kDirectLengthBits + 1);  // cuts no length
static_assert((1ll << kDirectQueryBits) * kDirectMaxTopk <= 1ll << 31, "clipped_sum fits 32 bits");

struct DirectShared {
  u32 kv[kBlockWarps];  // sums of a warp
  u32 q[kBlockWarps];
  u32 clipped[kBlockWarps];
  u32 unusual[kBlockWarps];
};

// Length idx of an array whose elements are `step` bytes apart.
struct DirectLength : LengthWords {
  __device__ __forceinline__ DirectLength(const void* lengths, int idx, int step, bool is_int64)
      : LengthWords(lengths, static_cast<u64>(static_cast<u32>(idx)) * static_cast<u32>(step), is_int64) {}

  // Without a condition: the word of an int32 is loaded twice.
  __device__ __forceinline__ void load() {
    low = __ldg(reinterpret_cast<const int*>(at));
    second = __ldg(reinterpret_cast<const int*>(at + (is_int64 ? sizeof(int) : 0)));
  }
};

__device__ __forceinline__ DirectLength direct_seq_len(const FusedArgs& args, int idx) {
  return {args.seq_lens, idx, args.seq_step, (args.flags & kFusedSeqIsInt64) != 0};
}

__device__ __forceinline__ DirectLength direct_extend_len(const FusedArgs& args, int idx) {
  return {args.extend_seq_lens, idx, args.extend_step, (args.flags & kFusedExtendIsInt64) != 0};
}

__device__ __forceinline__ DirectLength direct_pool_index(const FusedArgs& args, int idx) {
  return {args.req_pool_indices, idx, args.pool_step, (args.flags & kFusedPoolIsInt64) != 0};
}

// kUniform: every request has uniform_q query tokens, and there are no extend lengths.
template <bool kUniform>
__device__ __forceinline__ void direct_row_block(const FusedArgs& args) {
  __shared__ DirectShared shared;
  const int thread = threadIdx.x;
  const int warp = static_cast<int>(threadIdx.x / kWarpThreads);
  const int lane = static_cast<int>(threadIdx.x % kWarpThreads);
  const int bs = args.bs;
  // A warp for each request, whose rows its lanes take, where there are as many: lanes behind the
  // requests hold the last one. Or every warp holds the requests and takes every kBlockWarps-th row of
  // each; or every thread holds one request and takes all of its rows.
  const bool has_warps = bs <= kBlockWarps;
  const bool spreads = bs <= kWarpThreads;
  const int holder = spreads ? lane : thread;
  const bool exists = holder < bs;
  const int idx = has_warps ? min(lane, max(bs - 1, 0)) : holder;
  DirectLength seq_words = direct_seq_len(args, idx), extend_words = direct_extend_len(args, idx);
  if (idx < bs) {
    seq_words.load();
    if constexpr (!kUniform) extend_words.load();
  }
  // Whose results this thread writes, and which rows of it.
  const int writes = has_warps ? warp : holder;
  const int first_row = has_warps ? lane : spreads ? warp : 0;
  const int row_step = has_warps ? kWarpThreads : spreads ? kBlockWarps : 1;
  const u32 total_len = static_cast<u32>(args.total_len);
  const u32 least_total = (args.flags & kTotalIsCapacity) != 0 ? 0 : total_len;
  int* const cache_at = made_here(args.cache_seqlens + writes);  // where most results go: the same line
  int* const expanded_out = made_here(args.seqlens_expanded + writes);  // the line after it
  const Length seq = seq_words.value();
  Length extend = extend_words.value();
  if constexpr (kUniform) extend = {idx < bs ? args.uniform_q : 0, 0};
  // Cut to the bits that are usual, so that no arithmetic overflows before the others are noticed.
  int kv = idx < bs ? (seq.low & ((1 << kDirectLengthBits) - 1)) + args.kv_add : 0;
  int q = extend.low & ((1 << kDirectQueryBits) - 1);
  const int topk = min(args.topk, kDirectMaxTopk);
  const u32 clipped = static_cast<u32>(clipped_sum(kv - q + 1, q, topk));
  // With that many bits, the sums of a warp stay below 2^31.
  u32 unusual = seq.high | (static_cast<u32>(seq.low) | static_cast<u32>(kv) | clipped) >> kDirectLengthBits |
                extend.high | static_cast<u32>(extend.low) >> kDirectQueryBits;
  static_assert(kWarpThreads <= 1ll << (31 - kDirectLengthBits), "sums of a warp are below 2^31");
  bool is_unusual = unusual != 0;

  u32 kv_before = 0, q_before = 0, clipped_before = 0;  // of what this thread writes
  u32 total = args.total_len;
  if (has_warps) {
    if constexpr (!kUniform) total = static_cast<u32>(q);  // of the one request, or of none
    if (bs > 1) {
      // In one step rather than in those of a scan.
      const bool is_before = lane < warp;
      kv_before = warp_sum_small(is_before ? static_cast<u32>(kv) : 0);
      clipped_before = warp_sum_small(is_before ? clipped : 0);
      if constexpr (!kUniform) {
        q_before = warp_sum_small(is_before ? static_cast<u32>(q) : 0);
        total = warp_sum_small(exists ? static_cast<u32>(q) : 0);
        q = __shfl_sync(kFullWarp, q, warp);
      }
      kv = __shfl_sync(kFullWarp, kv, warp);
    }
  } else {
    u32 kv_upto = static_cast<u32>(kv), q_upto = static_cast<u32>(q), clipped_upto = clipped;
    const int scanned = spreads ? bs : kWarpThreads;  // lanes
#pragma unroll
    for (int distance = 1; distance < kWarpThreads; distance *= 2) {
      if (distance >= scanned) break;
      const u32 kv_below = __shfl_up_sync(kFullWarp, kv_upto, distance);
      u32 q_below = 0;
      if constexpr (!kUniform) q_below = __shfl_up_sync(kFullWarp, q_upto, distance);
      const u32 clipped_below = __shfl_up_sync(kFullWarp, clipped_upto, distance);
      if (lane >= distance) {
        kv_upto += kv_below;
        q_upto += q_below;
        clipped_upto += clipped_below;
      }
    }
    if constexpr (!kUniform) total = __shfl_sync(kFullWarp, q_upto, scanned - 1);
    kv_before = kv_upto - static_cast<u32>(kv);
    q_before = q_upto - static_cast<u32>(q);
    clipped_before = clipped_upto - clipped;
    if (!spreads) {
      is_unusual = __any_sync(kFullWarp, is_unusual);
      if (lane == kWarpThreads - 1) {
        shared.kv[warp] = kv_upto;
        shared.q[warp] = q_upto;
        shared.clipped[warp] = clipped_upto;
        shared.unusual[warp] = is_unusual ? 1 : 0;
      }
      __syncthreads();
      u32 kv_sum = 0, clipped_sum = 0, marks = 0;
      total = 0;
#pragma unroll
      for (int w = 0; w < kBlockWarps; ++w) {
        if (w == warp) {
          kv_before += kv_sum;
          q_before += total;
          clipped_before += clipped_sum;
        }
        kv_sum += shared.kv[w];
        total += shared.q[w];
        clipped_sum += shared.clipped[w];
        marks |= (kv_sum | clipped_sum) >> 31 | shared.unusual[w];  // two good sums stay below 2^32
      }
      is_unusual = marks != 0;
    }
  }
  // The sum up to the first of the rows, made while the other sums are.
  const int first = kv - q + 1;
  u32 row_sum = made_here(static_cast<u32>(clipped_sum(first, first_row + 1, topk)));
  if constexpr (!kUniform) {
    is_unusual = is_unusual || total - least_total > total_len - least_total;
  }
  if (unlikely(__any_sync(kFullWarp, is_unusual))) {  // the same in all threads
    row_block<false>(args, 0, 0);
    return;
  }

  if (thread == 0) {
    args.cu_seqlens_k[0] = 0;
    args.dsa_cu_seqlens_k[0] = 0;
  }
  if (writes >= bs) return;
  if (first_row == 0) {
    *cache_at = kv;
    args.cu_seqlens_k[writes + 1] = static_cast<int>(kv_before) + kv;
  }
  if constexpr (kUniform) q_before = static_cast<u32>(writes * q);
  int j = first_row;
#pragma unroll 1
  while (j < q) {
    const u32 row = q_before + static_cast<u32>(j);
    const int expanded = max(first + j, 0);
    args.dsa_cache_seqlens[row] = min(expanded, args.topk);
    args.dsa_cu_seqlens_k[row + 1] = static_cast<int>(clipped_before + row_sum);
    if (args.seqlens_expanded != nullptr) expanded_out[static_cast<int>(row) - writes] = expanded;
    if (kUniform && args.paged_mqa_ctx_lens_2d != nullptr) {
      args.paged_mqa_ctx_lens_2d[writes * args.mqa_stride + j] = kv;
    }
    j += row_step;
    if (j < q) row_sum = static_cast<u32>(clipped_sum(first, j + 1, topk));
  }
}

// ---- Blocks of tables ---------------------------------------------------------------------------

// Sum over all threads of the block of the sums of their warps. `warp_sums` [kBlockWarps] is shared
// memory, free on entry.
__device__ __forceinline__ i64 sum_of_warps(i64 warp_total, i64* warp_sums) {
  if (threadIdx.x % kWarpThreads == 0) warp_sums[threadIdx.x / kWarpThreads] = warp_total;
  __syncthreads();
  i64 sum = 0;
#pragma unroll
  for (int w = 0; w < kBlockWarps; ++w) sum += warp_sums[w];
  return sum;
}

__device__ __forceinline__ i64 block_sum(i64 v, i64* warp_sums) {
  return sum_of_warps(warp_combined(v, [](i64 a, i64 b) { return a + b; }), warp_sums);
}

// What a length counts for, tokens of the flattened table or query tokens; the blocks of 1-D arrays
// report it where it is bad.
__device__ __forceinline__ i64 tokens_of(const Length& length) {
  int ignored = 0;
  return max(cut(length.value(), &ignored), 0);
}

// This thread's share of the sum over the requests before `request` of their query tokens or
// flattened tokens.
__device__ __forceinline__ i64 share_before(const FusedArgs& args, int request, bool of_tokens) {
  i64 sum = 0;
  int idx_begin = 0;
  if (args.tile_sums != nullptr) {
    const int tile = request / kRequestsPerTile;
    idx_begin = tile * kRequestsPerTile;
    const i64* const tiles =
        args.tile_sums + (of_tokens ? kTileTokens : kTileQ) * static_cast<i64>(args.num_tiles);
    for (int other = threadIdx.x; other < tile; other += kBlockThreads) sum += tiles[other];
  }
  const Lengths lengths = of_tokens ? fused_seq_lens(args) : fused_extend_lens(args);
#pragma unroll 1
  for (int idx = idx_begin + static_cast<int>(threadIdx.x); idx < request; idx += kUnroll * kBlockThreads) {
    Length loaded[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      LengthWords words(lengths.at(idx + k * kBlockThreads), 0, lengths.is_int64);
      words.load(idx + k * kBlockThreads < request);
      loaded[k] = words.value();
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) sum += tokens_of(loaded[k]);
  }
  return sum;
}

// One row of tokens, and the rows that it is written to: `num_rows` of them, `stride` apart.
struct TableRow {
  const int* tokens;
  int* out;
  i64 stride;
  int num_rows;
};

// Which items (vectors or tokens) of a row a thread of a block takes: `first + k * kBlockThreads`,
// k < per_thread, and again `step` further on.
struct Share {
  u32 first;
  u32 step;
  u32 per_thread;  // <= kUnroll
};

// The first `vectors` vectors of a row; the tokens and all rows of `out` are 16-byte aligned.
__device__ __forceinline__ void copy_vectors(const TableRow& row, u32 vectors, const Share& share) {
#pragma unroll 1
  for (u32 first = share.first; first < vectors; first += share.step) {
    const int4* const from = reinterpret_cast<const int4*>(row.tokens) + first;
    const u32 left = min((vectors - first + kBlockThreads - 1) / kBlockThreads, share.per_thread);
    int4 values[kUnroll];
#pragma unroll
    for (u32 k = 0; k < kUnroll; ++k) {
      if (k < left) values[k] = from[k * kBlockThreads];
    }
    int* out = row.out + static_cast<i64>(first) * kVectorColumns;
#pragma unroll 1
    for (int r = 0; r < row.num_rows; ++r) {
#pragma unroll
      for (u32 k = 0; k < kUnroll; ++k) {
        if (k < left) reinterpret_cast<int4*>(out)[k * kBlockThreads] = values[k];
      }
      out += row.stride;
    }
  }
}

// Items [begin, end) of a row, the tokens at the columns item << shift: only they are read.
__device__ __forceinline__ void copy_tokens(const TableRow& row, u32 begin, u32 end, const Share& share,
                                            int shift) {
#pragma unroll 1
  for (u32 first = begin + share.first; first < end; first += share.step) {
    const u32 left = min((end - first + kBlockThreads - 1) / kBlockThreads, share.per_thread);
    int values[kUnroll];
#pragma unroll
    for (u32 k = 0; k < kUnroll; ++k) {
      if (k < left) values[k] = __ldg(row.tokens + ((first + k * kBlockThreads) << shift));
    }
    int* out = row.out + first;
#pragma unroll 1
    for (int r = 0; r < row.num_rows; ++r) {
#pragma unroll
      for (u32 k = 0; k < kUnroll; ++k) {
        if (k < left) out[k * kBlockThreads] = values[k] >> shift;
      }
      out += row.stride;
    }
  }
}

// The first `items` items of a row; by vectors where they can be.
__device__ __forceinline__ void copy_row(const TableRow& row, u32 items, const Share& share, int shift,
                                         bool has_vectors) {
  u32 begin = 0;
  if (has_vectors) {
    begin = items / kVectorColumns * kVectorColumns;
    copy_vectors(row, items / kVectorColumns, share);
  }
  copy_tokens(row, begin, items, share, shift);  // behind vectors: three columns at most
}

// Block `block` of the blocks of one request: first those of page_table_1, then those of
// real_page_table, then those of page_table_1_flattened.
__device__ __forceinline__ void table_block(const FusedArgs& args, int request, int block) {
  __shared__ i64 warp_sums[kBlockWarps];
  const i64 seq = fused_seq_lens(args)[request].value();
  const i64 pool = fused_pool_indices(args)[request].value();
  int ignored = 0;  // the 1-D blocks report the lengths
  // One tile of requests is latency bound: its extend lengths are loaded along with what the exits
  // below wait for, one by each thread.
  const bool rows_vary = args.uniform_q < 0 && (args.flags & kOneRowPerRequest) == 0;
  const bool loads_early = rows_vary && args.num_tiles == 1;
  int q = args.uniform_q;  // lengths of query tokens fit 32 bits
  u32 early = 0;
  if (loads_early) {
    const Lengths lengths = fused_extend_lens(args);
    q = static_cast<int>(tokens_of(lengths[request]));
    const int other = static_cast<int>(threadIdx.x);
    if (other < request) early = static_cast<u32>(tokens_of(lengths[other]));
  }
  if (pool < 0 || pool >= args.pool_rows) {
    if (block == 0 && threadIdx.x == 0) atomicMax(args.status, kRequestOutsidePool);
    return;
  }
  TableRow row = {args.req_to_token + pool * args.token_stride, args.page_table_1, args.page_1_stride, 1};
  int width = args.width;
  int blocks = args.page_1_blocks;
  int shift = 0;
  bool flattens = false;
  if (block >= blocks) {
    block -= blocks;
    blocks = args.real_page_blocks;
    row.out = args.real_page_table;
    row.stride = args.real_page_stride;
    shift = args.page_shift;
    if (block >= blocks) {
      block -= blocks;
      blocks = args.flattened_blocks;
      row.out = args.page_table_1_flattened;
      width = args.token_width;
      shift = 0;
      flattens = true;
    }
  }

  const i64 kv = max(static_cast<i64>(cut(seq, &ignored)) + args.kv_add, static_cast<i64>(0));
  u32 items = (static_cast<u32>(min(kv, static_cast<i64>(width))) + (1u << shift) - 1) >> shift;
  const u32 per_thread = static_cast<u32>(args.table_items);
  const u32 block_first = static_cast<u32>(block) * per_thread * kBlockThreads;
  if (block_first >= items) return;  // behind the live prefix: before any sum

  if (rows_vary && !loads_early) q = static_cast<int>(tokens_of(fused_extend_lens(args)[request]));
  i64 sum = 0;
  if (loads_early && !flattens) {
    sum = sum_of_warps(static_cast<i64>(warp_sum(early)), warp_sums);
  } else if (flattens || rows_vary) {
    sum = block_sum(share_before(args, request, flattens), warp_sums);
  }
  if (flattens) {
    const i64 room = args.flattened_size - sum;
    if (room < kv) {
      if (threadIdx.x == 0) atomicMax(args.status, kOverCapacity);
      if (room <= 0) return;
      items = min(items, static_cast<u32>(min(room, kInt32Max)));
    }
    row.out += sum;
  } else if ((args.flags & kOneRowPerRequest) != 0) {
    row.out += request * row.stride;
  } else {
    const i64 row_begin = rows_vary ? sum : static_cast<i64>(request) * q;
    if (row_begin >= args.total_len || q <= 0) return;
    row.num_rows = static_cast<int>(min(static_cast<i64>(q), args.total_len - row_begin));
    row.out += row_begin * row.stride;
  }
  const u64 misaligned = (reinterpret_cast<u64>(row.tokens) | reinterpret_cast<u64>(row.out) |
                          (row.num_rows > 1 ? static_cast<u64>(row.stride) * sizeof(int) : 0)) &
                         (sizeof(int4) - 1);
  const Share share = {block_first + threadIdx.x, static_cast<u32>(blocks) * per_thread * kBlockThreads,
                       per_thread};
  copy_row(row, items, share, shift, shift == 0 && misaligned == 0);
}

// ---- The blocks of tables of fused_direct -------------------------------------------------------

// Query tokens of a length, of which more than all rows of a small batch need not be told apart.
__device__ __forceinline__ u32 direct_query_tokens(const Length& extend) {
  constexpr int kManyRows = 1 << 12;
  static_assert(kRequestsPerTile * kManyRows < 1 << 30, "their sums fit 32 bits");
  if (extend.high != 0) return extend.high < 0 ? 0 : kManyRows;
  return static_cast<u32>(extend.low) < kManyRows ? static_cast<u32>(extend.low) : kManyRows;
}

constexpr u32 kIntBytes = sizeof(int);

// `count` rows of an output, `pitch` bytes apart.
struct DirectRows {
  char* out;
  u32 pitch;
  int count;

  template <class T>
  __device__ __forceinline__ void store(const T& value) const {
    char* to = out;
#pragma unroll 1
    for (int r = 0; r < count; ++r) {
      *reinterpret_cast<T*>(to) = value;
      to += pitch;
    }
  }

  // The first `left` tokens of a vector, up to three.
  __device__ __forceinline__ void store_some(const int4& value, int left) const {
    char* to = out;
#pragma unroll 1
    for (int r = 0; r < count; ++r) {
      int* const tokens = reinterpret_cast<int*>(to);
      tokens[0] = value.x;
      if (left > 1) tokens[1] = value.y;
      if (left > 2) tokens[2] = value.z;
      to += pitch;
    }
  }
};

// What a thread takes of a row, at a column below the width: a vector or a token. A vector is read as
// a whole wherever the table is wide enough for it, however little of it is live.
__device__ __forceinline__ int4 direct_load(const int* from, bool has_vectors, int columns) {
  if (has_vectors && columns >= kVectorColumns) return *reinterpret_cast<const int4*>(from);
  int4 value = {__ldg(from), 0, 0, 0};
  if (has_vectors && columns > 1) value.y = __ldg(from + 1);
  if (has_vectors && columns > 2) value.z = __ldg(from + 2);
  return value;
}

// `value`, of which the compiler does not know that all threads have the same: on the path of uniform
// numbers instructions take longer, and what is loaded through it is waited for to be moved there.
__device__ __forceinline__ u32 of_this_thread(u32 value) {
#ifdef __CUDA_ARCH__
  u32 zero;
  asm("shr.u32 %0, %1, 8;" : "=r"(zero) : "r"(threadIdx.x));
  static_assert(kBlockThreads == 1 << 8, "threads of a block");
  value += zero;
#endif
  return value;
}

// As table_block; 32-bit numbers, and no more instructions before a load or store than it needs: what
// does not depend on a length is made while the lengths are under way, tokens are loaded before it is
// known which rows they go to, and nothing is branched over on the way there.
template <bool kUniform>
__device__ __forceinline__ void direct_table_block(const FusedArgs& args) {
  const int thread = threadIdx.x;
  const int table = static_cast<int>(of_this_thread(blockIdx.x)) - 1;
  const int blocks_of_request = args.page_1_blocks + args.real_page_blocks;
  const int request = args.blocks_inverse == 0
                          ? table
                          : static_cast<int>(__umulhi(static_cast<u32>(table), args.blocks_inverse));
  DirectLength seq_words = direct_seq_len(args, request), pool_words = direct_pool_index(args, request);
  const bool in_warp = args.bs <= kWarpThreads;  // every warp adds them up, without a barrier
  const int other = static_cast<int>(in_warp ? threadIdx.x % kWarpThreads : threadIdx.x);
  DirectLength extend_words = direct_extend_len(args, other);  // of this request or one before
  if (!kUniform && other <= request) extend_words.load();
  seq_words.load();
  pool_words.load();

  int block = table - request * blocks_of_request;
  const bool is_page_1 = block < args.page_1_blocks;
  if (!is_page_1) block -= args.page_1_blocks;
  const int shift = is_page_1 ? 0 : args.page_shift;
  const u32 per_thread = static_cast<u32>(args.table_items);
  const u32 blocks = static_cast<u32>(is_page_1 ? args.page_1_blocks : args.real_page_blocks);
  const u32 step = blocks * per_thread * kBlockThreads;
  // With one item for each thread, warp w of block b takes chunk w * blocks + b of kWarpThreads items: few
  // tokens, of many rows, are stored by many multiprocessors, each of which writes 64 bytes per cycle.
  const bool by_warps = per_thread == 1;
  const u32 block_first = static_cast<u32>(block) * (by_warps ? kWarpThreads : per_thread * kBlockThreads);
  const u32 item_of_block =
      by_warps ? (threadIdx.x / kWarpThreads) * blocks * kWarpThreads + threadIdx.x % kWarpThreads
               : threadIdx.x;
  const bool has_vectors = shift == 0 && (args.flags & kHasVectors) != 0;
  // Items are vectors or tokens; below 2^30 + 2^20 columns.
  const int columns_log2 = has_vectors ? 2 : shift;
  static_assert(kVectorColumns == 1 << 2, "columns of a vector");
  const int width = args.width;
  const u32 item = block_first + item_of_block;
  int column = static_cast<int>(item << columns_log2);
  const int columns =
      static_cast<int>(made_here(static_cast<u32>(width - column)));  // of the table, from there on
  const int* from = args.req_to_token + column;
  const u32 token_pitch = made_here(static_cast<u32>(args.token_stride) * kIntBytes);
  // Both are loaded and one is taken: not loaded from an address that has to be computed.
  int* const page_table_1 = made_here(args.page_table_1);
  int* const real_page_table = made_here(args.real_page_table);
  int* const out = is_page_1 ? page_table_1 : real_page_table;
  const i64 stride = is_page_1 ? args.page_1_stride : args.real_page_stride;
  DirectRows rows = {reinterpret_cast<char*>(out + (has_vectors ? column : static_cast<int>(item))),
                     made_here(static_cast<u32>(stride) * kIntBytes), kUniform ? args.uniform_q : 0};

  const Length seq = seq_words.value(), pool = pool_words.value();
  const bool in_pool = pool.high == 0 && static_cast<u32>(pool.low) < static_cast<u32>(args.pool_rows);
  // A column is live below min(seq + kv_add, width).
  const bool is_live = columns > 0 && seq.value() > column - args.kv_add;
  from = reinterpret_cast<const int*>(reinterpret_cast<const char*>(from) +
                                      static_cast<u64>(static_cast<u32>(pool.low)) * token_pitch);
  int4 value = {0, 0, 0, 0};
  if (in_pool && is_live && per_thread == 1) value = direct_load(from, has_vectors, columns);

  if (unlikely(!in_pool)) {
    if (block_first == 0 && thread == 0) atomicMax(args.status, kRequestOutsidePool);
    return;
  }
  constexpr int kFar = 1 << 30;
  const int seq_cut = seq.outside_int32() == 0 ? seq.low : seq.high < 0 ? -kFar : kFar;
  const int kv = min(max(min(seq_cut, width) + args.kv_add, 0), width);
  if (static_cast<int>(block_first << columns_log2) >= kv) return;  // behind the live prefix

  int row_begin = request * rows.count;
  if constexpr (!kUniform) {
    const u32 query_tokens = direct_query_tokens(extend_words.value());
    u32 sum = warp_sum_small(other < request ? query_tokens : 0);
    if (in_warp) {
      rows.count = __shfl_sync(kFullWarp, static_cast<int>(query_tokens), request);
    } else {
      __shared__ u32 warp_sums[kBlockWarps + 1];
      if (thread == request) warp_sums[kBlockWarps] = query_tokens;
      if (thread % kWarpThreads == 0) warp_sums[thread / kWarpThreads] = sum;
      __syncthreads();
      sum = 0;
#pragma unroll
      for (int w = 0; w < kBlockWarps; ++w) sum += warp_sums[w];
      rows.count = static_cast<int>(warp_sums[kBlockWarps]);
    }
    row_begin = static_cast<int>(sum);
    rows.count = min(rows.count, args.total_len - row_begin);
    if (rows.count <= 0) return;
  }
  if (unlikely(per_thread > 1)) {
    const TableRow row = {args.req_to_token + pool.low * args.token_stride, out + row_begin * stride, stride,
                          rows.count};
    const u32 items = (static_cast<u32>(kv) + (1u << shift) - 1) >> shift;
    copy_row(row, items, {item, step, per_thread}, shift, has_vectors);
    return;
  }
  rows.out += static_cast<u64>(static_cast<u32>(row_begin)) * rows.pitch;
  while (column < kv) {
    const int left = kv - column;
    if (!has_vectors) {
      rows.store(value.x >> shift);
    } else if (left >= kVectorColumns) {
      rows.store(value);
    } else {
      rows.store_some(value, left);
    }
    column += static_cast<int>(step << columns_log2);
    if (unlikely(column < kv)) {
      from += step << columns_log2;
      rows.out += (has_vectors ? step << columns_log2 : step) * sizeof(int);
      value = direct_load(from, has_vectors, width - column);
    }
  }
}

}  // namespace nsa

// Grid: num_tiles * row_parts blocks of 1-D arrays, then the blocks of tables, request by request, which
// has to stay below 2^31; in the two-launch form after fused_tiles on the same stream.
extern "C" __global__ void __launch_bounds__(nsa::kBlockThreads, nsa::kFusedBlocksPerSm)
    fused(const nsa::FusedArgs args) {
  const int block = static_cast<int>(blockIdx.x);
  const int row_blocks = args.num_tiles * args.row_parts;
  if (block < row_blocks) {
    const int tile = args.num_tiles == 1 ? 0 : block / args.row_parts;  // most batches: no division
    nsa::row_block<true>(args, tile, block - tile * args.row_parts);
  } else {
    const int table = block - row_blocks;
    const int blocks = args.page_1_blocks + args.real_page_blocks + args.flattened_blocks;
    nsa::table_block(args, table / blocks, table % blocks);
  }
}

// Grids: a block of 1-D arrays, then the blocks of tables, request by request.
#define NSA_DIRECT_KERNEL(name, kUniform)                                                  \
  extern "C" __global__ void __launch_bounds__(nsa::kBlockThreads, nsa::kFusedBlocksPerSm) \
      name(const nsa::FusedArgs args) {                                                    \
    if (blockIdx.x == 0) {                                                                 \
      nsa::direct_row_block<kUniform>(args);                                               \
    } else {                                                                               \
      nsa::direct_table_block<kUniform>(args);                                             \
    }                                                                                      \
  }
NSA_DIRECT_KERNEL(fused_direct, false)
NSA_DIRECT_KERNEL(fused_direct_uniform, true)
#undef NSA_DIRECT_KERNEL

// Grid: num_tiles blocks.
extern "C" __global__ void __launch_bounds__(nsa::kBlockThreads) fused_tiles(const nsa::FusedArgs args) {
  __shared__ nsa::i64 warp_sums[nsa::kBlockWarps];
  const int tile = static_cast<int>(blockIdx.x);
  const int idx = tile * nsa::kRequestsPerTile + static_cast<int>(threadIdx.x);
  int ignored = 0;  // `fused` reports it
  nsa::Sums sums = {0, 0, 0};
  nsa::i64 tokens = 0;
  if (idx < args.bs) {
    sums = nsa::request_sums(args, idx, &ignored);
    tokens = nsa::tokens_of(nsa::fused_seq_lens(args)[idx]);
  }
#pragma unroll 1
  for (int which = 0; which < nsa::kTileSums; ++which) {
    const nsa::i64 value = which == nsa::kTileKv        ? sums.kv
                           : which == nsa::kTileQ       ? sums.q
                           : which == nsa::kTileClipped ? sums.clipped
                                                        : tokens;
    const nsa::i64 total = nsa::block_sum(value, warp_sums);
    if (threadIdx.x == 0) args.tile_sums[static_cast<nsa::i64>(which) * args.num_tiles + tile] = total;
    __syncthreads();
  }
}
