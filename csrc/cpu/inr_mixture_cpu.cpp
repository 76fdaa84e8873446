#include <algorithm>
#include <numeric>
#include <vector>

#include "../inr_mixture.h"
#include "../threads.h"
#include "../simd/likelihood.h"
#include "memory.h"

namespace vamoh {

namespace {

// Rows of theta, for the kernels.
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

constexpr int64_t kMostNets = 24;

// Networks that share a pass over the features, and their first layers one below the other, [count * H, E].
struct Nets {
  int64_t count;
  const float* theta[kMostNets];
  const float *weight, *bias;
};

struct Gradients {  // of Nets
  float* theta[kMostNets];
  float *weight, *bias;
};

// Features of a tile in panels [E][kPanel] and, if rows is not null, also in blocks [E / kPanel][kPanel points]
// [kPanel features] per panel: the layout in which the first layer's gradient is fastest.
struct Features {
  const float* panels;
  const float* rows;
  int64_t count;     // panels
  int64_t mirrored;  // the first of them, which also serve their mirror points
  int64_t last;      // points in the last one
};

// For a tile; the panels of mirror points follow the `count` of the points.
struct Workspace {
  float* hidden;      // outputs of the hidden layers, each [panels of points][nets][width][kPanel]
  float* derivative;  // of the activation, same layout; only if keep_derivative
  float* outputs;     // [panels of points][nets][C][kPanel]
  float* grad[2];     // [panels of points][nets][width][kPanel], of layers in turn
  float* even;        // [nets * first width][kPanel]
  float* values;      // [panels of points][C][kPanel]
};

}  // namespace

}  // namespace vamoh

#define VAMOH_KERNEL "../cpu/inr_mixture_cpu.inl"
#include "../simd/each_isa.inl"

namespace vamoh {

namespace {

constexpr int64_t kPanel = portable::kPanel;
constexpr int64_t kTileBytes = int64_t{512} << 10;  // of activations and gradients: most of a level-2 cache
constexpr int64_t kMostTilePanels = 16;
constexpr int64_t kItemPanels = 32;  // panels of features per work item where no gradient is summed over points
constexpr int64_t kFewNets = 8;      // fewer than these share their points among work items also where one is

// The points of a function in the order of its panels: those with a mirror point behind them, then all others.
struct Order {
  std::vector<int64_t> index[2];  // of the points, and of the mirror points of the first of them
  int64_t panels, mirrored;       // panels, and those of them that have mirror points

