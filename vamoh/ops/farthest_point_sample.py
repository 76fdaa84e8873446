"""Farthest-point sampling: centroids that cover a point cloud (Qi et al. 2017, PointNet++)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vamoh._checks import check_positive, values_readable
from vamoh.ops._native import items
from vamoh.ops._op import Op
from vamoh.ops._points import POINTS, check_cells, check_mask, check_points, name_of, squared_distances


def farthest_point_sample(
    coords: Tensor,
    num_samples: int,
    mask: Tensor | None = None,
    *,
    table: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Indices of points that lie far apart, int64 [M], or [B, M] if coords or mask hold a batch.

    coords [N, D] or [B, N, D], float32 or float64; mask None (all points), [N] or [B, N] bool: only points with True
    are candidates. Starts at the first candidate, then repeatedly takes the candidate with the largest squared
    Euclidean distance to those taken, the lowest index on ties, never one twice. An item with at most num_samples
    candidates gets them all in index order, then -1; M = min(num_samples, most candidates of an item).
    A NaN distance brings no candidate nearer. All backends return the same indices. Not differentiable.

    table [T], float32 or float64, T odd: squared distances on a lattice, where they depend on the displacement alone.
    coords are then flat cell indices, int64 with D = 1 in 0 .. T // 2, and the squared distance of p to a point q taken
    is table[T // 2 + p - q]: `vamoh.geometry.Lattice` makes both.

    With a mask, M depends on its values: that breaks the graph of `torch.compile`. Where they cannot be read, as in a
    CUDA graph, M = min(num_samples, N).
    Raises TypeError or ValueError naming the argument, ValueError for an item without candidates.
    """
    where = "farthest_point_sample"
    batch = check_mask(where, mask, coords, check_points(where, "coords", coords, "N", table))
    check_positive(where, "num_samples", num_samples)
    shape = [1 if batch is None else batch, *coords.shape[-2:]]
    order: Tensor = _farthest_point_sample(
        coords.detach().expand(shape),
        None if mask is None else mask.expand(shape[:2]),
        num_samples,
        None if table is None else table.detach(),
        backend=backend,
    )
    return order[0] if batch is None else order


def farthest_point_sample_reference(coords: Tensor, mask: Tensor | None, samples: int, table: Tensor | None) -> Tensor:
    """Plain torch: indices [B, samples] from coords [B, N, D], mask [B, N] and table [T]."""
    batch, points, _ = coords.shape
    by_dim = coords.permute(2, 0, 1).contiguous()  # [D, B, N]
    index = torch.arange(points, device=coords.device).expand(batch, points)
    if mask is None:
        mask = torch.ones_like(index, dtype=torch.bool)
    listed = index.where(mask, points).sort(1).values[:, :samples]
    dtype = (coords if table is None else table).dtype
    nearest = torch.where(mask, math.inf, -1.0).to(dtype)  # to the points taken; -1: cannot be taken
    order = torch.empty(batch, samples, dtype=torch.int64, device=coords.device)
    for step in range(samples):
        taken = listed[:, :1] if step == 0 else nearest.argmax(1, keepdim=True)  # the first of equals
        order[:, step] = taken[:, 0]
        distance = squared_distances(by_dim, by_dim.take_along_dim(taken[None], 2), table)[:, 0]
        nearest = torch.where(distance < nearest, distance, nearest).scatter(1, taken, -1.0)
    takes_all = mask.sum(1, keepdim=True) <= samples
    return torch.where(takes_all, listed.masked_fill(listed == points, -1), order)


def _fake(coords: Tensor, mask: Tensor | None, num_samples: int, table: Tensor | None) -> Tensor:
    samples = min(num_samples, coords.shape[1]) if mask is None else torch.library.get_ctx().new_dynamic_size()
    return coords.new_empty((coords.shape[0], samples), dtype=torch.int64)


def _check_contents(
    coords: Tensor, mask: Tensor | None, num_samples: int, table: Tensor | None
) -> tuple[Tensor, Tensor | None, int, Tensor | None]:
    """Check the contents, and make of num_samples how many are taken."""
    batch, points, _ = coords.shape
    counts = mask.sum(1).tolist() if mask is not None and values_readable(mask) else [points] * batch
    if 0 in counts:
        name, item = ("coords", "") if mask is None else ("mask", f" in item {counts.index(0)}")
        raise ValueError(f"farthest_point_sample: {name} must leave at least one candidate, got none{item}")
    if table is not None:
        check_cells("farthest_point_sample", "coords", coords, table)
    return coords, mask, min(num_samples, max(counts, default=points)), table


_farthest_point_sample = Op(
    "farthest_point_sample(Tensor coords, Tensor? mask, int num_samples, Tensor? table) -> Tensor",
    farthest_point_sample_reference,
    _fake,
    check=_check_contents,
)


@_farthest_point_sample.backend("cpu", "cuda", dtypes=POINTS)
def _(call: Any, coords: Tensor, mask: Tensor | None, samples: int, table: Tensor | None) -> Tensor:
    order = coords.new_empty((len(coords), samples), dtype=torch.int64)
    name = "farthest_point_sample"
    call(
        f"{name}_{name_of(coords)}" if table is None else f"{name}_by_table_{name_of(table)}",
        cloud=[*items(coords), *coords.shape[1:]],
        mask=items(mask),
        out=order,
        batch=len(coords),
        samples=samples,
        **({} if table is None else {"table": [table, len(table)]}),
    )
    return order
