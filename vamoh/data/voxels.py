"""Voxels: furniture, the chairs among it, and grids of the user's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vamoh._shown import unquoted
from vamoh.data.dataset import Dataset, grid_dataset, random_splits
from vamoh.data.files import Array, Arrays, list_files, read_bundled, reading, stored_arrays

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
        grids = read_grid(files[0])
        if grids.ndim != 4:
            raise ValueError(f"{files[0]}: a single file must hold grids [n, D, H, W], got shape {list(grids.shape)}")
        return grid_dataset(where, grids[..., None], random_splits(path, len(grids)))
    first = read_grid(files[0])
    grids = np.empty((len(files), *first.shape), np.uint8)
    for i, file in enumerate(files):
        grid = read_grid(file)
        if grid.ndim != 3:
            raise ValueError(f"{file}: each of several files must hold one grid [D, H, W], got {list(grid.shape)}")
        if grid.shape != first.shape:
            raise ValueError(f"{file}: grid must be {list(first.shape)} like {files[0].name}, got {list(grid.shape)}")
        grids[i] = grid
    return grid_dataset(where, grids[..., None], random_splits(path, len(grids)))


def _unpack(file: Arrays) -> Array:
    """Unpack the bits of a bundled file to grids [n, D, H, W, 1] uint8 of 0 and 255."""
    shape = tuple(file["shape"])
    bits = np.unpackbits(file["vox"], count=int(np.prod(shape)))
    return bits.reshape(*shape, 1) * np.uint8(255)


def _groups(grids: Array) -> Array:
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


def read_grid(path: Path) -> Array:
    """Read occupancy as uint8 of 0 and 255."""
    if path.suffix.lower() == ".binvox":
        return _read_binvox(path)
    arrays = stored_arrays(path)
    if len(arrays) != 1:
        names = ", ".join(map(unquoted, sorted(arrays)))[:120]
        raise ValueError(f"{path}: must hold one array, got {len(arrays)} ({names})")
    stored = next(iter(arrays.values()))
    if stored.dtype.kind not in "biuf":
        raise ValueError(f"{path}: voxels must be bool or numbers that are 0 or 1, got {stored.dtype}")
    if 0 in stored.shape:
        raise ValueError(f"{path}: grid must have no size 0, got shape {list(stored.shape)}")
    grid = np.empty(stored.shape, np.uint8)
    for where, block in stored.blocks():
        other = block[(block != 0) & (block != 1)]
        if other.size:
            raise ValueError(f"{path}: voxels must be bool or numbers that are 0 or 1, got {other.flat[0]}")
        grid[where] = np.where(block != 0, np.uint8(255), np.uint8(0))
    return grid


def _read_binvox(path: Path) -> Array:
    """Read a run-length coded .binvox file, stored x-slowest and y-fastest, as [x, y, z] uint8 of 0 and 255."""
    with reading(path, ".binvox file"):
        header, data = path.read_bytes().split(b"\ndata\n", 1)
        lines = header.decode("ascii").splitlines()
        if lines[0].split() != ["#binvox", "1"]:
            raise ValueError(f"a first line {lines[0]!r:.40} instead of '#binvox 1'")
        sizes = [line.split()[1:] for line in lines if line.split()[:1] == ["dim"]]
        if len(sizes) != 1:
            raise ValueError(f"{len(sizes)} lines that tell the dimensions")
        x, z, y = (int(size) for size in sizes[0])
        if min(x, y, z) < 1:
            raise ValueError(f"dimensions {x} {z} {y}")
        value, run = np.frombuffer(data, np.uint8).reshape(-1, 2).T
        if int(run.sum(dtype=np.int64)) != x * y * z:
            raise ValueError(f"{run.sum(dtype=np.int64)} voxels where the header says {x * y * z}")
        if value.size and value.max() > 1:
            raise ValueError(f"a voxel of {value.max()}, where 0 and 1 are known")
        grid: Array = np.repeat(value * np.uint8(255), run).reshape(x, z, y).transpose(0, 2, 1)
    return grid
