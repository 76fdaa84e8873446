#include <algorithm>
#include <limits>

#include "../farthest_point_sample.h"
#include "../threads.h"
#include "memory.h"

#define VAMOH_KERNEL "farthest_point_sample_cpu.inl"
#include "each_isa.inl"

namespace vamoh {

namespace {

template <class T>
struct Kernel {
  decltype(&portable::pack_panels<T, portable::panel_width<T>()>) pack;
  decltype(&portable::sample<T>) sample;
};

template <class T>
Kernel<T> kernel(Isa isa) {
#if VAMOH_X86
  if (isa == Isa::avx512) return {&avx512::pack_panels<T, avx512::panel_width<T>()>, &avx512::sample<T>};
  if (isa == Isa::avx2) return {&avx2::pack_panels<T, avx2::panel_width<T>()>, &avx2::sample<T>};
#endif
  (void)isa;
  return {&portable::pack_panels<T, portable::panel_width<T>()>, &portable::sample<T>};
}

}  // namespace

template <class T>
void farthest_point_sample(const T* coords, int64_t coords_step, const bool* mask, int64_t mask_step, int64_t* out,
                           int64_t batch, int64_t points, int64_t dims, int64_t samples, int threads, Isa isa) {
  const Kernel<T> run = kernel<T>(isa);
  const int64_t padded = round_up(points, kWidestPanel);
  const int64_t reals = padded * dims + padded + padded + round_up(dims, kWidestPanel);  // one worker's scratch
  threads = static_cast<int>(std::min<int64_t>(threads, batch));
  const Buffer<T> scratch = allocate<T>(std::max(threads, 1) * reals);
  const Buffer<int64_t> candidates = allocate<int64_t>(std::max(threads, 1) * padded);

  ThreadPool::get().run(batch, threads, [&](int64_t b, int worker) {
    const bool* allowed = mask ? mask + b * mask_step : nullptr;
    int64_t* index = candidates.get() + worker * padded;
    int64_t n = 0;
    for (int64_t i = 0; i < points; ++i)
      if (!allowed || allowed[i]) index[n++] = i;

    int64_t* result = out + b * samples;
    if (n <= samples) {
      std::fill(std::copy(index, index + n, result), result + samples, -1);
      return;
    }
    T* panels = scratch.get() + worker * reals;
    T* nearest = panels + padded * dims;
    T* panel_best = nearest + padded;
    run.pack(coords + b * coords_step, index, n, dims, panels);
    run.sample(panels, n, dims, samples, nearest, panel_best, panel_best + padded, std::numeric_limits<T>::infinity(),
               result);
    for (int64_t i = 0; i < samples; ++i) result[i] = index[result[i]];
  });
}

template void farthest_point_sample(const float*, int64_t, const bool*, int64_t, int64_t*, int64_t, int64_t, int64_t,
                                    int64_t, int, Isa);
template void farthest_point_sample(const double*, int64_t, const bool*, int64_t, int64_t*, int64_t, int64_t, int64_t,
                                    int64_t, int, Isa);

}  // namespace vamoh
