#include "../linear.h"

#include <array>
#include <cstdint>
#include <string>

#include "binding.h"

namespace {

using Numbers3 = std::array<int64_t, 3>;
using Numbers4 = std::array<int64_t, 4>;

vamoh::Strides strides(const Numbers3& s) { return {s[0], s[1], s[2]}; }
vamoh::LinearSizes linear_sizes(const Numbers4& s) { return {s[0], s[1], s[2], s[3]}; }

void linear(uintptr_t x, Numbers3 x_at, uintptr_t weight, uintptr_t bias, uintptr_t out, Numbers3 out_at,
            Numbers4 sizes, int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::linear(at<const float>(x), strides(x_at), at<const float>(weight), at<const float>(bias), at<float>(out),
                strides(out_at), linear_sizes(sizes), threads, chosen);
}

// An address 0 asks for no such gradient.
void linear_backward(uintptr_t grad, Numbers3 grad_at, uintptr_t x, Numbers3 x_at, uintptr_t weight, uintptr_t grad_x,
                     uintptr_t grad_weight, uintptr_t grad_bias, Numbers4 sizes, int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  if (grad_x)
    vamoh::linear_grad_x(at<const float>(grad), strides(grad_at), at<const float>(weight), at<float>(grad_x),
                         linear_sizes(sizes), threads, chosen);
  if (grad_weight || grad_bias)
    vamoh::linear_grad_weight(at<const float>(grad), strides(grad_at), at<const float>(x), strides(x_at),
                              at<float>(grad_weight), at<float>(grad_bias), linear_sizes(sizes), threads, chosen);
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear", &linear, py::kw_only(), py::arg("x"), py::arg("x_at"), py::arg("weight"), py::arg("bias"),
        py::arg("out"), py::arg("out_at"), py::arg("sizes"), py::arg("threads"), py::arg("isa"));
  m.def("linear_backward", &linear_backward, py::kw_only(), py::arg("grad"), py::arg("grad_at"), py::arg("x"),
        py::arg("x_at"), py::arg("weight"), py::arg("grad_x"), py::arg("grad_weight"), py::arg("grad_bias"),
        py::arg("sizes"), py::arg("threads"), py::arg("isa"));
}
