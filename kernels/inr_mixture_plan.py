"""How the work of `inr_mixture.py` is cut: a function of sizes, precision and device, without Triton or a GPU.

No GPU has run these kernels yet: block sizes were chosen by what the compiler reports (docs/kernels.md), the rest by
counting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ._plan import Device, power, splits, up

PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")
OPS = ("log_likelihood", "outputs", "mean", "expected", "outputs_backward")

REGISTERS = 255
"""Registers per thread that the compiler may use: all there are, or it spills some to fit more warps."""
MOST_CHANNELS = 64
MOST_SCRATCH = 32 << 20
"""Bytes of scratch of all programs at which a tile stops to grow; it fits an L2 cache of 40 or 50 MB."""
MOST_TILE = 256
"""Rows after which more rows per update of the gradient save next to nothing."""


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


def blocks(training: bool, precision: str, capability: int) -> tuple[int, int, int, int, int]:
    """Rows, most outputs, inputs, warps and stages: the largest products that do not spill registers."""
    if precision == "ieee" and not training and capability < 90:
        return 64, 32, 16, 8, 1
    if training or precision == "ieee":
        return 64, 64, 16, 8, 1
    if precision == "tf32x3" and capability < 90:
        return 64, 64, 16, 4, 2
    return 64, 64, 32, 4, 2


def plan(
    op: str,
    batch: int,
    components: int,
    points: int,
    widths: Sequence[int],
    precision: str,
    device: Device,
    mirrored: bool,
) -> Plan:
    """The plan of one call; points counts pairs of opposite points once if `mirrored`.

    Raises ValueError for an unknown precision, and for widths with a `refusal`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"inr_mixture: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    reason = refusal(widths)
    if reason is not None:
        raise ValueError(f"inr_mixture: backend 'triton' {reason}")
    training = op in ("expected", "outputs_backward")
    rows, most, inputs, warps, stages = blocks(training, precision, device.capability)
    width, layers, channels = widths[1], len(widths) - 2, power(widths[-1], 16)
    outputs = min(most, power(width, 16))
    inputs = min(inputs, outputs)
    hidden = up(width, outputs) * outputs
    programs = device.programs(REGISTERS, warps)
    per_block = rows // 2 if mirrored else rows
    count = up(points, per_block)
    if not training:
        groups = 1 if op == "mean" else min(components, max(1, programs // max(1, count * batch)))
        groups = up(components, up(components, groups)) if components else 1
        items = count * batch * groups
        scratch = 2 * rows * hidden
        return Plan(
            rows,
            outputs,
            inputs,
            hidden,
            channels,
            rows,
            count,
            warps,
            stages,
            groups,
            1,
            min(programs, items),
            scratch,
        )
    tile = rows
    while (
        2 * tile <= min(MOST_TILE, count * rows)
        and programs * _train_scratch(2 * tile, layers, hidden, channels) * 4 <= MOST_SCRATCH
    ):
        tile *= 2
    tiles = up(points, per_block * (tile // rows))
    pairs = batch * components
    parameters = sum(a * b + b for a, b in zip(widths, widths[1:]))  # noqa: B905
    shares = splits(pairs, tiles, programs, 4 * parameters)
    scratch = _train_scratch(tile, layers, hidden, channels)
    return Plan(
        rows,
        outputs,
        inputs,
        hidden,
        channels,
        tile,
        tiles,
        warps,
        stages,
        1,
        shares,
        min(programs, pairs * shares),
        scratch,
    )


def _train_scratch(tile: int, layers: int, hidden: int, channels: int) -> int:
    return tile * (2 * layers * hidden + channels)
