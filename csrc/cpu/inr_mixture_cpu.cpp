#include "../inr_mixture.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "../threads.h"
#include "likelihood.h"
#include "memory.h"

namespace vamoh {

namespace {

// A row of theta, for the kernels.
struct Network {
  int64_t depth;
  const int64_t* widths;
  const int64_t *weight_at, *bias_at;  // of each layer in the row
  const int64_t* hidden_at;            // floats per point before each hidden layer in Workspace::hidden
  bool mirrored;
  bool keep_derivative;  // of the activation, as the sign of its value does not tell
  bool sine;
  float slope, omega;
};

// Features of a tile in panels [E][kPanel] and, if rows is not null, also in blocks [E / kPanel][kPanel points]
// [kPanel features] per panel: the layout in which the first layer's gradient is fastest.
struct Features {
  const float* panels;
  const float* rows;
  int64_t count;  // panels
};

// For a tile; mirrored, the panels of points opposite follow those of the points.
struct Workspace {
  float* hidden;      // outputs of the hidden layers, each [panels of points][width][kPanel]
  float* derivative;  // of the activation, same layout; only if keep_derivative
  float* outputs;     // [panels of points][C][kPanel]
  float* grad[2];     // [panels of points][width][kPanel], of layers in turn
  float* even;        // [first width][kPanel]
};

}  // namespace

}  // namespace vamoh

#define VAMOH_KERNEL "inr_mixture_cpu.inl"
#include "each_isa.inl"

namespace vamoh {

namespace {

constexpr int64_t kPanel = portable::kPanel;
constexpr int64_t kTileBytes = int64_t{512} << 10;  // of activations and gradients: most of a level-2 cache
constexpr int64_t kMostTilePanels = 16;
constexpr int64_t kItemPanels = 32;  // panels of features per work item where no gradient is summed over points

struct Kernel {
  decltype(&portable::forward) forward;
  decltype(&portable::backward) backward;
  decltype(&portable::score_panel) score;
  decltype(&portable::mix_panel) mix;
  decltype(&portable::exponential) exponential;
  decltype(&portable::gather_panel) gather;
  decltype(&portable::scatter_panel) scatter;
  decltype(&portable::gather_rows) gather_rows;
};

Kernel kernel(Isa isa) {
#define VAMOH_TABLE(isa)                                                                                      \
  {&isa::forward,     &isa::backward,     &isa::score_panel,   &isa::mix_panel, \
   &isa::exponential, &isa::gather_panel, &isa::scatter_panel, &isa::gather_rows}
#if VAMOH_X86
  if (isa == Isa::avx512) return VAMOH_TABLE(avx512);
  if (isa == Isa::avx2) return VAMOH_TABLE(avx2);
#endif
  (void)isa;
  return VAMOH_TABLE(portable);
#undef VAMOH_TABLE
}

// How one call is carried out: order of the points, sizes of tiles, copies of shared features.
class Plan {
 public:
  Plan(const InrMixture& mixture, bool gradients, int threads, Isa isa)
      : run(kernel(isa)), mixture(mixture), threads_(std::max(threads, 1)), gradients_(gradients) {
    const int64_t depth = mixture.depth;
    const int64_t* widths = mixture.widths;
    for (int64_t l = 0, weights = 0; l < depth; weights += widths[l] * widths[l + 1], ++l)
      weight_at_.push_back(weights);
    int64_t at = weight_at_.back() + widths[depth - 1] * widths[depth];
    for (int64_t l = 0; l < depth; at += widths[++l]) bias_at_.push_back(at);
    packed = at;
    for (int64_t l = 0, hidden = 0; l < depth; hidden += widths[++l]) hidden_at_.push_back(hidden);
    widest_ = *std::max_element(widths + 1, widths + depth + 1);
    net = {depth,
           widths,
           weight_at_.data(),
           bias_at_.data(),
           hidden_at_.data(),
           mixture.mirror != nullptr && depth > 1,
           mixture.sine || mixture.slope < 0,
           mixture.sine,
           mixture.slope,
           mixture.omega};
    sides = net.mirrored ? 2 : 1;
    order_points();
    with_rows_ = gradients && widths[0] / sides % kPanel == 0;
    const int64_t per_panel =
        (hidden_at_.back() * (net.keep_derivative ? 2 : 1) + widths[depth] + 2 * widest_) * kPanel * 4;
    tile = std::min(std::max(kTileBytes / per_panel / sides, int64_t{1}), kMostTilePanels / sides);
    if (mixture.features_step == 0) copy_shared_features();
    else tile_features_ = allocate<float>(threads_ * features_size(tile));
    work_ = allocate<float>(threads_ * workspace_size());
  }

