// Device code that every kernel of this package shares: typed loads of length arrays, scans over
// requests that notice what leaves int32, and searches.
//
// Plain C++17 without headers, so that NVRTC compiles it in tens of milliseconds and the tests
// compile the same text with g++ (tests/cuda_on_cpu.h).
#pragma once

namespace nsa {

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int kWarpThreads = 32;
constexpr int kBlockThreads = 256;
constexpr int kBlockWarps = kBlockThreads / kWarpThreads;
constexpr u32 kFullWarp = 0xffffffffu;
constexpr i64 kInt32Max = 0x7fffffff;
constexpr i64 kInt32Min = -kInt32Max - 1;

static_assert(kBlockThreads % kWarpThreads == 0, "a block is made of whole warps");
static_assert(kBlockWarps <= kWarpThreads, "one warp scans the warp totals");

// ---- Status words (the same numbers in cupy_nsa_meta/_status.py) --------------------------------
enum Status {
  kOk = 0,
  kOverCapacity = 1,    // T over the capacity
  kNegativeExtend = 2,  // a negative extend length
  kOutsideInt32 = 3,    // a length, a total or a prefix sum outside int32
  kTotalMismatch = 4,   // T differs from the given total_tokens
};

// ---- Lengths: int32 or int64, any stride --------------------------------------------------------
struct Lengths {
  const int* words;  // little-endian: an int64 is its low word, then its high word
  i64 stride;        // in elements
  bool is_int64;

  // Read as 32-bit words, so that both types share one load path without a branch around it.
  __device__ __forceinline__ i64 operator[](i64 idx) const {
    const i64 at = idx * stride;  // 64-bit: idx * stride passes 2^31
    const int* const word = words + (is_int64 ? 2 * at : at);
    const int low = __ldg(word);
    const int high = is_int64 ? __ldg(word + 1) : low >> 31;
    return static_cast<i64>(static_cast<u64>(static_cast<u32>(high)) << 32 | static_cast<u32>(low));
  }

  // values[k] = the length at first + k * kBlockThreads, 0 at and past `end`; all in flight at once.
  template <int kCount>
  __device__ __forceinline__ void load(i64 (&values)[kCount], int first, int end) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int idx = first + k * kBlockThreads;
      values[k] = idx < end ? (*this)[idx] : 0;
    }
  }
};

__device__ __forceinline__ bool fits_int32(i64 v) { return v >= kInt32Min && v <= kInt32Max; }

// ---- Scans over requests ------------------------------------------------------------------------
// Sums are 32-bit and exact as long as no flag is raised. Values are below 2^31, so one addition of
// two good sums stays below 2^32 and shows in the sign bit when it leaves int32; whoever adds ORs
// its sums together and turns that bit into kFlagOutside. Once a flag is up the sums mean nothing,
// the batch has no rows, and the flags of all threads tell its status.
constexpr u32 kFlagNegative = 1;  // some extend length was negative
constexpr u32 kFlagOutside = 2;   // some length or sum left int32

__device__ __forceinline__ u32 outside_flag(u32 all_sums) { return all_sums >> 31 << 1; }

// What a request adds to the sums; 0 with a flag where it must not count.
__device__ __forceinline__ u32 request_rows(i64 extend, i64 seq, u32* flags) {
  const bool outside = extend > kInt32Max || !fits_int32(seq);
  if (extend < 0) *flags |= kFlagNegative;
  if (outside) *flags |= kFlagOutside;
  return extend < 0 || outside ? 0 : static_cast<u32>(extend);
}

// Inclusive sums over the lanes of a warp.
__device__ __forceinline__ u32 warp_inclusive_scan(u32 v, u32* flags) {
  const int lane = threadIdx.x % kWarpThreads;
  u32 all_sums = v;
#pragma unroll
  for (int distance = 1; distance < kWarpThreads; distance *= 2) {
    const u32 below = __shfl_up_sync(kFullWarp, v, distance);
    if (lane >= distance) v += below;
    all_sums |= v;
  }
  *flags |= outside_flag(all_sums);
  return v;
}

// The flags of a warp, in every lane. Raised flags are rare: one vote in the common case.
__device__ __forceinline__ u32 warp_flags(u32 flags) {
  if (!__any_sync(kFullWarp, flags != 0)) return 0;
  return (__any_sync(kFullWarp, (flags & kFlagNegative) != 0) ? kFlagNegative : 0) |
         (__any_sync(kFullWarp, (flags & kFlagOutside) != 0) ? kFlagOutside : 0);
}

struct alignas(16) WarpSums {
  u32 totals[kBlockWarps];
  u32 flags[kBlockWarps];
};

// A sum over the whole block, the same in every thread.
struct BlockSum {
  u64 total;
  u32 flags;
};

// Exclusive sums over the threads of the block. `sums` is shared memory that is free on entry. One
// barrier inside; the caller puts a barrier before the next use of `sums`.
__device__ __forceinline__ u32 block_exclusive_scan(u32 v, u32 flags, WarpSums& sums, BlockSum* block) {
  const int warp = threadIdx.x / kWarpThreads;
  const int lane = threadIdx.x % kWarpThreads;
  const u32 inclusive = warp_inclusive_scan(v, &flags);
  flags = warp_flags(flags);
  if (lane == kWarpThreads - 1) {
    sums.totals[warp] = inclusive;
    sums.flags[warp] = flags;
  }
  __syncthreads();
  u32 before = 0;
  block->total = 0;
  block->flags = 0;
#pragma unroll
  for (int w = 0; w < kBlockWarps; ++w) {
    if (w < warp) before += sums.totals[w];
    block->total += sums.totals[w];
    block->flags |= sums.flags[w];
  }
  if (block->total > static_cast<u64>(kInt32Max)) block->flags |= kFlagOutside;
  return before + inclusive - v;
}

// ---- Search -------------------------------------------------------------------------------------
// First index in [begin, end) whose value is > key, or end. `values` does not decrease.
__device__ __forceinline__ int upper_bound(const u32* values, int begin, int end, u32 key) {
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (values[middle] <= key) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

}  // namespace nsa
