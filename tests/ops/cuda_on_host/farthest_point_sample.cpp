#include "farthest_point_sample.h"

#include <algorithm>

#include "points.h"

namespace {

template <class T>
std::vector<int64_t> sampled(const T* x, const bool* mask, int64_t n, int64_t dims, int64_t samples) {
  std::vector<int64_t> candidates, order;
  for (int64_t i = 0; i < n; ++i)
    if (!mask || mask[i]) candidates.push_back(i);
  if (static_cast<int64_t>(candidates.size()) <= samples) {
    candidates.resize(samples, -1);
    return candidates;
  }
  std::vector<T> nearest(n, -1);
  for (int64_t i : candidates) nearest[i] = std::numeric_limits<T>::infinity();
  while (static_cast<int64_t>(order.size()) < samples) {
    order.push_back(std::max_element(nearest.begin(), nearest.end()) - nearest.begin());
    nearest[order.back()] = -1;
    for (int64_t i = 0; i < n; ++i)
      if (const T d = distance(x + i * dims, x + order.back() * dims, dims); d < nearest[i]) nearest[i] = d;
  }
  return order;
}

template <class T>
bool run(int64_t n, int64_t dims, int64_t samples, Kind kind, bool shared) {
  const int64_t batch = 2, stride = shared ? 0 : n * dims;
  const auto coords = cloud<T>((shared ? 1 : batch) * n * dims, kind, 1);
  const auto mask = random_mask(batch, n, 1);
  bool good = true;
  for (const bool* allowed : {static_cast<const bool*>(nullptr), static_cast<const bool*>(mask.get())}) {
    const auto order = memory<int64_t>(batch * samples);
    good = good && run_cuda([&](vamoh::CudaRun& run) {
             return vamoh::farthest_point_sample_cuda<T>({coords.get(), stride, n, dims}, {allowed, n}, order.get(),
                                                         batch, samples, run);
           });
    for (int64_t b = 0; b < batch; ++b) {
      const auto expected = sampled(coords.get() + b * stride, allowed ? allowed + b * n : nullptr, n, dims, samples);
      good = good && std::equal(expected.begin(), expected.end(), order.get() + b * samples);
    }
  }
  return good;
}

const Register farthest_point_sample([](bool) {
  for (Kind kind : {whole, fractions, broken})
    if (!run<float>(1, 1, 1, kind, false) || !run<float>(67, 3, 17, kind, true) ||
        !run<double>(131, 35, 5, kind, false))
      return false;
  return run<float>(30, 2, 25, whole, false) && run<float>(1030, 2, 4, whole, true);
});

}  // namespace
