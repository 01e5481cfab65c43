// Just enough CUDA for g++ to compile the files of cuda_src/ as they stand: one std::thread per CUDA
// thread, a std::barrier for __syncthreads, slots and a warp barrier for the shuffles. The blocks of
// a grid run one after another, so that `__shared__` can be a static variable; its content survives
// from block to block, which shows a block that reads shared memory it has not written.
#pragma once

#include <atomic>
#include <barrier>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local Index3 threadIdx, blockIdx;
inline Index3 gridDim;

struct alignas(16) int4 {
  int x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
inline T __ldg(const T* at) {
  return *at;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}
inline int atomicMax(int* at, int value) {
  std::atomic_ref<int> word(*at);
  int old = word.load();
  while (old < value && !word.compare_exchange_weak(old, value)) {
  }
  return old;
}

namespace cuda_on_cpu {

constexpr int kMaxThreads = 1024;
constexpr int kWarp = 32;

struct Warp {
  std::barrier<> barrier{kWarp};
  std::uint64_t slots[kWarp] = {};
};
inline Warp warps[kMaxThreads / kWarp];

template <class T>
inline T exchange(T value, int source_lane) {
  Warp& warp = warps[threadIdx.x / kWarp];
  warp.slots[threadIdx.x % kWarp] = static_cast<std::uint64_t>(value);
  warp.barrier.arrive_and_wait();
  const T got = static_cast<T>(warp.slots[source_lane]);
  warp.barrier.arrive_and_wait();
  return got;
}

// The threads of a block, from the first launch to the end of the process: under a sanitizer it takes
// longer to make them than to run a block.
class Block {
 public:
  explicit Block(unsigned num_threads)
      : barrier(num_threads), begin_(num_threads + 1), end_(num_threads + 1) {
    for (unsigned thread = 0; thread < num_threads; ++thread) {
      threads_.emplace_back([this, thread] {
        threadIdx.x = thread;
        for (begin_.arrive_and_wait(); work_; begin_.arrive_and_wait()) {
          work_();
          end_.arrive_and_wait();
        }
      });
    }
  }
  ~Block() {
    work_ = nullptr;
    begin_.arrive_and_wait();
    for (std::thread& thread : threads_) thread.join();
  }
  // Runs `work` in every thread and waits for all.
  void run(const std::function<void()>& work) {
    work_ = work;
    begin_.arrive_and_wait();
    end_.arrive_and_wait();
  }

  std::barrier<> barrier;  // __syncthreads

 private:
  std::barrier<> begin_, end_;
  std::function<void()> work_;
  std::vector<std::thread> threads_;
};

inline Block* running;

// Runs kernel(args) for every thread of `grid` blocks of `num_threads` threads.
template <class Args>
void launch(void (*kernel)(Args), unsigned grid, unsigned num_threads, const Args& args) {
  static std::map<unsigned, Block> blocks;  // by their threads
  running = &blocks.try_emplace(num_threads, num_threads).first->second;
  gridDim.x = grid;
  running->run([&] {
    for (unsigned block = 0; block < grid; ++block) {
      blockIdx.x = block;
      kernel(args);
      running->barrier.arrive_and_wait();
    }
  });
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::running->barrier.arrive_and_wait(); }

template <class T>
inline T __shfl_sync(unsigned, T value, int lane) {
  return cuda_on_cpu::exchange(value, lane);
}

inline bool __any_sync(unsigned, bool predicate) {
  cuda_on_cpu::Warp& warp = cuda_on_cpu::warps[threadIdx.x / cuda_on_cpu::kWarp];
  warp.slots[threadIdx.x % cuda_on_cpu::kWarp] = predicate;
  warp.barrier.arrive_and_wait();
  bool any = false;
  for (const std::uint64_t slot : warp.slots) any |= slot != 0;
  warp.barrier.arrive_and_wait();
  return any;
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  cuda_on_cpu::Warp& warp = cuda_on_cpu::warps[threadIdx.x / cuda_on_cpu::kWarp];
  warp.slots[threadIdx.x % cuda_on_cpu::kWarp] = predicate;
  warp.barrier.arrive_and_wait();
  unsigned lanes = 0;
  for (int lane = 0; lane < cuda_on_cpu::kWarp; ++lane) {
    lanes |= static_cast<unsigned>(warp.slots[lane]) << lane;
  }
  warp.barrier.arrive_and_wait();
  return lanes;
}
inline int __popc(unsigned word) { return __builtin_popcount(word); }

template <class T>
inline T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = threadIdx.x % cuda_on_cpu::kWarp;
  return cuda_on_cpu::exchange(value, lane < distance ? lane : lane - distance);
}

template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_cpu::exchange(value, (threadIdx.x % cuda_on_cpu::kWarp) ^ mask);
}