  // How many points panel p of a side holds.
  int64_t count(int side, int64_t p) const {
    return std::min(kPanel, static_cast<int64_t>(index[side].size()) - p * kPanel);
  }
};

Order order_of(const InrMixture& mixture, bool mirrored, const bool* mask) {
  Order order;
  std::vector<int64_t>&here = order.index[0], &mirror = order.index[1];
  std::vector<int64_t> alone;
  const auto observed = [mask](int64_t i) { return mask == nullptr || mask[i]; };
  for (int64_t i = 0; i < (mixture.batch ? mixture.points : 0); ++i) {
    const int64_t j = mirrored ? mixture.mirror[i] : -1;
    if (!observed(i)) continue;
    if (j < 0 || j == i || !observed(j)) {
      alone.push_back(i);
    } else if (i < j) {
      here.push_back(i);
      mirror.push_back(j);
    }
  }
  here.insert(here.end(), alone.begin(), alone.end());
  order.panels = ceil_div(static_cast<int64_t>(here.size()), kPanel);
  order.mirrored = ceil_div(static_cast<int64_t>(mirror.size()), kPanel);
  return order;
}

struct Points {  // of a panel
  const int64_t* index;
  int64_t count, computed;  // of mirror points, also those are computed that are not there but whose partners are
};

// Part of the work: networks `net` to net + count of all B * K at the panels from `first` to `end`, one of the pieces
// into which the points are split. Where functions differ in their features they are networks of one function.
struct Item {
  int64_t net, count, piece, first, end;
};

// How one call is carried out: order of the points, sizes of items and tiles, copies of features and first layers.
class MixturePlan {
 public:
  MixturePlan(const InrMixture& mixture, bool gradients, int threads, Isa isa)
      : isa(isa),
        mixture(mixture),
        channels(mixture.widths[mixture.depth]),
        nets(mixture.batch * mixture.components),
        threads_(std::max(threads, 1)),
        gradients_(gradients),
        shared_features_(mixture.features_stride == 0 && mixture.mask == nullptr) {
    const int64_t depth = mixture.depth;
    const int64_t* widths = mixture.widths;
    for (int64_t l = 0, weights = 0; l < depth; weights += widths[l] * widths[l + 1], ++l)
      weight_at_.push_back(weights);
    packed = weight_at_.back() + widths[depth - 1] * widths[depth];
    for (int64_t l = 0; l < depth; packed += widths[++l]) bias_at_.push_back(packed);
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
    sides_ = net.mirrored ? 2 : 1;
    for (int64_t b = 0; b < (mixture.mask ? mixture.batch : 1); ++b)
      orders_.push_back(order_of(mixture, net.mirrored, mixture.mask ? mixture.mask + b * mixture.points : nullptr));
    for (const Order& order : orders_) panels_ = std::max(panels_, order.panels);
    with_rows_ = gradients && widths[0] / sides_ % kPanel == 0;
    // Few rows of a first layer would wait for the features. The tile must not depend on the number of threads, as the
    // order of sums does on the tile.
    const int64_t most = std::max<int64_t>(kMostNets / widths[1], 1);
    const int64_t per_panel =
        (hidden_at_.back() * (net.keep_derivative ? 2 : 1) + channels + 2 * widest_) * most * kPanel * 4;
    tile = std::min(std::max(kTileBytes / per_panel / sides_, int64_t{1}), kMostTilePanels / sides_);
    span_ = shared_features_ ? nets : mixture.components;
    group = std::max<int64_t>(std::min({most, span_, nets / threads_}), 1);
    pieces = ceil_div(panels_, kItemPanels);
    if (gradients) pieces = std::min(ceil_div(kFewNets, std::max<int64_t>(nets, 1)), panels_);
    pieces = std::max<int64_t>(pieces, 1);
    if (shared_features_)
      copy_shared_features();
    else
      tile_features_ = allocate<float>(threads_ * features_size(tile));
    work_ = allocate<float>(threads_ * workspace_size());
    first_layers_ = allocate<float>(threads_ * 2 * first_size());
    if (gradients) partial_ = allocate<float>((pieces - 1) * nets * packed);
  }

  // Features of function b at the panels from p to `end`, or as many as a tile holds.
  Features features(int64_t b, int64_t p, int64_t end, int worker) const {
    const Order& order = order_at(b);
    const int64_t count = std::min(tile, end - p), size = mixture.widths[0] * kPanel;
    const int64_t mirrored = std::min(std::max<int64_t>(order.mirrored - p, 0), count);
    const int64_t last = order.count(0, p + count - 1);
    if (shared_features_)
      return {shared_.get() + p * size, with_rows_ ? shared_rows_ + p * size : nullptr, count, mirrored, last};
    float* copy = tile_features_.get() + worker * features_size(tile);
    float* rows = with_rows_ ? copy + tile * size : nullptr;
    for (int64_t i = 0; i < count; ++i)
      copy_panel(mixture.features + b * mixture.features_stride, order, p + i, copy + i * size,
                 rows ? rows + i * size : nullptr);
    return {copy, rows, count, mirrored, last};
  }

  // Calls task(i, points) for the panels of points of a tile of function b from panel p on.
  template <class Task>
  void for_each_panel(int64_t b, int64_t p, const Features& features, const Task& task) const {
    const Order& order = order_at(b);
    for (int64_t i = 0; i < features.count + features.mirrored; ++i) {
      const int side = i < features.count ? 0 : 1;
      const int64_t panel = p + i - side * features.count;
      task(i, Points{order.index[side].data() + panel * kPanel, order.count(side, panel), order.count(0, panel)});
    }
  }

