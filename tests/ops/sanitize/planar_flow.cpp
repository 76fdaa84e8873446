#include "planar_flow.h"

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <memory>

#include "check.h"

namespace {

struct Random {
  uint32_t state = 1;
  float operator()() { return static_cast<float>((state = state * 1664525u + 1013904223u) >> 16) / 65536; }
};

std::unique_ptr<float[]> exactly(int64_t count, Random& random, float least = -0.5f) {
  std::unique_ptr<float[]> values(new float[count]);
  for (int64_t i = 0; i < count; ++i) values[i] = random() + least;
  return values;
}

bool run(int64_t batch, int64_t samples, int64_t latent, int64_t layers, int threads, vamoh::Isa isa) {
  Random random;
  const int64_t matrix = layers * latent;
  const auto u = exactly(matrix, random), gain = exactly(layers, random, 0.5f), w = exactly(matrix, random);
  const auto b = exactly(layers, random), loc = exactly(latent, random), log_scale = exactly(latent, random);
  const vamoh::PlanarFlow flow{u.get(), gain.get(), w.get(), b.get(), loc.get(), log_scale.get(), layers, latent, 0.2f};
  const auto by_u = exactly(batch * matrix, random), by_w = exactly(batch * matrix, random);
  const auto by_gain = exactly(batch * layers, random), by_b = exactly(batch * layers, random);
  const auto by_loc = exactly(batch * latent, random), by_log_scale = exactly(batch * latent, random);
  const vamoh::PlanarFlowGradient gradient{by_u.get(), by_gain.get(), by_w.get(),
                                           by_b.get(), by_loc.get(),  by_log_scale.get()};
  const vamoh::PlanarFlowGradient none{};
  const auto mean = exactly(batch * latent, random), std = exactly(batch * latent, random, 0.1f);
  const auto by_mean = exactly(batch * latent, random), by_std = exactly(batch * latent, random);
  const auto noise = exactly(samples * batch * latent, random), value = exactly(batch, random);
  const auto log_p = exactly(samples, random), by_z = exactly(samples * latent, random);

  bool good = true;
  for (const float* given : {static_cast<const float*>(nullptr), static_cast<const float*>(noise.get())})
    for (const bool learn : {true, false}) {
      vamoh::planar_flow_expected_log_prob(flow, mean.get(), std.get(), given, 7, value.get(), by_mean.get(),
                                           by_std.get(), learn ? gradient : none, batch, samples, threads, isa);
      vamoh::planar_flow_expected_log_prob(flow, mean.get(), std.get(), given, 7, value.get(), nullptr, nullptr,
                                           learn ? gradient : none, batch, samples, threads, isa);
      for (int64_t i = 0; i < batch; ++i) good &= std::isfinite(value[i]);
      vamoh::planar_flow_log_prob_backward(flow, noise.get(), log_p.get(), learn ? nullptr : by_z.get(),
                                           learn ? gradient : none, samples, threads, isa);
    }
  vamoh::planar_flow_log_prob(flow, noise.get(), log_p.get(), samples, threads, isa);
  vamoh::planar_flow_sample(flow, noise.get(), by_z.get(), log_p.get(), samples, threads, isa);
  vamoh::counter_noise(7, noise.get(), samples, batch, latent, isa);
  for (int64_t i = 0; i < samples; ++i) good &= std::isfinite(log_p[i]);
  for (int64_t i = 0; i < samples * batch * latent; ++i) good &= std::isfinite(noise[i]);
  return good;
}

const Register planar_flow([](vamoh::Isa isa, int threads) {
  bool good = true;
  for (const int64_t samples : {1, 63, 65, 1100})
    for (const int64_t latent : {1, 5, 16})
      for (const int64_t layers : {1, 3, 8, 13}) good &= run(2, samples, latent, layers, threads, isa);
  return good && run(1, 64, 70, 66, threads, isa);
});

}  // namespace
