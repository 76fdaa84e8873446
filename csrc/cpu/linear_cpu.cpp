#include "../linear.h"

#include <algorithm>

#include "../threads.h"
#include "memory.h"

#define VAMOH_KERNEL "../cpu/linear_cpu.inl"
#include "../simd/each_isa.inl"

namespace vamoh {

namespace {

constexpr int64_t kRowsAtOnce = 512;  // rows m for which the weight is read once
constexpr int64_t kThinRows = 24;     // up to this many rows, sums along the contraction
constexpr int64_t kOutsPerTask = 96;
constexpr int64_t kDepth = 512;                  // of a contraction between stores of its sums
constexpr int64_t kStrip = 512;                  // columns of grad_x of a task
constexpr int64_t kTasks = 16;                   // enough to occupy the threads
constexpr int64_t kOutsPerPart = 1024;           // at least, of a contraction that is cut
constexpr int64_t kStreamed = int64_t{1} << 22;  // values of a gradient that no cache keeps until it is read
constexpr int64_t kSmall = int64_t{1} << 17;     // multiplications that are not worth a second thread
constexpr int64_t kVector = 16;                  // floats of the widest vector

int useful_threads(const LinearSizes& s, int threads) {
  return s.groups * s.rows * s.in * s.out <= kSmall ? 1 : threads;
}

}  // namespace

void linear(const float* x, Strides x_strides, const float* weight, const float* bias, float* out, Strides out_strides,
            LinearSizes s, int threads, Isa isa) {
  threads = useful_threads(s, threads);
  const int64_t together = std::min(s.rows, kRowsAtOnce), padded = round_up(together, kVector);
  const bool shared = x_strides.group == 0;
  const int64_t size = padded * round_up(s.in, kVector);
  const Buffer<float> packed = allocate<float>((shared ? 1 : s.groups) * size);
  const Buffer<float> sums = allocate<float>(std::max(threads, 1) * kOutsPerTask * padded);
  const int64_t tasks = ceil_div(s.out, kOutsPerTask);
  ThreadPool& pool = ThreadPool::get();
  for (int64_t m = 0; m < s.rows; m += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, s.rows - m);
    const bool thin = rows <= kThinRows;
    pool.run(shared ? std::min<int64_t>(s.groups, 1) : s.groups, threads, [&](int64_t g, int) {
      const float* from = x + g * x_strides.group + m * x_strides.row;
      float* to = packed.get() + g * size;
      thin ? VAMOH_DISPATCH(isa, pack_thin)(from, x_strides.row, x_strides.value, rows, s.in, to)
           : VAMOH_DISPATCH(isa, pack)(from, x_strides.value, x_strides.row, s.in, rows, to);
    });
    pool.run(s.groups * tasks, threads, [&](int64_t task, int worker) {
      const int64_t g = task / tasks, o = task % tasks * kOutsPerTask;
      const int64_t end = std::min(o + kOutsPerTask, s.out);
      const float* w = weight + g * s.out * s.in;
      const float* b = bias ? bias + g * s.out : nullptr;
      const float* from = packed.get() + (shared ? 0 : g * size);
      float* to = out + g * out_strides.group + m * out_strides.row;
      thin ? VAMOH_DISPATCH(isa, linear_forward_thin)(w, b, from, rows, s.in, o, end, to, out_strides.row)
           : VAMOH_DISPATCH(isa, linear_forward)(w, b, from, rows, s.in, o, end, kDepth,
                                                 sums.get() + worker * kOutsPerTask * padded, to, out_strides.row);
    });
  }
}

