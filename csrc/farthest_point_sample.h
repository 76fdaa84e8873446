// Greedy farthest-point sampling.
//
//   cloud   [B, N, D]  float32 or float64
//   mask    [B, N]     candidates
//   out     [B, M]     int64 indices into N
//
// Starts at the first candidate, then takes the candidate with the largest squared distance to those taken, the lowest
// index on ties, never one twice. A function with at most M candidates gets them all in index order, then -1. A NaN
// distance counts as no distance: it brings no candidate nearer.
//
// A squared distance is the sum over d = 0 .. D-1 in that order, each product and sum rounded: the same bits for every
// instruction set and thread count, on CUDA devices, and for the plain-torch reference.
#pragma once

#include <cstdint>

#include "cloud.h"
#include "cuda.h"
#include "isa.h"

namespace vamoh {

template <class T>
void farthest_point_sample(const Cloud<T>& cloud, const Mask& mask, int64_t* out, int64_t batch, int64_t samples,
                           int threads, Isa isa);

template <class T>
int farthest_point_sample_cuda(const Cloud<T>& cloud, const Mask& mask, int64_t* out, int64_t batch, int64_t samples,
                               CudaRun& run);

// The same for cells [B, N] of a lattice.
template <class T>
void farthest_point_sample_by_table(const Cloud<int64_t>& cells, const DistanceTable<T>& table, const Mask& mask,
                                    int64_t* out, int64_t batch, int64_t samples, int threads, Isa isa);

template <class T>
int farthest_point_sample_by_table_cuda(const Cloud<int64_t>& cells, const DistanceTable<T>& table, const Mask& mask,
                                        int64_t* out, int64_t batch, int64_t samples, CudaRun& run);

}  // namespace vamoh
