// Standard normal noise as a function of a seed and of its place: Philox4x32-10 and Box-Muller, as vamoh/ops/_noise.py
// defines it. Needs vectors.inl and panel.inl. Included by the kernels, once per instruction set.

// 64-bit lanes of which the lower half is a word of Philox and the upper half is ignored: products need no shuffles.
typedef unsigned long long W __attribute__((vector_size(kVectorBytes), may_alias));

constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;

inline W splat_word(uint64_t x) { return x - W{}; }

inline W word_product(W a, uint64_t b) {
#if VAMOH_VECTOR_BITS == 512  // maskz: the plain intrinsics warn of uninitialised values in some versions of GCC
  return reinterpret_cast<W>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif VAMOH_VECTOR_BITS == 256
  return reinterpret_cast<W>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif VAMOH_X86
  return reinterpret_cast<W>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xffffffffu) * b;
#endif
}

inline W exclusive_or(W a, W b, W c) {
#if VAMOH_VECTOR_BITS == 512
  return reinterpret_cast<W>(_mm512_ternarylogic_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b),
                                                       reinterpret_cast<__m512i>(c), 0x96));
#else
  return a ^ b ^ c;
#endif
}

inline V square_root(V x) {
#if VAMOH_VECTOR_BITS == 512
  return _mm512_maskz_sqrt_ps(0xffff, x);
#elif VAMOH_VECTOR_BITS == 256
  return _mm256_sqrt_ps(x);
#elif VAMOH_X86
  return _mm_sqrt_ps(x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

struct Keys {
  uint32_t at[10][2];
};

inline Keys keys_of(uint64_t seed) {
  Keys keys;
  for (uint32_t i = 0; i < 10; ++i) {
    keys.at[i][0] = static_cast<uint32_t>(seed) + i * 0x9E3779B9u;
    keys.at[i][1] = static_cast<uint32_t>(seed >> 32) + i * 0xBB67AE85u;
  }
  return keys;
}

inline uint64_t high(uint64_t x) { return x >> 32; }
inline uint64_t low(uint64_t x) { return x & 0xffffffffu; }

// The four words of the counters (block, sample, function, 0), one sample per lane.
inline void philox(const Keys& keys, uint32_t block, W sample, uint32_t function, W (&words)[4]) {
  // Until round 3 some words are the same in all lanes.
  const uint64_t p0 = kMultiplier0 * block, p1 = kMultiplier1 * function;
  W product = word_product(sample ^ splat_word(high(p1) ^ keys.at[0][0]), kMultiplier0);
  const uint64_t q1 = kMultiplier1 * low(high(p0) ^ keys.at[0][1]);
  const W second = (product >> 32) ^ splat_word(low(p0) ^ keys.at[1][1]);
  const uint64_t r0 = kMultiplier0 * low(high(q1) ^ low(p1) ^ keys.at[1][0]);
  const W r1 = word_product(second, kMultiplier1);
  W c0 = (r1 >> 32) ^ splat_word(low(q1) ^ keys.at[2][0]), c1 = r1;
  W c2 = product ^ splat_word(high(r0) ^ keys.at[2][1]), c3 = splat_word(low(r0));
#pragma GCC unroll 8
  for (int i = 3; i < 10; ++i) {
    const W left = word_product(c0, kMultiplier0), right = word_product(c2, kMultiplier1);
    c0 = exclusive_or(right >> 32, c1, splat_word(keys.at[i][0]));
    c2 = exclusive_or(left >> 32, c3, splat_word(keys.at[i][1]));
    c1 = right;
    c3 = left;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Two normals per lane from two words.
inline void box_muller(Vi first, Vi second, V& a, V& b) {
  constexpr float kStep = 4.656612873077393e-10f;  // 2^-31
  const V uniform = fma(__builtin_convertvector((first >> 1) & 0x7fffffff, V), splat(kStep), splat(0.5f * kStep));
  const V radius = square_root(log_normal(uniform, Vi{}) * -2.0f);
  V sine, cosine;
  sincos_quarter(__builtin_convertvector(second, V) * (2.0f * kStep), sine, cosine);
  a = radius * cosine;
  b = radius * sine;
}

// A panel of samples first..first + kPanel - 1 of a function: out [latent rounded up to 4][kPanel].
inline void noise_panel(const Keys& keys, int64_t first, int64_t function, int64_t latent, float* out) {
  W index;
  for (int i = 0; i < kLanes / 2; ++i) index[i] = 2 * i;
  for (int64_t row = 0; row < latent; row += 4, out += 4 * kPanel) {
    for (int lane = 0; lane < kPanel; lane += kLanes) {
      const W sample = index + static_cast<uint64_t>(first + lane);
      W even[4], odd[4];
      philox(keys, static_cast<uint32_t>(row / 4), sample, static_cast<uint32_t>(function), even);
      philox(keys, static_cast<uint32_t>(row / 4), sample + 1, static_cast<uint32_t>(function), odd);
      for (int i = 0; i < 4; ++i)
        store(out + i * kPanel + lane, reinterpret_cast<V>((even[i] & 0xffffffffu) | (odd[i] << 32)));
    }
    // Apart from the words: both at once need more registers than there are.
    for (int pair = 0; pair < 4 * kPanel; pair += 2 * kPanel)
      for (int lane = 0; lane < kPanel; lane += kLanes) {
        float *const a = out + pair + lane, *const b = a + kPanel;
        V x, y;
        box_muller(bits(load(a)), bits(load(b)), x, y);
        store(a, x);
        store(b, y);
      }
  }
}
