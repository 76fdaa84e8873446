"""Likelihood of a value under one component, with its learnable scale."""

from __future__ import annotations

import math
from typing import get_type_hints

import torch
from torch import Tensor, nn

from vamoh._options import check_likelihood, check_types
from vamoh.ops import likelihood as op


class Likelihood(nn.Module):
    """Discretised logistic (Eq. 17), Bernoulli or continuous Bernoulli of values in [0, 1].

    kind:       "logistic", "bernoulli" or "continuous_bernoulli".
    scale:      initial scale of the logistic for every component and channel; learned if `learn_scale`.
    max_scale:  upper clamp of the scale (the published code's 0.1 makes it a constant); 1 is no clamp.
    bin_width:  width of a bin: 1/256 in the published code, 1/255 for a proper probability of 8-bit data.
    epsilon:    added to the probability before the logarithm (the published code's 1e-7).
    open_ends:  the bins at 0 and 1 reach to infinity, as a proper probability needs.
    """

    def __init__(
        self,
        kind: str,
        components: int,
        channels: int,
        *,
        scale: float = 0.1,
        learn_scale: bool = True,
        max_scale: float = 1.0,
        bin_width: float = 1 / 256,
        epsilon: float = 1e-7,
        open_ends: bool = False,
    ) -> None:
        super().__init__()
        options = {
            "likelihood": kind,
            "scale": scale,
            "learn_scale": learn_scale,
            "max_scale": max_scale,
            "bin_width": bin_width,
            "epsilon": epsilon,
            "open_ends": open_ends,
        }
        check_types("Likelihood: ", {**get_type_hints(Likelihood.__init__), "likelihood": str}, options)
        check_likelihood("Likelihood: ", options)
        self.op = op.Likelihood(kind, bin_width / 2, epsilon, open_ends)
        self.max_scale = max_scale
        raw = torch.full((components, channels), math.log(scale / (1 - scale)))
        self.raw_scale: Tensor
        if kind == "logistic" and learn_scale:
            self.raw_scale = nn.Parameter(raw)
        else:
            self.register_buffer("raw_scale", raw)

    @property
    def scale(self) -> Tensor:
        """Scale of the logistic [K, C], between 0 and 1."""
        return torch.sigmoid(self.raw_scale).clamp(max=self.max_scale)

    def as_pmf(self) -> op.Likelihood:
        """The normalised likelihood of 8-bit values, for bits per dimension: 256 bins of 1/255 with open ends."""
        if self.op.kind != "logistic":
            return self.op
        return op.Likelihood("logistic", half_bin=1 / 510, epsilon=0.0, open_ends=True)

    def mean(self, logits: Tensor) -> Tensor:
        """Mean of the component at the coordinate network's outputs [...]."""
        return op.mean(self.op, logits)

    def sample(self, mean: Tensor, component: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Values [..., C] in [0, 1] from components [...] int64 with means [..., C]; the logistic gives 8-bit levels.

        By the inverse of the distribution function at one uniform number per value, drawn by `generator`.
        """
        device = generator.device if generator else mean.device
        uniform = torch.rand(mean.shape, generator=generator, dtype=torch.float64, device=device).to(mean.device)
        if self.op.kind == "bernoulli":
            return (uniform < mean).to(mean)
        if self.op.kind == "logistic":
            uniform = uniform.clamp(1e-12, 1 - 1e-12)
            value = mean + self.scale[component] * (uniform / (1 - uniform)).log()
            return ((value.clamp(0, 1) * 255).round() / 255).to(mean)
        # Density ∝ e^(l y); with a = |l|, and y counted from the end where the density is high.
        steepness = _steepness(torch.where(mean > 0.5, 1 - mean, mean).double())
        inward = -(uniform + (1 - uniform) * (-steepness).exp()).log() / steepness
        return torch.where(mean > 0.5, 1 - inward, inward).clamp(0, 1).to(mean)

    def check_values(self, low: float, high: float) -> None:
        """Raise ValueError unless the values, from low to high, lie in [0, 1]."""
        if low < 0 or high > 1:
            raise ValueError(
                f"elbo: values must lie in [0, 1] for the {self.op.kind} likelihood, "
                f"got values from {low:g} to {high:g}"
            )


def _steepness(mean: Tensor) -> Tensor:
    """a > 0 for which the density ∝ e^(-a y) on [0, 1] has this mean, at most 1/2; 1e-3 at least. By bisection."""
    low, high = torch.full_like(mean, 1e-3), torch.full_like(mean, 1e9)
    for _ in range(60):
        middle = (low * high).sqrt()
        above = 1 / middle - 1 / torch.expm1(middle) > mean  # too flat
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low * high).sqrt()
