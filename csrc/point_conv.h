// PointConv, average pooling over neighbours, and their gradients.
//
//   features       [B, N, C]     float32, contiguous, as everything here
//   neighbors      [B, M, S]     int64 indices into N, or [1, M, S] where shared
//   weights        [B, M, S, Q]  or [1, M, S, Q] where shared
//   linear_weight  [O, C * Q]    channel-major
//   linear_bias    [O]
//   out            [B, M, O]     leaky(linear(flatten_{c,q} sum_s features[b, neighbors[m, s], c] weights[m, s, q]))
//
// The contracted features are made a tile at a time and never stored; the gradients make them again. A gradient of
// features is a sum over the places that read a point, in their order. Scratch: linear_weight repacked, and 32 MiB; on
// CUDA lists of those places, partial sums of the linear gradient, and 16 MiB (or one function) of gradients of
// contracted features.
#pragma once

#include <cstdint>

#include "cuda.h"
#include "isa.h"

namespace vamoh {

struct PointConvSizes {
  int64_t batch, points, channels, centroids, neighbors, width, outputs;
  bool shared;
};

struct PointConvInputs {
  const float* features;
  const int64_t* neighbors;
  const float* weights;
  const float* linear_weight;
  const float* linear_bias;
};

// Gradients, each of the shape of its input; features may be null: not wanted.
struct PointConvGradients {
  float* features;
  float* weights;
  float* linear_weight;
  float* linear_bias;
};

// slope: of the LeakyReLU on the output; 1: none.
void point_conv(const PointConvInputs& inputs, float* out, const PointConvSizes& sizes, float slope, int threads,
                Isa isa);
int point_conv_cuda(const PointConvInputs& inputs, float* out, const PointConvSizes& sizes, float slope, CudaRun& run);

// grad and out [B, M, O]; slope >= 0.
void point_conv_backward(const float* grad, const float* out, const PointConvInputs& inputs,
                         const PointConvGradients& gradients, const PointConvSizes& sizes, float slope, int threads,
                         Isa isa);
int point_conv_backward_cuda(const float* grad, const float* out, const PointConvInputs& inputs,
                             const PointConvGradients& gradients, const PointConvSizes& sizes, float slope,
                             CudaRun& run);

struct DifferenceSizes {
  int64_t batch, points, centroids, neighbors, width;
  bool table_shared, index_shared;
};

// out [B, M, S, Q] = table[neighbors] - table[centroids] + bias, from table [B, N, Q], neighbors [B, M, S], centroids
// [B, M] and bias [Q]. The table and the indices may each be shared, with batch 1.
void neighbor_difference(const float* table, const int64_t* neighbors, const int64_t* centroids, const float* bias,
                         float* out, const DifferenceSizes& sizes, int threads, Isa isa);
int neighbor_difference_cuda(const float* table, const int64_t* neighbors, const int64_t* centroids, const float* bias,
                             float* out, const DifferenceSizes& sizes, CudaRun& run);

// grad_table, of the shape of the table, and grad_bias [Q] from grad [B, M, S, Q].
void neighbor_difference_backward(const float* grad, const int64_t* neighbors, const int64_t* centroids,
                                  float* grad_table, float* grad_bias, const DifferenceSizes& sizes, int threads,
                                  Isa isa);
int neighbor_difference_backward_cuda(const float* grad, const int64_t* neighbors, const int64_t* centroids,
                                      float* grad_table, float* grad_bias, const DifferenceSizes& sizes, CudaRun& run);

}  // namespace vamoh
