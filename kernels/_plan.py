"""What the plans share: the device, and how many shares of the work keep it busy."""

from __future__ import annotations

from dataclasses import dataclass

MOST_PARTIAL = 128 << 20
"""Bytes of partial sums at which splits stop to grow."""


@dataclass(frozen=True)
class Device:
    """A GPU: compute capability (80, 90, ...) and number of multiprocessors."""

    capability: int
    multiprocessors: int

    def programs(self, registers: int, warps: int) -> int:
        """As many programs of so many registers per thread as have registers."""
        return self.multiprocessors * max(1, 65536 // (registers * 32 * warps))


def splits(items: int, tiles: int, programs: int, size: int) -> int:
    """The fewest shares of the tiles, none empty, that keep the programs busy 90 % of the time, or nearest to it.

    Each of the items has so many tiles, and partial sums of `size` bytes per share.
    """
    best, most = 1, 0.0
    for shares in range(1, min(tiles, 4 * programs) + 1):
        if shares > 1 and shares * items * size > MOST_PARTIAL:
            break
        each = up(tiles, shares)
        if up(tiles, each) != shares:
            continue
        busy = items * tiles / (programs * up(items * shares, programs) * each)
        if busy > most + 0.02:
            best, most = shares, busy
        if busy >= 0.9:
            break
    return best


def power(width: int, least: int = 1) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (width - 1).bit_length()) if width else least


def up(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
