#include "knn.h"

#include <algorithm>

#include "points.h"

namespace {

template <class T>
std::vector<int64_t> found(const T* x, const T* query, const bool* mask, int64_t n, int64_t dims, int64_t neighbors) {
  std::vector<std::pair<T, int64_t>> all;
  for (int64_t i = 0; i < n; ++i)
    if (const T d = distance(x + i * dims, query, dims); !mask || mask[i])
      all.emplace_back(d < std::numeric_limits<T>::max() ? d : std::numeric_limits<T>::max(), i);
  std::sort(all.begin(), all.end());
  std::vector<int64_t> indices;
  for (int64_t s = 0; s < neighbors; ++s) indices.push_back(all[s].second);
  return indices;
}

template <class T>
bool run(int64_t n, int64_t dims, int64_t neighbors, int64_t m, Kind kind, bool shared) {
  const int64_t batch = 2, stride = shared ? 0 : n * dims;
  const auto points = cloud<T>((shared ? 1 : batch) * n * dims, kind, 1), queries = cloud<T>(batch * m * dims, kind, 2);
  const auto mask = random_mask(batch, n, neighbors);
  bool good = true;
  for (const bool* allowed : {static_cast<const bool*>(nullptr), static_cast<const bool*>(mask.get())}) {
    const auto index = memory<int64_t>(batch * m * neighbors);
    good = good && run_cuda([&](vamoh::CudaRun& run) {
             return vamoh::knn_cuda<T>({points.get(), stride, n, dims}, {queries.get(), m * dims, m, dims},
                                       {allowed, n}, index.get(), batch, neighbors, run);
           });
    for (int64_t q = 0; q < batch * m; ++q) {
      const auto expected = found(points.get() + q / m * stride, queries.get() + q * dims,
                                  allowed ? allowed + q / m * n : nullptr, n, dims, neighbors);
      good = good && std::equal(expected.begin(), expected.end(), index.get() + q * neighbors);
    }
  }
  return good;
}

// So many points that the workspace serves one block, which takes all queries. Without coordinates all are equally
// near.
bool run_one_block() {
  const int64_t batch = 2, n = 270000, m = 5, neighbors = 2;
  const double nothing = 0;
  const auto mask = memory<bool>(batch * n);
  for (int64_t i = 0; i < batch * n; ++i) mask[i] = i % n % 7 == i / n;
  const auto index = memory<int64_t>(batch * m * neighbors);
  bool good = run_cuda([&](vamoh::CudaRun& run) {
    return vamoh::knn_cuda<double>({&nothing, 0, n, 0}, {&nothing, 0, m, 0}, {mask.get(), n}, index.get(), batch,
                                   neighbors, run);
  });
  for (int64_t i = 0; i < batch * m * neighbors; ++i)
    good = good && index[i] == i / (m * neighbors) + i % neighbors * 7;
  return good;
}

const Register knn([](bool slow) {
  for (Kind kind : {whole, fractions, broken})
    if (!run<float>(1, 1, 1, 1, kind, false) || !run<float>(67, 3, 20, 5, kind, true) ||
        !run<double>(130, 33, 9, 19, kind, false))
      return false;
  return run<float>(5, 40, 5, 0, fractions, true) && (!slow || run_one_block());
});

}  // namespace
