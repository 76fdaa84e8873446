"""Initial values from a generator of their own: threads that build models at once do not meet in the global one."""

from __future__ import annotations

import math

import torch
from torch import nn


def own_generator(seed: int) -> torch.Generator:
    """A generator for new tensors, on torch's default device."""
    device = torch.get_default_device()
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)


def linear_layer(
    in_features: int, out_features: int, generator: torch.Generator | None, bias: bool = True
) -> nn.Linear:
    """A linear layer with torch's own initial values, drawn from `generator`; None: the global one."""
    # On "meta" it draws nothing from the global generator.
    layer = nn.Linear(in_features, out_features, bias=bias, device="meta").to_empty(device=torch.get_default_device())
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    if bias:
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer
