"""The benchmarks measure what they say: counts, contestants that agree, timing in turn, the report."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import counts, plain
from bench.baseline import Baseline
from bench.cases import NAMES, Draw, config, coordinates, positions, reference_backend, sizes, symmetric
from bench.op_cases import op_cases
from bench.report import HEADER, report
from bench.roofline import Probe
from bench.timing import SLOW, TooSlow, interleave, plan, ratios, time_limit
from vamoh import PointSet, VaMoH, grid_coords
from vamoh.layout import packed_size
from vamoh.ops.inr_mixture import Inr, inr_mixture_reference
from vamoh.ops.point_conv import point_conv_reference

B, K, N, M, S, C, Z, Q, T = 2, 3, 10, 5, 4, 2, 3, 7, 6
WIDTHS = (6, 5, 4, 2)


def products(run: Callable[[], object]) -> int:
    """Operations of all matrix products of `run`, counted while it runs."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_inr_forward_counts() -> None:
    theta, features = torch.randn(B, K, packed_size(WIDTHS)), torch.randn(N, 6)
    outputs = []
    operations = products(lambda: outputs.append(inr_mixture_reference(theta, features, Inr(WIDTHS))))
    assert counts.inr_forward(B, K, N, WIDTHS) == (operations, size(theta, features, *outputs))


