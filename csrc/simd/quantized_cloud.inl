// Distances of quantized points, see quantized_cloud.h. Needs cloud.inl. Included by the kernels, once per instruction
// set.

#include "vectors.inl"

using vamoh::kFarthest;
using vamoh::kNoPoint;
using vamoh::QuantizedCloud;

constexpr int kQuantizedLanes = kVectorBytes / 4;
typedef int32_t Quantized __attribute__((vector_size(kVectorBytes), may_alias));  // four to a lane
typedef uint32_t Words __attribute__((vector_size(kVectorBytes), may_alias));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes), may_alias));
constexpr int kQuantizedWidth = kVectors * kQuantizedLanes;  // points per panel
constexpr int kExactRows = kLanes;                           // points whose exact distances are computed side by side

// sum and the products of a's and b's bytes, lane by lane. With AVX-512 the CPU must have VNNI, see
// `with_byte_products`.
inline __attribute__((always_inline)) Quantized add_products(Quantized sum, Quantized a, Quantized b) {
#if VAMOH_VECTOR_BITS == 512
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
#elif VAMOH_VECTOR_BITS == 256
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
  return sum + (Quantized)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  const Halves pairs = ((Halves)a & 0xff) * ((Halves)b & 0xff) + ((Halves)a >> 8) * ((Halves)b >> 8);
  return sum + ((Quantized)pairs & 0xffff) + (Quantized)((Words)pairs >> 16);
#endif
}

// Extends [low, high] to the values of a row of at least one vector; false if one of them is NaN or beyond `most`.
template <class T>
bool extend_range(const T* row, int64_t dims, T most, T& low, T& high) {
  typedef T Values __attribute__((vector_size(kVectorBytes), may_alias, aligned(sizeof(T))));
  constexpr int lanes = Vector<T>::lanes;
  bool fits = true;
  const auto extend = [&](T x) {
    fits = fits && x >= -most && x <= most;
    low = x < low ? x : low;
    high = x > high ? x : high;
  };
  Values least = *reinterpret_cast<const Values*>(row), greatest = least;
  for (int64_t d = 0;;) {
    const Values x = *reinterpret_cast<const Values*>(row + d);
    fits = fits && !any(!(x >= -most && x <= most));
    least = x < least ? x : least;
    greatest = x > greatest ? x : greatest;
    if (d == dims - lanes) break;
    d = d + lanes < dims - lanes ? d + lanes : dims - lanes;
  }
  for (int lane = 0; lane < lanes; ++lane) {
    extend(least[lane]);
    extend(greatest[lane]);
  }
  return fits;
}

// Quantizes a row [ceil(dims / 4)], 0 beyond the last dimension; returns the sum of squares.
template <class T>
int32_t quantize(const T* row, int64_t dims, T low, T step, int32_t* quantized) {
  uint8_t* const out = reinterpret_cast<uint8_t*>(quantized);
  const T inverse = 1 / step;
  int32_t square = 0;
  for (int64_t d = 0; d < dims; ++d) {
    const int32_t code = static_cast<int32_t>((row[d] - low) * inverse + T(0.5));
    out[d] = static_cast<uint8_t>(code);
    square += code * code;
  }
  for (int64_t d = dims; d % 4; ++d) out[d] = 0;
  return square;
}

// Fills quantized points and squares of a cloud, W points to a panel.
template <class T>
void pack_quantized(const QuantizedCloud<T>& cloud, int32_t* row, int32_t* quantized, int32_t* squares) {
  constexpr int W = kQuantizedWidth;
  const int64_t groups = cloud.groups;
  for (int64_t i = 0; i < (cloud.n + W - 1) / W * W; ++i) {
    int32_t* const out = quantized + i / W * W * groups + i % W;
    const bool beyond = i >= cloud.n;
    squares[i] = beyond ? kNoPoint
                        : quantize(cloud.coords + cloud.index[i] * cloud.dims, cloud.dims, cloud.low, cloud.step, row);
    for (int64_t g = 0; g < groups; ++g) out[g * W] = beyond ? 0 : row[g];
  }
}

// How far quantized points may be apart, squared, where the squared distance of points, computed with rounding, is at
// most `near`.
template <class T>
int32_t reach(const QuantizedCloud<T>& cloud, T near) {
  const double rounding = 1 + 2e-7 * static_cast<double>(cloud.dims + 8);
  const double most = (__builtin_sqrt(near) * rounding + cloud.slack) / cloud.step;
  return most * most < kFarthest ? static_cast<int32_t>(most * most) + 1 : kFarthest;
}

// Squared distances of the candidates at `positions` [count <= kExactRows] from a query, summed as panels sum them.
template <class T>
void exact_distances(const QuantizedCloud<T>& cloud, const int64_t* positions, int64_t count, const T* query,
                     T* distances) {
  const T* rows[kExactRows];
  for (int64_t r = 0; r < kExactRows; ++r)
    rows[r] = cloud.coords + cloud.index[positions[r < count ? r : 0]] * cloud.dims;
  alignas(kVectorBytes) T sum[kExactRows] = {};
  int64_t d = 0;
  if constexpr (sizeof(T) == sizeof(float)) {
    V total{};
    for (; d + kLanes <= cloud.dims; d += kLanes) {
      V x[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) x[r] = load(rows[r] + d);
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const V difference = x[i] - query[d + i];
        total += difference * difference;
      }
    }
    store(sum, total);
  }
  for (; d < cloud.dims; ++d)
    for (int r = 0; r < kExactRows; ++r) {
      const T difference = rows[r][d] - query[d];
      sum[r] += difference * difference;
    }
  for (int64_t r = 0; r < count; ++r) distances[r] = sum[r];
}
