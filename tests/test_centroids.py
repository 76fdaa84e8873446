"""Fixed centroids of the encoder: what depends on the points given, and what does not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vamoh import PointSet, VaMoH, checkpoint, grid_coords, sphere_grid
from vamoh.config import Config, ModelConfig
from vamoh.geometry import neighborhoods_in_graph
from vamoh.ops.farthest_point_sample import farthest_point_sample

SIZES: dict[str, Any] = {
    "latent_dim": 3,
    "components": 2,
    "frequencies": 6,
    "frequency_scale": 0.5,
    "encoder_centroids": (14, 6),
    "encoder_neighbors": (5, 4),
    "encoder_channels": (6, 6),
    "weight_net": (4,),
    "flow_layers": 1,
    "hypernet_widths": (5,),
    "inr_widths": (5,),
    "gating_widths": (4,),
    "centroids": "fixed",
}
GRID = grid_coords((7, 6), dtype=torch.float64)


def build(domain: Tensor | None = GRID, **changes: Any) -> VaMoH:
    model = VaMoH(**{"coord_dim": 2, "channels": 1, "weight_net_slope": 0.2, **SIZES, **changes}).double()
    if domain is not None:
        model.set_centroids(domain)
    return model


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=seeded(seed))


def latent(model: VaMoH, points: PointSet) -> Tensor:
    """Mean and standard deviation of q(z), [B, 2Z]."""
    posterior = model.encode(points)
    return torch.cat([posterior.mean, posterior.std], 1).detach()


@pytest.mark.parametrize("metric", ["raw", "encoded"])
def test_centroids_are_farthest_point_samples_and_their_sites_nearest_points(metric):
    cloud = draw(60, 2)
    model = build(cloud, neighbor_metric=metric, pool_centroids=(10,), pool_neighbors=(3,))
    space = model.encoding(cloud) if metric == "encoded" else cloud
    fixed, chosen = model.encoder.fixed, farthest_point_sample(space, 14)
    assert torch.equal(fixed.centroids, cloud[chosen])
    distances = torch.cdist(space[chosen], space)
    assert torch.equal(fixed.sites, cloud[distances.topk(5, largest=False).indices])
    # The pooling has the first 10 of the 14, the second convolution the first 6 of those: samples of samples.
    assert torch.equal(farthest_point_sample(space[chosen], 10), torch.arange(10))
    distances = torch.cdist(space[chosen[:10]], space[chosen])
    assert torch.equal(fixed.neighbors_1, distances.topk(3, largest=False).indices)
    distances = torch.cdist(space[chosen[:6]], space[chosen[:10]])
    assert torch.equal(fixed.neighbors_2, distances.topk(4, largest=False).indices)


@pytest.mark.parametrize("metric", ["raw", "encoded"])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("lattice", [True, False])
def test_neighbors_are_the_observed_points_nearest_to_the_sites(metric, own, lattice):
    coords = GRID if lattice else draw(42, 2)
    coords = coords.expand(3, -1, -1).contiguous() if own else coords
    mask = draw(3, 42, seed=1) < 0.4
    model = build(neighbor_metric=metric)
    first, *later = model.neighborhoods(PointSet(coords, torch.zeros(3, 42, 1, dtype=torch.float64), mask))
    kept = mask.any(0).nonzero()[:, 0]
    sites = model.encoder.fixed.sites.flatten(0, 1)
    for i in range(3):
        cloud = coords[i] if own else coords
        space, wanted = (model.encoding(cloud), model.encoding(sites)) if metric == "encoded" else (cloud, sites)
        distances = torch.cdist(wanted, space, compute_mode="donot_use_mm_for_euclid_dist")
        found = kept[first.neighbors[i].flatten()]
        assert mask[i, found].all()
        nearest = distances.masked_fill(~mask[i], torch.inf).amin(1)
        torch.testing.assert_close(distances.gather(1, found[:, None])[:, 0], nearest)
    assert all(hood.neighbors.shape[0] == 1 for hood in later)


@pytest.mark.parametrize("metric", ["raw", "encoded"])
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), lattice=st.booleans(), own=st.booleans(), density=st.booleans())
def test_neither_order_nor_company_nor_padding_matters(metric, seed, lattice, own, density):
    generator = seeded(seed)
    sizes = torch.randint(1, 43, (3,), generator=generator).tolist()
    model = build(neighbor_metric=metric, encoder_density=density)
    clouds = []
    for n in sizes:  # on a grid, several points are equally near to a site
        coords = GRID[torch.randperm(42, generator=generator)[:n]] if lattice else draw(n, 2, seed=seed + n)
        clouds.append((coords, draw(n, 1, seed=seed + n + 1)))
    alone = torch.cat([latent(model, PointSet(x, y[None])) for x, y in clouds])
    if own or not lattice:
        together = PointSet.from_lists([x for x, _ in clouds], [y for _, y in clouds])
    else:
        where = [(x[:, None] == GRID).all(-1).nonzero()[:, 1] for x, _ in clouds]
        mask, values = torch.zeros(3, 42, dtype=torch.bool), draw(3, 42, 1)
        for i, (_, y) in enumerate(clouds):
            mask[i, where[i]], values[i, where[i]] = True, y
        together = PointSet(GRID, values, mask)
    torch.testing.assert_close(latent(model, together), alone, rtol=1e-9, atol=1e-12)
    shuffled = []
    for x, y in clouds:
        order = torch.randperm(len(x), generator=generator)
        shuffled.append(latent(model, PointSet(x[order], y[None, order])))
    torch.testing.assert_close(torch.cat(shuffled), alone, rtol=1e-9, atol=1e-12)


def test_equal_masks_give_what_different_ones_do():
    model, values = build(), draw(2, 42, 1)
    mask = draw(2, 42, seed=1) < 0.5
    mixed = latent(model, PointSet(GRID, values, mask))
    for i in range(2):
        torch.testing.assert_close(latent(model, PointSet(GRID, values, mask[i]))[i], mixed[i])
        torch.testing.assert_close(latent(model, PointSet(GRID, values, mask[i].expand(2, -1)))[i], mixed[i])


def test_on_its_own_domain_it_is_the_published_encoder():
    cloud, values = draw(60, 2), draw(4, 60, 1)
    fixed, points = build(cloud), build(None, centroids="points")
    assert torch.equal(latent(fixed, PointSet(cloud, values)), latent(points, PointSet(cloud, values)))


def wave(coords: Tensor) -> Tensor:
    """Smooth functions [3, N, 1]."""
    phase = torch.tensor([0.0, 1.0, 2.0], dtype=coords.dtype)[:, None]
    return (0.5 + 0.3 * (2 * coords.sum(-1) + phase).sin() * (3 * coords[:, 0] - phase).cos())[..., None]


def test_finer_and_coarser_clouds_of_a_function_give_nearby_latents():
    domain = grid_coords((14, 14), dtype=torch.float64)
    model = build(domain, encoder_density=True, encoder_centroids=(49, 12), encoder_neighbors=(9, 6))
    there = latent(model, PointSet(domain, wave(domain)))[:, :3]
    size = there.norm(dim=1)
    finer = grid_coords((14, 14), scale=2, dtype=torch.float64)
    torch.testing.assert_close(latent(model, PointSet(finer, wave(finer)))[:, :3], there)  # holds the domain's points
    scattered = 2 * draw(784, 2) - 1
    assert ((latent(model, PointSet(scattered, wave(scattered)))[:, :3] - there).norm(dim=1) < 0.1 * size).all()
    coarser = domain[draw(196) < 0.5]
    assert ((latent(model, PointSet(coarser, wave(coarser)))[:, :3] - there).norm(dim=1) < 0.25 * size).all()


def test_density_changes_nothing_but_what_the_encoder_sees():
    model, plain = build(encoder_density=True), build()
    seen: list[Tensor] = []
    model.encoder.convs[0].register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    values = draw(2, 42, 1)
    model.encode(PointSet(GRID, values))
    assert torch.equal(seen[0], torch.cat([2 * values - 1, torch.ones_like(values)], -1))
    assert model.encoder.convs[0].linear.in_features == 2 * plain.encoder.convs[0].linear.in_features


def test_one_observed_point_is_enough():
    model = build()
    assert model.min_points == 1 and build(None, centroids="points").min_points == 6
    points = PointSet(GRID, draw(2, 42, 1), torch.arange(42) == 3)
    assert model.elbo(points, generator=seeded()).elbo.isfinite().all()
    nothing = torch.stack([torch.arange(42) == 3, torch.arange(42) < 0])
    with pytest.raises(ValueError, match="encoder: points must have at least 1 observed points per function .*, got 0"):
        model.encode(points.with_mask(nothing))


def test_a_small_domain_gives_some_centroids_twice():
    few = draw(4, 2)
    model = build(few)
    assert torch.equal(model.encoder.fixed.centroids.unique(dim=0), few.unique(dim=0))
    assert model.encode(PointSet(few, draw(1, 4, 1))).mean.isfinite().all()


def test_centroids_must_be_set():
    model, points = build(None), PointSet(GRID, draw(1, 42, 1))
    assert model.needs_centroids and not build().needs_centroids
    for call in (model.encode, model.elbo, model.reconstruct, model.iwae, model.neighborhoods):
        with pytest.raises(ValueError, match=r"must be set before anything is encoded: model.set_centroids\(coords"):
            call(points)
    model.set_centroids(GRID)
    assert model.encode(points).mean.isfinite().all()


@pytest.mark.parametrize(
    ("coords", "error", "message"),
    [
        ([[0.0, 0.0]], TypeError, "set_centroids: coords must be a torch.Tensor, got list"),
        (torch.zeros(5, 3).double(), ValueError, r"set_centroids: coords must have shape \[N, 2\], got \[5, 3\]"),
        (torch.zeros(5, 2), TypeError, "set_centroids: coords must have dtype torch.float64"),
        (torch.full((5, 2), torch.nan).double(), ValueError, "set_centroids: coords must be finite"),
        (torch.zeros(0, 2).double(), ValueError, "set_centroids: coords must hold at least one point"),
    ],
)
def test_bad_domains(coords, error, message):
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        model.set_centroids(coords)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


CLOUDS = {
    "lattice": lambda: grid_coords((6, 5), dtype=torch.float64),
    "scattered": lambda: draw(30, 2, seed=1),
    "own": lambda: draw(3, 30, 2, seed=2),
}


@pytest.mark.parametrize("metric", ["raw", "encoded"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cloud", CLOUDS)
def test_ordered_points_may_come_in_any_order(cloud, masked, metric):
    coords, values = CLOUDS[cloud](), draw(3, 30, 1, seed=4)
    mask = draw(3, 30, seed=5) < 0.8 if masked else None
    order = torch.randperm(30, generator=seeded())
    shuffled = PointSet(coords[..., order, :], values[:, order], None if mask is None else mask[:, order])
    for centroids, alike in (("ordered", True), ("points", False)):
        model = build(None, centroids=centroids, neighbor_metric=metric)
        a, b = latent(model, PointSet(coords, values, mask)), latent(model, shuffled)
        assert torch.allclose(a, b, rtol=0, atol=1e-12) is alike, centroids


@pytest.mark.parametrize("masked", [False, True])
def test_ordered_points_of_a_sorted_cloud_are_the_published_ones(masked):
    points = PointSet(GRID, draw(2, 42, 1), draw(2, 42, seed=1) < 0.8 if masked else None)
    ours, published = (build(None, centroids=c).neighborhoods(points) for c in ("ordered", "points"))
    assert all(torch.equal(a, b) for a, b in zip(itertools.chain(*ours), itertools.chain(*published), strict=True))


def test_points_have_no_centroids_to_set():
    model = build(None, centroids="points")
    with pytest.raises(ValueError, match='must have centroids="fixed", got centroids="points"'):
        model.set_centroids(GRID)
    assert not model.needs_centroids


def test_they_are_part_of_the_state(tmp_path):
    config = Config(model=ModelConfig(**{**SIZES, "weight_net_slope": 0.2}))
    model = checkpoint.new_model(config, 2, 1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.set_centroids(GRID.float())
    points = PointSet(GRID.float(), torch.rand(2, 42, 1, generator=seeded()))
    other = checkpoint.new_model(config, 2, 1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(latent(other, points), latent(model, points))
    other.load_state_dict(state)
    assert other.needs_centroids


def test_new_centroids_replace_the_old_ones():
    model, points = build(), PointSet(GRID, draw(1, 42, 1))
    before = latent(model, points)
    model.set_centroids(draw(50, 2))
    after, fresh = latent(model, points), build(draw(50, 2))
    assert torch.equal(after, latent(fresh, points)) and not torch.allclose(after, before)


def test_sphere():
    grid = sphere_grid((6, 9), dtype=torch.float64)
    model, values = build(grid, coord_dim=3), draw(2, 54, 1)
    order = torch.randperm(54, generator=seeded())
    torch.testing.assert_close(
        latent(model, PointSet(grid[order], values[:, order])), latent(model, PointSet(grid, values))
    )


@pytest.mark.parametrize("metric", ["raw", "encoded"])
def test_search_in_a_graph_is_the_models_own(metric):
    model = build(neighbor_metric=metric)
    sites, frequencies = model.encoder.fixed.where(), model.encoding.frequencies if metric == "encoded" else None
    for coords in (GRID, draw(30, 2), draw(2, 30, 2)):
        points = PointSet(coords, torch.zeros(2, coords.shape[-2], 1, dtype=torch.float64))
        batched = coords if coords.dim() == 3 else coords[None]
        arguments = (batched, frequencies, [14, 5, 6, 4], True, sites.coords, sites.members)
        (found,) = neighborhoods_in_graph(*arguments)
        assert torch.equal(found, model.neighborhoods(points)[0].neighbors)
        torch.library.opcheck(neighborhoods_in_graph, arguments)
    with FakeTensorMode():
        members = torch.zeros(5, 4, dtype=torch.int64)
        (found,) = neighborhoods_in_graph(torch.empty(3, 9, 2), None, [5, 4], True, torch.empty(7, 2), members)
        assert found.shape == (3, 5, 4)


def test_compiled_elbo():
    torch._dynamo.reset()
    model, points = build(encoder_density=True), PointSet(GRID, draw(2, 42, 1))
    noise = model.draw_noise(2, generator=seeded())
    compiled = torch.compile(lambda p: model.elbo(p, noise=noise).elbo, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(points), model.elbo(points, noise=noise).elbo)


def test_gradients_reach_every_parameter_of_the_encoder():
    model = build(encoder_density=True)
    points = PointSet(GRID, draw(3, 42, 1), draw(3, 42, seed=1) < 0.5)
    model.elbo(points, generator=seeded()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters())
