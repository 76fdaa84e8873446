// A check runs one kernel on odd sizes in exactly sized memory, for one instruction set and number of threads, and
// returns whether the results are plausible; the sanitizers do the rest.
#pragma once

#include <vector>

#include "isa.h"

using Check = bool (*)(vamoh::Isa isa, int threads);

inline std::vector<Check>& checks() {
  static std::vector<Check> all;
  return all;
}

struct Register {
  explicit Register(Check check) { checks().push_back(check); }
};
