// Points quantized to seven bits: round((x - low) / step), 0 to 127, for a value x. Their squared distances are
// integers, of which one instruction computes many, and bound those of the points from below: where quantized points
// are c apart, the distance of the points differs from c * step by `slack` at most.
#pragma once

#include <cmath>
#include <cstdint>

namespace vamoh {

constexpr int64_t kFewestQuantizedDims = 64;  // with fewer, exact distances cost about as little
constexpr int64_t kMostQuantizedDims = 8192;  // squared distances of quantized points fit 32 bits, with room
constexpr double kMostQuantized = 1e12;       // magnitude of values, so that no square overflows
constexpr int32_t kFarthest = 1 << 28;        // more than any squared distance of quantized points
constexpr int32_t kNoPoint = 1 << 29;         // the sum of squares where there is no point: farther still

template <class T>
struct QuantizedCloud {
  const T* coords = nullptr;       // [*, dims]
  const int64_t* index = nullptr;  // [n] the candidates' rows
  int64_t n = 0, dims = 0;
  int64_t groups = (dims + 3) / 4;
  T low = 0, step = 0;
  double slack = 0;                    // the most by which distances differ
  const int32_t* quantized = nullptr;  // [panels, groups, W], four to a group; W depends on the kernel
  const int32_t* squares = nullptr;    // [panels * W] sums of squares, kNoPoint beyond n
};

// Sets low, step and slack for the cloud and other rows [rows, dims]; false if it cannot be quantized.
template <class T, class ExtendRange>
bool set_scale(QuantizedCloud<T>& cloud, const T* others, int64_t rows, const ExtendRange& extend_range) {
  if (cloud.n == 0 || cloud.dims < kFewestQuantizedDims || cloud.dims > kMostQuantizedDims) return false;
  T low = cloud.coords[cloud.index[0] * cloud.dims], high = low;
  const auto fits = [&](const T* row) { return extend_range(row, cloud.dims, T(kMostQuantized), low, high); };
  for (int64_t i = 0; i < cloud.n; ++i)
    if (!fits(cloud.coords + cloud.index[i] * cloud.dims)) return false;
  for (int64_t i = 0; i < rows; ++i)
    if (!fits(others + i * cloud.dims)) return false;
  cloud.low = low;
  cloud.step = (high - low) / 127;
  cloud.slack = 1.01 * std::sqrt(static_cast<double>(cloud.dims)) * static_cast<double>(cloud.step);
  return cloud.step > T(1 / kMostQuantized);
}

}  // namespace vamoh
