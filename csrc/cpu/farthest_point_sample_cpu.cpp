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
  decltype(&portable::sample_by_table<T>) sample_by_table;
};

template <class T>
Kernel<T> kernel(Isa isa) {
#define VAMOH_TABLE(isa)                                                                   \
  {                                                                                        \
    &isa::pack_panels<T, isa::panel_width<T>()>, &isa::sample<T>, &isa::sample_by_table<T> \
  }
#if VAMOH_X86
  if (isa == Isa::avx512) return VAMOH_TABLE(avx512);
  if (isa == Isa::avx2) return VAMOH_TABLE(avx2);
#endif
  (void)isa;
  return VAMOH_TABLE(portable);
#undef VAMOH_TABLE
}

// Calls sample(b, candidates, n, order, worker) for every function with more than M candidates, which leaves positions
// among the candidates in `order` [M].
template <class Sample>
void for_each_function(const bool* mask, int64_t mask_step, int64_t* out, int64_t batch, int64_t points,
                       int64_t samples, int threads, const Sample& sample) {
  const int64_t padded = round_up(points, kWidestPanel);
  const Buffer<int64_t> candidates = allocate<int64_t>(threads * padded);
  ThreadPool::get().run(batch, threads, [&](int64_t b, int worker) {
    const bool* allowed = mask ? mask + b * mask_step : nullptr;
    int64_t* index = candidates.get() + worker * padded;
    int64_t n = 0;
    for (int64_t i = 0; i < points; ++i)
      if (!allowed || allowed[i]) index[n++] = i;

    int64_t* order = out + b * samples;
    if (n <= samples) {
      std::fill(std::copy(index, index + n, order), order + samples, -1);
      return;
    }
    sample(b, index, n, order, worker);
    for (int64_t i = 0; i < samples; ++i) order[i] = index[order[i]];
  });
}

int workers(int threads, int64_t batch) { return std::max(static_cast<int>(std::min<int64_t>(threads, batch)), 1); }

}  // namespace

template <class T>
void farthest_point_sample(const T* coords, int64_t coords_step, const bool* mask, int64_t mask_step, int64_t* out,
                           int64_t batch, int64_t points, int64_t dims, int64_t samples, int threads, Isa isa) {
  const Kernel<T> run = kernel<T>(isa);
  const int64_t padded = round_up(points, kWidestPanel);
  const int64_t reals = padded * dims + padded + padded + round_up(dims, kWidestPanel);  // one worker's scratch
  threads = workers(threads, batch);
  const Buffer<T> scratch = allocate<T>(threads * reals);
  for_each_function(mask, mask_step, out, batch, points, samples, threads,
                    [&](int64_t b, const int64_t* index, int64_t n, int64_t* order, int worker) {
                      T* panels = scratch.get() + worker * reals;
                      T* nearest = panels + padded * dims;
                      T* panel_best = nearest + padded;
                      run.pack(coords + b * coords_step, index, n, dims, panels);
                      run.sample(panels, n, dims, samples, nearest, panel_best, panel_best + padded,
                                 std::numeric_limits<T>::infinity(), order);
                    });
}

template <class T>
void farthest_point_sample_by_table(const int64_t* coords, int64_t coords_step, const T* table, int64_t table_size,
                                    const bool* mask, int64_t mask_step, int64_t* out, int64_t batch, int64_t points,
                                    int64_t samples, int threads, Isa isa) {
  const Kernel<T> run = kernel<T>(isa);
  const int64_t padded = round_up(points, kWidestPanel);
  threads = workers(threads, batch);
  const Buffer<T> scratch = allocate<T>(threads * padded);
  const Buffer<int32_t> packed = allocate<int32_t>(threads * padded);
  for_each_function(mask, mask_step, out, batch, points, samples, threads,
                    [&](int64_t b, const int64_t* index, int64_t n, int64_t* order, int worker) {
                      const int64_t* from = coords + b * coords_step;
                      int32_t* places = packed.get() + worker * padded;
                      for (int64_t i = 0; i < n; ++i) places[i] = static_cast<int32_t>(from[index[i]]);
                      std::fill(places + n, places + round_up(n, kWidestPanel), places[0]);
                      run.sample_by_table(places, n, table + table_size / 2, samples, scratch.get() + worker * padded,
                                          std::numeric_limits<T>::infinity(), order);
                    });
}

#define VAMOH_INSTANTIATE(T)                                                                                        \
  template void farthest_point_sample(const T*, int64_t, const bool*, int64_t, int64_t*, int64_t, int64_t, int64_t, \
                                      int64_t, int, Isa);                                                           \
  template void farthest_point_sample_by_table(const int64_t*, int64_t, const T*, int64_t, const bool*, int64_t,    \
                                               int64_t*, int64_t, int64_t, int64_t, int, Isa);
VAMOH_INSTANTIATE(float)
VAMOH_INSTANTIATE(double)
#undef VAMOH_INSTANTIATE

}  // namespace vamoh
