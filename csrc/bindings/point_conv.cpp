#include "point_conv.h"

void bind_point_conv(py::module_& m) {
  m.def("point_conv", native(&vamoh::point_conv), py::kw_only(), "inputs"_a, "out"_a, "sizes"_a, "slope"_a, "threads"_a,
        "isa"_a);
  m.def("point_conv_backward", native(&vamoh::point_conv_backward), py::kw_only(), "grad"_a, "out"_a, "inputs"_a,
        "gradients"_a, "sizes"_a, "slope"_a, "threads"_a, "isa"_a);
  m.def("neighbor_difference", native(&vamoh::neighbor_difference), py::kw_only(), "table"_a, "neighbors"_a,
        "centroids"_a, "bias"_a, "out"_a, "sizes"_a, "threads"_a, "isa"_a);
  m.def("neighbor_difference_backward", native(&vamoh::neighbor_difference_backward), py::kw_only(), "grad"_a,
        "neighbors"_a, "centroids"_a, "grad_table"_a, "grad_bias"_a, "sizes"_a, "threads"_a, "isa"_a);
}
