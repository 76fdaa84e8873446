"""Point sets: a batch of functions, each known at some points of its domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vamoh._checks import (
    FLOATING,
    check_device,
    check_finite,
    check_positive,
    check_tensor,
    check_type,
    values_readable,
)
from vamoh.grids import grid_coords as grid_coords
from vamoh.grids import grid_shape as grid_shape
from vamoh.grids import sphere_coords as sphere_coords
from vamoh.grids import sphere_grid as sphere_grid
from vamoh.grids import sphere_grid_shape as sphere_grid_shape
from vamoh.grids import to_grid as to_grid


@dataclass(frozen=True, eq=False)
class PointSet:
    """A batch of B functions given by their values at N points.

    coords: [N, D] shared by the batch, or [B, N, D] per function; float32 or float64, dimensionless.
    values: [B, N, C], same dtype and device as coords.
    mask:   None (all observed), [N] shared, or [B, N] per function; bool, True where observed.
    Values at unobserved points are ignored by every consumer, but must be finite.

    Raises TypeError or ValueError naming the field, what was expected and what came.
    """

    coords: Tensor
    values: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        where = "PointSet"
        values = check_tensor(where, "values", self.values, ["B", "N", "C"], dtypes=FLOATING)
        if values.shape[0] == 0:
            raise ValueError(
                f"{where}: values must hold at least one function, got an empty batch {list(values.shape)}"
            )
        batch, count, _ = values.shape
        if not isinstance(self.coords, Tensor) or self.coords.dim() not in (2, 3):
            got = list(self.coords.shape) if isinstance(self.coords, Tensor) else type(self.coords).__name__
            raise ValueError(f"{where}: coords must have shape [N, D] or [B, N, D], got {got}")
        shape: list[int | str | None] = [count, "D"] if self.coords.dim() == 2 else [batch, count, "D"]
        check_tensor(where, "coords", self.coords, shape, like=values)
        check_finite(where, "coords", self.coords)
        check_finite(where, "values", values)
        if self.mask is not None:
            if not isinstance(self.mask, Tensor) or tuple(self.mask.shape) not in ((count,), (batch, count)):
                got = list(self.mask.shape) if isinstance(self.mask, Tensor) else type(self.mask).__name__
                raise ValueError(f"{where}: mask must have shape [{count}] or [{batch}, {count}], got {got}")
            check_tensor(where, "mask", self.mask, list(self.mask.shape), dtypes=[torch.bool])
            if self.mask.device != values.device:
                raise TypeError(f"{where}: mask must be on {values.device}, got {self.mask.device}")

    def _with(self, coords: Tensor, values: Tensor, mask: Tensor | None) -> PointSet:
        """Points made of these, which were checked already: reading them again would wait for their device."""
        derived = object.__new__(type(self))
        for name, value in (("coords", coords), ("values", values), ("mask", mask)):
            object.__setattr__(derived, name, value)
        return derived

    def value_range(self) -> tuple[float, float]:
        """Least and largest value, observed or not (0 where there are none)."""
        low, high = self.values.aminmax() if self.values.numel() else (0.0, 0.0)
        return float(low), float(high)

    def observed(self) -> tuple[int, int]:
        """Observed points of the function that has the fewest, and of that with the most."""
        if self.mask is None:
            return self.count, self.count
        counts = self.mask.sum(-1).flatten().tolist()
        return min(counts), max(counts)

    @property
    def batch(self) -> int:
        """Number of functions B."""
        return self.values.shape[0]

    @property
    def count(self) -> int:
        """Number of points N of each function, observed or not."""
        return self.values.shape[1]

    @property
    def coord_dim(self) -> int:
        """Number of coordinate dimensions D."""
        return self.coords.shape[-1]

    @property
    def channels(self) -> int:
        """Number of channels C of a value."""
        return self.values.shape[2]

    def to(self, target: torch.device | torch.dtype | str) -> PointSet:
        """Copy to a device, or to a floating dtype (the mask stays bool)."""
        if isinstance(target, torch.dtype):
            if target not in FLOATING:
                raise TypeError(f"PointSet.to: target must be a device, float32 or float64, got {target}")
            return PointSet(self.coords.to(target), self.values.to(target), self.mask)
        if not isinstance(target, torch.device):
            target = check_device("PointSet.to: target", target)
        mask = None if self.mask is None else self.mask.to(target)
        return self._with(self.coords.to(target), self.values.to(target), mask)

    def with_mask(self, mask: Tensor | None) -> PointSet:
        """Return the same points with another mask, [N] or [B, N] bool."""
        return replace(self, mask=mask)

    def restrict(self, seen: Tensor) -> PointSet:
        """Return the same points, observed only where they were and where seen, [N] or [B, N] bool, is True."""
        check_type("PointSet.restrict", "seen", seen, Tensor)
        batched = seen.dim() == 2
        check_tensor("PointSet.restrict", "seen", seen, [self.batch, self.count][not batched :], dtypes=[torch.bool])
        return self._with(self.coords, self.values, seen if self.mask is None else self.mask & seen)

    def select(self, index: Tensor) -> PointSet:
        """Keep the points `index` [N'] (int64) of every function, in that order."""
        check_tensor("PointSet.select", "index", index, ["N'"], dtypes=[torch.int64])
        if index.device.type == "cpu" and index.numel() and values_readable(index):
            low, high = int(index.min()), int(index.max())
            if low < -self.count or high >= self.count:
                raise ValueError(f"PointSet.select: index must lie within the {self.count} points, got {low} to {high}")
        coords = self.coords[..., index, :]
        mask = None if self.mask is None else self.mask[..., index]
        return self._with(coords, self.values[:, index], mask)

    def part(self, functions: slice | Tensor) -> PointSet:
        """Keep the functions of a slice of the batch, or at indices int64."""
        coords = self.coords[functions] if self.coords.dim() == 3 else self.coords
        mask = self.mask[functions] if self.mask is not None and self.mask.dim() == 2 else self.mask
        return self._with(coords, self.values[functions], mask)

    def repeat(self, times: int) -> PointSet:
        """The batch so many times over, one after another: B · times functions."""
        coords = self.coords.repeat(times, 1, 1) if self.coords.dim() == 3 else self.coords
        mask = self.mask.repeat(times, 1) if self.mask is not None and self.mask.dim() == 2 else self.mask
        return self._with(coords, self.values.repeat(times, 1, 1), mask)

    def compact(self) -> PointSet:
        """Drop the points that no function observes; a mask shared by the batch disappears.

        With a mask [N] the result holds exactly the observed points, in order, and no mask. With a mask per function
        [B, N] the points observed by at least one function stay, with values of 0 where they are not observed.
        """
        if self.mask is None:
            return self
        any_observed = self.mask if self.mask.dim() == 1 else self.mask.any(0)
        kept = self if bool(any_observed.all()) else self.select(any_observed.nonzero()[:, 0])
        if kept.mask is None or bool(kept.mask.all()):
            return self._with(kept.coords, kept.values, None)
        return self._with(kept.coords, torch.where(kept.mask[..., None], kept.values, 0), kept.mask)

    def drop(self, rate: float, generator: torch.Generator | None = None, at_least: int = 1) -> PointSet:
        """Point dropout: keep each point with probability 1 - rate, one draw shared by the batch (Alg. 1).

        Never leaves fewer than `at_least` points: the points of the largest draws are then kept.
        Returns the kept points only, in order.
        """
        check_type("PointSet.drop", "rate", rate, int, float)
        check_positive("PointSet.drop", "at_least", at_least)
        check_type("PointSet.drop", "generator", generator, torch.Generator, type(None))
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"PointSet.drop: rate must be between 0 and 1, got {rate}")
        if rate == 0.0:
            return self
        draw = torch.rand(self.count, generator=generator)
        kept = (draw >= rate).nonzero()[:, 0]
        if len(kept) < at_least:
            kept = draw.topk(min(at_least, self.count)).indices.sort().values
        return self.select(kept.to(self.values.device))

    def subsample(self, count: int, generator: torch.Generator | None = None, at_least: int = 0) -> PointSet:
        """Keep `count` points drawn without replacement, one draw shared by the batch, in their original order.

        Where a function would be left fewer than `at_least` observed points, its next ones in the order of the draw are
        kept too, as far as it has them.
        """
        check_positive("PointSet.subsample", "count", count)
        check_type("PointSet.subsample", "generator", generator, torch.Generator, type(None))
        if count > self.count:
            raise ValueError(f"PointSet.subsample: count must be at most N={self.count}, got {count}")
        order = torch.randperm(self.count, generator=generator)
        kept = torch.zeros(self.count, dtype=torch.bool)
        kept[order[:count]] = True
        if at_least and self.mask is not None:
            drawn = self.mask.cpu().expand(self.batch, -1)[:, order]
            fewer = drawn[drawn[:, :count].sum(1) < at_least]
            kept[order[(fewer & (fewer.cumsum(1) <= at_least)).any(0)]] = True
        return self.select(kept.nonzero()[:, 0].to(self.values.device))

    @staticmethod
    def from_grid(values: Tensor, coords: Tensor | None = None, mask: Tensor | None = None) -> PointSet:
        """Points of a batch of regular grids.

        values: [B, C, *shape] (images, voxels, fields). coords: [N, D], default `grid_coords(shape)`.
        mask: None, [*shape] or [B, *shape] bool. Points are in row-major order.
        """
        if not isinstance(values, Tensor) or values.dim() < 3:
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"PointSet.from_grid: values must have shape [B, C, *shape], got {got}")
        shape = tuple(values.shape[2:])
        if coords is None:
            coords = grid_coords(shape, dtype=values.dtype, device=values.device)
        if mask is not None:
            check_type("PointSet.from_grid", "mask", mask, Tensor)
            if tuple(mask.shape) not in (shape, (values.shape[0], *shape)):
                raise ValueError(
                    f"PointSet.from_grid: mask must have shape {list(shape)} or {[values.shape[0], *shape]}, "
                    f"got {list(mask.shape)}"
                )
            mask = mask.flatten() if mask.dim() == len(shape) else mask.flatten(1)
        return PointSet(coords, values.flatten(2).transpose(1, 2).contiguous(), mask)

    @staticmethod
    def from_lists(coords: Sequence[Tensor], values: Sequence[Tensor]) -> PointSet:
        """Point lists of different lengths, padded to the longest with a mask.

        coords: B tensors [N_b, D]; values: B tensors [N_b, C]. Padding repeats zeros and is masked out.
        """
        for name, tensors in (("coords", coords), ("values", values)):
            check_type("PointSet.from_lists", name, tensors, list, tuple)
            for i, tensor in enumerate(tensors):
                check_tensor("PointSet.from_lists", f"{name}[{i}]", tensor, ["N", None], dtypes=FLOATING)
        if len(coords) != len(values) or not coords:
            raise ValueError(
                f"PointSet.from_lists: coords and values must be lists of one length >= 1, "
                f"got {len(coords)} and {len(values)}"
            )
        for i, (x, y) in enumerate(zip(coords, values, strict=True)):
            check_tensor("PointSet.from_lists", f"coords[{i}]", x, ["N", coords[0].shape[-1]], like=coords[0])
            check_tensor("PointSet.from_lists", f"values[{i}]", y, [x.shape[0], values[0].shape[-1]], like=x)
        pad = torch.nn.utils.rnn.pad_sequence
        lengths = torch.tensor([len(x) for x in coords], device=coords[0].device)
        mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        return PointSet(
            pad(list(coords), batch_first=True), pad(list(values), batch_first=True), None if mask.all() else mask
        )


