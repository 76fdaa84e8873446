#include "../simd/vectors.inl"
#include "../simd/panel.inl"
#include "../simd/noise.inl"

using vamoh::Layers;
using vamoh::Panel;
using vamoh::SampleSums;
using vamoh::View;

template <int R>
inline __attribute__((always_inline)) void solve_rows(const Layers& f, const View& view, const Panel& p, int64_t t) {
  const int64_t T = f.layers, Z = f.latent;
  for (int lane = 0; lane < kPanel; lane += kBlock) {
    Accumulators<R> linear;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) linear.at[r][j] = splat(view.b[t + r]);
    multiply<R>(view.w + t * Z, Z, 1, p.x + lane, kPanel, Z, linear);
    multiply<R>(f.gram + t * T + t + R, T, 1, p.e + (t + R) * kPanel + lane, kPanel, T - t - R, linear);
#pragma GCC unroll 8
    for (int r = R - 1; r >= 0; --r) {
      const V positive = splat(f.positive[t + r]), negative = splat(f.negative[t + r]);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) {
        const V v = linear.at[r][j], e = v * (v < 0.0f ? negative : positive);
        store(p.e + (t + r) * kPanel + lane + j * kLanes, e);
#pragma GCC unroll 8
        for (int q = 0; q < r; ++q) linear.at[q][j] = fma(splat(f.gram[(t + q) * T + t + r]), e, linear.at[q][j]);
      }
    }
  }
}

template <int R>
inline __attribute__((always_inline)) void solve_back_rows(const Layers& f, const float* weight, const Panel& p,
                                                           const SampleSums& sums, int64_t t) {
  const int64_t T = f.layers, Z = f.latent;
  for (int lane = 0; lane < kPanel; lane += kBlock) {
    Accumulators<R> grad = {};
    multiply<R>(f.u + t * Z, Z, 1, p.y + lane, kPanel, Z, grad);
    multiply<R>(f.gram + t, 1, T, p.h + lane, kPanel, t, grad);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V positive = splat(f.positive[t + r]), negative = splat(f.negative[t + r]);
      float *const negatives = sums.negative + (t + r) * kLanes, *const hs = sums.h + (t + r) * kLanes;
      V below = load(negatives), total = load(hs);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) {
        const int at = lane + j * kLanes;
        const auto side = load(p.e + (t + r) * kPanel + at) > 0.0f;
        const V h = grad.at[r][j] * (side ? negative : positive);
        store(p.h + (t + r) * kPanel + at, h);
        below += side ? load(weight + at) : V{};
        total += h;
#pragma GCC unroll 8
        for (int q = r + 1; q < R; ++q) grad.at[q][j] = fma(splat(f.gram[(t + r) * T + t + q]), h, grad.at[q][j]);
      }
      store(negatives, below);
      store(hs, total);
    }
  }
}

// Away from the base: e_t = leak_t linear_t with linear = w x + b + G e.
template <int R>
inline __attribute__((always_inline)) void forward_rows(const Layers& f, const View& view, const Panel& p, float slope,
                                                        int64_t t) {
  const int64_t T = f.layers, Z = f.latent;
  for (int lane = 0; lane < kPanel; lane += kBlock) {
    Accumulators<R> linear;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) linear.at[r][j] = splat(view.b[t + r]);
    multiply<R>(view.w + t * Z, Z, 1, p.x + lane, kPanel, Z, linear);
    multiply<R>(f.gram + t * T, T, 1, p.e + lane, kPanel, t, linear);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) {
        const V v = linear.at[r][j], e = v < 0.0f ? v * slope : v;
        store(p.e + (t + r) * kPanel + lane + j * kLanes, e);
#pragma GCC unroll 8
        for (int q = r + 1; q < R; ++q) linear.at[q][j] = fma(splat(f.gram[(t + q) * T + t + r]), e, linear.at[q][j]);
      }
  }
}

