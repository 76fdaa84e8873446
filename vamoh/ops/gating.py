"""The networks that say which component explains a point, and the divergence between two of them.

A network is an MLP on [encoded coordinates, value, z] with LeakyReLU between its layers and a softmax over K
components. Its first layer is split: the coordinates' part (`gating_coords`) is computed once per set of coordinates,
z's part (`shift`) once per function. Points come last in memory: [H, N] and [K, N].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vamoh._checks import FLOATING, check_tensor
from vamoh.ops._backend import (
    float32_under_autocast,
    items,
    native,
    native_isa,
    native_unavailable,
    refuse_second_derivatives,
    register,
    register_plain,
    require_reference,
    resolve,
    triton_kernels,
    triton_precision,
    triton_unavailable,
)
from vamoh.ops._points import check_mask

Context = torch.autograd.function.FunctionCtx


@float32_under_autocast
def gating_coords(
    encoded: Tensor, weights: Sequence[Tensor], *, twice: bool = False, backend: str | None = None
) -> list[Tensor]:
    """What the coordinates add to the first layers of networks: weights[i] · encoded, [H, N] or [B, H, N] for each.

    encoded [N, E] or [B, N, E] and weights [H, E] (H of each network), float32 or float64 of one dtype and device;
    differentiable once, or `twice` by plain torch. Networks that are given together share the reading of `encoded`.
    Raises TypeError or ValueError naming the argument.
    """
    where = "gating_coords"
    if not isinstance(encoded, Tensor) or encoded.dim() not in (2, 3):
        got = list(encoded.shape) if isinstance(encoded, Tensor) else type(encoded).__name__
        raise ValueError(f"{where}: encoded must have shape [N, E] or [B, N, E], got {got}")
    check_tensor(where, "encoded", encoded, [None] * encoded.dim(), dtypes=FLOATING)
    for i, weight in enumerate(weights):
        check_tensor(where, f"weights[{i}]", weight, ["H", encoded.shape[-1]], like=encoded)
    if twice:
        require_reference(where, "second derivatives", backend)
        return [weight @ encoded.mT for weight in weights]
    batched = encoded if encoded.dim() == 3 else encoded[None]
    parts: list[Tensor] = torch.ops.vamoh.gating_coords(batched, list(weights), backend)
    return parts if encoded.dim() == 3 else [part.squeeze(0) for part in parts]


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
    coords = coords if coords.dim() == 3 else coords[None]
    widths = [hidden, *(bias.shape[0] for bias in biases)]
    if twice:
        require_reference(where, "second derivatives", backend)
        return gating_reference(coords, shift, values, parameters, widths, slope, bounded)
    log_p: Tensor = torch.ops.vamoh.gating(coords, shift, values, parameters, widths, slope, bounded, backend)
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
    q, kl = torch.ops.vamoh.categorical_kl(log_q, log_p.expand_as(log_q), observed, backend)
    return q, kl


torch.library.define("vamoh::gating_coords", "(Tensor encoded, Tensor[] weights, str? backend) -> Tensor[]")
torch.library.define(
    "vamoh::gating_coords_backward", "(Tensor[] grads, Tensor encoded, Tensor[] weights, str? backend) -> Tensor[]"
)


@torch.library.register_fake("vamoh::gating_coords")
def _coords_fake(encoded: Tensor, weights: list[Tensor], backend: str | None) -> list[Tensor]:
    return [encoded.new_empty(encoded.shape[0], w.shape[0], encoded.shape[1]) for w in weights]


@torch.library.register_fake("vamoh::gating_coords_backward")
def _coords_backward_fake(
    grads: list[Tensor], encoded: Tensor, weights: list[Tensor], backend: str | None
) -> list[Tensor]:
    return [w.new_empty(w.shape) for w in weights]


@torch.library.impl("vamoh::gating_coords", "CompositeExplicitAutograd")
def _coords_run(encoded: Tensor, weights: list[Tensor], backend: str | None) -> list[Tensor]:
    chosen = resolve("gating_coords", encoded.device, encoded.dtype, backend)
    if chosen == "reference":
        return [w @ encoded.mT for w in weights]
    if chosen == "triton":
        return triton_kernels("gating").coords(encoded, weights, triton_precision())  # type: ignore[no-any-return]
    encoded, weights = encoded.contiguous(), [w.contiguous() for w in weights]
    parts = [encoded.new_empty(encoded.shape[0], w.shape[0], encoded.shape[1]) for w in weights]
    native().gating_coords(
        weights=[w.data_ptr() for w in weights],
        parts=[part.data_ptr() for part in parts],
        **_coords_arguments(encoded, weights),
    )
    return parts


@torch.library.impl("vamoh::gating_coords_backward", "CompositeExplicitAutograd")
def _coords_backward_run(
    grads: list[Tensor], encoded: Tensor, weights: list[Tensor], backend: str | None
) -> list[Tensor]:
    chosen = resolve("gating_coords", encoded.device, encoded.dtype, backend)
    if chosen == "reference":
        return [(grad @ encoded).sum(0) for grad in grads]
    if chosen == "triton":
        return triton_kernels("gating").coords_backward(  # type: ignore[no-any-return]
            grads, encoded, weights, triton_precision()
        )
    grads, encoded = [grad.contiguous() for grad in grads], encoded.contiguous()
    grad_weights = [w.new_empty(w.shape) for w in weights]
    native().gating_coords_backward(
        grads=[grad.data_ptr() for grad in grads],
        grad_weights=[w.data_ptr() for w in grad_weights],
        **_coords_arguments(encoded, weights),
    )
    return grad_weights


def _coords_arguments(encoded: Tensor, weights: list[Tensor]) -> dict[str, object]:
    return {
        "encoded": encoded.data_ptr(),
        "hidden": [w.shape[0] for w in weights],
        "batch": encoded.shape[0],
        "count": encoded.shape[1],
        "inputs": encoded.shape[2],
        "threads": torch.get_num_threads(),
        "isa": native_isa(),
    }


def _coords_setup(ctx: Context, inputs: tuple[Tensor, list[Tensor], str | None], output: list[Tensor]) -> None:
    encoded, weights, backend = inputs
    ctx.save_for_backward(encoded, *weights)
    ctx.backend = backend  # type: ignore[attr-defined]


@float32_under_autocast
def _coords_backward(ctx: Context, grads: list[Tensor]) -> tuple[object, ...]:
    refuse_second_derivatives("gating_coords")
    encoded, *weights = ctx.saved_tensors  # type: ignore[attr-defined]
    by_encoded = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        by_encoded = sum(grad.mT @ weight for grad, weight in zip(grads, weights, strict=True))
    by_weights = torch.ops.vamoh.gating_coords_backward(grads, encoded, weights, ctx.backend)  # type: ignore[attr-defined]
    return by_encoded, by_weights, None


torch.library.register_autograd("vamoh::gating_coords", _coords_backward, setup_context=_coords_setup)


# parameters is [value_weight, weights[0], biases[0], weights[1], ...] in one row
_NETWORK = "Tensor coords, Tensor shift, Tensor? values, Tensor parameters, int[] widths, float slope, bool bounded, "
torch.library.define("vamoh::gating", f"({_NETWORK}str? backend) -> Tensor")
torch.library.define(
    "vamoh::gating_backward",
    f"(Tensor grad, Tensor log_p, {_NETWORK}bool by_values, str? backend) "
    "-> (Tensor grad_coords, Tensor grad_shift, Tensor grad_values, Tensor grad_parameters)",
)


@torch.library.register_fake("vamoh::gating")
def _fake(
    coords: Tensor,
    shift: Tensor,
    values: Tensor | None,
    parameters: Tensor,
    widths: Sequence[int],
    slope: float,
    bounded: bool,
    backend: str | None,
) -> Tensor:
    return _empty_log_p(coords, shift, widths)


@torch.library.register_fake("vamoh::gating_backward")
def _backward_fake(
    grad: Tensor,
    log_p: Tensor,
    coords: Tensor,
    shift: Tensor,
    values: Tensor | None,
    parameters: Tensor,
    widths: Sequence[int],
    slope: float,
    bounded: bool,
    by_values: bool,
    backend: str | None,
) -> tuple[Tensor, ...]:
    return _empty_grads(coords, shift, values, parameters, by_values)


def _empty_log_p(coords: Tensor, shift: Tensor, widths: Sequence[int]) -> Tensor:
    return shift.new_empty(shift.shape[0], widths[-1], coords.shape[2])


def _empty_grads(
    coords: Tensor, shift: Tensor, values: Tensor | None, parameters: Tensor, by_values: bool
) -> tuple[Tensor, ...]:
    by_value = shift.new_empty(values.shape if by_values and values is not None else 0)
    return coords.new_empty(coords.shape), shift.new_empty(shift.shape), by_value, shift.new_empty(parameters.shape)


@torch.library.impl("vamoh::gating", "CompositeExplicitAutograd")
def _run(
    coords: Tensor,
    shift: Tensor,
    values: Tensor | None,
    parameters: Tensor,
    widths: Sequence[int],
    slope: float,
    bounded: bool,
    backend: str | None,
) -> Tensor:
    chosen = _resolve(shift, widths, backend)
    if chosen == "reference":
        return gating_reference(coords, shift, values, parameters, widths, slope, bounded)
    if chosen == "triton":
        return triton_kernels("gating").gating(  # type: ignore[no-any-return]
            coords, shift, values, parameters, widths, slope, bounded, triton_precision()
        )
    coords, shift, parameters = coords.contiguous(), shift.contiguous(), parameters.contiguous()
    values = None if values is None else values.contiguous()
    log_p = _empty_log_p(coords, shift, widths)
    native().gating(log_p=log_p.data_ptr(), **_arguments(coords, shift, values, parameters, widths, slope, bounded))
    return log_p


@torch.library.impl("vamoh::gating_backward", "CompositeExplicitAutograd")
def _backward_run(
    grad: Tensor,
    log_p: Tensor,
    coords: Tensor,
    shift: Tensor,
    values: Tensor | None,
    parameters: Tensor,
    widths: Sequence[int],
    slope: float,
    bounded: bool,
    by_values: bool,
    backend: str | None,
) -> tuple[Tensor, ...]:
    chosen = _resolve(shift, widths, backend)
    if chosen == "reference":
        return gating_backward_reference(
            grad, log_p, coords, shift, values, parameters, widths, slope, bounded, by_values
        )
    if chosen == "triton":
        return triton_kernels("gating").gating_backward(  # type: ignore[no-any-return]
            grad, log_p, coords, shift, values, parameters, widths, slope, bounded, by_values, triton_precision()
        )
    coords, shift, parameters = coords.contiguous(), shift.contiguous(), parameters.contiguous()
    values = None if values is None else values.contiguous()
    grad, log_p = grad.contiguous(), log_p.contiguous()
    grads = _empty_grads(coords, shift, values, parameters, by_values)
    native().gating_backward(
        grad=grad.data_ptr(),
        log_p=log_p.data_ptr(),
        grad_coords=grads[0].data_ptr(),
        grad_shift=grads[1].data_ptr(),
        grad_values=grads[2].data_ptr() if by_values else 0,
        grad_parameters=grads[3].data_ptr(),
        **_arguments(coords, shift, values, parameters, widths, slope, bounded),
    )
    return grads


def _resolve(shift: Tensor, widths: Sequence[int], backend: str | None) -> str:
    def refusal(name: str) -> str | None:
        return triton_kernels("gating_plan").refusal(widths) if name == "triton" else None

    return resolve("gating", shift.device, shift.dtype, backend, refusal)


def _arguments(
    coords: Tensor,
    shift: Tensor,
    values: Tensor | None,
    parameters: Tensor,
    widths: Sequence[int],
    slope: float,
    bounded: bool,
) -> dict[str, object]:
    net = native().GatingNet(
        coords=coords.data_ptr(),
        shared=coords.shape[0] == 1,
        shift=shift.data_ptr(),
        values=0 if values is None else values.data_ptr(),
        parameters=parameters.data_ptr(),
        widths=widths,
        batch=shift.shape[0],
        count=coords.shape[2],
        channels=0 if values is None else values.shape[2],
        slope=slope,
        bounded=bounded,
    )
    return {"net": net, "threads": torch.get_num_threads(), "isa": native_isa()}


def _setup(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    coords, shift, values, parameters, *rest = inputs
    ctx.save_for_backward(output, coords, shift, values, parameters)
    ctx.rest = rest  # type: ignore[attr-defined]


@float32_under_autocast
def _backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivatives("gating")
    *rest, backend = ctx.rest  # type: ignore[attr-defined]
    by_values = ctx.needs_input_grad[2]  # type: ignore[attr-defined]
    grad_coords, grad_shift, grad_values, grad_parameters = torch.ops.vamoh.gating_backward(
        grad,
        *ctx.saved_tensors,  # type: ignore[attr-defined]
        *rest,
        by_values,
        backend,
    )
    return grad_coords, grad_shift, grad_values if by_values else None, grad_parameters, *(None,) * 4


torch.library.register_autograd("vamoh::gating", _backward, setup_context=_setup)


def _split(parameters: Tensor, widths: Sequence[int], channels: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Weight [H, C] of the values, and weight and bias of every layer after the first."""
    shapes = [size for i, o in zip(widths[:-1], widths[1:], strict=True) for size in (o * i, o)]
    first, *rest = parameters.split([widths[0] * channels, *shapes])
    weights = [w.view(-1, i) for w, i in zip(rest[::2], widths[:-1], strict=True)]
    return first.view(widths[0], channels), list(zip(weights, rest[1::2], strict=True))


