// What the CUDA functions of all ops have in common.
//
// X_cuda does what X of csrc/X.h does, with all memory on the current device. It only enqueues kernels on the stream:
// it neither waits nor allocates. It returns a cudaError_t, 0 where all launches went well. Offsets are 64-bit.
#pragma once

#include <cstdint>

namespace vamoh {

struct CudaRun {
  void* workspace;  // device memory of `bytes`; null: launch nothing, only say in `bytes` how much it has to be
  int64_t bytes;
  void* stream;  // a cudaStream_t
};

// 0 if there are devices and the driver is new enough for the CUDA runtime in this library, else a cudaError_t.
int cuda_devices();

// Name and explanation of a cudaError_t.
const char* cuda_error_name(int error);
const char* cuda_error_text(int error);

}  // namespace vamoh
