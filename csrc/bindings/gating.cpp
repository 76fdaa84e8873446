#include "../gating.h"

#include <cstdint>
#include <vector>

#include "binding.h"

template <>
struct Passed<const vamoh::GatingNet&>
    : Fields<vamoh::GatingNet, const float*, bool, const float*, const float*, const float*, std::vector<int64_t>,
             int64_t, int64_t, int64_t, float, bool> {};

template <>
struct Passed<const vamoh::GatingGrads&> : Fields<vamoh::GatingGrads, float*, float*, float*, float*> {};

void bind_gating(py::module_& m) {
  m.def("gating", native(&vamoh::gating), py::kw_only(), "net"_a, "log_p"_a, "threads"_a, "isa"_a);
  m.def("gating_backward", native(&vamoh::gating_backward), py::kw_only(), "net"_a, "log_p"_a, "grad"_a, "grads"_a,
        "threads"_a, "isa"_a);
  m.def("categorical_kl", native(&vamoh::categorical_kl), py::kw_only(), "log_q"_a, "log_p"_a, "uniform"_a, "mask"_a,
        "mask_stride"_a, "q"_a, "kl"_a, "batch"_a, "components"_a, "count"_a, "threads"_a, "isa"_a);
  m.def("categorical_kl_backward", native(&vamoh::categorical_kl_backward), py::kw_only(), "grad_q"_a, "grad_kl"_a,
        "q"_a, "log_q"_a, "log_p"_a, "uniform"_a, "grad_log_q"_a, "grad_log_p"_a, "batch"_a, "components"_a, "count"_a,
        "threads"_a, "isa"_a);
}
