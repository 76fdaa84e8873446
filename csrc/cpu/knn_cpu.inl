constexpr int kVectors = 2;  // of points per panel

#include "../simd/cloud.inl"
#include "../simd/quantized_cloud.inl"

using vamoh::PointTree;

constexpr int kRows = 4;  // queries per tile: kRows * kVectors sums stay in registers

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
        const int64_t stop = d + kDimsPerTest < dims ? d + kDimsPerTest : dims;
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

// Squared distance from a query to the nearest point of a box [2, dims], summed and rounded as those of points are: no
// point in it has a smaller one.
template <class T>
inline T distance_to_box(const T* box, const T* query, int64_t dims) {
  T sum = 0;
  for (int64_t d = 0; d < dims; ++d) {
    const T below = box[d] - query[d], above = query[d] - box[dims + d];
    const T outside = below > 0 ? below : above > 0 ? above : T(0);
    sum += outside * outside;
  }
  return sum;
}

// Neighbours of one query in a tree, as `search` finds them, positions those of the candidates.
template <class T>
void search_tree(const PointTree<T>& tree, const T* query, int64_t neighbors, T infinity, T* distances,
                 int64_t* positions) {
  using V = typename Vector<T>::type;
  constexpr int64_t W = panel_width<T>();
  constexpr int lanes = Vector<T>::lanes;
  struct {
    int64_t node, leaf, leaves;
    T distance;
  } waiting[64];
  for (int64_t i = 0; i < neighbors; ++i) {
    distances[i] = infinity;
    positions[i] = -1;
  }
  const int64_t dims = tree.dims, last = neighbors - 1;
  int depth = 0;
  waiting[depth++] = {0, 0, tree.leaves, T(0)};
  while (depth) {
    auto [node, leaf, leaves, distance] = waiting[--depth];
    if (distance > distances[last]) continue;
    while (leaves > 1) {  // towards the nearer half, the other one waits
      const int64_t half = leaves / 2, right = node + 2 * half;
      const T to_left = distance_to_box(tree.boxes + (node + 1) * 2 * dims, query, dims);
      const T to_right = distance_to_box(tree.boxes + right * 2 * dims, query, dims);
      const bool goes_left = to_left <= to_right;
      if (goes_left)
        waiting[depth++] = {right, leaf + half, leaves - half, to_right};
      else
        waiting[depth++] = {node + 1, leaf, half, to_left};
      node = goes_left ? node + 1 : right;
      leaf = goes_left ? leaf : leaf + half;
      leaves = goes_left ? half : leaves - half;
      distance = goes_left ? to_left : to_right;
    }
    if (distance > distances[last]) continue;
    const T* x = tree.panels + leaf * dims * W;
    V sum[kVectors] = {};
    for (int64_t d = 0; d < dims; ++d)
      for (int v = 0; v < kVectors; ++v) {
        const V difference = *reinterpret_cast<const V*>(x + d * W + v * lanes) - query[d];
        sum[v] += difference * difference;
      }
    uint32_t near = 0;
    alignas(sizeof(V)) T found[W];
    for (int v = 0; v < kVectors; ++v) {
      near |= lanes_of(sum[v] <= distances[last]) << (v * lanes);
      *reinterpret_cast<V*>(found + v * lanes) = sum[v];
    }
    for (; near; near &= near - 1) {
      const int lane = __builtin_ctz(near);
      const T here = found[lane];
      const int64_t position = tree.members[leaf * W + lane];
      if (!(here < infinity) || here > distances[last] || (here == distances[last] && position > positions[last]))
        continue;
      int64_t i = last;
      for (; i > 0 && (distances[i - 1] > here || (distances[i - 1] == here && positions[i - 1] > position)); --i) {
        distances[i] = distances[i - 1];
        positions[i] = positions[i - 1];
      }
      distances[i] = here;
      positions[i] = position;
    }
  }
}

constexpr int kQuantizedRows = 8;  // queries for which a quantized panel is read once

// Calls take(position) for the values of a row [n], n a multiple of the panel, that are at most `limit`, in their
// order.
template <class Take>
inline void for_each_up_to(const int32_t* row, int64_t n, const int32_t& limit, const Take& take) {
  for (int64_t first = 0; first < n; first += kQuantizedWidth) {
    uint32_t near = 0;
    for (int v = 0; v < kVectors; ++v)
      near |= lanes_of(*reinterpret_cast<const Quantized*>(row + first + v * kQuantizedLanes) <= limit)
              << (v * kQuantizedLanes);
    for (; near; near &= near - 1) take(first + __builtin_ctz(near));
  }
}

