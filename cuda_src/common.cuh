// Device code that every kernel of this package shares: typed loads of length arrays, scans over
// requests that notice what leaves int32, and searches.
//
// Plain C++17 without headers, so that the front end of NVRTC takes tens of milliseconds and the tests
// compile the same text with g++ (tests/cuda_on_cpu.h).
#pragma once

// Which kernels of a file are compiled: those of one program (cupy_nsa_meta/_module.py), or all.
#ifdef CUPY_NSA_META_PROGRAM
#define NSA_IN_PROGRAM(number) (CUPY_NSA_META_PROGRAM == (number))
#else
#define NSA_IN_PROGRAM(number) 1
#endif

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

// A launch of few rows is as long as its longest chain of instructions, and a jump over code that is
// not run costs a fetch of instructions: such code is laid out behind the rest.
__device__ __forceinline__ bool unlikely(bool condition) { return __builtin_expect(condition, 0) != 0; }

// The same value, made where this stands: while the first loads are under way, rather than behind
// them where it is used. So the line of constants that it comes from is there by then.
template <class T>
__device__ __forceinline__ T* made_here(T* value) {
#ifdef __CUDA_ARCH__
  u64 global = __cvta_generic_to_global(value);  // or its accesses would be generic ones
  asm volatile("" : "+l"(global));
  value = static_cast<T*>(__cvta_global_to_generic(global));
#endif
  return value;
}

__device__ __forceinline__ u32 made_here(u32 value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(value));
#endif
  return value;
}

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
// A length as two 32-bit words, so that both types share one load path without a branch around it.
struct Length {
  int low;
  int high;  // of an int32: its sign

  __device__ __forceinline__ i64 value() const {
    return static_cast<i64>(static_cast<u64>(static_cast<u32>(high)) << 32 | static_cast<u32>(low));
  }

  // Not 0: the length is outside int32.
  __device__ __forceinline__ u32 outside_int32() const { return high ^ low >> 31; }
};

__device__ __forceinline__ bool fits_int32(i64 v) { return v >= kInt32Min && v <= kInt32Max; }

// The words of one length, as they are in memory: loaded first, looked at later.
struct LengthWords {
  const char* at;
  bool is_int64;
  int low = 0;
  int second = 0;  // of an int64: the high word

  __device__ __forceinline__ LengthWords(const void* lengths, u64 offset, bool is_int64)
      : at(static_cast<const char*>(lengths) + offset), is_int64(is_int64) {}

  // The condition is in each load: a branch around them would cost more.
  __device__ __forceinline__ void load(bool exists) {
    const int* const words = reinterpret_cast<const int*>(at);
    if (exists) low = __ldg(words);
    if (exists && is_int64) second = __ldg(words + 1);
  }

  __device__ __forceinline__ Length value() const { return {low, is_int64 ? second : low >> 31}; }
};

struct Lengths {
  const int* words;  // little-endian: an int64 is its low word, then its high word
  i64 stride;        // in elements
  bool is_int64;

  __device__ __forceinline__ const int* at(i64 idx) const {
    const i64 element = idx * stride;  // 64-bit: idx * stride passes 2^31
    return words + (is_int64 ? 2 * element : element);
  }

  // Both words are loaded before either is looked at: a use between them would wait for the first.
  __device__ __forceinline__ Length operator[](i64 idx) const {
    const int* const word = at(idx);
    const int low = __ldg(word);
    const int second = __ldg(word + (is_int64 ? 1 : 0));
    return {low, is_int64 ? second : low >> 31};
  }

  // The same by one product: idx < 2^29.
  __device__ __forceinline__ LengthWords words_of(u32 idx) const {
    return {words, static_cast<u64>(idx * 4 << (is_int64 ? 1 : 0)) * static_cast<u64>(stride), is_int64};
  }

  // Four lengths side by side fit in one or two 16-byte loads.
  __device__ __forceinline__ bool has_quads() const {
    return stride == 1 && (reinterpret_cast<u64>(words) & 15) == 0;
  }
};

// The words of four consecutive lengths, as they are in memory: loaded first, looked at later.
struct LengthQuad {
  int4 first = {};
  int4 second = {};  // of int64 lengths

