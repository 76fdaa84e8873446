// One network at one tile of points, forward and backward. Points lie in panels (panel.inl); with a mirror, a panel of
// features serves two panels of points, those on its one side and those opposite.

#include "simd.inl"
#include "panel.inl"
#include "likelihood.inl"

using vamoh::Features;
using vamoh::Network;
using vamoh::Workspace;

template <bool kKeep>
struct Activate {
  const Network* net;
  float* h;
  float* derivative;
  void operator()(int64_t row, int64_t lane, V v) const {
    const int64_t at = row * kPanel + lane;
    if (!kKeep) {
      store(h + at, v > 0.0f ? v : v * net->slope);
    } else if (net->sine) {
      V sine, cosine;
      sincos(v * net->omega, sine, cosine);
      store(h + at, sine);
      store(derivative + at, cosine * net->omega);
    } else {
      const V d = v > 0.0f ? splat(1.0f) : splat(net->slope);
      store(h + at, v * d);
      store(derivative + at, d);
    }
  }
};

template <bool kKeep>
struct ActivateBothSides {  // pre(x) = even + odd, pre(-x) = even - odd
  const float* even;
  Activate<kKeep> plus, minus;
  void operator()(int64_t row, int64_t lane, V odd) const {
    const V e = load(even + row * kPanel + lane);
    plus(row, lane, e + odd);
    minus(row, lane, e - odd);
  }
};

template <bool kKeep>
struct Deactivate {
  float* grad;
  const float* h;
  const float* derivative;
  float slope;
  void operator()(int64_t row, int64_t lane, V v) const {
    const int64_t at = row * kPanel + lane;
    store(grad + at, kKeep ? v * load(derivative + at) : load(h + at) > 0.0f ? v : v * slope);
  }
};

template <bool kKeep>
inline void forward_layers(const Network& net, const float* theta, const Features& features, const Workspace& work) {
  const int64_t points = features.count * (net.mirrored ? 2 : 1);  // panels
  const auto activate = [&](int64_t layer, int64_t panel) __attribute__((always_inline)) {
    const int64_t at = (net.hidden_at[layer] * points + panel * net.widths[layer + 1]) * kPanel;
    return Activate<kKeep>{&net, work.hidden + at, work.derivative + at};
  };
  const float *weight = theta + net.weight_at[0], *bias = theta + net.bias_at[0];
  const int64_t encoded = net.widths[0], first = net.widths[1];
  for (int64_t p = 0; p < features.count; ++p) {
    const float* x = features.panels + p * encoded * kPanel;
    if (net.depth == 1) {
      product(weight, encoded, 1, x, kPanel, first, encoded, kPanel, FromColumn{bias},
              ToMatrix{work.outputs + p * first * kPanel, kPanel});
    } else if (!net.mirrored) {
      product(weight, encoded, 1, x, kPanel, first, encoded, kPanel, FromColumn{bias}, activate(0, p));
    } else {
      const int64_t half = encoded / 2;
      product(weight, encoded, 1, x, kPanel, first, half, kPanel, FromColumn{bias}, ToMatrix{work.even, kPanel});
      product(weight + half, encoded, 1, x + half * kPanel, kPanel, first, half, kPanel, FromZero{},
              ActivateBothSides<kKeep>{work.even, activate(0, p), activate(0, features.count + p)});
    }
  }
  for (int64_t p = 0; p < points; ++p)
    for (int64_t layer = 1; layer < net.depth; ++layer) {
      const int64_t in = net.widths[layer], out = net.widths[layer + 1];
      const float* x = work.hidden + (net.hidden_at[layer - 1] * points + p * in) * kPanel;
      weight = theta + net.weight_at[layer];
      bias = theta + net.bias_at[layer];
      if (layer == net.depth - 1)
        product(weight, in, 1, x, kPanel, out, in, kPanel, FromColumn{bias},
                ToMatrix{work.outputs + p * out * kPanel, kPanel});
      else
        product(weight, in, 1, x, kPanel, out, in, kPanel, FromColumn{bias}, activate(layer, p));
    }
}

void forward(const Network& net, const float* theta, const Features& features, const Workspace& work) {
  net.keep_derivative ? forward_layers<true>(net, theta, features, work)
                      : forward_layers<false>(net, theta, features, work);
}

template <bool kKeep>
inline void backward_layers(const Network& net, const float* theta, const Features& features, const Workspace& work,
                            float* grad_theta) {
  const int64_t points = features.count * (net.mirrored ? 2 : 1);
  for (int64_t layer = net.depth - 1; layer >= 0; --layer) {
    const int64_t in = net.widths[layer], out = net.widths[layer + 1];
    float* d = work.grad[layer % 2];
    float* grad_weight = grad_theta + net.weight_at[layer];
    for (int64_t r = 0; r < out; ++r)
      grad_theta[net.bias_at[layer] + r] += row_sum(d + r * kPanel, out * kPanel, points);
    if (layer > 0) {
      const float* x = work.hidden + net.hidden_at[layer - 1] * points * kPanel;
      const float* derivative = work.derivative + (kKeep ? net.hidden_at[layer - 1] * points * kPanel : 0);
      float* below = work.grad[(layer - 1) % 2];
      dots(d, out * kPanel, x, in * kPanel, points, out, in, grad_weight, in);
      for (int64_t p = 0; p < points; ++p) {
        const int64_t at = p * in * kPanel;
        product(theta + net.weight_at[layer], 1, in, d + p * out * kPanel, kPanel, in, out, kPanel, FromZero{},
                Deactivate<kKeep>{below + at, x + at, derivative + (kKeep ? at : 0), net.slope});
      }
      continue;
    }
    if (net.mirrored) {
      float* opposite = d + features.count * out * kPanel;
      for (int64_t i = 0; i < features.count * out * kPanel; i += kLanes) {
        const V a = load(d + i), b = load(opposite + i);
        store(d + i, a + b);
        store(opposite + i, a - b);
      }
    }
    const int64_t parts = net.mirrored ? 2 : 1, width = in / parts;
    for (int64_t part = 0; part < parts; ++part) {
      const float* a = d + part * features.count * out * kPanel;
      if (!features.rows) {
        dots(a, out * kPanel, features.panels + part * width * kPanel, in * kPanel, features.count, out, width,
             grad_weight + part * width, in);
        continue;
      }
      for (int64_t p = 0; p < features.count; ++p)
        for (int64_t column = part * width; column < (part + 1) * width; column += kPanel)
          product(a + p * out * kPanel, kPanel, 1, features.rows + (p * in + column) * kPanel, kPanel, out, kPanel,
                  kPanel, FromMatrix{grad_weight + column, in}, ToMatrix{grad_weight + column, in});
    }
  }
}

