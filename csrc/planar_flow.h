// Log-density of samples under a planar flow with LeakyReLU layers over a diagonal Gaussian, and its gradients.
//
//   u, w       [T, Z]  layer t: f(v) = v + u_t leaky(w_t v + b_t), applied in order 0..T-1 from the base to z;
//                      u is constrained already
//   gain       [T]     1 + w_t u_t > 0, given because the sum would lose it to rounding
//   b          [T]
//   loc, log_scale [Z] mean and log standard deviation of the base
//
// All float32 and contiguous. With G = w u^T the inverse needs, for a sample z, no state of width Z:
//   linear_t = w_t z + b_t - sum_{s > t} G_ts c_s,  c_t = linear_t leak_t / stretch_t,  base = z - u^T c
// where stretch = 1 - leak + leak gain. Only T + Z values per sample live at once, a few hundred samples per thread.
//
// Results are the same for any number of threads: sums run over fixed chunks of samples, added in order.
#pragma once

#include <cstdint>

#include "isa.h"

namespace vamoh {

struct PlanarFlow {
  const float *u, *gain, *w, *b, *loc, *log_scale;
  int64_t layers, latent;
  float slope;  // of the leak, > 0
};

// Where the gradients go, shaped as the parameters. A null loc: they are not wanted, and the others are not looked
// at. (u is null where there are no layers.)
struct PlanarFlowGradient {
  float *u, *gain, *w, *b, *loc, *log_scale;
};

// Log-density `out` [S] of z [S, Z].
void planar_flow_log_prob(const PlanarFlow& flow, const float* z, float* out, int64_t samples, int threads, Isa isa);

// Gradients of sum_s grad_s log p(z_s): grad_z [S, Z], or null, and those of the parameters.
void planar_flow_log_prob_backward(const PlanarFlow& flow, const float* z, const float* grad, float* grad_z,
                                   const PlanarFlowGradient& gradient, int64_t samples, int threads, Isa isa);

// Samples z [S, Z] made of standard normal noise [S, Z], and their log-density log_p [S].
void planar_flow_sample(const PlanarFlow& flow, const float* noise, float* z, float* log_p, int64_t samples,
                        int threads, Isa isa);

// value [B] = mean over S >= 1 samples of log p(mean_b + std_b noise_sb), and its gradients for every b.
//
//   mean, std   [B, Z]
//   noise       [S, B, Z], or null: counter noise of `seed`, see counter_noise
//   grad_mean, grad_std [B, Z]: both or none
//   gradient    of the parameters, each with a leading B
void planar_flow_expected_log_prob(const PlanarFlow& flow, const float* mean, const float* std, const float* noise,
                                   uint64_t seed, float* value, float* grad_mean, float* grad_std,
                                   const PlanarFlowGradient& gradient, int64_t batch, int64_t samples, int threads,
                                   Isa isa);

// The noise that planar_flow_expected_log_prob makes of a seed, [S, B, Z]; vamoh/ops/_noise.py defines it.
void counter_noise(uint64_t seed, float* out, int64_t samples, int64_t batch, int64_t latent, Isa isa);

}  // namespace vamoh
