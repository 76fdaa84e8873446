#include "../simd/vectors.inl"
#include "../simd/panel.inl"
#include "../simd/gemm.inl"

using vamoh::PointConvInputs;
using vamoh::PointConvSizes;

// Row r of the output is centroid r % M of function r / M. These find what it reads.
inline const float* points_of(const PointConvInputs& in, const PointConvSizes& s, int64_t r) {
  return in.features + r / s.centroids * s.points * s.channels;
}
inline int64_t place(const PointConvSizes& s, int64_t r) { return s.shared ? r % s.centroids : r; }

// V sums of `Channels` channels: to[c * Q + lane] = sum_s points[index[s]][c] * weights[s][lane]
template <int Channels>
inline void contract_channels(const float* points, int64_t channels, const int64_t* index, const float* weights,
                              int64_t neighbors, int64_t width, int64_t lane, float* to) {
  V sums[Channels] = {};
  for (int64_t s = 0; s < neighbors; ++s) {
    const float* f = points + index[s] * channels;
    const V w = load_part(weights + s * width + lane, width - lane);
#pragma GCC unroll 16
    for (int c = 0; c < Channels; ++c) sums[c] = fma(splat(f[c]), w, sums[c]);
  }
#pragma GCC unroll 16
  for (int c = 0; c < Channels; ++c) store_part(to + c * width + lane, sums[c], width - lane);
}

constexpr int kChannels = kRows * kColumns >= 24 ? 16 : 8;

// Channels [c0, c1) of the contracted rows [r0, r1): to[row][c][q], rows `stride` apart.
void contract(const PointConvInputs& in, const PointConvSizes& sizes, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
              float* to, int64_t stride) {
  const int64_t channels = sizes.channels, width = sizes.width, neighbors = sizes.neighbors;
  for (int64_t r = r0; r < r1; ++r, to += stride) {
    const float* points = points_of(in, sizes, r);
    const int64_t* index = in.neighbors + place(sizes, r) * neighbors;
    const float* weights = in.weights + place(sizes, r) * neighbors * width;
    for (int64_t lane = 0; lane < width; lane += kLanes) {
      int64_t c = c0;
      for (; c + kChannels <= c1; c += kChannels)
        contract_channels<kChannels>(points + c, channels, index, weights, neighbors, width, lane,
                                     to + (c - c0) * width);
      for (; c + 4 <= c1; c += 4)
        contract_channels<4>(points + c, channels, index, weights, neighbors, width, lane, to + (c - c0) * width);
      for (; c < c1; ++c)
        contract_channels<1>(points + c, channels, index, weights, neighbors, width, lane, to + (c - c0) * width);
    }
  }
}

// Rows [i0, i1) of the transpose of linear_weight [outputs][in], in panels.
void pack_transposed(const float* linear_weight, int64_t in, int64_t outputs, int64_t i0, int64_t i1, float* to) {
  for (int64_t lane = 0; lane < outputs; lane += kBlock) {
    const int64_t width = panel_width(outputs, lane);
    pack(linear_weight + lane * in + i0, 1, in, i1 - i0, outputs - lane < width ? outputs - lane : width,
         to + lane * in + i0 * width);
  }
}

// Rows [r0, r1) of the output. panels: linear_weight from pack_transposed. tile [r1 - r0][channels_at_once * Q].
void forward_rows(const PointConvInputs& in, const PointConvSizes& s, const float* panels, int64_t r0, int64_t r1,
                  int64_t channels_at_once, float slope, float* tile, float* out) {
  const int64_t rows = r1 - r0, inputs = s.channels * s.width;
  out += r0 * s.outputs;
  for (int64_t c = 0; c < s.channels; c += channels_at_once) {
    const int64_t end = c + channels_at_once < s.channels ? c + channels_at_once : s.channels;
    const int64_t depth = (end - c) * s.width;
    contract(in, s, r0, r1, c, end, tile, depth);
    for (int64_t lane = 0; lane < s.outputs; lane += kBlock) {
      const int64_t width = panel_width(s.outputs, lane);
      const float* panel = panels + lane * inputs + c * s.width * width;
      float* const to = out + lane;
      panel_product(tile, depth, 1, panel, width, rows, depth, 0, width,
                    {c == 0 ? in.linear_bias + lane : to, c == 0 ? 0 : s.outputs, to, s.outputs, s.outputs - lane,
                     end == s.channels ? slope : 1});
    }
  }
}

void activate(float* values, int64_t count, float slope) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(values + i, leaky(load(values + i), slope));
  for (; i < count; ++i) values[i] = values[i] > 0 ? values[i] : values[i] * slope;
}

