// Kernels of the two ahead-of-time extensions that bench.py compares with; extension.h says what
// each does.
#include "extension.h"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxBlocks = 132 * 8;

__device__ __forceinline__ int first_end_above(const int* ends, int count, int row) {
  int begin = 0, end = count - 1;
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (ends[middle] <= row) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

__global__ void __launch_bounds__(kThreads)
    prefix_and_fill(const int* __restrict__ extend, const long long* __restrict__ seq, int bs, int topk,
                    int capacity, int* __restrict__ expanded, int* __restrict__ clamped,
                    int* __restrict__ total) {
  extern __shared__ int ends[];  // [bs]
  __shared__ int warp_sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int running = 0;
  for (int first = 0; first < bs; first += kThreads) {
    const int idx = first + static_cast<int>(threadIdx.x);
    int sum = idx < bs ? extend[idx] : 0;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += below;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    int before = running;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += warp_sums[w];
      running += warp_sums[w];
    }
    if (idx < bs) ends[idx] = before + sum;
    __syncthreads();
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *total = running;
  const int rows = running <= capacity ? running : 0;
  for (int row = blockIdx.x * kThreads + threadIdx.x; row < rows; row += gridDim.x * kThreads) {
    const int idx = first_end_above(ends, bs, row);
    const int value = max(static_cast<int>(seq[idx]) + 1 - ends[idx] + row, 0);
    expanded[row] = value;
    clamped[row] = min(value, topk);
  }
}

__global__ void __launch_bounds__(kThreads)
    fill(const int* __restrict__ extend, const long long* __restrict__ seq, const int* __restrict__ cu,
         int bs, int topk, int total, int* __restrict__ expanded, int* __restrict__ clamped) {
  const int row = blockIdx.x * kThreads + threadIdx.x;
  if (row >= total) return;
  const int idx = first_end_above(cu + 1, bs, row);
  const int value = max(static_cast<int>(seq[idx]) - extend[idx] + 1 + row - cu[idx], 0);
  expanded[row] = value;
  clamped[row] = min(value, topk);
}

int blocks_for(int rows) { return rows <= kThreads ? 1 : (rows + kThreads - 1) / kThreads; }

}  // namespace

cudaError_t launch_prefix_and_fill(const int* extend, const long long* seq, int bs, int topk, int capacity,
                                   int* expanded, int* clamped, int* total, cudaStream_t stream) {
  const int blocks = blocks_for(capacity);
  const int grid = blocks < kMaxBlocks ? blocks : kMaxBlocks;
  prefix_and_fill<<<grid, kThreads, sizeof(int) * bs, stream>>>(extend, seq, bs, topk, capacity, expanded,
                                                                clamped, total);
  return cudaGetLastError();
}

cudaError_t launch_fill(const int* extend, const long long* seq, const int* cu, int bs, int topk, int total,
                        int* expanded, int* clamped, cudaStream_t stream) {
  if (total == 0) return cudaSuccess;
  fill<<<blocks_for(total), kThreads, 0, stream>>>(extend, seq, cu, bs, topk, total, expanded, clamped);
  return cudaGetLastError();
}
