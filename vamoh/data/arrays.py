"""Arrays of the user's own: images, voxels or points in one .npy or .npz file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vamoh._checks import check_finite
from vamoh.data.dataset import Dataset, grid_dataset, random_splits
from vamoh.data.files import Arrays, read_arrays, unit_values

MAX_CHANNELS = 4


def array_file(path: str) -> Dataset:
    """Functions stored in one file, as uint8 (0 to 255), bool, or floating values in [0, 1].

    One array, by its shape:
    [n, H, W]          images of one channel
    [n, H, W, C]       images, where C is at most 4
    [n, D, H, W]       voxels, where W is more than 4
    [n, D, H, W, C]    voxels
    An .npz file with the arrays `coords` [N, D] or [n, N, D] and `values` [n, N, C], and maybe `mask` [N] or [n, N]
    (bool, True where observed), gives points instead. Splits are 80/10/10, see `random_splits`.

    Raises ValueError or TypeError naming the file when it cannot be read, has another shape or dtype, or holds values
    that are NaN or out of range.
    """
    file = Path(path).expanduser()
    arrays = read_arrays(file)
    if {"coords", "values"} <= set(arrays) <= {"coords", "values", "mask"}:
        return _points(str(file), arrays)
    if len(arrays) != 1:
        names = ", ".join(sorted(arrays))
        raise ValueError(f"{file}: must hold one array, or coords, values and maybe mask, got {names or 'nothing'}")
    grids = next(iter(arrays.values()))
    if grids.ndim == 3 or (grids.ndim == 4 and grids.shape[-1] > MAX_CHANNELS):
        grids = grids[..., None]
    if grids.ndim not in (4, 5) or 0 in grids.shape:
        raise ValueError(
            f"{file}: array must have shape [n, H, W], [n, H, W, C], [n, D, H, W] or [n, D, H, W, C] with no size 0, "
            f"got {list(grids.shape)}"
        )
    if grids.dtype == np.uint8 and grids.max() <= 1:
        raise ValueError(f"{file}: uint8 values must use the range 0 to 255, got at most 1; store bool for occupancy")
    return grid_dataset("arrays", unit_values(str(file), grids))


def _points(where: str, arrays: Arrays) -> Dataset:
    if arrays["coords"].ndim not in (2, 3) or arrays["coords"].dtype.kind not in "iuf":
        got = f"{arrays['coords'].dtype} of shape {list(arrays['coords'].shape)}"
        raise ValueError(f"{where}: coords must be numbers of shape [N, D] or [n, N, D], got {got}")
    coords = torch.from_numpy(arrays["coords"].astype(np.float32))
    check_finite(where, "coords", coords)
    values = unit_values(where, arrays["values"])
    mask = arrays.get("mask")
    return Dataset(
        name=where,
        kind="points",
        shape=(),
        coords=coords,
        values=torch.from_numpy(values),
        splits=random_splits(where, len(values)),
        likelihood="logistic",
        mask=None if mask is None else torch.from_numpy(mask),
    )
