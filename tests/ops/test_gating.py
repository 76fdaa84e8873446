from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import GatingCase, gating_case
from tests.precision import UNIT, near
from vamoh.ops import categorical_kl, gating

SIZES = [
    (1, 1, 1, (), 1, 0),
    (3, 70, 5, (4,), 4, 3),
    (2, 64, 32, (32,), 5, 3),
    (5, 129, 9, (6, 11), 3, 0),
    (2, 130, 7, (), 7, 2),
    (3, 65, 70, (33,), 10, 1),
    (33, 40, 16, (17,), 2, 4),
]  # B, N, H, widths, K, C


def run(net: GatingCase, bounded: bool, grad: Tensor, backend: str | None = None) -> list[Tensor]:
    """Log-probabilities and the gradients of every tensor, in the order of `GatingCase.tensors`."""
    log_p = gating(*net, slope=0.125, bounded=bounded, backend=backend)
    return [log_p.detach(), *torch.autograd.grad(log_p, net.tensors(), grad.to(log_p.dtype))]


def distance(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    a, b = a.detach().double(), b.detach()
    return float((a - b).norm() / b.norm()) if b.any() else float(a.norm())


def log_softmax(x: list[float]) -> list[float]:
    top = max(x)
    return [v - top - math.log(sum(math.exp(u - top) for u in x)) for v in x]


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_matches_definition(backend, shared, bounded):
    b, n, k = 2, 3, 3
    net = gating_case(b, n, 4, (5,), k, 2, shared).to(torch.float64 if backend == "reference" else torch.float32)
    net = GatingCase(*(x.detach() if isinstance(x, Tensor) else x for x in net))
    result = gating(*net, slope=0.125, bounded=bounded, backend=backend)
    coords = net.coords.expand(b, -1, -1)
    for i in range(b):
        for j in range(n):
            h = [
                float(coords[i, r, j] + net.shift[i, r] + net.value_weight[r] @ net.values[i, j])
                for r in range(coords.shape[1])
            ]
            for weight, bias in zip(net.weights, net.biases, strict=True):
                h = [v if v > 0 else 0.125 * v for v in h]
                h = [sum(w * v for w, v in zip(row, h, strict=True)) for row in weight.tolist()]
                h = [v + c for v, c in zip(h, bias.tolist(), strict=True)]
            expected = log_softmax([math.tanh(v) for v in h] if bounded else h)
            assert result[i, :, j].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_every_isa_and_thread_count_is_near_float64(isas, monkeypatch, size, shared, bounded):
    net = gating_case(*size, shared)
    grad = torch.randn(size[0], size[4], size[1], generator=torch.Generator().manual_seed(1))
    expected = run(net.to(torch.float64), bounded, grad)
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(net.to(torch.float32), bounded, grad, "cpu"))
        for first, second, third, exact in zip(*results, expected, strict=True):
            assert distance(first, exact) < 1e-5, isa
            assert torch.equal(first, second) and torch.equal(first, third), isa


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_any_network(data):
    b, n, h, c = (data.draw(st.integers(low, high)) for low, high in ((1, 4), (1, 140), (1, 40), (0, 5)))
    widths = tuple(data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3)))
    k, shared, bounded = data.draw(st.integers(1, 12)), data.draw(st.booleans()), data.draw(st.booleans())
    net = gating_case(b, n, h, widths, k, c, shared, data.draw(st.integers(0, 99)))
    expected = gating(*net.to(torch.float64), slope=0.125, bounded=bounded)
    result = gating(*net.to(torch.float32), slope=0.125, bounded=bounded)
    assert distance(result, expected) < 1e-5
    assert distance(result.exp().sum(1), torch.ones(b, n)) < 1e-6


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("channels", [0, 2])
@pytest.mark.parametrize("widths", [(), (3,), (4, 2)])
def test_gradient_of_the_reference(widths, channels, bounded):
    torch.manual_seed(0)
    h = widths[0] if widths else 3
    net = gating_case(2, 3, h, widths, 3, channels, True).to(torch.float64)
    net = net._replace(coords=torch.randn(h, 3, dtype=torch.float64, requires_grad=True))

    def call(*tensors: Tensor) -> Tensor:
        coords, shift, *rest = tensors
        values = (rest.pop(-2), rest.pop(-1)) if channels else (None, None)
        layers = len(rest) // 2
        return gating(coords, shift, rest[:layers], rest[layers:], *values, slope=0.1, bounded=bounded)

    assert torch.autograd.gradcheck(call, net.tensors())


