"""Random Fourier features of coordinates (Tancik et al. 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vamoh._cache import ContentCache
from vamoh.points import antipodes

_REMEMBERED = 1 << 18
"""Most points of a grid whose opposites are remembered."""


class FourierFeatures(nn.Module):
    """γ(x) = [cos 2πFx, sin 2πFx] with rows of F drawn from N(0, scale²); raw coordinates when `frequencies` is 0.

    Maps coords [..., D] to [..., E] with E = 2·frequencies (or D). Fixed features of a grid are computed once.
    """

    def __init__(self, coord_dim: int, frequencies: int, scale: float, learn: bool) -> None:
        super().__init__()
        matrix = torch.randn(frequencies, coord_dim) * scale  # [E/2, D], cycles per unit of coordinate
        self.frequencies: Tensor
        if learn:
            self.frequencies = nn.Parameter(matrix)
        else:
            self.register_buffer("frequencies", matrix)
        self.out_dim = 2 * frequencies if frequencies else coord_dim
        self._cache: ContentCache[Tensor] = ContentCache()
        self._mirrors: ContentCache[Tensor | None] = ContentCache()

    def forward(self, coords: Tensor) -> Tensor:
        """Encode coords [..., D] of the frequencies' dtype as [..., E]; differentiable."""
        if not len(self.frequencies):
            return coords
        phase = coords @ (2 * math.pi * self.frequencies).mT
        return torch.cat([phase.cos(), phase.sin()], -1)

    def cached(self, coords: Tensor) -> Tensor:
        """`forward`, remembered for coordinates that come again; with gradients or while compiling, computed afresh."""
        raw = not len(self.frequencies)  # a remembered result would be the caller's own tensor
        if raw or torch.compiler.is_compiling() or coords.requires_grad or self.frequencies.requires_grad:
            return self(coords)  # type: ignore[no-any-return]
        return self._cache.get((coords, self.frequencies), lambda: self(coords))

    def mirror(self, coords: Tensor) -> Tensor | None:
        """`antipodes` of coords [N, D], remembered: the cosines of opposite points are equal, the sines opposite.

        None where that saves nothing: raw coordinates, coordinates of their own for every function, few opposites; and
        while compiling, as it depends on the values.
        """
        if not len(self.frequencies) or coords.dim() != 2 or torch.compiler.is_compiling():
            return None
        if len(coords) > _REMEMBERED:
            return antipodes(coords.detach())
        return self._mirrors.get((coords,), lambda: antipodes(coords.detach()))
