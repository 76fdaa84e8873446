"""Linear layers in groups: G weight matrices at once, each with its own rows."""

from __future__ import annotations

import torch
from torch import Tensor

from vamoh._checks import FLOATING, check_tensor
from vamoh.ops._backend import (
    float32_under_autocast,
    native,
    native_isa,
    native_unavailable,
    refuse_second_derivatives,
    register,
    register_plain,
    require_reference,
    resolve,
    under_autocast,
)
from vamoh.ops._memory import empty_gradient

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
    check_tensor(where, "x", x, ["G", "M", "I"], dtypes=AUTOCAST if autocast else FLOATING)
    groups, _, size = x.shape
    like = None if autocast else x
    check_tensor(where, "weight", weight, [groups, "O", size], like=like)
    if bias is not None:
        check_tensor(where, "bias", bias, [groups, weight.shape[1]], like=like)
    if autocast:
        require_reference(where, "autocast", backend)
        return linear_reference(x, weight, bias)
    result: Tensor = torch.ops.vamoh.linear(x, weight, bias, backend)
    return result


torch.library.define("vamoh::linear", "(Tensor x, Tensor weight, Tensor? bias, str? backend) -> Tensor")
torch.library.define(
    "vamoh::linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, bool[] needed, str? backend) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
)


@torch.library.register_fake("vamoh::linear")
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    return x.new_empty(x.shape[1], x.shape[0], weight.shape[1]).transpose(0, 1)


@torch.library.register_fake("vamoh::linear_backward")
def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool], backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:2])
    by_x, by_weight, by_bias = (x.new_empty(s if n else (0,)) for s, n in zip(shapes, needed, strict=True))
    return by_x, by_weight, by_bias


@torch.library.impl("vamoh::linear", "CompositeExplicitAutograd")
def _run(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    out = torch.empty(x.shape[1], x.shape[0], weight.shape[1], dtype=x.dtype, device=x.device).transpose(0, 1)
    if resolve("linear", x.device, x.dtype, backend) == "reference":
        return out.copy_(linear_reference(x, weight, bias))
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    native().linear(
        x=x.data_ptr(),
        x_at=x.stride(),
        weight=weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        out_at=out.stride(),
        sizes=(*x.shape, weight.shape[1]),
        threads=torch.get_num_threads(),
        isa=native_isa(),
    )
    return out


@torch.library.impl("vamoh::linear_backward", "CompositeExplicitAutograd")
def _run_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool], backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    by_x = x.new_empty(x.shape if needed[0] else (0,))
    by_weight = empty_gradient(weight) if needed[1] else x.new_empty(0)
    by_bias = x.new_empty(weight.shape[:2] if needed[2] else (0,))
    if resolve("linear", x.device, x.dtype, backend) == "reference":
        if needed[0]:
            torch.bmm(grad, weight, out=by_x)
        if needed[1]:
            torch.bmm(grad.mT, x, out=by_weight)
        if needed[2]:
            torch.sum(grad, 1, out=by_bias)
        return by_x, by_weight, by_bias
    weight = weight.contiguous()
    native().linear_backward(
        grad=grad.data_ptr(),
        grad_at=grad.stride(),
        x=x.data_ptr(),
        x_at=x.stride(),
        weight=weight.data_ptr(),
        grad_x=by_x.data_ptr() if needed[0] else 0,
        grad_weight=by_weight.data_ptr() if needed[1] else 0,
        grad_bias=by_bias.data_ptr() if needed[2] else 0,
        sizes=(*x.shape, weight.shape[1]),
        threads=torch.get_num_threads(),
        isa=native_isa(),
    )
    return by_x, by_weight, by_bias


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Plain torch: [G, M, O]."""
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)


register_plain("linear", lambda *arguments: linear_reference(*arguments[:-1]))


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor | None, str | None], output: Tensor
) -> None:
    x, weight, _, backend = inputs
    ctx.save_for_backward(x, weight)
    ctx.backend = backend  # type: ignore[attr-defined]


@float32_under_autocast
def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivatives("linear")
    needed = list(ctx.needs_input_grad[:3])  # type: ignore[attr-defined]
    grads = torch.ops.vamoh.linear_backward(grad, *ctx.saved_tensors, needed, ctx.backend)  # type: ignore[attr-defined]
    return (*(g if n else None for g, n in zip(grads, needed, strict=True)), None)


torch.library.register_autograd("vamoh::linear", _backward, setup_context=_setup_context)

register("linear", "cpu", devices=["cpu"], dtypes=[torch.float32], unavailable=native_unavailable)
register("linear", "reference")
