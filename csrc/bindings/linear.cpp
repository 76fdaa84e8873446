#include "../linear.h"

#include <cstdint>
#include <string>

#include "binding.h"

namespace {

using Rows = Strided<3>;  // [G, M, values]

template <class T>
T* data(const Rows& rows) {
  return reinterpret_cast<T*>(rows.address);
}

vamoh::Strides at(const Rows& rows) { return {rows.strides[0], rows.strides[1], rows.strides[2]}; }

vamoh::LinearSizes sizes(const Rows& out, int64_t in) { return {out.sizes[0], out.sizes[1], in, out.sizes[2]}; }

void linear(const Rows& x, const Memory& weight, const Memory& bias, const Rows& out, int threads,
            const std::string& isa) {
  const py::gil_scoped_release unlocked;
  vamoh::linear(data<const float>(x), at(x), Passed<const float*>::get(weight), Passed<const float*>::get(bias),
                data<float>(out), at(out), sizes(out, x.sizes[2]), threads, vamoh::parse_isa(isa));
}

void linear_grad_x(const Rows& grad, const Memory& weight, const Rows& grad_x, int threads, const std::string& isa) {
  const py::gil_scoped_release unlocked;
  vamoh::linear_grad_x(data<const float>(grad), at(grad), Passed<const float*>::get(weight), data<float>(grad_x),
                       sizes(grad, grad_x.sizes[2]), threads, vamoh::parse_isa(isa));
}

void linear_grad_weight(const Rows& grad, const Rows& x, const Memory& grad_weight, const Memory& grad_bias,
                        int threads, const std::string& isa) {
  const py::gil_scoped_release unlocked;
  vamoh::linear_grad_weight(data<const float>(grad), at(grad), data<const float>(x), at(x),
                            Passed<float*>::get(grad_weight), Passed<float*>::get(grad_bias), sizes(grad, x.sizes[2]),
                            threads, vamoh::parse_isa(isa));
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear", &linear, py::kw_only(), "x"_a, "weight"_a, "bias"_a, "out"_a, "threads"_a, "isa"_a);
  m.def("linear_grad_x", &linear_grad_x, py::kw_only(), "grad"_a, "weight"_a, "grad_x"_a, "threads"_a, "isa"_a);
  m.def("linear_grad_weight", &linear_grad_weight, py::kw_only(), "grad"_a, "x"_a, "grad_weight"_a, "grad_bias"_a,
        "threads"_a, "isa"_a);
}
