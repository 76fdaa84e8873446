"""What the ops on point clouds share: argument checks and squared distances."""

from __future__ import annotations

import torch
from torch import Tensor

from vamoh._checks import FLOATING, check_tensor, values_readable

POINTS = (*FLOATING, torch.int64)
"""Dtypes of a cloud: coordinates, or flat cell indices of a lattice."""


def check_points(where: str, name: str, value: Tensor, rows: str, table: Tensor | None = None) -> int | None:
    """Check a point cloud [rows, D] or [B, rows, D]; return B, or None if it has no batch.

    With a table of squared distances, check that as well, and that the cloud holds cells.
    """
    if isinstance(value, Tensor) and value.dim() not in (2, 3):
        raise ValueError(f"{where}: {name} must have shape [{rows}, D] or [B, {rows}, D], got {list(value.shape)}")
    lead = ["B"] if isinstance(value, Tensor) and value.dim() == 3 else []
    if table is None:
        check_tensor(where, name, value, [*lead, rows, "D"], dtypes=FLOATING)
    else:
        check_tensor(where, "table", table, ["T"], dtypes=FLOATING)
        if len(table) % 2 == 0 or len(table) >= 1 << 31:
            raise ValueError(f"{where}: table must have an odd number of entries below 2^31, got {len(table)}")
        check_tensor(where, name, value, [*lead, rows, 1], dtypes=[torch.int64])
        if value.device != table.device:
            raise TypeError(f"{where}: {name} must be on {table.device}, got {value.device}")
    return value.shape[0] if value.dim() == 3 else None


def check_cells(where: str, name: str, cells: Tensor, table: Tensor) -> None:
    """Check that the differences of cells lie in the table."""
    if cells.numel() and values_readable(cells) and (cells.min() < 0 or cells.max() > len(table) // 2):
        raise ValueError(
            f"{where}: {name} must lie between 0 and {len(table) // 2}, half of the table, "
            f"got {int(cells.min())} to {int(cells.max())}"
        )


def check_mask(where: str, mask: Tensor | None, points: Tensor, batch: int | None) -> int | None:
    """Check a mask [N] or [B, N] of points [..., N, D]; return the batch size, None if nothing has a batch."""
    if mask is None:
        return batch
    count = points.shape[-2]
    if isinstance(mask, Tensor) and mask.dim() not in (1, 2):
        raise ValueError(
            f"{where}: mask must have shape [{count}] or [{batch or 'B'}, {count}], got {list(mask.shape)}"
        )
    lead = ["B" if batch is None else batch] if isinstance(mask, Tensor) and mask.dim() == 2 else []
    check_tensor(where, "mask", mask, [*lead, count], dtypes=[torch.bool])
    if mask.device != points.device:
        raise TypeError(f"{where}: mask must be on {points.device}, got {mask.device}")
    return mask.shape[0] if mask.dim() == 2 else batch


def squared_distances(points: Tensor, queries: Tensor, table: Tensor | None) -> Tensor:
    """Squared distances [..., M, N] between queries [D, ..., M] and points [D, ..., N], dimensions first.

    Summed over the dimensions one after another, as the kernels do, so that all backends get the same bits. With a
    table, those of cells.
    """
    if table is not None:
        return table[len(table) // 2 + points[0][..., None, :] - queries[0][..., :, None]]
    total = points.new_zeros(*queries.shape[1:], points.shape[-1])
    for q, p in zip(queries, points, strict=True):
        difference = q[..., :, None] - p[..., None, :]
        total += difference * difference
    return total


def name_of(values: Tensor) -> str:
    """Dtype as it ends the names of kernels that are compiled for more than one."""
    return str(values.dtype).removeprefix("torch.")
