#include "../linear.h"

#include <algorithm>

#include "../threads.h"
#include "memory.h"

#define VAMOH_KERNEL "linear_cpu.inl"
#include "each_isa.inl"

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

struct Kernel {
  decltype(&portable::pack) pack;
  decltype(&portable::pack_thin) pack_thin;
  decltype(&portable::linear_forward) forward;
  decltype(&portable::linear_forward_thin) forward_thin;
  decltype(&portable::linear_grad_x) grad_x;
  decltype(&portable::linear_grad_weight) grad_weight;
  decltype(&portable::linear_grad_bias) grad_bias;
};

#define VAMOH_LINEAR(isa)                                                                              \
  Kernel {                                                                                             \
    &isa::pack, &isa::pack_thin, &isa::linear_forward, &isa::linear_forward_thin, &isa::linear_grad_x, \
        &isa::linear_grad_weight, &isa::linear_grad_bias                                               \
  }
Kernel kernel(Isa isa) {
#if VAMOH_X86
  if (isa == Isa::avx512) return VAMOH_LINEAR(avx512);
  if (isa == Isa::avx2) return VAMOH_LINEAR(avx2);
#endif
  (void)isa;
  return VAMOH_LINEAR(portable);
}
#undef VAMOH_LINEAR

int useful_threads(const LinearSizes& s, int threads) {
  return s.groups * s.rows * s.in * s.out <= kSmall ? 1 : threads;
}

int64_t blocks(int64_t size, int64_t step) { return (size + step - 1) / step; }

}  // namespace

void linear(const float* x, Strides x_at, const float* weight, const float* bias, float* out, Strides out_at,
            LinearSizes s, int threads, Isa isa) {
  const Kernel run = kernel(isa);
  threads = useful_threads(s, threads);
  const int64_t together = std::min(s.rows, kRowsAtOnce), padded = round_up(together, kVector);
  const bool shared = x_at.group == 0;
  const int64_t size = padded * round_up(s.in, kVector);
  const Buffer<float> packed = allocate<float>((shared ? 1 : s.groups) * size);
  const Buffer<float> sums = allocate<float>(std::max(threads, 1) * kOutsPerTask * padded);
  const int64_t tasks = blocks(s.out, kOutsPerTask);
  ThreadPool& pool = ThreadPool::get();
  for (int64_t m = 0; m < s.rows; m += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, s.rows - m);
    const bool thin = rows <= kThinRows;
    pool.run(shared ? std::min<int64_t>(s.groups, 1) : s.groups, threads, [&](int64_t g, int) {
      const float* from = x + g * x_at.group + m * x_at.row;
      float* to = packed.get() + g * size;
      thin ? run.pack_thin(from, x_at.row, x_at.value, rows, s.in, to)
           : run.pack(from, x_at.value, x_at.row, s.in, rows, to);
    });
    pool.run(s.groups * tasks, threads, [&](int64_t task, int worker) {
      const int64_t g = task / tasks, o = task % tasks * kOutsPerTask;
      const int64_t end = std::min(o + kOutsPerTask, s.out);
      const float* w = weight + g * s.out * s.in;
      const float* b = bias ? bias + g * s.out : nullptr;
      const float* from = packed.get() + (shared ? 0 : g * size);
      float* to = out + g * out_at.group + m * out_at.row;
      thin ? run.forward_thin(w, b, from, rows, s.in, o, end, to, out_at.row)
           : run.forward(w, b, from, rows, s.in, o, end, kDepth, sums.get() + worker * kOutsPerTask * padded, to,
                         out_at.row);
    });
  }
}

void linear_grad_x(const float* grad, Strides grad_at, const float* weight, float* grad_x, LinearSizes s, int threads,
                   Isa isa) {
  const Kernel run = kernel(isa);
  threads = useful_threads(s, threads);
  const int64_t strip = std::max<int64_t>(std::min(s.in, kStrip), 1), strips = blocks(s.in, strip);
  const int64_t width = round_up(strip, kVector);
  const int64_t together = std::min(s.rows, kRowsAtOnce);
  // A matrix that gives few tasks is cut across the contraction too: by its size alone, so that sums do not depend on
  // the number of threads.
  const int64_t wanted = blocks(kTasks, std::max<int64_t>(s.groups * strips, 1));
  const int64_t parts = std::max<int64_t>(std::min(wanted, s.out / kOutsPerPart), 1);
  const int64_t length = blocks(s.out, parts), tasks = parts * strips;
  const Buffer<float> packed = allocate<float>(std::max(threads, 1) * portable::kPackedDepth * width);
  const Buffer<float> partial = allocate<float>(parts > 1 ? s.groups * tasks * together * width : 0);
  ThreadPool& pool = ThreadPool::get();
  for (int64_t m = 0; m < s.rows; m += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, s.rows - m);
    const auto result = [&](int64_t g, int64_t i) { return grad_x + (g * s.rows + m) * s.in + i; };
    pool.run(s.groups * tasks, threads, [&](int64_t task, int worker) {
      const int64_t g = task / tasks, part = task % tasks / strips, i = task % strips * strip;
      run.grad_x(grad + g * grad_at.group + m * grad_at.row, grad_at.row, grad_at.value, weight + g * s.out * s.in,
                 rows, s.in, i, std::min(i + strip, s.in), part * length, std::min((part + 1) * length, s.out),
                 packed.get() + worker * portable::kPackedDepth * width,
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

void linear_grad_weight(const float* grad, Strides grad_at, const float* x, Strides x_at, float* grad_weight,
                        float* grad_bias, LinearSizes s, int threads, Isa isa) {
  const Kernel run = kernel(isa);
  threads = useful_threads(s, threads);
  const bool shared = x_at.group == 0;
  const int64_t size = s.rows * round_up(s.in, kVector);
  const bool streams = s.rows <= kDepth && s.in % kVector == 0 && s.groups * s.out * s.in >= kStreamed &&
                       reinterpret_cast<uintptr_t>(grad_weight) % 64 == 0;
  if (grad_weight) expect_huge(grad_weight, s.groups * s.out * s.in * 4);
  const Buffer<float> packed = allocate<float>((shared ? 1 : s.groups) * size);
  const int64_t tasks = blocks(s.out, kOutsPerTask);
  ThreadPool& pool = ThreadPool::get();
  const int64_t packs = !grad_weight ? 0 : shared ? std::min<int64_t>(s.groups, 1) : s.groups;
  pool.run(packs, threads, [&](int64_t g, int) {
    run.pack(x + g * x_at.group, x_at.row, x_at.value, s.rows, s.in, packed.get() + g * size);
  });
  pool.run(s.groups * tasks, threads, [&](int64_t task, int) {
    const int64_t g = task / tasks, o = task % tasks * kOutsPerTask;
    const int64_t end = std::min(o + kOutsPerTask, s.out);
    const float* from = grad + g * grad_at.group;
    if (grad_weight)
      run.grad_weight(from, grad_at.row, grad_at.value, packed.get() + (shared ? 0 : g * size), s.rows, s.in, o, end,
                      kDepth, streams, grad_weight + g * s.out * s.in);
    if (grad_bias) run.grad_bias(from, grad_at.row, grad_at.value, s.rows, o, end, grad_bias + g * s.out);
  });
}

}  // namespace vamoh
