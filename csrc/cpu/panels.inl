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

// Entries of a table at `at` [lanes].
template <class T>
inline typename Vector<T>::type gather(const T* table, const int32_t* at) {
  typename Vector<T>::type result{};
  for (int lane = 0; lane < Vector<T>::lanes; ++lane) result[lane] = table[at[lane]];
  return result;
}

// The masked intrinsics with every lane set: GCC warns that the plain ones read what they never set.
#if VAMOH_VECTOR_BITS == 512
template <>
inline Vector<float>::type gather(const float* table, const int32_t* at) {
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, _mm512_loadu_si512(at), table, 4);
}

template <>
inline Vector<double>::type gather(const double* table, const int32_t* at) {
  const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return _mm512_mask_i32gather_pd(_mm512_setzero_pd(), 0xff, index, table, 8);
}
#elif VAMOH_VECTOR_BITS == 256
template <>
inline Vector<float>::type gather(const float* table, const int32_t* at) {
  const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  const __m256 all = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), table, index, all, 4);
}

template <>
inline Vector<double>::type gather(const double* table, const int32_t* at) {
  const __m128i index = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  const __m256d all = _mm256_castsi256_pd(_mm256_set1_epi32(-1));
  return _mm256_mask_i32gather_pd(_mm256_setzero_pd(), table, index, all, 8);
}
#endif
