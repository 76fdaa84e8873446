from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vamoh.ops import point_conv
from vamoh.ops.point_conv import gather

SIZES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 5, 3, 4, 2, 3, 4),
    (3, 7, 7, 1, 3, 1, 2),
    (2, 4, 9, 6, 1, 5, 3),
]  # B, N, M, S, C, Q, O


def inputs(b: int, n: int, m: int, s: int, c: int, q: int, o: int, shared: bool = False) -> list[Tensor]:
    """Features, neighbours (some of them twice), weights, linear weight and bias."""
    g = np.random.default_rng([b, n, m, s, c, q, o])
    lead = 1 if shared else b
    features, weights = g.normal(size=(b, n, c)), g.normal(size=(lead, m, s, q))
    neighbors = g.integers(0, n, (lead, m, s))
    arrays = [features, neighbors, weights, g.normal(size=(o, c * q)), g.normal(size=o)]
    return [torch.from_numpy(a) for a in arrays]


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
    single = point_conv(*(t if t.dtype == torch.int64 else t.float() for t in arguments)).double()
    assert (single - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("shared", [True, False])
def test_gradients(shared):
    features, neighbors, *rest = inputs(*SIZES[1], shared)
    differentiable = [t.requires_grad_() for t in (features, *rest)]
    assert torch.autograd.gradcheck(lambda f, *r: point_conv(f, neighbors, *r), differentiable)


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
        ({"linear_weight": torch.zeros(7, 11)}, ValueError, r"linear_weight must have shape \[O, 12\], got \[7, 11\]"),
        ({"linear_bias": torch.zeros(6)}, ValueError, r"linear_bias must have shape \[7\], got \[6\]"),
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
