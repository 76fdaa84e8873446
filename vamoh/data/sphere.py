"""Fields over the globe: the bundled climate fields, and NetCDF files of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vamoh._shown import unquoted
from vamoh.data.dataset import Dataset, Domain, random_splits
from vamoh.data.fields import FieldFile, Variable, degrees, find_variables, natural_values, open_fields
from vamoh.data.files import Array, read_bundled
from vamoh.data.source import BLOCK_BYTES, Source, keep
from vamoh.points import sphere_coords, sphere_grid


def climate() -> Dataset:
    """78 global fields of surface temperature, 46x90, in kelvin; 0 and 1 are the extremes of all fields.

    Field i belongs to member i // 6 of an ensemble of nearly equal forecasts, so the splits keep members whole:
    0-8 train, 9 validation, 10-12 test.
    """
    fields = read_bundled("glosea46x90.npz")["t"]
    index = torch.arange(len(fields))
    member = index // 6
    splits = {"train": index[member < 9], "validation": index[member == 9], "test": index[member > 9]}
    flat = fields.reshape(len(fields), -1, 1)
    source = _Fields("climate", flat.shape, lambda chosen: flat[chosen].astype(np.float64))
    return _dataset("climate", source, _Places(sphere_grid(fields.shape[1:]), fields.shape[1:]), (("t", "K"),), splits)


def netcdf(path: str) -> Dataset:
    """The fields of variables of a NetCDF file; 0 and 1 are the extremes of all fields, `units` keeps the unit.

    path: FILE, or FILE::VARIABLE where several variables have a latitude and a longitude; FILE::A,B for channels, each
    scaled by its own extremes. All other dimensions of the variable (time, level, member) count functions. Missing
    values are masked out. A global grid (longitudes in even steps around the globe, latitudes up to the poles or to
    within a row of them, in any order in the file) has kind "sphere"; any other one becomes points on the sphere,
    which cannot be refined. Fields that would take more than `memory_share` are read batch by batch. Splits are
    80/10/10, see `random_splits`. Folders (Zarr), HDF5 and GRIB files are opened by xarray.

    Raises ImportError without the netCDF4 package, or xarray where it reads, ValueError naming the file when it cannot
    be read, when no single variable fits, or when its values are infinite or constant.
    """
    name, _, wanted = path.partition("::")
    where = str(Path(name).expanduser())
    file = open_fields(where)
    variables, latitude, longitude = find_variables(where, file, wanted)
    stored = StoredFields(where, file, variables, latitude, longitude)
    shape = (stored.count, len(stored.places.coords), len(variables))
    if 0 in shape:
        raise ValueError(f"{where}: {unquoted(variables[0].name)} must have no size 0, got {list(variables[0].shape)}")
    source = _Fields(where, shape, stored.read)
    splits = random_splits(where, stored.count)
    units = tuple((variable.name, str(variable.attributes.get("units", ""))) for variable in variables)
    return _dataset("netcdf", source, stored.places, units, splits)


@dataclass(frozen=True)
class _Places:
    """Where fields have values: coords [N, 3]; shape and axes as in `Domain` where they are a global grid."""

    coords: Tensor
    shape: tuple[int, ...] = ()
    axes: tuple[tuple[float, ...], ...] = ()


class _Fields(Source):
    """Fields [n, N, C] in natural units, NaN where missing, scaled to [0, 1] by the extremes of each channel.

    What no field observes is in `mask` [N]; where fields miss different points, `masked` is True instead.
    Raises ValueError when values are infinite, a field has none, or all of a channel are equal.
    """

    def __init__(self, where: str, shape: tuple[int, int, int], natural: Callable[[Array], Array]) -> None:
        super().__init__(shape, torch.float32)
        self._natural = natural
        self.low, self.high = np.full(shape[2], np.inf), np.full(shape[2], -np.inf)
        first: Array | None = None
        step = max(1, BLOCK_BYTES // (8 * shape[1] * shape[2]))
        for start in range(0, shape[0], step):
            fields = natural(np.arange(start, min(start + step, shape[0])))
            if np.isinf(fields).any():
                raise ValueError(f"{where}: fields must be finite, got {int(np.isinf(fields).sum())} infinite values")
            seen = _complete(fields)
            if not seen.any(1).all():
                empty = start + int(seen.any(1).argmin())
                raise ValueError(f"{where}: every field must hold a value, got none in field {empty}")
            first = seen[0] if first is None else first
            self.masked = self.masked or not bool((seen == first).all())
            self.low = np.minimum(self.low, np.where(seen[..., None], fields, np.inf).min((0, 1)))
            self.high = np.maximum(self.high, np.where(seen[..., None], fields, -np.inf).max((0, 1)))
        self.mask = None if self.masked or first is None or first.all() else torch.from_numpy(first)
        for low, high in zip(self.low, self.high, strict=True):
            if low == high:
                raise ValueError(f"{where}: fields must vary, got {low} everywhere")
            if not np.isfinite(high - low):
                raise ValueError(f"{where}: fields must span a range that float64 holds, got {low} to {high}")

    def read(self, index: Array) -> tuple[Array, Array | None]:
        """Values and masks of the fields `index`."""
        fields = self._natural(index)
        seen = _complete(fields)
        values = np.where(seen[..., None], (fields - self.low) / (self.high - self.low), 0).astype(np.float32)
        return values, seen if self.masked else None


def _complete(fields: Array) -> Array:
    """Where no channel is missing, [B, N]."""
    seen: Array = np.logical_not(np.isnan(fields).any(-1))
    return seen


def _dataset(
    name: str, source: _Fields, places: _Places, units: tuple[tuple[str, str], ...], splits: dict[str, Tensor]
) -> Dataset:
    values, masks = keep(source)
    scales = [(float(low), float(high)) for low, high in zip(source.low, source.high, strict=True)]
    several = len(units) > 1
    return Dataset(
        name=name,
        kind="sphere" if places.shape else "points",
        shape=places.shape,
        coords=places.coords,
        values=values,
        splits=splits,
        likelihood="continuous_bernoulli",
        mask=source.mask if masks is None else masks,
        units=("", 0.0, 1.0) if several else (units[0][1], *scales[0]),
        channel_units=tuple((*unit, *scale) for unit, scale in zip(units, scales, strict=True)) if several else (),
        axes=places.axes,
    )


class StoredFields:
    """Fields of variables of a file: all dimensions but latitude and longitude count functions.

    places: where they have values. shape, axes: rows and columns of a grid, its latitudes and longitudes in degrees.
    """

    def __init__(
        self, where: str, file: FieldFile, variables: list[Variable], latitude: Variable, longitude: Variable
    ) -> None:
        self._where, self._file, self._variables = where, file, variables
        dims, shape = variables[0].dims, variables[0].shape
        places = list(dict.fromkeys((latitude.dims[0], longitude.dims[0])))
        self._counting = [i for i, dim in enumerate(dims) if dim not in places]
        self._order = [*self._counting, *(dims.index(dim) for dim in places)]
        self._sizes = tuple(shape[i] for i in self._counting)
        self.count = int(np.prod(self._sizes, dtype=np.int64))
        lat, lon = degrees(where, file, latitude), degrees(where, file, longitude)
        _check_degrees(where, latitude.name, lat, -90, 90)
        _check_degrees(where, longitude.name, lon, -360, 720)
        self._rows: Array | None = None
        self._twins: list[tuple[int, int]] = []
        self.shape: tuple[int, ...] = ()
        self.axes: tuple[Array, ...] = ()
        if len(places) == 1:
            self.places = _Places(_on_sphere(lat, lon))
        else:
            self._rows = np.argsort(-lat, kind="stable")
            east, self._columns, self._twins = _eastward(where, longitude.name, lon)
            lat = lat[self._rows]
            twice = lat[1:][np.diff(lat) == 0]
            if twice.size:
                raise ValueError(f"{where}: {unquoted(latitude.name)} must not repeat, got {twice[0]} twice")
            self.places = _places(lat, east)
            self.axes, self.shape = (lat, east), (len(lat), len(east))

    def read(self, index: Array) -> Array:
        """Natural values [B, N, C] of the functions `index`, NaN where missing."""
        parts = []
        for run in np.split(index, np.flatnonzero(np.diff(index) != 1) + 1):
            inner = self._sizes[-1] if self._sizes else 1
            for piece in np.split(run, np.flatnonzero(run[1:] % inner == 0) + 1):
                parts.append(np.stack([self._slab(variable, piece) for variable in self._variables], -1))
        return np.concatenate(parts)

    def _slab(self, variable: Variable, run: Array) -> Array:
        """Functions of consecutive indices that differ in the last counting dimension only, [B, N]."""
        place = np.unravel_index(run[0], self._sizes) if self._sizes else ()
        slices = [slice(0, size) for size in variable.shape]
        for i, start in zip(self._counting, place, strict=True):
            slices[i] = slice(int(start), int(start) + (len(run) if i == self._counting[-1] else 1))
        stored = self._file.read(variable.name, slices)
        fields = natural_values(self._where, variable, stored).transpose(self._order)
        if self._rows is None:
            return fields.reshape(len(run), -1)
        fields = fields.reshape(len(run), *fields.shape[-2:])
        for kept, other in self._twins:
            if not np.allclose(fields[..., kept], fields[..., other], rtol=1e-4, atol=1e-30, equal_nan=True):
                raise ValueError(
                    f"{self._where}: {unquoted(variable.name)} must have one value where the meridian is repeated, got "
                    f"others in columns {kept} and {other}"
                )
        return fields[:, self._rows][:, :, self._columns].reshape(len(run), -1)


def _check_degrees(where: str, name: str, values: Array, low: int, high: int) -> None:
    outside = values[(values < low - 1e-3) | (values > high + 1e-3)]
    if outside.size:
        raise ValueError(f"{where}: {name} must lie from {low} to {high} degrees, got {outside[0]}")


def _eastward(where: str, name: str, lon: Array) -> tuple[Array, Array, list[tuple[int, int]]]:
    """Longitudes from 0 to 360, growing; which columns they are; and pairs of columns of one meridian, 360 apart."""
    tolerance = min(1e-3, 360 / max(len(lon), 1) / 100)
    east = lon % 360
    east[360 - east < tolerance] = 0  # what rounding leaves of the meridian of Greenwich
    order = np.argsort(east, kind="stable")
    kept: list[int] = []
    twins = []
    for column in order.tolist():
        if kept and east[column] - east[kept[-1]] < tolerance:
            if abs(lon[column] - lon[kept[-1]]) < tolerance:
                raise ValueError(f"{where}: {name} must not repeat, got {lon[column]} twice")
            twins.append((kept[-1], column))
        else:
            kept.append(column)
    return east[kept], np.array(kept), twins


def _places(lat: Array, east: Array) -> _Places:
    """Where the nodes of latitudes (southward) and longitudes (eastward) lie, as a global grid if they make one."""
    rows, columns = len(lat), len(east)
    even = np.allclose(np.diff(east), 360 / columns, rtol=0, atol=min(2e-3, 3.6 / columns))
    if even and east[0] < 1e-3 and np.allclose(lat, np.linspace(90, -90, rows), atol=1e-3):
        return _Places(sphere_grid((rows, columns)), (rows, columns))
    if even and rows >= 3 and columns >= 3:
        gaps = -np.diff(lat)
        near = 90 - lat[0] <= 1.01 * gaps[0] and lat[-1] + 90 <= 1.01 * gaps[-1]
        if near and gaps.max() <= 2 * np.median(gaps):
            axes = (
                tuple(np.clip(lat, -90, 90).tolist()),
                tuple((east[0] + np.arange(columns) * (360 / columns)).tolist()),
            )
            return _Places(Domain("sphere", (rows, columns), axes=axes).grid()[0], (rows, columns), axes)
    return _Places(_on_sphere(*np.meshgrid(lat, east, indexing="ij")))


def _on_sphere(lat: Array, lon: Array) -> Tensor:
    return sphere_coords(torch.from_numpy(lat), torch.from_numpy(lon)).reshape(-1, 3).float()
