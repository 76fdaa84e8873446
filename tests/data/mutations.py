"""Damaged files: small valid ones of every kind that is read, and ways to damage them."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vamoh.data import open_dataset

Random = np.random.Generator
_SPECIAL = [struct.pack(f, n) for f in ("<I", ">I", "<Q", ">Q") for n in (0, 1, 2**31 - 1, 2**31, 2**32 - 1)]


def mutate(content: bytes, rng: Random) -> bytes:
    """Damage a file in one to four places: bits, bytes, numbers, lengths, or its end."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        # Most of what can go wrong is told by the first bytes.
        end = len(data) if rng.random() < 0.5 else min(len(data), 128)
        place = int(rng.integers(0, max(end, 1)))
        kind = rng.integers(0, 7)
        if kind == 0 and data:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1 and data:
            data[place] = int(rng.integers(256))
        elif kind == 2:
            special = _SPECIAL[int(rng.integers(len(_SPECIAL)))]
            data[place : place + len(special)] = special
        elif kind == 3:
            del data[place : place + int(rng.integers(1, 9))]
        elif kind == 4:
            data[place:place] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 5:
            del data[place:]
        else:
            other = int(rng.integers(0, max(len(data), 1)))
            data[place : place + 8] = data[other : other + 8]
    return bytes(data)


def _image(kind: str) -> bytes:
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    options: dict[str, Any] = {"compression": "tiff_lzw"} if kind == "tiff" else {}
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _numpy(kind: str, **arrays: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, arrays["x"])
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(buffer, **arrays)
    return buffer.getvalue()


def _binvox() -> bytes:
    return b"#binvox 1\ndim 2 3 4\ntranslate 0 0 0\nscale 1\ndata\n" + bytes([0, 5, 1, 10, 0, 9])


def _netcdf(layout: str) -> bytes:
    import netCDF4

    file = netCDF4.Dataset("m.nc", "w", format=layout, memory=1 << 16)
    for name, size in (("time", 4), ("lat", 3), ("lon", 4)):
        file.createDimension(name, size)
    file.createVariable("lat", "f4", ("lat",))[:] = [90, 0, -90]
    file.createVariable("lon", "f4", ("lon",))[:] = [0, 90, 180, 270]
    packed = {"zlib": True, "chunksizes": (2, 3, 4)} if layout == "NETCDF4" else {}
    variable = file.createVariable("t", "i2", ("time", "lat", "lon"), fill_value=-1, **packed)
    variable.scale_factor, variable.add_offset, variable.units = 0.5, 200.0, "K"
    variable[:] = 200 + np.arange(48).reshape(4, 3, 4)
    return bytes(file.close())


def _splits() -> bytes:
    return b'{"train": [0, 1, 2], "validation": [3], "test": [4]}'


def kinds() -> dict[str, tuple[str, str, Callable[[], bytes]]]:
    """Data set, suffix and a valid file, by the name of the kind."""
    rng = np.random.default_rng(0)
    grids = rng.random((5, 4, 3)).astype(np.float32)
    cloud = {"coords": rng.random((5, 7, 2)), "values": rng.random((5, 7, 1)), "mask": rng.random((5, 7)) < 0.9}
    found: dict[str, tuple[str, str, Callable[[], bytes]]] = {
        "npy": ("arrays", ".npy", lambda: _numpy("npy", x=grids)),
        "npy columns": ("arrays", ".npy", lambda: _numpy("npy", x=np.asfortranarray(grids))),
        "npz": ("arrays", ".npz", lambda: _numpy("npz", x=grids)),
        "npz packed": ("arrays", ".npz", lambda: _numpy("packed", x=grids)),
        "npz points": ("arrays", ".npz", lambda: _numpy("npz", **cloud)),
        "voxels": ("voxels", ".npy", lambda: _numpy("npy", x=np.random.default_rng(0).random((4, 3, 2, 2)) > 0.5)),
        "binvox": ("voxels", ".binvox", _binvox),
        "splits": ("splits", ".json", _splits),
        "netcdf 3": ("netcdf", ".nc", lambda: _netcdf("NETCDF3_CLASSIC")),
        "netcdf 4": ("netcdf", ".nc", lambda: _netcdf("NETCDF4")),
    }
    for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp"):
        found[kind] = ("images", f".{kind}", lambda kind=kind: _image(kind))  # type: ignore[misc]
    return found


def open_damaged(folder: Path, kind: str, content: bytes) -> str:
    """Open a data set with one damaged file: "read" if its values are right in themselves, else the error's message.

    Raises whatever is not an error of one line that names the file.
    """
    name, suffix, make = kinds()[kind]
    folder = folder / kind.replace(" ", "-")
    folder.mkdir(exist_ok=True)
    file = folder / f"damaged{suffix}"
    file.write_bytes(content)
    path = file
    if name == "images" or kind == "binvox":
        path = folder
        for other in ("whole1", "whole2"):
            (folder / f"{other}{suffix}").write_bytes(make())
    if name == "splits":
        np.save(folder / "whole.npy", np.random.default_rng(0).random((5, 4, 3)))
    try:
        if name == "splits":
            data = open_dataset("arrays", str(folder / "whole.npy"), splits=str(file))
        else:
            data = open_dataset(name, str(path))
    except (ValueError, TypeError) as error:
        text = str(error)
        others = ["whole1" + suffix, "images: path", "data must hold at least 3"]
        if "\n" in text or len(text) > 600 or not any(part in text for part in (file.name, *others)):
            raise AssertionError(f"message {text!r}") from error
        return text
    points = data.batch(data.splits["train"][:1])
    low, high = points.value_range()
    assert 0 <= low <= high <= 1
    return "read"