  void gather_values(const float* values, int64_t b, int64_t p, const Features& features, const Workspace& work) const {
    for_each_panel(b, p, features, [&](int64_t i, const Points& points) {
      VAMOH_DISPATCH(isa, gather_panel)(values + b * mixture.points * channels, points.index, points.count, channels,
                                        work.values + i * channels * kPanel);
    });
  }

  Workspace workspace(int worker) const {
    const int64_t points = tile * sides_ * kPanel, all = points * group;
    Workspace work;
    work.hidden = work_.get() + worker * workspace_size();
    work.derivative = work.hidden + hidden_at_.back() * all;
    work.outputs = work.derivative + (net.keep_derivative ? hidden_at_.back() * all : 0);
    work.grad[0] = work.outputs + channels * all;
    work.grad[1] = work.grad[0] + (gradients_ ? widest_ * all : 0);
    work.values = work.grad[1] + (gradients_ ? widest_ * all : 0);
    work.even = work.values + channels * points;
    return work;
  }

  Nets parameters(int64_t first, int64_t count, int worker) const {
    Nets result{count, {}, nullptr, nullptr};
    const int64_t rows = mixture.widths[1], size = rows * mixture.widths[0];
    float *weight = first_layers_.get() + worker * 2 * first_size(), *bias = weight + count * size;
    for (int64_t i = 0; i < count; ++i) {
      const float* theta = mixture.theta + row_at(first + i);
      std::copy_n(theta, size, weight + i * size);
      std::copy_n(theta + bias_at_[0], rows, bias + i * rows);
      result.theta[i] = theta;
    }
    result.weight = weight;
    result.bias = bias;
    return result;
  }

  // The rows of grad_theta, or of a piece's share in them, all zero. `finish` adds the first layers.
  Gradients gradients(const Item& item, float* grad_theta, int worker) const {
    Gradients result;
    for (int64_t i = 0; i < item.count; ++i) {
      const int64_t n = item.net + i;
      result.theta[i] =
          item.piece == 0 ? grad_theta + row_at(n) : partial_.get() + ((item.piece - 1) * nets + n) * packed;
      std::fill_n(result.theta[i], packed, 0.0f);
    }
    result.weight = first_layers_.get() + (worker * 2 + 1) * first_size();
    result.bias = result.weight + item.count * mixture.widths[1] * mixture.widths[0];
    std::fill(result.weight, result.bias + item.count * mixture.widths[1], 0.0f);
    return result;
  }

  void finish(const Item& item, const Gradients& grads) const {
    const int64_t rows = mixture.widths[1], size = rows * mixture.widths[0];
    for (int64_t i = 0; i < item.count; ++i) {
      std::copy_n(grads.weight + i * size, size, grads.theta[i]);
      std::copy_n(grads.bias + i * rows, rows, grads.theta[i] + bias_at_[0]);
    }
  }

  // Sums the pieces' shares.
  void add_pieces(float* grad_theta) const {
    if (pieces > 1)
      ThreadPool::get().run(nets, threads_, [&](int64_t n, int) {
        float* row = grad_theta + row_at(n);
        for (int64_t piece = 1; piece < pieces; ++piece) {
          const float* share = partial_.get() + ((piece - 1) * nets + n) * packed;
          for (int64_t i = 0; i < packed; ++i) row[i] += share[i];
        }
      });
  }

  // Calls task(item, worker) for all items.
  template <class Task>
  void for_each_item(const Task& task) const {
    const int64_t groups = ceil_div(span_, group), length = ceil_div(panels_, pieces);
    ThreadPool::get().run(nets / std::max<int64_t>(span_, 1) * groups * pieces, threads_, [&](int64_t i, int worker) {
      const int64_t piece = i % pieces, span = i / pieces / groups * span_, net = span + i / pieces % groups * group;
      const int64_t panels = order_at(net / mixture.components).panels, first = std::min(piece * length, panels);
      task({net, std::min(group, span + span_ - net), piece, first, std::min(first + length, panels)}, worker);
    });
  }

  // The same for tiles of a function, with all its networks: task(b, first panel, end, worker).
  template <class Task>
  void for_each_tile(const Task& task) const {
    const int64_t tiles = ceil_div(panels_, tile);
    ThreadPool::get().run(mixture.batch * tiles, threads_, [&](int64_t i, int worker) {
      const int64_t p = i % tiles * tile;
      task(i / tiles, p, std::min(p + tile, panels_), worker);
    });
  }

