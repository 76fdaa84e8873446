#include "../point_conv.h"

#include <algorithm>

#include "../linear.h"
#include "../threads.h"
#include "memory.h"

#define VAMOH_KERNEL "../cpu/point_conv_cpu.inl"
#include "../simd/each_isa.inl"

namespace vamoh {

namespace {

constexpr int64_t kRowsPerTask = 96;
constexpr int64_t kColumns = 256;             // of the contracted features made at once, about
constexpr int64_t kDepth = 128;               // rows of them, for the gradient of linear_weight
constexpr int64_t kFewRows = 512;             // up to this many, they are stored
constexpr int64_t kTasks = 16;                // enough to occupy the threads
constexpr int64_t kRowsPerPart = 1024;        // at least, of a sum over rows that is cut
constexpr int64_t kPairs = int64_t{1} << 22;  // gradients of single reads alive at once, at least one function's
constexpr int64_t kPointsPerTask = 128;
constexpr int64_t kPackedRows = 256;
constexpr int64_t kVector = 16;  // floats of the widest vector

int64_t channels_at_once(const PointConvSizes& s) {
  const int64_t wanted = round_up(std::max<int64_t>(kColumns / std::max<int64_t>(s.width, 1), 1), kVector);
  return std::max<int64_t>(std::min(s.channels, wanted), 1);
}

bool stored(const PointConvSizes& s) { return s.batch * s.centroids <= kFewRows || s.channels * s.width == 0; }

// Calls work(first, last, worker) for blocks of [0, size).
template <class Work>
void in_blocks(int64_t size, int64_t step, int threads, const Work& work) {
  ThreadPool::get().run(ceil_div(size, step), threads,
                        [&](int64_t i, int worker) { work(i * step, std::min((i + 1) * step, size), worker); });
}

// For every point the places that hold it in index [functions, pairs], in order: starts_of(b)[j] to
// starts_of(b)[j + 1] in list_of(b).
struct Readers {
  Buffer<int64_t> starts, list;
  int64_t functions, points, pairs;

  Readers(const int64_t* neighbors, int64_t functions, int64_t points, int64_t pairs, int threads)
      : functions(functions), points(points), pairs(pairs) {
    starts = allocate<int64_t>(functions * (points + 1));
    list = allocate<int64_t>(functions * pairs);
    in_blocks(functions, 1, threads, [&](int64_t b, int64_t, int) {
      const int64_t* index = neighbors + b * pairs;
      int64_t* const start = starts.get() + b * (points + 1);
      std::fill(start, start + points + 1, 0);
      for (int64_t p = 0; p < pairs; ++p) ++start[index[p]];
      int64_t total = 0;
      for (int64_t j = 0; j <= points; ++j) total += start[j], start[j] = total;  // ends, until filled from the back
      for (int64_t p = pairs; p-- > 0;) list[b * pairs + --start[index[p]]] = p;
    });
  }

