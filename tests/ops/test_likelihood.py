from __future__ import annotations

import math

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.precision import UNIT
from vamoh.ops.likelihood import KINDS, Likelihood, log_likelihood, log_likelihood_with_derivatives, mean

LOGITS = [-900.0, -60.0, -7.5, -0.51, -0.5, -0.499, -1e-5, 0.0, 0.3, 0.5, 2.0, 21.0, 35.0, 700.0]
VALUES = [0.0, 1e-3, 0.25, 0.5, 254 / 255, 1.0]
SCALES = [0.004, 0.1, 0.9]
LIKELIHOODS = [
    Likelihood("logistic"),
    Likelihood("logistic", 1 / 510, 0.0, True),
    Likelihood("logistic", 1 / 512, 0.0, False),
    Likelihood("logistic", 1 / 16, 1e-3, True),
    Likelihood("bernoulli"),
    Likelihood("continuous_bernoulli"),
]


def oracle(kind: Likelihood, logit: float, y: float, scale: float) -> mp.mpf:
    """The formulas as printed, in 600 digits."""
    logit, y, scale, h = (mp.mpf(v) for v in (logit, y, scale, kind.half_bin))
    if kind.kind != "logistic":
        if kind.kind == "bernoulli":
            return y * logit - mp.log(1 + mp.exp(logit))
        return y * logit - mp.log(mp.expm1(logit) / logit) if logit else mp.mpf(0)
    m = 1 / (1 + mp.exp(-logit))
    low, high = kind.open_ends and y < h, kind.open_ends and y > 1 - h
    above = 1 if high else 1 / (1 + mp.exp(-(y + h - m) / scale))
    below = 0 if low else 1 / (1 + mp.exp(-(y - h - m) / scale))
    return mp.log(above - below + mp.mpf(kind.epsilon))


