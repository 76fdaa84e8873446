"""PointConv encoder: a cloud of (coordinate, feature) pairs to the posterior over z (Sec. 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vamoh._cache import ContentCache
from vamoh._checks import check_type, values_readable
from vamoh._initial import linear_layer
from vamoh.geometry import Neighborhood, Sites, Stage
from vamoh.ops._autocast import float32_under_autocast
from vamoh.ops.farthest_point_sample import farthest_point_sample
from vamoh.ops.knn import knn
from vamoh.ops.linear import linear
from vamoh.ops.point_conv import gather, neighbor_difference, neighbor_mean, point_conv

SLOPE = 0.2
"""LeakyReLU slope between the encoder's layers (the published code's)."""

INITIAL_LOG_VARIANCE = -3.0
"""Of q(z), so that z carries the data from the first step."""


class PointConvLayer(nn.Module):
    """A weight net on neighbour offsets, contraction with their features, a linear layer."""

    def __init__(
        self,
        encoded_dim: int,
        in_channels: int,
        out_channels: int,
        weight_net: Sequence[int],
        slope: float | None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        widths = [encoded_dim, *weight_net]
        self.weight_net = nn.ModuleList(linear_layer(a, b, generator) for a, b in pairwise(widths))
        self.linear = linear_layer(in_channels * widths[-1], out_channels, generator)
        self.slope = slope
        self._composed: ContentCache[tuple[Tensor, Tensor]] = ContentCache(1)

    @torch.no_grad()
    def keep_scale(self, neighbors: int, generator: torch.Generator | None) -> None:
        """Initialise so that features leave at about the scale they came with, whatever the sizes."""
        layers = self._weight_layers()
        for layer in layers:
            nn.init.normal_(layer.weight, 0, 1 / math.sqrt(layer.in_features), generator)
        nn.init.normal_(layers[-1].bias, generator=generator)
        # Neighbours share the bias and the centroid's part of the offset, so their weights add up.
        layers[-1].weight.div_(neighbors)
        layers[-1].bias.div_(neighbors)
        nn.init.normal_(self.linear.weight, 0, math.sqrt(2 / (1 + SLOPE**2) / self.linear.in_features), generator)

    def forward(
        self,
        features: Tensor,
        encoded: Tensor,
        centroids: Tensor,
        neighbors: Tensor,
        points: Tensor | None = None,
        anchors: Tensor | None = None,
    ) -> Tensor:
        """Features [B, N, C] at encoded coordinates [B|1, N, E] to activated [B, M, O] at the centroids.

        points [B|1, N]: which of the encoded coordinates the features lie at; None: all in order.
        anchors [1, A, E]: encoded coordinates without features, which `centroids` index behind the N points.
        """
        table, bias = self._first_layer(encoded)
        if anchors is not None:
            table = torch.cat([table, self._first_layer(anchors)[0].expand(table.shape[0], -1, -1)], 1)
        at = (neighbors, centroids) if points is None else (_select(points, neighbors), _select(points, centroids))
        w = neighbor_difference(table, *at, bias)  # [B|1, M, S, Q]
        if self.slope is not None:
            for layer in self._weight_layers()[1:]:
                w = layer(F.leaky_relu(w, self.slope))
        return point_conv(features, neighbors, w, self.linear.weight, self.linear.bias, SLOPE)

    @float32_under_autocast  # differences are taken of it
    def _first_layer(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """The weight net's first layer at every point [B|1, N, Q] of encoded coordinates, without its bias, and that.

        It is linear in the offset, so it is applied to points instead of pairs.
        """
        weight, bias = self._affine_layers()
        # The tall matrix of points goes where `linear` expects a weight matrix: it is read once, in place.
        table = linear(weight[None], encoded.flatten(0, 1)[None], None)[0].mT.unflatten(0, encoded.shape[:2])
        return table, bias

    def _affine_layers(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the weight net's layers up to the first activation; remembered without gradients."""
        layers = self._weight_layers()[: None if self.slope is None else 1]
        if len(layers) == 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _composed(layers)
        key = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
        return self._composed.get(key, lambda: _composed(layers))

    def _weight_layers(self) -> list[nn.Linear]:
        return [layer for layer in self.weight_net if isinstance(layer, nn.Linear)]


