"""The mixture of coordinate networks (INRs) whose parameters a hypernetwork made, and its likelihood.

`theta` [B, K, P] packs one network per function and component (`vamoh.layout`); `features` are the encoded
coordinates, [N, E] shared by the batch or [B, N, E]. Three functions share one forward pass: plain outputs, the
log-likelihood of every component, and its expectation together with the gradient of θ in a single pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vamoh._checks import FLOATING, check_choice, check_tensor
from vamoh.layout import packed_size, unpack
from vamoh.ops._backend import register, resolve
from vamoh.ops.likelihood import KINDS, Likelihood, log_likelihood, log_likelihood_with_derivatives

ACTIVATIONS = ("leaky_relu", "relu", "sine")

_CHUNK = 1 << 20
"""Most hidden values [b, K, N, H] alive at once in the one-pass reference: about a level-3 cache."""


class Inr(NamedTuple):
    """Architecture of one coordinate network: layer widths (E, H, ..., H, C) and the hidden activation.

    slope is LeakyReLU's, omega the frequency of sine(ω·x).
    """

    widths: tuple[int, ...]
    activation: str = "leaky_relu"
    slope: float = 0.1
    omega: float = 30.0


def inr_mixture(theta: Tensor, features: Tensor, inr: Inr, *, backend: str | None = None) -> Tensor:
    """Outputs [B, K, N, C] of K networks per function at the encoded points; differentiable in both tensors.

    theta [B, K, P] and features [N, E] or [B, N, E], float32 or float64 of one dtype and device.
    Raises TypeError or ValueError naming the argument.
    """
    _check(inr, theta, features)
    resolve("inr_mixture", theta.device, theta.dtype, backend)
    return inr_mixture_reference(theta, features, inr)


def inr_mixture_log_likelihood(
    theta: Tensor,
    features: Tensor,
    values: Tensor,
    scale: Tensor,
    inr: Inr,
    likelihood: Likelihood,
    *,
    backend: str | None = None,
) -> Tensor:
    """Log-likelihood [B, K, N] in nats of `values` [B, N, C] under every component, summed over channels.

    scale [K, C] > 0 is the logistic's (ignored by the others). Differentiable by plain autograd, which stores every
    activation: the documented slow path for gradients to coordinates and frequencies.
    """
    _check(inr, theta, features, values, scale, likelihood)
    resolve("inr_mixture_log_likelihood", theta.device, theta.dtype, backend)
    logits = inr_mixture_reference(theta, features, inr)
    return log_likelihood(likelihood, logits, values[:, None], scale[:, None]).sum(-1)


def inr_mixture_expected_log_likelihood(
    theta: Tensor,
    features: Tensor,
    values: Tensor,
    weights: Tensor,
    scale: Tensor,
    inr: Inr,
    likelihood: Likelihood,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Expected log-likelihood under the weights q(c), in one pass that keeps no activation.

    Returns value [B] = Σ_n Σ_k weights[b,k,n] · log_likelihood[b,k,n] and log_likelihood [B, K, N], in nats.
    weights [B, K, N] are zero at unobserved points. The value is linear in the log-likelihoods, so the gradients of
    θ and the scales are known in the same pass. `value` is differentiable in theta, weights and scale;
    `log_likelihood` is not. Features or values that need a gradient take the slow path of
    `inr_mixture_log_likelihood`.
    """
    _check(inr, theta, features, values, scale, likelihood)
    batch, components = theta.shape[:2]
    check_tensor("inr_mixture", "weights", weights, [batch, components, values.shape[1]], like=theta)
    if features.requires_grad or values.requires_grad:
        log_p = inr_mixture_log_likelihood(theta, features, values, scale, inr, likelihood, backend=backend)
        return (weights * log_p).sum((1, 2)), log_p.detach()
    value, log_p, _, _ = torch.ops.vamoh.inr_mixture_expected_log_likelihood(
        theta, features, values, weights, scale, list(inr.widths), *inr[1:], *likelihood, backend
    )
    return value, log_p.detach()


def _check(
    inr: Inr,
    theta: Tensor,
    features: Tensor,
    values: Tensor | None = None,
    scale: Tensor | None = None,
    likelihood: Likelihood | None = None,
) -> None:
    where = "inr_mixture"
    check_choice(where, "activation", inr.activation, ACTIVATIONS)
    check_tensor(where, "theta", theta, ["B", "K", packed_size(inr.widths)], dtypes=FLOATING)
    batch, components, _ = theta.shape
    if not isinstance(features, Tensor) or features.dim() not in (2, 3):
        got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"{where}: features must have shape [N, E] or [B, N, E], got {got}")
    shape: list[int | str | None] = ["N", inr.widths[0]] if features.dim() == 2 else [batch, "N", inr.widths[0]]
    check_tensor(where, "features", features, shape, like=theta)
    if values is not None:
        check_tensor(where, "values", values, [batch, features.shape[-2], inr.widths[-1]], like=theta)
    if scale is not None:
        check_tensor(where, "scale", scale, [components, inr.widths[-1]], like=theta)
    if likelihood is not None:
        check_choice(where, "likelihood", likelihood.kind, KINDS)


torch.library.define(
    "vamoh::inr_mixture_expected_log_likelihood",
    "(Tensor theta, Tensor features, Tensor values, Tensor weights, Tensor scale, int[] widths, str activation, "
    "float slope, float omega, str likelihood, float half_bin, float epsilon, bool open_ends, str? backend) "
    "-> (Tensor value, Tensor log_likelihood, Tensor grad_theta, Tensor grad_scale)",
)


