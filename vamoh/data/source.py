"""Functions that are read from their file when they are asked for, and what of them fits memory."""

from __future__ import annotations

import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

BLOCK_BYTES = 1 << 24
"""Functions per read in a pass over all of them."""


class Source(ABC):
    """n functions of N points and C channels in a file, read by their indices: float32 in [0, 1], or uint8.

    masked: whether every function has a mask of its own, which `read` then returns.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, masked: bool = False) -> None:
        self.shape, self.dtype, self.masked = shape, dtype, masked
        self.checksum: int | None = None
        self.observed: Tensor | None = None

    @abstractmethod
    def read(self, index: Array) -> tuple[Array, Array | None]:
        """Values [B, N, C] of the functions `index` [B] int64, and their masks [B, N] bool, None without.

        Raises ValueError or TypeError naming the file where a value cannot be taken.
        """

    @property
    def bytes(self) -> int:
        """What it takes to keep all values and masks in memory."""
        n, points, channels = self.shape
        return n * points * (channels * self.dtype.itemsize + self.masked)

    def blocks(self) -> Iterator[tuple[slice, Array, Array | None]]:
        """All functions in order, some at a time: which, their values, their masks."""
        n, points, channels = self.shape
        step = max(1, BLOCK_BYTES // max(1, points * channels * 8))
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            yield part, *self.read(np.arange(part.start, part.stop))

    def survey(self) -> None:
        """Read every function once: finds whatever cannot be read, the checksum, and how many points each has."""
        checksum, counts = 0, np.full(self.shape[0], self.shape[1], np.int64)
        for part, values, mask in self.blocks():
            checksum = zlib.crc32(np.ascontiguousarray(values).data, checksum)
            if mask is not None:
                counts[part] = mask.sum(1)
        if self.masked:
            for _, _, mask in self.blocks():
                checksum = zlib.crc32(np.ascontiguousarray(mask).data, checksum)
        self.checksum, self.observed = checksum, torch.from_numpy(counts)

    def load(self) -> tuple[Tensor, Tensor | None]:
        """All values and masks, in memory."""
        values = np.empty(self.shape, np.uint8 if self.dtype == torch.uint8 else np.float32)
        masks = np.empty(self.shape[:2], np.bool_) if self.masked else None
        for part, block, mask in self.blocks():
            values[part] = block
            if masks is not None:
                masks[part] = mask
        return torch.from_numpy(values), None if masks is None else torch.from_numpy(masks)


def keep(source: Source) -> tuple[Tensor | Source, Tensor | None]:
    """Values and masks in memory if they fit `memory_share`; else the source itself, read through once, no masks."""
    if source.bytes <= memory_share():
        return source.load()
    source.survey()
    return source, None


def memory_share() -> int:
    """Bytes that one data set may take: a quarter of the memory, shared by the processes of this machine."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path("/sys/fs/cgroup", name).read_text()))
        except (OSError, ValueError):
            continue
    return min(limits) // 4 // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
