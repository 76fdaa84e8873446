"""A planar flow with LeakyReLU layers over a diagonal Gaussian: log-density and sampling, both exact.

Layer t: f(v) = v + û_t · leaky(w_t·v + b_t) with û = u + (softplus(w·u) - 1 - w·u) w/|w|², so that 1 + w·û > 0
(Rezende & Mohamed 2015, App. A.1). Layers are applied in order 0..T-1 from the base to z.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vamoh._checks import FLOATING, check_tensor
from vamoh.ops._backend import (
    float32_under_autocast,
    native,
    native_isa,
    native_unavailable,
    refuse_second_derivatives,
    register,
    require_reference,
    resolve,
    triton_kernels,
    triton_unavailable,
)
from vamoh.ops._noise import CounterNoise, check_noise, counter_noise_reference

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


@float32_under_autocast
def planar_flow_log_prob(z: Tensor, flow: PlanarFlow, *, backend: str | None = None) -> Tensor:
    """Log-density [S] in nats of samples z [S, Z], float32 or float64; differentiable once in z and the parameters.

    Raises TypeError or ValueError naming the argument.
    """
    where = "planar_flow_log_prob"
    check_tensor(where, "z", z, ["S", "Z"], dtypes=FLOATING)
    _check(where, flow, z)
    return torch.ops.vamoh.planar_flow_log_prob(z, *_constrained(flow), flow.slope, backend)  # type: ignore[no-any-return]


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
    value: Tensor = torch.ops.vamoh.planar_flow_expected_log_prob(
        mean,
        std,
        *_constrained(flow),
        flow.slope,
        given,
        seed,
        samples,
        learn and (mean.requires_grad or std.requires_grad),
        learn and any(parameter.requires_grad for parameter in flow[:5]),
        backend,
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
    z, log_p = torch.ops.vamoh.planar_flow_sample(noise, *_constrained(flow), flow.slope, backend)
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


def _constrained(flow: PlanarFlow) -> tuple[Tensor, ...]:
    """The tensors as the compiled ops take them: û, gain, w, b, loc, log_scale."""
    return (*_constrain(flow), flow.w, flow.b, flow.loc, flow.log_scale)


_PARAMETERS = "Tensor u_hat, Tensor gain, Tensor w, Tensor b, Tensor loc, Tensor log_scale, float slope"
_GRADIENTS = "Tensor grad_u_hat, Tensor grad_gain, Tensor grad_w, Tensor grad_b, Tensor grad_loc, Tensor grad_log_scale"
# Gradients that are not asked for are empty tensors.
torch.library.define("vamoh::planar_flow_log_prob", f"(Tensor z, {_PARAMETERS}, str? backend) -> Tensor")
torch.library.define(
    "vamoh::planar_flow_log_prob_backward",
    f"(Tensor grad, Tensor z, {_PARAMETERS}, bool grad_z, bool grad_flow, str? backend) "
    f"-> (Tensor z_grad, {_GRADIENTS})",
)
torch.library.define(
    "vamoh::planar_flow_sample", f"(Tensor noise, {_PARAMETERS}, str? backend) -> (Tensor z, Tensor log_p)"
)
torch.library.define(
    "vamoh::planar_flow_expected_log_prob",
    f"(Tensor mean, Tensor std, {_PARAMETERS}, Tensor? noise, Tensor? seed, SymInt samples, bool grad_posterior, "
    f"bool grad_flow, str? backend) -> (Tensor value, Tensor grad_mean, Tensor grad_std, {_GRADIENTS})",
)


@torch.library.register_fake("vamoh::planar_flow_log_prob")
def _fake_log_prob(z: Tensor, *_: object) -> Tensor:
    return z.new_empty(z.shape[0])


@torch.library.register_fake("vamoh::planar_flow_log_prob_backward")
def _fake_backward(
    grad: Tensor, z: Tensor, u_hat: Tensor, gain: Tensor, w: Tensor, b: Tensor, loc: Tensor, log_scale: Tensor,
    slope: float, grad_z: bool, grad_flow: bool, backend: str | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (_like(z, grad_z), *(_like(p, grad_flow) for p in (u_hat, gain, w, b, loc, log_scale)))


@torch.library.register_fake("vamoh::planar_flow_expected_log_prob")
def _fake_expected(
    mean: Tensor, std: Tensor, u_hat: Tensor, gain: Tensor, w: Tensor, b: Tensor, loc: Tensor, log_scale: Tensor,
    slope: float, noise: Tensor | None, seed: Tensor | None, samples: int, grad_posterior: bool, grad_flow: bool,
    backend: str | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch = mean.shape[0]
    flow = (_like(p, grad_flow, batch) for p in (u_hat, gain, w, b, loc, log_scale))
    return (mean.new_empty(batch), _like(mean, grad_posterior), _like(std, grad_posterior), *flow)


@torch.library.register_fake("vamoh::planar_flow_sample")
def _fake_sample(noise: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return noise.new_empty(noise.shape), noise.new_empty(noise.shape[0])


def _like(x: Tensor, wanted: bool, *lead: int) -> Tensor:
    return x.new_empty((*lead, *x.shape) if wanted else 0)


def _setup_log_prob(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.slope, ctx.backend = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(*tensors)


@float32_under_autocast
def _backward_log_prob(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivatives("planar_flow_log_prob")
    wanted: tuple[bool, ...] = ctx.needs_input_grad  # type: ignore[attr-defined]
    grads: tuple[Tensor, ...] = torch.ops.vamoh.planar_flow_log_prob_backward(
        grad, *ctx.saved_tensors, ctx.slope, wanted[0], any(wanted[1:7]), ctx.backend  # type: ignore[attr-defined]
    )  # fmt: skip
    return (*(g if want else None for g, want in zip(grads, wanted[:7], strict=True)), None, None)


def _setup_expected(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    ctx.save_for_backward(*output[1:])


@float32_under_autocast
def _backward_expected(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    refuse_second_derivatives("planar_flow_expected_log_prob")
    wanted: tuple[bool, ...] = ctx.needs_input_grad  # type: ignore[attr-defined]
    saved: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
    grads: list[Tensor | None] = [None] * len(wanted)
    for i, each in enumerate(saved):
        if wanted[i]:
            weighted = grad.view([-1] + [1] * (each.dim() - 1)) * each
            grads[i] = weighted if i < 2 else weighted.sum(0)
    return tuple(grads)


torch.library.register_autograd("vamoh::planar_flow_log_prob", _backward_log_prob, setup_context=_setup_log_prob)
torch.library.register_autograd(
    "vamoh::planar_flow_expected_log_prob", _backward_expected, setup_context=_setup_expected
)


@torch.library.impl("vamoh::planar_flow_log_prob", "CompositeExplicitAutograd")
def _run_log_prob(z: Tensor, *arguments: Any) -> Tensor:
    *parameters, slope, backend = arguments
    chosen = _resolve("planar_flow_log_prob", z, backend)
    if chosen == "reference":
        return _reference(z[:, None], None, parameters, slope)[0][:, 0]
    if chosen == "triton":
        return triton_kernels("planar_flow").log_prob(z, parameters, slope)  # type: ignore[no-any-return]
    out, z = z.new_empty(len(z)), z.contiguous()
    flow, sizes = _native_arguments(parameters, slope)
    native().planar_flow_log_prob(flow=_addresses(flow), z=z.data_ptr(), out=out.data_ptr(), samples=len(z), **sizes)
    return out


@torch.library.impl("vamoh::planar_flow_log_prob_backward", "CompositeExplicitAutograd")
def _run_backward(grad: Tensor, z: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *parameters, slope, grad_z, grad_flow, backend = arguments
    chosen = _resolve("planar_flow_log_prob", z, backend)
    if chosen == "triton":
        return triton_kernels("planar_flow").log_prob_backward(  # type: ignore[no-any-return]
            grad, z, parameters, slope, grad_z, grad_flow
        )
    if chosen == "reference":
        by_z, by_flow = torch.empty_like(z), [torch.zeros_like(p) for p in parameters]
        for part in _chunks(len(z), z.shape[1] * len(parameters[1])):
            _, by_z[part, None], found = _reference(z[part, None], grad[part, None], parameters, slope)
            for total, each in zip(by_flow, found, strict=True):
                total += each[0]
        return (by_z if grad_z else z.new_empty(0), *(g if grad_flow else g.new_empty(0) for g in by_flow))
    z, grad = z.contiguous(), grad.contiguous()
    flow, sizes = _native_arguments(parameters, slope)
    by_z, by_flow = _like(z, grad_z), [_like(p, grad_flow) for p in flow]
    native().planar_flow_log_prob_backward(
        flow=_addresses(flow),
        z=z.data_ptr(),
        grad=grad.data_ptr(),
        grad_z=by_z.data_ptr() if grad_z else 0,
        gradient=_addresses(by_flow) if grad_flow else [0] * 6,
        samples=len(z),
        **sizes,
    )
    return (by_z, *by_flow)


@torch.library.impl("vamoh::planar_flow_expected_log_prob", "CompositeExplicitAutograd")
def _run_expected(mean: Tensor, std: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *parameters, slope, noise, seed, samples, grad_posterior, grad_flow, backend = arguments
    batch, latent = mean.shape
    chosen = _resolve("planar_flow_expected_log_prob", mean, backend)
    if chosen == "reference":
        return _expected_reference(mean, std, parameters, slope, noise, seed, samples, grad_posterior, grad_flow)
    if chosen == "triton":
        return triton_kernels("planar_flow").expected_log_prob(  # type: ignore[no-any-return]
            mean, std, parameters, slope, noise, seed, samples, grad_posterior, grad_flow
        )
    mean, std = mean.contiguous(), std.contiguous()
    noise = None if noise is None else noise.contiguous()
    flow, sizes = _native_arguments(parameters, slope)
    value, by_mean, by_std = mean.new_empty(batch), _like(mean, grad_posterior), _like(std, grad_posterior)
    by_flow = [_like(p, grad_flow, batch) for p in flow]
    native().planar_flow_expected_log_prob(
        flow=_addresses(flow),
        mean=mean.data_ptr(),
        std=std.data_ptr(),
        noise=0 if noise is None else noise.data_ptr(),
        seed=0 if seed is None else int(seed),
        value=value.data_ptr(),
        grad_mean=by_mean.data_ptr() if grad_posterior else 0,
        grad_std=by_std.data_ptr() if grad_posterior else 0,
        gradient=_addresses(by_flow) if grad_flow else [0] * 6,
        batch=batch,
        samples=samples,
        **sizes,
    )
    return (value, by_mean, by_std, *by_flow)


@torch.library.impl("vamoh::planar_flow_sample", "CompositeExplicitAutograd")
def _run_sample(noise: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *parameters, slope, backend = arguments
    chosen = _resolve("planar_flow_sample", noise, backend)
    if chosen == "triton":
        return triton_kernels("planar_flow").sample(noise, parameters, slope)  # type: ignore[no-any-return]
    if chosen == "reference":
        u_hat, gain, w, b, loc, log_scale = parameters
        base = loc + log_scale.exp() * noise
        z, log_det = _forward(base, u_hat, gain, w, b, slope)
        return z, normal_log_prob(base, loc, log_scale) - log_det
    noise = noise.contiguous()
    z, log_p = noise.new_empty(noise.shape), noise.new_empty(len(noise))
    flow, sizes = _native_arguments(parameters, slope)
    native().planar_flow_sample(
        flow=_addresses(flow),
        noise=noise.data_ptr(),
        z=z.data_ptr(),
        log_p=log_p.data_ptr(),
        samples=len(noise),
        **sizes,
    )
    return z, log_p


def _resolve(op: str, x: Tensor, backend: str | None) -> str:
    """Backend for samples or means x [..., Z]."""

    def refusal(name: str) -> str | None:
        return triton_kernels("planar_flow_plan").refusal(x.shape[-1]) if name == "triton" else None

    return resolve(op, x.device, x.dtype, backend, refusal)


def _native_arguments(parameters: Sequence[Tensor], slope: float) -> tuple[list[Tensor], dict[str, Any]]:
    """Contiguous parameters, to be kept while the kernel runs, and the arguments that all kernels take."""
    layers, latent = parameters[0].shape
    sizes = {
        "layers": layers,
        "latent": latent,
        "slope": slope,
        "threads": torch.get_num_threads(),
        "isa": native_isa(),
    }
    return [p.contiguous() for p in parameters], sizes


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def _expected_reference(
    mean: Tensor,
    std: Tensor,
    parameters: Sequence[Tensor],
    slope: float,
    noise: Tensor | None,
    seed: Tensor | None,
    samples: int,
    grad_posterior: bool,
    grad_flow: bool,
) -> tuple[Tensor, ...]:
    """Plain torch, some samples at a time: value [B] and the gradients of every function, as the op returns them."""
    batch, latent = mean.shape
    value, by_mean, by_std = mean.new_zeros(batch), torch.zeros_like(mean), torch.zeros_like(std)
    by_flow = [p.new_zeros(batch, *p.shape) for p in parameters]
    for part in _chunks(samples, batch * latent * len(parameters[1])):
        if seed is None:
            eps = noise[part]  # type: ignore[index]
        else:
            eps = counter_noise_reference(seed, range(part.start, part.stop), batch, latent, mean.dtype)
        weight = mean.new_full((len(eps), batch), 1 / samples) if grad_posterior or grad_flow else None
        log_p, by_z, found = _reference(mean + std * eps, weight, parameters, slope)
        value += log_p.sum(0) / samples
        if weight is None:
            continue
        by_mean += by_z.sum(0)
        by_std += (eps * by_z).sum(0)
        for total, each in zip(by_flow, found, strict=True):
            total += each
    posterior = (g if grad_posterior else g.new_empty(0) for g in (by_mean, by_std))
    return (value, *posterior, *(g if grad_flow else g.new_empty(0) for g in by_flow))


def _reference(
    z: Tensor, weight: Tensor | None, parameters: Sequence[Tensor], slope: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Plain torch: log-density [S, B] of z [S, B, Z], and the gradients of its sum over S, weighted [S, B].

    To z, and to the parameters of every function: [B, T, Z], ... Without weights these are empty.
    """
    u_hat, gain, w, b, loc, log_scale = parameters
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


for _op, _limits in (
    ("planar_flow_log_prob", ""),
    ("planar_flow_expected_log_prob", ""),
    ("planar_flow_sample", "no gradients"),
):
    _wide = "at most 1024 dimensions" + (f"; {_limits}" if _limits else "")
    register(_op, "triton", devices=["cuda"], dtypes=[torch.float32], unavailable=triton_unavailable, limits=_wide)
    register(_op, "cpu", devices=["cpu"], dtypes=[torch.float32], unavailable=native_unavailable, limits=_limits)
    register(_op, "reference")
