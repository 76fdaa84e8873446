// Compiles the file VAMOH_KERNEL once per instruction set, each in a namespace of that name.
//
// A kernel file must not use the standard library: an inline function or template compiled here with AVX-512 could be
// the copy that the linker keeps for everyone.

#if VAMOH_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx2")
namespace {
namespace avx512 {
constexpr int kVectorBytes = 64;
#include VAMOH_KERNEL
}  // namespace avx512
}  // namespace
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2")
namespace {
namespace avx2 {
constexpr int kVectorBytes = 32;
#include VAMOH_KERNEL
}  // namespace avx2
}  // namespace
#pragma GCC pop_options
#endif

namespace {
namespace portable {
constexpr int kVectorBytes = 16;
#include VAMOH_KERNEL
}  // namespace portable
}  // namespace
