"""How many operations and bytes a computation needs: functions of sizes alone.

An operation is one multiplication or addition inside a matrix product, a dot product or a squared distance; elementwise
functions count nothing. Bytes are those that must move once in float32 and int64: every input read and every output
written, whatever is kept or read again in between. So a share of the peak can only come out too low.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

FLOAT, INDEX = 4, 8


class Count(NamedTuple):
    """Operations and bytes."""

    operations: int
    bytes: int

    def __add__(self, other: Count) -> Count:  # type: ignore[override]
        return Count(self.operations + other.operations, self.bytes + other.bytes)


class Conv(NamedTuple):
    """One encoder stage: N points in, M centroids with S neighbours; C channels to O, None for average pooling."""

    points: int
    centroids: int
    neighbors: int
    channels: int
    out: int | None


class Sizes(NamedTuple):
    """What a training step works on; letters as in docs/architecture.md, S counts samples of the flow."""

    batch: int
    points: int
    """observed points N"""
    components: int
    latent: int
    samples: int
    flow_layers: int
    inr: tuple[int, ...]
    """widths (E, H, ..., C)"""
    hypernet: tuple[int, ...]
    """widths (Z, ..., P)"""
    gating: tuple[int, ...]
    """widths (H, ..., K) after the split first layer"""
    weight_net: tuple[int, ...]
    """widths (E, ..., Q)"""
    convs: tuple[Conv, ...]


def layers(widths: Sequence[int]) -> int:
    """Operations of one row through an MLP."""
    return sum(2 * a * b for a, b in pairwise(widths))


def parameters(widths: Sequence[int]) -> int:
    """Weights and biases of an MLP."""
    return sum(a * b + b for a, b in pairwise(widths))


def inr_forward(batch: int, components: int, points: int, widths: Sequence[int], mirrored: bool = False) -> Count:
    """B·K networks at N points: outputs [B, K, N, C]. mirrored: the even/odd split halves the first layer."""
    per_point = layers(widths) - (widths[0] * widths[1] if mirrored else 0)
    moved = batch * components * (parameters(widths) + points * widths[-1]) + points * widths[0]
    return Count(batch * components * points * per_point, FLOAT * moved)


def inr_train(batch: int, components: int, points: int, widths: Sequence[int], mirrored: bool = False) -> Count:
    """Log-likelihoods [B, K, N] and the gradient of θ in one pass over the points.

    Forward, as much again for the gradient of the weights, and the gradient of every layer's input but the first's.
    """
    first = widths[0] * widths[1] * (1 if mirrored else 2)
    rest = layers(widths[1:])
    nets = batch * components
    moved = nets * (2 * parameters(widths) + 2 * points) + points * (widths[0] + batch * widths[-1])
    return Count(nets * points * (2 * first + 3 * rest), FLOAT * moved)


def inr_mean(batch: int, components: int, points: int, widths: Sequence[int], mirrored: bool = False) -> Count:
    """B·K networks at N points, mixed to the mean and the most probable component's mean, both [B, N, C]."""
    operations = inr_forward(batch, components, points, widths, mirrored).operations
    moved = batch * components * (parameters(widths) + points) + points * (widths[0] + 2 * batch * widths[-1])
    return Count(operations, FLOAT * moved)


def categorical_kl(batch: int, components: int, points: int) -> Count:
    """Both log-probabilities in, q and the divergence out; no products."""
    return Count(0, FLOAT * batch * (3 * components * points + 1))


def point_conv_forward(batch: int, conv: Conv, weights: int, shared: bool = True) -> Count:
    """Gather, contraction with Q weights per pair (shared by the batch or not), linear layer."""
    b, pairs = 1 if shared else batch, conv.centroids * conv.neighbors
    if conv.out is None:
        moved = batch * conv.channels * (conv.points + conv.centroids)
        return Count(batch * pairs * conv.channels, FLOAT * moved + INDEX * b * pairs)
    contracted = conv.channels * weights
    operations = 2 * batch * (pairs * contracted + conv.centroids * contracted * conv.out)
    moved = batch * (conv.points * conv.channels + conv.centroids * conv.out) + b * pairs * weights
    moved += (contracted + 1) * conv.out
    return Count(operations, FLOAT * moved + INDEX * b * pairs)


