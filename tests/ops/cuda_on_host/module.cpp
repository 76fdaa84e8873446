// The CUDA functions of vamoh._native for host memory, as a Python module of their own. The kernels are in a library
// beside it, because their thread_local variables must be shared memory and nothing else.
#include "bindings/binding.h"

namespace cuda_on_host {

void set_seed(uint64_t seed);

}  // namespace cuda_on_host

PYBIND11_MODULE(cuda_on_host, m) {
  bind_cuda(m);
  m.def("set_seed", &cuda_on_host::set_seed);
}
