"""The "triton" backend of the INR mixture against the float64 reference."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.cases import mixture_case
from tests.precision import mean_terms, near, operations
from vamoh.kernels.inr_mixture_plan import PRECISIONS, refusal
from vamoh.layout import packed_size
from vamoh.ops import (
    inr_mixture,
    inr_mixture_expected_log_likelihood,
    inr_mixture_log_likelihood,
    inr_mixture_mean,
    status,
)
from vamoh.ops._native import triton_unavailable
from vamoh.ops.inr_mixture import Inr, inr_mixture_mean_reference, inr_mixture_reference
from vamoh.ops.likelihood import Likelihood

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("device")

OPS = ("inr_mixture", "inr_mixture_log_likelihood", "inr_mixture_expected_log_likelihood", "inr_mixture_mean")
LIKELIHOODS = [
    Likelihood("logistic"),
    Likelihood("logistic", 1 / 510, 0.0, True),
    Likelihood("bernoulli"),
    Likelihood("continuous_bernoulli"),
]
ACTIVATIONS = [("leaky_relu", 0.2), ("leaky_relu", -0.2), ("relu", 0.7), ("sine", 0.0)]
SIZES = [
    ((1, 1, 1, (2, 4, 1)), "shared"),
    ((2, 1, 5, (3, 7, 2)), "own"),
    ((1, 3, 37, (6, 5, 5, 2)), "mirrored"),
    pytest.param((2, 2, 21, (8, 5, 5, 3)), "own", marks=pytest.mark.slow),
    ((1, 2, 70, (36, 17, 17, 1)), "mirrored"),
    ((1, 1, 65, (10, 32, 32, 32, 3)), "shared"),
    ((1, 1, 33, (6, 64, 64, 17)), "mirrored"),
    ((1, 1, 20, (4, 128, 128, 3)), "shared"),
    pytest.param((1, 1, 9, (2, 256, 1)), "mirrored", marks=pytest.mark.slow),
]  # B, K, N, widths


def expected(
    arguments: list[Tensor],
    inr: Inr,
    kind: Likelihood,
    mirror: Tensor | None,
    backend: str,
    mask: Tensor | None = None,
) -> list[Tensor]:
    """Value, log-likelihoods, gradients of theta and scale."""
    op = torch.ops.vamoh.inr_mixture_expected_log_likelihood
    return list(op(*arguments, mask, mirror, list(inr.widths), *inr[1:], *kind, backend))


def to(device: str, arguments: list[Tensor], mirror: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    return [t.to(device) for t in arguments], None if mirror is None else mirror.to(device)


def check(size: tuple, features: str, inr: Inr, kind: Likelihood, device: str, unit: float = 1.0) -> None:
    """All ops, and the gradients they have, against the reference in float64."""
    arguments, mirror = mixture_case(*size, features)
    (theta, x, values, weights, scale), mirror = to(device, arguments, mirror)

    results = expected([theta, x, values, weights, scale], inr, kind, mirror, "triton")
    results.append(inr_mixture_log_likelihood(theta, x, values, scale, inr, kind, mirror=mirror, backend="triton"))

    def exact(*arguments: Tensor) -> list[Tensor]:
        found = expected(list(arguments), inr, kind, None, "reference")
        return [*found, found[1]]

    assert near(results, exact, arguments, inr.widths, unit)

    leaf = theta.clone().requires_grad_()
    out = inr_mixture(leaf, x, inr, mirror=mirror, backend="triton")
    incoming = torch.sin(torch.arange(out.numel())).view(out.shape)
    by_theta = torch.autograd.grad(out, leaf, incoming.to(device))[0]

    def exact_outputs(theta: Tensor, x: Tensor, incoming: Tensor) -> tuple[Tensor, Tensor]:
        theta = theta.detach().requires_grad_()
        out = inr_mixture_reference(theta, x, inr)
        return out.detach(), torch.autograd.grad(out, theta, incoming)[0]

    assert near([out, by_theta], exact_outputs, [*arguments[:2], incoming], inr.widths, unit)

    for points in [size[2], 1][: 1 + (size[2] < 10)]:
        log_pi = torch.linspace(-3, 0, size[0] * size[1] * points).sin().view(size[0], size[1], points).log_softmax(1)
        means = inr_mixture_mean(theta, x, log_pi.to(device), inr, kind, mirror=mirror, backend="triton")
        assert near(
            means,
            lambda theta, x, log_pi: inr_mixture_mean_reference(theta, x, log_pi, inr, kind),
            [*arguments[:2], log_pi],
            inr.widths,
            unit,
            mean_terms(kind.kind),
        )


def near_expected(
    results: list[Tensor], arguments: list[Tensor], inr: Inr, kind: Likelihood, mask: Tensor | None = None
) -> bool:
    """Whether the results of `expected` are those of the reference in float64."""

    def exact(*arguments: Tensor) -> list[Tensor]:
        return expected(list(arguments), inr, kind, None, "reference", mask)

    return near(results, exact, arguments, inr.widths)


@pytest.mark.parametrize(("size", "features"), SIZES, ids=str)
def test_matches_float64(size, features, device):
    i = [getattr(each, "values", each)[0] for each in SIZES].index(size)
    check(size, features, Inr(size[3], *ACTIVATIONS[i // 2 % 4], 1.5), LIKELIHOODS[i % 4], device)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", LIKELIHOODS, ids=str)
def test_every_likelihood_and_depth(kind, layers, device):
    widths = (4, *[6] * layers, 2)
    inr = Inr(widths, *ACTIVATIONS[(layers + LIKELIHOODS.index(kind)) % 4], 1.5)
    arguments, mirror = mixture_case(1, 1, 7, widths, "mirrored" if layers % 2 else "shared")
    there, mirror = to(device, arguments, mirror)
    assert near_expected(expected(there, inr, kind, mirror, "triton"), arguments, inr, kind)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(monkeypatch, precision, device):
    """The interpreter has exact float32 products but for bf16; kinks of a ReLU would hide rounding in the gradients."""
    monkeypatch.setenv("VAMOH_TRITON_PRECISION", precision)
    widths = (8, 16, 16, 2)
    share = 2 * 3 / operations(widths)  # of the roundings in a row: the factors of three layers' products
    unit = {"ieee": 1, "tf32x3": 1, "tf32": share * 2**13, "bf16": share * 2**16}[precision]  # 11 and 8 bits of 24
    size, inr = (1, 1, 40, widths), Inr(widths, "sine", omega=1.0)
    check(size, "shared", inr, LIKELIHOODS[0], device, unit)
    if precision == "bf16":
        with pytest.raises(AssertionError):
            check(size, "shared", inr, LIKELIHOODS[0], device)


@pytest.mark.parametrize("kind", LIKELIHOODS, ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0])
def test_extreme_outputs_and_scales(kind, scale, device):
    """Outputs far beyond saturation, at 0 and next to 0, and values at both ends."""
    logits = torch.tensor([-2e4, -90.0, -20.0, -1.0, -1e-3, 0.0, 1e-4, 0.49, 0.51, 15.0, 80.0, 3e3]).repeat(3)
    values = torch.tensor([0.0, 0.37, 1.0]).repeat_interleave(12)[None, :, None]
    theta, weights = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]]), torch.ones(1, 1, 36)  # passes its feature on, at slope 1
    arguments = [theta, logits[:, None], values, weights, torch.tensor([[scale]])]
    inr = Inr((1, 1, 1), slope=1.0)
    result = expected(to(device, arguments, None)[0], inr, kind, None, "triton")
    assert all(t.isfinite().all() for t in result)
    for a, b, unit in zip(
        result,
        expected([t.double() for t in arguments], inr, kind, None, "reference"),
        (1, 1, 1, 1 / scale),
        strict=True,
    ):  # saturated: next to nothing
        assert (a.cpu().double() - b).norm() <= 1e-5 * (b.norm() + unit)


@pytest.mark.parametrize("kind", LIKELIHOODS, ids=str)
def test_means_next_to_the_ends(kind, device):
    """What is left of a value of 1 less a mean of 0.9996 decides the gradient."""
    logits, values = torch.tensor([7.0, 7.5, 8.0, -7.0, -7.5, -8.0]), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    logits *= 1.5 if kind.kind == "bernoulli" else 1  # a logistic loses those digits in any form
    theta = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
    arguments = [theta, logits[:, None], values[None, :, None], torch.ones(1, 1, 6), torch.tensor([[1e-3]])]
    inr = Inr((1, 1, 1), slope=1.0)
    result = expected(to(device, arguments, None)[0], inr, kind, None, "triton")
    exact = expected([t.double() for t in arguments], inr, kind, None, "reference")
    for a, b in zip(result, exact, strict=True):  # for these very values: others next to them lose what is asked here
        assert (a.cpu().double() - b).norm() <= 1e-5 * b.norm()


@pytest.mark.slow
@pytest.mark.parametrize("features", ["shared", "mirrored"])
def test_shares_of_the_points(features, device):
    """Several tiles per share, several shares per network, and the same bits each time."""
    size, inr = (1, 1, 1100, (4, 5, 2)), Inr((4, 5, 2))
    module = importlib.import_module("vamoh.kernels.inr_mixture")
    arguments, mirror = mixture_case(*size, features)
    there, mirror = to(device, arguments, mirror)
    chosen = module._Call(*there[:2], mirror, *inr, "ieee").plan("expected")
    assert chosen.splits > 1
    if device == "cpu":
        assert chosen.tiles > chosen.splits
    result = expected(there, inr, LIKELIHOODS[0], mirror, "triton")
    assert near_expected(result, arguments, inr, LIKELIHOODS[0])
    assert all(map(torch.equal, result, expected(there, inr, LIKELIHOODS[0], mirror, "triton")))


def test_shares_of_the_components(device):
    """Few points and functions: components run side by side."""
    check((1, 7, 3, (4, 5, 2)), "mirrored", Inr((4, 5, 2)), LIKELIHOODS[0], device)


@pytest.mark.parametrize("size", [(0, 2, 3), (2, 2, 0)], ids=str)
def test_empty(size, device):
    arguments, _ = mixture_case(2, 2, 3, (4, 5, 2))
    b, k, n = size
    theta, x, values, weights, scale = to(device, arguments, None)[0]
    cut = [theta[:b], x[:n], values[:b, :n], weights[:b, :, :n], scale]
    value, log_p, grad_theta, grad_scale = expected(cut, Inr((4, 5, 2)), LIKELIHOODS[0], None, "triton")
    assert not value.any() and not grad_theta.any() and not grad_scale.any()
    assert value.shape == (b,) and log_p.shape == size and grad_theta.shape == cut[0].shape
    assert inr_mixture(*cut[:2], Inr((4, 5, 2)), backend="triton").shape == (*size, 2)
    means = inr_mixture_mean(*cut[:2], cut[3], Inr((4, 5, 2)), LIKELIHOODS[0], backend="triton")
    assert [m.shape for m in means] == [(b, n, 2)] * 2


@pytest.mark.parametrize(
    "features", [*(pytest.param(f, marks=pytest.mark.slow) for f in ("shared", "own")), "mirrored"]
)
def test_strided_arguments(features, device):
    arguments, mirror = mixture_case(2, 2, 9, (8, 5, 2), features)
    arguments, mirror = to(device, arguments, mirror)
    strided = [t.mT.contiguous().mT for t in arguments]
    inr, kind = Inr((8, 5, 2)), LIKELIHOODS[0]
    plain = expected(arguments, inr, kind, mirror, "triton")
    for theta in (strided[0], arguments[0].transpose(0, 1).contiguous().transpose(0, 1)):
        result = expected([theta, *strided[1:]], inr, kind, mirror, "triton")
        assert result[2].stride() == torch.empty_like(theta).stride()
        assert all(map(torch.equal, result, plain))
    once = arguments[1][:1].expand(2, -1, -1) if features == "own" else None
    if once is not None:
        whole = inr_mixture(arguments[0], once.contiguous(), inr, backend="triton")
        assert torch.equal(inr_mixture(arguments[0], once, inr, backend="triton"), whole)


@pytest.mark.parametrize("features", ["shared", "own", "mirrored"])
def test_what_is_hidden_plays_no_part(features, device):
    arguments, mirror = mixture_case(2, 2, 9, (4, 5, 2), features)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 0, 1, 1], [0, 0, 1, 0, 1, 1, 1, 1, 0]]).bool()
    theta, x, values, weights, scale = arguments
    x.masked_fill_(~(mask if features == "own" else mask.any(0))[..., None], torch.nan)
    values.masked_fill_(~mask[..., None], torch.nan)
    weights.masked_fill_(~mask[:, None], torch.nan)
    inr, kind = Inr((4, 5, 2)), LIKELIHOODS[0]
    exact = expected([t.double() for t in arguments], inr, kind, None, "reference", mask)
    assert exact[0].isfinite().all() and not exact[1][~mask[:, None].expand(2, 2, 9)].any()
    (theta, x, values, weights, scale), mirror = to(device, arguments, mirror)
    hidden = mask.to(device)
    result = expected([theta, x, values, weights, scale], inr, kind, mirror, "triton", hidden)
    assert near_expected(result, arguments, inr, kind, mask)
    options = {"mask": hidden, "mirror": mirror, "backend": "triton"}
    log_p = inr_mixture_log_likelihood(theta, x, values, scale, inr, kind, **options)
    assert near_expected([result[0], log_p, *result[2:]], arguments, inr, kind, mask)


def test_gradients_through_autograd(device):
    arguments, mirror = mixture_case(2, 2, 9, (4, 5, 2), "mirrored")
    inr, kind = Inr((4, 5, 2)), LIKELIHOODS[0]

    def gradients(backend: str, mirror: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        theta, x, values, weights, scale = tensors
        leaves = [t.clone().requires_grad_() for t in (theta, weights, scale)]
        value, _ = inr_mixture_expected_log_likelihood(
            leaves[0], x, values, leaves[1], leaves[2], inr, kind, mirror=mirror, backend=backend
        )
        incoming = torch.tensor([-1.0, 2.0], dtype=value.dtype, device=value.device)
        return torch.autograd.grad(value, leaves, incoming)

    there, mirror = to(device, arguments, mirror)
    result = gradients("triton", mirror, *there)
    assert near(result, functools.partial(gradients, "reference", None), arguments, inr.widths)


def test_means_of_equally_probable_components(device):
    theta = torch.tensor([[[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 2.0]]])  # constants 1 and 2
    for log_pi, first in ((torch.full((1, 2, 3), 0.5).log(), 1.0), (torch.full((1, 2, 3), -torch.inf), 1.0)):
        x = torch.zeros(3, 1, device=device)
        mean, mean_map = inr_mixture_mean(
            theta.to(device), x, log_pi.to(device), Inr((1, 1, 1)), Likelihood("bernoulli"), backend="triton"
        )
        both = (log_pi.exp()[..., None] * torch.sigmoid(torch.tensor([1.0, 2.0]))[None, :, None, None]).sum(1)
        torch.testing.assert_close(mean.cpu(), both)
        torch.testing.assert_close(mean_map.cpu(), torch.sigmoid(torch.tensor(first)).expand(1, 3, 1))


def test_a_mirror_that_changed_is_read_again(device):
    given, mirror = mixture_case(1, 1, 12, (4, 5, 1), "mirrored")
    arguments, mirror = to(device, given, mirror)
    inr = Inr((4, 5, 1))
    inr_mixture(*arguments[:2], inr, mirror=mirror, backend="triton")
    mirror.fill_(-1)
    result = inr_mixture(*arguments[:2], inr, mirror=mirror, backend="triton")
    assert near([result], lambda theta, x: [inr_mixture_reference(theta, x, inr)], given[:2], inr.widths)
    mirror.fill_(5)
    with pytest.raises(ValueError, match="inr_mixture: mirror must hold -1 or pairs"):
        inr_mixture(*arguments[:2], Inr((4, 5, 1)), mirror=mirror, backend="triton")


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((4, 2), "takes hidden layers of one width, at least one, got widths \\[4, 2\\]"),
        ((4, 5, 6, 2), "takes hidden layers of one width, at least one, got widths \\[4, 5, 6, 2\\]"),
        ((4, 5, 65), "takes at most 64 channels, got 65"),
    ],
)
def test_networks_it_does_not_take_go_to_the_next_backend(widths, message, device):
    theta, x = torch.ones(1, 1, packed_size(widths), device=device), torch.ones(3, widths[0], device=device)
    assert refusal(widths) is not None
    result = inr_mixture(theta, x, Inr(widths))
    assert torch.equal(result, inr_mixture(theta, x, Inr(widths), backend="cpu" if device == "cpu" else "reference"))
    with pytest.raises(ValueError, match=f"inr_mixture: backend 'triton' {message}"):
        inr_mixture(theta, x, Inr(widths), backend="triton")


def test_it_is_the_first_choice(monkeypatch, device):
    module, calls = importlib.import_module("vamoh.kernels.inr_mixture"), []
    monkeypatch.setattr(module, "outputs", lambda *_: calls.append(1) or torch.zeros(1, 1, 3, 2))
    theta, x = torch.ones(1, 1, packed_size((4, 5, 2)), device=device), torch.ones(3, 4, device=device)
    inr_mixture(theta, x, Inr((4, 5, 2)))
    assert calls == [1]


def test_mirror_is_on_the_device_of_theta(device):
    theta, x = torch.ones(1, 1, 9, device=device), torch.ones(3, 2, device=device)
    elsewhere = torch.zeros(3, dtype=torch.int64, device="meta")
    with pytest.raises(TypeError, match=f"inr_mixture: mirror must be on {device}.*, got meta"):
        inr_mixture(theta, x, Inr((2, 2, 1)), mirror=elsewhere)


def test_unknown_precision(monkeypatch, device):
    monkeypatch.setenv("VAMOH_TRITON_PRECISION", "fp8")
    with pytest.raises(ValueError, match="VAMOH_TRITON_PRECISION must be one of ieee, tf32x3, tf32, bf16, got 'fp8'"):
        inr_mixture(
            torch.ones(1, 1, 7, device=device), torch.ones(3, 1, device=device), Inr((1, 2, 1)), backend="triton"
        )


def test_status_says_why_it_cannot_run(monkeypatch, device):
    triton_unavailable.cache_clear()
    monkeypatch.undo()
    rows = {row.op: row for row in status().rows if row.backend == "triton"}
    assert set(OPS) <= set(rows)
    if not torch.cuda.is_available():
        assert {row.reason for row in rows.values()} == {"no CUDA device"}
        with pytest.raises(ValueError, match="backend 'triton' takes tensors on cuda, got cpu"):
            inr_mixture(torch.ones(1, 1, 7), torch.ones(3, 1), Inr((1, 2, 1)), backend="triton")
    else:
        assert status().triton["precision"] == "tf32x3"


def test_import_does_not_load_triton():
    script = """
import sys, torch
before = "triton" in sys.modules
import vamoh, vamoh.kernels, vamoh.kernels.inr_mixture_plan
from vamoh.ops.inr_mixture import Inr, inr_mixture
inr_mixture(torch.ones(1, 1, 7), torch.ones(3, 1), Inr((1, 2, 1)))
assert before or "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
