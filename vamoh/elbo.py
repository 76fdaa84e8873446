"""The evidence lower bound (Eq. 6 and 16) from its terms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ElboTerms:
    """Terms of the bound per function, in nats, each [B].

    elbo = log_likelihood - beta_z · kl_z - beta_c · kl_c, with log_likelihood the expectation under q(z) q(c).
    """

    elbo: Tensor
    log_likelihood: Tensor
    kl_z: Tensor
    kl_c: Tensor

    @property
    def loss(self) -> Tensor:
        """What to minimise: the negative bound, averaged over the batch."""
        return -self.elbo.mean()


def combine(log_likelihood: Tensor, kl_z: Tensor, kl_c: Tensor, beta_z: float, beta_c: float) -> ElboTerms:
    """Terms [B] to the bound."""
    return ElboTerms(log_likelihood - beta_z * kl_z - beta_c * kl_c, log_likelihood, kl_z, kl_c)


def kl_categorical(log_q: Tensor, log_p: Tensor, mask: Tensor | None) -> Tensor:
    """Σ_n KL(q(c_n) ‖ p(c_n)) [B] in nats over observed points; log-probabilities [B, K, N], p also [B, K, 1]."""
    per_point = (log_q.exp() * (log_q - log_p)).sum(1)
    return per_point.sum(-1) if mask is None else torch.where(mask, per_point, 0).sum(-1)


def importance_bound(log_weights: Tensor) -> Tensor:
    """log mean exp of importance weights [S, B] over S, in nats [B] (Burda et al. 2016)."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))
