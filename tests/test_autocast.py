"""The model under torch.autocast in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vamoh import PointSet, VaMoH

SIZES: dict[str, Any] = {
    "coord_dim": 2,
    "channels": 1,
    "latent_dim": 6,
    "components": 3,
    "frequencies": 8,
    "encoder_centroids": (12, 5),
    "encoder_neighbors": (5, 5),
    "encoder_channels": (8, 8),
    "hypernet_widths": (16,),
    "inr_widths": (12, 12),
    "flow_layers": 4,
    "kl_samples": 8,
}
VARIANTS = [
    {},
    {"learn_frequencies": True},
    {"weight_net_slope": 0.2, "frequencies": 0},
    {"prior": "normal", "likelihood": "bernoulli", "pool_centroids": (8,), "pool_neighbors": (3,)},
]


def autocast(on: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def cloud() -> PointSet:
    generator = torch.Generator().manual_seed(0)
    return PointSet(torch.rand(30, 2, generator=generator), torch.rand(4, 30, 1, generator=generator))


def close(a: Tensor, b: Tensor, bound: float) -> bool:
    """Whether they differ by less than `bound`, relative to all of b."""
    return bool((a - b).norm() < bound * b.norm())


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bound_and_gradient(variant, backend, monkeypatch):
    monkeypatch.setenv("VAMOH_BACKEND", backend)
    model, points = VaMoH(**{**SIZES, **variant}), cloud()
    noise = model.draw_noise(4, generator=torch.Generator().manual_seed(1))
    found = []
    for on in (False, True):
        with autocast(on):
            terms = model.elbo(points, noise=noise)
        grads = torch.autograd.grad(terms.loss, list(model.parameters()))
        assert {t.dtype for t in (*vars(terms).values(), *grads)} == {torch.float32}
        found.append((terms, torch.cat([g.flatten() for g in grads])))
    (exact, exact_grad), (mixed, mixed_grad) = found
    for name, value in vars(exact).items():
        assert close(getattr(mixed, name), value, 0.02), name
    assert not torch.equal(mixed.elbo, exact.elbo)
    assert close(mixed_grad, exact_grad, 0.05)


def test_everything_else_is_close_and_float32():
    model, points = VaMoH(**SIZES), cloud()
    coords = torch.rand(50, 2)

    def results() -> dict[str, Tensor]:
        seeded = torch.Generator().manual_seed(2)
        q, hidden = model.encode(points), points.with_mask(torch.arange(30) > 7)
        return {
            "mean": q.mean,
            "std": q.std,
            "reconstruct": model.reconstruct(points).mean,
            "complete": model.reconstruct(hidden, coords).mean,
            "pi": model.reconstruct(hidden).pi,
            "sample": model.sample(3, coords, generator=seeded).mean,
            "iwae": model.iwae(points, samples=3, generator=seeded),
        }

    exact = results()
    with autocast():
        mixed = results()
    for name, value in exact.items():
        assert mixed[name].dtype == torch.float32, name
        assert close(mixed[name], value, 0.03), name


def test_divergence_of_the_posterior_is_computed_in_float32():
    model, points = VaMoH(**SIZES, prior="normal"), cloud()
    noise = model.draw_noise(4)
    with autocast():
        posterior, terms = model.encode(points), model.elbo(points, noise=noise)
    assert torch.equal(terms.kl_z, posterior.kl_standard())


def test_affine_weight_nets_are_computed_in_float32():
    model, points = VaMoH(**SIZES), cloud()
    hoods = model.neighborhoods(points)
    outputs = []
    for on in (False, True):
        with autocast(on):
            outputs.append(model.encoder.stage_outputs(points.values, model.encoding(points.coords)[None], hoods))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype):
    model, points = VaMoH(**SIZES).cuda(), cloud().to("cuda")
    noise = model.draw_noise(4)
    exact = model.elbo(points, noise=noise).elbo
    with torch.autocast("cuda", dtype):
        mixed = model.elbo(points, noise=noise)
    grads = torch.autograd.grad(mixed.loss, list(model.parameters()))
    assert {t.dtype for t in (mixed.elbo, *grads)} == {torch.float32}
    assert not torch.equal(mixed.elbo, exact) and close(mixed.elbo, exact, 0.02)


def test_half_precision_points_are_refused():
    with (
        pytest.raises(TypeError, match="^PointSet: values must have dtype float32 or float64, got bfloat16"),
        autocast(),
    ):
        PointSet(torch.rand(30, 2).bfloat16(), torch.rand(4, 30, 1).bfloat16())


def test_training_goes_on():
    model, points = VaMoH(**SIZES), cloud()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        with autocast():
            loss = model.elbo(points, generator=torch.Generator().manual_seed(0)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 20
