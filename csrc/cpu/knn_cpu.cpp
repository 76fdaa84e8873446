#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../knn.h"
#include "../threads.h"
#include "../simd/point_tree.h"
#include "../simd/quantized_cloud.h"
#include "memory.h"

#define VAMOH_KERNEL "../cpu/knn_cpu.inl"
#include "../simd/each_isa.inl"

namespace vamoh {

namespace {

constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kQuantizedRows = portable::kQuantizedRows;
constexpr int64_t kPackedBytes = int64_t{64} << 20;  // of points held in panels at once, at least one function

constexpr int64_t kFewestTreePoints = 1024;

// Whether a tree takes less time than the distances it saves: its levels cost as much as those from some queries.
bool worth_a_tree(int64_t count, int64_t queries, int64_t dims) {
  return dims >= 1 && dims <= kMostTreeDims && count >= kFewestTreePoints &&
         queries >= 64 * (std::ilogb(static_cast<double>(count)) - 6);
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
bool walk(const int32_t* at, const int32_t* order, int64_t length, const DistanceTable<T>& table, int64_t neighbors,
          T* distances, int64_t* positions) {
  int64_t found = 0;
  for (int64_t i = 0; i < length; ++i) {
    const T distance = table.values[order[i]];
    if (found == neighbors && distance > distances[found - 1]) return true;
    const int64_t candidate = at[order[i] - table.size / 2];
    if (candidate < 0) continue;
    int64_t slot = found < neighbors ? found++ : found;
    if (slot == neighbors && candidate > positions[--slot]) continue;
    for (; slot > 0 && distances[slot - 1] == distance && positions[slot - 1] > candidate; --slot)
      positions[slot] = positions[slot - 1], distances[slot] = distance;
    positions[slot] = candidate;
    distances[slot] = distance;
  }
  return found == neighbors && length == table.size;
}

// Calls pack(b, candidates, n, packed) for every function, whose candidates take `size` values of type Packed, and then
// search(b, packed, n, row, rows, distances, positions, worker) for its queries, a few at a time.
template <class T, class Packed, class Pack, class Search>
void for_each_query(const Mask& mask, int64_t* out, int64_t batch, int64_t count, int64_t num_queries, int64_t size,
                    int64_t neighbors, int threads, const Pack& pack, const Search& search) {
  const int64_t padded = round_up(count, kWidestPanel);
  const int64_t bytes = std::max<int64_t>(size * static_cast<int64_t>(sizeof(Packed)), 1);
  const int64_t together = std::min(batch, std::max<int64_t>(kPackedBytes / bytes, 1));
  const int64_t tasks = ceil_div(num_queries, kRowsPerTask);
  const int64_t list = kRowsPerTask * neighbors;
  const Buffer<Packed> packed = allocate<Packed>(together * size);
  const Buffer<int64_t> candidates = allocate<int64_t>(together * padded);
  const Buffer<int64_t> counts = allocate<int64_t>(together);
  const Buffer<T> distances = allocate<T>(std::max(threads, 1) * list);
  ThreadPool& pool = ThreadPool::get();

  for (int64_t b0 = 0; b0 < batch; b0 += together) {
    const int64_t here = std::min(together, batch - b0);
    pool.run(here, threads, [&](int64_t i, int) {
      const bool* allowed = mask.of(b0 + i);
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
void knn(const Cloud<T>& points, const Cloud<T>& queries, const Mask& mask, int64_t* out, int64_t batch,
         int64_t neighbors, int threads, Isa isa) {
  isa = with_byte_products(isa);
  const auto search = VAMOH_DISPATCH(isa, search<T>);
  const auto quantized_search = VAMOH_DISPATCH(isa, search_quantized<T>);
  const int64_t padded = round_up(points.count, kWidestPanel), dims = points.dims;
  const auto tree_search = VAMOH_DISPATCH(isa, search_tree<T>);
  const int64_t width = VAMOH_DISPATCH(isa, panel_width<T>());
  const bool by_tree = worth_a_tree(points.count, queries.count, dims);
  std::vector<QuantizedCloud<T>> clouds(batch);
  std::vector<PointTree<T>> trees(batch);
  const bool quantizable = dims >= kFewestQuantizedDims && dims <= kMostQuantizedDims;
  const int64_t size = quantizable ? round_up(kQuantizedRows * (padded + dims) + neighbors, kWidestPanel) : 0;
  const Buffer<int32_t> scratch = allocate<int32_t>(std::max(threads, 1) * size);
  for_each_query<T, T>(
      mask, out, batch, points.count, queries.count,
      by_tree ? PointTree<T>::size(padded, dims, width) : padded * dims, neighbors, threads,
      [&](int64_t b, const int64_t* index, int64_t n, T* packed) {
        if (by_tree && n > 0) {
          trees[b] = PointTree<T>(packed, n, dims, width);
          if (trees[b].build(points.values + b * points.stride, index, n)) return;
        }
        QuantizedCloud<T>& cloud = clouds[b];
        cloud = {points.values + b * points.stride, index, n, dims};
        const T* const others = queries.values + b * queries.stride;
        if (!set_scale(cloud, others, queries.count, VAMOH_DISPATCH(isa, extend_range<T>)))
          return VAMOH_DISPATCH(isa, pack_panels<T>)(cloud.coords, index, n, dims, packed);
        int32_t* const quantized = reinterpret_cast<int32_t*>(packed);  // needs less room than the panels
        int32_t* const squares = quantized + padded * cloud.groups;
        VAMOH_DISPATCH(isa, pack_quantized<T>)(cloud, squares + padded, quantized, squares);
        cloud.quantized = quantized;
        cloud.squares = squares;
      },
      [&](int64_t b, const T* packed, int64_t n, int64_t row, int64_t rows, T* distances, int64_t* positions,
          int worker) {
        const T* const from = queries.values + b * queries.stride + row * dims;
        const T infinity = std::numeric_limits<T>::infinity();
        if (trees[b].leaves) {
          for (int64_t r = 0; r < rows; ++r)
            tree_search(trees[b], from + r * dims, neighbors, infinity, distances, positions + r * neighbors);
          return;
        }
        if (!clouds[b].quantized) return search(packed, n, dims, from, rows, neighbors, infinity, distances, positions);
        int32_t* const memory = scratch.get() + worker * size;
        quantized_search(clouds[b], from, rows, neighbors, infinity, memory, distances, positions);
      });
}

template <class T>
void knn_by_table(const Cloud<int64_t>& points, const Cloud<int64_t>& queries, const DistanceTable<T>& table,
                  const int32_t* order, int64_t length, const Mask& mask, int64_t* out, int64_t batch,
                  int64_t neighbors, int threads, Isa isa) {
  const auto search = VAMOH_DISPATCH(isa, search_by_table<T>);
  const T infinity = std::numeric_limits<T>::infinity();
  const int64_t half = table.size / 2, padded = round_up(points.count, kWidestPanel);
  // After the candidates' cells: which candidate is in a cell, from half a table before the first cell. Nothing can be
  // in the one before all others: it tells whether two candidates share a cell.
  const int64_t size = length ? half + table.size : 0;
  for_each_query<T, int32_t>(
      mask, out, batch, points.count, queries.count, padded + size, neighbors, threads,
      [&](int64_t b, const int64_t* index, int64_t n, int32_t* cells) {
        const int64_t* from = points.values + b * points.stride;
        for (int64_t i = 0; i < n; ++i) cells[i] = static_cast<int32_t>(from[index[i]]);
        std::fill(cells + n, cells + round_up(n, kWidestPanel), n ? cells[n - 1] : 0);
        int32_t* const shared = cells + padded;
        std::fill(shared, shared + size, -1);
        for (int64_t i = 0; i < n && size; ++i) {
          int32_t& candidate = shared[half + cells[i]];
          if (candidate >= 0) *shared = 0;
          candidate = static_cast<int32_t>(i);
        }
      },
      [&](int64_t b, const int32_t* cells, int64_t n, int64_t row, int64_t rows, T* distances, int64_t* positions,
          int) {
        const int64_t* const query = queries.values + b * queries.stride + row;
        const int32_t* const shared = cells + padded;
        for (int64_t r = 0; r < rows; ++r) {
          T* const list = distances + r * neighbors;
          int64_t* const result = positions + r * neighbors;
          if (!size || *shared >= 0 || !walk(shared + half + query[r], order, length, table, neighbors, list, result))
            search(cells, n, table.values + half - query[r], neighbors, infinity, list, result);
        }
      });
}

#define VAMOH_INSTANTIATE(T)                                                                                        \
  template void knn(const Cloud<T>&, const Cloud<T>&, const Mask&, int64_t*, int64_t, int64_t, int, Isa);           \
  template void knn_by_table(const Cloud<int64_t>&, const Cloud<int64_t>&, const DistanceTable<T>&, const int32_t*, \
                             int64_t, const Mask&, int64_t*, int64_t, int64_t, int, Isa);
VAMOH_INSTANTIATE(float)
VAMOH_INSTANTIATE(double)
#undef VAMOH_INSTANTIATE

}  // namespace vamoh
