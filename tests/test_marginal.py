"""`objective="marginal"`: the components summed out, against the definition in plain float64 torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import SIZES
from vamoh import PointSet, VaMoH, checkpoint
from vamoh.compat.state import to_reference
from vamoh.config import BetaConfig, Config, ContextConfig, DataConfig, ModelConfig, TrainConfig
from vamoh.ops.inr_mixture import inr_mixture_reference
from vamoh.ops.likelihood import log_likelihood
from vamoh.train import train

BATCH, SHAPE = 3, (5, 6)
POINTS = 30
MASKS = {
    "none": None,
    "shared": torch.arange(POINTS) % 3 > 0,
    "own": torch.rand(BATCH, POINTS, generator=torch.Generator().manual_seed(9)) < 0.8,
}


def build(objective: str = "marginal", **changes: Any) -> VaMoH:
    """A float64 model whose parameters have all left their special initial values."""
    model = VaMoH(coord_dim=2, channels=2, **{**SIZES, "components": 3, "objective": objective, **changes}).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():  # the same ones of either objective come first
            parameter += 0.3 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return model


def grid(mask: Tensor | None = None) -> PointSet:
    values = torch.rand(BATCH, 2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points = PointSet.from_grid(values)
    return points if mask is None else points.with_mask(mask)


def scores(model: VaMoH, points: PointSet, z: Tensor) -> tuple[Tensor, Tensor]:
    """log p(y | x, z, c) and log p(c | x, z), both [B, K, N], by plain torch."""
    features = model.encoding(points.coords)
    logits = inr_mixture_reference(model.hypernet(z), features, model.inr)
    each = log_likelihood(model.likelihood.op, logits, points.values[:, None], model.likelihood.scale[:, None])
    return each.sum(-1), model.gating_prior(features, z)


def best(log_likelihoods: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """max over q of E_q log p(y | c) - beta · KL(q ‖ p), [B, N]."""
    if beta == 0:
        return log_likelihoods.amax(1)
    return beta * (log_likelihoods / beta + log_p).logsumexp(1)


@pytest.mark.parametrize("beta", [1.0, 0.0, 0.3, 2.0])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("likelihood", ["logistic", "bernoulli"])
def test_value_and_gradients_are_those_of_the_definition(likelihood: str, mask: str, beta: float) -> None:
    model, points = build(likelihood=likelihood), grid(MASKS[mask])
    noise = model.draw_noise(BATCH, generator=torch.Generator().manual_seed(1))
    terms = model.elbo(points, noise=noise, beta_c=beta)
    observed = torch.ones(BATCH, POINTS, dtype=torch.bool) if points.mask is None else points.mask.expand(BATCH, -1)
    per_point = best(*scores(model, points, model.encode(points).sample(noise.z)), beta)
    exact = torch.where(observed, per_point, 0).sum(-1) - terms.kl_z
    torch.testing.assert_close(terms.elbo, exact, rtol=1e-12, atol=1e-12)
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(v @ upstream, list(model.parameters()), retain_graph=True, materialize_grads=True)
        for v in (terms.elbo, exact)
    )
    for (name, _), a, b in zip(model.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("context", [None, torch.arange(POINTS) % 2 == 0])
def test_it_bounds_no_less_than_a_network_does(mask: str, context: Tensor | None) -> None:
    network, model, points = build("elbo"), build(), grid(MASKS[mask])
    same = model.load_state_dict({k: v for k, v in network.state_dict().items() if "posterior" not in k})
    assert not same.missing_keys and network.gating_posterior is not None and model.gating_posterior is None
    for seed in range(5):
        noise = model.draw_noise(BATCH, generator=torch.Generator().manual_seed(seed))
        marginal, bound = (m.elbo(points, context=context, noise=noise).elbo for m in (model, network))
        assert (marginal > bound).all()


def test_observed_points_have_the_exact_posterior_over_components() -> None:
    model, points = build(), grid(MASKS["own"])
    z = model.encode(points).mean
    likely, log_p = scores(model, points, z)
    posterior = (likely + log_p).softmax(1)
    expected = torch.where(points.mask[:, None], posterior, log_p.exp()).mT
    assert (posterior - log_p.exp()).abs().max() > 0.1
    torch.testing.assert_close(model.reconstruct(points).pi, expected, rtol=1e-9, atol=1e-12)


def test_one_component_leaves_nothing_to_sum_out() -> None:
    network, model, points = (*(build(o, components=1) for o in ("elbo", "marginal")), grid())
    model.load_state_dict({k: v for k, v in network.state_dict().items() if "posterior" not in k})
    noise = model.draw_noise(BATCH, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.elbo(points, noise=noise).elbo, network.elbo(points, noise=noise).elbo)


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    torch._dynamo.reset()
    model, points = build(), grid()
    noise, hoods = model.draw_noise(BATCH, generator=torch.Generator().manual_seed(1)), model.neighborhoods(points)
    compiled = torch.compile(
        lambda v: model.elbo(PointSet(points.coords, v), noise=noise, neighborhoods=hoods).elbo,
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    torch.testing.assert_close(compiled(points.values), model.elbo(points, noise=noise, neighborhoods=hoods).elbo)


def test_a_run_trains_and_is_kept(tmp_path: Path) -> None:
    rows = np.linspace(0, 3, 6)[:, None] + np.random.default_rng(0).uniform(0, 6, (40, 1, 1))
    np.save(tmp_path / "a.npy", ((np.sin(rows) * np.ones(7) + 1) * 127).astype(np.uint8))
    context = ContextConfig(random=0.5, box=0.2)
    settings = TrainConfig(
        steps=60, batch_size=8, lr=5e-3, beta_c=BetaConfig(1.0, "linear", 0, 4), threads=1, log_every=1,
        evaluate_every=60, context=context, target="all", point_dropout=0.0,
    )  # fmt: skip
    model_config = ModelConfig(**SIZES, objective="marginal")
    data = DataConfig("arrays", path=str(tmp_path / "a.npy"))
    train(Config(data=data, model=model_config, train=settings), tmp_path / "run", progress=False)
    model = checkpoint.load(tmp_path / "run")
    assert not any("posterior" in name for name in model.state_dict())
    untrained = VaMoH(coord_dim=2, channels=1, **vars(model_config))
    points = PointSet.from_grid(torch.from_numpy(np.load(tmp_path / "a.npy"))[:8, None] / 255)
    noise = model.draw_noise(8, generator=torch.Generator().manual_seed(0))
    assert model.elbo(points, noise=noise).loss < untrained.elbo(points, noise=noise).loss - 5


def test_the_published_code_has_no_such_objective() -> None:
    with pytest.raises(ValueError, match="objective must be 'elbo', as in the published code, got 'marginal'"):
        to_reference(build(weight_net_slope=None, centroids="points", gating_bound="tanh"))
    with pytest.raises(ValueError, match="objective must be one of elbo, marginal, got 'exact'"):
        build("exact")
