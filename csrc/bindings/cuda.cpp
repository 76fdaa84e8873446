// The CUDA functions of all ops. Each returns the bytes of workspace it needs; with workspace 0 it does nothing else.
#include "../cuda.h"

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../farthest_point_sample.h"
#include "../knn.h"
#include "../point_conv.h"
#include "binding.h"

namespace {

std::string explained(int error) {
  return std::string(vamoh::cuda_error_text(error)) + " (" + vamoh::cuda_error_name(error) + ")";
}

// Calls launch(run) and turns its error code into a RuntimeError.
template <class Launch>
int64_t launched(const char* op, uintptr_t workspace, uintptr_t stream, const Launch& launch) {
  vamoh::CudaRun run{at<void>(workspace), 0, at<void>(stream)};
  const py::gil_scoped_release unlocked;
  const int error = launch(run);
  if (error != 0)
    throw std::runtime_error(std::string(op) + ": CUDA kernel could not be launched: " + explained(error));
  return run.bytes;
}

int64_t farthest_point_sample(uintptr_t coords, int64_t coords_step, uintptr_t mask, int64_t mask_step, uintptr_t out,
                              int64_t batch, int64_t points, int64_t dims, int64_t samples, bool is_double,
                              uintptr_t workspace, uintptr_t stream) {
  return launched("farthest_point_sample", workspace, stream, [&](vamoh::CudaRun& run) {
    const auto typed = [&](auto* typed_coords) {
      return vamoh::farthest_point_sample_cuda(typed_coords, coords_step, at<const bool>(mask), mask_step,
                                               at<int64_t>(out), batch, points, dims, samples, run);
    };
    return is_double ? typed(at<const double>(coords)) : typed(at<const float>(coords));
  });
}

int64_t farthest_point_sample_by_table(uintptr_t coords, int64_t coords_step, uintptr_t table, int64_t table_size,
                                       uintptr_t mask, int64_t mask_step, uintptr_t out, int64_t batch, int64_t points,
                                       int64_t samples, bool is_double, uintptr_t workspace, uintptr_t stream) {
  return launched("farthest_point_sample", workspace, stream, [&](vamoh::CudaRun& run) {
    const auto typed = [&](auto* typed_table) {
      return vamoh::farthest_point_sample_by_table_cuda(at<const int64_t>(coords), coords_step, typed_table, table_size,
                                                        at<const bool>(mask), mask_step, at<int64_t>(out), batch,
                                                        points, samples, run);
    };
    return is_double ? typed(at<const double>(table)) : typed(at<const float>(table));
  });
}

int64_t knn(uintptr_t points, int64_t points_step, uintptr_t queries, int64_t queries_step, uintptr_t mask,
            int64_t mask_step, uintptr_t out, int64_t batch, int64_t count, int64_t num_queries, int64_t dims,
            int64_t neighbors, bool is_double, uintptr_t workspace, uintptr_t stream) {
  return launched("knn", workspace, stream, [&](vamoh::CudaRun& run) {
    const auto typed = [&](auto* typed_points, auto* typed_queries) {
      return vamoh::knn_cuda(typed_points, points_step, typed_queries, queries_step, at<const bool>(mask), mask_step,
                             at<int64_t>(out), batch, count, num_queries, dims, neighbors, run);
    };
    return is_double ? typed(at<const double>(points), at<const double>(queries))
                     : typed(at<const float>(points), at<const float>(queries));
  });
}

int64_t knn_by_table(uintptr_t points, int64_t points_step, uintptr_t queries, int64_t queries_step, uintptr_t table,
                     int64_t table_size, uintptr_t mask, int64_t mask_step, uintptr_t out, int64_t batch, int64_t count,
                     int64_t num_queries, int64_t neighbors, bool is_double, uintptr_t workspace, uintptr_t stream) {
  return launched("knn", workspace, stream, [&](vamoh::CudaRun& run) {
    const auto typed = [&](auto* typed_table) {
      return vamoh::knn_by_table_cuda(at<const int64_t>(points), points_step, at<const int64_t>(queries), queries_step,
                                      typed_table, table_size, at<const bool>(mask), mask_step, at<int64_t>(out), batch,
                                      count, num_queries, neighbors, run);
    };
    return is_double ? typed(at<const double>(table)) : typed(at<const float>(table));
  });
}

using Numbers7 = std::array<int64_t, 7>;

vamoh::PointConvSizes point_conv_sizes(const Numbers7& s, bool shared) {
  return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], shared};
}