// y = view of x + u^T e, times the weight of its sample.
template <int R>
inline __attribute__((always_inline)) void base_rows(const Layers& f, const View& view, const float* weight,
                                                     const Panel& p, const SampleSums& sums, int64_t z) {
  for (int lane = 0; lane < kPanel; lane += kBlock) {
    Accumulators<R> y;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j)
        y.at[r][j] =
            fma(splat(view.scale[z + r]), load(p.x + (z + r) * kPanel + lane + j * kLanes), splat(view.shift[z + r]));
    multiply<R>(f.u + z, 1, f.latent, p.e + lane, kPanel, f.layers, y);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int64_t row = (z + r) * kLanes;
      V total = load(sums.y + row), square = load(sums.square + row), along = load(sums.along + row);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) {
        const int64_t at = (z + r) * kPanel + lane + j * kLanes;
        const V weighted = y.at[r][j] * load(weight + lane + j * kLanes);
        store(p.y + at, weighted);
        total += weighted;
        square = fma(y.at[r][j], weighted, square);
        along = fma(load(p.x + at), weighted, along);
      }
      store(sums.y + row, total);
      store(sums.square + row, square);
      store(sums.along + row, along);
    }
  }
}

#define VAMOH_LAST_ROWS(function, rows, ...) \
  switch (rows) {                            \
    case 1:                                  \
      function<1>(__VA_ARGS__);              \
      break;                                 \
    case 2:                                  \
      function<2>(__VA_ARGS__);              \
      break;                                 \
    case 3:                                  \
      function<3>(__VA_ARGS__);              \
      break;                                 \
    case 4:                                  \
      function<4>(__VA_ARGS__);              \
      break;                                 \
    case 5:                                  \
      function<5>(__VA_ARGS__);              \
      break;                                 \
    default:                                 \
      break;                                 \
  }

inline void solve(const Layers& f, const View& view, const Panel& p) {
  int64_t t = f.layers;
  for (; t >= kRows; t -= kRows) solve_rows<kRows>(f, view, p, t - kRows);
  VAMOH_LAST_ROWS(solve_rows, t, f, view, p, 0)
}

inline void solve_back(const Layers& f, const float* weight, const Panel& p, const SampleSums& sums) {
  int64_t t = 0;
  for (; t + kRows <= f.layers; t += kRows) solve_back_rows<kRows>(f, weight, p, sums, t);
  VAMOH_LAST_ROWS(solve_back_rows, f.layers - t, f, weight, p, sums, t)
}

inline void base(const Layers& f, const View& view, const float* weight, const Panel& p, const SampleSums& sums) {
  int64_t z = 0;
  for (; z + kRows <= f.latent; z += kRows) base_rows<kRows>(f, view, weight, p, sums, z);
  VAMOH_LAST_ROWS(base_rows, f.latent - z, f, view, weight, p, sums, z)
}

inline void forward(const Layers& f, const View& view, const Panel& p, float slope) {
  int64_t t = 0;
  for (; t + kRows <= f.layers; t += kRows) forward_rows<kRows>(f, view, p, slope, t);
  VAMOH_LAST_ROWS(forward_rows, f.layers - t, f, view, p, slope, t)
}

#undef VAMOH_LAST_ROWS

// Minus the log-determinants: out [kPanel]. sign: of e where a sample is on the negative side of a kink.
inline void stretches(const Layers& f, const Panel& p, float sign, float* out) {
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    V total = V{};
    for (int64_t t = 0; t < f.layers; ++t)
      total -= load(p.e + t * kPanel + lane) * sign > 0.0f ? splat(f.negative_log[t]) : splat(f.positive_log[t]);
    store(out + lane, total);
  }
}

// Log-densities of a panel but for the constant of the base: out [kPanel]. p.e is scratch.
void panel_values(const Layers& f, const View& view, const Panel& p, float* out) {
  solve(f, view, p);
  stretches(f, p, 1, out);
  struct Init {
    const float *x, *scale, *shift;
    V operator()(int64_t row, int64_t lane) const {
      return fma(splat(scale[row]), load(x + row * kPanel + lane), splat(shift[row]));
    }
  };
  struct Done {
    float* out;
    void operator()(int64_t, int64_t lane, V y) const { store(out + lane, fma(y * -0.5f, y, load(out + lane))); }
  };
  product(f.u, 1, f.latent, p.e, kPanel, f.latent, f.layers, kPanel, Init{p.x, view.scale, view.shift}, Done{out});
}

