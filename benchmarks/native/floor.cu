// The floor: what a C++ program pays for the seed operation at a batch of 32 requests.
//
//   floor-graph   cudaGraphLaunch of one captured one-block kernel      end_to_end_us, host_us, gpu_us
//   floor-launch  the same kernel by <<<>>>                             end_to_end_us, host_us
//   floor-empty   an empty kernel as a node of a graph                  gpu_us
//
// end_to_end_us: from the launch until the host has the total, which the kernel writes to mapped
// memory and the host polls. host_us: the launch call alone. gpu_us: many launches in one graph, by
// events. The device is idle before each call, and the lengths are others each time: a copy from a
// pool goes before. The first calls of each kind are not counted.
//
//   floor ITERATIONS WARMUP     one JSON object per line: provider, metric, case, median, p20, p80, samples
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

constexpr int kRequests = 32;
constexpr int kMaxExtend = 5;
constexpr int kMaxKv = 9000;
constexpr int kTopk = 2048;
constexpr int kThreads = 256;
constexpr int kCapacity = kRequests * kMaxExtend;
constexpr int kPool = 64;
constexpr int kNodes = 500;    // launches in one graph
constexpr int kReplays = 200;  // of it
constexpr int kWaiting = -1;   // no total is negative
constexpr long long kMaxSpins = 2'000'000'000;
constexpr long long kHoldCycles = 500'000;  // about 250 us: longer than a graph launch takes
static_assert(kCapacity <= kThreads, "a thread has one row");

#define CHECK(call)                                                       \
  do {                                                                    \
    const cudaError_t error = (call);                                     \
    if (error != cudaSuccess) {                                           \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error)); \
      std::exit(1);                                                       \
    }                                                                     \
  } while (0)

struct Args {
  const int* extend;     // [kRequests]
  const long long* seq;  // [kRequests]
  int* expanded;         // [kCapacity]
  int* clamped;          // [kCapacity]
  volatile int* total;   // mapped host memory
};

// A lane holds a request; every warp sums all of them, so there is no barrier.
__global__ void __launch_bounds__(kThreads) expand(const Args args) {
  const int lane = threadIdx.x % 32;
  const int seq = static_cast<int>(args.seq[lane]);
  int end = args.extend[lane];
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(~0u, end, distance);
    if (lane >= distance) end += below;
  }
  const int total = __shfl_sync(~0u, end, 31);
  if (threadIdx.x == kThreads - 1) *args.total = total;
  const int row = static_cast<int>(threadIdx.x);
  int owner = 0;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    if (__shfl_sync(~0u, end, owner + step - 1) <= row) owner += step;
  }
  const int base = __shfl_sync(~0u, seq + 1 - end, owner);
  if (row < total) {
    const int value = max(base + row, 0);
    args.expanded[row] = value;
    args.clamped[row] = min(value, kTopk);
  }
}

__global__ void empty() {}

// Keeps the GPU busy while the host enqueues what is to be timed behind it.
__global__ void hold() {
  const long long begin = clock64();
  while (clock64() - begin < kHoldCycles) {
  }
}

using Clock = std::chrono::steady_clock;

double microseconds(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double, std::micro>(end - begin).count();
}

