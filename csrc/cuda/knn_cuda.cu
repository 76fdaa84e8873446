#include "../knn.h"
#include "distance.cuh"
#include "launch.cuh"

namespace vamoh {

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocks = 8;    // at once on a multiprocessor
constexpr int kQueries = 16;  // of a block
constexpr int kPoints = 64;   // and of the tile that it compares them with
constexpr int kDims = 32;     // of both tiles at once
constexpr int kColumns = 16;  // threads along the points: each has kOwnQueries x kOwnPoints distances
constexpr int kRows = kThreads / kColumns;
constexpr int kOwnQueries = kQueries / kRows;
constexpr int kOwnPoints = kPoints / kColumns;
constexpr int64_t kWorkspace = int64_t{64} << 20;  // at most, or one block's

// Rows [first, first + Rows) of x [count, dims], columns [d0, d0 + kDims): tile[d][row], zero beyond the ends. A zero
// in points and queries adds nothing to a distance.
template <int Rows, class T>
__device__ void load_tile(const T* x, int64_t count, int64_t dims, int64_t first, int64_t d0, T (*tile)[Rows + 1]) {
  for (int i = threadIdx.x; i < Rows * kDims; i += kThreads) {
    const int64_t row = first + i / kDims, d = d0 + i % kDims;
    tile[i % kDims][i / kDims] = row < count && d < dims ? x[row * dims + d] : T(0);
  }
}

// Distances [kQueries, count] of the queries from `first`: infinite where a point is no candidate, else at most the
// largest number.
template <class T>
__device__ void measure(const T* points, const T* queries, const bool* mask, int64_t count, int64_t num_queries,
                        int64_t dims, int64_t first, T* distances) {
  __shared__ T point_tile[kDims][kPoints + 1];
  __shared__ T query_tile[kDims][kQueries + 1];
  const int column = threadIdx.x % kColumns, row = threadIdx.x / kColumns;
  for (int64_t n0 = 0; n0 < count; n0 += kPoints) {
    T sums[kOwnQueries][kOwnPoints] = {};
    for (int64_t d0 = 0; d0 < dims; d0 += kDims) {
      load_tile<kPoints>(points, count, dims, n0, d0, point_tile);
      load_tile<kQueries>(queries, num_queries, dims, first, d0, query_tile);
      __syncthreads();
      const int depth = dims - d0 < kDims ? static_cast<int>(dims - d0) : kDims;
      for (int d = 0; d < depth; ++d) {
#pragma unroll
        for (int q = 0; q < kOwnQueries; ++q)
#pragma unroll
          for (int p = 0; p < kOwnPoints; ++p)
            sums[q][p] = add_square(sums[q][p], query_tile[d][row + q * kRows], point_tile[d][column + p * kColumns]);
      }
      __syncthreads();
    }
#pragma unroll
    for (int q = 0; q < kOwnQueries; ++q)
#pragma unroll
      for (int p = 0; p < kOwnPoints; ++p) {
        const int64_t n = n0 + column + p * kColumns;
        const T distance = sums[q][p] < kLargest<T> ? sums[q][p] : kLargest<T>;  // also of NaN
        if (n < count) distances[(row + q * kRows) * count + n] = !mask || mask[n] ? distance : kInfinity<T>;
      }
  }
}

template <class T>
struct ByCoords {
  using Value = T;
  Cloud<T> points, queries;
  __device__ void operator()(int64_t b, const bool* mask, int64_t first, T* distances) const {
    measure(points.values + b * points.stride, queries.values + b * queries.stride, mask, points.count, queries.count,
            points.dims, first, distances);
  }
};

template <class T>
struct ByTable {
  using Value = T;
  Cloud<int64_t> points, queries;
  const T* center;
  __device__ void operator()(int64_t b, const bool* mask, int64_t first, T* distances) const {
    const int64_t count = points.count, left = queries.count - first, here = left < kQueries ? left : kQueries;
    for (int64_t i = threadIdx.x; i < here * count; i += kThreads) {
      const int64_t n = i % count;
      const T found =
          center[points.values[b * points.stride + n] - queries.values[b * queries.stride + first + i / count]];
      const T distance = found < kLargest<T> ? found : kLargest<T>;  // also of NaN
      distances[i] = !mask || mask[n] ? distance : kInfinity<T>;
    }
  }
};

// The smallest of every 32nd distance from the lane on.
template <class T>
__device__ Entry<T> smallest_of_lane(const T* distances, int64_t count) {
  Entry<T> best{kInfinity<T>, count};
  for (int64_t n = threadIdx.x % kWarp; n < count; n += kWarp)
    if (distances[n] < best.value) best = {distances[n], n};
  return best;
}

// One warp finds a query's neighbours. Those found become infinite in distances [count].
template <class T>
__device__ void select(T* distances, int64_t count, int64_t neighbors, int64_t* out) {
  Entry<T> own = smallest_of_lane(distances, count);
  for (int64_t s = 0; s < neighbors; ++s) {
    const Entry<T> best = smallest(own);
    if (threadIdx.x % kWarp == 0) out[s] = best.index;
    if (best.index == own.index && own.index < count) {
      distances[best.index] = kInfinity<T>;
      own = smallest_of_lane(distances, count);
    }
  }
}

// A block takes kQueries queries of one function, then others. distances [gridDim.x, kQueries, count].
template <class Measure, class T = typename Measure::Value>
__global__ void __launch_bounds__(kThreads, kBlocks)
    search(Measure measure, Mask mask, T* distances, int64_t* out, int64_t tasks, int64_t tasks_per_function,
           int64_t neighbors) {
  const int64_t count = measure.points.count, num_queries = measure.queries.count;
  distances += int64_t{blockIdx.x} * kQueries * count;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t b = task / tasks_per_function, first = task % tasks_per_function * kQueries;
    measure(b, mask.values ? mask.values + b * mask.stride : nullptr, first, distances);
    __syncthreads();
    for (int q = threadIdx.x / kWarp; q < kQueries && first + q < num_queries; q += kWarps)
      select(distances + q * count, count, neighbors, out + (b * num_queries + first + q) * neighbors);
    __syncthreads();
  }
}

