#include "simd/vectors.inl"
#include "simd/likelihood.inl"

// results[0 .. count) of values, count a multiple of the lanes. Sines and cosines are functions of their own.
void evaluate(Function function, const float* values, int64_t count, float* results) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const V x = load(values + i);
    V result, other;
    switch (function) {
      case Function::exp:
        result = exp(x);
        break;
      case Function::log:
        result = log(x);
        break;
      case Function::log_normal:
        result = log_normal(x, Vi{});
        break;
      case Function::log1p:
        result = log1p(x);
        break;
      case Function::tanh:
        result = tanh(x);
        break;
      case Function::sine:
        sincos(x, result, other);
        break;
      case Function::cosine:
        sincos(x, other, result);
        break;
      case Function::sine_quarter:
        sincos_quarter(x, result, other);
        break;
      case Function::cosine_quarter:
        sincos_quarter(x, other, result);
        break;
      case Function::sigmoid:
        result = mean(PointLikelihood::bernoulli, x);
        break;
      default:
        result = mean(PointLikelihood::continuous_bernoulli, x);
    }
    store(results + i, result);
  }
}
