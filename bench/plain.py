"""The model in plain torch functions alone, so that `torch.compile` sees every operation.

An op of `vamoh.ops` is closed to the compiler. Here its plain-torch reference stands in its place, differentiated by
autograd; the rest is written out from the parameters of a `VaMoH`. Exact savings that need no kernel are kept: only
observed points are decoded, features are shared by functions and components, the gating's first layer is split.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vamoh import VaMoH
from vamoh.encoder import PointConvLayer
from vamoh.gating import Gating
from vamoh.latent import Posterior
from vamoh.ops.fourier_features import fourier_features_reference
from vamoh.ops.inr_mixture import inr_mixture_reference
from vamoh.ops.likelihood import log_likelihood, mean
from vamoh.ops.planar_flow import PlanarFlow, normal_log_prob, planar_flow_inverse_reference
from vamoh.ops.point_conv import gather

Hoods = Sequence[tuple[Tensor, Tensor]]


def loss(model: VaMoH, coords: Tensor, values: Tensor, hoods: Hoods, noise_z: Tensor, noise_kl: Tensor) -> Tensor:
    """Minus the bound with `kl="cross_entropy"`, batch mean: coords [N, D], values [B, N, C], all of them observed."""
    features = fourier_features_reference(coords, model.encoding.frequencies)
    posterior = _encode(model, features, values, hoods)
    z = posterior.sample(noise_z)
    log_q, log_p = _gate(model.gating_posterior, features, z, values), _gate(model.gating_prior, features, z)
    logits = inr_mixture_reference(_theta(model, z), features, model.inr)  # [B, K, N, C]
    scale = model.likelihood.scale[:, None]
    per_component = log_likelihood(model.likelihood.op, logits, values[:, None], scale).sum(-1)
    q = log_q.exp()
    samples = posterior.sample(noise_kl).detach().flatten(0, 1)
    prior = model.prior
    flow = PlanarFlow(prior.u, prior.w, prior.b, prior.loc, prior.log_scale)
    base, log_det = planar_flow_inverse_reference(samples, flow)
    log_prior = (log_det + normal_log_prob(base, flow.loc, flow.log_scale)).mean()
    return -((q * (per_component - log_q + log_p)).sum((1, 2)).mean() + log_prior)


@torch.no_grad()
def reconstruct(model: VaMoH, coords: Tensor, values: Tensor, out: Tensor, at: Tensor, hoods: Hoods) -> Tensor:
    """Mean [B, M, C] at the coordinates `out`; every given point is observed, `at` [N] is its position in `out`."""
    frequencies = model.encoding.frequencies
    features, wanted = (fourier_features_reference(x, frequencies) for x in (coords, out))
    z = _encode(model, features, values, hoods).mean
    log_pi = _gate(model.gating_prior, wanted, z).index_copy(2, at, _gate(model.gating_posterior, features, z, values))
    means = mean(model.likelihood.op, inr_mixture_reference(_theta(model, z), wanted, model.inr))
    return (log_pi.exp()[..., None] * means).sum(1)


def _encode(model: VaMoH, features: Tensor, values: Tensor, hoods: Hoods) -> Posterior:
    convs, encoded, h = iter(model.encoder.convs), features[None], values
    for stage, (centroids, neighbors) in zip(model.encoder.stages, hoods, strict=True):
        if stage.channels is None:
            h = gather(h, neighbors).mean(2)
        else:
            h = F.leaky_relu(_convolve(next(convs), h, encoded, centroids, neighbors), 0.2)
        encoded = gather(encoded, centroids)
    head = model.encoder.head
    return Posterior.from_logits(F.linear(h.flatten(1), head.weight, head.bias))


def _convolve(conv: PointConvLayer, h: Tensor, encoded: Tensor, centroids: Tensor, neighbors: Tensor) -> Tensor:
    """PointConv [B, M, O] of features [B, N, C]; an affine weight net is one matrix, applied to points."""
    first, *rest = conv.weight_net
    weight, bias = first.weight, first.bias
    if conv.slope is None:
        for layer in rest:
            weight, bias = layer.weight @ weight, F.linear(bias, layer.weight, layer.bias)
    projected = F.linear(encoded, weight)
    w = gather(projected, neighbors) - gather(projected, centroids)[:, :, None] + bias  # [1, M, S, Q]
    if conv.slope is not None:
        for layer in rest:
            w = F.linear(F.leaky_relu(w, conv.slope), layer.weight, layer.bias)
    batch, _, channels = h.shape
    _, m, s, q = w.shape
    # The batch shares the weights: one product [Q, S] x [S, B·C] per centroid.
    rows = h.transpose(0, 1).flatten(1)[neighbors.flatten()].view(m, s, batch * channels)
    contracted = (w[0].mT @ rows).view(m, q, batch, channels).permute(2, 0, 3, 1)  # [B, M, C, Q]
    return F.linear(contracted.flatten(2), conv.linear.weight, conv.linear.bias)


def _theta(model: VaMoH, z: Tensor) -> Tensor:
    """Packed parameters [B, K, P]."""
    net = model.hypernet
    h = z.expand(model.components, -1, -1)
    for i, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        h = torch.baddbmm(bias[:, None], h if i == 0 else F.leaky_relu(h, 0.1), weight.mT)
    return h.transpose(0, 1)


def _gate(net: Gating, encoded: Tensor, z: Tensor, values: Tensor | None = None) -> Tensor:
    """Log-probabilities [B, K, N]."""
    h = F.linear(encoded, net.by_coords.weight, net.by_coords.bias) + F.linear(z, net.by_z.weight)[:, None]
    if values is not None:
        h = h + F.linear(values, net.by_value.weight)
    for layer in net.rest:
        h = F.linear(F.leaky_relu(h, 0.1), layer.weight, layer.bias)
    return F.log_softmax((torch.tanh(h) if net.bounded else h).mT, 1)
