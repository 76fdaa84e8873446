#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <numeric>

#include "check.h"
#include "farthest_point_sample.h"
#include "knn.h"

namespace {

template <class T>
bool run(vamoh::Isa isa, int64_t batch, int64_t n, int64_t d, int64_t s, int threads, int64_t m = 67) {
  std::unique_ptr<T[]> points(new T[batch * n * d]), queries(new T[batch * m * d]);
  std::unique_ptr<bool[]> mask(new bool[batch * n]);
  uint32_t state = 1;
  const auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 16; };
  for (int64_t i = 0; i < batch * n * d; ++i) points[i] = T(next() % 9);
  for (int64_t i = 0; i < batch * m * d; ++i) queries[i] = T(next() % 9);
  for (int64_t i = 0; i < batch * n; ++i) mask[i] = i % n < s || next() % 2;
  bool good = true;
  for (const bool* allowed : {static_cast<const bool*>(nullptr), static_cast<const bool*>(mask.get())}) {
    std::unique_ptr<int64_t[]> order(new int64_t[batch * s]), index(new int64_t[batch * m * s]);
    const vamoh::Cloud<T> cloud{points.get(), n * d, n, d};
    vamoh::farthest_point_sample(cloud, {allowed, n}, order.get(), batch, s, threads, isa);
    vamoh::knn(cloud, {queries.get(), m * d, m, d}, {allowed, n}, index.get(), batch, s, threads, isa);
    for (int64_t i = 0; i < batch * s; ++i) good &= order[i] >= 0 && order[i] < n;
    for (int64_t i = 0; i < batch * m * s; ++i) good &= index[i] >= 0 && index[i] < n;
  }
  return good;
}

template <class T>
bool run_by_table(vamoh::Isa isa, int64_t n, int64_t s, int64_t half, int threads) {
  const int64_t batch = 3, m = 67;
  std::unique_ptr<int64_t[]> points(new int64_t[batch * n]), queries(new int64_t[batch * m]);
  std::unique_ptr<T[]> table(new T[2 * half + 1]);
  for (int64_t i = 0; i < batch * n; ++i) points[i] = i * 7 % (half + 1);
  for (int64_t i = 0; i < batch * m; ++i) queries[i] = i * 5 % (half + 1);
  for (int64_t i = 0; i <= 2 * half; ++i) table[i] = T(i * 3 % 5);
  std::unique_ptr<int32_t[]> nearest(new int32_t[2 * half + 1]);
  std::iota(nearest.get(), nearest.get() + 2 * half + 1, 0);
  std::sort(nearest.get(), nearest.get() + 2 * half + 1, [&](int32_t a, int32_t b) { return table[a] < table[b]; });
  std::unique_ptr<int64_t[]> order(new int64_t[batch * s]), index(new int64_t[batch * m * s]);
  const vamoh::Cloud<int64_t> cells{points.get(), n, n, 1};
  const vamoh::DistanceTable<T> distances{table.get(), 2 * half + 1};
  vamoh::farthest_point_sample_by_table(cells, distances, {nullptr, 0}, order.get(), batch, s, threads, isa);
  bool good = true;
  for (int64_t i = 0; i < batch * s; ++i) good &= order[i] >= 0 && order[i] < n;
  for (int64_t length : {int64_t{0}, half, 2 * half + 1}) {
    vamoh::knn_by_table(cells, {queries.get(), m, m, 1}, distances, nearest.get(), length, {nullptr, 0}, index.get(),
                        batch, s, threads, isa);
    for (int64_t i = 0; i < batch * m * s; ++i) good &= index[i] >= 0 && index[i] < n;
  }
  return good;
}

const Register neighbors([](vamoh::Isa isa, int threads) {
  bool good = true;
  for (int64_t n : {1, 7, 63, 65, 130})
    for (int64_t d : {1, 3, 33, 67}) {
      good &= run<float>(isa, 3, n, d, n > 5 ? 5 : n, threads);
      good &= run<double>(isa, 3, n, d, n, threads);
    }
  for (int64_t d : {63, 65}) good &= run<float>(isa, 1, 1100, d, 9, threads);  // threads share a cloud
  good &= run<float>(isa, 2, 4161, 2, 384, threads, 384);  // by trees
  good &= run<double>(isa, 2, 4161, 3, 384, threads, 384);
  for (int64_t n : {1, 7, 63, 65, 130}) {
    good &= run_by_table<float>(isa, n, n > 5 ? 5 : n, 12, threads);  // several points in a cell
    good &= run_by_table<double>(isa, n, n, 210, threads);            // one
  }
  return good;
});

}  // namespace
