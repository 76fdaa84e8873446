from __future__ import annotations

import importlib
import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import mixture_case, mixture_inputs
from tests.precision import UNIT, bounds, mean_terms, near, operations, within
from vamoh.ops import (
    inr_mixture,
    inr_mixture_expected_log_likelihood,
    inr_mixture_log_likelihood,
    inr_mixture_mean,
)
from vamoh.ops._native import native_unavailable
from vamoh.ops.inr_mixture import ACTIVATIONS, Inr, inr_mixture_mean_reference, inr_mixture_reference
from vamoh.ops.likelihood import Likelihood, log_likelihood, log_likelihood_with_derivatives

module = importlib.import_module("vamoh.ops.inr_mixture")  # the package has a function of that name

LIKELIHOODS = [
    Likelihood("logistic"),
    Likelihood("logistic", 1 / 510, 0.0, True),
    Likelihood("bernoulli"),
    Likelihood("continuous_bernoulli"),
]
SIZES = [
    (1, 1, 1, (1, 1)),
    (1, 1, 7, (3, 5, 1)),
    (2, 3, 1, (4, 3, 5, 2)),
    (3, 2, 11, (5, 9, 3)),
    (2, 4, 33, (2, 7, 6, 5, 1)),
]  # B, K, N, widths


def loops(theta: np.ndarray, features: np.ndarray, inr: Inr) -> np.ndarray:
    """One network and one point at a time; all weights stand before all biases."""
    activate = {
        "leaky_relu": lambda h: np.where(h > 0, h, inr.slope * h),
        "relu": lambda h: np.maximum(h, 0),
        "sine": lambda h: np.sin(inr.omega * h),
    }[inr.activation]
    b, k, _ = theta.shape
    n = features.shape[-2]
    out = np.zeros((b, k, n, inr.widths[-1]))
    for i, j, m in np.ndindex(b, k, n):
        h = features[m] if features.ndim == 2 else features[i, m]
        weight_at, bias_at = 0, sum(x * y for x, y in pairwise(inr.widths))
        for layer, (x, y) in enumerate(pairwise(inr.widths)):
            weight = theta[i, j, weight_at : weight_at + x * y].reshape(y, x)
            h = weight @ h + theta[i, j, bias_at : bias_at + y]
            h = activate(h) if layer < len(inr.widths) - 2 else h
            weight_at, bias_at = weight_at + x * y, bias_at + y
        out[i, j, m] = h
    return out


def gradients(arguments: list, inr: Inr, kind: Likelihood, slow: bool = False) -> list[Tensor]:
    """Value [B] and the gradients of theta, weights and scale for unequal incoming gradients."""
    theta, features, values, weights, scale = arguments
    theta, weights, scale = (t.detach().clone().requires_grad_() for t in (theta, weights, scale))
    if slow:
        value = (weights * inr_mixture_log_likelihood(theta, features, values, scale, inr, kind)).sum((1, 2))
    else:
        value, _ = inr_mixture_expected_log_likelihood(theta, features, values, weights, scale, inr, kind)
    incoming = torch.linspace(-1, 2, len(value), dtype=value.dtype)
    grads = torch.autograd.grad(value, [theta, weights, scale], incoming, allow_unused=True, materialize_grads=True)
    return [value.detach(), *grads]


def float32_bounds(arguments: list, inr: Inr, kind: Likelihood) -> list[float]:
    """How far float32 may take what `gradients` gives."""

    def exact(*arguments: Tensor) -> list[Tensor]:
        return gradients(list(arguments), inr, kind, slow=True)

    return bounds(exact, arguments, operations(inr.widths))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_outputs_match_loops(size, shared, activation):
    theta, features, *_ = mixture_inputs(*size, shared)
    inr = Inr(size[-1], activation, slope=0.3, omega=2.5)
    expected = torch.from_numpy(loops(theta.numpy(), features.numpy(), inr))
    torch.testing.assert_close(inr_mixture(theta, features, inr), expected, rtol=1e-12, atol=1e-12)
    single = inr_mixture(theta.float(), features.float(), inr)
    assert near([single], lambda *t: [inr_mixture_reference(*t, inr)], [theta, features], inr.widths)


