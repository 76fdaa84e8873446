// Vectors of float and the functions of them that kernels need. Included by the kernels, once per instruction set.
//
// Functions state their largest error beside their name, in units in the last place of the true value where not said
// otherwise. They follow the C library for infinities and NaN; results below the smallest normal number may be 0.

typedef float V __attribute__((vector_size(kVectorBytes), may_alias, aligned(4)));
typedef int Vi __attribute__((vector_size(kVectorBytes), may_alias, aligned(4)));
constexpr int kLanes = kVectorBytes / 4;

inline V load(const float* p) { return *reinterpret_cast<const V*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<V*>(p) = v; }
inline V splat(float x) { return x - V{}; }
inline Vi bits(V v) { return reinterpret_cast<Vi>(v); }
inline V from_bits(Vi v) { return reinterpret_cast<V>(v); }

// a * b + c, rounded once where the instruction set can.
inline V fma(V a, V b, V c) {
#if VAMOH_VECTOR_BITS == 512
  return _mm512_fmadd_ps(a, b, c);
#elif VAMOH_VECTOR_BITS == 256
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__clang__) && __has_builtin(__builtin_elementwise_fma)
  return __builtin_elementwise_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// b where either is NaN.
inline V min(V a, V b) {
#if VAMOH_VECTOR_BITS == 512
  return _mm512_mask_min_ps(a, 0xffff, a, b);
#elif VAMOH_VECTOR_BITS == 256
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
inline V max(V a, V b) {
#if VAMOH_VECTOR_BITS == 512
  return _mm512_mask_max_ps(a, 0xffff, a, b);
#elif VAMOH_VECTOR_BITS == 256
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline V abs(V v) { return from_bits(bits(v) & 0x7fffffff); }

typedef float V4 __attribute__((vector_size(16), may_alias, aligned(4)));
typedef int Vi4 __attribute__((vector_size(16), may_alias, aligned(4)));

inline V4 fold(V v) {
  V4 parts[kLanes / 4];
  __builtin_memcpy(parts, &v, sizeof v);
  V4 total = parts[0];
#pragma GCC unroll 4
  for (int i = 1; i < kLanes / 4; ++i) total += parts[i];
  return total;
}

inline float sum(V v) {
  const V4 parts = fold(v);
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

inline Vi lane_numbers() {
  Vi v;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// A vector of which only the first n lanes are in memory; the others are 0.
inline V load_part(const float* p, int64_t n) {
  if (n >= kLanes) return load(p);
#if VAMOH_VECTOR_BITS == 512
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#elif VAMOH_VECTOR_BITS == 256
  return _mm256_maskload_ps(p, (__m256i)(lane_numbers() < static_cast<int>(n)));
#else
  V v = V{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

inline void store_part(float* p, V v, int64_t n) {
  if (n >= kLanes) return store(p, v);
#if VAMOH_VECTOR_BITS == 512
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
#elif VAMOH_VECTOR_BITS == 256
  _mm256_maskstore_ps(p, (__m256i)(lane_numbers() < static_cast<int>(n)), v);
#else
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// Bit D of the row number changes places with bit D of the lane number.
template <int D>
inline __attribute__((always_inline)) void exchange(V& low, V& high) {
  const V a = low, b = high;
#if defined(__clang__)
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & D ? b[i ^ D] : a[i];
    high[i] = i & D ? b[i] : a[i ^ D];
  }
#else
  const Vi i = lane_numbers();
  low = __builtin_shuffle(a, b, (i & D) != 0 ? (i ^ D) + kLanes : i);
  high = __builtin_shuffle(a, b, (i & D) != 0 ? i + kLanes : (i ^ D));
#endif
}

template <int D>
inline __attribute__((always_inline)) void transpose_step(V* m) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & D)) exchange<D>(m[i], m[i + D]);
}

// The rows of m[kLanes] become its columns.
inline __attribute__((always_inline)) void transpose(V* m) {
  transpose_step<1>(m);
  transpose_step<2>(m);
  if constexpr (kLanes > 4) transpose_step<4>(m);
  if constexpr (kLanes > 8) transpose_step<8>(m);
}

// Nearest integer to |x| < 2^22, as a float and, in `integer`, as an int.
inline V round(V x, Vi& integer) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: the sum has no room for a fraction
  const V shifted = x + kShift;
  integer = bits(shifted) - 0x4b400000;
  return shifted - kShift;
}

inline V exp(V x) {  // 1.5
  x = min(splat(89.0f), max(splat(-104.0f), x));
  Vi n;
  const V scale = round(x * 1.44269504f, n);
  V r = fma(scale, splat(-0.693359375f), x);
  r = fma(scale, splat(2.12194440e-4f), r);
  V p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
#if VAMOH_VECTOR_BITS == 512
  return _mm512_mask_scalef_ps(p, 0xffff, p, scale);
#else
  const Vi half = n >> 1;  // 2^n in two steps, as n may be beyond a float's exponents
  return p * from_bits((half + 127) << 23) * from_bits((n - half + 127) << 23);
#endif
}

// log(x / 2^shift) for a positive, finite and normal x.
inline V log_normal(V x, Vi shift) {                   // 1
  const Vi exponent = ((bits(x) - 0x3f3504f3) >> 23);  // so that the fraction lies in [sqrt(1/2), sqrt(2))
  const V f = from_bits(bits(x) - (exponent << 23)) - 1.0f;
  const V e = __builtin_convertvector(exponent - shift, V);
  V p = splat(7.0376836292e-2f);
  p = fma(p, f, splat(-1.1514610310e-1f));
  p = fma(p, f, splat(1.1676998740e-1f));
  p = fma(p, f, splat(-1.2420140846e-1f));
  p = fma(p, f, splat(1.4249322787e-1f));
  p = fma(p, f, splat(-1.6668057665e-1f));
  p = fma(p, f, splat(2.0000714765e-1f));
  p = fma(p, f, splat(-2.4999993993e-1f));
  p = fma(p, f, splat(3.3333331174e-1f));
  const V square = f * f;
  V result = fma(p * f, square, e * -2.12194440e-4f);
  result = fma(square, splat(-0.5f), result) + f;
  return fma(e, splat(0.693359375f), result);
}

inline V log(V x) {  // 1
  const Vi tiny = x < 1.17549435e-38f;
  V result = log_normal(tiny ? x * 8388608.0f : x, tiny & 23);
  const V infinity = splat(__builtin_inff());
  result = x == infinity ? infinity : result;
  result = x > 0.0f ? result : splat(__builtin_nanf(""));
  return x == 0.0f ? -infinity : result;
}

// log(1 + x) for x >= 0, precise also where x is small.
inline V log1p(V x) {  // 1.5
  const V w = x + 1.0f;
  return w == x ? log(x) : log(w) + (x - (w - 1.0f)) / w;
}

inline V tanh(V x) {  // 1.5
  const V square = x * x;
  V p = splat(-5.528318827e-3f);
  p = fma(p, square, splat(2.048301867e-2f));
  p = fma(p, square, splat(-5.369287627e-2f));
  p = fma(p, square, splat(1.333089878e-1f));
  p = fma(p, square, splat(-3.333326286e-1f));
  const V size = abs(x);
  const V far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  return size < 0.625f ? fma(p * square, x, x) : x < 0.0f ? -far : far;
}

// Sine and cosine of r + quadrant * pi / 2 for |r| <= pi / 4.
inline void sincos_reduced(V r, Vi quadrant, V& sine, V& cosine) {
  const V square = r * r;
  V s = fma(splat(-1.9515295891e-4f), square, splat(8.3321608736e-3f));
  s = fma(s, square, splat(-1.6666654611e-1f));
  s = fma(s * square, r, r);
  V c = fma(splat(2.443315711809948e-5f), square, splat(-1.388731625493765e-3f));
  c = fma(c, square, splat(4.166664568298827e-2f));
  c = fma(c * square, square, fma(square, splat(-0.5f), splat(1.0f)));
  const Vi swap = (quadrant & 1) != 0;
  const V a = swap ? c : s, b = swap ? s : c;
  sine = (quadrant & 2) != 0 ? -a : a;
  cosine = ((quadrant + 1) & 2) != 0 ? -b : b;
}

// Sine and cosine of x * pi / 2 for |x| < 2^22, within 1.2e-7.
inline void sincos_quarter(V x, V& sine, V& cosine) {
  Vi quadrant;
  const V r = (x - round(x, quadrant)) * 1.57079632679f;
  sincos_reduced(r, quadrant, sine, cosine);
}

// Sine and cosine of x, within 1.2e-7; those of |x| >= 8192 are the C library's.
inline void sincos(V x, V& sine, V& cosine) {
  Vi far = !(abs(x) < 8192.0f);
  bool any_far = false;
  for (int i = 0; i < kLanes; ++i) any_far |= far[i] != 0;
  const V near = far ? V{} : x;
  Vi quadrant;
  const V q = round(near * 0.63661977236f, quadrant);
  V r = fma(q, splat(-1.5703125f), near);  // pi / 2 in three parts, so that r is exact
  r = fma(q, splat(-4.837512969970703125e-4f), r);
  r = fma(q, splat(-7.54978995489188216e-8f), r);
  sincos_reduced(r, quadrant, sine, cosine);
  if (any_far)
    for (int i = 0; i < kLanes; ++i)
      if (far[i]) {
        sine[i] = __builtin_sinf(x[i]);
        cosine[i] = __builtin_cosf(x[i]);
      }
}
