// Device code that every kernel of this package shares: typed loads of length arrays, saturating
// sums that carry the status of a batch, and the block-wide scan over them.
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

// ---- Saturating sums ----------------------------------------------------------------------------
// A Sum is a count in [0, 2^31 - 1] or one of two marks above that range. Marks survive addition,
// the larger one wins, so the total of a batch alone tells its status, in whatever order it was
// added up: sum_add is associative and commutative.
typedef u32 Sum;
constexpr Sum kSumOutside = 0x80000000u;   // some value or partial sum left int32
constexpr Sum kSumNegative = 0xffffffffu;  // some extend length was negative

__device__ __forceinline__ bool sum_is_marked(Sum a) { return a >= kSumOutside; }

__device__ __forceinline__ Sum sum_add(Sum a, Sum b) {
  const bool marked = sum_is_marked(a | b);
  const Sum larger = a > b ? a : b;
  const Sum added = a + b;  // at most 2^32 - 2 when neither is marked
  return marked ? larger : (added < kSumOutside ? added : kSumOutside);
}

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
};

__device__ __forceinline__ bool fits_int32(i64 v) { return v >= kInt32Min && v <= kInt32Max; }

// ---- Block scan ---------------------------------------------------------------------------------
__device__ __forceinline__ Sum warp_inclusive_scan(Sum v) {
  const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
  for (int distance = 1; distance < kWarpThreads; distance *= 2) {
    const Sum below = __shfl_up_sync(kFullWarp, v, distance);
    if (lane >= distance) v = sum_add(below, v);
  }
  return v;
}

// Exclusive prefix of `v` over the threads of the block. `warp_totals` [kBlockWarps] is shared
// memory that is free on entry; *block_total receives the sum over all threads. One barrier inside;
// the caller puts a barrier before the next use of `warp_totals`.
__device__ __forceinline__ Sum block_exclusive_scan(Sum v, Sum* warp_totals, Sum* block_total) {
  const int warp = threadIdx.x / kWarpThreads;
  const int lane = threadIdx.x % kWarpThreads;
  const Sum inclusive = warp_inclusive_scan(v);
  if (lane == kWarpThreads - 1) warp_totals[warp] = inclusive;
  const Sum from_left = __shfl_up_sync(kFullWarp, inclusive, 1);
  __syncthreads();
  Sum before = 0, total = 0;
#pragma unroll
  for (int w = 0; w < kBlockWarps; ++w) {
    if (w == warp) before = total;
    total = sum_add(total, warp_totals[w]);
  }
  *block_total = total;
  return lane == 0 ? before : sum_add(before, from_left);
}

// ---- Search -------------------------------------------------------------------------------------
// First index in [begin, end) whose value is > key, or end. `values` does not decrease.
__device__ __forceinline__ int upper_bound(const Sum* values, int begin, int end, Sum key) {
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

// The same for a handful of values, without a data-dependent branch.
__device__ __forceinline__ int upper_bound_linear(const Sum* values, int begin, int end, Sum key) {
  int found = begin;
  for (int idx = begin; idx < end; ++idx) found += values[idx] <= key ? 1 : 0;
  return found;
}

}  // namespace nsa
