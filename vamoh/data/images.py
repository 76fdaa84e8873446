"""Images: MNIST digits, the same digits over photographs, and folders of the user's own."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vamoh._checks import check_positive
from vamoh.data import source as sources
from vamoh.data.dataset import SPLITS, Dataset, grid_dataset, on_grid, random_splits
from vamoh.data.files import BUNDLED_FOLDER, Array, list_files, read_bundled, reading
from vamoh.data.source import Source

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
PHOTOGRAPHS = ("astronaut", "chelsea", "china", "coffee", "hubble", "rocket")

_SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
_MOST_PACKED, _SMALL = 5000, 1 << 24
"""Bytes of pixels that one byte of a file may stand for, and what any file may take."""
_WORKERS = min(8, os.cpu_count() or 1)


def digits() -> Dataset:
    """10 000 MNIST digits, 28x28, one channel; labels [n] are the digits.

    Splits of `numpy.random.default_rng(0).permutation(10000)`: 8500 train, 500 validation, 1000 test.
    """
    file = read_bundled("mnist10k.npz")
    return grid_dataset("digits", file["x"][..., None], _digit_splits(), file["y"])


def polymnist() -> Dataset:
    """The digits over random patches of photographs, 28x28, three channels; labels and splits as in `digits`.

    Each image takes a patch of one photograph drawn at random and inverts it where the digit exceeds 127.
    """
    file = read_bundled("mnist10k.npz")
    photographs = [np.asarray(Image.open(BUNDLED_FOLDER / f"photo_{name}.png")) for name in PHOTOGRAPHS]
    count, *size = file["x"].shape
    rng = np.random.default_rng(0)
    family = rng.integers(len(photographs), size=count)
    place = rng.random((count, 2))
    images = np.empty((count, *size, 3), np.uint8)
    for i, photograph in enumerate(photographs):
        patches = np.lib.stride_tricks.sliding_window_view(photograph, size, axis=(0, 1))
        chosen = np.flatnonzero(family == i)
        row, column = (place[chosen] * patches.shape[:2]).astype(np.int64).T
        images[chosen] = np.moveaxis(patches[row, column], 1, -1)
    ink = file["x"] > 127
    images[ink] = 255 - images[ink]
    return grid_dataset("polymnist", images, _digit_splits(), file["y"])


def image_folder(path: str, size: int | None = None) -> tuple[Dataset, list[str]]:
    """Images below a folder in the order of their names, one channel if all are grey, else three; and these names.

    size: cut the centred square out of every image and resize it to size x size; None takes images of one size as
    they are. Transparent parts lie over white. Images that would take more than `memory_share` together are decoded
    batch by batch. Where the folder holds nothing but the folders train, val (or valid, validation) and test, or two of
    them with train, these are the splits; else they are 80/10/10, see `random_splits`.
    Raises ValueError naming the file when one cannot be read, has more than one frame, other than 8 bits per channel or
    colours that need a profile, or differs in size.
    """
    where = "images"
    if size is not None:
        check_positive(where, "size", size)
    files = list_files(where, path, SUFFIXES)
    start = Path(path).expanduser()
    names = [file.relative_to(start).as_posix() if file != start else file.name for file in files]
    splits = _folder_splits(path, names)
    if splits is None:
        splits = random_splits(path, len(files))
    first = _read_image(files[0], size)
    if len(files) * first.nbytes <= sources.memory_share():
        images = _load(files, first.shape, size)
        values: Tensor | Source = torch.from_numpy(images).flatten(1, 2)
    else:
        values = _Images(files, first.shape, size)
    return on_grid(where, first.shape[:2], values, splits=splits), names


def _folder_splits(path: str, names: list[str]) -> dict[str, Tensor] | None:
    """Splits by the folders train, validation and test that hold all the files; None where there are none."""
    tops = [name.split("/")[0] if "/" in name else "" for name in names]
    parts = [_SPLIT_FOLDERS.get(top.lower()) for top in tops]
    if "train" not in parts or not {"validation", "test"} & set(parts):
        return None
    for name, part in zip(names, parts, strict=True):
        if part is None:
            raise ValueError(
                f"images: {path!r} must hold no images beside the folders train, validation and test, got {name}; a "
                "file of splits may name which ones to use"
            )
    for split in SPLITS:
        several = sorted({top for top, part in zip(tops, parts, strict=True) if part == split})
        if len(several) > 1:
            raise ValueError(f"images: {path!r} must have one folder for {split}, got {', '.join(several)}")
    return {
        split: torch.tensor([i for i, part in enumerate(parts) if part == split], dtype=torch.int64) for split in SPLITS
    }


def _decode(files: Sequence[Path], like: Path, shape: tuple[int, ...], size: int | None) -> Iterator[Array]:
    """Images [H, W, 3] of the files in order, some decoded at a time, side by side."""
    with ThreadPoolExecutor(_WORKERS) as pool:
        for start in range(0, len(files), 4 * _WORKERS):
            part = files[start : start + 4 * _WORKERS]
            for file, image in zip(part, pool.map(lambda file: _read_image(file, size), part), strict=True):
                if image.shape != shape:
                    raise ValueError(
                        f"{file}: image must be {shape[1]}x{shape[0]} like {like.name}, "
                        f"got {image.shape[1]}x{image.shape[0]}; give size to crop and resize"
                    )
                yield image


def _load(files: list[Path], shape: tuple[int, ...], size: int | None) -> Array:
    """All images [n, H, W, 1] if they are grey, else [n, H, W, 3]."""
    images = np.empty((len(files), *shape[:2], 1), np.uint8)
    for i, image in enumerate(_decode(files, files[0], shape, size)):
        if images.shape[-1] == 1 and not _is_grey(image):
            coloured = np.empty((len(files), *shape), np.uint8)
            coloured[:i] = images[:i]
            images = coloured
        images[i] = image[..., : images.shape[-1]]
    return images


def _is_grey(image: Array) -> bool:
    return bool((image[..., :1] == image[..., 1:]).all())


class _Images(Source):
    """Images that are decoded when they are asked for; as many as fit memory are then kept."""

    def __init__(self, files: list[Path], shape: tuple[int, ...], size: int | None) -> None:
        self._files, self._image, self._size = files, shape, size
        self._kept: dict[int, Array] = {}
        grey = all(_is_grey(image) for image in _decode(files, files[0], shape, size))
        super().__init__((len(files), shape[0] * shape[1], 1 if grey else 3), torch.uint8)
        self._room = sources.memory_share() // (self.shape[1] * self.shape[2])
        self.survey()

    def read(self, index: Array) -> tuple[Array, None]:
        """Values of the images `index`."""
        values = np.empty((len(index), *self.shape[1:]), np.uint8)
        absent = [i for i in range(len(index)) if int(index[i]) not in self._kept]
        files = [self._files[int(index[i])] for i in absent]
        for i, image in zip(absent, _decode(files, self._files[0], self._image, self._size), strict=True):
            flat = image.reshape(self.shape[1], 3)[:, : self.shape[2]]
            if self.shape[2] == 1 and not _is_grey(image):
                raise ValueError(
                    f"{self._files[int(index[i])]}: image must be grey, as it was when the data were opened"
                )
            values[i] = flat
            if len(self._kept) < self._room:
                self._kept[int(index[i])] = flat.copy()
        for i in range(len(index)):
            if i not in absent:
                values[i] = self._kept[int(index[i])]
        return values, None


def _digit_splits() -> dict[str, Tensor]:
    return random_splits("digits", 10_000, validation=500, test=1000)


def _read_image(path: Path, size: int | None) -> Array:
    """Read an image file as [H, W, 3] uint8."""
    _silence_readers()
    with reading(path, "image"), Image.open(path) as opened:
        claimed, held = 4 * opened.width * opened.height, path.stat().st_size
        if claimed > _MOST_PACKED * held + _SMALL:
            raise ValueError(f"{opened.width}x{opened.height} pixels by its header in a file of {held} bytes")
        problem = _unread(opened, path)
        image = None if problem else ImageOps.exif_transpose(opened)
        if image is not None:
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    if image is None:
        raise ValueError(f"{path}: image must {problem}")
    if size is not None:
        # Cut first: resizing a box of an image would blend in what lies outside the box.
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image)


def read_picture(path: Path, grey: bool) -> tuple[Array, Array | None]:
    """An image file as [H, W, 3] uint8, or [H, W, 1] if grey, and where it is not transparent [H, W]; None: nowhere."""
    rgb = _read_image(path, None)
    values = np.asarray(Image.fromarray(rgb).convert("L"))[..., None] if grey else rgb
    with reading(path, "image"), Image.open(path) as opened:
        if not opened.has_transparency_data:
            return values, None
        alpha = ImageOps.exif_transpose(opened).convert("RGBA").getchannel("A")
    return values, np.asarray(alpha) > 0


def _unread(image: Image.Image, path: Path) -> str:
    """What an image must be that it is not, because it would lose something as 8 bits of red, green and blue."""
    bits, signed = _bits(image, path)
    if image.mode[0] in "IF" or bits > 8:
        return f"have 8 bits per channel, got {f'{bits} bits' if bits > 8 else f'mode {image.mode}'}"
    if signed:
        return "hold unsigned numbers, got signed or floating ones"
    if image.mode in ("CMYK", "LAB", "HSV"):
        return f"be grey or red, green and blue, got {image.mode}, which needs a colour profile"
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # of a camera's, the first picture is the photograph
        return f"have one frame or page, got {frames}"
    return ""


def _bits(image: Image.Image, path: Path) -> tuple[int, bool]:
    """Bits per channel of the file, and whether its numbers are signed or floating; Pillow reduces some to 8."""
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24], False
    tags: Any = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None:
        return 8, False
    bits, formats = tags.get(258, (1,)), tags.get(339, (1,))
    return max(np.ravel(bits).tolist()), bool(set(np.ravel(formats).tolist()) - {1, 4})


@functools.cache
def _silence_readers() -> None:
    """Damage comes as an exception; libtiff also prints it, and Pillow warns of metadata that nothing is taken from."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        with contextlib.suppress(OSError, AttributeError):
            library: Any = Image
            setter = getattr(ctypes.CDLL(library.core.__file__), name)
            setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
            setter(None)
