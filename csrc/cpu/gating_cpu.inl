#include "../simd/vectors.inl"

#include "../simd/panel.inl"

#if defined(__clang__)
#define VAMOH_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define VAMOH_PICK(a, b, ...) __builtin_shuffle(a, b, Vi4{__VA_ARGS__})
#endif

// panel[c][r] = rows[r * stride + c] for r < count.
inline void transpose(const float* rows, int64_t stride, int64_t count, int64_t columns, float* panel) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4, rows += 4 * stride) {
    int64_t c = 0;
    float* to = panel + r;
    for (; c + 4 <= columns; c += 4, to += 4 * kPanel) {
      V4 x[4];
      for (int i = 0; i < 4; ++i) x[i] = *reinterpret_cast<const V4*>(rows + i * stride + c);
      const V4 a = VAMOH_PICK(x[0], x[1], 0, 4, 1, 5), b = VAMOH_PICK(x[2], x[3], 0, 4, 1, 5);
      const V4 d = VAMOH_PICK(x[0], x[1], 2, 6, 3, 7), e = VAMOH_PICK(x[2], x[3], 2, 6, 3, 7);
      *reinterpret_cast<V4*>(to) = VAMOH_PICK(a, b, 0, 1, 4, 5);
      *reinterpret_cast<V4*>(to + kPanel) = VAMOH_PICK(a, b, 2, 3, 6, 7);
      *reinterpret_cast<V4*>(to + 2 * kPanel) = VAMOH_PICK(d, e, 0, 1, 4, 5);
      *reinterpret_cast<V4*>(to + 3 * kPanel) = VAMOH_PICK(d, e, 2, 3, 6, 7);
    }
    for (; c < columns; ++c, to += kPanel)
      for (int64_t i = 0; i < 4; ++i) to[i] = rows[i * stride + c];
  }
  for (; r < count; ++r, rows += stride)
    for (int64_t c = 0; c < columns; ++c) panel[c * kPanel + r] = rows[c];
}

#undef VAMOH_PICK

// panel[r][p] = rows[r * stride + p] for p < count, 0 for the other p < kPanel.
inline void load_rows(const float* from, int64_t stride, int64_t rows, int64_t count, float* panel) {
  for (int64_t r = 0; r < rows; ++r, from += stride, panel += kPanel) {
    if (count == kPanel) {
      for (int p = 0; p < kPanel; p += kLanes) store(panel + p, load(from + p));
    } else {
      for (int64_t p = 0; p < kPanel; ++p) panel[p] = p < count ? from[p] : 0;
    }
  }
}

inline void store_rows(const float* panel, int64_t rows, int64_t count, float* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, panel += kPanel, to += stride) {
    if (count == kPanel) {
      for (int p = 0; p < kPanel; p += kLanes) store(to + p, load(panel + p));
    } else {
      for (int64_t p = 0; p < count; ++p) to[p] = panel[p];
    }
  }
}

inline void tanh_rows(float* panel, int64_t rows) {
  for (int64_t i = 0; i < rows * kPanel; i += kLanes) store(panel + i, tanh(load(panel + i)));
}

// Logits to log-probabilities, in place.
inline void log_softmax(float* panel, int64_t rows) {
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    float* column = panel + lane;
    V top = load(column);
    for (int64_t k = 1; k < rows; ++k) top = max(load(column + k * kPanel), top);
    V total = V{};
    for (int64_t k = 0; k < rows; ++k) total += exp(load(column + k * kPanel) - top);
    const V shift = log(total);
    for (int64_t k = 0; k < rows; ++k) store(column + k * kPanel, (load(column + k * kPanel) - top) - shift);
  }
}

// panel[c][p] = values[p][c] for p < count, 0 for the other p < kPanel.
inline void load_values(const float* values, int64_t channels, int64_t count, float* panel) {
  transpose(values, channels, count, channels, panel);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t p = count; p < kPanel; ++p) panel[c * kPanel + p] = 0;
}

struct FromCoords {
  const float *coords, *shift;
  V operator()(int64_t row, int64_t lane) const { return load(coords + row * kPanel + lane) + shift[row]; }
};

struct ToLeaky {
  float* panel;
  float slope;
  void operator()(int64_t row, int64_t lane, V v) const {
    store(panel + row * kPanel + lane, v > 0.0f ? v : v * slope);
  }
};

