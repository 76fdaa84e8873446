from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vamoh.points import (
    PointSet,
    collate,
    domain,
    grid_coords,
    grid_shape,
    observed_coords,
    sphere_coords,
    sphere_grid,
    sphere_grid_shape,
    to_grid,
)


def points(b: int = 3, n: int = 5, d: int = 2, c: int = 2, *, shared: bool = True, mask: object = None) -> PointSet:
    g = torch.Generator().manual_seed(0)
    coords = torch.rand(n, d, generator=g) if shared else torch.rand(b, n, d, generator=g)
    values = torch.rand(b, n, c, generator=g)
    return PointSet(coords, values, None if mask is None else torch.tensor(mask, dtype=torch.bool))


def test_sizes():
    p = points(3, 5, 4, 2, shared=False)
    assert (p.batch, p.count, p.coord_dim, p.channels) == (3, 5, 4, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": None}, TypeError, "values must be a torch.Tensor, got NoneType"),
        ({"values": torch.zeros(5, 2)}, ValueError, r"values must have shape \[B, N, C\], got \[5, 2\]"),
        ({"values": torch.zeros(0, 5, 2)}, ValueError, "values must hold at least one function, got an empty batch"),
        ({"values": torch.zeros(3, 5, 2).int()}, TypeError, "values must have dtype float32 or float64, got int32"),
        ({"values": torch.zeros(3, 5, 2).half()}, TypeError, "values must have dtype float32 or float64, got float16"),
        ({"coords": [[0.0]]}, ValueError, r"coords must have shape \[N, D\] or \[B, N, D\], got list"),
        ({"coords": torch.zeros(5)}, ValueError, r"coords must have shape \[N, D\] or \[B, N, D\], got \[5\]"),
        ({"coords": torch.zeros(4, 2)}, ValueError, r"coords must have shape \[5, D\], got \[4, 2\]"),
        ({"coords": torch.zeros(2, 5, 2)}, ValueError, r"coords must have shape \[3, 5, D\], got \[2, 5, 2\]"),
        ({"coords": torch.zeros(5, 2).double()}, TypeError, "coords must have dtype torch.float32, got torch.float64"),
        ({"coords": torch.zeros(5, 2, device="meta")}, TypeError, "coords must be on cpu, got meta"),
        ({"coords": torch.full((5, 2), math.inf)}, ValueError, "coords must be finite, got 10 NaN or infinite values"),
        ({"mask": torch.ones(5)}, TypeError, "mask must have dtype bool, got float32"),
        ({"mask": torch.ones(4).bool()}, ValueError, r"mask must have shape \[5\] or \[3, 5\], got \[4\]"),
        ({"mask": torch.ones(2, 5).bool()}, ValueError, r"mask must have shape \[5\] or \[3, 5\], got \[2, 5\]"),
        ({"mask": [True] * 5}, ValueError, r"mask must have shape \[5\] or \[3, 5\], got list"),
        ({"mask": torch.ones(5, device="meta").bool()}, TypeError, "mask must be on cpu, got meta"),
    ],
)
def test_errors_name_the_field(change, error, message):
    fields = {"coords": torch.zeros(5, 2), "values": torch.zeros(3, 5, 2), **change}
    with pytest.raises(error, match=f"^PointSet: {message}"):
        PointSet(**fields)


def test_the_first_bad_value_is_named():
    values = torch.zeros(3, 5, 2)
    values[1, 4, 0] = math.nan
    with pytest.raises(ValueError, match=r"values must be finite, got 1 NaN or infinite values, first at \[1, 4, 0\]"):
        PointSet(torch.zeros(5, 2), values)


def test_to():
    p = points(mask=[1, 0, 1, 1, 1])
    double = p.to(torch.float64)
    assert double.coords.dtype == double.values.dtype == torch.float64 and double.mask.dtype == torch.bool
    assert p.to("cpu").mask.tolist() == p.mask.tolist()


@pytest.mark.parametrize("shared", [True, False])
def test_select(shared):
    p = points(mask=[[1, 0, 1, 1, 1], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1]], shared=shared)
    kept = p.select(torch.tensor([4, 1]))
    assert torch.equal(kept.coords, p.coords[..., [4, 1], :])
    assert torch.equal(kept.values, p.values[:, [4, 1]])
    assert kept.mask.tolist() == [[True, False], [False, False], [True, True]]


