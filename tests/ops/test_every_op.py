"""Every op as it is chosen by itself, on every device, against its float64 plain torch on the CPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.precision import bounds, independent, mean_terms, operations, within
from vamoh import ops
from vamoh.geometry import mirror as mirror_of
from vamoh.layout import packed_size
from vamoh.ops import CounterNoise
from vamoh.ops._op import OPS, all_ops, plain_torch
from vamoh.ops.inr_mixture import Inr
from vamoh.ops.likelihood import KINDS, Likelihood
from vamoh.ops.planar_flow import PlanarFlow
from vamoh.points import grid_coords

DEVICES = pytest.mark.parametrize(
    ("device", "precision", "unit"),
    [
        ("cpu", "ieee", 1),
        pytest.param("cuda", "ieee", 1, marks=pytest.mark.gpu),
        # Triton's default: of the parts of a product, each rounded to 11 bits, the smallest is left out, 2^-21 of it
        # against 2^-24 of float32
        pytest.param("cuda", "tf32x3", 8, marks=pytest.mark.gpu),
    ],
)


class Size(NamedTuple):
    """Letters of docs/architecture.md."""

    B: int
    N: int
    M: int
    S: int
    K: int
    H: int
    C: int
    Z: int


SIZES = {
    "odd": Size(3, 37, 11, 5, 3, 9, 2, 5),
    "ones": Size(1, 1, 1, 1, 1, 1, 1, 1),
    "tiles": Size(2, 130, 64, 16, 2, 32, 3, 64),
}


class Call(NamedTuple):
    """An op: a function of the tensors, which of them get a gradient, whether it is discrete, and terms that cancel."""

    op: str
    run: Callable[..., Any]
    tensors: Sequence[Tensor]
    leaves: Sequence[int] = ()
    exact: bool = False
    terms: float = 0.0


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def index(count: int, *shape: int) -> Tensor:
    return torch.randint(max(count, 1), shape, generator=torch.Generator().manual_seed(count))


def calls(s: Size) -> Iterator[Call]:
    """All ops at one size."""
    cloud, features = draw(s.B, s.N, 3), draw(s.N, 2 * s.H)
    mask = uniform(s.B, s.N) < 0.7
    mask[:, : min(s.S, s.N)] = True
    neighbors = index(s.N, s.B, s.M, s.S)
    for m in (None, mask):
        given = [cloud] if m is None else [cloud, m]
        yield Call("farthest_point_sample", lambda x, *m: ops.farthest_point_sample(x, s.M, *m), given, exact=True)
        yield Call("knn", lambda x, *m: ops.knn(x, x[:, : s.M], min(s.S, s.N), *m), given, exact=True)
    yield Call("fourier_features", ops.fourier_features, [cloud, draw(s.H, 3)])
    weights, linear, bias = draw(s.B, s.M, s.S, 4), draw(s.H, 4 * s.C), draw(s.H)
    convolved = [draw(s.B, s.N, s.C), weights, linear, bias, neighbors]
    yield Call("point_conv", lambda f, w, *r: ops.point_conv(f, r[2], w, *r[:2], 0.2), convolved, range(4))
    table = [draw(s.B, s.N, 4), draw(4), neighbors]
    yield Call("neighbor_difference", lambda t, b, n: ops.neighbor_difference(t, n, n[..., 0], b), table, (0, 1))
    yield Call("linear", ops.linear, [draw(s.K, s.B, s.Z), draw(s.K, s.H, s.Z), draw(s.K, s.H)], range(3))

    size = 0.5 * s.Z**-0.25  # of layers that change a density by some units
    layers = [size * draw(4, s.Z), size * draw(4, s.Z, seed=1), draw(4)]
    parameters = [*layers, draw(s.Z), 0.1 * draw(s.Z, seed=1)]
    mean, std, noise = draw(s.B, s.Z), 0.1 + uniform(s.B, s.Z), draw(s.M, s.B, s.Z)
    flow = [mean, std, *parameters]
    yield Call("planar_flow_log_prob", lambda z, *p: ops.planar_flow_log_prob(z, PlanarFlow(*p)), [mean, *parameters],
               range(6))  # fmt: skip
    yield Call("planar_flow_sample", lambda e, *p: ops.planar_flow_sample(e, PlanarFlow(*p)), [mean, *parameters])
    expected = ops.planar_flow_expected_log_prob
    yield Call("planar_flow_expected_log_prob", lambda m, s, e, *p: expected(m, s, PlanarFlow(*p), e),
               [mean, std, noise, *parameters], (0, 1, *range(3, 8)))  # fmt: skip
    yield Call("planar_flow_expected_log_prob", lambda m, d, seed, *p: expected(m, d, PlanarFlow(*p),
               CounterNoise(seed, s.M)), [*flow[:2], torch.tensor(7), *parameters], (0, 1, *range(3, 8)))  # fmt: skip

    def gate(coords: Tensor, shift: Tensor, values: Tensor, first: Tensor, *rest: Tensor) -> Tensor:
        return ops.gating(coords, shift, rest[:2], rest[2:], values, first, slope=0.1, bounded=False)

    layers = [draw(s.H, s.H), draw(s.K, s.H), draw(s.H), draw(s.K)]
    gated = [draw(s.H, s.N), draw(s.B, s.H), uniform(s.B, s.N, s.C), draw(s.H, s.C), *layers]
    yield Call("gating", gate, gated, (0, 1, *range(3, 8)))
    log_q, log_p = (draw(s.B, s.K, s.N, seed=i).log_softmax(1) for i in (0, 1))
    yield Call("categorical_kl", ops.categorical_kl, [log_q, log_p, mask], (0, 1))

    grid = grid_coords((s.N,))
    phase = grid @ draw(1, s.H)
    for kind, activation in zip(KINDS, ("leaky_relu", "relu", "leaky_relu"), strict=True):
        inr, likelihood = Inr((2 * s.H, s.H, s.H, s.C), activation), Likelihood(kind, open_ends=True)
        theta = 0.3 * draw(s.B, s.K, packed_size(inr.widths), seed=1)  # one without a hidden unit at its kink
        values, q, scale = uniform(s.B, s.N, s.C), uniform(s.B, s.K, s.N), 0.05 + uniform(s.K, s.C)
        encoded, mirror = torch.cat([phase.cos(), phase.sin()], 1), mirror_of(grid)
        by = {"inr": inr, "likelihood": likelihood, "mirror": mirror}
        yield from _networks(theta, encoded, values, q, scale, log_p, mask, **by)
        yield from _networks(theta, features, values, q, scale, log_p, mask, **{**by, "mirror": None})


def _networks(
    theta: Tensor, x: Tensor, y: Tensor, q: Tensor, scale: Tensor, log_p: Tensor, mask: Tensor, *, inr: Inr,
    likelihood: Likelihood, mirror: Tensor | None,
) -> Iterator[Call]:  # fmt: skip
    def at(x: Tensor) -> Tensor | None:
        return None if mirror is None else mirror.to(x.device)

    yield Call("inr_mixture", lambda t, x: ops.inr_mixture(t, x, inr, mirror=at(x)), [theta, x], (0,))
    run = ops.inr_mixture_log_likelihood
    yield Call("inr_mixture_log_likelihood", lambda t, x, y, s, m: run(t, x, y, s, inr, likelihood, mask=m,
               mirror=at(x)), [theta, x, y, scale, mask])  # fmt: skip
    mixed = ops.inr_mixture_expected_log_likelihood
    for given in ([], [mask]):
        yield Call("inr_mixture_expected_log_likelihood", lambda t, q, s, x, y, *m: mixed(t, x, y, q, s, inr,
                   likelihood, mask=m[0] if m else None, mirror=at(x))[0], [theta, q, scale, x, y, *given],
                   (0, 1, 2) if likelihood.kind == "logistic" else (0, 1))  # fmt: skip
    yield Call("inr_mixture_mean", lambda t, x, p: ops.inr_mixture_mean(t, x, p, inr, likelihood, mirror=at(x)),
               [theta, x, log_p], terms=mean_terms(likelihood.kind))  # fmt: skip


def results(call: Call, device: str, dtype: torch.dtype, weights: Sequence[Tensor] = ()) -> list[Tensor]:
    """What the op returns, and the gradients of a sum of it with these weights or drawn ones, on the CPU."""
    tensors = [t.detach().to(device, dtype if t.is_floating_point() else t.dtype) for t in call.tensors]
    leaves = [tensors[i].requires_grad_() for i in call.leaves]
    out = flat(call.run(*tensors))
    if leaves:
        weights = weights or [draw(*o.shape, seed=3) for o in out]
        each = zip(out, weights, strict=True)
        total = sum(((o * w.to(o)).sum() for o, w in each if o.is_floating_point()), out[0].sum() * 0)
        out += torch.autograd.grad(total, leaves)
    return [o.detach().cpu() for o in out]


def in_float64(call: Call, *floats: Tensor) -> list[Tensor]:
    """Its results for these in place of its tensors of floats, and of the weights."""
    rest = iter(floats)
    tensors = [next(rest) if t.is_floating_point() else t for t in call.tensors]
    return results(call._replace(tensors=tensors), "cpu", torch.float64, list(rest))


@DEVICES
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", sorted(OPS))
def test_matches_float64(
    op: str, size: str, device: str, precision: str, unit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAMOH_TRITON_PRECISION", precision)
    s = SIZES[size]
    mine = [call for call in calls(s) if call.op == op]
    assert mine, f"add calls of {op} here"
    roundings = unit * (independent(s.B * s.N) + operations([]))  # the longest sums, and a likelihood's functions
    for call in mine:
        found = results(call, device, torch.float32)
        monkeypatch.setenv("VAMOH_BACKEND", "reference")
        if call.exact:
            expected = results(call, "cpu", torch.float32)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        else:
            weights = [draw(*o.shape, seed=3) for o in found[: len(found) - len(call.leaves)]]
            floats = [t.double() for t in (*call.tensors, *weights) if t.is_floating_point()]
            exact = functools.partial(in_float64, call)
            assert within(found, exact(*floats), bounds(exact, floats, roundings, call.terms))
        monkeypatch.delenv("VAMOH_BACKEND")


@pytest.mark.gpu
@pytest.mark.parametrize("op", sorted(OPS))
def test_the_same_bits_twice(op: str) -> None:
    for call in calls(SIZES["tiles"]):
        if call.op == op:
            first, second = (results(call, "cuda", torch.float32) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Recorder(TorchDispatchMode):
    """Keeps the ops of vamoh that run, and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vamoh":
            self.seen.append((func, tree_map_only(Tensor, lambda t: t.detach().clone(), args)))
        return func(*args, **(kwargs or {}))


