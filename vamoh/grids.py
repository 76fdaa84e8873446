"""Regular grids: their coordinates, on a plane, in space and on a sphere, and back from points to grids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vamoh._checks import FLOATING, check_device, check_positive, check_sizes, check_tensor, check_type, shown


def to_grid(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Reorder point values [B, N, C] to a grid [B, C, *shape]; inverse of `PointSet.from_grid`."""
    check_tensor("to_grid", "values", values, ["B", "N", "C"])
    shape = check_sizes("to_grid", "shape", shape)
    if values.shape[1] != torch.Size(shape).numel():
        raise ValueError(f"to_grid: shape {list(shape)} must hold N={values.shape[1]} points")
    return values.transpose(1, 2).reshape(values.shape[0], values.shape[2], *shape)


def grid_coords(
    shape: Sequence[int], *, scale: int = 1, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Coordinates [N, D] of an image or voxel grid, row-major, order (row, column) or (depth, row, column).

    Index i maps to 2 (i / (n - 1) - 1/2) with n the first size above 1, for every axis: pixels stay square, that axis
    spans [-1, 1] (the published code's rule). `scale` s gives the finer grid of s (n - 1) + 1 points per axis over the
    same extent, whose every s-th point is a point of the grid.
    """
    shape = check_sizes("grid_coords", "shape", shape)
    if not shape:
        raise ValueError("grid_coords: shape must list at least one size, got none")
    check_positive("grid_coords", "scale", scale)
    check_type("grid_coords", "dtype", dtype, torch.dtype)
    device = check_device("grid_coords", device)
    span = next((n - 1 for n in shape if n > 1), 1)
    axes = [
        2 * (torch.arange(scale * (n - 1) + 1, dtype=torch.float64, device=device) / (scale * span) - 0.5)
        for n in shape
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(shape)).to(dtype)


def grid_shape(shape: Sequence[int], scale: int = 1) -> tuple[int, ...]:
    """Sizes of the grid that `grid_coords(shape, scale=scale)` covers."""
    return tuple(scale * (n - 1) + 1 for n in shape)


def sphere_coords(latitude: Tensor, longitude: Tensor) -> Tensor:
    """Points [..., 3] on the unit sphere from latitude and longitude in degrees, tensors of one shape [...]."""
    check_type("sphere_coords", "latitude", latitude, Tensor)
    check_tensor("sphere_coords", "latitude", latitude, list(latitude.shape), dtypes=FLOATING)
    check_tensor("sphere_coords", "longitude", longitude, list(latitude.shape), like=latitude)
    lat, lon = torch.deg2rad(latitude), torch.deg2rad(longitude)
    return torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], -1)


def sphere_grid(
    shape: Sequence[int], *, scale: int = 1, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Coordinates [N, 3] of a latitude-longitude grid of `shape` (rows, columns), row-major.

    Latitudes run from 90 to -90 inclusive, longitudes from 0 to 360 - 360 / columns. `scale` s refines to
    s (rows - 1) + 1 by s * columns points, whose every s-th row and column is one of the grid (the published code's
    finer grid does not align in longitude).
    """
    rows, columns = sphere_grid_shape(shape, scale)
    check_type("sphere_grid", "dtype", dtype, torch.dtype)
    device = check_device("sphere_grid", device)
    lat = torch.linspace(90, -90, rows, dtype=torch.float64, device=device)
    lon = torch.arange(columns, dtype=torch.float64, device=device) * (360 / columns)
    return sphere_coords(*torch.meshgrid(lat, lon, indexing="ij")).reshape(-1, 3).to(dtype)


def sphere_grid_shape(shape: Sequence[int], scale: int = 1) -> tuple[int, int]:
    """Sizes (rows, columns) of the grid that `sphere_grid(shape, scale=scale)` covers."""
    check_type("sphere_grid", "shape", shape, list, tuple)
    if len(shape) != 2:
        raise ValueError(f"sphere_grid: shape must be (rows, columns), got {shown(shape)}")
    rows, columns = shape
    check_positive("sphere_grid", "rows", rows)
    check_positive("sphere_grid", "columns", columns)
    check_positive("sphere_grid", "scale", scale)
    return scale * (rows - 1) + 1, scale * columns
