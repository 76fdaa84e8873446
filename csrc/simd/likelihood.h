// What likelihood.inl must know of one channel of one component.
#pragma once

#include <cmath>
#include <cstdint>

#include "../inr_mixture.h"

namespace vamoh {

struct Channel {
  PointLikelihood::Kind kind;
  bool open_ends;
  float half_bin, epsilon, scale;
  float inside;     // 1 - e^-w with w = 2 half_bin / scale, the width of a bin
  float inside_by;  // scale times the derivative of its logarithm to the scale
  float width, q;   // half_bin / scale, e^-width
  bool usual;       // closed ends, and q and epsilon so far from 0 that no product in score_usual underflows
};

inline Channel channel_of(const PointLikelihood& likelihood, int64_t index) {
  Channel channel{likelihood.kind,
                  likelihood.open_ends,
                  static_cast<float>(likelihood.half_bin),
                  static_cast<float>(likelihood.epsilon),
                  1,
                  0,
                  0,
                  0,
                  0,
                  false};
  if (likelihood.kind != PointLikelihood::logistic) return channel;
  channel.scale = likelihood.scale[index];
  const double width = 2 * likelihood.half_bin / channel.scale;
  channel.inside = static_cast<float>(-std::expm1(-width));
  channel.inside_by = static_cast<float>(-width / std::expm1(width));
  channel.width = static_cast<float>(width / 2);
  channel.q = static_cast<float>(std::exp(-width / 2));
  channel.usual = !likelihood.open_ends && channel.q * channel.q * channel.epsilon > 1e-30f;
  return channel;
}

}  // namespace vamoh
