// Scratch memory aligned for the widest vectors.
#pragma once

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

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Most points a panel holds, for any type and instruction set.
constexpr int64_t kWidestPanel = 64;

}  // namespace vamoh
