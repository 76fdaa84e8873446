"""The "triton" backend of the planar flow against the float64 reference."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cases import clear_flow_case, expected_log_prob, far_from_kinks, flow_case
from tests.precision import UNIT, bounds, independent, near, within
from vamoh.ops import (
    CounterNoise,
    planar_flow,
    planar_flow_expected_log_prob,
    planar_flow_log_prob,
    planar_flow_sample,
)
from vamoh.ops._noise import _box_muller, counter_noise_reference
from vamoh.ops._noise import philox as philox_reference
from vamoh.ops.planar_flow import PlanarFlow

triton = pytest.importorskip("triton")
tl = importlib.import_module("triton.language")
kernels = importlib.import_module("vamoh.kernels.planar_flow")
pytestmark = pytest.mark.usefixtures("device")

OPS = ("planar_flow_log_prob", "planar_flow_expected_log_prob", "planar_flow_sample")
SIZES = [  # S, B, Z, T: around whole tiles, powers of two and shares
    (1, 1, 1, 1),
    (1, 3, 2, 2),
    (16, 5, 16, 3),
    pytest.param((65, 2, 4, 6), marks=pytest.mark.slow),
    pytest.param((37, 2, 33, 13), marks=pytest.mark.slow),
    pytest.param((300, 1, 18, 5), marks=pytest.mark.slow),
    pytest.param((9, 2, 130, 4), marks=pytest.mark.slow),
    (5, 1, 520, 2),
]


def by_kernel(
    mean: Tensor, std: Tensor, flow: PlanarFlow, upstream: Tensor, noise: Tensor | CounterNoise, device: str
) -> list[Tensor]:
    mean, std, upstream, *parameters = (t.float().to(device) for t in (mean, std, upstream, *flow[:5]))
    leaves = [t.requires_grad_() for t in (mean, std, *parameters)]
    if isinstance(noise, CounterNoise):
        noise = CounterNoise(noise.seed.to(device), noise.samples)
    else:
        noise = noise.float().to(device)
    flow = PlanarFlow(*leaves[2:], flow.slope)
    value = planar_flow_expected_log_prob(mean, std, flow, noise, backend="triton")
    with torch.no_grad():
        alone = planar_flow_expected_log_prob(mean, std, flow, noise, backend="triton")
    assert distance(alone, value.detach().cpu().double()) <= 1e-6
    return [value.detach(), *torch.autograd.grad(value @ upstream, leaves)]


def distance(result: Tensor, exact: Tensor) -> float:
    """‖result - exact‖ / ‖exact‖, 0 where both vanish."""
    assert result.shape == exact.shape
    result, exact = result.detach().cpu(), exact.detach()
    return float((result.double() - exact).norm() / exact.norm()) if exact.any() else float(result.any())


def check(results: list[Tensor], expected: list[Tensor]) -> None:
    assert len(results) == len(expected)
    for result, exact in zip(results, expected, strict=True):
        assert distance(result, exact) <= 1e-5


FAR = 1e-4
"""Of the samples from the kinks of the layers: farther than the roundings of `conditioned` move them."""


def conditioned(
    function: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor], size: Sequence[int]
) -> tuple[Sequence[Tensor], list[float]]:
    """Results in float64, and how far float32 may be off: single numbers are as small as their terms cancel.

    A layer rounds its own parameters 16 times in a row besides its sum of Z terms, and the point once: a softplus of 4,
    a logarithm of 2, 10 products and sums. The sums over the samples are of independent terms.
    """
    samples, _, latent, layers = size
    arguments = [a.detach().double() for a in arguments]
    units = independent(max(samples, latent)) + 16 + layers
    return function(*arguments), bounds(function, arguments, units)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_expected_log_prob_matches_float64(size, device):
    """Noise made in the kernel, and given."""
    seed, (mean, std, flow, upstream), noise = clear_flow_case(*size, far=FAR)

    def exact(mean: Tensor, std: Tensor, upstream: Tensor, noise: Tensor, *flow: Tensor) -> list[Tensor]:
        return expected_log_prob(mean, std, PlanarFlow(*flow), upstream, noise)

    expected = conditioned(exact, (mean, std, upstream, noise, *flow[:5]), size)
    for given in (CounterNoise(torch.tensor(seed), size[0]), noise):
        assert within(by_kernel(mean, std, flow, upstream, given, device), *expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_log_prob_matches_float64(size, device):
    """Per sample, with the gradients; those that are not wanted change nothing."""
    _, (mean, std, flow, _), noise = clear_flow_case(*size, far=FAR)
    z = (mean + std * noise).flatten(0, 1).float()
    upstream = torch.from_numpy(np.random.default_rng(1).normal(size=len(z))).float()

    def run(backend: str, upstream: Tensor, *arguments: Tensor) -> list[Tensor]:
        x, *parameters = (t.detach().requires_grad_() for t in arguments)
        value = planar_flow_log_prob(x, PlanarFlow(*parameters), backend=backend)
        total = value @ upstream
        grads = torch.autograd.grad(total, [x, *parameters], retain_graph=True)
        assert torch.equal(torch.autograd.grad(total, x, retain_graph=True)[0], grads[0])
        assert torch.equal(torch.autograd.grad(total, parameters[4])[0], grads[5])
        return [value.detach(), *grads]

    arguments = (upstream, z, *flow[:5])
    results = run("triton", *(t.float().to(device) for t in arguments))
    assert within(results, *conditioned(functools.partial(run, "reference"), arguments, size))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_samples_match_float64(size, device):
    samples, _, latent, _ = size
    flow = flow_case(*size)[2]

    def run(backend: str, noise: Tensor, *flow: Tensor) -> list[Tensor]:
        return list(planar_flow_sample(noise, PlanarFlow(*flow), backend=backend))

    draws = (np.random.default_rng([2, i]).normal(size=(samples, latent)) for i in range(100))
    singles = (torch.from_numpy(draw).float() for draw in draws)
    noise = next(n for n in singles if far_from_kinks(run("reference", n.double(), *flow[:5])[0], flow, FAR))
    results = run("triton", *(t.float().to(device) for t in (noise, *flow[:5])))
    assert within(results, *conditioned(functools.partial(run, "reference"), (noise, *flow[:5]), size))


@triton.jit
def philox(c, seed, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    words = [tl.load(c + j * SIZE + i).to(tl.uint64) for j in tl.static_range(4)]
    words = kernels.philox(*words, tl.load(seed).to(tl.uint64))
    for j in tl.static_range(4):
        tl.store(out + j * SIZE + i, words[j].to(tl.int64))


@triton.jit
def noise_of(seed, s, b, out, BS: tl.constexpr, ZP: tl.constexpr):
    row, column = tl.arange(0, BS), tl.arange(0, ZP)
    noise = kernels.counter_noise(tl.load(s + row), tl.load(b), tl.load(seed), BS, ZP)
    tl.store(out + row[:, None] * ZP + column[None, :], noise)


@pytest.mark.parametrize("seed", [0, 5, -123_456_789_012_345, 2**63 - 1, -(2**63)])
def test_noise_is_that_of_every_backend(seed, device):
    """Samples and functions that need all bits of their words; near float64 noise, a few roundings off."""
    seed = torch.tensor(seed)
    for first, b in ((0, 0), (3, 1), (2**31 - 5, 70_000)):
        s = torch.arange(first, first + 4, dtype=torch.int32)
        out = torch.full((4, 16), torch.nan)
        there = [t.to(device) for t in (seed, s, torch.tensor(b), out)]
        noise_of[(1,)](*there, BS=4, ZP=16)
        exact = counter_noise_reference(seed, range(first, first + 4), b + 1, 16, torch.float64)[:, b]
        assert (there[-1].cpu().double() - exact).abs().max() <= 2e-6
        assert distance(there[-1], exact) <= 2e-7


@triton.jit
def normals(words, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    first = tl.load(words + i).to(tl.uint64)
    x, y = kernels.box_muller(first, tl.load(words + SIZE + i).to(tl.uint64))
    tl.store(out + i, x)
    tl.store(out + SIZE + i, y)


def test_normals_at_the_ends_of_the_words(device):
    """The smallest and largest uniforms, and every eighth of a turn with its neighbours."""
    ends = [0, 1, 2, 3, 2**31, 2**32 - 1, 2**32 - 2, 2**30, 2**29 + 5]
    turns = [(i * 2**28 + d) % 2**32 for i in range(16) for d in (-(2**10), -1, 0, 1, 2**10)]
    words = torch.tensor([[u, v] for u in ends for v in turns]).T
    words = torch.nn.functional.pad(words, (0, 1024 - words.shape[1])).contiguous()
    out = torch.full(words.shape, torch.nan, device=device)
    normals[(1,)](words.to(device), out, SIZE=1024)
    exact = torch.stack(_box_muller(words[0], words[1]))
    radius = exact.norm(dim=0).clamp(min=1e-4)
    # Logarithm 1 (half of 2, under the root), root 2, angle 2, series 1, product 1: units of the radius.
    assert ((out.cpu().double() - exact).abs() / radius).max() <= 7 * UNIT


def test_words_are_those_of_the_reference(device):
    g = np.random.default_rng(0)
    counter = torch.from_numpy(g.integers(0, 2**32, (4, 64)))
    counter[:, 0], counter[:, 1] = 0, 2**32 - 1
    for seed in (0, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF):
        key = torch.tensor(seed)
        out = torch.zeros_like(counter, device=device)
        philox[(1,)](counter.to(device), key.to(device), out, SIZE=64)
        expected = philox_reference(tuple(counter), (key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF))
        assert torch.equal(out.cpu(), torch.stack(expected))


@pytest.mark.slow
@pytest.mark.parametrize("published", [True, False])
def test_deep_flows(published, device):
    """As deep as the models' deepest, at both initialisations."""
    latent, layers, samples = 24, 60, 16
    g = torch.Generator().manual_seed(1)
    bound = (2 / latent) ** 0.5
    w = torch.empty(layers, latent).uniform_(-bound, bound, generator=g)
    u = torch.empty(layers, latent).uniform_(-(2**0.5), 2**0.5, generator=g) * (1 if published else 0.05)
    zeros = torch.zeros(latent)
    flow = PlanarFlow(*(t.double() for t in (u, w, torch.zeros(layers), zeros, zeros)))
    mean, std, upstream = torch.zeros(1, latent).double(), torch.ones(1, latent).double(), torch.ones(1).double()
    noise = counter_noise_reference(torch.tensor(0), range(samples), 1, latent, torch.float64)
    noise = torch.stack([n for n in noise if far_from_kinks(mean + std * n, flow, 1e-4)])
    assert len(noise) >= samples // 2
    check(by_kernel(mean, std, flow, upstream, noise, device), expected_log_prob(mean, std, flow, upstream, noise))


