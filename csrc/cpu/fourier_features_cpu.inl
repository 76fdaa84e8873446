#include "../simd/vectors.inl"

// Cosines and sines [count] of one point; frequencies lie by dimension, each padded to a multiple of the lanes.
inline void encode_point(const float* x, const float* frequencies, int64_t padded, int64_t dims, int64_t count,
                         float* cosines, float* sines) {
  for (int64_t f = 0; f < count; f += kLanes) {
    // cycles + rest: what rounding loses of products and sums, since many cycles leave few digits to the angle.
    V cycles = V{}, rest = V{};
    for (int64_t d = 0; d < dims; ++d) {
      const V frequency = load(frequencies + d * padded + f), product = frequency * x[d], sum = cycles + product;
      const V added = sum - cycles;
      rest += fma(frequency, splat(x[d]), -product) + ((cycles - (sum - added)) + (product - added));
      cycles = sum;
    }
    const Vi whole = !(abs(cycles) < 524288.0f);  // or infinite, or NaN
    const V quarters = whole ? V{} : cycles * 4.0f;
    Vi quadrant;
    const V reduced = quarters - round(quarters, quadrant);
    V sine, cosine;
    sincos_reduced((reduced + (whole ? V{} : rest * 4.0f)) * 1.57079632679f, quadrant, sine, cosine);
    for (int i = 0; i < kLanes; ++i)
      if (whole[i]) {
        const double angle = 6.283185307179586 * __builtin_remainder(cycles[i], 1.0);
        sine[i] = static_cast<float>(__builtin_sin(angle));
        cosine[i] = static_cast<float>(__builtin_cos(angle));
      }
    if (f + kLanes <= count) {
      store(cosines + f, cosine);
      store(sines + f, sine);
    } else {
      for (int i = 0; f + i < count; ++i) {
        cosines[f + i] = cosine[i];
        sines[f + i] = sine[i];
      }
    }
  }
}

// NaN where the phase 2 pi F x in radians overflows, as it does in plain torch; the cycles may not.
inline void mark_overflow(const float* x, const float* frequencies, int64_t padded, int64_t dims, int64_t count,
                          float* cosines, float* sines) {
  for (int64_t f = 0; f < count; ++f) {
    float phase = 0;
    for (int64_t d = 0; d < dims; ++d) phase += x[d] * (6.28318531f * frequencies[d * padded + f]);
    if (phase - phase != 0) cosines[f] = sines[f] = __builtin_nanf("");
  }
}

void encode(const float* coords, const float* frequencies, int64_t padded, int64_t points, int64_t dims, int64_t count,
            float* out) {
  float highest = 0;
  for (int64_t i = 0; i < dims * padded; ++i) {
    const float size = __builtin_fabsf(frequencies[i]);
    highest = size > highest ? size : highest;
  }
  for (int64_t n = 0; n < points; ++n) {
    const float* x = coords + n * dims;
    float *cosines = out + n * 2 * count, *sines = cosines + count;
    encode_point(x, frequencies, padded, dims, count, cosines, sines);
    float reach = 6.28318531f * highest;
    for (int64_t d = 0; d < dims; ++d) reach += __builtin_fabsf(x[d]) * 6.3f * highest;
    if (!(reach < 3e38f)) mark_overflow(x, frequencies, padded, dims, count, cosines, sines);
  }
}
