from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tests.cases import clear_flow_case, expected_log_prob, far_from_kinks, flow_case, flow_of
from tests.precision import near
from vamoh.ops import CounterNoise, planar_flow, planar_flow_expected_log_prob, planar_flow_log_prob, planar_flow_sample
from vamoh.ops._native import native_unavailable
from vamoh.ops._noise import counter_noise_reference
from vamoh.ops.planar_flow import (
    PlanarFlow,
    normal_log_prob,
    planar_flow_forward_reference,
    planar_flow_inverse_reference,
)

SIZES = [(1, 1), (1, 4), (5, 1), (3, 2), (7, 6)]  # T, Z


def loops(v: np.ndarray, flow: PlanarFlow) -> tuple[np.ndarray, float]:
    """One point through the layers as printed, and the log-determinant of the product of their Jacobians."""
    u, w, b, *_ = (t.numpy() for t in flow[:5])
    jacobian = np.eye(len(v))
    for t in range(len(b)):
        inner = w[t] @ u[t]
        u_hat = u[t] + (np.log1p(np.exp(inner)) - 1 - inner) * w[t] / (w[t] @ w[t])
        x = w[t] @ v + b[t]
        slope = 1.0 if x >= 0 else flow.slope
        v = v + u_hat * slope * x
        jacobian = (np.eye(len(v)) + slope * np.outer(u_hat, w[t])) @ jacobian
    return v, np.linalg.slogdet(jacobian)[1]