  // Point indices of panel p of the features and a side, negative where a panel is not full.
  const int64_t* index(int64_t side, int64_t p) const { return index_[side].data() + p * kPanel; }

  Features features(int64_t b, int64_t p, int worker) const {
    const int64_t count = std::min(tile, panels - p), encoded = mixture.widths[0];
    if (mixture.features_step == 0)
      return {shared_.get() + p * encoded * kPanel, with_rows_ ? shared_rows_ + p * encoded * kPanel : nullptr, count};
    float* copy = tile_features_.get() + worker * features_size(tile);
    float* rows = with_rows_ ? copy + tile * encoded * kPanel : nullptr;
    for (int64_t i = 0; i < count; ++i)
      copy_panel(mixture.features + b * mixture.features_step, p + i, copy + i * encoded * kPanel,
                 rows ? rows + i * encoded * kPanel : nullptr);
    return {copy, rows, count};
  }

  Workspace workspace(int worker, int64_t count) const {
    const int64_t points = count * sides * kPanel;
    Workspace work;
    work.hidden = work_.get() + worker * workspace_size();
    work.derivative = work.hidden + hidden_at_.back() * points;
    work.outputs = work.derivative + (net.keep_derivative ? hidden_at_.back() * points : 0);
    work.grad[0] = work.outputs + mixture.widths[mixture.depth] * points;
    work.grad[1] = work.grad[0] + (gradients_ ? widest_ * points : 0);
    work.even = work.grad[1] + (gradients_ ? widest_ * points : 0);
    return work;
  }

  const float* theta(int64_t b, int64_t k) const {
    return mixture.theta + b * mixture.theta_batch_step + k * mixture.theta_component_step;
  }

  // Values [B, N, C] as panels [B][sides][panels][C][kPanel].
  Buffer<float> in_panels(const float* values) const {
    const int64_t channels = mixture.widths[mixture.depth], size = channels * kPanel;
    Buffer<float> result = allocate<float>(mixture.batch * sides * panels * size);
    ThreadPool::get().run(mixture.batch, threads_, [&](int64_t b, int) {
      for (int64_t side = 0; side < sides; ++side)
        for (int64_t p = 0; p < panels; ++p)
          run.gather(values + b * mixture.points * channels, index(side, p), channels,
                     result.get() + ((b * sides + side) * panels + p) * size);
    });
    return result;
  }

  // Calls task(b, k, first panel, end, worker) for all, in pieces of `piece` panels.
  template <class Task>
  void for_each_net(int64_t piece, const Task& task) const {
    const int64_t pieces = std::max<int64_t>((panels + piece - 1) / piece, 1), k = mixture.components;
    ThreadPool::get().run(mixture.batch * k * pieces, threads_, [&](int64_t i, int worker) {
      const int64_t first = i % pieces * piece;
      task(i / pieces / k, i / pieces % k, first, std::min(first + piece, panels), worker);
    });
  }

  const Kernel run;
  const InrMixture& mixture;
  Network net;
  int64_t sides, panels, tile, packed;  // panels, tile: of features

 private:
  void order_points() {
    const int64_t n = mixture.batch ? mixture.points : 0;
    std::vector<int64_t>&here = index_[0], &opposite = index_[1];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t j = sides == 2 ? mixture.mirror[i] : -1;
      if (j >= 0 && j < i) continue;
      here.push_back(i);
      opposite.push_back(j == i ? -1 : j);
    }
    panels = (static_cast<int64_t>(here.size()) + kPanel - 1) / kPanel;
    here.resize(panels * kPanel, -1);
    opposite.resize(panels * kPanel, -1);
  }

  void copy_panel(const float* matrix, int64_t p, float* panel, float* rows) const {
    run.gather(matrix, index(0, p), mixture.widths[0], panel);
    if (rows) run.gather_rows(matrix, index(0, p), mixture.widths[0], rows);
  }

  void copy_shared_features() {
    const int64_t size = mixture.widths[0] * kPanel;
    shared_ = allocate<float>(features_size(panels));
    shared_rows_ = shared_.get() + panels * size;
    ThreadPool::get().run(panels, threads_, [&](int64_t p, int) {
      copy_panel(mixture.features, p, shared_.get() + p * size, with_rows_ ? shared_rows_ + p * size : nullptr);
    });
  }

  int64_t features_size(int64_t count) const { return count * mixture.widths[0] * kPanel * (with_rows_ ? 2 : 1); }

