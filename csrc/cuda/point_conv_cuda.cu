#include "../point_conv.h"
#include "launch.cuh"
#include "product.cuh"
#include "readers.cuh"

namespace vamoh {

namespace {

constexpr int64_t kContracted = int64_t{1} << 22;  // gradients of contracted features at once, or one function's
constexpr int64_t kBlocks = 512;                   // enough to occupy a device
constexpr int64_t kRowsPerPart = 256;              // at least, of a sum over rows that is cut

// Entry k = (c, q) of contracted row r: centroid r % M of function r / M.
__device__ inline float contracted(const PointConvInputs& in, const PointConvSizes& s, int64_t r, int64_t k) {
  const int64_t c = k / s.width, q = k % s.width;
  const int64_t first = (s.shared ? r % s.centroids : r) * s.neighbors;
  const float* const features = in.features + r / s.centroids * s.points * s.channels + c;
  float sum = 0;
  for (int64_t n = first; n < first + s.neighbors; ++n)
    sum += features[in.neighbors[n] * s.channels] * in.weights[n * s.width + q];
  return sum;
}

// The gradient before the activation.
__device__ inline float before(const float* grad, const float* out, float slope, int64_t at) {
  return out[at] > 0 ? grad[at] : grad[at] * slope;
}

__global__ void __launch_bounds__(kProductThreads, kProductBlocks)
    forward(PointConvInputs in, float* out, PointConvSizes s, float slope, int64_t across) {
  const int64_t rows = s.batch * s.centroids, inputs = s.channels * s.width;
  const int64_t r0 = blockIdx.x / across * kTile, o0 = blockIdx.x % across * kTile;
  product<true, true>(
      0, inputs, [&](int i, int64_t k) { return r0 + i < rows ? contracted(in, s, r0 + i, k) : 0.0f; },
      [&](int j, int64_t k) { return o0 + j < s.outputs ? in.linear_weight[(o0 + j) * inputs + k] : 0.0f; },
      [&](int i, int j, float sum) {
        if (r0 + i >= rows || o0 + j >= s.outputs) return;
        const float value = sum + in.linear_bias[o0 + j];
        out[(r0 + i) * s.outputs + o0 + j] = value > 0 ? value : value * slope;
      });
}

// d [b1 - b0, M, C * Q]: the gradient of the contracted features of functions [b0, b1).
__global__ void __launch_bounds__(kProductThreads, kProductBlocks)
    grad_contracted(const float* grad, const float* out, PointConvInputs in, PointConvSizes s, float slope, int64_t b0,
                    int64_t b1, float* d, int64_t across) {
  const int64_t rows = (b1 - b0) * s.centroids, inputs = s.channels * s.width, shift = b0 * s.centroids * s.outputs;
  const int64_t r0 = blockIdx.x / across * kTile, k0 = blockIdx.x % across * kTile;
  product<true, false>(
      0, s.outputs,
      [&](int i, int64_t o) {
        return r0 + i < rows ? before(grad, out, slope, shift + (r0 + i) * s.outputs + o) : 0.0f;
      },
      [&](int j, int64_t o) { return k0 + j < inputs ? in.linear_weight[o * inputs + k0 + j] : 0.0f; },
      [&](int i, int j, float sum) {
        if (r0 + i < rows && k0 + j < inputs) d[(r0 + i) * inputs + k0 + j] = sum;
      });
}

// sums [parts, O, C * Q + 1]: of a part of the rows, the gradient of linear_weight and, as the weight of an input that
// is always 1, of linear_bias.
__global__ void __launch_bounds__(kProductThreads, kProductBlocks)
    grad_linear(const float* grad, const float* out, PointConvInputs in, PointConvSizes s, float slope, float* sums,
                int64_t length, int64_t down, int64_t across) {
  const int64_t rows = s.batch * s.centroids, inputs = s.channels * s.width;
  const int64_t part = blockIdx.x / (down * across), o0 = blockIdx.x / across % down * kTile,
                k0 = blockIdx.x % across * kTile;
  const int64_t begin = part * length, end = begin + length < rows ? begin + length : rows;
  product<false, false>(
      begin, end,
      [&](int i, int64_t r) { return o0 + i < s.outputs ? before(grad, out, slope, r * s.outputs + o0 + i) : 0.0f; },
      [&](int j, int64_t r) { return k0 + j < inputs    ? contracted(in, s, r, k0 + j)
                                     : k0 + j == inputs ? 1.0f
                                                        : 0.0f; },
      [&](int i, int j, float sum) {
        if (o0 + i < s.outputs && k0 + j <= inputs) sums[(part * s.outputs + o0 + i) * (inputs + 1) + k0 + j] = sum;
      });
}

__global__ void add_parts(const float* sums, int64_t parts, int64_t outputs, int64_t inputs, float* weight,
                          float* bias) {
  for_each(outputs * (inputs + 1), [&](int64_t i) {
    float total = 0;
    for (int64_t part = 0; part < parts; ++part) total += sums[part * outputs * (inputs + 1) + i];
    const int64_t o = i / (inputs + 1), k = i % (inputs + 1);
    (k < inputs ? weight[o * inputs + k] : bias[o]) = total;
  });
}

// Functions [b0, b1); shared weights gather their gradient from all functions, in order.
__global__ void grad_weights(PointConvInputs in, PointConvSizes s, int64_t b0, int64_t b1, const float* d, float* to) {
  const int64_t own = s.centroids * s.neighbors * s.width, inputs = s.channels * s.width;
  for_each(s.shared ? own : (b1 - b0) * own, [&](int64_t i) {
    const int64_t q = i % s.width, m = i / s.width / s.neighbors % s.centroids;
    const int64_t at = s.shared ? i : b0 * own + i;
    const int64_t neighbor = in.neighbors[at / s.width];
    const int64_t first = s.shared ? b0 : b0 + i / own, last = s.shared ? b1 : first + 1;
    float total = s.shared && b0 > 0 ? to[at] : 0;
    for (int64_t b = first; b < last; ++b) {
      const float* const features = in.features + (b * s.points + neighbor) * s.channels;
      const float* const right = d + ((b - b0) * s.centroids + m) * inputs + q;
      float sum = 0;
      for (int64_t c = 0; c < s.channels; ++c) sum += features[c] * right[c * s.width];
      total += sum;
    }
    to[at] = total;
  });
}

__global__ void grad_features(PointConvInputs in, PointConvSizes s, int64_t b0, int64_t b1, const float* d,
                              Readers readers, float* to) {
  const int64_t inputs = s.channels * s.width, pairs = s.centroids * s.neighbors;
  for_each((b1 - b0) * s.points * s.channels, [&](int64_t i) {
    const int64_t c = i % s.channels, j = i / s.channels % s.points, b = b0 + i / s.channels / s.points;
    const int64_t* const starts = readers.starts_of(b);
    const int64_t* const list = readers.list_of(b);
    float total = 0;
    for (int64_t p = starts[j]; p < starts[j + 1]; ++p) {
      const float* const left = d + ((b - b0) * s.centroids + list[p] / s.neighbors) * inputs + c * s.width;
      const float* const right = in.weights + ((s.shared ? 0 : b * pairs) + list[p]) * s.width;
      float sum = 0;
      for (int64_t q = 0; q < s.width; ++q) sum += left[q] * right[q];
      total += sum;
    }
    to[(b * s.points + j) * s.channels + c] = total;
  });
}

__global__ void difference(const float* table, const int64_t* neighbors, const int64_t* centroids, const float* bias,
                           float* out, DifferenceSizes s) {
  for_each(s.batch * s.centroids * s.neighbors * s.width, [&](int64_t i) {
    const int64_t q = i % s.width, pair = i / s.width, row = pair / s.neighbors, b = row / s.centroids;
    const int64_t own = s.index_shared ? pair % (s.centroids * s.neighbors) : pair;
    const int64_t centroid = centroids[s.index_shared ? row % s.centroids : row];
    const float* const values = table + (s.table_shared ? 0 : b * s.points * s.width) + q;
    out[i] = (values[neighbors[own] * s.width] - values[centroid * s.width]) + bias[q];
  });
}

// to[i] = sum of `count` rows of [rows, width] from row i * count on, fewer at the end.
__global__ void sum_rows(const float* from, int64_t rows, int64_t count, int64_t width, int64_t sums, float* to) {
  for_each(sums * width, [&](int64_t i) {
    const int64_t q = i % width, begin = i / width * count, end = begin + count < rows ? begin + count : rows;
    float sum = 0;
    for (int64_t r = begin; r < end; ++r) sum += from[r * width + q];
    to[i] = sum;
  });
}

// sums [B, M, Q]: of grad over the neighbours. A shared table gathers its gradient from all functions, in order.
__global__ void grad_difference(const float* grad, const float* sums, Readers by_neighbor, Readers by_centroid,
                                float* to, DifferenceSizes s) {
  for_each((s.table_shared ? 1 : s.batch) * s.points * s.width, [&](int64_t i) {
    const int64_t q = i % s.width, j = i / s.width % s.points, first = i / s.width / s.points;
    float total = 0;
    for (int64_t b = first; b < (s.table_shared ? s.batch : first + 1); ++b) {
      const int64_t *starts = by_neighbor.starts_of(b), *list = by_neighbor.list_of(b);
      float sum = 0;
      for (int64_t p = starts[j]; p < starts[j + 1]; ++p)
        sum += grad[(b * s.centroids * s.neighbors + list[p]) * s.width + q];
      starts = by_centroid.starts_of(b), list = by_centroid.list_of(b);
      for (int64_t p = starts[j]; p < starts[j + 1]; ++p) sum -= sums[(b * s.centroids + list[p]) * s.width + q];
      total += sum;
    }
    to[i] = total;
  });
}

}  // namespace

int point_conv_cuda(const PointConvInputs& in, float* out, const PointConvSizes& s, float slope, CudaRun& run) {
  Launcher launch(run);
  if (launch.asked()) return 0;
  const int64_t across = ceil_div(s.outputs, kTile), tasks = ceil_div(s.batch * s.centroids, kTile) * across;
  launch(forward, tasks, kProductThreads, in, out, s, slope, across);
  return launch.error();
}

int point_conv_backward_cuda(const float* grad, const float* out, const PointConvInputs& in,
                             const PointConvGradients& gradients, const PointConvSizes& s, float slope, CudaRun& run) {
  Launcher launch(run);
  const int64_t rows = s.batch * s.centroids, inputs = s.channels * s.width, own = s.centroids * inputs;
  const int64_t down = ceil_div(s.outputs, kTile), across = ceil_div(inputs + 1, kTile);
  const int64_t wanted = std::max<int64_t>(kBlocks / std::max<int64_t>(down * across, 1), 1);
  const int64_t length = std::max(ceil_div(rows, wanted), kRowsPerPart);
  const int64_t parts = std::max<int64_t>(ceil_div(rows, length), 1);
  const int64_t group = std::min(s.batch, std::max<int64_t>(kContracted / std::max<int64_t>(own, 1), 1));
  float* const sums = launch.take<float>(parts * s.outputs * (inputs + 1));
  float* const d = launch.take<float>(group * own);
  const Readers readers = take_readers(launch,
                                       !gradients.features ? 0
                                       : s.shared          ? 1
                                                           : s.batch,
                                       s.points, s.centroids * s.neighbors);
  if (launch.asked()) return 0;

  const int64_t tasks = parts * down * across;
  launch(grad_linear, tasks, kProductThreads, grad, out, in, s, slope, sums, length, down, across);
  launch.each(add_parts, s.outputs * (inputs + 1), sums, parts, s.outputs, inputs, gradients.linear_weight,
              gradients.linear_bias);
  fill_readers(launch, in.neighbors, readers);
  for (int64_t b0 = 0; b0 == 0 || b0 < s.batch; b0 += std::max<int64_t>(group, 1)) {
    const int64_t b1 = std::min(b0 + group, s.batch), wide = ceil_div(inputs, kTile);
    const int64_t tiles = ceil_div((b1 - b0) * s.centroids, kTile) * wide;
    launch(grad_contracted, tiles, kProductThreads, grad, out, in, s, slope, b0, b1, d, wide);
    const int64_t weights = (s.shared ? 1 : b1 - b0) * s.centroids * s.neighbors * s.width;
    launch.each(grad_weights, weights, in, s, b0, b1, d, gradients.weights);
    if (gradients.features)
      launch.each(grad_features, (b1 - b0) * s.points * s.channels, in, s, b0, b1, d, readers, gradients.features);
  }
  return launch.error();
}

int neighbor_difference_cuda(const float* table, const int64_t* neighbors, const int64_t* centroids, const float* bias,
                             float* out, const DifferenceSizes& s, CudaRun& run) {
  Launcher launch(run);
  if (launch.asked()) return 0;
  launch.each(difference, s.batch * s.centroids * s.neighbors * s.width, table, neighbors, centroids, bias, out, s);
  return launch.error();
}

int neighbor_difference_backward_cuda(const float* grad, const int64_t* neighbors, const int64_t* centroids,
                                      float* grad_table, float* grad_bias, const DifferenceSizes& s, CudaRun& run) {
  Launcher launch(run);
  const int64_t functions = s.index_shared ? 1 : s.batch, rows = s.batch * s.centroids;
  const int64_t parts = ceil_div(rows, kRowsPerPart);
  const Readers by_neighbor = take_readers(launch, functions, s.points, s.centroids * s.neighbors);
  const Readers by_centroid = take_readers(launch, functions, s.points, s.centroids);
  float* const sums = launch.take<float>(rows * s.width);
  float* const totals = launch.take<float>(parts * s.width);
  if (launch.asked()) return 0;
  fill_readers(launch, neighbors, by_neighbor);
  fill_readers(launch, centroids, by_centroid);
  const auto add = [&](const float* from, int64_t count, int64_t together, int64_t results, float* to) {
    launch.each(sum_rows, results * s.width, from, count, together, s.width, results, to);
  };
  add(grad, rows * s.neighbors, s.neighbors, rows, sums);
  add(sums, rows, kRowsPerPart, parts, totals);
  add(totals, parts, parts, 1, grad_bias);
  launch.each(grad_difference, (s.table_shared ? 1 : s.batch) * s.points * s.width, grad, sums, by_neighbor,
              by_centroid, grad_table, s);
  return launch.error();
}

}  // namespace vamoh
