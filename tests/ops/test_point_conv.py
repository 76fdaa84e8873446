from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.precision import UNIT, near_sums
from vamoh.ops import neighbor_difference, neighbor_mean, point_conv
from vamoh.ops.point_conv import gather

HAS_CUDA = True

SIZES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 5, 3, 4, 2, 3, 4),
    (3, 7, 7, 1, 3, 1, 2),
    (2, 4, 9, 6, 1, 5, 3),
]  # B, N, M, S, C, Q, O
LARGER = [
    *SIZES,
    (2, 40, 19, 9, 37, 16, 70),
    (5, 30, 150, 11, 21, 16, 33),  # from here on, more rows than are stored
    (3, 300, 700, 3, 18, 7, 20),
    (130, 9, 5, 2, 3, 20, 6),
    (2, 50, 600, 1, 300, 1, 5),
]


def rounded(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.float().double() if tensor.is_floating_point() else tensor


def inputs(b: int, n: int, m: int, s: int, c: int, q: int, o: int, shared: bool = False) -> list[Tensor]:
    """Features, neighbours (some of them twice), weights, linear weight and bias: float32 numbers in float64."""
    g = np.random.default_rng([b, n, m, s, c, q, o])
    lead = 1 if shared else b
    features, weights = g.normal(size=(b, n, c)), g.normal(size=(lead, m, s, q))
    neighbors = g.integers(0, n, (lead, m, s))
    arrays = [features, neighbors, weights, g.normal(size=(o, c * q)), g.normal(size=o)]
    return [rounded(a) for a in arrays]


def loops(features, neighbors, weights, linear_weight, linear_bias):
    features, neighbors, weights, linear_weight, linear_bias = (
        t.numpy() for t in (features, neighbors, weights, linear_weight, linear_bias)
    )
    (b, _, c), (lead, m, s, q) = features.shape, weights.shape
    out = np.zeros((b, m, len(linear_bias)))
    for i, j in np.ndindex(b, m):
        own = i % lead
        flat = [
            sum(features[i, neighbors[own, j, n], channel] * weights[own, j, n, w] for n in range(s))
            for channel in range(c)
            for w in range(q)
        ]
        out[i, j] = linear_weight @ np.array(flat) + linear_bias
    return torch.from_numpy(out)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_matches_loops(size, shared):
    arguments = inputs(*size, shared)
    expected = loops(*arguments)
    torch.testing.assert_close(point_conv(*arguments), expected, rtol=1e-12, atol=1e-12)
    grad = torch.ones_like(expected)
    assert near_float64(run(single(arguments), grad.float(), 1.0), arguments, grad, 1.0)


@pytest.mark.parametrize("slope", [1.0, 0.2, 0.0])
@pytest.mark.parametrize("shared", [True, False])
def test_gradients(shared, slope):
    features, neighbors, *rest = inputs(*SIZES[1], shared)
    differentiable = [t.requires_grad_() for t in (features, *rest)]
    assert torch.autograd.gradcheck(lambda f, *r: point_conv(f, neighbors, *r, slope), differentiable)


def run(arguments: list[Tensor], grad: Tensor, slope: float = 0.2, frozen: tuple[int, ...] = (1,), **options):
    """The output and the gradients to all inputs but those `frozen`."""
    leaves = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(arguments)]
    out = point_conv(*leaves, slope, **options)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t.requires_grad], grad)]


def single(arguments: list[Tensor]) -> list[Tensor]:
    return [t if t.dtype == torch.int64 else t.float() for t in arguments]


def gradient(size: tuple[int, ...], seed: int = 0) -> Tensor:
    return rounded(np.random.default_rng(seed).normal(size=(size[0], size[2], size[6])))


def gradient_off_kinks(arguments: list[Tensor]) -> Tensor:
    """One that leaves out what lies at the kink of the output, where float32 may be on either side."""
    out = point_conv(*arguments)
    grad = rounded(np.random.default_rng(0).normal(size=out.shape))
    return grad * (out.abs() > 1e-5 * out.square().mean().sqrt())


def near_float64(results: list[Tensor], arguments: list[Tensor], grad: Tensor, slope: float = 0.2) -> bool:
    """Whether these are the results of `run`. Squares of all factors give the sums of the squares of the terms."""
    factor = torch.where(point_conv(*arguments) > 0, 1.0, slope)
    squares = [t if t.dtype == torch.int64 else t.square() for t in arguments]
    sizes = [float(t.sum()) ** 0.5 for t in run(squares, (factor * grad).square(), 1.0)]
    factors = 5  # features, weights, linear weight, gradient and slope
    return near_sums(results, run(arguments, grad, slope), sizes, factors)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", LARGER)
