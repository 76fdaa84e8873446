"""The generator: θ and points to component parameters, log-likelihoods and mixed means, through the ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vamoh._progress import Progress
from vamoh.likelihood import Likelihood
from vamoh.ops._autocast import float32_under_autocast
from vamoh.ops.inr_mixture import (
    Inr,
    inr_mixture_expected_log_likelihood,
    inr_mixture_log_likelihood,
    inr_mixture_mean,
)

_CHUNK = 1 << 24
"""Most values alive at once while decoding (64 MB in float32), besides the results."""

_GATING = 64
"""Values per function and point that the gating holds at once, about."""


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Decoded functions at M points.

    mean [B, M, C]: mean of the mixture. mean_map [B, M, C]: mean of the most probable component.
    pi [B, M, K]: probability of each component; [B, 0, K] where it was left out.
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


@dataclass(frozen=True, eq=False)
class Draws:
    """S functions that fit what was seen, at M points, each of its own z: decoded [S, B, M, C], without noise."""

    decoded: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean of the draws, [B, M, C]."""
        return self.decoded.mean(0)

    @property
    def std(self) -> Tensor:
        """Standard deviation of the draws, [B, M, C]; 0 for a single one."""
        return self.decoded.std(0, correction=min(1, len(self.decoded) - 1))


def expected_log_likelihood(
    theta: Tensor,
    features: Tensor,
    values: Tensor,
    q: Tensor,
    mask: Tensor | None,
    inr: Inr,
    likelihood: Likelihood,
    mirror: Tensor | None = None,
) -> Tensor:
    """E_q(c) log p(y | x, z, c) [B] in nats with q [B, K, N], summed over points observed by mask [B, N]."""
    return inr_mixture_expected_log_likelihood(
        theta, features, values, q, likelihood.scale, inr, likelihood.op, mask=mask, mirror=mirror
    )[0]


@torch.no_grad()
def log_responsibilities(
    theta: Tensor,
    features: Tensor,
    values: Tensor,
    log_p: Tensor,
    mask: Tensor | None,
    inr: Inr,
    likelihood: Likelihood,
    mirror: Tensor | None = None,
    beta: float = 1.0,
) -> Tensor:
    """log q(c) [B, K, N] that maximises E_q log p(y | x, z, c) - beta · KL(q(c) ‖ p(c | x, z)), beta ≥ 0.

    With beta 1 that is the exact posterior p(c | x, y, z), and the maximum is log p(y | x, z); at unobserved points it
    is p. log_p [B, K, N] or [B, K, 1]. No gradient: by the envelope theorem that of the maximum takes q as constant.
    """
    score = inr_mixture_log_likelihood(
        theta, features, values, likelihood.scale, inr, likelihood.op, mask=mask, mirror=mirror
    )
    if beta:
        return (score / beta + log_p).log_softmax(1)
    return torch.full_like(score, -math.inf).scatter(1, score.argmax(1, keepdim=True), 0.0)


def marginal_log_likelihood(
    theta: Tensor,
    features: Tensor,
    values: Tensor,
    log_p: Tensor,
    mask: Tensor | None,
    inr: Inr,
    likelihood: Likelihood,
    proper: bool,
    mirror: Tensor | None = None,
) -> Tensor:
    """log Σ_c p(c | x, z) p(y | x, z, c) [B] in nats, summed over observed points; log_p [B, K, N] or [B, K, 1]."""
    kind = likelihood.as_pmf() if proper else likelihood.op
    per_component = inr_mixture_log_likelihood(
        theta, features, values, likelihood.scale, inr, kind, mask=mask, mirror=mirror
    )
    per_point = (per_component + log_p).logsumexp(1)
    return per_point.sum(-1) if mask is None else torch.where(mask, per_point, 0).sum(-1)


Part = slice | Tensor
"""Indices of points: a stretch of them, or [m] int64."""


@float32_under_autocast
def decode(
    theta: Tensor,
    count: int,
    encode: Callable[[Part], Tensor],
    log_pi: Callable[[Tensor, Part], Tensor],
    inr: Inr,
    likelihood: Likelihood,
    *,
    shared: bool = True,
    mirror: Tensor | None = None,
    with_pi: bool = True,
    progress: bool = False,
    differentiable: bool = False,
) -> Reconstruction:
    """Mixed means at M = count points, a bounded number at a time, or differentiable and all at once.

    encode maps indices of m points to their features, [m, E] if shared by the batch, else [B, m, E]; log_pi maps
    (features, indices) to log-probabilities [B, K, m] or [B, K, 1]. mirror [M]: pairs of points that are decoded
    together. with_pi False leaves pi out of the result; progress shows a bar on standard error.
    """
    batch, components, _ = theta.shape
    if differentiable:
        features = encode(slice(0, count))
        log_p = log_pi(features, slice(0, count))
        mean, mean_map = inr_mixture_mean(theta, features, log_p, inr, likelihood.op, mirror=mirror)
        pi = log_p.exp().mT.expand(-1, count, -1)
        return Reconstruction(mean, mean_map, pi if with_pi else pi[:, :0])
    mean = theta.new_empty(batch, count, inr.widths[-1])
    mean_map = torch.empty_like(mean)
    pi = theta.new_empty(batch, count if with_pi else 0, components)
    step = max(1, _CHUNK // ((1 if shared else batch) * inr.widths[0] + batch * (components + _GATING)))
    with Progress(total=count, desc="decode", unit="points", unit_scale=True, disable=not progress) as bar:
        for index, reflected in _parts(count, step, mirror, theta.device):
            features = encode(index)
            log_p = log_pi(features, index)
            mean[:, index], mean_map[:, index] = inr_mixture_mean(
                theta, features, log_p, inr, likelihood.op, mirror=reflected
            )
            if with_pi:
                pi[:, index] = log_p.exp().mT
            bar.update(features.shape[-2])
    return Reconstruction(mean, mean_map, pi)


def _parts(total: int, step: int, mirror: Tensor | None, device: torch.device) -> Iterator[tuple[Part, Tensor | None]]:
    """Point indices, at most `step` at a time, and the mirror among them; a point and its mirror stay together."""
    if total <= step:
        yield slice(0, total), mirror
        return
    if mirror is None or step == 1:
        for start in range(0, total, step):
            yield slice(start, min(start + step, total)), None
        return
    leading = ((mirror < 0) | (mirror >= torch.arange(total, device=device))).nonzero()[:, 0]
    for part in leading.split(step // 2):
        partner = mirror[part]
        paired = (partner != part) & (partner >= 0)
        both = torch.cat([part, partner[paired]])
        here, there = paired.nonzero()[:, 0], torch.arange(len(part), len(both), device=device)
        reflected = torch.where(partner == part, torch.arange(len(part), device=device), -1)
        reflected = torch.cat([reflected, here])
        reflected[here] = there
        yield both, reflected
