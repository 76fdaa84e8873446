"""The generator: θ and points to component parameters, log-likelihoods and mixed means, through the ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vamoh.likelihood import Likelihood
from vamoh.ops.inr_mixture import (
    Inr,
    inr_mixture,
    inr_mixture_expected_log_likelihood,
    inr_mixture_log_likelihood,
)

_CHUNK = 1 << 22
"""Most hidden values [B, K, m, H] alive at once while decoding (16 MB in float32)."""


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Decoded functions at M points.

    mean [B, M, C]: mean of the mixture. mean_map [B, M, C]: mean of the most probable component.
    pi [B, M, K]: probability of each component.
    """

    mean: Tensor
    mean_map: Tensor
    pi: Tensor

    @property
    def segmentation(self) -> Tensor:
        """Most probable component [B, M], int64."""
        return self.pi.argmax(-1)

    @property
    def entropy(self) -> Tensor:
        """Entropy [B, M] in nats of the component probabilities: the uncertainty map."""
        nats: Tensor = torch.special.entr(self.pi)
        return nats.sum(-1)


def expected_log_likelihood(
    theta: Tensor,
    features: Tensor,
    values: Tensor,
    log_q: Tensor,
    mask: Tensor | None,
    inr: Inr,
    likelihood: Likelihood,
) -> Tensor:
    """E_q(c) log p(y | x, z, c) [B] in nats, summed over observed points; log_q [B, K, N]."""
    weights = log_q.exp() if mask is None else torch.where(mask[:, None], log_q.exp(), 0)
    return inr_mixture_expected_log_likelihood(
        theta, features, values, weights.contiguous(), likelihood.scale, inr, likelihood.op
    )[0]


def marginal_log_likelihood(
    theta: Tensor,
    features: Tensor,
    values: Tensor,
    log_p: Tensor,
    mask: Tensor | None,
    inr: Inr,
    likelihood: Likelihood,
    proper: bool,
) -> Tensor:
    """log Σ_c p(c | x, z) p(y | x, z, c) [B] in nats, summed over observed points; log_p [B, K, N] or [B, K, 1]."""
    kind = likelihood.as_pmf() if proper else likelihood.op
    per_component = inr_mixture_log_likelihood(theta, features, values, likelihood.scale, inr, kind)
    per_point = (per_component + log_p).logsumexp(1)
    return per_point.sum(-1) if mask is None else torch.where(mask, per_point, 0).sum(-1)


def decode(
    theta: Tensor,
    coords: Tensor,
    encode: Callable[[Tensor], Tensor],
    log_pi: Callable[[Tensor, slice], Tensor],
    inr: Inr,
    likelihood: Likelihood,
) -> Reconstruction:
    """Mixed means at coords [M, D] or [B, M, D], a bounded number of points at a time.

    encode maps coordinates to features; log_pi maps (features, which points) to log-probabilities [B, K, m].
    """
    batch, components, _ = theta.shape
    total, channels = coords.shape[-2], inr.widths[-1]
    mean = theta.new_empty(batch, total, channels)
    mean_map = theta.new_empty(batch, total, channels)
    pi = theta.new_empty(batch, total, components)
    step = max(1, _CHUNK // max(1, batch * components * max(inr.widths[1:])))
    for start in range(0, total, step):
        part = slice(start, min(start + step, total))
        features = encode(coords[..., part, :])
        probability = log_pi(features, part).exp().expand(-1, -1, part.stop - start)  # [B, K, m]
        means = likelihood.mean(inr_mixture(theta, features, inr))  # [B, K, m, C]
        mean[:, part] = (probability[..., None] * means).sum(1)
        best = probability.argmax(1)[:, None, :, None].expand(-1, 1, -1, channels)
        mean_map[:, part] = means.gather(1, best)[:, 0]
        pi[:, part] = probability.mT
    return Reconstruction(mean, mean_map, pi)
