// Products of small matrices with a panel: kPanel points side by side, feature after feature, [features][kPanel].
// Needs vectors.inl. Included by the kernels, once per instruction set.

constexpr int kPanel = 64;

// One register block: kRows x kColumns vectors and what feeds them fill the registers of the instruction set.
constexpr int kRows = 6;
constexpr int kColumns = VAMOH_VECTOR_BITS == 512 ? 4 : 2;
constexpr int kBlock = kColumns * kLanes;  // floats across a register block; divides kPanel

template <int R, int J = kColumns>
struct Accumulators {
  V at[R][J];
};

// sums[r][lane] += sum_k a[r * a_row + k * a_stride] * b[k * b_stride + lane]
template <int R, int J>
inline __attribute__((always_inline)) void multiply(const float* a, int64_t a_row, int64_t a_stride, const float* b,
                                                    int64_t b_stride, int64_t count, Accumulators<R, J>& sums) {
  Accumulators<R, J> s = sums;
#pragma GCC unroll 1
  for (int64_t k = 0; k < count; ++k, a += a_stride, b += b_stride) {
    V right[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      const V left = splat(a[r * a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) s.at[r][j] = fma(left, right[j], s.at[r][j]);
    }
  }
  sums = s;
}

template <int R, int J, class Init, class Done>
inline __attribute__((always_inline)) void product_block(const float* a, int64_t a_row, int64_t a_stride,
                                                         const float* b, int64_t b_stride, int64_t count, int64_t row,
                                                         int64_t lane, const Init& init, const Done& done) {
  Accumulators<R, J> sums;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) sums.at[r][j] = init(row + r, lane + j * kLanes);
  multiply<R, J>(a, a_row, a_stride, b + lane, b_stride, count, sums);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) done(row + r, lane + j * kLanes, sums.at[r][j]);
}

template <int R, class Init, class Done>
inline __attribute__((always_inline)) void product_rows(const float* a, int64_t a_row, int64_t a_stride, const float* b,
                                                        int64_t b_stride, int64_t count, int64_t width, int64_t row,
                                                        const Init& init, const Done& done) {
  int64_t lane = 0;
  for (; lane + kBlock <= width; lane += kBlock)
    product_block<R, kColumns>(a, a_row, a_stride, b, b_stride, count, row, lane, init, done);
  for (; lane < width; lane += kLanes)
    product_block<R, 1>(a, a_row, a_stride, b, b_stride, count, row, lane, init, done);
}

// For every row r < rows and lane < width (a multiple of kLanes, best of kBlock):
//   done(r, lane, init(r, lane) + sum_k a[r * a_row + k * a_stride] * b[k * b_stride + lane])
// with vectors of lanes. One function for y = W x (a_row = in, a_stride = 1), x = W^T y (a_row = 1, a_stride = in) and
// gradients of W where b is a matrix of points in rows.
template <class Init, class Done>
inline void product(const float* a, int64_t a_row, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows,
                    int64_t count, int64_t width, const Init& init, const Done& done) {
  int64_t r = 0;
  for (; r + kRows <= rows && (rows - r > kRows + 2 || rows - r == kRows); r += kRows)
    product_rows<kRows>(a + r * a_row, a_row, a_stride, b, b_stride, count, width, r, init, done);
  if (rows - r > kRows) {  // 7 as 4 + 3 and 8 as 4 + 4: blocks of one or two rows are bound by loads of b
    product_rows<4>(a + r * a_row, a_row, a_stride, b, b_stride, count, width, r, init, done);
    r += 4;
  }
  a += r * a_row;
  switch (rows - r) {
    case 1:
      return product_rows<1>(a, a_row, a_stride, b, b_stride, count, width, r, init, done);
    case 2:
      return product_rows<2>(a, a_row, a_stride, b, b_stride, count, width, r, init, done);
    case 3:
      return product_rows<3>(a, a_row, a_stride, b, b_stride, count, width, r, init, done);
    case 4:
      return product_rows<4>(a, a_row, a_stride, b, b_stride, count, width, r, init, done);
    case 5:
      return product_rows<5>(a, a_row, a_stride, b, b_stride, count, width, r, init, done);
    default:
      return;
  }
}

// The usual ways to begin and to end a product.
struct FromZero {
  V operator()(int64_t, int64_t) const { return V{}; }
};
struct FromColumn {  // one value per row: a bias
  const float* column;
  V operator()(int64_t row, int64_t) const { return splat(column[row]); }
};
struct FromMatrix {
  const float* matrix;
  int64_t stride;
  V operator()(int64_t row, int64_t lane) const { return load(matrix + row * stride + lane); }
};
struct ToMatrix {
  float* matrix;
  int64_t stride;
  void operator()(int64_t row, int64_t lane, V v) const { store(matrix + row * stride + lane, v); }
};

