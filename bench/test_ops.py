"""Every op at the presets' sizes: rates, and shares of what the machine can do."""

from __future__ import annotations

import pytest
import torch

from bench.cases import reference_backend
from bench.conftest import Contest
from bench.op_cases import NOTHING, OpCase, op_cases


def directions(case: OpCase) -> list[str]:
    if case.backward is None:
        return ["forward"]
    return ["forward_backward"] if case.backward == NOTHING else ["forward", "forward_backward"]


CASES = [
    pytest.param(case, direction, id=f"{case.label}-{direction}")
    for case in op_cases()
    for direction in directions(case)
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

    ones = torch.ones_like(call()) if backward else None  # the incoming gradient is not the op's work

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        call().backward(ones)

    run = both if backward else forward_only
    contest.benchmark.group = case.preset
    contest.budget /= 6
    runs = {"ours": run}
    if not case.op.startswith(
        ("farthest_point_sample", "knn")
    ):  # by far slower in plain torch, and of no interest there
        runs["oracle"] = reference_backend()(run)
    contest.run(runs, count, preset=case.preset, what=f"{case.op}, {direction.replace('_', ' + ')}")