  const int64_t* starts_of(int64_t b) const { return starts.get() + (functions == 1 ? 0 : b * (points + 1)); }
  const int64_t* list_of(int64_t b) const { return list.get() + (functions == 1 ? 0 : b * pairs); }
};

}  // namespace

void point_conv(const PointConvInputs& in, float* out, const PointConvSizes& s, float slope, int threads, Isa isa) {
  const int64_t rows = s.batch * s.centroids, inputs = s.channels * s.width;
  if (stored(s)) {
    const Buffer<float> contracted = allocate<float>(rows * inputs);
    in_blocks(rows, 8, threads, [&](int64_t r0, int64_t r1, int) {
      VAMOH_DISPATCH(isa, contract)(in, s, r0, r1, 0, s.channels, contracted.get() + r0 * inputs, inputs);
    });
    const LinearSizes sizes{1, rows, inputs, s.outputs};
    linear(contracted.get(), {0, inputs, 1}, in.linear_weight, in.linear_bias, out, {0, s.outputs, 1}, sizes, threads,
           isa);
    VAMOH_DISPATCH(isa, activate)(out, rows * s.outputs, slope);
    return;
  }
  const int64_t together = channels_at_once(s), tile = kRowsPerTask * together * s.width;
  const Buffer<float> panels = allocate<float>(inputs * round_up(s.outputs, kVector));
  const Buffer<float> tiles = allocate<float>(std::max(threads, 1) * tile);
  in_blocks(inputs, kPackedRows, threads, [&](int64_t i0, int64_t i1, int) {
    VAMOH_DISPATCH(isa, pack_transposed)(in.linear_weight, inputs, s.outputs, i0, i1, panels.get());
  });
  in_blocks(rows, kRowsPerTask, threads, [&](int64_t r0, int64_t r1, int worker) {
    VAMOH_DISPATCH(isa, forward_rows)(in, s, panels.get(), r0, r1, together, slope, tiles.get() + worker * tile, out);
  });
}

namespace {

// The gradient of linear_weight from `grad`, before the activation, without storing the contracted features.
void grad_linear_weight(Isa isa, const float* grad, const PointConvInputs& in, const PointConvSizes& s, float* to,
                        int threads) {
  const int64_t rows = s.batch * s.centroids, inputs = s.channels * s.width, together = channels_at_once(s);
  const int64_t columns = ceil_div(s.channels, together), tile = kDepth * round_up(together * s.width, kVector);
  const int64_t parts = std::max<int64_t>(std::min(ceil_div(kTasks, columns), rows / kRowsPerPart), 1);
  const int64_t length = ceil_div(rows, parts), size = s.outputs * inputs;
  const Buffer<float> tiles = allocate<float>(std::max(threads, 1) * tile);
  const Buffer<float> partial = allocate<float>((parts - 1) * size);
  ThreadPool::get().run(columns * parts, threads, [&](int64_t task, int worker) {
    const int64_t c = task % columns * together, part = task / columns;
    float* const result = part == 0 ? to : partial.get() + (part - 1) * size;
    VAMOH_DISPATCH(isa, grad_linear)(grad, in, s, std::min(part * length, rows), std::min((part + 1) * length, rows), c,
                                     std::min(c + together, s.channels), kDepth, tiles.get() + worker * tile,
                                     result + c * s.width, inputs);
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < size; ++i) to[i] += partial[(part - 1) * size + i];
}

}  // namespace

void point_conv_backward(const float* grad, const float* out, const PointConvInputs& in,
                         const PointConvGradients& gradients, const PointConvSizes& s, float slope, int threads,
                         Isa isa) {
  const int64_t rows = s.batch * s.centroids, inputs = s.channels * s.width, together = channels_at_once(s);
  const int64_t reads = s.centroids * s.neighbors * s.channels;
  const bool few = stored(s);

  const Buffer<float> masked = allocate<float>(slope == 1 ? 0 : rows * s.outputs);
  const Buffer<float> sums = allocate<float>(ceil_div(rows, kRowsPerTask) * s.outputs);
  in_blocks(rows, kRowsPerTask, threads, [&](int64_t r0, int64_t r1, int) {
    VAMOH_DISPATCH(isa, begin_backward)(grad, out, r0, r1, s.outputs, slope, slope == 1 ? nullptr : masked.get(),
                                        sums.get() + r0 / kRowsPerTask * s.outputs);
  });
  if (slope != 1) grad = masked.get();
  std::fill(gradients.linear_bias, gradients.linear_bias + s.outputs, 0.0f);
  for (int64_t i = 0; i < ceil_div(rows, kRowsPerTask) * s.outputs; ++i)
    gradients.linear_bias[i % s.outputs] += sums[i];

  const Buffer<float> d = allocate<float>(few ? rows * inputs : 0);
  if (few) {
    const Buffer<float> contracted = allocate<float>(rows * inputs);
    in_blocks(rows, 8, threads, [&](int64_t r0, int64_t r1, int) {
      VAMOH_DISPATCH(isa, contract)(in, s, r0, r1, 0, s.channels, contracted.get() + r0 * inputs, inputs);
    });
    const LinearSizes sizes{1, rows, inputs, s.outputs};
    const Strides at{0, s.outputs, 1};
    linear_grad_weight(grad, at, contracted.get(), {0, inputs, 1}, gradients.linear_weight, nullptr, sizes, threads,
                       isa);
    linear_grad_x(grad, at, in.linear_weight, d.get(), sizes, threads, isa);
  } else {
    grad_linear_weight(isa, grad, in, s, gradients.linear_weight, threads);
  }

  const int64_t columns = ceil_div(s.channels, together), block = round_up(together * s.width, kVector) * s.outputs;
  const Buffer<float> panels = allocate<float>(few ? 0 : columns * block);
  if (!few)
    in_blocks(s.channels, together, threads, [&](int64_t c0, int64_t c1, int) {
      VAMOH_DISPATCH(isa, pack_columns)(in.linear_weight, inputs, s.outputs, c0 * s.width, c1 * s.width,
                                        panels.get() + c0 / together * block);
    });

  const bool wanted = gradients.features != nullptr;
  const int64_t fitting = std::max<int64_t>(kPairs / std::max<int64_t>(reads, 1), 1);
  const int64_t group = wanted ? std::min(s.batch, fitting) : s.batch;
  const Buffer<float> pairs = allocate<float>(wanted ? group * reads : 0);
  const Readers readers(in.neighbors,
                        !wanted    ? 0
                        : s.shared ? 1
                                   : s.batch,
                        s.points, s.centroids * s.neighbors, threads);
  // Shared weights gather their gradient from all functions in one task, in order.
  const int64_t functions = s.shared ? std::min(group, kRowsPerTask) : 1;
  const int64_t along = std::max<int64_t>(kRowsPerTask / functions, 1), stretches = ceil_div(s.centroids, along);
  const int64_t row_scratch = kRowsPerTask * s.outputs, d_scratch = kRowsPerTask * together * s.width;
  const Buffer<float> scratch = allocate<float>(few ? 0 : std::max(threads, 1) * (row_scratch + d_scratch));
  for (int64_t b0 = 0; b0 < s.batch; b0 += group) {
    const int64_t b1 = std::min(b0 + group, s.batch);
    const auto work = [&](int64_t first, int64_t last, int64_t m0, int64_t m1, int worker) {
      float* const read = wanted ? pairs.get() + (first - b0) * reads : nullptr;
      if (!few) {
        float* const own = scratch.get() + worker * (row_scratch + d_scratch);
        VAMOH_DISPATCH(isa, backward_rows)(grad, in, s, panels.get(), first, last, m0, m1, together, own,
                                           own + row_scratch, gradients.weights, read, reads);
        return;
      }
      for (int64_t b = first; b < last; ++b)
        for (int64_t m = m0; m < m1; ++m)
          VAMOH_DISPATCH(isa, spread)(in, s, b * s.centroids + m, 0, s.channels,
                                      d.get() + (b * s.centroids + m) * inputs, gradients.weights,
                                      wanted ? read + (b - first) * reads + m * s.neighbors * s.channels : nullptr);
    };
    ThreadPool::get().run(s.shared ? stretches : (b1 - b0) * stretches, threads, [&](int64_t task, int worker) {
      const int64_t m0 = task % stretches * along, m1 = std::min(m0 + along, s.centroids);
      if (!s.shared) return work(b0 + task / stretches, b0 + task / stretches + 1, m0, m1, worker);
      for (int64_t b = b0; b < b1; b += functions) work(b, std::min(b + functions, b1), m0, m1, worker);
    });
    if (!wanted) continue;
    const int64_t tasks = ceil_div(s.points, kPointsPerTask);
    ThreadPool::get().run((b1 - b0) * tasks, threads, [&](int64_t task, int) {
      const int64_t b = b0 + task / tasks, j = task % tasks * kPointsPerTask;
      VAMOH_DISPATCH(isa, collect)(pairs.get() + (b - b0) * reads, readers.starts_of(b), readers.list_of(b), 1,
                                   s.channels, j, std::min(j + kPointsPerTask, s.points), 1, false,
                                   gradients.features + b * s.points * s.channels);
    });
  }
}

void neighbor_difference(const float* table, const int64_t* neighbors, const int64_t* centroids, const float* bias,
                         float* out, const DifferenceSizes& s, int threads, Isa isa) {
  const int64_t tasks = ceil_div(s.centroids, kPointsPerTask), pairs = s.centroids * s.neighbors;
  ThreadPool::get().run(s.batch * tasks, threads, [&](int64_t task, int) {
    const int64_t b = task / tasks, m = task % tasks * kPointsPerTask, own = s.index_shared ? 0 : b;
    VAMOH_DISPATCH(isa, difference_rows)(table + (s.table_shared ? 0 : b * s.points * s.width), neighbors + own * pairs,
                                         centroids + own * s.centroids, bias, s.neighbors, s.width, m,
                                         std::min(m + kPointsPerTask, s.centroids), out + b * pairs * s.width);
  });
}

void neighbor_difference_backward(const float* grad, const int64_t* neighbors, const int64_t* centroids,
                                  float* grad_table, float* grad_bias, const DifferenceSizes& s, int threads, Isa isa) {
  const int64_t pairs = s.centroids * s.neighbors, tasks = ceil_div(s.centroids, kPointsPerTask);
  const int64_t indices = s.index_shared ? 1 : s.batch;
  const Readers by_neighbor(neighbors, indices, s.points, pairs, threads);
  const Readers by_centroid(centroids, indices, s.points, s.centroids, threads);
  const Buffer<float> sums = allocate<float>(s.batch * s.centroids * s.width);
  const Buffer<float> totals = allocate<float>(s.batch * tasks * s.width);
  ThreadPool& pool = ThreadPool::get();
  pool.run(s.batch * tasks, threads, [&](int64_t task, int) {
    const int64_t b = task / tasks, m = task % tasks * kPointsPerTask;
    VAMOH_DISPATCH(isa, sum_rows)(grad + b * pairs * s.width, s.neighbors, s.width, m,
                                  std::min(m + kPointsPerTask, s.centroids), sums.get() + b * s.centroids * s.width,
                                  totals.get() + task * s.width);
  });
  std::fill(grad_bias, grad_bias + s.width, 0.0f);
  for (int64_t i = 0; i < s.batch * tasks * s.width; ++i) grad_bias[i % s.width] += totals[i];

  const int64_t stretches = ceil_div(s.points, kPointsPerTask);
  pool.run((s.table_shared ? 1 : s.batch) * stretches, threads, [&](int64_t task, int) {
    const int64_t first = task / stretches, j = task % stretches * kPointsPerTask;
    const int64_t end = std::min(j + kPointsPerTask, s.points);
    float* const to = grad_table + first * s.points * s.width;
    for (int64_t b = first; b < (s.table_shared ? s.batch : first + 1); ++b) {
      VAMOH_DISPATCH(isa, collect)(grad + b * pairs * s.width, by_neighbor.starts_of(b), by_neighbor.list_of(b), 1,
                                   s.width, j, end, 1, b > first, to);
      VAMOH_DISPATCH(isa, collect)(sums.get() + b * s.centroids * s.width, by_centroid.starts_of(b),
                                   by_centroid.list_of(b), 1, s.width, j, end, -1, true, to);
    }
  });
}

}  // namespace vamoh