def test_native_matches_float64(size, shared, isas, monkeypatch):
    arguments, threads = inputs(*size, shared), torch.get_num_threads()
    grad = gradient_off_kinks(arguments)
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(single(arguments), grad.float(), backend="cpu"))
        torch.set_num_threads(threads)
        assert near_float64(results[0], arguments, grad)
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", LARGER)
def test_every_backend_matches_float64(size, shared, backend):
    arguments = inputs(*size, shared)
    grad = gradient_off_kinks(arguments)
    assert near_float64(run(single(arguments), grad.float(), backend=backend), arguments, grad)


@pytest.mark.parametrize("slope", [1.0, 0.0])
@pytest.mark.parametrize("size", [LARGER[4], LARGER[5]])
def test_activations(size, slope, backend):
    arguments = inputs(*size, True)
    grad = gradient_off_kinks(arguments)
    assert near_float64(run(single(arguments), grad.float(), slope, backend=backend), arguments, grad, slope)


@pytest.mark.parametrize("size", [LARGER[4], LARGER[5]])
def test_features_without_gradient(size, backend):
    arguments, grad = inputs(*size), gradient(size)
    full = run(single(arguments), grad.float(), backend=backend)
    part = run(single(arguments), grad.float(), frozen=(0, 1), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(part, [full[0], *full[2:]], strict=True))


@pytest.mark.parametrize("empty", range(7))
def test_empty(empty, backend):
    size = tuple(0 if i == empty else n for i, n in enumerate(SIZES[1]))
    if empty == 1:
        size = tuple(0 if i in (1, 3) else n for i, n in enumerate(SIZES[1]))
    arguments, grad = inputs(*size), gradient(size)
    for got, expected in zip(run(single(arguments), grad.float(), backend=backend), run(arguments, grad), strict=True):
        torch.testing.assert_close(got, expected.float())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_mean_of_neighbors(size, shared):
    features, neighbors = inputs(*size, shared)[:2]
    leaf = features.float().requires_grad_()
    out = neighbor_mean(leaf, neighbors)
    every = neighbors.expand(size[0], -1, -1)
    near = torch.stack([f[i] for f, i in zip(features, every, strict=True)])
    roundings = every.shape[2] + 1  # of the features, all sums and the quotient
    assert ((out.double() - near.mean(2)).abs() <= roundings * UNIT * near.abs().mean(2)).all()
    grad = torch.from_numpy(np.random.default_rng(1).normal(size=out.shape))
    (by_features,) = torch.autograd.grad(out, leaf, grad.float())
    expected = torch.zeros_like(features)
    for b, m, s in np.ndindex(*every.shape):
        expected[b, every[b, m, s]] += grad[b, m] / every.shape[2]
    torch.testing.assert_close(by_features.double(), expected, rtol=1e-5, atol=1e-6)


