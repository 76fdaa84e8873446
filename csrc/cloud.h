// Clouds of points, as farthest-point sampling and the search for neighbours get them.
#pragma once

#include <cstdint>

namespace vamoh {

// Points [B, count, dims], or with dims 1 cells of a lattice by their flat indices. Consecutive functions are `stride`
// values apart, 0 if they share one.
template <class T>
struct Cloud {
  const T* values;
  int64_t stride, count, dims;
};

// Candidates [B, count], or null: all. Rows are `stride` apart, 0 if they share one.
struct Mask {
  const bool* values;
  int64_t stride;

  const bool* of(int64_t b) const { return values ? values + b * stride : nullptr; }
};

// Squared distances on a lattice: that of cells p and q is values[size / 2 + p - q]. Cells are 0 .. size / 2; size is
// odd and below 2^31.
template <class T>
struct DistanceTable {
  const T* values;
  int64_t size;
};

}  // namespace vamoh