#if defined(__clang__)
#define VAMOH_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define VAMOH_PICK(a, b, ...) __builtin_shuffle(a, b, Vi4{__VA_ARGS__})
#endif

// The sums of four vectors.
inline V4 sums(V a, V b, V c, V d) {
  const V4 w = fold(a), x = fold(b), y = fold(c), z = fold(d);
  const V4 wx = VAMOH_PICK(w, x, 0, 4, 1, 5) + VAMOH_PICK(w, x, 2, 6, 3, 7);
  const V4 yz = VAMOH_PICK(y, z, 0, 4, 1, 5) + VAMOH_PICK(y, z, 2, 6, 3, 7);
  return VAMOH_PICK(wx, yz, 0, 1, 4, 5) + VAMOH_PICK(wx, yz, 2, 3, 6, 7);
}

#undef VAMOH_PICK

// Rows of a block of `dots`; its columns are 4.
constexpr int kDotRows = VAMOH_VECTOR_BITS == 512 ? 6 : 2;

struct FullPanels {  // how many floats across a panel count, a multiple of kLanes
  int64_t operator()(int64_t) const { return kPanel; }
};

// out[r * out_row + c] += sum over panels and points of a[panel][r][point] * b[panel][c][point], C <= 4 columns
template <int R, int C, class Lanes>
inline __attribute__((always_inline)) void dots_block(const float* a, int64_t a_panel, const float* b, int64_t b_panel,
                                                      int64_t panels, float* out, int64_t out_row, const Lanes& lanes) {
  V s[R][4] = {};
  for (int64_t panel = 0; panel < panels; ++panel, a += a_panel, b += b_panel) {
    const int64_t end = lanes(panel);
#pragma GCC unroll 1
    for (int64_t lane = 0; lane < end; lane += kLanes) {
      V right[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) right[c] = load(b + c * kPanel + lane);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V left = load(a + r * kPanel + lane);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) s[r][c] = fma(left, right[c], s[r][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const V4 total = sums(s[r][0], s[r][1], s[r][2], s[r][3]);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) out[r * out_row + c] += total[c];
  }
}

template <int R, class Lanes>
inline void dots_rows(const float* a, int64_t a_panel, const float* b, int64_t b_panel, int64_t panels, int64_t columns,
                      float* out, int64_t out_row, const Lanes& lanes) {
  int64_t c = 0;
  for (; c + 4 <= columns; c += 4)
    dots_block<R, 4>(a, a_panel, b + c * kPanel, b_panel, panels, out + c, out_row, lanes);
  for (; c < columns; ++c) dots_block<R, 1>(a, a_panel, b + c * kPanel, b_panel, panels, out + c, out_row, lanes);
}

// Gradient of a weight matrix: out[r * out_row + c] += sum over panels and points of a[panel][r][point] *
// b[panel][c][point]. Panels are a_panel and b_panel floats apart.
template <class Lanes = FullPanels>
inline void dots(const float* a, int64_t a_panel, const float* b, int64_t b_panel, int64_t panels, int64_t rows,
                 int64_t columns, float* out, int64_t out_row, const Lanes& lanes = {}) {
  int64_t r = 0;
  for (; r + kDotRows <= rows; r += kDotRows)
    dots_rows<kDotRows>(a + r * kPanel, a_panel, b, b_panel, panels, columns, out + r * out_row, out_row, lanes);
  a += r * kPanel;
  out += r * out_row;
  switch (rows - r) {
    case 1:
      return dots_rows<1>(a, a_panel, b, b_panel, panels, columns, out, out_row, lanes);
    case 2:
      return dots_rows<2>(a, a_panel, b, b_panel, panels, columns, out, out_row, lanes);
    case 3:
      return dots_rows<3>(a, a_panel, b, b_panel, panels, columns, out, out_row, lanes);
    case 4:
      return dots_rows<4>(a, a_panel, b, b_panel, panels, columns, out, out_row, lanes);
    case 5:
      return dots_rows<5>(a, a_panel, b, b_panel, panels, columns, out, out_row, lanes);
    default:
      return;
  }
}

// sum over panels and points of one row: gradient of a bias.
template <class Lanes = FullPanels>
inline float row_sum(const float* row, int64_t panel_stride, int64_t panels, const Lanes& lanes = {}) {
  V total = V{};
  for (int64_t panel = 0; panel < panels; ++panel, row += panel_stride)
    for (int64_t lane = 0, end = lanes(panel); lane < end; lane += kLanes) total += load(row + lane);
  return sum(total);
}
