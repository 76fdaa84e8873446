#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <thread>

#include "../farthest_point_sample.h"
#include "../threads.h"
#include "coded_cloud.h"
#include "memory.h"

#define VAMOH_KERNEL "farthest_point_sample_cpu.inl"
#include "each_isa.inl"

namespace vamoh {

namespace {

template <class T>
struct Kernel {
  int64_t width, coded_width;
  decltype(&portable::pack_panels<T, portable::panel_width<T>()>) pack;
  decltype(&portable::come_nearer<T>) come_nearer;
  decltype(&portable::extend_range<T>) extend_range;
  decltype(&portable::pack_codes<T, portable::kCodedWidth>) pack_codes;
  decltype(&portable::come_nearer_by_codes<T>) come_nearer_by_codes;
  decltype(&portable::sample_by_table<T>) sample_by_table;
};

template <class T>
Kernel<T> kernel(Isa isa) {
#define VAMOH_TABLE(isa)                                                                                        \
  {                                                                                                             \
    isa::panel_width<T>(), isa::kCodedWidth, &isa::pack_panels<T, isa::panel_width<T>()>, &isa::come_nearer<T>, \
        &isa::extend_range<T>, &isa::pack_codes<T, isa::kCodedWidth>, &isa::come_nearer_by_codes<T>,            \
        &isa::sample_by_table<T>                                                                                \
  }
#if VAMOH_X86
  if (isa == Isa::avx512 && has_vnni()) return VAMOH_TABLE(avx512);
  if (isa != Isa::portable) return VAMOH_TABLE(avx2);
#endif
  (void)isa;
  return VAMOH_TABLE(portable);
#undef VAMOH_TABLE
}

// Order [samples] of positions among n points in panels of `width`, samples < n. take(position) updates scratch:
// nearest [panels, W], panel_best [panels].
template <class T, class Take>
void sample(int64_t n, int64_t samples, int64_t width, T* nearest, T* panel_best, const Take& take, int64_t* order) {
  const int64_t count = (n + width - 1) / width;
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
void for_each_function(const bool* mask, int64_t mask_step, int64_t* out, int64_t batch, int64_t points,
                       int64_t samples, int threads, const Sample& sample) {
  const int64_t padded = round_up(points, kWidestPanel);
  const Buffer<int64_t> candidates = allocate<int64_t>(threads * padded);
  ThreadPool::get().run(batch, threads, [&](int64_t b, int worker) {
    const bool* allowed = mask ? mask + b * mask_step : nullptr;
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

// One worker's memory for clouds of up to `padded` points: panels, or codes, squares and limits, which need less room
// as coded clouds have many dimensions.
template <class T>
struct Scratch {
  T *panels, *nearest, *panel_best, *query;

  static int64_t size(int64_t padded, int64_t dims) { return padded * (dims + 2) + round_up(dims, kWidestPanel); }

  Scratch(T* memory, int64_t padded, int64_t dims)
      : panels(memory), nearest(panels + padded * dims), panel_best(nearest + padded), query(panel_best + padded) {}
};

// `sample` by `team` threads, which share the panels. take(position) comes before come_nearer(p0, p1) for all panels.
template <class T, class Take, class ComeNearer>
void sample_together(int64_t n, int64_t samples, int64_t width, int team, const Scratch<T>& scratch, const Take& take,
                     const ComeNearer& come_nearer, int64_t* order) {
  const int64_t count = (n + width - 1) / width, pieces = std::min<int64_t>(count, team * kPiecesPerThread);
  const auto sample_with = [&](const auto& all_come_nearer) {
    const auto take_each = [&](int64_t taken) {
      take(taken);
      all_come_nearer();
    };
    sample(n, samples, width, scratch.nearest, scratch.panel_best, take_each, order);
  };
  if (team == 1) return sample_with([&] { come_nearer(0, count); });
  Rounds rounds(pieces);
  const auto piece = [&](int64_t i) { come_nearer(i * count / pieces, (i + 1) * count / pieces); };
  ThreadPool::get().run(team, team, [&](int64_t task, int) {
    if (task > 0) return rounds.help(task * pieces / team, piece);
    sample_with([&] { rounds.lead(piece); });
    rounds.finish();
  });
}

template <class T>
void sample_in_panels(const Kernel<T>& run, const CodedCloud<T>& cloud, int64_t samples, int team,
                      const Scratch<T>& scratch, int64_t* order) {
  const int64_t width = run.width, dims = cloud.dims;
  T* const query = scratch.query;
  run.pack(cloud.coords, cloud.index, cloud.n, dims, scratch.panels);
  sample_together(
      cloud.n, samples, width, team, scratch,
      [&](int64_t taken) {
        const T* const row = scratch.panels + taken / width * width * dims + taken % width;
        for (int64_t d = 0; d < dims; ++d) query[d] = row[d * width];
      },
      [&](int64_t p0, int64_t p1) {
        run.come_nearer(scratch.panels, dims, p0, p1, query, scratch.nearest, scratch.panel_best);
      },
      order);
}

template <class T>
void sample_by_codes(const Kernel<T>& run, CodedCloud<T>& cloud, int64_t samples, int team, const Scratch<T>& scratch,
                     int64_t* order) {
  const int64_t width = run.coded_width, groups = cloud.groups, padded = round_up(cloud.n, width);
  int32_t* const codes = reinterpret_cast<int32_t*>(scratch.panels);
  int32_t* const squares = codes + padded * groups;
  int32_t* const limits = squares + padded;
  int32_t* const query = limits + padded;
  cloud.codes = codes;
  cloud.squares = squares;
  run.pack_codes(cloud, query, codes, squares);
  for (int64_t i = 0; i < padded; ++i) limits[i] = squares[i] - (i < cloud.n ? kFarthest : 0);
  int64_t from = 0;
  sample_together(
      cloud.n, samples, width, team, scratch,
      [&](int64_t taken) {
        from = taken;
        limits[taken] = kNoPoint;
        const int32_t* const row = codes + taken / width * width * groups + taken % width;
        for (int64_t g = 0; g < groups; ++g) query[g] = row[g * width];
      },
      [&](int64_t p0, int64_t p1) {
        run.come_nearer_by_codes(cloud, p0, p1, cloud.coords + cloud.index[from] * cloud.dims, query, squares[from],
                                 scratch.nearest, limits, scratch.panel_best);
      },
      order);
}

}  // namespace

template <class T>
void farthest_point_sample(const T* coords, int64_t coords_step, const bool* mask, int64_t mask_step, int64_t* out,
                           int64_t batch, int64_t points, int64_t dims, int64_t samples, int threads, Isa isa) {
  const Kernel<T> run = kernel<T>(isa);
  const int64_t padded = round_up(points, kWidestPanel), size = Scratch<T>::size(padded, dims);
  // Few functions are shared by all threads, many are shared out.
  const bool together = batch < threads && points * dims >= kShared;
  const int team = together ? threads : 1;
  threads = together ? 1 : workers(threads, batch);
  const Buffer<T> memory = allocate<T>(threads * size);
  for_each_function(mask, mask_step, out, batch, points, samples, threads,
                    [&](int64_t b, const int64_t* index, int64_t n, int64_t* order, int worker) {
                      const Scratch<T> scratch(memory.get() + worker * size, padded, dims);
                      CodedCloud<T> cloud{coords + b * coords_step, index, n, dims};
                      // The portable kernel is slower by codes.
                      if (isa != Isa::portable && set_scale<T>(cloud, nullptr, 0, run.extend_range))
                        sample_by_codes(run, cloud, samples, team, scratch, order);
                      else
                        sample_in_panels(run, cloud, samples, team, scratch, order);
                    });
}

template <class T>
void farthest_point_sample_by_table(const int64_t* coords, int64_t coords_step, const T* table, int64_t table_size,
                                    const bool* mask, int64_t mask_step, int64_t* out, int64_t batch, int64_t points,
                                    int64_t samples, int threads, Isa isa) {
  const Kernel<T> run = kernel<T>(isa);
  const int64_t padded = round_up(points, kWidestPanel);
  threads = workers(threads, batch);
  const Buffer<T> scratch = allocate<T>(threads * padded);
  const Buffer<int32_t> packed = allocate<int32_t>(threads * padded);
  for_each_function(mask, mask_step, out, batch, points, samples, threads,
                    [&](int64_t b, const int64_t* index, int64_t n, int64_t* order, int worker) {
                      const int64_t* from = coords + b * coords_step;
                      int32_t* places = packed.get() + worker * padded;
                      for (int64_t i = 0; i < n; ++i) places[i] = static_cast<int32_t>(from[index[i]]);
                      std::fill(places + n, places + round_up(n, kWidestPanel), places[0]);
                      run.sample_by_table(places, n, table + table_size / 2, samples, scratch.get() + worker * padded,
                                          std::numeric_limits<T>::infinity(), order);
                    });
}

#define VAMOH_INSTANTIATE(T)                                                                                        \
  template void farthest_point_sample(const T*, int64_t, const bool*, int64_t, int64_t*, int64_t, int64_t, int64_t, \
                                      int64_t, int, Isa);                                                           \
  template void farthest_point_sample_by_table(const int64_t*, int64_t, const T*, int64_t, const bool*, int64_t,    \
                                               int64_t*, int64_t, int64_t, int64_t, int, Isa);
VAMOH_INSTANTIATE(float)
VAMOH_INSTANTIATE(double)
#undef VAMOH_INSTANTIATE

}  // namespace vamoh
