// Random Fourier features: out[n] = [cos 2πFx_n, sin 2πFx_n].
//
//   coords       [N, D]   float32, contiguous
//   frequencies  [F, D]   contiguous, in cycles per unit of coordinate
//   out          [N, 2F]  contiguous
//
// The cycles are summed before anything is rounded to an angle, so opposite points get the same cosines and opposite
// sines to the bit.
#pragma once

#include <cstdint>

#include "isa.h"

namespace vamoh {

void fourier_features(const float* coords, const float* frequencies, float* out, int64_t points, int64_t dims,
                      int64_t count, int threads, Isa isa);

}  // namespace vamoh
