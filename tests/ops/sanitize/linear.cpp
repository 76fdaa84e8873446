#include "linear.h"

#include <cmath>
#include <memory>

#include "check.h"

namespace {

bool run(vamoh::Isa isa, int threads, vamoh::LinearSizes s, bool shared) {
  const int64_t inputs = (shared ? 1 : s.groups) * s.rows * s.in, weights = s.groups * s.out * s.in;
  const int64_t outputs = s.groups * s.rows * s.out;
  const auto filled = [](int64_t count) {
    std::unique_ptr<float[]> values(new float[count]);
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(i % 7) - 3;
    return values;
  };
  const auto x = filled(inputs), weight = filled(weights), bias = filled(s.groups * s.out), grad = filled(outputs);
  std::unique_ptr<float[]> out(new float[outputs]), grad_x(new float[s.groups * s.rows * s.in]),
      grad_weight(new float[weights]), grad_bias(new float[s.groups * s.out]);
  const vamoh::Strides x_strides{shared ? 0 : s.rows * s.in, s.in, 1}, by_row{s.out, s.groups * s.out, 1};
  vamoh::linear(x.get(), x_strides, weight.get(), bias.get(), out.get(), by_row, s, threads, isa);
  vamoh::linear_grad_x(grad.get(), by_row, weight.get(), grad_x.get(), s, threads, isa);
  vamoh::linear_grad_weight(grad.get(), by_row, x.get(), x_strides, grad_weight.get(), grad_bias.get(), s, threads,
                            isa);
  bool good = true;
  for (int64_t i = 0; i < outputs; ++i) good &= std::isfinite(out[i]);
  for (int64_t i = 0; i < s.groups * s.rows * s.in; ++i) good &= std::isfinite(grad_x[i]);
  for (int64_t i = 0; i < weights; ++i) good &= std::isfinite(grad_weight[i]);
  return good;
}

const Register linear([](vamoh::Isa isa, int threads) {
  bool good = true;
  for (int64_t rows : {1, 3, 25, 70})
    for (int64_t in : {1, 16, 67, 530})
      for (int64_t out : {1, 5, 99}) good &= run(isa, threads, {2, rows, in, out}, rows == 3);
  return good && run(isa, threads, {1, 2, 3, 2100}, false) && run(isa, threads, {1, 515, 2, 3}, true);
});

}  // namespace
