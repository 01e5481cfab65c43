// Runs kernels of cuda_src/ on buffers that come in on stdin, and writes the buffers back to stdout.
// Every buffer is a heap block of its own, flush with its end, so that AddressSanitizer sees the
// first byte past it. The protocol is that of cpu_kernels.py.
#include "cuda_on_cpu.h"
//
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

// Both are written by cpu_kernels.py: an #include for each file of cuda_src/, a line for each kernel.
#include "sources.inc"

namespace {

using Bytes = std::vector<char>;
using Kernel = std::function<void(unsigned grid, const Bytes& args)>;

template <class Args>
Kernel wrap(void (*kernel)(Args), unsigned num_threads) {
  return [kernel, num_threads](unsigned grid, const Bytes& bytes) {
    Args args;
    if (bytes.size() != sizeof(args)) {
      std::fprintf(stderr, "expected %zu argument bytes, got %zu\n", sizeof(args), bytes.size());
      std::exit(3);
    }
    std::memcpy(&args, bytes.data(), sizeof(args));
    cuda_on_cpu::launch(kernel, grid, num_threads, args);
  };
}

const std::map<std::string, Kernel> kKernels = {
#include "kernels.inc"
};

void read_exactly(void* to, std::size_t size) {
  if (size != 0 && std::fread(to, 1, size, stdin) != size) {
    std::fprintf(stderr, "input ends early\n");
    std::exit(3);
  }
}

std::uint64_t read_number() {
  std::uint64_t value;
  read_exactly(&value, sizeof(value));
  return value;
}

Bytes read_bytes() {
  Bytes bytes(read_number());
  read_exactly(bytes.data(), bytes.size());
  return bytes;
}

struct Buffer {
  explicit Buffer(std::uint64_t misalignment) : bytes(read_bytes()) {
    const std::size_t size = bytes.size() + misalignment;
    block = static_cast<char*>(std::malloc(size ? size : 1));
    data = block + misalignment;
    if (!bytes.empty()) std::memcpy(data, bytes.data(), bytes.size());
  }
  Bytes bytes;
  char* block;
  char* data;
};

}  // namespace

int main() {
  for (std::uint64_t jobs = read_number(); jobs > 0; --jobs) {
    std::vector<Buffer> buffers;
    for (std::uint64_t count = read_number(); count > 0; --count) buffers.emplace_back(read_number());
    Bytes args = read_bytes();
    for (std::uint64_t count = read_number(); count > 0; --count) {
      const std::uint64_t at = read_number(), buffer = read_number(), offset = read_number();
      const char* const target = buffers.at(buffer).data + offset;
      std::memcpy(args.data() + at, &target, sizeof(target));
    }
    for (std::uint64_t count = read_number(); count > 0; --count) {
      const Bytes name = read_bytes();
      const std::uint64_t grid = read_number();
      kKernels.at(std::string(name.begin(), name.end()))(static_cast<unsigned>(grid), args);
    }
    for (const Buffer& buffer : buffers) {
      std::fwrite(buffer.data, 1, buffer.bytes.size(), stdout);
      std::free(buffer.block);
    }
  }
  return 0;
}
