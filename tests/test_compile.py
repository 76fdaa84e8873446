"""The training step under torch.compile: one graph, the results of eager."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor

from vamoh import PointSet, VaMoH, grid_coords
from vamoh.geometry import neighborhoods_in_graph
from vamoh.model import Noise
from vamoh.ops import CounterNoise

SIZES: dict[str, Any] = {
    "coord_dim": 2,
    "channels": 1,
    "latent_dim": 4,
    "components": 2,
    "frequencies": 6,
    "encoder_centroids": (12, 5),
    "encoder_neighbors": (5, 4),
    "encoder_channels": (4, 4),
    "hypernet_widths": (6,),
    "inr_widths": (6,),
    "gating_widths": (6,),
    "flow_layers": 2,
    "kl_samples": 4,
}


class Step:
    """Loss and gradients of a training step that finds its neighbourhoods itself, compiled and not."""

    def __init__(self, backend: str = "aot_eager", dynamic: bool | None = None, **changes: Any) -> None:
        torch._dynamo.reset()
        self.model = VaMoH(**{**SIZES, **changes})
        self.compiled = torch.compile(self.loss, fullgraph=True, backend=backend, dynamic=dynamic)

    def loss(self, coords: Tensor, values: Tensor, z: Tensor, seed: Tensor) -> Tensor:
        noise = Noise(z, CounterNoise(seed, self.model.kl_samples))
        return self.model.elbo(PointSet(coords, values), noise=noise, beta_z=0.5).loss

    def compare(self, coords: Tensor, batch: int, autocast: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        values = torch.rand(batch, coords.shape[-2], 1, generator=generator)
        noise = self.model.draw_noise(batch, generator=generator)
        results = []
        for function in (self.compiled, self.loss):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = function(coords, values, noise.z, noise.kl.seed)
            results.append((loss, *torch.autograd.grad(loss, list(self.model.parameters()))))
        for compiled, eager in zip(*results, strict=True):
            assert compiled.dtype == eager.dtype == torch.float32
            bound = 0.02 if autocast else 1e-5
            assert (compiled - eager).norm() <= bound * (1e-3 + eager.norm())


def cloud(count: int, *lead: int, seed: int = 0) -> Tensor:
    return torch.rand(*lead, count, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
def test_any_batch_and_new_points_every_step():
    step = Step()
    for batch, count in ((3, 30), (4, 25)):
        step.compare(cloud(count, seed=count), batch)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, coords in ((5, cloud(20)), (2, cloud(33)), (7, grid_coords((6, 5)))):
            step.compare(coords, batch)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"neighbor_metric": "raw", "weight_net_slope": 0.2, "prior": "normal"}, marks=pytest.mark.slow),
        {"learn_frequencies": True, "pool_centroids": (8,), "pool_neighbors": (3,), "likelihood": "bernoulli"},
    ],
)
def test_other_models_with_coordinates_of_their_own(changes):
    Step(**changes).compare(cloud(20, 3), 3)


def test_mixed_precision():
    Step().compare(cloud(20), 3, autocast=True)


def test_noise_drawn_inside_and_optimizer_outside():
    torch._dynamo.reset()
    points = PointSet(cloud(20), torch.rand(3, 20, 1, generator=torch.Generator().manual_seed(0)))
    losses = []
    for compiled in (True, False):
        model = VaMoH(**SIZES)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        elbo = torch.compile(model.elbo, fullgraph=True, backend="aot_eager") if compiled else model.elbo
        torch.manual_seed(0)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = elbo(points).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]


def test_masks_break_the_graph_and_nothing_else():
    torch._dynamo.reset()
    model, generator = VaMoH(**SIZES), torch.Generator().manual_seed(0)
    mask = torch.rand(3, 30, generator=generator) < 0.7
    points = PointSet(cloud(30), torch.rand(3, 30, 1, generator=generator), mask)
    noise = model.draw_noise(3, generator=generator)
    compiled = torch.compile(lambda: model.elbo(points, noise=noise).elbo, backend="eager")
    torch.testing.assert_close(compiled(), model.elbo(points, noise=noise).elbo)


def test_search_in_a_graph_is_the_models_own():
    for coords in (cloud(30), grid_coords((6, 5)), cloud(9, 2)):
        for metric in ("encoded", "raw"):
            model = VaMoH(**{**SIZES, "neighbor_metric": metric})
            hoods = model.neighborhoods(PointSet(coords, torch.zeros(2, coords.shape[-2], 1)))
            frequencies = model.encoding.frequencies if metric == "encoded" else None
            batched = coords if coords.dim() == 3 else coords[None]
            arguments = (batched, frequencies, [12, 5, 5, 4], True, None, None)
            found = neighborhoods_in_graph(*arguments)
            assert all(torch.equal(a, b) for a, b in zip(found, (i for h in hoods for i in h), strict=True))
            torch.library.opcheck(neighborhoods_in_graph, arguments)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_inductor():
    with torch._inductor.config.patch("cpp.simdlen", 0):  # halves the time it compiles
        step = Step("inductor", dynamic=False, encoder_centroids=(6,), encoder_neighbors=(5,), encoder_channels=(4,))
        step.compare(cloud(20), 3)
