constexpr int kVectors = 4;  // per panel: enough independent sums to hide the latency of an addition

#include "../simd/cloud.inl"
#include "../simd/quantized_cloud.inl"

using vamoh::PointTree;

// Largest of a panel's W values.
template <class T, int64_t W>
inline T largest(const T* values) {
  using V = typename Vector<T>::type;
  V most = *reinterpret_cast<const V*>(values);
  for (int64_t i = Vector<T>::lanes; i < W; i += Vector<T>::lanes) {
    const V next = *reinterpret_cast<const V*>(values + i);
    most = next > most ? next : most;
  }
  T best = most[0];
  for (int lane = 1; lane < Vector<T>::lanes; ++lane) best = most[lane] > best ? most[lane] : best;
  return best;
}

// Lowers nearest [p0 * W, p1 * W), the squared distance of every point to the nearest one taken, to that from `query`
// [dims] where it is less, and panel_best, its largest value in every panel, with it.
template <class T>
void come_nearer(const T* panels, int64_t dims, int64_t p0, int64_t p1, const T* query, T* nearest, T* panel_best) {
  using V = typename Vector<T>::type;
  constexpr int64_t W = panel_width<T>();
  constexpr int lanes = Vector<T>::lanes;
  for (int64_t p = p0; p < p1; ++p) {
    const T* x = panels + p * dims * W;
    V* near = reinterpret_cast<V*>(nearest + p * W);
    V sum[kVectors] = {};
    bool nearer;
    int64_t d = 0;
    do {
      const int64_t stop = d + kDimsPerTest < dims ? d + kDimsPerTest : dims;
      for (; d < stop; ++d)
        for (int v = 0; v < kVectors; ++v) {
          const V difference = *reinterpret_cast<const V*>(x + d * W + v * lanes) - query[d];
          sum[v] += difference * difference;
        }
      auto below = sum[0] < near[0];
      for (int v = 1; v < kVectors; ++v) below |= sum[v] < near[v];
      nearer = any(below);
    } while (nearer && d < dims);
    if (!nearer) continue;
    for (int v = 0; v < kVectors; ++v) near[v] = sum[v] < near[v] ? sum[v] : near[v];
    panel_best[p] = largest<T, W>(nearest + p * W);
  }
}

// The lowest member of a leaf for which nearest has this value.
template <class T>
inline int32_t first_member(const PointTree<T>& tree, int64_t leaf, const T* nearest, T value) {
  using V = typename Vector<T>::type;
  constexpr int64_t W = panel_width<T>();
  constexpr int lanes = Vector<T>::lanes;
  int32_t first = INT32_MAX;
  for (int64_t i = leaf * W; i < (leaf + 1) * W; i += lanes)
    for (uint32_t equal = lanes_of(*reinterpret_cast<const V*>(nearest + i) == value); equal; equal &= equal - 1) {
      const int32_t member = tree.members[i + __builtin_ctz(equal)];
      first = member < first ? member : first;
    }
  return first;
}

// The same for the leaves of a tree whose boxes come near enough: box [2, dims, leaves] lowest and highest coordinates,
// leaves up to a whole vector; leaf_best is below 0 beyond the last. leaf_member is the lowest with that value.
template <class T>
void come_nearer_in_tree(const PointTree<T>& tree, const T* boxes, int64_t padded, const T* query, T* nearest,
                         T* leaf_best, int32_t* leaf_member) {
  using V = typename Vector<T>::type;
  constexpr int lanes = Vector<T>::lanes;
  const V zero{};
  for (int64_t first = 0; first < padded; first += lanes) {
    V sum{};
    for (int64_t d = 0; d < tree.dims; ++d) {
      const V below = *reinterpret_cast<const V*>(boxes + d * padded + first) - query[d];
      const V above = query[d] - *reinterpret_cast<const V*>(boxes + (tree.dims + d) * padded + first);
      const V outside = below > zero ? below : above > zero ? above : zero;
      sum += outside * outside;
    }
    for (uint32_t near = lanes_of(sum < *reinterpret_cast<const V*>(leaf_best + first)); near; near &= near - 1) {
      const int64_t leaf = first + __builtin_ctz(near);
      come_nearer(tree.panels, tree.dims, leaf, leaf + 1, query, nearest, leaf_best);
      leaf_member[leaf] = first_member(tree, leaf, nearest, leaf_best[leaf]);
    }
  }
}

// The leaf [padded] with the largest value of leaf_best, that with the lowest member of those.
template <class T>
int64_t farthest_leaf(const T* leaf_best, const int32_t* leaf_member, int64_t padded) {
  using V = typename Vector<T>::type;
  constexpr int lanes = Vector<T>::lanes;
  V most = *reinterpret_cast<const V*>(leaf_best);
  for (int64_t i = lanes; i < padded; i += lanes) {
    const V next = *reinterpret_cast<const V*>(leaf_best + i);
    most = next > most ? next : most;
  }
  T best = most[0];
  for (int lane = 1; lane < lanes; ++lane) best = most[lane] > best ? most[lane] : best;
  int64_t found = -1;
  for (int64_t i = 0; i < padded; i += lanes)
    for (uint32_t equal = lanes_of(*reinterpret_cast<const V*>(leaf_best + i) == best); equal; equal &= equal - 1) {
      const int64_t leaf = i + __builtin_ctz(equal);
      if (found < 0 || leaf_member[leaf] < leaf_member[found]) found = leaf;
    }
  return found;
}

