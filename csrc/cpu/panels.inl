// Points in panels: W consecutive points side by side, dimension after dimension, so that one vector holds one
// dimension of several points. Included by the kernels, once per instruction set.

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr int lanes = kVectorBytes / sizeof(T);
};

// Dimensions summed between two looks at whether a panel can still matter: squared distances only grow.
constexpr int64_t kDimsPerLook = 32;

// Fills panels [ceil(n / W), dims, W] with the n rows `index` of coords [*, dims], or its first n rows if index is
// null. Lanes beyond n repeat the last point.
template <class T, int W>
void pack_panels(const T* coords, const int64_t* index, int64_t n, int64_t dims, T* panels) {
  for (int64_t first = 0; first < n; first += W, panels += dims * W)
    for (int64_t lane = 0; lane < W; ++lane) {
      const int64_t i = first + lane < n ? first + lane : n - 1;
      const T* row = coords + (index ? index[i] : i) * dims;
      for (int64_t d = 0; d < dims; ++d) panels[d * W + lane] = row[d];
    }
}

// True if any bit of the comparison result is set.
template <class Mask>
inline bool any(const Mask& mask) {
  typedef long long Words __attribute__((vector_size(kVectorBytes), may_alias));
  const Words words = *reinterpret_cast<const Words*>(&mask);
  long long bits = 0;
  for (int i = 0; i < kVectorBytes / 8; ++i) bits |= words[i];
  return bits != 0;
}
