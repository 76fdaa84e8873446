#include "../planar_flow.h"

#include <cstdint>

#include "binding.h"

// A seed is an int64 of torch.
template <>
struct Passed<uint64_t> {
  using type = int64_t;
  static uint64_t get(int64_t seed) { return static_cast<uint64_t>(seed); }
};

template <>
struct Passed<const vamoh::PlanarFlow&> : Fields<vamoh::PlanarFlow, const float*, const float*, const float*,
                                                 const float*, const float*, const float*, int64_t, int64_t, float> {};

template <>
struct Passed<const vamoh::PlanarFlowGradient&>
    : Fields<vamoh::PlanarFlowGradient, float*, float*, float*, float*, float*, float*> {};

void bind_planar_flow(py::module_& m) {
  m.def("planar_flow_log_prob", native(&vamoh::planar_flow_log_prob), py::kw_only(), "flow"_a, "z"_a, "out"_a,
        "samples"_a, "threads"_a, "isa"_a);
  m.def("planar_flow_log_prob_backward", native(&vamoh::planar_flow_log_prob_backward), py::kw_only(), "flow"_a, "z"_a,
        "grad"_a, "grad_z"_a, "gradient"_a, "samples"_a, "threads"_a, "isa"_a);
  m.def("planar_flow_sample", native(&vamoh::planar_flow_sample), py::kw_only(), "flow"_a, "noise"_a, "z"_a, "log_p"_a,
        "samples"_a, "threads"_a, "isa"_a);
  m.def("planar_flow_expected_log_prob", native(&vamoh::planar_flow_expected_log_prob), py::kw_only(), "flow"_a,
        "mean"_a, "std"_a, "noise"_a, "seed"_a, "value"_a, "grad_mean"_a, "grad_std"_a, "gradient"_a, "batch"_a,
        "samples"_a, "threads"_a, "isa"_a);
  m.def("counter_noise", native(&vamoh::counter_noise), py::kw_only(), "seed"_a, "out"_a, "samples"_a, "batch"_a,
        "latent"_a, "isa"_a);
}
