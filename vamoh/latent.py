"""The latent variable z: its posterior, its prior, and estimators of the divergence between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vamoh.ops import CounterNoise
from vamoh.ops._autocast import float32_under_autocast
from vamoh.ops.planar_flow import (
    PlanarFlow,
    normal_log_prob,
    planar_flow_expected_log_prob,
    planar_flow_log_prob,
    planar_flow_sample,
)


@dataclass(frozen=True, eq=False)
class Posterior:
    """q(z | x, y), a diagonal Gaussian: mean and std, both [B, Z]."""

    mean: Tensor
    std: Tensor

    @staticmethod
    @float32_under_autocast
    def from_logits(logits: Tensor) -> Posterior:
        """From the encoder's head [B, 2Z]: mean first, then log-variance; std is at most 10 (published code)."""
        mean, log_variance = logits.chunk(2, -1)
        return Posterior(mean, torch.exp(log_variance.clamp(-70, 70) / 2).clamp(max=10))

    def sample(self, noise: Tensor) -> Tensor:
        """z = mean + std · noise for standard normal noise [..., B, Z]; differentiable."""
        return self.mean + self.std * noise

    def entropy(self) -> Tensor:
        """Entropy [B] in nats."""
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density [...] in nats at z [..., B, Z]."""
        return normal_log_prob(z, self.mean, self.std.log())

    def kl_standard(self) -> Tensor:
        """KL(q ‖ N(0, I)) [B] in nats, closed form."""
        return (0.5 * (self.std.square() + self.mean.square() - 1) - self.std.log()).sum(-1)


class NormalPrior(nn.Module):
    """p(z) = N(0, I)."""

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density [S] in nats at z [S, Z]."""
        return normal_log_prob(z, torch.zeros_like(z[:1]), torch.zeros_like(z[:1]))

    def sample(self, noise: Tensor) -> Tensor:
        """Return standard normal noise [S, Z] as it is."""
        return noise


class FlowPrior(nn.Module):
    """p(z): a planar flow of T layers over a trainable diagonal Gaussian (Sec. 3.1)."""

    def __init__(self, latent_dim: int, layers: int, identity: bool, generator: torch.Generator | None = None) -> None:
        """`identity` starts the flow near the identity; otherwise as the published code does, far off when deep."""
        super().__init__()
        bound = math.sqrt(2 / latent_dim)
        self.w = nn.Parameter(torch.empty(layers, latent_dim).uniform_(-bound, bound, generator=generator))
        u = torch.empty(layers, latent_dim).uniform_(-math.sqrt(2), math.sqrt(2), generator=generator)
        if identity:
            # w·u = log(e - 1) makes û vanish; a little noise across w breaks the symmetry of the layers
            along = self.w.detach() / self.w.detach().square().sum(-1, keepdim=True)
            noise = 0.01 * u
            u = math.log(math.e - 1) * along + noise - (noise * self.w.detach()).sum(-1, keepdim=True) * along
        self.u = nn.Parameter(u)
        self.b = nn.Parameter(torch.zeros(layers))
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(latent_dim))

    @property
    def flow(self) -> PlanarFlow:
        """The parameters as the op takes them."""
        return PlanarFlow(self.u, self.w, self.b, self.loc, self.log_scale)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density [S] in nats at z [S, Z]; exact, by the analytic inverse."""
        return planar_flow_log_prob(z, self.flow)

    def expected_log_prob(self, mean: Tensor, std: Tensor, noise: Tensor | CounterNoise) -> Tensor:
        """Mean log-density [B] in nats over samples mean + std · noise; mean and std [B, Z], noise [S, B, Z]."""
        return planar_flow_expected_log_prob(mean, std, self.flow, noise)

    def sample(self, noise: Tensor) -> Tensor:
        """Samples [S, Z] from standard normal noise [S, Z]."""
        return planar_flow_sample(noise, self.flow)[0]


def kl_exact(posterior: Posterior, prior: NormalPrior | FlowPrior, noise: Tensor | CounterNoise) -> Tensor:
    """KL(q ‖ p) [B] in nats: closed form for N(0, I), else analytic entropy and noise [S, B, Z] for E_q[log p]."""
    if isinstance(prior, NormalPrior):
        return posterior.kl_standard()
    return -posterior.entropy() - prior.expected_log_prob(posterior.mean, posterior.std, noise)


def kl_cross_entropy(posterior: Posterior, prior: NormalPrior | FlowPrior, noise: Tensor | CounterNoise) -> Tensor:
    """What the published code uses for a flow prior: -E_q[log p] [B], without entropy or gradient to the encoder."""
    if isinstance(prior, NormalPrior):
        return posterior.kl_standard()
    return -prior.expected_log_prob(posterior.mean.detach(), posterior.std.detach(), noise)
