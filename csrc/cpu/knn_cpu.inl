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
      V found[kRows][kVectors];  // a copy: indexing single lanes of `sum` would keep it out of registers above
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) found[r][v] = sum[r][v];
      for (int64_t r = 0; r < used; ++r) {
        T* list = distances + (row + r) * neighbors;
        const T* distance = reinterpret_cast<const T*>(found[r]);
        for (int64_t lane = 0; lane < W && first + lane < n; ++lane)
          if (distance[lane] < list[neighbors - 1])
            insert(list, positions + (row + r) * neighbors, neighbors, distance[lane], first + lane);
      }
    }
  }
}

// The same on a lattice: the squared distance of places p and q is center[p - q]. places [n] is readable up to a
// multiple of the widest panel.
template <class T>
void search_by_table(const int32_t* places, int64_t n, const T* center, const int64_t* queries, int64_t rows,
                     int64_t neighbors, T infinity, T* distances, int64_t* positions) {
  using V = typename Vector<T>::type;
  constexpr int lanes = Vector<T>::lanes;
  for (int64_t i = 0; i < rows * neighbors; ++i) {
    distances[i] = infinity;
    positions[i] = -1;
  }
  for (int64_t r = 0; r < rows; ++r) {
    T* list = distances + r * neighbors;
    for (int64_t first = 0; first < n; first += lanes) {
      const V distance = gather(center - queries[r], places + first);
      if (!any(distance < list[neighbors - 1])) continue;
      for (int64_t lane = 0; lane < lanes && first + lane < n; ++lane)
        if (distance[lane] < list[neighbors - 1])
          insert(list, positions + r * neighbors, neighbors, distance[lane], first + lane);
    }
  }
}
