from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.precision import near_sums
from vamoh.ops import _memory, linear

SIZES = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 8, 64, 130),
    (1, 25, 515, 99),
    (2, 40, 67, 33),
    (1, 5, 16, 2500),  # the contraction of the gradient of x is cut
    (2, 530, 18, 20),  # more rows than go at once
]  # G, M, I, O


def inputs(g: int, m: int, i: int, o: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weight, bias and a gradient of the output."""
    draw = np.random.default_rng([g, m, i, o])
    arrays = (draw.normal(size=s) for s in ((g, m, i), (g, o, i), (g, o), (g, m, o)))
    return [torch.from_numpy(a).to(dtype) for a in arrays]


def run(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, **options) -> list[Tensor]:
    """The output and the gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = linear(leaves[0], leaves[1], leaves[2] if bias is not None else None, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def oracle(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    x, weight, bias, grad = (t.double() for t in (x, weight, bias, grad))
    out = torch.einsum("gmi,goi->gmo", x, weight) + bias[:, None]
    by_x = torch.einsum("gmo,goi->gmi", grad, weight)
    return [out, by_x, torch.einsum("gmo,gmi->goi", grad, x), grad.sum(1)]


def near_float64(results: list[Tensor], *arguments: Tensor) -> bool:
    """Whether these are the results of `run`. Squares of all factors give the sums of the squares of the terms."""
    squares = oracle(*(t.double().square() for t in arguments))
    count = len(results)
    return near_sums(results, oracle(*arguments)[:count], [float(t.sum()) ** 0.5 for t in squares[:count]])


@pytest.mark.parametrize("size", SIZES)
def test_matches_float64(size, backend):
    arguments = inputs(*size)
    assert near_float64(run(*arguments, backend=backend), *arguments)


@pytest.mark.parametrize("size", SIZES)
def test_every_instruction_set_and_number_of_threads(size, isas, monkeypatch):
    arguments = inputs(*size)
    threads = torch.get_num_threads()
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(run(*arguments, backend="cpu"))
        torch.set_num_threads(threads)
        assert near_float64(results[0], *arguments)
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_large_gradient_of_the_weight(isas, monkeypatch):
    arguments = inputs(1, 2, 1024, 4100)
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        assert near_float64(run(*arguments, backend="cpu"), *arguments)


def test_layouts(backend):
    x, weight, bias, grad = inputs(*SIZES[2])
    expected = run(x, weight, bias, grad, backend=backend)
    strided = [t.mT.contiguous().mT for t in (x, weight, bias, grad)]
    for got in (
        run(*strided, backend=backend),
        run(x, weight, bias, grad.transpose(0, 1).contiguous().transpose(0, 1)),
    ):
        assert near_sums(got, [t.double() for t in expected])
    assert expected[0].transpose(0, 1).is_contiguous()
    shared = x[:1].expand(3, -1, -1)
    assert near_float64(run(shared, weight, bias, grad, backend=backend), shared, weight, bias, grad)
    apart = torch.stack([x, x], -1)[..., 0]  # dense in no dimension
    assert near_sums(run(apart, weight, bias, grad, backend=backend), [t.double() for t in expected])
    ones = torch.ones(()).expand(grad.shape)
    assert near_float64(run(x, weight, bias, ones, backend=backend), x, weight, bias, ones)


def test_without_bias(backend):
    x, weight, bias, grad = inputs(*SIZES[1])
    assert near_float64(run(x, weight, None, grad, backend=backend), x, weight, torch.zeros_like(bias), grad)


@pytest.mark.parametrize("wanted", range(3))
def test_only_the_gradients_asked_for(wanted, backend):
    arguments = inputs(*SIZES[1])
    leaves = [t.requires_grad_(i == wanted) for i, t in enumerate(arguments[:3])]
    (grad,) = torch.autograd.grad(linear(*leaves, backend=backend), leaves[wanted], arguments[3])
    assert near_sums([grad], [oracle(*(t.detach() for t in arguments))[wanted + 1]])


@pytest.mark.parametrize("size", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty(size, backend):
    arguments = inputs(*size)
    for got, expected in zip(run(*arguments, backend=backend), oracle(*arguments), strict=True):
        torch.testing.assert_close(got, expected.float())


@given(st.data())
def test_groups_and_rows_are_independent(data):
    size = [data.draw(st.integers(1, n)) for n in (4, 40, 40, 110)]
    x, weight, bias, grad = inputs(*size)
    out, by_x, *_ = run(x, weight, bias, grad)
    g, m = data.draw(st.integers(0, size[0] - 1)), data.draw(st.integers(0, size[1] - 1))
    alone = run(x[g : g + 1, m : m + 1], weight[g : g + 1], bias[g : g + 1], grad[g : g + 1, m : m + 1])
    torch.testing.assert_close(alone[0][0, 0], out[g, m], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone[1][0, 0], by_x[g, m], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients(shared):
    x, weight, bias, _ = (t.requires_grad_() for t in inputs(*SIZES[1], torch.float64))
    if shared:
        assert torch.autograd.gradcheck(lambda x, *rest: linear(x.expand(2, -1, -1), *rest), (x[:1], weight, bias))
    assert torch.autograd.gradcheck(linear, (x, weight, bias))


def test_second_derivatives_are_refused(backend):
    x, weight, bias, _ = (t.requires_grad_() for t in inputs(*SIZES[1]))
    with pytest.raises(RuntimeError, match="^linear: has no second derivatives"):
        torch.autograd.grad(linear(x, weight, bias, backend=backend).square().sum(), x, create_graph=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*TF32|.*deprecated")
def test_contract_of_a_torch_op(backend):
    arguments = [t.requires_grad_() for t in inputs(*SIZES[1])[:3]]
    torch.library.opcheck(torch.ops.vamoh.linear.default, (*arguments, backend))
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments, backend=backend), linear(*arguments, backend=backend))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 5)}, ValueError, r"x must have shape \[G, M, I\], got \[4, 5\]"),
        ({"x": torch.zeros(2, 4, 5).half()}, TypeError, "x must have dtype float32 or float64, got float16"),
        ({"weight": torch.zeros(2, 3, 4)}, ValueError, r"weight must have shape \[2, O, 5\], got \[2, 3, 4\]"),
        (
            {"weight": torch.zeros(2, 3, 5).double()},
            TypeError,
            "weight must have dtype torch.float32, got torch.float64",
        ),
        ({"bias": torch.zeros(1, 3)}, ValueError, r"bias must have shape \[2, 3\], got \[1, 3\]"),
        ({"backend": "gpu"}, ValueError, "backend must be one of cpu, reference, got 'gpu'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"x": torch.zeros(2, 4, 5), "weight": torch.zeros(2, 3, 5), "bias": torch.zeros(2, 3), **change}
    with pytest.raises(error, match=f"^linear: {message}"):
        linear(**arguments)


def large_weight():
    """One whose gradient is large enough to be kept."""
    return torch.randn(1, 1 << 12, 1 << 8, requires_grad=True)


def gradient(weight, x):
    linear(x, weight, None).sum().backward()
    taken, weight.grad = weight.grad, None
    return taken


def test_a_large_gradient_takes_the_place_of_the_last_one():
    weight, x = large_weight(), torch.randn(1, 2, 1 << 8)
    place = gradient(weight, x).data_ptr()
    assert gradient(weight, x).data_ptr() == place


def test_a_gradient_in_use_is_left_alone():
    weight, x = large_weight(), torch.randn(1, 2, 1 << 8)
    gradient(weight, x)  # leaves memory for the next one
    first = gradient(weight, x)
    part, expected = first[0, 5:9], x.sum(1).expand(4, -1)
    del first  # its memory lives on in the part
    second = gradient(weight, -x)
    torch.testing.assert_close(part, expected)
    torch.testing.assert_close(second[0], -x.sum(1).expand(1 << 12, -1))


def test_gradients_of_two_passes_add_up():
    weight, x = large_weight(), torch.randn(1, 2, 1 << 8)
    for _ in range(2):
        linear(x, weight, None).sum().backward()
    torch.testing.assert_close(weight.grad[0], 2 * x.sum(1).expand(1 << 12, -1))


def test_kept_memory_goes_with_its_weight():
    weight = large_weight()
    gradient(weight, torch.randn(1, 2, 1 << 8))
    (block,) = _memory._FREE[weight]
    kept = weakref.ref(block)
    del block
    assert kept() is not None
    del weight
    gc.collect()
    assert kept() is None
