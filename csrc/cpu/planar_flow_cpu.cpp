#include <algorithm>
#include <cmath>
#include <vector>

#include "../planar_flow.h"
#include "../threads.h"
#include "memory.h"

namespace vamoh {
namespace {

// The flow as the kernels use it. With e_t = -c_t = coefficient_t linear_t all sums over layers have a plus.
struct Layers {
  int64_t layers, latent;
  const float* u;                            // over the scale of the base [T, Z]
  const float* gram;                         // w u^T [T, T]
  const float *positive, *negative;          // the coefficient on either side of the kink [T]
  const float *positive_log, *negative_log;  // logarithm of the stretch [T]
};

// What the layers and the base see of a panel x [Z][64]: linear = w x + b + ..., y = scale x + shift + ...
struct View {
  const float *w, *b, *scale, *shift;
};

// A panel of 64 samples: x and y [Z][64], e and h [T][64]. h_t = coefficient_t times the gradient to e_t.
struct Panel {
  float *x, *y, *e, *h;
};

// SampleSums over samples, one vector per row.
struct SampleSums {
  float *negative, *h;        // [T]: weight of the samples on the negative side; h
  float *y, *square, *along;  // [Z]: y, y^2 and x y, weighted
};

}  // namespace
}  // namespace vamoh

#define VAMOH_KERNEL "../cpu/planar_flow_cpu.inl"
#include "../simd/each_isa.inl"

namespace vamoh {

namespace {

constexpr int64_t kMostLanes = 16;                    // most lanes of a vector
constexpr int64_t kWidth = 64;                        // samples per panel
constexpr int64_t kSamplesPerTask = 1024;             // at least, in whole panels
constexpr int64_t kMostTasks = 64;                    // of one function, as each keeps its sums
constexpr int64_t kPanelBytes = int64_t{512} << 10;   // of panels whose products are taken together
constexpr int64_t kPartialBytes = int64_t{64} << 20;  // of sums of tasks held at once, at least one function
constexpr double kHalfLogTwoPi = 0.91893853320467274178;
static_assert(portable::kPanel == kWidth && kSamplesPerTask % kWidth == 0);

// How many samples a task takes: the same for any number of threads.
int64_t samples_per_task(int64_t samples) {
  return std::max(kSamplesPerTask, round_up(ceil_div(samples, kMostTasks), kWidth));
}

// Parameters as all tasks share them.
struct Prepared {
  int64_t layers, latent;
  Buffer<float> u, gram, positive, negative, positive_log, negative_log, inverse_scale, w_padded, u_padded;
  int64_t width;    // of the padded matrices [T, width]
  double constant;  // of the log-density
};

// SampleSums of one task over its samples.
struct SumsLayout {
  int64_t hx, ey, he, negative, h, y, square, along, size;
  SumsLayout(int64_t T, int64_t Z)
      : hx(0),
        ey(T * Z),
        he(2 * T * Z),
        negative(he + T * T),
        h(negative + T),
        y(h + T),
        square(y + Z),
        along(square + Z),
        size(along + Z) {}
};

Prepared prepare(const PlanarFlow& flow, Isa isa) {
  const int64_t T = flow.layers, Z = flow.latent;
  Prepared p;
  p.layers = T;
  p.latent = Z;
  p.width = round_up(std::max(T, Z), kWidestPanel);
  p.u = allocate<float>(T * Z);
  p.gram = allocate<float>(T * T);
  for (Buffer<float>* row : {&p.positive, &p.negative, &p.positive_log, &p.negative_log}) *row = allocate<float>(T);
  p.inverse_scale = allocate<float>(Z);
  p.w_padded = allocate<float>(T * p.width);
  p.u_padded = allocate<float>(T * p.width);
  p.constant = -kHalfLogTwoPi * static_cast<double>(Z);
  for (int64_t z = 0; z < Z; ++z) {
    p.inverse_scale[z] = static_cast<float>(std::exp(-static_cast<double>(flow.log_scale[z])));
    p.constant -= flow.log_scale[z];
  }
  for (int64_t t = 0; t < T; ++t) {
    const double slope = flow.slope, gain = flow.gain[t], stretch = 1 - slope + slope * gain;
    p.positive[t] = static_cast<float>(-1 / gain);
    p.negative[t] = static_cast<float>(-slope / stretch);
    p.positive_log[t] = static_cast<float>(std::log(gain));
    p.negative_log[t] = static_cast<float>(std::log(stretch));
    for (int64_t z = 0; z < Z; ++z) p.u[t * Z + z] = flow.u[t * Z + z] * p.inverse_scale[z];
    std::copy_n(flow.w + t * Z, Z, &p.w_padded[t * p.width]);
    std::copy_n(flow.u + t * Z, Z, &p.u_padded[t * p.width]);
    std::fill_n(&p.w_padded[t * p.width + Z], p.width - Z, 0.0f);
    std::fill_n(&p.u_padded[t * p.width + Z], p.width - Z, 0.0f);
  }
  const Buffer<float> transposed = allocate<float>(Z * p.width), gram = allocate<float>(T * p.width);
  std::fill_n(transposed.get(), Z * p.width, 0.0f);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t z = 0; z < Z; ++z) transposed[z * p.width + t] = flow.u[t * Z + z];
  VAMOH_DISPATCH(isa, matrix_product)(flow.w, Z, 1, transposed.get(), T, Z, p.width, gram.get());
  for (int64_t t = 0; t < T; ++t) std::copy_n(&gram[t * p.width], T, &p.gram[t * T]);
  return p;
}

// Panels of samples in rows: x [Z][kWidth] from `count` rows `stride` apart; the lanes after them repeat the last row.
void pack(const float* rows, int64_t stride, int64_t count, int64_t latent, float* x) {
  for (int64_t z = 0; z < latent; ++z)
    for (int64_t lane = 0; lane < kWidth; ++lane) x[z * kWidth + lane] = rows[std::min(lane, count - 1) * stride + z];
}

// Memory of one worker: panels, and what a function makes of the parameters.
struct Worker {
  Isa isa;
  Layers layers;
  int64_t rows, stride, group;
  Buffer<float> panels, weight, w, b, scale, shift, inputs, vectors, product;
  Panel panel;
  SampleSums sums;

