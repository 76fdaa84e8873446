"""What launches share: the device of the tensors, as the plans know it and as the current one, and the precision."""

from __future__ import annotations

import contextlib

import torch
import triton

from ._plan import Device


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the current device; launches then go to torch's current stream there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def device_of(device: torch.device) -> Device:
    """What plans depend on."""
    if device.type != "cuda":  # under the interpreter; few programs, so that they share, split and group as on a GPU
        return Device(90, 3)
    properties = torch.cuda.get_device_properties(device)
    return Device(10 * properties.major + properties.minor, properties.multi_processor_count)


def products(precision: str) -> str:
    """The PRECISION of `_math.dot`."""
    return "bf16_rounded" if precision == "bf16" and triton.knobs.runtime.interpret else precision
