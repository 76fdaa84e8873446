#include "../inr_mixture.h"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "binding.h"

namespace {

struct InrMixture {
  std::vector<int64_t> widths;
  vamoh::InrMixture mixture;
};

void check_pairs(const int64_t* mirror, int64_t points) {
  for (int64_t n = 0; mirror && n < points; ++n)
    if (mirror[n] >= points || (mirror[n] >= 0 && mirror[mirror[n]] != n))
      throw std::invalid_argument("inr_mixture: mirror must hold -1 or pairs, mirror[mirror[n]] = n, of the N points");
}

InrMixture make_mixture(uintptr_t theta, int64_t theta_batch_step, int64_t theta_component_step, uintptr_t features,
                        int64_t features_step, uintptr_t mirror, uintptr_t mask, std::vector<int64_t> widths,
                        int64_t batch, int64_t components, int64_t points, bool sine, float slope, float omega) {
  check_pairs(at<const int64_t>(mirror), points);
  const auto depth = static_cast<int64_t>(widths.size()) - 1;
  return {
      std::move(widths),
      {at<const float>(theta), theta_batch_step, theta_component_step, at<const float>(features), features_step,
       at<const int64_t>(mirror), at<const bool>(mask), nullptr, depth, batch, components, points, sine, slope, omega}};
}

const vamoh::InrMixture& with_widths(InrMixture& arguments) {
  arguments.mixture.widths = arguments.widths.data();
  return arguments.mixture;
}

vamoh::PointLikelihood make_likelihood(const std::string& kind, double half_bin, double epsilon, bool open_ends,
                                       uintptr_t scale) {
  using Likelihood = vamoh::PointLikelihood;
  const Likelihood::Kind parsed = kind == "logistic"    ? Likelihood::logistic
                                  : kind == "bernoulli" ? Likelihood::bernoulli
                                                        : Likelihood::continuous_bernoulli;
  return {parsed, half_bin, epsilon, open_ends, at<const float>(scale)};
}

void inr_mixture(InrMixture mixture, uintptr_t outputs, int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::inr_mixture(with_widths(mixture), at<float>(outputs), threads, chosen);
}

void inr_mixture_backward(InrMixture mixture, uintptr_t grad_outputs, uintptr_t grad_theta, int threads,
                          const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::inr_mixture_backward(with_widths(mixture), at<const float>(grad_outputs), at<float>(grad_theta), threads,
                              chosen);
}

void inr_mixture_log_likelihood(InrMixture mixture, const vamoh::PointLikelihood& likelihood, uintptr_t values,
                                uintptr_t log_p, int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::inr_mixture_log_likelihood(with_widths(mixture), likelihood, at<const float>(values), at<float>(log_p),
                                    threads, chosen);
}

void inr_mixture_expected_log_likelihood(InrMixture mixture, const vamoh::PointLikelihood& likelihood, uintptr_t values,
                                         uintptr_t weights, uintptr_t value, uintptr_t log_p, uintptr_t grad_theta,
                                         uintptr_t grad_scale, int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::inr_mixture_expected_log_likelihood(with_widths(mixture), likelihood, at<const float>(values),
                                             at<const float>(weights), at<float>(value), at<float>(log_p),
                                             at<float>(grad_theta), at<float>(grad_scale), threads, chosen);
}

void inr_mixture_mean(InrMixture mixture, const vamoh::PointLikelihood& likelihood, uintptr_t log_pi, bool uniform,
                      uintptr_t mean, uintptr_t mean_map, int threads, const std::string& isa) {
  const vamoh::Isa chosen = vamoh::parse_isa(isa);
  const py::gil_scoped_release unlocked;
  vamoh::inr_mixture_mean(with_widths(mixture), likelihood, at<const float>(log_pi), uniform, at<float>(mean),
                          at<float>(mean_map), threads, chosen);
}

}  // namespace

void bind_inr_mixture(py::module_& m) {
  py::class_<InrMixture>(m, "InrMixture")
      .def(py::init(&make_mixture), py::kw_only(), py::arg("theta"), py::arg("theta_batch_step"),
           py::arg("theta_component_step"), py::arg("features"), py::arg("features_step"), py::arg("mirror"),
           py::arg("mask"), py::arg("widths"), py::arg("batch"), py::arg("components"), py::arg("points"),
           py::arg("sine"), py::arg("slope"), py::arg("omega"));
  py::class_<vamoh::PointLikelihood>(m, "PointLikelihood")
      .def(py::init(&make_likelihood), py::kw_only(), py::arg("kind"), py::arg("half_bin"), py::arg("epsilon"),
           py::arg("open_ends"), py::arg("scale"));
  m.def("inr_mixture", &inr_mixture, py::arg("mixture"), py::kw_only(), py::arg("outputs"), py::arg("threads"),
        py::arg("isa"));
  m.def("inr_mixture_backward", &inr_mixture_backward, py::arg("mixture"), py::kw_only(), py::arg("grad_outputs"),
        py::arg("grad_theta"), py::arg("threads"), py::arg("isa"));
  m.def("inr_mixture_log_likelihood", &inr_mixture_log_likelihood, py::arg("mixture"), py::arg("likelihood"),
        py::kw_only(), py::arg("values"), py::arg("log_p"), py::arg("threads"), py::arg("isa"));
  m.def("inr_mixture_expected_log_likelihood", &inr_mixture_expected_log_likelihood, py::arg("mixture"),
        py::arg("likelihood"), py::kw_only(), py::arg("values"), py::arg("weights"), py::arg("value"), py::arg("log_p"),
        py::arg("grad_theta"), py::arg("grad_scale"), py::arg("threads"), py::arg("isa"));
  m.def("inr_mixture_mean", &inr_mixture_mean, py::arg("mixture"), py::arg("likelihood"), py::kw_only(),
        py::arg("log_pi"), py::arg("uniform"), py::arg("mean"), py::arg("mean_map"), py::arg("threads"),
        py::arg("isa"));
}
