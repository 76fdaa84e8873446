// A check runs kernels of one op on odd sizes in exactly sized memory and compares them with loops, for the order of
// threads that is set. It returns whether all is right. What is slow it does only if asked to.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda.h"

namespace cuda_on_host {

void set_seed(uint64_t seed);  // of the order of threads, see cuda_runtime.h

}  // namespace cuda_on_host

using Check = bool (*)(bool slow);

inline std::vector<Check>& checks() {
  static std::vector<Check> all;
  return all;
}

struct Register {
  explicit Register(Check check) { checks().push_back(check); }
};

// Exactly sized, so that AddressSanitizer sees every access beyond; filled with NaN or -1.
template <class T>
std::unique_ptr<T[]> memory(int64_t count) {
  std::unique_ptr<T[]> all(new T[count]);
  memset(static_cast<void*>(all.get()), 0xff, count * sizeof(T));
  return all;
}

// Calls op(run), first for the size of its workspace.
template <class Op>
bool run_cuda(const Op& op) {
  vamoh::CudaRun run{nullptr, 0, nullptr};
  if (op(run) != 0) return false;
  const auto workspace = memory<char>(run.bytes > 0 ? run.bytes : 1);
  run.workspace = workspace.get();
  return op(run) == 0;
}
