"""Which component explains a point: prior p(c | x, z) and posterior q(c | x, y, z)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.1
"""LeakyReLU slope of the gating networks (the published code's)."""


class Gating(nn.Module):
    """An MLP on [γ(x), y, z] (posterior) or [γ(x), z] (prior, `channels` 0) with a softmax over K components.

    The first layer is split: its coordinate part is computed once for the batch and its z part once per function.
    `bounded` passes the logits through tanh, as the published code does; no component can then be certain.
    """

    def __init__(
        self, encoded_dim: int, channels: int, latent_dim: int, widths: Sequence[int], components: int, bounded: bool
    ) -> None:
        super().__init__()
        sizes = [*widths, components]
        self.by_coords = nn.Linear(encoded_dim, sizes[0])
        self.by_value = nn.Linear(channels, sizes[0], bias=False) if channels else None
        self.by_z = nn.Linear(latent_dim, sizes[0], bias=False)
        self.rest = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.bounded = bounded
        bound = 1 / math.sqrt(encoded_dim + channels + latent_dim)
        for parameter in (*self.by_coords.parameters(), *self.by_z.parameters()):
            nn.init.uniform_(parameter, -bound, bound)
        if self.by_value is not None:
            nn.init.uniform_(self.by_value.weight, -bound, bound)

    def forward(self, encoded: Tensor, z: Tensor, values: Tensor | None = None) -> Tensor:
        """Log-probabilities [B, K, N] of the components.

        encoded [N, E] or [B, N, E]; z [B, Z]; values [B, N, C] for the posterior.
        """
        h = self.by_coords(encoded) + self.by_z(z)[:, None]  # [B, N, H]
        if self.by_value is not None:
            h = h + self.by_value(values)
        for layer in self.rest:
            h = layer(F.leaky_relu(h, SLOPE))
        logits = torch.tanh(h) if self.bounded else h
        return F.log_softmax(logits.mT, 1)


def uniform(batch: int, components: int, like: Tensor) -> Tensor:
    """Log-probabilities [B, K, 1] of the uniform prior held during the gating's warm-up."""
    return like.new_full((batch, components, 1), -math.log(components))
