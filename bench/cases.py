"""The five presets at full size, and the four ways to compute them that are compared.

ours:     `vamoh.VaMoH` with whatever backend it chooses.
oracle:   the same object with VAMOH_BACKEND=reference: every op in plain torch.
compile:  `torch.compile` of `bench.plain`, the same mathematics without op boundaries.
baseline: `bench.baseline`, eager torch in the style of the published code.

All four compute the published objective (kl="cross_entropy", tanh-bounded gating, constant scale 0.1).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench import counts
from bench.baseline import Baseline
from bench.plain import loss as plain_loss
from bench.plain import reconstruct as plain_reconstruct
from bench.timing import time_limit
from vamoh import PointSet, VaMoH, grid_coords, sphere_grid
from vamoh.checkpoint import new_model
from vamoh.config import PRESETS, Config
from vamoh.geometry import Neighborhoods
from vamoh.layout import packed_size
from vamoh.model import Noise
from vamoh.ops import CounterNoise
from vamoh.ops._noise import counter_noise_reference
from vamoh.points import grid_shape, sphere_grid_shape

BATCH = {"polymnist": 64, "shapes3d": 16, "era5": 16, "shapenet": 8, "celebahq": 8}
CHANNELS = {"polymnist": 3, "shapes3d": 3, "era5": 1, "shapenet": 1, "celebahq": 3}
SHAPE = {
    "polymnist": (28, 28),
    "shapes3d": (64, 64),
    "era5": (46, 90),
    "shapenet": (32, 32, 32),
    "celebahq": (64, 64),
}
NAMES = tuple(BATCH)
LOSS_TOLERANCE = 1e-4
"""Relative, float32."""
GRADIENT_TOLERANCE = 1e-2
"""Of the whole gradient's norm, float32: a LeakyReLU unit within rounding of its kink may switch sides."""


class Disagreement(AssertionError):
    """Two contestants compute different things."""


def config(name: str, **sizes: object) -> Config:
    """The preset with the published objective; `sizes` replace fields of its model."""
    preset = PRESETS[name]
    published = {"kl": "cross_entropy", "kl_samples": 4096, "gating_bound": "tanh"}
    constant = {"learn_scale": False, "max_scale": 0.1}
    return replace(preset, model=replace(preset.model, **{**published, **constant, **sizes}))


def coordinates(name: str, scale: int = 1) -> Tensor:
    """Coordinates [P, D] of the preset's grid, `scale` times as fine."""
    return (sphere_grid if name == "era5" else grid_coords)(SHAPE[name], scale=scale)


def positions(name: str, scale: int) -> Tensor:
    """Where the points of the grid stand [P] in the one `scale` times as fine."""
    shape = (sphere_grid_shape if name == "era5" else grid_shape)(SHAPE[name], scale)
    index = torch.arange(torch.Size(shape).numel()).view(shape)
    return index[(slice(None, None, scale),) * len(shape)].flatten()


def sizes(settings: Config, channels: int, points: int, batch: int) -> counts.Sizes:
    """Sizes of a training step of this configuration."""
    m = settings.model
    encoded = 2 * m.frequencies
    inr = (encoded, *m.inr_widths, channels)
    convs, count, width = [], points, channels
    pools = [*zip(m.pool_centroids, m.pool_neighbors, strict=True)]
    for i, (centroids, neighbors, out) in enumerate(
        zip(m.encoder_centroids, m.encoder_neighbors, m.encoder_channels, strict=True)
    ):
        convs.append(counts.Conv(count, min(centroids, count), neighbors, width, out))
        count, width = min(centroids, count), out
        if i < len(pools):
            convs.append(counts.Conv(count, min(pools[i][0], count), pools[i][1], width, None))
            count = min(pools[i][0], count)
    return counts.Sizes(
        batch=batch,
        points=points,
        components=m.components,
        latent=m.latent_dim,
        samples=m.kl_samples,
        flow_layers=m.flow_layers,
        inr=inr,
        hypernet=(m.latent_dim, *m.hypernet_widths, packed_size(inr)),
        gating=(*m.gating_widths, m.components),
        weight_net=(encoded, *m.weight_net),
        convs=tuple(convs),
    )


def symmetric(coords: Tensor) -> bool:
    """Whether -x is among the coordinates for every x of them."""
    here, there = ({tuple(x) for x in (sign * coords).round(decimals=4).add(0.0).tolist()} for sign in (1, -1))
    return here == there


