"""Every op at the presets' sizes: rates, and shares of what the machine can do."""

from __future__ import annotations

import pytest
import torch

from bench.cases import reference_backend
from bench.conftest import Contest
from bench.op_cases import OpCase, op_cases

CASES = [
    pytest.param(case, direction, id=f"{case.label}-{direction}")
    for case in op_cases()
    for direction in (["forward", "forward_backward"] if case.backward is not None else ["forward"])
]


@pytest.mark.parametrize("case, direction", CASES)
def test_op(case: OpCase, direction: str, contest: Contest) -> None:
    torch.manual_seed(0)
    call, leaves = case.build()
    backward = direction == "forward_backward"
    count = case.forward + case.backward if backward else case.forward

    def forward_only() -> None:
        with torch.no_grad():
            call()

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        result = call()
        result.backward(torch.ones_like(result))

    run = both if backward else forward_only
    contest.benchmark.group = case.preset
    contest.budget /= 6
    runs = {"ours": run}
    if case.op not in ("farthest_point_sample", "knn"):  # by far slower in plain torch, and of no interest there
        runs["oracle"] = reference_backend()(run)
    contest.run(runs, count, preset=case.preset, what=f"{case.op}, {direction.replace('_', ' + ')}")