def _hidden(
    coords: Tensor, shift: Tensor, values: Tensor | None, parameters: Tensor, widths: Sequence[int], slope: float
) -> tuple[list[Tensor], Tensor]:
    """Inputs [B, I, N] of the layers after the first, and the output of the last."""
    value_weight, layers = _split(parameters, widths, 0 if values is None else values.shape[2])
    h = coords + shift[:, :, None]  # [B, H, N]
    if values is not None:
        h = h + value_weight @ values.mT
    inputs = []
    for weight, bias in layers:
        inputs.append(F.leaky_relu(h, slope))
        h = weight @ inputs[-1] + bias[:, None]
    return inputs, h


def gating_reference(
    coords: Tensor,
    shift: Tensor,
    values: Tensor | None,
    parameters: Tensor,
    widths: Sequence[int],
    slope: float,
    bounded: bool,
) -> Tensor:
    """Plain torch: log-probabilities [B, K, N] from coords [B, H, N] or [1, H, N]."""
    _, h = _hidden(coords, shift, values, parameters, widths, slope)
    return (h.tanh() if bounded else h).log_softmax(1)


register_plain("gating_coords", lambda encoded, weights, backend: [w @ encoded.mT for w in weights])
register_plain("gating", lambda *arguments: gating_reference(*arguments[:-1]))