def _composed(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Weight and bias of linear layers one after another: with nothing between them they are one."""
    weight: Tensor = layers[0].weight
    bias: Tensor = layers[0].bias
    for layer in layers[1:]:
        weight, bias = layer.weight @ weight, F.linear(bias, layer.weight, layer.bias)
    return weight, bias


class FixedCentroids(nn.Module):
    """Centroids that do not depend on the points given, and the neighbours among them; NaN until `set`.

    centroids [M, D] of the first stage; every later stage has the first of those of the stage before. sites [M, S, D]:
    where the first stage looks: its neighbours are the observed points nearest to the sites of a centroid.
    neighbors_i int64 [M, S]: of stage i among the centroids of the stage before.
    """

    def __init__(self, stages: Sequence[Stage], coord_dim: int) -> None:
        super().__init__()
        first = stages[0]
        self.centroids: Tensor
        self.sites: Tensor
        self.site_coords: Tensor  # [R, D], the sites without repetition
        self.site_index: Tensor  # [M, S], where each of them is there
        self.register_buffer("centroids", torch.full((first.centroids, coord_dim), math.nan))
        self.register_buffer("sites", torch.full((first.centroids, first.neighbors, coord_dim), math.nan))
        for i, stage in enumerate(stages[1:], 1):
            self.register_buffer(f"neighbors_{i}", torch.zeros(stage.centroids, stage.neighbors, dtype=torch.int64))
        self.register_buffer("site_coords", self.sites.new_empty(0, coord_dim), persistent=False)
        self.register_buffer("site_index", self.sites.new_empty(0, 0, dtype=torch.int64), persistent=False)

    @property
    def is_set(self) -> bool:
        """Whether the centroids were chosen."""
        return len(self.site_coords) > 0

    @torch.no_grad()
    def set(self, coords: Tensor, metric: Tensor, table: Tensor | None, stages: Sequence[Stage]) -> None:
        """Choose them among coords [N, D], by distances in metric [N, E] and table as ops on point clouds take them.

        Farthest-point samples: the first M of them are the sample of M points. Fewer points than that come repeatedly.
        """
        first = stages[0]
        repeats = -(-max(first.centroids, first.neighbors) // len(coords))
        coords, metric = coords.repeat(repeats, 1), metric.repeat(repeats, 1)
        chosen = farthest_point_sample(metric, first.centroids, table=table)  # [M]
        self.centroids.copy_(coords[chosen])
        self.sites.copy_(coords[knn(metric, metric[chosen], first.neighbors, table=table)])
        for i, (before, stage) in enumerate(pairwise(stages), 1):
            points, queries = metric[chosen[: before.centroids]], metric[chosen[: stage.centroids]]
            self.get_buffer(f"neighbors_{i}").copy_(knn(points, queries, stage.neighbors, table=table))
        self._find_distinct()

    def where(self) -> Sites:
        """What a search needs of them."""
        later = [value for name, value in self.named_buffers() if name.startswith("neighbors_")]
        order = torch.arange(len(self.centroids), device=self.sites.device)[None]
        return Sites(
            self.site_coords,
            self.site_index,
            tuple(Neighborhood(order[:, : len(neighbors)], neighbors[None]) for neighbors in later),
        )

    def _find_distinct(self) -> None:
        self.site_coords, index = self.sites.flatten(0, 1).unique(dim=0, return_inverse=True)
        self.site_index = index.view(self.sites.shape[:2])

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.centroids.isnan().any():
            self.site_coords = self.site_coords[:0]
        else:
            self._find_distinct()


class Encoder(nn.Module):
    """Stack of PointConv, LeakyReLU and average pooling, then one linear head to [mean, log-variance].

    The centroids of every stage are farthest-point samples of the points before, the neighbours the nearest of them,
    both Euclidean in the coordinates given as metric; or they are fixed, see `FixedCentroids`.
    """

    def __init__(
        self,
        encoded_dim: int,
        channels: int,
        latent_dim: int,
        stages: Sequence[Stage],
        weight_net: Sequence[int],
        weight_net_slope: float | None,
        published: bool,
        generator: torch.Generator | None = None,
        density: bool = False,
        fixed_in: int | None = None,
    ) -> None:
        """`published`: default linear initialisation. Otherwise features keep their scale and q(z) starts narrow.

        density: see values y as 2y - 1 with a constant 1 beside them. fixed_in: coordinate dimensions D of fixed
        centroids; None: they are points of the cloud.
        """
        super().__init__()
        self.stages = tuple(stages)
        self.fixed = None if fixed_in is None else FixedCentroids(stages, fixed_in)
        self.density = density
        channels += density
        self.convs = nn.ModuleList()
        for stage in self.stages:
            if stage.channels is not None:
                self.convs.append(
                    PointConvLayer(encoded_dim, channels, stage.channels, weight_net, weight_net_slope, generator)
                )
                channels = stage.channels
        self.head = linear_layer(self.stages[-1].centroids * channels, 2 * latent_dim, generator)
        if not published:
            convs = (stage for stage in self.stages if stage.channels is not None)
            for conv, stage in zip(self._conv_layers(), convs, strict=True):
                conv.keep_scale(stage.neighbors, generator)
            with torch.no_grad():
                self.head.weight[:latent_dim].normal_(0, 1 / math.sqrt(self.head.in_features), generator=generator)
                self.head.weight[latent_dim:].zero_()
                self.head.bias[latent_dim:].fill_(INITIAL_LOG_VARIANCE)

    def _conv_layers(self) -> list[PointConvLayer]:
        return [conv for conv in self.convs if isinstance(conv, PointConvLayer)]

    def stage_outputs(
        self,
        values: Tensor,
        encoded: Tensor,
        neighborhoods: Sequence[Neighborhood],
        anchors: Tensor | None = None,
    ) -> list[Tensor]:
        """Features [B, M, C] after every stage, from values [B, N, C] at encoded coordinates [B|1, N, E].

        anchors [1, M, E]: encoded coordinates of fixed centroids.
        """
        if self.density:
            values = torch.cat([2 * values - 1, torch.ones_like(values[..., :1])], -1)
        convs = iter(self._conv_layers())
        outputs = [values]
        points: Tensor | None = None  # which of `encoded` the last outputs lie at
        for stage, (centroids, neighbors) in zip(self.stages, neighborhoods, strict=True):
            chosen = centroids.clamp(min=0)
            if stage.channels is None:
                outputs.append(neighbor_mean(outputs[-1], neighbors))
            else:
                outputs.append(next(convs)(outputs[-1], encoded, chosen, neighbors, points, anchors))
            if anchors is not None:
                encoded, points, anchors = anchors, None, None
                continue
            points = chosen if points is None else _select(points, chosen)
            if torch.compiler.is_compiling() or points.shape[1] < encoded.shape[1]:
                encoded, points = gather(encoded, points), None
        return outputs[1:]

    def forward(
        self,
        values: Tensor,
        encoded: Tensor,
        neighborhoods: Sequence[Neighborhood],
        anchors: Tensor | None = None,
    ) -> Tensor:
        """Head output [B, 2Z]: mean and log-variance of q(z); arguments as in `stage_outputs`."""
        features = self.stage_outputs(values, encoded, neighborhoods, anchors)[-1].flatten(1)
        return linear(features[None], self.head.weight[None], self.head.bias[None])[0]


def _select(values: Tensor, index: Tensor) -> Tensor:
    """Entries `index` [B|1, ...] of values [B|1, N]."""
    return gather(values[..., None], index)[..., 0]


def check_neighborhoods(
    neighborhoods: Sequence[Neighborhood], stages: Sequence[Stage], batch: int, count: int, anchors: int = 0
) -> None:
    """Raise ValueError unless `neighborhoods` fit the stages and a batch of functions of `count` points.

    anchors: number of fixed centroids, which come behind the points.
    """
    where = "encoder"
    check_type(where, "neighborhoods", neighborhoods, list, tuple)
    if len(neighborhoods) != len(stages):
        raise ValueError(
            f"{where}: neighborhoods must have one entry per stage, {len(stages)}, got {len(neighborhoods)}"
        )
    for i, (stage, hood) in enumerate(zip(stages, neighborhoods, strict=True)):
        check_type(where, f"neighborhoods[{i}]", hood, list, tuple)
        if len(hood) != 2:
            raise ValueError(f"{where}: neighborhoods[{i}] must be centroids and neighbors, got {len(hood)} entries")
        for tensor in hood:
            check_type(where, f"each of neighborhoods[{i}]", tensor, Tensor)
        centroids, neighbors = hood
        for name, index, dim in (("centroids", centroids, 2), ("neighbors", neighbors, 3)):
            if index.dim() != dim or index.shape[0] not in (1, batch) or index.dtype != torch.int64:
                raise ValueError(
                    f"{where}: {name} of neighborhoods[{i}] must be int64 with {dim} dimensions and batch 1 or "
                    f"{batch}, got {index.dtype} {list(index.shape)}"
                )
            if not (index.numel() and values_readable(index)):
                continue
            low, high = int(index.min()), int(index.max())
            known = count + (anchors if i == 0 and name == "centroids" else 0)
            if high >= known or low < (-1 if name == "centroids" else 0):
                raise ValueError(
                    f"{where}: {name} of neighborhoods[{i}] must index the {known} points before, "
                    f"got {high if high >= known else low}"
                )
        wanted = [centroids.shape[0], centroids.shape[1], stage.neighbors]
        if list(neighbors.shape) != wanted:
            raise ValueError(
                f"{where}: neighbors of neighborhoods[{i}] must have shape {wanted}, got {list(neighbors.shape)}"
            )
        count = centroids.shape[1]
    if count != stages[-1].centroids:
        raise ValueError(f"{where}: the last neighborhood must have {stages[-1].centroids} centroids, got {count}")
