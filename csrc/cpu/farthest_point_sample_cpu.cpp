#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "../farthest_point_sample.h"
#include "../threads.h"
#include "../simd/point_tree.h"
#include "../simd/quantized_cloud.h"
#include "memory.h"

#define VAMOH_KERNEL "../cpu/farthest_point_sample_cpu.inl"
#include "../simd/each_isa.inl"

namespace vamoh {

namespace {

// Order [samples] of positions among n points in panels of `width`, samples < n. take(position) updates scratch:
// nearest [panels, W], panel_best [panels].
template <class T, class Take>
void sample(int64_t n, int64_t samples, int64_t width, T* nearest, T* panel_best, const Take& take, int64_t* order) {
  const int64_t count = ceil_div(n, width);
  const T infinity = std::numeric_limits<T>::infinity();
  std::fill(nearest, nearest + n, infinity);
  std::fill(nearest + n, nearest + count * width, T(-1));  // as points taken
  std::fill(panel_best, panel_best + count, infinity);
  int64_t taken = 0;
  for (int64_t step = 0;; ++step) {
    order[step] = taken;
    if (step + 1 == samples) return;
    const int64_t home = taken / width;
    nearest[taken] = T(-1);
    panel_best[home] = *std::max_element(nearest + home * width, nearest + (home + 1) * width);
    take(taken);
    const T* best = std::max_element(panel_best, panel_best + count);  // the first of equals
    const T* from = nearest + (best - panel_best) * width;
    taken = std::find(from, from + width, *best) - nearest;
  }
}

// Rounds of a few pieces of work, far too short to wake threads for: they spin. One thread leads; whoever else is there
// helps, best with the same pieces in every round, whose data its caches hold.
class Rounds {
 public:
  explicit Rounds(int64_t pieces) : pieces_(pieces), taken_(new std::atomic<int64_t>[pieces]) {
    for (int64_t i = 0; i < pieces; ++i) taken_[i] = 0;
  }

  // work(i) once for every piece, by the leader and the helpers.
  template <class Work>
  void lead(const Work& work) {
    done_.store(0, std::memory_order_relaxed);
    const int64_t round = round_.fetch_add(1, std::memory_order_release) + 1;
    take(round, 0, work);
    while (done_.load(std::memory_order_acquire) < pieces_) pause();
  }

  // Helps until `finish`; starts with piece `first`.
  template <class Work>
  void help(int64_t first, const Work& work) {
    for (int64_t seen = 0, round; (round = round_.load(std::memory_order_acquire)) != kFinished; seen = round) {
      if (round != seen) take(round, first, work);
      pause();
    }
  }

  void finish() { round_.store(kFinished, std::memory_order_release); }

 private:
  static constexpr int64_t kFinished = -1;

