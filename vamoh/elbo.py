"""The evidence lower bound (Eq. 6 and 16) from its terms."""

from __future__ import annotations

import math
from dataclasses import dataclass

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


def importance_bound(log_weights: Tensor) -> Tensor:
    """log mean exp of importance weights [S, B] over S, in nats [B] (Burda et al. 2016)."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))
