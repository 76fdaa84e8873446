// Exact nearest neighbours.
//
//   points   [B, N, D]     float32 or float64; consecutive functions are points_step values apart, 0 if shared
//   queries  [B, M, D]     same type, queries_step apart
//   mask     [B, N]        candidates, or null: all; rows are mask_step apart, 0 if shared
//   out      [B, M, S]     int64 indices into N, sorted by (squared distance, index)
//
// Every function has at least S candidates. NaN and overflowing distances count as equal and largest. Distances are
// summed as in farthest_point_sample.h.
#pragma once

#include <cstdint>

#include "cuda.h"
#include "isa.h"

namespace vamoh {

template <class T>
void knn(const T* points, int64_t points_step, const T* queries, int64_t queries_step, const bool* mask,
         int64_t mask_step, int64_t* out, int64_t batch, int64_t count, int64_t num_queries, int64_t dims,
         int64_t neighbors, int threads, Isa isa);

template <class T>
int knn_cuda(const T* points, int64_t points_step, const T* queries, int64_t queries_step, const bool* mask,
             int64_t mask_step, int64_t* out, int64_t batch, int64_t count, int64_t num_queries, int64_t dims,
             int64_t neighbors, CudaRun& run);

// The same for points on a lattice: points [B, N] and queries [B, M] are places 0 .. table_size / 2, and the squared
// distance of a point p to a query q is table[table_size / 2 + p - q]. table_size is odd and below 2^31. `order` holds
// the positions in the table of its `length` smallest distances, none NaN, in their order; or length is 0: then every
// point is looked at.
template <class T>
void knn_by_table(const int64_t* points, int64_t points_step, const int64_t* queries, int64_t queries_step,
                  const T* table, int64_t table_size, const int32_t* order, int64_t length, const bool* mask,
                  int64_t mask_step, int64_t* out, int64_t batch, int64_t count, int64_t num_queries, int64_t neighbors,
                  int threads, Isa isa);

template <class T>
int knn_by_table_cuda(const int64_t* points, int64_t points_step, const int64_t* queries, int64_t queries_step,
                      const T* table, int64_t table_size, const bool* mask, int64_t mask_step, int64_t* out,
                      int64_t batch, int64_t count, int64_t num_queries, int64_t neighbors, CudaRun& run);

}  // namespace vamoh
