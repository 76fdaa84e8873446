"""What Triton kernels share: products of a stated precision, activations, and the likelihoods of one channel.

The formulas are those of `vamoh/ops/likelihood.py`, in forms that do not cancel in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32; "bf16_rounded" is "bf16" for the interpreter, which has no such products."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    elif PRECISION == "bf16_rounded":
        return tl.dot(a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def activate(x, slope, omega, SINE: tl.constexpr):
    """Hidden activation of x."""
    return tl.sin(omega * x) if SINE else tl.where(x > 0, x, slope * x)


@triton.jit
def activate_backward(grad, x, slope, omega, SINE: tl.constexpr):
    """Gradient at the input x of the activation from the gradient at its output."""
    return grad * (omega * tl.cos(omega * x)) if SINE else tl.where(x > 0, grad, slope * grad)


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1: what 1 + x loses is added back."""
    y = 1.0 + x
    return tl.log(y) + (x - (y - 1.0)) / y


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0."""
    tail = 1.0 / 720 + x * (1.0 / 5040 + x * (1.0 / 40320))
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * tail)))))
    return tl.where(x > -0.5, series, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    """Hyperbolic tangent."""
    shrink = expm1(-2.0 * tl.abs(x))
    size = -shrink / (2.0 + shrink)
    return tl.where(x < 0, -size, size)


@triton.jit
def sigmoid_parts(x):
    """sigmoid(x), sigmoid(-x) and e^-|x|."""
    small = tl.exp(-tl.abs(x))
    near = 1.0 / (1.0 + small)
    far = small * near
    return tl.where(x > 0, near, far), tl.where(x > 0, far, near), small


@triton.jit
def score_logistic(logit, y, scale, half_bin, epsilon, OPEN_ENDS: tl.constexpr, PADDED: tl.constexpr):
    """Log-likelihood and its derivatives to logit and scale; PADDED: epsilon > 0."""
    mean, other, _ = sigmoid_parts(logit)
    distance = tl.where(logit > 0, (y - 1.0) + other, y - mean)  # no cancellation next to 1
    inverse = 1.0 / scale
    a = (distance + half_bin) * inverse
    b = (distance - half_bin) * inverse
    upper, above, small_a = sigmoid_parts(a)
    below, lower, small_b = sigmoid_parts(b)
    width = 2.0 * half_bin * inverse
    shrink = expm1(-width)
    inside = -shrink + tl.zeros_like(logit)
    inside_by = width * (1.0 + shrink) / shrink + tl.zeros_like(logit)  # -w / (e^w - 1), finite for any w
    low = y < half_bin
    high = y > 1.0 - half_bin
    if OPEN_ENDS:
        upper = tl.where(high, 1.0, upper)
        above = tl.where(high, 0.0, above)
        lower = tl.where(low, 1.0, lower)
        below = tl.where(low, 0.0, below)
        inside = tl.where(low | high, 1.0, inside)
        inside_by = tl.where(low | high, 0.0, inside_by)
    by_logit = (below - above) * inverse * (mean * other)
    by_scale = (b * below - a * above + inside_by) * inverse
    if PADDED:
        p = upper * lower * inside
        padded = p + epsilon
        share = p / padded
        return tl.log(padded), by_logit * share, by_scale * share
    else:
        log_upper = tl.minimum(a, 0.0) - log1p(small_a)
        log_lower = tl.minimum(-b, 0.0) - log1p(small_b)
        if OPEN_ENDS:
            log_upper = tl.where(high, 0.0, log_upper)
            log_lower = tl.where(low, 0.0, log_lower)
        return log_upper + log_lower + tl.log(inside), by_logit, by_scale


@triton.jit
def mean_continuous_bernoulli(logit):
    """Mean of the continuous Bernoulli."""
    square = logit * logit
    series = 1.0 / 12 + square * (
        -1.0 / 720 + square * (1.0 / 30240 + square * (-1.0 / 1209600 + square * (1.0 / 47900160)))
    )
    near = square < 0.25
    far = tl.where(near, 1.0, tl.abs(logit))
    right = 1.0 / (1.0 - tl.exp(-far)) - 1.0 / far
    return tl.where(near, 0.5 + series * logit, tl.where(logit > 0, right, 1.0 - right))


@triton.jit
def score_continuous_bernoulli(logit, y):
    """Log-likelihood and its derivative to the logit."""
    square = logit * logit
    tail = 1.0 / 181440 + square * (-1.0 / 9676800 + square * (1.0 / 479001600))
    series = square * (1.0 / 24 + square * (-1.0 / 2880 + square * tail))
    near = square < 0.25
    far = tl.where(near, 1.0, tl.abs(logit))
    log_partition = tl.where(near, 0.5 * logit + series, tl.maximum(logit, 0.0) + tl.log((1.0 - tl.exp(-far)) / far))
    return y * logit - log_partition, y - mean_continuous_bernoulli(logit)


@triton.jit
def score_bernoulli(logit, y):
    """Log-likelihood and its derivative to the logit."""
    mean, other, small = sigmoid_parts(logit)
    return y * logit - tl.maximum(logit, 0.0) - log1p(small), tl.where(logit > 0, (y - 1.0) + other, y - mean)


@triton.jit
def score(logit, y, scale, half_bin, epsilon, KIND: tl.constexpr, OPEN_ENDS: tl.constexpr, PADDED: tl.constexpr):
    """Log-likelihood and its derivatives to logit and scale, of the likelihood that KIND names."""
    if KIND == "logistic":
        return score_logistic(logit, y, scale, half_bin, epsilon, OPEN_ENDS, PADDED)
    elif KIND == "bernoulli":
        log_p, by_logit = score_bernoulli(logit, y)
        return log_p, by_logit, tl.zeros_like(logit)
    else:
        tl.static_assert(KIND == "continuous_bernoulli")
        log_p, by_logit = score_continuous_bernoulli(logit, y)
        return log_p, by_logit, tl.zeros_like(logit)


@triton.jit
def mean_of(logit, KIND: tl.constexpr):
    """Mean of the component."""
    if KIND == "continuous_bernoulli":
        return mean_continuous_bernoulli(logit)
    else:
        tl.static_assert(KIND == "logistic" or KIND == "bernoulli")
        mean, _, _ = sigmoid_parts(logit)
        return mean
