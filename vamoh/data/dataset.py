"""What every data set looks like once it is open: functions on a grid or on bare points, with fixed splits."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vamoh._checks import check_choice, check_positive, check_sizes, check_tensor, check_type
from vamoh.points import PointSet, grid_coords, grid_shape, sphere_grid, sphere_grid_shape

Kind = Literal["image", "voxels", "sphere", "points"]
KINDS = ("image", "voxels", "sphere", "points")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Dataset:
    """n functions in memory, each known at N points.

    kind:       "image" (row, column), "voxels" (three axes), "sphere" (latitude-longitude grid) or "points" (no grid).
    shape:      grid sizes, their product is N; () for points.
    coords:     [N, D] float32 shared by all functions, or [n, N, D] for point lists.
    values:     [n, N, C] float32 in [0, 1], or uint8 that `batch` divides by 255.
    mask:       None (all observed), [N] or [n, N] bool, True where observed; values elsewhere are 0.
    splits:     "train", "validation" and "test": disjoint int64 indices into the n functions.
    labels:     None or [n] / [n, F], never used by training.
    likelihood: name of the likelihood that fits the values.
    units:      (unit, natural value of 0, natural value of 1), such as ("K", 200.0, 320.0).
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    coords: Tensor
    values: Tensor
    splits: dict[str, Tensor]
    likelihood: str
    mask: Tensor | None = None
    labels: Tensor | None = None
    units: tuple[str, float, float] = ("", 0.0, 1.0)

    def __post_init__(self) -> None:
        where = f"Dataset {self.name}"
        check_choice(where, "kind", self.kind, KINDS)
        check_tensor(where, "values", self.values, ["n", "N", "C"], dtypes=[torch.float32, torch.uint8])
        n, count, _ = self.values.shape
        check_type(where, "coords", self.coords, Tensor)
        check_type(where, "mask", self.mask, Tensor, type(None))
        check_type(where, "splits", self.splits, dict)
        check_sizes(where, "shape", self.shape)
        shared: list[int | str | None] = [count, "D"]
        shape = shared if self.coords.dim() == 2 else [n, *shared]
        check_tensor(where, "coords", self.coords, shape, dtypes=[torch.float32])
        if self.mask is not None:
            mask_shape = [count] if self.mask.dim() == 1 else [n, count]
            check_tensor(where, "mask", self.mask, mask_shape, dtypes=[torch.bool])
        if self.kind != "points" and torch.Size(self.shape).numel() != count:
            raise ValueError(f"{where}: shape {list(self.shape)} must hold N={count} points")
        if set(self.splits) != set(SPLITS):
            raise ValueError(f"{where}: splits must be {', '.join(SPLITS)}, got {', '.join(map(str, self.splits))}")
        for name, index in self.splits.items():
            check_tensor(where, f"splits[{name!r}]", index, ["n"], dtypes=[torch.int64])

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def coord_dim(self) -> int:
        """Number of coordinate dimensions D."""
        return self.coords.shape[-1]

    @property
    def channels(self) -> int:
        """Number of channels C of a value."""
        return self.values.shape[-1]

    def fingerprint(self) -> dict[str, int]:
        """Sizes, and a checksum of values, masks and splits: equal for the same data opened again."""
        checksum = 0
        for tensor in (self.values, self.mask, *(self.splits[name] for name in SPLITS)):
            if tensor is not None:
                checksum = zlib.crc32(tensor.contiguous().numpy().data, checksum)
        n, points, channels = self.values.shape
        return {"functions": n, "points": points, "channels": channels, "checksum": checksum}

    def batch(self, index: Tensor) -> PointSet:
        """Points of the functions `index` [B] (int64), values as float32 in [0, 1].

        Raises TypeError or ValueError when `index` is not a non-empty int64 vector within [0, n).
        """
        where = f"Dataset {self.name}"
        check_tensor(where, "index", index, ["B"], dtypes=[torch.int64])
        if len(index) == 0:
            raise ValueError(f"{where}: index must name at least one of n={len(self)} functions, got none")
        if int(index.min()) < 0 or int(index.max()) >= len(self):
            raise ValueError(
                f"{where}: index must lie in [0, {len(self)}), got {int(index.min())} to {int(index.max())}"
            )
        values = self.values[index]
        if values.dtype == torch.uint8:
            values = values.to(torch.float32) / 255
        coords = self.coords[index] if self.coords.dim() == 3 else self.coords
        mask = self.mask[index] if self.mask is not None and self.mask.dim() == 2 else self.mask
        return PointSet(coords, values, mask)

    def grid(self, scale: int = 1) -> tuple[Tensor, tuple[int, ...]]:
        """Coordinates [M, D] float32 and sizes of the grid refined `scale` times, whose every scale-th point is given.

        Raises ValueError for kind "points", which has no grid to refine.
        """
        check_positive(f"Dataset {self.name}", "scale", scale)
        if self.kind == "points":
            raise ValueError(f"Dataset {self.name}: grid must have a kind with a grid, got kind points")
        if self.kind == "sphere":
            return sphere_grid(self.shape, scale=scale), sphere_grid_shape(self.shape, scale)
        return grid_coords(self.shape, scale=scale), grid_shape(self.shape, scale)


def random_splits(where: str, count: int, validation: int | None = None, test: int | None = None) -> dict[str, Tensor]:
    """Split `numpy.random.default_rng(0).permutation(count)`: training part first, then validation, then test.

    By default a tenth each (rounded down, at least one) goes to validation and test.
    Raises ValueError when there is not one function for each split.
    """
    if count < 3:
        raise ValueError(f"{where}: data must hold at least 3 functions, one for each split, got {count}")
    validation = max(1, count // 10) if validation is None else validation
    test = max(1, count // 10) if test is None else test
    order = torch.from_numpy(np.random.default_rng(0).permutation(count))
    train = count - validation - test
    return {"train": order[:train], "validation": order[train:-test], "test": order[-test:]}


def grid_dataset(
    name: str,
    grids: np.ndarray[Any, Any],
    splits: dict[str, Tensor] | None = None,
    labels: np.ndarray[Any, Any] | None = None,
) -> Dataset:
    """Images [n, H, W, C] or voxels [n, D, H, W, C], uint8 or float32 in [0, 1], on the shared grid of coordinates."""
    shape = grids.shape[1:-1]
    voxels = len(shape) == 3
    return Dataset(
        name=name,
        kind="voxels" if voxels else "image",
        shape=shape,
        coords=grid_coords(shape),
        values=torch.from_numpy(np.ascontiguousarray(grids)).flatten(1, -2),
        splits=random_splits(name, len(grids)) if splits is None else splits,
        likelihood="bernoulli" if voxels else "logistic",
        labels=None if labels is None else torch.from_numpy(labels),
    )