// Rows [r0, r1) of the gradient before the activation, into `masked` unless that is null, and their sums [outputs].
void begin_backward(const float* grad, const float* out, int64_t r0, int64_t r1, int64_t outputs, float slope,
                    float* masked, float* sums) {
  for (int64_t o = 0; o < outputs; o += kLanes) {
    V total = V{};
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t at = r * outputs + o;
      V g = load_part(grad + at, outputs - o);
      if (masked) {
        g = load_part(out + at, outputs - o) > 0.0f ? g : g * slope;
        store_part(masked + at, g, outputs - o);
      }
      total += g;
    }
    store_part(sums + o, total, outputs - o);
  }
}

// Columns of channels [c0, c1) of the gradient of linear_weight, from rows [r0, r1): to[o][...], outputs `stride`
// apart. tile [depth][(c1 - c0) * Q padded to kLanes].
void grad_linear(const float* grad, const PointConvInputs& in, const PointConvSizes& s, int64_t r0, int64_t r1,
                 int64_t c0, int64_t c1, int64_t depth, float* tile, float* to, int64_t stride) {
  const int64_t columns = (c1 - c0) * s.width, padded = (columns + kLanes - 1) / kLanes * kLanes;
  for (int64_t r = r0; r == r0 || r < r1; r += depth) {
    const int64_t count = r1 - r < depth ? r1 - r : depth;
    contract(in, s, r, r + count, c0, c1, tile, padded);
    for (int64_t lane = 0; lane < columns; lane += kBlock)
      panel_product(grad + r * s.outputs, 1, s.outputs, tile + lane, padded, s.outputs, count, lane,
                    panel_width(columns, lane), {r == r0 ? nullptr : to, stride, to, stride, columns});
  }
}

// A block of the columns of linear_weight in panels: [outputs][c1 - c0 channels].
void pack_columns(const float* linear_weight, int64_t in, int64_t outputs, int64_t first, int64_t last, float* to) {
  pack(linear_weight + first, in, 1, outputs, last - first, to);
}

// weights[s][lane] (+)= sum_c points[index[s]][c] * d[c][lane] for S neighbours from the first
template <int S>
inline void weight_gradient(const float* points, int64_t channels, const int64_t* index, int64_t neighbors,
                            const float* d, int64_t count, int64_t width, int64_t lane, bool fresh, float* to) {
  for (; neighbors >= S; neighbors -= S, index += S, to += S * width) {
    const float* f[S];
    V sums[S];
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s) {
      f[s] = points + index[s] * channels;
      sums[s] = fresh ? V{} : load_part(to + s * width + lane, width - lane);
    }
    for (int64_t c = 0; c < count; ++c) {
      const V right = load_part(d + c * width + lane, width - lane);
#pragma GCC unroll 16
      for (int s = 0; s < S; ++s) sums[s] = fma(splat(f[s][c]), right, sums[s]);
    }
#pragma GCC unroll 16
    for (int s = 0; s < S; ++s) store_part(to + s * width + lane, sums[s], width - lane);
  }
  if constexpr (S > 1) weight_gradient<S - 1>(points, channels, index, neighbors, d, count, width, lane, fresh, to);
}

// to[s][c] = sum_q d[c][q] * weights[s][q] for `count` channels; rows of `to` are `channels` apart.
inline void feature_gradient(const float* d, const float* weights, int64_t neighbors, int64_t count, int64_t width,
                             float* to, int64_t channels) {
  for (int64_t c = 0; c < count; c += kLanes)
    for (int64_t q = 0; q == 0 || q < width; q += kLanes) {
      V t[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) t[i] = c + i < count ? load_part(d + (c + i) * width + q, width - q) : V{};
      transpose(t);
      const int64_t used = width - q < kLanes ? width - q : kLanes;
      for (int64_t s = 0; s < neighbors; ++s) {
        float* const place = to + s * channels + c;
        const float* w = weights + s * width + q;
        V total = q > 0 ? load_part(place, count - c) : V{};
        if (used == kLanes) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) total = fma(splat(w[i]), t[i], total);
        } else {
          for (int64_t i = 0; i < used; ++i) total = fma(splat(w[i]), t[i], total);
        }
        store_part(place, total, count - c);
      }
    }
}

