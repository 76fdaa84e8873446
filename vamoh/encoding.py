"""Random Fourier features of coordinates (Tancik et al. 2020)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vamoh.ops.fourier_features import fourier_features

_FARTHEST = 32.0
"""Coordinates beyond are of other units: even of long grids, whose pixels are square, few reach it."""

_LEAST_PERIODS = 0.05
"""Of the features along the longest axis; with fewer, points all look alike."""

_MEDIAN_NYQUIST = 0.74
"""Spacing times the features' frequency (root mean square) at which half of them have fewer than two points a period:
half of a normal variable's values are beyond 0.674 of its standard deviation."""


class FourierFeatures(nn.Module):
    """γ(x) = [cos 2πFx, sin 2πFx] with rows of F drawn from N(0, scale²); raw coordinates when `frequencies` is 0.

    Maps coords [..., D] to [..., E] with E = 2·frequencies (or D).
    Coordinates of other units are normalised first, to (coords - offset) / scale, once `set_domain` was called; the two
    are then part of the state.
    """

    _nominal: float  # standard deviation of the frequencies as asked for

    def __init__(
        self, coord_dim: int, frequencies: int, scale: float, learn: bool, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self._fill(torch.randn(frequencies, coord_dim, generator=generator) * scale, learn)
        self._nominal = abs(scale)

    @classmethod
    def of(cls, frequencies: Tensor) -> FourierFeatures:
        """Fixed features of a copy of these frequencies [E/2, D]."""
        features = cls.__new__(cls)
        nn.Module.__init__(features)
        features._fill(frequencies.detach().clone(), learn=False)
        features._nominal = math.nan  # nobody asks for it
        return features

    def _fill(self, matrix: Tensor, learn: bool) -> None:
        self.frequencies: Tensor  # [E/2, D], cycles per unit of coordinate
        if learn:
            self.frequencies = nn.Parameter(matrix)
        else:
            self.register_buffer("frequencies", matrix)
        self.offset: Tensor | None
        self.scale: Tensor | None  # both [D], in units of the coordinates
        self.register_buffer("offset", None)
        self.register_buffer("scale", None)
        self._in_host_memory: tuple[Tensor, Tensor] | None = None
        self.out_dim = 2 * matrix.shape[0] or matrix.shape[1]

    def set_domain(self, offset: Tensor, scale: Tensor) -> None:
        """Take coordinates as (coords - offset) / scale from now on; offset and scale > 0 [D]."""
        self.offset, self.scale = offset.to(self.frequencies), scale.to(self.frequencies)
        self._in_host_memory = self.offset.cpu(), self.scale.cpu()

    @property
    def domain(self) -> tuple[Tensor | None, Tensor | None]:
        """Offset and scale; None and None where coordinates are taken as they are."""
        return self.offset, self.scale

    def steps(self, step: Tensor) -> Tensor:
        """Lengths [D] along the axes, float64 in host memory, in the units of the frequencies."""
        return step if self._in_host_memory is None else step / self._in_host_memory[1].double()

    def normalized(self, coords: Tensor) -> Tensor:
        """Coordinates [..., D] in the units of the frequencies; differentiable."""
        if self.offset is None or self.scale is None or self._in_host_memory is None:
            return coords
        if coords.device == self.offset.device:
            return (coords - self.offset) / self.scale
        offset, scale = self._in_host_memory  # to fetch those of a GPU would wait for it
        return (coords - offset.to(coords)) / scale.to(coords)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """A state with a domain is taken by features that have none yet."""
        names = [prefix + name for name in ("offset", "scale")]
        if all(name in state_dict for name in names):
            self.set_domain(*(state_dict[name] for name in names))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @torch.no_grad()
    def problem(self, coords: Tensor) -> str:
        """What is wrong with coordinates [N, D] for these frequencies, in words; nothing for good ones.

        Points farther apart than half a period of most frequencies are too coarse a sample of the features (Nyquist).
        """
        x = self.normalized(coords).double()
        if len(x) < 2:
            return ""
        remedy = "; call set_domain(coords) first, or give coordinates that span [-1, 1]"
        extent = float((x.amax(0) - x.amin(0)).max())
        farthest = float(x.abs().max())
        if farthest > _FARTHEST:
            return f"coordinates must be near [-1, 1], got them up to {farthest:g} from 0{remedy}"
        if not len(self.frequencies):
            return ""
        in_host = self.frequencies.device.type == "cpu"  # to read those of a GPU would wait for it
        frequency = float(self.frequencies.double().square().mean().sqrt()) if in_host else self._nominal
        if extent * frequency < _LEAST_PERIODS:
            return f"coordinates must span a good part of [-1, 1], got {extent:g} in all{remedy}"
        some = torch.linspace(0, len(x) - 1, min(len(x), 256)).long()
        apart = torch.cdist(x[some], x).scatter(1, some[:, None], math.inf)
        spacing = float(apart.amin(1).median())
        if spacing * frequency <= _MEDIAN_NYQUIST:
            return ""
        if extent > 3 and 2 / extent * spacing * frequency <= _MEDIAN_NYQUIST:
            reason = remedy
        else:
            reason = f"; take a frequency_scale of at most {_MEDIAN_NYQUIST / spacing:.2g}, or more points"
        return (
            f"coordinates must be sampled more finely: neighbours {spacing:.3g} apart show frequencies up to "
            f"{0.5 / spacing:.2g} cycles per unit, and most of the features', of {frequency:.2g}, are above{reason}"
        )

    def forward(self, coords: Tensor) -> Tensor:
        """Encode coords [..., D] of the frequencies' dtype as [..., E]; differentiable."""
        coords = self.normalized(coords)
        if not len(self.frequencies):
            return coords
        return fourier_features(coords, self.frequencies)
