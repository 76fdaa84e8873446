// Points of a few dimensions in a balanced k-d tree. Its leaves are panels, its nodes know the box around their points.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../cpu/memory.h"

namespace vamoh {

constexpr int64_t kMostTreeDims = 4;  // with more, boxes rule out little

template <class T>
struct PointTree {
  int64_t dims = 0, width = 0, leaves = 0;
  T* panels = nullptr;  // [leaves, dims, width], infinite where a leaf has no more points
  T* boxes = nullptr;   // [2 * leaves - 1, 2, dims] lowest and highest coordinates; the nodes on the left follow their
                        // parent, those on the right follow them
  int32_t* members = nullptr;  // [leaves, width] which candidate it is; -1: none

  // Values that n points take, up to whole vectors.
  static int64_t size(int64_t n, int64_t dims, int64_t width) {
    return round_up(ceil_div(n, width) * (width * (dims + 1) + 4 * dims), kWidestPanel);
  }

  PointTree() = default;

  // A tree without leaves, in memory of that size.
  PointTree(T* memory, int64_t n, int64_t dims, int64_t width)
      : dims(dims),
        width(width),
        panels(memory),
        boxes(panels + round_up(n, width) * dims),
        members(reinterpret_cast<int32_t*>(boxes + ceil_div(n, width) * 4 * dims)) {}

  // Takes n >= 1 rows `index` of coords [*, dims]; false, and no leaves, if one is not finite.
  bool build(const T* coords, const int64_t* index, int64_t n) {
    T low[kMostTreeDims], high[kMostTreeDims];
    std::copy(coords + index[0] * dims, coords + (index[0] + 1) * dims, low);
    std::copy(low, low + dims, high);
    std::vector<Member> order(n);
    bool finite = true;
    for (int64_t i = 0; i < n; ++i) {
      const T* const row = coords + index[i] * dims;
      order[i].position = static_cast<int32_t>(i);
      for (int64_t d = 0; d < dims; ++d) {
        order[i].coords[d] = row[d];
        finite = finite && std::isfinite(row[d]);
        low[d] = std::min(low[d], row[d]);
        high[d] = std::max(high[d], row[d]);
      }
    }
    if (!finite) return false;
    leaves = ceil_div(n, width);
    split(order.data(), n, 0, 0, leaves, low, high);
    return true;
  }

  // Calls take(leaf, box) for every leaf, box [2, dims].
  template <class Take>
  void for_each_leaf(const Take& take) const {
    visit(0, 0, leaves, take);
  }

 private:
  template <class Take>
  void visit(int64_t node, int64_t leaf, int64_t count, const Take& take) const {
    if (count == 1) return take(leaf, boxes + node * 2 * dims);
    const int64_t half = count / 2;
    visit(node + 1, leaf, half, take);
    visit(node + 2 * half, leaf + half, count - half, take);
  }

  struct Member {
    T coords[kMostTreeDims];
    int32_t position;
  };

  // As std::nth_element by one coordinate, but in large ranges without branches on coordinates: half of them would be
  // mispredicted.
  static void select(Member* order, int64_t n, int64_t nth, int64_t d) {
    int64_t begin = 0, end = n;
    for (int rounds = 0; end - begin > 4 * kSample && rounds < 64; ++rounds) {
      T sample[kSample];
      for (int64_t i = 0; i < kSample; ++i) sample[i] = order[begin + i * (end - begin) / kSample].coords[d];
      std::sort(sample, sample + kSample);
      const T pivot = sample[(nth - begin) * kSample / (end - begin)];
      int64_t less = begin;
      for (int64_t i = begin; i < end; ++i) {
        const Member here = order[i];
        order[i] = order[less];
        order[less] = here;
        less += here.coords[d] < pivot;
      }
      if (nth < less)
        end = less;
      else if (less > begin)
        begin = less;
      else
        break;  // none is below the pivot
    }
    std::nth_element(order + begin, order + nth, order + end,
                     [=](const Member& a, const Member& b) { return a.coords[d] < b.coords[d]; });
  }

  static constexpr int64_t kSample = 31;

  // The node for n members, all of them between low and high.
  void split(Member* order, int64_t n, int64_t node, int64_t leaf, int64_t count, T* low, T* high) {
    T* const box = boxes + node * 2 * dims;
    if (count == 1) {
      for (int64_t i = 0; i < width; ++i) members[leaf * width + i] = i < n ? order[i].position : -1;
      for (int64_t d = 0; d < dims; ++d) {
        T* const lanes = panels + (leaf * dims + d) * width;
        for (int64_t i = 0; i < width; ++i) lanes[i] = i < n ? order[i].coords[d] : std::numeric_limits<T>::infinity();
        const auto [least, most] = std::minmax_element(lanes, lanes + n);
        box[d] = *least;
        box[dims + d] = *most;
      }
      return;
    }
    int64_t widest = 0;
    for (int64_t d = 1; d < dims; ++d)
      if (high[d] - low[d] > high[widest] - low[widest]) widest = d;
    const int64_t half = count / 2, left = half * width;
    select(order, n, left, widest);
    const T middle = order[left].coords[widest], lowest = low[widest], highest = high[widest];
    high[widest] = middle;
    split(order, left, node + 1, leaf, half, low, high);
    high[widest] = highest;
    low[widest] = middle;
    split(order + left, n - left, node + 2 * half, leaf + half, count - half, low, high);
    low[widest] = lowest;
    const T* const nodes[2] = {boxes + (node + 1) * 2 * dims, boxes + (node + 2 * half) * 2 * dims};
    for (int64_t d = 0; d < dims; ++d) {
      box[d] = std::min(nodes[0][d], nodes[1][d]);
      box[dims + d] = std::max(nodes[0][dims + d], nodes[1][dims + d]);
    }
  }
};

}  // namespace vamoh