@pytest.mark.parametrize("inner", [-30.0, -1.0, 0.0, 3.0, 40.0, 200.0])
def test_layers_far_from_neutral(inner, device):
    """1 + w·û next to 0 and far above 1."""
    w = torch.tensor([[0.6, -0.8]])
    arguments = [torch.cat([w, -0.5 * w]) + 0.25, inner * w, w, torch.zeros(1), torch.zeros(2), torch.zeros(2)]

    def run(backend: str, z: Tensor, *parameters: Tensor) -> list[Tensor]:
        flow = PlanarFlow(*parameters)
        return [planar_flow_log_prob(z, flow, backend=backend), *planar_flow_sample(z, flow, backend=backend)]

    results = run("triton", *(t.to(device) for t in arguments))
    assert near(results, functools.partial(run, "reference"), arguments, [2])


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0])
def test_slope_is_an_argument(slope, device):
    _, (mean, std, flow, upstream), noise = clear_flow_case(16, 5, 16, 3)
    flow = flow._replace(slope=slope)
    if far_from_kinks((mean + std * noise).flatten(0, 1), flow, 1e-6):
        arguments = (mean, std, flow, upstream, noise)
        check(by_kernel(*arguments, device), expected_log_prob(*arguments))
    else:
        raise AssertionError("choose another case")


