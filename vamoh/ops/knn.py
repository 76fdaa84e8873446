"""Nearest neighbours, exact."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vamoh._cache import version
from vamoh._checks import check_positive, check_tensor, may_look
from vamoh.ops._backend import call_native, cuda_unavailable, items, native_unavailable, register, resolve
from vamoh.ops._points import POINTS, check_mask, check_places, check_points, squared_distances

_CHUNK = 1 << 18
"""Most distances alive at once in the reference."""


def knn(
    points: Tensor,
    queries: Tensor,
    num_neighbors: int,
    mask: Tensor | None = None,
    *,
    table: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Indices int64 [M, S] of the S = num_neighbors points nearest to each query, [B, M, S] if any input has a batch.

    points [N, D] or [B, N, D] and queries [M, D] or [B, M, D], float32 or float64 of one dtype and device; mask None
    (all points), [N] or [B, N] bool: only points with True are candidates. Neighbours are sorted by squared Euclidean
    distance, then by index; a query that is a point has itself among them. NaN and overflowing distances count as
    equal and largest. All backends return the same indices. Not differentiable.

    table [T], float32 or float64, T odd: squared distances on a lattice, where they depend on the displacement alone.
    points and queries are then places, int64 with D = 1 in 0 .. T // 2, and the squared distance of p to q is
    table[T // 2 + p - q]: `vamoh.points.Lattice` makes both.

    Raises TypeError or ValueError naming the argument, ValueError for an item with fewer candidates than num_neighbors.
    """
    where = "knn"
    points_batch = check_points(where, "points", points, "N", table)
    batch = check_points(where, "queries", queries, "M", table)
    lead = [] if batch is None else [batch if points_batch is None else points_batch]
    check_tensor(where, "queries", queries, [*lead, "M", points.shape[-1]], like=points)
    batch = check_mask(where, mask, points, batch if points_batch is None else points_batch)
    check_positive(where, "num_neighbors", num_neighbors)
    lead = [1 if batch is None else batch]
    index: Tensor = torch.ops.vamoh.knn(
        points.detach().expand(*lead, -1, -1),
        queries.detach().expand(*lead, -1, -1),
        num_neighbors,
        None if mask is None else mask.expand(*lead, -1),
        table.detach() if table is not None and table.requires_grad else table,
        backend,
    )
    return index[0] if batch is None else index


torch.library.define(
    "vamoh::knn",
    "(Tensor points, Tensor queries, int num_neighbors, Tensor? mask, Tensor? table, str? backend) -> Tensor",
)


@torch.library.register_fake("vamoh::knn")
def _fake(points: Tensor, queries: Tensor, num_neighbors: int, *_: object) -> Tensor:
    return queries.new_empty((*queries.shape[:2], num_neighbors), dtype=torch.int64)


@torch.library.impl("vamoh::knn", "CompositeExplicitAutograd")
def _run(
    points: Tensor,
    queries: Tensor,
    num_neighbors: int,
    mask: Tensor | None,
    table: Tensor | None,
    backend: str | None,
) -> Tensor:
    batch, count, _ = points.shape
    counts = mask.sum(1).tolist() if mask is not None and may_look(mask) else [count] * batch
    fewest = min(counts, default=num_neighbors)
    if fewest < num_neighbors:
        item = "" if mask is None else f" in item {counts.index(fewest)}"
        raise ValueError(f"knn: num_neighbors must be at most the {fewest} candidates{item}, got {num_neighbors}")
    if table is not None:
        check_places("knn", "points", points, table)
        check_places("knn", "queries", queries, table)
    chosen = resolve("knn", points.device, points.dtype, backend)
    if chosen == "reference":
        return knn_reference(points, queries, num_neighbors, mask, table)
    return _native(chosen, points, queries, num_neighbors, mask, table)


def knn_reference(
    points: Tensor, queries: Tensor, num_neighbors: int, mask: Tensor | None, table: Tensor | None
) -> Tensor:
    """Plain torch: indices [B, M, S] from points [B, N, D], queries [B, M, D], mask [B, N] and table [T]."""
    batch, count, _ = points.shape
    index = torch.empty(*queries.shape[:2], num_neighbors, dtype=torch.int64, device=points.device)
    rows = max(1, _CHUNK // max(count, 1))
    largest = torch.finfo((points if table is None else table).dtype).max
    for b in range(batch):
        by_dim = points[b].T.contiguous()  # [D, N]
        for start in range(0, queries.shape[1], rows):
            part = slice(start, start + rows)
            distance = squared_distances(by_dim, queries[b, part].T, table).nan_to_num(nan=largest, posinf=largest)
            if mask is not None:
                distance.masked_fill_(~mask[b], math.inf)
            index[b, part] = distance.sort(dim=1, stable=True).indices[:, :num_neighbors]
    return index


def _native(
    backend: str, points: Tensor, queries: Tensor, num_neighbors: int, mask: Tensor | None, table: Tensor | None
) -> Tensor:
    batch, count, dims = points.shape
    num_queries = queries.shape[1]
    index = torch.empty(batch, num_queries, num_neighbors, dtype=torch.int64, device=points.device)
    points, points_step = items(points)
    queries, queries_step = items(queries)
    mask, mask_step = (None, 0) if mask is None else items(mask)
    common = {
        "points": points.data_ptr(),
        "points_step": points_step,
        "queries": queries.data_ptr(),
        "queries_step": queries_step,
        "mask": 0 if mask is None else mask.data_ptr(),
        "mask_step": mask_step,
        "out": index.data_ptr(),
        "batch": batch,
        "count": count,
        "num_queries": num_queries,
        "neighbors": num_neighbors,
        "is_double": (points if table is None else table).dtype == torch.float64,
    }
    if table is None:
        call_native("knn", backend, points.device, **common, dims=dims)
    else:
        table = table.contiguous()
        common |= {"table": table.data_ptr(), "table_size": len(table)}
        if backend == "cuda":
            call_native("knn_by_table", backend, points.device, **common)
        else:
            order = _nearest_cells(table, count, num_queries, num_neighbors)
            call_native("knn_by_table", backend, points.device, **common, order=order.data_ptr(), length=len(order))
    return index


def _nearest_cells(table: Tensor, count: int, num_queries: int, num_neighbors: int) -> Tensor:
    """Positions of the smallest distances of a table, int32, in their order; so many that they usually hold a query's
    neighbours.

    Empty where to look at every point is as fast. The longest list asked for is remembered as long as the table is.
    """
    if count * num_queries < 4 * len(table):
        return torch.empty(0, dtype=torch.int32)
    # Half the cells of a displacement lie outside along every axis for a query in a corner, hence the factor.
    wanted = min(4 * num_neighbors * len(table) // count + _FEWEST_CELLS, len(table))
    written = version(table)
    known: _Order | None = _ORDERS.get(table)
    if known is not None and known.version == written and known.length >= wanted:
        return known.order
    length = min(1 << (wanted - 1).bit_length(), len(table))  # the next, for fewer points, may want a little more
    distances, index = table.topk(length, largest=False)
    order = index[distances.isfinite()].int()
    if written is not None:
        _ORDERS[table] = _Order(written, length, order)
    return order


class _Order(NamedTuple):
    """What `_nearest_cells` found in a table of this version, among so many of its smallest entries."""

    version: int
    length: int
    order: Tensor


_FEWEST_CELLS = 64

_ORDERS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

register("knn", "cpu", devices=["cpu"], dtypes=POINTS, unavailable=native_unavailable)
register("knn", "cuda", devices=["cuda"], dtypes=POINTS, unavailable=cuda_unavailable)
register("knn", "reference")
