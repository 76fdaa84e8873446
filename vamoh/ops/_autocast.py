"""What ops do under torch.autocast: most run in float32, whatever half-precision tensors come."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_DEVICES = ("cpu", "cuda")


def under_autocast(x: Tensor) -> bool:
    """Whether torch.autocast is on for tensors of this device."""
    if x.is_cpu:
        return torch.is_autocast_enabled("cpu")
    return x.is_cuda and torch.is_autocast_enabled("cuda")


def float32_under_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which under torch.autocast runs with autocast off and half-precision arguments cast to float32.

    Tensors may lie in lists and tuples. float64 stays, as everywhere under autocast; where autocast is off nothing is
    cast.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                args, kwargs = _float32(args, device), _float32(kwargs, device)
                with torch.autocast(device, enabled=False):
                    return run(*args, **kwargs)
        return function(*args, **kwargs)

    return run


def _float32(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        half = value.dtype in (torch.bfloat16, torch.float16) and value.device.type == device
        return value.float() if half else value
    if isinstance(value, dict):
        return {name: _float32(each, device) for name, each in value.items()}
    if isinstance(value, list | tuple):
        parts = [_float32(each, device) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