// Adds the gradients of the network's parameters to a row of theta's shape. The gradient of the outputs, in their
// layout, lies in work.grad[(depth - 1) % 2] and is lost.
void backward(const Network& net, const float* theta, const Features& features, const Workspace& work,
              float* grad_theta) {
  net.keep_derivative ? backward_layers<true>(net, theta, features, work, grad_theta)
                      : backward_layers<false>(net, theta, features, work, grad_theta);
}

// One channel of a panel; see score_panel.
template <class Function>
inline __attribute__((always_inline)) float score_channel(const Function& score, const float* outputs,
                                                          const float* values, const float* weights, float* log_p,
                                                          float* grad) {
  V by_scale = V{};
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    const Score s = score(load(outputs + lane), load(values + lane));
    store(log_p + lane, load(log_p + lane) + s.log_p);
    if (!weights) continue;
    const V q = load(weights + lane);
    store(grad + lane, q * s.by_logit);
    by_scale = fma(q, s.by_scale, by_scale);
  }
  return sum(by_scale);
}

// One panel of outputs [C][kPanel] against values of the same layout: log_p [kPanel], summed over channels. With
// weights [kPanel], also their product's gradient to the outputs and, summed over the panel, to the scale [C].
// Returns sum of weights * log_p.
double score_panel(const Channel* channels, int64_t count, const float* outputs, const float* values,
                   const float* weights, float* log_p, float* grad, double* grad_scale) {
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) store(log_p + lane, V{});
  for (int64_t i = 0; i < count; ++i) {
    const Channel c = channels[i];
    const float *l = outputs + i * kPanel, *y = values + i * kPanel;
    float* g = grad + i * kPanel;
    if (c.kind == PointLikelihood::bernoulli)
      score_channel(Bernoulli{}, l, y, weights, log_p, g);
    else if (c.kind == PointLikelihood::continuous_bernoulli)
      score_channel(ContinuousBernoulli{}, l, y, weights, log_p, g);
    else {
      const float by_scale = c.usual ? score_channel(UsualLogistic{c}, l, y, weights, log_p, g)
                                     : score_channel(Logistic{c}, l, y, weights, log_p, g);
      if (weights) grad_scale[i] += by_scale;
    }
  }
  V value = V{};
  if (weights)
    for (int64_t lane = 0; lane < kPanel; lane += kLanes) value = fma(load(weights + lane), load(log_p + lane), value);
  return sum(value);
}

// mean += probability * mean of the outputs, and best = that mean where `probability` exceeds `largest`.
void mix_panel(PointLikelihood::Kind kind, int64_t count, const float* outputs, const float* probability, float* largest, float* mixed,
               float* best) {
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    const V p = load(probability + lane), most = load(largest + lane);
    const Vi better = p > most;
    store(largest + lane, better ? p : most);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t at = c * kPanel + lane;
      const V m = mean(kind, load(outputs + at));
      store(mixed + at, fma(p, m, load(mixed + at)));
      store(best + at, better ? m : load(best + at));
    }
  }
}

void exponential(float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(values + i, exp(load(values + i)));
}

// Rows index[0 .. kPanel) of matrix [*, width] as a panel [width][kPanel]; zeros where the index is negative.
void gather_panel(const float* matrix, const int64_t* index, int64_t width, float* panel) {
  for (int64_t i = 0; i < kPanel; ++i) {
    const float* row = matrix + index[i] * width;
    if (index[i] < 0)
      for (int64_t w = 0; w < width; ++w) panel[w * kPanel + i] = 0;
    else
      for (int64_t w = 0; w < width; ++w) panel[w * kPanel + i] = row[w];
  }
}

// The inverse for one panel; entries with a negative index are dropped.
void scatter_panel(const float* panel, const int64_t* index, int64_t width, float* matrix) {
  for (int64_t i = 0; i < kPanel; ++i)
    if (index[i] >= 0)
      for (int64_t w = 0; w < width; ++w) matrix[index[i] * width + w] = panel[w * kPanel + i];
}

// The same rows in blocks [width / kPanel][kPanel][kPanel]; see Features.
void gather_rows(const float* matrix, const int64_t* index, int64_t width, float* rows) {
  for (int64_t i = 0; i < kPanel; ++i)
    for (int64_t block = 0; block < width; block += kPanel)
      for (int64_t lane = 0; lane < kPanel; lane += kLanes)
        store(rows + (block + i) * kPanel + lane,
              index[i] < 0 ? V{} : load(matrix + index[i] * width + block + lane));
}