def collate(functions: Sequence[PointSet | Sequence[Tensor | None]]) -> PointSet:
    """Batch functions of any number of points: the `collate_fn` of a `torch.utils.data.DataLoader`.

    functions: each (coords [N_b, D], values [N_b, C]), (coords, values, mask [N_b] bool or None), or a PointSet, whose
    functions are batched one by one. Equal coordinates, as those of a grid, are shared by the batch; lists of different
    lengths are padded under a mask.
    Raises TypeError or ValueError naming the function.
    """
    where = "collate"
    check_type(where, "functions", functions, list, tuple)
    parts: list[tuple[Any, Any, Any]] = []
    for i, function in enumerate(functions):
        if isinstance(function, PointSet):
            singles = (function.part(slice(b, b + 1)) for b in range(function.batch))
            parts += [
                (s.coords.flatten(0, -2), s.values[0], None if s.mask is None else s.mask.flatten()) for s in singles
            ]
            continue
        check_type(where, f"functions[{i}]", function, PointSet, tuple, list)
        if len(function) not in (2, 3):
            raise ValueError(
                f"{where}: functions[{i}] must be coords, values and maybe a mask, got {len(function)} entries"
            )
        coords_of, values_of, mask_of = (*function, None)[:3]
        parts.append((coords_of, values_of, mask_of))
    coords, values, masks = map(list, zip(*parts, strict=True)) if parts else ([], [], [])
    batch = PointSet.from_lists(coords, values)
    if any(mask is not None for mask in masks):
        for i, (mask, y) in enumerate(zip(masks, values, strict=True)):
            if mask is None:
                masks[i] = torch.ones(len(y), dtype=torch.bool, device=y.device)
            check_tensor(where, f"masks[{i}]", masks[i], [len(y)], dtypes=[torch.bool])
        batch = batch.with_mask(torch.nn.utils.rnn.pad_sequence(masks, batch_first=True))
    first = coords[0]
    shared = all(x is first or (x.shape == first.shape and torch.equal(x, first)) for x in coords)
    return batch._with(first, batch.values, batch.mask) if shared else batch


