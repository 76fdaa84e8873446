// Points as codes of seven bits. A value x has the code round((x - low) / step), 0 to 127, so that squared distances of
// codes are integers, of which one instruction computes many. They tell which points cannot be near: where codes are c
// apart, the distance of the points differs from c * step by `slack` at most.
#pragma once

#include <cmath>
#include <cstdint>

namespace vamoh {

constexpr int64_t kFewestCodedDims = 64;  // with fewer, distances cost about as little as codes
constexpr int64_t kMostCodedDims = 8192;  // squared distances of codes fit 32 bits, with room
constexpr double kMostCoded = 1e12;       // magnitude of values, so that no square overflows
constexpr int32_t kFarthest = 1 << 28;    // more than any squared distance of codes
constexpr int32_t kNoPoint = 1 << 29;     // the sum of squares where there is no point: farther still

template <class T>
struct CodedCloud {
  const T* coords;       // [*, dims]
  const int64_t* index;  // [n] the candidates' rows
  int64_t n, dims;
  int64_t groups = (dims + 3) / 4;
  T low = 0, step = 0;
  double slack = 0;                  // the most by which distances differ
  const int32_t* codes = nullptr;    // [panels, groups, W], four to a group; W depends on the kernel
  const int32_t* squares = nullptr;  // [panels * W] sums of squared codes, kNoPoint beyond n
};

// Sets low, step and slack for the cloud and other rows [rows, dims]; false if it cannot be coded.
template <class T, class ExtendRange>
bool set_scale(CodedCloud<T>& cloud, const T* others, int64_t rows, const ExtendRange& extend_range) {
  if (cloud.n == 0 || cloud.dims < kFewestCodedDims || cloud.dims > kMostCodedDims) return false;
  T low = cloud.coords[cloud.index[0] * cloud.dims], high = low;
  const auto fits = [&](const T* row) { return extend_range(row, cloud.dims, T(kMostCoded), low, high); };
  for (int64_t i = 0; i < cloud.n; ++i)
    if (!fits(cloud.coords + cloud.index[i] * cloud.dims)) return false;
  for (int64_t i = 0; i < rows; ++i)
    if (!fits(others + i * cloud.dims)) return false;
  cloud.low = low;
  cloud.step = (high - low) / 127;
  cloud.slack = 1.01 * std::sqrt(static_cast<double>(cloud.dims)) * static_cast<double>(cloud.step);
  return cloud.step > T(1 / kMostCoded);
}

}  // namespace vamoh
