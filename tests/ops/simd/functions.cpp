// functions STRIDE [FUNCTION FIRST END]: largest errors of the vector functions over every STRIDE-th float, or those of
// one over bit patterns from FIRST to END, for every instruction set of this machine. Prints "isa function units
// absolute worst": the error in units in the last place of the true value and as a difference, and where the first is
// largest. Infinities and NaN that differ from the true value's count as infinite errors; results below the smallest
// normal number may be 0.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "simd/likelihood.h"
#include "isa.h"

enum class Function {
  exp,
  log,
  log_normal,
  log1p,
  tanh,
  sine,
  cosine,
  sine_quarter,
  cosine_quarter,
  sigmoid,
  continuous_bernoulli,
};

#define VAMOH_KERNEL "functions.inl"
#include "simd/each_isa.inl"

namespace {

constexpr double kHalfPi = 1.57079632679489661923;

double continuous_bernoulli(double x) {
  const double square = x * x;
  if (std::fabs(x) < 0.05) return 0.5 + x * (1.0 / 12 - square * (1.0 / 720 - square * (1.0 / 30240)));
  return x > 0 ? -1 / std::expm1(-x) - 1 / x : -(1 / std::expm1(-x) + 1 / x);
}

struct Case {
  const char* name;
  Function function;
  double (*truth)(double);
  bool (*in_range)(float);
};

bool any(float) { return true; }
bool not_negative(float x) { return !(x < 0); }
bool positive_normal(float x) { return x >= 1.17549435e-38f && x < std::numeric_limits<float>::infinity(); }
bool near(float x) { return std::fabs(x) < 4194304; }

const Case kCases[] = {
    {"exp", Function::exp, [](double x) { return std::exp(x); }, any},
    {"log", Function::log, [](double x) { return std::log(x); }, any},
    {"log_normal", Function::log_normal, [](double x) { return std::log(x); }, positive_normal},
    {"log1p", Function::log1p, [](double x) { return std::log1p(x); }, not_negative},
    {"tanh", Function::tanh, [](double x) { return std::tanh(x); }, any},
    {"sine", Function::sine, [](double x) { return std::sin(x); }, any},
    {"cosine", Function::cosine, [](double x) { return std::cos(x); }, any},
    {"sine_quarter", Function::sine_quarter, [](double x) { return std::sin(std::fmod(x, 4) * kHalfPi); }, near},
    {"cosine_quarter", Function::cosine_quarter, [](double x) { return std::cos(std::fmod(x, 4) * kHalfPi); }, near},
    {"sigmoid", Function::sigmoid, [](double x) { return 1 / (1 + std::exp(-x)); }, any},
    {"continuous_bernoulli", Function::continuous_bernoulli, continuous_bernoulli, any},
};

struct Error {
  double units, absolute;
};

// 1 / unit in the last place of a float next to the finite truth.
double units_of(double truth) {
  uint64_t bits;
  std::memcpy(&bits, &truth, 8);
  const int64_t exponent = std::max<int64_t>(static_cast<int64_t>(bits >> 52 & 0x7ff) - 1023, -126);
  bits = static_cast<uint64_t>(23 - exponent + 1023) << 52;
  std::memcpy(&truth, &bits, 8);
  return truth;
}

Error error(float result, double truth, double units) {
  constexpr float kMost = std::numeric_limits<float>::max(), kTiny = std::numeric_limits<float>::min();
  if (std::fabs(truth) <= kMost && std::fabs(result) <= kMost) {
    const double absolute = std::fabs(result - truth);
    return {result == 0 && std::fabs(truth) < kTiny ? 0 : absolute * units, absolute};
  }
  const float rounded = static_cast<float>(truth);
  if (std::isnan(truth) || std::isnan(result) || std::isinf(rounded) || std::isinf(result)) {
    const bool same = std::isnan(truth) ? std::isnan(result) : result == rounded;
    const double e = same ? 0 : std::numeric_limits<double>::infinity();
    return {e, e};
  }
  const double absolute = std::fabs(result - truth);  // the truth rounds to a finite number
  return {absolute * units, absolute};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 && argc != 5) return 2;
  const uint64_t stride = std::strtoull(argv[1], nullptr, 0);
  const uint64_t first = argc > 3 ? std::strtoull(argv[3], nullptr, 0) : 0;
  const uint64_t end = argc > 4 ? std::strtoull(argv[4], nullptr, 0) : uint64_t{1} << 32;
  const std::vector<std::string> isas = vamoh::supported_isas();
  constexpr int64_t kBlock = 4096;
  std::vector<float> values(kBlock), results(kBlock);
  std::vector<double> truths(kBlock), units(kBlock);
  for (const Case& c : kCases) {
    if (argc > 2 && std::strcmp(argv[2], c.name) != 0) continue;
    std::vector<Error> most(isas.size(), {0, 0});
    std::vector<float> worst(isas.size(), 0);
    for (uint64_t bits = first; bits < end;) {
      int64_t count = 0;
      for (; count < kBlock && bits < end; bits += stride) {
        const uint32_t pattern = static_cast<uint32_t>(bits);
        float x;
        std::memcpy(&x, &pattern, 4);
        if (!c.in_range(x)) continue;
        truths[count] = c.truth(x);
        units[count] = units_of(truths[count]);
        values[count++] = x;
      }
      for (int64_t i = count; i < kBlock; ++i) values[i] = 1;
      for (size_t i = 0; i < isas.size(); ++i) {
        switch (vamoh::parse_isa(isas[i])) {
#if VAMOH_X86
          case vamoh::Isa::avx512:
            avx512::evaluate(c.function, values.data(), kBlock, results.data());
            break;
          case vamoh::Isa::avx2:
            avx2::evaluate(c.function, values.data(), kBlock, results.data());
            break;
#endif
          default:
            portable::evaluate(c.function, values.data(), kBlock, results.data());
        }
        for (int64_t j = 0; j < count; ++j) {
          const Error e = error(results[j], truths[j], units[j]);
          if (e.units > most[i].units) worst[i] = values[j];
          most[i].units = std::max(most[i].units, e.units);
          most[i].absolute = std::max(most[i].absolute, e.absolute);
        }
      }
    }
    for (size_t i = 0; i < isas.size(); ++i)
      std::printf("%s %s %.4g %.4g %.9g\n", isas[i].c_str(), c.name, most[i].units, most[i].absolute, worst[i]);
    std::fflush(stdout);
  }
}
