"""Files of the user's own as functions of a model, and results in their format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vamoh.data.dataset import Domain
from vamoh.data.function import read_function, solid_as_obj
from vamoh.points import grid_coords, sphere_coords

IMAGE, VOXELS = Domain("image", (8, 9)), Domain("voxels", (6, 6, 6))
GLOBE, POINTS = Domain("sphere", (46, 90), ("K", 200.0, 320.0)), Domain("points", ())


def test_a_picture_of_another_size_covers_the_domain(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (15, 17, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[3:6, 4:9, 3] = 0  # transparent: missing
    Image.fromarray(pixels).save(tmp_path / "a.png")
    function = read_function(str(tmp_path / "a.png"), IMAGE, 2, 3)
    points = function.points
    assert function.shape == (15, 17) and points.values.shape == (1, 255, 3)
    torch.testing.assert_close(points.coords, grid_coords((8, 9), scale=2)[:, :2], rtol=0, atol=1e-6)
    seen = pixels[..., 3].reshape(-1) > 0
    assert np.array_equal(points.mask[0].numpy(), seen)
    wanted = pixels[..., :3].reshape(-1, 3)[seen] / np.float32(255)
    assert np.array_equal(points.values[0].numpy()[seen], wanted.astype(np.float32))
    assert read_function(str(tmp_path / "a.png"), IMAGE, 2, 1).points.channels == 1
    written = function.write(tmp_path / "a-x", function.on_grid(points.values))
    assert written == tmp_path / "a-x.png"
    again = np.asarray(Image.open(written))
    assert np.array_equal(again.reshape(-1, 3)[seen], pixels[..., :3].reshape(-1, 3)[seen])


def test_arrays_with_holes(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((5, 1, 2))
    values[2, 0, 1] = np.nan
    np.save(tmp_path / "a.npy", values)
    function = read_function(str(tmp_path / "a.npy"), IMAGE, 2, 2)
    assert function.points.mask.tolist() == [[True, True, False, True, True]]
    torch.testing.assert_close(function.points.coords[:, 0], torch.linspace(-1, 1, 5))
    middle = (grid_coords((8, 9))[:, 1].max() - 1) / 2
    torch.testing.assert_close(function.points.coords[:, 1], middle.expand(5))
    written = function.write(tmp_path / "b", function.on_grid(function.points.values))
    assert written is not None and np.load(written).shape == (5, 1, 2)
    solid = np.zeros((3, 4, 5), bool)
    np.save(tmp_path / "s.npy", solid)
    assert read_function(str(tmp_path / "s.npy"), VOXELS, 3, 1).shape == (3, 4, 5)


def test_a_finer_grid_holds_the_points_of_the_coarse_one(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((5, 7)))
    function = read_function(str(tmp_path / "a.npy"), IMAGE, 2, 1)
    coords, finer = function.finer(3)
    assert finer.shape == (13, 19)
    coarse = coords.view(13, 19, 2)[::3, ::3].reshape(-1, 2)
    torch.testing.assert_close(coarse, function.points.coords)


@pytest.mark.parametrize("globe", [True, False])
def test_fields_anywhere(tmp_path: Path, globe: bool) -> None:
    netcdf = pytest.importorskip("netCDF4")
    lat = np.linspace(90, -90, 7) if globe else np.array([40.0, 42.5, 45.0])
    lon = np.arange(0, 360, 30.0) if globe else np.array([10.0, 12.0, 14.0, 16.0])
    kelvin = np.random.default_rng(0).uniform(210, 310, (2, len(lat), len(lon)))
    with netcdf.Dataset(tmp_path / "f.nc", "w") as file:
        for name, axis, unit in (("lat", lat, "degrees_north"), ("lon", lon, "degrees_east")):
            file.createDimension(name, len(axis))
            variable = file.createVariable(name, "f8", (name,))
            variable[:], variable.units = axis, unit
        file.createDimension("time", 2)
        variable = file.createVariable("t", "f8", ("time", "lat", "lon"), fill_value=-1.0)
        variable.units, variable[:] = "K", kelvin
        variable[1, 2, 1] = -1.0
    function = read_function(str(tmp_path / "f.nc"), GLOBE, 3, 1)
    points, down = function.points, np.argsort(-lat)
    assert function.shape == (len(lat), len(lon)) and points.batch == 2 and int((~points.mask).sum()) == 1
    angles = torch.meshgrid(torch.from_numpy(lat[down].copy()), torch.from_numpy(lon), indexing="ij")
    torch.testing.assert_close(points.coords, sphere_coords(*angles).reshape(-1, 3).float(), rtol=0, atol=1e-6)
    wanted = ((kelvin[:, down] - 200) / 120).reshape(2, -1, 1).astype(np.float32)
    np.testing.assert_allclose(points.values[points.mask].numpy(), wanted[points.mask.numpy()], rtol=1e-6)
    coords, finer = function.finer(2)
    assert finer.shape == ((13, 24) if globe else (5, 7))
    rows, columns = finer.shape
    torch.testing.assert_close(coords.view(rows, columns, 3)[::2, ::2].reshape(-1, 3), points.coords, rtol=0, atol=1e-6)
    written = function.write(tmp_path / "g", function.on_grid(points.values))
    with netcdf.Dataset(written) as file:
        assert (file["value"].units, file["lat"].units) == ("K", "degrees_north")
        np.testing.assert_allclose(file["lat"][:], lat[down])
        np.testing.assert_allclose(file["value"][0], kelvin[0, down], rtol=1e-5)
    assert read_function(str(written), GLOBE, 3, 1).shape == function.shape
    with pytest.raises(ValueError, match="f.nc: must hold one variable in 'hPa' as the data of the run, got 'K'"):
        read_function(str(tmp_path / "f.nc"), Domain("sphere", (46, 90), ("hPa", 0.0, 1.0)), 3, 1)


def test_point_lists(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    coords, values = generator.uniform(0, 500, (9, 2)), generator.random((9, 1))
    values[4] = np.nan
    np.savez(tmp_path / "p.npz", coords=coords, values=values, mask=np.arange(9) != 2)
    function = read_function(str(tmp_path / "p.npz"), POINTS, 2, 1)
    assert function.points.mask[0].tolist() == [i not in (2, 4) for i in range(9)]
    np.testing.assert_allclose(function.points.coords, coords, rtol=1e-6)
    assert function.write(tmp_path / "q", values[None]) is None
    with pytest.raises(ValueError, match="p.npz: must hold a grid to be refined"):
        function.finer(2)


@pytest.mark.parametrize("seed", range(3))
def test_the_surface_of_a_solid_encloses_its_voxels(seed: int) -> None:
    solid = np.random.default_rng(seed).random((4, 3, 5)) < 0.5
    lines = solid_as_obj(solid).splitlines()
    vertices = np.array([line.split()[1:] for line in lines if line[0] == "v"], float)
    faces = np.array([line.split()[1:] for line in lines if line[0] == "f"], int) - 1
    a, b, c, d = (vertices[faces[:, i]] for i in range(4))
    volume = sum((p * np.cross(q, r)).sum() for p, q, r in ((a, b, c), (a, c, d))) / 6
    assert volume == pytest.approx(solid.sum())
    padded = np.pad(solid, 1).astype(int)
    assert len(faces) == sum(np.abs(np.diff(padded, axis=i)).sum() for i in range(3))


@pytest.mark.parametrize(
    ("name", "content", "domain", "sizes", "message"),
    [
        ("a.npy", np.zeros((4, 4, 2)), IMAGE, (2, 1), r"a.npy: must hold 2 axes of 1 channels, got shape \[4, 4, 2\]"),
        ("a.npy", np.full((4, 4), 1.5), IMAGE, (2, 1), "a.npy: floating values must lie in"),
        ("a.npy", np.zeros((4, 4)), GLOBE, (3, 1), "a.npy: must be a file of fields"),
        ("a.npy", np.zeros((4, 4)), POINTS, (2, 1), "a.npy: must hold coords"),
        (None, None, IMAGE, (2, 1), "gone.npy: must be a file, got nothing of that name"),
    ],
)
def test_what_does_not_fit(
    tmp_path: Path, name: str | None, content: Any, domain: Domain, sizes: tuple[int, int], message: str
) -> None:
    path = tmp_path / (name or "gone.npy")
    if name:
        np.save(path, content)
    with pytest.raises(ValueError, match=message):
        read_function(str(path), domain, *sizes)
