// Instruction sets the CPU kernels are compiled for, chosen at run time.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

// GCC and clang can compile a part of a file for another instruction set; other compilers build portable kernels alone.
#if defined(__x86_64__) && defined(__GNUC__)
#define VAMOH_X86 1
#else
#define VAMOH_X86 0
#endif

namespace vamoh {

enum class Isa { portable, avx2, avx512 };

// Names of the instruction sets this binary holds and this CPU has, best first.
inline std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
#if VAMOH_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      names.push_back("avx512");
    names.push_back("avx2");
  }
#endif
  names.push_back("portable");
  return names;
}

// The same, or AVX2 where a CPU with AVX-512 cannot sum products of bytes in one instruction, as most can.
inline Isa with_byte_products(Isa isa) {
#if VAMOH_X86
  if (isa == Isa::avx512 && !__builtin_cpu_supports("avx512vnni")) return Isa::avx2;
#endif
  return isa;
}

// Throws for a name that `supported_isas` does not list: running it would be an illegal instruction.
inline Isa parse_isa(const std::string& name) {
  for (const std::string& supported : supported_isas())
    if (name == supported) return name == "avx512" ? Isa::avx512 : name == "avx2" ? Isa::avx2 : Isa::portable;
  throw std::invalid_argument("vamoh._native: unsupported instruction set " + name);
}

}  // namespace vamoh