  int64_t workspace_size() const {
    const int64_t per_point = hidden_at_.back() * (net.keep_derivative ? 2 : 1) + mixture.widths[mixture.depth] +
                              (gradients_ ? 2 * widest_ : 0);
    return (per_point * sides * tile + mixture.widths[1]) * kPanel;
  }

  const int threads_;
  const bool gradients_;
  bool with_rows_;
  int64_t widest_;
  std::vector<int64_t> weight_at_, bias_at_, hidden_at_, index_[2];
  Buffer<float> shared_, tile_features_, work_;
  float* shared_rows_;
};

std::vector<Channel> channels_of(const InrMixture& mixture, const PointLikelihood& likelihood) {
  std::vector<Channel> channels;
  for (int64_t i = 0; i < mixture.components * mixture.widths[mixture.depth]; ++i)
    channels.push_back(channel_of(likelihood, i));
  return channels;
}

}  // namespace

void inr_mixture(const InrMixture& mixture, float* outputs, int threads, Isa isa) {
  const Plan plan(mixture, false, threads, isa);
  const int64_t channels = mixture.widths[mixture.depth];
  plan.for_each_net(kItemPanels, [&](int64_t b, int64_t k, int64_t first, int64_t end, int worker) {
    float* out = outputs + (b * mixture.components + k) * mixture.points * channels;
    for (int64_t p = first; p < end; p += plan.tile) {
      const Features features = plan.features(b, p, worker);
      const Workspace work = plan.workspace(worker, features.count);
      plan.run.forward(plan.net, plan.theta(b, k), features, work);
      for (int64_t i = 0; i < plan.sides * features.count; ++i)
        plan.run.scatter(work.outputs + i * channels * kPanel,
                         plan.index(i / features.count, p + i % features.count), channels, out);
    }
  });
}

void inr_mixture_backward(const InrMixture& mixture, const float* grad_outputs, float* grad_theta, int threads,
                          Isa isa) {
  const Plan plan(mixture, true, threads, isa);
  const int64_t channels = mixture.widths[mixture.depth];
  plan.for_each_net(std::max<int64_t>(plan.panels, 1), [&](int64_t b, int64_t k, int64_t, int64_t, int worker) {
    const float* grad = grad_outputs + (b * mixture.components + k) * mixture.points * channels;
    float* row = grad_theta + b * mixture.theta_batch_step + k * mixture.theta_component_step;
    std::fill(row, row + plan.packed, 0.0f);
    for (int64_t p = 0; p < plan.panels; p += plan.tile) {
      const Features features = plan.features(b, p, worker);
      const Workspace work = plan.workspace(worker, features.count);
      plan.run.forward(plan.net, plan.theta(b, k), features, work);
      for (int64_t i = 0; i < plan.sides * features.count; ++i)
        plan.run.gather(grad, plan.index(i / features.count, p + i % features.count), channels,
                        work.grad[(mixture.depth - 1) % 2] + i * channels * kPanel);
      plan.run.backward(plan.net, plan.theta(b, k), features, work, row);
    }
  });
}

void inr_mixture_log_likelihood(const InrMixture& mixture, const PointLikelihood& likelihood, const float* values,
                                float* log_p, int threads, Isa isa) {
  const Plan plan(mixture, false, threads, isa);
  const int64_t channels = mixture.widths[mixture.depth];
  const std::vector<Channel> channel = channels_of(mixture, likelihood);
  const Buffer<float> in_panels = plan.in_panels(values);
  plan.for_each_net(kItemPanels, [&](int64_t b, int64_t k, int64_t first, int64_t end, int worker) {
    float* out = log_p + (b * mixture.components + k) * mixture.points;
    alignas(64) float scores[kPanel];
    for (int64_t p = first; p < end; p += plan.tile) {
      const Features features = plan.features(b, p, worker);
      const Workspace work = plan.workspace(worker, features.count);
      plan.run.forward(plan.net, plan.theta(b, k), features, work);
      for (int64_t i = 0; i < plan.sides * features.count; ++i) {
        const int64_t side = i / features.count, panel = p + i % features.count;
        plan.run.score(&channel[k * channels], channels, work.outputs + i * channels * kPanel,
                       in_panels.get() + ((b * plan.sides + side) * plan.panels + panel) * channels * kPanel, nullptr,
                       scores, nullptr, nullptr);
        plan.run.scatter(scores, plan.index(side, panel), 1, out);
      }
    }
  });
}

