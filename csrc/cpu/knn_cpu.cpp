#include <algorithm>
#include <limits>
#include <vector>

#include "../knn.h"
#include "../threads.h"
#include "coded_cloud.h"
#include "memory.h"

#define VAMOH_KERNEL "knn_cpu.inl"
#include "each_isa.inl"

namespace vamoh {

namespace {

constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kCodedRows = portable::kCodedRows;
constexpr int64_t kPackedBytes = int64_t{64} << 20;  // of points held in panels at once, at least one function

template <class T>
struct Kernel {
  decltype(&portable::pack_panels<T, portable::panel_width<T>()>) pack;
  decltype(&portable::search<T>) search;
  decltype(&portable::extend_range<T>) extend_range;
  decltype(&portable::pack_codes<T, portable::kCodedWidth>) pack_codes;
  decltype(&portable::search_by_codes<T>) search_by_codes;
  decltype(&portable::search_by_table<T>) search_by_table;
};

template <class T>
Kernel<T> kernel(Isa isa) {
#define VAMOH_TABLE(isa)                                                                          \
  {                                                                                               \
    &isa::pack_panels<T, isa::panel_width<T>()>, &isa::search<T>, &isa::extend_range<T>,          \
        &isa::pack_codes<T, isa::kCodedWidth>, &isa::search_by_codes<T>, &isa::search_by_table<T> \
  }
#if VAMOH_X86
  if (isa == Isa::avx512 && has_vnni()) return VAMOH_TABLE(avx512);
  if (isa != Isa::portable) return VAMOH_TABLE(avx2);
#endif
  (void)isa;
  return VAMOH_TABLE(portable);
#undef VAMOH_TABLE
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

// The `neighbors` nearest of the candidates on a lattice, by visiting its cells in the order of their distance from the
// query: `order` [length] positions in the table, `at` the candidate in every cell or -1, from that of the query.
// False if these cells do not hold them for sure.
template <class T>
bool walk(const int32_t* at, const int32_t* order, int64_t length, const T* table, int64_t table_size,
          int64_t neighbors, T* distances, int64_t* positions) {
  int64_t found = 0;
  for (int64_t i = 0; i < length; ++i) {
    const T distance = table[order[i]];
    if (found == neighbors && distance > distances[found - 1]) return true;
    const int64_t candidate = at[order[i] - table_size / 2];
    if (candidate < 0) continue;
    int64_t slot = found < neighbors ? found++ : found;
    if (slot == neighbors && candidate > positions[--slot]) continue;
    for (; slot > 0 && distances[slot - 1] == distance && positions[slot - 1] > candidate; --slot)
      positions[slot] = positions[slot - 1], distances[slot] = distance;
    positions[slot] = candidate;
    distances[slot] = distance;
  }
  return found == neighbors && length == table_size;
}

// Calls pack(b, candidates, n, packed) for every function, whose candidates take `size` values of type Packed, and then
// search(b, packed, n, row, rows, distances, positions, worker) for its queries, a few at a time.
template <class T, class Packed, class Pack, class Search>
void for_each_query(const bool* mask, int64_t mask_step, int64_t* out, int64_t batch, int64_t count,
                    int64_t num_queries, int64_t size, int64_t neighbors, int threads, const Pack& pack,
                    const Search& search) {
  const int64_t padded = round_up(count, kWidestPanel);
  const int64_t bytes = std::max<int64_t>(size * static_cast<int64_t>(sizeof(Packed)), 1);
  const int64_t together = std::min(batch, std::max<int64_t>(kPackedBytes / bytes, 1));
  const int64_t tasks = (num_queries + kRowsPerTask - 1) / kRowsPerTask;
  const int64_t list = kRowsPerTask * neighbors;
  const Buffer<Packed> packed = allocate<Packed>(together * size);
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
      pack(b0 + i, index, n, packed.get() + i * size);
    });
    pool.run(here * tasks, threads, [&](int64_t task, int worker) {
      const int64_t i = task / tasks, row = task % tasks * kRowsPerTask;
      const int64_t rows = std::min(kRowsPerTask, num_queries - row);
      const int64_t* index = candidates.get() + i * padded;
      int64_t* result = out + ((b0 + i) * num_queries + row) * neighbors;
      search(b0 + i, packed.get() + i * size, counts[i], row, rows, distances.get() + worker * list, result, worker);
      for (int64_t r = 0; r < rows; ++r) complete(result + r * neighbors, neighbors);
      for (int64_t j = 0; j < rows * neighbors; ++j) result[j] = index[result[j]];
    });
  }
}

}  // namespace

