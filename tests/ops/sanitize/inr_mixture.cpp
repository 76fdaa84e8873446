#include "inr_mixture.h"

#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "check.h"

namespace {

struct Random {
  uint32_t state = 1;
  float operator()() { return static_cast<float>((state = state * 1664525u + 1013904223u) >> 16) / 65536; }
};

std::unique_ptr<float[]> exactly(int64_t count, Random& random) {
  std::unique_ptr<float[]> values(new float[count]);
  for (int64_t i = 0; i < count; ++i) values[i] = random() - 0.5f;
  return values;
}

bool run(const std::vector<int64_t>& widths, int64_t batch, int64_t points, int features, bool masked, bool sine,
         int threads, vamoh::Isa isa) {
  const int64_t components = 2, encoded = widths.front(), channels = widths.back();
  int64_t packed = 0;
  for (size_t i = 0; i + 1 < widths.size(); ++i) packed += widths[i] * widths[i + 1] + widths[i + 1];
  Random random;
  const bool own = features == 1, mirrored = features == 2;
  const auto theta = exactly(batch * components * packed, random);
  const auto x = exactly((own ? batch : 1) * points * encoded, random);
  const auto values = exactly(batch * points * channels, random),
             weights = exactly(batch * components * points, random);
  std::unique_ptr<int64_t[]> mirror(new int64_t[points]);
  for (int64_t i = 0; i < points; ++i) mirror[i] = i == 0 ? -1 : points - i;
  std::unique_ptr<bool[]> mask(new bool[batch * points]);
  for (int64_t i = 0; i < batch * points; ++i) mask[i] = i < points || random() < 0.5f;
  for (int64_t i = 0; i < batch * points * channels; ++i) values[i] += 0.5f;
  std::vector<float> scale(components * channels, 0.1f);
  const vamoh::InrMixture mixture{theta.get(),
                                  components * packed,
                                  packed,
                                  x.get(),
                                  own ? points * encoded : 0,
                                  mirrored ? mirror.get() : nullptr,
                                  masked ? mask.get() : nullptr,
                                  widths.data(),
                                  static_cast<int64_t>(widths.size()) - 1,
                                  batch,
                                  components,
                                  points,
                                  sine,
                                  0.1f,
                                  2.0f};
  const int64_t scores = batch * components * points;
  const auto out = exactly(scores * channels, random), log_p = exactly(scores, random), value = exactly(batch, random);
  const auto grad = exactly(batch * components * packed, random),
             by_scale = exactly(batch * components * channels, random);
  const auto mean = exactly(batch * points * channels, random), best = exactly(batch * points * channels, random);
  vamoh::InrMixture whole = mixture;
  whole.mask = nullptr;
  vamoh::inr_mixture(whole, out.get(), threads, isa);
  vamoh::inr_mixture_backward(whole, out.get(), grad.get(), threads, isa);
  using Likelihood = vamoh::PointLikelihood;
  for (const Likelihood::Kind kind : {Likelihood::logistic, Likelihood::bernoulli, Likelihood::continuous_bernoulli}) {
    const Likelihood likelihood{kind, 1.0 / 512, sine ? 0 : 1e-7, sine, scale.data()};
    vamoh::inr_mixture_log_likelihood(mixture, likelihood, values.get(), log_p.get(), threads, isa);
    vamoh::inr_mixture_expected_log_likelihood(mixture, likelihood, values.get(), weights.get(), value.get(),
                                               log_p.get(), grad.get(), by_scale.get(), threads, isa);
    vamoh::inr_mixture_mean(whole, likelihood, weights.get(), false, mean.get(), best.get(), threads, isa);
  }
  for (int64_t i = 0; i < scores; ++i)
    if (!std::isfinite(log_p[i])) return false;
  return true;
}

const Register inr_mixture([](vamoh::Isa isa, int threads) {
  bool good = true;
  for (const std::vector<int64_t>& widths :
       {std::vector<int64_t>{2, 1}, {6, 5, 3}, {64, 4, 9, 2}, {128, 33, 1}, {10, 1, 1, 7, 1}})
    for (int64_t points : {0, 1, 7, 65, 200})
      for (int features : {0, 1, 2})
        for (int64_t batch : {0, 1, 3})
          for (bool masked : {false, true})
            good &= run(widths, batch, points, features, masked, points % 2 == 0, threads, isa);
  return good;
});

}  // namespace
