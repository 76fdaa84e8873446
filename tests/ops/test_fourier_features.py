from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.precision import UNIT
from vamoh.ops import fourier_features
from vamoh.points import grid_coords


def draw(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def definition(coords: Tensor, frequencies: Tensor) -> Tensor:
    """In float64, from what the arguments hold."""
    phase = 2 * math.pi * (coords.double()[..., None, :] * frequencies.double()).sum(-1)
    return torch.cat([phase.cos(), phase.sin()], -1)


def error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (257, 2), (3, 5, 3), (2,)])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 128])
def test_matches_definition(backend, isas, monkeypatch, shape, count):
    coords, frequencies = draw(*shape), draw(count, shape[-1], scale=2.0, seed=1)
    expected = definition(coords, frequencies)
    # roundings of phases, in all sums and products, and of sines: sines and cosines move by no more than phases
    sizes = 2 * math.pi * coords.abs() @ frequencies.abs().mT
    roundings = shape[-1] + (1 if backend == "cpu" else 4)
    bound = UNIT * (roundings * float(sizes.norm() / expected.norm()) + 4)
    results = []
    for isa in isas if backend == "cpu" else ["portable"]:
        monkeypatch.setenv("VAMOH_ISA", isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fourier_features(coords, frequencies, backend=backend))
            assert results[-1].shape == (*shape[:-1], 2 * count)
            assert error(results[-1], expected) < bound
            assert threads == 1 or backend != "cpu" or torch.equal(results[-1], results[-2])
    double = fourier_features(coords.double(), frequencies.double())
    torch.testing.assert_close(double, expected, rtol=0, atol=1e-12)


@given(st.data())
def test_any_sizes_and_values(data):
    n, d, f = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    scale = data.draw(st.sampled_from([0.0, 1e-20, 1.0, 300.0]))
    coords, frequencies = draw(n, d, scale=scale, seed=n), draw(f, d, seed=f)
    result = fourier_features(coords, frequencies)
    bound = 1e-6 * (1 + scale * d * 10)  # the phase is rounded
    worst = (result.double() - definition(coords, frequencies)).abs().max() if n else 0
    assert worst <= bound


def test_opposite_points_have_the_same_cosines_and_opposite_sines(isas, monkeypatch):
    frequencies = draw(33, 2, scale=3.0)
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        features = fourier_features(grid_coords((9, 9)), frequencies, backend="cpu")
        assert torch.equal(features[:, :33], features.flip(0)[:, :33])
        assert torch.equal(features[:, 33:], -features.flip(0)[:, 33:])


def test_far_and_special_values(isas, monkeypatch):
    """Where float32 holds whole and half cycles only, and where there is no angle."""
    coords = torch.tensor([[600000.25], [600000.5], [4194304.5], [1e30], [5e37], [math.inf], [math.nan], [0.0]])
    frequencies = torch.ones(17, 1)
    expected = torch.tensor([[0.0, 1.0], [-1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        result = fourier_features(coords, frequencies, backend="cpu")[:, ::17]
        torch.testing.assert_close(result[:5], expected, rtol=0, atol=1e-6)
        assert result[5:7].isnan().all()
        assert result[7].tolist() == [1, 0]


def test_overflow_as_in_plain_torch(isas, monkeypatch):
    """A phase in radians beyond float32 is no angle, also where the cycles are finite or cancel."""
    coords = torch.tensor([[3e38, 0.0], [3e38, -3e38], [3e38, 3e38], [1e38, 1.0], [1e19, 1e19], [0.0, 0.0], [2.0, 1.0]])
    frequencies = torch.tensor([[1.0, 1.0], [3e38, 1.0], [1e-30, 1e-30], [1e19, -1e19], [0.0, 0.0], [1.0, math.inf]])
    expected = fourier_features(coords, frequencies, backend="reference").isnan()
    assert expected.any() and not expected.all()
    for isa in isas:
        monkeypatch.setenv("VAMOH_ISA", isa)
        assert torch.equal(fourier_features(coords, frequencies, backend="cpu").isnan(), expected)


def test_strided_inputs(backend):
    coords, frequencies = draw(3, 6, 2), draw(2, 9).mT
    expected = fourier_features(coords.contiguous(), frequencies.contiguous(), backend=backend)
    result = fourier_features(coords.mT.contiguous().mT, frequencies, backend=backend)
    # Plain torch may choose another matrix product, and so round two products and their sum otherwise.
    phase = 2 * math.pi * (coords.abs() @ frequencies.abs().mT)
    bound = 0.0 if backend == "cpu" else float(6 * torch.finfo(torch.float32).eps * phase.max())
    torch.testing.assert_close(result, expected, rtol=0, atol=bound)


def test_gradients_take_the_plain_path(monkeypatch):
    coords, frequencies = draw(5, 2).double().requires_grad_(), draw(3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(fourier_features, (coords, frequencies))
    with pytest.raises(ValueError, match="^fourier_features: backend must be 'reference' for gradients, got 'cpu'"):
        fourier_features(coords, frequencies, backend="cpu")
    with torch.no_grad():
        assert not fourier_features(coords, frequencies).requires_grad


def test_contract_of_torch_library(backend):
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(torch.ops.vamoh.fourier_features, (draw(3, 5, 2), draw(7, 2), backend))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"coords": None}, TypeError, "coords must be a torch.Tensor, got NoneType"),
        ({"coords": torch.zeros(())}, ValueError, r"coords must have shape \[\.\.\., 2\], got \[\]"),
        ({"coords": torch.zeros(4, 3)}, ValueError, r"coords must have shape \[4, 2\], got \[4, 3\]"),
        ({"coords": torch.zeros(4, 2).double()}, TypeError, "coords must have dtype torch.float32, got torch.float64"),
        ({"frequencies": torch.zeros(3)}, ValueError, r"frequencies must have shape \[F, D\], got \[3\]"),
        ({"frequencies": torch.zeros(3, 2).half()}, TypeError, "frequencies must have dtype float32 or float64"),
        ({"backend": "gpu"}, ValueError, "backend must be one of cpu, reference, got 'gpu'"),
    ],
)
def test_errors_name_the_argument(change, kind, message):
    arguments = {"coords": torch.zeros(4, 2), "frequencies": torch.zeros(3, 2), **change}
    with pytest.raises(kind, match=f"^fourier_features: {message}"):
        fourier_features(**arguments)
