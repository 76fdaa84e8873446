"""What an op is: a schema, its plain torch, a fake, and one function per backend; and which backend runs.

`Op("f(Tensor x, Size size) -> Tensor", f_reference, fake)` declares the torch.library op vamoh::f. A NamedTuple that
the file of the reference knows, such as Size here, stands in the schema as its fields, and every function gets it
whole; `backend` is added at the end.

The choice is made when the op runs, never while it is traced: the `backend=` argument, else the environment variable
VAMOH_BACKEND, else the first backend that takes the device and dtype and is available. An explicit choice never falls
back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from vamoh.ops._autocast import float32_under_autocast
from vamoh.ops._native import (
    call_cpu,
    call_cuda,
    cuda_unavailable,
    isa_of,
    native_unavailable,
    setting,
    triton_unavailable,
)

F = TypeVar("F", bound=Callable[..., Any])

FLOAT32 = (torch.float32,)

OPS: dict[str, Op] = {}
"""All ops by name, without those that compute their derivatives."""


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. `devices` and `dtypes` None: any. `unavailable` returns the reason, or None if it runs.

    function takes the arguments of the op. refusal takes them too and says why they are not among those it computes,
    worded as "takes ..., got ...", or None; limits says the same in advance, for display: beyond them the next runs.
    """

    backend: str
    function: Callable[..., Any]
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    unavailable: Callable[[], str | None] = lambda: None
    limits: str = ""
    refusal: Callable[..., str | None] | None = None

    def misfit(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it does not take tensors of this device and dtype, or None."""
        if self.devices is not None and device.type not in self.devices:
            return f"takes tensors on {' or '.join(self.devices)}, got {device}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"takes dtype {' or '.join(str(d) for d in self.dtypes)}, got {dtype}"
        return None


_COMPILED: dict[str, tuple[str, Callable[[], str | None], Callable[..., None] | None]] = {
    "triton": ("cuda", triton_unavailable, None),
    "cpu": ("cpu", native_unavailable, call_cpu),
    "cuda": ("cuda", cuda_unavailable, call_cuda),
}
"""Device, reason why it is not available, and what calls its kernels, for every backend but the reference."""


class Saved(NamedTuple):
    """What a derivative gets: the values that `saves` kept, which inputs need a gradient, and the forward's backend."""

    values: Sequence[Any]
    needed: Sequence[bool]
    backend: str | None


class Op:
    """An op. Called with its arguments it runs on the backend chosen, and records its derivative where one is asked."""

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        check: Callable[..., Sequence[Any] | None] | None = None,
        plain: Callable[..., Any] | None = None,
        forward: Op | None = None,
    ) -> None:
        name, arguments, returns = re.fullmatch(r"(\w+)\((.*)\) -> (.*)", schema).groups()  # type: ignore[union-attr]
        declared = [argument.split(" ") for argument in arguments.split(", ")]
        self.structs = [_struct(reference, kind) for kind, _ in declared]
        flat = [part for (k, n), s in zip(declared, self.structs, strict=True) for part in _fields(k, n, s)]
        self.name: str = name if forward is None else forward.name
        self.reference, self.plain = reference, plain or reference
        self.implementations = [Implementation("reference", reference)]
        self._forward_op, self._fake, self._check = forward, fake, check
        self._packed = any(self.structs)
        self._like = [kind for kind, _ in declared].index("Tensor")
        self._tensors = [i for i, (kind, _) in enumerate(flat) if kind in ("Tensor", "Tensor?")]
        self._schema = f"({', '.join(map(' '.join, flat))}, str? backend) -> {returns}"
        self._chosen: dict[tuple[Any, ...], list[Implementation]] = {}
        self._autograd: type[torch.autograd.Function] | None = None
        self.node = self.alone = self._define(f"vamoh::{name}")
        _ALL.append(self)
        if forward is None:
            OPS[name] = self

    def _define(self, name: str) -> Any:
        torch.library.define(name, self._schema)
        torch.library.impl(name, "CompositeExplicitAutograd", self._run)
        torch.library.register_fake(name, lambda *flat: self._fake(*self._pack(flat[:-1])))
        return getattr(torch.ops.vamoh, name.removeprefix("vamoh::")).default

    def backend(
        self,
        *names: str,
        dtypes: Sequence[torch.dtype] = FLOAT32,
        limits: str = "",
        refusal: Callable[..., str | None] | None = None,
    ) -> Callable[[F], F]:
        """Decorator for the function of one or more backends; those that come first are preferred.

        Functions of cpu and cuda get before the op's arguments what calls a function of the native module by name.
        Those of a derivative serve where the op's own backend of that name does.
        """

        def decorate(function: F) -> F:
            for name in names:
                device, unavailable, call = _COMPILED[name]
                run = partial(function, call) if call else function
                made = Implementation(name, run, (device,), tuple(dtypes), unavailable, limits, refusal)
                if self._forward_op is not None:
                    own = next(i for i in self._forward_op.implementations if i.backend == name)
                    made = replace(own, function=run, refusal=refusal)
                self.implementations.insert(-1, made)
            return function

        return decorate

    def derivative(self, schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Op:
        """Declare an op that computes the gradients: it is chosen, and named in errors, as this one."""
        return Op(schema, reference, fake, forward=self)

    def gradient(
        self, saves: Callable[..., Sequence[Any]], instead: str = ""
    ) -> Callable[[Callable[..., Sequence[Tensor | None]]], None]:
        """Decorator for the derivative: from `Saved` and the gradients of the outputs, None where there is none, to
        those of the leading inputs of the schema, None where there is none.

        saves: from the op's arguments and its output to what the derivative needs, tensors or plain values. It is
        differentiable once; instead: what to say to who asks for more.
        """

        def decorate(function: Callable[..., Sequence[Tensor | None]]) -> None:
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                *flat, ctx.backend = inputs
                kept = saves(*self._pack(flat), output)
                ctx.kept = [_TENSOR if isinstance(value, Tensor) else value for value in kept]
                ctx.save_for_backward(*(value for value in kept if isinstance(value, Tensor)))
                ctx.set_materialize_grads(False)

            @float32_under_autocast
            def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
                refuse_second_derivatives(self.name, instead)
                needed: tuple[bool, ...] = ctx.needs_input_grad
                found: Sequence[Tensor | None] = ()
                if any(grad is not None for grad in grads):
                    tensors = iter(ctx.saved_tensors)
                    values = [next(tensors) if value is _TENSOR else value for value in ctx.kept]
                    found = function(Saved(values, needed, ctx.backend), *grads)
                wanted = [grad if need else None for grad, need in zip(found, needed, strict=False)]
                return (*wanted, *(None,) * (len(needed) - len(wanted)))

            torch.library.register_autograd(self.node.name(), backward, setup_context=setup_context)
            self.alone = alone = self._define(f"{self.node.name()}_forward")

            class Function(torch.autograd.Function):
                @staticmethod
                def forward(ctx: Any, *inputs: Any) -> Any:
                    output = alone(*inputs)
                    setup_context(ctx, inputs, output)
                    return output

            Function.backward = staticmethod(backward)  # type: ignore[method-assign]
            self._autograd = Function

        return decorate

    def __call__(self, *arguments: Any, backend: str | None = None) -> Any:
        flat = self._flat(arguments) if self._packed else arguments
        if self._autograd is None or torch.compiler.is_compiling():
            return self.node(*flat, backend)
        if torch.is_grad_enabled():
            for i in self._tensors:
                x = flat[i]
                if x is not None and x.requires_grad:
                    return self._autograd.apply(*flat, backend)
        return self.alone(*flat, backend)

    def _flat(self, arguments: Sequence[Any]) -> list[Any]:
        flat: list[Any] = []
        for value, struct in zip(arguments, self.structs, strict=True):
            if struct is None:
                flat.append(value)
            else:
                flat.extend(value)
        return flat

    def _pack(self, flat: Sequence[Any]) -> Sequence[Any]:
        if not self._packed:
            return flat
        arguments: list[Any] = []
        start = 0
        for struct in self.structs:
            if struct is None:
                arguments.append(flat[start])
                start += 1
            else:
                stop = start + len(struct._fields)
                arguments.append(struct(*(tuple(v) if isinstance(v, list) else v for v in flat[start:stop])))
                start = stop
        return arguments

    def _run(self, *flat: Any) -> Any:
        arguments = self._pack(flat[:-1]) if self._packed else flat[:-1]
        if self._check is not None:
            arguments = self._check(*arguments) or arguments
        like = arguments[self._like]
        return self.choose(like.device, like.dtype, flat[-1], arguments).function(*arguments)

    def choose(
        self, device: torch.device, dtype: torch.dtype, backend: str | None = None, arguments: Sequence[Any] = ()
    ) -> Implementation:
        """What runs for tensors of this device and dtype and, where a backend has a refusal, these arguments.

        Raises ValueError when the backend asked for is unknown or does not take them, RuntimeError when it is missing
        here; both say why.
        """
        wish = setting("VAMOH_BACKEND")
        key = (device, dtype, backend, wish)
        candidates = self._chosen.get(key)
        if candidates is None:
            candidates = self._chosen[key] = self._candidates(device, dtype, backend, wish)
        for candidate in candidates:
            refused = None if candidate.refusal is None else candidate.refusal(*arguments)
            if refused is None:
                return candidate
        raise ValueError(f"{self.name}: backend {_asked(backend, wish)} {refused}")

    def _candidates(
        self, device: torch.device, dtype: torch.dtype, backend: str | None, wish: str | None
    ) -> list[Implementation]:
        chosen, known = backend or wish or None, self.implementations
        if chosen is None:
            return [i for i in known if i.misfit(device, dtype) is None and i.unavailable() is None]
        asked = _asked(backend, wish)
        for implementation in known:
            if implementation.backend != chosen:
                continue
            misfit = implementation.misfit(device, dtype)
            if misfit is not None:
                raise ValueError(f"{self.name}: backend {asked} {misfit}")
            reason = implementation.unavailable()
            if reason is not None:
                raise RuntimeError(f"{self.name}: backend {asked} is not available: {reason}")
            return [implementation]
        raise ValueError(f"{self.name}: backend must be one of {', '.join(i.backend for i in known)}, got {asked}")


_ALL: list[Op] = []
_TENSOR = object()


def _asked(backend: str | None, wish: str | None) -> str:
    return f"{backend!r}" if backend else f"{wish!r} (from VAMOH_BACKEND)"


def _struct(reference: Callable[..., Any], kind: str) -> Any:
    """The NamedTuple of this name in the reference's file, or None for a type of torch.library."""
    found = getattr(reference, "__globals__", {}).get(kind)
    return found if hasattr(found, "_fields") else None


_KINDS = {Tensor: "Tensor", int: "SymInt", float: "float", str: "str", bool: "bool", tuple[int, ...]: "SymInt[]"}


def _fields(kind: str, name: str, struct: Any) -> list[tuple[str, str]]:
    """Type and name of what stands in the schema for an argument."""
    if struct is None:
        return [(kind, name)]
    hints = get_type_hints(struct)
    return [(_KINDS[hints[field]], f"{name}_{field}") for field in struct._fields]


def all_ops() -> list[Op]:
    """Those of `OPS`, and those that compute their derivatives under the same name."""
    return list(_ALL)


def forget_choices() -> None:
    """Find out anew, at the next calls, which backends and instruction sets are available."""
    isa_of.cache_clear()
    for op in _ALL:
        op._chosen.clear()


def plain_torch() -> dict[Any, Callable[..., Any]]:
    """Plain torch to put in place of ops in an exported program, for one that runs without vamoh."""

    def without_backend(op: Op) -> Callable[..., Any]:
        return lambda *flat: op.plain(*op._pack(flat[:-1]))

    return {node: without_backend(op) for op in OPS.values() for node in (op.node, op.alone)}


def require_reference(op: str, wish: str, backend: str | None) -> None:
    """Raise ValueError if another backend than "reference" was asked for, where only that one does what is wished."""
    chosen = backend or os.environ.get("VAMOH_BACKEND") or "reference"
    if chosen != "reference":
        raise ValueError(f"{op}: backend must be 'reference' for {wish}, got {chosen!r}")


def refuse_second_derivatives(op: str, instead: str = "") -> None:
    """Raise RuntimeError in a backward that autograd records: what it computes would count as constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: has no second derivatives (create_graph=True){instead and '; ' + instead}")
