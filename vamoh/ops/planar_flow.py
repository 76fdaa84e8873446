"""A planar flow with LeakyReLU layers over a diagonal Gaussian: log-density and sampling, both exact.

Layer t: f(v) = v + û_t · leaky(w_t·v + b_t) with û = u + (softplus(w·u) - 1 - w·u) w/|w|², so that 1 + w·û > 0
(Rezende & Mohamed 2015, App. A.1). Layers are applied in order 0..T-1 from the base to z.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vamoh._checks import FLOATING, check_tensor
from vamoh.ops._autocast import float32_under_autocast
from vamoh.ops._native import triton_kernels
from vamoh.ops._noise import CounterNoise, check_noise, counter_noise_reference
from vamoh.ops._op import Op, Saved, require_reference

_CHUNK = 1 << 20
"""Most values [S, B, Z] of all layers alive at once in the one-pass reference."""


class PlanarFlow(NamedTuple):
    """Parameters: u, w [T, Z], b [T], base mean loc [Z] and log standard deviation log_scale [Z]; slope of the leak."""

    u: Tensor
    w: Tensor
    b: Tensor
    loc: Tensor
    log_scale: Tensor
    slope: float = 0.2


class Constrained(NamedTuple):
    """A flow as the ops take it: û and gain = 1 + w·û instead of u; else as `PlanarFlow`."""

    u_hat: Tensor
    gain: Tensor
    w: Tensor
    b: Tensor
    loc: Tensor
    log_scale: Tensor
    slope: float


@float32_under_autocast
def planar_flow_log_prob(z: Tensor, flow: PlanarFlow, *, backend: str | None = None) -> Tensor:
    """Log-density [S] in nats of samples z [S, Z], float32 or float64; differentiable once in z and the parameters.

    Raises TypeError or ValueError naming the argument.
    """
    where = "planar_flow_log_prob"
    check_tensor(where, "z", z, ["S", "Z"], dtypes=FLOATING)
    _check(where, flow, z)
    return _log_prob(z, _constrained(flow), backend=backend)  # type: ignore[no-any-return]


@float32_under_autocast
def planar_flow_expected_log_prob(
    mean: Tensor, std: Tensor, flow: PlanarFlow, noise: Tensor | CounterNoise, *, backend: str | None = None
) -> Tensor:
    """Mean log-density [B] in nats over S samples mean + std · noise_s of every function.

    mean, std [B, Z] float32 or float64; noise a tensor [S, B, Z] or `CounterNoise`, whose samples are never stored.
    Value and gradients are made in one pass. Differentiable once in all but the noise.
    Raises TypeError or ValueError naming the argument.
    """
    where = "planar_flow_expected_log_prob"
    check_tensor(where, "mean", mean, ["B", "Z"], dtypes=FLOATING)
    check_tensor(where, "std", std, list(mean.shape), like=mean)
    _check(where, flow, mean)
    check_noise(where, "noise", noise, mean)
    given, seed, samples = (None, *noise) if isinstance(noise, CounterNoise) else (noise, None, len(noise))
    learn = torch.is_grad_enabled()
    value: Tensor = _expected_log_prob(
        mean,
        std,
        _constrained(flow),
        given,
        seed,
        samples,
        learn and (mean.requires_grad or std.requires_grad),
        learn and any(parameter.requires_grad for parameter in flow[:5]),
        backend=backend,
    )[0]
    return value


@float32_under_autocast
def planar_flow_sample(noise: Tensor, flow: PlanarFlow, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Samples z [S, Z] made from standard normal noise [S, Z], and their log-density [S] in nats.

    Where something needs a gradient this is plain torch, which keeps every layer's state.
    Raises TypeError or ValueError naming the argument.
    """
    where = "planar_flow_sample"
    check_tensor(where, "noise", noise, ["S", "Z"], dtypes=FLOATING)
    _check(where, flow, noise)
    if torch.is_grad_enabled() and (noise.requires_grad or any(p.requires_grad for p in flow[:5])):
        require_reference(where, "gradients", backend)
        base = flow.loc + flow.log_scale.exp() * noise
        z, log_det = planar_flow_forward_reference(base, flow)
        return z, normal_log_prob(base, flow.loc, flow.log_scale) - log_det
    z, log_p = _sample(noise, _constrained(flow), backend=backend)
    return z, log_p


