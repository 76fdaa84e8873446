"""Every Triton kernel compiles without a GPU and keeps to the limits of docs/kernels.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from vamoh.config import PRESETS
from vamoh.kernels import planar_flow_plan
from vamoh.kernels.ahead_of_time import CHIPS, MOST_SPILLED, Case, FlowCase, GatingCase, cases, digest

DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ")][2:]
REWRITE = "run `python -m vamoh.kernels.ahead_of_time docs/kernels.md`"


def within_limits(row: str) -> bool:
    """Whether a row of the table keeps to the limits, and its kernel uses tensor cores where the precision has any."""
    op, _, _, precision, chip, _, registers, spilled, shared, wgmma, mma = row.strip("| ").split(" | ")
    kernel = "train" if op.endswith(("expected", "backward")) else "forward"
    return (
        int(registers) <= 255
        and int(spilled) <= MOST_SPILLED[kernel]
        and int(shared) <= CHIPS[int(chip.removeprefix("sm_"))]
        and (precision == "ieee") == (int(wgmma) + int(mma) == 0)
    )


def compiled(script: str, folder: Path) -> list[str]:
    """Lines printed by a script in a process that compiles kernels instead of interpreting them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    script = "from vamoh.kernels.ahead_of_time import *\n" + script
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, cwd=DOCUMENT.parents[1], text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_table_is_of_these_sources():
    assert digest() in TEXT, f"the kernels changed: {REWRITE}"
    assert len(ROWS) == sum(len(case.precisions) for case in cases()) * len(CHIPS)
    assert len(set(ROWS)) == len(ROWS)


def test_every_plan_keeps_to_the_limits():
    assert not [row for row in ROWS if not within_limits(row)]


def test_limits_are_seen():
    row = next(r for r in ROWS if r.startswith("| expected |") and "sm_80" in r and "tf32x3" in r)
    cells = row.strip("| ").split(" | ")
    assert within_limits(row)
    for column, bad in ((6, 256), (7, 65), (8, 164 << 10), (3, "ieee")):
        assert not within_limits("| " + " | ".join(map(str, [*cells[:column], bad, *cells[column + 1 :]])) + " |")


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_kernels_compile(chip, tmp_path):
    """A sample of the table: the default precision, and one kernel each in the others."""
    script = f"""
sample = [(case, "tf32x3") for case in cases()[:3] + cases()[6:7]] + [(cases()[4], "bf16"), (cases()[8], "tf32")]
expected, backward = FlowCase("expected", 40, 32, True), FlowCase("backward", 40, 32)
gates = [GatingCase("gating", (16, 2), 1), GatingCase("gating_backward", (16, 2), 1)]
rest = [expected, backward, *gates, CoordsCase("coords_backward", 2, 16), KlCase("categorical_kl", 10, True)]
for case, precision in sample + [(case, case.precisions[0]) for case in rest]:
    print(row(case, precision, {chip}))
for case in (cases()[2], cases()[8], expected, gates[1]):
    report(case, case.precisions[0], {chip}, ones=True)
"""
    rows = compiled(script, tmp_path)
    assert len(rows) == 12
    assert not [row for row in rows if not within_limits(row)]
    if f"Triton {triton.__version__}" in TEXT:
        assert set(rows) <= set(ROWS), f"the compiler reports something else: {REWRITE}"


def test_sizes_of_the_table_are_those_of_the_presets():
    networks = [case for case in cases() if isinstance(case, Case)]
    assert {case.op for case in networks} == {"log_likelihood", "expected", "mean", "outputs", "outputs_backward"}
    assert {4, 32, 64, 128, 256} <= {case.widths[1] for case in networks}
    assert {case.likelihood[0] for case in networks} == {"logistic", "bernoulli", "continuous_bernoulli"}
    flows = [case for case in cases() if isinstance(case, FlowCase)]
    assert {case.op for case in flows} == set(planar_flow_plan.OPS)
    assert {config.model.latent_dim for config in PRESETS.values()} <= {case.latent for case in flows}
    gates = [case for case in cases() if isinstance(case, GatingCase)]
    models = [config.model for config in PRESETS.values()]
    wanted = {(*m.gating_widths, m.components) for m in models}
    assert max(map(len, wanted)) < max(len(case.widths) for case in gates)
    assert max(max(widths) for widths in wanted) <= max(max(case.widths) for case in gates)
    assert {case.bounded for case in gates} == {case.shared for case in gates} == {True, False}
