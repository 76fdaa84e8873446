// The Python module vamoh._native.
#include <cstdlib>

#include "../isa.h"
#include "binding.h"

PYBIND11_MODULE(_native, m) {
  m.attr("version") = VAMOH_VERSION;
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  m.attr("flags") = VAMOH_FLAGS;
#if defined(VAMOH_CUDA)
  m.attr("cuda") = VAMOH_CUDA;
  bind_cuda(m);
#else
  m.attr("cuda") = "";
#endif
  m.def("getenv", [](const char* name) { return std::getenv(name); });
  m.def("supported_isas", &vamoh::supported_isas);
  bind_farthest_point_sample(m);
  bind_fourier_features(m);
  bind_gating(m);
  bind_inr_mixture(m);
  bind_knn(m);
  bind_linear(m);
  bind_planar_flow(m);
  bind_point_conv(m);
}