def test_large_logits(backend):
    """Certain components: log-probabilities stay finite far below what exp can tell from 0, and so do gradients."""
    net = gating_case(2, 70, 6, (5,), 4, 1, True).to(torch.float32)
    net = net._replace(biases=[net.biases[0], torch.tensor([0.0, 1e4, -1e4, 300.0]).requires_grad_()])
    log_p, *grads = run(net, False, torch.ones(2, 4, 70), backend)
    assert log_p.min() < -19000 and log_p.max() == 0
    assert all(g.isfinite().all() for g in [log_p, *grads])
    log_p, *grads = run(net, True, torch.ones(2, 4, 70), backend)
    assert log_p.min() > -4
    assert all(g.isfinite().all() for g in grads)


def test_bounded_logits_near_zero_keep_their_digits(isas, monkeypatch):
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        x = torch.cat([torch.logspace(-20, 1.5, 300), torch.linspace(0.6, 0.65, 50)])
        x = torch.cat([-x, x])
        log_p = gating(torch.stack([x, torch.zeros_like(x)]), torch.zeros(1, 2), [], [], slope=0.1, bounded=True)
        odds = log_p.double()[0, 0] - log_p.double()[0, 1]
        # numbers below 2: tanh within 4 roundings, two sums with the same number one each
        torch.testing.assert_close(odds, x.double().tanh(), rtol=0, atol=8 * UNIT)


def test_strided_inputs(backend):
    net = gating_case(3, 20, 6, (5,), 4, 2, False).to(torch.float32)
    strided = [t.mT.contiguous().mT if t.dim() > 1 else torch.stack([t, t], 1)[:, 0] for t in net[:2] + net[4:]]
    weights = [w.T.contiguous().T for w in net.weights]
    biases = [torch.stack([b, b], 1)[:, 0] for b in net.biases]
    other = GatingCase(*(t.detach().requires_grad_() for t in strided[:2]), weights, biases, *strided[2:]).to(
        torch.float32
    )
    grad = torch.randn(4, 3, 20, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    for a, b in zip(run(other, True, grad, backend), run(net, True, grad, backend), strict=True):
        assert torch.equal(a, b) if backend == "cpu" else distance(a, b) < 1e-6


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("b", "n"), [(0, 5), (3, 0), (0, 0)])
def test_no_functions_and_no_points(backend, b, n, shared):
    net = gating_case(b, n, 4, (3,), 2, 2, shared).to(torch.float32)
    log_p, *grads = run(net, False, torch.zeros(b, 2, n), backend)
    assert log_p.shape == (b, 2, n)
    assert [g.shape for g in grads] == [t.shape for t in net.tensors()]
    assert not any(g.any() for g in grads)


def log_probabilities(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).log_softmax(1)


