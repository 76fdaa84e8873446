#include "../point_conv.h"

#include <array>
#include <cstdint>
#include <string>

#include "binding.h"

namespace {

using Numbers7 = std::array<int64_t, 7>;

vamoh::PointConvSizes point_conv_sizes(const Numbers7& s, bool shared) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], shared};
}

void point_conv(uintptr_t features, uintptr_t neighbors, uintptr_t weights, uintptr_t linear_weight,
                uintptr_t linear_bias, uintptr_t out, Numbers7 sizes, bool shared, float slope, int threads,
                const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::point_conv({at<const float>(features), at<const int64_t>(neighbors), at<const float>(weights),
                     at<const float>(linear_weight), at<const float>(linear_bias)},
                    at<float>(out), point_conv_sizes(sizes, shared), slope, threads, chosen);
}

// grad_features 0: not wanted.
void point_conv_backward(uintptr_t grad, uintptr_t out, uintptr_t features, uintptr_t neighbors, uintptr_t weights,
                         uintptr_t linear_weight, uintptr_t grad_features, uintptr_t grad_weights,
                         uintptr_t grad_linear_weight, uintptr_t grad_linear_bias, Numbers7 sizes, bool shared,
                         float slope, int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::point_conv_backward(
      at<const float>(grad), at<const float>(out),
      {at<const float>(features), at<const int64_t>(neighbors), at<const float>(weights),
       at<const float>(linear_weight), nullptr},
      {at<float>(grad_features), at<float>(grad_weights), at<float>(grad_linear_weight), at<float>(grad_linear_bias)},
      point_conv_sizes(sizes, shared), slope, threads, chosen);
}

void neighbor_mean(uintptr_t source, uintptr_t neighbors, uintptr_t out, Numbers7 sizes, bool shared, bool backward,
                   int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  (backward ? vamoh::neighbor_mean_backward : vamoh::neighbor_mean)(at<const float>(source),
                                                                    at<const int64_t>(neighbors), at<float>(out),
                                                                    point_conv_sizes(sizes, shared), threads, chosen);
}

using Numbers5 = std::array<int64_t, 5>;

vamoh::DifferenceSizes difference_sizes(const Numbers5& s, bool table_shared, bool index_shared) {
  return {s[0], s[1], s[2], s[3], s[4], table_shared, index_shared};
}

void neighbor_difference(uintptr_t table, uintptr_t neighbors, uintptr_t centroids, uintptr_t bias, uintptr_t out,
                         Numbers5 sizes, bool table_shared, bool index_shared, int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::neighbor_difference(at<const float>(table), at<const int64_t>(neighbors), at<const int64_t>(centroids),
                             at<const float>(bias), at<float>(out), difference_sizes(sizes, table_shared, index_shared),
                             threads, chosen);
}

void neighbor_difference_backward(uintptr_t grad, uintptr_t neighbors, uintptr_t centroids, uintptr_t grad_table,
                                  uintptr_t grad_bias, Numbers5 sizes, bool table_shared, bool index_shared,
                                  int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::neighbor_difference_backward(at<const float>(grad), at<const int64_t>(neighbors), at<const int64_t>(centroids),
                                      at<float>(grad_table), at<float>(grad_bias),
                                      difference_sizes(sizes, table_shared, index_shared), threads, chosen);
}

}  // namespace

void bind_point_conv(py::module_& m) {
  m.def("point_conv", &point_conv, py::kw_only(), py::arg("features"), py::arg("neighbors"), py::arg("weights"),
        py::arg("linear_weight"), py::arg("linear_bias"), py::arg("out"), py::arg("sizes"), py::arg("shared"),
        py::arg("slope"), py::arg("threads"), py::arg("isa"));
  m.def("point_conv_backward", &point_conv_backward, py::kw_only(), py::arg("grad"), py::arg("out"),
        py::arg("features"), py::arg("neighbors"), py::arg("weights"), py::arg("linear_weight"),
        py::arg("grad_features"), py::arg("grad_weights"), py::arg("grad_linear_weight"), py::arg("grad_linear_bias"),
        py::arg("sizes"), py::arg("shared"), py::arg("slope"), py::arg("threads"), py::arg("isa"));
  m.def("neighbor_mean", &neighbor_mean, py::kw_only(), py::arg("source"), py::arg("neighbors"), py::arg("out"),
        py::arg("sizes"), py::arg("shared"), py::arg("backward"), py::arg("threads"), py::arg("isa"));
  m.def("neighbor_difference", &neighbor_difference, py::kw_only(), py::arg("table"), py::arg("neighbors"),
        py::arg("centroids"), py::arg("bias"), py::arg("out"), py::arg("sizes"), py::arg("table_shared"),
        py::arg("index_shared"), py::arg("threads"), py::arg("isa"));
  m.def("neighbor_difference_backward", &neighbor_difference_backward, py::kw_only(), py::arg("grad"),
        py::arg("neighbors"), py::arg("centroids"), py::arg("grad_table"), py::arg("grad_bias"), py::arg("sizes"),
        py::arg("table_shared"), py::arg("index_shared"), py::arg("threads"), py::arg("isa"));
}
