"""The ops of `vamoh.ops` at the sizes that the presets give them, and the parts of the model that are none.

To add an op, write a function that yields `OpCase`s from the sizes of a preset, and list it in OPS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import counts
from bench.cases import BATCH, CHANNELS, NAMES, SHAPE, config, coordinates, sizes, symmetric
from bench.counts import Count, Sizes
from vamoh import ops
from vamoh._cache import ContentCache
from vamoh.config import ModelConfig
from vamoh.encoding import FourierFeatures
from vamoh.gating import Gating
from vamoh.geometry import find_mirror, measure
from vamoh.hypernet import Hypernet
from vamoh.latent import FlowPrior
from vamoh.layout import packed_size
from vamoh.ops.inr_mixture import Inr
from vamoh.ops.likelihood import Likelihood

NOTHING = Count(0, 0)
"""What a backward pass needs that only multiplies gradients, found in the forward pass, by a number."""


@dataclass(frozen=True)
class OpCase:
    """One op at one size.

    build: makes the inputs and returns the call, whose floating results are differentiated where `backward` is given.
    forward, backward: what they need. An op that finds its gradient in the forward pass has all of it in `forward`, and
    is timed forward + backward alone: without a gradient it may do less.
    """

    preset: str
    op: str
    build: Callable[[], tuple[Callable[[], Any], Sequence[Tensor]]]
    forward: Count
    backward: Count | None = None

    @property
    def label(self) -> str:
        """Its name in the list of tests."""
        return f"{self.preset}-{self.op}"


@dataclass(frozen=True)
class Preset:
    """What the makers of cases need to know."""

    name: str
    sizes: Sizes
    model: ModelConfig
    mirrored: bool

    @property
    def inr(self) -> Inr:
        """Architecture of the coordinate networks."""
        return Inr(self.sizes.inr, self.model.inr_activation, self.model.inr_slope, self.model.inr_omega)

    def coords(self) -> Tensor:
        """Observed points [N, D]."""
        coords = coordinates(self.name).to(torch.get_default_device())
        if len(coords) == self.sizes.points:
            return coords
        return coords[torch.randperm(len(coords), generator=_generator())[: self.sizes.points].sort().values]

    def features(self) -> Tensor:
        """Their Fourier features [N, E]."""
        return self.encoding()(self.coords())

    def encoding(self) -> FourierFeatures:
        """Fourier features of these coordinates."""
        dims = len(SHAPE[self.name]) + (self.name == "era5")
        return FourierFeatures(dims, self.sizes.inr[0] // 2, self.model.frequency_scale, False)

    def encoded(self) -> tuple[Tensor, Tensor | None]:
        """Features [N, E] and the mirror, as the model finds them."""
        encoding, coords = self.encoding(), self.coords()
        return encoding(coords), find_mirror(coords, encoding, ContentCache())

    def metric(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Cells of the first points and the table of their distances, None where they lie on no lattice."""
        return measure(self.coords()[:count], self.encoding(), True, ContentCache(), count * count)

    def values(self) -> Tensor:
        """Values [B, N, C] in [0, 1]."""
        return torch.rand(self.sizes.batch, self.sizes.points, CHANNELS[self.name], generator=_generator())

    def theta(self) -> Tensor:
        """Parameters [B, K, P] of about the scale of trained ones."""
        s = self.sizes
        theta = torch.randn(s.batch, s.components, packed_size(s.inr), generator=_generator())
        return theta.mul_(0.1).requires_grad_()


def presets() -> Iterator[Preset]:
    """The five, from their configurations alone."""
    for name in NAMES:
        settings = config(name)
        points = settings.train.num_points or torch.Size(SHAPE[name]).numel()
        of = sizes(settings, CHANNELS[name], points, BATCH[name])
        yield Preset(name, of, settings.model, settings.train.num_points is None and symmetric(coordinates(name)))


