from __future__ import annotations

import importlib
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vamoh.ops import knn
from vamoh.points import grid_coords

module = importlib.import_module("vamoh.ops.knn")  # vamoh.ops.knn is also the function

HAS_CUDA = True

SIZES = [
    (1, 1, 1, 1),
    (5, 3, 2, 5),
    (33, 70, 3, 9),
    (100, 7, 17, 27),
    (129, 65, 256, 9),
    (64, 130, 1, 64),
]  # N, M, D, S


def oracle(points: list[list[int]], queries: list[list[int]], neighbors: int, mask: list[bool] | None = None):
    """The definition, in whole numbers."""
    candidates = [i for i in range(len(points)) if mask is None or mask[i]]
    return [
        sorted(candidates, key=lambda i, q=q: (sum((a - b) ** 2 for a, b in zip(points[i], q, strict=True)), i))[
            :neighbors
        ]
        for q in queries
    ]


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Coordinates with many exact ties and no rounding."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-5, 6, shape)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m", "d", "s"), SIZES)
def test_matches_definition(backend, n, m, d, s, dtype):
    points, queries = whole(n, d), whole(m, d, seed=1)
    result = knn(points.to(dtype), queries.to(dtype), s, backend=backend)
    assert result.dtype == torch.int64
    assert result.tolist() == oracle(points.long().tolist(), queries.long().tolist(), s)


@given(st.data())
def test_any_masked_cloud(data):
    n, m, d = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    b = data.draw(st.integers(1, 3))
    row = st.lists(st.integers(-3, 3), min_size=d, max_size=d)
    points = data.draw(st.lists(st.lists(row, min_size=n, max_size=n), min_size=b, max_size=b))
    queries = data.draw(st.lists(st.lists(row, min_size=m, max_size=m), min_size=b, max_size=b))
    masks = data.draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n).filter(any), min_size=b, max_size=b))
    s = data.draw(st.integers(1, min(map(sum, masks))))
    expected = [oracle(p, q, s, k) for p, q, k in zip(points, queries, masks, strict=True)]
    for backend in (None, "reference"):
        result = knn(
            torch.tensor(points).float(), torch.tensor(queries).float(), s, torch.tensor(masks), backend=backend
        )
        assert result.tolist() == expected


