"""PointConv: gather neighbours, weigh them by a function of their offsets, contract, project; and average pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vamoh._checks import FLOATING, check_tensor, values_readable
from vamoh.ops._autocast import float32_under_autocast
from vamoh.ops._op import Op, Saved


@float32_under_autocast
def point_conv(
    features: Tensor,
    neighbors: Tensor,
    weights: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor,
    slope: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Continuous convolution [B, M, O] of point features (Wu et al. 2019; no density term, no division by S).

    features [B, N, C]; neighbors int64 [B, M, S] and weights [B, M, S, Q], the weight net at every neighbour's offset,
    both of batch 1 where they are shared; linear_weight [O, C·Q], channel-major; linear_bias [O]; slope >= 0 of a
    LeakyReLU on the result (1: none). float32 or float64 of one dtype and device. Differentiable once in all tensors
    but the neighbours.

        out[b, m] = leaky(linear(flatten_{c,q} Σ_s features[b, neighbors[b, m, s], c] · weights[b, m, s, q]))

    Raises TypeError or ValueError naming the argument.
    """
    where = "point_conv"
    check_tensor(where, "features", features, ["B", "N", "C"], dtypes=FLOATING)
    check_tensor(where, "weights", weights, ["B", "M", "S", "Q"], like=features)
    shared, m, s, q = weights.shape
    if shared not in (1, features.shape[0]):
        raise ValueError(f"{where}: weights must have batch 1 or {features.shape[0]}, got {shared}")
    _check_index(where, "neighbors", neighbors, [shared, m, s], features)
    check_tensor(where, "linear_weight", linear_weight, ["O", features.shape[2] * q], like=features)
    check_tensor(where, "linear_bias", linear_bias, [linear_weight.shape[0]], like=features)
    if not slope >= 0:
        raise ValueError(f"{where}: slope must be at least 0, got {slope}")
    result: Tensor = _point_conv(
        features, neighbors, weights, linear_weight, linear_bias, float(slope), backend=backend
    )
    return result


@float32_under_autocast
def neighbor_mean(features: Tensor, neighbors: Tensor) -> Tensor:
    """Mean [B, M, C] of point features [B, N, C] over neighbors, int64 [B, M, S], of batch 1 where they are shared.

    float32 or float64, plain torch. Differentiable once in the features. Raises TypeError or ValueError naming the
    argument.
    """
    where = "neighbor_mean"
    check_tensor(where, "features", features, ["B", "N", "C"], dtypes=FLOATING)
    _check_index(where, "neighbors", neighbors, ["B", "M", "S"], features)
    batch, points, _ = features.shape
    shared, _, count = neighbors.shape
    if shared not in (1, batch):
        raise ValueError(f"{where}: neighbors must have batch 1 or {batch}, got {shared}")
    if count == 0:
        raise ValueError(f"{where}: neighbors must hold at least 1 neighbour of a centroid, got 0")
    _check_range(where, neighbors, points)
    mean: Tensor = _NeighborMean.apply(features, neighbors)  # type: ignore[no-untyped-call]
    return mean


