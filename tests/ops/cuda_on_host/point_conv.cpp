#include "point_conv.h"

#include <cmath>
#include <random>

#include "check.h"

namespace {

using Values = std::unique_ptr<float[]>;
using Doubles = std::vector<double>;

bool close(const float* got, const Doubles& expected) {
  double error = 0, size = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += (got[i] - expected[i]) * (got[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  return std::sqrt(error) <= 1e-6 * std::sqrt(size);
}

class Draw {
 public:
  explicit Draw(unsigned seed) : bits_(seed) {}

  Values normal(int64_t count) {
    Values all = memory<float>(count);
    std::normal_distribution<float> value;
    for (int64_t i = 0; i < count; ++i) all[i] = value(bits_);
    return all;
  }

  std::unique_ptr<int64_t[]> index(int64_t count, int64_t below) {
    auto all = memory<int64_t>(count);
    for (int64_t i = 0; i < count; ++i) all[i] = static_cast<int64_t>(bits_() % below);
    return all;
  }

 private:
  std::mt19937 bits_;
};

bool run_conv(const vamoh::PointConvSizes& s, float slope) {
  const int64_t lead = s.shared ? 1 : s.batch, places = lead * s.centroids * s.neighbors;
  const int64_t rows = s.batch * s.centroids, inputs = s.channels * s.width;
  const int64_t features = s.batch * s.points * s.channels;
  Draw draw(1);
  const auto x = draw.normal(features), w = draw.normal(places * s.width), l = draw.normal(s.outputs * inputs);
  const auto bias = draw.normal(s.outputs), grad = draw.normal(rows * s.outputs);
  const auto neighbors = draw.index(places, s.points);
  const auto out = memory<float>(rows * s.outputs), by_x = memory<float>(features),
             by_w = memory<float>(places * s.width), by_l = memory<float>(s.outputs * inputs),
             by_bias = memory<float>(s.outputs), again = memory<float>(places * s.width);
  const vamoh::PointConvInputs in{x.get(), neighbors.get(), w.get(), l.get(), bias.get()};
  bool good = run_cuda([&](vamoh::CudaRun& run) { return vamoh::point_conv_cuda(in, out.get(), s, slope, run); });

  Doubles expected(rows * s.outputs), to_x(features), to_w(places * s.width), to_l(s.outputs * inputs),
      to_bias(s.outputs);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (s.shared ? r % s.centroids : r) * s.neighbors, base = r / s.centroids * s.points;
    Doubles contracted(inputs), d(inputs);
    for (int64_t n = at; n < at + s.neighbors; ++n)
      for (int64_t k = 0; k < inputs; ++k)
        contracted[k] += double{x[(base + neighbors[n]) * s.channels + k / s.width]} * w[n * s.width + k % s.width];
    for (int64_t o = 0; o < s.outputs; ++o) {
      double value = bias[o];
      for (int64_t k = 0; k < inputs; ++k) value += contracted[k] * l[o * inputs + k];
      expected[r * s.outputs + o] = value > 0 ? value : value * slope;
      // The sign that the kernel saw: at a kink both are right.
      const double g = grad[r * s.outputs + o] * (out[r * s.outputs + o] > 0 ? 1 : slope);
      to_bias[o] += g;
      for (int64_t k = 0; k < inputs; ++k) to_l[o * inputs + k] += g * contracted[k], d[k] += g * l[o * inputs + k];
    }
    for (int64_t n = at; n < at + s.neighbors; ++n)
      for (int64_t k = 0; k < inputs; ++k) {
        const int64_t feature = (base + neighbors[n]) * s.channels + k / s.width, weight = n * s.width + k % s.width;
        to_w[weight] += d[k] * x[feature], to_x[feature] += d[k] * w[weight];
      }
  }
  good = good && close(out.get(), expected);
  for (float* wanted : {by_x.get(), static_cast<float*>(nullptr)})
    good = good && run_cuda([&](vamoh::CudaRun& run) {
             float* const weights = wanted ? by_w.get() : again.get();
             return vamoh::point_conv_backward_cuda(grad.get(), out.get(), in,
                                                    {wanted, weights, by_l.get(), by_bias.get()}, s, slope, run);
           });
  return good && close(by_x.get(), to_x) && close(by_w.get(), to_w) && close(by_l.get(), to_l) &&
         close(by_bias.get(), to_bias) && !memcmp(again.get(), by_w.get(), sizeof(float) * places * s.width);
}

bool run_difference(const vamoh::DifferenceSizes& s) {
  const int64_t rows = s.batch * s.centroids, values = (s.table_shared ? 1 : s.batch) * s.points * s.width;
  const int64_t lead = (s.index_shared ? 1 : s.batch) * s.centroids, results = rows * s.neighbors * s.width;
  Draw draw(1);
  const auto table = draw.normal(values), bias = draw.normal(s.width), grad = draw.normal(results);
  const auto neighbors = draw.index(lead * s.neighbors, s.points), centroids = draw.index(lead, s.points);
  const auto out = memory<float>(results), by_table = memory<float>(values), by_bias = memory<float>(s.width);
  bool good = run_cuda([&](vamoh::CudaRun& run) {
    return vamoh::neighbor_difference_cuda(table.get(), neighbors.get(), centroids.get(), bias.get(), out.get(), s,
                                           run);
  });
  good = good && run_cuda([&](vamoh::CudaRun& run) {
           return vamoh::neighbor_difference_backward_cuda(grad.get(), neighbors.get(), centroids.get(), by_table.get(),
                                                           by_bias.get(), s, run);
         });
  Doubles expected(results), to_table(values), to_bias(s.width);
  for (int64_t i = 0; i < results; ++i) {
    const int64_t q = i % s.width, pair = i / s.width, row = pair / s.neighbors, b = row / s.centroids;
    const int64_t base = s.table_shared ? 0 : b * s.points;
    const int64_t neighbor = neighbors[s.index_shared ? pair % (s.centroids * s.neighbors) : pair];
    const int64_t near = (base + neighbor) * s.width + q;
    const int64_t own = (base + centroids[s.index_shared ? row % s.centroids : row]) * s.width + q;
    expected[i] = double{table[near]} - table[own] + bias[q];
    to_table[near] += grad[i], to_table[own] -= grad[i], to_bias[q] += grad[i];
  }
  return good && close(out.get(), expected) && close(by_table.get(), to_table) && close(by_bias.get(), to_bias);
}

const Register point_conv([](bool slow) {
  for (bool shared : {true, false}) {
    if (!run_conv({1, 1, 1, 1, 1, 1, 1, shared}, 1) || !run_conv({3, 11, 10, 5, 19, 2, 17, shared}, 0.2f) ||
        !run_conv({2, 300, 3, 150, 3, 16, 70, shared}, 0) || !run_conv({2, 5, 4, 0, 3, 3, 4, shared}, 1) ||
        !run_conv({2, 5, 4, 3, 0, 3, 4, shared}, 1))
      return false;
    // More functions than the workspace holds gradients of at once.
    if (slow && !run_conv({2, 3, 64, 1100, 1, 32, 3, shared}, 0.5f)) return false;
    for (bool table_shared : {true, false})
      if (!run_difference({3, 300, 90, 5, 3, table_shared, shared}) ||
          !run_difference({2, 5, 0, 3, 3, table_shared, shared}))
        return false;
  }
  return true;
});

}  // namespace
