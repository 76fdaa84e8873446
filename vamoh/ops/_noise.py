"""Standard normal noise as a function of a seed: nothing is stored, and every backend makes the same.

The value of sample s, function b and dimension z is made by Philox4x32-10 (Salmon et al. 2011) and Box-Muller:

    counter  (z // 4, s, b, 0), four 32-bit words; key (lower, upper) 32 bits of the seed; output words w_0..w_3
    pair     w = w_0, w_1 for z % 4 in {0, 1}, w_2, w_3 for {2, 3}
    uniform  float32(w[0] >> 1) · 2^-31 + 2^-32, each step rounded to float32: in (0, 1], at least 2^-32
    angle    float32(int32(w[1])) · 2^-31 · π, in [-π, π]
    value    sqrt(-2 log uniform) · cos(angle) for even z, · sin(angle) for odd z

So it depends neither on the number of samples nor on the batch or Z. Words, uniforms and angles are the same everywhere
to the bit, values up to the rounding of log, cos and sin; float64 noise is the same noise with less of that rounding.
S and B must be below 2^32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vamoh._checks import check_positive, check_tensor

_WORD = 0xFFFFFFFF


class CounterNoise(NamedTuple):
    """Standard normal noise [S, B, Z] that is made where it is used: seed int64 [] and S, the number of samples."""

    seed: Tensor
    samples: int


def check_noise(where: str, name: str, noise: Tensor | CounterNoise, like: Tensor) -> None:
    """Raise unless `noise` is counter noise, or a tensor [S, B, Z] that fits `like` [B, Z]; S >= 1."""
    if isinstance(noise, CounterNoise):
        check_tensor(where, f"{name}.seed", noise.seed, [], dtypes=[torch.int64])
        if noise.seed.device != like.device:
            raise TypeError(f"{where}: {name}.seed must be on {like.device}, got {noise.seed.device}")
        check_positive(where, f"{name}.samples", noise.samples)
        return
    check_tensor(where, name, noise, ["S", *like.shape], like=like)
    if not len(noise):
        raise ValueError(f"{where}: {name} must hold at least one sample, got {list(noise.shape)}")
    if noise.requires_grad:
        raise ValueError(f"{where}: {name} must not require a gradient")


def counter_noise_reference(
    seed: Tensor, samples: range, batch: int, latent: int, dtype: torch.dtype = torch.float32, first: int = 0
) -> Tensor:
    """Plain torch: the noise [len(samples), B, Z] of these samples and functions, on the device of the seed."""

    def index(values: range, dim: int) -> Tensor:
        return torch.arange(values.start, values.stop, device=seed.device).view(
            [-1 if d == dim else 1 for d in range(3)]
        )

    functions = range(first, first + batch)
    counter = (index(range(-(-latent // 4)), 2), index(samples, 0), index(functions, 1), torch.zeros_like(seed))
    words = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))
    pairs = (*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3]))
    return torch.stack(pairs, -1).flatten(2)[..., :latent].to(dtype)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words from a counter of four and a key of two, int64 tensors in [0, 2^32) that broadcast."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # wraps around at 2^64, which leaves both halves as they are
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    uniform = ((first >> 1).float() * 2.0**-31 + 2.0**-32).double()
    signed = torch.where(second >= 2**31, second - 2**32, second)
    angle = signed.float().double() * (math.pi * 2.0**-31)
    radius = torch.sqrt(-2 * torch.log(uniform))
    return radius * torch.cos(angle), radius * torch.sin(angle)
