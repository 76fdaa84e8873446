#include "../fourier_features.h"

#include <cstdint>
#include <string>

#include "binding.h"

namespace {

void fourier_features(uintptr_t coords, uintptr_t frequencies, uintptr_t out, int64_t points, int64_t dims,
                      int64_t count, int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::fourier_features(at<const float>(coords), at<const float>(frequencies), at<float>(out), points, dims, count,
                          threads, chosen);
}

}  // namespace

void bind_fourier_features(py::module_& m) {
  m.def("fourier_features", &fourier_features, py::kw_only(), py::arg("coords"), py::arg("frequencies"), py::arg("out"),
        py::arg("points"), py::arg("dims"), py::arg("count"), py::arg("threads"), py::arg("isa"));
}