@pytest.mark.parametrize("size", SIZES)
def test_forward_matches_loops_and_the_jacobian(size):
    flow, base = (
        flow_of(*size),
        torch.randn(6, size[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    )
    z, log_det = planar_flow_forward_reference(base, flow)
    expected = [loops(v, flow) for v in base.numpy()]
    torch.testing.assert_close(z, torch.from_numpy(np.stack([e[0] for e in expected])), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        log_det, torch.tensor([e[1] for e in expected], dtype=torch.float64), rtol=1e-9, atol=1e-9
    )
    for v, d in zip(base, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: planar_flow_forward_reference(x[None], flow)[0][0], v)
        assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(float(d), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("w", [0.0, 1e-30])
def test_a_layer_without_direction_shifts(w, dtype):
    """w = 0 makes û of the formula 0 / 0, yet leaves nothing to invert: f(v) = v + u · leaky(b)."""
    plain = flow_of(3, 4, dtype=dtype)
    leaves = [t.clone() for t in plain[:5]]
    leaves[1][1] = w if dtype == torch.float32 else 0.0
    flow = PlanarFlow(*(t.requires_grad_() for t in leaves), slope=0.2)
    noise = torch.randn(6, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    z, log_p = planar_flow_sample(noise, flow)
    again = planar_flow_log_prob(z, flow)
    (z.sum() + log_p.sum()).backward()
    assert all(bool(t.grad.isfinite().all()) for t in flow[:5])
    if dtype == torch.float32:  # 1e-7 in place of w = 0 would make û 1e7: w is not moved
        still = leaves[1].detach().double()
        still[1] = 0

        def exact(u: Tensor, b: Tensor, loc: Tensor, log_scale: Tensor, noise: Tensor, z: Tensor) -> list[Tensor]:
            flow = PlanarFlow(u, still, b, loc, log_scale, slope=0.2)
            return [*planar_flow_sample(noise, flow), planar_flow_log_prob(z, flow)]

        assert near([z, log_p, again], exact, [leaves[0], *leaves[2:], noise, z], [4])
    else:
        torch.testing.assert_close(again, log_p)
    fixed = [t.detach() for t in flow[:5]]
    first, middle, last = (PlanarFlow(*(t[i : i + 1] for t in fixed[:3]), *fixed[3:], slope=0.2) for i in range(3))
    before, _ = planar_flow_sample(noise, first)
    after, log_det = planar_flow_forward_reference(before, middle)
    torch.testing.assert_close(after, before + middle.u * torch.where(middle.b >= 0, middle.b, 0.2 * middle.b))
    assert not log_det.any()
    torch.testing.assert_close(planar_flow_forward_reference(after, last)[0], z.detach())


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 50))
def test_inverse_undoes_forward(layers, latent, seed):
    flow = flow_of(layers, latent, 0.7, seed=seed)
    base = torch.randn(5, latent, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    z, log_det = planar_flow_forward_reference(base, flow)
    back, inverse_log_det = planar_flow_inverse_reference(z, flow)
    torch.testing.assert_close(back, base, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-7, atol=1e-7)
    again, _ = planar_flow_forward_reference(planar_flow_inverse_reference(base, flow)[0], flow)
    torch.testing.assert_close(again, base, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("size", SIZES)
def test_density_of_samples(size):
    """log p(z) by the inverse equals that of sampling, and the base density is a diagonal Gaussian's."""
    flow, noise = (
        flow_of(*size),
        torch.randn(9, size[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    )
    z, log_q = planar_flow_sample(noise, flow)
    base = torch.distributions.Normal(flow.loc, flow.log_scale.exp())
    start = flow.loc + noise * flow.log_scale.exp()
    expected = [(v, *loops(v.numpy(), flow)) for v in start]
    density = torch.stack([base.log_prob(v).sum() - d for v, _, d in expected])
    torch.testing.assert_close(z, torch.from_numpy(np.stack([e[1] for e in expected])), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(log_q, density, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(planar_flow_log_prob(z, flow), density, rtol=1e-8, atol=1e-8)


def test_float32():
    flow, z = flow_of(8, 6, 0.4), torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    single = PlanarFlow(*(t.float() for t in flow[:5]))
    for function in (planar_flow_log_prob, lambda x, f: planar_flow_sample(x, f)[0]):
        exact = function(z, flow)
        assert (function(z.float(), single).double() - exact).norm() <= 1e-5 * exact.norm()


def test_density_integrates_to_one():
    flow = flow_of(4, 1, 0.8)
    x = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
    assert float(torch.trapezoid(planar_flow_log_prob(x[:, None], flow).exp(), x)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inner", [-80.0, -30.0, -1.0, 0.0, 3.0, 40.0, 200.0])
def test_any_parameters_give_an_invertible_layer(inner, dtype):
    """1 + w·û = softplus(w·u) > 0, however far u points against w."""
    w = torch.tensor([[0.6, -0.8]], dtype=dtype)
    zeros = torch.zeros(2, dtype=dtype)
    flow = PlanarFlow(inner * w, w, zeros[:1], zeros, zeros)
    base = 3 * torch.cat([w, -w])  # on either side of the kink
    z, log_det = planar_flow_forward_reference(base, flow)
    softplus = math.log1p(math.exp(inner)) if inner < 30 else inner
    expected = [math.log(softplus), math.log(0.8 + 0.2 * softplus)]
    torch.testing.assert_close(log_det, torch.tensor(expected, dtype=dtype))
    back, inverse_log_det = planar_flow_inverse_reference(base, flow)
    torch.testing.assert_close(inverse_log_det, -log_det)
    assert z.isfinite().all() and back.isfinite().all()


@pytest.mark.parametrize("size", [(1, 3), (4, 2)])
def test_gradients(size):
    flow, z = flow_of(*size), torch.randn(5, size[1], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tensors = [t.requires_grad_() for t in (z, *flow[:5])]
    assert torch.autograd.gradcheck(lambda x, *f: planar_flow_log_prob(x, PlanarFlow(*f)), tensors)
    assert torch.autograd.gradcheck(lambda x, *f: planar_flow_sample(x, PlanarFlow(*f)), tensors)


def test_order_of_samples_is_free_and_inputs_may_be_strided():
    flow, z = flow_of(4, 5), torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    result, p = planar_flow_log_prob(z, flow), torch.tensor([3, 1, 6, 0, 2, 5, 4])
    strided = PlanarFlow(*(t.mT.contiguous().mT if t.dim() == 2 else t for t in flow[:5]))
    torch.testing.assert_close(planar_flow_log_prob(z.mT.contiguous().mT[p], strided), result[p])
    torch.testing.assert_close(torch.cat([planar_flow_log_prob(row[None], flow) for row in z]), result)
    assert planar_flow_log_prob(z[:0], flow).shape == (0,)


def test_normal_log_prob():
    x, loc, log_scale = (
        torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    expected = torch.distributions.Normal(loc, log_scale.exp()).log_prob(x).sum(-1)
    torch.testing.assert_close(normal_log_prob(x, loc, log_scale), expected)


def test_slope_is_an_argument():
    flow, z = flow_of(3, 2), torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    linear = flow._replace(slope=1.0)
    moved, log_det = planar_flow_forward_reference(z, linear)
    assert log_det.std() < 1e-12  # an affine map has one determinant
    assert not torch.allclose(moved, planar_flow_forward_reference(z, flow)[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3)}, ValueError, r"{x} must have shape \[S, Z\], got \[3\]"),
        ({"x": torch.zeros(5, 3).half()}, TypeError, "{x} must have dtype float32 or float64, got float16"),
        ({"u": torch.zeros(2, 4)}, ValueError, r"u must have shape \[2, 3\], got \[2, 4\]"),
        ({"w": torch.zeros(3, 3)}, ValueError, r"w must have shape \[2, 3\], got \[3, 3\]"),
        ({"loc": torch.zeros(1, 3)}, ValueError, r"loc must have shape \[3\], got \[1, 3\]"),
        (
            {"log_scale": torch.zeros(3).double()},
            TypeError,
            "log_scale must have dtype torch.float32, got torch.float64",
        ),
        ({"backend": "gpu"}, ValueError, "backend must be one of .*reference, got 'gpu'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    parts: dict[str, Tensor] = dict(zip(PlanarFlow._fields, flow_of(2, 3, dtype=torch.float32)[:5], strict=False))
    flow = PlanarFlow(**{**parts, **{k: v for k, v in change.items() if k in parts}})
    x, backend = change.get("x", torch.zeros(5, 3)), change.get("backend")
    for function, name in ((planar_flow_log_prob, "z"), (planar_flow_sample, "noise")):
        with pytest.raises(error, match=f"^{function.__name__}: " + message.replace("{x}", name)):
            function(x, flow, backend=backend)


NAMES = ("value", "mean", "std", *PlanarFlow._fields[:5])
NATIVE = [  # S, B, Z, T: around whole panels, register blocks and tasks
    (1, 1, 1, 1),
    (16, 5, 16, 3),
    (63, 2, 5, 7),
    (65, 3, 4, 6),
    (130, 2, 33, 13),
    (128, 1, 18, 25),
    (1500, 2, 6, 12),
    (66_000, 1, 1, 1),
]


def by_op(
    mean: Tensor,
    std: Tensor,
    flow: PlanarFlow,
    upstream: Tensor,
    noise: Tensor | CounterNoise,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> list[Tensor]:
    mean, std, *parameters = (t.to(dtype).clone().requires_grad_() for t in (mean, std, *flow[:5]))
    flow = PlanarFlow(*parameters, flow.slope)
    value = planar_flow_expected_log_prob(mean, std, flow, noise, backend=backend)
    assert value.dtype == dtype
    return [value.detach(), *torch.autograd.grad(value @ upstream.to(dtype), [mean, std, *parameters])]


def assert_near(results: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for name, result, true in zip(NAMES[-len(expected) :], results, expected, strict=True):
        assert (result.double() - true).norm() <= tolerance * true.norm() + 1e-12, name


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (7, 3, 2, 5), (70, 2, 5, 3)])
def test_expected_matches_autograd_of_the_inverse(size, monkeypatch):
    samples, batch, latent, _ = size
    arguments, seed = flow_case(*size), torch.tensor(3)
    noise = counter_noise_reference(seed, range(samples), batch, latent, torch.float64)
    expected = expected_log_prob(*arguments, noise)
    for kind in (noise, CounterNoise(seed, samples)):
        assert_near(by_op(*arguments, kind, torch.float64), expected, 1e-12)
    monkeypatch.setattr(planar_flow, "_CHUNK", 50)
    assert_near(by_op(*arguments, CounterNoise(seed, samples), torch.float64), expected, 1e-12)


@pytest.mark.parametrize("size", NATIVE)
def test_native_expected_log_prob(isas, monkeypatch, size):
    """Against float64, every instruction set, bit-equal for every number of threads, noise counted and given."""
    seed, arguments, noise = clear_flow_case(*size)
    expected = expected_log_prob(*arguments, noise)
    counter = CounterNoise(torch.tensor(seed), size[0])
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(by_op(*arguments, counter, backend="cpu"))
            with torch.no_grad():
                mean, std, flow, _ = arguments
                single = PlanarFlow(*(t.float() for t in flow[:5]))
                value = planar_flow_expected_log_prob(mean.float(), std.float(), single, counter, backend="cpu")
            results[-1].append(value)
        assert_near([results[0][-1]], expected[:1])
        assert_near(results[0][:-1], expected)
        for other in results[1:]:
            assert all(map(torch.equal, other, results[0]))
        assert_near(by_op(*arguments, noise.float(), backend="cpu"), expected)
    assert_near(by_op(*arguments, counter, backend="reference"), expected)


@given(st.integers(1, 70), st.integers(1, 3), st.integers(1, 9), st.integers(1, 14), st.integers(0, 99))
def test_native_of_any_size(samples, batch, latent, layers, seed):
    if native_unavailable():
        pytest.skip(str(native_unavailable()))
    arguments = flow_case(samples, batch, latent, layers, seed)
    noise = counter_noise_reference(torch.tensor(seed), range(samples), batch, latent, torch.float64)
    mean, std, flow, _ = arguments
    assume(far_from_kinks((mean + std * noise).flatten(0, 1), flow))
    counter, expected = CounterNoise(torch.tensor(seed), samples), expected_log_prob(*arguments, noise)
    # a norm of few entries may be small because its terms cancel
    assert_near(by_op(*arguments, counter, backend="cpu"), expected, 1e-4)


@pytest.mark.parametrize("size", NATIVE)
def test_native_log_prob(isas, monkeypatch, size):
    """Per-sample values and gradients against float64."""
    samples, batch, latent, layers = size
    _, (mean, std, flow, _), noise = clear_flow_case(*size)
    single = (mean + std * noise).flatten(0, 1).float()
    if not far_from_kinks(single.double(), flow, 1e-6):
        pytest.skip("rounding moved a sample to a kink")
    upstream = torch.from_numpy(np.random.default_rng(1).normal(size=len(single))).float()

    def run(dtype: torch.dtype, backend: str | None) -> list[Tensor]:
        z, *parameters = (t.to(dtype).clone().requires_grad_() for t in (single, *flow[:5]))
        value = planar_flow_log_prob(z, PlanarFlow(*parameters), backend=backend)
        grads = torch.autograd.grad(value @ upstream.to(dtype), [z, *parameters], retain_graph=True)
        assert torch.equal(torch.autograd.grad(value @ upstream.to(dtype), z, retain_graph=True)[0], grads[0])
        some = torch.autograd.grad(value @ upstream.to(dtype), [parameters[2], parameters[4]])
        assert torch.equal(some[0], grads[3]) and torch.equal(some[1], grads[5])
        return [value.detach(), *grads]

    expected = run(torch.float64, "reference")
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(torch.float32, "cpu"))
            assert all(map(torch.equal, results[-1], results[0]))
        assert_near(results[0], expected)
    assert_near(run(torch.float32, "reference"), expected)


@pytest.mark.parametrize("size", NATIVE)
def test_native_sample(isas, monkeypatch, size):
    samples, _, latent, layers = size
    flow = flow_case(*size)[2]
    flow = flow._replace(loc=(flow.loc + 0.5).float().double())
    noise = torch.from_numpy(np.random.default_rng(2).normal(size=(samples, latent))).float()
    expected = planar_flow_sample(noise.double(), flow)
    single = PlanarFlow(*(t.float() for t in flow[:5]))
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(planar_flow_sample(noise, single, backend="cpu"))
            assert all(map(torch.equal, results[-1], results[0]))
        for result, true in zip(results[0], expected, strict=True):
            assert (result.double() - true).norm() <= 1e-5 * true.norm()
        strided = planar_flow_sample(noise.T.contiguous().T, single, backend="cpu")
        assert all(map(torch.equal, strided, results[0]))
    assert [t.shape for t in planar_flow_sample(noise[:0], single, backend="cpu")] == [(0, latent), (0,)]


def test_sampling_with_gradients_is_plain_torch():
    flow = flow_case(5, 1, 3, 4)[2]
    single = PlanarFlow(*(t.float().requires_grad_() for t in flow[:5]))
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="^planar_flow_sample: backend must be 'reference' for gradients, got 'cpu'"):
        planar_flow_sample(noise, single, backend="cpu")
    with_gradient = planar_flow_sample(noise, single)
    with torch.no_grad():
        without = planar_flow_sample(noise, single)
    for a, b in zip(with_gradient, without, strict=True):
        assert a.requires_grad and not b.requires_grad
        torch.testing.assert_close(a, b)


def test_log_prob_reference_in_parts(monkeypatch):
    mean, std, flow, _ = flow_case(40, 1, 3, 4)
    z = mean + std * torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run() -> tuple[Tensor, ...]:
        tensors = [t.clone().requires_grad_() for t in (z, *flow[:5])]
        return torch.autograd.grad(planar_flow_log_prob(tensors[0], PlanarFlow(*tensors[1:])).sum(), tensors)

    whole = run()
    monkeypatch.setattr(planar_flow, "_CHUNK", 50)
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("published", [True, False])
def test_deep_flows(isas, published):
    """As deep as the models' deepest, at both initialisations; within rounding of a kink sides may differ."""
    latent, layers, samples = 24, 60, 70
    g = torch.Generator().manual_seed(1)
    bound = math.sqrt(2 / latent)
    w = torch.empty(layers, latent).uniform_(-bound, bound, generator=g)
    u = torch.empty(layers, latent).uniform_(-(2**0.5), 2**0.5, generator=g) * (1 if published else 0.05)
    zeros = torch.zeros(latent)
    flow = PlanarFlow(*(t.double() for t in (u, w, torch.zeros(layers), zeros, zeros)))
    mean, std, upstream = torch.zeros(1, latent).double(), torch.ones(1, latent).double(), torch.ones(1).double()
    noise = counter_noise_reference(torch.tensor(0), range(samples), 1, latent, torch.float64)
    kept = [n for n in noise if far_from_kinks(mean + std * n, flow, 1e-4)]
    assert len(kept) > samples // 2
    noise = torch.stack(kept)
    for backend in ("cpu", "reference"):
        assert_near(
            by_op(mean, std, flow, upstream, noise.float(), backend=backend),
            expected_log_prob(mean, std, flow, upstream, noise),
        )


@pytest.mark.parametrize("inner", [-30.0, -1.0, 0.0, 3.0, 40.0, 200.0])
def test_native_layers_far_from_neutral(isas, inner):
    w = torch.tensor([[0.6, -0.8]])
    flow = PlanarFlow(inner * w, w, torch.zeros(1), torch.zeros(2), torch.zeros(2))
    z = torch.cat([w, -0.5 * w]) + 0.25
    double = PlanarFlow(*(t.double() for t in flow[:5]))
    expected = planar_flow_log_prob(z.double(), double)
    assert (planar_flow_log_prob(z, flow, backend="cpu").double() - expected).norm() <= 1e-5 * expected.norm()


def test_expected_is_the_mean_of_log_prob_and_no_order_matters():
    mean, std, flow, upstream = flow_case(9, 4, 3, 5)
    noise = torch.randn(9, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    value = planar_flow_expected_log_prob(mean, std, flow, noise)
    each = torch.stack([planar_flow_log_prob(mean + std * n, flow) for n in noise])
    torch.testing.assert_close(value, each.mean(0))
    s, b = torch.tensor([3, 1, 6, 0, 2, 5, 4, 8, 7]), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(planar_flow_expected_log_prob(mean[b], std[b], flow, noise[s][:, b]), value[b])
    one = planar_flow_expected_log_prob(mean[1:2], std[1:2], flow, noise[:, 1:2])
    torch.testing.assert_close(one, value[1:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strided_and_shared_inputs(dtype):
    mean, std, flow, _ = (x.to(dtype) if isinstance(x, Tensor) else x for x in flow_case(70, 4, 6, 5))
    flow = PlanarFlow(*(t.to(dtype) for t in flow[:5]))
    noise = counter_noise_reference(torch.tensor(0), range(70), 4, 6, dtype)
    expected = planar_flow_expected_log_prob(mean, std, flow, noise)
    strided = PlanarFlow(*(t.mT.contiguous().mT if t.dim() == 2 else t.repeat(2, 1).T[:, 0] for t in flow[:5]))
    result = planar_flow_expected_log_prob(
        mean.T.contiguous().T, std.repeat(1, 2)[:, :6], strided, noise.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    )
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    z = mean + std * noise[0]
    torch.testing.assert_close(planar_flow_log_prob(z.T.contiguous().T, strided), planar_flow_log_prob(z, flow))
    shared = planar_flow_expected_log_prob(
        mean[:1].expand(4, -1), std[:1].expand(4, -1), flow, noise[:, :1].expand(-1, 4, -1)
    )
    assert torch.equal(shared, shared[:1].expand(4))


def test_no_functions_and_no_samples(backend):
    mean, std, flow, upstream = (x.float() if isinstance(x, Tensor) else x for x in flow_case(1, 2, 3, 2))
    parameters = [t.float().requires_grad_() for t in flow[:5]]
    empty = planar_flow_expected_log_prob(
        mean[:0], std[:0], PlanarFlow(*parameters), CounterNoise(torch.tensor(0), 5), backend=backend
    )
    assert empty.shape == (0,)
    assert not any(g.any() for g in torch.autograd.grad(empty.sum(), parameters))
    none = planar_flow_log_prob(mean[:0], PlanarFlow(*parameters), backend=backend)
    assert none.shape == (0,)
    assert not any(g.any() for g in torch.autograd.grad(none.sum(), parameters))


def test_a_flow_without_layers_is_its_base(backend):
    mean, std = (x.float() for x in flow_case(5, 2, 3, 1)[:2])
    flow = flow_of(0, 3, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (mean, std, *flow[:5])]
    noise = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    flow = PlanarFlow(*leaves[2:])

    def grads(value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)

    def expected() -> Tensor:
        return normal_log_prob(mean + std * noise, flow.loc, flow.log_scale)

    value = planar_flow_expected_log_prob(mean, std, flow, noise, backend=backend)
    torch.testing.assert_close(value, expected().mean(0))
    torch.testing.assert_close(grads(value), grads(expected().mean(0)))
    each = planar_flow_log_prob((mean + std * noise).flatten(0, 1), flow, backend=backend)
    torch.testing.assert_close(each, expected().flatten())
    torch.testing.assert_close(grads(each), grads(expected()))
    with torch.no_grad():
        base, log_p = planar_flow_sample(noise[:, 0], flow, backend=backend)
        torch.testing.assert_close(base, flow.loc + flow.log_scale.exp() * noise[:, 0])
        torch.testing.assert_close(log_p, normal_log_prob(base, flow.loc, flow.log_scale))


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("noise", *PlanarFlow._fields[:5]) for value in (math.nan, math.inf)]
    + [(name, 3e38) for name in ("noise", "loc", "log_scale")],
)
def test_samples_that_are_no_numbers_are_those_of_the_reference(isas, monkeypatch, name, value):
    tensors = {**flow_of(4, 3, dtype=torch.float32)._asdict(), "noise": torch.randn(9, 3)}
    tensors[name].view(-1)[1] = value
    noise, flow = tensors.pop("noise"), PlanarFlow(**tensors)
    expected = planar_flow_sample(noise, flow, backend="reference")
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        for a, b in zip(planar_flow_sample(noise, flow, backend="cpu"), expected, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            if name in ("noise", "loc", "log_scale"):
                assert torch.equal(a.isinf(), b.isinf())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_gradients_that_are_wanted_are_made(monkeypatch, dtype):
    made, op = [], torch.ops.vamoh.planar_flow_expected_log_prob_forward.default
    mean, std, flow, _ = flow_case(5, 2, 3, 4)
    mean, std = (t.to(dtype).requires_grad_() for t in (mean, std))
    flow, noise = PlanarFlow(*(t.to(dtype).requires_grad_() for t in flow[:5])), CounterNoise(torch.tensor(0), 5)

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is op:
                made.append([bool(g.numel()) for g in result[1:]])
            return result

    frozen = PlanarFlow(*(t.detach() for t in flow[:5]))
    with Spy():
        planar_flow_expected_log_prob(mean, std, flow, noise)
        planar_flow_expected_log_prob(mean.detach(), std.detach(), flow, noise).sum().backward()
        planar_flow_expected_log_prob(mean, std, frozen, noise).sum().backward()
        with torch.no_grad():
            planar_flow_expected_log_prob(mean, std, flow, noise)
    assert made == [[True] * 8, [False] * 2 + [True] * 6, [True] * 2 + [False] * 6, [False] * 8]
    assert mean.grad.any() and std.grad.any() and all(t.grad.any() for t in flow[:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives_are_refused(dtype):
    mean, std, flow, _ = flow_case(5, 2, 3, 4)
    mean = mean.to(dtype).requires_grad_()
    flow = PlanarFlow(*(t.to(dtype) for t in flow[:5]))
    for value in (
        planar_flow_expected_log_prob(mean, std.to(dtype), flow, CounterNoise(torch.tensor(0), 5)),
        planar_flow_log_prob(mean, flow),
    ):
        with pytest.raises(RuntimeError, match="has no second derivatives"):
            torch.autograd.grad(value.sum(), mean, create_graph=True)


def test_expected_gradients_by_differences():
    mean, std, flow, _ = flow_case(4, 2, 3, 2)
    noise = CounterNoise(torch.tensor(2), 4)
    tensors = [t.requires_grad_() for t in (mean, std, *flow[:5])]
    assert torch.autograd.gradcheck(
        lambda m, s, *f: planar_flow_expected_log_prob(m, s, PlanarFlow(*f), noise), tensors
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contract_of_torch_library(dtype):
    torch.use_deterministic_algorithms(False)
    mean, std, flow, _ = flow_case(5, 2, 3, 4)
    mean, std, *flow = (t.to(dtype).requires_grad_() for t in (mean, std, *flow[:5]))
    parameters = [t.detach().requires_grad_() for t in planar_flow._constrained(PlanarFlow(*flow))[:6]]
    noise = torch.randn(5, 2, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for tensor, seed in ((noise, None), (None, torch.tensor(3))):
        torch.library.opcheck(
            torch.ops.vamoh.planar_flow_expected_log_prob,
            (mean, std, *parameters, 0.2, tensor, seed, 5, True, True, None),
        )
    torch.library.opcheck(torch.ops.vamoh.planar_flow_log_prob, (mean, *parameters, 0.2, None))
    detached = [t.detach() for t in (mean, *parameters)]
    torch.library.opcheck(torch.ops.vamoh.planar_flow_sample, (*detached, 0.2, None))
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.vamoh.planar_flow_log_prob_backward, (mean.detach()[:, 0], *detached, 0.2, *wanted, None)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_once_for_all_seeds(dtype):
    mean, std, flow, upstream = flow_case(5, 2, 3, 4)
    mean, std, *flow = (t.to(dtype).requires_grad_() for t in (mean, std, *flow[:5]))

    def run(mean: Tensor, std: Tensor, flow: PlanarFlow, noise: CounterNoise) -> Tensor:
        each = planar_flow_log_prob(mean, flow)
        return planar_flow_expected_log_prob(mean, std, flow, noise) + each

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2):
            noise = CounterNoise(torch.tensor(seed), 5)
            results = []
            for function in (compiled, run):
                value = function(mean, std, PlanarFlow(*flow), noise)
                results.append([value, *torch.autograd.grad(value.sum(), [mean, std, *flow])])
            for x, y in zip(*results, strict=True):
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mean": torch.zeros(3)}, ValueError, r"mean must have shape \[B, Z\], got \[3\]"),
        ({"std": torch.zeros(1, 3)}, ValueError, r"std must have shape \[2, 3\], got \[1, 3\]"),
        ({"std": torch.zeros(2, 3).double()}, TypeError, "std must have dtype torch.float32, got torch.float64"),
        ({"noise": torch.zeros(5, 3, 3)}, ValueError, r"noise must have shape \[S, 2, 3\], got \[5, 3, 3\]"),
        ({"u": torch.zeros(2, 4)}, ValueError, r"u must have shape \[2, 3\], got \[2, 4\]"),
        ({"backend": "gpu"}, ValueError, "backend must be one of .*reference, got 'gpu'"),
    ],
)
def test_errors_of_the_expectation_name_the_argument(change, error, message):
    parts: dict[str, Tensor] = dict(zip(PlanarFlow._fields, flow_of(2, 3, dtype=torch.float32)[:5], strict=False))
    flow = PlanarFlow(**{**parts, **{k: v for k, v in change.items() if k in parts}})
    mean, std, noise = (
        change.get(name, default)
        for name, default in (
            ("mean", torch.zeros(2, 3)), ("std", torch.ones(2, 3)), ("noise", CounterNoise(torch.tensor(0), 2))
        )
    )  # fmt: skip
    with pytest.raises(error, match="^planar_flow_expected_log_prob: " + message):
        planar_flow_expected_log_prob(mean, std, flow, noise, backend=change.get("backend"))
