"""How far a result in float32 may be from the one in float64: unit roundoff times operations times condition.

A sum of n products, rounded anywhere and in any order, is the exact sum for factors that changed by at most n units
(Higham 2002, section 3.1). So a computation of layers of such sums is exact for arguments that changed by as many units
as it has operations in a row, and how far that moves the result is its condition. Cancellation, saturation and slopes
are in it by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

UNIT = 2.0**-24
"""Largest relative error of one rounding to float32."""


def bounds(
    function: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor], operations: float, terms: float = 0.0
) -> list[float]:
    """For each result of function(*arguments) in float64, how far its norm may move by `operations` roundings in a row.

    The farthest of eight draws in which every entry of every argument is off by so many units of its own size, at least
    of the usual size of its tensor, up or down: a sum rounds a small term as it rounds the others. Never less than
    eight units of the result, or of its last terms, so large each, where these cancel.

    Results have to move in proportion: at a kink, such as a rectifier's, float32 may be on either side, and a bound
    that allows both allows nearly anything.
    """
    arguments = [a.detach() for a in arguments]
    exact, generator = function(*arguments), torch.Generator().manual_seed(0)
    sizes = [operations * UNIT * a.abs().clamp(min=float(a.abs().nanmean())) for a in arguments]
    farthest, slopes = [0.0] * len(exact), [0.0] * len(exact)
    for _ in range(8):
        signs = [2.0 * torch.randint(0, 2, a.shape, generator=generator) - 1 for a in arguments]
        for share, most in ((1, farthest), (2.0**-10, slopes)):
            moved = function(*(a + share * s * size for a, s, size in zip(arguments, signs, sizes, strict=True)))
            for i, (m, e) in enumerate(zip(moved, exact, strict=True)):
                most[i] = max(most[i], float((m - e).norm()) / share)
    least = [8 * UNIT * max(float(e.norm()), terms * e.numel() ** 0.5) for e in exact]
    far = [max(both) for both in zip(farthest, least, strict=True)]
    for f, slope, low in zip(far, slopes, least, strict=True):
        assert f <= 4 * max(slope, low) and slope <= 4 * f, "an argument lies at a kink of the function: choose others"
    return far


def within(results: Sequence[Tensor], exact: Sequence[Tensor], bounds: Sequence[float]) -> bool:
    """Whether every result is as near to the exact one as its bound."""
    assert [r.shape for r in results] == [e.shape for e in exact]
    errors = [float((r.detach().cpu().double() - e.detach()).norm()) for r, e in zip(results, exact, strict=True)]
    return all(error <= bound for error, bound in zip(errors, bounds, strict=True))


def near(
    results: Sequence[Tensor],
    function: Callable[..., Sequence[Tensor]],
    arguments: Sequence[Tensor],
    widths: Sequence[int],
    unit: float = 1.0,
    terms: float = 0.0,
) -> bool:
    """Whether results are those of the function in float64 of a network, up to roundings of `unit` times float32's."""
    arguments = [a.detach().cpu().double() for a in arguments]
    allowed = bounds(function, arguments, unit * operations(widths), terms)
    return within(results, function(*arguments), allowed)


def near_sums(
    results: Sequence[Tensor], exact: Sequence[Tensor], sizes: Sequence[float] | None = None, factors: int = 2
) -> bool:
    """Whether results are float32 sums of independent terms of either sign, none longer than their rows or columns.

    sizes: the root of the sum of the squares of each result's terms, where a result is of too few entries to be as
    large as that. factors: of a term.
    """
    terms = max(max(t.flatten(0, -2).shape) for t in exact if t.dim() > 1)
    sizes = [0.0] * len(exact) if sizes is None else sizes
    each = zip(exact, sizes, strict=True)
    return within(
        results, exact, [independent(terms, factors) * UNIT * max(float(e.detach().norm()), s) for e, s in each]
    )


def independent(terms: int, factors: int = 2) -> float:
    """Units by which a float32 sum of so many independent terms of either sign may be off.

    The sum of k of n terms is √(k/n) of the result's size and rounds by a unit of it: √(n/2) units together where
    roundings are independent (Higham and Mary 2019), and √(f - 1) for products of f factors. Thrice both, and one
    for the result.
    """
    return 3 * (math.sqrt(terms / 2) + math.sqrt(factors - 1)) + 1


def operations(widths: Sequence[int]) -> int:
    """Roundings in a row of a network of these widths and its likelihood: of its sums, and 32 of the likelihood.

    The longest, the logistic's, has two exponentials, two reciprocals and a logarithm of 2 to 4 each, and 20 sums and
    products.
    """
    return sum(widths) + 32


def mean_terms(kind: str) -> float:
    """How large the terms are whose difference is the mean of a likelihood: 1/(1 - e⁻ˡ) and 1/l from l = 0.5 on."""
    return 2.5 if kind == "continuous_bernoulli" else 0.0
