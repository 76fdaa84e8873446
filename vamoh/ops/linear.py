"""Linear layers in groups: G weight matrices at once, each with its own rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vamoh._checks import FLOATING, check_tensor
from vamoh.ops._autocast import under_autocast
from vamoh.ops._memory import empty_gradient
from vamoh.ops._op import Op, Saved, require_reference

AUTOCAST = (*FLOATING, torch.bfloat16, torch.float16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str | None = None) -> Tensor:
    """x weightᵀ + bias [G, M, O] for every group; in memory the groups of a row m lie side by side, [M, G, O].

    x [G, M, I], weight [G, O, I], bias [G, O] or None, float32 or float64 of one dtype and device. Groups may share
    their x by `expand`. Differentiable once in all three.

    Under torch.autocast it is torch's linear layer: half precision may come in, and comes out, contiguous.
    Raises TypeError or ValueError naming the argument.
    """
    where = "linear"
    autocast = isinstance(x, Tensor) and under_autocast(x)
    check_tensor(where, "x", x, ("G", "M", "I"), dtypes=AUTOCAST if autocast else FLOATING)
    groups, _, size = x.shape
    like = None if autocast else x
    check_tensor(where, "weight", weight, (groups, "O", size), like=like)
    if bias is not None:
        check_tensor(where, "bias", bias, (groups, weight.shape[1]), like=like)
    if autocast:
        require_reference(where, "autocast", backend)
        return linear_reference(x, weight, bias)
    result: Tensor = _linear(x, weight, bias, backend=backend)
    return result


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Plain torch: [G, M, O]."""
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)


def _empty(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    groups, rows, _ = x.shape
    outputs = weight.shape[1]
    return x.new_empty_strided((groups, rows, outputs), (outputs, groups * outputs, 1))


def _reference(*arguments: Any) -> Tensor:
    return _empty(*arguments).copy_(linear_reference(*arguments))


def _empty_grads(grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]) -> list[Tensor]:
    """Gradients of x, weight and bias; those that are not needed are empty."""
    shapes = (x.shape, weight.shape, weight.shape[:2])
    return [x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needed, strict=True)]


def _grads(grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]) -> list[Tensor]:
    grad_x, _, grad_bias = _empty_grads(grad, x, weight, [needed[0], False, needed[2]])
    return [grad_x, empty_gradient(weight) if needed[1] else x.new_empty(0), grad_bias]


def _backward_reference(grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]) -> tuple[Tensor, ...]:
    grad_x, grad_weight, grad_bias = _grads(grad, x, weight, needed)
    if needed[0]:
        torch.bmm(grad, weight, out=grad_x)
    if needed[1]:
        torch.bmm(grad.mT, x, out=grad_weight)
    if needed[2]:
        torch.sum(grad, 1, out=grad_bias)
    return grad_x, grad_weight, grad_bias


_linear = Op("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _reference, _empty, plain=linear_reference)
_linear_backward = _linear.derivative(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, bool[] needed) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _backward_reference,
    _empty_grads,
)


@_linear.backend("cpu")
def _(call: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = _empty(x, weight, bias)
    call("linear", x=x, weight=weight, bias=bias, out=out)
    return out


@_linear_backward.backend("cpu")
def _(call: Any, grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]) -> tuple[Tensor, ...]:
    grad_x, grad_weight, grad_bias = _grads(grad, x, weight, needed)
    if needed[0]:
        call("linear_grad_x", grad=grad, weight=weight, grad_x=grad_x)
    if needed[1] or needed[2]:
        wanted = (grad_weight if needed[1] else None, grad_bias if needed[2] else None)
        call("linear_grad_weight", grad=grad, x=x, grad_weight=wanted[0], grad_bias=wanted[1])
    return grad_x, grad_weight, grad_bias


@_linear.gradient(saves=lambda x, weight, bias, out: (x, weight))
def _(saved: Saved, grad: Tensor) -> tuple[Tensor, ...]:
    return _linear_backward(grad, *saved.values, list(saved.needed[:3]), backend=saved.backend)  # type: ignore[no-any-return]