  // `idx` is a multiple of 4, and the lengths have quads.
  __device__ __forceinline__ void load(const Lengths& lengths, int idx) {
    const int4* const at =
        reinterpret_cast<const int4*>(lengths.words + (lengths.is_int64 ? 2 * static_cast<i64>(idx) : idx));
    first = __ldg(at);
    if (lengths.is_int64) second = __ldg(at + 1);
  }

  __device__ __forceinline__ int4 lows(bool is_int64) const {
    return is_int64 ? make_int4(first.x, first.z, second.x, second.z) : first;
  }

  // The high words of int64 lengths ORed together.
  __device__ __forceinline__ u32 highs(bool is_int64) const {
    return is_int64 ? first.y | first.w | second.y | second.w : 0;
  }

  // Not 0: an int64 length is outside int32. 0 where none was loaded.
  __device__ __forceinline__ u32 outside_int32() const {
    return Length{first.x, first.y}.outside_int32() | Length{first.z, first.w}.outside_int32() |
           Length{second.x, second.y}.outside_int32() | Length{second.z, second.w}.outside_int32();
  }

  __device__ __forceinline__ void decode(bool is_int64, Length (&out)[4]) const {
    out[0] = {first.x, is_int64 ? first.y : first.x >> 31};
    out[1] = is_int64 ? Length{first.z, first.w} : Length{first.y, first.y >> 31};
    out[2] = is_int64 ? Length{second.x, second.y} : Length{first.z, first.z >> 31};
    out[3] = is_int64 ? Length{second.z, second.w} : Length{first.w, first.w >> 31};
  }
};

// Lengths [idx, idx + 4), 0 at and past `end`.
__device__ __forceinline__ void load_four(const Lengths& lengths, int idx, int end, Length (&out)[4]) {
  if (idx + 4 <= end && lengths.has_quads()) {
    LengthQuad quad;
    quad.load(lengths, idx);
    quad.decode(lengths.is_int64, out);
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    out[k] = {0, 0};
    if (idx + k < end) out[k] = lengths[idx + k];
  }
}

// ---- Scans over requests ------------------------------------------------------------------------
// Sums are 32-bit and right as long as nothing is marked. Values are below 2^31, so one addition of
// two good sums stays below 2^32 and shows in the sign bit when it leaves int32. Whoever adds ORs
// the sums together and marks that bit. A marked batch has no rows, so its sums may be anything.
struct Marks {
  u32 bad = 0;    // not 0: some length or sum of this thread is not good
  int signs = 0;  // below 0: some extend length was negative

  // An extend length must be in [0, 2^31), a KV length in int32.
  __device__ __forceinline__ void check(Length extend, Length seq) {
    bad |= extend.high | extend.low >> 31 | seq.outside_int32();
    signs |= extend.high;
  }
  __device__ __forceinline__ void check_sums(u32 all_sums) { bad |= all_sums >> 31; }
};

constexpr u32 kMarked = 0x80000000u;  // of a total: there are no rows
constexpr u32 kMarkedNegative = kMarked | 1;
constexpr u32 kMarkedOutside = kMarked;

// The total of a warp, or its mark; the same in every lane.
__device__ __forceinline__ u32 warp_word(u32 total, const Marks& marks) {
  if (unlikely(__any_sync(kFullWarp, marks.bad != 0))) {
    return __any_sync(kFullWarp, marks.signs < 0) ? kMarkedNegative : kMarkedOutside;
  }
  return total;
}

// Inclusive sums over the lanes of a warp.
__device__ __forceinline__ u32 warp_inclusive_scan(u32 v, Marks& marks) {
  const int lane = threadIdx.x % kWarpThreads;
  u32 all_sums = v;
#pragma unroll
  for (int distance = 1; distance < kWarpThreads; distance *= 2) {
    const u32 below = __shfl_up_sync(kFullWarp, v, distance);
    if (lane >= distance) v += below;
    all_sums |= v;
  }
  marks.check_sums(all_sums);
  return v;
}

// What `combine` makes of the lanes of a warp, in every lane.
template <class T, class Combine>
__device__ __forceinline__ T warp_combined(T v, const Combine& combine) {
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    v = combine(v, __shfl_xor_sync(kFullWarp, v, distance));
  }
  return v;
}

// Sum over the lanes of a warp, in every lane, that fits 32 bits.
__device__ __forceinline__ u32 warp_sum_small(u32 v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kFullWarp, v);  // one instruction
#else
  return warp_combined(v, [](u32 a, u32 b) { return a + b; });
#endif
}

