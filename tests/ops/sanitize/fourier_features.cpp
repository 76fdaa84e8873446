#include "fourier_features.h"

#include <cmath>
#include <memory>

#include "check.h"

namespace {

bool run(vamoh::Isa isa, int threads, int64_t points, int64_t dims, int64_t count) {
  std::unique_ptr<float[]> coords(new float[points * dims]), frequencies(new float[count * dims]),
      out(new float[points * 2 * count]);
  for (int64_t i = 0; i < points * dims; ++i) coords[i] = static_cast<float>(i % 11) * 0.25f - 1;
  for (int64_t i = 0; i < count * dims; ++i) frequencies[i] = static_cast<float>(i % 5) * (i % 7 ? 0.3f : 3e7f);
  vamoh::fourier_features(coords.get(), frequencies.get(), out.get(), points, dims, count, threads, isa);
  bool good = true;
  for (int64_t i = 0; i < points * 2 * count; ++i) good &= std::fabs(out[i]) <= 1.000001f;
  return good;
}

const Register fourier_features([](vamoh::Isa isa, int threads) {
  bool good = true;
  for (int64_t points : {0, 1, 300})
    for (int64_t dims : {1, 3})
      for (int64_t count : {1, 15, 16, 17, 128}) good &= run(isa, threads, points, dims, count);
  return good;
});

}  // namespace
