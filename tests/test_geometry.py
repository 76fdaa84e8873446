"""What follows from coordinates, and that nothing of it depends on the company of a function in its batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vamoh.geometry as module
from vamoh import PointSet, VaMoH
from vamoh._cache import ContentCache
from vamoh.encoding import FourierFeatures
from vamoh.geometry import copy_to_device, features, find_lattice, find_mirror, measure, mirror
from vamoh.model import Noise
from vamoh.points import grid_coords, sphere_grid


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "coords",
    [
        grid_coords((4, 4)),
        grid_coords((5, 7)),
        grid_coords((3, 4, 5)),
        sphere_grid((5, 8)),
        sphere_grid((46, 90)),
        torch.zeros(1, 2),
        torch.zeros(0, 2),
    ],
    ids=lambda c: str(tuple(c.shape)),
)
def test_mirror_of_symmetric_points(coords):
    coords = coords - (coords.amin(0) + coords.amax(0)) / 2 if coords.shape[1] == 3 and len(coords) == 60 else coords
    shuffled = coords[torch.randperm(len(coords), generator=seeded())]
    for x in (coords, shuffled):
        found = mirror(x)
        if len(coords) == 35:  # taller than wide: the columns are not centred
            assert found is None
            continue
        assert found is not None
        paired = found >= 0
        assert paired.double().mean() >= 7 / 8 or not len(x)
        assert torch.equal(found[found[paired]], torch.arange(len(x))[paired])
        assert (x[found[paired]] + x[paired]).abs().max() <= 3e-7 if len(x) else True


def test_mirror_of_points_that_have_few():
    g = seeded()
    cloud = torch.randn(50, 3, generator=g)
    assert mirror(cloud) is None
    most = torch.cat([cloud, -cloud.flip(0), torch.randn(10, 3, generator=g)])
    found = mirror(most)
    assert found is not None and found.tolist() == [*range(99, -1, -1), *[-1] * 10]


def test_mirror_of_a_grid_in_parts(monkeypatch):
    coords = grid_coords((5, 5))
    whole = mirror(coords)
    for chunk in (1, 7, 24):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        assert torch.equal(mirror(coords), whole)
    assert torch.equal(whole, torch.arange(24, -1, -1))


def test_mirror_of_repeated_points():
    coords = torch.tensor([[1.0, 2.0], [1.0, 2.0], [-1.0, -2.0], [0.0, 0.0], [-1.0, -2.0]])
    found = mirror(coords)
    assert found is not None and found.tolist() == [2, 4, 0, 3, 1]


@pytest.mark.parametrize("shape", [(7,), (28, 28), (5, 9), (4, 1, 6), (32, 32, 32)])
def test_lattice_of_a_grid_and_of_some_of_its_points(shape):
    coords = grid_coords(shape)
    found = find_lattice(coords)
    assert found.sizes == shape
    cells = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"), -1).reshape(-1, len(shape))
    assert torch.equal(found.cells, cells)
    some = torch.randperm(len(coords), generator=seeded())[: max(len(coords) // 2, 5)]
    part = find_lattice(coords[some])
    moved = cells[some] - cells[some].amin(0)
    assert torch.equal(part.cells, moved)
    assert part.sizes == tuple((moved.amax(0) + 1).tolist())


def test_cell_indices_number_displacements():
    found = find_lattice(grid_coords((4, 3, 2)))
    assert found.displacements == 7 * 5 * 3
    cell, middle = found.cell_index()[:, 0], found.displacements // 2
    assert int(cell.min()) == 0 and int(cell.max()) == middle
    table = torch.stack(
        torch.meshgrid(torch.arange(-3, 4), torch.arange(-2, 3), torch.arange(-1, 2), indexing="ij"), -1
    ).reshape(-1, 3)
    numbers = middle + cell[:, None] - cell
    assert torch.equal(table[numbers], found.cells[:, None] - found.cells)


def test_lattice_of_batches_steps_and_other_axes():
    coords = torch.tensor([[[0.5, 3.0], [1.5, 3.0]], [[3.5, 3.0], [0.5, 3.0]]])
    found = find_lattice(coords)
    assert found.sizes == (4, 1) and found.step.tolist() == [1, 1]
    assert found.cells.tolist() == [[[0, 0], [1, 0]], [[3, 0], [0, 0]]]
    assert find_lattice(coords[0, :1]).sizes == (1, 1)


def test_no_lattice():
    generator = seeded()
    assert find_lattice(torch.randn(50, 2, generator=generator)) is None
    assert find_lattice(sphere_grid((10, 20))) is None
    assert find_lattice(torch.zeros(0, 2)) is None
    assert find_lattice(torch.arange(5000.0)[:, None]) is None
    assert find_lattice(torch.arange(4096.0)[:, None]).sizes == (4096,)
    coords = grid_coords((28, 28))
    coords[100, 1] += 1e-4
    assert find_lattice(coords) is None
    assert find_lattice(1 + torch.arange(9.0, dtype=torch.float64)[:, None] * 2**-23) is None  # all within rounding


@given(st.data())
def test_some_points_of_a_lattice_lie_on_one_with_no_more_cells(data):
    """Also where no two of them are neighbours: gaps of 2 and 3 cells have the step of one."""
    sizes = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    scale, shift = data.draw(st.floats(0.01, 100)), data.draw(st.floats(-2, 2))
    cells = torch.tensor(
        [[data.draw(st.integers(0, n - 1)) for n in sizes] for _ in range(data.draw(st.integers(1, 9)))]
    )
    found = find_lattice(((cells + shift * max(sizes)) * scale).float())
    assert found is not None
    assert all(n <= size for n, size in zip(found.sizes, sizes, strict=True))
    extents = (cells.amax(0) - cells.amin(0)).tolist()
    extents = (cells.amax(0) - cells.amin(0)).tolist()
    steps = torch.tensor([extent / max(n - 1, 1) for n, extent in zip(found.sizes, extents, strict=True)])
    assert torch.equal(found.cells * steps.round().long(), cells - cells.amin(0))


def test_gaps_without_a_single_cell():
    found = find_lattice(torch.tensor([0.0, 2.0, 5.0, 12.0])[:, None])
    assert found is not None and found.cells[:, 0].tolist() == [0, 2, 5, 12]


@pytest.mark.parametrize("frequencies", [0, 4])
def test_features_are_remembered_by_content(frequencies):
    encoding, coords, cache = FourierFeatures(2, frequencies, 1.0, learn=False), torch.rand(5, 2), ContentCache[Any]()
    before = coords.clone()
    for _ in range(2):
        assert torch.equal(features(coords, encoding, cache), encoding(coords))
    coords.mul_(0.5)
    assert torch.equal(features(coords, encoding, cache), encoding(coords))
    assert torch.equal(features(before, encoding, cache), encoding(before))
    if frequencies:
        assert features(before, encoding, cache) is features(before.clone(), encoding, cache)
        encoding.frequencies.mul_(2)
        assert torch.equal(features(before, encoding, cache), encoding(before))
    else:
        assert features(coords, encoding, cache) is coords


def test_features_keep_gradients():
    encoding, coords, cache = FourierFeatures(2, 3, 1.0, learn=True), torch.rand(5, 2), ContentCache[Any]()
    for _ in range(2):
        encoding.zero_grad()
        features(coords, encoding, cache).sum().backward()
        assert encoding.frequencies.grad.any()
    encoding = FourierFeatures(2, 3, 1.0, learn=False)
    features(coords, encoding, cache)
    coords.requires_grad_()
    features(coords, encoding, cache).sum().backward()
    assert coords.grad.any()


def test_mirror_of_symmetric_coordinates():
    coords, cache = grid_coords((6, 6)), ContentCache[Any]()
    encoding = FourierFeatures(2, 5, 2.0, learn=False)
    found = find_mirror(coords, encoding, cache)
    assert found is not None and find_mirror(coords.clone(), encoding, cache) is found  # remembered
    at = encoding(coords)
    torch.testing.assert_close(at[found], at * torch.tensor([1.0] * 5 + [-1.0] * 5), rtol=0, atol=2e-6)


def test_mirror_only_where_it_saves_work():
    coords, encoding = grid_coords((6, 6)), FourierFeatures(2, 5, 1.0, learn=False)
    assert find_mirror(coords, FourierFeatures(2, 0, 1.0, learn=False), ContentCache()) is None
    assert find_mirror(coords[:9], encoding, ContentCache()) is None
    assert find_mirror(coords[None], encoding, ContentCache()) is None


def test_mirror_of_a_large_grid_is_not_remembered(monkeypatch):
    coords, encoding, cache = grid_coords((6, 6)), FourierFeatures(2, 5, 1.0, learn=False), ContentCache()
    expected = find_mirror(coords, encoding, cache)
    monkeypatch.setattr(module, "_REMEMBERED", 35)
    first, second = (find_mirror(coords, encoding, cache) for _ in range(2))
    assert first is not second and torch.equal(first, expected) and torch.equal(second, expected)


def distances(cells: Tensor, table: Tensor) -> Tensor:
    return table[len(table) // 2 + cells[:, 0][:, None] - cells[:, 0]].double()


@pytest.mark.parametrize("shape", [(9,), (12, 7), (5, 4, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("encoded", [True, False])
def test_the_table_of_a_lattice_holds_its_distances(shape, dtype, encoded):
    encoding = FourierFeatures(len(shape), 16, 2.0, learn=False).to(dtype)
    coords = grid_coords(shape, dtype=torch.float64)
    cells, table = measure(coords.to(dtype), encoding, encoded, ContentCache(), 0)
    assert table.dtype == dtype and torch.equal(table, table.flip(0)) and table[len(table) // 2] == 0
    at = encoding.double()(coords) if encoded else coords
    expected = ((at[:, None] - at) ** 2).sum(-1)
    bound = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(distances(cells, table), expected, rtol=0, atol=bound)


def test_equal_distances_on_a_lattice_are_equal():
    """3, 4 and 5, along any axis, whatever the step is rounded to."""
    for scale in (0.1, 1 / 3, 0.7):
        coords = grid_coords((6, 9), dtype=torch.float64) * scale
        cells, table = measure(coords, FourierFeatures(2, 0, 1.0, False).double(), False, ContentCache(), 0)
        squared = distances(cells, table)[0].view(6, 9)
        assert squared[3, 4] == squared[4, 3] == squared[5, 0] == squared[0, 5] and squared[1, 0] == squared[0, 1]


def test_elsewhere_distances_are_those_of_features():
    encoding = FourierFeatures(2, 4, 2.0, learn=False)
    cloud, fine = torch.rand(6, 2, generator=seeded()), grid_coords((300, 300))
    assert measure(cloud, encoding, True, ContentCache(), 0)[1] is None
    assert torch.equal(measure(cloud, encoding, True, ContentCache(), 0)[0], encoding(cloud))
    assert measure(cloud, encoding, False, ContentCache(), 0)[0] is cloud
    # More displacements than a small table has.
    assert measure(fine, encoding, True, ContentCache(), 0)[1] is None
    assert measure(fine, encoding, True, ContentCache(), 599 * 599)[1] is not None


def test_a_table_is_remembered_by_lattice_and_frequencies():
    encoding, cache = FourierFeatures(2, 4, 2.0, learn=False), ContentCache[Any]()
    coords = grid_coords((4, 4))
    table = measure(coords, encoding, True, cache, 0)[1]
    assert measure(coords.flip(0), encoding, True, cache, 0)[1] is table
    encoding.frequencies.mul_(2)
    assert not torch.equal(measure(coords, encoding, True, cache, 0)[1], table)


@pytest.mark.parametrize("again", [True, False])
def test_copies_bring_what_is_known_of_the_coordinates(monkeypatch, again):
    encoding, coords = FourierFeatures(2, 4, 2.0, learn=False), grid_coords((5, 6))
    mask = torch.rand(2, 30, generator=seeded()) < 0.7
    each = coords + torch.where(mask[..., None], 0, 0.01)  # what is not observed lies on no lattice
    monkeypatch.setattr("vamoh.geometry.upload", lambda value, device: value.clone())
    for host, known in ((coords, None), (each, mask)):
        cache: ContentCache[Any] = ContentCache()
        copies = copy_to_device(host, known, encoding, cache, again)
        assert (copy_to_device(host.clone(), known, encoding, cache, again)[0] is copies[0]) == again
        lattice = module._lattice(host, known)
        reflected = find_mirror(host, encoding, ContentCache()) if again else None
        with monkeypatch.context() as patch:
            for name in ("find_lattice", "mirror"):
                patch.setattr(f"vamoh.geometry.{name}", lambda *_: pytest.fail("read the copy"))
            found = module._lattice_worth_a_table(*copies, 0, cache)
            there = find_mirror(copies[0], encoding, cache)
        assert torch.equal(found.cells, lattice.cells) and found.sizes == lattice.sizes
        assert there is reflected is None or torch.equal(there, reflected)


TINY: dict[str, Any] = {
    "coord_dim": 2,
    "channels": 1,
    "latent_dim": 3,
    "components": 3,
    "frequencies": 6,
    "frequency_scale": 0.7,
    "encoder_centroids": (12, 5),
    "encoder_neighbors": (5, 4),
    "encoder_channels": (4, 4),
    "weight_net": (4,),
    "weight_net_slope": 0.2,
    "flow_layers": 2,
    "hypernet_widths": (6,),
    "inr_widths": (6,),
    "gating_widths": (4,),
    "kl_samples": 4,
}
GRID = grid_coords((8, 6), dtype=torch.float64)
SCATTERED = 2 * torch.rand(48, 2, dtype=torch.float64, generator=seeded(1)) - 1
CLOUDS = {
    "grid": GRID,
    "scattered": SCATTERED,
    "grid and others": torch.cat([GRID[:36], SCATTERED[:12]]),  # the function of interest observes the grid alone
    "grids of their own": torch.stack([GRID, GRID.flip(0), GRID[torch.randperm(48, generator=seeded(2))]]),
    "own, some on a grid": torch.stack([GRID, SCATTERED, GRID.flip(0) * 0.9]),
}


def everything(model: VaMoH, points: PointSet, noise: Noise, where: Tensor) -> dict[str, Tensor]:
    """What the model makes of the first function of a batch."""
    with torch.no_grad():
        q, terms, maps = model.encode(points), model.elbo(points, noise=noise), model.reconstruct(points, where)
        model._randn = lambda *shape, generator: noise.z
        found = {"mean": q.mean, "std": q.std, **vars(terms), "iwae": model.iwae(points, samples=1), "pi": maps.pi}
        return {name: value[0] for name, value in {**found, "reconstruction": maps.mean}.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("centroids", ["ordered", "points", "fixed"])
@pytest.mark.parametrize("metric", ["encoded", "raw"])
@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_function_gets_the_same_in_any_company(cloud, metric, centroids, dtype):
    """Alone as a cloud or under a mask, among equal masks, among others: to rounding, the sizes of matrices differ."""
    coords, generator = CLOUDS[cloud].to(dtype), seeded(3)
    model = VaMoH(**TINY, neighbor_metric=metric, centroids=centroids).to(dtype)
    if centroids == "fixed":
        model.set_centroids(GRID.to(dtype))
    values = torch.rand(3, 48, 1, generator=generator, dtype=torch.float64).to(dtype)
    noise = Noise(*(torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in ((3, 3), (4, 3, 3))))
    kept = torch.randperm(36, generator=generator)[:32].sort().values
    own = torch.zeros(48, dtype=torch.bool).index_fill(0, kept, True)
    others = torch.rand(2, 48, generator=generator) < 0.6
    others[:, 36:] = True
    first = coords if coords.dim() == 2 else coords[0]
    equal = coords if coords.dim() == 2 else first.expand(3, -1, -1).contiguous()
    alone = everything(model, PointSet(first[kept], values[:1, kept]), noise.part(slice(0, 1)), first)
    batches = {
        "masked": (PointSet(first, values[:1], own[None]), noise.part(slice(0, 1))),
        "a mask for all": (PointSet(equal, values, own), noise),
        "equal masks": (PointSet(equal, values, own.expand(3, -1)), noise),
        "other masks": (PointSet(coords, values, torch.cat([own[None], others])), noise),
    }
    bound = 1e-12 if dtype == torch.float64 else 2e-5
    for company, (points, part) in batches.items():
        for name, value in everything(model, points, part, first).items():
            error = (value - alone[name]).abs().max() / alone[name].abs().max()
            assert error <= bound, f"{name}, {company}: {float(error):.1e}"
