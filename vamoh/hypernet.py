"""Hypernetworks: z to the parameters of K coordinate networks, all heads batched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vamoh.layout import packed_size, unpack

SLOPE = 0.1
"""LeakyReLU slope of the hypernetworks (the published code's)."""


class Hypernet(nn.Module):
    """K MLPs [Z, *widths, P] with LeakyReLU, their weights stacked as [K, out, in]."""

    def __init__(
        self, latent_dim: int, components: int, widths: Sequence[int], inr_widths: Sequence[int], published: bool
    ) -> None:
        """`published`: default linear initialisation, as the published code.

        Otherwise the last bias holds coordinate networks at their own usual initial scale, and z moves them by a
        fifth of it, so that reconstructions start sensible whatever the widths.
        """
        super().__init__()
        sizes = [latent_dim, *widths, packed_size(inr_widths)]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in pairwise(sizes):
            bound = 1 / math.sqrt(a)
            self.weights.append(torch.empty(components, b, a).uniform_(-bound, bound))
            self.biases.append(torch.empty(components, b).uniform_(-bound, bound))
        if not published:
            with torch.no_grad():
                self._scale_to_inr(inr_widths)

    def _scale_to_inr(self, inr_widths: Sequence[int]) -> None:
        bias, weight = self.biases[-1], self.weights[-1]
        for i, (w, b) in enumerate(unpack(bias, inr_widths)):
            last = i == len(inr_widths) - 2
            bound = math.sqrt((1 if last else 6) / inr_widths[i])
            w.uniform_(-bound, bound)
            b.uniform_(-1 / math.sqrt(inr_widths[i]), 1 / math.sqrt(inr_widths[i]))
        for i, (w, b) in enumerate(unpack(weight.mT, inr_widths)):
            gain = 0.2 * math.sqrt(6 / inr_widths[i])
            w.mul_(gain)
            b.mul_(gain)

    def forward(self, z: Tensor) -> Tensor:
        """θ [B, K, P] from z [B, Z]; P is contiguous."""
        h = z.expand(self.weights[0].shape[0], -1, -1)  # [K, B, Z]
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias[:, None], h if i == 0 else F.leaky_relu(h, SLOPE), weight.mT)
        return h.transpose(0, 1)
