// Likelihoods of vectors of points, the formulas of vamoh/ops/likelihood.py. Needs vectors.inl and likelihood.h.
// Included by the kernels, once per instruction set.

using vamoh::Channel;
using vamoh::PointLikelihood;

struct Score {
  V log_p, by_logit, by_scale;
};

// For any scale, epsilon and ends.
struct Logistic {
  Channel c;
  inline __attribute__((always_inline)) Score operator()(V logit, V y) const {
    const V e = exp(-abs(logit)), r = 1.0f / (1.0f + e);
    // y - sigmoid(logit) without cancellation next to 1
    const V distance = logit > 0.0f ? (y - 1.0f) + e * r : y - e * r;
    const V inverse = splat(1.0f / c.scale);
    const V a = (distance + c.half_bin) * inverse, b = (distance - c.half_bin) * inverse;
    // sigmoid(x) is 1 / (1 + e^-x) or e^x / (1 + e^x), whichever does not overflow; a > 0 and b < 0 are the near sides
    const V small_a = exp(-abs(a)), small_b = exp(-abs(b));
    const V over_a = 1.0f + small_a, over_b = 1.0f + small_b, both = 1.0f / (over_a * over_b);
    const V near_a = over_b * both, near_b = over_a * both, far_a = small_a * near_a, far_b = small_b * near_b;
    const Vi right_a = a > 0.0f, left_b = b < 0.0f;
    V upper = right_a ? near_a : far_a, above = right_a ? far_a : near_a;  // sigmoid(a), sigmoid(-a)
    V lower = left_b ? near_b : far_b, below = left_b ? far_b : near_b;    // sigmoid(-b), sigmoid(b)
    V inside = splat(c.inside), inside_by = splat(c.inside_by);
    const Vi low = y < c.half_bin, high = y > 1.0f - c.half_bin;
    if (c.open_ends) {
      upper = high ? splat(1.0f) : upper;
      above = high ? V{} : above;
      lower = low ? splat(1.0f) : lower;
      below = low ? V{} : below;
      inside = (low | high) ? splat(1.0f) : inside;
      inside_by = (low | high) ? V{} : inside_by;
    }
    Score s;
    s.by_logit = (below - above) * inverse * (e * r * r);
    s.by_scale = (b * below - a * above + inside_by) * inverse;
    if (c.epsilon != 0.0f) {
      const V p = upper * lower * inside, padded = p + c.epsilon, share = p / padded;
      s.log_p = log(padded);
      s.by_logit *= share;
      s.by_scale *= share;
      return s;
    }
    V log_upper = (right_a ? V{} : a) - log1p(small_a), log_lower = (left_b ? V{} : -b) - log1p(small_b);
    if (c.open_ends) {
      log_upper = high ? V{} : log_upper;
      log_lower = low ? V{} : log_lower;
    }
    s.log_p = log_upper + log_lower + log(inside);
    return s;
  }
};

inline V mean_continuous_bernoulli(V logit) {  // within 5e-7
  const V size = abs(logit), square = logit * logit;
  V series = fma(square, splat(1.0f / 47900160), splat(-1.0f / 1209600));
  series = fma(series, square, splat(1.0f / 30240));
  series = fma(series, square, splat(-1.0f / 720));
  series = fma(series, square, splat(1.0f / 12));
  const Vi near = size < 0.5f;
  const V far = near ? splat(1.0f) : size;
  const V right = 1.0f / (1.0f - exp(-far)) - 1.0f / far;
  return near ? fma(series, logit, splat(0.5f)) : logit > 0.0f ? right : 1.0f - right;
}

struct ContinuousBernoulli {
  inline __attribute__((always_inline)) Score operator()(V logit, V y) const {
    const V size = abs(logit), square = logit * logit;
    V series = fma(square, splat(1.0f / 479001600), splat(-1.0f / 9676800));
    series = fma(series, square, splat(1.0f / 181440));
    series = fma(series, square, splat(-1.0f / 2880));
    series = fma(series, square, splat(1.0f / 24)) * square;
    const Vi near = size < 0.5f;
    const V far = near ? splat(1.0f) : size;
    // logit / 2 + |logit| / 2 is max(logit, 0)
    const V log_partition =
        near ? fma(logit, splat(0.5f), series) : (logit > 0.0f ? logit : V{}) + log((1.0f - exp(-far)) / far);
    return {y * logit - log_partition, y - mean_continuous_bernoulli(logit), V{}};
  }
};

struct Bernoulli {
  inline __attribute__((always_inline)) Score operator()(V logit, V y) const {
    const V e = exp(-abs(logit)), r = 1.0f / (1.0f + e);
    const Vi right = logit > 0.0f;
    return {y * logit - (right ? logit : V{}) - log1p(e), right ? (y - 1.0f) + e * r : y - e * r, V{}};
  }
};

inline V mean(PointLikelihood::Kind kind, V logit) {  // the sigmoid within 3 units in the last place
  if (kind == PointLikelihood::continuous_bernoulli) return mean_continuous_bernoulli(logit);
  const V e = exp(-abs(logit)), r = 1.0f / (1.0f + e);
  return logit > 0.0f ? r : e * r;
}
