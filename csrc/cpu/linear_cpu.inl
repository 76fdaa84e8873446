#include "../simd/vectors.inl"
#include "../simd/panel.inl"
#include "../simd/gemm.inl"

// With few rows m, values are summed along the contraction instead: kThin rows of x share every vector of the weight.
constexpr int kThinOuts = 3;
constexpr int kThin = kRows * kColumns / kThinOuts;

// x [rows][in] in groups of kThin, kThin / 2, ... 1 rows, each [in padded / kLanes][rows of the group][kLanes].
void pack_thin(const float* x, int64_t x_row, int64_t x_value, int64_t rows, int64_t in, float* to) {
  int64_t m = 0;
  for (int64_t group = kThin; group > 0; group /= 2)
    for (; m + group <= rows; m += group)
      for (int64_t k = 0; k < in; k += kLanes)
        for (int64_t r = 0; r < group; ++r)
          for (int64_t i = k; i < k + kLanes; ++i) *to++ = i < in ? x[(m + r) * x_row + i * x_value] : 0;
}

template <int O, int M>
inline void thin_block(const float* weight, const float* bias, const float* x, int64_t in, float* out,
                       int64_t out_row) {
  V s[O][M] = {};
  const auto add = [&](const V(&w)[O]) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const V right = load(x + m * kLanes);
#pragma GCC unroll 4
      for (int o = 0; o < O; ++o) s[o][m] = fma(w[o], right, s[o][m]);
    }
    x += M * kLanes;
  };
  V w[O];
  int64_t k = 0;
#pragma GCC unroll 1
  for (; k + kLanes <= in; k += kLanes) {
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) {
      prefetch(weight + o * in + k + kAhead);
      w[o] = load(weight + o * in + k);
    }
    add(w);
  }
  if (k < in) {
    for (int o = 0; o < O; ++o) w[o] = load_part(weight + o * in + k, in - k);
    add(w);
  }
#pragma GCC unroll 4
  for (int o = 0; o < O; ++o) {
    const float start = bias ? bias[o] : 0;
    for (int m = 0; m + 4 <= M; m += 4) {
      const V4 total = sums(s[o][m], s[o][m + 1], s[o][m + 2], s[o][m + 3]) + start;
      for (int i = 0; i < 4; ++i) out[(m + i) * out_row + o] = total[i];
    }
    for (int m = M / 4 * 4; m < M; ++m) out[m * out_row + o] = sum(s[o][m]) + start;
  }
}

template <int O, int M>
inline void thin_rows(const float* weight, const float* bias, const float* x, int64_t rows, int64_t in, float* out,
                      int64_t out_row) {
  const int64_t padded = (in + kLanes - 1) / kLanes * kLanes;
  for (; rows >= M; rows -= M, x += M * padded, out += M * out_row) thin_block<O, M>(weight, bias, x, in, out, out_row);
  if constexpr (M > 1) thin_rows<O, M / 2>(weight, bias, x, rows, in, out, out_row);
}

void linear_forward_thin(const float* weight, const float* bias, const float* x, int64_t rows, int64_t in, int64_t o0,
                         int64_t o1, float* out, int64_t out_row) {
  int64_t o = o0;
  for (; o + kThinOuts <= o1; o += kThinOuts)
    thin_rows<kThinOuts, kThin>(weight + o * in, bias ? bias + o : nullptr, x, rows, in, out + o, out_row);
  for (; o < o1; ++o) thin_rows<1, kThin>(weight + o * in, bias ? bias + o : nullptr, x, rows, in, out + o, out_row);
}

