#include "../fourier_features.h"

#include "binding.h"

void bind_fourier_features(py::module_& m) {
  m.def("fourier_features", native(&vamoh::fourier_features), py::kw_only(), "coords"_a, "frequencies"_a, "out"_a,
        "points"_a, "dims"_a, "count"_a, "threads"_a, "isa"_a);
}
