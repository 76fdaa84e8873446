"""Hypernetworks: z to the parameters of K coordinate networks, all heads batched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vamoh.layout import packed_size, unpack
from vamoh.ops.linear import linear

SLOPE = 0.1
"""LeakyReLU slope of the hypernetworks (the published code's)."""

MODULATION = 0.5
"""How far z moves a generated parameter at the start, relative to its own initial scale."""


class Hypernet(nn.Module):
    """K MLPs [Z, *widths, P] with LeakyReLU, their weights stacked as [K, out, in]."""

    def __init__(
        self,
        latent_dim: int,
        components: int,
        widths: Sequence[int],
        inr_widths: Sequence[int],
        published: bool,
        generator: torch.Generator | None = None,
    ) -> None:
        """`published`: default linear initialisation, as the published code.

        Otherwise z ~ N(0, I) keeps its scale through the hidden layers, the last bias holds coordinate networks at
        their own usual scale, and z moves their parameters by half of it.
        """
        super().__init__()
        sizes = [latent_dim, *widths, packed_size(inr_widths)]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in pairwise(sizes):
            bound = 1 / math.sqrt(a)
            self.weights.append(torch.empty(components, b, a).uniform_(-bound, bound, generator=generator))
            self.biases.append(torch.empty(components, b).uniform_(-bound, bound, generator=generator))
        if not published:
            with torch.no_grad():
                for i, weight in enumerate(self.weights):
                    weight.mul_(math.sqrt(3) if i == 0 else math.sqrt(6 / (1 + SLOPE**2)))  # unit variance
                self._scale_to_inr(inr_widths, generator)

    def _scale_to_inr(self, inr_widths: Sequence[int], generator: torch.Generator | None) -> None:
        layers = zip(
            unpack(self.weights[-1].mT, inr_widths), unpack(self.biases[-1], inr_widths), inr_widths[:-1], strict=True
        )
        for i, ((weight_by_z, bias_by_z), (weight, bias), fan_in) in enumerate(layers):
            last = i == len(inr_widths) - 2
            std = math.sqrt((1 if last else 2) / fan_in)  # of a layer that keeps the scale of its input
            weight.normal_(0, std, generator=generator)
            bias.normal_(0, std, generator=generator)
            weight_by_z.mul_(MODULATION * std)
            bias_by_z.mul_(MODULATION * std)

    def forward(self, z: Tensor) -> Tensor:
        """θ [B, K, P] from z [B, Z]; P is contiguous."""
        h = z.expand(self.weights[0].shape[0], -1, -1)  # [K, B, Z]
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = linear(h if i == 0 else F.leaky_relu(h, SLOPE), weight, bias)
        return h.transpose(0, 1)
