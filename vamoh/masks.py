"""Masks for completion: which points of a grid the model is shown."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vamoh._checks import check_seed, check_sizes, check_type

NAMES = ("patch", "half", "outside", "random:RATE")


def completion_mask(name: str, shape: Sequence[int], *, seed: int = 0) -> Tensor:
    """Bool mask [*shape], True where a point is observed, of a grid with the given sizes.

    name: one of
        "patch"        a centred block of half the size along every axis longer than 1 is missing (in-painting);
        "half"         the first half of the last axis longer than 1 (the left columns) is observed;
        "outside"      only the centred block of "patch" is observed (out-painting);
        "random:RATE"  each point is missing with probability RATE, 0 < RATE < 1, drawn from `seed`;
        a file         .npy (bool, or numbers 0 and 1 or 255) or .png (white = observed) of exactly this shape.

    Raises ValueError for an unknown name, a bad rate, a file of another shape or content, or a mask that observes all
    or none of the points; FileNotFoundError for a missing file.
    """
    check_type("mask", "name", name, str)
    check_seed("mask", "seed", seed)
    shape = check_sizes("mask", "shape", shape)
    kind, _, rate = name.partition(":")
    if Path(name).suffix.lower() in (".npy", ".png"):
        mask = _from_file(Path(name), shape)
    elif kind == "random":
        mask = _random(name, rate, shape, seed)
    elif name in ("patch", "outside"):
        mask = torch.ones(shape, dtype=torch.bool)
        mask[tuple(slice((n - n // 2) // 2, (n - n // 2) // 2 + max(n // 2, 1)) for n in shape)] = False
        mask = mask if name == "patch" else ~mask
    elif name == "half":
        axis = max((i for i, n in enumerate(shape) if n > 1), default=0)
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.narrow(axis, 0, shape[axis] // 2).fill_(True)
    else:
        near = difflib.get_close_matches(name, ["patch", "half", "outside", "random:0.5"], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"mask: name must be {', '.join(NAMES)}, or a .npy or .png file, got {name!r}{hint}")
    if bool(mask.all()) or not bool(mask.any()):
        raise ValueError(
            f"mask: {name!r} must leave some points observed and some missing on a grid {list(shape)}, "
            f"got {int(mask.sum())} of {mask.numel()} observed"
        )
    return mask


def _random(name: str, rate: str, shape: tuple[int, ...], seed: int) -> Tensor:
    try:
        value = float(rate)
    except ValueError:
        value = float("nan")
    if not 0 < value < 1:
        raise ValueError(f"mask: the rate of random:RATE must be a number between 0 and 1, got {name!r}")
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= value


def _from_file(path: Path, shape: tuple[int, ...]) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"mask: no file {str(path)!r}")
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                array = np.asarray(image.convert("L")) >= 128
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"mask: {str(path)!r} cannot be read: {error}") from error
    if array.shape != shape:
        raise ValueError(f"mask: {str(path)!r} must have shape {list(shape)}, got {list(array.shape)}")
    if array.dtype != np.bool_:
        levels = np.unique(array)
        if not (np.isin(levels, (0, 1)).all() or np.isin(levels, (0, 255)).all()):
            raise ValueError(
                f"mask: {str(path)!r} must be bool, or hold only 0 and 1 or 0 and 255, got {array.dtype} with values "
                f"from {levels[0]} to {levels[-1]}"
            )
    return torch.from_numpy(array.astype(np.bool_))
