"""What a call of an op costs besides its kernel: a small `linear` from Python, less the bare call of its kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.conftest import Contest
from vamoh.ops import linear
from vamoh.ops._native import native, native_isa, native_unavailable

CALLS = 1000
"""In one round."""


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


@pytest.mark.skipif(native_unavailable() is not None, reason=str(native_unavailable()))
def test_small_linear(contest: Contest) -> None:
    groups, rows, inputs, outputs = 1, 4, 8, 8
    x, weight, bias = torch.randn(groups, rows, inputs), torch.randn(groups, outputs, inputs), torch.randn(1, outputs)
    learned = weight.clone().requires_grad_()
    out = torch.empty(rows, groups, outputs).transpose(0, 1)
    arguments = {"x": x, "weight": weight, "bias": bias, "out": out}
    arguments |= {"threads": torch.get_num_threads(), "isa": native_isa()}
    kernel = native().linear
    runs = {
        "ours": repeated(lambda: linear(x, weight, bias)),
        "with gradient": repeated(lambda: linear(x, learned, bias)),
        "kernel": repeated(lambda: kernel(**arguments)),
    }
    contest.benchmark.group = "dispatch"
    contest.budget /= 6
    contest.run(runs, what=f"{CALLS} calls of linear")
