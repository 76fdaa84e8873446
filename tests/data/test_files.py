"""Data of the user's own: what is read, and what is refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vamoh.data import open_dataset
from vamoh.points import sphere_coords, sphere_grid, to_grid

Array = np.ndarray[Any, Any]


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_images(folder: Path, images: dict[str, Array]) -> str:
    folder.mkdir(exist_ok=True)
    for name, image in images.items():
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return str(folder)


def refuse(match: str, error: type[Exception] = ValueError) -> Any:
    return pytest.raises(error, match=re.escape(match))


class TestImages:
    def test_colour_images_come_in_the_order_of_their_names(self, tmp_path: Path) -> None:
        images = {f"{name}.png": noise(6, 8, 3, seed=i) for i, name in enumerate(["b", "a", "sub/c", "d"])}
        data = open_dataset("images", write_images(tmp_path, images))
        assert (data.kind, data.shape, data.channels, data.likelihood) == ("image", (6, 8), 3, "logistic")
        for i, name in enumerate(["a.png", "b.png", "d.png", "sub/c.png"]):
            assert np.array_equal(data.values[i].numpy(), images[name].reshape(-1, 3))

    def test_grey_images_have_one_channel(self, tmp_path: Path) -> None:
        images = {f"{i}.png": noise(6, 8, seed=i) for i in range(3)}
        grey = np.repeat(noise(6, 8, 1, seed=9), 3, -1)
        data = open_dataset("images", write_images(tmp_path, {**images, "rgb.png": grey}))
        assert data.channels == 1
        assert np.array_equal(data.values[1, :, 0], images["1.png"].ravel())

    def test_one_colour_image_makes_all_colour(self, tmp_path: Path) -> None:
        images = {"0.png": noise(6, 8), "1.png": noise(6, 8), "2.png": noise(6, 8, 3)}
        data = open_dataset("images", write_images(tmp_path, images))
        assert np.array_equal(data.values[0], np.repeat(images["0.png"].reshape(-1, 1), 3, 1))

    def test_size_cuts_the_centred_square(self, tmp_path: Path) -> None:
        wide = np.zeros((10, 30, 3), np.uint8)
        wide[:, 10:20] = [200, 100, 50]
        data = open_dataset("images", write_images(tmp_path, {f"{i}.png": wide for i in range(3)}), size=5)
        assert data.shape == (5, 5)
        assert (data.values == torch.tensor([200, 100, 50], dtype=torch.uint8)).all()

    def test_sizes_are_resized_to_one(self, tmp_path: Path) -> None:
        images = {f"{n}.png": np.full((n, n + 3, 3), n, np.uint8) for n in (4, 9, 20)}
        data = open_dataset("images", write_images(tmp_path, images), size=8)
        assert data.values[:, 0, 0].tolist() == [20, 4, 9]

    def test_transparent_parts_are_white(self, tmp_path: Path) -> None:
        images = {f"{i}.png": np.zeros((4, 4, 4), np.uint8) for i in range(3)}
        assert (open_dataset("images", write_images(tmp_path, images)).values == 255).all()

    def test_stored_rotation_is_applied(self, tmp_path: Path) -> None:
        image = Image.fromarray(np.zeros((4, 8, 3), np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6
        for i in range(3):
            image.save(tmp_path / f"{i}.jpg", exif=exif)
        assert open_dataset("images", str(tmp_path)).shape == (8, 4)

    def test_different_sizes(self, tmp_path: Path) -> None:
        path = write_images(tmp_path, {"a.png": noise(4, 4), "b.png": noise(4, 5), "c.png": noise(4, 4)})
        with refuse(f"{tmp_path}/b.png: image must be 4x4 like a.png, got 5x4; give size to crop and resize"):
            open_dataset("images", path)

    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".gif", ".tif", ".webp"])
    def test_truncated_file(self, tmp_path: Path, suffix: str) -> None:
        path = write_images(tmp_path, {f"{i}{suffix}": noise(32, 32, 3) for i in range(3)})
        file = tmp_path / f"1{suffix}"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with refuse(f"{file}: must be a readable image, got "):
            open_dataset("images", path)

    def test_no_image(self, tmp_path: Path) -> None:
        path = write_images(tmp_path, {f"{i}.png": noise(4, 4) for i in range(3)})
        (tmp_path / "2.png").write_text("hello")
        with refuse(f"{tmp_path}/2.png: must be a readable image, got UnidentifiedImageError"):
            open_dataset("images", path)

    def test_sixteen_bits(self, tmp_path: Path) -> None:
        path = write_images(tmp_path, {f"{i}.png": noise(4, 4).astype(np.uint16) for i in range(3)})
        with refuse(f"{tmp_path}/0.png: image must have 8 bits per channel, got 16 bits"):
            open_dataset("images", path)

    def test_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / ".hidden.png").write_text("")
        with refuse("images: path must hold .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp files, got none below"):
            open_dataset("images", str(tmp_path))

    def test_no_folder(self, tmp_path: Path) -> None:
        with refuse("images: path must be a file or folder, got"):
            open_dataset("images", str(tmp_path / "nowhere"))

    def test_too_few(self, tmp_path: Path) -> None:
        path = write_images(tmp_path, {f"{i}.png": noise(4, 4) for i in range(2)})
        with refuse(f"{path}: data must hold at least 3 functions, one for each split, got 2"):
            open_dataset("images", path)


class TestArrays:
    @pytest.mark.parametrize(
        ("shape", "kind", "grid", "channels"),
        [
            ((5, 6, 7), "image", (6, 7), 1),
            ((5, 6, 7, 3), "image", (6, 7), 3),
            ((5, 6, 7, 8), "voxels", (6, 7, 8), 1),
            ((5, 6, 7, 3, 2), "voxels", (6, 7, 3), 2),
        ],
    )
    @pytest.mark.parametrize("suffix", [".npy", ".npz"])
    def test_shapes(
        self, tmp_path: Path, shape: tuple[int, ...], kind: str, grid: tuple[int, ...], channels: int, suffix: str
    ) -> None:
        array, file = noise(*shape), tmp_path / f"a{suffix}"
        if suffix == ".npy":
            np.save(file, array)
        else:
            np.savez(file, x=array)
        data = open_dataset("arrays", str(file))
        assert (data.kind, data.shape, data.channels) == (kind, grid, channels)
        assert data.likelihood == ("bernoulli" if kind == "voxels" else "logistic")
        channels_first = np.moveaxis(array.reshape(5, *grid, channels), -1, 1) / np.float32(255)
        np.testing.assert_allclose(to_grid(data.batch(torch.arange(5)).values, grid), channels_first, atol=1e-7)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.bool_])
    def test_dtypes(self, tmp_path: Path, dtype: type) -> None:
        array = (noise(4, 5, 6) / 255).round().astype(dtype)
        np.save(tmp_path / "a.npy", array)
        values = open_dataset("arrays", str(tmp_path / "a.npy")).batch(torch.arange(4)).values
        assert np.array_equal(values, array.reshape(4, 30, 1).astype(np.float32))

    @pytest.mark.parametrize(
        ("array", "error", "message"),
        [
            (np.zeros((5, 6)), ValueError, "array must have shape [n, H, W], [n, H, W, C]"),
            (np.zeros((5, 0, 6)), ValueError, "got [5, 0, 6]"),
            (np.full((5, 6, 6), np.nan), ValueError, "values must be finite, got 180 NaN or infinite ones"),
            (np.full((5, 6, 6), 1.5), ValueError, "floating values must lie in [0, 1], got 1.5 to 1.5"),
            (np.full((5, 6, 6), -0.5), ValueError, "floating values must lie in [0, 1], got -0.5 to -0.5"),
            (np.zeros((5, 6, 6), np.int64), TypeError, "values must be uint8, bool or floating, got int64"),
            (np.ones((5, 6, 6), np.uint8), ValueError, "uint8 values must use the range 0 to 255, got at most 1"),
            (np.zeros((2, 6, 6)), ValueError, "at least 3 functions"),
        ],
    )
    def test_wrong_array(self, tmp_path: Path, array: Array, error: type[Exception], message: str) -> None:
        np.save(tmp_path / "a.npy", array)
        with refuse(message, error):
            open_dataset("arrays", str(tmp_path / "a.npy"))

    @pytest.mark.parametrize("suffix", [".npy", ".npz"])
    @pytest.mark.parametrize("keep", [0, 5, 100, -20])
    def test_truncated_file(self, tmp_path: Path, suffix: str, keep: int) -> None:
        file = tmp_path / f"a{suffix}"
        with file.open("wb") as opened:
            np.save(opened, noise(5, 6, 7)) if suffix == ".npy" else np.savez(opened, noise(5, 6, 7))
        file.write_bytes(file.read_bytes()[:keep])
        with refuse(f"{file}: must be a readable .npy or .npz file, got "):
            open_dataset("arrays", str(file))

    def test_pickles_are_not_opened(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
        with refuse(f"{tmp_path}/a.npy: must be a readable .npy or .npz file"):
            open_dataset("arrays", str(tmp_path / "a.npy"))

    def test_several_arrays(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=noise(5, 6, 7), y=noise(5))
        with refuse("must hold one array, or coords, values and maybe mask, got x, y"):
            open_dataset("arrays", str(tmp_path / "a.npz"))

    @pytest.mark.parametrize("own", [False, True])
    def test_points(self, tmp_path: Path, own: bool) -> None:
        rng = np.random.default_rng(0)
        coords, values = rng.normal(size=(4, 9, 2) if own else (9, 2)), rng.random((4, 9, 3))
        mask = rng.random((4, 9)) < 0.5
        np.savez(tmp_path / "a.npz", coords=coords, values=values, mask=mask)
        data = open_dataset("arrays", str(tmp_path / "a.npz"))
        points = data.batch(torch.tensor([2, 0]))
        assert (data.kind, data.shape, data.coord_dim, data.channels) == ("points", (), 2, 3)
        np.testing.assert_allclose(points.coords, coords[[2, 0]] if own else coords, rtol=1e-6)
        np.testing.assert_allclose(points.values, values[[2, 0]], rtol=1e-6)
        assert np.array_equal(points.mask, mask[[2, 0]])

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"coords": np.zeros(9)}, ValueError, "coords must be numbers of shape [N, D] or [n, N, D], got float64"),
            ({"coords": np.full((9, 2), np.inf)}, ValueError, "coords must be finite"),
            ({"coords": np.zeros((8, 2))}, ValueError, "coords must have shape"),
            ({"coords": np.full((9, 2), "a")}, ValueError, "coords must be numbers"),
            ({"values": np.zeros((4, 9))}, ValueError, "values must have shape [n, N, C] with no size 0, got [4, 9]"),
            ({"values": np.full((4, 9, 1), 2.0)}, ValueError, "floating values must lie in [0, 1]"),
            ({"mask": np.full((4, 9), 0.5)}, ValueError, "mask must be bool, or numbers that are 0 or 1, got 0.5"),
            ({"mask": np.full(9, "1")}, TypeError, "mask must be bool, or numbers that are 0 or 1, got <U1"),
            ({"mask": np.zeros((4, 9))}, ValueError, "a point, got none in function 0"),
            ({"mask": np.zeros(8, bool)}, ValueError, "mask must have shape [9] or [4, 9], got [8]"),
            ({"mask": np.zeros((4, 9, 1), bool)}, ValueError, "mask must have shape [9] or [4, 9], got [4, 9, 1]"),
        ],
    )
    def test_wrong_points(self, tmp_path: Path, change: dict[str, Array], error: type[Exception], message: str) -> None:
        arrays = {"coords": np.zeros((9, 2)), "values": np.zeros((4, 9, 1))}
        np.savez(tmp_path / "a.npz", **{**arrays, **change})
        with refuse(message, error):
            open_dataset("arrays", str(tmp_path / "a.npz"))


def write_binvox(file: Path, grid: Array) -> None:
    """Write [x, y, z] bool in the order of the format: x slowest, then z, y fastest; one run per voxel."""
    x, y, z = grid.shape
    data = bytes(b for i in range(x) for k in range(z) for j in range(y) for b in (int(grid[i, j, k]), 1))
    header = f"#binvox 1\ndim {x} {z} {y}\ntranslate 0 0 0\nscale 1\ndata\n"
    file.write_bytes(header.encode() + data)


class TestVoxels:
    grids = np.random.default_rng(0).random((4, 3, 5, 6)) < 0.3

    def check(self, path: Path) -> None:
        data = open_dataset("voxels", str(path))
        assert (data.kind, data.shape, data.channels, data.likelihood) == ("voxels", (3, 5, 6), 1, "bernoulli")
        values = data.batch(torch.arange(4)).values
        assert np.array_equal(values.reshape(4, 3, 5, 6), self.grids.astype(np.float32))

    @pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.float32])
    def test_stack_in_one_file(self, tmp_path: Path, dtype: type) -> None:
        np.save(tmp_path / "all.npy", self.grids.astype(dtype))
        self.check(tmp_path / "all.npy")
        self.check(tmp_path)

    def test_folder_of_all_formats(self, tmp_path: Path) -> None:
        np.save(tmp_path / "0.npy", self.grids[0])
        np.savez(tmp_path / "1.npz", self.grids[1])
        write_binvox(tmp_path / "2.binvox", self.grids[2])
        write_binvox(tmp_path / "3.BINVOX", self.grids[3])
        self.check(tmp_path)

    def test_binvox_runs(self, tmp_path: Path) -> None:
        header = b"#binvox 1\ndim 2 3 4\ntranslate 0 0 0\nscale 1\ndata\n"
        for i in range(3):
            (tmp_path / f"{i}.binvox").write_bytes(header + bytes([0, 5, 1, 10, 0, 9]))
        data = open_dataset("voxels", str(tmp_path))
        assert data.shape == (2, 4, 3)
        flat = np.zeros(24)
        flat[5:15] = 1
        expected = flat.reshape(2, 3, 4).swapaxes(1, 2)
        assert np.array_equal(data.batch(torch.tensor([0])).values.reshape(2, 4, 3), expected)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"#binvox 1\ndim 2 2 2\n",
            b"#binvox 1\ndata\n\0\10",
            b"#binvox 1\ndim 2 2 2\ndata\n\0\7",
            b"#binvox 1\ndim 2 2 2\ndata\n\0\10\1",
            b"#binvox 1\ndim 2 two 2\ndata\n\0\10",
            b"#other 1\ndim 2 2 2\ndata\n\0\10",
        ],
    )
    def test_malformed_binvox(self, tmp_path: Path, content: bytes) -> None:
        for i in range(3):
            write_binvox(tmp_path / f"{i}.binvox", self.grids[i])
        (tmp_path / "1.binvox").write_bytes(content)
        with refuse(f"{tmp_path}/1.binvox: must be a readable .binvox file, got "):
            open_dataset("voxels", str(tmp_path))

    @pytest.mark.parametrize(
        ("grid", "message"),
        [
            (np.zeros((3, 5, 7), bool), "1.npy: grid must be [3, 5, 6] like 0.npy, got [3, 5, 7]"),
            (
                np.zeros((4, 3, 5, 6), bool),
                "1.npy: each of several files must hold one grid [D, H, W], got [4, 3, 5, 6]",
            ),
            (np.full((3, 5, 6), 255), "1.npy: voxels must be bool or numbers that are 0 or 1"),
            (np.full((3, 5, 6), np.nan), "1.npy: voxels must be bool or numbers that are 0 or 1"),
        ],
    )
    def test_wrong_grid(self, tmp_path: Path, grid: Array, message: str) -> None:
        for i in range(3):
            np.save(tmp_path / f"{i}.npy", grid if i == 1 else self.grids[i])
        with refuse(message):
            open_dataset("voxels", str(tmp_path))

    def test_single_grid(self, tmp_path: Path) -> None:
        np.save(tmp_path / "0.npy", self.grids[0])
        with refuse("a single file must hold grids [n, D, H, W], got shape [3, 5, 6]"):
            open_dataset("voxels", str(tmp_path / "0.npy"))


class TestNetcdf:
    lat, lon = np.linspace(90, -90, 7), np.arange(12) * 30.0
    fields = np.random.default_rng(0).normal(280, 20, (4, 7, 12))

    @pytest.fixture(autouse=True)
    def library(self) -> None:
        self.netcdf = pytest.importorskip("netCDF4")

    def write(
        self,
        file: Path,
        fields: Array,
        lat: Array,
        lon: Array,
        dims: tuple[str, ...] = ("time", "lat", "lon"),
        names: tuple[str, ...] = ("t",),
        layout: str = "NETCDF4",
    ) -> str:
        with self.netcdf.Dataset(file, "w", format=layout) as out:
            for dim, size in zip(dims, fields.shape, strict=True):
                out.createDimension(dim, size)
            for name, values in (("lat", lat), ("lon", lon)):
                out.createVariable(name, "f8", (name,))[:] = values
            for name in names:
                variable = out.createVariable(name, "f8", dims, fill_value=-999.0)
                variable.units = "K"
                variable[:] = fields
        return str(file)

    def natural(self, data: Any) -> Array:
        _, low, high = data.units
        return low + (high - low) * data.values[..., 0].double().numpy()

    @pytest.mark.parametrize("layout", ["NETCDF4", "NETCDF3_CLASSIC"])
    def test_global_grid(self, tmp_path: Path, layout: str) -> None:
        data = open_dataset("netcdf", self.write(tmp_path / "a.nc", self.fields, self.lat, self.lon, layout=layout))
        assert (data.kind, data.shape, data.likelihood, data.mask) == ("sphere", (7, 12), "continuous_bernoulli", None)
        assert data.units == ("K", self.fields.min(), self.fields.max())
        assert torch.equal(data.coords, sphere_grid((7, 12)))
        np.testing.assert_allclose(self.natural(data), self.fields.reshape(4, -1), atol=1e-4)

    def test_any_order_of_rows_columns_and_dimensions(self, tmp_path: Path) -> None:
        west = np.roll((self.lon + 180) % 360 - 180, 6)
        fields = np.roll(self.fields, 6, -1)[:, ::-1].transpose(2, 0, 1)
        path = self.write(tmp_path / "a.nc", fields, self.lat[::-1], west, dims=("lon", "time", "lat"))
        data = open_dataset("netcdf", path)
        assert (data.kind, data.shape) == ("sphere", (7, 12))
        np.testing.assert_allclose(self.natural(data), self.fields.reshape(4, -1), atol=1e-4)

    def test_other_dimensions_count_functions(self, tmp_path: Path) -> None:
        fields = np.random.default_rng(1).random((2, 3, 7, 12))
        path = self.write(tmp_path / "a.nc", fields, self.lat, self.lon, dims=("level", "time", "lat", "lon"))
        np.testing.assert_allclose(self.natural(open_dataset("netcdf", path)), fields.reshape(6, -1), atol=1e-6)

    def test_closing_meridian_is_dropped(self, tmp_path: Path) -> None:
        fields = np.concatenate([self.fields, self.fields[..., :1]], -1)
        data = open_dataset("netcdf", self.write(tmp_path / "a.nc", fields, self.lat, np.arange(13) * 30.0))
        assert data.shape == (7, 12)

    def test_region_becomes_points(self, tmp_path: Path) -> None:
        lat, lon = np.linspace(40, 60, 7), np.linspace(-10, 12, 12)
        data = open_dataset("netcdf", self.write(tmp_path / "a.nc", self.fields, lat, lon))
        assert (data.kind, data.shape) == ("points", ())
        where = {}
        for i, y in enumerate(lat):
            for j, x in enumerate(lon):
                where[i, j] = sphere_coords(torch.tensor(y), torch.tensor(x)).float()
        for (i, j), place in where.items():
            nearest = (data.coords - place).norm(dim=1).argmin()
            torch.testing.assert_close(data.coords[nearest], place, atol=1e-6, rtol=0)
            np.testing.assert_allclose(self.natural(data)[:, nearest], self.fields[:, i, j], atol=1e-4)

    def test_missing_everywhere_is_a_shared_mask(self, tmp_path: Path) -> None:
        fields = self.fields.copy()
        fields[:, 2, 3] = -999
        data = open_dataset("netcdf", self.write(tmp_path / "a.nc", fields, self.lat, self.lon))
        assert data.mask.shape == (84,)
        assert (~data.mask).nonzero().tolist() == [[27]]
        assert data.units[1] > 0
        assert (data.batch(torch.arange(4)).values[:, 27] == 0).all()

    def test_missing_in_some_is_a_mask_of_its_own(self, tmp_path: Path) -> None:
        fields = self.fields.copy()
        fields[1, 2, 3] = np.nan
        data = open_dataset("netcdf", self.write(tmp_path / "a.nc", fields, self.lat, self.lon))
        assert data.mask.shape == (4, 84)
        assert (~data.mask).nonzero().tolist() == [[1, 27]]

    def test_variable_is_chosen(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.nc", self.fields, self.lat, self.lon, names=("t", "u"))
        with refuse(f"{path}: must hold one variable over latitude and longitude, got t, u; choose FILE::VARIABLE"):
            open_dataset("netcdf", path)
        assert len(open_dataset("netcdf", f"{path}::u")) == 4
        with refuse(f"{path}: variable must be one over latitude and longitude (t, u), got 'v'"):
            open_dataset("netcdf", f"{path}::v")

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (np.inf, "fields must be finite, got 84 infinite values"),
            (-999.0, "every field must hold a value, got none in field 2"),
        ],
    )
    def test_wrong_values(self, tmp_path: Path, value: float, message: str) -> None:
        fields = self.fields.copy()
        fields[2] = value
        with refuse(message):
            open_dataset("netcdf", self.write(tmp_path / "a.nc", fields, self.lat, self.lon))

    def test_constant_values(self, tmp_path: Path) -> None:
        with refuse("fields must vary, got 3.0 everywhere"):
            open_dataset("netcdf", self.write(tmp_path / "a.nc", np.full((4, 7, 12), 3.0), self.lat, self.lon))

    def test_no_field(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.nc", self.fields, self.lat, self.lon, names=())
        with refuse("must hold one variable over latitude and longitude, got none"):
            open_dataset("netcdf", path)

    @pytest.mark.parametrize("layout", ["NETCDF4", "NETCDF3_CLASSIC"])
    def test_truncated_file(self, tmp_path: Path, layout: str) -> None:
        path = self.write(tmp_path / "a.nc", self.fields, self.lat, self.lon, layout=layout)
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) // 2])
        with refuse(f"{path}: must be a readable NetCDF file, got "):
            open_dataset("netcdf", path)

    def test_no_file(self, tmp_path: Path) -> None:
        with refuse("must be a readable NetCDF file, got FileNotFoundError"):
            open_dataset("netcdf", str(tmp_path / "a.nc"))


def test_missing_netcdf_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "netCDF4", None)
    with refuse('pip install "vamoh[netcdf]"', ImportError):
        open_dataset("netcdf", "a.nc")