def asks_gradients(arguments: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.clone().requires_grad_(t.is_floating_point()), arguments)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("op", sorted(OPS))
def test_contract_of_torch_library(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake and derivative of everything that runs, for the backend chosen and for the reference."""
    torch.use_deterministic_algorithms(False)
    recorder = Recorder()
    for backend in ("", "reference"):
        monkeypatch.setenv("VAMOH_BACKEND", backend)
        with recorder:
            for call in calls(SIZES["odd"]):
                if call.op == op:
                    results(call, "cpu", torch.float32)
        ran = {func for func, _ in recorder.seen}
        known = {node for each in all_ops() if each.name == op for node in (each.node, each.alone)}
        assert ran <= known
        for func, arguments in {str(func): (func, arguments) for func, arguments in recorder.seen}.values():
            torch.library.opcheck(func, arguments)
            if func is OPS[op].alone is not OPS[op].node:
                torch.library.opcheck(OPS[op].node, asks_gradients(arguments))
        recorder.seen.clear()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("op", sorted(OPS))
def test_compiled_is_the_same(op: str) -> None:
    """In one graph, with its derivative; only the size of a sample of masked points breaks it."""
    for call in calls(SIZES["odd"]):
        if call.op != op:
            continue
        torch._dynamo.reset()
        whole = op != "farthest_point_sample" or len(call.tensors) == 1
        compiled = call._replace(run=torch.compile(call.run, fullgraph=whole, backend="aot_eager"))
        for a, b in zip(*(results(c, "cpu", torch.float32) for c in (compiled, call)), strict=True):
            assert torch.equal(a, b)


DECODER = {"fourier_features", "gating", "linear", "inr_mixture", "inr_mixture_mean"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", sorted(OPS))
def test_exported_runs_without_vamoh(op: str) -> None:
    """An op is one node, for which plain torch stands in where a decoder may hold it."""

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return call.run(*tensors)

    for call in calls(SIZES["odd"]):
        if call.op != op or (op == "farthest_point_sample" and len(call.tensors) > 1):
            continue
        with torch.no_grad():
            program = torch.export.export(Module(), tuple(call.tensors))
            nodes = {str(node.target) for node in program.graph.nodes}
            assert f"vamoh.{op}.default" in nodes
            if op not in DECODER:
                continue
            plain = program.run_decompositions(plain_torch())
            assert not any("vamoh" in str(node.target) for node in plain.graph.nodes)
            for a, b in zip(*(flat(f(*call.tensors)) for f in (plain.module(), call.run)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("op", sorted(set(OPS) - {"linear", "farthest_point_sample", "knn"}))
def test_float32_under_autocast(op: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision is cast to float32, also in a backward inside autocast, and refused where autocast is off."""
    monkeypatch.setenv("VAMOH_BACKEND", backend)
    for call in calls(SIZES["odd"]):
        if call.op != op:
            continue
        half = call._replace(tensors=[t.bfloat16() if t.is_floating_point() else t for t in call.tensors])
        expected = results(half, "cpu", torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found = results(half, "cpu", torch.bfloat16)
            again = results(half, "cpu", torch.float32)
        outputs = len(expected) - len(call.leaves)
        for i, (a, b, c) in enumerate(zip(found, again, expected, strict=True)):
            assert torch.equal(b, c) and a.dtype == (c.dtype if i < outputs else torch.bfloat16)
            assert torch.equal(a, c.to(a.dtype))
        if any(t.is_floating_point() for t in call.tensors):
            with pytest.raises(TypeError, match="must have dtype"):
                call.run(*half.tensors)


@pytest.mark.parametrize("op", ["inr_mixture_expected_log_likelihood", "planar_flow_expected_log_prob"])
def test_gradients_that_nobody_asked_for_are_not_made(op: str) -> None:
    """Of an output that is not used, such as the gradients that wait for their derivative: not even zeros."""
    torch.use_deterministic_algorithms(False)
    for call in (call for call in calls(SIZES["tiles"]) if call.op == op):
        tensors = [t.clone().requires_grad_() if i in call.leaves[:2] else t for i, t in enumerate(call.tensors)]
        value = flat(call.run(*tensors))[0]
        grad = torch.ones_like(value)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.autograd.grad(value, [tensors[i] for i in call.leaves[:2]], grad)
        names = {event.name for event in profile.events()}
        assert "aten::mul" in names and not {"aten::zeros", "aten::zero_", "aten::fill_"} & names


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def test_no_backend_is_forced() -> None:
    """Else these tests would not see what is chosen by itself."""
    assert not os.environ.get("VAMOH_BACKEND")