  Worker(const Prepared& p, Isa isa)
      : isa(isa),
        layers{p.layers,
               p.latent,
               p.u.get(),
               p.gram.get(),
               p.positive.get(),
               p.negative.get(),
               p.positive_log.get(),
               p.negative_log.get()},
        rows(round_up(p.latent, 4)) {
    const int64_t T = p.layers, Z = p.latent;
    // Not a multiple of 4 KiB, or the same row of all panels would share a few cache sets.
    stride = round_up((rows + Z + 2 * T) * kWidth - 256, 1024) + 256;
    group = std::clamp<int64_t>(kPanelBytes / (stride * 4), 1, kSamplesPerTask / kWidth);
    panels = allocate<float>(group * stride);
    weight = allocate<float>(kWidth);
    w = allocate<float>(T * Z);
    b = allocate<float>(T);
    scale = allocate<float>(Z);
    shift = allocate<float>(Z);
    inputs = allocate<float>(Z * kWidth);
    vectors = allocate<float>((2 * T + 3 * Z) * kMostLanes);
    product = allocate<float>(T * p.width);
    panel = at(0);
    float* v = vectors.get();
    sums = {v, v + T * kMostLanes, v + 2 * T * kMostLanes, v + (2 * T + Z) * kMostLanes,
            v + (2 * T + 2 * Z) * kMostLanes};
  }

  Panel at(int64_t i) const {
    float* x = panels.get() + i * stride;
    float* y = x + rows * kWidth;
    float* e = y + layers.latent * kWidth;
    return {x, y, e, e + layers.layers * kWidth};
  }

  View view() const { return {w.get(), b.get(), scale.get(), shift.get()}; }

  // Samples are mean + std x; null: x itself.
  void sample_from(const PlanarFlow& flow, const Prepared& p, const float* mean, const float* std) {
    const int64_t T = p.layers, Z = p.latent;
    for (int64_t z = 0; z < Z; ++z) {
      scale[z] = (std ? std[z] : 1.0f) * p.inverse_scale[z];
      shift[z] = ((mean ? mean[z] : 0.0f) - flow.loc[z]) * p.inverse_scale[z];
    }
    for (int64_t t = 0; t < T; ++t) {
      double bias = flow.b[t];
      for (int64_t z = 0; z < Z; ++z) {
        const float weight_tz = flow.w[t * Z + z];
        w[t * Z + z] = std ? weight_tz * std[z] : weight_tz;
        if (mean) bias += static_cast<double>(weight_tz) * mean[z];
      }
      b[t] = static_cast<float>(bias);
    }
  }

  void weigh(const float* weights, int64_t count) {
    for (int64_t i = 0; i < kWidth; ++i) weight[i] = i >= count ? 0.0f : weights ? weights[i] : 1.0f;
  }

