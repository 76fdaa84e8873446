"""What a reader could lose is read for what it is, or refused by the file's name: bits, frames, attributes, places."""

from __future__ import annotations

import io
import logging
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vamoh.data import open_dataset, source
from vamoh.points import sphere_coords, sphere_grid

Array = np.ndarray[Any, Any]


def refuse(match: str, error: type[Exception] = ValueError) -> Any:
    return pytest.raises(error, match=re.escape(match))


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(image: Array, bits: int, colour: int) -> bytes:
    """A PNG of rows of bytes [H, ...] as they are stored; Pillow writes no 16 bits of colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = image.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in image)
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


class TestImages:
    """Every folder gets two plain pictures beside the one in question, which comes first."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        for i in (1, 2):
            Image.fromarray(noise(4, 6, 3, seed=i)).save(tmp_path / f"{i}.png")
        return tmp_path / "0.png"

    def first(self, file: Path) -> Array:
        return open_dataset("images", str(file.parent)).values[0].numpy().reshape(4, 6, -1)

    @pytest.mark.parametrize("colour", [0, 2])
    def test_sixteen_bits_of_a_png(self, file: Path, colour: int) -> None:
        channels = (3,) if colour == 2 else ()
        file.write_bytes(png(noise(4, 6, *channels).astype(">u2") * 256, 16, colour))
        with refuse(f"{file}: image must have 8 bits per channel, got 16 bits"):
            self.first(file)

    @pytest.mark.parametrize(
        ("dtype", "message"),
        [
            (np.uint16, "image must have 8 bits per channel, got 16 bits"),
            (np.int32, "image must have 8 bits per channel, got 32 bits"),
            (np.float32, "image must have 8 bits per channel, got 32 bits"),
        ],
    )
    def test_wide_numbers_of_a_tiff(self, file: Path, dtype: type, message: str) -> None:
        Image.fromarray(noise(4, 6).astype(dtype)).save(file.with_suffix(".tif"))
        with refuse(f"{file.with_suffix('.tif')}: {message}"):
            self.first(file)

    def test_sixteen_bits_of_colour_in_a_tiff(self, file: Path) -> None:
        values = noise(4, 6, 3).astype("<u2") * 256
        entries = [(256, 3, 1, 6), (257, 3, 1, 4), (258, 3, 3, 8 + 200), (259, 3, 1, 1), (262, 3, 1, 2),
                   (273, 4, 1, 8 + 206), (277, 3, 1, 3), (278, 3, 1, 4), (279, 4, 1, values.nbytes)]  # fmt: skip
        table = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries) + bytes(4)
        content = b"II*\0" + struct.pack("<I", 8) + table.ljust(200, b"\0") + struct.pack("<HHH", 16, 16, 16)
        file.with_suffix(".tif").write_bytes(content + values.tobytes())
        with refuse(f"{file.with_suffix('.tif')}: image must have 8 bits per channel, got 16 bits"):
            self.first(file)

    @pytest.mark.parametrize("suffix", [".gif", ".png", ".tif", ".webp"])
    def test_several_frames(self, file: Path, suffix: str) -> None:
        frames = [Image.fromarray(noise(4, 6, 3, seed=i)) for i in range(3)]
        file = file.with_suffix(suffix)
        frames[0].save(file, save_all=True, append_images=frames[1:])
        with refuse(f"{file}: image must have one frame or page, got 3"):
            self.first(file)

    def test_a_palette_gives_its_colours(self, file: Path) -> None:
        palette, index = noise(256, 3, seed=5), noise(4, 6)
        image = Image.fromarray(index, "P")
        image.putpalette(palette.tobytes())
        for name in (file, file.with_suffix(".gif")):
            image.save(name)
            assert np.array_equal(self.first(name), palette[index])
            name.unlink()

    @pytest.mark.parametrize("bits", [1, 2, 4])
    def test_few_bits_span_the_whole_range(self, file: Path, bits: int) -> None:
        values = np.arange(24).reshape(4, 6) % 2**bits
        rows = np.stack([np.packbits(np.unpackbits(r[:, None].astype(np.uint8), axis=1)[:, -bits:]) for r in values])
        content = png(rows, bits, 0)
        head = struct.pack(">II", 6, 4)
        content = content[:16] + head + content[24:29] + struct.pack(">I", zlib.crc32(b"IHDR" + head + content[24:29]))
        file.write_bytes(content + png(rows, bits, 0)[33:])
        assert np.array_equal(self.first(file)[..., 0], values * 255 // (2**bits - 1))

    @pytest.mark.parametrize("mode", ["LA", "PA", "RGBA"])
    def test_transparency_lies_over_white(self, file: Path, mode: str) -> None:
        image = Image.fromarray(np.concatenate([noise(4, 6, 3), np.zeros((4, 6, 1), np.uint8)], -1), "RGBA")
        image.convert(mode).save(file.with_suffix(".tif") if mode == "PA" else file)
        assert (self.first(file) == 255).all()

    def test_half_transparent_colours_mix_with_white(self, file: Path) -> None:
        colour = noise(4, 6, 3)
        Image.fromarray(np.concatenate([colour, np.full((4, 6, 1), 51, np.uint8)], -1), "RGBA").save(file)
        assert np.abs(self.first(file) - (0.2 * colour + 0.8 * 255)).max() <= 1

    def test_colours_that_need_a_profile(self, file: Path) -> None:
        file = file.with_suffix(".jpg")
        Image.fromarray(noise(4, 6, 4), "CMYK").save(file)
        with refuse(f"{file}: image must be grey or red, green and blue, got CMYK, which needs a colour profile"):
            self.first(file)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_every_orientation(self, tmp_path: Path, orientation: int) -> None:
        upright = noise(5, 5, 3)
        turned = {
            1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
            6: np.rot90(upright, 1), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
        }[orientation]  # fmt: skip
        exif = Image.Exif()
        exif[0x0112] = orientation
        for i in range(3):
            Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / f"{i}.png", exif=exif)
        assert np.array_equal(open_dataset("images", str(tmp_path)).values[0].reshape(5, 5, 3), upright)

    def test_hidden_folders_are_left_out_and_links_followed(self, file: Path, tmp_path: Path) -> None:
        inside = tmp_path / "inside"
        inside.mkdir()
        for name in (file.parent / ".cache", inside):
            name.mkdir(exist_ok=True)
            Image.fromarray(noise(4, 6, 3, seed=9)).save(name / "hidden.png")
        outside = tmp_path.with_name("outside-" + tmp_path.name)
        inside.rename(outside)
        (tmp_path / "linked").symlink_to(outside)
        data = open_dataset("images", str(tmp_path))
        assert len(data) == 3
        assert np.array_equal(data.values[2].reshape(4, 6, 3), noise(4, 6, 3, seed=9))
        (outside / "loop").symlink_to(tmp_path)
        with refuse("must not lead to a folder that is read already, got"):
            open_dataset("images", str(tmp_path))

    def test_a_broken_link_is_named(self, file: Path) -> None:
        file.symlink_to("nowhere.png")
        with refuse(f"{file}: must be a readable image, got FileNotFoundError"):
            self.first(file)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
    def test_a_folder_that_cannot_be_listed(self, file: Path) -> None:
        folder = file.parent / "closed"
        folder.mkdir(mode=0)
        with refuse(f"images: cannot list {folder} (Permission denied)"):
            self.first(file)

    def test_a_header_that_claims_too_much(self, file: Path) -> None:
        content = png(noise(4, 6), 8, 0)
        head = struct.pack(">IIBBBBB", 13000, 13000, 8, 0, 0, 0, 0)
        file.write_bytes(content[:16] + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + content[33:])
        with refuse(f"{file}: must be a readable image, got ValueError: 13000x13000 pixels by its header in a file of"):
            self.first(file)

    def test_a_damaged_tiff_prints_nothing(self, file: Path, capfd: pytest.CaptureFixture[str]) -> None:
        buffer = io.BytesIO()
        Image.fromarray(noise(40, 60, 3)).save(buffer, "tiff", compression="tiff_lzw")
        content = bytearray(buffer.getvalue())
        content[200:2000] = bytes(1800)
        file.with_suffix(".tif").write_bytes(content)
        with refuse(f"{file.with_suffix('.tif')}: must be a readable image, got "):
            self.first(file)
        assert capfd.readouterr().err == ""

    @pytest.mark.parametrize("path", ["a\0b", "\udcff"])
    def test_paths_that_no_file_keeps(self, path: str) -> None:
        with refuse("open_dataset: path must be a path in UTF-8 without NUL, got"):
            open_dataset("images", path)


