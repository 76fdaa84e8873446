"""Raw clouds of few dimensions: neighbours and centroids beside libraries that people use, where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.cases import Disagreement
from bench.conftest import Contest
from vamoh.ops import farthest_point_sample, knn

NEIGHBORS = 16
SAMPLES = 2048
COUNTS = [4096, 65536, 2**21]
MOST_FLAT = 65536
"""Points that faiss's flat index, which computes every distance, still gets."""


def cloud(count: int, dims: int) -> Tensor:
    """Uniform points [N, D] of the unit cube."""
    return torch.rand(count, dims, generator=torch.Generator().manual_seed(dims))


def missing(contest: Contest, name: str) -> bool:
    """Whether a library is not installed; then the result says so."""
    if find_spec(name) is None:
        contest.left_out[name] = "not installed"
    return name in contest.left_out


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dims", [2, 3])
def test_neighbors(dims: int, count: int, contest: Contest) -> None:
    """NEIGHBORS of every point among all."""
    points = cloud(count, dims)
    runs: dict[str, Callable[[], object]] = {"ours": lambda: knn(points, points, NEIGHBORS)}
    found = {}
    threads = torch.get_num_threads()
    if not missing(contest, "scipy"):
        from scipy.spatial import cKDTree

        def by_tree() -> Tensor:
            return torch.from_numpy(cKDTree(points.numpy()).query(points.numpy(), NEIGHBORS, workers=threads)[1])

        runs["scipy"] = found["scipy"] = by_tree
    if count > MOST_FLAT:
        contest.left_out["faiss"] = "computes every distance"
    elif not missing(contest, "faiss"):
        import faiss

        faiss.omp_set_num_threads(threads)

        def flat() -> Tensor:
            index = faiss.IndexFlatL2(dims)
            index.add(points.numpy())
            return torch.from_numpy(index.search(points.numpy(), NEIGHBORS)[1])

        runs["faiss"] = found["faiss"] = flat
    ours = squared_distances(points, knn(points, points, NEIGHBORS))
    for name, search in found.items():  # faiss subtracts products, which cancel
        if not torch.allclose(squared_distances(points, search()), ours, rtol=1e-5, atol=2e-6):
            raise Disagreement(f"{name} finds other neighbours")
    contest.benchmark.group = "neighbors"
    contest.run(runs, what=f"{NEIGHBORS} neighbors of {count} points in {dims}-D")


def squared_distances(points: Tensor, index: Tensor) -> Tensor:
    """[M, S] from every point to its neighbours, which may differ where they are equally far."""
    return (points[index].double() - points[:, None].double()).square().sum(-1)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dims", [2, 3])
def test_centroids(dims: int, count: int, contest: Contest) -> None:
    """SAMPLES farthest points of all, or half of a small cloud."""
    points = cloud(count, dims)
    samples = min(SAMPLES, count // 2)
    runs: dict[str, Callable[[], object]] = {"ours": lambda: farthest_point_sample(points, samples)}
    if not missing(contest, "fpsample"):
        import fpsample

        def buckets() -> Any:
            return fpsample.bucket_fps_kdline_sampling(points.numpy(), samples, h=7, start_idx=0).astype("int64")

        runs["fpsample"] = buckets
        ours, theirs = (reach(points, torch.as_tensor(i)) for i in (farthest_point_sample(points, samples), buckets()))
        if abs(theirs / ours - 1) > 0.05:  # ties and rounding lead to other points, which cover as well
            raise Disagreement(f"fpsample covers the points within {theirs:g}, ours within {ours:g}")
    contest.benchmark.group = "centroids"
    contest.run(runs, what=f"{samples} centroids of {count} points in {dims}-D")


def reach(points: Tensor, index: Tensor) -> float:
    """Largest distance of a point to the nearest of those of an index."""
    nearest = knn(points[index], points, 1)[:, 0]
    return float((points[index][nearest] - points).norm(dim=-1).max())