// Samples p.y of standard normal p.x, with base points scale x + shift of the view and `u` [T, Z], and their
// log-densities but for the constant: out [kPanel]. p.x and p.e are scratch.
void panel_samples(const Layers& f, const View& view, const Panel& p, const float* u, float slope, float* out) {
  float squares[kPanel] = {};
  for (int64_t z = 0; z < f.latent; ++z)
    for (int lane = 0; lane < kPanel; lane += kLanes) {
      float* const at = p.x + z * kPanel + lane;
      const V x = load(at), base = fma(splat(view.scale[z]), x, splat(view.shift[z]));
      const V standard =
          base - base == 0.0f ? x : (base - view.shift[z]) / view.scale[z];  // NaN and overflow reach the density too
      store(squares + lane, fma(standard, standard, load(squares + lane)));
      store(at, base);
    }
  forward(f, view, p, slope);
  stretches(f, p, -1, out);
  for (int lane = 0; lane < kPanel; lane += kLanes)
    store(out + lane, fma(load(squares + lane), splat(-0.5f), load(out + lane)));
  product(u, 1, f.latent, p.e, kPanel, f.latent, f.layers, kPanel, FromMatrix{p.x, kPanel}, ToMatrix{p.y, kPanel});
}

// e, weighted y and h of a panel, and their sums; weight [kPanel].
void panel_gradients(const Layers& f, const View& view, const float* weight, const Panel& p, const SampleSums& sums) {
  solve(f, view, p);
  base(f, view, weight, p, sums);
  solve_back(f, weight, p, sums);
}

// Adds products over the samples of `panels` panels, `stride` floats apart: h x^T [T, Z], and with `all` e y^T [T, Z]
// and h e^T [T, T] from the diagonal on, or a few entries before it.
void panel_products(const Layers& f, const Panel& p, int64_t stride, int64_t panels, bool all, float* hx, float* ey,
                    float* he) {
  const int64_t T = f.layers, Z = f.latent;
  dots(p.h, stride, p.x, stride, panels, T, Z, hx, Z);
  if (!all) return;
  dots(p.e, stride, p.y, stride, panels, T, Z, ey, Z);
  for (int64_t t = 0; t < T; t += kDotRows)
    dots(p.h + t * kPanel, stride, p.e + t * kPanel, stride, panels, T - t < kDotRows ? T - t : kDotRows, T - t,
         he + t * T + t, T);
}

// Gradient to x of a panel: out [Z][kPanel] = -(scale y + w^T h).
void panel_input_gradients(const Layers& f, const View& view, const Panel& p, float* out) {
  struct Init {
    const float *y, *scale;
    V operator()(int64_t row, int64_t lane) const { return splat(scale[row]) * load(y + row * kPanel + lane); }
  };
  struct Done {
    float* out;
    void operator()(int64_t row, int64_t lane, V v) const { store(out + row * kPanel + lane, -v); }
  };
  product(view.w, 1, f.latent, p.h, kPanel, f.latent, f.layers, kPanel, Init{p.y, view.scale}, Done{out});
}

void fill_noise(uint64_t seed, int64_t first, int64_t function, int64_t latent, float* out) {
  noise_panel(keys_of(seed), first, function, latent, out);
}

// out [rows, width] = a b, with a[r * a_row + k * a_stride], b [count, width] and width a multiple of kWidestPanel.
void matrix_product(const float* a, int64_t a_row, int64_t a_stride, const float* b, int64_t rows, int64_t count,
                    int64_t width, float* out) {
  product(a, a_row, a_stride, b, width, rows, count, width, FromZero{}, ToMatrix{out, width});
}

// out [rows]: the sum of the kLanes entries of every row.
void sum_rows(const float* vectors, int64_t rows, float* out) {
  for (int64_t i = 0; i < rows; ++i) out[i] = sum(load(vectors + i * kLanes));
}
