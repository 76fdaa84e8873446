from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vamoh.encoding import FourierFeatures
from vamoh.points import grid_coords


def test_formula_and_order():
    encoding = FourierFeatures(2, 3, 2.0, learn=False).double()
    coords = torch.randn(4, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = encoding(coords)
    assert result.shape == (4, 5, 6) and encoding.out_dim == 6
    f = encoding.frequencies.numpy()
    for i, j in np.ndindex(4, 5):
        for m in range(3):
            phase = 2 * math.pi * float(coords[i, j].numpy() @ f[m])
            assert float(result[i, j, m]) == pytest.approx(math.cos(phase), abs=1e-12)
            assert float(result[i, j, 3 + m]) == pytest.approx(math.sin(phase), abs=1e-12)


def test_frequencies_are_normal_with_that_scale():
    torch.manual_seed(0)
    frequencies = FourierFeatures(2, 5000, 3.0, learn=False).frequencies
    assert float(frequencies.std()) == pytest.approx(3, rel=0.03)
    assert abs(float(frequencies.mean())) < 0.1


@pytest.mark.parametrize("learn", [True, False])
def test_learned_or_a_buffer(learn):
    encoding = FourierFeatures(3, 4, 1.0, learn)
    assert ("frequencies" in dict(encoding.named_parameters())) == learn
    assert list(encoding.state_dict()) == ["frequencies"]


def test_raw_coordinates():
    encoding, coords = FourierFeatures(3, 0, 1.0, learn=False), torch.rand(5, 3)
    assert encoding.out_dim == 3
    assert torch.equal(encoding(coords), coords)
    assert torch.equal(encoding.cached(coords), coords)


@pytest.mark.parametrize("frequencies", [0, 4])
def test_cached_features_follow_the_content(frequencies):
    encoding, coords = FourierFeatures(2, frequencies, 1.0, learn=False), torch.rand(5, 2)
    before = coords.clone()
    for _ in range(2):
        assert torch.equal(encoding.cached(coords), encoding(coords))
    coords.mul_(0.5)
    assert torch.equal(encoding.cached(coords), encoding(coords))
    assert torch.equal(encoding.cached(before), encoding(before))
    if frequencies:
        assert encoding.cached(before) is encoding.cached(before.clone())
        encoding.frequencies.mul_(2)
        assert torch.equal(encoding.cached(before), encoding(before))


def test_cached_keeps_gradients():
    encoding, coords = FourierFeatures(2, 3, 1.0, learn=True), torch.rand(5, 2)
    for _ in range(2):
        encoding.zero_grad()
        encoding.cached(coords).sum().backward()
        assert encoding.frequencies.grad.any()
    encoding = FourierFeatures(2, 3, 1.0, learn=False)
    encoding.cached(coords)
    coords.requires_grad_()
    encoding.cached(coords).sum().backward()
    assert coords.grad.any()


def test_mirror_of_symmetric_coordinates():
    coords = grid_coords((6, 6))
    encoding = FourierFeatures(2, 5, 2.0, learn=False)
    mirror = encoding.mirror(coords)
    assert mirror is not None and encoding.mirror(coords.clone()) is mirror  # remembered
    features = encoding(coords)
    torch.testing.assert_close(features[mirror], features * torch.tensor([1.0] * 5 + [-1.0] * 5), rtol=0, atol=2e-6)


def test_mirror_only_where_it_saves_work():
    coords = grid_coords((6, 6))
    assert FourierFeatures(2, 0, 1.0, learn=False).mirror(coords) is None
    assert FourierFeatures(2, 5, 1.0, learn=False).mirror(coords[:9]) is None
    assert FourierFeatures(2, 5, 1.0, learn=False).mirror(coords[None]) is None
