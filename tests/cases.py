"""Arguments of the ops for the tests of all their backends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vamoh.layout import packed_size
from vamoh.ops._noise import counter_noise_reference
from vamoh.ops.planar_flow import PlanarFlow, normal_log_prob, planar_flow_inverse_reference


class GatingCase(NamedTuple):
    """Arguments of `gating`."""

    coords: Tensor
    shift: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    values: Tensor | None
    value_weight: Tensor | None

    def tensors(self) -> list[Tensor]:
        return [t for t in (*self[:2], *self.weights, *self.biases, *self[4:]) if t is not None]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> GatingCase:
        """A copy whose tensors are leaves."""

        def leaf(t: Tensor) -> Tensor:
            return t.detach().to(device, dtype, copy=True).requires_grad_()

        weights, biases = [leaf(w) for w in self.weights], [leaf(b) for b in self.biases]
        rest = [None if t is None else leaf(t) for t in self[4:]]
        return GatingCase(leaf(self.coords), leaf(self.shift), weights, biases, *rest)


def gating_case(
    b: int, n: int, h: int, widths: tuple[int, ...], k: int, c: int, shared: bool, seed: int = 0
) -> GatingCase:
    """Multiples of 1/8: hidden units of small networks are exact in float32, so none switches sides at its kink."""
    g = np.random.default_rng(seed)

    def eighths(*shape: int, span: int = 8) -> Tensor:
        return torch.from_numpy(g.integers(-span, span + 1, shape) / 8)

    sizes = [k] if not widths and h == k else [h, *widths, k]
    coords = eighths(h, n) if shared else eighths(b, h, n)
    weights = [eighths(o, i, span=4) / 4 for i, o in zip(sizes[:-1], sizes[1:], strict=True)]
    values = (eighths(b, n, c), eighths(h, c)) if c else (None, None)
    return GatingCase(coords, eighths(b, h), weights, [eighths(o) for o in sizes[1:]], *values)


def flow_of(
    layers: int, latent: int, size: float = 1.0, dtype: torch.dtype = torch.float64, seed: int = 0
) -> PlanarFlow:
    g = np.random.default_rng([layers, latent, seed])
    shapes = [(layers, latent), (layers, latent), (layers,), (latent,), (latent,)]
    u, w, b, loc, log_scale = (torch.from_numpy(g.normal(size=s)).to(dtype) for s in shapes)
    return PlanarFlow(size * u, size * w, b, loc, 0.3 * log_scale, slope=0.2)


def flow_case(
    samples: int, batch: int, latent: int, layers: int, seed: int = 0
) -> tuple[Tensor, Tensor, PlanarFlow, Tensor]:
    """float64 mean, std, flow and upstream gradients whose float32 rounding is exact."""
    g = np.random.default_rng([samples, batch, latent, layers, seed])
    mean, std, upstream = (
        torch.from_numpy(x).float().double()
        for x in (g.normal(size=(batch, latent)), g.uniform(0.1, 1.5, (batch, latent)), g.normal(size=batch))
    )
    flow = flow_of(layers, latent, layers**-0.5 * latent**-0.25, seed=seed)
    return mean, std, PlanarFlow(*(t.float().double() for t in flow[:5])), upstream


def far_from_kinks(z: Tensor, flow: PlanarFlow, far: float = 1e-5) -> bool:
    """No sample lies within `far` of the kink of a layer, where float32 may take the other side."""
    for t in reversed(range(len(flow.b))):
        if float((z @ flow.w[t] + flow.b[t]).abs().min()) < far:
            return False
        z = planar_flow_inverse_reference(z, flow._replace(**{k: getattr(flow, k)[t : t + 1] for k in "uwb"}))[0]
    return True


def clear_flow_case(
    samples: int, batch: int, latent: int, layers: int, far: float | None = None
) -> tuple[int, tuple, Tensor]:
    """The first seed with no sample within `far` of a kink, its case, and its noise in float64."""
    far = 1e-5 / samples**0.25 if far is None else far
    for seed in range(1000):
        arguments = mean, std, flow, _ = flow_case(samples, batch, latent, layers, seed)
        noise = counter_noise_reference(torch.tensor(seed), range(samples), batch, latent, torch.float64)
        if far_from_kinks((mean + std * noise).flatten(0, 1), flow, far):
            return seed, arguments, noise
    raise AssertionError("no such seed")


def expected_log_prob(mean: Tensor, std: Tensor, flow: PlanarFlow, upstream: Tensor, noise: Tensor) -> list[Tensor]:
    """Value and gradients from the plain inverse, in float64."""
    mean, std, *parameters = (t.clone().requires_grad_() for t in (mean, std, *flow[:5]))
    flow = PlanarFlow(*parameters, flow.slope)
    base, log_det = planar_flow_inverse_reference((mean + std * noise).flatten(0, 1), flow)
    value = (log_det + normal_log_prob(base, flow.loc, flow.log_scale)).view(noise.shape[:2]).mean(0)
    return [value.detach(), *torch.autograd.grad(value @ upstream, [mean, std, *parameters])]


def mixture_inputs(
    b: int, k: int, n: int, widths: Sequence[int], shared: bool = True, dtype: Any = torch.float64
) -> list[Tensor]:
    """theta, features, values, weights, scale; some values exactly 0 and 1, some weights 0."""
    g = np.random.default_rng([b, k, n, *widths])
    values = g.uniform(0.01, 0.99, (b, n, widths[-1]))  # off the limits of the bins at the ends
    values[g.random(values.shape) < 0.2] = 0.0
    values[g.random(values.shape) < 0.2] = 1.0
    weights = g.dirichlet(np.ones(k), (b, n)).transpose(0, 2, 1) * (g.random((b, 1, n)) < 0.8)
    arrays = [
        g.normal(size=(b, k, packed_size(widths))),
        g.normal(size=(n, widths[0]) if shared else (b, n, widths[0])),
        values,
        weights,
        g.uniform(0.05, 0.5, (k, widths[-1])),
    ]
    return [torch.from_numpy(a).to(dtype).contiguous() for a in arrays]


def mirrored(points: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features [N, 2·width] float32 whose second half changes its sign at the mirror point, and the mirror [N].

    Mirror points lie anywhere in the list; about a tenth have none and some are their own.
    """
    g = np.random.default_rng([points, width, seed])
    features, mirror = g.normal(size=(points, 2 * width)), np.full(points, -1)
    order = g.permutation(points)[: points - points // 10]
    if len(order) % 2:
        features[order[-1], width:] = 0
        mirror[order[-1]] = order[-1]
        order = order[:-1]
    for i, j in order.reshape(-1, 2):
        mirror[i], mirror[j] = j, i
        features[j] = np.concatenate([features[i, :width], -features[i, width:]])
    return torch.from_numpy(features).float(), torch.from_numpy(mirror)


def mixture_case(
    b: int, k: int, n: int, widths: tuple[int, ...], features: str = "shared"
) -> tuple[list[Tensor], Tensor | None]:
    """float32 arguments with parameters of the usual scale, and the mirror; features "shared", "own" or "mirrored"."""
    arguments, mirror = mixture_inputs(b, k, n, widths, features != "own", torch.float32), None
    arguments[0] *= 0.5 / math.sqrt(max(widths))
    if features == "mirrored":
        arguments[1], mirror = mirrored(n, widths[0] // 2)
    return arguments, mirror
