from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from vamoh.latent import FlowPrior, NormalPrior, Posterior, kl_cross_entropy, kl_exact
from vamoh.ops import CounterNoise
from vamoh.ops._noise import counter_noise_reference


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def flow(identity: bool, latent: int = 4, layers: int = 3) -> FlowPrior:
    torch.manual_seed(0)
    return FlowPrior(latent, layers, identity).double()


def neutral(latent: int = 4) -> FlowPrior:
    """A flow prior that is N(0, I) exactly."""
    prior = flow(True, latent, 1)
    with torch.no_grad():
        prior.u.copy_(math.log(math.e - 1) * prior.w / prior.w.square().sum(1, keepdim=True))
    return prior


def test_posterior_from_logits():
    logits = torch.tensor([[1.0, -2.0, 0.0, 2.0]])
    q = Posterior.from_logits(logits)
    assert q.mean.tolist() == [[1, -2]]
    assert q.std.tolist() == [pytest.approx([1, math.e])]
    extreme = Posterior.from_logits(torch.tensor([[0.0, 0.0, 1e4, -1e4]]))
    assert extreme.std.tolist() == [[10, pytest.approx(math.exp(-35), rel=1e-5, abs=0)]]
    assert q.sample(torch.tensor([[0.5, 1.0]])).tolist() == [pytest.approx([1.5, -2 + math.e])]


def test_posterior_is_a_diagonal_gaussian():
    q = Posterior(draw(3, 4), draw(3, 4, seed=1).exp())
    p = Independent(Normal(q.mean, q.std), 1)
    torch.testing.assert_close(q.entropy(), p.entropy())
    z = draw(5, 3, 4, seed=2)
    torch.testing.assert_close(q.log_prob(z), p.log_prob(z))
    standard = Independent(Normal(torch.zeros_like(q.mean), torch.ones_like(q.std)), 1)
    torch.testing.assert_close(q.kl_standard(), kl_divergence(p, standard))
    torch.testing.assert_close(NormalPrior().log_prob(z[0]), standard.log_prob(z[0]))


def test_exact_kl_of_a_neutral_flow_is_the_closed_form_within_its_error():
    q = Posterior(draw(3, 4), 0.5 * draw(3, 4, seed=1).exp())
    noise = draw(20_000, 3, 4, seed=2)
    estimate = kl_exact(q, neutral(), noise)
    z = q.sample(noise)
    error = (q.log_prob(z) - NormalPrior().log_prob(z.flatten(0, 1)).unflatten(0, z.shape[:2])).std(0) / len(z) ** 0.5
    assert ((estimate - q.kl_standard()).abs() < 4 * error).all()
    assert torch.equal(kl_exact(q, NormalPrior(), noise[:0]), q.kl_standard())
    assert torch.equal(kl_cross_entropy(q, NormalPrior(), noise[:0]), q.kl_standard())


def test_the_terms_differ_by_the_entropy():
    q, noise = Posterior(draw(3, 4), draw(3, 4, seed=1).exp()), draw(7, 3, 4, seed=2)
    prior = flow(False)
    cross_entropy = kl_cross_entropy(q, prior, noise)
    torch.testing.assert_close(cross_entropy - q.entropy(), kl_exact(q, prior, noise))
    per_sample = torch.stack([-prior.log_prob(q.mean + q.std * n) for n in noise])
    torch.testing.assert_close(cross_entropy, per_sample.mean(0))


@pytest.mark.parametrize(("estimate", "reaches"), [(kl_exact, True), (kl_cross_entropy, False)])
def test_gradient_to_the_encoder(estimate, reaches):
    mean, std = draw(3, 4).requires_grad_(), draw(3, 4, seed=1).exp().requires_grad_()
    prior = flow(False)
    value = estimate(Posterior(mean, std), prior, draw(5, 3, 4, seed=2)).sum()
    to_encoder = torch.autograd.grad(value, [mean, std], allow_unused=True, retain_graph=True)
    assert [g is not None and bool(g.any()) for g in to_encoder] == [reaches, reaches]
    assert all(g.any() for g in torch.autograd.grad(value, list(prior.parameters())))
    to_encoder = torch.autograd.grad(estimate(Posterior(mean, std), NormalPrior(), draw(0, 3, 4)).sum(), [mean, std])
    assert all(g.any() for g in to_encoder)


@pytest.mark.parametrize("estimate", [kl_exact, kl_cross_entropy])
def test_counted_noise_is_noise(estimate):
    """A seed gives what its samples in a tensor give, in float32 as in float64."""
    prior, seed = flow(False), torch.tensor(11)
    stored = counter_noise_reference(seed, range(500), 3, 4, torch.float64)
    results = []
    for dtype, noise in (
        (torch.float64, stored),
        *((d, CounterNoise(seed, 500)) for d in (torch.float64, torch.float32)),
    ):
        mean, std = (t.to(dtype).requires_grad_() for t in (draw(3, 4), draw(3, 4, seed=1).exp()))
        value = estimate(Posterior(mean, std), prior.to(dtype), noise)
        grads = torch.autograd.grad(value.sum(), [mean, std, *prior.parameters()], allow_unused=True)
        results.append([value.detach(), *(g for g in grads if g is not None)])
    for exact, double, single in zip(*results, strict=True):
        torch.testing.assert_close(double, exact)
        assert (single.double() - exact).norm() <= 1e-5 * exact.norm()


def test_flow_starts_near_the_identity_however_deep():
    """Six standard deviations of what layers add, each a vector of entries within 0.01·√2, across w, times a tanh."""
    z = draw(200, 6)
    for layers in (1, 80):
        prior, shift = flow(True, 6, layers), 6 * 0.01 * math.sqrt(2 / 3 * layers)
        torch.testing.assert_close(prior.sample(z), z, rtol=0, atol=shift)
        difference = prior.log_prob(z) - NormalPrior().log_prob(z)  # layers across w keep volumes
        assert (difference.abs() < shift * z.norm(dim=1) + shift**2 / 2).all()
        assert (prior.sample(z) - z).abs().max() > 1e-3  # at the identity all layers would be alike
    assert (flow(False, 6, 20).sample(z) - z).abs().max() > 5


def test_published_ranges():
    prior = flow(False, 50, 40)
    assert 1.4 < float(prior.u.detach().abs().max()) <= 2**0.5
    assert 0.19 < float(prior.w.detach().abs().max()) <= 0.2
    assert not prior.b.any() and not prior.loc.any() and not prior.log_scale.any()


def test_flow_samples_follow_its_density():
    """E[f(z)] over samples equals the integral of f times the density."""
    prior = flow(False, 1, 4)
    with torch.no_grad():
        z = prior.sample(draw(100_000, 1))[:, 0]
        x = torch.linspace(float(z.min()) - 1, float(z.max()) + 1, 200_001, dtype=torch.float64)
        density = prior.log_prob(x[:, None]).exp()
    for f in (torch.sigmoid, lambda t: (t > 0.5).double(), lambda t: torch.cos(t)):
        expected, error = torch.trapezoid(density * f(x), x), f(z).std() / len(z) ** 0.5
        assert abs(float(f(z).mean() - expected)) < 4 * float(error) + 1e-3