def normal_log_prob(x: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Log-density [...] of a diagonal Gaussian at x [..., Z]."""
    standard = (x - loc) * torch.exp(-log_scale)
    return -(0.5 * standard.square() + log_scale).sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)


def _check(where: str, flow: PlanarFlow, like: Tensor) -> None:
    latent, layers = like.shape[1], flow.b.shape[0]
    check_tensor(where, "u", flow.u, [layers, latent], like=like)
    check_tensor(where, "w", flow.w, [layers, latent], like=like)
    check_tensor(where, "b", flow.b, [layers], like=like)
    check_tensor(where, "loc", flow.loc, [latent], like=like)
    check_tensor(where, "log_scale", flow.log_scale, [latent], like=like)


def _constrain(flow: PlanarFlow) -> tuple[Tensor, Tensor]:
    """û [T, Z] and 1 + w·û [T] = softplus(w·u), kept as it is: the sum would round to 0 when w·u is far below 0.

    A layer with w = 0 shifts every point alike and needs no û: there û = u and 1 + w·û = 1.
    """
    inner, square = (flow.w * flow.u).sum(-1), flow.w.square().sum(-1)
    bends = square >= torch.finfo(square.dtype).tiny
    gain = torch.where(bends, F.softplus(inner), 1.0)
    correction = (gain - 1 - inner) / torch.where(bends, square, 1.0)
    return flow.u + torch.where(bends, correction, 0.0)[:, None] * flow.w, gain


def _constrained(flow: PlanarFlow) -> Constrained:
    return Constrained(*_constrain(flow), flow.w, flow.b, flow.loc, flow.log_scale, flow.slope)


def _reference(z: Tensor, weight: Tensor | None, flow: Constrained) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Plain torch: log-density [S, B] of z [S, B, Z], and the gradients of its sum over S, weighted [S, B].

    To z, and to the parameters of every function: [B, T, Z], ... Without weights these are empty.
    """
    u_hat, gain, w, b, loc, log_scale, slope = flow
    x, states = z, []
    log_det = z.new_zeros(z.shape[:2])
    for t in reversed(range(len(b))):
        linear = x @ w[t] + b[t]
        leak = torch.where(linear < 0, z.new_full((), slope), z.new_ones(()))
        stretch = 1 - leak + leak * gain[t]
        ratio = leak / stretch
        if weight is not None:
            states.append((x, ratio, ratio * linear))
        x = x - (ratio * linear)[..., None] * u_hat[t]
        log_det -= torch.log(stretch)
    log_p = log_det + normal_log_prob(x, loc, log_scale)
    if weight is None:
        return log_p, z.new_empty(0), []
    standard = (x - loc) * torch.exp(-log_scale)
    grad = -weight[..., None] * standard * torch.exp(-log_scale)
    rows: list[tuple[Tensor, ...]] = []
    for t, (x, ratio, c) in enumerate(reversed(states)):
        by_c = -(grad @ u_hat[t])
        by_linear = by_c * ratio
        by_u, by_w = -(c[..., None] * grad).sum(0), (by_linear[..., None] * x).sum(0)
        rows.append((by_u, -(ratio * (by_c * c + weight)).sum(0), by_w, by_linear.sum(0)))
        grad = grad + by_linear[..., None] * w[t]
    by_loc = (weight[..., None] * standard).sum(0) * torch.exp(-log_scale)
    by_log_scale = (weight[..., None] * (standard.square() - 1)).sum(0)
    layers = [torch.stack(row, 1) for row in zip(*rows, strict=True)]
    if not rows:
        layers = [p.new_empty(len(by_loc), *p.shape) for p in (u_hat, gain, w, b)]
    return log_p, grad, [*layers, by_loc, by_log_scale]


def _chunks(samples: int, size: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(size, 1))
    return (slice(i, min(i + step, samples)) for i in range(0, samples, step))


def planar_flow_inverse_reference(z: Tensor, flow: PlanarFlow) -> tuple[Tensor, Tensor]:
    """Plain torch: base points [S, Z] and log |d base / d z| [S]."""
    u_hat, gain = _constrain(flow)
    log_det = z.new_zeros(z.shape[0])
    for t in reversed(range(len(flow.b))):
        linear = z @ flow.w[t] + flow.b[t]
        leak = torch.where(linear < 0, z.new_full((), flow.slope), z.new_ones(()))
        stretch = 1 - leak + leak * gain[t]
        z = z - (leak * linear / stretch)[:, None] * u_hat[t]
        log_det = log_det - torch.log(stretch)
    return z, log_det


def planar_flow_forward_reference(base: Tensor, flow: PlanarFlow) -> tuple[Tensor, Tensor]:
    """Plain torch: z [S, Z] and log |d z / d base| [S]."""
    return _forward(base, *_constrain(flow), flow.w, flow.b, flow.slope)


def _forward(base: Tensor, u_hat: Tensor, gain: Tensor, w: Tensor, b: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    z, log_det = base, base.new_zeros(base.shape[0])
    for t in range(len(b)):
        linear = z @ w[t] + b[t]
        leak = torch.where(linear < 0, z.new_full((), slope), z.new_ones(()))
        z = z + (leak * linear)[:, None] * u_hat[t]
        log_det = log_det + torch.log(1 - leak + leak * gain[t])
    return z, log_det


def _log_prob_reference(z: Tensor, flow: Constrained) -> Tensor:
    return _reference(z[:, None], None, flow)[0][:, 0]


def _empty_log_prob(z: Tensor, flow: Constrained) -> Tensor:
    return z.new_empty(z.shape[0])


_log_prob = Op("planar_flow_log_prob(Tensor z, Constrained flow) -> Tensor", _log_prob_reference, _empty_log_prob)

_WIDE = "at most 1024 dimensions"


def _refusal(*arguments: Any) -> str | None:
    flow = next(each for each in arguments if isinstance(each, Constrained))
    return triton_kernels("planar_flow_plan").refusal(flow.loc.shape[0])  # type: ignore[no-any-return]


@_log_prob.backend("triton", limits=_WIDE, refusal=_refusal)
def _(z: Tensor, flow: Constrained) -> Tensor:
    return triton_kernels("planar_flow").log_prob(z, flow[:6], flow.slope)  # type: ignore[no-any-return]


@_log_prob.backend("cpu")
def _(call: Any, z: Tensor, flow: Constrained) -> Tensor:
    out = _empty_log_prob(z, flow)
    call("planar_flow_log_prob", flow=_native_flow(flow), z=z, out=out, samples=len(z))
    return out


def _native_flow(flow: Constrained) -> list[Any]:
    """PlanarFlow of csrc/planar_flow.h."""
    return [*flow[:6], *flow.u_hat.shape, flow.slope]


def _backward_reference(grad: Tensor, z: Tensor, flow: Constrained, by_z: bool, by_flow: bool) -> tuple[Tensor, ...]:
    grad_z, grad_flow = torch.empty_like(z), [torch.zeros_like(p) for p in flow[:6]]
    for part in _chunks(len(z), z.shape[1] * len(flow.gain)):
        _, grad_z[part, None], found = _reference(z[part, None], grad[part, None], flow)
        for total, each in zip(grad_flow, found, strict=True):
            total += each[0]
    return (grad_z if by_z else z.new_empty(0), *(g if by_flow else g.new_empty(0) for g in grad_flow))


def _like(x: Tensor, wanted: bool, *lead: int) -> Tensor:
    return x.new_empty((*lead, *x.shape) if wanted else 0)


def _empty_grads(grad: Tensor, z: Tensor, flow: Constrained, by_z: bool, by_flow: bool) -> tuple[Tensor, ...]:
    return (_like(z, by_z), *(_like(p, by_flow) for p in flow[:6]))


# Gradients that are not asked for are empty tensors.
_GRADIENTS = "Tensor grad_u_hat, Tensor grad_gain, Tensor grad_w, Tensor grad_b, Tensor grad_loc, Tensor grad_log_scale"
_log_prob_backward = _log_prob.derivative(
    "planar_flow_log_prob_backward(Tensor grad, Tensor z, Constrained flow, bool by_z, bool by_flow) "
    f"-> (Tensor grad_z, {_GRADIENTS})",
    _backward_reference,
    _empty_grads,
)


@_log_prob_backward.backend("triton", refusal=_refusal)
def _(grad: Tensor, z: Tensor, flow: Constrained, by_z: bool, by_flow: bool) -> tuple[Tensor, ...]:
    kernels = triton_kernels("planar_flow")
    return kernels.log_prob_backward(grad, z, flow[:6], flow.slope, by_z, by_flow)  # type: ignore[no-any-return]


@_log_prob_backward.backend("cpu")
def _(call: Any, grad: Tensor, z: Tensor, flow: Constrained, by_z: bool, by_flow: bool) -> tuple[Tensor, ...]:
    grads = _empty_grads(grad, z, flow, by_z, by_flow)
    call(
        "planar_flow_log_prob_backward",
        flow=_native_flow(flow),
        z=z,
        grad=grad,
        grad_z=grads[0] if by_z else None,
        gradient=list(grads[1:]) if by_flow else _NONE,
        samples=len(z),
    )
    return grads


_NONE = [None] * 6


@_log_prob.gradient(saves=lambda z, flow, out: (z, *flow))
def _(saved: Saved, grad: Tensor) -> tuple[Tensor, ...]:
    z, *flow = saved.values
    by_z, *by_flow = saved.needed
    return _log_prob_backward(grad, z, flow, by_z, any(by_flow), backend=saved.backend)  # type: ignore[no-any-return]


def _sample_reference(noise: Tensor, flow: Constrained) -> tuple[Tensor, Tensor]:
    base = flow.loc + flow.log_scale.exp() * noise
    z, log_det = _forward(base, flow.u_hat, flow.gain, flow.w, flow.b, flow.slope)
    return z, normal_log_prob(base, flow.loc, flow.log_scale) - log_det


def _empty_sample(noise: Tensor, flow: Constrained) -> tuple[Tensor, Tensor]:
    return noise.new_empty(noise.shape), noise.new_empty(noise.shape[0])


_sample = Op(
    "planar_flow_sample(Tensor noise, Constrained flow) -> (Tensor z, Tensor log_p)", _sample_reference, _empty_sample
)


@_sample.backend("triton", limits=f"{_WIDE}; no gradients", refusal=_refusal)
def _(noise: Tensor, flow: Constrained) -> tuple[Tensor, Tensor]:
    return triton_kernels("planar_flow").sample(noise, flow[:6], flow.slope)  # type: ignore[no-any-return]


@_sample.backend("cpu", limits="no gradients")
def _(call: Any, noise: Tensor, flow: Constrained) -> tuple[Tensor, Tensor]:
    z, log_p = _empty_sample(noise, flow)
    call("planar_flow_sample", flow=_native_flow(flow), noise=noise, z=z, log_p=log_p, samples=len(noise))
    return z, log_p


def _expected_reference(
    mean: Tensor,
    std: Tensor,
    flow: Constrained,
    noise: Tensor | None,
    seed: Tensor | None,
    samples: int,
    by_posterior: bool,
    by_flow: bool,
) -> tuple[Tensor, ...]:
    """Plain torch, some samples at a time: value [B] and the gradients of every function, as the op returns them."""
    batch, latent = mean.shape
    value, grad_mean, grad_std = mean.new_zeros(batch), torch.zeros_like(mean), torch.zeros_like(std)
    grad_flow = [p.new_zeros(batch, *p.shape) for p in flow[:6]]
    for part in _chunks(samples, batch * latent * len(flow.gain)):
        if seed is None:
            eps = noise[part]  # type: ignore[index]
        else:
            eps = counter_noise_reference(seed, range(part.start, part.stop), batch, latent, mean.dtype)
        weight = mean.new_full((len(eps), batch), 1 / samples) if by_posterior or by_flow else None
        log_p, by_z, found = _reference(mean + std * eps, weight, flow)
        value += log_p.sum(0) / samples
        if weight is None:
            continue
        grad_mean += by_z.sum(0)
        grad_std += (eps * by_z).sum(0)
        for total, each in zip(grad_flow, found, strict=True):
            total += each
    posterior = (g if by_posterior else g.new_empty(0) for g in (grad_mean, grad_std))
    return (value, *posterior, *(g if by_flow else g.new_empty(0) for g in grad_flow))


def _empty_expected(
    mean: Tensor,
    std: Tensor,
    flow: Constrained,
    noise: Tensor | None,
    seed: Tensor | None,
    samples: int,
    by_posterior: bool,
    by_flow: bool,
) -> tuple[Tensor, ...]:
    batch = mean.shape[0]
    parameters = (_like(p, by_flow, batch) for p in flow[:6])
    return (mean.new_empty(batch), _like(mean, by_posterior), _like(std, by_posterior), *parameters)


_expected_log_prob = Op(
    "planar_flow_expected_log_prob(Tensor mean, Tensor std, Constrained flow, Tensor? noise, Tensor? seed, "
    "SymInt samples, bool by_posterior, bool by_flow) "
    f"-> (Tensor value, Tensor grad_mean, Tensor grad_std, {_GRADIENTS})",
    _expected_reference,
    _empty_expected,
)


@_expected_log_prob.backend("triton", limits=_WIDE, refusal=_refusal)
def _(mean: Tensor, std: Tensor, flow: Constrained, *rest: Any) -> tuple[Tensor, ...]:
    kernels = triton_kernels("planar_flow")
    return kernels.expected_log_prob(mean, std, flow[:6], flow.slope, *rest)  # type: ignore[no-any-return]


@_expected_log_prob.backend("cpu")
def _(
    call: Any,
    mean: Tensor,
    std: Tensor,
    flow: Constrained,
    noise: Tensor | None,
    seed: Tensor | None,
    samples: int,
    by_posterior: bool,
    by_flow: bool,
) -> tuple[Tensor, ...]:
    results = _empty_expected(mean, std, flow, noise, seed, samples, by_posterior, by_flow)
    value, grad_mean, grad_std, *gradient = results
    call(
        "planar_flow_expected_log_prob",
        flow=_native_flow(flow),
        mean=mean,
        std=std,
        noise=noise,
        seed=0 if seed is None else int(seed),
        value=value,
        grad_mean=grad_mean if by_posterior else None,
        grad_std=grad_std if by_posterior else None,
        gradient=gradient if by_flow else _NONE,
        batch=len(mean),
        samples=samples,
    )
    return results


@_expected_log_prob.gradient(saves=lambda *inputs_and_output: inputs_and_output[-1][1:])
def _(saved: Saved, grad: Tensor, *_: Tensor | None) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for i, each in enumerate(saved.values):
        weighted = grad.view([-1] + [1] * (each.dim() - 1)) * each if saved.needed[i] else None
        found.append(weighted if weighted is None or i < 2 else weighted.sum(0))
    return found
