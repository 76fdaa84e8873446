#include "../linear.h"

#include "binding.h"

template <>
struct Passed<vamoh::Strides> : Fields<vamoh::Strides, int64_t, int64_t, int64_t> {};

template <>
struct Passed<vamoh::LinearSizes> : Fields<vamoh::LinearSizes, int64_t, int64_t, int64_t, int64_t> {};

void bind_linear(py::module_& m) {
  m.def("linear", native(&vamoh::linear), py::kw_only(), "x"_a, "x_at"_a, "weight"_a, "bias"_a, "out"_a, "out_at"_a,
        "sizes"_a, "threads"_a, "isa"_a);
  m.def("linear_grad_x", native(&vamoh::linear_grad_x), py::kw_only(), "grad"_a, "grad_at"_a, "weight"_a, "grad_x"_a,
        "sizes"_a, "threads"_a, "isa"_a);
  m.def("linear_grad_weight", native(&vamoh::linear_grad_weight), py::kw_only(), "grad"_a, "grad_at"_a, "x"_a, "x_at"_a,
        "grad_weight"_a, "grad_bias"_a, "sizes"_a, "threads"_a, "isa"_a);
}
