// Networks at one tile of points, forward and backward. Points lie in panels (panel.inl); with a mirror, a panel of
// features serves two panels of points, those on one side and their mirror points.

#include "../simd/vectors.inl"
#include "../simd/panel.inl"
#include "../simd/likelihood.inl"

using vamoh::Features;
using vamoh::Gradients;
using vamoh::Nets;
using vamoh::Network;
using vamoh::Workspace;

// Floats across a panel of points that count.
struct Lanes {
  const Features& features;
  int64_t from = 0;
  int64_t operator()(int64_t panel) const {
    const int64_t p = from + panel, here = p < features.count ? p : p - features.count;
    return here < features.count - 1 ? kPanel : (features.last + kLanes - 1) / kLanes * kLanes;
  }
};

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
inline void forward_layers(const Network& net, const Nets& nets, const Features& features, const Workspace& work) {
  const int64_t points = features.count + features.mirrored;  // panels
  const Lanes lanes{features};
  const auto activate = [&](int64_t layer, int64_t panel, int64_t which) __attribute__((always_inline)) {
    const int64_t width = net.widths[layer + 1], before = net.hidden_at[layer] * points * nets.count;
    const int64_t at = (before + (panel * nets.count + which) * width) * kPanel;
    return Activate<kKeep>{&net, work.hidden + at, work.derivative + at};
  };
  const int64_t encoded = net.widths[0], rows = nets.count * net.widths[1], half = encoded / 2;
  for (int64_t p = 0; p < features.count; ++p) {
    const float* x = features.panels + p * encoded * kPanel;
    if (net.depth == 1) {
      product(nets.weight, encoded, 1, x, kPanel, rows, encoded, lanes(p), FromColumn{nets.bias},
              ToMatrix{work.outputs + p * rows * kPanel, kPanel});
    } else if (p >= features.mirrored) {
      product(nets.weight, encoded, 1, x, kPanel, rows, encoded, lanes(p), FromColumn{nets.bias}, activate(0, p, 0));
    } else {
      product(nets.weight, encoded, 1, x, kPanel, rows, half, lanes(p), FromColumn{nets.bias},
              ToMatrix{work.even, kPanel});
      product(nets.weight + half, encoded, 1, x + half * kPanel, kPanel, rows, half, lanes(p), FromZero{},
              ActivateBothSides<kKeep>{work.even, activate(0, p, 0), activate(0, features.count + p, 0)});
    }
  }
  for (int64_t p = 0; p < points; ++p)
    for (int64_t which = 0; which < nets.count; ++which)
      for (int64_t layer = 1; layer < net.depth; ++layer) {
        const int64_t in = net.widths[layer], out = net.widths[layer + 1];
        const float* x = activate(layer - 1, p, which).h;
        const float* weight = nets.theta[which] + net.weight_at[layer];
        const FromColumn bias{nets.theta[which] + net.bias_at[layer]};
        if (layer == net.depth - 1)
          product(weight, in, 1, x, kPanel, out, in, lanes(p), bias,
                  ToMatrix{work.outputs + (p * nets.count + which) * out * kPanel, kPanel});
        else
          product(weight, in, 1, x, kPanel, out, in, lanes(p), bias, activate(layer, p, which));
      }
}

void forward(const Network& net, const Nets& nets, const Features& features, const Workspace& work) {
  net.keep_derivative ? forward_layers<true>(net, nets, features, work)
                      : forward_layers<false>(net, nets, features, work);
}

// The first layers' gradients, from those of their outputs [panels of points][rows][kPanel].
inline void backward_first(const Network& net, int64_t rows, const Features& features, float* d,
                           const Gradients& grads) {
  const int64_t in = net.widths[0], panel = rows * kPanel, split = net.mirrored ? in / 2 : in;
  for (int64_t r = 0; r < rows; ++r)
    grads.bias[r] += row_sum(d + r * kPanel, panel, features.count + features.mirrored, Lanes{features});
  float* mirror = d + features.count * panel;
  for (int64_t i = 0; i < features.mirrored * panel; i += kLanes) {
    const V a = load(d + i), b = load(mirror + i);
    store(d + i, a + b);
    store(mirror + i, a - b);
  }
  if (!features.rows) {
    const float* x = features.panels;
    dots(d, panel, x, in * kPanel, features.count, rows, split, grads.weight, in, Lanes{features});
    if (split == in) return;
    x += split * kPanel;
    dots(mirror, panel, x, in * kPanel, features.mirrored, rows, split, grads.weight + split, in, Lanes{features});
    dots(d + features.mirrored * panel, panel, x + features.mirrored * in * kPanel, in * kPanel,
         features.count - features.mirrored, rows, split, grads.weight + split, in, Lanes{features, features.mirrored});
    return;
  }
  for (int64_t p = 0; p < features.count; ++p) {
    const int64_t points = p < features.count - 1 ? kPanel : features.last;
    for (int64_t column = 0; column < in; column += kPanel)
      product((p < features.mirrored && column >= split ? mirror : d) + p * panel, kPanel, 1,
              features.rows + (p * in + column) * kPanel, kPanel, rows, points, kPanel,
              FromMatrix{grads.weight + column, in}, ToMatrix{grads.weight + column, in});
  }
}

