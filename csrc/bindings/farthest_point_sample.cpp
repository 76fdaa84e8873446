#include "../farthest_point_sample.h"

#include <cstdint>
#include <string>

#include "binding.h"

namespace {

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

void farthest_point_sample_by_table(uintptr_t coords, int64_t coords_step, uintptr_t table, int64_t table_size,
                                    uintptr_t mask, int64_t mask_step, uintptr_t out, int64_t batch, int64_t points,
                                    int64_t samples, bool is_double, int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  const auto run = [&](auto* typed_table) {
    vamoh::farthest_point_sample_by_table(at<const int64_t>(coords), coords_step, typed_table, table_size,
                                          at<const bool>(mask), mask_step, at<int64_t>(out), batch, points, samples,
                                          threads, chosen);
  };
  is_double ? run(at<const double>(table)) : run(at<const float>(table));
}

}  // namespace

void bind_farthest_point_sample(py::module_& m) {
  m.def("farthest_point_sample", &farthest_point_sample, py::kw_only(), py::arg("coords"), py::arg("coords_step"),
        py::arg("mask"), py::arg("mask_step"), py::arg("out"), py::arg("batch"), py::arg("points"), py::arg("dims"),
        py::arg("samples"), py::arg("is_double"), py::arg("threads"), py::arg("isa"));
  m.def("farthest_point_sample_by_table", &farthest_point_sample_by_table, py::kw_only(), py::arg("coords"),
        py::arg("coords_step"), py::arg("table"), py::arg("table_size"), py::arg("mask"), py::arg("mask_step"),
        py::arg("out"), py::arg("batch"), py::arg("points"), py::arg("samples"), py::arg("is_double"),
        py::arg("threads"), py::arg("isa"));
}