def test_divergence_matches_definition(backend):
    log_q, log_p = log_probabilities(2, 3, 5, seed=0), log_probabilities(2, 3, 5, seed=1)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    dtype = torch.float32 if backend == "cpu" else torch.float64
    q, kl = categorical_kl(log_q.to(dtype), log_p.to(dtype), mask, backend=backend)
    for b in range(2):
        expected = 0.0
        for n in range(5):
            for k in range(3):
                probability = math.exp(log_q[b, k, n]) if mask[b, n] else 0.0
                assert float(q[b, k, n]) == pytest.approx(probability, rel=1e-5)
                expected += probability * float(log_q[b, k, n] - log_p[b, k, n])
        assert float(kl[b]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("masked", ["no", "shared", "each"])
@pytest.mark.parametrize(("b", "k", "n"), [(1, 1, 1), (3, 4, 70), (2, 3, 4111), (2, 10, 64)])
def test_divergence_is_near_float64(isas, monkeypatch, b, k, n, masked, uniform):
    g = torch.Generator().manual_seed(0)
    logs = [log_probabilities(b, k, n, seed=0), log_probabilities(b, k, 1 if uniform else n, seed=1)]
    mask = {"no": None, "shared": torch.rand(n, generator=g) < 0.6, "each": torch.rand(b, n, generator=g) < 0.6}[masked]
    grads = [torch.randn(b, k, n, generator=g), torch.randn(b, generator=g)]

    def call(dtype: torch.dtype, backend: str | None) -> list[Tensor]:
        inputs = [t.float().to(dtype, copy=True).requires_grad_() for t in logs]
        results = categorical_kl(*inputs, mask, backend=backend)
        return [*results, *torch.autograd.grad(results, inputs, [d.to(dtype) for d in grads])]

    expected = call(torch.float64, None)
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call(torch.float32, "cpu"))
            assert all(map(torch.equal, results[-1], results[0])), (isa, threads)
        assert max(map(distance, results[0], expected)) < 1e-5, isa


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 80), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_any_divergence(b, k, n, seed):
    log_q, log_p = log_probabilities(b, k, n, seed=seed), log_probabilities(b, k, n, seed=seed + 100)
    q, kl = categorical_kl(log_q.float(), log_p.float())
    assert (kl > -1e-5).all()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=log_q.mT), torch.distributions.Categorical(logits=log_p.mT)
    )
    torch.testing.assert_close(kl.double(), expected.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("components", [3, 20])
def test_divergence_of_certain_components(backend, components):
    """No NaN from 0 · inf, in value and gradient."""
    log_q = torch.full((1, components, 2), -1e4)
    log_q[0, 0], log_q[0, 1, 1] = 0, -math.inf
    log_p = torch.full((1, components, 2), -1e4)
    log_p[0, 0], log_p[0, 2] = -2.0, -math.inf
    log_q.requires_grad_(), log_p.requires_grad_()
    q, kl = categorical_kl(log_q, log_p, backend=backend)
    assert q[0, 0].tolist() == [1, 1] and not q[0, 1:].any()
    assert kl.tolist() == [4]
    by_q, by_p = torch.autograd.grad([q, kl], [log_q, log_p], [torch.ones_like(q), torch.ones(1)])
    assert by_q[0, 0].tolist() == [4, 4] and by_p[0, 0].tolist() == [-1, -1]
    assert not by_q[0, 1:].any() and not by_p[0, 1:].any()


def test_divergence_does_not_look_at_unobserved_points(backend):
    log_q, log_p = (log_probabilities(2, 3, 70, seed=s).float() for s in (0, 1))
    mask = torch.arange(70) % 3 != 0
    expected = categorical_kl(log_q, log_p, mask, backend=backend)[1]
    log_q, log_p = (torch.where(mask, t, math.nan).requires_grad_() for t in (log_q, log_p))
    q, kl = categorical_kl(log_q, log_p, mask, backend=backend)
    assert torch.equal(kl, expected) and q.isfinite().all()
    for grad in torch.autograd.grad([q, kl], [log_q, log_p], [torch.ones_like(q), torch.ones(2)]):
        assert not grad[:, :, ~mask].any() and grad.isfinite().all()


def test_divergence_of_strided_and_empty_inputs(backend):
    log_q, log_p = (log_probabilities(3, 4, 20, seed=s).float() for s in (0, 1))
    mask = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = categorical_kl(log_q, log_p, mask, backend=backend)
    strided = categorical_kl(log_q.mT.contiguous().mT, log_p.mT.contiguous().mT, mask.T.contiguous().T, backend=backend)
    for a, b in zip(strided, expected, strict=True):
        torch.testing.assert_close(a, b)
    for shape in ((0, 4, 20), (3, 4, 0)):
        q, kl = categorical_kl(torch.zeros(shape), torch.zeros(shape), backend=backend)
        assert q.shape == shape and kl.tolist() == [0.0] * shape[0]


def test_gradient_of_the_divergence():
    mask = torch.tensor([[True, False, True]])
    log_q, log_p = (log_probabilities(1, 2, 3, seed=s).requires_grad_() for s in (0, 1))
    assert torch.autograd.gradcheck(lambda a, b: categorical_kl(a, b, mask), (log_q, log_p))
    assert torch.autograd.gradcheck(categorical_kl, (log_q, log_p[:, :, :1].detach().requires_grad_()))


def step(net: GatingCase, prior: Tensor, mask: Tensor | None, backend: str | None) -> Tensor:
    """What the bound does with the ops."""
    log_q = gating(*net, slope=0.125, bounded=True, backend=backend)
    q, kl = categorical_kl(log_q, prior, mask, backend=backend)
    return q.square().sum((1, 2)) + kl


@pytest.mark.slow
def test_contract_of_torch_library(backend):
    torch.use_deterministic_algorithms(False)
    ops = torch.ops.vamoh
    for channels in (0, 2):
        net = gating_case(2, 9, 4, (3,), 2, channels, False).to(torch.float32)
        parameters = torch.randn(4 * channels + 3 * 5 + 2 * 4, requires_grad=True)
        arguments = *net[:2], net.values, parameters, [4, 3, 2], 0.125, True, backend
        torch.library.opcheck(ops.gating, arguments)
    log_q, log_p = (log_probabilities(2, 2, 9, seed=s).float().requires_grad_() for s in (0, 1))
    mask = torch.rand(2, 9) < 0.5
    for m in (None, mask):
        torch.library.opcheck(ops.categorical_kl, (log_q, log_p, m, backend))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = [log_p, *net.tensors()]

    def gradients(f: Callable[..., Tensor], backend: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        inputs = [t.detach().requires_grad_() for t in inputs]
        prior, coords, shift, *rest = inputs
        same = GatingCase(coords, shift, rest[:2], rest[2:4], *rest[4:])
        return torch.autograd.grad(f(same, prior, mask, backend).sum(), inputs)

    result = gradients(compiled, backend, *inputs)
    if backend == "reference":  # a graph may lay out plain torch's factors otherwise, and so round their sums
        assert near(result, partial(gradients, step, backend), inputs, [4, 3, 2 * 9])
    else:
        assert all(map(torch.equal, result, gradients(step, backend, *inputs)))


def test_there_is_no_second_derivative(backend):
    net = gating_case(2, 9, 4, (3,), 2, 2, False).to(torch.float32)
    log_q = log_probabilities(2, 2, 9, seed=0).float().requires_grad_()
    for name, inputs, result in (
        ("gating", net.shift, gating(*net, slope=0.1, bounded=False, backend=backend)),
        ("categorical_kl", log_q, categorical_kl(log_q, log_q.detach(), backend=backend)[1]),
    ):
        with pytest.raises(RuntimeError, match=f"^{name}: has no second derivatives"):
            torch.autograd.grad(result.sum(), inputs, create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"shift": None}, TypeError, "shift must be a torch.Tensor, got NoneType"),
        ({"shift": torch.zeros(2, 4).half()}, TypeError, "shift must have dtype float32 or float64, got float16"),
        ({"coords": torch.zeros(4)}, ValueError, r"coords must have shape \[4, N\] or \[2, 4, N\], got \[4\]"),
        ({"coords": torch.zeros(3, 4, 9)}, ValueError, r"coords must have shape \[2, 4, N\], got \[3, 4, 9\]"),
        ({"coords": torch.zeros(4, 9).double()}, TypeError, "coords must have dtype torch.float32, got torch.float64"),
        ({"values": None}, ValueError, "values and value_weight must be given together"),
        ({"values": torch.zeros(2, 8, 2)}, ValueError, r"values must have shape \[2, 9, C\], got \[2, 8, 2\]"),
        ({"value_weight": torch.zeros(4, 3)}, ValueError, r"value_weight must have shape \[4, 2\], got \[4, 3\]"),
        ({"biases": []}, ValueError, "biases must be as many as the 2 weights, got 0"),
        (
            {"weights": [torch.zeros(3, 4), torch.zeros(2, 4)]},
            ValueError,
            r"weights\[1\] must have shape \[O, 3\], got \[2, 4\]",
        ),
        ({"biases": [torch.zeros(3), torch.zeros(3)]}, ValueError, r"biases\[1\] must have shape \[2\], got \[3\]"),
        ({"slope": -0.5}, ValueError, "slope must be between 0 and 1, got -0.5"),
        ({"backend": "cuda"}, ValueError, "backend must be one of triton, cpu, reference, got 'cuda'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    net = gating_case(2, 9, 4, (3,), 2, 2, True).to(torch.float32)
    arguments = {**net._asdict(), "slope": 0.1, "bounded": False, **change}
    with pytest.raises(error, match=f"^gating: {message}"):
        gating(**arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: categorical_kl(torch.zeros(2, 3), torch.zeros(2, 3, 1)),
            ValueError,
            r"categorical_kl: log_q must have shape \[B, K, N\], got \[2, 3\]",
        ),
        (
            lambda: categorical_kl(torch.zeros(2, 3, 4), torch.zeros(2, 3, 2)),
            ValueError,
            r"categorical_kl: log_p must have shape \[2, 3, 4\], got \[2, 3, 2\]",
        ),
        (
            lambda: categorical_kl(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(3, 4).bool()),
            ValueError,
            r"categorical_kl: mask must have shape \[2, 4\], got \[3, 4\]",
        ),
    ],
)
def test_errors_of_the_other_ops(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