def grid(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, values and scales, exact in float32."""
    return tuple(t.to(dtype) for t in torch.meshgrid(*map(torch.tensor, (LOGITS, VALUES, SCALES)), indexing="ij"))


@pytest.fixture(autouse=True)
def digits():
    with mp.workdps(600):
        yield


@pytest.mark.parametrize("kind", LIKELIHOODS, ids=str)
def test_against_many_digits(kind):
    logits, values, scale = grid()
    expected = torch.tensor(
        [float(oracle(kind, *p)) for p in zip(*(t.flatten().tolist() for t in (logits, values, scale)), strict=True)],
        dtype=torch.float64,
    ).view_as(logits)
    torch.testing.assert_close(log_likelihood(kind, logits, values, scale), expected, rtol=1e-12, atol=1e-12)
    single = log_likelihood(kind, logits.float(), values.float(), scale.float()).double()
    terms = expected.abs() if kind.kind == "logistic" else logits.abs()  # the others are differences of such terms
    roundings = 8 * (1 + terms)  # of exponentials, logarithms and their sums
    if kind.kind == "logistic":
        roundings = roundings + 6 / scale  # 4 of the mean, 2 of its distance to the ends of the bin
    assert ((single - expected).abs() <= roundings * UNIT).all()


def test_the_difference_as_printed_fails_in_float32():
    logits, values, scale = torch.tensor([-7.5]), torch.tensor([0.9]), torch.tensor([0.1])
    m = torch.sigmoid(logits)
    naive = torch.sigmoid((values + 1 / 512 - m) / scale) - torch.sigmoid((values - 1 / 512 - m) / scale)
    exact = float(oracle(LIKELIHOODS[2], -7.5, float(values), float(scale)))
    assert abs(float(naive.log()) - exact) > 1e-4
    assert abs(float(log_likelihood(LIKELIHOODS[2], logits, values, scale)) - exact) < 1e-6 * abs(exact)


@pytest.mark.parametrize("kind", LIKELIHOODS, ids=str)
def test_derivatives(kind):
    """Against autograd of the log-likelihood, and at moderate points against differences in many digits."""
    logits, values, scale = (t.clone().requires_grad_(i != 1) for i, t in enumerate(grid()))
    value, by_logit, by_scale = log_likelihood_with_derivatives(kind, logits, values, scale)
    expected = torch.autograd.grad(
        log_likelihood(kind, logits, values, scale).sum(), [logits, scale], allow_unused=True
    )
    assert torch.equal(value, log_likelihood(kind, logits, values, scale))
    torch.testing.assert_close(by_logit, expected[0], rtol=1e-8, atol=1e-9)
    if kind.kind == "logistic":
        torch.testing.assert_close(by_scale, expected[1], rtol=1e-8, atol=1e-7)
    else:
        assert by_scale is None
    at = (slice(3, 11), slice(None), slice(1, None))
    points = list(zip(*(t[at].flatten().tolist() for t in (logits, values, scale)), strict=True))[::7]
    with mp.workdps(60):
        exact = [float(mp.diff(lambda x, y=y, s=s: oracle(kind, x, y, s), logit)) for logit, y, s in points]
    torch.testing.assert_close(
        by_logit[at].flatten()[::7], torch.tensor(exact, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("kind", LIKELIHOODS, ids=str)
def test_float32_derivatives(kind):
    exact = log_likelihood_with_derivatives(kind, *grid())[1:]
    single = log_likelihood_with_derivatives(kind, *grid(torch.float32))[1:]
    for a, b in zip(single, exact, strict=True):
        if b is not None:
            coarse = grid()[2] >= 0.1
            assert (a.double() - b)[coarse].norm() <= 1e-6 * b[coarse].norm()


@given(st.floats(-50, 50), st.floats(0.002, 0.95))
def test_open_bins_of_8_bits_sum_to_one(logit, scale):
    kind = Likelihood("logistic", half_bin=1 / 510, epsilon=0.0, open_ends=True)
    for dtype, unit in ((torch.float64, 2.0**-53), (torch.float32, UNIT)):
        levels = torch.arange(256, dtype=dtype) / 255
        log_p = log_likelihood(kind, torch.tensor(logit, dtype=dtype), levels, torch.tensor(scale, dtype=dtype))
        # levels and ends of their bins round 3 times in all; the mean's roundings move all bins alike
        roundings = 8 * (1 + math.log(256)) + 3 / scale
        assert abs(float(log_p.exp().sum()) - 1) < roundings * unit


@pytest.mark.parametrize("logit", [-90.0, -8.0, -0.5, -0.3, 0.0, 0.1, 0.500001, 30.0])
def test_continuous_bernoulli_is_a_density_with_that_mean(logit):
    nodes, weights = np.polynomial.legendre.leggauss(120)
    y, w = torch.from_numpy(nodes / 2 + 0.5), torch.from_numpy(weights / 2)
    kind, logits = Likelihood("continuous_bernoulli"), torch.tensor(logit, dtype=torch.float64)
    density = log_likelihood(kind, logits, y, torch.ones(())).exp()
    assert abs(float(w @ density) - 1) < 1e-11
    assert abs(float(w @ (y * density)) - float(mean(kind, logits))) < 1e-11
    # terms up to 2.5, that of an exponential with 3 roundings and that of a reciprocal with 1, and their sum
    assert abs(float(mean(kind, logits.float())) - float(mean(kind, logits))) < 11 * UNIT


def test_matches_torch_distributions():
    logits = torch.linspace(-12, 12, 97, dtype=torch.float64)[:, None]
    values = torch.linspace(0, 1, 11, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    cb = torch.distributions.ContinuousBernoulli(logits=logits)
    kind = Likelihood("continuous_bernoulli")
    torch.testing.assert_close(log_likelihood(kind, logits, values, one), cb.log_prob(values), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean(kind, logits), cb.mean, rtol=1e-6, atol=1e-6)
    bernoulli = torch.distributions.Bernoulli(logits=logits)
    result = log_likelihood(Likelihood("bernoulli"), logits, values.round(), one)
    torch.testing.assert_close(result, bernoulli.log_prob(values.round()), rtol=1e-12, atol=1e-12)
    for kind in KINDS[:2]:
        torch.testing.assert_close(mean(Likelihood(kind), logits), bernoulli.mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", LIKELIHOODS, ids=str)
def test_saturated_outputs_stay_finite(kind, dtype):
    logits = torch.tensor([-1e4, -88.0, 0.0, 88.0, 1e4], dtype=dtype)[:, None, None]
    values, scale = torch.tensor([0.0, 0.5, 1.0], dtype=dtype)[:, None], torch.tensor([1e-3, 0.999], dtype=dtype)
    for result in log_likelihood_with_derivatives(kind, logits, values, scale):
        assert result is None or result.isfinite().all()


def test_unknown_likelihood():
    with pytest.raises(ValueError, match="^log_likelihood: likelihood must be one of logistic, .*, got 'gauss'"):
        log_likelihood(Likelihood("gauss"), torch.zeros(1), torch.zeros(1), torch.ones(1))


def test_width_of_a_bin_matters():
    """A bin holds about its width times the density of the logistic distribution."""
    logits, y, s = torch.zeros(1).double(), torch.full((1,), 0.43).double(), torch.full((1,), 0.2).double()
    a = float((y - 0.5) / s)
    density = math.exp(-a) / (1 + math.exp(-a)) ** 2 / 0.2
    for width in (1e-4, 1e-3):
        p = float(log_likelihood(Likelihood("logistic", width / 2, 0.0), logits, y, s).exp())
        assert p == pytest.approx(width * density, rel=1e-5)