@pytest.mark.parametrize("kind", LIKELIHOODS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_log_likelihood_is_that_of_the_outputs(size, kind):
    theta, features, values, weights, scale = mixture_inputs(*size)
    inr = Inr(size[-1])
    logits = torch.from_numpy(loops(theta.numpy(), features.numpy(), inr))
    expected = log_likelihood(kind, logits, values[:, None], scale[:, None]).sum(-1)
    result = inr_mixture_log_likelihood(theta, features, values, scale, inr, kind)
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)
    value, per_point = inr_mixture_expected_log_likelihood(theta, features, values, weights, scale, inr, kind)
    torch.testing.assert_close(per_point, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(value, torch.einsum("bkn,bkn->b", weights, expected), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", LIKELIHOODS, ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_match_autograd(size, shared, kind, activation):
    single = mixture_inputs(*size, shared, dtype=torch.float32)
    arguments, inr = [t.double() for t in single], Inr(size[-1], activation, slope=0.3, omega=0.8)
    expected = gradients(arguments, inr, kind, slow=True)
    single = gradients(single, inr, kind)
    for result, exact in zip(gradients(arguments, inr, kind), expected, strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-9, atol=1e-9 * float(exact.abs().max()))
    assert within(single, expected, float32_bounds(arguments, inr, kind))


@pytest.mark.parametrize("kind", LIKELIHOODS, ids=str)
def test_gradients_match_finite_differences(kind):
    theta, features, values, weights, scale = mixture_inputs(2, 2, 3, (2, 3, 2))
    inr = Inr((2, 3, 2), "sine", omega=1.5)
    differentiable = [t.requires_grad_() for t in (theta, weights, scale)]

    def value(theta: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        return inr_mixture_expected_log_likelihood(theta, features, values, weights, scale, inr, kind)[0]

    assert torch.autograd.gradcheck(value, differentiable)


@pytest.mark.parametrize("argument", [1, 2], ids=["features", "values"])
def test_gradient_of_features_and_values(argument):
    arguments = mixture_inputs(2, 2, 3, (2, 3, 2), shared=False)
    inr, kind = Inr((2, 3, 2), "sine", omega=1.5), Likelihood("logistic")

    def value(theta: Tensor, other: Tensor) -> Tensor:
        changed = [theta, *arguments[1:]]
        changed[argument] = other
        return inr_mixture_expected_log_likelihood(*changed, inr, kind)[0]

    fast = value(arguments[0], arguments[argument])
    tensors = (arguments[0].clone().requires_grad_(), arguments[argument].clone().requires_grad_())
    assert torch.autograd.gradcheck(value, tensors)
    torch.testing.assert_close(value(*tensors), fast)


def test_second_derivatives_of_outputs_are_refused():
    theta, features, *_ = mixture_inputs(1, 2, 3, (2, 3, 1))
    out = inr_mixture(theta.requires_grad_(), features, Inr((2, 3, 1)))
    with pytest.raises(RuntimeError, match="inr_mixture: has no second derivatives"):
        torch.autograd.grad(out.sum(), theta, create_graph=True)


def test_second_derivatives_are_refused():
    theta, features, values, weights, scale = mixture_inputs(1, 2, 3, (2, 3, 1))
    value, _ = inr_mixture_expected_log_likelihood(
        theta.requires_grad_(), features, values, weights, scale, Inr((2, 3, 1)), Likelihood("logistic")
    )
    with pytest.raises(RuntimeError, match="inr_mixture"):
        torch.autograd.grad(value.sum(), theta, create_graph=True)


@pytest.mark.parametrize("kind", LIKELIHOODS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_outputs(kind, dtype):
    """Outputs in the thousands next to moderate ones."""
    arguments = mixture_inputs(2, 3, 9, (4, 6, 2), dtype=dtype)
    arguments[0][:, 0] *= 40
    inr = Inr((4, 6, 2))
    assert inr_mixture(*arguments[:2], inr).abs().max() > 1000
    result = gradients(arguments, inr, kind)
    exact = [t.double() for t in arguments]
    expected = gradients(exact, inr, kind, slow=True)
    assert all(t.isfinite().all() for t in result)
    if dtype == torch.float64:
        assert max(map(distance, result, expected)) <= 1e-9
    else:
        assert within(result, expected, float32_bounds(exact, inr, kind))


def test_weights_of_zero():
    theta, features, values, weights, scale = mixture_inputs(2, 3, 5, (3, 4, 2))
    arguments, inr, kind = [theta, features, values, torch.zeros_like(weights), scale], Inr((3, 4, 2)), LIKELIHOODS[0]
    value, grad_theta, grad_weights, grad_scale = gradients(arguments, inr, kind)
    assert not value.any() and not grad_theta.any() and not grad_scale.any()
    assert grad_weights.any()
    weights[:, :, 2] = 0
    before = gradients([theta, features, values, weights, scale], inr, kind)
    values[:, 2], features[2] = 0.123, 17.0
    after = gradients([theta, features, values, weights, scale], inr, kind)
    for i in (0, 1, 3):
        torch.testing.assert_close(after[i], before[i])


@pytest.mark.parametrize("shared", [True, False])
def test_strided_inputs(shared):
    arguments, inr, kind = mixture_inputs(3, 2, 8, (4, 5, 2), shared), Inr((4, 5, 2)), LIKELIHOODS[0]
    strided = [t.mT.contiguous().mT for t in arguments]
    strided[0] = arguments[0].transpose(0, 1).contiguous().transpose(0, 1)  # as the hypernetwork gives it
    strided[4] = arguments[4][:1].expand(2, -1)
    arguments[4] = strided[4].contiguous()
    assert not any(t.is_contiguous() for t in strided)
    for a, b in zip(gradients(strided, inr, kind), gradients(arguments, inr, kind), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_chunks_give_the_same_numbers(monkeypatch, shared):
    arguments, inr, kind = mixture_inputs(5, 2, 6, (3, 4, 2), shared), Inr((3, 4, 2)), LIKELIHOODS[0]
    whole, sizes = gradients(arguments, inr, kind), []

    def spy(kind: Likelihood, logits: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        sizes.append(len(logits))
        return log_likelihood_with_derivatives(kind, logits, *rest)

    monkeypatch.setattr(module, "log_likelihood_with_derivatives", spy)
    for chunk, expected in ((1, [1] * 5), (2 * 2 * 6 * (4 + 2), [2, 2, 1])):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        sizes.clear()
        for a, b in zip(gradients(arguments, inr, kind), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert sizes == expected


@given(st.data())
def test_order_of_points_components_and_functions_is_free(data):
    b, k, n = (data.draw(st.integers(1, m)) for m in (4, 4, 12))
    widths = tuple(data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4)))
    shared, kind = data.draw(st.booleans()), data.draw(st.sampled_from(LIKELIHOODS))
    theta, features, values, weights, scale = mixture_inputs(b, k, n, widths, shared)
    inr = Inr(widths, data.draw(st.sampled_from(ACTIVATIONS)))

    def run(*arguments: Tensor) -> list[Tensor]:
        return gradients(list(arguments), inr, kind)

    value, by_theta, by_weights, by_scale = run(theta, features, values, weights, scale)
    p, c = (torch.tensor(data.draw(st.permutations(range(m)))) for m in (n, k))
    by_points = run(theta, features[..., p, :], values[:, p], weights[..., p], scale)
    by_components = run(theta[:, c], features, values, weights[:, c], scale[c])
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    for result, expected in (
        (by_points, [value, by_theta, by_weights[..., p], by_scale]),
        (by_components, [value, by_theta[:, c], by_weights[:, c], by_scale[c]]),
    ):
        for x, y in zip(result, expected, strict=True):
            torch.testing.assert_close(x, y, **tolerance)
    for i in range(b):
        own = features if shared else features[i : i + 1]
        alone = inr_mixture_expected_log_likelihood(
            theta[i : i + 1], own, values[i : i + 1], weights[i : i + 1], scale, inr, kind
        )
        torch.testing.assert_close(alone[0], value[i : i + 1], **tolerance)


def test_no_points_and_no_functions():
    theta, features, values, weights, scale = mixture_inputs(2, 3, 4, (3, 4, 2))
    inr, kind = Inr((3, 4, 2)), LIKELIHOODS[0]
    value, by_theta, by_weights, by_scale = gradients(
        [theta, features[:0], values[:, :0], weights[..., :0], scale], inr, kind
    )
    assert not value.any() and not by_theta.any() and not by_scale.any() and by_weights.shape == (2, 3, 0)
    assert inr_mixture(theta, features[:0], inr).shape == (2, 3, 0, 2)
    empty = inr_mixture_expected_log_likelihood(theta[:0], features, values[:0], weights[:0], scale, inr, kind)
    assert [tuple(t.shape) for t in empty] == [(0,), (0, 3, 4)]


def off_kinks(theta: Tensor, features: Tensor, inr: Inr) -> Tensor:
    """The points [B, K, N] with no hidden unit so near to its kink that roundings may take it to the other side.

    Roundings of every factor of a unit's sum move it, by their number times the root of the sum of the squares of its
    products, and so do those of the layers before.
    """
    clear = torch.ones(*theta.shape[:2], features.shape[-2], dtype=torch.bool)
    if inr.activation != "sine":
        for unit in module._forward(theta.double(), features.double(), inr)[2]:  # [B, K, H, N]
            far = 8 * operations(inr.widths) * UNIT * unit.square().mean(2, keepdim=True).sqrt()
            clear &= (unit.abs() > far).all(2)
    return clear


def expected_with_gradients(
    arguments: list, inr: Inr, kind: Likelihood, mirror: Tensor | None, backend: str, mask: Tensor | None = None
) -> list:
    return list(
        torch.ops.vamoh.inr_mixture_expected_log_likelihood(
            *arguments, mask, mirror, list(inr.widths), *inr[1:], *kind, backend
        )
    )


def distance(result: Tensor, exact: Tensor) -> float:
    """‖result - exact‖ / ‖exact‖, 0 where both vanish."""
    assert result.shape == exact.shape
    result, exact = result.detach(), exact.detach()
    return float((result.double() - exact).norm() / exact.norm()) if exact.any() else float(result.any())


NATIVE_SIZES = [
    (1, 1, 1, (2, 1)),
    (2, 3, 7, (6, 5, 4, 2)),
    (3, 1, 65, (64, 4, 4, 3)),
    (1, 2, 130, (128, 32, 33, 1)),
    pytest.param((2, 2, 200, (256, 64, 64, 64, 3)), marks=pytest.mark.slow),
    (1, 1, 129, (10, 256, 7, 2)),
]
needs_native = pytest.mark.skipif(native_unavailable() is not None, reason=str(native_unavailable()))


def exact_results(inr: Inr, kind: Likelihood, mask: Tensor | None, *arguments: Tensor) -> list[Tensor]:
    """Value, log-likelihoods, gradients of theta and scale, and the log-likelihoods again."""
    results = expected_with_gradients(list(arguments), inr, kind, None, "reference", mask)
    return [*results, results[1]]


def exact_outputs(inr: Inr, theta: Tensor, features: Tensor, incoming: Tensor) -> list[Tensor]:
    """Outputs and the gradient of theta."""
    theta = theta.detach().requires_grad_()
    out = inr_mixture_reference(theta, features, inr)
    return [out.detach(), torch.autograd.grad(out, theta, incoming)[0]]


@needs_native
@pytest.mark.parametrize("features", ["shared", "own", "mirrored"])
@pytest.mark.parametrize("size", NATIVE_SIZES, ids=str)
def test_native_matches_float64(monkeypatch, isas, size, features):
    (given, mirror), n = mixture_case(*size, features), size[2]
    for i, isa in enumerate(isas):
        monkeypatch.setenv("VAMOH_ISA", isa)
        for j, kind in enumerate(LIKELIHOODS):
            activation = ACTIVATIONS[(i + j) % 3]
            inr = Inr(size[-1], activation, slope=-0.2 if j == 1 else 0.2, omega=1.5)
            theta, x, values, weights, scale = given
            clear = off_kinks(theta, x, inr)
            assert clear.float().mean() > 0.8
            arguments = [theta, x, values, weights * clear, scale]
            results = expected_with_gradients(arguments, inr, kind, mirror, "cpu")
            results.append(inr_mixture_log_likelihood(theta, x, values, scale, inr, kind, mirror=mirror, backend="cpu"))
            assert near(results, partial(exact_results, inr, kind, None), arguments, inr.widths)

            leaf = theta.clone().requires_grad_()
            out = inr_mixture(leaf, x, inr, mirror=mirror, backend="cpu")
            incoming = torch.sin(torch.arange(out.numel())).view(out.shape) * clear[..., None]
            results = [out, torch.autograd.grad(out, leaf, incoming)[0]]
            assert near(results, partial(exact_outputs, inr), [theta, x, incoming], inr.widths)

            for points in (n, 1):
                log_pi = torch.randn(size[0], size[1], points, generator=torch.Generator().manual_seed(j)).log_softmax(
                    1
                )
                means = inr_mixture_mean(theta, x, log_pi, inr, kind, mirror=mirror, backend="cpu")
                exact = partial(inr_mixture_mean_reference, log_pi=log_pi.double(), inr=inr, likelihood=kind)
                assert near(means, exact, [theta, x], inr.widths, terms=mean_terms(kind.kind))


@needs_native
@pytest.mark.parametrize("features", ["shared", "own", "mirrored"])
@pytest.mark.parametrize(
    ("b", "k", "n", "widths"), [(2, 3, 3000, (128, 32, 32, 3)), (9, 3, 500, (8, 4, 5, 2))], ids=str
)
def test_native_gives_the_same_bits_for_any_number_of_threads(b, k, n, widths, features):
    arguments, mirror = mixture_case(b, k, n, widths, features)
    mask = torch.rand(b, n, generator=torch.Generator().manual_seed(1)) < 0.5
    inr, kind, before = Inr(widths), LIKELIHOODS[0], torch.get_num_threads()
    log_pi = arguments[3].clamp(min=1e-3).log()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            [
                *expected_with_gradients(arguments, inr, kind, mirror, "cpu"),
                *expected_with_gradients(arguments, inr, kind, mirror, "cpu", mask),
                inr_mixture(*arguments[:2], inr, mirror=mirror, backend="cpu"),
                *inr_mixture_mean(*arguments[:2], log_pi, inr, kind, mirror=mirror, backend="cpu"),
            ]
        )
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def poisoned(arguments: list, mask: Tensor) -> list:
    """The same with NaN wherever the mask allows it."""
    theta, features, values, weights, scale = arguments
    used = mask.any(0) if features.dim() == 2 else mask
    junk = float("nan")
    return [
        theta,
        torch.where(used[..., None], features, junk),
        torch.where(mask[..., None], values, junk),
        torch.where(mask[:, None], weights, junk),
        scale,
    ]


def masks(b: int, n: int) -> Tensor:
    """The first function has every point, the last none, one point that nobody has."""
    mask = torch.rand(b, n, generator=torch.Generator().manual_seed(n)) < 0.6
    mask[0], mask[-1] = True, False
    mask[:, n // 2] = False
    return mask


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("features", ["shared", "own", "mirrored"])
@pytest.mark.parametrize(
    "size", [(3, 2, 9, (4, 3, 2)), (4, 3, 300, (128, 4, 5, 3)), (3, 1, 131, (6, 33, 1)), (4, 2, 70, (6, 2))], ids=str
)
def test_masks_equal_every_function_alone(monkeypatch, isas, size, features, backend):
    if backend == "cpu" and native_unavailable() is not None:
        pytest.skip(str(native_unavailable()))
    b, k, n, widths = size
    arguments, mirror = mixture_case(*size, features)
    mask, inr = masks(b, n), Inr(widths)
    for i, kind in enumerate(LIKELIHOODS):
        monkeypatch.setenv("VAMOH_ISA", isas[i % len(isas)])
        given = poisoned(arguments if backend == "cpu" else [t.double() for t in arguments], mask)
        result = expected_with_gradients(given, inr, kind, mirror, backend, mask)
        theta, x, values, weights, scale = (t.double() for t in arguments)
        expected = [torch.zeros_like(t).double() for t in result]
        for j in range(b):
            own, here = mask[j].nonzero()[:, 0], slice(j, j + 1)
            alone = [
                theta[here],
                x[own] if x.dim() == 2 else x[here, own],
                values[here, own],
                weights[here, :, own],
                scale,
            ]
            one = expected_with_gradients(alone, inr, kind, None, "reference")
            for whole, part in zip((expected[0], *expected[2:]), (one[0], *one[2:]), strict=True):
                whole[here] = part
            expected[1][j, :, own] = one[1][0]
        result.append(
            inr_mixture_log_likelihood(
                *given[:3], scale.to(given[0].dtype), inr, kind, mask=mask, mirror=mirror, backend=backend
            )
        )
        expected.append(expected[1])
        if backend == "reference":
            assert max(map(distance, result, expected)) <= 1e-12
        else:
            exact, doubles = partial(exact_results, inr, kind, mask), [t.double() for t in given]
            allowed = bounds(exact, doubles, operations(widths))
            assert within(result, expected, allowed)


def test_gradients_with_a_mask():
    """Weights at unobserved points have no gradient; the slow path gives the same numbers."""
    arguments, inr, kind = mixture_inputs(3, 2, 8, (4, 5, 2)), Inr((4, 5, 2)), LIKELIHOODS[0]
    mask, incoming = masks(3, 8), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    theta, features, values, weights, scale = poisoned(arguments, mask)
    leaves = [t.requires_grad_() for t in (theta, weights, scale)]
    value, log_p = inr_mixture_expected_log_likelihood(theta, features, values, weights, scale, inr, kind, mask=mask)
    grads = torch.autograd.grad(value, leaves, incoming)
    slow, slow_log_p = inr_mixture_expected_log_likelihood(
        theta, features.requires_grad_(), values, weights, scale, inr, kind, mask=mask
    )
    assert not log_p[~mask[:, None].expand(-1, 2, -1)].any()
    for a, b in zip(
        [value, log_p, *grads], [slow, slow_log_p, *torch.autograd.grad(slow, leaves, incoming)], strict=True
    ):
        torch.testing.assert_close(a, b)
    shared = inr_mixture_log_likelihood(*arguments[:3], arguments[4], inr, kind, mask=mask[1])
    each = inr_mixture_log_likelihood(*arguments[:3], arguments[4], inr, kind, mask=mask[1].expand(3, -1))
    assert torch.equal(shared, each)


@needs_native
@given(st.data())
def test_native_at_any_size(data):
    b, k, n = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 140))
    half, *rest = data.draw(st.lists(st.integers(1, 70), min_size=2, max_size=4))
    widths = (2 * half, *rest)
    features = data.draw(st.sampled_from(["shared", "own", "mirrored"]))
    arguments, mirror = mixture_case(b, k, n, widths, features)
    inr = Inr(widths, data.draw(st.sampled_from(ACTIVATIONS)), omega=2.0)
    kind = data.draw(st.sampled_from(LIKELIHOODS))
    arguments[3] *= off_kinks(*arguments[:2], inr)
    result = expected_with_gradients(arguments, inr, kind, mirror, "cpu")
    assert near(result, lambda *t: exact_results(inr, kind, None, *t)[:-1], arguments, widths)


@needs_native
@pytest.mark.parametrize("kind", LIKELIHOODS, ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0])
def test_native_at_extreme_outputs_and_scales(monkeypatch, isas, kind, scale):
    """Outputs far beyond saturation, at 0 and next to 0, and values at both ends."""
    logits = torch.tensor([-2e4, -90.0, -20.0, -1.0, -1e-3, 0.0, 1e-4, 0.49, 0.51, 15.0, 80.0, 3e3]).repeat(3)
    values = torch.tensor([0.0, 0.37, 1.0]).repeat_interleave(12)[None, :, None]
    theta, weights = torch.tensor([[[1.0, 0.0]]]), torch.ones(1, 1, 36)  # a network that passes its feature on
    arguments = [theta, logits[:, None], values, weights, torch.tensor([[scale]])]
    exact = [t.double() for t in arguments]
    expected = expected_with_gradients(exact, Inr((1, 1)), kind, None, "reference")
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        result = expected_with_gradients(arguments, Inr((1, 1)), kind, None, "cpu")
        assert all(t.isfinite().all() for t in result)
        for a, b, unit in zip(result, expected, (1, 1, 1, 1 / scale), strict=True):  # saturated: next to nothing
            assert (a.double() - b).norm() <= 1e-5 * (b.norm() + unit)


@needs_native
@pytest.mark.parametrize("output", [70.0, -80.0])
@pytest.mark.parametrize("kind", LIKELIHOODS[:2], ids=str)
def test_native_gradients_of_certain_outputs_hold_no_subnormal_numbers(monkeypatch, isas, kind, output):
    """They would slow down all that reads them. Of such an output the gradient is 0 but for rounding: e^-70 at most."""
    inr = Inr((6, 5, 4, 1))
    theta, features, values, weights, scale = (t.float() for t in mixture_inputs(2, 2, 70, inr.widths))
    theta[:, 0, -1] = output  # the last bias
    theta[:, 0, :-1] *= 1e-3
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        _, grad, *_ = gradients([theta, features, values, weights, scale], inr, kind)
        assert ((grad == 0) | (grad.abs() >= torch.finfo(torch.float32).tiny)).all()
        assert (grad[:, 0] == 0).all() and (grad[1:, 1] != 0).any()


@needs_native
def test_native_means_of_equally_probable_components():
    theta = torch.tensor([[[0.0, 1.0], [0.0, 2.0]]])  # constants 1 and 2
    log_pi = torch.full((1, 2, 3), math.log(0.5))
    mean, mean_map = inr_mixture_mean(
        theta, torch.zeros(3, 1), log_pi, Inr((1, 1)), Likelihood("bernoulli"), backend="cpu"
    )
    first, second = torch.sigmoid(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(mean_map, first.expand(1, 3, 1))
    torch.testing.assert_close(mean, ((first + second) / 2).expand(1, 3, 1))


@needs_native
def test_native_means_of_nearly_equally_probable_components(monkeypatch, isas):
    """Log-probabilities one rounding apart, whose exponentials are one number or in the wrong order."""
    theta = torch.tensor([[[0.0, 1.0], [0.0, 2.0]]])  # constants 1 and 2
    less = -torch.linspace(0.3, 3.0, 1000)
    more = torch.nextafter(less, torch.zeros(()))
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        for log_pi, best in (([less, more], 2.0), ([more, less], 1.0), ([less, torch.full((1000,), math.nan)], 2.0)):
            arguments = theta, torch.zeros(1000, 1), torch.stack(log_pi)[None], Inr((1, 1)), Likelihood("bernoulli")
            mean_map = inr_mixture_mean(*arguments, backend="cpu")[1]
            torch.testing.assert_close(mean_map, torch.sigmoid(torch.tensor(best)).expand(1, 1000, 1))
            assert torch.equal(
                mean_map.round(decimals=3), inr_mixture_mean(*arguments, backend="reference")[1].round(decimals=3)
            )


@needs_native
def test_native_takes_strided_arguments():
    arguments, mirror = mixture_case(3, 2, 70, (8, 5, 2), "mirrored")
    strided = [t.mT.contiguous().mT for t in arguments]
    strided[0] = arguments[0].transpose(0, 1).contiguous().transpose(0, 1)  # as the hypernetwork gives it
    inr, kind = Inr((8, 5, 2)), LIKELIHOODS[0]
    result = expected_with_gradients(strided, inr, kind, mirror, "cpu")
    assert result[2].stride() == strided[0].stride()
    for a, b in zip(result, expected_with_gradients(arguments, inr, kind, mirror, "cpu"), strict=True):
        assert torch.equal(a, b)


@needs_native
@pytest.mark.parametrize(
    ("mirror", "error", "message"),
    [
        (torch.tensor([1, 0, 2]), ValueError, r"mirror must have shape \[4\], got \[3\]"),
        (torch.tensor([1, 0, 3, 2]).int(), TypeError, "mirror must have dtype .*int64, got .*int32"),
        (torch.tensor([1, 0, 4, -1]), ValueError, "mirror must hold -1 or pairs"),
        (torch.tensor([1, 2, 0, -1]), ValueError, "mirror must hold -1 or pairs"),
    ],
)
def test_mirror_is_checked(mirror, error, message):
    with pytest.raises(error, match=f"^inr_mixture: {message}"):
        inr_mixture(torch.zeros(1, 1, 13), torch.zeros(4, 2), Inr((2, 3, 1)), mirror=mirror)


def test_mirror_needs_shared_features_of_even_width():
    pairs = torch.tensor([1, 0])
    for theta, features, widths in (
        (torch.zeros(1, 1, 13), torch.zeros(1, 2, 2), (2, 3, 1)),
        (torch.zeros(1, 1, 16), torch.zeros(2, 3), (3, 3, 1)),
    ):
        with pytest.raises(ValueError, match="mirror must come with features"):
            inr_mixture(theta, features, Inr(widths), mirror=pairs)


def test_gradients_that_only_the_reference_has(monkeypatch):
    theta, features, values, weights, scale = mixture_inputs(1, 1, 3, (2, 3, 1), dtype=torch.float32)
    inr, kind = Inr((2, 3, 1)), LIKELIHOODS[0]
    calls = [
        lambda **b: inr_mixture(theta, features.clone().requires_grad_(), inr, **b),
        lambda **b: inr_mixture_log_likelihood(theta.clone().requires_grad_(), features, values, scale, inr, kind, **b),
    ]
    for call in calls:
        assert call().requires_grad
        with pytest.raises(ValueError, match="backend must be 'reference' for gradients.*, got 'cpu'"):
            call(backend="cpu")
        monkeypatch.setenv("VAMOH_BACKEND", "cpu")
        with pytest.raises(ValueError, match="backend must be 'reference' for gradients.*, got 'cpu'"):
            call()
        monkeypatch.delenv("VAMOH_BACKEND")


@pytest.mark.skipif(bool(native_unavailable()), reason="needs the native module")
def test_a_likelihood_that_is_not_compiled_is_refused(monkeypatch):
    monkeypatch.setattr(module, "KINDS", ("logistic", "bernoulli", "continuous_bernoulli", "gauss"))
    theta, features, values, weights, scale = mixture_inputs(1, 1, 3, (2, 3, 1), dtype=torch.float32)
    with pytest.raises(ValueError, match="inr_mixture: no compiled likelihood gauss"):
        inr_mixture_log_likelihood(theta, features, values, scale, Inr((2, 3, 1)), Likelihood("gauss"), backend="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", ["shared", "own", "mirrored"])
@pytest.mark.parametrize("masked", [True, False])
def test_contract_of_torch_library(masked, features, dtype):
    torch.use_deterministic_algorithms(False)
    mask = masks(2, 5) if masked else None
    arguments, mirror = mixture_case(2, 3, 5, (4, 4, 2), features)
    theta, x, values, weights, scale = (t.to(dtype) for t in arguments)
    for t in (theta, weights, scale):
        t.requires_grad_()
    network, kind, ops = (mirror, [4, 4, 2], "leaky_relu", 0.1, 30.0), LIKELIHOODS[0], torch.ops.vamoh
    torch.library.opcheck(
        ops.inr_mixture_expected_log_likelihood, (theta, x, values, weights, scale, mask, *network, *kind, None)
    )
    torch.library.opcheck(ops.inr_mixture, (theta, x, *network, None))
    plain = [t.detach() for t in (theta, x, values, scale, weights)]
    torch.library.opcheck(ops.inr_mixture_log_likelihood, (*plain[:4], mask, *network, *kind, None))
    torch.library.opcheck(ops.inr_mixture_mean, (*plain[:2], plain[4], *network, "bernoulli", None))
    grad = torch.ones(2, 3, 5, 2, dtype=dtype)
    torch.library.opcheck(ops.inr_mixture_backward, (grad, *plain[:2], *network, None))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"theta": None}, TypeError, "theta must be a torch.Tensor, got NoneType"),
        ({"theta": torch.zeros(2, 3, 19)}, ValueError, r"theta must have shape \[B, K, 21\], got \[2, 3, 19\]"),
        ({"theta": torch.zeros(2, 3, 21).half()}, TypeError, "theta must have dtype float32 or float64, got float16"),
        ({"features": torch.zeros(5)}, ValueError, r"features must have shape \[N, E\] or \[B, N, E\], got \[5\]"),
        ({"features": torch.zeros(5, 4)}, ValueError, r"features must have shape \[N, 3\], got \[5, 4\]"),
        ({"features": torch.zeros(1, 5, 3)}, ValueError, r"features must have shape \[2, N, 3\], got \[1, 5, 3\]"),
        ({"features": torch.zeros(5, 3).double()}, TypeError, "features must have dtype torch.float32, got .*float64"),
        ({"features": torch.zeros(5, 3, device="meta")}, TypeError, "features must be on cpu, got meta"),
        ({"values": torch.zeros(2, 4, 1)}, ValueError, r"values must have shape \[2, 5, 1\], got \[2, 4, 1\]"),
        ({"weights": torch.zeros(2, 5, 3)}, ValueError, r"weights must have shape \[2, 3, 5\], got \[2, 5, 3\]"),
        ({"mask": torch.ones(5)}, TypeError, "mask must have dtype bool, got float32"),
        ({"mask": torch.ones(3, 5, dtype=torch.bool)}, ValueError, r"mask must have shape \[2, 5\], got \[3, 5\]"),
        ({"mask": torch.ones(1, 2, 5)}, ValueError, r"mask must have shape \[5\] or \[2, 5\], got \[1, 2, 5\]"),
        ({"mask": torch.ones(5, dtype=torch.bool, device="meta")}, TypeError, "mask must be on cpu, got meta"),
        ({"scale": torch.zeros(1)}, ValueError, r"scale must have shape \[3, 1\], got \[1\]"),
        ({"inr": Inr((3, 4, 1), "tanh")}, ValueError, "activation must be one of leaky_relu, relu, sine, got 'tanh'"),
        ({"likelihood": Likelihood("gauss")}, ValueError, "likelihood must be one of logistic, .*, got 'gauss'"),
        ({"backend": "gpu"}, ValueError, "backend must be one of .*reference, got 'gpu'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    b, k, n = 2, 3, 5
    arguments = {
        "theta": torch.zeros(b, k, 21),
        "features": torch.zeros(n, 3),
        "values": torch.zeros(b, n, 1),
        "weights": torch.zeros(b, k, n),
        "scale": torch.ones(k, 1),
        "inr": Inr((3, 4, 1)),
        "likelihood": Likelihood("logistic"),
    }
    arguments = {**arguments, **change}
    with pytest.raises(error, match=f"^inr_mixture.*: {message}"):
        inr_mixture_expected_log_likelihood(**arguments)


def test_width_lists_are_checked():
    for widths in ((3,), (3, 0, 1), (3, 2.0, 1)):
        with pytest.raises((ValueError, TypeError), match="^layout: "):
            inr_mixture(torch.zeros(1, 1, 4), torch.zeros(2, 3), Inr(widths))


def test_backend_from_the_environment(monkeypatch):
    theta, features, values, weights, scale = mixture_inputs(1, 1, 2, (2, 1))
    monkeypatch.setenv("VAMOH_BACKEND", "nowhere")
    calls = [
        lambda: inr_mixture(theta, features, Inr((2, 1))),
        lambda: inr_mixture_log_likelihood(theta, features, values, scale, Inr((2, 1)), LIKELIHOODS[0]),
        lambda: inr_mixture_expected_log_likelihood(
            theta, features, values, weights, scale, Inr((2, 1)), LIKELIHOODS[0]
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="'nowhere'"):
            call()


def test_sine_derivative_at_high_frequency():
    """A network sin(ω w x): its slope in w is ω x cos(ω w x)."""
    inr, omega = Inr((1, 1, 1), "sine", omega=30.0), 30.0
    theta = torch.tensor([[[0.7, 1.0, 0.0, 0.0]]], dtype=torch.float64)  # w, output weight, biases
    features, y = torch.tensor([[0.4]], dtype=torch.float64), torch.tensor([[[1.0]]], dtype=torch.float64)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    by_theta = gradients([theta, features, y, one, one[0]], inr, Likelihood("bernoulli"))[1]
    output = math.sin(omega * 0.7 * 0.4)
    by_output = 1 - 1 / (1 + math.exp(-output))
    incoming = -1.0  # of `gradients` for a single function
    assert float(by_theta[0, 0, 0]) == pytest.approx(
        incoming * by_output * omega * 0.4 * math.cos(omega * 0.7 * 0.4), rel=1e-12
    )


def test_sine_of_large_phases(isas, monkeypatch):
    """Beyond the range in which kernels reduce a phase by themselves: sin(w x) of phases that are exact in float32."""
    phases = torch.tensor([2.0**k * sign for k in (3, 17, 20, 22, 30, 60, 120) for sign in (1, -1)])
    theta, features = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]]), phases[:, None]
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        result = inr_mixture(theta, features, Inr((1, 1, 1), "sine", omega=1.0), backend="cpu").flatten()
        assert (result.double() - phases.double().sin()).abs().max() <= 1.2e-7


def test_log_likelihoods_alone_give_no_gradient(backend):
    theta, features, values, weights, scale = mixture_inputs(1, 2, 3, (2, 3, 1), dtype=torch.float32)
    leaves = [theta.requires_grad_(), weights.requires_grad_(), scale.requires_grad_()]
    value, log_p = inr_mixture_expected_log_likelihood(
        theta, features, values, weights, scale, Inr((2, 3, 1)), LIKELIHOODS[0], backend=backend
    )
    assert value.requires_grad
    if log_p.requires_grad:
        assert torch.autograd.grad(log_p.sum(), leaves, allow_unused=True) == (None, None, None)