template <class Measure, class T = typename Measure::Value>
int run_search(const Measure& measure, const Mask& mask, int64_t* out, int64_t batch, int64_t neighbors, CudaRun& run) {
  Launcher launch(run);
  const int64_t per_function = ceil_div(measure.queries.count, kQueries), tasks = batch * per_function;
  const int64_t values = kQueries * measure.points.count, own = values * static_cast<int64_t>(sizeof(T));
  const int64_t blocks = std::min(tasks, std::max<int64_t>(kWorkspace / std::max<int64_t>(own, 1), 1));
  T* const distances = launch.take<T>(blocks * values);
  if (launch.asked()) return 0;
  launch(search<Measure>, blocks, kThreads, measure, mask, distances, out, tasks, per_function, neighbors);
  return launch.error();
}

}  // namespace

template <class T>
int knn_cuda(const Cloud<T>& points, const Cloud<T>& queries, const Mask& mask, int64_t* out, int64_t batch,
             int64_t neighbors, CudaRun& run) {
  return run_search(ByCoords<T>{points, queries}, mask, out, batch, neighbors, run);
}

template <class T>
int knn_by_table_cuda(const Cloud<int64_t>& points, const Cloud<int64_t>& queries, const DistanceTable<T>& table,
                      const Mask& mask, int64_t* out, int64_t batch, int64_t neighbors, CudaRun& run) {
  return run_search(ByTable<T>{points, queries, table.values + table.size / 2}, mask, out, batch, neighbors, run);
}

#define VAMOH_INSTANTIATE(T)                                                                                         \
  template int knn_cuda(const Cloud<T>&, const Cloud<T>&, const Mask&, int64_t*, int64_t, int64_t, CudaRun&);        \
  template int knn_by_table_cuda(const Cloud<int64_t>&, const Cloud<int64_t>&, const DistanceTable<T>&, const Mask&, \
                                 int64_t*, int64_t, int64_t, CudaRun&);
VAMOH_INSTANTIATE(float)
VAMOH_INSTANTIATE(double)
#undef VAMOH_INSTANTIATE

}  // namespace vamoh