def _fourier_features(p: Preset) -> Iterator[OpCase]:
    frequencies = p.encoding().frequencies

    def build() -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
        coords = p.coords()
        return lambda: ops.fourier_features(coords, frequencies), ()

    count = counts.fourier_features(p.sizes.points, frequencies.shape[1], len(frequencies))
    yield OpCase(p.name, "fourier_features", build, count)


def _farthest_point_sample(p: Preset) -> Iterator[OpCase]:
    stage = max((c for c in p.sizes.convs if c.centroids < c.points), key=lambda c: c.centroids * c.points)
    encoded = p.sizes.inr[0]

    def build() -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
        features = p.features()[: stage.points].contiguous()
        return lambda: ops.farthest_point_sample(features, stage.centroids), ()

    count = counts.farthest_point_sample(1, stage.points, encoded, stage.centroids)
    yield OpCase(p.name, "farthest_point_sample", build, count)
    cells, table = p.metric(stage.points)
    if table is None:
        return
    count = counts.farthest_point_sample_by_table(1, stage.points, len(table), stage.centroids)

    def by_table() -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
        cells, table = p.metric(stage.points)
        return lambda: ops.farthest_point_sample(cells, stage.centroids, table=table), ()

    yield OpCase(p.name, "farthest_point_sample_by_table", by_table, count)


def _knn(p: Preset) -> Iterator[OpCase]:
    stage = max(p.sizes.convs, key=lambda c: c.centroids * c.points)

    def build() -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
        features = p.features()[: stage.points].contiguous()
        queries = features[: stage.centroids].contiguous()
        return lambda: ops.knn(features, queries, stage.neighbors), ()

    yield OpCase(p.name, "knn", build, counts.knn(1, stage.points, stage.centroids, p.sizes.inr[0], stage.neighbors))
    cells, table = p.metric(stage.points)
    if table is None:
        return

    def by_table() -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
        cells, table = p.metric(stage.points)
        queries = cells[: stage.centroids].contiguous()
        return lambda: ops.knn(cells, queries, stage.neighbors, table=table), ()

    count = counts.knn_by_table(1, stage.points, stage.centroids, len(table), stage.neighbors)
    yield OpCase(p.name, "knn_by_table", by_table, count)


def _point_conv(p: Preset) -> Iterator[OpCase]:
    batch, width = p.sizes.batch, p.sizes.weight_net[-1]
    for i, stage in enumerate(s for s in p.sizes.convs if s.out is not None):

        def build(stage: counts.Conv = stage, first: bool = i == 0) -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
            g = _generator()
            features = torch.randn(batch, stage.points, stage.channels, generator=g).requires_grad_(not first)
            neighbors = _neighbors(stage)[1]
            weights = torch.randn(1, stage.centroids, stage.neighbors, width, generator=g).requires_grad_()
            linear = torch.randn(stage.out, stage.channels * width, generator=g).requires_grad_()
            bias = torch.zeros(stage.out).requires_grad_()
            leaves = [x for x in (features, weights, linear, bias) if x.requires_grad]
            return lambda: ops.point_conv(features, neighbors, weights, linear, bias, 0.2), leaves

        forward = counts.point_conv_forward(batch, stage, width)
        backward = counts.point_conv_backward(batch, stage, width, features=i > 0)
        yield OpCase(p.name, f"point_conv{i}", build, forward, backward)


def _neighbor_difference(p: Preset) -> Iterator[OpCase]:
    stage = max((s for s in p.sizes.convs if s.out is not None), key=lambda s: s.centroids * s.neighbors)
    width = p.sizes.weight_net[-1]

    def build() -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
        table = torch.randn(1, stage.points, width, generator=_generator()).requires_grad_()
        bias = torch.zeros(width).requires_grad_()
        centroids, neighbors = _neighbors(stage)
        return lambda: ops.neighbor_difference(table, neighbors, centroids, bias), [table, bias]

    count = counts.neighbor_difference(stage, width)
    yield OpCase(p.name, "neighbor_difference", build, count, count)


