"""Voxels: furniture, the chairs among it, and grids of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vamoh.data.dataset import Dataset, grid_dataset, random_splits
from vamoh.data.files import Arrays, list_files, read_array, read_bundled

SUFFIXES = (".binvox", ".npy", ".npz")


def chairs() -> Dataset:
    """68 chairs and stools as 32x32x32 occupancy, axes (right, up, front). Splits are 80/10/10."""
    return grid_dataset("chairs", _unpack(read_bundled("chairs32.npz")))


def furniture() -> Dataset:
    """748 objects as 32x32x32 occupancy, axes (right, up, front); labels [n] index the sorted categories.

    Objects that overlap by more than 0.9 of their union (variants of one model) stay in one split: the splits are
    80/10/10 of the groups of such objects.
    """
    file = read_bundled("furniture32.npz")
    grids = _unpack(file)
    group = _groups(grids)
    splits = random_splits("furniture", int(group.max()) + 1)
    members = {name: torch.from_numpy(np.flatnonzero(np.isin(group, part))) for name, part in splits.items()}
    return grid_dataset("furniture", grids, members, np.unique(file["cats"], return_inverse=True)[1])


def voxel_files(path: str) -> Dataset:
    """Occupancy grids [D, H, W] from the .binvox, .npy and .npz files below a folder, or [n, D, H, W] from one file.

    Values are bool, or numbers that are all 0 or 1. Axes of .binvox files become (x, y, z). Splits are 80/10/10.
    Raises ValueError naming the file when one cannot be read, holds other values or differs in size.
    """
    where = "voxels"
    files = list_files(where, path, SUFFIXES)
    if len(files) == 1:
        grids = _read_grid(files[0])
        if grids.ndim != 4:
            raise ValueError(f"{files[0]}: a single file must hold grids [n, D, H, W], got shape {list(grids.shape)}")
        return grid_dataset(where, grids[..., None])
    read = [_read_grid(file) for file in files]
    for file, grid in zip(files, read, strict=True):
        if grid.ndim != 3:
            raise ValueError(f"{file}: each of several files must hold one grid [D, H, W], got {list(grid.shape)}")
        if grid.shape != read[0].shape:
            raise ValueError(f"{file}: grid must be {list(read[0].shape)} like {files[0].name}, got {list(grid.shape)}")
    return grid_dataset(where, np.stack(read)[..., None])


def _unpack(file: Arrays) -> np.ndarray[Any, Any]:
    """Unpack the bits of a bundled file to grids [n, D, H, W, 1] uint8 of 0 and 255."""
    shape = tuple(file["shape"])
    bits = np.unpackbits(file["vox"], count=int(np.prod(shape)))
    return bits.reshape(*shape, 1) * np.uint8(255)


def _groups(grids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Number the groups of grids that are linked by an intersection over union above 0.9, in order of appearance."""
    occupied = grids.reshape(len(grids), -1).astype(np.float32) / 255
    common = occupied @ occupied.T
    volume = occupied.sum(1)
    linked = common > 0.9 * (volume[:, None] + volume - common)
    group = np.arange(len(grids))
    while True:
        smallest = np.where(linked, group, len(grids)).min(1)
        if (smallest == group).all():
            return np.unique(group, return_inverse=True)[1]
        group = smallest


def _read_grid(path: Path) -> np.ndarray[Any, Any]:
    """Read occupancy as uint8 of 0 and 255."""
    grid = _read_binvox(path) if path.suffix.lower() == ".binvox" else read_array(path)
    if grid.dtype.kind not in "biuf" or not ((grid == 0) | (grid == 1)).all():
        raise ValueError(f"{path}: voxels must be bool or numbers that are 0 or 1, got other values ({grid.dtype})")
    return np.where(grid != 0, np.uint8(255), np.uint8(0))


def _read_binvox(path: Path) -> np.ndarray[Any, Any]:
    """Read a run-length coded .binvox file, stored x-slowest and y-fastest, as [x, y, z]."""
    try:
        header, data = path.read_bytes().split(b"\ndata\n", 1)
        lines = header.decode("ascii").splitlines()
        sizes = next(line.split()[1:] for line in lines if line.startswith("dim "))
        x, z, y = (int(size) for size in sizes)
        value, run = np.frombuffer(data, np.uint8).reshape(-1, 2).T
        if not lines[0].startswith("#binvox") or int(run.sum(dtype=np.int64)) != x * y * z:
            raise ValueError(f"{run.sum(dtype=np.int64)} voxels where the header says {x * y * z}")
    except (OSError, ValueError, StopIteration) as error:
        raise ValueError(f"{path}: must be a readable .binvox file, got {type(error).__name__}: {error}") from error
    return np.repeat(value, run).reshape(x, z, y).transpose(0, 2, 1)
