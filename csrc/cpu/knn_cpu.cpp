#include <algorithm>
#include <limits>

#include "../knn.h"
#include "../threads.h"
#include "memory.h"

#define VAMOH_KERNEL "knn_cpu.inl"
#include "each_isa.inl"

namespace vamoh {

namespace {

constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kPackedBytes = int64_t{64} << 20;  // of points held in panels at once, at least one function

template <class T>
struct Kernel {
  decltype(&portable::pack_panels<T, portable::panel_width<T>()>) pack;
  decltype(&portable::search<T>) search;
};

template <class T>
Kernel<T> kernel(Isa isa) {
#if VAMOH_X86
  if (isa == Isa::avx512) return {&avx512::pack_panels<T, avx512::panel_width<T>()>, &avx512::search<T>};
  if (isa == Isa::avx2) return {&avx2::pack_panels<T, avx2::panel_width<T>()>, &avx2::search<T>};
#endif
  (void)isa;
  return {&portable::pack_panels<T, portable::panel_width<T>()>, &portable::search<T>};
}

// A row ends in -1 where distances are NaN or infinite: put the first candidates there that the row does not hold yet.
void complete(int64_t* positions, int64_t neighbors) {
  int64_t* const end = positions + neighbors;
  int64_t* const found = std::find(positions, end, -1);
  int64_t next = 0;
  for (int64_t* slot = found; slot < end; ++slot, ++next) {
    while (std::find(positions, found, next) != found) ++next;
    *slot = next;
  }
}

}  // namespace

template <class T>
void knn(const T* points, int64_t points_step, const T* queries, int64_t queries_step, const bool* mask,
         int64_t mask_step, int64_t* out, int64_t batch, int64_t count, int64_t num_queries, int64_t dims,
         int64_t neighbors, int threads, Isa isa) {
  const Kernel<T> run = kernel<T>(isa);
  const int64_t padded = round_up(count, kWidestPanel);
  const int64_t bytes = std::max<int64_t>(padded * dims * static_cast<int64_t>(sizeof(T)), 1);
  const int64_t together = std::min(batch, std::max<int64_t>(kPackedBytes / bytes, 1));
  const int64_t tasks = (num_queries + kRowsPerTask - 1) / kRowsPerTask;
  const int64_t list = kRowsPerTask * neighbors;
  const Buffer<T> panels = allocate<T>(together * padded * dims);
  const Buffer<int64_t> candidates = allocate<int64_t>(together * padded);
  const Buffer<int64_t> counts = allocate<int64_t>(together);
  const Buffer<T> distances = allocate<T>(std::max(threads, 1) * list);
  ThreadPool& pool = ThreadPool::get();

  for (int64_t b0 = 0; b0 < batch; b0 += together) {
    const int64_t here = std::min(together, batch - b0);
    pool.run(here, threads, [&](int64_t i, int) {
      const bool* allowed = mask ? mask + (b0 + i) * mask_step : nullptr;
      int64_t* index = candidates.get() + i * padded;
      int64_t n = 0;
      for (int64_t j = 0; j < count; ++j)
        if (!allowed || allowed[j]) index[n++] = j;
      counts[i] = n;
      run.pack(points + (b0 + i) * points_step, index, n, dims, panels.get() + i * padded * dims);
    });
    pool.run(here * tasks, threads, [&](int64_t task, int worker) {
      const int64_t i = task / tasks, row = task % tasks * kRowsPerTask;
      const int64_t rows = std::min(kRowsPerTask, num_queries - row);
      const int64_t* index = candidates.get() + i * padded;
      int64_t* result = out + ((b0 + i) * num_queries + row) * neighbors;
      run.search(panels.get() + i * padded * dims, counts[i], dims, queries + (b0 + i) * queries_step + row * dims,
                 rows, neighbors, std::numeric_limits<T>::infinity(), distances.get() + worker * list, result);
      for (int64_t r = 0; r < rows; ++r) complete(result + r * neighbors, neighbors);
      for (int64_t j = 0; j < rows * neighbors; ++j) result[j] = index[result[j]];
    });
  }
}

template void knn(const float*, int64_t, const float*, int64_t, const bool*, int64_t, int64_t*, int64_t, int64_t,
                  int64_t, int64_t, int64_t, int, Isa);
template void knn(const double*, int64_t, const double*, int64_t, const bool*, int64_t, int64_t*, int64_t, int64_t,
                  int64_t, int64_t, int64_t, int, Isa);

}  // namespace vamoh