def test_mean_of_nothing():
    """Of no functions, centroids or channels nothing; of no neighbours there is none."""
    for batch, centroids, channels in ((0, 3, 5), (2, 0, 5), (2, 3, 0)):
        features = torch.ones(batch, 4, channels, requires_grad=True)
        for shared in (batch, 1):
            out = neighbor_mean(features, torch.zeros(shared, centroids, 2, dtype=torch.int64))
            assert out.shape == (batch, centroids, channels)
            assert not torch.autograd.grad(out.sum(), features)[0].any()
    with pytest.raises(ValueError, match="^neighbor_mean: neighbors must hold at least 1 neighbour .*, got 0"):
        neighbor_mean(torch.ones(2, 4, 5), torch.zeros(2, 3, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="^neighbor_mean: neighbors must have batch 1 or 3, got 2"):
        neighbor_mean(torch.ones(3, 4, 5), torch.zeros(2, 3, 1, dtype=torch.int64))


def test_gradient_of_the_mean():
    features, neighbors = inputs(*SIZES[1])[:2]
    assert torch.autograd.gradcheck(lambda f: neighbor_mean(f, neighbors), features.requires_grad_())


def difference_inputs(size: tuple[int, ...], table_shared: bool, index_shared: bool) -> list[Tensor]:
    draw = np.random.default_rng([*size, table_shared, index_shared])
    b, n, m, s, _, q, _ = size
    tables, lead = 1 if table_shared else b, 1 if index_shared else b
    arrays = [draw.normal(size=(tables, n, q)), draw.integers(0, n, (lead, m, s)), draw.integers(0, n, (lead, m))]
    return [rounded(a) for a in (*arrays, draw.normal(size=q))]


def difference_by_loops(arguments: list[Tensor], batch: int, shared: tuple[bool, bool]) -> tuple[Tensor, list[Tensor]]:
    """A gradient, and the result and the gradients of table and bias that belong to it."""
    table, neighbors, centroids, bias = (t.expand(batch, *t.shape[1:]) if t.dim() > 1 else t for t in arguments)
    each = zip(table, neighbors, centroids, strict=True)
    expected = torch.stack([t[near] - t[own][:, None] + bias for t, near, own in each])
    grad = rounded(np.random.default_rng(1).normal(size=expected.shape))
    by_table = torch.zeros_like(table)
    for b, m in np.ndindex(*centroids.shape):
        by_table[b].index_add_(0, neighbors[b, m], grad[b, m])
        by_table[b, centroids[b, m]] -= grad[b, m].sum(0)
    if shared[0]:
        by_table = by_table.sum(0, keepdim=True)
    if all(shared):
        expected, grad = expected[:1], grad.sum(0, keepdim=True)
    return grad, [expected, by_table, grad.sum((0, 1, 2))]


def run_difference(arguments: list[Tensor], grad: Tensor, backend: str) -> list[Tensor]:
    leaves = [t.requires_grad_(t.dtype != torch.int64) for t in single(arguments)]
    out = neighbor_difference(*leaves, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, [leaves[0], leaves[3]], grad.float())]


ALL_SHARED = [(True, True), (True, False), (False, True), (False, False)]
DIFFERENCES = [*LARGER, (3, 5, 0, 4, 2, 3, 4), (2, 5, 3, 0, 2, 3, 4)]


@pytest.mark.parametrize("shared", ALL_SHARED)
@pytest.mark.parametrize("size", DIFFERENCES)
def test_differences(size, shared, backend):
    arguments = difference_inputs(size, *shared)
    grad, expected = difference_by_loops(arguments, size[0], shared)
    # The bias has few entries, whose sums may cancel.
    assert near_sums(run_difference(arguments, grad, backend), expected, [0.0, 0.0, float(grad.norm())])


@pytest.mark.parametrize("shared", ALL_SHARED)
@pytest.mark.parametrize("size", DIFFERENCES)
def test_differences_on_every_isa_and_thread_count(size, shared, isas, monkeypatch):
    arguments, threads = difference_inputs(size, *shared), torch.get_num_threads()
    grad, expected = difference_by_loops(arguments, size[0], shared)
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run_difference(arguments, grad, "cpu"))
        torch.set_num_threads(threads)
        assert near_sums(results[0], expected, [0.0, 0.0, float(grad.norm())])
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_differences_are_rounded_as_in_the_reference(host_backend):
    arguments = single(difference_inputs(LARGER[4], False, True))
    arguments[3] *= 1e7  # the bias first, and little would be left of the difference
    expected = neighbor_difference(*arguments, backend="reference")
    assert torch.equal(neighbor_difference(*arguments, backend=host_backend), expected)


def test_gradients_of_differences():
    table, neighbors, centroids, bias = difference_inputs(SIZES[1], True, False)
    leaves = [t.requires_grad_() for t in (table, bias)]
    assert torch.autograd.gradcheck(lambda t, b: neighbor_difference(t, neighbors, centroids, b), leaves)


def test_second_derivatives_are_refused(backend):
    features, neighbors, *rest = single(inputs(*SIZES[1]))
    features.requires_grad_()
    results = (
        point_conv(features, neighbors, *rest, backend=backend),
        neighbor_difference(features, neighbors, neighbors[:, :, 0], torch.zeros(2), backend=backend),
    )
    for out in results:
        with pytest.raises(RuntimeError, match="has no second derivatives"):
            torch.autograd.grad(out.square().sum(), features, create_graph=True)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_contract_of_a_torch_op(shared, host_backend):
    arguments = single(inputs(*SIZES[1], shared))
    leaves = [t.requires_grad_(t.dtype != torch.int64) for t in arguments]
    torch.library.opcheck(torch.ops.vamoh.point_conv.default, (*leaves, 0.2, host_backend))
    differences = single(difference_inputs(SIZES[1], False, shared))
    differences = [t.requires_grad_(t.dtype != torch.int64) for t in differences]
    torch.library.opcheck(torch.ops.vamoh.neighbor_difference.default, (*differences, host_backend))
    compiled = torch.compile(point_conv, fullgraph=True, backend="aot_eager", dynamic=False)
    assert torch.equal(compiled(*leaves, 0.2, backend=host_backend), point_conv(*leaves, 0.2, backend=host_backend))


