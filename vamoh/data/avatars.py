"""Cartoon faces drawn from seeds; needs the optional packages of `vamoh[avatars]`."""

from __future__ import annotations

import importlib
import io
import json
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image

from vamoh.data.dataset import Dataset, grid_dataset
from vamoh.data.files import Arrays, cached

# Both are CC BY 4.0: Personas by Draftbit, Toon Head by Johan Melin.
STYLES = ("personas", "toon-head")
BACKGROUNDS = ("b6e3f4", "c0aede", "d1d4f9", "ffd5dc", "ffdfbf")
COUNT = 4000
SIZE = 64


def avatars(root: str | None = None) -> Dataset:
    """4000 cartoon faces, 64x64, three channels, drawn from the seeds 0 to 3999 and cached under `root`.

    labels: [n] index into `STYLES`. The pictures follow the installed version of the dicebear packages.
    Raises ImportError naming the extra when the faces are not cached and a package is missing.
    """
    file = cached(root, f"avatars-{COUNT}-1.npz", _build)
    return grid_dataset("avatars", file["images"], labels=file["style"])


def _build() -> Arrays:
    style = np.arange(COUNT) % len(STYLES)
    return {"images": draw(style), "style": style}


def draw(style: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Draw faces [n, 64, 64, 3] uint8 in the styles `style` [n] (indices into `STYLES`), face i from the seed "i"."""
    try:
        dicebear: Any = importlib.import_module("dicebear")
        resvg: Any = importlib.import_module("resvg_py")
        definitions = files("dicebear_styles")
    except ImportError as error:
        raise ImportError(
            f'avatars: drawing the faces needs packages that are missing ({error}): pip install "vamoh[avatars]"; '
            f'or use the data set "images" with a folder of your own as path'
        ) from error
    styles = [dicebear.Style(json.loads((definitions / f"{name}.json").read_text("utf-8"))) for name in STYLES]
    images = np.empty((len(style), SIZE, SIZE, 3), np.uint8)
    for i, s in enumerate(style):
        avatar = dicebear.Avatar(styles[s], {"seed": str(i), "backgroundColor": list(BACKGROUNDS)})
        png = resvg.svg_to_bytes(svg_string=str(avatar), width=SIZE, height=SIZE)
        images[i] = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))
    return images