@contextmanager
def reference_backend() -> Iterator[None]:
    """Every op in plain torch."""
    before = os.environ.get("VAMOH_BACKEND")
    os.environ["VAMOH_BACKEND"] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["VAMOH_BACKEND"]
        else:
            os.environ["VAMOH_BACKEND"] = before


class Draw(NamedTuple):
    """What a step draws: the observed points (None: all) and the noise of the bound."""

    index: Tensor | None
    noise: Noise

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The noise z [B, Z] and kl [S, B, Z], whether it is kept as tensors or as a seed."""
        z, kl = self.noise.z, self.noise.kl
        if isinstance(kl, CounterNoise):
            kl = counter_noise_reference(kl.seed, range(kl.samples), *z.shape, z.dtype)
        return z, kl


class Case:
    """A model of a preset with synthetic data of its shape: random 8-bit values, or voxels of 0 and 1."""

    def __init__(
        self,
        name: str,
        *,
        batch: int | None = None,
        points: int | None = None,
        shape: tuple[int, ...] | None = None,
        device: torch.device | str = "cpu",
        **sizes: object,
    ) -> None:
        """batch: default the preset's of BATCH. points: use only that many of the grid's, drawn once.

        shape: of another grid than the preset's.
        """
        self.name, self.batch, self.config, self.device = name, batch or BATCH[name], config(name, **sizes), device
        model = new_model(self.config, len(SHAPE[name]) + (name == "era5"), CHANNELS[name])
        self.model: VaMoH = model.to(device)
        generator = torch.Generator().manual_seed(0)
        levels = 1 if name == "shapenet" else 255
        sized = (self.batch, CHANNELS[name], *(shape or SHAPE[name]))
        values = torch.randint(0, levels + 1, sized, generator=generator) / levels
        drawn_from = PointSet.from_grid(values, coordinates(name) if shape is None else grid_coords(shape))
        # Clouds that are drawn anew in every step; a fixed cloud has its neighbours cached by every contestant.
        self.drawn = self.config.train.num_points
        if points is not None:
            self.drawn, drawn_from = None, drawn_from.subsample(points, generator)
        self.host, self.points = drawn_from, self.model.prepare(drawn_from)
        self._baseline: Baseline | None = None
        self._compiled: Callable[..., Tensor] | None = None
        self._compiled_for: set[int] = set()
        self._checked: dict[tuple[str, int], Checked] = {}

    @property
    def sizes(self) -> counts.Sizes:
        """Sizes of a training step."""
        settings = replace(self.config, model=replace(self.config.model, kl_samples=self.model.kl_samples))
        return sizes(settings, self.points.channels, self.drawn or self.points.count, self.batch)

    @property
    def mirrored(self) -> bool:
        """Whether -x is a point for every point x: true of the whole grids, not of points drawn from them."""
        return self.drawn is None and symmetric(self.points.coords)

    @property
    def baseline(self) -> Baseline:
        """The baseline with the model's weights, made on first use."""
        if self._baseline is None:
            self._baseline = Baseline(self.model, cache_neighbors=self.drawn is None)
        return self._baseline

    def draw(self) -> Draw:
        """Observed points and noise for every contestant."""
        index = None if self.drawn is None else self._draw_points().to(self.device)
        return Draw(index, self.model.draw_noise(self.batch))

    def observed(self, draw: Draw) -> PointSet:
        """The points that the encoder sees."""
        return self.points if draw.index is None else self.points.select(draw.index)

    def _draw_points(self) -> Tensor:
        return torch.randperm(self.points.count)[: self.drawn].sort().values

    def ours(self, draw: Draw | None = None, hoods: Neighborhoods | None = None) -> Tensor:
        """Loss by the public API; without `draw` a training step's own draws and neighbour search."""
        if draw is not None:
            return self.model.elbo(self.observed(draw), noise=draw.noise, neighborhoods=hoods).loss
        points = self.points
        if self.drawn is not None:
            points = self.model.prepare(self.host.subsample(self.drawn), again=False)
        return self.model.elbo(points, noise=self.model.draw_noise(self.batch)).loss

    def theirs(self, draw: Draw | None = None, hoods: Neighborhoods | None = None) -> Tensor:
        """Loss by the baseline; the mask picks from the whole grid, decoded or not."""
        z, kl = self._noise() if draw is None else draw.tensors()
        mask = torch.ones(self.points.count, dtype=torch.bool, device=self.device)
        if self.drawn is not None:
            mask = torch.zeros_like(mask)
            mask[self._draw_points().to(self.device) if draw is None else draw.index] = True
        return self.baseline.loss(self.points.coords, self.points.values, mask, z, kl, hoods)

    def plain(self, draw: Draw | None = None, hoods: Neighborhoods | None = None) -> Tensor:
        """Loss by `bench.plain`, compiled if `compile` was called; new clouds are searched as the baseline does."""
        z, kl = self._noise() if draw is None else draw.tensors()
        points = self.points
        if self.drawn is not None:
            points = points.select(self._draw_points().to(self.device) if draw is None else draw.index)
        if hoods is None and self.drawn is None:
            hoods = self.model.neighborhoods(points)
        elif hoods is None:
            with torch.no_grad():
                hoods = self.baseline.search(self.model.encoding(points.coords)[None])
        run = self._compiled or plain_loss
        return run(self.model, points.coords, points.values, tuple(map(tuple, hoods)), z, kl)

    def compile(self, seconds: float, mode: str | None = None) -> None:
        """Compile `plain` and its backward for the present sizes. Raises TooSlow, or what torch.compile raises."""
        if self.model.kl_samples in self._compiled_for:
            return
        if self._compiled is None:
            torch._dynamo.reset()
            self._compiled = torch.compile(plain_loss, dynamic=False, fullgraph=True, mode=mode)
        try:
            with time_limit(seconds):
                self.plain().backward()
        except BaseException:
            self._compiled = None
            self._compiled_for.clear()
            raise
        finally:
            clear_gradients(self.model)
        self._compiled_for.add(self.model.kl_samples)

    def check(self, name: str) -> Checked:
        """`check_step`, once per contestant and number of samples: the weights stay."""
        key = (name, self.model.kl_samples)
        if key not in self._checked:
            self._checked[key] = check_step(self, name)
        return self._checked[key]

    def _noise(self) -> tuple[Tensor, Tensor]:
        latent = self.model.latent_dim
        shape = (self.model.kl_samples, self.batch, latent)
        return torch.randn(shape[1:], device=self.device), torch.randn(shape, device=self.device)


