from __future__ import annotations

import math

import pytest
import torch

from vamoh.elbo import combine, importance_bound


def test_bound_and_loss():
    terms = combine(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0]), 2.0, 0.25)
    assert terms.elbo.tolist() == [3 - 2 - 0.125, 5 - 4 - 1]
    assert float(terms.loss) == pytest.approx(-(0.875 + 0) / 2)


def test_importance_bound_is_stable():
    weights = torch.tensor([[-1000.0, 700.0], [-1001.0, 700.0]])
    expected = [-1000 + math.log((1 + math.exp(-1)) / 2), 700.0]
    assert importance_bound(weights).tolist() == pytest.approx(expected)
    assert importance_bound(weights[:1]).tolist() == [-1000, 700]