def point_conv_backward(batch: int, conv: Conv, weights: int, shared: bool = True, features: bool = True) -> Count:
    """Gradients of weights, linear layer and (`features`) of the input; the contraction is not counted again."""
    forward = point_conv_forward(batch, conv, weights, shared)
    pairs = conv.centroids * conv.neighbors
    if conv.out is None:
        return Count(batch * pairs * conv.channels, forward.bytes)
    skipped = 0 if features else 2 * batch * pairs * conv.channels * weights
    written = (batch * conv.points * conv.channels if features else 0) + (1 if shared else batch) * pairs * weights
    written += (conv.channels * weights + 1) * conv.out
    return Count(2 * forward.operations - skipped, forward.bytes + FLOAT * written)


def neighbor_difference(conv: Conv, weights: int) -> Count:
    """A linear function of the offsets of M·S pairs from that of N points; the same again backwards. No products."""
    pairs = conv.centroids * conv.neighbors
    moved = weights * (conv.points + pairs + 1)
    return Count(0, FLOAT * moved + INDEX * (pairs + conv.centroids))


def fourier_features(points: int, dims: int, frequencies: int) -> Count:
    """The phases; sines and cosines do not count as operations."""
    moved = points * (dims + 2 * frequencies) + frequencies * dims
    return Count(2 * points * dims * frequencies, FLOAT * moved)


def farthest_point_sample(batch: int, points: int, dims: int, samples: int) -> Count:
    """Squared distances of every point to each sample but the last: subtract, multiply, add per dimension."""
    return Count(3 * batch * (samples - 1) * points * dims, batch * (FLOAT * points * dims + INDEX * samples))


def knn(batch: int, points: int, queries: int, dims: int, neighbors: int) -> Count:
    """Squared distances of every query to every point."""
    moved = FLOAT * (points + queries) * dims + INDEX * queries * neighbors
    return Count(3 * batch * queries * points * dims, batch * moved)


def farthest_point_sample_by_table(batch: int, points: int, table: int, samples: int) -> Count:
    """A look into the table of every point for each sample but the last: minimum and comparison."""
    return Count(2 * batch * (samples - 1) * points, FLOAT * table + batch * INDEX * (points + samples))


def knn_by_table(batch: int, points: int, queries: int, table: int, neighbors: int) -> Count:
    """A look into the table of every query for each point: a subtraction of cells and a comparison."""
    return Count(2 * batch * queries * points, FLOAT * table + batch * INDEX * (points + queries * (1 + neighbors)))


def flow_forward(samples: int, latent: int, flow_layers: int) -> Count:
    """Density of given samples: one dot product and one update of z per layer."""
    moved = samples * (latent + 1) + flow_layers * (2 * latent + 1) + 2 * latent
    return Count(4 * samples * latent * flow_layers, FLOAT * moved)


def flow_backward(samples: int, latent: int, flow_layers: int) -> Count:
    """Per layer: the gradient through the update and the dot product to z, û and w."""
    moved = 2 * samples * latent + 2 * (flow_layers * (2 * latent + 1) + 2 * latent)
    return Count(8 * samples * latent * flow_layers, FLOAT * moved)


def flow_expected(samples: int, batch: int, latent: int, flow_layers: int) -> Count:
    """Mean density of S samples per function and its gradient in one pass; the noise is made where it is used."""
    operations = flow_forward(samples * batch, latent, flow_layers) + flow_backward(
        samples * batch, latent, flow_layers
    )
    moved = 2 * (flow_layers * (2 * latent + 1) + 2 * latent) + batch * (4 * latent + 1)
    return Count(operations.operations, FLOAT * moved)


def linear_forward(rows: int, widths: Sequence[int]) -> Count:
    """An MLP on `rows` rows."""
    return Count(rows * layers(widths), FLOAT * (rows * (widths[0] + widths[-1]) + parameters(widths)))


def linear_backward(rows: int, widths: Sequence[int], inputs: bool = True) -> Count:
    """Gradients of weights and of inputs; `inputs` False: not of the first layer's."""
    skipped = 0 if inputs else 2 * rows * widths[0] * widths[1]
    moved = rows * (widths[-1] + (2 if inputs else 1) * widths[0]) + 2 * parameters(widths)
    return Count(2 * rows * layers(widths) - skipped, FLOAT * moved)


def hypernet_forward(batch: int, components: int, widths: Sequence[int]) -> Count:
    """K MLPs from z to θ."""
    one = linear_forward(batch, widths)
    return Count(components * one.operations, components * one.bytes)


