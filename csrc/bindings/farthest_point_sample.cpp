#include "../farthest_point_sample.h"

#include <string>

#include "cloud.h"

namespace {

template <class T>
void bind(py::module_& m, const std::string& dtype) {
  m.def(("farthest_point_sample_" + dtype).c_str(), native(&vamoh::farthest_point_sample<T>), py::kw_only(), "cloud"_a,
        "mask"_a, "out"_a, "batch"_a, "samples"_a, "threads"_a, "isa"_a);
  m.def(("farthest_point_sample_by_table_" + dtype).c_str(), native(&vamoh::farthest_point_sample_by_table<T>),
        py::kw_only(), "cloud"_a, "table"_a, "mask"_a, "out"_a, "batch"_a, "samples"_a, "threads"_a, "isa"_a);
}

}  // namespace

void bind_farthest_point_sample(py::module_& m) {
  bind<float>(m, "float32");
  bind<double>(m, "float64");
}
