"""Arrays of the user's own: images, voxels or points in one .npy or .npz file, or in a variable of HDF5 or Zarr."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vamoh._shown import unquoted
from vamoh.data import source as sources
from vamoh.data.dataset import Dataset, on_grid, random_splits
from vamoh.data.fields import FieldArray, open_array
from vamoh.data.files import Array, StoredArray, stored_arrays, unit_dtype, unit_values
from vamoh.data.source import Source, keep

MAX_CHANNELS = 4
_FIELD_SUFFIXES = (".h5", ".hdf5", ".he5", ".nc", ".zarr")


def array_file(path: str) -> Dataset:
    """Functions stored in one file, as uint8 (0 to 255), bool, or floating values in [0, 1].

    One array, by its shape:
    [n, H, W]          images of one channel
    [n, H, W, C]       images, where C is at most 4
    [n, D, H, W]       voxels, where W is more than 4
    [n, D, H, W, C]    voxels
    An .npz file with the arrays `coords` [N, D] or [n, N, D] and `values` [n, N, C], and maybe `mask` [N] or [n, N]
    (bool or 0 and 1, True where observed), gives points instead; coordinates and values that are not observed may be
    NaN. path is FILE::NAME for an array of an HDF5, NetCDF or Zarr file. Such an array, or an .npy file, that would
    take more than `memory_share` is read batch by batch. Splits are 80/10/10, see `random_splits`.

    Raises ValueError or TypeError naming the file when it cannot be read, has a shape that could mean two things or
    nothing, another dtype, or holds values that are NaN or out of range.
    """
    name, _, wanted = path.partition("::")
    file = Path(name).expanduser()
    if wanted or file.is_dir() or file.suffix.lower() in _FIELD_SUFFIXES:
        arrays: Mapping[str, StoredArray | FieldArray] = {wanted: open_array(str(file), wanted)}
    else:
        arrays = stored_arrays(file)
    if {"coords", "values"} <= set(arrays) <= {"coords", "values", "mask"}:
        return _points(str(file), stored_arrays(file))
    if len(arrays) != 1:
        names = ", ".join(map(unquoted, sorted(arrays)))[:120] or "nothing"
        raise ValueError(f"{file}: must hold one array, or coords, values and maybe mask, got {names}")
    stored = next(iter(arrays.values()))
    shape = _image_shape(str(file), stored.shape)
    source = _Stored(str(file), stored, shape)
    values, _ = _keep(source)
    if stored.dtype == np.uint8 and source.largest <= 1:
        raise ValueError(f"{file}: uint8 values must use the range 0 to 255, got at most 1; store bool for occupancy")
    return on_grid("arrays", shape[:-1], values, splits=random_splits(str(file), values.shape[0]))


class _Stored(Source):
    """Values of an array in a file, [n, *shape]."""

    def __init__(
        self, where: str, stored: StoredArray | FieldArray, shape: tuple[int, ...], seen: Array | None = None
    ) -> None:
        dtype = torch.uint8 if unit_dtype(where, stored.dtype) == np.uint8 else torch.float32
        *grid, channels = shape
        super().__init__((stored.shape[0], int(np.prod(grid)), channels), dtype)
        self._where, self._stored, self._seen, self.largest = where, stored, seen, 0

    def read(self, index: Array) -> tuple[Array, Array | None]:
        """Values of the functions `index`."""
        values = unit_values(self._where, self._stored.read(index))
        self.largest = max(self.largest, int(values.max())) if self.dtype == torch.uint8 else 0
        return values.reshape(len(index), *self.shape[1:]), None

    def load(self) -> tuple[torch.Tensor, None]:
        """All values in memory, read in the order of the file."""
        values = np.empty(self._stored.shape, np.uint8 if self.dtype == torch.uint8 else np.float32)
        for where, block in self._stored.blocks():
            seen = None if self._seen is None else self._seen[where]
            values[where] = unit_values(self._where, block, seen)
        self.largest = int(values.max()) if self.dtype == torch.uint8 and values.size else 0
        return torch.from_numpy(values.reshape(self.shape)), None


def _keep(source: _Stored) -> tuple[Any, Any]:
    share = sources.memory_share()
    if source.bytes > share and not source._stored.rows_at_hand:
        raise ValueError(
            f"{source._where}: array must fit {share} bytes of memory, got {source.bytes}; larger ones are read in "
            "parts from .npy files in row-major (C) order"
        )
    return keep(source)


def _image_shape(where: str, stored: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes [*grid, C] of the functions in an array [n, ...]; ValueError where they could be something else."""
    if len(stored) not in (3, 4, 5) or 0 in stored:
        raise ValueError(
            f"{where}: array must have shape [n, H, W], [n, H, W, C], [n, D, H, W] or [n, D, H, W, C] with no size 0, "
            f"got {list(stored)}"
        )
    n, *sizes = stored
    shown, first, last = list(stored), sizes[0], sizes[-1]
    if len(sizes) == 2 and 1 < last <= MAX_CHANNELS < first:
        raise ValueError(
            f"{where}: array of shape {shown} could be images [n, H, W] of width {last} or signals of {last} channels; "
            f"store the first as [{n}, {first}, {last}, 1] and the second as [{n}, {first}, 1, {last}]"
        )
    if len(sizes) == 3 and first <= MAX_CHANNELS < last:
        raise ValueError(
            f"{where}: array of shape {shown} could be images [n, C, H, W] of {first} channels or voxels [n, D, H, W] "
            f"of depth {first}; store the first as [n, H, W, C] ({[n, *sizes[1:], first]}) and the second as "
            f"[n, D, H, W, C] ({[*shown, 1]})"
        )
    if len(sizes) == 4 and first <= MAX_CHANNELS < last:
        raise ValueError(
            f"{where}: array of shape {shown} could be voxels [n, C, D, H, W] of {first} channels or [n, D, H, W, C] "
            f"of {last}; channels come last, at most {MAX_CHANNELS} where an axis before is as short: "
            f"store the first as {[n, *sizes[1:], first]}"
        )
    return (*sizes, 1) if len(sizes) == 2 or (len(sizes) == 3 and last > MAX_CHANNELS) else tuple(sizes)


