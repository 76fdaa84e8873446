"""Fields over the globe: the bundled climate fields, and NetCDF files of the user's own."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vamoh.data.dataset import Dataset, random_splits
from vamoh.data.files import read_bundled
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
    return field_dataset("climate", fields, sphere_grid(fields.shape[1:]), True, "K", splits)


def netcdf(path: str) -> Dataset:
    """The fields of one variable of a NetCDF file; 0 and 1 are the extremes of all fields, `units` keeps the unit.

    path: FILE, or FILE::VARIABLE where several variables have a latitude and a longitude. All other dimensions of the
    variable (time, level, member) count functions. Missing values are masked out. A global grid with latitudes from 90
    to -90 and longitudes from 0 in even steps (in any order in the file) has kind "sphere"; any other one becomes
    points on the sphere, which cannot be refined. Splits are 80/10/10, see `random_splits`.

    Raises ImportError without the netCDF4 package, ValueError naming the file when it cannot be read, when no single
    variable fits, or when its values are infinite or constant.
    """
    try:
        library: Any = importlib.import_module("netCDF4")
    except ImportError as error:
        raise ImportError('netcdf: reading NetCDF needs the netCDF4 package: pip install "vamoh[netcdf]"') from error
    file, _, wanted = path.partition("::")
    try:
        # Opened from memory, because the library reads zeros beyond the end of a classic file on disk.
        content = Path(file).expanduser().read_bytes()
        with library.Dataset(file, memory=content) as opened:
            name, latitude, longitude = _choose_variable(file, opened, wanted)
            variable = opened[name]
            data, dims = np.ma.asarray(variable[:]), list(variable.dimensions)
            unit = str(getattr(variable, "units", ""))
            lat, lon = (np.ma.asarray(opened[key][:], dtype=np.float64).filled(np.nan) for key in (latitude, longitude))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{file}: must be a readable NetCDF file, got {type(error).__name__}: {error}") from error
    if data.dtype.kind not in "iuf":
        raise ValueError(f"{file}: {name} must hold numbers, got {data.dtype}")
    everything = np.ma.asarray(data, dtype=np.float64).filled(np.nan)
    grids = np.moveaxis(everything, [dims.index(latitude), dims.index(longitude)], [-2, -1])

    north_first = np.argsort(-lat)
    east, eastward = np.unique(lon % 360, return_index=True)
    fields = grids[..., north_first, :][..., eastward].reshape(-1, len(lat), len(east))
    rows, columns = fields.shape[1:]
    lat = lat[north_first]
    regular = np.allclose(lat, np.linspace(90, -90, rows), atol=1e-3) and np.allclose(
        east, np.arange(columns) * (360 / columns), atol=1e-3
    )
    if regular:
        coords = sphere_grid((rows, columns))
    else:
        angles = np.meshgrid(lat, east, indexing="ij")
        coords = sphere_coords(*map(torch.from_numpy, angles)).reshape(-1, 3).float()
    return field_dataset("netcdf", fields, coords, bool(regular), unit, random_splits(file, len(fields)))


def field_dataset(
    where: str, fields: np.ndarray[Any, Any], coords: Tensor, regular: bool, unit: str, splits: dict[str, Tensor]
) -> Dataset:
    """Fields [n, rows, columns] in natural units at coords [N, 3], scaled to [0, 1] by the extremes of all of them.

    NaN marks what is missing: it becomes 0 under a mask, [N] if all fields miss the same points, else [n, N].
    regular: whether coords are those of `sphere_grid`.
    Raises ValueError when values are infinite, a field has none, or all are equal.
    """
    flat = fields.reshape(len(fields), -1).astype(np.float64)
    seen = ~np.isnan(flat)
    if np.isinf(flat).any():
        raise ValueError(f"{where}: fields must be finite, got {int(np.isinf(flat).sum())} infinite values")
    if not seen.any(1).all():
        raise ValueError(f"{where}: every field must hold a value, got none in field {int(seen.any(1).argmin())}")
    low, high = float(flat[seen].min()), float(flat[seen].max())
    if low == high:
        raise ValueError(f"{where}: fields must vary, got {low} everywhere")
    values = np.where(seen, (flat - low) / (high - low), 0).astype(np.float32)
    mask = None
    if not seen.all():
        mask = torch.from_numpy(seen[0] if (seen == seen[0]).all() else seen)
    return Dataset(
        name=where,
        kind="sphere" if regular else "points",
        shape=fields.shape[1:] if regular else (),
        coords=coords,
        values=torch.from_numpy(values)[..., None],
        splits=splits,
        likelihood="continuous_bernoulli",
        mask=mask,
        units=(unit, low, high),
    )


def _choose_variable(file: str, opened: Any, wanted: str) -> tuple[str, str, str]:
    """Names of the data variable and of its latitude and longitude dimensions."""
    latitude = [name for name in opened.variables if _is_axis(opened[name], ("lat", "latitude"), "degrees_north")]
    longitude = [name for name in opened.variables if _is_axis(opened[name], ("lon", "longitude"), "degrees_east")]
    fitting = {
        name: (lat, lon)
        for name, variable in opened.variables.items()
        for lat in latitude
        for lon in longitude
        if {lat, lon} <= set(variable.dimensions)
    }
    if wanted in fitting or (len(fitting) == 1 and not wanted):
        name = wanted or next(iter(fitting))
        return name, *fitting[name]
    names = ", ".join(fitting) or "none"
    if wanted:
        raise ValueError(f"{file}: variable must be one over latitude and longitude ({names}), got {wanted!r}")
    raise ValueError(f"{file}: must hold one variable over latitude and longitude, got {names}; choose FILE::VARIABLE")


def _is_axis(variable: Any, names: tuple[str, str], unit: str) -> bool:
    """Whether a variable is the coordinate of its own dimension, by the CF unit or by its name."""
    if variable.dimensions != (variable.name,):
        return False
    return getattr(variable, "units", None) == unit or variable.name.lower() in names