template <bool kKeep>
inline void backward_layers(const Network& net, const Nets& nets, const Features& features, const Workspace& work,
                            const Gradients& grads) {
  const int64_t points = features.count + features.mirrored;
  const Lanes lanes{features};
  for (int64_t layer = net.depth - 1; layer > 0; --layer) {
    const int64_t in = net.widths[layer], out = net.widths[layer + 1];
    const int64_t in_panel = nets.count * in * kPanel, out_panel = nets.count * out * kPanel;
    for (int64_t which = 0; which < nets.count; ++which) {
      const float* d = work.grad[layer % 2] + which * out * kPanel;
      float* below = work.grad[(layer - 1) % 2] + which * in * kPanel;
      const int64_t at = net.hidden_at[layer - 1] * points * nets.count * kPanel + which * in * kPanel;
      const float *x = work.hidden + at, *derivative = work.derivative + (kKeep ? at : 0);
      float* row = grads.theta[which];
      for (int64_t r = 0; r < out; ++r)
        row[net.bias_at[layer] + r] += row_sum(d + r * kPanel, out_panel, points, lanes);
      dots(d, out_panel, x, in_panel, points, out, in, row + net.weight_at[layer], in, lanes);
      for (int64_t p = 0; p < points; ++p)
        product(nets.theta[which] + net.weight_at[layer], 1, in, d + p * out_panel, kPanel, in, out, lanes(p),
                FromZero{},
                Deactivate<kKeep>{below + p * in_panel, x + p * in_panel, derivative + (kKeep ? p * in_panel : 0),
                                  net.slope});
    }
  }
  backward_first(net, nets.count * net.widths[1], features, work.grad[0], grads);
}

// Adds the gradients of the networks' parameters. The gradient of the outputs, in their layout, lies in
// work.grad[(depth - 1) % 2] and is lost.
void backward(const Network& net, const Nets& nets, const Features& features, const Workspace& work,
              const Gradients& grads) {
  net.keep_derivative ? backward_layers<true>(net, nets, features, work, grads)
                      : backward_layers<false>(net, nets, features, work, grads);
}

// A gradient to an output below this counts as 0: certain outputs have nearly none, and the subnormal numbers that the
// layers below would make of it take many times as long. NaN stays.
constexpr float kNegligible = 1e-24f;

inline V settled(V grad) { return abs(grad) < kNegligible ? V{} : grad; }

// One channel of a panel; see score_panel.
template <class Function>
inline __attribute__((always_inline)) float score_channel(const Function& score, const float* outputs,
                                                          const float* values, const float* weights, int64_t lanes,
                                                          float* log_p, float* grad) {
  V by_scale = V{};
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    const Score s = score(load(outputs + lane), load(values + lane));
    store(log_p + lane, load(log_p + lane) + s.log_p);
    if (!weights) continue;
    const V q = load(weights + lane);
    store(grad + lane, settled(q * s.by_logit));
    by_scale = fma(q, s.by_scale, by_scale);
  }
  return sum(by_scale);
}

// The same for the logistic in its usual case (Channel::usual), as a function of t = |y - mean| / scale and
// q = e^-(half_bin / scale): with u = e^-t, p = u (1 - q^2) / ((1 + u q) (u + q)). Three short loops: the vectors of
// one long one would each wait for their own chain of operations.
inline float score_usual(const Channel& c, const float* outputs, const float* values, const float* weights,
                         int64_t lanes, float* log_p, float* grad) {
  alignas(64) float distance[kPanel], by_output[kPanel], padded[kPanel];
  const V inverse = splat(1.0f / c.scale);
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    const V logit = load(outputs + lane), y = load(values + lane);
    const V e = exp(-abs(logit)), r = 1.0f / (1.0f + e), small = e * r;
    store(distance + lane, logit > 0.0f ? (y - 1.0f) + small : y - small);  // no cancellation next to 1
    store(by_output + lane, small * r);
  }
  V by_scale = V{};
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    const V d = load(distance + lane), t = abs(d) * inverse, u = exp(-t), uq = u * c.q, square = u * u;
    const V under = (1.0f + uq) * (u + c.q), over = u * c.inside, more = fma(under, splat(c.epsilon), over);
    const V both = 1.0f / (under * more), falls = (1.0f - square) * c.q;  // p = over / under
    store(padded + lane, more * (more * both));
    if (!weights) continue;
    const V scaled = load(weights + lane) * (over * both) * inverse, slope = falls * scaled * load(by_output + lane);
    store(grad + lane, settled(d < 0.0f ? -slope : slope));
    const V width = fma(uq, splat(2.0f), square + 1.0f) * (c.q * c.width);
    by_scale = fma(fma(t, falls, fma(under, splat(c.inside_by), -width)), scaled, by_scale);
  }
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    const V p = load(padded + lane);
    store(log_p + lane, load(log_p + lane) + fma(p, V{}, log_normal(p, Vi{})));  // + 0 * p: NaN stays NaN
  }
  return sum(by_scale);
}

