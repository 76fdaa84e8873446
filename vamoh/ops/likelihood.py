"""Elementwise likelihoods of one channel of one component, with their derivatives.

Shapes broadcast; `logits` is the coordinate network's output. The kernels compute the same formulas.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vamoh._checks import check_choice
from vamoh._options import LikelihoodKind

KINDS: tuple[str, ...] = get_args(LikelihoodKind)


class Likelihood(NamedTuple):
    """What a kernel must know of a likelihood besides its tensors.

    half_bin, epsilon and open_ends belong to the logistic (Eq. 17): the half width of a bin, what is added to its
    probability before the logarithm, and whether the bins at 0 and 1 reach to infinity.
    """

    kind: str
    half_bin: float = 1 / 512
    epsilon: float = 1e-7
    open_ends: bool = False


def log_likelihood(likelihood: Likelihood, logits: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """Log-likelihood in nats of `values` in [0, 1]; `scale` > 0 is the logistic's and ignored by the others.

    logistic: log(σ((y+h-m)/s) - σ((y-h-m)/s) + ε) with m = σ(logit), in the form that does not cancel.
    bernoulli: y·logit - softplus(logit). continuous_bernoulli: y·logit - log((e^logit - 1)/logit).
    """
    check_choice("log_likelihood", "likelihood", likelihood.kind, KINDS)
    if likelihood.kind == "bernoulli":
        return values * logits + F.logsigmoid(-logits)  # softplus of torch is linear from 20 on
    if likelihood.kind == "continuous_bernoulli":
        return values * logits - _log_partition(logits)
    half = likelihood.half_bin
    distance = values - torch.sigmoid(logits)
    upper, lower = F.logsigmoid((distance + half) / scale), F.logsigmoid((half - distance) / scale)
    inside = torch.log(-torch.expm1(-2 * half / scale))
    if likelihood.open_ends:
        low, high = values < half, values > 1 - half
        upper, lower = upper.masked_fill(high, 0), lower.masked_fill(low, 0)
        inside = torch.where(low | high, 0, inside)
    log_p = upper + lower + inside
    return log_p if likelihood.epsilon == 0 else torch.log(log_p.exp() + likelihood.epsilon)


def log_likelihood_with_derivatives(
    likelihood: Likelihood, logits: Tensor, values: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`log_likelihood`, its derivative to the logits, and to the scale (logistic only, else None)."""
    result = log_likelihood(likelihood, logits, values, scale)
    if likelihood.kind == "bernoulli":
        return result, values - torch.sigmoid(logits), None
    if likelihood.kind == "continuous_bernoulli":
        return result, values - mean(likelihood, logits), None
    half = likelihood.half_bin
    m = torch.sigmoid(logits)
    distance = values - m
    a, c = (distance + half) / scale, (distance - half) / scale
    above, below = torch.sigmoid(-a), torch.sigmoid(c)  # d log σ(a)/da, -d log σ(-c)/dc
    width = 2 * half / scale
    inside = -width / torch.expm1(width)  # scale · d log(1 - e^-width) / d scale
    if likelihood.open_ends:
        low, high = values < half, values > 1 - half
        above, below = above.masked_fill(high, 0), below.masked_fill(low, 0)
        inside = torch.where(low | high, 0, inside)
    by_logit = (below - above) / scale * m * (1 - m)
    by_scale = (c * below - a * above + inside) / scale
    if likelihood.epsilon != 0:
        share = 1 - likelihood.epsilon * torch.exp(-result)  # p / (p + ε)
        by_logit, by_scale = by_logit * share, by_scale * share
    return result, by_logit, by_scale


def mean(likelihood: Likelihood, logits: Tensor) -> Tensor:
    """Mean of the component: σ(logit), or the continuous Bernoulli's own."""
    if likelihood.kind != "continuous_bernoulli":
        return torch.sigmoid(logits)
    square = logits * logits
    series = 1 / 12 + square * (-1 / 720 + square * (1 / 30240 + square * (-1 / 1209600 + square / 47900160)))
    near = logits.abs() < 0.5
    far = torch.where(near, 1, logits)
    return torch.where(near, 0.5 + logits * series, -1 / torch.expm1(-far) - 1 / far)


def _log_partition(logits: Tensor) -> Tensor:
    """log((e^l - 1)/l) = l/2 + log(sinh(l/2)/(l/2)), smooth through 0."""
    square = logits * logits
    tail = 1 / 181440 + square * (-1 / 9676800 + square / 479001600)
    series = square * (1 / 24 + square * (-1 / 2880 + square * tail))
    near = logits.abs() < 0.5
    far = torch.where(near, 1, logits).abs()
    return logits / 2 + torch.where(near, series, far / 2 + torch.log(-torch.expm1(-far) / far))
