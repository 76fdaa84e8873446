// The networks that say which component explains a point, and the divergence between two of them. float32, row-major,
// points last.
//
// Sizes: B functions, N points, E encoded coordinates, C channels, K components. widths[0] = H is the first layer's,
// the last width is K.
//
//   log_p = log_softmax(bound(h)),  h <- weights[l] leaky(h) + biases[l] for l < layers,
//   first h = coords + shift + value_weight values
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"

namespace vamoh {

struct GatingNet {
  const float* coords;  // [B, H, N], or [H, N] if `shared`
  bool shared;
  const float* shift;       // [B, H]
  const float* values;      // [B, N, C], or null with C = 0
  const float* parameters;  // value_weight [H, C], then weights[l] [widths[l + 1], widths[l]] and biases[l] for every l
  std::vector<int64_t> widths;
  int64_t batch, count, channels;
  float slope;   // of LeakyReLU, in [0, 1]
  bool bounded;  // the bound is tanh, else there is none
};

struct GatingGrads {
  float* coords;      // as GatingNet's; summed over B if `shared`
  float* shift;       // [B, H]
  float* values;      // [B, N, C], or null: not wanted
  float* parameters;  // as GatingNet's
};

// log_p [B, K, N]
void gating(const GatingNet& net, float* log_p, int threads, Isa isa);

// From the gradient of log_p and log_p itself. Sums are taken in an order that does not depend on `threads`.
void gating_backward(const GatingNet& net, const float* log_p, const float* grad, const GatingGrads& grads, int threads,
                     Isa isa);

// q = exp(log_q) where mask [B, N] (null: everywhere), else 0; kl [B] = sum over K, N of q (log_q - log_p), where q >
// 0. log_q, q [B, K, N]; log_p the same, or [B, K, 1] if `uniform`; rows of mask are mask_stride apart, 0 if shared.
void categorical_kl(const float* log_q, const float* log_p, bool uniform, const bool* mask, int64_t mask_stride,
                    float* q, float* kl, int64_t batch, int64_t components, int64_t count, int threads, Isa isa);

// Gradients [B, K, N] of both log-probabilities from those of q [B, K, N] and kl [B].
void categorical_kl_backward(const float* grad_q, const float* grad_kl, const float* q, const float* log_q,
                             const float* log_p, bool uniform, float* grad_log_q, float* grad_log_p, int64_t batch,
                             int64_t components, int64_t count, int threads, Isa isa);

}  // namespace vamoh