// From the gradient d of channels [c0, c1) of contracted row r: the gradients of its weights, added up over channels
// and, where the weights are shared, over functions; and, unless `pairs` is null, of every feature it reads,
// pairs[s][c] for all channels.
void spread(const PointConvInputs& in, const PointConvSizes& s, int64_t r, int64_t c0, int64_t c1, const float* d,
            float* grad_weights, float* pairs) {
  const int64_t* index = in.neighbors + place(s, r) * s.neighbors;
  const int64_t at = place(s, r) * s.neighbors * s.width;
  const bool fresh = c0 == 0 && (!s.shared || r < s.centroids);
  for (int64_t lane = 0; lane < s.width; lane += kLanes)
    weight_gradient<9>(points_of(in, s, r) + c0, s.channels, index, s.neighbors, d, c1 - c0, s.width, lane, fresh,
                       grad_weights + at);
  if (pairs) feature_gradient(d, in.weights + at, s.neighbors, c1 - c0, s.width, pairs + c0, s.channels);
}

// Centroids [m0, m1) of functions [b0, b1). panels: linear_weight from pack_columns, in blocks of channels_at_once.
// Of the scratch, rows [rows][outputs] and d [rows][channels_at_once * Q padded to kLanes].
void backward_rows(const float* grad, const PointConvInputs& in, const PointConvSizes& s, const float* panels,
                   int64_t b0, int64_t b1, int64_t m0, int64_t m1, int64_t channels_at_once, float* rows, float* d,
                   float* grad_weights, float* pairs, int64_t pairs_stride) {
  const int64_t along = m1 - m0, count = (b1 - b0) * along;
  for (int64_t b = b0; b < b1; ++b)
    __builtin_memcpy(rows + (b - b0) * along * s.outputs, grad + (b * s.centroids + m0) * s.outputs,
                     static_cast<size_t>(along * s.outputs) * sizeof(float));
  for (int64_t c = 0; c < s.channels; c += channels_at_once) {
    const int64_t end = c + channels_at_once < s.channels ? c + channels_at_once : s.channels;
    const int64_t columns = (end - c) * s.width;
    for (int64_t lane = 0; lane < columns; lane += kBlock) {
      const int64_t width = panel_width(columns, lane);
      panel_product(rows, s.outputs, 1, panels + lane * s.outputs, width, count, s.outputs, lane, width,
                    {nullptr, 0, d, columns, columns});
    }
    panels += s.outputs * ((columns + kLanes - 1) / kLanes * kLanes);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = b0 + i / along, m = m0 + i % along;
      spread(in, s, b * s.centroids + m, c, end, d + i * columns, grad_weights,
             pairs ? pairs + (b - b0) * pairs_stride + m * s.neighbors * s.channels : nullptr);
    }
  }
}

// to[j] (+)= scale * sum of rows[list[i] / per] for i in [starts[j], starts[j + 1]), for points j in [j0, j1)
void collect(const float* rows, const int64_t* starts, const int64_t* list, int64_t per, int64_t channels, int64_t j0,
             int64_t j1, float scale, bool add, float* to) {
  for (int64_t j = j0; j < j1; ++j)
    for (int64_t c = 0; c < channels; c += kLanes) {
      float* const place = to + j * channels + c;
      V total = V{};
      for (int64_t i = starts[j]; i < starts[j + 1]; ++i)
        total += load_part(rows + list[i] / per * channels + c, channels - c);
      total *= scale;
      store_part(place, add ? load_part(place, channels - c) + total : total, channels - c);
    }
}

// to[m][s] = table[neighbors[m][s]] - table[centroids[m]] + bias for m in [m0, m1)
void difference_rows(const float* table, const int64_t* neighbors, const int64_t* centroids, const float* bias,
                     int64_t count, int64_t width, int64_t m0, int64_t m1, float* to) {
  for (int64_t m = m0; m < m1; ++m)
    for (int64_t q = 0; q < width; q += kLanes) {
      const int64_t left = width - q;
      const V center = load_part(table + centroids[m] * width + q, left), added = load_part(bias + q, left);
      for (int64_t s = 0; s < count; ++s)
        store_part(to + (m * count + s) * width + q,
                   (load_part(table + neighbors[m * count + s] * width + q, left) - center) + added, left);
    }
}

// sums[m] = sum_s rows[m][s] for m in [m0, m1), and their total.
void sum_rows(const float* rows, int64_t count, int64_t width, int64_t m0, int64_t m1, float* sums, float* total) {
  for (int64_t q = 0; q < width; q += kLanes) {
    V all = V{};
    for (int64_t m = m0; m < m1; ++m) {
      V one = V{};
      for (int64_t s = 0; s < count; ++s) one += load_part(rows + (m * count + s) * width + q, width - q);
      store_part(sums + m * width + q, one, width - q);
      all += one;
    }
    store_part(total + q, all, width - q);
  }
}
