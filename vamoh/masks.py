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
from vamoh._files import check_name
from vamoh._shown import reason, shown

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
    check_name("mask", "name", name)
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
        raise ValueError(f"mask: name must be {', '.join(NAMES)}, or a .npy or .png file, got {shown(name)}{hint}")
    if bool(mask.all()) or not bool(mask.any()):
        raise ValueError(
            f"mask: {shown(name)} must leave some points observed and some missing on a grid {list(shape)}, "
            f"got {int(mask.sum())} of {mask.numel()} observed"
        )
    return mask


def context_mask(
    coords: Tensor,
    batch: int,
    *,
    random: float = 0.0,
    rate: float = 0.9,
    box: float = 0.0,
    outside: float = 0.0,
    half: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Bool mask [B, N], True where the encoder sees a point of its function, drawn for each function of a batch.

    coords [N, D] or [B, N, D], from any domain: extents are those of the coordinates. With these probabilities a
    function is shown
        random    without points at random, at a rate drawn from U(0, `rate`);
        box       without a box, a quarter to three quarters of the domain along every axis;
        outside   only such a box;
        half      on one side of a random axis only, a quarter to three quarters of the domain;
    and otherwise whole. Drawn on the CPU: the same for every device, and whatever the coordinates.
    """
    count, dims = coords.shape[-2:]
    kind = torch.rand(batch, generator=generator)
    draws = torch.rand(batch, 2 * dims + 3, generator=generator)
    bounds = torch.tensor([random, box, outside, half]).cumsum(0)
    kind = torch.bucketize(kind, bounds, right=True)  # 4: whole
    low, high = coords.amin(-2, keepdim=True), coords.amax(-2, keepdim=True)
    place = ((coords - low) / (high - low).clamp(min=torch.finfo(coords.dtype).tiny)).cpu()  # [.., N, D] in [0, 1]
    extent = (0.25 + 0.5 * draws[:, None, :dims]).to(place)
    start = draws[:, None, dims : 2 * dims].to(place) * (1 - extent)
    inside = ((place >= start) & (place <= start + extent)).all(-1)  # [B, N]
    axis = (draws[:, -3] * dims).long().clamp(max=dims - 1)
    along = place.expand(batch, -1, -1).gather(2, axis[:, None, None].expand(-1, count, 1))[..., 0]
    side = (along <= (0.25 + 0.5 * draws[:, -2:-1]).to(place)) ^ (draws[:, -1:] < 0.5)
    scattered = torch.rand(batch, count, generator=generator) >= rate * draws[:, -1:]
    kinds = torch.stack([scattered, ~inside, inside, side, torch.ones_like(inside)])
    return kinds[kind, torch.arange(batch)]


def _random(name: str, rate: str, shape: tuple[int, ...], seed: int) -> Tensor:
    try:
        value = float(rate)
    except ValueError:
        value = float("nan")
    if not 0 < value < 1:
        raise ValueError(f"mask: the rate of random:RATE must be a number between 0 and 1, got {shown(name)}")
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= value


def _from_file(path: Path, shape: tuple[int, ...]) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"mask: no file {str(path)!r}")
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                if image.mode[0] in "IF":
                    raise ValueError(f"it must have 8 bits per channel, got mode {image.mode}")
                array = np.asarray(image.convert("L")) >= 128
    except Exception as error:  # readers of damaged files raise of all kinds
        raise ValueError(f"mask: {str(path)!r} cannot be read: {reason(error)}") from error
    if array.shape != shape:
        raise ValueError(f"mask: {str(path)!r} must have shape {list(shape)}, got {shown(list(array.shape))}")
    if array.dtype != np.bool_:
        levels = np.unique(array)
        if not (np.isin(levels, (0, 1)).all() or np.isin(levels, (0, 255)).all()):
            raise ValueError(
                f"mask: {str(path)!r} must be bool, or hold only 0 and 1 or 0 and 255, got {array.dtype} with values "
                f"from {levels[0]} to {levels[-1]}"
            )
    return torch.from_numpy(array.astype(np.bool_))