@torch.library.register_fake("vamoh::inr_mixture_expected_log_likelihood")
def _fake(
    theta: Tensor, features: Tensor, values: Tensor, weights: Tensor, scale: Tensor, *_: object
) -> tuple[Tensor, ...]:
    batch, components, packed = theta.shape
    return (
        theta.new_empty(batch),
        theta.new_empty(batch, components, values.shape[1]),
        theta.new_empty(batch, components, packed),
        theta.new_empty(batch, components, values.shape[2]),
    )


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, ...]
) -> None:
    _, log_p, grad_theta, grad_scale = output
    ctx.save_for_backward(log_p, grad_theta, grad_scale)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad_value: Tensor, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # the saved gradients would count as constants
        raise RuntimeError(
            "inr_mixture_expected_log_likelihood: has no second derivatives (create_graph=True); "
            "inr_mixture_log_likelihood has"
        )
    log_p, grad_theta, grad_scale = ctx.saved_tensors  # type: ignore[attr-defined]
    per_datum = grad_value[:, None, None]
    by_scale = (per_datum * grad_scale).sum(0)
    return (per_datum * grad_theta, None, None, per_datum * log_p, by_scale, *(None,) * 9)


torch.library.register_autograd("vamoh::inr_mixture_expected_log_likelihood", _backward, setup_context=_setup_context)


def inr_mixture_reference(theta: Tensor, features: Tensor, inr: Inr) -> Tensor:
    """Plain torch: outputs [B, K, N, C]."""
    layers = unpack(theta, inr.widths)
    h = features.mT if features.dim() == 2 else features.mT[:, None]  # [E, N] or [B, 1, E, N]
    for i, (weight, bias) in enumerate(layers):
        h = weight @ h + bias[..., None]  # [B, K, H, N]
        if i < len(layers) - 1:
            h = _activate(h, inr)
    return h.mT


@torch.library.impl("vamoh::inr_mixture_expected_log_likelihood", "CompositeExplicitAutograd")
def inr_mixture_expected_log_likelihood_reference(
    theta: Tensor,
    features: Tensor,
    values: Tensor,
    weights: Tensor,
    scale: Tensor,
    widths: Sequence[int],
    activation: str,
    slope: float,
    omega: float,
    likelihood: str,
    half_bin: float,
    epsilon: float,
    open_ends: bool,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plain torch, a few functions at a time: value, log-likelihoods, gradients to θ [B, K, P] and scale [B, K, C]."""
    resolve("inr_mixture_expected_log_likelihood", theta.device, theta.dtype, backend)
    inr = Inr(tuple(widths), activation, slope, omega)
    kind = Likelihood(likelihood, half_bin, epsilon, open_ends)
    batch, components, _ = theta.shape
    count, channels = values.shape[1:]
    log_p = theta.new_empty(batch, components, count)
    grad_theta = torch.empty(theta.shape, dtype=theta.dtype, device=theta.device)
    grad_scale = theta.new_zeros(batch, components, channels)
    for part in _chunks(batch, components * count * sum(widths[1:])):
        shared = features.dim() == 2
        first = features.mT if shared else features[part].mT[:, None]
        layers, inputs, before = unpack(theta[part], widths), [first], []
        for weight, bias in layers[:-1]:
            before.append((weight @ inputs[-1]).add_(bias[..., None]))
            inputs.append(_activate(before[-1], inr))
        logits = layers[-1][0] @ inputs[-1] + layers[-1][1][..., None]  # [b, K, C, N]
        log_p_c, by_logit, by_scale = log_likelihood_with_derivatives(
            kind, logits, values[part].mT[:, None], scale[..., None]
        )
        torch.sum(log_p_c, 2, out=log_p[part])
        q = weights[part][:, :, None]
        if by_scale is not None:
            grad_scale[part] = (q * by_scale).sum(-1)
        grads = unpack(grad_theta[part], widths)
        d = q * by_logit
        for i in reversed(range(len(layers))):
            grads[i][0].copy_(d @ inputs[i].mT)
            grads[i][1].copy_(d.sum(-1))
            if i > 0:
                d = _activate_backward(layers[i][0].mT @ d, before[i - 1], inr)
    return (weights * log_p).sum((1, 2)), log_p, grad_theta, grad_scale


def _activate(x: Tensor, inr: Inr) -> Tensor:
    if inr.activation == "sine":
        return torch.sin(inr.omega * x)
    return F.leaky_relu(x, _slope(inr))


def _activate_backward(grad: Tensor, x: Tensor, inr: Inr) -> Tensor:
    """Gradient at the input x of the activation from the gradient at its output."""
    if inr.activation == "sine":
        return grad * torch.cos(inr.omega * x).mul_(inr.omega)
    return torch.ops.aten.leaky_relu_backward(grad, x, _slope(inr), False)  # type: ignore[no-any-return]


def _slope(inr: Inr) -> float:
    return inr.slope if inr.activation == "leaky_relu" else 0.0


def _chunks(batch: int, size: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(size, 1))
    return (slice(i, min(i + step, batch)) for i in range(0, batch, step))


for _op in ("inr_mixture", "inr_mixture_log_likelihood", "inr_mixture_expected_log_likelihood"):
    register(_op, "reference")
