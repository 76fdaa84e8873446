// Scratch memory aligned for the widest vectors.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace vamoh {

constexpr std::align_val_t kAlignment{64};

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete[](memory, kAlignment); }
};

template <class T>
using Buffer = std::unique_ptr<T[], AlignedDelete>;

// Uninitialised.
template <class T>
Buffer<T> allocate(int64_t count) {
  return Buffer<T>(static_cast<T*>(::operator new[](static_cast<size_t>(count) * sizeof(T), kAlignment)));
}

// Asks for huge pages where memory was not touched yet: the first write to it is then several times faster.
inline void expect_huge(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }
inline int64_t round_up(int64_t value, int64_t to) { return ceil_div(value, to) * to; }

// Most points a panel holds, for any type and instruction set.
constexpr int64_t kWidestPanel = 64;

}  // namespace vamoh
