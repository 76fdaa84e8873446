from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vamoh.ops import farthest_point_sample
from vamoh.points import grid_coords, sphere_grid

HAS_CUDA = True

SIZES = [(1, 1, 1), (5, 2, 3), (31, 3, 31), (64, 17, 20), (65, 2, 64), (129, 256, 40), (200, 1, 250)]  # N, D, M


def oracle(points: list[list[int]], samples: int, mask: list[bool] | None = None) -> list[int]:
    """The definition, in whole numbers."""
    candidates = [i for i in range(len(points)) if mask is None or mask[i]]
    if len(candidates) <= samples:
        return candidates
    taken = candidates[:1]
    while len(taken) < samples:
        gaps = {
            i: min(sum((a - b) ** 2 for a, b in zip(points[i], points[j], strict=True)) for j in taken)
            for i in candidates
            if i not in taken
        }
        taken.append(min(gaps, key=lambda i: (-gaps[i], i)))
    return taken


def whole(*shape: int, high: int = 5, seed: int = 0) -> Tensor:
    """Coordinates with many exact ties and no rounding."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-high, high + 1, shape)).float()


def encoded_grid(n: int, frequencies: int = 128) -> Tensor:
    frequency = 2 * torch.randn(2, frequencies, generator=torch.Generator().manual_seed(0))
    phase = 2 * math.pi * grid_coords((n, n)) @ frequency
    return torch.cat([phase.cos(), phase.sin()], 1)


@cache
def whole_cloud(n: int, d: int, m: int) -> tuple[Tensor, list[int]]:
    """Coordinates and what is to be found."""
    coords = whole(n, d)
    return coords, oracle(coords.long().tolist(), m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d", "m"), SIZES)
def test_matches_definition(backend, n, d, m, dtype):
    coords, expected = whole_cloud(n, d, m)
    result = farthest_point_sample(coords.to(dtype), m, backend=backend)
    assert result.dtype == torch.int64
    assert result.tolist() == expected


@given(st.data())
def test_any_masked_cloud(data):
    n, d, b = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    value = st.integers(-3, 3)
    coords = data.draw(
        st.lists(st.lists(st.lists(value, min_size=d, max_size=d), min_size=n, max_size=n), min_size=b, max_size=b)
    )
    masks = data.draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n).filter(any), min_size=b, max_size=b))
    m = data.draw(st.integers(1, n + 2))
    expected = [oracle(c, m, k) for c, k in zip(coords, masks, strict=True)]
    width = max(map(len, expected))
    padded = [row + [-1] * (width - len(row)) for row in expected]
    for backend in (None, "reference"):
        result = farthest_point_sample(
            torch.tensor(coords, dtype=torch.float32), m, torch.tensor(masks), backend=backend
        )
        assert result.tolist() == padded


def lattice_cloud(batch: int, n: int, half: int = 30) -> tuple[Tensor, Tensor]:
    """Places [batch, n, 1] and a table of distances with many ties, not the same both ways."""
    generator = np.random.default_rng(0)
    table = torch.from_numpy(generator.integers(0, 9, 2 * half + 1)).float()
    return torch.from_numpy(generator.integers(0, half + 1, (batch, n, 1))), table


def order_by_table(cells: list[int], samples: int, table: list[float], mask: list[bool]) -> list[int]:
    """The definition, one function: cells [N]."""
    left = [i for i, taken in enumerate(mask) if taken]
    if len(left) <= samples:
        return left + [-1] * (samples - len(left))
    taken = [left.pop(0)]
    while len(taken) < samples:
        gap = {i: min(table[len(table) // 2 + cells[i] - cells[j]] for j in taken) for i in left}
        taken.append(min(gap, key=lambda i: (-gap[i], i)))
        left.remove(taken[-1])
    return taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(2, 1), (5, 2), (64, 20), (65, 64), (129, 40)])
def test_table_of_distances(backend, isas, monkeypatch, n, m, dtype):
    cells, table = lattice_cloud(3, n)
    mask = torch.from_numpy(np.random.default_rng(2).random((3, n)) < 0.7) | (torch.arange(n) % 3 == 0)
    clouds = zip(cells[..., 0].tolist(), mask.tolist(), strict=True)
    most = min(m, int(mask.sum(1).max()))
    expected = [order_by_table(cloud, m, table.tolist(), kept)[:most] for cloud, kept in clouds]
    for isa in isas if backend == "cpu" else [None]:
        if isa:
            monkeypatch.setenv("VAMOH_ISA", isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result = farthest_point_sample(cells, m, mask, table=table.to(dtype), backend=backend)
            assert result.tolist() == expected
    one = farthest_point_sample(cells[1], m, table=table.repeat_interleave(2)[::2], backend=backend)
    both = farthest_point_sample(cells[1:2].expand(2, -1, -1), m, table=table, backend=backend)
    assert both.tolist() == [one.tolist()] * 2


def test_grid_corners_then_centre(backend):
    order = farthest_point_sample(grid_coords((5, 5)), 5, backend=backend)
    assert order.tolist() == [0, 24, 4, 20, 12]


def test_coincident_points_are_taken_once_in_index_order(backend):
    assert farthest_point_sample(torch.zeros(9, 3), 6, backend=backend).tolist() == [0, 1, 2, 3, 4, 5]
    poles = farthest_point_sample(sphere_grid((10, 20)), 200, backend=backend)
    assert poles.tolist() == list(range(200))
    assert len(set(farthest_point_sample(sphere_grid((10, 20)), 199, backend=backend).tolist())) == 199


def test_as_many_samples_as_candidates(backend):
    coords = whole(3, 6, 2)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1]], dtype=torch.bool)
    result = farthest_point_sample(coords, 6, mask, backend=backend)
    assert result.tolist() == [[0, 2, 3, -1], [1, -1, -1, -1], [0, 1, 4, 5]]
    assert farthest_point_sample(coords, 9, backend=backend).tolist() == [[0, 1, 2, 3, 4, 5]] * 3


def test_mask_without_effect_and_shared_inputs(backend):
    coords, mask = whole(4, 70, 3), torch.from_numpy(np.random.default_rng(1).random((4, 70)) < 0.5)

    def run(c: Tensor, m: Tensor | None) -> list[list[int]]:
        return farthest_point_sample(c, 12, m, backend=backend).tolist()

    assert run(coords, torch.ones(70, dtype=torch.bool)) == run(coords, None)
    assert run(coords, mask[0]) == [run(c, mask[0]) for c in coords]
    assert run(coords[0], mask) == [run(coords[0], m) for m in mask]
    assert run(coords[:1].expand(4, -1, -1), mask) == run(coords[0], mask)
    assert run(coords[0], mask[0]) == oracle(coords[0].long().tolist(), 12, mask[0].tolist())


def test_strided_inputs(backend):
    coords, mask = whole(3, 50, 4), torch.from_numpy(np.random.default_rng(2).random((3, 50)) < 0.7)
    expected = farthest_point_sample(coords, 9, mask, backend=backend)
    wide = torch.stack([coords, torch.full_like(coords, 9.0)], -1)[..., 0]
    turned = mask.t().contiguous().t()
    assert not wide.is_contiguous()
    assert not turned.is_contiguous()
    assert torch.equal(farthest_point_sample(wide, 9, turned, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_isa_thread_count_and_the_reference_agree_to_the_bit(isas, monkeypatch, dtype):
    generator = torch.Generator().manual_seed(0)
    clouds = [
        encoded_grid(13),
        torch.randn(5, 301, 33, generator=generator),
        torch.randn(2, 97, 3, generator=generator),
    ]
    for cloud in clouds:
        coords = cloud.to(dtype)
        mask = torch.rand(coords.shape[:-1], generator=generator) < 0.8
        for m in (None, mask):
            expected = farthest_point_sample(coords, 60, m, backend="reference")
            for isa in isas:
                monkeypatch.setenv("VAMOH_ISA", isa)
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    assert torch.equal(farthest_point_sample(coords, 60, m, backend="cpu"), expected), (isa, threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_clouds_on_every_isa(isas, monkeypatch, wide_cloud, dtype):
    coords = wide_cloud.to(dtype)
    clouds = torch.stack([coords, coords.flip(0), -coords])
    mask = torch.rand(3, len(coords)) < 0.9
    seen = torch.cat([mask, mask[1:], torch.ones_like(mask[:1])])
    every = farthest_point_sample(clouds[[0, 1, 2, 0, 0, 0]], len(coords) // 2, seen, backend="reference")
    for cloud, m, expected in ((coords, None, every[5]), (coords, mask, every[[0, 3, 4]]), (clouds, mask, every[:3])):
        for isa in isas:
            monkeypatch.setenv("VAMOH_ISA", isa)
            for threads in (1, 3, 5):
                torch.set_num_threads(threads)
                result = farthest_point_sample(cloud, len(coords) // 2, m, backend="cpu")
                assert torch.equal(result, expected), (isa, threads)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_flat_clouds_on_every_isa(isas, monkeypatch, flat_cloud, dtype):
    coords = flat_cloud.to(dtype)
    coords = torch.stack([coords, coords.flip(0)])
    mask = torch.rand(coords.shape[:2]) < 0.99
    mask[1] = True
    expected = farthest_point_sample(coords, 400, mask, backend="reference")
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        for threads in (1, 3):  # of three, two have a cloud to themselves
            torch.set_num_threads(threads)
            assert torch.equal(farthest_point_sample(coords, 400, mask, backend="cpu"), expected), (isa, threads)


def test_nan_and_infinite_coordinates_end(backend):
    coords = whole(40, 3)
    coords[7, 1], coords[9, 0], coords[11] = math.nan, math.inf, -math.inf
    order = farthest_point_sample(coords, 20, backend=backend).tolist()
    assert len(set(order)) == 20
    assert {7, 9, 11} < set(order)
    coords[-1] = math.nan
    assert farthest_point_sample(coords, 39, backend=backend).unique().tolist()[-1] == 39
    assert len(set(farthest_point_sample(torch.full((30, 2), math.nan), 10, backend=backend).tolist())) == 10


def test_empty_batch(backend):
    assert farthest_point_sample(torch.zeros(0, 5, 2), 3, backend=backend).shape == (0, 3)


@pytest.mark.slow
def test_contract_of_torch_library(host_backend):
    coords, mask = whole(2, 12, 3).requires_grad_(), torch.arange(24).reshape(2, 12) % 3 != 1
    torch.use_deterministic_algorithms(False)
    for m in (None, mask):
        torch.library.opcheck(torch.ops.vamoh.farthest_point_sample, (coords, m, 5, None, host_backend))
    cells, table = lattice_cloud(2, 12)
    torch.library.opcheck(torch.ops.vamoh.farthest_point_sample, (cells, None, 5, table, host_backend))
    assert not farthest_point_sample(coords, 5, backend=host_backend).requires_grad
    compiled = torch.compile(farthest_point_sample, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(coords, 5, backend=host_backend), farthest_point_sample(coords, 5, backend=host_backend)
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"coords": [1.0]}, TypeError, "coords must be a torch.Tensor, got list"),
        ({"coords": torch.zeros(3)}, ValueError, r"coords must have shape \[N, D\] or \[B, N, D\], got \[3\]"),
        ({"coords": torch.zeros(4, 2).long()}, TypeError, "coords must have dtype float32 or float64, got int64"),
        ({"coords": torch.zeros(0, 2)}, ValueError, "coords must leave at least one candidate, got none"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ({"num_samples": 2.0}, TypeError, "num_samples must be an int, got 2.0"),
        ({"mask": torch.ones(2, 5).bool()}, ValueError, r"mask must have shape \[B, 4\], got \[2, 5\]"),
        ({"mask": torch.ones(4)}, TypeError, "mask must have dtype bool, got float32"),
        ({"mask": torch.ones(1, 1, 4).bool()}, ValueError, r"mask must have shape \[4\] or \[B, 4\], got \[1, 1, 4\]"),
        ({"mask": torch.tensor([[True] * 4, [False] * 4])}, ValueError, "at least one candidate, got none in item 1"),
        (
            {"coords": torch.zeros(3, 4, 2), "mask": torch.ones(2, 4).bool()},
            ValueError,
            r"shape \[3, 4\], got \[2, 4\]",
        ),
        ({"mask": torch.ones(4, device="meta").bool()}, TypeError, "mask must be on cpu, got meta"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"coords": torch.zeros(4, 2), "num_samples": 2, **change}
    with pytest.raises(error, match=f"^farthest_point_sample: .*{message}"):
        farthest_point_sample(**arguments)


@pytest.mark.parametrize("distinct", [1501, 80])
@pytest.mark.parametrize("dims", [60, 66])
@pytest.mark.parametrize("batch", [1, 2])
def test_threads_that_share_a_cloud(isas, monkeypatch, batch, dims, distinct):
    """Whole numbers: many ties, no rounding."""
    draw = np.random.default_rng([batch, dims])
    values = draw.integers(-4, 5, (batch, distinct, dims))[:, draw.permutation(1501) % distinct]
    points = torch.from_numpy(values).float()
    mask = torch.arange(1501) % 7 != 3
    for m in (None, mask):
        torch.set_num_threads(1)
        expected = farthest_point_sample(points, 90, m, backend="reference")
        for isa in isas:
            monkeypatch.setenv("VAMOH_ISA", isa)
            for threads in (2, 3, 5):
                torch.set_num_threads(threads)
                for _ in range(3):
                    assert torch.equal(farthest_point_sample(points, 90, m, backend="cpu"), expected), (isa, threads)