  // SampleSums over `samples` samples into out. fill(first, count, x) makes panels, weights is [samples] or null: ones,
  // finish(first, count, panel) sees every panel.
  template <class Fill, class Finish>
  void accumulate(const SumsLayout& layout, int64_t samples, const float* weights, bool all, float* out,
                  const Fill& fill, const Finish& finish) {
    const int64_t T = layers.layers, Z = layers.latent;
    std::fill_n(out, layout.size, 0.0f);
    std::fill_n(vectors.get(), (2 * T + 3 * Z) * kMostLanes, 0.0f);
    for (int64_t first = 0; first < samples; first += group * kWidth) {
      const int64_t here = std::min(group, ceil_div(samples - first, kWidth));
      for (int64_t i = 0; i < here; ++i) {
        const int64_t start = first + i * kWidth, count = std::min(kWidth, samples - start);
        const Panel p = at(i);
        fill(start, count, p.x);
        weigh(weights ? weights + start : nullptr, count);
        VAMOH_DISPATCH(isa, panel_gradients)(layers, view(), weight.get(), p, sums);
        finish(start, count, p);
      }
      VAMOH_DISPATCH(isa, panel_products)(layers, at(0), stride, here, all, out + layout.hx, out + layout.ey,
                                          out + layout.he);
    }
    VAMOH_DISPATCH(isa, sum_rows)(sums.negative, T, out + layout.negative);
    VAMOH_DISPATCH(isa, sum_rows)(sums.h, T, out + layout.h);
    VAMOH_DISPATCH(isa, sum_rows)(sums.y, Z, out + layout.y);
    VAMOH_DISPATCH(isa, sum_rows)(sums.square, Z, out + layout.square);
    VAMOH_DISPATCH(isa, sum_rows)(sums.along, Z, out + layout.along);
  }
};

// The sums of `count` tasks in one, in double.
void add_up(const float* partial, int64_t count, int64_t size, float* out) {
  constexpr int64_t kStrip = 512;
  double total[kStrip];
  for (int64_t first = 0; first < size; first += kStrip) {
    const int64_t here = std::min(kStrip, size - first);
    std::fill_n(total, here, 0.0);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < here; ++j) total[j] += partial[i * size + first + j];
    for (int64_t j = 0; j < here; ++j) out[first + j] = static_cast<float>(total[j]);
  }
}

// Gradients of the parameters from the sums, times `factor`. n: sum of the weights; mean, std: of the samples or null.
// product [T, width] is scratch.
void parameter_gradients(Isa isa, const Prepared& p, const SumsLayout& layout, float* sums, double n, double factor,
                         const float* mean, const float* std, float* product, const PlanarFlowGradient& out) {
  const int64_t T = p.layers, Z = p.latent, width = p.width;
  float* he = sums + layout.he;
  for (int64_t t = 0; t < T; ++t) {
    const double negative = sums[layout.negative + t];
    const double ratios = negative * p.negative[t] + (n - negative) * p.positive[t];
    out.gain[t] = static_cast<float>(factor * (ratios - he[t * T + t]));
    out.b[t] = static_cast<float>(-factor * sums[layout.h + t]);
    std::fill_n(he + t * T, t + 1, 0.0f);
  }
  VAMOH_DISPATCH(isa, matrix_product)(he, T, 1, p.u_padded.get(), T, T, width, product);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t z = 0; z < Z; ++z) {
      const double along = static_cast<double>(sums[layout.hx + t * Z + z]) * (std ? std[z] : 1.0f);
      const double middle = mean ? static_cast<double>(sums[layout.h + t]) * mean[z] : 0.0;
      out.w[t * Z + z] = static_cast<float>(-factor * (along + middle + product[t * width + z]));
    }
  VAMOH_DISPATCH(isa, matrix_product)(he, 1, T, p.w_padded.get(), T, T, width, product);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t z = 0; z < Z; ++z) {
      const double along = static_cast<double>(sums[layout.ey + t * Z + z]) * p.inverse_scale[z];
      out.u[t * Z + z] = static_cast<float>(-factor * (along + product[t * width + z]));
    }
  for (int64_t z = 0; z < Z; ++z) {
    out.loc[z] = static_cast<float>(factor * sums[layout.y + z] * p.inverse_scale[z]);
    out.log_scale[z] = static_cast<float>(factor * (sums[layout.square + z] - n));
  }
}

}  // namespace