def _neighbor_mean(p: Preset) -> Iterator[OpCase]:
    for i, stage in enumerate(s for s in p.sizes.convs if s.out is None):

        def build(stage: counts.Conv = stage) -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
            features = torch.randn(p.sizes.batch, stage.points, stage.channels, generator=_generator())
            neighbors = _neighbors(stage)[1]
            features.requires_grad_()
            return lambda: ops.neighbor_mean(features, neighbors), [features]

        count = counts.point_conv_forward(p.sizes.batch, stage, 0)
        yield OpCase(p.name, f"neighbor_mean{i}", build, count, count)


def _linear(p: Preset) -> Iterator[OpCase]:
    """The hypernetworks' last layer."""
    s, widths = p.sizes, p.sizes.hypernet[-2:]

    def build() -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
        g = _generator()
        x = torch.randn(s.components, s.batch, widths[0], generator=g).requires_grad_()
        weight = torch.randn(s.components, widths[1], widths[0], generator=g).requires_grad_()
        bias = torch.zeros(s.components, widths[1]).requires_grad_()
        return lambda: ops.linear(x, weight, bias), [x, weight, bias]

    of = (s.batch, s.components, widths)
    yield OpCase(p.name, "linear", build, counts.hypernet_forward(*of), counts.hypernet_backward(*of))


def _planar_flow(p: Preset) -> Iterator[OpCase]:
    latent, depth, samples = p.sizes.latent, p.sizes.flow_layers, p.sizes.samples * p.sizes.batch

    def flow() -> FlowPrior:
        return FlowPrior(latent, depth, identity=True)

    def log_prob() -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
        prior = flow()
        z = torch.randn(samples, latent, generator=_generator())
        return lambda: ops.planar_flow_log_prob(z, prior.flow), list(prior.parameters())

    def expected() -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
        prior, noise = flow(), ops.CounterNoise(torch.tensor(0), p.sizes.samples)
        mean, std = torch.zeros(p.sizes.batch, latent), torch.ones(p.sizes.batch, latent)
        return lambda: ops.planar_flow_expected_log_prob(mean, std, prior.flow, noise), list(prior.parameters())

    def sample() -> tuple[Callable[[], Any], Sequence[Tensor]]:
        parameters = flow().requires_grad_(False).flow
        noise = torch.randn(p.sizes.samples, latent, generator=_generator())
        return lambda: ops.planar_flow_sample(noise, parameters), ()

    yield OpCase(
        p.name,
        "planar_flow_log_prob",
        log_prob,
        counts.flow_forward(samples, latent, depth),
        counts.flow_backward(samples, latent, depth),
    )
    one_pass = counts.flow_expected(p.sizes.samples, p.sizes.batch, latent, depth)
    yield OpCase(p.name, "planar_flow_expected_log_prob", expected, one_pass, NOTHING)
    yield OpCase(p.name, "planar_flow_sample", sample, counts.flow_forward(p.sizes.samples, latent, depth))


