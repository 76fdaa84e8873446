"""Which component explains a point: prior p(c | x, z) and posterior q(c | x, y, z)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vamoh._initial import linear_layer
from vamoh.ops._autocast import float32_under_autocast
from vamoh.ops.gating import gating
from vamoh.ops.linear import linear

SLOPE = 0.1
"""LeakyReLU slope of the gating networks (the published code's)."""


class Gating(nn.Module):
    """An MLP on [γ(x), y, z] (posterior) or [γ(x), z] (prior, `channels` 0) with a softmax over K components.

    The first layer is split: its coordinate part is computed once for the batch and its z part once per function.
    `bounded` passes the logits through tanh, as the published code does; no component can then be certain.
    """

    def __init__(
        self,
        encoded_dim: int,
        channels: int,
        latent_dim: int,
        widths: Sequence[int],
        components: int,
        bounded: bool,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = [*widths, components]
        self.by_coords = linear_layer(encoded_dim, sizes[0], generator)
        self.by_value = linear_layer(channels, sizes[0], generator, bias=False) if channels else None
        self.by_z = linear_layer(latent_dim, sizes[0], generator, bias=False)
        self.rest = nn.ModuleList(linear_layer(a, b, generator) for a, b in pairwise(sizes))
        self.bounded = bounded
        bound = 1 / math.sqrt(encoded_dim + channels + latent_dim)
        for parameter in (*self.by_coords.parameters(), *self.by_z.parameters()):
            nn.init.uniform_(parameter, -bound, bound, generator)
        if self.by_value is not None:
            nn.init.uniform_(self.by_value.weight, -bound, bound, generator)

    def forward(self, encoded: Tensor, z: Tensor, values: Tensor | None = None) -> Tensor:
        """Log-probabilities [B, K, N] of the components.

        encoded [N, E] or [B, N, E]; z [B, Z]; values [B, N, C] for the posterior. Differentiable once; the prior twice
        where `encoded` needs a gradient.
        """
        twice = values is None and torch.is_grad_enabled() and encoded.requires_grad
        return self._finish(_coordinate_parts(encoded, [self], twice)[0], z, values, twice)

    def _finish(self, coords: Tensor, z: Tensor, values: Tensor | None, twice: bool = False) -> Tensor:
        """Log-probabilities from the coordinates' part of the first layer, [H, N] or [B, H, N]."""
        layers = [layer for layer in self.rest if isinstance(layer, nn.Linear)]
        return gating(
            coords,
            F.linear(z, self.by_z.weight, self.by_coords.bias),
            [layer.weight for layer in layers],
            [layer.bias for layer in layers],
            None if self.by_value is None else values,
            None if self.by_value is None else self.by_value.weight,
            slope=SLOPE,
            bounded=self.bounded,
            twice=twice,
        )


def posterior_and_prior(
    posterior: Gating, prior: Gating, encoded: Tensor, z: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, K, N] of both networks, as their calls give; reads the encoded coordinates once."""
    part_q, part_p = _coordinate_parts(encoded, [posterior, prior])
    return posterior._finish(part_q, z, values), prior._finish(part_p, z, None)


@float32_under_autocast
def _coordinate_parts(encoded: Tensor, networks: Sequence[Gating], twice: bool = False) -> Sequence[Tensor]:
    """What the coordinates add to the first layer of every network, [H, N] or [B, H, N], without the bias.

    encoded [N, E] or [B, N, E]. `twice` takes plain torch, which has second derivatives.
    """
    weights = [network.by_coords.weight for network in networks]
    weight = torch.cat(weights)
    if twice:
        parts = weight @ encoded.mT
    elif encoded.dim() == 2:
        parts = linear(weight[None], encoded[None], None)[0]
    else:
        parts = linear(weight.expand(encoded.shape[0], -1, -1), encoded, None)
    split: Sequence[Tensor] = parts.split([len(weight) for weight in weights], -2)
    return split


def uniform(batch: int, components: int, like: Tensor) -> Tensor:
    """Log-probabilities [B, K, 1] of the uniform prior held during the gating's warm-up."""
    return like.new_full((batch, components, 1), -math.log(components))