void planar_flow_log_prob(const PlanarFlow& flow, const float* z, float* out, int64_t samples, int threads, Isa isa) {
  const Prepared p = prepare(flow, isa);
  const int64_t Z = flow.latent, chunk = samples_per_task(samples), tasks = ceil_div(samples, chunk);
  std::vector<Worker> workers;
  for (int i = 0; i < std::max(threads, 1); ++i) workers.emplace_back(p, isa).sample_from(flow, p, nullptr, nullptr);
  ThreadPool::get().run(tasks, threads, [&](int64_t task, int id) {
    Worker& worker = workers[id];
    const int64_t end = std::min(samples, (task + 1) * chunk);
    for (int64_t first = task * chunk; first < end; first += kWidth) {
      const int64_t count = std::min(kWidth, end - first);
      pack(z + first * Z, Z, count, Z, worker.panel.x);
      VAMOH_DISPATCH(isa, panel_values)(worker.layers, worker.view(), worker.panel, worker.weight.get());
      for (int64_t i = 0; i < count; ++i) out[first + i] = static_cast<float>(p.constant + worker.weight[i]);
    }
  });
}

void planar_flow_sample(const PlanarFlow& flow, const float* noise, float* z, float* log_p, int64_t samples,
                        int threads, Isa isa) {
  const Prepared p = prepare(flow, isa);
  const int64_t Z = flow.latent, chunk = samples_per_task(samples), tasks = ceil_div(samples, chunk);
  std::vector<Worker> workers;
  for (int i = 0; i < std::max(threads, 1); ++i) {
    Worker& worker = workers.emplace_back(p, isa);
    worker.sample_from(flow, p, nullptr, nullptr);
    for (int64_t j = 0; j < Z; ++j) {  // the base from standard normal noise
      worker.scale[j] = std::exp(flow.log_scale[j]);
      worker.shift[j] = flow.loc[j];
    }
  }
  ThreadPool::get().run(tasks, threads, [&](int64_t task, int id) {
    Worker& worker = workers[id];
    const float* const y = worker.panel.y;
    const int64_t end = std::min(samples, (task + 1) * chunk);
    for (int64_t first = task * chunk; first < end; first += kWidth) {
      const int64_t count = std::min(kWidth, end - first);
      pack(noise + first * Z, Z, count, Z, worker.panel.x);
      VAMOH_DISPATCH(isa, panel_samples)(worker.layers, worker.view(), worker.panel, flow.u, flow.slope,
                                         worker.weight.get());
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < Z; ++j) z[(first + i) * Z + j] = y[j * kWidth + i];
        log_p[first + i] = static_cast<float>(p.constant + worker.weight[i]);
      }
    }
  });
}

void planar_flow_log_prob_backward(const PlanarFlow& flow, const float* z, const float* grad, float* grad_z,
                                   const PlanarFlowGradient& gradient, int64_t samples, int threads, Isa isa) {
  const Prepared p = prepare(flow, isa);
  const int64_t Z = flow.latent, chunk = samples_per_task(samples), tasks = ceil_div(samples, chunk);
  const SumsLayout layout(flow.layers, Z);
  const Buffer<float> partial = allocate<float>((tasks + 1) * layout.size);
  std::vector<Worker> workers;
  for (int i = 0; i < std::max(threads, 1); ++i) workers.emplace_back(p, isa).sample_from(flow, p, nullptr, nullptr);
  ThreadPool::get().run(tasks, threads, [&](int64_t task, int id) {
    Worker& worker = workers[id];
    const int64_t first = task * chunk, here = std::min(chunk, samples - first);
    const auto fill = [&](int64_t start, int64_t count, float* x) { pack(z + (first + start) * Z, Z, count, Z, x); };
    const auto finish = [&](int64_t start, int64_t count, const Panel& panel) {
      if (!grad_z) return;
      VAMOH_DISPATCH(isa, panel_input_gradients)(worker.layers, worker.view(), panel, worker.inputs.get());
      float* rows = grad_z + (first + start) * Z;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < Z; ++j) rows[i * Z + j] = worker.inputs[j * kWidth + i];
    };
    worker.accumulate(layout, here, grad + first, gradient.loc, partial.get() + task * layout.size, fill, finish);
  });
  if (!gradient.loc) return;
  float* sums = partial.get() + tasks * layout.size;
  add_up(partial.get(), tasks, layout.size, sums);
  double n = 0;
  for (int64_t i = 0; i < samples; ++i) n += grad[i];
  parameter_gradients(isa, p, layout, sums, n, 1.0, nullptr, nullptr, workers[0].product.get(), gradient);
}