  template <class Work>
  void take(int64_t round, int64_t first, const Work& work) {
    for (int64_t k = 0; k < pieces_; ++k) {
      const int64_t i = first + k < pieces_ ? first + k : first + k - pieces_;
      int64_t last = round - 1;
      if (!taken_[i].compare_exchange_strong(last, round, std::memory_order_acq_rel)) continue;
      work(i);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  static void pause() { std::this_thread::yield(); }

  const int64_t pieces_;
  const std::unique_ptr<std::atomic<int64_t>[]> taken_;  // the last round in which a piece was
  std::atomic<int64_t> round_{0}, done_{0};
};

// Calls sample(b, candidates, n, order, worker) for every function with more than M candidates, which leaves positions
// among the candidates in `order` [M].
template <class Sample>
void for_each_function(const Mask& mask, int64_t* out, int64_t batch, int64_t points, int64_t samples, int threads,
                       const Sample& sample) {
  const int64_t padded = round_up(points, kWidestPanel);
  const Buffer<int64_t> candidates = allocate<int64_t>(threads * padded);
  ThreadPool::get().run(batch, threads, [&](int64_t b, int worker) {
    const bool* allowed = mask.of(b);
    int64_t* index = candidates.get() + worker * padded;
    int64_t n = 0;
    for (int64_t i = 0; i < points; ++i)
      if (!allowed || allowed[i]) index[n++] = i;

    int64_t* order = out + b * samples;
    if (n <= samples) {
      std::fill(std::copy(index, index + n, order), order + samples, -1);
      return;
    }
    sample(b, index, n, order, worker);
    for (int64_t i = 0; i < samples; ++i) order[i] = index[order[i]];
  });
}

constexpr int64_t kShared = int64_t{1} << 16;  // values of a cloud that occupies several threads
constexpr int kPiecesPerThread = 4;

int workers(int threads, int64_t batch) { return std::max(static_cast<int>(std::min<int64_t>(threads, batch)), 1); }

// One worker's memory for clouds of up to `padded` points: panels, or quantized points, squares, limits and queries,
// which need less room as quantized clouds have many dimensions.
template <class T>
struct Scratch {
  T *panels, *nearest, *panel_best, *query;

  static int64_t size(int64_t padded, int64_t dims) { return padded * (dims + 2) + round_up(dims, kWidestPanel); }

  Scratch(T* memory, int64_t padded, int64_t dims)
      : panels(memory), nearest(panels + padded * dims), panel_best(nearest + padded), query(panel_best + padded) {}
};

// Calls lead(rounds), where rounds() is piece(i) once for every i of `pieces`, by a team of threads.
template <class Lead, class Piece>
void with_team(int team, int64_t pieces, const Lead& lead, const Piece& piece) {
  if (team == 1)
    return lead([&] {
      for (int64_t i = 0; i < pieces; ++i) piece(i);
    });
  Rounds rounds(pieces);
  ThreadPool::get().run(team, team, [&](int64_t task, int) {
    if (task > 0) return rounds.help(task * pieces / team, piece);
    lead([&] { rounds.lead(piece); });
    rounds.finish();
  });
}

template <class T>
void sample_in_panels(Isa isa, const QuantizedCloud<T>& cloud, int64_t samples, int team, const Scratch<T>& scratch,
                      int64_t* order) {
  const int64_t width = VAMOH_DISPATCH(isa, panel_width<T>()), dims = cloud.dims, count = ceil_div(cloud.n, width);
  const int64_t pieces = team == 1 ? 1 : std::min<int64_t>(count, team * kPiecesPerThread);
  T* const query = scratch.query;
  VAMOH_DISPATCH(isa, pack_panels<T>)(cloud.coords, cloud.index, cloud.n, dims, scratch.panels);
  with_team(
      team, pieces,
      [&](const auto& all_come_nearer) {
        const auto take = [&](int64_t taken) {
          const T* const row = scratch.panels + taken / width * width * dims + taken % width;
          for (int64_t d = 0; d < dims; ++d) query[d] = row[d * width];
          all_come_nearer();
        };
        sample(cloud.n, samples, width, scratch.nearest, scratch.panel_best, take, order);
      },
      [&](int64_t i) {
        const int64_t p0 = i * count / pieces, p1 = (i + 1) * count / pieces;
        VAMOH_DISPATCH(isa, come_nearer<T>)(scratch.panels, dims, p0, p1, query, scratch.nearest, scratch.panel_best);
      });
}

// Whether a tree takes less time than the distances it saves.
bool worth_a_tree(int64_t points, int64_t samples, int64_t dims, int team) {
  return dims >= 1 && dims <= kMostTreeDims && points >= 4096 && samples >= 384 * team;  // one thread uses it
}

// The same by a tree in the scratch memory; false if the cloud cannot have one.
template <class T>
bool sample_in_tree(Isa isa, const QuantizedCloud<T>& cloud, int64_t samples, const Scratch<T>& scratch,
                    int64_t* order) {
  const int64_t width = VAMOH_DISPATCH(isa, panel_width<T>()), dims = cloud.dims;
  const Buffer<T> memory = allocate<T>(PointTree<T>::size(cloud.n, dims, width));
  PointTree<T> tree(memory.get(), cloud.n, dims, width);
  if (!tree.build(cloud.coords, cloud.index, cloud.n)) return false;
  const int64_t leaves = tree.leaves, padded = round_up(leaves, kWidestPanel);
  const Buffer<T> boxes = allocate<T>(2 * dims * padded);
  std::fill(boxes.get(), boxes.get() + 2 * dims * padded, T(0));
  tree.for_each_leaf([&](int64_t leaf, const T* box) {
    for (int64_t d = 0; d < 2 * dims; ++d) boxes[d * padded + leaf] = box[d];
  });
  T* const nearest = scratch.nearest;
  const Buffer<T> leaf_best = allocate<T>(padded);
  const Buffer<int32_t> leaf_member = allocate<int32_t>(padded);
  std::fill(nearest, nearest + cloud.n, std::numeric_limits<T>::infinity());
  std::fill(nearest + cloud.n, nearest + leaves * width, T(-1));
  std::fill(leaf_best.get(), leaf_best.get() + leaves, std::numeric_limits<T>::infinity());
  std::fill(leaf_best.get() + leaves, leaf_best.get() + padded, T(-1));
  const auto first_member = VAMOH_DISPATCH(isa, first_member<T>);
  const auto come_nearer = VAMOH_DISPATCH(isa, come_nearer_in_tree<T>);
  const auto farthest = VAMOH_DISPATCH(isa, farthest_leaf<T>);
  for (int64_t leaf = 0; leaf < leaves; ++leaf) leaf_member[leaf] = first_member(tree, leaf, nearest, leaf_best[leaf]);
  for (int64_t step = 0;; ++step) {
    const int64_t leaf = farthest(leaf_best.get(), leaf_member.get(), padded);
    order[step] = leaf_member[leaf];
    if (step + 1 == samples) return true;
    const int32_t* const members = tree.members + leaf * width;
    T* const near = nearest + leaf * width;
    near[std::find(members, members + width, leaf_member[leaf]) - members] = T(-1);
    leaf_best[leaf] = *std::max_element(near, near + width);
    leaf_member[leaf] = first_member(tree, leaf, nearest, leaf_best[leaf]);
    const T* const query = cloud.coords + cloud.index[order[step]] * dims;
    come_nearer(tree, boxes.get(), padded, query, nearest, leaf_best.get(), leaf_member.get());
  }
}

// A panel meets the points that were taken only when it may hold the farthest one, all at once: its values of nearest
// are too large until then.
template <class T>
void sample_quantized(Isa isa, QuantizedCloud<T>& cloud, int64_t samples, int team, const Scratch<T>& scratch,
                      int64_t* order) {
  const int64_t width = VAMOH_DISPATCH(isa, kQuantizedWidth), groups = cloud.groups, padded = round_up(cloud.n, width);
  const int64_t count = padded / width, pieces = team == 1 ? 1 : std::min<int64_t>(count, team * kPiecesPerThread);
  int32_t* const quantized = reinterpret_cast<int32_t*>(scratch.panels);
  int32_t* const squares = quantized + padded * groups;
  int32_t* const limits = squares + padded;
  int32_t* const queries = limits + padded;
  cloud.quantized = quantized;
  cloud.squares = squares;
  VAMOH_DISPATCH(isa, pack_quantized<T>)(cloud, queries, quantized, squares);
  for (int64_t i = 0; i < padded; ++i) limits[i] = squares[i] - (i < cloud.n ? kFarthest : 0);
  T* const nearest = scratch.nearest;
  T* const panel_best = scratch.panel_best;
  std::fill(nearest, nearest + cloud.n, std::numeric_limits<T>::infinity());
  std::fill(nearest + cloud.n, nearest + padded, T(-1));  // as points taken
  std::fill(panel_best, panel_best + count, std::numeric_limits<T>::infinity());
  std::vector<int64_t> met(count), turn(count);
  std::iota(turn.begin(), turn.end(), int64_t{0});
  int64_t known = 0;
  with_team(
      team, pieces,
      [&](const auto& first_in_turn_meet) {
        for (int64_t taken = 0;; ++known) {
          order[known] = taken;
          if (known + 1 == samples) return;
          const int64_t home = taken / width;
          const int32_t* const row = quantized + home * width * groups + taken % width;
          for (int64_t g = 0; g < groups; ++g) queries[known * groups + g] = row[g * width];
          limits[taken] = kNoPoint;
          nearest[taken] = T(-1);
          panel_best[home] = *std::max_element(nearest + home * width, nearest + (home + 1) * width);
          int64_t best;
          while (met[best = std::max_element(panel_best, panel_best + count) - panel_best] <= known) {
            if (pieces == 1)
              turn[0] = best;
            else
              std::nth_element(turn.begin(), turn.begin() + (pieces - 1), turn.end(),
                               [&](int64_t p, int64_t q) {
                                 return panel_best[p] > panel_best[q] || (panel_best[p] == panel_best[q] && p < q);
                               });
            first_in_turn_meet();
          }
          const T* const from = nearest + best * width;
          taken = best * width + (std::find(from, from + width, panel_best[best]) - from);
        }
      },
      [&](int64_t i) {
        const int64_t p = turn[i];
        panel_best[p] = VAMOH_DISPATCH(isa, come_nearer_quantized<T>)(cloud, p, order, queries, met[p], known + 1,
                                                                      nearest, limits);
        met[p] = known + 1;
      });
}

}  // namespace

template <class T>
void farthest_point_sample(const Cloud<T>& cloud, const Mask& mask, int64_t* out, int64_t batch, int64_t samples,
                           int threads, Isa isa) {
  isa = with_byte_products(isa);
  const int64_t padded = round_up(cloud.count, kWidestPanel), size = Scratch<T>::size(padded, cloud.dims);
  // Few functions are shared by all threads, many are shared out.
  const bool together = batch < threads && cloud.count * cloud.dims >= kShared;
  const int team = together ? threads : 1;
  threads = together ? 1 : workers(threads, batch);
  const Buffer<T> memory = allocate<T>(threads * size);
  for_each_function(
      mask, out, batch, cloud.count, samples, threads,
      [&](int64_t b, const int64_t* index, int64_t n, int64_t* order, int worker) {
        const Scratch<T> scratch(memory.get() + worker * size, padded, cloud.dims);
        QuantizedCloud<T> candidates{cloud.values + b * cloud.stride, index, n, cloud.dims};
        // The portable kernel is slower with quantized points.
        if (isa != Isa::portable && set_scale<T>(candidates, nullptr, 0, VAMOH_DISPATCH(isa, extend_range<T>)))
          sample_quantized(isa, candidates, samples, team, scratch, order);
        else if (!worth_a_tree(n, samples, cloud.dims, team) ||
                 !sample_in_tree(isa, candidates, samples, scratch, order))
          sample_in_panels(isa, candidates, samples, team, scratch, order);
      });
}

template <class T>
void farthest_point_sample_by_table(const Cloud<int64_t>& cells, const DistanceTable<T>& table, const Mask& mask,
                                    int64_t* out, int64_t batch, int64_t samples, int threads, Isa isa) {
  const auto sample = VAMOH_DISPATCH(isa, sample_by_table<T>);
  const int64_t padded = round_up(cells.count, kWidestPanel);
  threads = workers(threads, batch);
  const Buffer<T> scratch = allocate<T>(threads * padded);
  const Buffer<int32_t> packed = allocate<int32_t>(threads * padded);
  for_each_function(mask, out, batch, cells.count, samples, threads,
                    [&](int64_t b, const int64_t* index, int64_t n, int64_t* order, int worker) {
                      const int64_t* from = cells.values + b * cells.stride;
                      int32_t* candidates = packed.get() + worker * padded;
                      for (int64_t i = 0; i < n; ++i) candidates[i] = static_cast<int32_t>(from[index[i]]);
                      std::fill(candidates + n, candidates + round_up(n, kWidestPanel), candidates[0]);
                      sample(candidates, n, table.values + table.size / 2, samples, scratch.get() + worker * padded,
                             std::numeric_limits<T>::infinity(), order);
                    });
}

#define VAMOH_INSTANTIATE(T)                                                                                          \
  template void farthest_point_sample(const Cloud<T>&, const Mask&, int64_t*, int64_t, int64_t, int, Isa);            \
  template void farthest_point_sample_by_table(const Cloud<int64_t>&, const DistanceTable<T>&, const Mask&, int64_t*, \
                                               int64_t, int64_t, int, Isa);
VAMOH_INSTANTIATE(float)
VAMOH_INSTANTIATE(double)
#undef VAMOH_INSTANTIATE

}  // namespace vamoh