def observed_coords(coords: Tensor, mask: Tensor | None) -> Tensor:
    """Coordinates [M, D] of all points that some function observes; coords and mask as in a `PointSet`."""
    if mask is None:
        return coords.reshape(-1, coords.shape[-1])
    if coords.dim() == 2:
        return coords[mask if mask.dim() == 1 else mask.any(0)]
    return coords[:, mask].flatten(0, 1) if mask.dim() == 1 else coords[mask]


def domain(coords: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Offset and scale [D] with which (coords - offset) / scale has its middle at 0 and reaches 1 on its longest axis.

    coords [N, D]. One scale keeps angles and the shape of neighbourhoods. Only where some axis is less than a tenth of
    the longest, so that their units have nothing to do with each other, each has its own. An axis of one value takes
    the scale of the longest. Both are numbers that float32 holds. Raises ValueError for no points or infinite ones.
    """
    check_tensor("domain", "coords", coords, ["N", None], dtypes=FLOATING)
    if not len(coords):
        raise ValueError("domain: coords must hold at least one point, got none")
    check_finite("domain", "coords", coords)
    low, high = (bound.double() for bound in coords.aminmax(dim=0))
    middle, reach = (((high + sign * low) / 2).float().tolist() for sign in (1, -1))
    longest = max(reach) or 1.0
    apart = min((r for r in reach if r > 0), default=longest) < _OWN_SCALE * longest
    return tuple(middle), tuple(r if apart and r > 0 else longest for r in reach)


_OWN_SCALE = 0.1
"""Share of the longest axis below which axes have a scale of their own."""


def upload(value: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from host memory to a device; to a GPU by pinned memory, so that the copy is asynchronous."""
    pinned = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
    return pinned.to(device, non_blocking=pinned is not value)