void planar_flow_expected_log_prob(const PlanarFlow& flow, const float* mean, const float* std, const float* noise,
                                   uint64_t seed, float* value, float* grad_mean, float* grad_std,
                                   const PlanarFlowGradient& gradient, int64_t batch, int64_t samples, int threads,
                                   Isa isa) {
  const Prepared p = prepare(flow, isa);
  const int64_t T = flow.layers, Z = flow.latent, chunk = samples_per_task(samples), tasks = ceil_div(samples, chunk);
  const bool differentiate = gradient.loc || grad_mean;
  SumsLayout layout(T, Z);
  if (!differentiate) layout.size = 1;
  const int64_t bytes = (tasks + 1) * layout.size * 4;
  const int64_t together = std::min(batch, std::max<int64_t>(kPartialBytes / bytes, 1));
  const Buffer<float> partial = allocate<float>(together * (tasks + 1) * layout.size);
  std::vector<Worker> workers;
  for (int i = 0; i < std::max(threads, 1); ++i) workers.emplace_back(p, isa);
  ThreadPool& pool = ThreadPool::get();
  const double n = static_cast<double>(samples);

  for (int64_t b0 = 0; b0 < batch; b0 += together) {
    const int64_t functions = std::min(together, batch - b0);
    pool.run(functions * tasks, threads, [&](int64_t task, int id) {
      Worker& worker = workers[id];
      const int64_t b = b0 + task / tasks, first = task % tasks * chunk;
      const int64_t here = std::min(chunk, samples - first);
      float* out = partial.get() + task * layout.size;
      const auto fill = [&](int64_t start, int64_t count, float* x) {
        if (noise)
          pack(noise + ((first + start) * batch + b) * Z, batch * Z, count, Z, x);
        else
          VAMOH_DISPATCH(isa, fill_noise)(seed, first + start, b, Z, x);
      };
      worker.sample_from(flow, p, mean + b * Z, std + b * Z);
      if (differentiate) {
        worker.accumulate(layout, here, nullptr, gradient.loc, out, fill, [](int64_t, int64_t, const Panel&) {});
        return;
      }
      double total = 0;
      for (int64_t start = 0; start < here; start += kWidth) {
        const int64_t count = std::min(kWidth, here - start);
        fill(start, count, worker.panel.x);
        VAMOH_DISPATCH(isa, panel_values)(worker.layers, worker.view(), worker.panel, worker.weight.get());
        for (int64_t i = 0; i < count; ++i) total += worker.weight[i];
      }
      *out = static_cast<float>(total);
    });
    pool.run(functions, threads, [&](int64_t i, int id) {
      const int64_t b = b0 + i;
      const float* parts = partial.get() + i * tasks * layout.size;
      float* sums = partial.get() + (functions * tasks + i) * layout.size;
      if (!differentiate) {
        double total = 0;
        for (int64_t task = 0; task < tasks; ++task) total += parts[task];
        value[b] = static_cast<float>(p.constant + total / n);
        return;
      }
      add_up(parts, tasks, layout.size, sums);
      double total = 0;
      for (int64_t z = 0; z < Z; ++z) total -= 0.5 * sums[layout.square + z];
      for (int64_t t = 0; t < T; ++t) {
        const double negative = sums[layout.negative + t];
        total -= negative * p.negative_log[t] + (n - negative) * p.positive_log[t];
      }
      value[b] = static_cast<float>(p.constant + total / n);
      if (grad_mean)
        for (int64_t z = 0; z < Z; ++z) {
          double by_mean = static_cast<double>(sums[layout.y + z]) * p.inverse_scale[z];
          double by_std = static_cast<double>(sums[layout.along + z]) * p.inverse_scale[z];
          for (int64_t t = 0; t < T; ++t) {
            const double w = flow.w[t * Z + z];
            by_mean += w * sums[layout.h + t];
            by_std += w * sums[layout.hx + t * Z + z];
          }
          grad_mean[b * Z + z] = static_cast<float>(-by_mean / n);
          grad_std[b * Z + z] = static_cast<float>(-by_std / n);
        }
      if (gradient.loc)
        parameter_gradients(isa, p, layout, sums, n, 1 / n, mean + b * Z, std + b * Z, workers[id].product.get(),
                            {gradient.u + b * T * Z, gradient.gain + b * T, gradient.w + b * T * Z, gradient.b + b * T,
                             gradient.loc + b * Z, gradient.log_scale + b * Z});
    });
  }
}

void counter_noise(uint64_t seed, float* out, int64_t samples, int64_t batch, int64_t latent, Isa isa) {
  const auto fill = VAMOH_DISPATCH(isa, fill_noise);
  const Buffer<float> panel = allocate<float>(round_up(latent, 4) * kWidth);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t first = 0; first < samples; first += kWidth) {
      fill(seed, first, b, latent, panel.get());
      for (int64_t i = 0; i < std::min(kWidth, samples - first); ++i)
        for (int64_t z = 0; z < latent; ++z) out[((first + i) * batch + b) * latent + z] = panel[z * kWidth + i];
    }
}

}  // namespace vamoh