// Squared distances apart [kRows, padded] of a quantized cloud from queries [kRows, groups], whose sums of squares are
// `squares`, in a panel that starts at point `first`.
template <class T>
inline void quantized_distances(const QuantizedCloud<T>& cloud, int64_t first, const int32_t* queries,
                                const int32_t* squares, int64_t padded, int32_t* apart) {
  const int64_t groups = cloud.groups;
  const int32_t* x = cloud.quantized + first * groups;
  Quantized sum[kRows][kVectors] = {};
  for (int64_t g = 0; g < groups; ++g, x += kQuantizedWidth)
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = add_products(sum[r][v], *reinterpret_cast<const Quantized*>(x + v * kQuantizedLanes),
                                 Quantized{} + queries[r * groups + g]);
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = first + v * kQuantizedLanes;
      const Quantized both = *reinterpret_cast<const Quantized*>(cloud.squares + at) + squares[r];
      *reinterpret_cast<Quantized*>(apart + r * padded + at) = both - 2 * sum[r][v];
    }
}

// The reach of the `neighbors` points that are the least apart [padded] from a query when quantized: all its neighbours
// are within it. least [neighbors] is scratch.
template <class T>
int32_t reach_of_nearest(const QuantizedCloud<T>& cloud, const int32_t* apart, int64_t padded, int64_t neighbors,
                         int32_t* least) {
  for (int64_t i = 0; i < neighbors; ++i) least[i] = kNoPoint - 1;
  int32_t& last = least[neighbors - 1];
  for_each_up_to(apart, padded, last, [&](int64_t i) {
    if (apart[i] >= last) return;
    int64_t slot = neighbors - 1;
    for (; slot > 0 && least[slot - 1] > apart[i]; --slot) least[slot] = least[slot - 1];
    least[slot] = apart[i];
  });
  const double farthest = __builtin_sqrt(last) * cloud.step + cloud.slack;
  return reach(cloud, static_cast<T>(farthest * farthest));
}

// The same for a quantized cloud. scratch [kQuantizedRows * (padded + groups) + neighbors], padded the number of points
// up to a whole panel.
template <class T>
void search_quantized(const QuantizedCloud<T>& cloud, const T* queries, int64_t rows, int64_t neighbors, T infinity,
                      int32_t* scratch, T* distances, int64_t* positions) {
  const int64_t groups = cloud.groups, padded = (cloud.n + kQuantizedWidth - 1) / kQuantizedWidth * kQuantizedWidth;
  int32_t* const apart = scratch;
  int32_t* const quantized = apart + kQuantizedRows * padded;
  int32_t* const least = quantized + kQuantizedRows * groups;
  for (int64_t row = 0; row < rows; row += kQuantizedRows) {
    const int64_t used = rows - row < kQuantizedRows ? rows - row : kQuantizedRows;
    int32_t squares[kQuantizedRows];
    for (int64_t r = 0; r < kQuantizedRows; ++r) {
      const T* query = queries + (row + (r < used ? r : used - 1)) * cloud.dims;
      squares[r] = quantize(query, cloud.dims, cloud.low, cloud.step, quantized + r * groups);
    }
    for (int64_t first = 0; first < padded; first += kQuantizedWidth)
      for (int r = 0; r < kQuantizedRows; r += kRows)
        quantized_distances(cloud, first, quantized + r * groups, squares + r, padded, apart + r * padded);

    for (int64_t r = 0; r < used; ++r) {
      const int32_t limit = reach_of_nearest(cloud, apart + r * padded, padded, neighbors, least);
      T* const list = distances + (row + r) * neighbors;
      int64_t* const result = positions + (row + r) * neighbors;
      for (int64_t i = 0; i < neighbors; ++i) {
        list[i] = infinity;
        result[i] = -1;
      }
      int64_t near[kExactRows], count = 0;
      const auto look = [&] {
        T exact[kExactRows];
        exact_distances(cloud, near, count, queries + (row + r) * cloud.dims, exact);
        for (int64_t i = 0; i < count; ++i)
          if (exact[i] < list[neighbors - 1]) insert(list, result, neighbors, exact[i], near[i]);
        count = 0;
      };
      for_each_up_to(apart + r * padded, padded, limit, [&](int64_t i) {
        near[count++] = i;
        if (count == kExactRows) look();
      });
      if (count) look();
    }
  }
}

// The same for one query on a lattice: the squared distance of a cell p is from[p]. cells [n] is readable up to a
// multiple of the widest panel.
template <class T>
void search_by_table(const int32_t* cells, int64_t n, const T* from, int64_t neighbors, T infinity, T* distances,
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
      *reinterpret_cast<V*>(found + v * lanes) = gather(from, cells + first + v * lanes);
    insert_near(found, first, n, neighbors, distances, positions);
  }
}
