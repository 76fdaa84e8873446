// The Python module vamoh._native: raw addresses, sizes and a thread count; no torch, no checks of user input.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>

#include "farthest_point_sample.h"
#include "isa.h"
#include "knn.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void farthest_point_sample(uintptr_t coords, int64_t coords_step, uintptr_t mask, int64_t mask_step, uintptr_t out,
                           int64_t batch, int64_t points, int64_t dims, int64_t samples, bool is_double, int threads,
                           const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  const auto run = [&](auto* typed_coords) {
    vamoh::farthest_point_sample(typed_coords, coords_step, at<const bool>(mask), mask_step, at<int64_t>(out), batch,
                                 points, dims, samples, threads, chosen);
  };
  is_double ? run(at<const double>(coords)) : run(at<const float>(coords));
}

void knn(uintptr_t points, int64_t points_step, uintptr_t queries, int64_t queries_step, uintptr_t mask,
         int64_t mask_step, uintptr_t out, int64_t batch, int64_t count, int64_t num_queries, int64_t dims,
         int64_t neighbors, bool is_double, int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  const auto run = [&](auto* typed_points, auto* typed_queries) {
    vamoh::knn(typed_points, points_step, typed_queries, queries_step, at<const bool>(mask), mask_step,
               at<int64_t>(out), batch, count, num_queries, dims, neighbors, threads, chosen);
  };
  is_double ? run(at<const double>(points), at<const double>(queries))
            : run(at<const float>(points), at<const float>(queries));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.attr("version") = VAMOH_VERSION;
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  m.attr("flags") = VAMOH_FLAGS;
  m.def("supported_isas", &vamoh::supported_isas);
  m.def("farthest_point_sample", &farthest_point_sample, py::kw_only(), py::arg("coords"), py::arg("coords_step"),
        py::arg("mask"), py::arg("mask_step"), py::arg("out"), py::arg("batch"), py::arg("points"), py::arg("dims"),
        py::arg("samples"), py::arg("is_double"), py::arg("threads"), py::arg("isa"));
  m.def("knn", &knn, py::kw_only(), py::arg("points"), py::arg("points_step"), py::arg("queries"),
        py::arg("queries_step"), py::arg("mask"), py::arg("mask_step"), py::arg("out"), py::arg("batch"),
        py::arg("count"), py::arg("num_queries"), py::arg("dims"), py::arg("neighbors"), py::arg("is_double"),
        py::arg("threads"), py::arg("isa"));
}