@pytest.mark.slow
def test_shares_of_the_samples(device):
    """Several tiles per share, several shares per function, and the same bits each time."""
    size = (5000, 1, 3, 2)
    chosen = kernels._plan("expected", *size, kernels.device_of(torch.device(device)))
    assert chosen.splits > 1
    if device == "cpu":
        assert chosen.tiles > chosen.splits
    mean, std, flow, upstream = flow_case(*size)
    noise = counter_noise_reference(torch.tensor(0), range(size[0]), 1, 3, torch.float64)
    noise = torch.stack([n for n in noise if far_from_kinks(mean + std * n, flow, 1e-5)])
    assert len(noise) > 4900
    arguments = (mean, std, flow, upstream, noise)
    results = by_kernel(*arguments, device)
    check(results, expected_log_prob(*arguments))
    assert all(map(torch.equal, results, by_kernel(*arguments, device)))
    z = (mean + std * noise).flatten(0, 1).float().to(device)
    single = PlanarFlow(*(t.float().to(device) for t in flow[:5]))
    assert distance(planar_flow_log_prob(z, single).mean()[None], results[0].cpu().double()) <= 1e-5


def test_every_function_and_sample_is_its_own(device):
    """What a function gets does not depend on the others, nor a sample's density on its neighbours."""
    size = (21, 3, 5, 4)
    mean, std, flow, _ = flow_case(*size)
    mean, std, *parameters = (t.float().to(device) for t in (mean, std, *flow[:5]))
    single = PlanarFlow(*parameters)
    noise = torch.randn(21, 3, 5, generator=torch.Generator().manual_seed(0)).to(device)
    value = planar_flow_expected_log_prob(mean, std, single, noise)
    one = planar_flow_expected_log_prob(mean[1:2], std[1:2], single, noise[:, 1:2])
    torch.testing.assert_close(one, value[1:2])
    order = torch.tensor([2, 0, 1], device=device)
    shuffled = planar_flow_expected_log_prob(mean[order], std[order], single, noise[:, order])
    torch.testing.assert_close(shuffled, value[order])
    z = noise[:, 0]
    each = planar_flow_log_prob(z, single)
    torch.testing.assert_close(torch.cat([planar_flow_log_prob(z[i : i + 1], single) for i in (0, 20)]), each[[0, 20]])


