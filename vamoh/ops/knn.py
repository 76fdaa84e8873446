"""Nearest neighbours, exact."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vamoh._cache import version
from vamoh._checks import check_positive, check_tensor, values_readable
from vamoh.ops._native import items
from vamoh.ops._op import Op
from vamoh.ops._points import POINTS, check_cells, check_mask, check_points, name_of, squared_distances

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
    points and queries are then flat cell indices, int64 with D = 1 in 0 .. T // 2, and the squared distance of p to q
    is table[T // 2 + p - q]: `vamoh.geometry.Lattice` makes both.

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
    index: Tensor = _knn(
        points.detach().expand(*lead, -1, -1),
        queries.detach().expand(*lead, -1, -1),
        num_neighbors,
        None if mask is None else mask.expand(*lead, -1),
        table.detach() if table is not None and table.requires_grad else table,
        backend=backend,
    )
    return index[0] if batch is None else index


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


def _fake(points: Tensor, queries: Tensor, num_neighbors: int, mask: Tensor | None, table: Tensor | None) -> Tensor:
    return queries.new_empty((*queries.shape[:2], num_neighbors), dtype=torch.int64)


def _check_contents(
    points: Tensor, queries: Tensor, num_neighbors: int, mask: Tensor | None, table: Tensor | None
) -> None:
    batch, count, _ = points.shape
    counts = mask.sum(1).tolist() if mask is not None and values_readable(mask) else [count] * batch
    fewest = min(counts, default=num_neighbors)
    if fewest < num_neighbors:
        item = "" if mask is None else f" in item {counts.index(fewest)}"
        raise ValueError(f"knn: num_neighbors must be at most the {fewest} candidates{item}, got {num_neighbors}")
    if table is not None:
        check_cells("knn", "points", points, table)
        check_cells("knn", "queries", queries, table)


_knn = Op(
    "knn(Tensor points, Tensor queries, int num_neighbors, Tensor? mask, Tensor? table) -> Tensor",
    knn_reference,
    _fake,
    check=_check_contents,
)


@_knn.backend("cpu", dtypes=POINTS)
def _(
    call: Any, points: Tensor, queries: Tensor, num_neighbors: int, mask: Tensor | None, table: Tensor | None
) -> Tensor:
    if table is None:
        return _run(call, points, queries, num_neighbors, mask, None)
    order = _nearest_cells(table, points.shape[1], queries.shape[1], num_neighbors)
    return _run(call, points, queries, num_neighbors, mask, table, order=order, length=len(order))


@_knn.backend("cuda", dtypes=POINTS)
def _run(
    call: Any,
    points: Tensor,
    queries: Tensor,
    num_neighbors: int,
    mask: Tensor | None,
    table: Tensor | None,
    **cells: Any,
) -> Tensor:
    index = points.new_empty((len(points), queries.shape[1], num_neighbors), dtype=torch.int64)
    call(
        f"knn_{name_of(points)}" if table is None else f"knn_by_table_{name_of(table)}",
        points=[*items(points), *points.shape[1:]],
        queries=[*items(queries), *queries.shape[1:]],
        mask=items(mask),
        out=index,
        batch=len(points),
        neighbors=num_neighbors,
        **({} if table is None else {"table": [table, len(table)], **cells}),
    )
    return index


def _nearest_cells(table: Tensor, count: int, num_queries: int, num_neighbors: int) -> Tensor:
    """Positions of the smallest distances of a table, int32, in their order: the cells nearest to its origin, enough to
    contain the neighbours of a typical query.

    Empty if a linear scan is as fast. The longest list asked for is remembered as long as the table is.
    """
    if count * num_queries < 4 * len(table):
        return torch.empty(0, dtype=torch.int32)
    # A query in a corner sees only half of the cells per axis, hence the factor.
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