  const Isa isa;
  const InrMixture& mixture;
  const int64_t channels, nets;  // nets: B * K
  Network net;
  int64_t tile, group, pieces, packed;  // panels of features per tile, networks per item, items that share points

 private:
  const Order& order_at(int64_t b) const { return orders_[mixture.mask ? b : 0]; }

  int64_t row_at(int64_t n) const {
    return n / mixture.components * mixture.theta_batch_stride +
           n % mixture.components * mixture.theta_component_stride;
  }

  void copy_panel(const float* matrix, const Order& order, int64_t p, float* panel, float* rows) const {
    const int64_t *index = order.index[0].data() + p * kPanel, count = order.count(0, p);
    VAMOH_DISPATCH(isa, gather_panel)(matrix, index, count, mixture.widths[0], panel);
    if (rows) VAMOH_DISPATCH(isa, gather_rows)(matrix, index, count, mixture.widths[0], rows);
  }

  void copy_shared_features() {
    const int64_t size = mixture.widths[0] * kPanel;
    shared_ = allocate<float>(features_size(panels_));
    shared_rows_ = shared_.get() + panels_ * size;
    ThreadPool::get().run(panels_, threads_, [&](int64_t p, int) {
      copy_panel(mixture.features, orders_[0], p, shared_.get() + p * size,
                 with_rows_ ? shared_rows_ + p * size : nullptr);
    });
  }

  int64_t features_size(int64_t count) const { return count * mixture.widths[0] * kPanel * (with_rows_ ? 2 : 1); }

  int64_t first_size() const { return round_up(group * mixture.widths[1] * (mixture.widths[0] + 1), kPanel); }

  int64_t workspace_size() const {
    const int64_t per_net =
        hidden_at_.back() * (net.keep_derivative ? 2 : 1) + channels + (gradients_ ? 2 * widest_ : 0);
    return ((per_net * group + channels) * sides_ * tile + group * mixture.widths[1]) * kPanel;
  }