@pytest.mark.parametrize("shared", [True, False])
def test_strided_inputs(shared):
    arguments = inputs(*SIZES[1], shared)
    strided = [t.mT.contiguous().mT if t.dim() > 1 else t for t in arguments]
    assert not strided[0].is_contiguous() and not strided[2].is_contiguous()
    torch.testing.assert_close(point_conv(*strided), point_conv(*arguments), rtol=1e-12, atol=1e-12)


@given(st.data())
def test_order_of_neighbors_is_free_and_batches_are_loops(data):
    size = [data.draw(st.integers(1, m)) for m in (4, 8, 5, 6, 3, 4, 3)]
    shared = data.draw(st.booleans())
    features, neighbors, weights, *linear = inputs(*size, shared)
    result = point_conv(features, neighbors, weights, *linear)
    p = torch.tensor(data.draw(st.permutations(range(size[3]))))
    moved = point_conv(features, neighbors[..., p], weights[:, :, p], *linear)
    torch.testing.assert_close(moved, result, rtol=1e-10, atol=1e-10)
    for i in range(size[0]):
        own = slice(0, 1) if shared else slice(i, i + 1)
        alone = point_conv(features[i : i + 1], neighbors[own], weights[own], *linear)
        torch.testing.assert_close(alone[0], result[i], rtol=1e-10, atol=1e-10)


def test_gather_serves_a_batch_of_one_on_either_side():
    features, index = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([[4, 0], [1, 1]])
    many = index.expand(3, 2, 2)
    expected = torch.stack([f[index] for f in features])
    assert torch.equal(gather(features, index[None]), expected)
    assert torch.equal(gather(features, many), expected)
    assert torch.equal(gather(features[:1], many), expected[:1].expand(3, -1, -1, -1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.zeros(5, 2)}, ValueError, r"features must have shape \[B, N, C\], got \[5, 2\]"),
        (
            {"features": torch.zeros(3, 5, 2).long()},
            TypeError,
            "features must have dtype float32 or float64, got int64",
        ),
        ({"weights": torch.zeros(2, 4, 3, 6)}, ValueError, "weights must have batch 1 or 3, got 2"),
        ({"weights": torch.zeros(1, 4, 3, 6).double()}, TypeError, "weights must have dtype torch.float32, got"),
        (
            {"neighbors": torch.zeros(1, 4, 2).long()},
            ValueError,
            r"neighbors must have shape \[1, 4, 3\], got \[1, 4, 2\]",
        ),
        ({"neighbors": torch.zeros(1, 4, 3).int()}, TypeError, "neighbors must have dtype int64, got int32"),
        ({"neighbors": torch.zeros(1, 4, 3, device="meta").long()}, TypeError, "neighbors must be on cpu, got meta"),
        ({"linear_weight": torch.zeros(7, 11)}, ValueError, r"linear_weight must have shape \[O, 12\], got \[7, 11\]"),
        ({"linear_bias": torch.zeros(6)}, ValueError, r"linear_bias must have shape \[7\], got \[6\]"),
        ({"neighbors": torch.full((1, 4, 3), 5)}, ValueError, "neighbors must index the 5 points, got 5"),
        ({"neighbors": torch.full((1, 4, 3), -1)}, ValueError, "neighbors must index the 5 points, got -1"),
        ({"slope": -0.1}, ValueError, "slope must be at least 0, got -0.1"),
        ({"backend": "gpu"}, ValueError, "backend must be one of .*reference, got 'gpu'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {
        "features": torch.zeros(3, 5, 2),
        "neighbors": torch.zeros(1, 4, 3).long(),
        "weights": torch.zeros(1, 4, 3, 6),
        "linear_weight": torch.zeros(7, 12),
        "linear_bias": torch.zeros(7),
    }
    with pytest.raises(error, match=f"^point_conv: {message}"):
        point_conv(**{**arguments, **change})