// out[m][o] for m < rows and o0 <= o < o1 as the transpose of weight [o][in] x^T [in][m]: outputs are rows, so that
// the weight is read where it lies. x in panels of `rows` columns; sums [o1 - o0][rows padded to kLanes].
void linear_forward(const float* weight, const float* bias, const float* x, int64_t rows, int64_t in, int64_t o0,
                    int64_t o1, int64_t depth, float* sums, float* out, int64_t out_row) {
  const int64_t padded = (rows + kLanes - 1) / kLanes * kLanes, outs = o1 - o0;
  for (int64_t k = 0; k == 0 || k < in; k += depth) {
    const int64_t count = in - k < depth ? in - k : depth;
    const float* panel = x;
    for (int64_t lane = 0; lane < rows; lane += kBlock) {
      const int64_t width = panel_width(rows, lane);
      panel_product(weight + o0 * in + k, in, 1, panel + k * width, width, outs, count, lane, width,
                    {k == 0 ? nullptr : sums, padded, sums, padded, padded});
      panel += in * width;
    }
  }
  if (bias)
    for (int64_t o = 0; o < outs; ++o)
      for (int64_t lane = 0; lane < padded; lane += kLanes)
        store(sums + o * padded + lane, load(sums + o * padded + lane) + bias[o0 + o]);
  for (int64_t o = 0; o < outs; o += kLanes)
    for (int64_t m = 0; m < rows; m += kLanes) {
      if (o + kLanes <= outs && m + kLanes <= rows) {
        V block[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = load(sums + (o + i) * padded + m);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(out + (m + i) * out_row + o0 + o, block[i]);
      } else {
        for (int64_t i = m; i < rows && i < m + kLanes; ++i)
          for (int64_t j = o; j < outs && j < o + kLanes; ++j) out[i * out_row + o0 + j] = sums[j * padded + i];
      }
    }
}

// grad_x[m][i] for i0 <= i < i1 from outputs [o0, o1), as grad [m][o] weight [o][i]. Consecutive grad_x[m] are `stride`
// apart. packed [kPackedDepth][i1 - i0 padded to kLanes] is scratch.
constexpr int64_t kPackedFrom = 32;  // rows m from which a copy of the weight pays
constexpr int64_t kInPlaceDepth = 16;
constexpr int64_t kPackedDepth = 64;

void linear_grad_x(const float* grad, int64_t grad_row, int64_t grad_value, const float* weight, int64_t rows,
                   int64_t in, int64_t i0, int64_t i1, int64_t o0, int64_t o1, float* packed, float* grad_x,
                   int64_t stride) {
  const int64_t columns = i1 - i0;
  const bool in_place = columns % kLanes == 0 && rows < kPackedFrom;
  const int64_t depth = in_place ? kInPlaceDepth : kPackedDepth;
  for (int64_t o = o0; o == o0 || o < o1; o += depth) {
    const int64_t count = o1 - o < depth ? o1 - o : depth;
    const float* from = weight + o * in + i0;
    if (!in_place) pack(from, in, 1, count, columns, packed);
    const float* ahead = from + depth * in;  // of the next rows, prefetched in the order of memory
    int64_t prefetched = 0;
    for (int64_t lane = 0; lane < columns; lane += kBlock) {
      const int64_t width = panel_width(columns, lane);
      if (in_place)
        for (int64_t i = 0; i < width * depth; i += 16) {
          prefetch(ahead + prefetched);
          prefetched += 16;
          if (prefetched == columns) ahead += in, prefetched = 0;
        }
      panel_product(grad + o * grad_value, grad_row, grad_value, in_place ? from + lane : packed + lane * count,
                    in_place ? in : width, rows, count, lane, width,
                    {o == o0 ? nullptr : grad_x, stride, grad_x, stride, columns});
    }
  }
}

// grad_weight[o][i] for o0 <= o < o1, as the transpose of grad [m][o] times x [m][i] in panels.
void linear_grad_weight(const float* grad, int64_t grad_row, int64_t grad_value, const float* x, int64_t rows,
                        int64_t in, int64_t o0, int64_t o1, int64_t depth, bool streams, float* grad_weight) {
  grad += o0 * grad_value;
  grad_weight += o0 * in;
  for (int64_t m = 0; m == 0 || m < rows; m += depth) {
    const int64_t count = rows - m < depth ? rows - m : depth;
    const float* from = grad + m * grad_row;
    const float* panel = x;
    for (int64_t lane = 0; lane < in; lane += kBlock) {
      const int64_t width = panel_width(in, lane);
      float* to = grad_weight + lane;
      panel_product(from, grad_value, grad_row, panel + m * width, width, o1 - o0, count, 0, width,
                    {m == 0 ? nullptr : to, in, to, in, in - lane, 1, streams});
      panel += rows * width;
    }
  }
#if VAMOH_VECTOR_BITS >= 256
  _mm_sfence();
#endif
}

// grad_bias[o] for o0 <= o < o1.
void linear_grad_bias(const float* grad, int64_t grad_row, int64_t grad_value, int64_t rows, int64_t o0, int64_t o1,
                      float* grad_bias) {
  int64_t o = o0;
  if (grad_value == 1)
    for (; o + kLanes <= o1; o += kLanes) {
      V total = V{};
      for (int64_t m = 0; m < rows; ++m) total += load(grad + m * grad_row + o);
      store(grad_bias + o, total);
    }
  for (; o < o1; ++o) {
    float total = 0;
    for (int64_t m = 0; m < rows; ++m) total += grad[m * grad_row + o * grad_value];
    grad_bias[o] = total;
  }
}
