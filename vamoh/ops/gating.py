"""The networks that say which component explains a point, and the divergence between two of them.

A network is an MLP on [encoded coordinates, value, z] with LeakyReLU between its layers and a softmax over K
components. Its first layer is split: the coordinates' part (`coords`) is computed once per set of coordinates, z's part
(`shift`) once per function. Points come last in memory: [H, N] and [K, N].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vamoh._checks import FLOATING, check_tensor
from vamoh.ops._autocast import float32_under_autocast
from vamoh.ops._native import items, triton_kernels, triton_precision
from vamoh.ops._op import Op, Saved, require_reference
from vamoh.ops._points import check_mask


class Gate(NamedTuple):
    """Architecture of the layers after the first: widths (H, ..., K), LeakyReLU's slope, whether tanh bounds logits."""

    widths: tuple[int, ...]
    slope: float
    bounded: bool


@float32_under_autocast
def gating(
    coords: Tensor,
    shift: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    values: Tensor | None = None,
    value_weight: Tensor | None = None,
    *,
    slope: float,
    bounded: bool,
    twice: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Log-probabilities [B, K, N] of K components at N points, keeping no hidden layer; differentiable once.

    `twice` takes plain torch, which keeps every layer and has second derivatives.

    The first layer is coords + shift + value_weight · values: coords [H, N] or [B, H, N], shift [B, H] (z's part and
    the bias), values [B, N, C] with value_weight [H, C], or neither. weights ([O, I] each) and biases ([O]) are those
    of the layers after it, the last of K outputs. LeakyReLU of `slope` in [0, 1] stands between layers; `bounded`
    passes the logits through tanh. All tensors float32 or float64 of one dtype and device.
    Raises TypeError or ValueError naming the argument.
    """
    where = "gating"
    check_tensor(where, "shift", shift, ["B", "H"], dtypes=FLOATING)
    batch, hidden = shift.shape
    if not isinstance(coords, Tensor) or coords.dim() not in (2, 3):
        got = list(coords.shape) if isinstance(coords, Tensor) else type(coords).__name__
        raise ValueError(f"{where}: coords must have shape [{hidden}, N] or [{batch}, {hidden}, N], got {got}")
    check_tensor(where, "coords", coords, [*([batch] if coords.dim() == 3 else []), hidden, "N"], like=shift)
    if (values is None) != (value_weight is None):
        raise ValueError(f"{where}: values and value_weight must be given together")
    if values is not None:
        check_tensor(where, "values", values, [batch, coords.shape[-1], "C"], like=shift)
        check_tensor(where, "value_weight", value_weight, [hidden, values.shape[2]], like=shift)
    if len(weights) != len(biases):
        raise ValueError(f"{where}: biases must be as many as the {len(weights)} weights, got {len(biases)}")
    inputs = hidden
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_tensor(where, f"weights[{i}]", weight, ["O", inputs], like=shift)
        inputs = weight.shape[0]
        check_tensor(where, f"biases[{i}]", bias, [inputs], like=shift)
    if not 0 <= slope <= 1:
        raise ValueError(f"{where}: slope must be between 0 and 1, got {slope}")
    layers = [p.flatten() for layer in zip(weights, biases, strict=True) for p in layer]
    first = [] if value_weight is None else [value_weight.flatten()]
    parameters = torch.cat([*first, *layers]) if first or layers else shift.new_empty(0)
    gate = Gate((hidden, *(bias.shape[0] for bias in biases)), slope, bounded)
    coords = coords if coords.dim() == 3 else coords[None]
    if twice:
        require_reference(where, "second derivatives", backend)
        return gating_reference(coords, shift, values, parameters, gate)
    log_p: Tensor = _gating(coords, shift, values, parameters, gate, backend=backend)
    return log_p


@float32_under_autocast
def categorical_kl(
    log_q: Tensor, log_p: Tensor, mask: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """q = exp(log_q) [B, K, N], 0 at unobserved points, and Σ_n KL(q(c_n) ‖ p(c_n)) [B] in nats over observed points.

    log_q [B, K, N] and log_p [B, K, N] or [B, K, 1], float32 or float64 of one dtype and device; mask None (all
    observed), [N] or [B, N] bool. A component with q = 0 adds nothing, however small p or q is. Differentiable once in
    both. Raises TypeError or ValueError naming the argument.
    """
    where = "categorical_kl"
    check_tensor(where, "log_q", log_q, ["B", "K", "N"], dtypes=FLOATING)
    batch, components, count = log_q.shape
    points = 1 if isinstance(log_p, Tensor) and log_p.dim() == 3 and log_p.shape[2] == 1 else count
    check_tensor(where, "log_p", log_p, [batch, components, points], like=log_q)
    check_mask(where, mask, log_q.mT, batch)
    observed = None if mask is None else mask.expand(batch, -1)
    q, kl = _categorical_kl(log_q, log_p.expand_as(log_q), observed, backend=backend)
    return q, kl


def _split(parameters: Tensor, widths: Sequence[int], channels: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Weight [H, C] of the values, and weight and bias of every layer after the first."""
    shapes = [size for i, o in zip(widths[:-1], widths[1:], strict=True) for size in (o * i, o)]
    first, *rest = parameters.split([widths[0] * channels, *shapes])
    weights = [w.view(-1, i) for w, i in zip(rest[::2], widths[:-1], strict=True)]
    return first.view(widths[0], channels), list(zip(weights, rest[1::2], strict=True))


def _hidden(
    coords: Tensor, shift: Tensor, values: Tensor | None, parameters: Tensor, gate: Gate
) -> tuple[list[Tensor], Tensor]:
    """Inputs [B, I, N] of the layers after the first, and the output of the last."""
    value_weight, layers = _split(parameters, gate.widths, 0 if values is None else values.shape[2])
    h = coords + shift[:, :, None]  # [B, H, N]
    if values is not None:
        h = h + value_weight @ values.mT
    inputs = []
    for weight, bias in layers:
        inputs.append(F.leaky_relu(h, gate.slope))
        h = weight @ inputs[-1] + bias[:, None]
    return inputs, h


def gating_reference(
    coords: Tensor,
    shift: Tensor,
    values: Tensor | None,
    parameters: Tensor,
    gate: Gate,
) -> Tensor:
    """Plain torch: log-probabilities [B, K, N] from coords [B, H, N] or [1, H, N]."""
    _, h = _hidden(coords, shift, values, parameters, gate)
    return (h.tanh() if gate.bounded else h).log_softmax(1)


def gating_backward_reference(
    grad: Tensor,
    log_p: Tensor,
    coords: Tensor,
    shift: Tensor,
    values: Tensor | None,
    parameters: Tensor,
    gate: Gate,
    by_values: bool,
) -> tuple[Tensor, ...]:
    """Plain torch: gradients of coords, shift, values (empty unless asked for) and parameters."""
    inputs, h = _hidden(coords, shift, values, parameters, gate)
    value_weight, layers = _split(parameters, gate.widths, 0 if values is None else values.shape[2])
    d = grad - log_p.exp() * grad.sum(1, keepdim=True)
    if gate.bounded:
        d = d * (1 - h.tanh().square())
    grads: list[Tensor] = []
    for (weight, _), before in zip(reversed(layers), reversed(inputs), strict=True):
        grads = [(d @ before.mT).sum(0).flatten(), d.sum((0, 2)), *grads]
        d = weight.mT @ d
        d = torch.where(before > 0, d, gate.slope * d)
    if values is not None:
        grads = [(d @ values).sum(0).flatten(), *grads]
    grad_coords = d.sum(0, keepdim=True) if coords.shape[0] == 1 else d.contiguous()
    grad_values = d.mT @ value_weight if by_values else shift.new_empty(0)
    return grad_coords, d.sum(2), grad_values, torch.cat([shift.new_empty(0), *grads])


def _empty(coords: Tensor, shift: Tensor, values: Tensor | None, parameters: Tensor, gate: Gate) -> Tensor:
    return shift.new_empty(shift.shape[0], gate.widths[-1], coords.shape[2])


def _empty_grads(
    grad: Tensor,
    log_p: Tensor,
    coords: Tensor,
    shift: Tensor,
    values: Tensor | None,
    parameters: Tensor,
    gate: Gate,
    by_values: bool,
) -> tuple[Tensor, ...]:
    grad_values = shift.new_empty(values.shape if by_values and values is not None else 0)
    return coords.new_empty(coords.shape), shift.new_empty(shift.shape), grad_values, shift.new_empty(parameters.shape)


_NETWORK = "Tensor coords, Tensor shift, Tensor? values, Tensor parameters, Gate gate"
_gating = Op(f"gating({_NETWORK}) -> Tensor", gating_reference, _empty)
_gating_backward = _gating.derivative(
    f"gating_backward(Tensor grad, Tensor log_p, {_NETWORK}, bool by_values) "
    "-> (Tensor grad_coords, Tensor grad_shift, Tensor grad_values, Tensor grad_parameters)",
    gating_backward_reference,
    _empty_grads,
)


def _refusal(*arguments: Any) -> str | None:
    gate = next(each for each in arguments if isinstance(each, Gate))
    return triton_kernels("gating_plan").refusal(gate.widths)  # type: ignore[no-any-return]


@_gating.backend("triton", limits="at most 64 components", refusal=_refusal)
def _(coords: Tensor, shift: Tensor, values: Tensor | None, parameters: Tensor, gate: Gate) -> Tensor:
    kernels = triton_kernels("gating")
    return kernels.gating(coords, shift, values, parameters, *gate, triton_precision())  # type: ignore[no-any-return]


@_gating_backward.backend("triton", refusal=_refusal)
def _(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, gate, by_values = arguments
    kernels = triton_kernels("gating")
    return kernels.gating_backward(*tensors, *gate, by_values, triton_precision())  # type: ignore[no-any-return]


@_gating.backend("cpu")
def _(call: Any, coords: Tensor, shift: Tensor, values: Tensor | None, parameters: Tensor, gate: Gate) -> Tensor:
    log_p = _empty(coords, shift, values, parameters, gate)
    call("gating", net=_net(coords, shift, values, parameters, gate), log_p=log_p)
    return log_p


@_gating_backward.backend("cpu")
def _(call: Any, grad: Tensor, log_p: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *network, by_values = rest
    grads = grad_coords, grad_shift, grad_values, grad_parameters = _empty_grads(grad, log_p, *rest)
    wanted = [grad_coords, grad_shift, grad_values if by_values else None, grad_parameters]
    call("gating_backward", net=_net(*network), log_p=log_p, grad=grad, grads=wanted)
    return grads


def _net(coords: Tensor, shift: Tensor, values: Tensor | None, parameters: Tensor, gate: Gate) -> list[Any]:
    """GatingNet of csrc/gating.h."""
    channels = 0 if values is None else values.shape[2]
    sizes = (shift.shape[0], coords.shape[2], channels)
    return [coords, coords.shape[0] == 1, shift, values, parameters, gate.widths, *sizes, gate.slope, gate.bounded]


@_gating.gradient(saves=lambda *network_and_log_p: network_and_log_p)
def _(saved: Saved, grad: Tensor) -> tuple[Tensor, ...]:
    *network, log_p = saved.values
    return _gating_backward(grad, log_p, *network, saved.needed[2], backend=saved.backend)  # type: ignore[no-any-return]


def categorical_kl_reference(log_q: Tensor, log_p: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Plain torch: q [B, K, N] and the divergence [B] from log-probabilities [B, K, N] and mask [B, N]."""
    q = log_q.exp() if mask is None else torch.where(mask[:, None], log_q.exp(), 0)
    return q, torch.where(q == 0, 0, q * (log_q - log_p)).sum((1, 2))


def categorical_kl_backward_reference(
    grad_q: Tensor, grad_kl: Tensor, q: Tensor, log_q: Tensor, log_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Plain torch: gradients [B, K, N] of both log-probabilities."""
    grad_kl = grad_kl[:, None, None]
    grad_log_q = torch.where(q == 0, 0, q * (grad_q + grad_kl * (log_q - log_p + 1)))
    return grad_log_q, -grad_kl * q


def _empty_kl(log_q: Tensor, log_p: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return log_q.new_empty(log_q.shape), log_q.new_empty(log_q.shape[0])


def _empty_kl_grads(grad_q: Tensor, grad_kl: Tensor, q: Tensor, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape)


_categorical_kl = Op(
    "categorical_kl(Tensor log_q, Tensor log_p, Tensor? mask) -> (Tensor q, Tensor kl)",
    categorical_kl_reference,
    _empty_kl,
)
_categorical_kl_backward = _categorical_kl.derivative(
    "categorical_kl_backward(Tensor grad_q, Tensor grad_kl, Tensor q, Tensor log_q, Tensor log_p) "
    "-> (Tensor grad_log_q, Tensor grad_log_p)",
    categorical_kl_backward_reference,
    _empty_kl_grads,
)


@_categorical_kl.backend("triton")
def _(log_q: Tensor, log_p: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return triton_kernels("gating").categorical_kl(log_q, log_p, mask)  # type: ignore[no-any-return]


@_categorical_kl_backward.backend("triton")
def _(grad_q: Tensor, grad_kl: Tensor, q: Tensor, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    kernels = triton_kernels("gating")
    return kernels.categorical_kl_backward(grad_q, grad_kl, q, log_q, log_p)  # type: ignore[no-any-return]


@_categorical_kl.backend("cpu")
def _(call: Any, log_q: Tensor, log_p: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    q, kl = _empty_kl(log_q, log_p, mask)
    mask, mask_stride = items(mask)
    call("categorical_kl", mask=mask, mask_stride=mask_stride, q=q, kl=kl, **_divergence(log_q, log_p))
    return q, kl


@_categorical_kl_backward.backend("cpu")
def _(call: Any, grad_q: Tensor, grad_kl: Tensor, q: Tensor, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    grad_log_q, grad_log_p = _empty_kl_grads(grad_q, grad_kl, q, log_q, log_p)
    call(
        "categorical_kl_backward",
        grad_q=grad_q,
        grad_kl=grad_kl,
        q=q,
        grad_log_q=grad_log_q,
        grad_log_p=grad_log_p,
        **_divergence(log_q, log_p),
    )
    return grad_log_q, grad_log_p


def _divergence(log_q: Tensor, log_p: Tensor) -> dict[str, Any]:
    """What both kernels take; `uniform` says that log_p is one column, [B, K, 1]."""
    batch, components, count = log_q.shape
    uniform = count > 1 and log_p.stride(2) == 0
    sizes = {"batch": batch, "components": components, "count": count}
    return {"log_q": log_q, "log_p": log_p[:, :, :1] if uniform else log_p, "uniform": uniform, **sizes}


@_categorical_kl.gradient(saves=lambda log_q, log_p, mask, out: (out[0], log_q, log_p))
def _(saved: Saved, grad_q: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor, Tensor]:
    q, log_q, log_p = saved.values
    grad_q = torch.zeros_like(q) if grad_q is None else grad_q
    grad_kl = q.new_zeros(len(q)) if grad_kl is None else grad_kl
    return _categorical_kl_backward(grad_q, grad_kl, q, log_q, log_p, backend=saved.backend)  # type: ignore[no-any-return]