def gating_backward_reference(
    grad: Tensor,
    log_p: Tensor,
    coords: Tensor,
    shift: Tensor,
    values: Tensor | None,
    parameters: Tensor,
    widths: Sequence[int],
    slope: float,
    bounded: bool,
    by_values: bool,
) -> tuple[Tensor, ...]:
    """Plain torch: gradients of coords, shift, values (empty unless asked for) and parameters."""
    inputs, h = _hidden(coords, shift, values, parameters, widths, slope)
    value_weight, layers = _split(parameters, widths, 0 if values is None else values.shape[2])
    d = grad - log_p.exp() * grad.sum(1, keepdim=True)
    if bounded:
        d = d * (1 - h.tanh().square())
    grads: list[Tensor] = []
    for (weight, _), before in zip(reversed(layers), reversed(inputs), strict=True):
        grads = [(d @ before.mT).sum(0).flatten(), d.sum((0, 2)), *grads]
        d = weight.mT @ d
        d = torch.where(before > 0, d, slope * d)
    if values is not None:
        grads = [(d @ values).sum(0).flatten(), *grads]
    grad_coords = d.sum(0, keepdim=True) if coords.shape[0] == 1 else d.contiguous()
    grad_values = d.mT @ value_weight if by_values else shift.new_empty(0)
    return grad_coords, d.sum(2), grad_values, torch.cat([shift.new_empty(0), *grads])