@pytest.mark.slow
def test_strided_and_shared_arguments(device):
    mean, std, flow, upstream = flow_case(9, 4, 6, 5)
    noise = counter_noise_reference(torch.tensor(0), range(9), 4, 6)
    plain = by_kernel(mean, std, flow, upstream, noise, device)
    strided = PlanarFlow(*(t.mT.contiguous().mT if t.dim() == 2 else t.repeat(2, 1).T[:, 0] for t in flow[:5]))
    arguments = (mean.T.contiguous().T, std.repeat(1, 2)[:, :6], strided, upstream, noise.mT.contiguous().mT)
    assert max(map(distance, by_kernel(*arguments, device), [t.cpu().double() for t in plain])) <= 1e-6
    once = (mean[:1].expand(4, -1), std[:1].expand(4, -1), flow, upstream, noise[:, :1].expand(-1, 4, -1))
    shared = by_kernel(*once, device)
    assert torch.equal(shared[0], shared[0][:1].expand(4))
    single = PlanarFlow(*(t.float().to(device) for t in flow[:5]))
    z = noise[:, 0].to(device)
    assert torch.equal(planar_flow_log_prob(z.T.contiguous().T, single), planar_flow_log_prob(z, single))
    sampled = planar_flow_sample(z.T.contiguous().T, single)
    assert all(map(torch.equal, sampled, planar_flow_sample(z, single)))


def test_no_functions_and_no_samples(device):
    mean, std, flow, _ = (x.float().to(device) if isinstance(x, Tensor) else x for x in flow_case(1, 2, 3, 2))
    parameters = [t.float().to(device).requires_grad_() for t in flow[:5]]
    flow, noise = PlanarFlow(*parameters), CounterNoise(torch.tensor(0, device=device), 5)
    empty = planar_flow_expected_log_prob(mean[:0], std[:0], flow, noise, backend="triton")
    none = planar_flow_log_prob(mean[:0], flow, backend="triton")
    for value in (empty, none):
        assert value.shape == (0,)
        assert not any(g.any() for g in torch.autograd.grad(value.sum(), parameters))
    with torch.no_grad():
        assert [t.shape for t in planar_flow_sample(mean[:0], flow, backend="triton")] == [(0, 3), (0,)]