class TestArrays:
    values = np.random.default_rng(0).random((5, 4, 6))

    @pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "<f2", ">f2"])
    @pytest.mark.parametrize("columns", [False, True])
    @pytest.mark.parametrize("suffix", [".npy", ".npz"])
    def test_any_byte_order_and_order_of_axes(self, tmp_path: Path, dtype: str, columns: bool, suffix: str) -> None:
        stored = np.asarray(self.values, dtype, order="F" if columns else "C")
        file = tmp_path / f"a{suffix}"
        np.save(file, stored) if suffix == ".npy" else np.savez_compressed(file, stored)
        assert np.array_equal(open_dataset("arrays", str(file)).values.reshape(5, 4, 6), stored.astype("<f4"))

    @pytest.mark.parametrize(
        ("dtype", "shown"), [(np.int64, "int64"), (np.uint16, "uint16"), (np.complex64, "complex64"), ("<U1", "<U1")]
    )
    def test_other_numbers(self, tmp_path: Path, dtype: Any, shown: str) -> None:
        np.save(tmp_path / "a.npy", np.zeros((5, 4, 6), dtype))
        with refuse(f"{tmp_path}/a.npy: values must be uint8, bool or floating, got {shown}", TypeError):
            open_dataset("arrays", str(tmp_path / "a.npy"))

    def test_rounding_at_the_edge_is_tolerated_and_said_once(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        values = self.values.astype(np.float32)
        values[0, 0, 0], values[1, 1, 1] = 1.0000001, -1e-9
        np.save(tmp_path / "a.npy", values)
        with caplog.at_level(logging.WARNING):
            first, second = (open_dataset("arrays", str(tmp_path / "a.npy")) for _ in range(2))
        assert (float(first.values.max()), float(first.values.min())) == (1, 0)
        assert torch.equal(first.values, second.values)
        (record,) = caplog.records
        text = "values from -1e-09 to 1.0000001 are taken for numbers in [0, 1] that were rounded"
        assert record.message == f"{tmp_path}/a.npy: {text}"

    @pytest.mark.parametrize("value", ["1.00001", "-2e-06"])
    def test_a_number_out_of_range_is_shown_in_full(self, tmp_path: Path, value: str) -> None:
        values = self.values.astype(np.float32).round()
        values[0, 0, 0] = np.float32(value)
        np.save(tmp_path / "a.npy", values)
        with refuse(value):
            open_dataset("arrays", str(tmp_path / "a.npy"))

    @pytest.mark.parametrize(
        ("shape", "readings"),
        [
            ((5, 3, 8, 9), ["images [n, C, H, W] of 3 channels or voxels [n, D, H, W] of depth 3", "[5, 8, 9, 3]"]),
            ((5, 1, 8, 9), ["images [n, C, H, W] of 1 channels", "[5, 8, 9, 1]", "[5, 1, 8, 9, 1]"]),
            ((5, 64, 3), ["images [n, H, W] of width 3 or signals of 3 channels", "[5, 64, 3, 1]", "[5, 64, 1, 3]"]),
            ((5, 2, 8, 9, 7), ["voxels [n, C, D, H, W] of 2 channels or [n, D, H, W, C] of 7", "[5, 8, 9, 7, 2]"]),
        ],
    )
    def test_another_order_of_axes_is_asked_about(
        self, tmp_path: Path, shape: tuple[int, ...], readings: list[str]
    ) -> None:
        np.save(tmp_path / "a.npy", np.zeros(shape, np.float32))
        with refuse(f"{tmp_path}/a.npy: array of shape {list(shape)} could be ") as error:
            open_dataset("arrays", str(tmp_path / "a.npy"))
        assert all(reading in str(error.value) for reading in readings)

    @pytest.mark.parametrize("extra", [b"x", b"\x93NUMPY"])
    def test_bytes_after_the_array(self, tmp_path: Path, extra: bytes) -> None:
        np.save(tmp_path / "a.npy", self.values)
        with (tmp_path / "a.npy").open("ab") as file:
            file.write(extra)
        with refuse(
            f"{tmp_path}/a.npy: must be a readable .npy or .npz file, got ValueError: {960 + len(extra)} bytes"
        ):
            open_dataset("arrays", str(tmp_path / "a.npy"))

    def test_padding_under_a_mask_may_be_nan(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        coords, values, seen = rng.random((20, 40, 2)), rng.random((20, 40, 1)), rng.random((20, 40)) > 0.2
        coords[~seen], values[~seen] = np.nan, np.nan
        for mask in (seen, seen.astype(np.uint8), seen.astype(np.float32)):
            np.savez(tmp_path / "a.npz", coords=coords, values=values, mask=mask)
            points = open_dataset("arrays", str(tmp_path / "a.npz")).batch(torch.arange(20))
            assert np.array_equal(points.mask, seen)
            assert np.array_equal(points.values[points.mask], values[seen].astype(np.float32))
            assert np.array_equal(points.coords[points.mask], coords[seen].astype(np.float32))
            assert bool(points.coords.isfinite().all()) and not bool(points.values[~points.mask].any())

    def test_what_is_observed_must_be_a_number(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        coords, values, seen = rng.random((20, 40, 2)), rng.random((20, 40, 1)), np.ones((20, 40), bool)
        coords[3, 5], seen[:, 6] = np.nan, False
        np.savez(tmp_path / "a.npz", coords=coords, values=values, mask=seen)
        with refuse("coords must be finite, got 1 observed points with NaN or infinite ones, first at [3, 5]"):
            open_dataset("arrays", str(tmp_path / "a.npz"))
        np.savez(
            tmp_path / "a.npz", coords=np.nan_to_num(coords), values=np.where(values > 0.9, np.nan, values), mask=seen
        )
        with refuse("values must be finite"):
            open_dataset("arrays", str(tmp_path / "a.npz"))

    def test_points_that_nobody_observes_may_have_no_place(self, tmp_path: Path) -> None:
        coords = np.random.default_rng(0).random((40, 2))
        coords[7] = np.nan
        for mask in (np.arange(40) != 7, np.arange(40) != np.full((20, 1), 7)):
            np.savez(tmp_path / "a.npz", coords=coords, values=np.random.default_rng(0).random((20, 40, 1)), mask=mask)
            data = open_dataset("arrays", str(tmp_path / "a.npz"))
            assert np.array_equal(data.coords[8:], coords[8:].astype(np.float32))
            assert bool(data.coords.isfinite().all())


class TestNetcdf:
    lat, lon = np.linspace(90, -90, 7), np.arange(12) * 30.0
    packed = np.random.default_rng(0).integers(-500, 500, (4, 7, 12)).astype("i2")

    @pytest.fixture(autouse=True)
    def library(self, tmp_path: Path) -> None:
        self.netcdf = pytest.importorskip("netCDF4")
        self.path = str(tmp_path / "a.nc")

    def write(
        self,
        stored: Array,
        attributes: dict[str, Any] | None = None,
        lat: Array | None = None,
        lon: Array | None = None,
        names: tuple[str, str] = ("lat", "lon"),
        axes: tuple[dict[str, Any], dict[str, Any]] = ({}, {}),
    ) -> Any:
        with self.netcdf.Dataset(self.path, "w") as out:
            out.createDimension("time", len(stored))
            for name, values, given in zip(names, (lat, lon), axes, strict=True):
                values = (self.lat if name == names[0] else self.lon) if values is None else values
                out.createDimension(name, len(values))
                axis = out.createVariable(name, "f8", (name,))
                axis[:] = values
                axis.setncatts(given)
            fill = (attributes or {}).pop("_FillValue", None)
            variable = out.createVariable("t", stored.dtype, ("time", *names), fill_value=fill)
            variable.set_auto_maskandscale(False)
            variable.setncatts(attributes or {})
            variable[:] = stored
        return open_dataset("netcdf", self.path)

    def natural(self, data: Any) -> Array:
        _, low, high = data.units
        values = low + (high - low) * data.values[..., 0].double().numpy()
        mask = np.ones(values.shape, bool) if data.mask is None else np.broadcast_to(data.mask.numpy(), values.shape)
        return np.where(mask, values, np.nan)

    @pytest.mark.parametrize("scale", [np.int32(2), np.float32(0.25), np.float64(0.01), "0.5", "2.0f"])
    @pytest.mark.parametrize("offset", [np.int16(3), np.float64(273.15)])
    @pytest.mark.parametrize(
        "dtype", ["i2", "f4", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("f8", "i1"))]
    )
    def test_numbers_are_scaled_whatever_the_types(self, scale: Any, offset: Any, dtype: str) -> None:
        stored = (self.packed // 8).astype(dtype)
        data = self.write(stored, {"scale_factor": scale, "add_offset": offset})
        factor = float(str(scale).rstrip("f")) if isinstance(scale, str) else float(scale)
        expected = stored.astype(np.float64).reshape(4, -1) * factor + float(offset)
        np.testing.assert_allclose(self.natural(data), expected, atol=np.ptp(expected) * 1e-6)

    @pytest.mark.parametrize(
        ("attributes", "bad"),
        [
            ({"_FillValue": np.int16(7)}, [7]),
            ({"missing_value": np.float64(7)}, [7]),
            ({"missing_value": np.array([7, 9], "i2")}, [7, 9]),
            ({"_FillValue": np.int16(7), "missing_value": np.int32(9)}, [7, 9]),
            ({"missing_value": "7"}, [7]),
            ({"valid_range": np.array([-499, 400], "i2")}, [-500, *range(401, 500)]),
            ({"valid_min": np.int16(-400)}, range(-500, -400)),
            ({"valid_max": np.float64(70.0), "scale_factor": 0.25}, range(281, 500)),
        ],
    )
    def test_every_mark_of_missing_values(self, attributes: dict[str, Any], bad: Any) -> None:
        stored = self.packed.copy()
        stored[:, 2, 3], stored[:, 4, 4] = 7, 9
        data = self.write(stored, dict(attributes))
        missing = np.isin(stored, list(bad)).reshape(4, -1)
        scale = float(attributes.get("scale_factor", 1.0))
        expected = np.where(missing, np.nan, scale * stored.reshape(4, -1))
        np.testing.assert_allclose(self.natural(data), expected, atol=1e-3)

    def test_a_mark_is_rounded_like_the_data(self) -> None:
        stored = np.random.default_rng(0).random((4, 7, 12)).astype("f4")
        stored[1, 2, 3], stored[2, 3, 4] = 1e20, 0.1
        data = self.write(stored, {"missing_value": np.float64(1e20), "valid_min": np.float64(0.1)})
        missing = (stored == np.float32(1e20)) | (stored < np.float32(0.1))
        assert np.array_equal(~data.mask.numpy(), missing.reshape(4, -1))
        assert bool(data.mask[2, 3 * 12 + 4]), "the limit itself is valid"

    def test_unsigned_bytes(self) -> None:
        stored = noise(4, 7, 12)
        data = self.write(stored.view("i1"), {"_Unsigned": "true", "missing_value": np.int8(-1)})
        expected = np.where(stored == 255, np.nan, stored.astype(float)).reshape(4, -1)
        np.testing.assert_allclose(self.natural(data), expected, atol=1e-4)

    def test_what_was_never_written_is_missing(self) -> None:
        stored = self.packed.astype("f4")
        stored[1, 2, 3] = self.netcdf.default_fillvals["f4"]
        assert (~self.write(stored).mask).nonzero().tolist() == [[1, 27]]

    @pytest.mark.parametrize("name", ["scale_factor", "missing_value", "valid_min"])
    def test_an_attribute_that_is_no_number(self, name: str) -> None:
        with refuse(f"a.nc: t: {name} must hold numbers, got 'many'"):
            self.write(self.packed, {name: "many"})

    def test_an_attribute_of_too_many_numbers(self) -> None:
        with refuse("a.nc: t: valid_range must hold two numbers, got 3"):
            self.write(self.packed, {"valid_range": np.array([1, 2, 3], "i2")})
        with refuse("a.nc: t: scale_factor must be one finite number, got [1.0, 2.0]"):
            self.write(self.packed, {"scale_factor": np.array([1.0, 2.0])})

    @pytest.mark.parametrize(
        ("names", "axes"),
        [
            (("y", "x"), ({"units": "degrees_north"}, {"units": "degrees_east"})),
            (("y", "x"), ({"units": "degreeN"}, {"units": "Degree_E"})),
            (("j", "i"), ({"standard_name": "latitude"}, {"standard_name": "longitude"})),
            (("a", "b"), ({"axis": "Y", "units": "degrees"}, {"axis": "X", "units": "degrees"})),
            (("y", "x"), ({"units": "degrees"}, {"units": "degrees"})),
            (("Latitude", "Longitude"), ({}, {})),
            (("nav_lat", "nav_lon"), ({}, {})),
        ],
    )
    def test_spellings_of_latitude_and_longitude(self, names: tuple[str, str], axes: Any) -> None:
        data = self.write(self.packed, names=names, axes=axes)
        assert (data.kind, data.shape) == ("sphere", (7, 12))
        np.testing.assert_allclose(self.natural(data), self.packed.reshape(4, -1), atol=1e-3)

    @pytest.mark.parametrize(
        ("names", "axes"),
        [
            (("y", "x"), ({"units": "m"}, {"units": "m"})),
            (("y", "x"), ({}, {})),
            (("rlat", "rlon"), ({"standard_name": "grid_latitude", "units": "degrees"}, {"units": "degrees"})),
            (("lat", "lon"), ({"units": "m"}, {"units": "m"})),
        ],
    )
    def test_axes_of_another_plane(self, names: tuple[str, str], axes: Any) -> None:
        with refuse("a.nc: must hold one variable over latitude and longitude, got none"):
            self.write(self.packed, names=names, axes=axes)

    def test_radians(self) -> None:
        axes = ({"units": "radians"}, {"units": "radians"})
        data = self.write(self.packed, lat=np.radians(self.lat), lon=np.radians(self.lon), axes=axes)
        assert torch.equal(data.coords, sphere_grid((7, 12)))

    @pytest.mark.parametrize("step", [0.2, 0.6, 1.2, 3.6, 1 / 3, 0.7031250])
    @pytest.mark.parametrize("dtype", ["f4", "f8"])
    def test_longitudes_from_the_west_in_any_step(self, step: float, dtype: str) -> None:
        lon = np.arange(round(360 / step)) * step - 180
        lon = np.arange(-180, 180, step)[: len(lon)].astype(dtype)
        stored = np.random.default_rng(0).random((4, 7, len(lon))).astype("f4")
        data = self.write(stored, lon=lon)
        assert (data.kind, data.shape) == ("sphere", (7, len(lon)))
        assert torch.equal(data.coords, sphere_grid((7, len(lon))))
        first = int(np.abs(lon).argmin())
        expected = np.roll(stored, -first, -1).reshape(4, -1)
        np.testing.assert_allclose(self.natural(data), expected, atol=1e-6)

    @pytest.mark.parametrize("start", [0.0, -180.0])
    def test_a_repeated_meridian_is_dropped_if_it_agrees(self, start: float) -> None:
        closed = np.concatenate([self.packed, self.packed[..., :1]], -1)
        data = self.write(closed, lon=start + np.arange(13) * 30.0)
        assert data.shape == (7, 12)
        expected = np.roll(self.packed, 0 if start == 0 else -6, -1).reshape(4, -1)
        np.testing.assert_allclose(self.natural(data), expected, atol=1e-3)
        closed[2, 3, 12] += 1
        with refuse("a.nc: t must have one value where the meridian is repeated, got others in columns"):
            self.write(closed, lon=start + np.arange(13) * 30.0)

    @pytest.mark.parametrize(
        ("lat", "lon", "message"),
        [
            (np.full(7, 10.0), None, "lat must not repeat, got 10.0 twice"),
            (None, np.repeat(np.arange(6) * 60.0, 2), "lon must not repeat, got 0.0 twice"),
            (np.linspace(90, -91, 7), None, "lat must lie from -90 to 90 degrees, got -91.0"),
            (None, np.arange(12) * 100.0, "lon must lie from -360 to 720 degrees, got 800.0"),
            (np.full(7, np.nan), None, "lat must be finite, got 7 missing values"),
        ],
    )
    def test_wrong_places(self, lat: Array | None, lon: Array | None, message: str) -> None:
        with refuse(f"a.nc: {message}"):
            self.write(self.packed, lat=lat, lon=lon)

    @pytest.mark.parametrize(
        ("lat", "lon"),
        [
            (np.linspace(85, -85, 18), np.arange(5, 360, 10.0)),
            (np.linspace(-85, 85, 18), np.arange(-175, 180, 10.0)),
            (np.degrees(np.arcsin(np.polynomial.legendre.leggauss(16)[0])), np.arange(0, 360, 11.25)),
            (np.linspace(80, -80, 17), np.arange(0, 360, 10.0)),
        ],
    )
    def test_global_grids_without_poles_can_be_refined(self, lat: Array, lon: Array) -> None:
        stored = np.random.default_rng(0).random((4, len(lat), len(lon))).astype("f4")
        data = self.write(stored, lat=lat, lon=lon)
        assert (data.kind, data.shape) == ("sphere", stored.shape[1:])
        rows, columns = np.argsort(-lat), np.argsort(lon % 360)
        places = np.meshgrid(lat[rows], lon[columns] % 360, indexing="ij")
        expected = sphere_coords(*map(torch.from_numpy, places)).reshape(-1, 3).float()
        torch.testing.assert_close(data.coords, expected, atol=1e-6, rtol=0)
        np.testing.assert_allclose(self.natural(data), stored[:, rows][:, :, columns].reshape(4, -1), atol=1e-6)
        coords, shape = data.grid(3)
        finer = coords.reshape(*shape, 3)
        assert shape == (3 * (len(lat) - 1) + 1, 3 * len(lon))
        torch.testing.assert_close(finer[::3, ::3].reshape(-1, 3), data.coords, atol=1e-6, rtol=0)
        torch.testing.assert_close(finer.norm(dim=-1), torch.ones(shape))
        gaps = (finer - finer.roll(-1, 1)).norm(dim=-1)  # even all around, across the meridian too
        torch.testing.assert_close(gaps, gaps[:, :1].expand_as(gaps), atol=1e-5, rtol=0)

    def test_part_of_the_globe_stays_points(self) -> None:
        assert self.write(self.packed, lat=np.linspace(60, -60, 7)).kind == "points"
        assert self.write(self.packed, lon=np.arange(12) * 15.0).kind == "points"

    def test_curvilinear_axes_are_named(self) -> None:
        with self.netcdf.Dataset(self.path, "w") as out:
            for name, size in (("time", 4), ("y", 7), ("x", 12)):
                out.createDimension(name, size)
            for name, values in (("nav_lat", self.lat[:, None]), ("nav_lon", self.lon[None])):
                out.createVariable(name, "f8", ("y", "x"))[:] = np.broadcast_to(values, (7, 12))
            out.createVariable("sst", "f4", ("time", "y", "x"))[:] = self.packed
        message = "sst must lie over latitudes and longitudes of one dimension, got nav_lat(y, x), a curvilinear grid"
        for path in (self.path, f"{self.path}::sst"):
            with refuse(f"a.nc: {message}"):
                open_dataset("netcdf", path)

    def test_places_that_share_a_dimension(self) -> None:
        rng = np.random.default_rng(0)
        lat, lon, values = rng.uniform(-90, 90, 30), rng.uniform(-180, 180, 30), rng.random((4, 30))
        with self.netcdf.Dataset(self.path, "w") as out:
            for name, size in (("time", 4), ("cell", 30)):
                out.createDimension(name, size)
            for name, places in (("lat", lat), ("lon", lon)):
                out.createVariable(name, "f8", ("cell",))[:] = places
            out.createVariable("t", "f8", ("cell", "time"))[:] = values.T
        data = open_dataset("netcdf", self.path)
        assert (data.kind, len(data)) == ("points", 4)
        expected = sphere_coords(torch.from_numpy(lat), torch.from_numpy(lon)).float()
        torch.testing.assert_close(data.coords, expected)
        np.testing.assert_allclose(self.natural(data), values, atol=1e-6)

    def test_several_variables_are_channels(self) -> None:
        fields = np.random.default_rng(0).normal(0, 1, (2, 4, 7, 12))
        fields[1, 2, 3, 4] = np.nan
        with self.netcdf.Dataset(self.path, "w") as out:
            for name, size in (("time", 4), ("lat", 7), ("lon", 12)):
                out.createDimension(name, size)
            out.createVariable("lat", "f8", ("lat",))[:] = self.lat
            out.createVariable("lon", "f8", ("lon",))[:] = self.lon
            for name, values in (("t2m", 280 + 20 * fields[0]), ("u10", fields[1])):
                variable = out.createVariable(name, "f8", ("time", "lat", "lon"))
                variable.units, variable[:] = "K" if name == "t2m" else "m s-1", values
        data = open_dataset("netcdf", f"{self.path}::t2m,u10")
        assert (data.channels, data.units) == (2, ("", 0.0, 1.0))
        assert [entry[:2] for entry in data.channel_units] == [("t2m", "K"), ("u10", "m s-1")]
        assert (~data.mask).nonzero().tolist() == [[2, 3 * 12 + 4]]
        for channel, (values, (_, _, low, high)) in enumerate(
            zip((280 + 20 * fields[0], fields[1]), data.channel_units, strict=True)
        ):
            natural = low + (high - low) * data.values[..., channel].double().numpy()
            np.testing.assert_allclose(natural[data.mask], values.reshape(4, -1)[data.mask], atol=1e-4)
        with refuse("variable must be one over latitude and longitude (t2m, u10), got 't2m,v10'"):
            open_dataset("netcdf", f"{self.path}::t2m,v10")

    def test_a_classic_file_is_not_read_beyond_its_end(self, tmp_path: Path) -> None:
        with self.netcdf.Dataset(self.path, "w", format="NETCDF3_64BIT_OFFSET") as out:
            for name, values in (("lat", self.lat), ("lon", self.lon)):
                out.createDimension(name, len(values))
                out.createVariable(name, "f8", (name,))[:] = values
            out.createDimension("time", None)
            out.createVariable("t", "f4", ("time", "lat", "lon"))[:] = self.packed
        content = Path(self.path).read_bytes()
        Path(self.path).write_bytes(content[:-100])
        with refuse("a.nc: must be a readable NetCDF file, got "):
            open_dataset("netcdf", self.path)


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_arrays_of_hdf5_are_those_of_numpy(tmp_path: Path, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    netcdf = pytest.importorskip("netCDF4")
    values = (np.random.default_rng(0).random((30, 5, 6, 3)) * (255 if dtype == np.uint8 else 1)).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    with netcdf.Dataset(tmp_path / "a.h5", "w") as out:
        for name, size in zip("nhwc", values.shape, strict=True):
            out.createDimension(name, size)
        out.createVariable("labels", "i8", ("n",))[:] = np.arange(30)
        out.createGroup("deep").createVariable("images", dtype, tuple("nhwc"), zlib=True)[:] = values
    wanted = open_dataset("arrays", str(tmp_path / "a.npy"))
    for share in (10**6, 1000):
        monkeypatch.setattr(source, "memory_share", lambda share=share: share)
        for path in ("a.h5", "a.h5::deep/images"):
            data = open_dataset("arrays", str(tmp_path / path))
            assert data.fingerprint() == wanted.fingerprint()
            index = torch.tensor([29, 3, 4, 5])
            assert torch.equal(data.batch(index).values, wanted.batch(index).values)
    with refuse("a.h5: array must be one of numbers in the file (labels, deep/images), got 'images'"):
        open_dataset("arrays", str(tmp_path / "a.h5::images"))


@pytest.mark.parametrize("suffix", [".zarr", ".h5"])
def test_fields_of_zarr_and_hdf5_are_those_of_netcdf(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("zarr" if suffix == ".zarr" else "h5py")
    pytest.importorskip("netCDF4")
    fields = np.random.default_rng(0).normal(280, 20, (6, 7, 12)).round(1)
    fields[2, 3, 4] = np.nan
    coords = {"time": np.arange(6), "lat": np.linspace(90, -90, 7), "lon": np.arange(12) * 30.0 - 180}
    opened = xarray.Dataset({"t": (("time", "lat", "lon"), fields, {"units": "K"})}, coords)
    encoding = {"t": {"dtype": "i2", "scale_factor": 0.1, "add_offset": 280.0, "_FillValue": -32768}}
    path, other = str(tmp_path / f"a{suffix}"), str(tmp_path / "a.nc")
    opened.to_netcdf(other, encoding=encoding)
    if suffix == ".zarr":
        opened.to_zarr(path, encoding=encoding)
    else:
        opened.to_netcdf(path, engine="h5netcdf", encoding=encoding)
    wanted, data = open_dataset("netcdf", other), open_dataset("netcdf", path)
    assert (data.kind, data.units) == (wanted.kind, wanted.units)
    assert torch.equal(data.values, wanted.values) and torch.equal(data.mask, wanted.mask)
    assert data.fingerprint() == wanted.fingerprint()
    monkeypatch.setattr(source, "memory_share", lambda: 100)
    assert open_dataset("netcdf", path).fingerprint() == wanted.fingerprint()
