#include "check.h"

int main() {
  bool good = true;
  for (const std::string& name : vamoh::supported_isas())
    for (int threads : {1, 2})
      for (const Check check : checks()) good &= check(vamoh::parse_isa(name), threads);
  return good && !checks().empty() ? 0 : 1;
}
