#include <cuda_runtime.h>

#include "../cuda.h"

namespace vamoh {

int cuda_devices() {
  int count;
  return cudaGetDeviceCount(&count);
}

const char* cuda_error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace vamoh
