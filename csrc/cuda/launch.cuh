// What all CUDA ops share: cutting up the workspace, launching, and one thread per element.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../cuda.h"

namespace vamoh {

constexpr int64_t kMostBlocks = 0x7fffffff;  // of one launch
constexpr int kEachThreads = 256;

// Calls work(i) for every i below count, spread over the threads of the grid.
template <class Work>
__device__ inline void for_each(int64_t count, const Work& work) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) work(i);
}

inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Takes arrays from the workspace, then launches one kernel after another until one fails.
class Launcher {
 public:
  explicit Launcher(CudaRun& run) : run_(run) { run.bytes = 0; }

  template <class T>
  T* take(int64_t count) {
    char* const at = static_cast<char*>(run_.workspace) + (run_.workspace ? run_.bytes : 0);
    run_.bytes += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return reinterpret_cast<T*>(at);
  }

  // Whether the caller wants to know the size of the workspace and nothing else.
  bool asked() const { return run_.workspace == nullptr; }

  template <class... P, class... A>
  void operator()(void (*kernel)(P...), int64_t blocks, int threads, A... arguments) {
    if (error_ == cudaSuccess && blocks > kMostBlocks) error_ = cudaErrorInvalidConfiguration;
    if (error_ != cudaSuccess || blocks == 0) return;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = static_cast<cudaStream_t>(run_.stream);
    error_ = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
  }

  // A kernel that is one call of for_each(count, ...).
  template <class... P, class... A>
  void each(void (*kernel)(P...), int64_t count, A... arguments) {
    (*this)(kernel, std::min(ceil_div(count, kEachThreads), kMostBlocks), kEachThreads, arguments...);
  }

  int error() const { return error_; }

 private:
  CudaRun& run_;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace vamoh
