#include "../fourier_features.h"

#include <algorithm>

#include "../threads.h"
#include "memory.h"

#define VAMOH_KERNEL "../cpu/fourier_features_cpu.inl"
#include "../simd/each_isa.inl"

namespace vamoh {

namespace {

constexpr int64_t kPointsPerTask = 256;

}  // namespace

void fourier_features(const float* coords, const float* frequencies, float* out, int64_t points, int64_t dims,
                      int64_t count, int threads, Isa isa) {
  const int64_t padded = round_up(count, 16);
  const Buffer<float> by_dim = allocate<float>(dims * padded);
  std::fill(by_dim.get(), by_dim.get() + dims * padded, 0.0f);
  for (int64_t f = 0; f < count; ++f)
    for (int64_t d = 0; d < dims; ++d) by_dim[d * padded + f] = frequencies[f * dims + d];
  const int64_t tasks = ceil_div(points, kPointsPerTask);
  ThreadPool::get().run(tasks, threads, [&](int64_t task, int) {
    const int64_t first = task * kPointsPerTask;
    VAMOH_DISPATCH(isa, encode)(coords + first * dims, by_dim.get(), padded, std::min(kPointsPerTask, points - first),
                                dims, count, out + first * 2 * count);
  });
}

}  // namespace vamoh
