"""Farthest-point sampling: centroids that cover a point cloud (Qi et al. 2017, PointNet++)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vamoh._checks import check_positive, may_look
from vamoh.ops._backend import call_native, cuda_unavailable, items, native_unavailable, register, resolve
from vamoh.ops._points import POINTS, check_mask, check_places, check_points, squared_distances


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
    coords are then places, int64 with D = 1 in 0 .. T // 2, and the squared distance of p to a point q taken is
    table[T // 2 + p - q]: `vamoh.points.Lattice` makes both.

    With a mask, M depends on its values: that breaks the graph of `torch.compile`. Where they cannot be looked at, as
    in a CUDA graph, M = min(num_samples, N).
    Raises TypeError or ValueError naming the argument, ValueError for an item without candidates.
    """
    where = "farthest_point_sample"
    batch = check_mask(where, mask, coords, check_points(where, "coords", coords, "N", table))
    check_positive(where, "num_samples", num_samples)
    shape = [1 if batch is None else batch, *coords.shape[-2:]]
    order: Tensor = torch.ops.vamoh.farthest_point_sample(
        coords.detach().expand(shape),
        None if mask is None else mask.expand(shape[:2]),
        num_samples,
        None if table is None else table.detach(),
        backend,
    )
    return order[0] if batch is None else order


torch.library.define(
    "vamoh::farthest_point_sample",
    "(Tensor coords, Tensor? mask, int num_samples, Tensor? table, str? backend) -> Tensor",
)


@torch.library.register_fake("vamoh::farthest_point_sample")
def _fake(coords: Tensor, mask: Tensor | None, num_samples: int, *_: object) -> Tensor:
    samples = min(num_samples, coords.shape[1]) if mask is None else torch.library.get_ctx().new_dynamic_size()
    return coords.new_empty((coords.shape[0], samples), dtype=torch.int64)


@torch.library.impl("vamoh::farthest_point_sample", "CompositeExplicitAutograd")
def _run(coords: Tensor, mask: Tensor | None, num_samples: int, table: Tensor | None, backend: str | None) -> Tensor:
    batch, points, _ = coords.shape
    counts = mask.sum(1).tolist() if mask is not None and may_look(mask) else [points] * batch
    if 0 in counts:
        name, item = ("coords", "") if mask is None else ("mask", f" in item {counts.index(0)}")
        raise ValueError(f"farthest_point_sample: {name} must leave at least one candidate, got none{item}")
    samples = min(num_samples, max(counts, default=points))
    if table is not None:
        check_places("farthest_point_sample", "coords", coords, table)
    chosen = resolve("farthest_point_sample", coords.device, coords.dtype, backend)
    if chosen == "reference":
        return farthest_point_sample_reference(coords, mask, samples, table)
    return _native(chosen, coords, mask, samples, table)


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


def _native(backend: str, coords: Tensor, mask: Tensor | None, samples: int, table: Tensor | None) -> Tensor:
    batch, points, dims = coords.shape
    coords, coords_step = items(coords)
    mask, mask_step = (None, 0) if mask is None else items(mask)
    order = torch.empty(batch, samples, dtype=torch.int64, device=coords.device)
    common = {
        "coords": coords.data_ptr(),
        "coords_step": coords_step,
        "mask": 0 if mask is None else mask.data_ptr(),
        "mask_step": mask_step,
        "out": order.data_ptr(),
        "batch": batch,
        "points": points,
        "samples": samples,
        "is_double": (coords if table is None else table).dtype == torch.float64,
    }
    if table is None:
        call_native("farthest_point_sample", backend, coords.device, **common, dims=dims)
    else:
        table = table.contiguous()
        size = len(table)
        call_native(
            "farthest_point_sample_by_table", backend, coords.device, **common, table=table.data_ptr(), table_size=size
        )
    return order


register("farthest_point_sample", "cpu", devices=["cpu"], dtypes=POINTS, unavailable=native_unavailable)
register("farthest_point_sample", "cuda", devices=["cuda"], dtypes=POINTS, unavailable=cuda_unavailable)
register("farthest_point_sample", "reference")