def hypernet_backward(batch: int, components: int, widths: Sequence[int]) -> Count:
    """Gradients of the weights and of z."""
    one = linear_backward(batch, widths)
    return Count(components * one.operations, components * one.bytes)


def gating_forward(batch: int, points: int, encoded: int, channels: int, latent: int, widths: Sequence[int]) -> Count:
    """Categorical network with the first layer split: coordinates once, z once per function; widths (H, ..., K)."""
    h, rows = widths[0], batch * points
    operations = 2 * h * (points * encoded + rows * channels + batch * latent) + rows * layers(widths)
    moved = points * encoded + rows * (channels + widths[-1]) + batch * latent
    return Count(operations, FLOAT * (moved + (encoded + channels + latent + 1) * h + parameters(widths)))


def gating_backward(batch: int, points: int, encoded: int, channels: int, latent: int, widths: Sequence[int]) -> Count:
    """Gradients of all weights and of z, none of coordinates and values."""
    h, rows = widths[0], batch * points
    operations = 2 * h * (points * encoded + rows * channels + 2 * batch * latent) + 2 * rows * layers(widths)
    weights = (encoded + channels + latent + 1) * h + parameters(widths)
    moved = points * encoded + rows * (channels + widths[-1]) + 2 * batch * latent + 2 * weights
    return Count(operations, FLOAT * moved)


def weight_net_forward(points: int, widths: Sequence[int]) -> Count:
    """Affine weight net, its layers multiplied into one matrix, on points (E, ..., Q)."""
    merged = sum(2 * widths[0] * a * b + 2 * a * b for a, b in pairwise(widths[1:]))
    first, last = widths[0], widths[-1]
    return Count(merged, FLOAT * parameters(widths)) + linear_forward(points, (first, last))


def weight_net_backward(points: int, widths: Sequence[int]) -> Count:
    """Gradients of all its layers; none of the encoded coordinates."""
    forward = weight_net_forward(points, widths)
    saved = linear_forward(points, (widths[0], widths[-1])).operations
    return Count(2 * forward.operations - saved, 2 * forward.bytes)


def train_step(sizes: Sizes, mirrored: bool = False) -> Count:
    """Forward and backward of the whole bound, neighbours known; what the exact savings leave, no recomputation."""
    s, encoded, channels = sizes, sizes.inr[0], sizes.inr[-1]
    total = inr_train(s.batch, s.components, s.points, s.inr, mirrored)
    total += hypernet_forward(s.batch, s.components, s.hypernet) + hypernet_backward(s.batch, s.components, s.hypernet)
    for c in (0, channels):
        total += gating_forward(s.batch, s.points, encoded, c, s.latent, s.gating)
        total += gating_backward(s.batch, s.points, encoded, c, s.latent, s.gating)
    first = True
    for conv in s.convs:
        total += point_conv_forward(s.batch, conv, s.weight_net[-1])
        total += point_conv_backward(s.batch, conv, s.weight_net[-1], features=not first)
        first = False
        if conv.out is not None:
            total += weight_net_forward(conv.points, s.weight_net) + weight_net_backward(conv.points, s.weight_net)
    last = s.convs[-1]
    head = (last.centroids * (last.out or last.channels), 2 * s.latent)
    total += linear_forward(s.batch, head) + linear_backward(s.batch, head)
    return total + flow_expected(s.samples, s.batch, s.latent, s.flow_layers)


def reconstruct(sizes: Sizes, out: int, mirrored: bool = False) -> Count:
    """Encode N points of every function and decode at `out` points; the neighbour search is not counted."""
    s, encoded, channels = sizes, sizes.inr[0], sizes.inr[-1]
    total = inr_forward(s.batch, s.components, out, s.inr, mirrored) + hypernet_forward(
        s.batch, s.components, s.hypernet
    )
    total += gating_forward(s.batch, out, encoded, 0, s.latent, s.gating)
    total += gating_forward(s.batch, s.points, encoded, channels, s.latent, s.gating)
    for conv in s.convs:
        total += point_conv_forward(s.batch, conv, s.weight_net[-1])
        if conv.out is not None:
            total += weight_net_forward(conv.points, s.weight_net)
    last = s.convs[-1]
    return total + linear_forward(s.batch, (last.centroids * (last.out or last.channels), 2 * s.latent))
