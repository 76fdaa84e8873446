"""How the work of `planar_flow.py` is cut: a function of sizes and device, without Triton or a GPU.

Block sizes are those measured on the GPU where there are any, else chosen by what the compiler reports
(docs/kernels.md); the rest is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ._plan import Device, ceil_div, measured, power, splits

OPS = ("log_prob", "sample", "value", "expected", "backward")
"""value is the expected log-density alone, expected that with gradients, backward the gradients of log_prob."""

REGISTERS = {"forward": 128, "train": 255}
"""Registers per thread that the compiler may use."""
MOST_LATENT = 1024
MOST_ROWS = 128
FEWEST_ROWS = 4
"""Rows below which a tile is not cut to keep more of the GPU busy."""


class Blocks(NamedTuple):
    """Samples of a tile and warps of a program."""

    rows: int
    warps: int


@dataclass(frozen=True)
class Plan:
    """rows: samples of a tile; latent: Z padded to a power of two; tiles: of one function's samples.

    programs share batch · splits items of work. scratch: floats of one program.
    """

    rows: int
    latent: int
    tiles: int
    warps: int
    splits: int
    programs: int
    scratch: int


def kernel_of(op: str) -> str:
    """The kernel that runs an op: "forward" or "train"."""
    return "train" if op in ("expected", "backward") else "forward"


def refusal(latent: int) -> str | None:
    """Why flows of this many dimensions cannot run here, or None."""
    return None if latent <= MOST_LATENT else f"takes at most {MOST_LATENT} dimensions, got {latent}"


def model(samples: int, batch: int, width: int, device: Device) -> Blocks:
    """Tiles of a few thousand values, fewer where they would leave multiprocessors idle."""
    values = 4096 if width > 256 else 2048
    rows = min(MOST_ROWS, max(1, values // width), power(samples))
    while rows > FEWEST_ROWS and batch * ceil_div(samples, rows) < 2 * device.multiprocessors:
        rows //= 2
    return Blocks(rows, min(8, max(1, rows * width // 512)))


def plan(
    op: str, samples: int, batch: int, latent: int, layers: int, device: Device, blocks: Blocks | None = None
) -> Plan:
    """The plan of one call, samples and batch at least 1. Raises ValueError for sizes with a `refusal`.

    blocks: by default what was measured for the op and these sizes, else those of the `model`.
    """
    reason = refusal(latent)
    if reason is not None:
        raise ValueError(f"planar_flow: backend 'triton' {reason}")
    kernel, width = kernel_of(op), power(latent, 4)
    if blocks is None:
        known = measured(device, f"planar_flow.{op}", (latent, layers), batch, samples)
        blocks = model(samples, batch, width, device) if known is None else Blocks(**known)
    rows, warps = blocks
    programs = device.programs(REGISTERS[kernel], warps)
    tiles = ceil_div(samples, rows)
    partial = 4 * (2 * layers * latent + 2 * layers + 4 * latent) if kernel == "train" else 0
    shares = splits(batch, tiles, programs, partial)
    scratch = layers * (4 + (3 * rows if kernel == "train" else 0))
    return Plan(
        rows=rows,
        latent=width,
        tiles=tiles,
        warps=warps,
        splits=shares,
        programs=min(programs, batch * shares),
        scratch=scratch,
    )
