// Exact nearest neighbours.
//
//   points   [B, N, D]     float32 or float64
//   queries  [B, M, D]     same type
//   mask     [B, N]        candidates
//   out      [B, M, S]     int64 indices into N, sorted by (squared distance, index)
//
// Every function has at least S candidates. NaN and overflowing distances count as equal and largest. Distances are
// summed as in farthest_point_sample.h.
#pragma once

#include <cstdint>

#include "cloud.h"
#include "cuda.h"
#include "isa.h"

namespace vamoh {

template <class T>
void knn(const Cloud<T>& points, const Cloud<T>& queries, const Mask& mask, int64_t* out, int64_t batch,
         int64_t neighbors, int threads, Isa isa);

template <class T>
int knn_cuda(const Cloud<T>& points, const Cloud<T>& queries, const Mask& mask, int64_t* out, int64_t batch,
             int64_t neighbors, CudaRun& run);

// The same for cells of a lattice: points [B, N] and queries [B, M]. `order` holds the positions in the table of its
// `length` smallest distances, none NaN, in their order; or length is 0: then every point is compared.
template <class T>
void knn_by_table(const Cloud<int64_t>& points, const Cloud<int64_t>& queries, const DistanceTable<T>& table,
                  const int32_t* order, int64_t length, const Mask& mask, int64_t* out, int64_t batch,
                  int64_t neighbors, int threads, Isa isa);

template <class T>
int knn_by_table_cuda(const Cloud<int64_t>& points, const Cloud<int64_t>& queries, const DistanceTable<T>& table,
                      const Mask& mask, int64_t* out, int64_t batch, int64_t neighbors, CudaRun& run);

}  // namespace vamoh