void inr_mixture_expected_log_likelihood(const InrMixture& mixture, const PointLikelihood& likelihood,
                                         const float* values, const float* weights, float* value, float* log_p,
                                         float* grad_theta, float* grad_scale, int threads, Isa isa) {
  const Plan plan(mixture, true, threads, isa);
  const int64_t components = mixture.components, channels = mixture.widths[mixture.depth];
  const std::vector<Channel> channel = channels_of(mixture, likelihood);
  const Buffer<float> in_panels = plan.in_panels(values);
  std::vector<double> parts(mixture.batch * components), by_scale(mixture.batch * components * channels);
  plan.for_each_net(std::max<int64_t>(plan.panels, 1), [&](int64_t b, int64_t k, int64_t, int64_t, int worker) {
    const int64_t net = b * components + k;
    float* row = grad_theta + b * mixture.theta_batch_step + k * mixture.theta_component_step;
    std::fill(row, row + plan.packed, 0.0f);
    alignas(64) float scores[kPanel], q[kPanel];
    for (int64_t p = 0; p < plan.panels; p += plan.tile) {
      const Features features = plan.features(b, p, worker);
      const Workspace work = plan.workspace(worker, features.count);
      plan.run.forward(plan.net, plan.theta(b, k), features, work);
      for (int64_t i = 0; i < plan.sides * features.count; ++i) {
        const int64_t side = i / features.count, panel = p + i % features.count, at = i * channels * kPanel;
        const int64_t* index = plan.index(side, panel);
        plan.run.gather(weights + net * mixture.points, index, 1, q);
        parts[net] += plan.run.score(
            &channel[k * channels], channels, work.outputs + at,
            in_panels.get() + ((b * plan.sides + side) * plan.panels + panel) * channels * kPanel, q, scores,
            work.grad[(mixture.depth - 1) % 2] + at, &by_scale[net * channels]);
        plan.run.scatter(scores, index, 1, log_p + net * mixture.points);
      }
      plan.run.backward(plan.net, plan.theta(b, k), features, work, row);
    }
  });
  for (int64_t b = 0; b < mixture.batch; ++b)
    value[b] = static_cast<float>(
        std::accumulate(parts.begin() + b * components, parts.begin() + (b + 1) * components, 0.0));
  std::copy(by_scale.begin(), by_scale.end(), grad_scale);
}

void inr_mixture_mean(const InrMixture& mixture, const PointLikelihood& likelihood, const float* log_pi, bool uniform,
                      float* mean, float* mean_map, int threads, Isa isa) {
  const Plan plan(mixture, false, threads, isa);
  const int64_t components = mixture.components, channels = mixture.widths[mixture.depth];
  const int64_t size = plan.sides * plan.tile * kPanel, tiles = (plan.panels + plan.tile - 1) / plan.tile;
  const Buffer<float> scratch = allocate<float>(std::max(threads, 1) * size * (2 * channels + 2));
  ThreadPool::get().run(mixture.batch * tiles, std::max(threads, 1), [&](int64_t item, int worker) {
    const int64_t b = item / tiles, p = item % tiles * plan.tile;
    const Features features = plan.features(b, p, worker);
    const Workspace work = plan.workspace(worker, features.count);
    float* probability = scratch.get() + worker * size * (2 * channels + 2);
    float *largest = probability + size, *mixed = largest + size, *best = mixed + size * channels;
    std::fill(largest, mixed, -1.0f);
    std::fill(mixed, best + size * channels, 0.0f);
    const int64_t points = plan.sides * features.count;
    for (int64_t k = 0; k < components; ++k) {
      plan.run.forward(plan.net, plan.theta(b, k), features, work);
      const float* row = log_pi + (b * components + k) * (uniform ? 1 : mixture.points);
      for (int64_t i = 0; i < points; ++i) {
        float* here = probability + i * kPanel;
        if (uniform) std::fill(here, here + kPanel, row[0]);
        else plan.run.gather(row, plan.index(i / features.count, p + i % features.count), 1, here);
        plan.run.exponential(here, kPanel);
        plan.run.mix(likelihood.kind, channels, work.outputs + i * channels * kPanel, here, largest + i * kPanel,
                     mixed + i * channels * kPanel, best + i * channels * kPanel);
      }
    }
    for (int64_t i = 0; i < points; ++i) {
      const int64_t* index = plan.index(i / features.count, p + i % features.count);
      plan.run.scatter(mixed + i * channels * kPanel, index, channels, mean + b * mixture.points * channels);
      plan.run.scatter(best + i * channels * kPanel, index, channels, mean_map + b * mixture.points * channels);
    }
  });
}

}  // namespace vamoh
