#include "point_conv.h"

#include <cmath>
#include <memory>

#include "check.h"

namespace {

bool run(vamoh::Isa isa, int threads, const vamoh::PointConvSizes& s, float slope) {
  const int64_t lead = s.shared ? 1 : s.batch, places = lead * s.centroids * s.neighbors;
  const int64_t features = s.batch * s.points * s.channels, weights = places * s.width;
  const int64_t linear = s.outputs * s.channels * s.width, outputs = s.batch * s.centroids * s.outputs;
  const auto filled = [](int64_t count) {
    std::unique_ptr<float[]> values(new float[count]);
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(i % 7) - 3;
    return values;
  };
  const auto x = filled(features), w = filled(weights), l = filled(linear);
  const auto bias = filled(s.outputs), offset = filled(s.channels);
  const auto grad = filled(outputs);
  std::unique_ptr<int64_t[]> neighbors(new int64_t[places]);
  for (int64_t i = 0; i < places; ++i) neighbors[i] = i * i % s.points;
  std::unique_ptr<float[]> out(new float[outputs]), by_x(new float[features]),
      by_w(new float[weights]), by_l(new float[linear]), by_bias(new float[s.outputs]);
  const vamoh::PointConvInputs in{x.get(), neighbors.get(), w.get(), l.get(), bias.get()};
  bool good = true;
  const auto check = [&](const float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) good &= std::isfinite(values[i]);
  };
  vamoh::point_conv(in, out.get(), s, slope, threads, isa);
  vamoh::point_conv_backward(grad.get(), out.get(), in, {by_x.get(), by_w.get(), by_l.get(), by_bias.get()}, s, slope,
                             threads, isa);
  vamoh::point_conv_backward(grad.get(), out.get(), in, {nullptr, by_w.get(), by_l.get(), by_bias.get()}, s, slope,
                             threads, isa);
  check(out.get(), outputs), check(by_x.get(), features), check(by_w.get(), weights), check(by_l.get(), linear);
  const vamoh::DifferenceSizes d{s.batch, s.points, s.centroids, s.neighbors, s.channels, false, s.shared};
  std::unique_ptr<float[]> pairs(new float[s.batch * s.centroids * s.neighbors * s.channels]),
      by_channel(new float[s.channels]);
  vamoh::neighbor_difference(x.get(), neighbors.get(), neighbors.get(), offset.get(), pairs.get(), d, threads, isa);
  vamoh::neighbor_difference_backward(pairs.get(), neighbors.get(), neighbors.get(), by_x.get(), by_channel.get(), d,
                                      threads, isa);
  check(by_x.get(), features), check(by_channel.get(), s.channels);
  return good;
}

const Register point_conv([](vamoh::Isa isa, int threads) {
  bool good = true;
  for (bool shared : {true, false}) {
    good &= run(isa, threads, {2, 5, 2, 3, 4, 3, 4, shared}, 1);
    good &= run(isa, threads, {3, 11, 5, 199, 10, 2, 17, shared}, 0.2f);
    good &= run(isa, threads, {2, 11, 20, 300, 3, 16, 70, shared}, 0);
  }
  return good;
});

}  // namespace
