"""A planar flow with LeakyReLU layers over a diagonal Gaussian: log-density and sampling, both exact.

Layer t: f(v) = v + û_t · leaky(w_t·v + b_t) with û = u + (softplus(w·u) - 1 - w·u) w/|w|², so that 1 + w·û > 0
(Rezende & Mohamed 2015, App. A.1). Layers are applied in order 0..T-1 from the base to z.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vamoh._checks import FLOATING, check_tensor
from vamoh.ops._backend import register, resolve


class PlanarFlow(NamedTuple):
    """Parameters: u, w [T, Z], b [T], base mean loc [Z] and log standard deviation log_scale [Z]; slope of the leak."""

    u: Tensor
    w: Tensor
    b: Tensor
    loc: Tensor
    log_scale: Tensor
    slope: float = 0.2


def planar_flow_log_prob(z: Tensor, flow: PlanarFlow, *, backend: str | None = None) -> Tensor:
    """Log-density [S] in nats of samples z [S, Z], float32 or float64; differentiable in z and the parameters.

    Raises TypeError or ValueError naming the argument.
    """
    _check("planar_flow_log_prob", "z", z, flow)
    resolve("planar_flow_log_prob", z.device, z.dtype, backend)
    base, log_det = planar_flow_inverse_reference(z, flow)
    return log_det + normal_log_prob(base, flow.loc, flow.log_scale)


def planar_flow_sample(noise: Tensor, flow: PlanarFlow, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Samples z [S, Z] made from standard normal noise [S, Z], and their log-density [S] in nats.

    Raises TypeError or ValueError naming the argument.
    """
    _check("planar_flow_sample", "noise", noise, flow)
    resolve("planar_flow_sample", noise.device, noise.dtype, backend)
    base = flow.loc + flow.log_scale.exp() * noise
    z, log_det = planar_flow_forward_reference(base, flow)
    return z, normal_log_prob(base, flow.loc, flow.log_scale) - log_det


def normal_log_prob(x: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Log-density [...] of a diagonal Gaussian at x [..., Z]."""
    standard = (x - loc) * torch.exp(-log_scale)
    return -(0.5 * standard.square() + log_scale).sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)


def planar_flow_inverse_reference(z: Tensor, flow: PlanarFlow) -> tuple[Tensor, Tensor]:
    """Plain torch: base points [S, Z] and log |d base / d z| [S]."""
    u_hat, gain = _constrain(flow)
    log_det = z.new_zeros(z.shape[0])
    for t in reversed(range(len(flow.b))):
        linear = z @ flow.w[t] + flow.b[t]
        leak = torch.where(linear < 0, z.new_full((), flow.slope), z.new_ones(()))
        stretch = 1 - leak + leak * gain[t]
        z = z - (leak * linear / stretch)[:, None] * u_hat[t]
        log_det = log_det - torch.log(stretch)
    return z, log_det


def planar_flow_forward_reference(base: Tensor, flow: PlanarFlow) -> tuple[Tensor, Tensor]:
    """Plain torch: z [S, Z] and log |d z / d base| [S]."""
    u_hat, gain = _constrain(flow)
    log_det = base.new_zeros(base.shape[0])
    for t in range(len(flow.b)):
        linear = base @ flow.w[t] + flow.b[t]
        leak = torch.where(linear < 0, base.new_full((), flow.slope), base.new_ones(()))
        base = base + (leak * linear)[:, None] * u_hat[t]
        log_det = log_det + torch.log(1 - leak + leak * gain[t])
    return base, log_det


def _constrain(flow: PlanarFlow) -> tuple[Tensor, Tensor]:
    """û [T, Z] and 1 + w·û [T] = softplus(w·u), kept as it is: the sum would round to 0 when w·u is far below 0."""
    inner = (flow.w * flow.u).sum(-1)
    gain = F.softplus(inner)
    return flow.u + ((gain - 1 - inner) / flow.w.square().sum(-1))[:, None] * flow.w, gain


def _check(where: str, name: str, x: Tensor, flow: PlanarFlow) -> None:
    check_tensor(where, name, x, ["S", "Z"], dtypes=FLOATING)
    latent, layers = x.shape[1], flow.b.shape[0]
    check_tensor(where, "u", flow.u, [layers, latent], like=x)
    check_tensor(where, "w", flow.w, [layers, latent], like=x)
    check_tensor(where, "b", flow.b, [layers], like=x)
    check_tensor(where, "loc", flow.loc, [latent], like=x)
    check_tensor(where, "log_scale", flow.log_scale, [latent], like=x)


register("planar_flow_log_prob", "reference")
register("planar_flow_sample", "reference")