def test_compact():
    p = points()
    assert p.compact() is p
    shared = p.with_mask(torch.tensor([1, 0, 1, 0, 0]).bool()).compact()
    assert shared.mask is None and torch.equal(shared.values, p.values[:, [0, 2]])
    each = torch.tensor([[1, 0, 0, 0, 1], [1, 0, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    union = p.with_mask(each).compact()
    assert union.mask.tolist() == each[:, [0, 2, 4]].tolist()
    assert torch.equal(union.coords, p.coords[[0, 2, 4]])
    assert torch.equal(union.values[union.mask], p.values[:, [0, 2, 4]][union.mask])
    assert p.with_mask(each[:1].expand(3, -1)).compact().mask is None
    assert p.with_mask(torch.zeros(5).bool()).compact().count == 0


@given(st.integers(1, 40), st.floats(0, 1), st.integers(1, 50), st.integers(0, 5))
def test_drop(count, rate, at_least, seed):
    p = points(2, count, mask=[i % 3 > 0 for i in range(count)])
    kept = p.drop(rate, torch.Generator().manual_seed(seed), at_least)
    draw = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    index = [i for i in range(count) if draw[i] >= rate]
    if rate == 0:
        index = list(range(count))
    elif len(index) < at_least:
        index = sorted(sorted(range(count), key=lambda i: -draw[i])[:at_least])
    assert torch.equal(kept.values, p.values[:, index])
    assert torch.equal(kept.coords, p.coords[index])
    assert torch.equal(kept.mask, p.mask[index])


def test_drop_and_subsample_draw_as_often_as_they_say():
    p, g = points(1, 10_000), torch.Generator().manual_seed(0)
    assert p.drop(0.3, g).count == pytest.approx(7000, abs=200)
    assert p.drop(1.0, g).count == 1
    chosen = p.subsample(4000, g)
    position = torch.searchsorted(p.coords[:, 0].sort().values, chosen.coords[:, 0].contiguous())
    assert len(position.unique()) == 4000  # without replacement
    assert float(chosen.values.mean()) == pytest.approx(float(p.values.mean()), abs=0.02)
    order = [p.coords[:, 0].tolist().index(x) for x in chosen.coords[:50, 0].tolist()]
    assert order == sorted(order)
    assert points().subsample(5).count == 5


def test_drop_and_subsample_errors():
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"^PointSet.drop: rate must be between 0 and 1, got"):
            points().drop(rate)
    with pytest.raises(ValueError, match=r"^PointSet.subsample: count must be at most N=5, got 6"):
        points().subsample(6)
    with pytest.raises(ValueError, match=r"^PointSet.subsample: count must be at least 1, got 0"):
        points().subsample(0)


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 4)])
def test_from_grid_and_back(shape):
    values = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1)) < 0.5
    p = PointSet.from_grid(values, mask=mask)
    assert torch.equal(p.coords, grid_coords(shape))
    assert torch.equal(to_grid(p.values, shape), values)
    for n, at in enumerate(np.ndindex(*shape)):  # row-major
        assert torch.equal(p.values[:, n], values[(slice(None), slice(None), *at)])
        assert torch.equal(p.mask[:, n], mask[(slice(None), *at)])
    assert torch.equal(PointSet.from_grid(values, mask=mask[0]).mask, p.mask[0])
    with pytest.raises(ValueError, match=r"^PointSet.from_grid: mask must have shape"):
        PointSet.from_grid(values, mask=mask[..., :1])
    with pytest.raises(ValueError, match=r"^to_grid: shape \[7\] must hold N="):
        to_grid(p.values, (7,))


def test_from_grid_needs_channels():
    with pytest.raises(
        ValueError, match=r"^PointSet.from_grid: values must have shape \[B, C, \*shape\], got \[2, 3\]"
    ):
        PointSet.from_grid(torch.zeros(2, 3))


def test_from_lists():
    sizes, g = [3, 5, 1], torch.Generator().manual_seed(0)
    coords = [torch.rand(n, 2, generator=g) for n in sizes]
    values = [torch.rand(n, 1, generator=g) for n in sizes]
    p = PointSet.from_lists(coords, values)
    assert p.mask.sum(1).tolist() == sizes
    for i in range(3):
        assert torch.equal(p.coords[i][p.mask[i]], coords[i])
        assert torch.equal(p.values[i][p.mask[i]], values[i])
    assert PointSet.from_lists(coords[:1], values[:1]).mask is None
    with pytest.raises(ValueError, match="^PointSet.from_lists: coords and values must be lists of one length >= 1"):
        PointSet.from_lists(coords, values[:2])
    with pytest.raises(ValueError, match="^PointSet.from_lists: coords and values must be lists of one length >= 1"):
        PointSet.from_lists([], [])
    with pytest.raises(ValueError, match=r"^PointSet.from_lists: values\[1\] must have shape \[5, 1\], got \[3, 1\]"):
        PointSet.from_lists(coords, [values[0], values[0], values[2]])


