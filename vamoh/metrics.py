"""Measures of a reconstruction against the data, one number per function; averages are the caller's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vamoh._checks import FLOATING, check_number, check_positive, check_tensor

MAX_PSNR = 100.0
"""Stands for the infinite PSNR of an exact reconstruction where figures are averaged or logged."""


def mse(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error over points and channels, [B].

    prediction, target: [B, N, C], float32 or float64. mask: None, [N] or [B, N] bool, True where a point counts.
    NaN for a function without a counted point. Raises TypeError or ValueError for mismatched tensors.
    """
    return _mean_square("mse", prediction, target, mask)


def rmse(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    span: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Root mean squared error over points and channels, [B], times `span`.

    With `span` the natural units that one unit of the values stands for (high - low), the result is in those units.
    weight: [N], at least 0, such as the cosine of the latitude, which makes areas of a sphere count alike; by default
    every grid point weighs the same. The rest is as in `mse`.
    """
    check_number("rmse", "span", span)
    return _mean_square("rmse", prediction, target, mask, weight).sqrt() * span


def psnr(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio -10 log10(mse) for data of range 1, [B] decibel; inf where exact.

    Arguments and errors as in `mse`.
    """
    return -10 * _mean_square("psnr", prediction, target, mask).log10()


def crps(draws: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Continuous ranked probability score of S draws [S, B, N, C], mean over points and channels, [B]; 0 is exact.

    E|X - y| - E|X - X'| / 2 with X and X' of the draws (Gneiting and Raftery 2007): a distance in units of the values,
    the mean absolute error where S = 1. The rest is as in `mse`.
    """
    check_tensor("crps", "draws", draws, ["S", "B", "N", "C"], dtypes=FLOATING)
    weight = _weight("crps", draws[0], target, mask)
    count = len(draws)
    rank = torch.arange(1 - count, count, 2, device=draws.device, dtype=draws.dtype)
    # Of sorted draws, Σ_ij |x_i - x_j| is 2 Σ_i (2i - S - 1) x_i.
    spread = (draws.sort(0).values * rank.view(-1, 1, 1, 1)).sum(0) / count**2
    score = ((draws - target).abs().mean(0) - spread).sum(-1)
    return (score * weight).sum(1) / (weight.sum(1) * target.shape[-1])


def ranks(draws: Tensor, target: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """How many of S draws [S, B, N, C] lie below each value [B, N, C]: int64 from 0 to S.

    Among draws that equal the value its place is drawn by `generator`. Where draws and value are of one distribution
    every rank is as likely (Hamill 2001, "Interpretation of rank histograms").
    """
    check_tensor("ranks", "draws", draws, ["S", "B", "N", "C"], dtypes=FLOATING)
    check_tensor("ranks", "target", target, list(draws.shape[1:]), like=draws)
    below, equal = (draws < target).sum(0), (draws == target).sum(0)
    device = generator.device if generator else target.device
    place = torch.rand(target.shape, generator=generator, dtype=torch.float64, device=device).to(target.device)
    return below + (place * (equal + 1)).long().clamp(max=equal)


def iou(prediction: Tensor, target: Tensor, mask: Tensor | None = None, *, threshold: float = 0.5) -> Tensor:
    """Intersection over union of the occupied points, [B]; 1 where both are empty, NaN where no point counts.

    A point is occupied where its value is at least `threshold`, in every channel on its own.
    Arguments and errors as in `mse`.
    """
    check_number("iou", "threshold", threshold)
    counted = _weight("iou", prediction, target, mask).bool()[..., None]
    a, b = (prediction >= threshold) & counted, (target >= threshold) & counted
    union = (a | b).sum((1, 2))
    result = torch.where(union > 0, (a & b).sum((1, 2)) / union.clamp(min=1), 1.0)
    return torch.where(counted.any((1, 2)), result, math.nan)


def bits_per_dim(log_likelihood: Tensor, points: int, channels: int) -> Tensor:
    """Negative log-likelihood in bits per value, [B], from nats per function [B] over `points` and `channels`.

    A lower bound of the log-likelihood gives an upper bound of the bits. For a discretised likelihood the nats must
    come from a proper probability over the levels.
    """
    check_tensor("bits_per_dim", "log_likelihood", log_likelihood, ["B"], dtypes=FLOATING)
    values = check_positive("bits_per_dim", "points", points) * check_positive("bits_per_dim", "channels", channels)
    return -log_likelihood / (values * math.log(2))


def _mean_square(
    where: str, prediction: Tensor, target: Tensor, mask: Tensor | None, by: Tensor | None = None
) -> Tensor:
    weight = _weight(where, prediction, target, mask)
    if by is not None:
        check_tensor(where, "weight", by, [target.shape[1]], like=target)
        weight = weight * by
    squared = (prediction - target).square().sum(-1)
    return (squared * weight).sum(1) / (weight.sum(1) * target.shape[-1])


def _weight(where: str, prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Check the arguments; return [B, N], 1 where a point counts and 0 elsewhere."""
    check_tensor(where, "target", target, ["B", "N", "C"], dtypes=FLOATING)
    check_tensor(where, "prediction", prediction, list(target.shape), like=target)
    batch, count, _ = target.shape
    if mask is None:
        return target.new_ones(batch, count)
    if not isinstance(mask, Tensor) or tuple(mask.shape) not in ((count,), (batch, count)):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{where}: mask must have shape [{count}] or [{batch}, {count}], got {got}")
    check_tensor(where, "mask", mask, list(mask.shape), dtypes=[torch.bool])
    return mask.expand(batch, count).to(target.dtype)
