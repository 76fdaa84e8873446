#include "../inr_mixture.h"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "binding.h"

namespace {

void check_pairs(const int64_t* mirror, int64_t points) {
  for (int64_t n = 0; mirror && n < points; ++n)
    if (mirror[n] >= points || (mirror[n] >= 0 && mirror[mirror[n]] != n))
      throw std::invalid_argument("inr_mixture: mirror must hold -1 or pairs, mirror[mirror[n]] = n, of the N points");
}

}  // namespace

// Widths come as a list, which lives as long as the call.
template <>
struct Passed<const vamoh::InrMixture&> {
  using type = std::tuple<Memory, int64_t, int64_t, Memory, int64_t, Memory, Memory, std::vector<int64_t>, int64_t,
                          int64_t, int64_t, bool, float, float>;
  static vamoh::InrMixture get(const type& fields) {
    return std::apply(
        [](const Memory& theta, int64_t batch_stride, int64_t component_stride, const Memory& features,
           int64_t features_stride, const Memory& mirror, const Memory& mask, const std::vector<int64_t>& widths,
           int64_t batch, int64_t components, int64_t points, bool sine, float slope,
           float omega) -> vamoh::InrMixture {
          const auto* const pairs = Passed<const int64_t*>::get(mirror);
          check_pairs(pairs, points);
          return {Passed<const float*>::get(theta),
                  batch_stride,
                  component_stride,
                  Passed<const float*>::get(features),
                  features_stride,
                  pairs,
                  Passed<const bool*>::get(mask),
                  widths.data(),
                  static_cast<int64_t>(widths.size()) - 1,
                  batch,
                  components,
                  points,
                  sine,
                  slope,
                  omega};
        },
        fields);
  }
};

template <>
struct Passed<vamoh::PointLikelihood::Kind> {
  using type = std::string;
  static vamoh::PointLikelihood::Kind get(const std::string& kind) {
    if (kind == "logistic") return vamoh::PointLikelihood::logistic;
    if (kind == "bernoulli") return vamoh::PointLikelihood::bernoulli;
    if (kind == "continuous_bernoulli") return vamoh::PointLikelihood::continuous_bernoulli;
    throw std::invalid_argument("inr_mixture: no compiled likelihood " + kind);
  }
};

template <>
struct Passed<const vamoh::PointLikelihood&>
    : Fields<vamoh::PointLikelihood, vamoh::PointLikelihood::Kind, double, double, bool, const float*> {};

void bind_inr_mixture(py::module_& m) {
  m.def("inr_mixture", native(&vamoh::inr_mixture), py::kw_only(), "mixture"_a, "outputs"_a, "threads"_a, "isa"_a);
  m.def("inr_mixture_backward", native(&vamoh::inr_mixture_backward), py::kw_only(), "mixture"_a, "grad_outputs"_a,
        "grad_theta"_a, "threads"_a, "isa"_a);
  m.def("inr_mixture_log_likelihood", native(&vamoh::inr_mixture_log_likelihood), py::kw_only(), "mixture"_a,
        "likelihood"_a, "values"_a, "log_p"_a, "threads"_a, "isa"_a);
  m.def("inr_mixture_expected_log_likelihood", native(&vamoh::inr_mixture_expected_log_likelihood), py::kw_only(),
        "mixture"_a, "likelihood"_a, "values"_a, "weights"_a, "value"_a, "log_p"_a, "grad_theta"_a, "grad_scale"_a,
        "threads"_a, "isa"_a);
  m.def("inr_mixture_mean", native(&vamoh::inr_mixture_mean), py::kw_only(), "mixture"_a, "likelihood"_a, "log_pi"_a,
        "uniform"_a, "mean"_a, "mean_map"_a, "threads"_a, "isa"_a);
}