torch.library.define(
    "vamoh::categorical_kl", "(Tensor log_q, Tensor log_p, Tensor? mask, str? backend) -> (Tensor q, Tensor kl)"
)
torch.library.define(
    "vamoh::categorical_kl_backward",
    "(Tensor grad_q, Tensor grad_kl, Tensor q, Tensor log_q, Tensor log_p, str? backend) "
    "-> (Tensor grad_log_q, Tensor grad_log_p)",
)


@torch.library.register_fake("vamoh::categorical_kl")
def _kl_fake(log_q: Tensor, log_p: Tensor, mask: Tensor | None, backend: str | None) -> tuple[Tensor, Tensor]:
    return log_q.new_empty(log_q.shape), log_q.new_empty(log_q.shape[0])


@torch.library.register_fake("vamoh::categorical_kl_backward")
def _kl_backward_fake(
    grad_q: Tensor, grad_kl: Tensor, q: Tensor, log_q: Tensor, log_p: Tensor, backend: str | None
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape)


@torch.library.impl("vamoh::categorical_kl", "CompositeExplicitAutograd")
def _kl_run(log_q: Tensor, log_p: Tensor, mask: Tensor | None, backend: str | None) -> tuple[Tensor, Tensor]:
    chosen = resolve("categorical_kl", log_q.device, log_q.dtype, backend)
    if chosen == "reference":
        return categorical_kl_reference(log_q, log_p, mask)
    if chosen == "triton":
        return triton_kernels("gating").categorical_kl(log_q, log_p, mask)  # type: ignore[no-any-return]
    q, kl = log_q.new_empty(log_q.shape), log_q.new_empty(log_q.shape[0])
    log_q, log_p, uniform = _kl_contiguous(log_q, log_p)
    mask, mask_step = (None, 0) if mask is None else items(mask)
    native().categorical_kl(
        mask=0 if mask is None else mask.data_ptr(),
        mask_step=mask_step,
        q=q.data_ptr(),
        kl=kl.data_ptr(),
        **_kl_arguments(log_q, log_p, uniform),
    )
    return q, kl


