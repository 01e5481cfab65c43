// What a user who compiles ahead of time would write, as a torch extension:
//
//   aot_enqueue  one prefix-and-fill launch; the total stays on the device
//   aot_run      the same, then a 4-byte copy to pinned memory and a stream synchronisation
//   seed_cuda    zeros, cumsum, copy, item, fill, a tensor of one element for the caller to read
//
// Arguments: extend_seq_lens [bs] int32, seq_lens [bs] int64, topk, two int32 outputs.
#include "extension.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>

namespace {

void check(cudaError_t error, const char* what) {
  TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

void check_arguments(const at::Tensor& extend, const at::Tensor& seq, const at::Tensor& expanded,
                     const at::Tensor& clamped) {
  TORCH_CHECK(extend.is_cuda() && seq.is_cuda() && expanded.is_cuda() && clamped.is_cuda(),
              "expected CUDA tensors");
  TORCH_CHECK(extend.scalar_type() == at::kInt && seq.scalar_type() == at::kLong,
              "expected int32 and int64 lengths");
  TORCH_CHECK(expanded.scalar_type() == at::kInt && clamped.scalar_type() == at::kInt,
              "expected int32 outputs");
  TORCH_CHECK(extend.dim() == 1 && seq.sizes() == extend.sizes(), "expected lengths [bs]");
  TORCH_CHECK(
      extend.is_contiguous() && seq.is_contiguous() && expanded.is_contiguous() && clamped.is_contiguous(),
      "expected contiguous tensors");
}

const long long* seq_data(const at::Tensor& seq) {
  return reinterpret_cast<const long long*>(seq.data_ptr<int64_t>());
}

void aot_enqueue(const at::Tensor& extend, const at::Tensor& seq, int64_t topk, const at::Tensor& expanded,
                 const at::Tensor& clamped, const at::Tensor& total) {
  check_arguments(extend, seq, expanded, clamped);
  TORCH_CHECK(extend.numel() <= kAotMaxBs, "expected at most ", kAotMaxBs, " requests, got ", extend.numel());
  check(launch_prefix_and_fill(
            extend.data_ptr<int>(), seq_data(seq), static_cast<int>(extend.numel()), static_cast<int>(topk),
            static_cast<int>(std::min(expanded.numel(), clamped.numel())), expanded.data_ptr<int>(),
            clamped.data_ptr<int>(), total.data_ptr<int>(), c10::cuda::getCurrentCUDAStream().stream()),
        "prefix_and_fill");
}

int64_t aot_run(const at::Tensor& extend, const at::Tensor& seq, int64_t topk, const at::Tensor& expanded,
                const at::Tensor& clamped, const at::Tensor& total, const at::Tensor& pinned) {
  aot_enqueue(extend, seq, topk, expanded, clamped, total);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  int* const read = pinned.data_ptr<int>();
  check(cudaMemcpyAsync(read, total.data_ptr<int>(), sizeof(int), cudaMemcpyDeviceToHost, stream), "copy");
  check(cudaStreamSynchronize(stream), "synchronize");
  return *read;
}

at::Tensor seed_cuda(const at::Tensor& extend, const at::Tensor& seq, int64_t topk,
                     const at::Tensor& expanded, const at::Tensor& clamped) {
  check_arguments(extend, seq, expanded, clamped);
  const int64_t bs = extend.numel();
  at::Tensor cu = at::zeros({bs + 1}, extend.options());
  cu.slice(0, 1).copy_(at::cumsum(extend, 0, at::kInt));
  const int total = cu[bs].item<int>();
  TORCH_CHECK(total <= expanded.numel() && total <= clamped.numel(), "expected room for ", total, " rows");
  check(launch_fill(extend.data_ptr<int>(), seq_data(seq), cu.data_ptr<int>(), static_cast<int>(bs),
                    static_cast<int>(topk), total, expanded.data_ptr<int>(), clamped.data_ptr<int>(),
                    c10::cuda::getCurrentCUDAStream().stream()),
        "fill");
  return at::full({1}, total, extend.options());
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.attr("max_bs") = kAotMaxBs;
  module.def("aot_enqueue", &aot_enqueue);
  module.def("aot_run", &aot_run);
  module.def("seed_cuda", &seed_cuda);
}
