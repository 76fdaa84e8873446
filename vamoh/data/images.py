"""Images: MNIST digits, the same digits over photographs, and folders of the user's own."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from vamoh._checks import check_positive
from vamoh.data.dataset import Dataset, grid_dataset, random_splits
from vamoh.data.files import BUNDLED_FOLDER, list_files, read_bundled

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
PHOTOGRAPHS = ("astronaut", "chelsea", "china", "coffee", "hubble", "rocket")

# What Pillow raises for files that are cut short, of another kind, or absurdly large.
_UNREADABLE = (OSError, EOFError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)


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


def image_folder(path: str, size: int | None = None) -> Dataset:
    """Images below a folder in the order of their names, one channel if all are grey, else three.

    size: cut the centred square out of every image and resize it to size x size; None takes images of one size as
    they are. Transparent parts lie over white. Splits are 80/10/10, see `random_splits`.
    Raises ValueError naming the file when one cannot be read, has 16 bits per channel, or differs in size.
    """
    where = "images"
    if size is not None:
        check_positive(where, "size", size)
    files = list_files(where, path, SUFFIXES)
    first = _read_image(files[0], size)
    images = np.empty((len(files), *first.shape), np.uint8)
    for i, file in enumerate(files):
        image = _read_image(file, size)
        if image.shape != first.shape:
            raise ValueError(
                f"{file}: image must be {first.shape[1]}x{first.shape[0]} like {files[0].name}, "
                f"got {image.shape[1]}x{image.shape[0]}; give size to crop and resize"
            )
        images[i] = image
    grey = all(np.ptp(image, axis=-1).max() == 0 for image in images)
    return grid_dataset(where, images[..., :1] if grey else images)


def _digit_splits() -> dict[str, Tensor]:
    return random_splits("digits", 10_000, validation=500, test=1000)


def _read_image(path: Path, size: int | None) -> np.ndarray[Any, Any]:
    """Read an image file as [H, W, 3] uint8."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
    except _UNREADABLE as error:
        raise ValueError(f"{path}: must be a readable image, got {type(error).__name__}: {error}") from error
    if image.mode[0] in "IF":
        raise ValueError(f"{path}: image must have 8 bits per channel, got mode {image.mode}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if size is not None:
        # Cut first: resizing a box of an image would blend in what lies outside the box.
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image)
