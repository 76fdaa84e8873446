"""The mixture of coordinate networks (INRs) whose parameters a hypernetwork made, and its likelihood.

`theta` [B, K, P] packs one network per function and component (`vamoh.layout`); `features` are the encoded
coordinates, [N, E] shared by the batch or [B, N, E]. Four functions share one forward pass: plain outputs, the
log-likelihood of every component, its expectation together with the gradient of θ in a single pass, and the mixed mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vamoh._checks import FLOATING, check_choice, check_tensor
from vamoh.layout import packed_size, unpack
from vamoh.ops._autocast import float32_under_autocast
from vamoh.ops._native import items, triton_kernels, triton_precision
from vamoh.ops._op import Op, Saved, require_reference
from vamoh.ops._points import check_mask
from vamoh.ops.likelihood import KINDS, Likelihood, log_likelihood, log_likelihood_with_derivatives, mean

ACTIVATIONS = ("leaky_relu", "relu", "sine")

_CHUNK = 1 << 20
"""Most hidden values [b, K, N, H] alive at once in the references: about a level-3 cache."""


class Inr(NamedTuple):
    """Architecture of one coordinate network: layer widths (E, H, ..., H, C) and the hidden activation.

    slope is LeakyReLU's, omega the frequency of sine(ω·x).
    """

    widths: tuple[int, ...]
    activation: str = "leaky_relu"
    slope: float = 0.1
    omega: float = 30.0


@float32_under_autocast
def inr_mixture(
    theta: Tensor, features: Tensor, inr: Inr, *, mirror: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Outputs [B, K, N, C] of K networks per function at the encoded points; differentiable in both tensors.

    theta [B, K, P] and features [N, E] or [B, N, E], float32 or float64 of one dtype and device.
    mirror [N] int64 speeds up symmetric grids: where mirror[n] = m >= 0, the halves (even, odd) of features[n] promise
    that features[m] is (even, -odd), and mirror[m] = n; -1: no such point. It changes nothing but the rounding.
    A gradient to the features takes the plain-torch path, which stores every activation and has second derivatives.
    Raises TypeError or ValueError naming the argument.
    """
    _check(inr, theta, features, mirror=mirror)
    if features.requires_grad:
        require_reference("inr_mixture", "gradients of features", backend)
        return inr_mixture_reference(theta, features, inr)
    result: Tensor = _outputs(theta, features, mirror, inr, backend=backend)
    return result


