"""The ray caster of the 3D Shapes factors."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vamoh.data import open_dataset, shapes
from vamoh.data.shapes import CAPSULE, CUBE, CYLINDER, FACTORS, SPHERE, draw

SOLIDS = {"cube": CUBE, "cylinder": CYLINDER, "sphere": SPHERE, "capsule": CAPSULE}
Array = np.ndarray[Any, Any]


def inside(shape: int, scale: float, point: Array) -> Array:
    """Whether points [m, 3] lie in the solid that stands on the floor, from its definition."""
    x, y, z = (point / scale).T
    if shape == CUBE:
        return np.asarray((abs(x) < 0.65) & (abs(y - 0.65) < 0.65) & (abs(z) < 0.65))
    if shape == CYLINDER:
        return np.asarray((np.hypot(x, z) < 0.65) & (abs(y - 0.75) < 0.75))
    if shape == SPHERE:
        return np.asarray(x * x + (y - 0.85) ** 2 + z * z < 0.85**2)
    return np.asarray(np.hypot(np.hypot(x, z), y - np.clip(y, 0.55, 1.45)) < 0.55)


@pytest.mark.parametrize("shape", SOLIDS.values(), ids=SOLIDS)
def test_rays_enter_where_marching_finds_the_solid(shape: int) -> None:
    rng = np.random.default_rng(shape)
    scale, step = 1.1, 1e-3
    origin = np.array([1.5, 2.6, 4.0])
    ray = rng.normal([0, 0.9, 0], 0.7, (300, 3)) - origin
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    distance = shapes._enter(shape, scale, origin, ray)
    along = np.arange(0, 8, step)
    for r, d in zip(ray, distance, strict=True):
        hit = inside(shape, scale, origin + along[:, None] * r)
        if hit.sum() > 2:
            assert d == pytest.approx(along[hit.argmax()], abs=2 * step)
        elif not hit.any():
            assert d == np.inf or not inside(shape, scale, origin + (d + step) * r[None]).any()
    assert 20 < np.isfinite(distance).sum() < 280


@pytest.mark.parametrize("shape", SOLIDS.values(), ids=SOLIDS)
def test_normals_point_out_of_the_solid(shape: int) -> None:
    rng = np.random.default_rng(shape)
    origin = np.array([1.5, 2.6, 4.0])
    ray = rng.normal([0, 0.9, 0], 0.4, (300, 3)) - origin
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    distance = shapes._enter(shape, 1.0, origin, ray)
    surface = (origin + distance[:, None] * ray)[np.isfinite(distance)]
    normal = shapes._normal(shape, 1.0, surface)
    np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, atol=1e-9)
    assert not inside(shape, 1.0, surface + 1e-4 * normal).any()
    assert inside(shape, 1.0, surface - 1e-2 * normal).mean() > 0.95


def test_each_hue_colours_its_own_part() -> None:
    plain = [0.0, 0.3, 0.6, 1.0, CUBE, 0.0]
    pictures = []
    for factor in range(3):
        changed = list(plain)
        changed[factor] = 0.9
        pictures.append(draw(np.array([plain, changed])))
    parts = [(a != b).any(-1) for a, b in pictures]
    floor, wall, solid = parts
    assert floor[-1].all() and not wall[-1].any()
    assert solid[34, 32] and not floor[34, 32] and not wall[34, 32]
    assert wall[10].all()
    assert not (floor | wall | solid)[0].any(), "the sky has a colour of its own"
    red, green = (np.array(colorsys.hsv_to_rgb(h, 1, 1)) for h in (0.0, 0.3))
    image = pictures[0][0]
    np.testing.assert_allclose(image[-1, 0] / image[-1, 0].max(), red, atol=0.02)
    np.testing.assert_allclose(image[10, 5] / image[10, 5].max(), green, atol=0.02)


@pytest.mark.parametrize("shape", SOLIDS.values(), ids=SOLIDS)
def test_scale_makes_the_solid_grow(shape: int) -> None:
    factors = np.array([[0.0, 0.0, hue, scale, shape, 10.0] for scale in FACTORS[3] for hue in (0.3, 0.6)])
    images = draw(factors, samples=1).reshape(8, 2, 64, 64, 3)
    area = (images[:, 0] != images[:, 1]).any(-1).sum((1, 2))
    assert (np.diff(area) > 0).all()


def test_orbit_turns_the_view() -> None:
    images = draw(np.array([[0.0, 0.3, 0.6, 1.0, CUBE, angle] for angle in FACTORS[5]]), samples=1)
    differences = [(images[0] != image).any(-1).mean() for image in images[1:]]
    assert min(differences) > 0.02
    assert differences[-1] > differences[0]


def test_samples_smooth_the_edges() -> None:
    factors = np.array([[0.0, 0.3, 0.6, 1.0, SPHERE, 0.0]])
    fine = draw(factors, size=64, samples=4)[0].astype(float)
    reference = draw(factors, size=512, samples=1)[0].reshape(64, 8, 64, 8, 3).mean((1, 3))
    rough = draw(factors, size=64, samples=1)[0].astype(float)
    assert np.abs(fine - reference).mean() < 0.5 * np.abs(rough - reference).mean()


def test_data_set_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "COUNT", 40)
    data = open_dataset("shapes3d", root=str(tmp_path))
    assert (len(data), data.kind, data.shape, data.channels, data.likelihood) == (40, "image", (64, 64), 3, "logistic")
    assert [path.name for path in tmp_path.iterdir()] == ["shapes3d-40-1.npz"]
    for column, values in zip(data.labels.T.numpy(), FACTORS, strict=True):
        assert np.isin(column, values.astype(np.float32)).all()
    assert len(data.labels.unique(dim=0)) == 40
    again = draw(data.labels[:3].double().numpy()).reshape(3, -1, 3)
    assert np.abs(data.values[:3].numpy().astype(int) - again).max() <= 1

    monkeypatch.setattr(shapes, "draw", None)
    assert torch.equal(open_dataset("shapes3d", root=str(tmp_path)).values, data.values)
