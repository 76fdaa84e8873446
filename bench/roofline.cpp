// Probes of what the machine can do: independent fused multiply-adds, and copying memory past the caches.

#include <chrono>
#include <cstddef>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));
constexpr int kChains = 12;  // more than latency times units of any CPU of the last ten years

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class Work>
double timed(int threads, Work work) {
  const double start = seconds();
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (auto& other : others) other.join();
  return seconds() - start;
}

void multiply_add(long rounds, float factor, float* out) {
  Vector x[kChains], a = Vector{} + factor, b = Vector{} + (1 - factor);
  for (int i = 0; i < kChains; ++i) x[i] = Vector{} + (float)i;
  for (long r = 0; r < rounds; ++r)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) x[i] = x[i] * a + b;
  Vector sum = {};
  for (int i = 0; i < kChains; ++i) sum += x[i];
  std::memcpy(out, &sum, sizeof(float));
}

void copy(float* to, const float* from, size_t count) {
  size_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16) _mm512_stream_ps(to + i, _mm512_loadu_ps(from + i));
  _mm_sfence();
#elif defined(__AVX__)
  for (; i + 8 <= count; i += 8) _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
  _mm_sfence();
#endif
  std::memcpy(to + i, from + i, (count - i) * sizeof(float));
}

}  // namespace

// Float operations per second, a multiply-add counting two.
extern "C" double fma_rate(int threads, long rounds) {
  std::vector<float> out(threads * 16);
  volatile float factor = 0.5f;
  const double time = timed(threads, [&](int i) { multiply_add(rounds, factor, &out[i * 16]); });
  return 2.0 * threads * rounds * kChains * (kBytes / sizeof(float)) / time;
}

// Bytes read plus bytes written per second; both pointers are aligned to 64 bytes.
extern "C" double copy_rate(int threads, float* to, const float* from, size_t count) {
  const size_t part = count / threads / 16 * 16;
  const double time = timed(threads, [&](int i) { copy(to + i * part, from + i * part, part); });
  return 2.0 * threads * part * sizeof(float) / time;
}