def lattice_cloud(batch: int, n: int, half: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Places [batch, n, 1] and a table of distances with many ties, not the same both ways."""
    generator = np.random.default_rng(seed)
    table = torch.from_numpy(generator.integers(0, 9, 2 * half + 1)).float()
    return torch.from_numpy(generator.integers(0, half + 1, (batch, n, 1))), table


def by_table(cells: Tensor, queries: Tensor, neighbors: int, table: Tensor, mask: Tensor) -> list[list[int]]:
    """The definition, one function: cells [N], queries [M], mask [N]."""
    distances, half = table.tolist(), len(table) // 2
    candidates = [(i, int(cells[i])) for i in mask.nonzero()[:, 0].tolist()]
    rows = [{i: distances[half + place - q] for i, place in candidates} for q in queries.tolist()]
    return [sorted(row, key=lambda i, row=row: (row[i], i))[:neighbors] for row in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m", "s"), [(1, 1, 1), (5, 3, 5), (33, 70, 9), (100, 7, 27), (129, 65, 64)])
def test_table_of_distances(backend, isas, monkeypatch, n, m, s, dtype):
    cells, table = lattice_cloud(3, n)
    queries, _ = lattice_cloud(3, m, seed=1)
    mask = torch.from_numpy(np.random.default_rng(2).random((3, n)) < 0.7) | (torch.arange(n) < s)

    clouds = zip(cells[..., 0], queries[..., 0], mask, strict=True)
    expected = [by_table(cloud, query, s, table, kept) for cloud, query, kept in clouds]
    for isa in isas if backend == "cpu" else [None]:
        if isa:
            monkeypatch.setenv("VAMOH_ISA", isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert knn(cells, queries, s, mask, table=table.to(dtype), backend=backend).tolist() == expected
    shared = knn(cells[:1].expand(3, -1, -1), queries, s, table=table, backend=backend)
    assert torch.equal(shared, knn(cells[0], queries, s, table=table.repeat_interleave(2)[::2], backend=backend))


@cache
def lattice_search(n: int, share: float, s: int, values: int) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Any]]:
    """Table, cells [2, N], queries [2, M], mask [2, N], and what is to be found."""
    generator = np.random.default_rng([n, s, values])
    table = torch.from_numpy(generator.integers(0, values, 401))
    cells = torch.from_numpy(np.stack([generator.permutation(201)[:n] for _ in range(2)]))
    queries = torch.from_numpy(generator.integers(0, 201, (2, 150)))
    mask = torch.from_numpy(generator.random((2, n)) < share) | (torch.arange(n) < s)
    expected = [by_table(*clouds, s, table, kept) for *clouds, kept in zip(cells, queries, mask, strict=True)]
    return table, cells, queries, mask, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", [2, 9, 10**6])  # all but a few distances tie; many; hardly any
@pytest.mark.parametrize(("n", "share", "s"), [(200, 1.0, 1), (200, 0.5, 9), (60, 0.7, 30), (201, 0.1, 14)])
def test_cells_in_the_order_of_their_distance(backend, n, share, s, values, dtype):
    table, cells, queries, mask, expected = lattice_search(n, share, s, values)
    table = table.to(dtype)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        result = knn(cells[..., None], queries[..., None], s, mask, table=table, backend=backend)
        assert result.tolist() == expected


def test_a_changed_table_is_noticed(backend):
    """The displacement of the nearest point goes from 0 to 5."""
    cells, distance = torch.arange(100)[:, None], (torch.arange(201) - 100).abs().float()

    def nearest(table: Tensor) -> list[int]:
        return knn(cells, cells, 1, table=table, backend=backend)[:, 0].tolist()

    shifted = [min(i + 5, 99) for i in range(100)]
    table = distance.clone()
    assert nearest(table) == list(range(100))
    table.copy_(distance.roll(5))
    assert nearest(table) == shifted
    with torch.inference_mode():
        table = distance.clone()
        assert nearest(table) == list(range(100))
        table.copy_(distance.roll(5))
        assert nearest(table) == shifted


def test_one_order_is_remembered_for_every_number_of_points():
    cells, table = torch.arange(400)[:, None], (torch.arange(801) - 400).abs().float()
    kept = set()
    for count in range(400, 40, -7):
        result = knn(cells[:count], cells, 2, table=table, backend="cpu")
        assert result[:, 0].tolist() == [min(i, count - 1) for i in range(400)]
        kept.add(module._ORDERS[table].length)
    assert len(kept) <= 4 and module._ORDERS[table].length == max(kept)


def test_table_without_finite_distances(backend):
    cells, table = torch.arange(100)[:, None], torch.full((201,), math.inf)
    table[100] = math.nan
    assert knn(cells, cells, 3, table=table, backend=backend).tolist() == [[0, 1, 2]] * 100


def test_nan_in_a_table_counts_as_largest(backend):
    table = torch.tensor([math.nan, math.inf, 0.0, 2.0, math.nan])
    cells = torch.tensor([[2], [1], [0]])
    assert knn(cells, cells[:1], 3, table=table, backend=backend).tolist() == [[0, 1, 2]]
    assert knn(cells, cells[2:], 3, table=table, backend=backend).tolist() == [[2, 1, 0]]


def test_grid_ties_go_to_the_lowest_index(backend):
    grid = grid_coords((5, 5))
    result = knn(grid, grid, 5, backend=backend)
    assert result[12].tolist() == [12, 7, 11, 13, 17]
    assert result[0].tolist() == [0, 1, 5, 6, 2]


def test_precise_coordinates_against_float64(backend):
    generator = np.random.default_rng(0)
    points, queries = generator.normal(size=(300, 40)), generator.normal(size=(80, 40))
    distance = ((queries[:, None] - points[None]) ** 2).sum(-1)
    expected = np.argsort(distance, axis=1)[:, :27]
    result = knn(torch.from_numpy(points), torch.from_numpy(queries), 27, backend=backend)
    assert np.array_equal(result.numpy(), expected)


def test_near_points_far_from_the_origin(backend):
    """|p|² + |q|² - 2p·q would lose these distances to cancellation."""
    points = 4096 + torch.arange(50.0)[:, None] / 1024
    assert knn(points, points, 2, backend=backend)[:, 0].tolist() == list(range(50))


def test_shared_inputs(backend):
    points, queries = whole(4, 40, 3), whole(4, 9, 3, seed=1)
    mask = torch.from_numpy(np.random.default_rng(1).random((4, 40)) < 0.6)

    def run(p: Tensor, q: Tensor, m: Tensor | None) -> list:
        return knn(p, q, 6, m, backend=backend).tolist()

    assert run(points, queries, None) == [run(p, q, None) for p, q in zip(points, queries, strict=True)]
    assert run(points[0], queries, None) == [run(points[0], q, None) for q in queries]
    assert run(points, queries[0], mask[0]) == [run(p, queries[0], mask[0]) for p in points]
    assert run(points[0], queries[0], mask) == [run(points[0], queries[0], m) for m in mask]
    assert run(points[:1].expand(4, -1, -1), queries, mask) == run(points[0], queries, mask)
    assert run(points[0], queries[0], torch.ones(40, dtype=torch.bool)) == run(points[0], queries[0], None)
    assert run(points[0], queries[0], mask[0]) == oracle(
        points[0].long().tolist(), queries[0].long().tolist(), 6, mask[0].tolist()
    )


def test_strided_inputs(backend):
    points, queries = whole(3, 50, 4), whole(3, 20, 4, seed=1)
    mask = torch.from_numpy(np.random.default_rng(2).random((3, 50)) < 0.7)
    expected = knn(points, queries, 5, mask, backend=backend)
    result = knn(points.mT.contiguous().mT, queries.flip(1).flip(1).mT.clone().mT, 5, mask.T.clone().T, backend=backend)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_isa_thread_count_and_the_reference_agree_to_the_bit(isas, monkeypatch, dtype):
    generator = torch.Generator().manual_seed(0)
    phase = 2 * math.pi * grid_coords((13, 13)) @ (2 * torch.randn(2, 128, generator=generator))
    encoded = torch.cat([phase.cos(), phase.sin()], 1)
    clouds = [encoded, torch.randn(5, 201, 33, generator=generator), torch.randn(2, 97, 3, generator=generator)]
    for cloud in clouds:
        points = cloud.to(dtype)
        mask = torch.rand(points.shape[:-1], generator=generator) < 0.8
        for m in (None, mask):
            expected = knn(points, points, 19, m, backend="reference")
            for isa in isas:
                monkeypatch.setenv("VAMOH_ISA", isa)
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    assert torch.equal(knn(points, points, 19, m, backend="cpu"), expected), (isa, threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_clouds_on_every_isa(isas, monkeypatch, wide_cloud, dtype):
    points = wide_cloud.to(dtype)
    n = len(points)
    mask = torch.rand(2, n) < 0.8
    queries = torch.stack([points, points[torch.randperm(n)] + 3 * points.nan_to_num().std()])[:, : n - 5]
    for s in (1, 9, 27):
        expected = knn(points, queries, s, mask, backend="reference")
        for isa in isas:
            monkeypatch.setenv("VAMOH_ISA", isa)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert torch.equal(knn(points, queries, s, mask, backend="cpu"), expected), (s, isa, threads)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_flat_clouds_on_every_isa(isas, monkeypatch, flat_cloud, dtype):
    points = flat_cloud.to(dtype)
    n = len(points)
    mask = torch.rand(2, n) < 0.8
    far = points[torch.randperm(n)[:199]] + 3 * points.nan_to_num(posinf=0).std()
    queries = torch.cat([points[torch.randperm(n)[:199]], far, points[:1] * math.nan])
    expected = knn(points, queries, 9, mask, backend="reference")
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found = knn(points, queries, 9, mask, backend="cpu")
            assert torch.equal(found, expected), (isa, threads)
            assert torch.equal(knn(points, queries, 1, mask, backend="cpu"), expected[..., :1]), (isa, threads)


def test_a_nearer_point_that_looks_farther_in_seven_bits(isas, monkeypatch):
    """Rounded to whole numbers the first point is 3 away in most dimensions, the second 1."""
    points = torch.tensor([12.51, 8.51, 0.0, 127.0])[:, None].repeat(1, 64)
    query = torch.full((1, 64), 10.49)
    points[0, :6] = 10.49
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        assert knn(points, query, 1, backend="cpu").tolist() == [[0]]


def test_batch_larger_than_what_is_packed_at_once(backend):
    points = torch.randn(9, 4000, 500, generator=torch.Generator().manual_seed(0))
    result = knn(points, points[:, 17:18], 1, backend=backend)  # 72 MB
    assert result.flatten().tolist() == [17] * 9


def test_nan_and_overflow_count_as_equal_and_largest(backend):
    points = torch.tensor([[math.nan], [1e30], [3.0], [math.inf], [1.0]])
    assert knn(points, torch.zeros(1, 1), 5, backend=backend).tolist() == [[4, 2, 0, 1, 3]]
    mask = torch.tensor([False, True, True, True, True])
    assert knn(points, torch.zeros(1, 1), 4, mask, backend=backend).tolist() == [[4, 2, 1, 3]]
    assert knn(points, torch.full((1, 1), math.nan), 3, backend=backend).tolist() == [[0, 1, 2]]


def test_no_queries_and_empty_batch(backend):
    assert knn(torch.zeros(5, 2), torch.zeros(0, 2), 3, backend=backend).shape == (0, 3)
    assert knn(torch.zeros(0, 5, 2), torch.zeros(0, 4, 2), 3, backend=backend).shape == (0, 4, 3)


@pytest.mark.slow
def test_contract_of_torch_library(host_backend):
    points, mask = whole(2, 12, 3).requires_grad_(), torch.arange(24).reshape(2, 12) % 3 != 1
    torch.use_deterministic_algorithms(False)
    for m in (None, mask):
        torch.library.opcheck(torch.ops.vamoh.knn, (points, points[:, :4], 5, m, None, host_backend))
    cells, table = lattice_cloud(2, 12)
    torch.library.opcheck(torch.ops.vamoh.knn, (cells, cells[:, :4], 5, mask, table, host_backend))
    compiled = torch.compile(knn, fullgraph=True, backend="aot_eager")
    for m in (None, mask):
        expected = knn(points, points, 5, m, backend=host_backend)
        assert torch.equal(compiled(points, points, 5, m, backend=host_backend), expected)
        assert not expected.requires_grad


PLACES = {
    "points": torch.zeros(4, 1, dtype=torch.int64),
    "queries": torch.zeros(3, 1, dtype=torch.int64),
    "table": torch.zeros(5),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"points": None}, TypeError, "points must be a torch.Tensor, got NoneType"),
        ({"points": torch.zeros(3)}, ValueError, r"points must have shape \[N, D\] or \[B, N, D\], got \[3\]"),
        ({"points": torch.zeros(4, 2).half()}, TypeError, "points must have dtype float32 or float64, got float16"),
        ({"queries": torch.zeros(3, 3)}, ValueError, r"queries must have shape \[M, 2\], got \[3, 3\]"),
        (
            {"queries": torch.zeros(3, 2).double()},
            TypeError,
            "queries must have dtype torch.float32, got torch.float64",
        ),
        ({"queries": torch.zeros(3, 2, device="meta")}, TypeError, "queries must be on cpu, got meta"),
        ({"num_neighbors": -1}, ValueError, "num_neighbors must be at least 1, got -1"),
        ({"num_neighbors": 5}, ValueError, "num_neighbors must be at most the 4 candidates, got 5"),
        ({"mask": torch.ones(3).bool()}, ValueError, r"mask must have shape \[4\], got \[3\]"),
        (
            {"mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 0]]).bool()},
            ValueError,
            "num_neighbors must be at most the 1 candidates in item 1, got 2",
        ),
        ({"points": torch.zeros(4, 2).long()}, TypeError, "points must have dtype float32 or float64, got int64"),
        (PLACES | {"points": torch.zeros(4, 1)}, TypeError, "points must have dtype int64, got float32"),
        (PLACES | {"points": torch.zeros(4, 2).long()}, ValueError, r"points must have shape \[N, 1\], got \[4, 2\]"),
        (PLACES | {"table": torch.zeros(4)}, ValueError, "table must have an odd number of entries below 2.31, got 4"),
        (PLACES | {"table": torch.zeros(5).long()}, TypeError, "table must have dtype float32 or float64, got int64"),
        (
            PLACES | {"queries": torch.tensor([[1], [3], [-1]])},
            ValueError,
            "queries must lie between 0 and 2, half of the table, got -1 to 3",
        ),
        (
            PLACES | {"points": torch.full((4, 1), 3)},
            ValueError,
            "points must lie between 0 and 2, half of the table, got 3 to 3",
        ),
        (PLACES | {"table": torch.zeros(5, device="meta")}, TypeError, "points must be on meta, got cpu"),
        (
            {"points": torch.zeros(3, 4, 2), "queries": torch.zeros(2, 3, 2)},
            ValueError,
            r"queries must have shape \[3, M, 2\], got \[2, 3, 2\]",
        ),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"points": torch.zeros(4, 2), "queries": torch.zeros(3, 2), "num_neighbors": 2, **change}
    with pytest.raises(error, match=f"^knn: {message}"):
        knn(**arguments)
