"""Random Fourier features of coordinates (Tancik et al. 2020)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vamoh._cache import ContentCache
from vamoh.ops.fourier_features import fourier_features
from vamoh.points import Lattice, antipodes, lattice, upload

_SMALL_TABLE = 1 << 18
"""Entries of a table of displacements that are always worth their computation: the grid of 32^3 voxels has fewer."""

_LARGEST_TABLE = 1 << 22

_REMEMBERED = 1 << 18
"""Most points of a grid whose opposites are remembered."""


_FARTHEST = 32.0
"""Coordinates beyond are of other units: even of long grids, whose pixels are square, few reach it."""

_LEAST_PERIODS = 0.05
"""Of the features along the longest axis; with fewer, points all look alike."""

_MEDIAN_NYQUIST = 0.74
"""Spacing times the features' frequency (root mean square) at which half of them have fewer than two points a period:
half of a normal variable's values are beyond 0.674 of its standard deviation."""


class FourierFeatures(nn.Module):
    """γ(x) = [cos 2πFx, sin 2πFx] with rows of F drawn from N(0, scale²); raw coordinates when `frequencies` is 0.

    Maps coords [..., D] to [..., E] with E = 2·frequencies (or D). Fixed features of a grid are computed once.
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
        self._cache: ContentCache[Tensor] = ContentCache()
        self._mirrors: ContentCache[Tensor | None] = ContentCache()
        self._tables: ContentCache[Tensor] = ContentCache()
        self._lattices: ContentCache[Lattice | None] = ContentCache()
        self._copies: ContentCache[tuple[Tensor, Tensor | None]] = ContentCache()

    def set_domain(self, offset: Tensor, scale: Tensor) -> None:
        """Take coordinates as (coords - offset) / scale from now on; offset and scale > 0 [D]."""
        self.offset, self.scale = offset.to(self.frequencies), scale.to(self.frequencies)
        self._in_host_memory = self.offset.cpu(), self.scale.cpu()

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

    def cached(self, coords: Tensor) -> Tensor:
        """`forward`, remembered for coordinates that come again; with gradients or while compiling, computed afresh."""
        raw = not len(self.frequencies)  # a remembered result would be the caller's own tensor
        if raw or torch.compiler.is_compiling() or coords.requires_grad or self.frequencies.requires_grad:
            return self(coords)  # type: ignore[no-any-return]
        return self._cache.get((coords, self.frequencies, self.offset, self.scale), lambda: self(coords))

    def mirror(self, coords: Tensor) -> Tensor | None:
        """`antipodes` of normalised coords [N, D], remembered: their cosines are equal, their sines opposite.

        None where that saves nothing: raw coordinates, coordinates of their own for every function, few opposites; and
        while compiling, as it depends on the values.
        """
        if not len(self.frequencies) or coords.dim() != 2 or torch.compiler.is_compiling():
            return None
        if len(coords) > _REMEMBERED and coords.device.type == "cpu":
            return antipodes(self.normalized(coords.detach()))
        key = (coords, self.offset, self.scale)
        return self._mirrors.get(key, lambda: antipodes(self.normalized(coords.detach())))

    def copied(self, coords: Tensor, mask: Tensor | None, again: bool) -> tuple[Tensor, Tensor | None]:
        """Copies of coords [..., N, D] and mask [..., N] from host memory in that of the frequencies.

        What `mirror` and `metric` find out by looking at them is found here, before: to look at the copies would wait
        for a GPU. again: the same coordinates will come again; they have one copy then. Otherwise `mirror` is None.
        """
        if again:
            return self._copies.get((coords, mask), lambda: self._copy(coords, mask, again))
        return self._copy(coords, mask, again)

    def _copy(self, coords: Tensor, mask: Tensor | None, again: bool) -> tuple[Tensor, Tensor | None]:
        device = self.frequencies.device
        copies = upload(coords, device), None if mask is None else upload(mask, device)
        if len(self.frequencies):
            found = _lattice(coords, mask)
            found = found and Lattice(upload(found.cells, device), found.sizes, found.step)
            self._lattices.put(copies, found)
            mirror = self.mirror(coords) if again else None
            key = (copies[0], self.offset, self.scale)
            self._mirrors.put(key, None if mirror is None else upload(mirror, device))
        return copies

    @torch.no_grad()
    def metric(self, coords: Tensor, mask: Tensor | None, distances: int) -> tuple[Tensor, Tensor | None]:
        """Points and table, as the ops on point clouds take them, for distances between encoded coords [..., N, D].

        On a lattice, places and a table of squared distances, if the table is small or has fewer entries than
        `distances`, the number that will be looked up; else the encoded coordinates and None. Points where mask
        [..., N] is False need not be on the lattice. In the table δ and -δ are equally far; between encoded coordinates
        rounding decides.
        """
        if not len(self.frequencies):
            return self.normalized(coords), None
        found = self._lattices.get((coords, mask), lambda: _lattice(coords, mask))
        if found is None or found.displacements > min(max(distances, _SMALL_TABLE), _LARGEST_TABLE):
            return self.cached(coords), None
        if self._in_host_memory is not None:
            found = Lattice(found.cells, found.sizes, found.step / self._in_host_memory[1].double())
        key = (self.frequencies, torch.tensor(found.sizes), found.step)
        return found.places(), self._tables.get(key, lambda: self._squared_distances(found))

    def _squared_distances(self, lattice: Lattice) -> Tensor:
        """Squared distance of the encoded ends of every displacement, see `Lattice.places`.

        Σ_f 2 - 2 cos 2πf·δ, where the angle is a sum over the axes: its cosine and sine come from theirs, axis by axis,
        and the last axis is a matrix product. δ and -δ are equally far, so half of the displacements will do.
        """
        waves: list[tuple[Tensor, Tensor]] = []
        for n, step, frequency in zip(lattice.sizes, lattice.step.tolist(), self.frequencies.mT, strict=True):
            offset = torch.arange(1 - n, n if waves else 1, dtype=torch.float64, device=frequency.device)[:, None]
            angle = offset * (2 * math.pi * step * frequency.double())
            waves.append((angle.cos(), angle.sin()))
        last = waves.pop()
        cosine, sine = waves[0] if waves else (torch.ones_like(last[0][:1]), torch.zeros_like(last[1][:1]))
        for c, s in waves[1:]:
            cosine, sine = cosine[:, None], sine[:, None]
            cosine, sine = (cosine * c - sine * s).flatten(0, 1), (sine * c + cosine * s).flatten(0, 1)
        total = torch.cat([cosine, -sine], 1) @ torch.cat(last, 1).mT
        half = 2 * (len(self.frequencies) - total.flatten()[: lattice.displacements // 2])
        squared: Tensor = torch.cat([half, half.new_zeros(1), half.flip(0)])
        return squared.clamp_(min=0).to(self.frequencies.dtype)


def _lattice(coords: Tensor, mask: Tensor | None) -> Lattice | None:
    """Lattice of the points that mask [..., N] leaves of coords [..., N, D]; the others count as one of them."""
    return lattice(coords if mask is None else coords.where(mask[..., None], coords[mask][:1]))


_LATTICES: ContentCache[Lattice | None] = ContentCache()
"""Of the coordinates that `raw_metric` saw."""


@torch.no_grad()
def raw_metric(coords: Tensor, mask: Tensor | None, distances: int) -> tuple[Tensor, Tensor | None]:
    """As `FourierFeatures.metric`, for distances between the coordinates themselves."""
    found = _LATTICES.get((coords, mask), lambda: _lattice(coords, mask))
    if found is None or found.displacements > min(max(distances, _SMALL_TABLE), _LARGEST_TABLE):
        return coords, None
    offsets = [
        torch.arange(1 - n, n, dtype=torch.float64) * step
        for n, step in zip(found.sizes, found.step.tolist(), strict=True)
    ]
    squared = torch.stack([offset.square() for offset in torch.meshgrid(*offsets, indexing="ij")]).sum(0)
    return found.places(), squared.flatten().to(coords.dtype)