@float32_under_autocast
def inr_mixture_log_likelihood(
    theta: Tensor,
    features: Tensor,
    values: Tensor,
    scale: Tensor,
    inr: Inr,
    likelihood: Likelihood,
    *,
    mask: Tensor | None = None,
    mirror: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-likelihood [B, K, N] in nats of `values` [B, N, C] under every component, summed over channels.

    scale [K, C] > 0 is the logistic's (ignored by the others). mask [N] or [B, N] bool, default all: the observed
    points; at others the result is 0, and features and values there, NaN or not, play no part. mirror as in
    `inr_mixture`. With gradients it takes the plain-torch path, which stores every activation: the documented slow path
    for gradients to coordinates and frequencies.
    """
    _check(inr, theta, features, values, scale, likelihood, mirror, mask)
    mask = None if mask is None else mask.expand(len(theta), -1)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (theta, features, values, scale)):
        require_reference("inr_mixture_log_likelihood", "gradients", backend)
        return inr_mixture_log_likelihood_reference(theta, features, values, scale, mask, mirror, inr, likelihood)
    result: Tensor = _log_likelihood(theta, features, values, scale, mask, mirror, inr, likelihood, backend=backend)
    return result


@float32_under_autocast
def inr_mixture_expected_log_likelihood(
    theta: Tensor,
    features: Tensor,
    values: Tensor,
    weights: Tensor,
    scale: Tensor,
    inr: Inr,
    likelihood: Likelihood,
    *,
    mask: Tensor | None = None,
    mirror: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Expected log-likelihood under the weights q(c), in one pass that keeps no activation.

    Returns value [B] = Σ_n Σ_k weights[b,k,n] · log_likelihood[b,k,n] and log_likelihood [B, K, N], in nats.
    weights [B, K, N]; mask as in `inr_mixture_log_likelihood`: weights at unobserved points play no part either. The
    value is linear in the log-likelihoods, so the gradients of θ and the scales are known in the same pass. `value` is
    differentiable in theta, weights and scale; `log_likelihood` is not. Features or values that need a gradient take
    the slow path of `inr_mixture_log_likelihood`; mirror as in `inr_mixture`.
    """
    _check(inr, theta, features, values, scale, likelihood, mirror, mask)
    mask = None if mask is None else mask.expand(len(theta), -1)
    batch, components = theta.shape[:2]
    check_tensor("inr_mixture", "weights", weights, [batch, components, values.shape[1]], like=theta)
    if features.requires_grad or values.requires_grad:
        log_p = inr_mixture_log_likelihood(theta, features, values, scale, inr, likelihood, mask=mask, backend=backend)
        weights = weights if mask is None else torch.where(mask[:, None], weights, 0)
        return (weights * log_p).sum((1, 2)), log_p.detach()
    value, log_p, _, _ = _expected_log_likelihood(
        theta, features, values, weights, scale, mask, mirror, inr, likelihood, backend=backend
    )
    return value, log_p.detach()


@float32_under_autocast
def inr_mixture_mean(
    theta: Tensor,
    features: Tensor,
    log_pi: Tensor,
    inr: Inr,
    likelihood: Likelihood,
    *,
    mirror: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean of the mixture and mean of its most probable component, both [B, N, C].

    log_pi [B, K, N], or [B, K, 1] for all points alike: log-probabilities of the components; the first of equally
    probable ones counts. mirror as in `inr_mixture`. Where a gradient is needed it stores the outputs of `inr_mixture`,
    whose paths and derivatives it then has.
    """
    _check(inr, theta, features, likelihood=likelihood, mirror=mirror)
    batch, components = theta.shape[:2]
    count = features.shape[-2]
    points = 1 if isinstance(log_pi, Tensor) and log_pi.dim() == 3 and log_pi.shape[2] == 1 else count
    check_tensor("inr_mixture", "log_pi", log_pi, [batch, components, points], like=theta)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (theta, features, log_pi)):
        outputs = inr_mixture(theta, features, inr, mirror=mirror, backend=backend)
        return _mix(outputs, log_pi.expand(-1, -1, count), likelihood)
    mean, mean_map = _mixed_mean(theta, features, log_pi, mirror, inr, likelihood.kind, backend=backend)
    return mean, mean_map


def _check(
    inr: Inr,
    theta: Tensor,
    features: Tensor,
    values: Tensor | None = None,
    scale: Tensor | None = None,
    likelihood: Likelihood | None = None,
    mirror: Tensor | None = None,
    mask: Tensor | None = None,
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
    if mask is not None:
        check_mask(where, mask, features, batch)
    if mirror is not None:
        check_tensor(where, "mirror", mirror, [features.shape[-2]], dtypes=[torch.int64])
        if mirror.device != theta.device:
            raise TypeError(f"{where}: mirror must be on {theta.device}, got {mirror.device}")
        if features.dim() != 2 or inr.widths[0] % 2:
            raise ValueError(
                f"{where}: mirror must come with features [N, E] shared by the batch and E even, "
                f"got {list(features.shape)}"
            )


_SIZES = "hidden layers of one width, at most 64 channels"
_SLOW = "no gradients to features"
_TWICE = "inr_mixture_log_likelihood has, and inr_mixture where the features need a gradient"


def _refusal(*arguments: Any) -> str | None:
    inr = next(each for each in arguments if isinstance(each, Inr))
    return triton_kernels("inr_mixture_plan").refusal(inr.widths)  # type: ignore[no-any-return]


def _mixture(theta: Tensor, features: Tensor, mirror: Tensor | None, inr: Inr, mask: Tensor | None = None) -> list[Any]:
    """InrMixture of csrc/inr_mixture.h, with the address of theta, which is dense, as it lies."""
    shared, stride = (features, 0) if features.dim() == 2 else items(features)
    sizes = (*theta.shape[:2], features.shape[-2])
    network = (inr.activation == "sine", _slope(inr), inr.omega)
    return [theta.data_ptr(), *theta.stride()[:2], shared, stride, mirror, mask, inr.widths, *sizes, *network]


def _dense(theta: Tensor) -> Tensor:
    """`theta` with P contiguous and no gaps; functions or components come first."""
    return theta if theta.is_contiguous() or theta.transpose(0, 1).is_contiguous() else theta.contiguous()


def _like(result: Tensor, theta: Tensor) -> Tensor:
    """`result` with the strides that the op promises: those of `empty_like(theta)`."""
    promised = torch.empty_like(theta) if not theta.is_contiguous() else result
    return result if promised.stride() == result.stride() else promised.copy_(result)


def inr_mixture_reference(theta: Tensor, features: Tensor, inr: Inr) -> Tensor:
    """Plain torch: outputs [B, K, N, C]."""
    return _forward(theta, features, inr)[3].mT


_Layers = list[tuple[Tensor, Tensor]]


def _forward(theta: Tensor, features: Tensor, inr: Inr) -> tuple[_Layers, list[Tensor], list[Tensor], Tensor]:
    """Weights and biases, the input of every layer, hidden values before the activation, and outputs [B, K, C, N]."""
    layers, before = unpack(theta, inr.widths), []
    inputs = [features.mT if features.dim() == 2 else features.mT[:, None]]  # [E, N] or [B, 1, E, N]
    for weight, bias in layers[:-1]:
        before.append(weight @ inputs[-1] + bias[..., None])  # [B, K, H, N]
        inputs.append(_activate(before[-1], inr))
    return layers, inputs, before, layers[-1][0] @ inputs[-1] + layers[-1][1][..., None]


def _backward_layers(
    layers: _Layers, inputs: list[Tensor], before: list[Tensor], grad: Tensor, grads: _Layers, inr: Inr
) -> None:
    """Write the gradients of weights and biases to `grads`, from that of the outputs [B, K, C, N]."""
    for i in reversed(range(len(layers))):
        grads[i][0].copy_(grad @ inputs[i].mT)
        grads[i][1].copy_(grad.sum(-1))
        if i > 0:
            grad = _activate_backward(layers[i][0].mT @ grad, before[i - 1], inr)


def _outputs_reference(theta: Tensor, features: Tensor, mirror: Tensor | None, inr: Inr) -> Tensor:
    return inr_mixture_reference(theta, features, inr).contiguous()


def _empty_outputs(theta: Tensor, features: Tensor, mirror: Tensor | None, inr: Inr) -> Tensor:
    return theta.new_empty(*theta.shape[:2], features.shape[-2], inr.widths[-1])


_outputs = Op(
    "inr_mixture(Tensor theta, Tensor features, Tensor? mirror, Inr inr) -> Tensor", _outputs_reference, _empty_outputs
)


@_outputs.backend("triton", limits=f"{_SIZES}; {_SLOW}", refusal=_refusal)
def _(theta: Tensor, features: Tensor, mirror: Tensor | None, inr: Inr) -> Tensor:
    kernels = triton_kernels("inr_mixture")
    return kernels.outputs(theta, features, mirror, *inr, triton_precision())  # type: ignore[no-any-return]


@_outputs.backend("cpu", limits=_SLOW)
def _(call: Any, theta: Tensor, features: Tensor, mirror: Tensor | None, inr: Inr) -> Tensor:
    dense, outputs = _dense(theta), _empty_outputs(theta, features, mirror, inr)
    call("inr_mixture", mixture=_mixture(dense, features, mirror, inr), outputs=outputs)
    return outputs


def _backward_reference(
    grad_outputs: Tensor, theta: Tensor, features: Tensor, mirror: Tensor | None, inr: Inr
) -> Tensor:
    grad_theta = torch.empty_like(theta)
    layers, inputs, before, _ = _forward(theta, features, inr)
    _backward_layers(layers, inputs, before, grad_outputs.mT, unpack(grad_theta, inr.widths), inr)
    return grad_theta


_outputs_backward = _outputs.derivative(
    "inr_mixture_backward(Tensor grad_outputs, Tensor theta, Tensor features, Tensor? mirror, Inr inr) -> Tensor",
    _backward_reference,
    lambda grad_outputs, theta, *_: torch.empty_like(theta),
)


@_outputs_backward.backend("triton", refusal=_refusal)
def _(grad_outputs: Tensor, theta: Tensor, features: Tensor, mirror: Tensor | None, inr: Inr) -> Tensor:
    kernels = triton_kernels("inr_mixture")
    return _like(kernels.outputs_backward(grad_outputs, theta, features, mirror, *inr, triton_precision()), theta)


@_outputs_backward.backend("cpu")
def _(call: Any, grad_outputs: Tensor, theta: Tensor, features: Tensor, mirror: Tensor | None, inr: Inr) -> Tensor:
    dense = _dense(theta)
    grad_theta = torch.empty_like(dense)
    mixture = _mixture(dense, features, mirror, inr)
    call("inr_mixture_backward", mixture=mixture, grad_outputs=grad_outputs, grad_theta=grad_theta.data_ptr())
    return _like(grad_theta, theta)


@_outputs.gradient(saves=lambda *inputs_and_output: inputs_and_output[:-1], instead=_TWICE)
def _(saved: Saved, grad: Tensor) -> tuple[Tensor]:
    return (_outputs_backward(grad, *saved.values, backend=saved.backend),)


def inr_mixture_log_likelihood_reference(
    theta: Tensor,
    features: Tensor,
    values: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    mirror: Tensor | None,
    inr: Inr,
    kind: Likelihood,
) -> Tensor:
    """Plain torch: log-likelihoods [B, K, N], 0 outside the mask [B, N]."""
    features, values = _observed(features, values, mask)
    logits = inr_mixture_reference(theta, features, inr)
    log_p = log_likelihood(kind, logits, values[:, None], scale[:, None]).sum(-1)
    return log_p if mask is None else torch.where(mask[:, None], log_p, 0)


_log_likelihood = Op(
    "inr_mixture_log_likelihood(Tensor theta, Tensor features, Tensor values, Tensor scale, Tensor? mask, "
    "Tensor? mirror, Inr inr, Likelihood likelihood) -> Tensor",
    inr_mixture_log_likelihood_reference,
    lambda theta, features, *_: theta.new_empty(*theta.shape[:2], features.shape[-2]),
)


@_log_likelihood.backend("triton", limits=f"{_SIZES}; no gradients", refusal=_refusal)
def _(
    theta: Tensor, features: Tensor, values: Tensor, scale: Tensor, mask: Tensor | None, mirror: Tensor | None,
    inr: Inr, kind: Likelihood,
) -> Tensor:  # fmt: skip
    mirror = _observed_pairs(mirror, mask)
    features, values = _observed(features, values, mask)
    log_p: Tensor = triton_kernels("inr_mixture").log_likelihood(
        theta, features, values, scale, mirror, *inr, *kind, triton_precision()
    )
    return log_p if mask is None else torch.where(mask[:, None], log_p, 0)


@_log_likelihood.backend("cpu", limits="no gradients")
def _(
    call: Any, theta: Tensor, features: Tensor, values: Tensor, scale: Tensor, mask: Tensor | None,
    mirror: Tensor | None, inr: Inr, kind: Likelihood,
) -> Tensor:  # fmt: skip
    dense, log_p = _dense(theta), theta.new_empty(*theta.shape[:2], values.shape[1])
    mixture = _mixture(dense, features, mirror, inr, mask)
    call("inr_mixture_log_likelihood", mixture=mixture, likelihood=[*kind, scale], values=values, log_p=log_p)
    return log_p


def inr_mixture_expected_log_likelihood_reference(
    theta: Tensor,
    features: Tensor,
    values: Tensor,
    weights: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    mirror: Tensor | None,
    inr: Inr,
    kind: Likelihood,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plain torch, a few functions at a time: value, log-likelihoods, gradients to θ [B, K, P] and scale [B, K, C]."""
    features, values = _observed(features, values, mask)
    weights = weights if mask is None else torch.where(mask[:, None], weights, 0)
    widths = inr.widths
    batch, components, _ = theta.shape
    count, channels = values.shape[1:]
    log_p = theta.new_empty(batch, components, count)
    grad_theta = torch.empty_like(theta)
    grad_scale = theta.new_zeros(batch, components, channels)
    for part in _chunks(batch, components * count * sum(widths[1:])):
        here = features if features.dim() == 2 else features[part]
        layers, inputs, before, logits = _forward(theta[part], here, inr)
        log_p_c, by_logit, by_scale = log_likelihood_with_derivatives(
            kind, logits, values[part].mT[:, None], scale[..., None]
        )
        torch.sum(log_p_c, 2, out=log_p[part])
        q = weights[part][:, :, None]
        if by_scale is not None:
            grad_scale[part] = (q * by_scale).sum(-1)
        _backward_layers(layers, inputs, before, q * by_logit, unpack(grad_theta[part], widths), inr)
    log_p = log_p if mask is None else torch.where(mask[:, None], log_p, 0)
    return (weights * log_p).sum((1, 2)), log_p, grad_theta, grad_scale


def _empty_expected(
    theta: Tensor, features: Tensor, values: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, components = theta.shape[:2]
    count, channels = values.shape[1:]
    shapes = [batch], [batch, components, count], [batch, components, channels]
    value, log_p, grad_scale = (theta.new_empty(shape) for shape in shapes)
    return value, log_p, torch.empty_like(theta), grad_scale


_expected_log_likelihood = Op(
    "inr_mixture_expected_log_likelihood(Tensor theta, Tensor features, Tensor values, Tensor weights, Tensor scale, "
    "Tensor? mask, Tensor? mirror, Inr inr, Likelihood likelihood) "
    "-> (Tensor value, Tensor log_likelihood, Tensor grad_theta, Tensor grad_scale)",
    inr_mixture_expected_log_likelihood_reference,
    _empty_expected,
)


@_expected_log_likelihood.backend("triton", limits=f"{_SIZES}; {_SLOW}", refusal=_refusal)
def _(
    theta: Tensor, features: Tensor, values: Tensor, weights: Tensor, scale: Tensor, mask: Tensor | None,
    mirror: Tensor | None, inr: Inr, kind: Likelihood,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mirror = _observed_pairs(mirror, mask)
    features, values = _observed(features, values, mask)
    weights = weights if mask is None else torch.where(mask[:, None], weights, 0)
    value, log_p, grad_theta, grad_scale = triton_kernels("inr_mixture").expected_log_likelihood(
        theta, features, values, weights, scale, mirror, *inr, *kind, triton_precision()
    )
    log_p = log_p if mask is None else torch.where(mask[:, None], log_p, 0)
    return value, log_p, _like(grad_theta, theta), grad_scale


@_expected_log_likelihood.backend("cpu", limits=_SLOW)
def _(
    call: Any, theta: Tensor, features: Tensor, values: Tensor, weights: Tensor, scale: Tensor, mask: Tensor | None,
    mirror: Tensor | None, inr: Inr, kind: Likelihood,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    value, log_p, _, grad_scale = _empty_expected(theta, features, values)
    dense = _dense(theta)
    grad_theta = torch.empty_like(dense)
    call(
        "inr_mixture_expected_log_likelihood",
        mixture=_mixture(dense, features, mirror, inr, mask),
        likelihood=[*kind, scale],
        values=values,
        weights=weights,
        value=value,
        log_p=log_p,
        grad_theta=grad_theta.data_ptr(),
        grad_scale=grad_scale,
    )
    return value, log_p, _like(grad_theta, theta), grad_scale


@_expected_log_likelihood.gradient(saves=lambda *inputs_and_output: inputs_and_output[-1][1:], instead=_TWICE)
def _(saved: Saved, grad_value: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_value is None:
        return ()
    log_p, grad_theta, grad_scale = saved.values
    grad = grad_value[:, None, None]
    by_scale = (grad * grad_scale).sum(0) if saved.needed[4] else None
    by_theta, by_weights = (
        grad * each if need else None for each, need in ((grad_theta, saved.needed[0]), (log_p, saved.needed[3]))
    )
    return by_theta, None, None, by_weights, by_scale


def inr_mixture_mean_reference(
    theta: Tensor, features: Tensor, log_pi: Tensor, inr: Inr, likelihood: Likelihood
) -> tuple[Tensor, Tensor]:
    """Plain torch: mean of the mixture and of its most probable component [B, N, C]."""
    batch, components, _ = theta.shape
    count, channels = features.shape[-2], inr.widths[-1]
    mixed = theta.new_empty(batch, count, channels)
    mean_map = torch.empty_like(mixed)
    log_pi = log_pi.expand(-1, -1, count)
    for part in _chunks(count, batch * components * max(inr.widths[1:])):
        mixed[:, part], mean_map[:, part] = _mean(theta, features[..., part, :], log_pi[..., part], inr, likelihood)
    return mixed, mean_map


def _mean_reference(
    theta: Tensor, features: Tensor, log_pi: Tensor, mirror: Tensor | None, inr: Inr, kind: str
) -> tuple[Tensor, Tensor]:
    return inr_mixture_mean_reference(theta, features, log_pi, inr, Likelihood(kind))


def _mean(theta: Tensor, features: Tensor, log_pi: Tensor, inr: Inr, likelihood: Likelihood) -> tuple[Tensor, Tensor]:
    return _mix(inr_mixture_reference(theta, features, inr), log_pi, likelihood)


def _mix(outputs: Tensor, log_pi: Tensor, likelihood: Likelihood) -> tuple[Tensor, Tensor]:
    means = mean(likelihood, outputs)  # [B, K, N, C]
    best = log_pi.argmax(1)[:, None, :, None].expand(-1, 1, -1, means.shape[3])
    return (log_pi.exp()[..., None] * means).sum(1), means.gather(1, best)[:, 0]


def _empty_means(
    theta: Tensor, features: Tensor, log_pi: Tensor, mirror: Tensor | None, inr: Inr, kind: str
) -> tuple[Tensor, Tensor]:
    means = theta.new_empty(theta.shape[0], features.shape[-2], inr.widths[-1])
    return means, torch.empty_like(means)


def _plain_mean(
    theta: Tensor, features: Tensor, log_pi: Tensor, mirror: Tensor | None, inr: Inr, kind: str
) -> tuple[Tensor, Tensor]:
    """Of all points at once, whatever their number."""
    return _mean(theta, features, log_pi.expand(-1, -1, features.shape[-2]), inr, Likelihood(kind))


_mixed_mean = Op(
    "inr_mixture_mean(Tensor theta, Tensor features, Tensor log_pi, Tensor? mirror, Inr inr, str likelihood) "
    "-> (Tensor, Tensor)",
    _mean_reference,
    _empty_means,
    plain=_plain_mean,
)


@_mixed_mean.backend("triton", limits=_SIZES, refusal=_refusal)
def _(
    theta: Tensor, features: Tensor, log_pi: Tensor, mirror: Tensor | None, inr: Inr, kind: str
) -> tuple[Tensor, Tensor]:
    kernels = triton_kernels("inr_mixture")
    return kernels.mean(theta, features, log_pi, mirror, *inr, kind, triton_precision())  # type: ignore[no-any-return]


@_mixed_mean.backend("cpu")
def _(
    call: Any, theta: Tensor, features: Tensor, log_pi: Tensor, mirror: Tensor | None, inr: Inr, kind: str
) -> tuple[Tensor, Tensor]:
    dense = _dense(theta)
    means, means_map = _empty_means(theta, features, log_pi, mirror, inr, kind)
    call(
        "inr_mixture_mean",
        mixture=_mixture(dense, features, mirror, inr),
        likelihood=[*Likelihood(kind), None],
        log_pi=log_pi,
        uniform=log_pi.shape[2] == 1,
        mean=means,
        mean_map=means_map,
    )
    return means, means_map


def _observed(features: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Features and values with 0 at points that are not observed."""
    if mask is None:
        return features, values
    used = mask.any(0) if features.dim() == 2 else mask
    return torch.where(used[..., None], features, 0), torch.where(mask[..., None], values, 0)


def _observed_pairs(mirror: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The mirror without pairs of which one is never observed: `_observed` leaves nothing of its features."""
    if mirror is None or mask is None:
        return mirror
    used = mask.any(0)
    return torch.where(used & used[mirror.clamp(min=0)], mirror, -1)


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


def _chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of `count` items of `size` hidden values each."""
    step = max(1, _CHUNK // max(size, 1))
    return (slice(i, min(i + step, count)) for i in range(0, count, step))
