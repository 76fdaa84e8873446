// Greedy farthest-point sampling.
//
//   coords  [B, N, D]  float32 or float64; consecutive functions are coords_step values apart, 0 if they share one
//   mask    [B, N]     candidates, or null: all; rows are mask_step apart, 0 if they share one
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

#include "cuda.h"
#include "isa.h"

namespace vamoh {

template <class T>
void farthest_point_sample(const T* coords, int64_t coords_step, const bool* mask, int64_t mask_step, int64_t* out,
                           int64_t batch, int64_t points, int64_t dims, int64_t samples, int threads, Isa isa);

template <class T>
int farthest_point_sample_cuda(const T* coords, int64_t coords_step, const bool* mask, int64_t mask_step, int64_t* out,
                               int64_t batch, int64_t points, int64_t dims, int64_t samples, CudaRun& run);

// The same for points on a lattice: coords [B, N] are places 0 .. table_size / 2, and the squared distance of a point p
// to a point q taken is table[table_size / 2 + p - q]. table_size is odd and below 2^31.
template <class T>
void farthest_point_sample_by_table(const int64_t* coords, int64_t coords_step, const T* table, int64_t table_size,
                                    const bool* mask, int64_t mask_step, int64_t* out, int64_t batch, int64_t points,
                                    int64_t samples, int threads, Isa isa);

template <class T>
int farthest_point_sample_by_table_cuda(const int64_t* coords, int64_t coords_step, const T* table, int64_t table_size,
                                        const bool* mask, int64_t mask_step, int64_t* out, int64_t batch,
                                        int64_t points, int64_t samples, CudaRun& run);

}  // namespace vamoh
