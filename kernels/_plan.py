"""What the plans share: the device, what was measured on it, and how many shares of the work keep it busy.

A table `tuned/<device>.json` holds the fastest blocks that a sweep found on a GPU; docs/gpu.md says how it is made.
Where there is none of a GPU, of an op or of its sizes, blocks are those of the model in the plan's own file.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MOST_PARTIAL = 128 << 20
"""Bytes of partial sums at which splits stop to grow."""


@dataclass(frozen=True)
class Device:
    """A GPU: compute capability (80, 90, ...), number of multiprocessors, and name as its driver gives it."""

    capability: int
    multiprocessors: int
    name: str = ""

    def programs(self, registers: int, warps: int) -> int:
        """Programs that fit on the device at once, by their registers per thread."""
        return self.multiprocessors * max(1, 65536 // (registers * 32 * warps))


TUNED = Path(__file__).parent / "tuned"


def table_path(name: str) -> Path:
    """Where the table of a GPU of this name is kept: tuned/nvidia_h100_80gb_hbm3.json."""
    return TUNED / (re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + ".json")


def measured(device: Device, op: str, sizes: Sequence[int], *variant: object) -> dict[str, int] | None:
    """Blocks measured on this GPU for an op, its sizes and its variant, by name; None if there are none."""
    return _table(device.name, device.capability).get((op, tuple(sizes), *variant))


def origin(name: str, capability: int) -> str:
    """In words, where the plans for a GPU come from."""
    found = len(_table(name, capability))
    return f"{found} measured on this GPU ({table_path(name).name}), else modelled" if found else "modelled"


@functools.cache
def _table(name: str, capability: int) -> dict[tuple[object, ...], dict[str, int]]:
    path = table_path(name)
    if not name or not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["capability"] != capability:
            return {}
        return {(e["op"], tuple(e["sizes"]), *e["variant"]): dict(e["blocks"]) for e in table["plans"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"kernels: {path} must be a table as a sweep writes it, got {error!r:.140}") from error


def splits(items: int, tiles: int, programs: int, size: int) -> int:
    """The fewest shares of the tiles, none empty, that keep the programs busy 90 % of the time, or nearest to it.

    Each of the items has so many tiles, and partial sums of `size` bytes per share.
    """
    best, most = 1, 0.0
    for shares in range(1, min(tiles, 4 * programs) + 1):
        if shares > 1 and shares * items * size > MOST_PARTIAL:
            break
        each = ceil_div(tiles, shares)
        if ceil_div(tiles, each) != shares:
            continue
        busy = items * tiles / (programs * ceil_div(items * shares, programs) * each)
        if busy > most + 0.02:
            best, most = shares, busy
        if busy >= 0.9:
            break
    return best


def power(width: int, least: int = 1) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (width - 1).bit_length()) if width else least


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