def test_mirrored_grid_halves_the_first_layer() -> None:
    first, rest = torch.randn(5, 6), torch.randn(4, 5)
    phase = torch.randn(N // 2, 3)
    outputs = []

    def by_halves() -> None:
        even, odd = phase.cos() @ first[:, :3].T, phase.sin() @ first[:, 3:].T
        outputs.append(torch.cat([even + odd, even - odd]) @ rest.T)

    assert counts.inr_forward(1, 1, N, (6, 5, 4), mirrored=True).operations == products(by_halves)
    whole = torch.cat([phase, -phase])
    torch.testing.assert_close(outputs[0], torch.cat([whole.cos(), whole.sin()], 1) @ first.T @ rest.T)


def test_inr_train_counts() -> None:
    theta, features = torch.randn(B, K, packed_size(WIDTHS), requires_grad=True), torch.randn(N, 6)
    count = counts.inr_train(B, K, N, WIDTHS)
    assert count.operations == products(lambda: inr_mixture_reference(theta, features, Inr(WIDTHS)).sum().backward())
    values, log_p, weights = torch.empty(B, N, 2), torch.empty(B, K, N), torch.empty(B, K, N)
    assert count.bytes == size(theta, theta.grad, features, values, log_p, weights)
    saved = count.operations - counts.inr_train(B, K, N, WIDTHS, mirrored=True).operations
    assert saved == 2 * (B * K * N * 6 * 5)  # a half of the forward product and of the weight's gradient


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("features_too", [True, False])
def test_point_conv_counts(shared: bool, features_too: bool) -> None:
    conv = counts.Conv(N, M, S, C, 8)
    b = 1 if shared else B
    features = torch.randn(B, N, C, requires_grad=features_too)
    neighbors, weights = torch.randint(0, N, (b, M, S)), torch.randn(b, M, S, Q, requires_grad=True)
    linear, bias = torch.randn(8, C * Q, requires_grad=True), torch.randn(8, requires_grad=True)
    outputs: list[Tensor] = []
    forward = products(lambda: outputs.append(point_conv_reference(features, neighbors, weights, linear, bias)))
    count = counts.point_conv_forward(B, conv, Q, shared)
    assert count == (forward, size(features, neighbors, weights, linear, bias, *outputs))
    backward = products(lambda: outputs[0].sum().backward())
    grads = [x.grad for x in (features, weights, linear, bias) if x.grad is not None]
    assert counts.point_conv_backward(B, conv, Q, shared, features_too) == (backward, count.bytes + size(*grads))


def test_pooling_counts_its_sums() -> None:
    pool = counts.Conv(N, M, S, C, None)
    operations = sum(1 for _ in itertools.product(range(B), range(M), range(S), range(C)))
    moved = size(torch.empty(B, N, C), torch.empty(B, M, C), torch.empty(1, M, S, dtype=torch.int64))
    assert counts.point_conv_forward(B, pool, Q) == (operations, moved)


def test_bytes_of_what_only_moves() -> None:
    conv = counts.Conv(N, M, S, C, 8)
    index = torch.empty(1, M, S, dtype=torch.int64), torch.empty(1, M, dtype=torch.int64)
    moved = size(torch.empty(1, N, Q), torch.empty(1, M, S, Q), torch.empty(Q), *index)
    assert counts.neighbor_difference(conv, Q) == (0, moved)
    log_q, log_p, q, kl = torch.empty(B, K, N), torch.empty(B, K, N), torch.empty(B, K, N), torch.empty(B)
    assert counts.categorical_kl(B, K, N) == (0, size(log_q, log_p, q, kl))


def test_neighbor_counts() -> None:
    per_distance = sum(3 for _ in range(Z))  # subtract, multiply, add
    distances = sum(1 for _ in itertools.product(range(B), range(M), range(N)))
    expected = (distances * per_distance, B * (4 * (N + M) * Z + 8 * M * S))
    assert counts.knn(B, N, M, Z, S) == expected
    needed = sum(1 for _ in itertools.product(range(B), range(M - 1), range(N)))
    assert counts.farthest_point_sample(B, N, Z, M) == (needed * per_distance, B * (4 * N * Z + 8 * M))


def test_flow_counts() -> None:
    forward = backward = 0
    for _ in itertools.product(range(S), range(T), range(Z)):
        forward += 2  # w·z
        forward += 2  # z - c û
        backward += 2  # û·dz
        backward += 2  # dz + dc w
        backward += 2  # dû - c dz
        backward += 2  # dw + dc z
    assert counts.flow_forward(S, Z, T).operations == forward
    assert counts.flow_backward(S, Z, T).operations == backward
    assert counts.flow_expected(S, 1, Z, T).operations == forward + backward


def tiny(likelihood: str = "logistic", pooling: bool = False) -> VaMoH:
    return VaMoH(
        coord_dim=2,
        channels=2,
        latent_dim=4,
        components=3,
        frequencies=8,
        centroids="points",
        encoder_centroids=(20, 8),
        encoder_neighbors=(5, 4),
        encoder_channels=(4, 5),
        pool_centroids=(10,) if pooling else (),
        pool_neighbors=(3,) if pooling else (),
        weight_net=(6, 7),
        flow_layers=3,
        hypernet_widths=(8, 16),
        inr_widths=(6, 5),
        gating_widths=(7, 6),
        gating_bound="tanh",
        likelihood=likelihood,
        learn_scale=False,
        max_scale=0.1,
        kl="cross_entropy",
        kl_samples=5,
        initialization="published",
    ).double()


def test_network_counts() -> None:
    model, z = tiny(), torch.randn(B, 4, dtype=torch.float64, requires_grad=True)
    widths = (4, 8, 16, packed_size((16, 6, 5, 2)))
    forward, backward = counts.hypernet_forward(B, 3, widths), counts.hypernet_backward(B, 3, widths)
    found = products(lambda: plain._theta(model, z).sum().backward())
    assert forward.operations + backward.operations == found
    encoded, values = torch.randn(N, 16, dtype=torch.float64), torch.rand(B, N, 2, dtype=torch.float64)
    for net, channels, y in ((model.gating_prior, 0, None), (model.gating_posterior, 2, values)):
        of = (B, N, 16, channels, 4, (7, 6, 3))
        found = products(lambda net=net, y=y: plain._gate(net, encoded, z, y).sum().backward())
        assert counts.gating_forward(*of).operations + counts.gating_backward(*of).operations == found


def test_training_step_counts() -> None:
    model = tiny()
    points = PointSet.from_grid(torch.rand(B, 2, 6, 7, dtype=torch.float64))
    hoods, noise = model.neighborhoods(points), Draw(None, model.draw_noise(B)).tensors()
    found = products(lambda: plain.loss(model, points.coords, points.values, hoods, *noise).backward())
    convs = (counts.Conv(42, 20, 5, 2, 4), counts.Conv(20, 8, 4, 4, 5))
    of = counts.Sizes(
        B, 42, 3, 4, 5, 3, (16, 6, 5, 2), (4, 8, 16, packed_size((16, 6, 5, 2))), (7, 6, 3), (16, 6, 7), convs
    )
    flow = counts.flow_expected(5, B, 4, 3)  # vectors, not matrix products
    phases = 2 * 42 * 2 * 8  # of the Fourier features, which a grid needs once
    assert counts.train_step(of).operations == found + flow.operations - phases


@pytest.mark.parametrize(
    "likelihood, pooling", [("logistic", True), ("bernoulli", False), ("continuous_bernoulli", False)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_contestants_compute_the_same(likelihood: str, pooling: bool, masked: bool) -> None:
    model = tiny(likelihood, pooling)
    points = PointSet.from_grid(torch.rand(B, 2, 6, 7, dtype=torch.float64))
    mask = torch.rand(42) > 0.3 if masked else torch.ones(42, dtype=torch.bool)
    seen = points.select(mask.nonzero()[:, 0])
    drawn, hoods = model.draw_noise(B), model.neighborhoods(seen)
    noise = Draw(None, drawn).tensors()
    expected = model.elbo(seen, noise=drawn, neighborhoods=hoods).loss
    expected.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    baseline = Baseline(model, cache_neighbors=True)
    loss = baseline.loss(points.coords, points.values, mask, *noise, hoods)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(baseline.gradients(), grads)
    model.zero_grad()
    loss = plain.loss(model, seen.coords, seen.values, hoods, *noise)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, grads)


def test_baseline_searches_neighbors_as_told() -> None:
    """A regular grid has ties, a random cloud has none: there all searches agree, up to the order of neighbours."""
    model = tiny(pooling=True)
    coords, values = torch.rand(42, 2, dtype=torch.float64), torch.rand(B, 42, 2, dtype=torch.float64)
    hoods = model.neighborhoods(PointSet(coords, values))
    found = Baseline(model, cache_neighbors=False).search(model.encoding(coords)[None])
    for (centroids, neighbors), hood in zip(found, hoods, strict=True):
        assert torch.equal(centroids, hood.centroids)
        assert torch.equal(neighbors.sort(-1).values, hood.neighbors.sort(-1).values)
    of = (coords, values, torch.ones(42, dtype=torch.bool), torch.zeros(B, 4).double(), torch.zeros(5, B, 4).double())
    for cached in (True, False):
        baseline = Baseline(model, cache_neighbors=cached)
        searches = []
        search = baseline.search
        baseline.search = lambda *a, search=search, searches=searches: searches.append(1) or search(*a)
        first, second = baseline.loss(*of), baseline.loss(*of)
        torch.testing.assert_close(first, second)
        torch.testing.assert_close(first, baseline.loss(*of, hoods))
        assert len(searches) == (1 if cached else 2)


@pytest.mark.parametrize("likelihood", ["logistic", "continuous_bernoulli"])
def test_reconstructions_are_the_same(likelihood: str) -> None:
    model = tiny(likelihood)
    points = PointSet.from_grid(torch.rand(B, 2, 6, 7, dtype=torch.float64))
    out = grid_coords((6, 7), scale=2, dtype=torch.float64)
    at = torch.arange(len(out)).view(11, 13)[::2, ::2].flatten()
    hoods, expected = model.neighborhoods(points), model.reconstruct(points, out, posterior_at=at)
    found = Baseline(model, cache_neighbors=False).reconstruct(points.coords, points.values, out, at, hoods)
    ours = (expected.mean, expected.mean_map, expected.pi, expected.entropy, expected.segmentation)
    torch.testing.assert_close(found, ours)
    torch.testing.assert_close(plain.reconstruct(model, points.coords, points.values, out, at, hoods), expected.mean)


@pytest.mark.parametrize("name", NAMES)
def test_cases_fit_the_presets(name: str) -> None:
    coords, finer = coordinates(name), coordinates(name, scale=2)
    torch.testing.assert_close(finer[positions(name, 2)], coords)
    assert symmetric(coords)
    settings = config(name)
    convs = sizes(settings, 1, len(coords), 8).convs
    assert [c.centroids for c in convs if c.out is not None] == list(settings.model.encoder_centroids)
    assert all(a.centroids == b.points and (a.out or a.channels) == b.channels for a, b in itertools.pairwise(convs))


def test_random_points_are_not_symmetric() -> None:
    assert not symmetric(coordinates("polymnist")[:100])


def test_an_op_case_runs() -> None:
    for case in op_cases():
        if case.label == "polymnist-point_conv0":
            call, leaves = case.build()
            assert call().shape == (64, 196, 32) and all(leaf.requires_grad for leaf in leaves)
            assert case.forward.operations > 0 and case.backward is not None
            return
    raise AssertionError("no case for point_conv")


def test_reference_backend_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAMOH_BACKEND", "cpu")
    with reference_backend():
        assert os.environ["VAMOH_BACKEND"] == "reference"
    assert os.environ["VAMOH_BACKEND"] == "cpu"


def test_plan_of_rounds() -> None:
    assert plan({"ours": 0.1, "baseline": 0.9}, 10) == (10, {"ours": 10, "baseline": 10})
    assert plan({"ours": 0.1, "baseline": 4.0}, 10) == (5, {"ours": 5, "baseline": 2})
    assert plan({"ours": 1e-6}, 10)[0] == 60


class Pedantic:
    """Stands for the fixture of pytest-benchmark."""

    def __init__(self) -> None:
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, target: Callable[[], Any], setup: Callable[[], Any], rounds: int, **_: int) -> None:
        for _ in range(rounds):
            setup()
            target()
            self.stats.stats.data.append(2.0)


def test_contestants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    takes = {"ours": 1.0, "oracle": 4.0, "baseline": SLOW + 1}
    monkeypatch.setattr("bench.timing._timed", lambda run: takes[run()])
    runs = {name: lambda name=name: calls.append(name) or name for name in takes}
    seconds = interleave(Pedantic(), runs, budget=30, before=lambda: calls.append("probe"))
    assert calls == ["ours", "oracle", "baseline"] + 6 * ["probe", "oracle", "ours"]
    assert seconds == {"ours": [2.0] * 6, "oracle": [4.0] * 6, "baseline": [SLOW + 1]}
    found = ratios(seconds)
    assert {name: of["ratio"] for name, of in found.items()} == {"ours": 1, "oracle": 2, "baseline": (SLOW + 1) / 2}
    assert found["baseline"]["rounds"] == 1


def test_time_limit() -> None:
    with pytest.raises(TooSlow), time_limit(0.01):
        for _ in itertools.count():
            pass


def test_probe_measures() -> None:
    try:
        probe = Probe()
    except RuntimeError as error:
        pytest.skip(str(error))
    peak = probe.measure()
    assert peak.gflops > 1 and peak.gbytes > 0.1


def test_report() -> None:
    step = {
        "preset": "polymnist",
        "what": "train step",
        "batch": 64,
        "contestants": {
            "ours": {"seconds": 0.02, "rounds": 9, "ratio": 1.0},
            "baseline": {"seconds": 0.2, "rounds": 2, "ratio": 10.5},
        },
        "left_out": {"compile": "not asked for"},
        "gflops": 123.4,
        "share_fma": 0.456,
        "share_copy": 0.0123,
        "memory": {"ours": 12.3, "baseline": 456.7},
    }
    scaling = {
        "preset": "polymnist",
        "what": "scaling with N",
        "contestants": {"N=4": {"seconds": 0.4, "rounds": 5}, "N=1": {"seconds": 0.1, "rounds": 5}},
        "left_out": {},
        "exponent": 1.0,
    }
    machine = {"processor": "a processor", "cpus": 4, "threads": 2, "version": "2.13.0"}
    result = {
        "machine_info": {"torch": machine},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [{"extra_info": e} for e in (step, scaling, {})],
    }
    lines = report([result]).splitlines()
    assert lines[0].strip() == "a processor, 4 CPUs; 2 threads; torch 2.13.0; commit 0123456789; 2026-01-02"
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == list(HEADER) and all(len(row) == len(HEADER) for row in table)
    assert table[2] == [
        "polymnist", "train step", "64", "20", "", "", "10.50 (n=2)", "123", "46 %", "1.2 %", "12.3, -, 457",
    ]  # fmt: skip
    assert table[3][1] == "scaling with N: exponent 1.00 (N=1: 100, N=4: 400 ms)"
    assert "Left out, compile: not asked for (polymnist, train step)." in lines
    newer = {**result, "benchmarks": [{"extra_info": {**step, "batch": 64, "gflops": 200.0}}]}
    assert report([result, newer]).count("train step |") == 1
    whole = {**result, "benchmarks": [{"extra_info": {**step, "left_out": {}}}]}
    assert "Left out" not in report([result, whole])
