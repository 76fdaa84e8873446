// Runs both ops on odd sizes in exactly sized memory; the sanitizers do the checking.
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "farthest_point_sample.h"
#include "knn.h"

template <class T>
int run(vamoh::Isa isa, int64_t n, int64_t d, int64_t s, int threads) {
  const int64_t batch = 3, m = 67;
  std::unique_ptr<T[]> points(new T[batch * n * d]), queries(new T[batch * m * d]);
  std::unique_ptr<bool[]> mask(new bool[batch * n]);
  uint32_t state = 1;
  const auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 16; };
  for (int64_t i = 0; i < batch * n * d; ++i) points[i] = T(next() % 9);
  for (int64_t i = 0; i < batch * m * d; ++i) queries[i] = T(next() % 9);
  for (int64_t i = 0; i < batch * n; ++i) mask[i] = i % n < s || next() % 2;
  int bad = 0;
  for (const bool* allowed : {static_cast<const bool*>(nullptr), static_cast<const bool*>(mask.get())}) {
    std::unique_ptr<int64_t[]> order(new int64_t[batch * s]), index(new int64_t[batch * m * s]);
    vamoh::farthest_point_sample(points.get(), n * d, allowed, n, order.get(), batch, n, d, s, threads, isa);
    vamoh::knn(points.get(), n * d, queries.get(), m * d, allowed, n, index.get(), batch, n, m, d, s, threads, isa);
    for (int64_t i = 0; i < batch * s; ++i) bad |= order[i] < 0 || order[i] >= n;
    for (int64_t i = 0; i < batch * m * s; ++i) bad |= index[i] < 0 || index[i] >= n;
  }
  return bad;
}

int main() {
  int bad = 0;
  for (const std::string& name : vamoh::supported_isas())
    for (int64_t n : {1, 7, 63, 65, 130})
      for (int64_t d : {1, 3, 33})
        for (int threads : {1, 2}) {
          bad |= run<float>(vamoh::parse_isa(name), n, d, n > 5 ? 5 : n, threads);
          bad |= run<double>(vamoh::parse_isa(name), n, d, n, threads);
        }
  return bad;
}