class TrainStep:
    """One step of a contestant: draws, forward, backward; with `optimizer` also clipping and Adam."""

    def __init__(self, loss: Callable[[], Tensor], module: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self.loss, self.module, self.optimizer = loss, module, optimizer
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    def __call__(self) -> None:
        """Do the step."""
        for p in self.parameters:
            p.grad = None
        self.loss().backward()
        if self.optimizer is not None:
            nn.utils.clip_grad_norm_(self.parameters, 200)
            self.optimizer.step()


def train_step(case: Case, name: str, optimizer: torch.optim.Optimizer | None = None) -> Callable[[], None]:
    """Training step of a contestant; forward and backward alone without `optimizer`."""
    if name == "baseline":
        return TrainStep(case.theirs, case.baseline, optimizer)
    if name == "oracle":
        return reference_backend()(TrainStep(case.ours, case.model, optimizer).__call__)
    return TrainStep(case.ours if name == "ours" else case.plain, case.model, optimizer)


def adam(case: Case, name: str) -> torch.optim.Optimizer:
    """Adam as `vamoh.train` has it, or as the published code has it.

    Its rate is 0: the work is the same, and all contestants keep the same weights.
    """
    if name == "baseline":
        return torch.optim.Adam(case.baseline.parameters(), lr=0.0)
    return torch.optim.Adam([p for p in case.model.parameters() if p.requires_grad], lr=0.0, fused=True)


class Reconstruct:
    """Encode `batch` functions of a case, decode them on the grid `scale` times as fine.

    Every call gets a new cloud, the grid shrunk a little more, so that no cache of neighbours or features can serve.
    """

    def __init__(self, case: Case, batch: int, scale: int) -> None:
        self.case, self.values = case, case.points.values[:batch]
        self.coords, self.out = case.points.coords, coordinates(case.name, scale).to(case.device)
        self.at = positions(case.name, scale).to(case.device)
        self.sizes = sizes(case.config, case.points.channels, case.points.count, batch)
        self.mirrored = symmetric(self.out)
        self._calls = 0

    def _cloud(self) -> tuple[Tensor, Tensor]:
        self._calls += 1
        shrink = 1 - 1e-4 * self._calls
        return self.coords * shrink, self.out * shrink

    def ours(self, hoods: Neighborhoods | None = None) -> Tensor:
        """Mean by the public API."""
        coords, out = self._cloud() if hoods is None else (self.coords, self.out)
        points = PointSet(coords, self.values)
        return self.case.model.reconstruct(points, out, posterior_at=self.at, neighborhoods=hoods).mean

    def theirs(self, hoods: Neighborhoods | None = None) -> Tensor:
        """Mean by the baseline."""
        coords, out = self._cloud() if hoods is None else (self.coords, self.out)
        return self.case.baseline.reconstruct(coords, self.values, out, self.at, hoods)[0]

    def plain(self, hoods: Neighborhoods | None = None) -> Tensor:
        """Mean by `bench.plain`, compiled if `compile` was called, with the baseline's neighbour search."""
        coords, out = self._cloud() if hoods is None else (self.coords, self.out)
        model = self.case.model
        if hoods is None:
            with torch.no_grad():
                hoods = self.case.baseline.search(model.encoding(coords)[None])
        return self._plain(model, coords, self.values, out, self.at, tuple(map(tuple, hoods)))

    _plain = staticmethod(plain_reconstruct)

    def compile(self, seconds: float) -> None:
        """Compile `plain`. Raises TooSlow, or what torch.compile raises."""
        torch._dynamo.reset()
        self._plain = torch.compile(plain_reconstruct, dynamic=False, fullgraph=True)
        with time_limit(seconds):
            self.plain()

    def run(self, name: str) -> Callable[[], Tensor]:
        """A contestant."""
        if name == "oracle":
            return reference_backend()(self.ours)
        return {"ours": self.ours, "compile": self.plain, "baseline": self.theirs}[name]

    def check(self, name: str) -> float:
        """Relative error of a contestant's mean against ours, with the same neighbours; Disagreement if too large."""
        hoods = self.case.model.neighborhoods(PointSet(self.coords, self.values))
        expected = self.ours(hoods)
        error = ((self.run(name)(hoods) - expected).norm() / expected.norm()).item()
        if not error < LOSS_TOLERANCE:
            raise Disagreement(f"{self.case.name}: {name} does not agree with ours: {error}")
        return error


@dataclass
class Checked:
    """How far a contestant is from ours: relative error of the loss, and of the gradient's norm."""

    loss: float
    gradient: float


def clear_gradients(module: nn.Module) -> None:
    """Free the gradients."""
    for p in module.parameters():
        p.grad = None


def check_step(case: Case, name: str) -> Checked:
    """Loss and gradient of a contestant against ours, with the same draws and neighbours.

    Raises Disagreement beyond LOSS_TOLERANCE and GRADIENT_TOLERANCE.
    """
    draw = case.draw()
    hoods = case.model.neighborhoods(case.observed(draw))
    clear_gradients(case.model)
    clear_gradients(case.baseline)
    expected = case.ours(draw, hoods)
    expected.backward()
    grads = {n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}
    clear_gradients(case.model)
    if name == "baseline":
        loss = case.theirs(draw, hoods)
        loss.backward()
        found = case.baseline.gradients()
    else:
        with reference_backend() if name == "oracle" else nullcontext():
            loss = (case.ours if name == "oracle" else case.plain)(draw, hoods)
            loss.backward()
        found = {n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}
    if set(found) != set(grads):
        raise Disagreement(f"{case.name}: {name} has gradients for other parameters: {set(found) ^ set(grads)}")
    error = sum((found[n] - g).double().square().sum() for n, g in grads.items())
    norm = sum(g.double().square().sum() for g in grads.values())
    clear_gradients(case.model)
    clear_gradients(case.baseline)
    difference = (loss - expected).detach().abs() / expected.detach().abs()
    checked = Checked(difference.item(), (error / norm).sqrt().item())
    if not (checked.loss < LOSS_TOLERANCE and checked.gradient < GRADIENT_TOLERANCE):
        raise Disagreement(f"{case.name}: {name} does not agree with ours: {checked}")
    return checked
