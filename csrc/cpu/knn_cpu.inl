#include "panels.inl"

constexpr int kVectors = 2;  // of points per panel
constexpr int kRows = 4;     // queries per tile: kRows * kVectors sums stay in registers

template <class T>
constexpr int64_t panel_width() {
  return kVectors * Vector<T>::lanes;
}

// Puts (distance, position) into a list sorted by distance, after its equals, and drops the last entry.
template <class T>
inline void insert(T* distances, int64_t* positions, int64_t size, T distance, int64_t position) {
  int64_t i = size - 1;
  for (; i > 0 && distances[i - 1] > distance; --i) {
    distances[i] = distances[i - 1];
    positions[i] = positions[i - 1];
  }
  distances[i] = distance;
  positions[i] = position;
}

// Puts those of a panel's distances, of points from `first` to n, that are below the last of a list into it.
template <class T>
inline void insert_near(const T* found, int64_t first, int64_t n, int64_t neighbors, T* distances, int64_t* positions) {
  using V = typename Vector<T>::type;
  constexpr int lanes = Vector<T>::lanes;
  uint32_t near = 0;
  for (int v = 0; v < kVectors; ++v)
    near |= lanes_of(*reinterpret_cast<const V*>(found + v * lanes) < distances[neighbors - 1]) << (v * lanes);
  for (; near; near &= near - 1) {
    const int lane = __builtin_ctz(near);
    if (first + lane < n && found[lane] < distances[neighbors - 1])
      insert(distances, positions, neighbors, found[lane], first + lane);
  }
}

// Neighbours of the `rows` queries [rows, dims] among the n packed points: positions [rows, neighbors], with -1 at the
// end of a row that has fewer finite distances. distances [rows, neighbors] is scratch.
template <class T>
void search(const T* panels, int64_t n, int64_t dims, const T* queries, int64_t rows, int64_t neighbors, T infinity,
            T* distances, int64_t* positions) {
  using V = typename Vector<T>::type;
  constexpr int64_t W = panel_width<T>();
  constexpr int lanes = Vector<T>::lanes;
  for (int64_t i = 0; i < rows * neighbors; ++i) {
    distances[i] = infinity;
    positions[i] = -1;
  }
  for (int64_t first = 0; first < n; first += W) {
    const T* x = panels + first * dims;
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t used = rows - row < kRows ? rows - row : kRows;
      const T* query[kRows];
      T limit[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t from = row + (r < used ? r : used - 1);
        query[r] = queries + from * dims;
        limit[r] = distances[from * neighbors + neighbors - 1];
      }
      V sum[kRows][kVectors] = {};
      bool nearer;
      int64_t d = 0;
      do {
        const int64_t stop = d + kDimsPerLook < dims ? d + kDimsPerLook : dims;
        for (; d < stop; ++d)
          for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectors; ++v) {
              const V difference = *reinterpret_cast<const V*>(x + d * W + v * lanes) - query[r][d];
              sum[r][v] += difference * difference;
            }
        auto below = sum[0][0] < limit[0];
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < kVectors; ++v) below |= sum[r][v] < limit[r];
        nearer = any(below);
      } while (nearer && d < dims);
      if (!nearer) continue;
      alignas(sizeof(V)) T found[kRows][W];  // a copy: indexing single lanes would keep `sum` out of registers above
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(found[r] + v * lanes) = sum[r][v];
      for (int64_t r = 0; r < used; ++r)
        insert_near(found[r], first, n, neighbors, distances + (row + r) * neighbors,
                    positions + (row + r) * neighbors);
    }
  }
}

// The same for one query on a lattice: the squared distance of a place p is from[p]. places [n] is readable up to a
// multiple of the widest panel.
template <class T>
void search_by_table(const int32_t* places, int64_t n, const T* from, int64_t neighbors, T infinity, T* distances,
                     int64_t* positions) {
  using V = typename Vector<T>::type;
  constexpr int64_t W = panel_width<T>();
  constexpr int lanes = Vector<T>::lanes;
  for (int64_t i = 0; i < neighbors; ++i) {
    distances[i] = infinity;
    positions[i] = -1;
  }
  for (int64_t first = 0; first < n; first += W) {
    alignas(sizeof(V)) T found[W];
    for (int v = 0; v < kVectors; ++v)
      *reinterpret_cast<V*>(found + v * lanes) = gather(from, places + first + v * lanes);
    insert_near(found, first, n, neighbors, distances, positions);
  }
}