// One panel of outputs [C][kPanel] against values of the same layout: log_p [kPanel], summed over channels. With
// weights [kPanel], also their product's gradient to the outputs and, summed over the panel, to the scale [C].
// Returns sum of weights * log_p. Only the first `points` of the panel count.
double score_panel(const Channel* channels, int64_t count, const float* outputs, const float* values,
                   const float* weights, int64_t points, float* log_p, float* grad, double* grad_scale) {
  const int64_t lanes = (points + kLanes - 1) / kLanes * kLanes;
  for (int64_t lane = 0; lane < lanes; lane += kLanes) store(log_p + lane, V{});
  for (int64_t i = 0; i < count; ++i) {
    const Channel c = channels[i];
    const float *l = outputs + i * kPanel, *y = values + i * kPanel;
    float* g = grad + i * kPanel;
    if (c.kind == PointLikelihood::bernoulli)
      score_channel(Bernoulli{}, l, y, weights, lanes, log_p, g);
    else if (c.kind == PointLikelihood::continuous_bernoulli)
      score_channel(ContinuousBernoulli{}, l, y, weights, lanes, log_p, g);
    else {
      const float by_scale = c.usual ? score_usual(c, l, y, weights, lanes, log_p, g)
                                     : score_channel(Logistic{c}, l, y, weights, lanes, log_p, g);
      if (weights) grad_scale[i] += by_scale;
    }
  }
  V value = V{};
  if (weights)
    for (int64_t lane = 0; lane < lanes; lane += kLanes) value = fma(load(weights + lane), load(log_p + lane), value);
  return sum(value);
}

// mixed += e^log_pi * mean of the outputs, and best = that mean where log_pi exceeds `largest`, at the first `points`
// of a panel. `first`: of all components. As in torch's argmax, NaN exceeds all; e^log_pi may round two values to one.
void mix_panel(PointLikelihood::Kind kind, int64_t count, const float* outputs, const float* log_pi, int64_t points,
               bool first, float* largest, float* mixed, float* best) {
  for (int64_t lane = 0; lane < points; lane += kLanes) {
    const V share = load(log_pi + lane), most = load(largest + lane), p = exp(share);
    const Vi better = first ? Vi{} - 1 : (~(share <= most)) & (most == most);
    store(largest + lane, better ? share : most);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t at = c * kPanel + lane;
      const V m = mean(kind, load(outputs + at));
      store(mixed + at, fma(p, m, load(mixed + at)));
      store(best + at, better ? m : load(best + at));
    }
  }
}

// Rows index[0 .. count) of matrix [*, width] as a panel [width][kPanel], and zeros.
void gather_panel(const float* matrix, const int64_t* index, int64_t count, int64_t width, float* panel) {
  int64_t w = 0;
  for (; w + kLanes <= width; w += kLanes)
    for (int64_t first = 0; first < kPanel; first += kLanes) {
      V block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = first + i < count ? load(matrix + index[first + i] * width + w) : V{};
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(panel + (w + i) * kPanel + first, block[i]);
    }
  for (; w < width; ++w) {
    for (int64_t i = 0; i < count; ++i) panel[w * kPanel + i] = matrix[index[i] * width + w];
    for (int64_t i = count; i < kPanel; ++i) panel[w * kPanel + i] = 0;
  }
}

// The inverse.
void scatter_panel(const float* panel, const int64_t* index, int64_t count, int64_t width, float* matrix) {
  for (int64_t w = 0; w < width; ++w)
    for (int64_t i = 0; i < count; ++i) matrix[index[i] * width + w] = panel[w * kPanel + i];
}

// The same rows in blocks [width / kPanel][kPanel][kPanel]; see Features.
void gather_rows(const float* matrix, const int64_t* index, int64_t count, int64_t width, float* rows) {
  for (int64_t i = 0; i < kPanel; ++i)
    for (int64_t block = 0; block < width; block += kPanel)
      for (int64_t lane = 0; lane < kPanel; lane += kLanes)
        store(rows + (block + i) * kPanel + lane, i < count ? load(matrix + index[i] * width + block + lane) : V{});
}
