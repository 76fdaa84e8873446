#include "../planar_flow.h"

#include <array>
#include <cstdint>
#include <string>

#include "binding.h"

namespace {

// u, gain, w, b, loc, log_scale
using Addresses = std::array<uintptr_t, 6>;

vamoh::PlanarFlow planar_flow(const Addresses& a, int64_t layers, int64_t latent, float slope) {
  return {at<const float>(a[0]),
          at<const float>(a[1]),
          at<const float>(a[2]),
          at<const float>(a[3]),
          at<const float>(a[4]),
          at<const float>(a[5]),
          layers,
          latent,
          slope};
}

vamoh::PlanarFlowGradient planar_flow_gradient(const Addresses& a) {
  return {at<float>(a[0]), at<float>(a[1]), at<float>(a[2]), at<float>(a[3]), at<float>(a[4]), at<float>(a[5])};
}

void planar_flow_log_prob(const Addresses& flow, uintptr_t z, uintptr_t out, int64_t samples, int64_t layers,
                          int64_t latent, float slope, int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::planar_flow_log_prob(planar_flow(flow, layers, latent, slope), at<const float>(z), at<float>(out), samples,
                              threads, chosen);
}

void planar_flow_log_prob_backward(const Addresses& flow, uintptr_t z, uintptr_t grad, uintptr_t grad_z,
                                   const Addresses& gradient, int64_t samples, int64_t layers, int64_t latent,
                                   float slope, int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::planar_flow_log_prob_backward(planar_flow(flow, layers, latent, slope), at<const float>(z),
                                       at<const float>(grad), at<float>(grad_z), planar_flow_gradient(gradient),
                                       samples, threads, chosen);
}

void planar_flow_sample(const Addresses& flow, uintptr_t noise, uintptr_t z, uintptr_t log_p, int64_t samples,
                        int64_t layers, int64_t latent, float slope, int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::planar_flow_sample(planar_flow(flow, layers, latent, slope), at<const float>(noise), at<float>(z),
                            at<float>(log_p), samples, threads, chosen);
}

void planar_flow_expected_log_prob(const Addresses& flow, uintptr_t mean, uintptr_t std, uintptr_t noise, int64_t seed,
                                   uintptr_t value, uintptr_t grad_mean, uintptr_t grad_std, const Addresses& gradient,
                                   int64_t batch, int64_t samples, int64_t layers, int64_t latent, float slope,
                                   int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::planar_flow_expected_log_prob(planar_flow(flow, layers, latent, slope), at<const float>(mean),
                                       at<const float>(std), at<const float>(noise), static_cast<uint64_t>(seed),
                                       at<float>(value), at<float>(grad_mean), at<float>(grad_std),
                                       planar_flow_gradient(gradient), batch, samples, threads, chosen);
}

void counter_noise(int64_t seed, uintptr_t out, int64_t samples, int64_t batch, int64_t latent,
                   const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::counter_noise(static_cast<uint64_t>(seed), at<float>(out), samples, batch, latent, chosen);
}

}  // namespace

void bind_planar_flow(py::module_& m) {
  m.def("planar_flow_log_prob", &planar_flow_log_prob, py::kw_only(), py::arg("flow"), py::arg("z"), py::arg("out"),
        py::arg("samples"), py::arg("layers"), py::arg("latent"), py::arg("slope"), py::arg("threads"), py::arg("isa"));
  m.def("planar_flow_log_prob_backward", &planar_flow_log_prob_backward, py::kw_only(), py::arg("flow"), py::arg("z"),
        py::arg("grad"), py::arg("grad_z"), py::arg("gradient"), py::arg("samples"), py::arg("layers"),
        py::arg("latent"), py::arg("slope"), py::arg("threads"), py::arg("isa"));
  m.def("planar_flow_sample", &planar_flow_sample, py::kw_only(), py::arg("flow"), py::arg("noise"), py::arg("z"),
        py::arg("log_p"), py::arg("samples"), py::arg("layers"), py::arg("latent"), py::arg("slope"),
        py::arg("threads"), py::arg("isa"));
  m.def("planar_flow_expected_log_prob", &planar_flow_expected_log_prob, py::kw_only(), py::arg("flow"),
        py::arg("mean"), py::arg("std"), py::arg("noise"), py::arg("seed"), py::arg("value"), py::arg("grad_mean"),
        py::arg("grad_std"), py::arg("gradient"), py::arg("batch"), py::arg("samples"), py::arg("layers"),
        py::arg("latent"), py::arg("slope"), py::arg("threads"), py::arg("isa"));
  m.def("counter_noise", &counter_noise, py::kw_only(), py::arg("seed"), py::arg("out"), py::arg("samples"),
        py::arg("batch"), py::arg("latent"), py::arg("isa"));
}