def test_grid_coords_of_a_non_square_grid():
    coords = grid_coords((5, 3), dtype=torch.float64).reshape(5, 3, 2)
    assert coords[:, 0, 0].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert coords[0, :, 1].tolist() == [-1, -0.5, 0]  # the first size sets the spacing of every axis
    assert grid_coords((1, 2)).tolist() == [[-1, -1], [-1, 1]]


@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("shape", [(4,), (4, 6), (3, 2, 4)])
def test_every_sth_point_of_a_finer_grid_is_a_point_of_the_grid(shape, scale):
    fine = grid_coords(shape, scale=scale, dtype=torch.float64).reshape(*grid_shape(shape, scale), len(shape))
    coarse = fine[tuple(slice(None, None, scale) for _ in shape)].reshape(-1, len(shape))
    torch.testing.assert_close(coarse, grid_coords(shape, dtype=torch.float64), rtol=0, atol=1e-15)
    assert fine.shape[:-1] == tuple(scale * (n - 1) + 1 for n in shape)


def test_grid_errors():
    with pytest.raises(ValueError, match="^grid_coords: every size of shape must be at least 1, got 0"):
        grid_coords((3, 0))
    with pytest.raises(ValueError, match="^grid_coords: shape must list at least one size, got none"):
        grid_coords(())
    with pytest.raises(ValueError, match=r"^sphere_grid: shape must be \(rows, columns\), got \(3,\)"):
        sphere_grid((3,))
    with pytest.raises(TypeError, match="^grid_coords: scale must be an int, got 1.5"):
        grid_coords((3,), scale=1.5)
    with pytest.raises(ValueError, match="^sphere_grid: columns must be at least 1, got 0"):
        sphere_grid((3, 0))


def test_sphere():
    assert sphere_coords(torch.tensor(90.0), torch.tensor(12.0)).tolist() == pytest.approx([0, 0, 1], abs=1e-6)
    assert sphere_coords(torch.tensor(0.0), torch.tensor(90.0)).tolist() == pytest.approx([0, 1, 0], abs=1e-6)
    assert sphere_coords(torch.tensor(30.0), torch.tensor(180.0)).tolist() == pytest.approx(
        [-(0.75**0.5), 0, 0.5], abs=1e-6
    )
    grid = sphere_grid((3, 4), dtype=torch.float64).reshape(3, 4, 3)
    torch.testing.assert_close(grid[0], torch.tensor([[0.0, 0, 1]] * 4, dtype=torch.float64))
    torch.testing.assert_close(grid[2], torch.tensor([[0.0, 0, -1]] * 4, dtype=torch.float64))
    equator = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0]], dtype=torch.float64)
    torch.testing.assert_close(grid[1], equator)
    assert sphere_grid((1, 3)).shape == (3, 3)


@pytest.mark.parametrize("scale", [2, 3])
def test_a_finer_sphere_keeps_the_rows_and_columns(scale):
    fine = sphere_grid((5, 6), scale=scale, dtype=torch.float64).reshape(*sphere_grid_shape((5, 6), scale), 3)
    torch.testing.assert_close(fine[::scale, ::scale].reshape(-1, 3), sphere_grid((5, 6), dtype=torch.float64))


def test_collate():
    g = torch.Generator().manual_seed(0)
    functions = [(torch.rand(n, 2, generator=g), torch.rand(n, 1, generator=g)) for n in (5, 3, 4)]
    mask = torch.tensor([True, False, True])
    batch = collate([functions[0], (*functions[1], mask), (*functions[2], None)])
    assert batch.values.shape == (3, 5, 1) and batch.coords.shape == (3, 5, 2)
    assert batch.mask is not None
    assert batch.mask.tolist() == [[True] * 5, [True, False, True, False, False], [True] * 4 + [False]]
    for i, (x, y) in enumerate(functions):
        assert torch.equal(batch.coords[i, : len(x)], x) and torch.equal(batch.values[i, : len(y)], y)
    assert collate(functions[:1] * 2).mask is None


def test_collate_shares_equal_coordinates():
    values = torch.rand(4, 2, 3, 5)
    whole = PointSet.from_grid(values)
    batch = collate([PointSet.from_grid(v) for v in values.split([1, 2, 1])])
    assert torch.equal(batch.coords, whole.coords) and torch.equal(batch.values, whole.values) and batch.mask is None
    masked = whole.with_mask(torch.rand(15) < 0.5)
    apart = collate([masked.part(slice(0, 3)), masked.part(slice(3, 4))])
    assert apart.coords.shape == (15, 2) and torch.equal(apart.mask, masked.mask.expand(4, -1))


