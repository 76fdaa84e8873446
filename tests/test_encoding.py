from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vamoh.encoding import FourierFeatures


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