double quantile(const std::vector<double>& sorted, double at) {
  const double position = at * static_cast<double>(sorted.size() - 1);
  const size_t below = static_cast<size_t>(position);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (position - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

void print(const char* provider, const char* metric, int bs, int rows, std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  std::printf("{\"provider\": \"%s\", \"metric\": \"%s\", \"case\": {\"bs\": %d, \"rows\": %d}, ", provider,
              metric, bs, rows);
  std::printf("\"median\": %.4f, \"p20\": %.4f, \"p80\": %.4f, \"samples\": [", quantile(samples, 0.5),
              quantile(samples, 0.2), quantile(samples, 0.8));
  for (size_t i = 0; i < samples.size(); ++i) std::printf("%s%.4f", i ? ", " : "", samples[i]);
  std::printf("]}\n");
}

class Floor {
 public:
  Floor() {
    std::mt19937 random(0);
    std::vector<int> extends(kPool * kRequests);
    std::vector<long long> seqs(kPool * kRequests);
    totals_.assign(kPool, 0);
    for (int i = 0; i < kPool * kRequests; ++i) {
      extends[i] = 1 + static_cast<int>(random() % kMaxExtend);
      seqs[i] = extends[i] + static_cast<long long>(random() % (kMaxKv - kMaxExtend));
      totals_[i / kRequests] += extends[i];
    }
    extends_ = extends;
    seqs_ = seqs;
    CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    CHECK(cudaMalloc(&extend_pool_, sizeof(int) * extends.size()));
    CHECK(cudaMalloc(&seq_pool_, sizeof(long long) * seqs.size()));
    CHECK(cudaMalloc(&extend_, sizeof(int) * kRequests));
    CHECK(cudaMalloc(&seq_, sizeof(long long) * kRequests));
    CHECK(cudaMalloc(&outs_, 2 * sizeof(int) * kCapacity));
    CHECK(cudaHostAlloc(&total_, sizeof(int), cudaHostAllocMapped));
    int* mapped = nullptr;
    CHECK(cudaHostGetDevicePointer(&mapped, total_, 0));
    CHECK(cudaMemcpy(extend_pool_, extends.data(), sizeof(int) * extends.size(), cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(seq_pool_, seqs.data(), sizeof(long long) * seqs.size(), cudaMemcpyHostToDevice));
    args_ = {extend_, seq_, outs_, outs_ + kCapacity, mapped};
    one_ = capture(1, [&] { expand<<<1, kThreads, 0, stream_>>>(args_); });
  }

  int typical_rows() const {
    std::vector<int> sorted = totals_;
    std::sort(sorted.begin(), sorted.end());
    return sorted[kPool / 2];
  }

  void launch_graph() { CHECK(cudaGraphLaunch(one_, stream_)); }
  void launch_plain() { expand<<<1, kThreads, 0, stream_>>>(args_); }

  // Other lengths, then an idle device.
  void advance() {
    current_ = (current_ + 1) % kPool;
    CHECK(cudaMemcpyAsync(extend_, extend_pool_ + current_ * kRequests, sizeof(int) * kRequests,
                          cudaMemcpyDeviceToDevice, stream_));
    CHECK(cudaMemcpyAsync(seq_, seq_pool_ + current_ * kRequests, sizeof(long long) * kRequests,
                          cudaMemcpyDeviceToDevice, stream_));
    CHECK(cudaDeviceSynchronize());
    *static_cast<volatile int*>(total_) = kWaiting;
  }

  int poll() const {
    const volatile int* word = total_;
    int total = *word;
    for (long long spins = 0; total == kWaiting; ++spins) {
      total = *word;
      if (spins > kMaxSpins) {  // seconds: the launch has failed
        CHECK(cudaDeviceSynchronize());
        CHECK(cudaGetLastError());
        fail(-1, totals_[current_], total);
      }
    }
    return total;
  }

  // Refuses to go on with a wrong result.
  void verify(int total) const {
    if (total != totals_[current_]) fail(-1, totals_[current_], total);
    CHECK(cudaDeviceSynchronize());
    std::vector<int> outs(2 * kCapacity);
    CHECK(cudaMemcpy(outs.data(), outs_, sizeof(int) * outs.size(), cudaMemcpyDeviceToHost));
    int row = 0;
    for (int request = 0; request < kRequests; ++request) {
      const int extend = extends_[current_ * kRequests + request];
      for (int j = 0; j < extend; ++j, ++row) {
        const int value = static_cast<int>(seqs_[current_ * kRequests + request]) - extend + 1 + j;
        if (outs[row] != value) fail(row, value, outs[row]);
        if (outs[kCapacity + row] != std::min(value, kTopk))
          fail(row, std::min(value, kTopk), outs[kCapacity + row]);
      }
    }
  }

  template <typename Launch>
  std::vector<double> end_to_end(int iterations, int warmup, const Launch& launch) {
    std::vector<double> samples;
    for (int i = 0; i < iterations + warmup; ++i) {
      advance();
      const Clock::time_point begin = Clock::now();
      launch();
      const int total = poll();
      const Clock::time_point end = Clock::now();
      if (i < warmup) {
        verify(total);
      } else if (total != totals_[current_]) {
        fail(-1, totals_[current_], total);
      } else {
        samples.push_back(microseconds(begin, end));
      }
    }
    return samples;
  }

  template <typename Launch>
  std::vector<double> host(int iterations, int warmup, const Launch& launch) {
    std::vector<double> samples;
    for (int i = 0; i < iterations + warmup; ++i) {
      advance();
      const Clock::time_point begin = Clock::now();
      launch();
      const Clock::time_point end = Clock::now();
      if (i >= warmup) samples.push_back(microseconds(begin, end));
    }
    CHECK(cudaDeviceSynchronize());
    return samples;
  }

  template <typename Launch>
  std::vector<double> gpu(const Launch& launch) {
    const cudaGraphExec_t graph = capture(kNodes, launch);
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    std::vector<double> samples;
    for (int i = -5; i < kReplays; ++i) {
      advance();
      hold<<<1, 1, 0, stream_>>>();
      CHECK(cudaEventRecord(begin, stream_));
      CHECK(cudaGraphLaunch(graph, stream_));
      CHECK(cudaEventRecord(end, stream_));
      CHECK(cudaEventSynchronize(end));
      float milliseconds = 0;
      CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
      if (i >= 0) samples.push_back(milliseconds * 1000.0 / kNodes);
    }
    CHECK(cudaGraphExecDestroy(graph));
    return samples;
  }

  void launch_empty() { empty<<<1, 32, 0, stream_>>>(); }

 private:
  template <typename Launch>
  cudaGraphExec_t capture(int count, const Launch& launch) {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < count; ++i) launch();
    CHECK(cudaStreamEndCapture(stream_, &graph));
    CHECK(cudaGraphInstantiate(&executable, graph, 0));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaGraphUpload(executable, stream_));
    CHECK(cudaStreamSynchronize(stream_));
    return executable;
  }

  [[noreturn]] static void fail(int row, int expected, int got) {
    std::fprintf(stderr, "row %d (-1: the total): expected %d, got %d\n", row, expected, got);
    std::exit(1);
  }

  std::vector<int> extends_, totals_;
  std::vector<long long> seqs_;
  cudaStream_t stream_ = nullptr;
  int* extend_pool_ = nullptr;
  long long* seq_pool_ = nullptr;
  int* extend_ = nullptr;
  long long* seq_ = nullptr;
  int* outs_ = nullptr;
  int* total_ = nullptr;
  Args args_ = {};
  cudaGraphExec_t one_ = nullptr;
  int current_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  const int iterations = argc > 1 ? std::atoi(argv[1]) : 2000;
  const int warmup = argc > 2 ? std::atoi(argv[2]) : 200;
  if (iterations < 1 || warmup < 0) {
    std::fprintf(stderr, "usage: floor ITERATIONS WARMUP\n");
    return 2;
  }
  Floor floor;
  const auto graph = [&] { floor.launch_graph(); };
  const auto plain = [&] { floor.launch_plain(); };
  // In blocks of two kinds by turns, so that a slow moment of the machine meets both.
  constexpr int kRounds = 10;
  const int per_round = (iterations + kRounds - 1) / kRounds;
  std::vector<double> graph_whole, graph_host, plain_whole, plain_host;
  const auto append = [](std::vector<double>& to, const std::vector<double>& from) {
    to.insert(to.end(), from.begin(), from.end());
  };
  for (int round = 0; round < kRounds; ++round) {
    const int skipped = round == 0 ? warmup : std::min(warmup, 5);
    append(graph_whole, floor.end_to_end(per_round, skipped, graph));
    append(plain_whole, floor.end_to_end(per_round, skipped, plain));
    append(graph_host, floor.host(per_round, skipped, graph));
    append(plain_host, floor.host(per_round, skipped, plain));
  }
  const int rows = floor.typical_rows();
  print("floor-graph", "end_to_end_us", kRequests, rows, graph_whole);
  print("floor-graph", "host_us", kRequests, rows, graph_host);
  print("floor-launch", "end_to_end_us", kRequests, rows, plain_whole);
  print("floor-launch", "host_us", kRequests, rows, plain_host);
  print("floor-graph", "gpu_us", kRequests, rows, floor.gpu(plain));
  print("floor-empty", "gpu_us", 0, 0, floor.gpu([&] { floor.launch_empty(); }));
  return 0;
}