def _inr_mixture(p: Preset) -> Iterator[OpCase]:
    s, kind = p.sizes, Likelihood(p.model.likelihood, p.model.bin_width / 2, p.model.epsilon, p.model.open_ends)

    def scale() -> Tensor:
        return torch.full((s.components, CHANNELS[p.name]), 0.1)

    def expected() -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
        theta, values, (features, mirror), width = p.theta(), p.values(), p.encoded(), scale()
        weights = torch.rand(s.batch, s.components, s.points, generator=_generator()).softmax(1).requires_grad_()

        def call() -> Tensor:
            run = ops.inr_mixture_expected_log_likelihood
            return run(theta, features, values, weights, width, p.inr, kind, mirror=mirror)[0]

        return call, [theta, weights]

    def log_likelihood() -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
        theta, values, (features, mirror), width = p.theta().detach(), p.values(), p.encoded(), scale()
        run = ops.inr_mixture_log_likelihood
        return lambda: run(theta, features, values, width, p.inr, kind, mirror=mirror), ()

    def logits() -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
        theta, (features, mirror) = p.theta().detach(), p.encoded()
        return lambda: ops.inr_mixture(theta, features, p.inr, mirror=mirror), ()

    def mean() -> tuple[Callable[[], Any], Sequence[Tensor]]:
        theta, (features, mirror) = p.theta().detach(), p.encoded()
        log_pi = torch.randn(s.batch, s.components, s.points, generator=_generator()).log_softmax(1)
        return lambda: ops.inr_mixture_mean(theta, features, log_pi, p.inr, kind, mirror=mirror), ()

    of = (s.batch, s.components, s.points, s.inr, p.mirrored)
    yield OpCase(p.name, "inr_mixture_expected_log_likelihood", expected, counts.inr_train(*of), NOTHING)
    yield OpCase(p.name, "inr_mixture_log_likelihood", log_likelihood, counts.inr_forward(*of))
    yield OpCase(p.name, "inr_mixture", logits, counts.inr_forward(*of))
    yield OpCase(p.name, "inr_mixture_mean", mean, counts.inr_mean(*of))


def _gating(p: Preset) -> Iterator[OpCase]:
    s, encoded = p.sizes, p.sizes.inr[0]
    for name, channels in (("prior", 0), ("posterior", CHANNELS[p.name])):

        def build(channels: int = channels) -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
            net = Gating(encoded, channels, s.latent, s.gating[:-1], s.components, True)
            features, values = p.features(), p.values() if channels else None
            z = torch.randn(s.batch, s.latent, generator=_generator()).requires_grad_()
            return lambda: net(features, z, values), [z, *net.parameters()]

        of = (s.batch, s.points, encoded, channels, s.latent, s.gating)
        yield OpCase(p.name, f"gating_{name}", build, counts.gating_forward(*of), counts.gating_backward(*of))

    def divergence() -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
        shape = (2, s.batch, s.components, s.points)
        both = torch.randn(shape, generator=_generator()).log_softmax(2).unbind()
        leaves = [x.contiguous().requires_grad_() for x in both]
        return lambda: torch.cat([part.flatten() for part in ops.categorical_kl(*leaves)]), leaves

    count = counts.categorical_kl(s.batch, s.components, s.points)
    yield OpCase(p.name, "categorical_kl", divergence, count, count)


def _hypernet(p: Preset) -> Iterator[OpCase]:
    s = p.sizes

    def build() -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
        net = Hypernet(s.latent, s.components, s.hypernet[1:-1], s.inr, published=False)
        z = torch.randn(s.batch, s.latent, generator=_generator()).requires_grad_()
        return lambda: net(z), [z, *net.parameters()]

    of = (s.batch, s.components, s.hypernet)
    yield OpCase(p.name, "hypernet", build, counts.hypernet_forward(*of), counts.hypernet_backward(*of))


OPS = (
    _fourier_features,
    _farthest_point_sample,
    _knn,
    _point_conv,
    _neighbor_difference,
    _neighbor_mean,
    _linear,
    _planar_flow,
    _inr_mixture,
    _gating,
    _hypernet,
)


def op_cases() -> Iterator[OpCase]:
    """Every case."""
    return (case for preset in presets() for op in OPS for case in op(preset))


def _neighbors(stage: counts.Conv) -> tuple[Tensor, Tensor]:
    """Centroids [1, M] and neighbours [1, M, S], close together as in a grid: windows of consecutive points."""
    first = torch.linspace(0, stage.points - stage.neighbors, stage.centroids).long()[None]
    return first + stage.neighbors // 2, first[..., None] + torch.arange(stage.neighbors)


def _generator() -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(0)
