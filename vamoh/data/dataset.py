"""What every data set looks like once it is open: functions on a grid or on bare points, with fixed splits."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vamoh._checks import check_choice, check_positive, check_sizes, check_tensor, check_type
from vamoh._shown import shown, unquoted
from vamoh.data.files import read_arrays, reading
from vamoh.data.source import Source
from vamoh.points import PointSet, grid_coords, grid_shape, sphere_coords, sphere_grid, sphere_grid_shape

Kind = Literal["image", "voxels", "sphere", "points"]
KINDS = ("image", "voxels", "sphere", "points")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Domain:
    """Where the functions of a data set live, and their units: what it takes to draw new ones without the data.

    kind, shape, units: as in `Dataset`.
    axes: latitudes [rows] and longitudes [columns] in degrees of a "sphere" that is not `sphere_grid`'s, else ().
    """

    kind: Kind
    shape: tuple[int, ...]
    units: tuple[str, float, float] = ("", 0.0, 1.0)
    axes: tuple[tuple[float, ...], ...] = ()

    def grid(self, scale: int = 1) -> tuple[Tensor, tuple[int, ...]]:
        """Coordinates [M, D] float32 and sizes of the grid refined `scale` times, whose every scale-th point is given.

        Rows and columns of `axes` get others at even steps between them.
        Raises ValueError for kind "points", which has no grid to refine.
        """
        check_positive("grid", "scale", scale)
        if self.kind == "points":
            raise ValueError("grid: data must have a kind with a grid, got kind points")
        if self.kind != "sphere":
            return grid_coords(self.shape, scale=scale), grid_shape(self.shape, scale)
        sizes = sphere_grid_shape(self.shape, scale)
        if not self.axes:
            return sphere_grid(self.shape, scale=scale), sizes
        finer = []
        for size, axis in zip(sizes, (self.axes[0], (*self.axes[1], self.axes[1][0] + 360.0)), strict=True):
            finer.append(torch.from_numpy(np.interp(np.arange(size) / scale, np.arange(len(axis)), axis)))
        angles = torch.meshgrid(*finer, indexing="ij")
        return sphere_coords(*angles).reshape(-1, 3).float(), sizes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `from_dict`."""
        axes = [list(axis) for axis in self.axes]
        return {"kind": self.kind, "shape": list(self.shape), "units": list(self.units), "axes": axes}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Domain:
        """The domain that `to_dict` described; ValueError for anything else."""
        try:
            unit, low, high = content["units"]
            kind = check_choice("domain", "kind", content["kind"], KINDS)
            axes = tuple(tuple(map(float, axis)) for axis in content["axes"])
            shape = check_sizes("domain", "shape", content["shape"])
            if axes and tuple(map(len, axes)) != shape:
                raise ValueError(f"axes of {[len(axis) for axis in axes]} for shape {list(shape)}")
            return Domain(kind, shape, (str(unit), float(low), float(high)), axes)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"domain: must hold kind, shape, units and axes, got {error}") from error


