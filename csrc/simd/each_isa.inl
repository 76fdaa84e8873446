// Compiles the file VAMOH_KERNEL once per instruction set, each in a namespace of that name.
//
// A kernel file must not use the standard library: an inline function or template compiled here with AVX-512 could be
// the copy that the linker keeps for everyone.

#if VAMOH_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2,fma")
#endif
namespace {
namespace avx512 {
constexpr int kVectorBytes = 64;
#define VAMOH_VECTOR_BITS 512
#include VAMOH_KERNEL
#undef VAMOH_VECTOR_BITS
}  // namespace avx512
}  // namespace
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace {
namespace avx2 {
constexpr int kVectorBytes = 32;
#define VAMOH_VECTOR_BITS 256
#include VAMOH_KERNEL
#undef VAMOH_VECTOR_BITS
}  // namespace avx2
}  // namespace
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace {
namespace portable {
constexpr int kVectorBytes = 16;
#define VAMOH_VECTOR_BITS 128
#include VAMOH_KERNEL
#undef VAMOH_VECTOR_BITS
}  // namespace portable
}  // namespace

// What the file calls f, compiled for an instruction set of those that the CPU has: VAMOH_DISPATCH(isa, f<T>)(x, n).
#if VAMOH_X86
#define VAMOH_DISPATCH(isa, ...)                     \
  ((isa) == vamoh::Isa::avx512 ? avx512::__VA_ARGS__ \
   : (isa) == vamoh::Isa::avx2 ? avx2::__VA_ARGS__   \
                               : portable::__VA_ARGS__)
#else
#define VAMOH_DISPATCH(isa, ...) ((void)(isa), portable::__VA_ARGS__)
#endif
