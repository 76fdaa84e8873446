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


@pytest.mark.parametrize("shape", [(9,), (12, 7), (5, 4, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_metric_of_a_lattice_is_the_distance_of_features(shape, dtype):
    encoding = FourierFeatures(len(shape), 16, 2.0, learn=False).to(dtype)
    coords = grid_coords(shape, dtype=torch.float64)
    places, table = encoding.metric(coords.to(dtype), None, 0)
    assert table.dtype == dtype and torch.equal(table, table.flip(0)) and table[len(table) // 2] == 0
    features = encoding.double()(coords)
    expected = ((features[:, None] - features) ** 2).sum(-1)
    result = table[len(table) // 2 + places[:, 0][:, None] - places[:, 0]].double()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-5)


def test_metric_elsewhere_is_the_features():
    encoding = FourierFeatures(2, 4, 2.0, learn=False)
    cloud = torch.rand(6, 2)
    assert encoding.metric(cloud, None, 0)[1] is None
    assert torch.equal(encoding.metric(cloud, None, 0)[0], encoding(cloud))
    fine = grid_coords((300, 300))  # more displacements than a small table has
    assert encoding.metric(fine, None, 0)[1] is None
    assert encoding.metric(fine, None, 599 * 599)[1] is not None
    raw = FourierFeatures(2, 0, 1.0, learn=False)
    assert raw.metric(fine, None, 0)[0] is fine


def test_metric_overlooks_hidden_points_and_follows_the_frequencies():
    encoding = FourierFeatures(2, 4, 2.0, learn=False)
    coords = torch.stack([grid_coords((4, 4)), grid_coords((4, 4)).flip(0)])
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 3] = False
    hidden = coords.clone()
    hidden[1, 3] = 0.123
    assert encoding.metric(hidden, None, 0)[1] is None
    places, table = encoding.metric(hidden, mask, 0)
    expected, same = encoding.metric(coords, None, 0)
    assert torch.equal(places[mask], expected[mask]) and same is table
    encoding.frequencies.mul_(2)
    assert not torch.equal(encoding.metric(coords, None, 0)[1], table)


@pytest.mark.parametrize("again", [True, False])
def test_copies_bring_what_is_known_of_the_coordinates(monkeypatch, again):
    encoding, coords = FourierFeatures(2, 4, 2.0, learn=False), grid_coords((5, 6))
    mask = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) < 0.7
    each = coords + torch.where(mask[..., None], 0, 0.01)  # what is not observed lies on no lattice
    plain = FourierFeatures(2, 4, 2.0, learn=False)
    plain.frequencies.copy_(encoding.frequencies)
    monkeypatch.setattr("vamoh.encoding.upload", lambda value, device: value.clone())
    for given, known in ((coords, None), (each, mask)):
        copies = encoding.copied(given, known, again)
        assert (encoding.copied(given.clone(), known, again)[0] is copies[0]) == again
        expected = plain.metric(given, known, 0), plain.mirror(given) if again else None
        with monkeypatch.context() as patch:
            for name in ("lattice", "antipodes"):
                patch.setattr(f"vamoh.encoding.{name}", lambda *_: pytest.fail("looked at the copy"))
            found = encoding.metric(*copies, 0), encoding.mirror(copies[0])
        for a, b in zip([*found[0], found[1]], [*expected[0], expected[1]], strict=True):
            assert a is b is None or torch.equal(a, b)
