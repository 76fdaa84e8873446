from __future__ import annotations

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
