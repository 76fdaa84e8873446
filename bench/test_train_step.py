"""The training step at full size: forward and backward, and with the optimizer; how its time grows."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict

import pytest

from bench import counts, memory
from bench.cases import BATCH, NAMES, Case, adam, train_step
from bench.conftest import Contest
from bench.timing import SLOW, TooSlow


@pytest.mark.parametrize("optimizer", [False, True], ids=["forward_backward", "with_optimizer"])
@pytest.mark.parametrize("samples", [4096, 16])
@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_train_step(case: Case, samples: int, optimizer: bool, contest: Contest) -> None:
    case.model.kl_samples = samples
    names = ["ours", "oracle", "compile", "baseline"]
    if contest.compile_limit:
        try:
            case.compile(contest.compile_limit)
        except (TooSlow, RuntimeError) as error:
            contest.left_out["compile"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    else:
        contest.left_out["compile"] = "not asked for"
    names = [name for name in names if name not in contest.left_out]
    errors = {name: asdict(case.check(name)) for name in names[1:]}
    steps = {name: train_step(case, name, adam(case, name) if optimizer else None) for name in names}
    what = f"train step, {samples} flow samples" + (", Adam" if optimizer else "")
    count = counts.train_step(case.sizes, mirrored=case.mirrored)
    contest.benchmark.group = case.name
    contest.run(steps, count, preset=case.name, what=what, batch=case.batch, errors=errors)
    if contest.memory and not optimizer:
        contest.benchmark.extra_info["memory"] = {
            name: memory.peak(case.name, name, samples)
            for name in names
            if name != "compile" and not contest.slow(name, 2 * SLOW)
        }


@pytest.mark.parametrize("letter", ["N", "B", "K"])
@pytest.mark.parametrize("name", NAMES)
def test_scaling(name: str, letter: str, contest: Contest) -> None:
    """Ours alone, forward and backward with 16 samples, as one size grows fourfold."""
    full = Case(name, batch=1)
    observed, components = full.drawn or full.points.count, full.model.components
    steps, numbers = {}, {}
    for share in (0.25, 0.5, 1.0):
        if letter == "N":
            case = Case(name, kl_samples=16, points=max(round(observed * share), full.model.min_points))
            numbers[share] = case.points.count
        elif letter == "B":
            case = Case(name, kl_samples=16, batch=max(round(BATCH[name] * share), 1))
            numbers[share] = case.batch
        else:
            case = Case(name, kl_samples=16, components=max(round(components * share), 1))
            numbers[share] = case.model.components
        steps[f"{letter}={numbers[share]}"] = train_step(case, "ours")
    contest.benchmark.group = name
    contest.budget /= 2
    contest.run(dict(reversed(steps.items())), preset=name, what=f"scaling with {letter}")
    extra = contest.benchmark.extra_info
    points = [(math.log(n), math.log(extra["contestants"][f"{letter}={n}"]["seconds"])) for n in numbers.values()]
    extra["exponent"] = statistics.linear_regression(*zip(*points, strict=True)).slope