def test_collate_in_a_data_loader():
    class Functions(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
            return torch.full((i + 1, 2), float(i)), torch.full((i + 1, 1), i / 10)

    loader = torch.utils.data.DataLoader(Functions(), batch_size=4, num_workers=1, collate_fn=collate)
    first, second = loader
    assert first.values.shape == (4, 4, 1) and second.values.shape == (2, 6, 1)
    for b, i in enumerate((4, 5)):
        assert torch.equal(second.coords[b, : i + 1], torch.full((i + 1, 2), float(i)))
        assert int(second.mask[b].sum()) == i + 1


def test_collate_refuses():
    x, y = torch.rand(3, 2), torch.rand(3, 1)
    cases: list[tuple[Any, type[Exception], str]] = [
        ([], ValueError, "coords and values must be lists of one length >= 1"),
        ([(x, y), x], TypeError, r"^collate: functions\[1\] must be PointSet or tuple or list, got Tensor"),
        ([(x,)], ValueError, r"^collate: functions\[0\] must be coords, values and maybe a mask, got 1 entries"),
        ([(x, y), (x, y[:2])], ValueError, r"values\[1\] must have shape \[3, 1\], got \[2, 1\]"),
        ([(x, y, torch.ones(3))], TypeError, r"^collate: masks\[0\] must have dtype"),
        ([(x, y, torch.ones(2) > 0)], ValueError, r"^collate: masks\[0\] must have shape \[3\]"),
    ]
    for functions, error, message in cases:
        with pytest.raises(error, match=message):
            collate(functions)


def test_domain():
    coords = torch.tensor([[0.0, 10.0], [4.0, 10.0], [2.0, 13.0]])
    assert domain(coords) == ((2.0, 11.5), (2.0, 2.0))
    assert domain(coords * torch.tensor([1.0, 100.0])) == ((2.0, 1150.0), (2.0, 150.0))  # of other units
    assert domain(coords * torch.tensor([1.0, 0.0])) == ((2.0, 0.0), (2.0, 2.0))  # an axis of one value
    assert domain(coords[:1]) == ((0.0, 10.0), (1.0, 1.0))
    with pytest.raises(ValueError, match="^domain: coords must hold at least one point, got none"):
        domain(coords[:0])
    with pytest.raises(ValueError, match="^domain: coords must be finite"):
        domain(coords / 0)


def test_observed_coords():
    coords = torch.arange(12.0).view(2, 3, 2)
    one, own = torch.tensor([True, False, True]), torch.tensor([[True, False, False], [False, False, True]])
    assert torch.equal(observed_coords(coords, None), coords.view(6, 2))
    assert torch.equal(observed_coords(coords, one), coords[:, [0, 2]].reshape(4, 2))
    assert torch.equal(observed_coords(coords, own), torch.stack([coords[0, 0], coords[1, 2]]))
    assert torch.equal(observed_coords(coords[0], own), coords[0, [0, 2]])
    assert torch.equal(observed_coords(coords[0], one), coords[0, [0, 2]])


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=12), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_domain_spans_the_unit_interval(numbers, stretch, shift):
    coords = torch.tensor(numbers[: len(numbers) // 2 * 2], dtype=torch.float64).view(-1, 2) * stretch + shift
    offset, scale = (torch.tensor(part, dtype=torch.float64) for part in domain(coords))
    size = coords.abs().max()
    assert ((coords - offset).abs().amax(0) <= scale + 1e-6 * size).all()
    extent = (coords.amax(0) - coords.amin(0)) / 2
    assert scale.max() <= max(1.0, float(extent.max()) * (1 + 1e-6)) and scale.min() > 0


def test_an_axis_of_size_one_leaves_the_others_their_extent() -> None:
    line = torch.linspace(-1, 1, 5)
    assert torch.equal(grid_coords((1, 5)), torch.stack([torch.full((5,), -1.0), line], -1))
    assert torch.equal(grid_coords((5, 1)), torch.stack([line, torch.full((5,), -1.0)], -1))
    assert torch.equal(grid_coords((1, 3, 1), scale=2)[:, 1], line)


def test_subsample_leaves_every_function_its_points() -> None:
    mask = torch.rand(6, 40, generator=torch.Generator().manual_seed(0)) < 0.2
    points = PointSet(torch.rand(40, 2), torch.rand(6, 40, 1), mask)
    for seed in range(20):
        plain = points.subsample(8, torch.Generator().manual_seed(seed))
        kept = points.subsample(8, torch.Generator().manual_seed(seed), at_least=3)
        assert int(kept.mask.sum(1).min()) >= 3
        assert {*map(tuple, plain.coords.tolist())} <= {*map(tuple, kept.coords.tolist())}
        if int(plain.mask.sum(1).min()) >= 3:
            assert torch.equal(plain.coords, kept.coords)
