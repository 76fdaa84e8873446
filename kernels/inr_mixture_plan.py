"""How the work of `inr_mixture.py` is cut: a function of sizes, precision and device, without Triton or a GPU.

Block sizes are those measured on the GPU where there are any, else chosen by what the compiler reports
(docs/kernels.md); the rest is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ._plan import Device, ceil_div, measured, power, splits

PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")
OPS = ("log_likelihood", "outputs", "mean", "expected", "outputs_backward")

REGISTERS = 255
"""Registers per thread that the compiler may use: all there are, or it spills some to fit more warps."""
MOST_CHANNELS = 64
MOST_SCRATCH = 32 << 20
"""Bytes of scratch of all programs at which a tile stops to grow; it fits an L2 cache of 40 or 50 MB."""
MOST_TILE = 256
"""Rows after which more rows per update of the gradient save next to nothing."""


class Blocks(NamedTuple):
    """Of products: rows, most outputs, inputs; warps and stages; most rows per update of the gradient.

    tile 0: as many rows as MOST_TILE and MOST_SCRATCH allow.
    """

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    tile: int = 0


@dataclass(frozen=True)
class Plan:
    """rows, outputs, inputs: blocks of a product; hidden, channels: widths padded to blocks.

    tile: rows per update of the gradient (training, else `rows`); tiles: of all points. programs share
    tiles · batch · groups items of work, or batch · components · splits in training. scratch: floats of one program.
    """

    rows: int
    outputs: int
    inputs: int
    hidden: int
    channels: int
    tile: int
    tiles: int
    warps: int
    stages: int
    groups: int
    splits: int
    programs: int
    scratch: int


def refusal(widths: Sequence[int]) -> str | None:
    """Why networks of these layer widths (E, H, ..., H, C) cannot run here, or None."""
    hidden = set(widths[1:-1])
    if len(hidden) != 1:
        return f"takes hidden layers of one width, at least one, got widths {list(widths)}"
    if widths[-1] > MOST_CHANNELS:
        return f"takes at most {MOST_CHANNELS} channels, got {widths[-1]}"
    return None


def model(training: bool, precision: str, capability: int) -> Blocks:
    """The largest products that do not spill registers."""
    if precision == "ieee" and not training and capability < 90:
        return Blocks(64, 32, 16, 8, 1)
    if training or precision == "ieee":
        return Blocks(64, 64, 16, 8, 1)
    if precision == "tf32x3" and capability < 90:
        return Blocks(64, 64, 16, 4, 2)
    return Blocks(64, 64, 32, 4, 2)


def plan(
    op: str,
    batch: int,
    components: int,
    points: int,
    widths: Sequence[int],
    precision: str,
    device: Device,
    mirrored: bool,
    blocks: Blocks | None = None,
) -> Plan:
    """The plan of one call; points counts pairs of opposite points once if `mirrored`.

    blocks: by default what was measured for the op and these widths, else those of the `model`.
    Raises ValueError for an unknown precision, and for widths with a `refusal`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"inr_mixture: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    reason = refusal(widths)
    if reason is not None:
        raise ValueError(f"inr_mixture: backend 'triton' {reason}")
    training = op in ("expected", "outputs_backward")
    if blocks is None:
        known = measured(device, f"inr_mixture.{op}", widths, precision, mirrored)
        blocks = model(training, precision, device.capability) if known is None else Blocks(**known)
    rows, most, inputs, warps, stages, most_tile = blocks
    width, layers, channels = widths[1], len(widths) - 2, power(widths[-1], 16)
    outputs = min(most, power(width, 16))
    inputs = min(inputs, outputs)
    hidden = ceil_div(width, outputs) * outputs
    programs = device.programs(REGISTERS, warps)
    per_block = rows // 2 if mirrored else rows
    count = ceil_div(points, per_block)
    if not training:
        groups = 1 if op == "mean" else min(components, max(1, programs // max(1, count * batch)))
        groups = ceil_div(components, ceil_div(components, groups)) if components else 1
        items = count * batch * groups
        scratch = 2 * rows * hidden
        return Plan(
            rows=rows,
            outputs=outputs,
            inputs=inputs,
            hidden=hidden,
            channels=channels,
            tile=rows,
            tiles=count,
            warps=warps,
            stages=stages,
            groups=groups,
            splits=1,
            programs=min(programs, items),
            scratch=scratch,
        )
    tile = rows
    while 2 * tile <= min(most_tile or MOST_TILE, count * rows):
        if not most_tile and programs * _train_scratch(2 * tile, layers, hidden, channels) * 4 > MOST_SCRATCH:
            break
        tile *= 2
    tiles = ceil_div(points, per_block * (tile // rows))
    pairs = batch * components
    parameters = sum(a * b + b for a, b in zip(widths, widths[1:]))  # noqa: B905
    shares = splits(pairs, tiles, programs, 4 * parameters)
    scratch = _train_scratch(tile, layers, hidden, channels)
    return Plan(
        rows=rows,
        outputs=outputs,
        inputs=inputs,
        hidden=hidden,
        channels=channels,
        tile=tile,
        tiles=tiles,
        warps=warps,
        stages=stages,
        groups=1,
        splits=shares,
        programs=min(programs, pairs * shares),
        scratch=scratch,
    )


def _train_scratch(tile: int, layers: int, hidden: int, channels: int) -> int:
    return tile * (2 * layers * hidden + channels)
