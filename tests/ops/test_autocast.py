"""Ops under torch.autocast: float32 inside, whatever half-precision tensors come, and TypeErrors elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vamoh import ops
from vamoh.layout import packed_size
from vamoh.ops import CounterNoise, status
from vamoh.ops.inr_mixture import Inr
from vamoh.ops.likelihood import Likelihood
from vamoh.ops.planar_flow import PlanarFlow

B, K, N, C, E, Z, T, H, M, S, Q = 3, 2, 11, 2, 6, 5, 4, 7, 4, 3, 5
INR = Inr((E, H, C))
KIND = Likelihood("logistic")
INDEX = torch.arange(M * S).view(1, M, S) % N
MASK = torch.arange(N) % 3 > 0
FLOW = PlanarFlow(*(0.3 * torch.randn(size, generator=torch.Generator().manual_seed(1)).float()
                    for size in ([T, Z], [T, Z], [T], [Z], [Z])))  # fmt: skip

# Shapes of the tensors, and the call with them; all but fourier_features and linear, which get their own tests.
CASES: dict[str, tuple[list[list[int]], Callable[..., Any]]] = {
    "planar_flow_log_prob": ([[N, Z]], lambda z: ops.planar_flow_log_prob(z, FLOW)),
    "planar_flow_expected_log_prob": (
        [[B, Z], [B, Z]],
        lambda m, s: ops.planar_flow_expected_log_prob(m, s, FLOW, CounterNoise(torch.tensor(3), 20)),
    ),
    "planar_flow_sample": ([[N, Z]], lambda e: ops.planar_flow_sample(e.detach(), FLOW)),
    "inr_mixture": ([[B, K, packed_size(INR.widths)], [N, E]], lambda t, f: ops.inr_mixture(t, f.detach(), INR)),
    "inr_mixture_log_likelihood": (
        [[B, K, packed_size(INR.widths)], [N, E], [B, N, C], [K, C]],
        lambda t, f, y, s: ops.inr_mixture_log_likelihood(t, f, y, s.abs(), INR, KIND, mask=MASK),
    ),
    "inr_mixture_expected_log_likelihood": (
        [[B, K, packed_size(INR.widths)], [N, E], [B, N, C], [B, K, N], [K, C]],
        lambda t, f, y, q, s: ops.inr_mixture_expected_log_likelihood(
            t, f.detach(), y.detach(), q, s.abs(), INR, KIND, mask=MASK
        )[0],
    ),
    "inr_mixture_mean": (
        [[B, K, packed_size(INR.widths)], [N, E], [B, K, N]],
        lambda t, f, p: ops.inr_mixture_mean(t, f, p.float().log_softmax(1), INR, KIND),
    ),
    "gating": (
        [[H, N], [B, H], [K, H], [K], [B, N, C], [H, C]],
        lambda x, z, w, b, y, v: ops.gating(x, z, [w], [b], y, v, slope=0.1, bounded=True),
    ),
    "categorical_kl": ([[B, K, N], [B, K, N]], lambda q, p: ops.categorical_kl(q, p, MASK)),
    "point_conv": (
        [[B, N, C], [1, M, S, Q], [6, C * Q], [6]],
        lambda x, w, v, b: ops.point_conv(x, INDEX, w, v, b, 0.2),
    ),
    "neighbor_mean": ([[B, N, C]], lambda x: ops.neighbor_mean(x, INDEX)),
    "neighbor_difference": ([[B, N, Q], [Q]], lambda t, b: ops.neighbor_difference(t, INDEX, INDEX[..., 0], b)),
}
WITHOUT_GRADIENT = {"planar_flow_sample", "inr_mixture_mean"}


def leaves(shapes: list[list[int]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [(0.5 * torch.randn(shape, generator=generator)).bfloat16() for shape in shapes]
    return [t.to(dtype).requires_grad_() for t in drawn]


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("how", ["cpu", "reference"])
@pytest.mark.parametrize("op", CASES)
def test_op_computes_in_float32(op, how, monkeypatch):
    monkeypatch.setenv("VAMOH_BACKEND", "reference" if how == "reference" or op == "inr_mixture_log_likelihood" else "")
    shapes, call = CASES[op]
    exact, half = leaves(shapes, torch.float32), leaves(shapes, torch.bfloat16)
    expected = tensors(call(*exact))
    with torch.autocast("cpu", torch.bfloat16):
        results = tensors(call(*half))
    for a, b in zip(results, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
    if op in WITHOUT_GRADIENT:
        return
    grads = torch.autograd.grad(sum(t.sum() for t in expected), exact, allow_unused=True)
    again = tensors(call(*exact))
    with torch.autocast("cpu", torch.bfloat16):  # as torch.compile traces a backward
        inside = torch.autograd.grad(sum(t.sum() for t in again), exact, allow_unused=True)
    by_half = torch.autograd.grad(sum(t.sum() for t in results), half, allow_unused=True)
    assert any(g is not None for g in grads)
    for a, b, c in zip(grads, inside, by_half, strict=True):
        if a is not None:
            assert c.dtype == torch.bfloat16 and torch.equal(c, a.bfloat16())
            if op != "inr_mixture_log_likelihood":  # its gradient is torch's own
                assert torch.equal(a, b)


@pytest.mark.parametrize("op", CASES)
def test_op_refuses_half_precision_without_autocast(op):
    shapes, call = CASES[op]
    with pytest.raises(TypeError, match=r"must have dtype"):
        call(*leaves(shapes, torch.bfloat16))


def test_float64_stays_under_autocast():
    shapes, call = CASES["gating"]
    with torch.autocast("cpu", torch.bfloat16):
        result = call(*leaves(shapes, torch.float64))
    assert torch.equal(result, call(*leaves(shapes, torch.float64)))


@pytest.mark.parametrize("backend", ["", "reference"])
def test_fourier_features_compute_in_float32(backend, monkeypatch):
    monkeypatch.setenv("VAMOH_BACKEND", backend)
    x, f = torch.randn(9, 2), 20 * torch.randn(5, 2)
    expected = ops.fourier_features(x, f)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.fourier_features(x, f), expected)
        learned = ops.fourier_features(x, f.clone().requires_grad_())
    torch.testing.assert_close(learned.detach(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_is_torchs_own_under_autocast(dtype):
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ([3, 4, 5], [3, 6, 5], [3, 6]))
    with torch.autocast("cpu", dtype):
        result = ops.linear(x, weight, bias)
        expected = torch.stack([F.linear(*group) for group in zip(x, weight, bias, strict=True)])
        chained = ops.linear(result, torch.ones(3, 2, 6), None)
        with pytest.raises(ValueError, match="^linear: backend must be 'reference' for autocast, got 'cpu'"):
            ops.linear(x, weight, bias, backend="cpu")
        with pytest.raises(ValueError, match="^linear: weight must have shape"):
            ops.linear(x, weight[..., 1:], bias)
        with pytest.raises(TypeError, match="^linear: x must have dtype"):
            ops.linear(x.long(), weight, bias)
    assert result.dtype == chained.dtype == dtype
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(result.float().sum(), (x, weight, bias))
    for a, b in zip(grads, torch.autograd.grad(ops.linear(x, weight, bias).sum(), (x, weight, bias)), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_document_states_every_op():
    text = (Path(__file__).parents[2] / "docs" / "ops.md").read_text(encoding="utf-8")
    table = text.split("## Mixed precision")[1].split("\n## ")[0]
    stated = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)))
    assert sorted(stated) == sorted({row.op for row in status().rows})
