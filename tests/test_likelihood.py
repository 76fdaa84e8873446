from __future__ import annotations

import math

import pytest
import torch

from vamoh.likelihood import Likelihood
from vamoh.ops import likelihood as op


@pytest.mark.parametrize("learn", [True, False])
def test_scale_of_every_component_and_channel(learn):
    module = Likelihood("logistic", 3, 2, scale=0.07, learn_scale=learn)
    torch.testing.assert_close(module.scale, torch.full((3, 2), 0.07))
    assert (len(list(module.parameters())) == 1) == learn
    assert list(module.state_dict()) == ["raw_scale"]
    assert not list(Likelihood("bernoulli", 3, 2).parameters())


def test_the_clamp_makes_a_constant():
    module = Likelihood("logistic", 1, 1, scale=0.3, max_scale=0.1)
    assert module.scale.item() == pytest.approx(0.1)
    module.scale.sum().backward()
    assert float(module.raw_scale.grad) == 0
    assert Likelihood("logistic", 1, 1, scale=0.3).scale.item() == pytest.approx(0.3)


def test_what_the_op_gets():
    assert Likelihood("logistic", 1, 1).op == op.Likelihood("logistic", 1 / 512, 1e-7, False)
    assert Likelihood("logistic", 1, 1, bin_width=0.5, epsilon=0.0, open_ends=True).op == ("logistic", 0.25, 0.0, True)


def test_as_pmf():
    proper = Likelihood("logistic", 1, 1).as_pmf()
    levels = torch.arange(256, dtype=torch.float64) / 255
    p = op.log_likelihood(proper, torch.tensor(1.3).double(), levels, torch.tensor(0.1).double()).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert Likelihood("bernoulli", 1, 1).as_pmf() == Likelihood("bernoulli", 1, 1).op


@pytest.mark.parametrize("kind", op.KINDS)
def test_mean(kind):
    logits = torch.linspace(-5, 5, 7)
    torch.testing.assert_close(Likelihood(kind, 1, 1).mean(logits), op.mean(op.Likelihood(kind), logits))


def test_values_outside_the_unit_interval():
    module = Likelihood("bernoulli", 1, 1)
    module.check_values(0.0, 1.0)
    for bad in (-0.01, 1.01):
        with pytest.raises(
            ValueError, match=r"values must lie in \[0, 1\] for the bernoulli likelihood, got values from"
        ):
            module.check_values(*sorted([0.5, bad]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "gauss"}, "likelihood must be one of logistic, bernoulli, continuous_bernoulli, got 'gauss'"),
        ({"scale": 0.0}, "scale must be above 0 and below 1, got 0.0"),
        ({"scale": float("nan")}, "scale must be a number, finite and below 2.63, got nan"),
        ({"bin_width": -1.0}, "bin_width must be above 0, got -1.0"),
        ({"epsilon": -1e-9}, "epsilon must be at least 0, got -1e-09"),
        ({"epsilon": float("nan")}, "epsilon must be a number, finite and below 2.63, got nan"),
        ({"max_scale": 0.0}, "max_scale must be above 0, got 0.0"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=f"^Likelihood: {message}"):
        Likelihood(**{"kind": "logistic", "components": 1, "channels": 1, **change})


def test_drawn_levels_have_their_probabilities() -> None:
    """Of the logistic, against the normalised probability of every 8-bit level."""
    likelihood = Likelihood("logistic", 2, 1)
    with torch.no_grad():
        likelihood.raw_scale.copy_(torch.tensor([[-4.0], [-2.0]]))
    levels = torch.arange(256) / 255
    generator = torch.Generator().manual_seed(0)
    for component, logit in ((0, 0.4), (1, -2.5), (1, 3.0)):
        count, scale = 40_000, likelihood.scale[component, 0]
        mean = torch.sigmoid(torch.tensor(logit)).expand(count, 1)
        drawn = likelihood.sample(mean, torch.full((count,), component), generator)
        found = (drawn[:, 0] * 255).round().long().bincount(minlength=256) / count
        inner = torch.sigmoid((levels[:-1] + 1 / 510 - mean[0]) / scale)
        expected = torch.diff(inner, prepend=torch.zeros(1), append=torch.ones(1))
        deviation = (expected * (1 - expected) / count).sqrt()
        assert ((found - expected).abs() <= 5 * deviation + 1e-4).all()


@pytest.mark.parametrize("logit", [-200.0, -6.0, -0.5, 0.0, 1e-3, 2.0, 40.0])
def test_drawn_values_of_the_continuous_bernoulli_have_its_distribution(logit: float) -> None:
    """By the largest distance of the distribution functions (Kolmogorov); F(y) = (e^ly - 1) / (e^l - 1)."""
    likelihood, count = Likelihood("continuous_bernoulli", 1, 1), 20_000
    mean = likelihood.mean(torch.full((count, 1), logit))
    drawn = likelihood.sample(mean, torch.zeros(count, dtype=torch.int64), torch.Generator().manual_seed(0))
    y = drawn[:, 0].double().sort().values
    steps = (torch.arange(count) + 0.5) / count
    if abs(logit) < 1e-2:
        exact = y
    elif logit > 0:
        exact = (torch.exp(logit * (y - 1)) - math.exp(-logit)) / -math.expm1(-logit)
    else:
        exact = torch.expm1(logit * y) / math.expm1(logit)
    assert (exact - steps).abs().max() < 1.95 / math.sqrt(count)  # exceeded once in 1000


def test_drawn_bits_are_ones_as_often_as_their_mean() -> None:
    mean = torch.tensor([0.0, 0.2, 1.0]).repeat(10_000, 1)
    drawn = Likelihood("bernoulli", 1, 3).sample(mean, torch.zeros(10_000, dtype=torch.int64))
    assert drawn.unique().tolist() == [0.0, 1.0]
    assert drawn.mean(0).tolist() == pytest.approx([0.0, 0.2, 1.0], abs=0.02)