def _points(where: str, arrays: dict[str, StoredArray]) -> Dataset:
    coords, values = arrays["coords"], arrays["values"]
    if len(coords.shape) not in (2, 3) or coords.dtype.kind not in "iuf":
        got = f"{coords.dtype} of shape {list(coords.shape)}"
        raise ValueError(f"{where}: coords must be numbers of shape [N, D] or [n, N, D], got {got}")
    if len(values.shape) != 3 or 0 in values.shape:
        raise ValueError(f"{where}: values must have shape [n, N, C] with no size 0, got {list(values.shape)}")
    n, count, _ = values.shape
    if coords.shape[:-1] not in ((count,), (n, count)) or coords.shape[-1] == 0:
        raise ValueError(f"{where}: coords must have shape [{count}, D] or [{n}, {count}, D], got {list(coords.shape)}")
    mask = _mask(where, arrays["mask"], n, count) if "mask" in arrays else None
    seen = None if mask is None else np.broadcast_to(mask, (n, count))[..., None]
    kept, _ = _keep(_Stored(where, values, values.shape[1:], seen))
    return Dataset(
        name=where,
        kind="points",
        shape=(),
        coords=torch.from_numpy(_coordinates(where, coords.load(), mask)),
        values=kept,
        splits=random_splits(where, n),
        likelihood="logistic",
        mask=None if mask is None else torch.from_numpy(mask),
    )


def _mask(where: str, stored: StoredArray, n: int, count: int) -> Array:
    if stored.shape not in ((count,), (n, count)):
        raise ValueError(f"{where}: mask must have shape [{count}] or [{n}, {count}], got {list(stored.shape)}")
    if stored.dtype.kind not in "biuf":
        raise TypeError(f"{where}: mask must be bool, or numbers that are 0 or 1, got {stored.dtype}")
    mask = stored.load()
    other = mask[(mask != 0) & (mask != 1)]
    if other.size:
        raise ValueError(f"{where}: mask must be bool, or numbers that are 0 or 1, got {other.flat[0]}")
    mask = mask.astype(np.bool_)
    empty = np.flatnonzero(~np.broadcast_to(mask, (n, count)).any(1))
    if empty.size:
        raise ValueError(f"{where}: mask must leave every function a point, got none in function {empty[0]}")
    return mask


def _coordinates(where: str, coords: Array, mask: Array | None) -> Array:
    """Coordinates as float32; those that no function observes are replaced where they are NaN or infinite."""
    given = coords
    with np.errstate(over="ignore"):
        coords = given.astype(np.float32)
    finite = np.isfinite(coords).all(-1)
    if given.dtype != np.float32:
        _check_rounding(where, given[finite], coords[finite])
    if finite.all():
        return coords
    counted: Array = np.ones(finite.shape, np.bool_)
    if mask is not None:
        counted = np.any(mask, 0) if finite.ndim < mask.ndim else counted & mask
    bad = np.argwhere(~finite & counted)
    if len(bad):
        raise ValueError(
            f"{where}: coords must be finite, got {len(bad)} observed points with NaN or infinite ones, first at "
            f"{bad[0].tolist()}"
        )
    for each, good in zip(coords, finite, strict=True) if coords.ndim == 3 else [(coords, finite)]:
        each[~good] = each[good][0]
    return coords


def _check_rounding(where: str, given: Array, rounded: Array) -> None:
    """Raise ValueError where float32 does not tell points [M, D] apart, as far from 0 as they are."""
    for axis in range(given.shape[-1] if len(given) else 0):
        lost = float(np.abs(given[:, axis] - rounded[:, axis]).max())
        extent = float(np.ptp(given[:, axis]))
        if extent > 0 and lost > _MOST_LOST * extent:
            raise ValueError(
                f"{where}: coords must differ by more than float32 rounds off, got {lost:g} lost of an extent of "
                f"{extent:g} along axis {axis}: subtract a number near {given[0, axis]:g} first"
            )


_MOST_LOST = 1e-3
"""Share of the extent of coordinates that may be rounded off."""