@dataclass(frozen=True, eq=False)
class Dataset:
    """n functions, each known at N points; in memory, or read from their file batch by batch.

    kind:       "image" (row, column), "voxels" (three axes), "sphere" (latitude-longitude grid) or "points" (no grid).
    shape:      grid sizes, their product is N; () for points.
    coords:     [N, D] float32 shared by all functions, or [n, N, D] for point lists.
    values:     [n, N, C] float32 in [0, 1], or uint8 that `batch` divides by 255; or a `Source` of them.
    mask:       None (all observed), [N] or [n, N] bool, True where observed; values elsewhere are 0. A `Source` may
                have masks [n, N] of its own.
    splits:     "train", "validation" and "test": disjoint int64 indices into the n functions.
    labels:     None or [n] / [n, F], never used by training.
    likelihood: name of the likelihood that fits the values.
    units:      (unit, natural value of 0, natural value of 1), such as ("K", 200.0, 320.0).
    channel_units: where channels are variables of their own: (name, unit, natural value of 0, of 1) of each.
    axes:       latitudes and longitudes of a "sphere" that is not `sphere_grid`'s, see `Domain`.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    coords: Tensor
    values: Tensor | Source
    splits: dict[str, Tensor]
    likelihood: str
    mask: Tensor | None = None
    labels: Tensor | None = None
    units: tuple[str, float, float] = ("", 0.0, 1.0)
    channel_units: tuple[tuple[str, str, float, float], ...] = ()
    axes: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        where = f"Dataset {self.name}"
        check_choice(where, "kind", self.kind, KINDS)
        if not isinstance(self.values, Source):
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
            raise ValueError(
                f"{where}: splits must be {', '.join(SPLITS)}, got {', '.join(map(unquoted, self.splits))[:200]}"
            )
        for name, index in self.splits.items():
            check_tensor(where, f"splits[{name!r}]", index, ["n"], dtypes=[torch.int64])
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < n:
                raise ValueError(
                    f"{where}: splits[{name!r}] must lie in [0, {n}), got {int(index.min())} to {int(index.max())}"
                )

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

    @property
    def points(self) -> int:
        """Number of points N of each function, observed or not."""
        return self.values.shape[1]

    @property
    def masked_each(self) -> bool:
        """Whether every function has a mask of its own."""
        if isinstance(self.values, Source) and self.values.masked:
            return True
        return self.mask is not None and self.mask.dim() == 2

    @property
    def domain(self) -> Domain:
        """What it takes to draw functions like these."""
        return Domain(self.kind, self.shape, self.units, self.axes)

    def observed(self) -> Tensor:
        """How many points each function observes, [n] int64."""
        if isinstance(self.values, Source) and self.values.observed is not None and self.values.masked:
            return self.values.observed
        count = torch.tensor(self.points) if self.mask is None else self.mask.sum(-1)
        return count.expand(len(self))

    def fingerprint(self) -> dict[str, Any]:
        """Sizes, a checksum of values, masks and splits, one of the coordinates, and the units.

        Equal for the same data opened again, wherever they lie and whether or not they fit memory.
        """
        checksum, read = 0, isinstance(self.values, Source)
        if isinstance(self.values, Source):
            if self.values.checksum is None:
                self.values.survey()
            checksum = self.values.checksum or 0
        for tensor in (None if read else self.values, self.mask, *(self.splits[name] for name in SPLITS)):
            if isinstance(tensor, Tensor):
                checksum = zlib.crc32(tensor.contiguous().numpy().data, checksum)
        n, points, channels = self.values.shape
        return {
            "functions": n,
            "points": points,
            "channels": channels,
            "checksum": checksum,
            "coordinates": zlib.crc32(self.coords.contiguous().numpy().data),
            "units": [*self.units, *(part for channel in self.channel_units for part in channel)],
        }

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
        mask = self.mask[index] if self.mask is not None and self.mask.dim() == 2 else self.mask
        if isinstance(self.values, Source):
            read, seen = self.values.read(index.numpy())
            values, mask = torch.from_numpy(read), mask if seen is None else torch.from_numpy(seen)
        else:
            values = self.values[index]
        if values.dtype == torch.uint8:
            values = values.to(torch.float32) / 255
        coords = self.coords[index] if self.coords.dim() == 3 else self.coords
        return PointSet(coords, values, mask)

    def grid(self, scale: int = 1) -> tuple[Tensor, tuple[int, ...]]:
        """Coordinates [M, D] float32 and sizes of the grid refined `scale` times, see `Domain.grid`."""
        return self.domain.grid(scale)


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


def resplit(dataset: Dataset, splits: str, files: Sequence[str] | None = None) -> Dataset:
    """The same data with the splits of a file of the user's own.

    splits: a .json file {"train": [...], "validation": [...], "test": [...]} or an .npz file of such arrays, of indices
    into the n functions, or where `files` names them, of these names. A split may be left out; functions in none too.
    Raises ValueError naming the file when it cannot be read, or names what is not there or anything twice.
    """
    path = Path(splits).expanduser()
    if path.suffix.lower() == ".json":
        with reading(path, ".json file of splits"):
            content = json.loads(path.read_text(encoding="utf-8"))
    else:
        content = {name: array.tolist() for name, array in read_arrays(path).items()}
    if not isinstance(content, dict) or not set(content) <= set(SPLITS) or "train" not in content:
        got = ", ".join(map(unquoted, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: must hold train and maybe validation and test, got {got[:80] or 'nothing'}")
    place = {name: index for index, name in enumerate(files or ())}
    found: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for split in SPLITS:
        entries = content.get(split, [])
        if not isinstance(entries, list):
            raise ValueError(f"{path}: {split} must be a list of indices or file names, got {type(entries).__name__}")
        indices = []
        for entry in entries:
            index = place.get(entry, -1) if isinstance(entry, str) else entry
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(dataset):
                wanted = f"indices from 0 to {len(dataset) - 1}" + (" or names of its files" if files else "")
                raise ValueError(f"{path}: {split} must hold {wanted} of {dataset.name}, got {shown(entry)}")
            if index in seen:
                raise ValueError(f"{path}: {shown(entry)} must be in one split, got it in {seen[index]} and {split}")
            seen[index] = split
            indices.append(index)
        found[split] = torch.tensor(indices, dtype=torch.int64)
    if not len(found["train"]):
        raise ValueError(f"{path}: train must name at least one function, got none")
    return replace(dataset, splits=found)


def grid_dataset(
    name: str,
    grids: np.ndarray[Any, Any],
    splits: dict[str, Tensor] | None = None,
    labels: np.ndarray[Any, Any] | None = None,
) -> Dataset:
    """Images [n, H, W, C] or voxels [n, D, H, W, C], uint8 or float32 in [0, 1], on the shared grid of coordinates."""
    values = torch.from_numpy(np.ascontiguousarray(grids)).flatten(1, -2)
    labelled = None if labels is None else torch.from_numpy(labels)
    return on_grid(name, grids.shape[1:-1], values, splits=splits, labels=labelled)


def on_grid(
    name: str,
    shape: tuple[int, ...],
    values: Tensor | Source,
    mask: Tensor | None = None,
    splits: dict[str, Tensor] | None = None,
    labels: Tensor | None = None,
) -> Dataset:
    """Images or voxels of the grid `shape`, by its number of axes; values [n, N, C] and mask as in `Dataset`."""
    voxels = len(shape) == 3
    return Dataset(
        name=name,
        kind="voxels" if voxels else "image",
        shape=tuple(shape),
        coords=grid_coords(shape),
        values=values,
        splits=random_splits(name, values.shape[0]) if splits is None else splits,
        likelihood="bernoulli" if voxels else "logistic",
        mask=mask,
        labels=labels,
    )
