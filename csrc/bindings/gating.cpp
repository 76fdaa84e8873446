#include "../gating.h"

#include <cstdint>
#include <string>
#include <vector>

#include "binding.h"

namespace {

template <class T>
std::vector<T*> all_at(const std::vector<uintptr_t>& addresses) {
  std::vector<T*> all;
  for (uintptr_t address : addresses) all.push_back(at<T>(address));
  return all;
}

void gating_coords(uintptr_t encoded, const std::vector<uintptr_t>& weights, const std::vector<uintptr_t>& parts,
                   const std::vector<int64_t>& hidden, int64_t batch, int64_t count, int64_t inputs, int threads,
                   const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::gating_coords(at<const float>(encoded), all_at<const float>(weights), all_at<float>(parts), hidden, batch,
                       count, inputs, threads, chosen);
}

void gating_coords_backward(uintptr_t encoded, const std::vector<uintptr_t>& grads,
                            const std::vector<uintptr_t>& grad_weights, const std::vector<int64_t>& hidden,
                            int64_t batch, int64_t count, int64_t inputs, int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::gating_coords_backward(at<const float>(encoded), all_at<const float>(grads), all_at<float>(grad_weights),
                                hidden, batch, count, inputs, threads, chosen);
}

vamoh::GatingNet gating_net(uintptr_t coords, bool shared, uintptr_t shift, uintptr_t values, uintptr_t parameters,
                            const std::vector<int64_t>& widths, int64_t batch, int64_t count, int64_t channels,
                            float slope, bool bounded) {
  return {at<const float>(coords),
          shared,
          at<const float>(shift),
          at<const float>(values),
          at<const float>(parameters),
          widths,
          batch,
          count,
          channels,
          slope,
          bounded};
}

void gating(const vamoh::GatingNet& net, uintptr_t log_p, int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::gating(net, at<float>(log_p), threads, chosen);
}

void gating_backward(const vamoh::GatingNet& net, uintptr_t log_p, uintptr_t grad, uintptr_t grad_coords,
                     uintptr_t grad_shift, uintptr_t grad_values, uintptr_t grad_parameters, int threads,
                     const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::gating_backward(
      net, at<const float>(log_p), at<const float>(grad),
      {at<float>(grad_coords), at<float>(grad_shift), at<float>(grad_values), at<float>(grad_parameters)}, threads,
      chosen);
}

void categorical_kl(uintptr_t log_q, uintptr_t log_p, bool uniform, uintptr_t mask, int64_t mask_step, uintptr_t q,
                    uintptr_t kl, int64_t batch, int64_t components, int64_t count, int threads,
                    const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::categorical_kl(at<const float>(log_q), at<const float>(log_p), uniform, at<const bool>(mask), mask_step,
                        at<float>(q), at<float>(kl), batch, components, count, threads, chosen);
}

void categorical_kl_backward(uintptr_t grad_q, uintptr_t grad_kl, uintptr_t q, uintptr_t log_q, uintptr_t log_p,
                             bool uniform, uintptr_t grad_log_q, uintptr_t grad_log_p, int64_t batch,
                             int64_t components, int64_t count, int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::categorical_kl_backward(at<const float>(grad_q), at<const float>(grad_kl), at<const float>(q),
                                 at<const float>(log_q), at<const float>(log_p), uniform, at<float>(grad_log_q),
                                 at<float>(grad_log_p), batch, components, count, threads, chosen);
}

}  // namespace

void bind_gating(py::module_& m) {
  m.def("gating_coords", &gating_coords, py::kw_only(), py::arg("encoded"), py::arg("weights"), py::arg("parts"),
        py::arg("hidden"), py::arg("batch"), py::arg("count"), py::arg("inputs"), py::arg("threads"), py::arg("isa"));
  m.def("gating_coords_backward", &gating_coords_backward, py::kw_only(), py::arg("encoded"), py::arg("grads"),
        py::arg("grad_weights"), py::arg("hidden"), py::arg("batch"), py::arg("count"), py::arg("inputs"),
        py::arg("threads"), py::arg("isa"));
  py::class_<vamoh::GatingNet>(m, "GatingNet")
      .def(py::init(&gating_net), py::kw_only(), py::arg("coords"), py::arg("shared"), py::arg("shift"),
           py::arg("values"), py::arg("parameters"), py::arg("widths"), py::arg("batch"), py::arg("count"),
           py::arg("channels"), py::arg("slope"), py::arg("bounded"));
  m.def("gating", &gating, py::kw_only(), py::arg("net"), py::arg("log_p"), py::arg("threads"), py::arg("isa"));
  m.def("gating_backward", &gating_backward, py::kw_only(), py::arg("net"), py::arg("log_p"), py::arg("grad"),
        py::arg("grad_coords"), py::arg("grad_shift"), py::arg("grad_values"), py::arg("grad_parameters"),
        py::arg("threads"), py::arg("isa"));
  m.def("categorical_kl", &categorical_kl, py::kw_only(), py::arg("log_q"), py::arg("log_p"), py::arg("uniform"),
        py::arg("mask"), py::arg("mask_step"), py::arg("q"), py::arg("kl"), py::arg("batch"), py::arg("components"),
        py::arg("count"), py::arg("threads"), py::arg("isa"));
  m.def("categorical_kl_backward", &categorical_kl_backward, py::kw_only(), py::arg("grad_q"), py::arg("grad_kl"),
        py::arg("q"), py::arg("log_q"), py::arg("log_p"), py::arg("uniform"), py::arg("grad_log_q"),
        py::arg("grad_log_p"), py::arg("batch"), py::arg("components"), py::arg("count"), py::arg("threads"),
        py::arg("isa"));
}