@pytest.mark.slow
def test_contract_of_torch_library(device):
    torch.use_deterministic_algorithms(False)
    mean, std, flow, _ = flow_case(5, 2, 3, 4)
    mean, std, *flow = (t.float().to(device).requires_grad_() for t in (mean, std, *flow[:5]))
    parameters = [t.detach().requires_grad_() for t in planar_flow._constrained(PlanarFlow(*flow))[:6]]
    noise = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0)).to(device)
    ops = torch.ops.vamoh
    for tensor, seed in ((noise, None), (None, torch.tensor(3, device=device))):
        for wanted in ((True, True), (True, False), (False, True), (False, False))[: 1 if seed is None else 4]:
            arguments = [t.detach() for t in (mean, std, *parameters)] if wanted != (True, True) else [mean, std]
            arguments += parameters if wanted == (True, True) else []
            torch.library.opcheck(
                ops.planar_flow_expected_log_prob, (*arguments, 0.2, tensor, seed, 5, *wanted, "triton")
            )
    torch.library.opcheck(ops.planar_flow_log_prob, (mean, *parameters, 0.2, "triton"))
    detached = [t.detach() for t in (mean, *parameters)]
    torch.library.opcheck(ops.planar_flow_sample, (*detached, 0.2, "triton"))
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            ops.planar_flow_log_prob_backward, (mean.detach()[:, 0], *detached, 0.2, *wanted, "triton")
        )


def test_memory_does_not_grow_with_the_samples(monkeypatch, device):
    """What is allocated for 4096 times the samples stays within what all programs of the plan may use."""
    sizes = []
    device_of = kernels.device_of(torch.device(device))
    for samples in (4096, 1 << 24):
        chosen = kernels._plan("expected", samples, 64, 64, 80, device_of)
        partial = chosen.splits * 64 * (2 * 80 * 64 + 2 * 80 + 4 * 64 + 1)
        sizes.append(chosen.programs * chosen.scratch + partial)
    assert sizes[1] == sizes[0]


def test_flows_it_does_not_take_go_to_the_next_backend(device):
    flow = PlanarFlow(*(torch.ones(s, device=device) for s in ((1, 1025), (1, 1025), (1,), (1025,), (1025,))))
    z = torch.ones(2, 1025, device=device)
    following = "cpu" if device == "cpu" else "reference"
    assert torch.equal(planar_flow_log_prob(z, flow), planar_flow_log_prob(z, flow, backend=following))
    for function in (planar_flow_log_prob, planar_flow_sample):
        message = f"^{function.__name__}: backend 'triton' takes at most 1024 dimensions, got 1025"
        with pytest.raises(ValueError, match=message):
            function(z, flow, backend="triton")
    with pytest.raises(ValueError, match="backend 'triton' takes at most 1024 dimensions, got 1025"):
        planar_flow_expected_log_prob(z, z, flow, z[None], backend="triton")


def test_float64_goes_to_the_next_backend(device):
    z = torch.ones(2, 3, device=device, dtype=torch.float64)
    flow = PlanarFlow(*(t.to(device) for t in flow_case(1, 1, 3, 2)[2][:5]))
    assert torch.equal(planar_flow_log_prob(z, flow), planar_flow_log_prob(z, flow, backend="reference"))
    with pytest.raises(ValueError, match="backend 'triton' takes dtype torch.float32, got torch.float64"):
        planar_flow_log_prob(z, flow, backend="triton")


@pytest.mark.parametrize("op", ["log_prob", "sample", "expected_log_prob"])
def test_it_is_the_first_choice(monkeypatch, op, device):
    calls = []
    whole = getattr(kernels, op)
    monkeypatch.setattr(kernels, op, lambda *arguments: calls.append(op) or whole(*arguments))
    mean, std, flow, _ = (x.float().to(device) if isinstance(x, Tensor) else x for x in flow_case(2, 2, 3, 1))
    flow = PlanarFlow(*(t.float().to(device) for t in flow[:5]))
    if op == "expected_log_prob":
        planar_flow_expected_log_prob(mean, std, flow, mean[None])
    else:
        {"log_prob": planar_flow_log_prob, "sample": planar_flow_sample}[op](mean, flow)
    assert calls == [op]
