"""Figures: panels show what they should, files are pictures of a sensible size."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vamoh import figures
from vamoh.figures import Column, Look

IMAGE, SPHERE, VOXELS = Look("image", 3), Look("sphere", 3, ("K", 200.0, 320.0)), Look("voxels", 3)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def assert_drawn(path: Path) -> None:
    picture = read(path)
    assert min(picture.shape[:2]) >= 120
    assert picture.std() > 8
    # The margin is empty: nothing is cut off at the border.
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (border == 255).all()


def test_grey_and_colour_images_keep_their_values() -> None:
    grey = figures.show_values(np.array([[[0.0], [1.0]], [[0.25], [2.0]]]), IMAGE)
    assert grey[..., 0].tolist() == [[0.0, 1.0], [0.25, 1.0]]
    assert (grey == grey[..., :1]).all()
    color = np.random.default_rng(0).random((3, 4, 3))
    assert np.array_equal(figures.show_values(color, IMAGE), color)


def test_missing_points_have_their_own_colour() -> None:
    mask = np.array([[True, False]])
    panel = figures.show_values(np.zeros((1, 2, 1)), IMAGE, mask)
    assert panel[0, 0].tolist() == [0, 0, 0]
    assert panel[0, 1].tolist() == figures.MISSING.tolist()


def test_components_keep_their_colours() -> None:
    panel = figures.show_components(np.array([[0, 1, 2, 1]]), IMAGE)
    assert len(np.unique(panel.reshape(-1, 3), axis=0)) == 3
    assert np.array_equal(panel[0, 1], panel[0, 3])
    assert np.array_equal(figures.show_components(np.array([[1]]), Look("image", 9))[0, 0], panel[0, 1])


def test_spread_is_the_largest_of_the_channels() -> None:
    spread = np.array([[[0.0, 0.0], [0.1, 0.2], [0.2, 0.0]]])
    none, some, same = figures.show_spread(spread, 0.2, IMAGE)[0]
    assert none.max() < 0.05 and some.min() > 0.7 and np.array_equal(some, same)


def test_entropy_is_scaled_by_log_k() -> None:
    low, high = figures.show_entropy(np.array([[0.0, math.log(3)]]), IMAGE)[0]
    assert low.sum() < 0.05 and high.sum() > 2.5


def test_maps_have_greenwich_in_the_middle() -> None:
    values = np.full((3, 8, 1), 0.5)
    values[1, 0] = 1.0
    panel = figures.show_values(values, SPHERE)
    different = (panel != panel[0, 0]).any(-1)
    assert np.argwhere(different).tolist() == [[1, 4]]


def test_globe_shows_the_point_it_is_turned_to() -> None:
    rows, columns = 19, 36
    latitude = np.linspace(90, -90, rows)[:, None, None] + np.zeros((rows, columns, 1))
    longitude = np.arange(columns)[None, :, None] * 10.0 + np.zeros((rows, columns, 1))
    spot = ((latitude == 30) & (longitude == 340)).astype(float)
    globe = figures.show_globe(spot, SPHERE, latitude=30, longitude=-20, size=60)
    away = figures.show_globe(spot, SPHERE, latitude=-30, longitude=160, size=60)
    background = figures.show_globe(np.zeros_like(spot), SPHERE, size=60)
    assert np.abs(globe - background)[28:32, 28:32].max() > 0.1
    assert np.abs(globe - background)[:20].max() == 0
    assert np.array_equal(away, background)
    assert (globe[0, 0] == 1).all()


@pytest.mark.parametrize("scale", [1, 2])
def test_globe_follows_the_rows_and_columns_of_the_data(scale: int) -> None:
    latitude, longitude = np.arange(85.0, -90, -10), np.arange(5.0, 360, 10)
    look = replace(SPHERE, axes=(tuple(latitude), tuple(longitude)))
    rows, columns = scale * (len(latitude) - 1) + 1, scale * len(longitude)
    spot = np.zeros((rows, columns, 1))
    spot[scale * 5, scale * 34] = 1.0  # 35 N, 345 E
    globe = figures.show_globe(spot, look, latitude=35, longitude=-15, size=60)
    lit = np.argwhere(np.abs(globe - figures.show_globe(np.zeros_like(spot), look, size=60)).max(-1) > 0.1)
    np.testing.assert_allclose(lit.mean(0), 29.5, atol=0.3)


def test_voxels_are_upright_and_nearer_cells_hide_farther_ones() -> None:
    solid = np.zeros((6, 6, 6), dtype=bool)
    solid[:, :3] = True
    rows = np.argwhere((figures.render_voxels(solid, size=60) < 0.8).any(-1))[:, 0]
    assert rows.mean() > 32
    # Front (last depth) red, back blue: red covers more of the picture.
    colors = np.zeros((6, 6, 6, 3))
    colors[:3, ..., 2] = 1.0
    colors[3:, ..., 0] = 1.0
    picture = figures.render_voxels(np.ones((6, 6, 6), dtype=bool), colors=colors, size=60)
    red = (picture[..., 0] > 0.4) & (picture[..., 1] < 0.1) & (picture[..., 2] < 0.1)
    blue = (picture[..., 2] > 0.4) & (picture[..., 1] < 0.1) & (picture[..., 0] < 0.1)
    assert red.sum() > 1.5 * blue.sum() > 0


def test_one_cell_covers_its_projected_area() -> None:
    alone = np.zeros((9, 9, 9), dtype=bool)
    alone[4, 4, 4] = True
    covered = (figures.render_voxels(alone, size=180) < 0.8).any(-1)
    # A unit cube seen along direction d covers the sum of |d| over the axes.
    yaw, pitch = math.radians(35), math.radians(24)
    area = math.cos(pitch) * (math.sin(yaw) + math.cos(yaw)) + math.sin(pitch)
    # The whole grid is 9 cells wide and its height fills the picture, but for a margin of 1 %.
    height = 9 * (math.cos(pitch) + math.sin(pitch) * (math.sin(yaw) + math.cos(yaw)))
    pixel = 1.01 * height / 180
    assert covered.sum() * pixel**2 == pytest.approx(area, rel=0.12)
    assert abs(np.argwhere(covered).mean(0) - 89.5).max() < 1


def test_hidden_cells_do_not_show_what_they_hold() -> None:
    values, mask = np.random.default_rng(0).random((6, 6, 6, 1)), np.ones((6, 6, 6), dtype=bool)
    mask[:, :, 3:] = False
    other = np.where(mask[..., None], values, 1 - values)
    assert np.array_equal(figures.show_values(values, VOXELS, mask), figures.show_values(other, VOXELS, mask))
    assert not np.array_equal(figures.show_values(values, VOXELS), figures.show_values(other, VOXELS))


def test_nothing_solid_leaves_the_outline_of_the_floor() -> None:
    picture = figures.render_voxels(np.zeros((4, 5, 6), dtype=bool), size=80)
    assert picture.min() >= figures.FLOOR.min()
    assert 0.01 < (picture < 1).any(-1).mean() < 0.1
    assert np.argwhere((picture < 1).any(-1))[:, 0].min() > 30


@pytest.mark.parametrize(
    "look, shape", [(IMAGE, (9, 12)), (SPHERE, (7, 12)), pytest.param(VOXELS, (6, 6, 6), marks=pytest.mark.slow)]
)
def test_sheets_and_strips_are_drawn(tmp_path: Path, look: Look, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    values, index = rng.random((5, *shape, 1)), rng.integers(0, 3, (5, *shape))
    solid = index[0] > 0 if look.kind == "voxels" else None
    assert_drawn(figures.write_samples(tmp_path / "new" / "samples.png", values, look))
    columns = [
        Column("Input", [figures.show_values(v, look) for v in values], "values" if look.kind == "sphere" else None),
        Column("Components", [figures.show_components(i, look, solid) for i in index], "components"),
        Column("Entropy", [figures.show_entropy(v[..., 0], look) for v in values], "entropy"),
    ]
    assert_drawn(figures.write_strip(tmp_path / "strip.png", columns, look, ["20.1 dB"] * 5))


def test_losses_are_drawn_and_diverged_values_left_out(tmp_path: Path) -> None:
    names = ("elbo", "log_likelihood", "kl_z", "kl_c")
    records = [{"split": "train", "step": i, **dict.fromkeys(names, -100.0 / i)} for i in range(1, 60)]
    records += [{"split": "validation", "step": 30, "elbo": -5.0, "psnr": 20.0}]
    records += [{"split": "train", "step": 60, "elbo": math.nan}]
    assert_drawn(figures.write_losses(tmp_path / "losses.png", records))


def test_thinned_batches_are_scaled_to_all_points() -> None:
    record = {"step": 1, "points": 25, "elbo": -26.0, "log_likelihood": -20.0, "kl_z": 4.0, "kl_c": 2.0}
    scaled = figures._scaled(record, 100)
    assert (scaled["log_likelihood"], scaled["kl_z"], scaled["kl_c"]) == (-80.0, 4.0, 8.0)
    assert scaled["elbo"] == -80.0 - 4.0 - 8.0


def test_bad_calls_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"write_losses: records must hold lines with step and elbo, got 1 without"):
        figures.write_losses(tmp_path / "x.png", [{"step": 1}])
    with pytest.raises(ValueError, match=r"write_samples: samples must hold at least one function"):
        figures.write_samples(tmp_path / "x.png", np.zeros((0, 2, 2, 1)), IMAGE)
    panel = np.zeros((2, 2, 3))
    with pytest.raises(ValueError, match=r"same number of panels, at least 1, got \[1, 2\]"):
        figures.write_strip(tmp_path / "x.png", [Column("A", [panel]), Column("B", [panel] * 2)], IMAGE)