struct ToLeakyGrad {
  const float* after;  // the activation; it has the sign of its input
  float* panel;
  float slope;
  void operator()(int64_t row, int64_t lane, V v) const {
    const int64_t i = row * kPanel + lane;
    store(panel + i, load(after + i) > 0.0f ? v : v * slope);
  }
};

// Fills a slot with the values and every layer's input, and with the last layer's output if `logits`.
inline void run_layers(const GatingTile& net, const float* coords, const float* shift, const float* values,
                       int64_t count, bool logits, float* slot) {
  float* inputs = slot + net.inputs_at[0];
  if (net.channels) load_values(values, net.channels, count, slot + net.values_at);
  const FromCoords first{coords, shift};
  const int64_t rows = net.widths[0];
  const float* const panel = slot + net.values_at;
  if (net.layers == 0) {
    if (logits)
      product(net.value_weight, net.channels, 1, panel, kPanel, rows, net.channels, kPanel, first,
              ToMatrix{slot + net.grads_at[0], kPanel});
    return;
  }
  product(net.value_weight, net.channels, 1, panel, kPanel, rows, net.channels, kPanel, first,
          ToLeaky{inputs, net.slope});
  for (int64_t l = 0; l < net.layers; ++l) {
    const float *weight = net.weights[l], *before = slot + net.inputs_at[l];
    const int64_t in = net.widths[l], out = net.widths[l + 1];
    const FromColumn bias{net.biases[l]};
    if (l + 1 < net.layers) {
      product(weight, in, 1, before, kPanel, out, in, kPanel, bias, ToLeaky{slot + net.inputs_at[l + 1], net.slope});
    } else if (logits) {
      product(weight, in, 1, before, kPanel, out, in, kPanel, bias, ToMatrix{slot + net.grads_at[l + 1], kPanel});
    }
  }
}

// log_p[k * stride + p] of the points p < count <= kPanel of one function. coords: panel [H].
void gating_tile(const GatingTile& net, const float* coords, const float* shift, const float* values, int64_t count,
                 float* log_p, int64_t stride, float* slot) {
  const int64_t components = net.widths[net.layers];
  float* logits = slot + net.grads_at[net.layers];
  run_layers(net, coords, shift, values, count, true, slot);
  if (net.bounded) tanh_rows(logits, components);
  log_softmax(logits, components);
  store_rows(logits, components, count, log_p, stride);
}

// out[r] += sum of row r of a panel; also added to the panel `total` where it is not null.
inline void add_rows(const float* panel, int64_t rows, float* out, float* total) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4, panel += 4 * kPanel) {
    V s[4] = {};
    for (int i = 0; i < 4; ++i)
      for (int lane = 0; lane < kPanel; lane += kLanes) s[i] += load(panel + i * kPanel + lane);
    const V4 four = sums(s[0], s[1], s[2], s[3]);
    for (int i = 0; i < 4; ++i) out[r + i] += four[i];
  }
  for (; r < rows; ++r, panel += kPanel) out[r] += row_sum(panel, 0, 1);
  if (total) {
    panel -= rows * kPanel;
    for (int64_t i = 0; i < rows * kPanel; i += kLanes) store(total + i, load(total + i) + load(panel + i));
  }
}

// Fills a slot with the layers' inputs and the gradients of their outputs, from log_p and its gradient (rows `stride`
// apart). Adds the first layer's gradient to the panel grad_coords [H] and, summed over the points, to grad_shift [H];
// writes grad_values [count, C] if not null.
void gating_backward_tile(const GatingTile& net, const float* coords, const float* shift, const float* values,
                          int64_t count, const float* log_p, const float* grad, int64_t stride, float* slot,
                          float* grad_coords, float* grad_shift, float* grad_values) {
  const int64_t layers = net.layers, components = net.widths[layers];
  run_layers(net, coords, shift, values, count, net.bounded, slot);
  float* d = slot + net.grads_at[layers];
  if (net.bounded) tanh_rows(d, components);
  if (count < kPanel) {
    float *log_p_panel = slot + net.spare_at, *grad_panel = log_p_panel + components * kPanel;
    load_rows(log_p, stride, components, count, log_p_panel);
    load_rows(grad, stride, components, count, grad_panel);
    log_p = log_p_panel;
    grad = grad_panel;
    stride = kPanel;
  }
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    V total = V{};
    for (int64_t k = 0; k < components; ++k) total += load(grad + k * stride + lane);
    for (int64_t k = 0; k < components; ++k) {
      float* at = d + k * kPanel + lane;
      V v = load(grad + k * stride + lane) - exp(load(log_p + k * stride + lane)) * total;
      if (net.bounded) v *= 1.0f - load(at) * load(at);
      store(at, v);
    }
  }
  for (int64_t l = layers - 1; l >= 0; --l) {
    const int64_t in = net.widths[l], out = net.widths[l + 1];
    product(net.weights[l], 1, in, slot + net.grads_at[l + 1], kPanel, in, out, kPanel, FromZero{},
            ToLeakyGrad{slot + net.inputs_at[l], slot + net.grads_at[l], net.slope});
  }
  const float* first = slot + net.grads_at[0];
  add_rows(first, net.widths[0], grad_shift, grad_coords);
  if (grad_values) {
    float* panel = slot + net.spare_at;
    product(net.value_weight, 1, net.channels, first, kPanel, net.channels, net.widths[0], kPanel, FromZero{},
            ToMatrix{panel, kPanel});
    for (int64_t p = 0; p < count; ++p)
      for (int64_t c = 0; c < net.channels; ++c) grad_values[p * net.channels + c] = panel[c * kPanel + p];
  }
}