// The OR over the lanes of a warp, in every lane.
__device__ __forceinline__ u32 warp_or(u32 v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_or_sync(kFullWarp, v);  // one instruction
#else
  return warp_combined(v, [](u32 a, u32 b) { return a | b; });
#endif
}

// Sum over the lanes of a warp, in every lane; exact for any values.
__device__ __forceinline__ u64 warp_sum(u32 v) {
  // Two halves, so that no sum leaves 32 bits.
  return (static_cast<u64>(warp_sum_small(v >> 16)) << 16) + warp_sum_small(v & 0xffffu);
}

// The total of one request per lane, or its mark; the same in every lane. It needs no scan: lengths of
// few bits have no sum outside int32.
__device__ __forceinline__ u32 warp_total(Length extend, Length seq) {
  constexpr int kFewBits = 26;
  static_assert(kWarpThreads <= 1ll << (31 - kFewBits), "sums of a warp are below 2^31");
  const u32 low = static_cast<u32>(extend.low);
  const u32 sum = warp_sum_small(low);
  Marks marks;
  marks.check(extend, seq);
  if (unlikely(__any_sync(kFullWarp, (marks.bad | low >> kFewBits) != 0))) {
    return warp_word(warp_sum(low) > kInt32Max ? kMarkedOutside : sum, marks);
  }
  return sum;
}

template <int kWarps = kBlockWarps>
struct alignas(16) WarpWords {
  u32 words[kWarps];
};

// The sums of the warps of a block, in the registers of every thread.
struct BlockSums {
  u32 warp_ends[kBlockWarps];  // inclusive sums over warps; indexed by constants only
  u32 total;                   // over the block, or a mark
};

// `warp_total` is a total or a mark, the same in every lane. `shared` is free on entry. One barrier
// inside, which also orders what the threads have written to shared memory before; the caller puts
// one before the next use of `shared`.
__device__ __forceinline__ BlockSums block_sums(u32 warp_total, WarpWords<>& shared) {
  if (threadIdx.x % kWarpThreads == 0) shared.words[threadIdx.x / kWarpThreads] = warp_total;
  __syncthreads();
  BlockSums sums;
  u32 running = 0, all_sums = 0;
#pragma unroll
  for (int w = 0; w < kBlockWarps; ++w) {
    const u32 of_warp = shared.words[w];
    running += of_warp;
    all_sums |= running | of_warp;
    sums.warp_ends[w] = running;
  }
  sums.total = running;
  if (unlikely((all_sums & kMarked) != 0)) {  // was a length negative?
    bool negative = false;
    for (int w = 0; w < kBlockWarps; ++w) negative |= shared.words[w] == kMarkedNegative;
    sums.total = negative ? kMarkedNegative : kMarkedOutside;
  }
  return sums;
}

// The sum of the warps of a block before this thread's, and of all of them.
struct BeforeWarp {
  u32 sum;
  u32 total;  // or a mark
};

// As block_sums, for blocks of up to 32 warps: the sums are held by the lanes of every warp.
template <int kWarps>
__device__ __forceinline__ BeforeWarp sum_before_warp(u32 warp_total, WarpWords<kWarps>& shared) {
  static_assert(kWarps <= kWarpThreads, "a lane holds a warp's total");
  const int lane = threadIdx.x % kWarpThreads;
  const int warp = threadIdx.x / kWarpThreads;
  if (lane == 0) shared.words[warp] = warp_total;
  __syncthreads();
  const u32 word = lane < kWarps ? shared.words[lane] : 0;
  Marks marks;
  marks.check_sums(word);
  if (word == kMarkedNegative) marks.signs = -1;
  const u32 end = warp_inclusive_scan(word, marks);
  const u32 total = __shfl_sync(kFullWarp, end, kWarpThreads - 1);
  return {__shfl_sync(kFullWarp, end - word, warp), warp_word(total, marks)};
}

// ---- Search -------------------------------------------------------------------------------------
// First index in [begin, end) whose value is > key, or end. `values` does not decrease. A begin
// other than 0 is near the answer: the search gallops from there.
__device__ __forceinline__ int upper_bound(const u32* values, int begin, int end, u32 key) {
  if (begin != 0) {
    int step = 1;
    while (begin + step <= end && values[begin + step - 1] <= key) {
      begin += step;
      step *= 2;
    }
    end = min(end, begin + step - 1);
  }
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