template <class T>
void knn(const T* points, int64_t points_step, const T* queries, int64_t queries_step, const bool* mask,
         int64_t mask_step, int64_t* out, int64_t batch, int64_t count, int64_t num_queries, int64_t dims,
         int64_t neighbors, int threads, Isa isa) {
  const Kernel<T> run = kernel<T>(isa);
  const int64_t padded = round_up(count, kWidestPanel);
  std::vector<CodedCloud<T>> clouds(batch);
  const bool may_code = dims >= kFewestCodedDims && dims <= kMostCodedDims;
  const int64_t size = may_code ? round_up(kCodedRows * (padded + dims) + neighbors, kWidestPanel) : 0;
  const Buffer<int32_t> scratch = allocate<int32_t>(std::max(threads, 1) * size);
  for_each_query<T, T>(
      mask, mask_step, out, batch, count, num_queries, padded * dims, neighbors, threads,
      [&](int64_t b, const int64_t* index, int64_t n, T* packed) {
        CodedCloud<T>& cloud = clouds[b];
        cloud = {points + b * points_step, index, n, dims};
        if (!set_scale(cloud, queries + b * queries_step, num_queries, run.extend_range))
          return run.pack(cloud.coords, index, n, dims, packed);
        int32_t* const codes = reinterpret_cast<int32_t*>(packed);  // need less room than the panels
        int32_t* const squares = codes + padded * cloud.groups;
        run.pack_codes(cloud, squares + padded, codes, squares);
        cloud.codes = codes;
        cloud.squares = squares;
      },
      [&](int64_t b, const T* packed, int64_t n, int64_t row, int64_t rows, T* distances, int64_t* positions,
          int worker) {
        const T* const from = queries + b * queries_step + row * dims;
        const T infinity = std::numeric_limits<T>::infinity();
        if (clouds[b].codes)
          run.search_by_codes(clouds[b], from, rows, neighbors, infinity, scratch.get() + worker * size, distances,
                              positions);
        else
          run.search(packed, n, dims, from, rows, neighbors, infinity, distances, positions);
      });
}

template <class T>
void knn_by_table(const int64_t* points, int64_t points_step, const int64_t* queries, int64_t queries_step,
                  const T* table, int64_t table_size, const int32_t* order, int64_t length, const bool* mask,
                  int64_t mask_step, int64_t* out, int64_t batch, int64_t count, int64_t num_queries, int64_t neighbors,
                  int threads, Isa isa) {
  const Kernel<T> run = kernel<T>(isa);
  const T infinity = std::numeric_limits<T>::infinity();
  const int64_t half = table_size / 2, padded = round_up(count, kWidestPanel);
  // After the places: which candidate is in a cell, from half a table before the first cell. Nothing can be in the one
  // before all others: it tells whether two candidates share a cell.
  const int64_t cells = length ? half + table_size : 0;
  for_each_query<T, int32_t>(
      mask, mask_step, out, batch, count, num_queries, padded + cells, neighbors, threads,
      [&](int64_t b, const int64_t* index, int64_t n, int32_t* places) {
        const int64_t* from = points + b * points_step;
        for (int64_t i = 0; i < n; ++i) places[i] = static_cast<int32_t>(from[index[i]]);
        std::fill(places + n, places + round_up(n, kWidestPanel), n ? places[n - 1] : 0);
        int32_t* const shared = places + padded;
        std::fill(shared, shared + cells, -1);
        for (int64_t i = 0; i < n && cells; ++i) {
          int32_t& cell = shared[half + places[i]];
          if (cell >= 0) *shared = 0;
          cell = static_cast<int32_t>(i);
        }
      },
      [&](int64_t b, const int32_t* places, int64_t n, int64_t row, int64_t rows, T* distances, int64_t* positions,
          int) {
        const int64_t* const query = queries + b * queries_step + row;
        const int32_t* const shared = places + padded;
        for (int64_t r = 0; r < rows; ++r) {
          T* const list = distances + r * neighbors;
          int64_t* const result = positions + r * neighbors;
          if (!cells || *shared >= 0 ||
              !walk(shared + half + query[r], order, length, table, table_size, neighbors, list, result))
            run.search_by_table(places, n, table + half - query[r], neighbors, infinity, list, result);
        }
      });
}

#define VAMOH_INSTANTIATE(T)                                                                                         \
  template void knn(const T*, int64_t, const T*, int64_t, const bool*, int64_t, int64_t*, int64_t, int64_t, int64_t, \
                    int64_t, int64_t, int, Isa);                                                                     \
  template void knn_by_table(const int64_t*, int64_t, const int64_t*, int64_t, const T*, int64_t, const int32_t*,    \
                             int64_t, const bool*, int64_t, int64_t*, int64_t, int64_t, int64_t, int64_t, int, Isa);
VAMOH_INSTANTIATE(float)
VAMOH_INSTANTIATE(double)
#undef VAMOH_INSTANTIATE

}  // namespace vamoh
