"""PointConv: gather neighbours, weigh them by a function of their offsets, contract, project."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vamoh._checks import FLOATING, check_tensor
from vamoh.ops._backend import register, resolve


def point_conv(
    features: Tensor,
    neighbors: Tensor,
    weights: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Continuous convolution [B, M, O] of point features (Wu et al. 2019; no density term, no division by S).

    features [B, N, C]; neighbors int64 [B, M, S] and weights [B, M, S, Q], the weight net at every neighbour's offset,
    both of batch 1 where they are shared; linear_weight [O, C·Q], channel-major; linear_bias [O]. float32 or float64
    of one dtype and device. Differentiable in all but the neighbours.

        out[b, m] = linear(flatten_{c,q} Σ_s features[b, neighbors[b, m, s], c] · weights[b, m, s, q])

    Raises TypeError or ValueError naming the argument.
    """
    where = "point_conv"
    check_tensor(where, "features", features, ["B", "N", "C"], dtypes=FLOATING)
    check_tensor(where, "weights", weights, ["B", "M", "S", "Q"], like=features)
    shared, m, s, q = weights.shape
    if shared not in (1, features.shape[0]):
        raise ValueError(f"{where}: weights must have batch 1 or {features.shape[0]}, got {shared}")
    check_tensor(where, "neighbors", neighbors, [shared, m, s], dtypes=[torch.int64])
    check_tensor(where, "linear_weight", linear_weight, ["O", features.shape[2] * q], like=features)
    check_tensor(where, "linear_bias", linear_bias, [linear_weight.shape[0]], like=features)
    resolve(where, features.device, features.dtype, backend)
    return point_conv_reference(features, neighbors, weights, linear_weight, linear_bias)


def point_conv_reference(
    features: Tensor, neighbors: Tensor, weights: Tensor, linear_weight: Tensor, linear_bias: Tensor
) -> Tensor:
    """Plain torch: per centroid one product [Q, S] x [S, B·C] where the batch shares weights, else [C, S] x [S, Q]."""
    batch, _, channels = features.shape
    shared, m, s, q = weights.shape
    if shared == 1:
        rows = features.transpose(0, 1).flatten(1)[neighbors[0].flatten()].view(m, s, batch * channels)
        contracted = (weights[0].mT @ rows).view(m, q, batch, channels).permute(2, 0, 3, 1)  # [B, M, C, Q]
    else:
        contracted = gather(features, neighbors).mT @ weights
    return F.linear(contracted.flatten(2), linear_weight, linear_bias)


def gather(features: Tensor, index: Tensor) -> Tensor:
    """Rows `index` of point features: [B, ..., C] from features [B, N, C] and int64 index [B, ...].

    Either batch may be 1 and then serves every function of the other.
    """
    if index.shape[0] == 1:
        return features.index_select(1, index.flatten()).reshape(-1, *index.shape[1:], features.shape[2])
    rows = index.flatten(1)[..., None].expand(-1, -1, features.shape[2])
    return features.expand(index.shape[0], -1, -1).gather(1, rows).reshape(*index.shape, features.shape[2])


register("point_conv", "reference")
