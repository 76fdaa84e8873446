#include <cuda_runtime.h>

#include "check.h"

void cuda_on_host::set_seed(uint64_t seed) { machine.set_seed(seed); }
