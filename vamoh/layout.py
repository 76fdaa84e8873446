"""How the parameters of one coordinate network are packed into a row of θ; the only file that knows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from vamoh._checks import check_positive


def packed_size(widths: Sequence[int]) -> int:
    """Number P of packed parameters of a network with layer widths (E, H, ..., H, C)."""
    for width in widths:
        check_positive("layout", "every width", width)
    if len(widths) < 2:
        raise ValueError(f"layout: widths must list at least input and output, got {list(widths)}")
    return sum(a * b + b for a, b in pairwise(widths))


def unpack(theta: Tensor, widths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Views of θ [..., P] as one (weight [..., out, in], bias [..., out]) per layer.

    All weights come first, layer by layer and row-major, then all biases: the published code's order.
    """
    if theta.shape[-1] != packed_size(widths):
        raise ValueError(
            f"layout: theta must have shape [..., P] with P={packed_size(widths)} for widths {list(widths)}, "
            f"got {list(theta.shape)}"
        )
    shapes = [(b, a) for a, b in pairwise(widths)]
    sizes = [b * a for b, a in shapes] + [b for b, _ in shapes]
    parts = theta.split(sizes, dim=-1)
    count = len(shapes)
    return [(parts[i].unflatten(-1, shapes[i]), parts[count + i]) for i in range(count)]
