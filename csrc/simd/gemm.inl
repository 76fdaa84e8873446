// Products of matrices of any size on the register blocks of panel.inl. Needs vectors.inl and panel.inl. Included by
// the kernels, once per instruction set.
//
// Of the operands of a sum over k of a[row][k] * b[k][column], a is read in place, one value at a time, with any
// strides; b lies in panels of kBlock columns, [count][kBlock], the last panel only as wide as it must be.

constexpr int64_t kAhead = 6144;  // prefetch distance in a large matrix, in floats

// Into the second-level cache: loads into the first wait for one of its few line buffers, which bounds a thread to a
// fraction of what the memory delivers.
inline void prefetch(const float* p) { __builtin_prefetch(p, 0, 2); }

// Floats across panel `lane / kBlock` of n columns.
inline int64_t panel_width(int64_t n, int64_t lane) {
  const int64_t left = (n - lane + kLanes - 1) / kLanes * kLanes;
  return left < kBlock ? left : kBlock;
}

// Rows of the register block of J vectors: no more than 12, whose addresses find room in registers too.
template <int J>
constexpr int kTall = kRows * kColumns / J < 12 ? kRows * kColumns / J : 12;

inline V leaky(V v, float slope) { return v > 0.0f ? v : v * slope; }

// Where sums begin and end: at from[row * from_stride + lane] (a bias has stride 0; null: at zero), and as
// leaky(sum) at to[row * to_stride + lane]. Lanes from `columns` on are not in memory.
struct Sums {
  const float* from;
  int64_t from_stride;
  float* to;
  int64_t to_stride, columns;
  float slope = 1;       // 1: as they are
  bool streams = false;  // past the caches: whole aligned vectors of a large output that nothing reads soon

  V begin(int64_t row, int64_t lane) const {
    return from ? load_part(from + row * from_stride + lane, columns - lane) : V{};
  }
  void end(int64_t row, int64_t lane, V v) const {
    float* const place = to + row * to_stride + lane;
    v = leaky(v, slope);
#if VAMOH_VECTOR_BITS == 512
    if (streams) return _mm512_stream_ps(place, v);
#elif VAMOH_VECTOR_BITS == 256
    if (streams) return _mm256_stream_ps(place, v);
#endif
    store_part(place, v, columns - lane);
  }
};

template <int R, int J>
inline void panel_rows(const float* a, int64_t a_row, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows,
                       int64_t count, int64_t row, int64_t lane, const Sums& sums) {
  for (; row + R <= rows; row += R) {
    Accumulators<R, J> block;
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) block.at[r][j] = sums.begin(row + r, lane + j * kLanes);
    multiply<R, J>(a + row * a_row, a_row, a_stride, b, b_stride, count, block);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) sums.end(row + r, lane + j * kLanes, block.at[r][j]);
  }
  constexpr int kLess = J == kColumns ? R - 1 : R / 2;  // whole rests where blocks are low, few blocks to compile else
  if constexpr (kLess > 0) panel_rows<kLess, J>(a, a_row, a_stride, b, b_stride, rows, count, row, lane, sums);
}

// For every row < rows and vector of the `width` (a panel_width) columns from `lane` on:
//   sums.end(row, lane, sums.begin(row, lane) + sum_k a[row * a_row + k * a_stride] * b[k * b_stride + lane of the
//   panel])
void panel_product(const float* a, int64_t a_row, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows,
                   int64_t count, int64_t lane, int64_t width, const Sums& sums) {
  switch (width / kLanes) {
    case 1:
      return panel_rows<kTall<1>, 1>(a, a_row, a_stride, b, b_stride, rows, count, 0, lane, sums);
#if VAMOH_VECTOR_BITS == 512
    case 2:
      return panel_rows<kTall<2>, 2>(a, a_row, a_stride, b, b_stride, rows, count, 0, lane, sums);
    case 3:
      return panel_rows<kTall<3>, 3>(a, a_row, a_stride, b, b_stride, rows, count, 0, lane, sums);
#endif
    default:
      return panel_rows<kRows, kColumns>(a, a_row, a_stride, b, b_stride, rows, count, 0, lane, sums);
  }
}

// to[c][r] = from[r][c], where row r >= rows of `from` counts as 0: `width` values per row of `to`, width >= rows a
// multiple of kLanes. Rows of `from` are from_row apart, those of `to` to_row.
inline void transpose_into(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to,
                           int64_t to_row, int64_t width) {
  for (int64_t r = 0; r < width; r += kLanes) {
    int64_t c = 0;
    if (r + kLanes <= rows)
      for (; c + kLanes <= columns; c += kLanes) {
        V m[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) m[i] = load(from + (r + i) * from_row + c);
        transpose(m);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + (c + i) * to_row + r, m[i]);
      }
    for (; c < columns; ++c)
      for (int64_t i = r; i < r + kLanes; ++i) to[c * to_row + i] = i < rows ? from[i * from_row + c] : 0;
  }
}

// Panels of b[count][n], whose element (k, column) is at from + k * stride + column * column_stride.
inline void pack(const float* from, int64_t stride, int64_t column_stride, int64_t count, int64_t n, float* to) {
  if (column_stride == 1) {  // whole rows, in the order of memory
    for (int64_t k = 0; k < count; ++k, from += stride)
      for (int64_t lane = 0; lane < n; lane += kBlock) {
        const int64_t width = panel_width(n, lane);
        for (int64_t j = 0; j < width; j += kLanes) {
          prefetch(from + lane + j + kAhead);
          store(to + lane * count + k * width + j, load_part(from + lane + j, n - lane - j));
        }
      }
    return;
  }
  for (int64_t lane = 0; lane < n; lane += kBlock) {
    const int64_t width = panel_width(n, lane), filled = n - lane < width ? n - lane : width;
    const float* source = from + lane * column_stride;
    if (stride == 1) {
      transpose_into(source, column_stride, filled, count, to + lane * count, width, width);
    } else {
      for (int64_t k = 0; k < count; ++k)
        for (int64_t i = 0; i < width; ++i)
          to[lane * count + k * width + i] = i < filled ? source[k * stride + i * column_stride] : 0;
    }
  }
}
