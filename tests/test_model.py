from __future__ import annotations

import copy
import inspect
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import SIZES
from vamoh import PointSet, VaMoH, generator, grid_coords
from vamoh.gating import uniform
from vamoh.geometry import Neighborhood
from vamoh.latent import NormalPrior, Posterior
from vamoh.model import Noise
from vamoh.ops import CounterNoise, inr_mixture, inr_mixture_mean
from vamoh.ops._noise import counter_noise_reference
from vamoh.ops.likelihood import log_likelihood

TINY: dict[str, Any] = {
    "coord_dim": 2,
    "channels": 1,
    "latent_dim": 3,
    "components": 3,
    "frequencies": 4,
    "frequency_scale": 0.5,
    "encoder_centroids": (8, 4),
    "encoder_neighbors": (4, 3),
    "encoder_channels": (3, 4),
    "weight_net": (3, 4),
    "flow_layers": 2,
    "hypernet_widths": (5,),
    "inr_widths": (6, 5),
    "gating_widths": (5, 4),
    "kl_samples": 3,
}


def build(**changes: Any) -> VaMoH:
    """A tiny float64 model whose parameters have all left their special initial values."""
    model = VaMoH(**{**TINY, **changes}).double()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, dtype=torch.float64, generator=g)
    return model


def grid(b: int = 3, shape: tuple[int, ...] = (5, 6), c: int = 1, seed: int = 0) -> PointSet:
    values = torch.rand(b, c, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return PointSet.from_grid(values)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masks(b: int, n: int, rate: float = 0.5) -> Tensor:
    """Per-item masks; the last item has fewer points than the first stage has centroids, but enough."""
    mask = torch.rand(b, n, generator=seeded(9)) < rate
    mask[-1] = False
    mask[-1, [2, 7, 11, 12, 20]] = True
    return mask


def terms(model: VaMoH, points: PointSet, noise: Noise, **arguments: Any) -> Tensor:
    """[B, 4]"""
    return torch.stack(list(vars(model.elbo(points, noise=noise, **arguments)).values()), 1)


def stored(noise: Noise) -> Noise:
    """The same noise, with all samples in a tensor."""
    seed, samples = noise.kl
    return Noise(noise.z, counter_noise_reference(seed, range(samples), *noise.z.shape, noise.z.dtype))


def item(noise: Noise, i: int) -> Noise:
    return Noise(noise.z[i : i + 1], noise.kl[:, i : i + 1])


def test_terms_add_up():
    model, points = build(), grid()
    noise = model.draw_noise(3, generator=seeded())
    result = model.elbo(points, noise=noise, beta_z=0.3, beta_c=2.0)
    torch.testing.assert_close(result.elbo, result.log_likelihood - 0.3 * result.kl_z - 2.0 * result.kl_c)
    torch.testing.assert_close(result.loss, -result.elbo.mean())
    assert all(t.shape == (3,) for t in vars(result).values())


def test_phases():
    model, points = build(), grid()
    noise = model.draw_noise(3, generator=seeded())
    both = model.elbo(points, noise=noise)
    model.use_flow = False
    standard = model.elbo(points, noise=noise)
    assert torch.equal(standard.kl_z, model.encode(points).kl_standard())
    assert not torch.allclose(standard.kl_z, both.kl_z) and torch.equal(standard.kl_c, both.kl_c)
    assert torch.equal(
        model.sample_prior(4, generator=seeded()), torch.randn(4, 3, dtype=torch.float64, generator=seeded())
    )
    model.use_gating_prior = False
    flat = model.elbo(points, noise=noise)
    features = model.encoding(points.coords)
    log_q = model.gating_posterior(features, model.encode(points).sample(noise.z), points.values)
    expected = (log_q.exp() * (log_q + math.log(3))).sum((1, 2))
    torch.testing.assert_close(flat.kl_c, expected)
    assert torch.equal(flat.log_likelihood, both.log_likelihood)
    torch.testing.assert_close(model.decode(noise.z, points.coords).pi, torch.full((3, 30, 3), 1 / 3).double())
    flat.loss.backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert unused == {n for n, _ in model.named_parameters() if n.startswith(("prior.", "gating_prior."))}
    model.use_flow = model.use_gating_prior = True
    model.zero_grad()
    model.elbo(points, noise=noise).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("use_flow", [True, False])
@pytest.mark.parametrize("kl", ["exact", "cross_entropy"])
def test_only_the_flow_cross_entropy_leaves_the_encoder_alone(kl, use_flow):
    model, points = build(kl=kl), grid()
    model.use_flow = use_flow
    model.elbo(points, generator=seeded()).kl_z.sum().backward()
    reached = any(p.grad is not None and p.grad.any() for p in model.encoder.parameters())
    assert reached == (kl == "exact" or not use_flow)
    model.zero_grad()
    model.elbo(points, generator=seeded()).loss.backward()
    assert all(p.grad.any() for p in model.encoder.parameters())


def test_the_kl_objectives_differ_by_the_entropy():
    exact, cross, points = build(), build(kl="cross_entropy"), grid()
    noise = exact.draw_noise(3, generator=seeded())
    difference = cross.elbo(points, noise=noise).kl_z - exact.elbo(points, noise=noise).kl_z
    torch.testing.assert_close(difference, exact.encode(points).entropy())


CONFIGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "cross_entropy": {"kl": "cross_entropy", "likelihood": "continuous_bernoulli"},
    "learned frequencies": {"learn_frequencies": True, "initialization": "published"},
    "raw coordinates, sine": {"frequencies": 0, "inr_activation": "sine", "inr_omega": 2.0, "likelihood": "bernoulli"},
    "others": {
        "inr_activation": "relu",
        "gating_bound": "tanh",
        "weight_net_slope": 0.2,
        "pool_centroids": (6,),
        "pool_neighbors": (3,),
        "prior": "normal",
        "open_ends": True,
        "bin_width": 1 / 255,
        "epsilon": 0.0,
        "neighbor_metric": "raw",
    },
}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_gradient_against_finite_differences(config):
    model, points = build(**CONFIGS[config]), grid()
    points = points.with_mask(masks(3, 30))
    noise, hoods = model.draw_noise(3, generator=seeded()), model.neighborhoods(points)

    def bound() -> Any:
        return model.elbo(points, noise=noise, neighborhoods=hoods, beta_z=0.7, beta_c=1.3)

    bound().loss.backward()
    for i, (name, parameter) in enumerate(model.named_parameters()):
        # the cross-entropy of the published code does not differentiate its samples
        detached = model.kl == "cross_entropy" and name.startswith("encoder.")

        def value(detached: bool = detached) -> float:
            result = bound()
            return -float((result.elbo + 0.7 * result.kl_z if detached else result.elbo).mean())

        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=seeded(i))
        at, step, sides = parameter.detach().clone(), 1e-6, []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.copy_(at + sign * step * direction)
                sides.append(value())
            parameter.copy_(at)
        expected = (sides[0] - sides[1]) / (2 * step)
        assert float((parameter.grad * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-5), name


def brute_force(model: VaMoH, points: PointSet) -> float:
    """log p(y) of the first function, by integrating over a one-dimensional z and summing over components."""
    z = torch.linspace(-14, 14, 7001, dtype=torch.float64)[:, None]
    features = model.encoding(points.coords)
    with torch.no_grad():
        logits = inr_mixture(model.hypernet(z), features, model.inr)
        per_component = log_likelihood(
            model.likelihood.op, logits, points.values[:1, None], model.likelihood.scale[:, None]
        ).sum(-1)
        log_pi = model.gating_prior(features, z) if model.use_gating_prior else uniform(1, model.components, z)
        log_joint = (log_pi.exp() * per_component.exp()).sum(1).log().sum(1) + model._prior_z.log_prob(z)
    shift = log_joint.max()
    return float(shift + torch.trapezoid((log_joint - shift).exp(), z[:, 0]).log())


@pytest.mark.parametrize("phase", [(True, True), (False, False)])
@pytest.mark.parametrize("likelihood", ["logistic", "continuous_bernoulli"])
def test_bounds_against_numerical_integration(likelihood, phase):
    """Many copies of one function: exp(iwae) is unbiased, and the bounds rise towards log p(y) with the samples."""
    model = build(latent_dim=1, likelihood=likelihood, scale=0.3, encoder_centroids=(4, 2), encoder_neighbors=(3, 2))
    model.use_flow, model.use_gating_prior = phase
    with torch.no_grad():  # centred on the prior and broader, as an importance distribution should be
        prior = model.sample_prior(2000, generator=seeded())
        model.encoder.head.bias.copy_(torch.stack([prior.mean(), prior.var().log() + 0.3]))
    coords, copies = torch.rand(5, 2, dtype=torch.float64, generator=seeded()), 4000
    values = torch.rand(1, 5, 1, dtype=torch.float64, generator=seeded(1)).expand(copies, -1, -1)
    points = PointSet(coords, values)
    exact = brute_force(model, points)
    with torch.no_grad():
        elbo = model.elbo(points, generator=seeded(2)).elbo
    bounds = [elbo] + [model.iwae(points, samples=s, generator=seeded(s)) for s in (1, 4, 20)]
    means = [float(b.mean()) for b in bounds]
    errors = [float(b.std()) / copies**0.5 for b in bounds]
    for i in range(3):
        assert means[i + 1] - means[i] > 3 * (errors[i] ** 2 + errors[i + 1] ** 2) ** 0.5
    assert means[-1] < exact < means[-1] + 0.2
    for bound in bounds[1:]:
        ratio = (bound - exact).exp()
        assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / copies**0.5 < 0.2


def test_proper_iwae_is_a_probability():
    """The 256 values of a single pixel, others fixed: probabilities of the whole image sum to that of the others."""
    model = build(channels=1)
    values = torch.full((256, 5, 1), 77 / 255, dtype=torch.float64)
    values[:, 0, 0] = torch.arange(256, dtype=torch.float64) / 255
    coords = torch.rand(5, 2, dtype=torch.float64, generator=seeded())
    z = torch.randn(1, 3, dtype=torch.float64, generator=seeded(1))
    zeros = torch.zeros(256, 3, dtype=torch.float64)
    model._posterior = lambda points, place: FixedPosterior(z, zeros)
    whole = model.iwae(PointSet(coords, values), samples=1, proper=True)
    others = model.iwae(PointSet(coords[1:], values[:1, 1:]), samples=1, proper=True)
    assert float(whole.logsumexp(0)) == pytest.approx(float(others), abs=1e-9)
    ours = model.iwae(PointSet(coords, values), samples=1)
    assert not torch.allclose(whole, ours)


class FixedPosterior:
    """A posterior that always gives the same z, with density 1."""

    def __init__(self, z: Tensor, like: Tensor) -> None:
        self.z = z

    def sample(self, noise: Tensor) -> Tensor:
        return self.z.expand(len(noise), -1)

    def log_prob(self, z: Tensor) -> Tensor:
        return torch.zeros(len(z), dtype=z.dtype)


def test_iwae_has_no_graph_and_follows_its_generator():
    model, points = build(), grid()
    first = model.iwae(points, samples=3, generator=seeded())
    assert not first.requires_grad and first.shape == (3,)
    assert torch.equal(model.iwae(points, samples=3, generator=seeded()), first)
    assert not torch.equal(model.iwae(points, samples=3, generator=seeded(1)), first)


@pytest.mark.parametrize("metric", ["encoded", "raw"])
def test_a_shared_mask_equals_selecting_points(metric):
    model, points = build(neighbor_metric=metric), grid()
    mask = torch.rand(30, generator=seeded()) < 0.5
    masked, selected = points.with_mask(mask), points.select(mask.nonzero()[:, 0])
    noise = model.draw_noise(3, generator=seeded())
    assert torch.equal(terms(model, masked, noise), terms(model, selected, noise))
    assert torch.equal(model.encode(masked).mean, model.encode(selected).mean)
    assert torch.equal(
        model.iwae(masked, samples=2, generator=seeded()), model.iwae(selected, samples=2, generator=seeded())
    )
    a = model.reconstruct(masked)
    b = model.reconstruct(selected, points.coords, posterior_at=mask.nonzero()[:, 0])
    for x, y in zip(vars(a).values(), vars(b).values(), strict=True):
        torch.testing.assert_close(x, y)
    for x, y in zip(model.neighborhoods(masked), model.neighborhoods(selected), strict=True):
        assert torch.equal(x.centroids, y.centroids) and torch.equal(x.neighbors, y.neighbors)
    per_item = points.with_mask(mask.expand(3, -1))
    assert torch.equal(terms(model, per_item, noise), terms(model, selected, noise))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
def test_masks_per_item_equal_every_item_alone(shared, pooled):
    model = build(**({"pool_centroids": (6,), "pool_neighbors": (3,)} if pooled else {}))
    points, mask = grid(), masks(3, 30)
    if not shared:
        jitter = torch.rand(3, 30, 2, dtype=torch.float64, generator=seeded(3))
        points = PointSet(points.coords + 0.1 * jitter, points.values)
    noise = stored(model.draw_noise(3, generator=seeded()))
    together = points.with_mask(mask)
    result, posterior = terms(model, together, noise), model.encode(together)
    maps, hoods = model.reconstruct(together), model.neighborhoods(together)
    model._randn = lambda *shape, generator: noise.z[:, :]
    bound = model.iwae(together, samples=2)
    kept = mask.any(0).nonzero()[:, 0]
    for i in range(3):
        own = mask[i].nonzero()[:, 0]
        coords = points.coords if shared else points.coords[i]
        alone = PointSet(coords[own], points.values[i : i + 1, own])
        torch.testing.assert_close(terms(model, alone, item(noise, i))[0], result[i])
        torch.testing.assert_close(model.encode(alone).mean[0], posterior.mean[i])
        torch.testing.assert_close(model.encode(alone).std[0], posterior.std[i])
        model._randn = lambda *shape, generator, i=i: noise.z[i : i + 1]
        torch.testing.assert_close(model.iwae(alone, samples=2)[0], bound[i])
        for x, y in zip(
            vars(model.reconstruct(alone, coords, posterior_at=own)).values(), vars(maps).values(), strict=True
        ):
            torch.testing.assert_close(x[0], y[i])
        first, many = model.neighborhoods(alone)[0], hoods[0]
        m = first.centroids.shape[1]
        assert torch.equal(own[first.centroids[0]], kept[many.centroids[i, :m]])
        assert torch.equal(own[first.neighbors[0]], kept[many.neighbors[i, :m]])
        assert (many.centroids[i, m:] == -1).all()


@pytest.mark.parametrize("centroids", ["points", "fixed"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_context_hides_points_from_the_encoder_alone(centroids, masked):
    model, points = build(centroids=centroids, encoder_centroids=(8, 4)), grid()
    if centroids == "fixed":
        model.set_centroids(points.coords)
    if masked:
        mask = torch.rand(3, 30, generator=seeded(1)) < 0.8
        mask[:, 3:5] = False  # points that no function observes
        points = points.with_mask(mask)
    context = masks(3, 30)
    noise = stored(model.draw_noise(3, generator=seeded()))
    result = model.elbo(points, context=context, noise=noise)
    # The same from the parts: q(z) of what is seen, likelihood and gating of all points.
    posterior = model.encode(points.with_mask(context if points.mask is None else points.mask & context))
    z, features = posterior.sample(noise.z), model.encoding(points.coords)
    log_q, log_p = model.gating_posterior(features, z, points.values), model.gating_prior(features, z)
    log_q = torch.where(context[:, None], log_q, log_p)  # nothing knows the values that are hidden
    logits = inr_mixture(model.hypernet(z), features, model.inr)
    scale = model.likelihood.scale[:, None]
    each = log_likelihood(model.likelihood.op, logits, points.values[:, None], scale).sum(-1)  # [B, K, N]
    every = points.mask if masked else torch.ones(3, 30, dtype=torch.bool)
    torch.testing.assert_close(result.log_likelihood, ((log_q.exp() * each).sum(1) * every).sum(1))
    torch.testing.assert_close(result.kl_c, ((log_q.exp() * (log_q - log_p)).sum(1) * every).sum(1))
    seen = model.neighborhoods(points.with_mask(context if points.mask is None else points.mask & context))
    torch.testing.assert_close(
        terms(model, points, noise, context=context, neighborhoods=seen), terms(model, points, noise, context=context)
    )
    kept = (every & context)[:, every.any(0)]
    for i, neighbors in enumerate(model.geometry(points, context=context).neighborhoods[0].neighbors):
        assert kept[i, neighbors].all()
    shared = context[0]
    torch.testing.assert_close(
        terms(model, points, noise, context=shared), terms(model, points, noise, context=shared.expand(3, -1))
    )
    everything = torch.ones(3, 30, dtype=torch.bool)
    torch.testing.assert_close(terms(model, points, noise, context=everything), terms(model, points, noise))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_draws_of_a_completion(own, elsewhere):
    model, points = build(), grid().with_mask(masks(3, 30))
    if own:
        points = PointSet(points.coords.expand(3, -1, -1).contiguous(), points.values, points.mask)
    coords = torch.rand(*([3] if own else []), 7, 2, dtype=torch.float64, generator=seeded(1)) if elsewhere else None
    calls, encode = [], model.encode
    model.encode = lambda *args, **kwargs: (calls.append(1), encode(*args, **kwargs))[1]
    result = model.reconstruct(points, coords, draws=4, generator=seeded())
    assert len(calls) == 1 and result.decoded.shape == (4, 3, 7 if elsewhere else 30, 1)
    q, g = encode(points), seeded()
    for drawn in result.decoded:
        z = q.sample(torch.randn(3, 3, dtype=torch.float64, generator=g))
        torch.testing.assert_close(drawn, model.reconstruct(points, coords, z=z).mean)
    torch.testing.assert_close(result.mean, result.decoded.mean(0))
    torch.testing.assert_close(result.std, result.decoded.std(0))
    assert result.std.amin() > 0 and not model.reconstruct(points, draws=1).std.any()


def test_draws_are_of_the_posterior():
    model, points = build(), grid()
    with pytest.raises(ValueError, match="reconstruct: z must be left out with draws"):
        model.reconstruct(points, z=torch.zeros(3, 3).double(), draws=2)
    with pytest.raises(ValueError, match="reconstruct: draws must be at least 1"):
        model.reconstruct(points, draws=0)


def test_padded_lists_equal_separate_ones():
    model, g, sizes = build(), seeded(), [20, 5, 11]
    coords = [torch.rand(n, 2, dtype=torch.float64, generator=g) for n in sizes]
    values = [torch.rand(n, 1, dtype=torch.float64, generator=g) for n in sizes]
    noise = stored(model.draw_noise(3, generator=seeded()))
    together = PointSet.from_lists(coords, values)
    result, maps = terms(model, together, noise), model.reconstruct(together)
    for i, n in enumerate(sizes):
        alone = PointSet(coords[i], values[i][None])
        torch.testing.assert_close(terms(model, alone, item(noise, i))[0], result[i])
        for x, y in zip(vars(model.reconstruct(alone)).values(), vars(maps).values(), strict=True):
            torch.testing.assert_close(x[0], y[i, :n])


@pytest.mark.parametrize("mask", [None, masks(3, 30)[0], masks(3, 30)], ids=["no mask", "shared", "per item"])
def test_coordinates_per_item_equal_shared_ones(mask):
    model, points = build(), grid().with_mask(mask)
    each = PointSet(points.coords.expand(3, -1, -1).clone(), points.values, mask)
    noise = model.draw_noise(3, generator=seeded())
    torch.testing.assert_close(terms(model, each, noise), terms(model, points, noise))
    for x, y in zip(vars(model.reconstruct(each)).values(), vars(model.reconstruct(points)).values(), strict=True):
        torch.testing.assert_close(x, y)
    z, c = noise.z, each.coords
    torch.testing.assert_close(model.decode(z, c).mean, model.decode(z, points.coords).mean)


@pytest.mark.parametrize("junk", [0.5, -7.0, 1e300])
@pytest.mark.parametrize("likelihood", ["logistic", "bernoulli"])
def test_values_at_unobserved_points_do_not_matter(likelihood, junk):
    model, points = build(likelihood=likelihood), grid()
    noise = model.draw_noise(3, generator=seeded())
    for mask in (masks(3, 30), masks(3, 30)[0]):
        results = []
        for values in (points.values, torch.where(mask[..., None], points.values, junk)):
            p = PointSet(points.coords, values, mask)
            model.zero_grad()
            result = terms(model, p, noise)
            result[:, 0].sum().backward()
            maps = model.reconstruct(p)
            grads = [q.grad.clone() for q in model.parameters()]
            results.append(
                [result, model.iwae(p, samples=2, generator=seeded()), maps.mean, maps.mean_map, maps.pi, *grads]
            )
        for x, y in zip(*results, strict=True):
            assert x.isfinite().all() and torch.equal(x, y)


def test_a_batch_equals_its_items():
    model, points = build(), grid(4)
    noise = stored(model.draw_noise(4, generator=seeded()))
    result = terms(model, points, noise)
    for i in range(4):
        alone = PointSet(points.coords, points.values[i : i + 1])
        torch.testing.assert_close(terms(model, alone, item(noise, i))[0], result[i])


def count_searches(model: VaMoH) -> list[int]:
    calls, get = [], model._cache.get

    def counted(key: Any, compute: Any, kind: str = "") -> Any:
        return get(key, lambda: (kind == "neighbors" and calls.append(1), compute())[1], kind)

    model._cache.get = counted
    return calls


def test_neighborhoods_are_remembered_by_content():
    model, points = build(), grid()
    calls, expected = count_searches(model), model.encode(points).mean
    assert len(calls) == 1
    again = PointSet(points.coords.clone(), points.values.clone())
    assert torch.equal(model.encode(again).mean, expected)
    model.elbo(again)
    model.reconstruct(again)
    model.iwae(again, samples=1)
    assert len(calls) == 1
    points.coords[7] += 0.37
    changed = model.encode(points).mean
    assert len(calls) == 2
    assert torch.equal(changed, build().encode(points).mean)
    masked = again.with_mask(masks(3, 30))
    masked.mask[1] = True  # every point stays
    model.encode(masked)
    assert len(calls) == 3
    masked.mask[0, 3] ^= True
    assert torch.equal(model.encode(masked).mean, build().encode(masked).mean)
    assert len(calls) == 4
    assert torch.equal(model.encode(again).mean, expected) and len(calls) == 4


def test_learned_frequencies_move_the_neighborhoods():
    model, points = build(learn_frequencies=True), grid()
    calls = count_searches(model)
    model.elbo(points)
    model.elbo(points)
    assert len(calls) == 1
    with torch.no_grad():
        model.encoding.frequencies.mul_(3)
    model.elbo(points)
    assert len(calls) == 2


@pytest.mark.parametrize("frequencies", [0, 4])
def test_coordinates_changed_in_place_leave_no_trace(frequencies):
    model, points = build(frequencies=frequencies), grid()
    before = PointSet(points.coords.clone(), points.values)
    expected = model.encode(points).mean
    points.coords.mul_(0.3)
    assert torch.equal(model.encode(before).mean, expected)
    assert torch.equal(model.encode(points).mean, build(frequencies=frequencies).encode(points).mean)


def test_training_goes_on_after_inference_mode():
    model, points = build(), grid()
    with torch.inference_mode():
        model.elbo(points)
    model.elbo(points).loss.backward()


def test_given_noise_and_neighborhoods_are_used():
    model, points = build(), grid()
    noise, hoods = model.draw_noise(3, generator=seeded()), model.neighborhoods(points)
    assert noise.z.shape == (3, 3) and noise.kl.samples == 3 and stored(noise).kl.shape == (3, 3, 3)
    calls = count_searches(model)
    first = terms(model, points, noise, neighborhoods=hoods)
    assert torch.equal(terms(model, points, noise, neighborhoods=hoods), first) and not calls
    assert torch.equal(terms(model, points, noise), first)
    torch.testing.assert_close(terms(model, points, stored(noise), neighborhoods=hoods), first)
    again = Noise(noise.z, CounterNoise(noise.kl.seed + 1, 3))
    assert not torch.allclose(terms(model, points, again, neighborhoods=hoods), first)
    other = tuple(Neighborhood(c, n.flip(1)) for c, n in hoods)
    assert not torch.allclose(terms(model, points, noise, neighborhoods=other), first)
    assert not torch.allclose(model.encode(points, neighborhoods=other).mean, model.encode(points).mean)
    a, b = (model.elbo(points, generator=seeded(s)).elbo for s in (0, 1))
    assert torch.equal(model.elbo(points, generator=seeded(0)).elbo, a) and not torch.equal(a, b)
    torch.manual_seed(3)
    a = model.elbo(points).elbo
    torch.manual_seed(3)
    assert torch.equal(model.elbo(points).elbo, a)


def test_reconstruction_mixes_the_components():
    model, points = build(), grid(2)
    z = model.encode(points).mean
    features = model.encoding(points.coords)
    with torch.no_grad():
        means = model.likelihood.mean(inr_mixture(model.hypernet(z), features, model.inr))
        prior, posterior = (
            model.gating_prior(features, z).exp(),
            model.gating_posterior(features, z, points.values).exp(),
        )
    for result, pi in (
        (model.reconstruct(points), posterior),
        (model.reconstruct(points, points.coords), prior),
        (model.decode(z, points.coords), prior),
        (model.reconstruct(points, z=z), posterior),
    ):
        torch.testing.assert_close(result.pi, pi.transpose(1, 2))
        torch.testing.assert_close(result.mean, torch.einsum("bkm,bkmc->bmc", pi, means))
        best = pi.argmax(1)[:, None, :, None]
        torch.testing.assert_close(result.mean_map, means.take_along_dim(best, 1)[:, 0])
        assert torch.equal(result.segmentation, pi.argmax(1))
    assert not model.reconstruct(points, z=z).mean.requires_grad
    other = model.reconstruct(points, z=z + 1)
    assert not torch.allclose(other.mean, model.reconstruct(points).mean)


def test_posterior_on_a_finer_grid():
    model, points, scale = build(), grid(2, (3, 4)), 2
    fine = grid_coords((3, 4), scale=scale, dtype=torch.float64)
    at = torch.arange(len(fine)).reshape(5, 7)[::2, ::2].flatten()
    points = points.with_mask(torch.arange(12) % 5 > 0)
    result, plain = model.reconstruct(points, fine, posterior_at=at), model.reconstruct(points, fine)
    on_grid = model.reconstruct(points)
    observed = at[points.mask]
    torch.testing.assert_close(result.pi[:, at], on_grid.pi)
    others = torch.ones(len(fine), dtype=torch.bool)
    others[observed] = False
    torch.testing.assert_close(result.pi[:, others], plain.pi[:, others])
    assert not torch.allclose(result.pi[:, observed], plain.pi[:, observed])


def test_posterior_replaces_the_uniform_prior():
    model, points = build(), grid(2).with_mask(torch.arange(30) % 3 > 0)
    learned = model.reconstruct(points)
    model.use_gating_prior = False
    flat = model.reconstruct(points)
    torch.testing.assert_close(flat.pi[:, points.mask], learned.pi[:, points.mask])
    torch.testing.assert_close(flat.pi[:, ~points.mask], torch.full((2, 10, 3), 1 / 3).double())


@pytest.mark.parametrize("per_item", [True, False])
def test_decoding_in_chunks(monkeypatch, per_item):
    model, points, order = build(), grid(2), torch.randperm(30, generator=seeded())
    coords = points.coords[order]
    at = order.argsort()
    coords = coords.expand(2, -1, -1) if per_item else coords
    z = torch.randn(2, 3, dtype=torch.float64, generator=seeded())
    calls: list[int] = []
    monkeypatch.setattr(
        generator,
        "inr_mixture_mean",
        lambda t, f, *rest, **mirror: (calls.append(f.shape[-2]), inr_mixture_mean(t, f, *rest, **mirror))[1],
    )

    def run() -> list[Tensor]:
        calls.clear()
        maps = [model.reconstruct(points, coords, posterior_at=at), model.decode(z, coords), model.reconstruct(points)]
        return [t for m in maps for t in vars(m).values()]

    whole = run()
    assert len(calls) == 3
    per_point = (2 if per_item else 1) * model.encoding.out_dim + 2 * (3 + generator._GATING)
    monkeypatch.setattr(generator, "_CHUNK", 7 * per_point)
    for x, y in zip(run(), whole, strict=True):
        torch.testing.assert_close(x, y)
    assert len(calls) >= 3 * 4 and max(calls) <= 7 * (2 if per_item else 1) and sum(calls) == 3 * 30


def test_samples():
    model, coords = build(channels=2), grid_coords((4, 3), dtype=torch.float64)
    result = model.sample(5, coords, generator=seeded())
    assert result.mean.shape == result.mean_map.shape == (5, 12, 2) and result.pi.shape == (5, 12, 3)
    assert result.segmentation.shape == result.entropy.shape == (5, 12)
    assert ((result.mean > 0) & (result.mean < 1)).all()
    torch.testing.assert_close(result.pi.sum(-1), torch.ones(5, 12).double())
    z = model.sample_prior(5, generator=seeded())
    assert torch.equal(model.decode(z, coords).mean, result.mean)
    noise = torch.randn(5, 3, dtype=torch.float64, generator=seeded())
    assert torch.equal(z, model.prior.sample(noise)) and not torch.equal(z, noise)
    assert not torch.equal(model.sample(5, coords, generator=seeded(1)).mean, result.mean)
    assert isinstance(build(prior="normal").prior, NormalPrior)
    assert torch.equal(build(prior="normal").sample_prior(5, generator=seeded()), noise)


def test_copies_give_the_same_numbers():
    model, points = build(), grid()
    noise = model.draw_noise(3, generator=seeded())
    expected = terms(model, points, noise)
    other = VaMoH(**{**TINY, "seed": 1}).double()
    assert not torch.equal(terms(other, points, noise), expected)
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(terms(twin, points, noise), expected)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.encoding.frequencies.mul_(2)
    assert torch.equal(terms(model, points, noise), expected)
    assert "encoding.frequencies" in model.state_dict()


def test_seed(monkeypatch):
    def forbidden(*_: object) -> None:
        raise AssertionError("the state of another device's generator was touched")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", forbidden)
    torch.default_generator.manual_seed(7)
    before = torch.get_rng_state()
    a, b, c = (VaMoH(**TINY, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name])
    drawn = [n for n, v in a.state_dict().items() if v.unique().numel() > 1]
    assert len(drawn) > 20 and not any(torch.equal(a.state_dict()[n], c.state_dict()[n]) for n in drawn)


CHANGES: dict[str, Any] = {
    "latent_dim": 4,
    "components": 2,
    "frequencies": 5,
    "frequency_scale": 0.7,
    "learn_frequencies": True,
    "coord_offset": {"coord_offset": (0.5, 0.0), "coord_scale": (2.0, 1.0)},
    "coord_scale": {"coord_offset": (0.0, 0.0), "coord_scale": (2.0, 1.0)},
    "encoder_centroids": (9, 5),
    "encoder_neighbors": (5, 3),
    "encoder_channels": (3, 5),
    "pool_centroids": {"pool_centroids": (6,), "pool_neighbors": (3,)},
    "pool_neighbors": {"pool_centroids": (6,), "pool_neighbors": (4,)},
    "weight_net": (4, 4),
    "weight_net_slope": 0.2,
    "neighbor_metric": "raw",
    "centroids": "points",
    "encoder_density": True,
    "prior": "normal",
    "flow_layers": 3,
    "hypernet_widths": (6,),
    "inr_widths": (6, 6),
    "inr_activation": "relu",
    "inr_slope": 0.3,
    "inr_omega": 3.0,
    "gating_widths": (5, 5),
    "gating_bound": "tanh",
    "likelihood": "bernoulli",
    "scale": 0.2,
    "learn_scale": False,
    "max_scale": 0.05,
    "bin_width": 1 / 255,
    "epsilon": 1e-3,
    "open_ends": True,
    "kl": "cross_entropy",
    "kl_samples": 4,
    "objective": "marginal",
    "initialization": "published",
    "seed": 1,
}
BASES = {
    "inr_omega": {"inr_activation": "sine"},
    "pool_neighbors": {"pool_centroids": (6,), "pool_neighbors": (3,)},
}


def fingerprint(**changes: Any) -> tuple[object, ...]:
    """The bound of a fresh model and what it learns."""
    model, points = VaMoH(**{**TINY, **changes}), grid().to(torch.float32)
    values = points.values.clone()
    values[:, :4], values[:, 4:8] = 0.0, 1.0
    order = torch.randperm(points.count, generator=seeded())
    result = model.elbo(PointSet(points.coords[order], values[:, order]), generator=seeded())
    return tuple(result.elbo.tolist()), tuple(n for n, _ in model.named_parameters())


def test_every_argument_is_tried():
    arguments = set(inspect.signature(VaMoH).parameters) - {"coord_dim", "channels"}
    assert arguments == set(CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_every_argument_has_an_effect(name):
    base, change = BASES.get(name, {}), CHANGES[name]
    assert fingerprint(**base) == fingerprint(**base)
    assert fingerprint(**{**base, **(change if isinstance(change, dict) else {name: change})}) != fingerprint(**base)


@pytest.mark.parametrize("coord_dim", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_domain(coord_dim, channels):
    model = VaMoH(**{**TINY, "coord_dim": coord_dim, "channels": channels})
    points = PointSet(torch.rand(2, 20, coord_dim), torch.rand(2, 20, channels))
    model.elbo(points).loss.backward()
    assert model.reconstruct(points).mean.shape == (2, 20, channels)


def test_learned_scale_gets_a_gradient():
    model, points = VaMoH(**TINY), grid().to(torch.float32)
    model.elbo(points).loss.backward()
    assert model.likelihood.raw_scale.grad.shape == (3, 1) and model.likelihood.raw_scale.grad.all()


@pytest.mark.parametrize("how", ["counter", pytest.param("tensor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(how):
    model, points = build(), grid()
    noise, hoods = model.draw_noise(3, generator=seeded()), model.neighborhoods(points)
    noise = stored(noise) if how == "tensor" else noise
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda p: model.elbo(p, neighborhoods=hoods, noise=noise), fullgraph=True, backend="aot_eager"
    )
    results = []
    for function in (compiled, lambda p: model.elbo(p, neighborhoods=hoods, noise=noise)):
        model.zero_grad()
        result = function(points)
        result.loss.backward()
        results.append([*vars(result).values(), *(p.grad for p in model.parameters())])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"coord_dim": 0}, ValueError, "VaMoH: coord_dim must be at least 1, got 0"),
        ({"channels": 1.0}, TypeError, "VaMoH: channels must be an int, got 1.0"),
        ({"latent_dim": -1}, ValueError, "VaMoH: latent_dim must be at least 1, got -1"),
        ({"components": True}, TypeError, "VaMoH: components must be an int, got True"),
        ({"flow_layers": 0}, ValueError, "VaMoH: flow_layers must be at least 1, got 0"),
        ({"kl_samples": 0}, ValueError, "VaMoH: kl_samples must be at least 1, got 0"),
        ({"frequencies": -1}, ValueError, "VaMoH: frequencies must be at least 0, got -1"),
        ({"frequencies": 2.5}, TypeError, "VaMoH: frequencies must be an int, got 2.5"),
        ({"frequency_scale": 0}, ValueError, "VaMoH: frequency_scale must be above 0, got 0"),
        ({"inr_slope": math.nan}, ValueError, "VaMoH: inr_slope must be a number, finite and below 2.63, got nan"),
        (
            {"coord_offset": (0.0, 1.0)},
            ValueError,
            r"VaMoH: coord_scale must be as long as coord_offset \(2\), got \[\]",
        ),
        (
            {"coord_offset": (0, 0, 0), "coord_scale": (1, 1, 1)},
            ValueError,
            r"VaMoH: coord_offset must list 2 numbers or none, got \[0, 0, 0\]",
        ),
        (
            {"coord_offset": (0.0, 1.0), "coord_scale": (1.0, 0.0)},
            ValueError,
            "VaMoH: coord_scale must be a list of numbers above 0, got",
        ),
        (
            {"encoder_centroids": ()},
            ValueError,
            r"VaMoH: encoder_centroids must be a list of at least one int, got \[\]",
        ),
        (
            {"encoder_channels": (3,)},
            ValueError,
            r"VaMoH: encoder_channels must be as long as encoder_centroids \(2\), got \[3\]",
        ),
        (
            {"encoder_channels": (3, 0)},
            ValueError,
            r"VaMoH: encoder_channels must be a list of ints of at least 1, got \[3, 0\]",
        ),
        (
            {"encoder_channels": (3, None)},
            TypeError,
            r"VaMoH: encoder_channels must be a list of ints, got \[3, None\]",
        ),
        ({"encoder_neighbors": (4, 0)}, ValueError, "VaMoH: encoder_neighbors must be a list of ints of at least 1"),
        ({"encoder_neighbors": 4}, TypeError, r"VaMoH: encoder_neighbors must be a list of ints, got 4 \(int\)"),
        (
            {"encoder_neighbors": (4, 9)},
            ValueError,
            r"VaMoH: encoder_neighbors must be at most the centroids of the stage before \(here 8\), got \[4, 9\]",
        ),
        (
            {"encoder_centroids": (8, 9)},
            ValueError,
            r"VaMoH: encoder_centroids must be at most the centroids of the stage before \(here 8\), got \[8, 9\]",
        ),
        (
            {"pool_centroids": (4, 4), "pool_neighbors": (2, 5)},
            ValueError,
            r"VaMoH: pool_neighbors must be at most the centroids of the stage before \(here 4\), got \[2, 5\]",
        ),
        ({"pool_centroids": (4,)}, ValueError, r"VaMoH: pool_neighbors must be as long as pool_centroids \(1\)"),
        ({"pool_centroids": (4,) * 3}, ValueError, "VaMoH: pool_centroids must be at most 2 long"),
        ({"weight_net": ()}, ValueError, "VaMoH: weight_net must be a list of at least one int"),
        ({"weight_net": (3, 0)}, ValueError, "VaMoH: weight_net must be a list of ints of at least 1"),
        ({"hypernet_widths": (0,)}, ValueError, "VaMoH: hypernet_widths must be a list of ints of at least 1"),
        ({"inr_widths": (0,)}, ValueError, "VaMoH: inr_widths must be a list of ints of at least 1"),
        ({"gating_widths": (3.0,)}, TypeError, r"VaMoH: gating_widths must be a list of ints, got \[3.0\]"),
        ({"neighbor_metric": "l1"}, ValueError, "VaMoH: neighbor_metric must be one of encoded, raw, got 'l1'"),
        ({"prior": "vamp"}, ValueError, "VaMoH: prior must be one of normal, flow, got 'vamp'"),
        ({"prior": 3}, TypeError, r"VaMoH: prior must be a string, got 3 \(int\)"),
        (
            {"inr_activation": "tanh"},
            ValueError,
            "VaMoH: inr_activation must be one of leaky_relu, relu, sine, got 'tanh'",
        ),
        ({"gating_bound": "relu"}, ValueError, "VaMoH: gating_bound must be one of none, tanh, got 'relu'"),
        ({"kl": "mc"}, ValueError, "VaMoH: kl must be one of exact, cross_entropy, got 'mc'"),
        ({"initialization": "zero"}, ValueError, "VaMoH: initialization must be one of stable, published, got 'zero'"),
        ({"likelihood": "normal"}, ValueError, "VaMoH: likelihood must be one of logistic, .*, got 'normal'"),
        ({"scale": 1.0}, ValueError, "VaMoH: scale must be above 0 and below 1, got 1.0"),
        ({"open_ends": 1}, TypeError, r"VaMoH: open_ends must be true or false, got 1 \(int\)"),
    ],
)
def test_constructor_errors(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        VaMoH(**{**TINY, **change})


def test_networks_without_hidden_layers():
    model, points = build(hypernet_widths=(), inr_widths=(), gating_widths=()), grid()
    model.elbo(points).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def float32() -> PointSet:
    return grid().to(torch.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, p: m.elbo(p.values), TypeError, "VaMoH: points must be a PointSet, got Tensor"),
        (
            lambda m, p: m.encode(PointSet(torch.rand(30, 3).double(), p.values)),
            ValueError,
            "VaMoH: coords must have D=2",
        ),
        (lambda m, p: m.elbo(grid(c=2)), ValueError, r"VaMoH: values must have shape \[B, N, 1\], got \[3, 30, 2\]"),
        (lambda m, p: m.elbo(float32()), TypeError, "VaMoH: values must have dtype torch.float64, got torch.float32"),
        (lambda m, p: m.neighborhoods(float32()), TypeError, "VaMoH: values must have dtype torch.float64"),
        (
            lambda m, p: m.elbo(PointSet(p.coords, p.values * 255)),
            ValueError,
            r"elbo: values must lie in \[0, 1\] for the",
        ),
        (
            lambda m, p: m.iwae(PointSet(p.coords, p.values - 1)),
            ValueError,
            r"elbo: values must lie in \[0, 1\] for the",
        ),
        (lambda m, p: m.iwae(p, samples=0), ValueError, "iwae: samples must be at least 1, got 0"),
        (lambda m, p: m.elbo(p.select(torch.arange(3))), ValueError, "encoder: points must have at least 4 .* got 3"),
        (
            lambda m, p: m.elbo(p.with_mask(torch.arange(30) < 2)),
            ValueError,
            "encoder: points must have at least 4 .* 2",
        ),
        (
            lambda m, p: m.elbo(p.with_mask(torch.arange(30) < 0)),
            ValueError,
            "encoder: points must have at least 4 .* 0",
        ),
        (
            lambda m, p: m.iwae(p.with_mask(torch.arange(30) < 0)),
            ValueError,
            "encoder: points must have at least 4 .* 0",
        ),
        (
            lambda m, p: m.elbo(p, neighborhoods=m.neighborhoods(p)[:1]),
            ValueError,
            "encoder: neighborhoods must have one entry per stage, 2, got 1",
        ),
        (
            lambda m, p: m.elbo(p.select(torch.arange(20)), neighborhoods=m.neighborhoods(p)),
            ValueError,
            r"encoder: centroids of neighborhoods\[0\] must index the 20 points before",
        ),
        (
            lambda m, p: m.elbo(p, noise=m.draw_noise(1)),
            ValueError,
            r"elbo: noise.z must have shape \[3, 3\], got \[1, 3\]",
        ),
        (
            lambda m, p: m.elbo(p, noise=Noise(m.draw_noise(3).z, torch.zeros(3, 1, 3).double())),
            ValueError,
            r"elbo: noise.kl must have shape \[S, 3, 3\], got \[3, 1, 3\]",
        ),
        (
            lambda m, p: m.elbo(p, noise=Noise(m.draw_noise(3).z, torch.zeros(0, 3, 3).double())),
            ValueError,
            "elbo: noise.kl must hold at least one sample",
        ),
        (
            lambda m, p: m.elbo(p, noise=Noise(m.draw_noise(3).z, CounterNoise(torch.tensor(0), 0))),
            ValueError,
            "elbo: noise.kl.samples must be at least 1, got 0",
        ),
        (
            lambda m, p: m.elbo(p, noise=Noise(m.draw_noise(3).z, CounterNoise(torch.tensor(0.0), 3))),
            TypeError,
            "elbo: noise.kl.seed must have dtype int64, got float32",
        ),
        (
            lambda m, p: m.elbo(p, noise=Noise(m.draw_noise(3).z.float(), m.draw_noise(3).kl)),
            TypeError,
            "elbo: noise.z must have dtype torch.float64, got torch.float32",
        ),
        (
            lambda m, p: m.decode(torch.zeros(2, 4).double(), p.coords),
            ValueError,
            r"decode: z must have shape \[B, 3\]",
        ),
        (lambda m, p: m.decode(torch.zeros(2, 3), p.coords), TypeError, "decode: z must have dtype torch.float64"),
        (
            lambda m, p: m.decode(torch.zeros(2, 3).double(), p.coords.float()),
            TypeError,
            "decode: coords must have dtype torch.float64",
        ),
        (
            lambda m, p: m.decode(torch.zeros(2, 3).double(), torch.zeros(3, 5, 2).double()),
            ValueError,
            r"decode: coords must have shape \[2, M, 2\], got \[3, 5, 2\]",
        ),
        (
            lambda m, p: m.sample(2, torch.zeros(5, 3).double()),
            ValueError,
            r"decode: coords must have shape \[M, 2\], got \[5, 3\]",
        ),
        (
            lambda m, p: m.sample(2, [0.0]),
            ValueError,
            r"decode: coords must have shape \[M, 2\] or \[B, M, 2\], got list",
        ),
        (lambda m, p: m.sample_prior(0), ValueError, "sample_prior: count must be at least 1, got 0"),
        (
            lambda m, p: m.reconstruct(p, z=torch.zeros(2, 3).double()),
            ValueError,
            r"reconstruct: z must have shape \[3, 3\]",
        ),
        (
            lambda m, p: m.reconstruct(p, p.coords, posterior_at=torch.arange(29)),
            ValueError,
            r"reconstruct: posterior_at must have shape \[30\], got \[29\]",
        ),
        (
            lambda m, p: m.reconstruct(p, p.coords[:20], posterior_at=torch.arange(30)),
            ValueError,
            "reconstruct: posterior_at must index the 20 coords",
        ),
        (
            lambda m, p: m.reconstruct(p, p.coords, posterior_at=torch.arange(30) - 1),
            ValueError,
            "reconstruct: posterior_at must index the 30 coords",
        ),
        (
            lambda m, p: m.reconstruct(p, p.coords, posterior_at=torch.arange(30.0)),
            TypeError,
            "reconstruct: posterior_at must have dtype int64, got float32",
        ),
    ],
)
def test_call_errors(call, error, message):
    model = build()
    with pytest.raises(error, match=f"^{message}"):
        call(model, grid())


def test_statistics_of_noise():
    model = build()
    noise = stored(model.draw_noise(40_000, generator=seeded()))  # of each, 0.04 is 14 deviations
    for t in (noise.z, noise.kl):
        assert t.dtype == torch.float64
        assert float(t.mean()) == pytest.approx(0, abs=0.04) and float(t.std()) == pytest.approx(1, abs=0.04)
    assert np.allclose(np.corrcoef(noise.z.flatten(), noise.kl[0].flatten())[0, 1], 0, atol=0.04)


@pytest.mark.parametrize("likelihood", ["logistic", "continuous_bernoulli"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_gradients_of_decode(likelihood, own, warm):
    model = build(likelihood=likelihood, channels=2)
    model.use_gating_prior = warm
    z = torch.randn(2, 3, dtype=torch.float64, generator=seeded()).requires_grad_()
    shape = (2, 7, 2) if own else (7, 2)
    coords = (torch.rand(shape, dtype=torch.float64, generator=seeded(1)) * 2 - 1).requires_grad_()

    def maps(z: Tensor, coords: Tensor) -> tuple[Tensor, ...]:
        return tuple(vars(model.decode(z, coords)).values())

    with torch.no_grad():
        plain = maps(z, coords)
    for inputs in ((z, coords), (z, coords.detach()), (z.detach(), coords)):
        for a, b in zip(maps(*inputs), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        assert torch.autograd.gradcheck(maps, inputs)


def test_decode_trains_latents_and_decoder():
    model = build()
    points, z = grid(), torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([z, *model.hypernet.parameters()], lr=0.05)
    errors = []
    for _ in range(60):
        error = (model.decode(z, points.coords).mean - points.values).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize("leaf", ["z", "coords", "both"])
def test_gradients_of_decode_in_float32(leaf):
    exact = build(components=2)
    model = copy.deepcopy(exact).float()
    z, coords = torch.randn(2, 3, generator=seeded()), torch.rand(9, 2, generator=seeded(1)) * 2 - 1

    def gradients(model: VaMoH, dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype).clone() for t in (z, coords)]
        leaves = [t.requires_grad_() for t, name in zip(inputs, ("z", "coords"), strict=True) if leaf in (name, "both")]
        leaves += model.hypernet.parameters()
        maps = vars(model.decode(*inputs)).values()
        total = sum((t * torch.arange(1, t.numel() + 1).reshape(t.shape)).sum() for t in maps)
        return [grad.double() for grad in torch.autograd.grad(total, leaves)]

    for found, wanted in zip(gradients(model, torch.float32), gradients(exact, torch.float64), strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_second_derivatives_of_decode():
    """As for a loss on the slopes, in coordinates, latents and parameters."""
    model = build(inr_activation="sine", inr_omega=1.0, gating_bound="tanh")
    z = torch.randn(1, 3, dtype=torch.float64, generator=seeded())
    coords = torch.rand(4, 2, dtype=torch.float64, generator=seeded(1))
    coords.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: model.decode(z, x).mean, (coords,))

    def slope(z: Tensor) -> Tensor:
        return torch.autograd.grad(model.decode(z, coords).mean.sum(), coords, create_graph=True)[0]

    assert torch.autograd.gradcheck(slope, (z.requires_grad_(),))
    slope(z).square().sum().backward()
    assert all(p.grad is not None for p in (*model.hypernet.parameters(), *model.gating_prior.parameters()))


def test_decode_has_no_gradient_unasked():
    model, coords = build(), grid().coords.requires_grad_()
    z = torch.zeros(1, 3, dtype=torch.float64)
    assert not model.decode(z, coords.detach()).mean.requires_grad
    with torch.no_grad():
        assert not model.decode(z, coords).mean.requires_grad
    mean = model.decode(z.requires_grad_(), coords.detach()).mean
    with pytest.raises(RuntimeError, match="has no second derivatives"):
        torch.autograd.grad(mean.sum(), z, create_graph=True)


def test_decode_without_pi_has_gradients():
    z = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    result = build().decode(z, grid().coords, with_pi=False)
    result.mean.sum().backward()
    assert result.pi.shape == (2, 0, 3) and z.grad.abs().min() > 0


UNITS = [((127.5, 127.5), (127.5, 127.5)), ((4.5e6, -20.0), (250.0, 250.0)), ((0.0, 3e-7), (8.0, 1e-6))]


@pytest.mark.parametrize(("offset", "scale"), UNITS)
@pytest.mark.parametrize("change", [{}, {"frequencies": 0}, {"neighbor_metric": "raw"}, {"centroids": "fixed"}])
def test_coordinates_of_any_units(offset, scale, change):
    """What a model makes of points does not depend on the units of its domain."""
    points, noise = grid(shape=(5, 5)), Noise(torch.randn(3, 3).double(), CounterNoise(torch.tensor(5), 3))

    def units(x: Tensor) -> Tensor:
        return x * torch.tensor(scale).double() + torch.tensor(offset).double()

    wanted, own = (build(**change) for _ in range(2))
    own.set_domain(units(points.coords))
    there = PointSet(units(points.coords), points.values)
    if change == {"centroids": "fixed"}:
        own.set_centroids(there.coords)
        wanted.set_centroids(points.coords)
    z, finer = torch.randn(3, 3).double(), grid_coords((5, 5), scale=2, dtype=torch.float64)
    with torch.no_grad():
        for name, value in vars(wanted.elbo(points, noise=noise)).items():
            torch.testing.assert_close(vars(own.elbo(there, noise=noise))[name], value, rtol=1e-6, atol=1e-6)
        for a, b in (
            (own.encode(there).mean, wanted.encode(points).mean),
            (own.reconstruct(there, units(finer)).mean, wanted.reconstruct(points, finer).mean),
            (own.decode(z, units(finer)).pi, wanted.decode(z, finer).pi),
        ):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_domain_is_part_of_the_state():
    points = grid()
    there = PointSet(points.coords * 100 + 50, points.values)
    model, other = build(), build()
    model.set_domain(there.coords)
    other.load_state_dict(model.state_dict())
    assert other.domain == model.domain != ((), ())
    assert torch.equal(other.encode(there).mean, model.encode(there).mean)
    again = copy.deepcopy(model)
    assert torch.equal(again.encode(there).mean, model.encode(there).mean)
    given = build(coord_offset=model.domain[0], coord_scale=model.domain[1])
    assert torch.equal(given.encode(there).mean, model.encode(there).mean)


def test_a_new_domain_is_searched_anew():
    """Neighbours, features and opposite points are remembered by coordinates and domain."""
    points = grid()
    model, fresh = build(), build()
    model.encode(points), model.reconstruct(points)
    stretched = torch.cat([points.coords, points.coords * torch.tensor([1.0, 30.0])])
    for m in (model, fresh):
        m.set_domain(stretched)
    torch.testing.assert_close(model.encode(points).mean, fresh.encode(points).mean, rtol=0, atol=0)
    torch.testing.assert_close(model.reconstruct(points).mean, fresh.reconstruct(points).mean, rtol=0, atol=0)


def test_gradients_are_in_the_units_of_the_coordinates():
    model, z = build(coord_offset=(50.0, 0.0), coord_scale=(100.0, 2.0)), torch.zeros(1, 3).double()
    coords = (torch.rand(5, 2).double() * torch.tensor([100.0, 2.0])).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model.decode(z, x).mean, (coords,), eps=1e-5)


def test_sampling_that_cannot_work_is_told_once():
    fine, values = grid_coords((12, 12), dtype=torch.float64), torch.rand(2, 144, 1).double()
    for coords, message in (
        (fine * 100, r"coordinates must be near \[-1, 1\], got them up to 100 from 0; call set_domain"),
        (fine * 0.01, r"coordinates must span a good part of \[-1, 1\], got 0.02 in all; call set_domain"),
        (fine * 20, r"neighbours 3.64 apart show frequencies up to 0.14 cycles per unit, .* call set_domain"),
    ):
        model = build()
        with pytest.warns(UserWarning, match=message):
            model.elbo(PointSet(coords, values))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.elbo(PointSet(coords + 1, values))  # the model has been told
            fit = build()
            fit.set_domain(coords)
            fit.elbo(PointSet(coords, values))
            build().eval().encode(PointSet(coords, values))
    for coords in (fine, fine * 2):
        with pytest.warns(UserWarning, match="take a frequency_scale of at most .*, or more points"):
            build(frequency_scale=9.0).elbo(PointSet(coords, values))


def test_complete_keeps_what_is_observed():
    model, points = build(), grid()
    masked = points.with_mask(masks(3, 30))
    mean, filled = model.reconstruct(masked).mean, model.complete(masked)
    for b in range(3):
        assert torch.equal(filled[b, masked.mask[b]], points.values[b, masked.mask[b]])
        assert torch.equal(filled[b, ~masked.mask[b]], mean[b, ~masked.mask[b]])
    shared = points.with_mask(masked.mask[0])
    assert torch.equal(model.complete(shared)[:, masked.mask[0]], points.values[:, masked.mask[0]])
    assert torch.equal(model.complete(points), points.values)


@pytest.mark.parametrize("likelihood", ["logistic", "bernoulli", "continuous_bernoulli"])
def test_values_with_noise_have_the_mean_that_is_decoded(likelihood: str) -> None:
    """And components in the shares of p(c | x, z): by the law of large numbers, with scales that keep within [0, 1]."""
    model = VaMoH(coord_dim=2, channels=1, **SIZES, likelihood=likelihood, scale=0.01).eval()
    z = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    coords = grid_coords((3, 3))
    generator = torch.Generator().manual_seed(1)
    drawn = model.sample_values(z.repeat(4000, 1), coords, generator=generator).unflatten(0, (4000, 2))
    assert drawn.shape == (4000, 2, 9, 1) and drawn.min() >= 0 and drawn.max() <= 1
    expected = model.decode(z, coords).mean
    deviation = drawn.std(0) / 4000**0.5
    assert ((drawn.mean(0) - expected).abs() < 5 * deviation + 1e-3).all()
    again = model.sample_values(z, coords, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again, model.sample_values(z, coords, generator=torch.Generator().manual_seed(3)))
    assert (drawn[0] != drawn[1]).any()


def test_values_with_noise_come_from_the_component_drawn() -> None:
    """Two components that are certain of 0 and of 1: values are either, in the shares of the prior over components."""
    model = VaMoH(coord_dim=2, channels=1, **SIZES, scale=0.01).eval()
    with torch.no_grad():
        model.hypernet.weights[-1].zero_()
        model.hypernet.biases[-1].zero_()
        model.hypernet.biases[-1][:, -1] = torch.tensor([-9.0, 9.0])  # the bias of the last layer comes last
    z, coords = torch.randn(1, 3, generator=torch.Generator().manual_seed(0)), grid_coords((2, 2))
    drawn = model.sample_values(z.repeat(4000, 1), coords, generator=torch.Generator().manual_seed(1))
    assert ((drawn < 0.2) | (drawn > 0.8)).all()
    shares = (drawn > 0.5).float().mean(0)[:, 0]
    assert torch.allclose(shares, model.decode(z, coords).pi[0, :, 1], atol=0.04)


@pytest.mark.slow
def test_the_bound_of_a_completion_by_quadrature() -> None:
    """log ∫ q(z | seen) p(hidden | z) dz of one latent dimension, summed over a grid of z; whatever the proposals."""
    model = VaMoH(coord_dim=2, channels=1, **{**SIZES, "latent_dim": 1}, scale=0.3).eval()
    values = torch.rand(2, 36, 1, generator=torch.Generator().manual_seed(0))
    points, seen = PointSet(grid_coords((6, 6)), values), torch.arange(36) < 20
    part, whole = model.encode(points.with_mask(seen)), model.encode(points)
    hidden = points.with_mask(~seen)
    axis = torch.linspace(-8, 8, 801)
    total = []
    for at in axis:
        certain = Posterior(at.expand(2, 1), torch.full((2, 1), 1e-6))
        # One draw of a narrow proposal is p(hidden | z) there, up to the densities of prior and proposal.
        log_q = part.log_prob(at.expand(2, 1))
        flat = model.iwae(
            hidden, samples=1, proposals=[certain], prior=certain, generator=torch.Generator().manual_seed(0)
        )
        total.append(flat + log_q)
    expected = torch.stack(total).logsumexp(0) + math.log(16 / 800)
    wide = Posterior(part.mean + 0.3, part.std * 1.5)
    for proposals in ([part], [part, whole], [wide, part, whole]):
        found = model.iwae(
            hidden, samples=3001, proposals=proposals, prior=part, generator=torch.Generator().manual_seed(2)
        )
        assert torch.allclose(found, expected, atol=0.03), (found, expected)
    single = model.iwae(hidden, samples=1, proposals=[part, whole], prior=part, generator=torch.Generator())
    assert torch.isfinite(single).all()
    with pytest.raises(TypeError, match="iwae: prior must be Posterior or None"):
        model.iwae(hidden, prior=torch.zeros(2, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="proposals.mean must have shape"):
        model.iwae(hidden, proposals=[Posterior(torch.zeros(3, 1), torch.ones(3, 1))])
