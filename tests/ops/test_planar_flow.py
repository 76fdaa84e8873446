from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vamoh.ops import planar_flow_log_prob, planar_flow_sample
from vamoh.ops.planar_flow import (
    PlanarFlow,
    normal_log_prob,
    planar_flow_forward_reference,
    planar_flow_inverse_reference,
)

SIZES = [(1, 1), (1, 4), (5, 1), (3, 2), (7, 6)]  # T, Z


def flow_of(
    layers: int, latent: int, size: float = 1.0, dtype: torch.dtype = torch.float64, seed: int = 0
) -> PlanarFlow:
    g = np.random.default_rng([layers, latent, seed])
    shapes = [(layers, latent), (layers, latent), (layers,), (latent,), (latent,)]
    u, w, b, loc, log_scale = (torch.from_numpy(g.normal(size=s)).to(dtype) for s in shapes)
    return PlanarFlow(size * u, size * w, b, loc, 0.3 * log_scale, slope=0.2)


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
