// Squared distances with the bits of the other backends, and the search for the best of (value, index).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

namespace vamoh {

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kLargest = std::numeric_limits<T>::max();

// sum + (a - b)², each step rounded: the compiler must not contract it to a fused multiply-add.
__device__ inline float add_square(float sum, float a, float b) {
  const float difference = __fsub_rn(a, b);
  return __fadd_rn(sum, __fmul_rn(difference, difference));
}
__device__ inline double add_square(double sum, double a, double b) {
  const double difference = __dsub_rn(a, b);
  return __dadd_rn(sum, __dmul_rn(difference, difference));
}

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
struct Entry {
  T value;
  int64_t index;
};

// The smallest value of a warp, the lowest index on ties; the same in every lane. Values are no NaN.
template <class T>
__device__ inline Entry<T> smallest(Entry<T> own) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T value = __shfl_xor_sync(kAllLanes, own.value, step);
    const int64_t index = __shfl_xor_sync(kAllLanes, own.index, step);
    if (value < own.value || (value == own.value && index < own.index)) own = {value, index};
  }
  return own;
}

}  // namespace vamoh
