#include "../farthest_point_sample.h"
#include "distance.cuh"
#include "launch.cuh"

namespace vamoh {

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kDimsPerTest = 16;  // after so many a distance that is no longer the nearest is given up

// The index of the largest value of a block, the lowest on ties.
template <class T>
__device__ int64_t farthest(Entry<T> own) {
  __shared__ T values[kWarps];
  __shared__ int64_t indices[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  own.value = -own.value;
  own = smallest(own);
  if (lane == 0) values[warp] = own.value, indices[warp] = own.index;
  __syncthreads();
  Entry<T> best{values[0], indices[0]};
  for (int w = 1; w < kWarps; ++w)
    if (values[w] < best.value || (values[w] == best.value && indices[w] < best.index)) best = {values[w], indices[w]};
  __syncthreads();
  return best.index;
}

// Squared distance between points i and j of function b, or a part of it that is `near` or more.
template <class T>
struct ByCoords {
  using Value = T;
  Cloud<T> cloud;
  __device__ T operator()(int64_t b, int64_t i, int64_t j, T near) const {
    const int64_t dims = cloud.dims;
    const T* const coords = cloud.values + b * cloud.stride;
    const T *const point = coords + i * dims, *const query = coords + j * dims;
    T sum = 0;
    int64_t d = 0;
    while (d < dims && sum < near) {
      const int64_t stop = d + kDimsPerTest < dims ? d + kDimsPerTest : dims;
      for (; d < stop; ++d) sum = add_square(sum, point[d], query[d]);
    }
    return sum;
  }
};

template <class T>
struct ByTable {
  using Value = T;
  Cloud<int64_t> cells;
  const T* center;
  __device__ T operator()(int64_t b, int64_t i, int64_t j, T) const {
    const int64_t* const of = cells.values + b * cells.stride;
    return center[of[i] - of[j]];
  }
};

// One block per function. nearest [B, N]: squared distance to the nearest point taken; -1: cannot be taken.
template <class Distance, class T = typename Distance::Value>
__global__ void __launch_bounds__(kThreads, 1)
    sample(Distance distance, Mask candidate, T* nearest, int64_t* out, int64_t points, int64_t samples) {
  __shared__ int64_t ranks[kThreads + 1];
  const int64_t b = blockIdx.x;
  nearest += b * points;
  out += b * samples;
  const bool* const mask = candidate.values ? candidate.values + b * candidate.stride : nullptr;

  // Every thread counts the candidates of a stretch of points; their sums say where its candidates come in order.
  const int64_t stretch = (points + kThreads - 1) / kThreads;
  const int64_t begin = threadIdx.x * stretch, end = begin + stretch < points ? begin + stretch : points;
  int64_t count = 0;
  for (int64_t i = begin; i < end; ++i) count += !mask || mask[i];
  ranks[threadIdx.x + 1] = count;
  __syncthreads();
  if (threadIdx.x == 0) {
    ranks[0] = 0;
    for (int t = 0; t < kThreads; ++t) ranks[t + 1] += ranks[t];
  }
  __syncthreads();
  const int64_t candidates = ranks[kThreads];
  if (candidates <= samples) {
    int64_t rank = ranks[threadIdx.x];
    for (int64_t i = begin; i < end; ++i)
      if (!mask || mask[i]) out[rank++] = i;
    for (int64_t i = candidates + threadIdx.x; i < samples; i += kThreads) out[i] = -1;
    return;
  }

  int64_t taken = 0;
  for (int64_t step = 0; step < samples; ++step) {
    Entry<T> best{T(-1), points};
    for (int64_t i = threadIdx.x; i < points; i += kThreads) {
      T near;
      if (step == 0) {
        near = !mask || mask[i] ? kInfinity<T> : T(-1);
      } else if (i == taken) {
        near = T(-1);
      } else {
        near = nearest[i];
        const T own = distance(b, i, taken, near);
        if (own < near) near = own;
      }
      nearest[i] = near;
      if (near > best.value) best = {near, i};
    }
    taken = farthest(best);
    if (threadIdx.x == 0) out[step] = taken;
  }
}

template <class Distance>
int run_sample(const Distance& distance, const Mask& mask, int64_t* out, int64_t batch, int64_t points, int64_t samples,
               CudaRun& run) {
  Launcher launch(run);
  auto* const nearest = launch.take<typename Distance::Value>(batch * points);
  if (launch.asked()) return 0;
  launch(sample<Distance>, batch, kThreads, distance, mask, nearest, out, points, samples);
  return launch.error();
}

}  // namespace

template <class T>
int farthest_point_sample_cuda(const Cloud<T>& cloud, const Mask& mask, int64_t* out, int64_t batch, int64_t samples,
                               CudaRun& run) {
  return run_sample(ByCoords<T>{cloud}, mask, out, batch, cloud.count, samples, run);
}

template <class T>
int farthest_point_sample_by_table_cuda(const Cloud<int64_t>& cells, const DistanceTable<T>& table, const Mask& mask,
                                        int64_t* out, int64_t batch, int64_t samples, CudaRun& run) {
  return run_sample(ByTable<T>{cells, table.values + table.size / 2}, mask, out, batch, cells.count, samples, run);
}

#define VAMOH_INSTANTIATE(T)                                                                                    \
  template int farthest_point_sample_cuda(const Cloud<T>&, const Mask&, int64_t*, int64_t, int64_t, CudaRun&);  \
  template int farthest_point_sample_by_table_cuda(const Cloud<int64_t>&, const DistanceTable<T>&, const Mask&, \
                                                   int64_t*, int64_t, int64_t, CudaRun&);
VAMOH_INSTANTIATE(float)
VAMOH_INSTANTIATE(double)
#undef VAMOH_INSTANTIATE

}  // namespace vamoh