constexpr int kQueries = kVectorBytes == 64 ? 4 : 2;  // that share a pass over a quantized panel, as registers allow

// Lowers nearest [W] and limits [W] of the quantized panel p to the distances from one query, at position `from`, of
// those points whose bit is set in `near`.
template <class T>
void come_nearer_exactly(const QuantizedCloud<T>& cloud, int64_t p, uint64_t near, int64_t from, T* nearest,
                         int32_t* limits) {
  const T* const query = cloud.coords + cloud.index[from] * cloud.dims;
  while (near) {
    int64_t positions[kExactRows], count = 0;
    T distances[kExactRows];
    for (; near && count < kExactRows; near &= near - 1)
      positions[count++] = p * kQuantizedWidth + __builtin_ctzll(near);
    exact_distances(cloud, positions, count, query, distances);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = positions[i];
      if (!(distances[i] < nearest[at])) continue;
      nearest[at] = distances[i];
      limits[at] = cloud.squares[at] - reach(cloud, distances[i]);
    }
  }
}

// The same for a quantized cloud, one panel p, and the queries q0 to q1 at positions `taken`, whose quantized rows are
// `queries` [*, groups]. limits [panels * W] are the squares less the reach of `nearest`, and change with it. Returns
// the largest value of nearest in the panel.
template <class T>
T come_nearer_quantized(const QuantizedCloud<T>& cloud, int64_t p, const int64_t* taken, const int32_t* queries,
                        int64_t q0, int64_t q1, T* nearest, int32_t* limits) {
  constexpr int64_t W = kQuantizedWidth;
  const int64_t groups = cloud.groups;
  for (int64_t q = q0; q < q1; q += kQueries) {
    const int64_t used = q1 - q < kQueries ? q1 - q : kQueries;
    const int32_t* query[kQueries];
    for (int64_t r = 0; r < kQueries; ++r) query[r] = queries + (q + (r < used ? r : used - 1)) * groups;
    const int32_t* x = cloud.quantized + p * groups * W;
    Quantized sum[kQueries][kVectors] = {};
    for (int64_t g = 0; g < groups; ++g, x += W)
      for (int r = 0; r < kQueries; ++r)
        for (int v = 0; v < kVectors; ++v)
          sum[r][v] = add_products(sum[r][v], *reinterpret_cast<const Quantized*>(x + v * kQuantizedLanes),
                                   Quantized{} + query[r][g]);
#pragma GCC unroll 4
    for (int r = 0; r < kQueries; ++r) {
      if (r >= used) break;
      uint64_t near = 0;
      for (int v = 0; v < kVectors; ++v) {
        const Quantized limit = *reinterpret_cast<const Quantized*>(limits + p * W + v * kQuantizedLanes);
        near |= static_cast<uint64_t>(lanes_of(2 * sum[r][v] >= limit + cloud.squares[taken[q + r]]))
                << (v * kQuantizedLanes);
      }
      if (near) come_nearer_exactly(cloud, p, near, taken[q + r], nearest, limits);
    }
  }
  return largest<T, W>(nearest + p * W);
}

// On a lattice, where the squared distance of cells p and q is center[p - q]. order [samples]: positions among the n
// cells, samples < n. cells [n] and the scratch nearest [n] reach up to a multiple of the widest panel.
template <class T>
void sample_by_table(const int32_t* cells, int64_t n, const T* center, int64_t samples, T* nearest, T infinity,
                     int64_t* order) {
  using V = typename Vector<T>::type;
  using Position = decltype(V{} < V{});  // integers as wide as T
  constexpr int lanes = Vector<T>::lanes;
  const int64_t padded = (n + lanes - 1) / lanes * lanes;
  for (int64_t i = 0; i < padded; ++i) nearest[i] = i < n ? infinity : T(-1);
  Position lane{};
  for (int i = 0; i < lanes; ++i) lane[i] = i;

  int64_t taken = 0;
  for (int64_t step = 0;; ++step) {
    order[step] = taken;
    if (step + 1 == samples) return;
    nearest[taken] = T(-1);
    const T* from = center - cells[taken];
    V farthest = V{} - 2;
    Position at{}, here = lane;
    for (int64_t i = 0; i < padded; i += lanes, here += lanes) {
      V& near = *reinterpret_cast<V*>(nearest + i);
      const V distance = gather(from, cells + i);
      near = distance < near ? distance : near;
      const auto farther = near > farthest;
      farthest = farther ? near : farthest;
      at = farther ? here : at;
    }
    int best = 0;
    for (int i = 1; i < lanes; ++i)
      if (farthest[i] > farthest[best] || (farthest[i] == farthest[best] && at[i] < at[best])) best = i;
    taken = at[best];
  }
}