  const int threads_;
  const bool gradients_, shared_features_;
  bool with_rows_;
  int64_t sides_, widest_, panels_ = 0;
  int64_t span_;  // networks that have the same features
  std::vector<int64_t> weight_at_, bias_at_, hidden_at_;
  std::vector<Order> orders_;
  Buffer<float> shared_, tile_features_, work_, first_layers_, partial_;
  float* shared_rows_ = nullptr;
};

std::vector<Channel> channels_of(const InrMixture& mixture, const PointLikelihood& likelihood) {
  std::vector<Channel> channels;
  for (int64_t i = 0; i < mixture.components * mixture.widths[mixture.depth]; ++i)
    channels.push_back(channel_of(likelihood, i));
  return channels;
}

}  // namespace

void inr_mixture(const InrMixture& mixture, float* outputs, int threads, Isa isa) {
  const MixturePlan plan(mixture, false, threads, isa);
  const int64_t channels = plan.channels;
  plan.for_each_item([&](const Item& item, int worker) {
    const Nets nets = plan.parameters(item.net, item.count, worker);
    const Workspace work = plan.workspace(worker);
    for (int64_t p = item.first, b = item.net / mixture.components; p < item.end; p += plan.tile) {
      const Features features = plan.features(b, p, item.end, worker);
      VAMOH_DISPATCH(plan.isa, forward)(plan.net, nets, features, work);
      plan.for_each_panel(b, p, features, [&](int64_t i, const Points& points) {
        for (int64_t which = 0; which < item.count; ++which)
          VAMOH_DISPATCH(plan.isa, scatter_panel)(work.outputs + (i * item.count + which) * channels * kPanel,
                                                  points.index, points.count, channels,
                                                  outputs + (item.net + which) * mixture.points * channels);
      });
    }
  });
}

void inr_mixture_backward(const InrMixture& mixture, const float* grad_outputs, float* grad_theta, int threads,
                          Isa isa) {
  const MixturePlan plan(mixture, true, threads, isa);
  const int64_t channels = plan.channels;
  plan.for_each_item([&](const Item& item, int worker) {
    const Nets nets = plan.parameters(item.net, item.count, worker);
    const Gradients grads = plan.gradients(item, grad_theta, worker);
    const Workspace work = plan.workspace(worker);
    for (int64_t p = item.first, b = item.net / mixture.components; p < item.end; p += plan.tile) {
      const Features features = plan.features(b, p, item.end, worker);
      VAMOH_DISPATCH(plan.isa, forward)(plan.net, nets, features, work);
      plan.for_each_panel(b, p, features, [&](int64_t i, const Points& points) {
        for (int64_t which = 0; which < item.count; ++which)
          VAMOH_DISPATCH(plan.isa, gather_panel)(
              grad_outputs + (item.net + which) * mixture.points * channels, points.index, points.count, channels,
              work.grad[(mixture.depth - 1) % 2] + (i * item.count + which) * channels * kPanel);
      });
      VAMOH_DISPATCH(plan.isa, backward)(plan.net, nets, features, work, grads);
    }
    plan.finish(item, grads);
  });
  plan.add_pieces(grad_theta);
}

void inr_mixture_log_likelihood(const InrMixture& mixture, const PointLikelihood& likelihood, const float* values,
                                float* log_p, int threads, Isa isa) {
  const MixturePlan plan(mixture, false, threads, isa);
  const int64_t components = mixture.components, channels = plan.channels;
  const std::vector<Channel> channel = channels_of(mixture, likelihood);
  if (mixture.mask) std::fill_n(log_p, plan.nets * mixture.points, 0.0f);
  plan.for_each_item([&](const Item& item, int worker) {
    const Nets nets = plan.parameters(item.net, item.count, worker);
    const Workspace work = plan.workspace(worker);
    alignas(64) float scores[kPanel];
    for (int64_t p = item.first, b = item.net / components; p < item.end; p += plan.tile) {
      const Features features = plan.features(b, p, item.end, worker);
      VAMOH_DISPATCH(plan.isa, forward)(plan.net, nets, features, work);
      for (int64_t which = 0; which < item.count; ++which) {
        const int64_t n = item.net + which;
        if (which == 0 || n % components == 0) plan.gather_values(values, n / components, p, features, work);
        plan.for_each_panel(b, p, features, [&](int64_t i, const Points& points) {
          VAMOH_DISPATCH(plan.isa, score_panel)(&channel[n % components * channels], channels,
                                                work.outputs + (i * item.count + which) * channels * kPanel,
                                                work.values + i * channels * kPanel, nullptr, points.count, scores,
                                                nullptr, nullptr);
          VAMOH_DISPATCH(plan.isa, scatter_panel)(scores, points.index, points.count, 1, log_p + n * mixture.points);
        });
      }
    }
  });
}

void inr_mixture_expected_log_likelihood(const InrMixture& mixture, const PointLikelihood& likelihood,
                                         const float* values, const float* weights, float* value, float* log_p,
                                         float* grad_theta, float* grad_scale, int threads, Isa isa) {
  const MixturePlan plan(mixture, true, threads, isa);
  const int64_t components = mixture.components, channels = plan.channels;
  const std::vector<Channel> channel = channels_of(mixture, likelihood);
  if (mixture.mask) std::fill_n(log_p, plan.nets * mixture.points, 0.0f);
  std::vector<double> parts(plan.pieces * plan.nets), by_scale(plan.pieces * plan.nets * channels);
  plan.for_each_item([&](const Item& item, int worker) {
    const Nets nets = plan.parameters(item.net, item.count, worker);
    const Gradients grads = plan.gradients(item, grad_theta, worker);
    const Workspace work = plan.workspace(worker);
    alignas(64) float scores[kPanel], q[kPanel];
    for (int64_t p = item.first, b = item.net / components; p < item.end; p += plan.tile) {
      const Features features = plan.features(b, p, item.end, worker);
      VAMOH_DISPATCH(plan.isa, forward)(plan.net, nets, features, work);
      for (int64_t which = 0; which < item.count; ++which) {
        const int64_t n = item.net + which, part = item.piece * plan.nets + n;
        if (which == 0 || n % components == 0) plan.gather_values(values, n / components, p, features, work);
        plan.for_each_panel(b, p, features, [&](int64_t i, const Points& points) {
          const int64_t at = (i * item.count + which) * channels * kPanel;
          VAMOH_DISPATCH(plan.isa, gather_panel)(weights + n * mixture.points, points.index, points.count, 1, q);
          parts[part] += VAMOH_DISPATCH(plan.isa, score_panel)(
              &channel[n % components * channels], channels, work.outputs + at, work.values + i * channels * kPanel, q,
              points.computed, scores, work.grad[(mixture.depth - 1) % 2] + at, &by_scale[part * channels]);
          VAMOH_DISPATCH(plan.isa, scatter_panel)(scores, points.index, points.count, 1, log_p + n * mixture.points);
        });
      }
      VAMOH_DISPATCH(plan.isa, backward)(plan.net, nets, features, work, grads);
    }
    plan.finish(item, grads);
  });
  plan.add_pieces(grad_theta);
  for (int64_t i = plan.nets; i < plan.pieces * plan.nets; ++i) parts[i % plan.nets] += parts[i];
  for (int64_t i = plan.nets * channels; i < plan.pieces * plan.nets * channels; ++i)
    by_scale[i % (plan.nets * channels)] += by_scale[i];
  for (int64_t b = 0; b < mixture.batch; ++b)
    value[b] =
        static_cast<float>(std::accumulate(parts.begin() + b * components, parts.begin() + (b + 1) * components, 0.0));
  std::copy_n(by_scale.begin(), plan.nets * channels, grad_scale);
}

void inr_mixture_mean(const InrMixture& mixture, const PointLikelihood& likelihood, const float* log_pi, bool uniform,
                      float* mean, float* mean_map, int threads, Isa isa) {
  const MixturePlan plan(mixture, false, threads, isa);
  const int64_t components = mixture.components, channels = plan.channels;
  const int64_t size = 2 * plan.tile * kPanel;  // points of a tile and their mirror points
  const Buffer<float> scratch = allocate<float>(std::max(threads, 1) * size * (2 * channels + 1));
  plan.for_each_tile([&](int64_t b, int64_t p, int64_t end, int worker) {
    const Features features = plan.features(b, p, end, worker);
    const Workspace work = plan.workspace(worker);
    float* largest = scratch.get() + worker * size * (2 * channels + 1);
    float *mixed = largest + size, *best = mixed + size * channels;
    std::fill_n(largest, size, 0.0f);
    std::fill_n(mixed, size * channels * 2, 0.0f);
    alignas(64) float shares[kPanel];
    for (int64_t k = 0; k < components; k += plan.group) {
      const int64_t group = std::min(plan.group, components - k);
      VAMOH_DISPATCH(plan.isa, forward)(plan.net, plan.parameters(b * components + k, group, worker), features, work);
      plan.for_each_panel(b, p, features, [&](int64_t i, const Points& points) {
        for (int64_t which = 0; which < group; ++which) {
          const float* row = log_pi + (b * components + k + which) * (uniform ? 1 : mixture.points);
          if (uniform)
            std::fill_n(shares, kPanel, row[0]);
          else
            VAMOH_DISPATCH(plan.isa, gather_panel)(row, points.index, points.count, 1, shares);
          VAMOH_DISPATCH(plan.isa, mix_panel)(
              likelihood.kind, channels, work.outputs + (i * group + which) * channels * kPanel, shares, points.count,
              k + which == 0, largest + i * kPanel, mixed + i * channels * kPanel, best + i * channels * kPanel);
        }
      });
    }
    plan.for_each_panel(b, p, features, [&](int64_t i, const Points& points) {
      VAMOH_DISPATCH(plan.isa, scatter_panel)(mixed + i * channels * kPanel, points.index, points.count, channels,
                                              mean + b * mixture.points * channels);
      VAMOH_DISPATCH(plan.isa, scatter_panel)(best + i * channels * kPanel, points.index, points.count, channels,
                                              mean_map + b * mixture.points * channels);
    });
  });
}

}  // namespace vamoh
