// Points of a cloud in panels: W consecutive points side by side, dimension after dimension, so that one vector holds
// one dimension of several points. Included by the kernels, once per instruction set, with kVectors vectors to a panel.

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr int lanes = kVectorBytes / sizeof(T);
};

template <class T>
constexpr int64_t panel_width() {
  return kVectors * Vector<T>::lanes;
}

// Dimensions summed between two tests whether a panel can still matter: squared distances only grow.
constexpr int64_t kDimsPerTest = 32;

// Fills panels [ceil(n / W), dims, W] with the n rows `index` of coords [*, dims], or its first n rows if index is
// null. Lanes beyond n repeat the last point.
template <class T>
void pack_panels(const T* coords, const int64_t* index, int64_t n, int64_t dims, T* panels) {
  constexpr int64_t W = panel_width<T>();
  for (int64_t first = 0; first < n; first += W, panels += dims * W)
    for (int64_t lane = 0; lane < W; ++lane) {
      const int64_t i = first + lane < n ? first + lane : n - 1;
      const T* row = coords + (index ? index[i] : i) * dims;
      for (int64_t d = 0; d < dims; ++d) panels[d * W + lane] = row[d];
    }
}

// One bit per lane of a comparison.
template <class Mask>
inline uint32_t lanes_of(const Mask& mask) {
  constexpr bool wide = sizeof(mask[0]) == 8;
#if VAMOH_VECTOR_BITS == 512
  const __m512i bits = reinterpret_cast<const __m512i&>(mask);
  return wide ? _mm512_movepi64_mask(bits) : _mm512_movepi32_mask(bits);
#elif VAMOH_VECTOR_BITS == 256
  const __m256i bits = reinterpret_cast<const __m256i&>(mask);
  return wide ? _mm256_movemask_pd(_mm256_castsi256_pd(bits)) : _mm256_movemask_ps(_mm256_castsi256_ps(bits));
#else
  uint32_t bits = 0;
  for (unsigned i = 0; i < sizeof(mask) / sizeof(mask[0]); ++i) bits |= mask[i] ? 1u << i : 0u;
  (void)wide;
  return bits;
#endif
}

template <class Mask>
inline bool any(const Mask& mask) {
  return lanes_of(mask) != 0;
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
