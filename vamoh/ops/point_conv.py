"""PointConv: gather neighbours, weigh them by a function of their offsets, contract, project; and average pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vamoh._checks import FLOATING, check_tensor, may_look
from vamoh.ops._backend import (
    call_native,
    cuda_unavailable,
    float32_under_autocast,
    native_unavailable,
    refuse_second_derivatives,
    register,
    resolve,
)


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
    result: Tensor = torch.ops.vamoh.point_conv(
        features, neighbors, weights, linear_weight, linear_bias, float(slope), backend
    )
    return result


@float32_under_autocast
def neighbor_mean(features: Tensor, neighbors: Tensor, *, backend: str | None = None) -> Tensor:
    """Mean [B, M, C] of point features [B, N, C] over neighbors, int64 [B, M, S], of batch 1 where they are shared.

    float32 or float64. Differentiable once in the features. Raises TypeError or ValueError naming the argument.
    """
    where = "neighbor_mean"
    check_tensor(where, "features", features, ["B", "N", "C"], dtypes=FLOATING)
    _check_index(where, "neighbors", neighbors, ["B", "M", "S"], features)
    if neighbors.shape[0] not in (1, features.shape[0]):
        raise ValueError(f"{where}: neighbors must have batch 1 or {features.shape[0]}, got {neighbors.shape[0]}")
    result: Tensor = torch.ops.vamoh.neighbor_mean(features, neighbors, backend)
    return result


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
    result: Tensor = torch.ops.vamoh.neighbor_difference(table, neighbors, centroids, bias, backend)
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


torch.library.define(
    "vamoh::point_conv",
    "(Tensor features, Tensor neighbors, Tensor weights, Tensor linear_weight, Tensor linear_bias, float slope, "
    "str? backend) -> Tensor",
)
torch.library.define(
    "vamoh::point_conv_backward",
    "(Tensor grad, Tensor out, Tensor features, Tensor neighbors, Tensor weights, Tensor linear_weight, float slope, "
    "bool features_needed, str? backend) "
    "-> (Tensor grad_features, Tensor grad_weights, Tensor grad_linear_weight, Tensor grad_linear_bias)",
)
torch.library.define("vamoh::neighbor_mean", "(Tensor features, Tensor neighbors, str? backend) -> Tensor")
torch.library.define(
    "vamoh::neighbor_mean_backward", "(Tensor grad, Tensor neighbors, SymInt points, str? backend) -> Tensor"
)


torch.library.define(
    "vamoh::neighbor_difference",
    "(Tensor table, Tensor neighbors, Tensor centroids, Tensor bias, str? backend) -> Tensor",
)
torch.library.define(
    "vamoh::neighbor_difference_backward",
    "(Tensor grad, Tensor neighbors, Tensor centroids, SymInt batch, SymInt points, str? backend) "
    "-> (Tensor grad_table, Tensor grad_bias)",
)


@torch.library.register_fake("vamoh::point_conv")
def _fake(features: Tensor, neighbors: Tensor, weights: Tensor, linear_weight: Tensor, *_: object) -> Tensor:
    return features.new_empty(features.shape[0], weights.shape[1], linear_weight.shape[0])


@torch.library.register_fake("vamoh::point_conv_backward")
def _fake_backward(
    grad: Tensor,
    out: Tensor,
    features: Tensor,
    neighbors: Tensor,
    weights: Tensor,
    linear_weight: Tensor,
    slope: float,
    features_needed: bool,
    backend: str | None,
) -> tuple[Tensor, ...]:
    by_features = features.new_empty(features.shape if features_needed else (0,))
    shapes = (weights.shape, linear_weight.shape, linear_weight.shape[:1])
    return (by_features, *(features.new_empty(shape) for shape in shapes))


@torch.library.register_fake("vamoh::neighbor_mean")
def _fake_mean(features: Tensor, neighbors: Tensor, backend: str | None) -> Tensor:
    return features.new_empty(features.shape[0], neighbors.shape[1], features.shape[2])


@torch.library.register_fake("vamoh::neighbor_mean_backward")
def _fake_mean_backward(grad: Tensor, neighbors: Tensor, points: int, backend: str | None) -> Tensor:
    return grad.new_empty(grad.shape[0], points, grad.shape[2])


@torch.library.register_fake("vamoh::neighbor_difference")
def _fake_difference(table: Tensor, neighbors: Tensor, centroids: Tensor, bias: Tensor, backend: str | None) -> Tensor:
    return table.new_empty(max(table.shape[0], neighbors.shape[0]), *neighbors.shape[1:], table.shape[2])


@torch.library.register_fake("vamoh::neighbor_difference_backward")
def _fake_difference_backward(
    grad: Tensor, neighbors: Tensor, centroids: Tensor, batch: int, points: int, backend: str | None
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(batch, points, grad.shape[3]), grad.new_empty(grad.shape[3])


@torch.library.impl("vamoh::point_conv", "CompositeExplicitAutograd")
def _run(
    features: Tensor,
    neighbors: Tensor,
    weights: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor,
    slope: float,
    backend: str | None,
) -> Tensor:
    _check_range("point_conv", neighbors, features.shape[1])
    chosen = resolve("point_conv", features.device, features.dtype, backend)
    if chosen == "reference":
        out = point_conv_reference(features, neighbors, weights, linear_weight, linear_bias)
        return F.leaky_relu(out, slope)
    inputs = [t.contiguous() for t in (features, neighbors, weights, linear_weight, linear_bias)]
    out = features.new_empty(features.shape[0], weights.shape[1], linear_weight.shape[0])
    call_native(
        "point_conv",
        chosen,
        features.device,
        features=inputs[0].data_ptr(),
        neighbors=inputs[1].data_ptr(),
        weights=inputs[2].data_ptr(),
        linear_weight=inputs[3].data_ptr(),
        linear_bias=inputs[4].data_ptr(),
        out=out.data_ptr(),
        slope=slope,
        **_sizes(features, neighbors, weights.shape[3], linear_weight.shape[0]),
    )
    return out


@torch.library.impl("vamoh::point_conv_backward", "CompositeExplicitAutograd")
def _run_backward(
    grad: Tensor,
    out: Tensor,
    features: Tensor,
    neighbors: Tensor,
    weights: Tensor,
    linear_weight: Tensor,
    slope: float,
    features_needed: bool,
    backend: str | None,
) -> tuple[Tensor, ...]:
    chosen = resolve("point_conv", features.device, features.dtype, backend)
    if chosen == "reference":
        grad = torch.where(out > 0, grad, grad * slope)
        return _backward_reference(grad, features, neighbors, weights, linear_weight, features_needed)
    grad = grad.contiguous()
    inputs = [t.contiguous() for t in (features, neighbors, weights, linear_weight)]
    by_features = features.new_empty(features.shape if features_needed else (0,))
    by_weights, by_linear = features.new_empty(weights.shape), features.new_empty(linear_weight.shape)
    by_bias = features.new_empty(linear_weight.shape[0])
    call_native(
        "point_conv_backward",
        chosen,
        features.device,
        grad=grad.data_ptr(),
        out=out.data_ptr(),
        features=inputs[0].data_ptr(),
        neighbors=inputs[1].data_ptr(),
        weights=inputs[2].data_ptr(),
        linear_weight=inputs[3].data_ptr(),
        grad_features=by_features.data_ptr(),
        grad_weights=by_weights.data_ptr(),
        grad_linear_weight=by_linear.data_ptr(),
        grad_linear_bias=by_bias.data_ptr(),
        slope=slope,
        **_sizes(features, neighbors, weights.shape[3], linear_weight.shape[0]),
    )
    return by_features, by_weights, by_linear, by_bias


@torch.library.impl("vamoh::neighbor_mean", "CompositeExplicitAutograd")
def _run_mean(features: Tensor, neighbors: Tensor, backend: str | None) -> Tensor:
    _check_range("neighbor_mean", neighbors, features.shape[1])
    chosen = resolve("neighbor_mean", features.device, features.dtype, backend)
    if chosen == "reference":
        return gather(features, neighbors).mean(2)
    out = features.new_empty(features.shape[0], neighbors.shape[1], features.shape[2])
    _native_mean(chosen, features, neighbors, out, features, backward=False)
    return out


@torch.library.impl("vamoh::neighbor_mean_backward", "CompositeExplicitAutograd")
def _run_mean_backward(grad: Tensor, neighbors: Tensor, points: int, backend: str | None) -> Tensor:
    chosen = resolve("neighbor_mean", grad.device, grad.dtype, backend)
    if chosen == "reference":
        size = neighbors.shape[2]
        return _scatter((grad / max(size, 1))[:, :, None].expand(-1, -1, size, -1), neighbors, points)
    out = grad.new_empty(grad.shape[0], points, grad.shape[2])
    _native_mean(chosen, grad, neighbors, out, out, backward=True)
    return out


@torch.library.impl("vamoh::neighbor_difference", "CompositeExplicitAutograd")
def _run_difference(table: Tensor, neighbors: Tensor, centroids: Tensor, bias: Tensor, backend: str | None) -> Tensor:
    where = "neighbor_difference"
    _check_range(where, neighbors, table.shape[1])
    _check_range(where, centroids, table.shape[1], "centroids")
    chosen = resolve(where, table.device, table.dtype, backend)
    if chosen == "reference":
        return gather(table, neighbors) - gather(table, centroids)[:, :, None] + bias
    inputs = [t.contiguous() for t in (table, neighbors, centroids, bias)]
    out = table.new_empty(max(table.shape[0], neighbors.shape[0]), *neighbors.shape[1:], table.shape[2])
    call_native(
        where,
        chosen,
        table.device,
        table=inputs[0].data_ptr(),
        neighbors=inputs[1].data_ptr(),
        centroids=inputs[2].data_ptr(),
        bias=inputs[3].data_ptr(),
        out=out.data_ptr(),
        **_difference_sizes(out, neighbors, *table.shape[:2]),
    )
    return out


@torch.library.impl("vamoh::neighbor_difference_backward", "CompositeExplicitAutograd")
def _run_difference_backward(
    grad: Tensor, neighbors: Tensor, centroids: Tensor, batch: int, points: int, backend: str | None
) -> tuple[Tensor, Tensor]:
    chosen = resolve("neighbor_difference", grad.device, grad.dtype, backend)
    if chosen == "reference":
        by_table = _scatter(grad, neighbors, points) - _scatter(grad.sum(2)[:, :, None], centroids[..., None], points)
        return by_table.sum(0, keepdim=True) if batch == 1 else by_table, grad.sum((0, 1, 2))
    inputs = [t.contiguous() for t in (grad, neighbors, centroids)]
    by_table, by_bias = grad.new_empty(batch, points, grad.shape[3]), grad.new_empty(grad.shape[3])
    call_native(
        "neighbor_difference_backward",
        chosen,
        grad.device,
        grad=inputs[0].data_ptr(),
        neighbors=inputs[1].data_ptr(),
        centroids=inputs[2].data_ptr(),
        grad_table=by_table.data_ptr(),
        grad_bias=by_bias.data_ptr(),
        **_difference_sizes(grad, neighbors, batch, points),
    )
    return by_table, by_bias


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


def _backward_reference(
    grad: Tensor, features: Tensor, neighbors: Tensor, weights: Tensor, linear_weight: Tensor, features_needed: bool
) -> tuple[Tensor, ...]:
    contracted = _contract(features, neighbors, weights)
    by_linear = grad.flatten(0, 1).mT @ contracted.flatten(0, 1)
    by_contracted = (grad @ linear_weight).view(*grad.shape[:2], features.shape[2], weights.shape[3])  # [B, M, C, Q]
    by_weights = gather(features, neighbors) @ by_contracted  # [B, M, S, Q]
    if weights.shape[0] == 1:
        by_weights = by_weights.sum(0, keepdim=True)
    by_features = features.new_empty(0)
    if features_needed:
        by_features = _scatter(weights @ by_contracted.mT, neighbors, features.shape[1])
    return by_features, by_weights, by_linear, grad.sum((0, 1))


def _scatter(rows: Tensor, index: Tensor, points: int) -> Tensor:
    """Inverse of `gather`: [B, points, C], rows [B, M, S, C] of the same index added up."""
    batch, channels = rows.shape[0], rows.shape[3]
    where = index.expand(batch, -1, -1).flatten(1)[..., None].expand(-1, -1, channels)
    return rows.new_zeros(batch, points, channels).scatter_add_(1, where, rows.flatten(1, 2))


def _native_mean(
    chosen: str, source: Tensor, neighbors: Tensor, out: Tensor, features: Tensor, *, backward: bool
) -> None:
    source, neighbors = source.contiguous(), neighbors.contiguous()
    call_native(
        "neighbor_mean",
        chosen,
        source.device,
        source=source.data_ptr(),
        neighbors=neighbors.data_ptr(),
        out=out.data_ptr(),
        backward=backward,
        **_sizes(features, neighbors, 1, 1),
    )


def _sizes(features: Tensor, neighbors: Tensor, width: int, outputs: int) -> dict[str, Any]:
    return {
        "sizes": (*features.shape, *neighbors.shape[1:], width, outputs),
        "shared": neighbors.shape[0] == 1,
    }


def _difference_sizes(out: Tensor, neighbors: Tensor, batch: int, points: int) -> dict[str, Any]:
    return {
        "sizes": (out.shape[0], points, *out.shape[1:]),
        "table_shared": batch == 1,
        "index_shared": neighbors.shape[0] == 1,
    }


def _check_range(where: str, index: Tensor, points: int, name: str = "neighbors") -> None:
    """A kernel would read anywhere."""
    if index.numel() and may_look(index):
        low, high = (int(i) for i in index.aminmax())
        if low < 0 or high >= points:
            raise ValueError(f"{where}: {name} must index the {points} points, got {low if low < 0 else high}")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.slope, ctx.backend = inputs
    ctx.save_for_backward(output, *tensors)


@float32_under_autocast
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivatives("point_conv")
    needed = ctx.needs_input_grad[0]
    by_features, *rest = torch.ops.vamoh.point_conv_backward(grad, *ctx.saved_tensors, ctx.slope, needed, ctx.backend)
    return (by_features if needed else None, None, *rest, None, None)


def _setup_context_mean(ctx: Any, inputs: tuple[Tensor, Tensor, str | None], output: Tensor) -> None:
    features, neighbors, ctx.backend = inputs
    ctx.points = features.shape[1]
    ctx.save_for_backward(neighbors)


@float32_under_autocast
def _backward_mean(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivatives("neighbor_mean")
    return torch.ops.vamoh.neighbor_mean_backward(grad, *ctx.saved_tensors, ctx.points, ctx.backend), None, None


def _setup_context_difference(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, str | None], output: Tensor
) -> None:
    table, neighbors, centroids, _, ctx.backend = inputs
    ctx.table = table.shape[:2]
    ctx.save_for_backward(neighbors, centroids)


@float32_under_autocast
def _backward_difference(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivatives("neighbor_difference")
    by_table, by_bias = torch.ops.vamoh.neighbor_difference_backward(grad, *ctx.saved_tensors, *ctx.table, ctx.backend)
    return by_table, None, None, by_bias, None


torch.library.register_autograd(
    "vamoh::neighbor_difference", _backward_difference, setup_context=_setup_context_difference
)
torch.library.register_autograd("vamoh::point_conv", _backward, setup_context=_setup_context)
torch.library.register_autograd("vamoh::neighbor_mean", _backward_mean, setup_context=_setup_context_mean)

for _op in ("point_conv", "neighbor_mean", "neighbor_difference"):
    register(_op, "cpu", devices=["cpu"], dtypes=[torch.float32], unavailable=native_unavailable)
    register(_op, "cuda", devices=["cuda"], dtypes=[torch.float32], unavailable=cuda_unavailable)
    register(_op, "reference")
