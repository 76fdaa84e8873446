// A tile of a matrix product whose factors are made by functions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vamoh {

constexpr int kTile = 64;  // rows and columns of a block
constexpr int kDepth = 16;
constexpr int kSide = 16;  // threads along either
constexpr int kOwn = kTile / kSide;
constexpr int kProductThreads = kSide * kSide;
constexpr int kProductBlocks = 2;  // at once on a multiprocessor: leaves registers enough

// Puts get(row, depth) into tile[depth][row]; Along: neighbouring threads go along the depth, else along the rows.
template <bool Along, class Get>
__device__ inline void fill(float (*tile)[kTile + 1], const Get& get) {
#pragma unroll
  for (int n = 0; n < kTile * kDepth / kProductThreads; ++n) {
    const int i = threadIdx.x + n * kProductThreads;
    const int row = Along ? i / kDepth : i % kTile, depth = Along ? i % kDepth : i / kTile;
    tile[depth][row] = get(row, depth);
  }
}

// store(i, j, sum over k in [k0, k1) of left(i, k) * right(j, k)) for i and j below kTile. left and right give 0 for
// rows that do not exist; they are not asked for k beyond k1. Sums run in the order of k.
template <bool LeftAlong, bool RightAlong, class Left, class Right, class Store>
__device__ inline void product(int64_t k0, int64_t k1, const Left& left, const Right& right, const Store& store) {
  __shared__ float left_tile[kDepth][kTile + 1], right_tile[kDepth][kTile + 1];
  const int row = threadIdx.x / kSide, column = threadIdx.x % kSide;
  float sums[kOwn][kOwn] = {};
  for (int64_t k = k0; k < k1; k += kDepth) {
    const int depth = k1 - k < kDepth ? static_cast<int>(k1 - k) : kDepth;
    fill<LeftAlong>(left_tile, [&](int i, int d) { return d < depth ? left(i, k + d) : 0.0f; });
    fill<RightAlong>(right_tile, [&](int j, int d) { return d < depth ? right(j, k + d) : 0.0f; });
    __syncthreads();
    for (int d = 0; d < depth; ++d) {
      float own[kOwn];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) own[j] = right_tile[d][column + j * kSide];
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
#pragma unroll
        for (int j = 0; j < kOwn; ++j) sums[i][j] += left_tile[d][row + i * kSide] * own[j];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int j = 0; j < kOwn; ++j) store(row + i * kSide, column + j * kSide, sums[i][j]);
}

}  // namespace vamoh
