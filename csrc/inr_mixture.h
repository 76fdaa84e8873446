// A mixture of coordinate networks (INRs): K networks per function, their parameters packed in rows of theta.
//
//   theta     [B, K, P]  strides between functions and components as given, P contiguous: all weights layer by layer,
//                        row-major [out, in], then all biases
//   features  [N, E]     encoded coordinates; functions are features_stride values apart, 0 if they share one
//   mirror    [N]        or null. Point mirror[n] is the mirror point of n: features[mirror[n]] = (even, -odd) where
//                        features[n] = (even, odd) are halves of a row; -1 where there is none. mirror[mirror[n]] = n.
//                        Only where features are shared and E is even.
//   mask      [B, N]     or null. Points of each function that count: nothing is read or computed at others.
//   widths    [depth + 1]  E, hidden widths, C
//
// float32. Every result is the same for any number of threads. Scratch memory does not grow with N, except for indices
// and a copy of shared features, and grows with threads.
#pragma once

#include <cstdint>

#include "isa.h"

namespace vamoh {

struct InrMixture {
  const float* theta;
  int64_t theta_batch_stride, theta_component_stride;
  const float* features;
  int64_t features_stride;
  const int64_t* mirror;
  const bool* mask;  // for the likelihoods only
  const int64_t* widths;
  int64_t depth;
  int64_t batch, components, points;
  bool sine;  // hidden activation sin(omega x), else LeakyReLU
  float slope, omega;
};

// Parameters of vamoh/ops/likelihood.py.
struct PointLikelihood {
  enum Kind { logistic, bernoulli, continuous_bernoulli } kind;
  double half_bin, epsilon;
  bool open_ends;
  const float* scale;  // [K, C]; logistic only
};

// outputs [B, K, N, C].
void inr_mixture(const InrMixture& mixture, float* outputs, int threads, Isa isa);

// grad_theta, strides as theta, from grad_outputs [B, K, N, C].
void inr_mixture_backward(const InrMixture& mixture, const float* grad_outputs, float* grad_theta, int threads,
                          Isa isa);

// log_p [B, K, N] of values [B, N, C], summed over channels; 0 outside the mask.
void inr_mixture_log_likelihood(const InrMixture& mixture, const PointLikelihood& likelihood, const float* values,
                                float* log_p, int threads, Isa isa);

// value [B] = sum over k and n of weights * log_p with weights [B, K, N]; log_p [B, K, N]; gradients of value[b] to
// theta (strides as theta) and, for the logistic, to scale [B, K, C] (else zero). One pass, no activation kept.
void inr_mixture_expected_log_likelihood(const InrMixture& mixture, const PointLikelihood& likelihood,
                                         const float* values, const float* weights, float* value, float* log_p,
                                         float* grad_theta, float* grad_scale, int threads, Isa isa);

// mean [B, N, C] = sum over k of exp(log_pi) * mean of component k, and mean_map [B, N, C]: that of the component with
// the largest log_pi (the first of equals). log_pi [B, K, N], or [B, K, 1] if uniform.
void inr_mixture_mean(const InrMixture& mixture, const PointLikelihood& likelihood, const float* log_pi, bool uniform,
                      float* mean, float* mean_map, int threads, Isa isa);

}  // namespace vamoh
