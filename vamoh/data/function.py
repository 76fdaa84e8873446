"""One file of the user's own as functions that a trained model can take, and results back in the file's own format."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vamoh._files import whole_file
from vamoh._shown import shown, unquoted
from vamoh.data.dataset import Domain
from vamoh.data.fields import find_variables, open_fields
from vamoh.data.files import Array, read_arrays, unit_values
from vamoh.data.images import SUFFIXES, read_picture
from vamoh.data.sphere import StoredFields
from vamoh.data.voxels import read_grid
from vamoh.points import PointSet, grid_coords, sphere_coords

FIELDS = (".nc", ".nc4", ".cdf", ".netcdf", ".zarr", ".h5", ".hdf5", ".grib", ".grib2")


@dataclass(frozen=True, eq=False)
class Function:
    """Functions of one file, of the kind that a data set has.

    points: what is known of them [B, N, C], values as in the data set; the mask leaves out what is missing.
    shape: sizes of their grid, () for bare points. axes: values of the coordinates along each axis of the grid; of a
    sphere latitudes and longitudes in degrees. units: as in `Domain`. kind: of the domain.
    """

    path: Path
    kind: str
    points: PointSet
    shape: tuple[int, ...] = ()
    axes: tuple[Array, ...] = ()
    units: tuple[str, float, float] = ("", 0.0, 1.0)

    def finer(self, scale: int) -> tuple[Tensor, Function]:
        """Coordinates [M, D] of the grid with scale - 1 points between neighbours, and this with its axes and shape."""
        if not self.shape:
            raise ValueError(f"{self.path}: must hold a grid to be refined, got bare points")
        axes = []
        for i, axis in enumerate(self.axes):
            closed = self.kind == "sphere" and i == 1 and bool(np.isclose(axis[-1] + axis[1] - 2 * axis[0], 360))
            ends = np.append(axis, axis[0] + 360) if closed else axis
            count = scale * len(axis) if closed else scale * (len(axis) - 1) + 1
            axes.append(np.interp(np.arange(count) / scale, np.arange(len(ends)), ends))
        shape = tuple(map(len, axes))
        return _places(self.kind, axes), Function(self.path, self.kind, self.points, shape, tuple(axes), self.units)

    def on_grid(self, values: Tensor) -> Array:
        """Values [B, M, ...] at the points of the grid as an array [B, *shape, ...]; of bare points as they are."""
        array: Array = values.cpu().numpy()
        return array.reshape(len(array), *self.shape, *array.shape[2:]) if self.shape else array

    def write(self, stem: Path, values: Array) -> Path | None:
        """Write values [B, *shape, C]: of pictures as PNG, fields as NetCDF, solids as an OBJ mesh, arrays as .npy.

        Returns the file, or None for bare points. Only fields have several functions in one file.
        """
        suffix = self.path.suffix.lower()
        if not self.shape:
            return None
        if self.kind == "sphere":
            return _write_netcdf(stem.with_name(f"{stem.name}.nc"), values, self.axes, self.units)
        if suffix in SUFFIXES:
            path = stem.with_name(f"{stem.name}.png")
            levels = np.rint(np.clip(values[0], 0, 1) * 255).astype(np.uint8)
            with whole_file("vamoh", path) as file:
                Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels).save(file, "png")
            return path
        if self.kind == "voxels":
            path = stem.with_name(f"{stem.name}.obj")
            with whole_file("vamoh", path) as file:
                file.write(solid_as_obj(values[0, ..., 0] >= 0.5).encode())
            return path
        path = stem.with_name(f"{stem.name}.npy")
        with whole_file("vamoh", path) as file:
            np.save(file, values[0, ..., 0] if values.shape[-1] == 1 else values[0])
        return path


def read_function(path: str, domain: Domain, coord_dim: int, channels: int) -> Function:
    """Read a file for a model of functions in `domain` with D coordinates and C channels.

    Pictures, arrays [H, W], [H, W, C] or solids [D, H, W] of any size: their grid is laid over that of the domain, axis
    by axis. Fields (FILE or FILE::VARIABLE) anywhere on the sphere, scaled by the domain's units. Point lists: .npz
    with coords [N, D], values [N, C] and maybe mask [N], coordinates in the units of the data. Missing are NaN, what a
    mask or a fill value hides, and where a picture is transparent.
    Raises ValueError naming the file for one that does not fit, ImportError without the package that reads it.
    """
    file = Path(path).expanduser()
    suffix = Path(path.partition("::")[0]).suffix.lower()
    if suffix in FIELDS or "::" in path:
        if coord_dim != 3 or channels != 1 or domain.kind not in ("sphere", "points"):
            raise ValueError(f"{path}: fields need a model of one variable on the sphere, got one of {domain.kind}")
        return _read_fields(path, domain)
    if not file.is_file():
        raise ValueError(f"{path}: must be a file, got {'a folder' if file.exists() else 'nothing of that name'}")
    if domain.kind == "points":
        return _read_points(file, domain, coord_dim, channels)
    if domain.kind == "sphere":
        raise ValueError(f"{path}: must be a file of fields ({', '.join(FIELDS)}) for a model on the sphere")
    seen: Array | None = None
    if domain.kind == "image" and suffix in SUFFIXES:
        values, seen = read_picture(file, grey=channels == 1)
    elif domain.kind == "voxels" and suffix == ".binvox":
        values = read_grid(file)[..., None]
    else:
        arrays = read_arrays(file)
        if len(arrays) != 1:
            raise ValueError(
                f"{path}: must hold one array, got {len(arrays)} ({', '.join(map(unquoted, sorted(arrays)))[:120]})"
            )
        values = next(iter(arrays.values()))
        if values.ndim == len(domain.shape):
            values = values[..., None]
    dims = len(domain.shape)
    if values.ndim != dims + 1 or values.shape[-1] != channels or 0 in values.shape:
        raise ValueError(f"{path}: must hold {dims} axes of {channels} channels, got shape {list(values.shape)}")
    if values.dtype.kind == "f":
        seen = np.asarray(np.isfinite(values).all(-1))
        values = np.where(seen[..., None], values, 0)
    values = unit_values(path, values)
    scaled = values.astype(np.float32) / (255 if values.dtype == np.uint8 else 1)
    shape = values.shape[:-1]
    return _on_grid(file, domain, scaled.reshape(1, -1, channels), None if seen is None else seen.reshape(1, -1), shape)


def _on_grid(path: Path, domain: Domain, values: Array, seen: Array | None, shape: tuple[int, ...]) -> Function:
    own = grid_coords(domain.shape)
    low, high = own.amin(0).tolist(), own.amax(0).tolist()
    axes = tuple(
        np.linspace(a, b, n) if n > 1 else np.array([(a + b) / 2]) for a, b, n in zip(low, high, shape, strict=True)
    )
    return Function(path, domain.kind, _points(_places(domain.kind, axes), values, seen), shape, axes, domain.units)


def _read_points(file: Path, domain: Domain, coord_dim: int, channels: int) -> Function:
    arrays = read_arrays(file)
    if not {"coords", "values"} <= set(arrays) <= {"coords", "values", "mask"}:
        got = ", ".join(sorted(arrays))[:120]
        raise ValueError(f"{file}: must hold coords [N, {coord_dim}], values [N, {channels}] and maybe mask, got {got}")
    coords, values = arrays["coords"], arrays["values"]
    if coords.ndim != 2 or coords.shape[1] != coord_dim or values.shape != (len(coords), channels):
        got = f"{list(coords.shape)} and {list(values.shape)}"
        raise ValueError(f"{file}: coords and values must have shapes [N, {coord_dim}] and [N, {channels}], got {got}")
    seen = np.asarray(np.isfinite(values.astype(np.float64)).all(-1))
    if "mask" in arrays:
        if arrays["mask"].shape != (len(coords),):
            raise ValueError(f"{file}: mask must have shape [{len(coords)}], got {list(arrays['mask'].shape)}")
        seen = np.asarray(seen & (arrays["mask"] != 0))
    if not np.isfinite(coords).all():
        raise ValueError(f"{file}: coords must be finite, got {int((~np.isfinite(coords)).sum())} NaN or infinite ones")
    known = unit_values(str(file), values, seen[:, None])
    scaled = known.astype(np.float32) / (255 if known.dtype == np.uint8 else 1)
    return Function(file, "points", _points(torch.from_numpy(coords.astype(np.float32)), scaled[None], seen[None]))


def _read_fields(path: str, domain: Domain) -> Function:
    name, _, wanted = path.partition("::")
    where = str(Path(name).expanduser())
    opened = open_fields(where)
    variables, latitude, longitude = find_variables(where, opened, wanted)
    unit, low, high = domain.units
    given = str(variables[0].attributes.get("units", ""))
    if len(variables) != 1 or given != unit:
        raise ValueError(f"{path}: must hold one variable in {unit!r} as the data of the run, got {shown(given)}")
    stored = StoredFields(where, opened, variables, latitude, longitude)
    natural = stored.read(np.arange(stored.count))  # [B, N, 1]
    seen = np.asarray(np.isfinite(natural).all(-1))
    values = np.where(seen[..., None], (natural - low) / (high - low), 0).astype(np.float32)
    points = _points(stored.places.coords, values, seen)
    return Function(Path(where), "sphere", points, stored.shape, stored.axes, domain.units)


def _points(coords: Tensor, values: Array, seen: Array | None) -> PointSet:
    mask = None if seen is None or seen.all() else torch.from_numpy(np.ascontiguousarray(seen))
    return PointSet(coords, torch.from_numpy(np.ascontiguousarray(values)), mask)


def _places(kind: str, axes: Any) -> Tensor:
    """Coordinates [N, D] of a grid with these axes, row-major."""
    grid = torch.meshgrid(*(torch.from_numpy(np.asarray(axis, np.float64)) for axis in axes), indexing="ij")
    places = sphere_coords(*grid) if kind == "sphere" else torch.stack(grid, -1)
    return places.reshape(-1, places.shape[-1]).float()


def _write_netcdf(path: Path, values: Array, axes: tuple[Array, ...], units: tuple[str, float, float]) -> Path:
    """Fields [B, rows, columns, C] in their unit, with latitudes and longitudes."""
    library: Any = importlib.import_module("netCDF4")
    unit, low, high = units
    file = library.Dataset("memory.nc", "w", memory=1024)
    file.createDimension("function", len(values))
    for name, axis, degrees in zip(("lat", "lon"), axes, ("degrees_north", "degrees_east"), strict=True):
        file.createDimension(name, len(axis))
        variable = file.createVariable(name, "f8", (name,))
        variable.units, variable[:] = degrees, axis
    for channel in range(values.shape[-1]):
        name = "value" if values.shape[-1] == 1 else f"value{channel}"
        variable = file.createVariable(name, "f4", ("function", "lat", "lon"))
        variable.units, variable[:] = unit, values[..., channel] * (high - low) + low
    content = file.close()
    with whole_file("vamoh", path) as written:
        written.write(content)
    return path


def solid_as_obj(solid: Array) -> str:
    """Surface of the True voxels of a grid [D, H, W] as an OBJ file of squares, outwards, one unit to a voxel."""
    padded = np.pad(solid, 1)
    inner = tuple(slice(1, -1) for _ in range(3))
    corners = {0: [(0, 0), (1, 0), (1, 1), (0, 1)], 1: [(0, 0), (0, 1), (1, 1), (1, 0)]}
    squares = []
    for axis in range(3):
        for side in (0, 1):
            outside = ~np.roll(padded, 1 - 2 * side, axis)[inner] & solid
            at = np.argwhere(outside)
            around = [(axis + 1) % 3, (axis + 2) % 3]
            square = np.repeat(at[:, None], 4, 1)
            square[..., axis] += side
            for i, offset in enumerate(corners[1 - side]):
                square[:, i, around] += offset
            squares.append(square)
    faces = np.concatenate(squares)
    vertices, index = np.unique(faces.reshape(-1, 3), axis=0, return_inverse=True)
    lines = [f"v {x} {y} {z}" for x, y, z in vertices.tolist()]
    lines += [f"f {a} {b} {c} {d}" for a, b, c, d in (index.reshape(-1, 4) + 1).tolist()]
    return "\n".join(lines) + "\n"
