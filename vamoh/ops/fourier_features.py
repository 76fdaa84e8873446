"""Random Fourier features of coordinates (Tancik et al. 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vamoh._checks import FLOATING, check_tensor
from vamoh.ops._backend import (
    float32_under_autocast,
    native,
    native_isa,
    native_unavailable,
    register,
    register_plain,
    require_reference,
    resolve,
)


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
    result: Tensor = torch.ops.vamoh.fourier_features(coords, frequencies, backend)
    return result


torch.library.define("vamoh::fourier_features", "(Tensor coords, Tensor frequencies, str? backend) -> Tensor")


@torch.library.register_fake("vamoh::fourier_features")
def _fake(coords: Tensor, frequencies: Tensor, backend: str | None) -> Tensor:
    return coords.new_empty(*coords.shape[:-1], 2 * frequencies.shape[0])


@torch.library.impl("vamoh::fourier_features", "CompositeExplicitAutograd")
def _run(coords: Tensor, frequencies: Tensor, backend: str | None) -> Tensor:
    if resolve("fourier_features", coords.device, coords.dtype, backend) == "reference":
        return fourier_features_reference(coords, frequencies)
    coords, frequencies = coords.contiguous(), frequencies.contiguous()
    count, dims = frequencies.shape
    out = coords.new_empty(*coords.shape[:-1], 2 * count)
    native().fourier_features(
        coords=coords.data_ptr(),
        frequencies=frequencies.data_ptr(),
        out=out.data_ptr(),
        points=coords.shape[:-1].numel(),
        dims=dims,
        count=count,
        threads=torch.get_num_threads(),
        isa=native_isa(),
    )
    return out


def fourier_features_reference(coords: Tensor, frequencies: Tensor) -> Tensor:
    """Plain torch: [..., 2F] from coords [..., D] and frequencies [F, D]."""
    phase = coords @ (2 * math.pi * frequencies).mT
    return torch.cat([phase.cos(), phase.sin()], -1)


register_plain("fourier_features", lambda *arguments: fourier_features_reference(*arguments[:-1]))

register(
    "fourier_features",
    "cpu",
    devices=["cpu"],
    dtypes=[torch.float32],
    unavailable=native_unavailable,
    limits="no gradients",
)
register("fourier_features", "reference")
