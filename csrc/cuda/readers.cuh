// Which places of an index read a point: the inverse of a gather, in order and without atomics.
#pragma once

#include "launch.cuh"

namespace vamoh {

// Function f's readers of point j are list[f][starts[f][j]] to list[f][starts[f][j + 1]], ascending.
struct Readers {
  int64_t functions, points, pairs;
  int64_t *starts, *list;  // [functions, points + 1] and [functions, pairs]

  __device__ const int64_t* starts_of(int64_t f) const { return starts + (functions == 1 ? 0 : f * (points + 1)); }
  __device__ const int64_t* list_of(int64_t f) const { return list + (functions == 1 ? 0 : f * pairs); }
};

namespace {

constexpr int kReaderThreads = 256;

// A thread goes through the whole index for one point: counts its readers into starts[j + 1], or lists them.
template <bool List>
__global__ void __launch_bounds__(kReaderThreads) find_readers(const int64_t* index, Readers readers) {
  __shared__ int64_t part[kReaderThreads];
  const int64_t blocks = (readers.points + kReaderThreads - 1) / kReaderThreads;
  const int64_t f = blockIdx.x / blocks, j = blockIdx.x % blocks * kReaderThreads + threadIdx.x;
  int64_t* const starts = readers.starts + f * (readers.points + 1);
  int64_t* const list = readers.list + f * readers.pairs;
  int64_t found = List && j < readers.points ? starts[j] : 0;
  for (int64_t first = 0; first < readers.pairs; first += kReaderThreads) {
    const int64_t left = readers.pairs - first;
    if (threadIdx.x < left) part[threadIdx.x] = index[f * readers.pairs + first + threadIdx.x];
    __syncthreads();
    for (int64_t i = 0; i < left && i < kReaderThreads; ++i) {
      if (part[i] != j) continue;
      if (List) list[found] = first + i;
      ++found;
    }
    __syncthreads();
  }
  if (!List && j < readers.points) starts[j + 1] = found;
}

// Adds up the counts in starts. One block per function; a thread adds a stretch of points.
__global__ void __launch_bounds__(kReaderThreads) add_counts(Readers readers) {
  __shared__ int64_t ends[kReaderThreads];
  const int64_t stretch = (readers.points + kReaderThreads - 1) / kReaderThreads;
  const int64_t begin = threadIdx.x * stretch;
  const int64_t end = begin + stretch < readers.points ? begin + stretch : readers.points;
  int64_t* const starts = readers.starts + blockIdx.x * (readers.points + 1);
  int64_t count = 0;
  for (int64_t j = begin; j < end; ++j) count += starts[j + 1];
  ends[threadIdx.x] = count;
  __syncthreads();
  int64_t total = 0;
  for (unsigned t = 0; t < threadIdx.x; ++t) total += ends[t];
  if (threadIdx.x == 0) starts[0] = 0;
  for (int64_t j = begin; j < end; ++j) starts[j + 1] = total += starts[j + 1];
}

inline Readers take_readers(Launcher& launch, int64_t functions, int64_t points, int64_t pairs) {
  int64_t* const starts = launch.take<int64_t>(functions * (points + 1));
  return {functions, points, pairs, starts, launch.take<int64_t>(functions * pairs)};
}

inline void fill_readers(Launcher& launch, const int64_t* index, const Readers& readers) {
  const int64_t blocks = readers.functions * ceil_div(readers.points, kReaderThreads);
  launch(find_readers<false>, blocks, kReaderThreads, index, readers);
  launch(add_counts, readers.functions, kReaderThreads, readers);
  launch(find_readers<true>, blocks, kReaderThreads, index, readers);
}

}  // namespace

}  // namespace vamoh
