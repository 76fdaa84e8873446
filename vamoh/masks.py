"""Masks for completion: which points of a grid the model is shown."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vamoh._checks import check_positive, check_seed, check_sizes, check_type
from vamoh._files import check_name
from vamoh._shown import reason, shown

NAMES = ("patch", "half", "outside", "random:RATE")
MIXTURES = ("posterior-matching-mnist", "posterior-matching-celeba", "vaeac-celeba")


def completion_mask(name: str, shape: Sequence[int], *, seed: int = 0, count: int | None = None) -> Tensor:
    """Bool mask [*shape], True where a point is observed, of a grid with the given sizes; for `count` functions
    [count, *shape].

    name: one of
        "patch"        a centred block of half the size along every axis longer than 1 is missing (in-painting);
        "half"         the first half of the last axis longer than 1 (the left columns) is observed;
        "outside"      only the centred block of "patch" is observed (out-painting);
        "random:RATE"  each point is missing with probability RATE, 0 < RATE < 1, drawn from `seed`;
        a file         .npy (bool, or numbers 0 and 1 or 255) or .png (white = observed) of exactly this shape;
        a mixture      one of `MIXTURES`, of images: masks of other papers, drawn from `seed` for each function; see
                       `_mixture`. The others are the same for all functions.

    Raises ValueError for an unknown name, a bad rate, a grid that a mixture is not made for, a file of another shape or
    content, or a mask, not of a mixture, that observes all or none of the points; FileNotFoundError for a missing file.
    """
    check_type("mask", "name", name, str)
    check_name("mask", "name", name)
    check_seed("mask", "seed", seed)
    shape = check_sizes("mask", "shape", shape)
    if count is not None:
        check_positive("mask", "count", count)
    if name in MIXTURES:
        generator = torch.Generator().manual_seed(seed)
        masks = torch.stack([_mixture(name, shape, generator) for _ in range(count or 1)])
        return masks[0] if count is None else masks
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
        near = difflib.get_close_matches(name, ["patch", "half", "outside", "random:0.5", *MIXTURES], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"mask: name must be {', '.join((*NAMES, *MIXTURES))}, or a .npy or .png file, got {shown(name)}{hint}"
        )
    if bool(mask.all()) or not bool(mask.any()):
        raise ValueError(
            f"mask: {shown(name)} must leave some points observed and some missing on a grid {list(shape)}, "
            f"got {int(mask.sum())} of {mask.numel()} observed"
        )
    return mask if count is None else mask.expand(count, *shape)


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


def _mixture(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """One mask [H, W] of a published mixture, True where a point is observed.

    "posterior-matching-mnist" (Strauss and Oliva 2022), any even square: with weights 2, 1 (each), 2 and 2, half of the
    pixels at random, one of four halves, a square of half the size anywhere, or a rectangle.
    "posterior-matching-celeba", 64 x 64, and "vaeac-celeba" (Ivanov, Figurnov and Vetrov 2019), 128 x 128: with weights
    1, 1 and 2, a mask of Yeh et al. 2017, one of the six rectangles O1 to O6 of Li et al. 2017, or a rectangle. The
    first is with weights 2, 2, 2 and 1 (each) the central square, blobs of about a quarter of the image (Pathak et al.
    2016), pixels at random (80 % or 95 % missing), or one of four halves.
    A rectangle has corners drawn uniformly until it hides at least 30 % of the image.
    """
    size = {"posterior-matching-celeba": 64, "vaeac-celeba": 128}.get(name)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] % 2 or (size is not None and shape[0] != size):
        wanted = "an even square" if size is None else f"{size} x {size}"
        raise ValueError(f"mask: {name} must have a grid of {wanted}, got {list(shape)}")
    side, half = shape[0], shape[0] // 2
    halves = [(0, 0, side, half), (0, 0, half, side), (0, half, side, side), (half, 0, side, side)]

    def below(end: int) -> int:
        return int(torch.randint(end, (), generator=generator))

    def choose(weights: Sequence[float]) -> int:
        return int(torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=generator))

    def without(top: int, left: int, bottom: int, right: int) -> Tensor:
        mask = torch.ones(shape, dtype=torch.bool)
        mask[top:bottom, left:right] = False
        return mask

    def scattered(rate: float) -> Tensor:
        return torch.rand(shape, generator=generator) >= rate

    def rectangle() -> Tensor:
        while True:
            (top, bottom), (left, right) = (sorted((below(side), below(side))) for _ in range(2))
            if (bottom + 1 - top) * (right + 1 - left) >= 0.3 * side**2:
                return without(top, left, bottom + 1, right + 1)

    if size is None:
        kind = choose([2, 1, 1, 1, 1, 2, 2])
        if kind == 0:
            return scattered(0.5)
        if kind == 5:
            top, left = below(half), below(half)
            return without(top, left, top + half, left + half)
        return rectangle() if kind == 6 else without(*halves[kind - 1])
    kind = choose([1, 1, 2])
    if kind == 2:
        return rectangle()
    if kind == 1:
        return without(*(-(-edge * side // 128) for edge in _FACE_PARTS[below(len(_FACE_PARTS))]))
    kind = choose([2, 2, 2, 1, 1, 1, 1])
    if kind == 0:
        return without(side // 4, side // 4, side - side // 4, side - side // 4)
    if kind == 1:
        return _blobs(side, generator)
    return scattered(0.8 if size == 64 else 0.95) if kind == 2 else without(*halves[kind - 3])


_FACE_PARTS = (
    (52, 33, 116, 71), (52, 57, 116, 95), (52, 29, 74, 99), (52, 29, 74, 67), (52, 61, 74, 99), (86, 40, 124, 88),
)  # fmt: skip
"""Top, left, bottom and right of O1 to O6 on 128 x 128 pixels; on 64 x 64 half of that, rounded up."""
_CELLS = 3.84
"""Random values along a side behind the blobs: 0.06 of 64 pixels, 0.03 of 128."""


def _blobs(side: int, generator: torch.Generator) -> Tensor:
    """Hide where values at random, a few along a side and interpolated between, are below 0.25: 20 to 30 %."""
    margin = 4  # more than the bicubic kernel reaches
    cells = math.ceil(_CELLS) + 1 + 2 * margin
    while True:
        values = torch.rand(cells, cells, generator=generator)
        top, left = (margin + torch.rand(2, generator=generator)).tolist()
        picture = Image.fromarray(values.numpy()).resize(
            (side, side), Image.Resampling.BICUBIC, box=(left, top, left + _CELLS, top + _CELLS)
        )
        mask = torch.from_numpy(np.asarray(picture) >= 0.25)
        if 0.2 < 1 - mask.float().mean() < 0.3:
            return mask


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