// Adds the gradients of the parameters that `slots` filled slots give, in the order of GatingGrads::parameters.
void gating_parameters(const GatingTile& net, const float* slots, int64_t count, float* total) {
  if (net.channels) {
    dots(slots + net.grads_at[0], net.slot, slots + net.values_at, net.slot, count, net.widths[0], net.channels, total,
         net.channels);
    total += net.widths[0] * net.channels;
  }
  for (int64_t l = 0; l < net.layers; ++l) {
    const int64_t in = net.widths[l], out = net.widths[l + 1];
    const float* grads = slots + net.grads_at[l + 1];
    dots(grads, net.slot, slots + net.inputs_at[l], net.slot, count, out, in, total, in);
    total += in * out;
    for (int64_t i = 0; i < count; ++i) add_rows(grads + i * net.slot, out, total, nullptr);
    total += out;
  }
}

// One function's q and divergence over `count` points; rows of log_q and q are `stride` apart, those of log_p p_stride.
double kl_rows(const float* log_q, const float* log_p, bool uniform, int64_t p_stride, const bool* mask, float* q,
               int64_t components, int64_t count, int64_t stride) {
  double result = 0;
  for (int64_t k = 0; k < components; ++k, log_q += stride, log_p += p_stride, q += stride) {
    V total = V{};
    int64_t n = 0;
    for (; n < count; n += kLanes) {
      const int64_t here = count - n < kLanes ? count - n : kLanes;
      V a = V{}, b = V{};
      Vi seen = Vi{} - 1;
      if (here == kLanes) {
        a = load(log_q + n);
        b = uniform ? splat(log_p[0]) : load(log_p + n);
        if (mask)
          for (int i = 0; i < kLanes; ++i) seen[i] = -int(mask[n + i]);
      } else {
        for (int64_t i = 0; i < kLanes; ++i) {
          a[i] = i < here ? log_q[n + i] : 0;
          b[i] = i < here ? log_p[uniform ? 0 : n + i] : 0;
          seen[i] = i < here ? mask ? -int(mask[n + i]) : -1 : 0;
        }
      }
      const V p = seen != 0 ? exp(a) : V{};
      total += p == 0.0f ? V{} : p * (a - b);
      if (here == kLanes) {
        store(q + n, p);
      } else {
        for (int64_t i = 0; i < here; ++i) q[n + i] = p[i];
      }
    }
    result += double(sum(total));
  }
  return result;
}

void kl_grad_rows(const float* grad_q, float grad_kl, const float* q, const float* log_q, const float* log_p,
                  bool uniform, float* grad_log_q, float* grad_log_p, int64_t count) {
  int64_t n = 0;
  for (; n + kLanes <= count; n += kLanes) {
    const V p = load(q + n), ratio = load(log_q + n) - (uniform ? splat(log_p[0]) : load(log_p + n));
    store(grad_log_q + n, p == 0.0f ? V{} : p * (load(grad_q + n) + grad_kl * (ratio + 1.0f)));
    store(grad_log_p + n, -grad_kl * p);
  }
  for (; n < count; ++n) {
    const float ratio = log_q[n] - log_p[uniform ? 0 : n];
    grad_log_q[n] = q[n] == 0 ? 0 : q[n] * (grad_q[n] + grad_kl * (ratio + 1));
    grad_log_p[n] = -grad_kl * q[n];
  }
}
