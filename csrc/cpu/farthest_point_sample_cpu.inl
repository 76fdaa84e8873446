#include "panels.inl"

constexpr int kVectors = 4;  // per panel: enough independent sums to hide the latency of an addition

template <class T>
constexpr int64_t panel_width() {
  return kVectors * Vector<T>::lanes;
}

template <class T>
T largest(const T* values) {
  T best = values[0];
  for (int64_t i = 1; i < panel_width<T>(); ++i) best = values[i] > best ? values[i] : best;
  return best;
}

// order [samples]: positions among the n packed points, samples < n. Scratch: nearest [panels, W] and query [dims];
// panel_best [panels].
template <class T>
void sample(const T* panels, int64_t n, int64_t dims, int64_t samples, T* nearest, T* panel_best, T* query, T infinity,
            int64_t* order) {
  using V = typename Vector<T>::type;
  constexpr int64_t W = panel_width<T>();
  constexpr int lanes = Vector<T>::lanes;
  const int64_t count = (n + W - 1) / W;
  // Squared distance to the nearest point taken; -1 for points taken and for the lanes beyond n.
  for (int64_t i = 0; i < count * W; ++i) nearest[i] = i < n ? infinity : T(-1);
  for (int64_t p = 0; p < count; ++p) panel_best[p] = infinity;

  int64_t taken = 0;
  for (int64_t step = 0;; ++step) {
    order[step] = taken;
    if (step + 1 == samples) return;
    const int64_t home = taken / W;
    for (int64_t d = 0; d < dims; ++d) query[d] = panels[(home * dims + d) * W + taken % W];
    nearest[taken] = T(-1);
    panel_best[home] = largest(nearest + home * W);

    int64_t best = 0;
    for (int64_t p = 0; p < count; ++p) {
      const T* x = panels + p * dims * W;
      V* near = reinterpret_cast<V*>(nearest + p * W);
      V sum[kVectors] = {};
      bool nearer;
      int64_t d = 0;
      do {
        const int64_t stop = d + kDimsPerLook < dims ? d + kDimsPerLook : dims;
        for (; d < stop; ++d)
          for (int v = 0; v < kVectors; ++v) {
            const V difference = *reinterpret_cast<const V*>(x + d * W + v * lanes) - query[d];
            sum[v] += difference * difference;
          }
        auto below = sum[0] < near[0];
        for (int v = 1; v < kVectors; ++v) below |= sum[v] < near[v];
        nearer = any(below);
      } while (nearer && d < dims);
      if (nearer) {
        for (int v = 0; v < kVectors; ++v) near[v] = sum[v] < near[v] ? sum[v] : near[v];
        panel_best[p] = largest(nearest + p * W);
      }
      if (panel_best[p] > panel_best[best]) best = p;
    }
    taken = best * W;
    while (nearest[taken] != panel_best[best]) ++taken;
  }
}

// The same on a lattice: the squared distance of places p and q is center[p - q]. places [n] and the scratch nearest
// [n] reach up to a multiple of the widest panel.
template <class T>
void sample_by_table(const int32_t* places, int64_t n, const T* center, int64_t samples, T* nearest, T infinity,
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
    const T* from = center - places[taken];
    V farthest = V{} - 2;
    Position at{}, here = lane;
    for (int64_t i = 0; i < padded; i += lanes, here += lanes) {
      V& near = *reinterpret_cast<V*>(nearest + i);
      const V distance = gather(from, places + i);
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
