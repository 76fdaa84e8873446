"""What launches share: how kernels are compiled, the device of the tensors, as the plans know it, and the precision."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton

from ._plan import Device


def kernel(function: Callable[..., None]) -> Any:
    """`triton.jit` of a function that is launched, compiled once for all sizes.

    Pointers end in _ptr; what else is no constant is a number: a size, a stride, how the work is cut, or a float.
    Triton would compile it anew where an integer is 1 or a multiple of 16: with point dropout, again and again.
    """
    parameters = inspect.signature(function).parameters.values()
    numbers = [p.name for p in parameters if p.annotation is p.empty and not p.name.endswith("_ptr")]
    return triton.jit(function, do_not_specialize=numbers)


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the current device; launches then go to torch's current stream there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def device_of(device: torch.device) -> Device:
    """What plans depend on."""
    if device.type != "cuda":  # under the interpreter; few programs, so that they share, split and group as on a GPU
        return Device(90, 3)
    properties = torch.cuda.get_device_properties(device)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count, properties.name)


def products(precision: str) -> str:
    """The PRECISION of `_math.dot`."""
    return "bf16_rounded" if precision == "bf16" and triton.knobs.runtime.interpret else precision
