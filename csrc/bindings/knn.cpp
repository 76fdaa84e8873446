#include "../knn.h"

#include <cstdint>
#include <string>

#include "binding.h"

namespace {

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

void knn_by_table(uintptr_t points, int64_t points_step, uintptr_t queries, int64_t queries_step, uintptr_t table,
                  int64_t table_size, uintptr_t order, int64_t length, uintptr_t mask, int64_t mask_step, uintptr_t out,
                  int64_t batch, int64_t count, int64_t num_queries, int64_t neighbors, bool is_double, int threads,
                  const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  const auto run = [&](auto* typed_table) {
    vamoh::knn_by_table(at<const int64_t>(points), points_step, at<const int64_t>(queries), queries_step, typed_table,
                        table_size, at<const int32_t>(order), length, at<const bool>(mask), mask_step, at<int64_t>(out),
                        batch, count, num_queries, neighbors, threads, chosen);
  };
  is_double ? run(at<const double>(table)) : run(at<const float>(table));
}

}  // namespace

void bind_knn(py::module_& m) {
  m.def("knn", &knn, py::kw_only(), py::arg("points"), py::arg("points_step"), py::arg("queries"),
        py::arg("queries_step"), py::arg("mask"), py::arg("mask_step"), py::arg("out"), py::arg("batch"),
        py::arg("count"), py::arg("num_queries"), py::arg("dims"), py::arg("neighbors"), py::arg("is_double"),
        py::arg("threads"), py::arg("isa"));
  m.def("knn_by_table", &knn_by_table, py::kw_only(), py::arg("points"), py::arg("points_step"), py::arg("queries"),
        py::arg("queries_step"), py::arg("table"), py::arg("table_size"), py::arg("order"), py::arg("length"),
        py::arg("mask"), py::arg("mask_step"), py::arg("out"), py::arg("batch"), py::arg("count"),
        py::arg("num_queries"), py::arg("neighbors"), py::arg("is_double"), py::arg("threads"), py::arg("isa"));
}
