"""The "triton" backend of the gating networks and their divergence against the float64 reference."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor

from tests.cases import GatingCase, gating_case
from tests.precision import UNIT
from vamoh.kernels.inr_mixture_plan import PRECISIONS
from vamoh.ops import categorical_kl, gating

pytest.importorskip("triton")
kernels = importlib.import_module("vamoh.kernels.gating")
pytestmark = pytest.mark.usefixtures("device")

OPS = ("gating", "categorical_kl")
SIZES = [
    (1, 1, 1, (), 1, 0),
    (1, 1, 3, (2,), 1, 1),
    pytest.param((3, 70, 5, (4,), 4, 3), marks=pytest.mark.slow),
    (2, 64, 32, (32,), 5, 0),
    (2, 129, 9, (6, 11), 3, 2),
    (2, 130, 7, (), 7, 2),
    (1, 65, 70, (33,), 17, 1),
    pytest.param((9, 5, 16, (3, 4, 5), 2, 4), marks=pytest.mark.slow),
    (1, 9, 130, (), 64, 1),
]  # B, N, H, widths, K, C


def run(net: GatingCase, bounded: bool, backend: str) -> list[Tensor]:
    """Log-probabilities and the gradients of every tensor, in the order of `GatingCase.tensors`."""
    log_p = gating(*net, slope=0.125, bounded=bounded, backend=backend)
    grad = torch.randn(log_p.shape, generator=torch.Generator().manual_seed(1)).to(log_p.device, log_p.dtype)
    return [log_p.detach(), *torch.autograd.grad(log_p, net.tensors(), grad)]


def distance(result: Tensor, exact: Tensor) -> float:
    """‖result - exact‖ / ‖exact‖, 0 where both vanish."""
    assert result.shape == exact.shape
    result, exact = result.detach().cpu(), exact.detach()
    return float((result.double() - exact).norm() / exact.norm()) if exact.any() else float(result.any())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_float64(size, shared, device):
    net = gating_case(*size, shared)
    for bounded in (True, False)[: 1 + shared]:
        exact = run(net.to(torch.float64), bounded, "reference")
        result = run(net.to(torch.float32, device), bounded, "triton")
        assert max(map(distance, result, exact)) <= 1e-5


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(monkeypatch, precision, device):
    """The interpreter has exact float32 products but for bf16; a slope of 1 has no kinks."""
    monkeypatch.setenv("VAMOH_TRITON_PRECISION", precision)
    tolerance = {"ieee": 1e-5, "tf32x3": 1e-5, "tf32": 5e-3, "bf16": 5e-2}[precision]
    g = torch.Generator().manual_seed(0)
    shapes = [(20, 40), (2, 20), (30, 20), (30,), (3, 30), (3,)]
    tensors = [torch.randn(*s, generator=g) / s[-1] ** 0.5 for s in shapes]

    def call(dtype: torch.dtype, where: str, backend: str) -> list[Tensor]:
        leaves = coords, shift, w, b, v, c = [t.to(where, dtype).requires_grad_() for t in tensors]
        log_p = gating(coords, shift, [w, v], [b, c], slope=1.0, bounded=True, backend=backend)
        return [log_p, *torch.autograd.grad(log_p[:, 0].sum(), leaves)]

    result, exact = call(torch.float32, device, "triton"), call(torch.float64, "cpu", "reference")
    error = max(map(distance, result, exact))
    assert error <= tolerance
    assert (error > 1e-4) == (precision == "bf16") or device != "cpu"


def test_large_logits(device):
    """Certain components: log-probabilities stay finite far below what exp can tell from 0, and so do gradients."""
    net = gating_case(2, 70, 6, (5,), 4, 1, True)
    net = net._replace(biases=[net.biases[0], torch.tensor([0.0, 1e4, -1e4, 300.0])])
    for bounded in (False, True):
        result = run(net.to(torch.float32, device), bounded, "triton")
        exact = run(net.to(torch.float64), bounded, "reference")
        assert all(t.isfinite().all() for t in result)
        assert (result[0].min() < -19000) == (not bounded) and distance(result[0], exact[0]) <= 1e-5
        for a, b in zip(result[1:], exact[1:], strict=True):  # saturated: next to nothing
            assert (a.cpu().double() - b).norm() <= 1e-5 * (b.norm() + 1)


def test_bounded_logits_near_zero_keep_their_digits(device):
    x = torch.cat([torch.logspace(-20, 1.5, 300), torch.linspace(0.6, 0.65, 50)])
    x = torch.cat([-x, x])
    coords = torch.stack([x, torch.zeros_like(x)]).to(device)
    log_p = gating(coords, torch.zeros(1, 2, device=device), [], [], slope=0.1, bounded=True, backend="triton").cpu()
    # numbers below 2: tanh within 4 roundings, two sums with the same number and their difference one each
    result = (log_p[0, 0] - log_p[0, 1]).double()
    torch.testing.assert_close(result, x.double().tanh(), rtol=0, atol=8 * UNIT)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_shares_of_the_work(shared, device):
    """Several tiles per group and functions per share, and the same bits each time."""
    net = gating_case(4, 250, 5, (4,), 3, 2, shared)
    p = kernels._plan("gating_backward", 4, 250, (5, 4, 3), "ieee", kernels.device_of(torch.device(device)))
    if device == "cpu":
        assert p.programs > 1 and p.tiles > p.groups and p.shares < 4
    single = net.to(torch.float32, device)
    result = run(single, True, "triton")
    assert max(map(distance, result, run(net.to(torch.float64), True, "reference"))) <= 1e-5
    assert all(map(torch.equal, result, run(single, True, "triton")))


@pytest.mark.slow
def test_functions_are_shared_out_where_points_are_few(device):
    p = kernels._plan("gating_backward", 40, 3, (5, 4, 3), "ieee", kernels.device_of(torch.device(device)))
    assert p.shares > 1 and p.groups == 1
    net = gating_case(40, 3, 5, (4,), 3, 1, True)
    result = run(net.to(torch.float32, device), False, "triton")
    assert max(map(distance, result, run(net.to(torch.float64), False, "reference"))) <= 1e-5


def test_strided_arguments(device):
    net = gating_case(3, 20, 6, (5,), 4, 2, False)
    plain = run(net.to(torch.float32, device), True, "triton")

    def stride(t: Tensor) -> Tensor:
        t = t.float().to(device)
        return t.mT.contiguous().mT if t.dim() > 1 else torch.stack([t, t], 1)[:, 0]

    strided = GatingCase(
        stride(net.coords),
        stride(net.shift),
        [stride(w) for w in net.weights],
        [stride(b) for b in net.biases],
        stride(net.values),
        stride(net.value_weight),
    )
    for t in strided.tensors():
        t.requires_grad_()
    assert all(map(torch.equal, run(strided, True, "triton"), plain))
    log_p = gating(*strided, slope=0.125, bounded=True, backend="triton")
    grad = torch.randn(4, 3, 20, generator=torch.Generator().manual_seed(0)).to(device).transpose(0, 1)
    one, other = (torch.autograd.grad(log_p, strided.shift, g, retain_graph=True)[0] for g in (grad, grad.contiguous()))
    assert torch.equal(one, other)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("b", "n"), [(0, 5), (3, 0), (0, 0)])
def test_no_functions_and_no_points(b, n, shared, device):
    net = gating_case(b, n, 4, (3,), 2, 2, shared).to(torch.float32, device)
    log_p, *grads = run(net, False, "triton")
    assert log_p.shape == (b, 2, n)
    assert [g.shape for g in grads] == [t.shape for t in net.tensors()]
    assert not any(g.any() for g in grads)


def log_probabilities(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).log_softmax(1)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("masked", ["no", "shared", "each"])
@pytest.mark.parametrize(("b", "k", "n"), [(1, 1, 1), (3, 4, 70), pytest.param(2, 3, 9001, marks=pytest.mark.slow)])
def test_divergence_matches_float64(b, k, n, masked, uniform, device):
    g = torch.Generator().manual_seed(0)
    logs = [log_probabilities(b, k, n, seed=0), log_probabilities(b, k, 1 if uniform else n, seed=1)]
    mask = {"no": None, "shared": torch.rand(n, generator=g) < 0.6, "each": torch.rand(b, n, generator=g) < 0.6}[masked]
    grads = [torch.randn(b, k, n, generator=g), torch.randn(b, generator=g)]

    def call(dtype: torch.dtype, where: str, backend: str) -> list[Tensor]:
        inputs = [t.float().to(where, dtype, copy=True).requires_grad_() for t in logs]
        results = categorical_kl(*inputs, None if mask is None else mask.to(where), backend=backend)
        return [*results, *torch.autograd.grad(results, inputs, [d.to(where, dtype) for d in grads])]

    exact, result = call(torch.float64, "cpu", "reference"), call(torch.float32, device, "triton")
    assert max(map(distance, result, exact)) <= 1e-5
    assert all(map(torch.equal, result, call(torch.float32, device, "triton")))


def test_divergence_of_certain_components(device):
    """No NaN from 0 · inf, in value and gradient."""
    log_q = torch.full((1, 3, 2), -1e4)
    log_q[0, 0], log_q[0, 1, 1] = 0, -math.inf
    log_p = torch.full((1, 3, 2), -1e4)
    log_p[0, 0], log_p[0, 2] = -2.0, -math.inf
    log_q, log_p = (t.to(device).requires_grad_() for t in (log_q, log_p))
    q, kl = categorical_kl(log_q, log_p, backend="triton")
    assert q[0, 0].tolist() == [1, 1] and not q[0, 1:].any()
    assert kl.tolist() == [4]
    by_q, by_p = torch.autograd.grad([q, kl], [log_q, log_p], [torch.ones_like(q), torch.ones_like(kl)])
    assert by_q[0, 0].tolist() == [4, 4] and by_p[0, 0].tolist() == [-1, -1]
    assert not by_q[0, 1:].any() and not by_p[0, 1:].any()


def test_divergence_does_not_look_at_unobserved_points(device):
    log_q, log_p = (log_probabilities(2, 3, 70, seed=s).float().to(device) for s in (0, 1))
    mask = torch.arange(70, device=device) % 3 != 0
    expected = categorical_kl(log_q, log_p, mask, backend="triton")[1]
    log_q, log_p = (torch.where(mask, t, math.nan).requires_grad_() for t in (log_q, log_p))
    q, kl = categorical_kl(log_q, log_p, mask, backend="triton")
    assert torch.equal(kl, expected) and q.isfinite().all()
    for grad in torch.autograd.grad([q, kl], [log_q, log_p], [torch.ones_like(q), torch.ones_like(kl)]):
        assert not grad[:, :, ~mask].any() and grad.isfinite().all()


def test_divergence_of_strided_and_empty_inputs(device):
    log_q, log_p = (log_probabilities(3, 4, 20, seed=s).float().to(device) for s in (0, 1))
    mask = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)).to(device) < 0.5
    strided = [t.mT.contiguous().mT for t in (log_q, log_p)]
    results = []
    for tensors, seen in (((log_q, log_p), mask), (strided, mask.T.contiguous().T)):
        leaves = [t.requires_grad_() for t in tensors]
        out = categorical_kl(*leaves, seen, backend="triton")
        grads = [torch.ones_like(out[0]).mT.contiguous().mT, torch.ones_like(out[1])]
        results.append([*out, *torch.autograd.grad(out, leaves, grads)])
    assert all(map(torch.equal, *results))
    for shape in ((0, 4, 20), (3, 4, 0), (3, 0, 20)):
        zeros = [torch.zeros(shape, device=device).requires_grad_() for _ in range(2)]
        q, kl = categorical_kl(*zeros, backend="triton")
        assert q.shape == shape and kl.shape == shape[:1] and not kl.any()
        assert [g.shape for g in torch.autograd.grad([q.sum(), kl.sum()], zeros)] == [shape] * 2


@pytest.mark.slow
@pytest.mark.parametrize("channels", [0, 2])
def test_contract_of_torch_library(channels, device):
    torch.use_deterministic_algorithms(False)
    net = gating_case(2, 5, 4, (3,), 2, channels, True).to(torch.float32, device)
    first = [] if net.value_weight is None else [net.value_weight.flatten()]
    layers = [p.flatten() for layer in zip(net.weights, net.biases, strict=True) for p in layer]
    parameters = torch.cat([*first, *layers]).detach().requires_grad_()
    arguments = (net.coords.detach()[None].requires_grad_(), net.shift, net.values, parameters)
    detached = tuple(t if t is None else t.detach() for t in arguments)
    ops, rest = torch.ops.vamoh, ([4, 3, 2], 0.1, True)
    torch.library.opcheck(ops.gating, (*arguments, *rest, "triton"))
    log_p = ops.gating(*detached, *rest, "triton")
    for by_values in (True, False)[: 1 + (channels > 0)]:
        torch.library.opcheck(ops.gating_backward, (log_p, log_p, *detached, *rest, by_values, "triton"))
    logs = [log_probabilities(2, 3, 5, seed=s).float().to(device).requires_grad_() for s in (0, 1)]
    mask = torch.tensor([True, False, True, True, False], device=device).expand(2, -1)
    torch.library.opcheck(ops.categorical_kl, (*logs, mask, "triton"))
    a, b = (t.detach() for t in logs)
    torch.library.opcheck(ops.categorical_kl_backward, (a, a[:, 0, 0].contiguous(), a.exp(), a, b, "triton"))


def test_networks_it_does_not_take_go_to_the_next_backend(device):
    coords, shift = torch.ones(65, 3, device=device), torch.ones(2, 65, device=device)
    following = "cpu" if device == "cpu" else "reference"
    result = gating(coords, shift, [], [], slope=0.1, bounded=False)
    assert torch.equal(result, gating(coords, shift, [], [], slope=0.1, bounded=False, backend=following))
    with pytest.raises(ValueError, match="^gating: backend 'triton' takes at most 64 components, got 65"):
        gating(coords, shift, [], [], slope=0.1, bounded=False, backend="triton")


@pytest.mark.parametrize("op", ["gating", "categorical_kl"])
def test_it_is_the_first_choice(monkeypatch, op, device):
    calls, whole = [], getattr(kernels, op)
    monkeypatch.setattr(kernels, op, lambda *arguments: calls.append(op) or whole(*arguments))
    x = torch.zeros(1, 2, 3, device=device)
    if op == "gating":
        gating(x, torch.zeros(1, 2, device=device), [], [], slope=0.1, bounded=False)
    else:
        categorical_kl(x, x)
    assert calls == [op]