class _NeighborMean(torch.autograd.Function):
    """Both ways are sums over lists of rows; embedding_bag's own gradient sorts the lists of every function anew."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, neighbors: Tensor) -> Tensor:
        ctx.save_for_backward(neighbors)
        batch, ctx.points, channels = features.shape
        index = _rows_of(neighbors, features).flatten(0, 1)
        mean = F.embedding_bag(index, features.flatten(0, 1), mode="mean")
        return mean.view(batch, neighbors.shape[1], channels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (neighbors,) = ctx.saved_tensors
        count, points = neighbors.shape[2], ctx.points
        batch, _, channels = grad.shape
        read = neighbors.flatten(1)
        readers = read.argsort(dim=1, stable=True) // count  # centroids, by the point that they read
        times = read.new_zeros(read.shape[0], points).scatter_add_(1, read, torch.ones_like(read))
        starts = times.cumsum(1) - times + read.shape[1] * torch.arange(batch, device=grad.device)[:, None]
        rows = (grad / count).flatten(0, 1)
        total = F.embedding_bag(_rows_of(readers, grad).flatten(), rows, starts.flatten(), mode="sum")
        return total.view(batch, points, channels), None


def _rows_of(index: Tensor, batch: Tensor) -> Tensor:
    """index [B|1, ...] into the rows of every item of batch [B, N, C], counted in all B·N."""
    first = batch.shape[1] * torch.arange(batch.shape[0], device=batch.device)
    return index + first.view(-1, *[1] * (index.dim() - 1))


@float32_under_autocast
def neighbor_difference(
    table: Tensor, neighbors: Tensor, centroids: Tensor, bias: Tensor, *, backend: str | None = None
) -> Tensor:
    """table[neighbors] - table[centroids] + bias [B, M, S, Q]: a linear function of the neighbours' offsets.

    table [B, N, Q], that function of every point; neighbors [B, M, S] and centroids [B, M], int64; bias [Q]. The table
    may have batch 1 and serve the whole batch, and so may the indices. float32 or float64. Differentiable once in
    table and bias. Raises TypeError or ValueError naming the argument.
    """
    where = "neighbor_difference"
    check_tensor(where, "table", table, ["B", "N", "Q"], dtypes=FLOATING)
    _check_index(where, "neighbors", neighbors, ["B", "M", "S"], table)
    _check_index(where, "centroids", centroids, list(neighbors.shape[:2]), table)
    check_tensor(where, "bias", bias, [table.shape[2]], like=table)
    if table.shape[0] != neighbors.shape[0] and 1 not in (table.shape[0], neighbors.shape[0]):
        raise ValueError(f"{where}: neighbors must have batch 1 or {table.shape[0]}, got {neighbors.shape[0]}")
    result: Tensor = _neighbor_difference(table, neighbors, centroids, bias, backend=backend)
    return result


def _check_index(where: str, name: str, index: Tensor, shape: Sequence[int | str], features: Tensor) -> None:
    check_tensor(where, name, index, shape, dtypes=[torch.int64])
    if index.device != features.device:
        raise TypeError(f"{where}: {name} must be on {features.device}, got {index.device}")


def gather(features: Tensor, index: Tensor) -> Tensor:
    """Rows `index` of point features: [B, ..., C] from features [B, N, C] and int64 index [B, ...].

    Either batch may be 1 and then serves every function of the other.
    """
    batch, count, channels = features.shape
    if index.shape[0] == 1:
        return features.index_select(1, index.flatten()).reshape(batch, *index.shape[1:], channels)
    if batch > 1:  # whole rows of one matrix: much faster than Tensor.gather
        first = torch.arange(batch, device=index.device) * count
        index = index + first.view(-1, *(1,) * (index.dim() - 1))
    return features.flatten(0, 1).index_select(0, index.flatten()).reshape(*index.shape, channels)


def _check_range(where: str, index: Tensor, points: int, name: str = "neighbors") -> None:
    """Bounds check: kernels do not check indices."""
    if index.numel() and values_readable(index):
        low, high = (int(i) for i in index.aminmax())
        if low < 0 or high >= points:
            raise ValueError(f"{where}: {name} must index the {points} points, got {low if low < 0 else high}")


def point_conv_reference(
    features: Tensor, neighbors: Tensor, weights: Tensor, linear_weight: Tensor, linear_bias: Tensor
) -> Tensor:
    """Plain torch, without activation."""
    return F.linear(_contract(features, neighbors, weights), linear_weight, linear_bias)


def _contract(features: Tensor, neighbors: Tensor, weights: Tensor) -> Tensor:
    """Contracted features [B, M, C·Q].

    Per centroid one product [Q, S] x [S, B·C] where the batch shares weights, else [C, S] x [S, Q].
    """
    batch, _, channels = features.shape
    shared, m, s, q = weights.shape
    if shared == 1:
        rows = features.transpose(0, 1).flatten(1)[neighbors[0].flatten()].view(m, s, batch * channels)
        return (weights[0].mT @ rows).view(m, q, batch, channels).permute(2, 0, 3, 1).flatten(2)
    return (gather(features, neighbors).mT @ weights).flatten(2)


def _scatter(rows: Tensor, index: Tensor, points: int) -> Tensor:
    """Inverse of `gather`: [B, points, C], rows [B, M, S, C] of the same index added up."""
    batch, channels = rows.shape[0], rows.shape[3]
    where = index.expand(batch, -1, -1).flatten(1)[..., None].expand(-1, -1, channels)
    return rows.new_zeros(batch, points, channels).scatter_add_(1, where, rows.flatten(1, 2))


def _reference(
    features: Tensor, neighbors: Tensor, weights: Tensor, linear_weight: Tensor, linear_bias: Tensor, slope: float
) -> Tensor:
    return F.leaky_relu(point_conv_reference(features, neighbors, weights, linear_weight, linear_bias), slope)


def _empty(
    features: Tensor, neighbors: Tensor, weights: Tensor, linear_weight: Tensor, linear_bias: Tensor, slope: float
) -> Tensor:
    return features.new_empty(features.shape[0], weights.shape[1], linear_weight.shape[0])


_point_conv = Op(
    "point_conv(Tensor features, Tensor neighbors, Tensor weights, Tensor linear_weight, Tensor linear_bias, "
    "float slope) -> Tensor",
    _reference,
    _empty,
    check=lambda features, neighbors, *_: _check_range("point_conv", neighbors, features.shape[1]),
)


@_point_conv.backend("cpu", "cuda")
def _(
    call: Any, features: Tensor, neighbors: Tensor, weights: Tensor, linear_weight: Tensor, linear_bias: Tensor,
    slope: float,
) -> Tensor:  # fmt: skip
    out = _empty(features, neighbors, weights, linear_weight, linear_bias, slope)
    inputs = [features, neighbors, weights, linear_weight, linear_bias]
    call("point_conv", inputs=inputs, out=out, sizes=_sizes(features, weights, linear_weight.shape[0]), slope=slope)
    return out


def _backward_reference(
    grad: Tensor, out: Tensor, features: Tensor, neighbors: Tensor, weights: Tensor, linear_weight: Tensor,
    slope: float, by_features: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    grad = torch.where(out > 0, grad, grad * slope)
    contracted = _contract(features, neighbors, weights)
    grad_linear = grad.flatten(0, 1).mT @ contracted.flatten(0, 1)
    grad_contracted = (grad @ linear_weight).view(*grad.shape[:2], features.shape[2], weights.shape[3])  # [B, M, C, Q]
    grad_weights = gather(features, neighbors) @ grad_contracted  # [B, M, S, Q]
    if weights.shape[0] == 1:
        grad_weights = grad_weights.sum(0, keepdim=True)
    grad_features = features.new_empty(0)
    if by_features:
        grad_features = _scatter(weights @ grad_contracted.mT, neighbors, features.shape[1])
    return grad_features, grad_weights, grad_linear, grad.sum((0, 1))


def _empty_grads(
    grad: Tensor, out: Tensor, features: Tensor, neighbors: Tensor, weights: Tensor, linear_weight: Tensor,
    slope: float, by_features: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = (features.shape if by_features else (0,), weights.shape, linear_weight.shape, linear_weight.shape[:1])
    return tuple(features.new_empty(shape) for shape in shapes)


_point_conv_backward = _point_conv.derivative(
    "point_conv_backward(Tensor grad, Tensor out, Tensor features, Tensor neighbors, Tensor weights, "
    "Tensor linear_weight, float slope, bool by_features) "
    "-> (Tensor grad_features, Tensor grad_weights, Tensor grad_linear_weight, Tensor grad_linear_bias)",
    _backward_reference,
    _empty_grads,
)


@_point_conv_backward.backend("cpu", "cuda")
def _(
    call: Any, grad: Tensor, out: Tensor, features: Tensor, neighbors: Tensor, weights: Tensor, linear_weight: Tensor,
    slope: float, by_features: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    grads = _empty_grads(grad, out, features, neighbors, weights, linear_weight, slope, by_features)
    call(
        "point_conv_backward",
        grad=grad,
        out=out,
        inputs=[features, neighbors, weights, linear_weight, None],
        gradients=[grads[0] if by_features else None, *grads[1:]],
        sizes=_sizes(features, weights, linear_weight.shape[0]),
        slope=slope,
    )
    return grads


@_point_conv.gradient(
    saves=lambda features, neighbors, weights, linear_weight, linear_bias, slope, out: (
        out, features, neighbors, weights, linear_weight, slope,
    )
)  # fmt: skip
def _(saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_features, *rest = _point_conv_backward(grad, *saved.values, saved.needed[0], backend=saved.backend)
    return (grad_features, None, *rest)


def _sizes(features: Tensor, weights: Tensor, outputs: int) -> tuple[Any, ...]:
    """PointConvSizes of csrc/point_conv.h."""
    return (*features.shape, *weights.shape[1:], outputs, weights.shape[0] == 1)


def _difference_reference(table: Tensor, neighbors: Tensor, centroids: Tensor, bias: Tensor) -> Tensor:
    return gather(table, neighbors) - gather(table, centroids)[:, :, None] + bias


def _empty_difference(table: Tensor, neighbors: Tensor, centroids: Tensor, bias: Tensor) -> Tensor:
    return table.new_empty(max(table.shape[0], neighbors.shape[0]), *neighbors.shape[1:], table.shape[2])


def _check_difference(table: Tensor, neighbors: Tensor, centroids: Tensor, bias: Tensor) -> None:
    _check_range("neighbor_difference", neighbors, table.shape[1])
    _check_range("neighbor_difference", centroids, table.shape[1], "centroids")


_neighbor_difference = Op(
    "neighbor_difference(Tensor table, Tensor neighbors, Tensor centroids, Tensor bias) -> Tensor",
    _difference_reference,
    _empty_difference,
    check=_check_difference,
)


@_neighbor_difference.backend("cpu", "cuda")
def _(call: Any, table: Tensor, neighbors: Tensor, centroids: Tensor, bias: Tensor) -> Tensor:
    out = _empty_difference(table, neighbors, centroids, bias)
    sizes = _difference_sizes(out, neighbors, *table.shape[:2])
    call("neighbor_difference", table=table, neighbors=neighbors, centroids=centroids, bias=bias, out=out, sizes=sizes)
    return out


def _difference_backward_reference(
    grad: Tensor, neighbors: Tensor, centroids: Tensor, batch: int, points: int
) -> tuple[Tensor, Tensor]:
    grad_table = _scatter(grad, neighbors, points) - _scatter(grad.sum(2)[:, :, None], centroids[..., None], points)
    return grad_table.sum(0, keepdim=True) if batch == 1 else grad_table, grad.sum((0, 1, 2))


def _empty_difference_grads(
    grad: Tensor, neighbors: Tensor, centroids: Tensor, batch: int, points: int
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(batch, points, grad.shape[3]), grad.new_empty(grad.shape[3])


_neighbor_difference_backward = _neighbor_difference.derivative(
    "neighbor_difference_backward(Tensor grad, Tensor neighbors, Tensor centroids, SymInt batch, SymInt points) "
    "-> (Tensor grad_table, Tensor grad_bias)",
    _difference_backward_reference,
    _empty_difference_grads,
)


@_neighbor_difference_backward.backend("cpu", "cuda")
def _(call: Any, grad: Tensor, neighbors: Tensor, centroids: Tensor, batch: int, points: int) -> tuple[Tensor, Tensor]:
    grad_table, grad_bias = _empty_difference_grads(grad, neighbors, centroids, batch, points)
    call(
        "neighbor_difference_backward",
        grad=grad,
        neighbors=neighbors,
        centroids=centroids,
        grad_table=grad_table,
        grad_bias=grad_bias,
        sizes=_difference_sizes(grad, neighbors, batch, points),
    )
    return grad_table, grad_bias


@_neighbor_difference.gradient(
    saves=lambda table, neighbors, centroids, bias, out: (neighbors, centroids, *table.shape[:2])
)
def _(saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_table, grad_bias = _neighbor_difference_backward(grad, *saved.values, backend=saved.backend)
    return grad_table, None, None, grad_bias


def _difference_sizes(out: Tensor, neighbors: Tensor, batch: int, points: int) -> tuple[Any, ...]:
    return (out.shape[0], points, *out.shape[1:], batch == 1, neighbors.shape[0] == 1)