int64_t point_conv(uintptr_t features, uintptr_t neighbors, uintptr_t weights, uintptr_t linear_weight,
                   uintptr_t linear_bias, uintptr_t out, Numbers7 sizes, bool shared, float slope, uintptr_t workspace,
                   uintptr_t stream) {
  return launched("point_conv", workspace, stream, [&](vamoh::CudaRun& run) {
    return vamoh::point_conv_cuda({at<const float>(features), at<const int64_t>(neighbors), at<const float>(weights),
                                   at<const float>(linear_weight), at<const float>(linear_bias)},
                                  at<float>(out), point_conv_sizes(sizes, shared), slope, run);
  });
}

// grad_features 0: not wanted.
int64_t point_conv_backward(uintptr_t grad, uintptr_t out, uintptr_t features, uintptr_t neighbors, uintptr_t weights,
                            uintptr_t linear_weight, uintptr_t grad_features, uintptr_t grad_weights,
                            uintptr_t grad_linear_weight, uintptr_t grad_linear_bias, Numbers7 sizes, bool shared,
                            float slope, uintptr_t workspace, uintptr_t stream) {
  return launched("point_conv_backward", workspace, stream, [&](vamoh::CudaRun& run) {
    return vamoh::point_conv_backward_cuda(
        at<const float>(grad), at<const float>(out),
        {at<const float>(features), at<const int64_t>(neighbors), at<const float>(weights),
         at<const float>(linear_weight), nullptr},
        {at<float>(grad_features), at<float>(grad_weights), at<float>(grad_linear_weight), at<float>(grad_linear_bias)},
        point_conv_sizes(sizes, shared), slope, run);
  });
}

int64_t neighbor_mean(uintptr_t source, uintptr_t neighbors, uintptr_t out, Numbers7 sizes, bool shared, bool backward,
                      uintptr_t workspace, uintptr_t stream) {
  return launched("neighbor_mean", workspace, stream, [&](vamoh::CudaRun& run) {
    return (backward ? vamoh::neighbor_mean_backward_cuda : vamoh::neighbor_mean_cuda)(
        at<const float>(source), at<const int64_t>(neighbors), at<float>(out), point_conv_sizes(sizes, shared), run);
  });
}

using Numbers5 = std::array<int64_t, 5>;

vamoh::DifferenceSizes difference_sizes(const Numbers5& s, bool table_shared, bool index_shared) {
  return {s[0], s[1], s[2], s[3], s[4], table_shared, index_shared};
}

int64_t neighbor_difference(uintptr_t table, uintptr_t neighbors, uintptr_t centroids, uintptr_t bias, uintptr_t out,
                            Numbers5 sizes, bool table_shared, bool index_shared, uintptr_t workspace,
                            uintptr_t stream) {
  return launched("neighbor_difference", workspace, stream, [&](vamoh::CudaRun& run) {
    return vamoh::neighbor_difference_cuda(at<const float>(table), at<const int64_t>(neighbors),
                                           at<const int64_t>(centroids), at<const float>(bias), at<float>(out),
                                           difference_sizes(sizes, table_shared, index_shared), run);
  });
}

