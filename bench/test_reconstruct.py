"""Reconstruction of new clouds: neighbours searched, encoded, decoded at the same and at twice the resolution."""

from __future__ import annotations

import pytest

from bench import counts, memory
from bench.cases import NAMES, Case, Reconstruct
from bench.conftest import Contest
from bench.timing import SLOW, TooSlow


@pytest.mark.parametrize("scale", [1, 2], ids=["1x", "2x"])
@pytest.mark.parametrize("single", [True, False], ids=["one", "batch"])
@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_reconstruct(case: Case, single: bool, scale: int, contest: Contest) -> None:
    work = Reconstruct(case, 1 if single else case.batch, scale)
    if case.name == "shapenet" and not (single and scale == 1):
        contest.left_out["oracle"] = "minutes per call; measured for one function at 1x"
    if contest.compile_limit:
        try:
            work.compile(contest.compile_limit)
        except (TooSlow, RuntimeError) as error:
            contest.left_out["compile"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    else:
        contest.left_out["compile"] = "not asked for"
    names = [name for name in ("ours", "oracle", "compile", "baseline") if name not in contest.left_out]
    one = Reconstruct(case, 1, scale)  # enough to tell, but what is compiled takes whole batches
    errors = {name: {"mean": (work if name == "compile" else one).check(name)} for name in names[1:]}
    contest.benchmark.group = case.name
    what = f"reconstruct, {scale}x"
    runs = {name: work.run(name) for name in names}
    count = counts.reconstruct(work.sizes, len(work.out), mirrored=work.mirrored)
    contest.run(runs, count, preset=case.name, what=what, batch=len(work.values), errors=errors)
    if contest.memory:
        contest.benchmark.extra_info["memory"] = {
            name: memory.peak(case.name, name, "reconstruct", len(work.values), scale)
            for name in names
            if name != "compile" and not contest.slow(name, SLOW)
        }