@torch.library.impl("vamoh::categorical_kl_backward", "CompositeExplicitAutograd")
def _kl_backward_run(
    grad_q: Tensor, grad_kl: Tensor, q: Tensor, log_q: Tensor, log_p: Tensor, backend: str | None
) -> tuple[Tensor, Tensor]:
    chosen = resolve("categorical_kl", log_q.device, log_q.dtype, backend)
    if chosen == "reference":
        return categorical_kl_backward_reference(grad_q, grad_kl, q, log_q, log_p)
    if chosen == "triton":
        return triton_kernels("gating").categorical_kl_backward(  # type: ignore[no-any-return]
            grad_q, grad_kl, q, log_q, log_p
        )
    grads = q.new_empty(q.shape), q.new_empty(q.shape)
    log_q, log_p, uniform = _kl_contiguous(log_q, log_p)
    grad_q, grad_kl, q = grad_q.contiguous(), grad_kl.contiguous(), q.contiguous()
    native().categorical_kl_backward(
        grad_q=grad_q.data_ptr(),
        grad_kl=grad_kl.data_ptr(),
        q=q.data_ptr(),
        grad_log_q=grads[0].data_ptr(),
        grad_log_p=grads[1].data_ptr(),
        **_kl_arguments(log_q, log_p, uniform),
    )
    return grads


def _kl_contiguous(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Both in memory of their own; the last says that log_p is one column, [B, K, 1]."""
    uniform = log_q.shape[2] > 1 and log_p.stride(2) == 0
    return log_q.contiguous(), (log_p[:, :, :1] if uniform else log_p).contiguous(), uniform


def _kl_arguments(log_q: Tensor, log_p: Tensor, uniform: bool) -> dict[str, object]:
    batch, components, count = log_q.shape
    return {
        "log_q": log_q.data_ptr(),
        "log_p": log_p.data_ptr(),
        "uniform": uniform,
        "batch": batch,
        "components": components,
        "count": count,
        "threads": torch.get_num_threads(),
        "isa": native_isa(),
    }


def _kl_setup(
    ctx: Context, inputs: tuple[Tensor, Tensor, Tensor | None, str | None], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(output[0], *inputs[:2])
    ctx.backend = inputs[3]  # type: ignore[attr-defined]


@float32_under_autocast
def _kl_backward(ctx: Context, grad_q: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivatives("categorical_kl")
    grads = torch.ops.vamoh.categorical_kl_backward(grad_q, grad_kl, *ctx.saved_tensors, ctx.backend)  # type: ignore[attr-defined]
    return (*grads, None, None)


torch.library.register_autograd("vamoh::categorical_kl", _kl_backward, setup_context=_kl_setup)


def categorical_kl_reference(log_q: Tensor, log_p: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Plain torch: q [B, K, N] and the divergence [B] from log-probabilities [B, K, N] and mask [B, N]."""
    q = log_q.exp() if mask is None else torch.where(mask[:, None], log_q.exp(), 0)
    return q, torch.where(q == 0, 0, q * (log_q - log_p)).sum((1, 2))


def categorical_kl_backward_reference(
    grad_q: Tensor, grad_kl: Tensor, q: Tensor, log_q: Tensor, log_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Plain torch: gradients [B, K, N] of both log-probabilities."""
    by_kl = grad_kl[:, None, None]
    by_log_q = torch.where(q == 0, 0, q * (grad_q + by_kl * (log_q - log_p + 1)))
    return by_log_q, -by_kl * q


for _op, _limits in (("gating_coords", ""), ("gating", "at most 64 components"), ("categorical_kl", "")):
    register(_op, "triton", devices=["cuda"], dtypes=[torch.float32], unavailable=triton_unavailable, limits=_limits)
    register(_op, "cpu", devices=["cpu"], dtypes=[torch.float32], unavailable=native_unavailable)
    register(_op, "reference")