int64_t neighbor_difference_backward(uintptr_t grad, uintptr_t neighbors, uintptr_t centroids, uintptr_t grad_table,
                                     uintptr_t grad_bias, Numbers5 sizes, bool table_shared, bool index_shared,
                                     uintptr_t workspace, uintptr_t stream) {
  return launched("neighbor_difference_backward", workspace, stream, [&](vamoh::CudaRun& run) {
    return vamoh::neighbor_difference_backward_cuda(
        at<const float>(grad), at<const int64_t>(neighbors), at<const int64_t>(centroids), at<float>(grad_table),
        at<float>(grad_bias), difference_sizes(sizes, table_shared, index_shared), run);
  });
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_problem", [] {
    const int error = vamoh::cuda_devices();
    return error == 0 ? std::string() : explained(error);
  });
  m.def("farthest_point_sample_cuda", &farthest_point_sample, py::kw_only(), py::arg("coords"), py::arg("coords_step"),
        py::arg("mask"), py::arg("mask_step"), py::arg("out"), py::arg("batch"), py::arg("points"), py::arg("dims"),
        py::arg("samples"), py::arg("is_double"), py::arg("workspace"), py::arg("stream"));
  m.def("farthest_point_sample_by_table_cuda", &farthest_point_sample_by_table, py::kw_only(), py::arg("coords"),
        py::arg("coords_step"), py::arg("table"), py::arg("table_size"), py::arg("mask"), py::arg("mask_step"),
        py::arg("out"), py::arg("batch"), py::arg("points"), py::arg("samples"), py::arg("is_double"),
        py::arg("workspace"), py::arg("stream"));
  m.def("knn_by_table_cuda", &knn_by_table, py::kw_only(), py::arg("points"), py::arg("points_step"),
        py::arg("queries"), py::arg("queries_step"), py::arg("table"), py::arg("table_size"), py::arg("mask"),
        py::arg("mask_step"), py::arg("out"), py::arg("batch"), py::arg("count"), py::arg("num_queries"),
        py::arg("neighbors"), py::arg("is_double"), py::arg("workspace"), py::arg("stream"));
  m.def("knn_cuda", &knn, py::kw_only(), py::arg("points"), py::arg("points_step"), py::arg("queries"),
        py::arg("queries_step"), py::arg("mask"), py::arg("mask_step"), py::arg("out"), py::arg("batch"),
        py::arg("count"), py::arg("num_queries"), py::arg("dims"), py::arg("neighbors"), py::arg("is_double"),
        py::arg("workspace"), py::arg("stream"));
  m.def("point_conv_cuda", &point_conv, py::kw_only(), py::arg("features"), py::arg("neighbors"), py::arg("weights"),
        py::arg("linear_weight"), py::arg("linear_bias"), py::arg("out"), py::arg("sizes"), py::arg("shared"),
        py::arg("slope"), py::arg("workspace"), py::arg("stream"));
  m.def("point_conv_backward_cuda", &point_conv_backward, py::kw_only(), py::arg("grad"), py::arg("out"),
        py::arg("features"), py::arg("neighbors"), py::arg("weights"), py::arg("linear_weight"),
        py::arg("grad_features"), py::arg("grad_weights"), py::arg("grad_linear_weight"), py::arg("grad_linear_bias"),
        py::arg("sizes"), py::arg("shared"), py::arg("slope"), py::arg("workspace"), py::arg("stream"));
  m.def("neighbor_mean_cuda", &neighbor_mean, py::kw_only(), py::arg("source"), py::arg("neighbors"), py::arg("out"),
        py::arg("sizes"), py::arg("shared"), py::arg("backward"), py::arg("workspace"), py::arg("stream"));
  m.def("neighbor_difference_cuda", &neighbor_difference, py::kw_only(), py::arg("table"), py::arg("neighbors"),
        py::arg("centroids"), py::arg("bias"), py::arg("out"), py::arg("sizes"), py::arg("table_shared"),
        py::arg("index_shared"), py::arg("workspace"), py::arg("stream"));
  m.def("neighbor_difference_backward_cuda", &neighbor_difference_backward, py::kw_only(), py::arg("grad"),
        py::arg("neighbors"), py::arg("centroids"), py::arg("grad_table"), py::arg("grad_bias"), py::arg("sizes"),
        py::arg("table_shared"), py::arg("index_shared"), py::arg("workspace"), py::arg("stream"));
}
