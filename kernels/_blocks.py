"""Blocks of matrices in memory, as kernels of networks read, keep and add them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matrix(
    start, r0, c0, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """[BR, BC] from row r0 and column c0 on of the matrix [ROWS, COLUMNS] at `start`, rows STRIDE apart; outside 0."""
    r = r0 + tl.arange(0, BR)[:, None]
    c = c0 + tl.arange(0, BC)[None, :]
    if ROWS % BR == 0 and COLUMNS % BC == 0:
        return tl.load(start + r * STRIDE + c)
    else:
        return tl.load(start + r * STRIDE + c, mask=(r < ROWS) & (c < COLUMNS), other=0.0)


@triton.jit
def bias(start, c0, SIZE: tl.constexpr, BC: tl.constexpr):
    """[1, BC] of the SIZE values at `start`, from c0 on; outside 0."""
    c = c0 + tl.arange(0, BC)[None, :]
    if SIZE % BC == 0:
        return tl.load(start + c)
    else:
        return tl.load(start + c, mask=c < SIZE, other=0.0)


@triton.jit
def at(scratch, r0, c0, STRIDE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Addresses of a block of scratch, rows STRIDE apart."""
    return scratch + (r0 + tl.arange(0, BR)[:, None]) * STRIDE + c0 + tl.arange(0, BC)[None, :]


@triton.jit
def accumulate(
    to, r0, c0, x, fresh, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Add the block x [BR, BC] to the matrix at `to` from row r0 and column c0 on; with `fresh` it was nothing yet."""
    r = r0 + tl.arange(0, BR)[:, None]
    c = c0 + tl.arange(0, BC)[None, :]
    if ROWS % BR == 0 and COLUMNS % BC == 0:
        before = tl.load(to + r * STRIDE + c, mask=not fresh, other=0.0)
        tl.store(to + r * STRIDE + c, before + x)
    else:
        inside = (r < ROWS) & (c < COLUMNS)
        before = tl.load(to + r * STRIDE + c, mask=inside & (not fresh), other=0.0)
        tl.store(to + r * STRIDE + c, before + x, mask=inside)
