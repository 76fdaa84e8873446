from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vamoh.elbo import combine, importance_bound, kl_categorical


def log_probabilities(*shape: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g).log_softmax(1)


def test_bound_and_loss():
    terms = combine(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0]), 2.0, 0.25)
    assert terms.elbo.tolist() == [3 - 2 - 0.125, 5 - 4 - 1]
    assert float(terms.loss) == pytest.approx(-(0.875 + 0) / 2)


def test_kl_categorical_against_torch_distributions():
    log_q, log_p = log_probabilities(2, 3, 5, seed=0), log_probabilities(2, 3, 5, seed=1)
    q, p = (torch.distributions.Categorical(logits=t.mT) for t in (log_q, log_p))
    per_point = torch.distributions.kl_divergence(q, p)
    weights, kl = kl_categorical(log_q, log_p, None)
    torch.testing.assert_close(weights, q.probs.mT)
    torch.testing.assert_close(kl, per_point.sum(1))
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    weights, kl = kl_categorical(log_q, log_p, mask)
    torch.testing.assert_close(weights, q.probs.mT * mask[:, None])
    torch.testing.assert_close(kl, (per_point * mask).sum(1))
    uniform = torch.full((2, 3, 1), -math.log(3), dtype=torch.float64)
    entropy = q.entropy().sum(1)
    torch.testing.assert_close(kl_categorical(log_q, uniform, None)[1], 5 * math.log(3) - entropy)


def test_importance_bound_is_stable():
    weights = torch.tensor([[-1000.0, 700.0], [-1001.0, 700.0]])
    expected = [-1000 + math.log((1 + math.exp(-1)) / 2), 700.0]
    assert importance_bound(weights).tolist() == pytest.approx(expected)
    assert importance_bound(weights[:1]).tolist() == [-1000, 700]
