// Point clouds for the checks of the ops on coordinates.
#pragma once

#include <limits>
#include <random>

#include "check.h"

enum Kind {
  whole,
  fractions,
  broken
};  // coordinates: with many ties; with ties but for rounding; with NaN and infinity

template <class T>
std::unique_ptr<T[]> cloud(int64_t count, Kind kind, unsigned seed) {
  auto values = memory<T>(count);
  std::mt19937 draw(seed);
  for (int64_t i = 0; i < count; ++i) {
    values[i] = static_cast<T>(draw() % 4) * (kind == fractions ? T(0.1) : T(1));
    if (kind == broken && draw() % 5 == 0)
      values[i] = draw() % 2 ? std::numeric_limits<T>::quiet_NaN() : std::numeric_limits<T>::infinity();
  }
  return values;
}

// Two of three points [batch, n] at random, and always the last `at_least`.
inline std::unique_ptr<bool[]> random_mask(int64_t batch, int64_t n, int64_t at_least) {
  auto mask = memory<bool>(batch * n);
  std::mt19937 draw(1);
  for (int64_t i = 0; i < batch * n; ++i) mask[i] = n - i % n <= at_least || draw() % 3 > 0;
  return mask;
}

template <class T>
T distance(const T* a, const T* b, int64_t dims) {
  T sum = 0;
  for (int64_t d = 0; d < dims; ++d) sum += (a[d] - b[d]) * (a[d] - b[d]);
  return sum;
}