void linear_grad_x(const float* grad, Strides grad_strides, const float* weight, float* grad_x, LinearSizes s,
                   int threads, Isa isa) {
  threads = useful_threads(s, threads);
  const int64_t strip = std::max<int64_t>(std::min(s.in, kStrip), 1), strips = ceil_div(s.in, strip);
  const int64_t width = round_up(strip, kVector);
  const int64_t together = std::min(s.rows, kRowsAtOnce);
  // A matrix that gives few tasks is cut across the contraction too: by its size alone, so that sums do not depend on
  // the number of threads.
  const int64_t wanted = ceil_div(kTasks, std::max<int64_t>(s.groups * strips, 1));
  const int64_t parts = std::max<int64_t>(std::min(wanted, s.out / kOutsPerPart), 1);
  const int64_t length = ceil_div(s.out, parts), tasks = parts * strips;
  const Buffer<float> packed = allocate<float>(std::max(threads, 1) * portable::kPackedDepth * width);
  const Buffer<float> partial = allocate<float>(parts > 1 ? s.groups * tasks * together * width : 0);
  ThreadPool& pool = ThreadPool::get();
  for (int64_t m = 0; m < s.rows; m += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, s.rows - m);
    const auto result = [&](int64_t g, int64_t i) { return grad_x + (g * s.rows + m) * s.in + i; };
    pool.run(s.groups * tasks, threads, [&](int64_t task, int worker) {
      const int64_t g = task / tasks, part = task % tasks / strips, i = task % strips * strip;
      VAMOH_DISPATCH(isa, linear_grad_x)(
          grad + g * grad_strides.group + m * grad_strides.row, grad_strides.row, grad_strides.value,
          weight + g * s.out * s.in, rows, s.in, i, std::min(i + strip, s.in), part * length,
          std::min((part + 1) * length, s.out), packed.get() + worker * portable::kPackedDepth * width,
          parts > 1 ? partial.get() + task * together * width : result(g, i), parts > 1 ? width : s.in);
    });
    if (parts > 1)
      pool.run(s.groups * strips, threads, [&](int64_t task, int) {
        const int64_t g = task / strips, strip_index = task % strips, i = strip_index * strip;
        const float* from = partial.get() + (g * tasks + strip_index) * together * width;
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t j = 0; j < std::min(strip, s.in - i); ++j) {
            float total = 0;
            for (int64_t part = 0; part < parts; ++part)
              total += from[part * strips * together * width + r * width + j];
            result(g, i)[r * s.in + j] = total;
          }
      });
  }
}

void linear_grad_weight(const float* grad, Strides grad_strides, const float* x, Strides x_strides, float* grad_weight,
                        float* grad_bias, LinearSizes s, int threads, Isa isa) {
  threads = useful_threads(s, threads);
  const bool shared = x_strides.group == 0;
  const int64_t size = s.rows * round_up(s.in, kVector);
  const bool streams = s.rows <= kDepth && s.in % kVector == 0 && s.groups * s.out * s.in >= kStreamed &&
                       reinterpret_cast<uintptr_t>(grad_weight) % 64 == 0;
  if (grad_weight) expect_huge(grad_weight, s.groups * s.out * s.in * 4);
  const Buffer<float> packed = allocate<float>((shared ? 1 : s.groups) * size);
  const int64_t tasks = ceil_div(s.out, kOutsPerTask);
  ThreadPool& pool = ThreadPool::get();
  const int64_t packs = !grad_weight ? 0 : shared ? std::min<int64_t>(s.groups, 1) : s.groups;
  pool.run(packs, threads, [&](int64_t g, int) {
    VAMOH_DISPATCH(isa, pack)(x + g * x_strides.group, x_strides.row, x_strides.value, s.rows, s.in,
                              packed.get() + g * size);
  });
  pool.run(s.groups * tasks, threads, [&](int64_t task, int) {
    const int64_t g = task / tasks, o = task % tasks * kOutsPerTask;
    const int64_t end = std::min(o + kOutsPerTask, s.out);
    const float* from = grad + g * grad_strides.group;
    if (grad_weight)
      VAMOH_DISPATCH(isa, linear_grad_weight)(from, grad_strides.row, grad_strides.value,
                                              packed.get() + (shared ? 0 : g * size), s.rows, s.in, o, end, kDepth,
                                              streams, grad_weight + g * s.out * s.in);
    if (grad_bias)
      VAMOH_DISPATCH(isa, linear_grad_bias)(from, grad_strides.row, grad_strides.value, s.rows, o, end,
                                            grad_bias + g * s.out);
  });
}

}  // namespace vamoh
