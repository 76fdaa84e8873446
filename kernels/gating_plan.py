"""How the work of `gating.py` is cut: a function of sizes, precision and device, without Triton or a GPU.

Block sizes were chosen by what the compiler reports (docs/kernels.md), the rest is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ._plan import Device, ceil_div, power, splits

REGISTERS = 255
"""Registers per thread that the compiler may use: all there are, or it spills some to fit more warps."""
MOST_COMPONENTS = 64
KL_POINTS = 1024
"""Points of a program's step in the divergence."""


@dataclass(frozen=True)
class Plan:
    """rows: points of a tile; inputs: block of a sum; outputs, widths: block and padded width of every layer.

    Forward, programs share tiles · batch items of work. In training, each of groups · shares programs has a group of
    the tiles and a share of the functions. scratch: floats of one program.
    """

    rows: int
    inputs: int
    outputs: tuple[int, ...]
    widths: tuple[int, ...]
    tiles: int
    warps: int
    stages: int
    groups: int
    shares: int
    programs: int
    scratch: int


def refusal(widths: Sequence[int]) -> str | None:
    """Why networks of these layer widths (H, ..., K) cannot run here, or None."""
    if widths[-1] > MOST_COMPONENTS:
        return f"takes at most {MOST_COMPONENTS} components, got {widths[-1]}"
    return None


def blocks(training: bool, precision: str, capability: int) -> tuple[int, int, int, int, int]:
    """Rows, most outputs, inputs, warps and stages: the largest products that do not spill registers."""
    if training and precision != "ieee" and capability < 90:
        return 64, 32, 16, 8, 1
    if training or precision == "ieee":
        return 64, 64, 16, 8, 1
    return 64, 64, 16, 4, 2


def plan(op: str, batch: int, points: int, widths: Sequence[int], precision: str, device: Device) -> Plan:
    """The plan of "gating" or "gating_backward", batch and points at least 1.

    Raises ValueError for widths with a `refusal`.
    """
    reason = refusal(widths)
    if reason is not None:
        raise ValueError(f"gating: backend 'triton' {reason}")
    training = op == "gating_backward"
    rows, most, inputs, warps, stages = blocks(training, precision, device.capability)
    outputs = tuple(min(most, power(width, 16)) for width in widths)
    padded = tuple(ceil_div(width, block) * block for width, block in zip(widths, outputs, strict=True))
    tiles = ceil_div(points, rows)
    programs = device.programs(REGISTERS, warps)
    if training:
        groups, shares = _cut(tiles, batch, programs)
        programs, scratch = groups * shares, rows * (sum(padded) + 2 * max(padded))
    else:
        groups, shares = tiles, batch
        programs, scratch = min(programs, tiles * batch), 2 * rows * max(padded)
    return Plan(
        rows=rows,
        inputs=inputs,
        outputs=outputs,
        widths=padded,
        tiles=tiles,
        warps=warps,
        stages=stages,
        groups=groups,
        shares=shares,
        programs=programs,
        scratch=scratch,
    )


def kl_splits(batch: int, points: int, device: Device) -> int:
    """Shares of the points of a function."""
    return splits(batch, ceil_div(points, KL_POINTS), 8 * device.multiprocessors, 4)


def _cut(tiles: int, batch: int, programs: int) -> tuple[int, int]:
    """Groups of tiles and shares of functions, none empty, that take the least time; the fewest shares of the best."""
    best, least = (1, 1), tiles * batch + 1
    for wanted in range(1, min(batch, programs) + 1):
        each = ceil_div(batch, wanted)
        shares = ceil_div(batch, each)
        long = ceil_div(tiles, min(tiles, programs // shares))
        if long * each < least:
            best, least = (ceil_div(tiles, long), shares), long * each
    return best
