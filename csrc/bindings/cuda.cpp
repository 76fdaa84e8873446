// The CUDA functions of all ops. Each returns the bytes of workspace it needs; with workspace 0 it does nothing else.
#include "../cuda.h"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "../farthest_point_sample.h"
#include "../knn.h"
#include "cloud.h"
#include "point_conv.h"

template <>
struct Passed<vamoh::CudaRun&> {
  using type = std::tuple<Memory, Memory>;  // workspace and stream
};

namespace {

std::string explained(int error) {
  return std::string(vamoh::cuda_error_text(error)) + " (" + vamoh::cuda_error_name(error) + ")";
}

template <class A>
decltype(auto) launch_argument(const passed<A>& argument, vamoh::CudaRun& run) {
  if constexpr (std::is_same_v<A, vamoh::CudaRun&>) {
    run.workspace = Passed<void*>::get(std::get<0>(argument));
    run.stream = Passed<void*>::get(std::get<1>(argument));
    return (run);
  } else {
    return Passed<A>::get(argument);
  }
}

template <class... A>
auto native_cuda(const char* op, int (*launch)(A...)) {
  return [op, launch](passed<A>... arguments) {
    vamoh::CudaRun run{nullptr, 0, nullptr};
    const py::gil_scoped_release unlocked;
    const int error = launch(launch_argument<A>(arguments, run)...);
    if (error != 0)
      throw std::runtime_error(std::string(op) + ": CUDA kernel could not be launched: " + explained(error));
    return run.bytes;
  };
}

template <class T>
void bind_indices(py::module_& m, const std::string& dtype) {
  m.def(("farthest_point_sample_" + dtype + "_cuda").c_str(),
        native_cuda("farthest_point_sample", &vamoh::farthest_point_sample_cuda<T>), py::kw_only(), "cloud"_a, "mask"_a,
        "out"_a, "batch"_a, "samples"_a, "run"_a);
  m.def(("farthest_point_sample_by_table_" + dtype + "_cuda").c_str(),
        native_cuda("farthest_point_sample", &vamoh::farthest_point_sample_by_table_cuda<T>), py::kw_only(), "cloud"_a,
        "table"_a, "mask"_a, "out"_a, "batch"_a, "samples"_a, "run"_a);
  m.def(("knn_" + dtype + "_cuda").c_str(), native_cuda("knn", &vamoh::knn_cuda<T>), py::kw_only(), "points"_a,
        "queries"_a, "mask"_a, "out"_a, "batch"_a, "neighbors"_a, "run"_a);
  m.def(("knn_by_table_" + dtype + "_cuda").c_str(), native_cuda("knn", &vamoh::knn_by_table_cuda<T>), py::kw_only(),
        "points"_a, "queries"_a, "table"_a, "mask"_a, "out"_a, "batch"_a, "neighbors"_a, "run"_a);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_problem", [] {
    const int error = vamoh::cuda_devices();
    return error == 0 ? std::string() : explained(error);
  });
  bind_indices<float>(m, "float32");
  bind_indices<double>(m, "float64");
  m.def("point_conv_cuda", native_cuda("point_conv", &vamoh::point_conv_cuda), py::kw_only(), "inputs"_a, "out"_a,
        "sizes"_a, "slope"_a, "run"_a);
  m.def("point_conv_backward_cuda", native_cuda("point_conv_backward", &vamoh::point_conv_backward_cuda), py::kw_only(),
        "grad"_a, "out"_a, "inputs"_a, "gradients"_a, "sizes"_a, "slope"_a, "run"_a);
  m.def("neighbor_difference_cuda", native_cuda("neighbor_difference", &vamoh::neighbor_difference_cuda), py::kw_only(),
        "table"_a, "neighbors"_a, "centroids"_a, "bias"_a, "out"_a, "sizes"_a, "run"_a);
  m.def("neighbor_difference_backward_cuda",
        native_cuda("neighbor_difference_backward", &vamoh::neighbor_difference_backward_cuda), py::kw_only(), "grad"_a,
        "neighbors"_a, "centroids"_a, "grad_table"_a, "grad_bias"_a, "sizes"_a, "run"_a);
}
