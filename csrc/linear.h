// Linear layers, one per group: out[g, m] = weight[g] x[g, m] + bias[g], and the gradients.
//
//   x       [G, M, I]   float32, any strides, 0 where groups share it
//   weight  [G, O, I]   contiguous
//   bias    [G, O]      contiguous, or null
//   out     [G, M, O]   consecutive values side by side
//
// A weight matrix is read once (by 512 rows m), where it lies: with few rows that is nearly all the time takes.
#pragma once

#include <cstdint>

#include "isa.h"

namespace vamoh {

// How many values lie from group to group, row to row and value to value.
struct Strides {
  int64_t group, row, value;
};

struct LinearSizes {
  int64_t groups, rows, in, out;
};

void linear(const float* x, Strides x_strides, const float* weight, const float* bias, float* out, Strides out_strides,
            LinearSizes sizes, int threads, Isa isa);

// grad_x [G, M, I], contiguous, from grad [G, M, O].
void linear_grad_x(const float* grad, Strides grad_strides, const float* weight, float* grad_x, LinearSizes sizes,
                   int threads, Isa isa);

// grad_weight [G, O, I] and grad_bias [G, O], contiguous; null: not wanted.
void linear_grad_weight(const float* grad, Strides grad_strides, const float* x, Strides x_strides, float* grad_weight,
                        float* grad_bias, LinearSizes sizes, int threads, Isa isa);

}  // namespace vamoh
