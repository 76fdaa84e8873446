#include "../knn.h"

#include <string>

#include "cloud.h"

namespace {

template <class T>
void bind(py::module_& m, const std::string& dtype) {
  m.def(("knn_" + dtype).c_str(), native(&vamoh::knn<T>), py::kw_only(), "points"_a, "queries"_a, "mask"_a, "out"_a,
        "batch"_a, "neighbors"_a, "threads"_a, "isa"_a);
  m.def(("knn_by_table_" + dtype).c_str(), native(&vamoh::knn_by_table<T>), py::kw_only(), "points"_a, "queries"_a,
        "table"_a, "order"_a, "length"_a, "mask"_a, "out"_a, "batch"_a, "neighbors"_a, "threads"_a, "isa"_a);
}

}  // namespace

void bind_knn(py::module_& m) {
  bind<float>(m, "float32");
  bind<double>(m, "float64");
}
