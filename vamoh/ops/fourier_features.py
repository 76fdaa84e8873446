"""Random Fourier features of coordinates (Tancik et al. 2020)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vamoh._checks import FLOATING, check_tensor
from vamoh.ops._autocast import float32_under_autocast
from vamoh.ops._op import Op, require_reference


@float32_under_autocast
def fourier_features(coords: Tensor, frequencies: Tensor, *, backend: str | None = None) -> Tensor:
    """γ(x) = [cos 2πFx, sin 2πFx], [..., 2F] for coords [..., D] and frequencies [F, D] in cycles per unit.

    float32 or float64 of one dtype and device. Where a gradient is needed it takes the plain-torch path.
    Raises TypeError or ValueError naming the argument.
    """
    where = "fourier_features"
    check_tensor(where, "frequencies", frequencies, ["F", "D"], dtypes=FLOATING)
    if isinstance(coords, Tensor) and coords.dim() == 0:
        raise ValueError(f"{where}: coords must have shape [..., {frequencies.shape[1]}], got []")
    lead = list(coords.shape[:-1]) if isinstance(coords, Tensor) else []
    check_tensor(where, "coords", coords, [*lead, frequencies.shape[1]], like=frequencies)
    if torch.is_grad_enabled() and (coords.requires_grad or frequencies.requires_grad):
        require_reference(where, "gradients", backend)
        return fourier_features_reference(coords, frequencies)
    result: Tensor = _fourier_features(coords, frequencies, backend=backend)
    return result


def fourier_features_reference(coords: Tensor, frequencies: Tensor) -> Tensor:
    """Plain torch: [..., 2F] from coords [..., D] and frequencies [F, D]."""
    phase = coords @ (2 * math.pi * frequencies).mT
    return torch.cat([phase.cos(), phase.sin()], -1)


def _empty(coords: Tensor, frequencies: Tensor) -> Tensor:
    return coords.new_empty(*coords.shape[:-1], 2 * frequencies.shape[0])


_fourier_features = Op(
    "fourier_features(Tensor coords, Tensor frequencies) -> Tensor", fourier_features_reference, _empty
)


@_fourier_features.backend("cpu", limits="no gradients")
def _(call: Any, coords: Tensor, frequencies: Tensor) -> Tensor:
    out = _empty(coords, frequencies)
    count, dims = frequencies.shape
    points = coords.shape[:-1].numel()
    call("fourier_features", coords=coords, frequencies=frequencies, out=out, points=points, dims=dims, count=count)
    return out
