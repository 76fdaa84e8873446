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


SPARE = 64
"""Bytes that a compiler other than the table's may spill besides: 16 of 255 registers, which each allocates its way."""


def within_limits(row: str, spare: int = 0) -> bool:
    """Whether a row of the table keeps to the limits, and its kernel uses tensor cores where the precision has any."""
    op, _, _, precision, chip, _, registers, spilled, shared, wgmma, mma = row.strip("| ").split(" | ")
    kernel = "train" if op.endswith(("expected", "backward")) else "forward"
    return (
        int(registers) <= 255
        and int(spilled) <= MOST_SPILLED[kernel] + spare
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
rest = [expected, backward, *gates, KlCase("categorical_kl", 10, True)]
for case, precision in sample + [(case, case.precisions[0]) for case in rest]:
    print(row(case, precision, {chip}))
"""
    rows = compiled(script, tmp_path)
    assert len(rows) == 11
    known = f"Triton {triton.__version__}" in TEXT
    assert not [row for row in rows if not within_limits(row, 0 if known else SPARE)]
    if known:
        assert set(rows) <= set(ROWS), f"the compiler reports something else: {REWRITE}"


LAUNCHES = """
import torch
from types import SimpleNamespace
from triton.runtime import driver
from vamoh.layout import packed_size
from vamoh.kernels import gating, inr_mixture, planar_flow

chip = GPUTarget("cuda", 90, 32)
same = {"get_current_target": lambda: chip, "get_current_device": lambda: 0, "get_current_stream": lambda device: 0}
driver.set_active(SimpleNamespace(**same))
compiled = {}

def compile(self, key, signature, device, constants, options, attributes, warmup):
    compiled[self.__module__, self.__name__, key] = ASTSource(self, signature, constants, attributes), options

triton.JITFunction._do_compile = compile
for module in (gating, inr_mixture, planar_flow):
    module.device_of = lambda device: Device(90, 132)
new = torch.empty

def network(op, batch, components, points, widths, mirrored, likelihood, precision="tf32x3"):
    theta, x = new(batch, components, packed_size(widths)), new(points, widths[0])
    mirror = torch.arange(points - 1, -1, -1) if mirrored else None
    y, q, scale = new(batch, points, widths[-1]), new(batch, components, points), new(components, widths[-1])
    more = [mirror, widths, "leaky_relu", 0.01, 1.0, *likelihood, precision]
    if op == "expected":
        inr_mixture.expected_log_likelihood(theta, x, y, q, scale, *more)
    elif op == "log_likelihood":
        inr_mixture.log_likelihood(theta, x, y, scale, *more)
    elif op == "mean":
        inr_mixture.mean(theta, x, q, *more[:5], likelihood[0], precision)
    elif op == "outputs":
        inr_mixture.outputs(theta, x, *more[:5], precision)
    else:
        grad = new(batch, components, points, widths[-1])
        inr_mixture.outputs_backward(grad, theta, x, *more[:5], precision)

def gates(batch, points, widths, channels):
    h, parameters = widths[0], new(widths[0] * channels + sum(o * (i + 1) for i, o in zip(widths, widths[1:])))
    given = [new(1, h, points), new(batch, h), new(batch, points, channels), parameters, widths, 0.01, False]
    log_p = gating.gating(*given, "tf32x3")
    gating.gating_backward(log_p, log_p, *given, False, "tf32x3")
    q, kl = gating.categorical_kl(log_p, log_p, None)
    gating.categorical_kl_backward(q, kl, q, log_p, log_p)

def flow(batch, samples, latent, layers):
    parameters = [new(layers, latent), new(layers), new(layers, latent), new(layers), new(latent), new(latent)]
    draw = [new(batch, latent), new(batch, latent)]
    planar_flow.expected_log_prob(*draw, parameters, 0.01, None, torch.tensor(1), samples, True, True)
"""


@pytest.mark.slow
def test_point_dropout_compiles_every_kernel_once(tmp_path):
    """Steps of `climate` with other numbers of points, odd ones and multiples of 16."""
    script = (
        LAUNCHES
        + """
for points in (4140, 4139, 2080, 3013, 2048, 1041, 700):
    network("expected", 6, 3, points, (256, 64, 64, 1), False, ("logistic", 1 / 512, 1e-7, False))
    gates(6, points, (32, 3), 1)
    flow(6, 64, 32, 6)
print(*sorted(f"{module.split('.')[-1]}.{name}" for module, name, _ in compiled), sep="\\n")
"""
    )
    found = compiled(script, tmp_path)
    kernels = ["forward", "kl_forward", "kl_train", "train"]
    assert found == [*(f"gating.{k}" for k in kernels), "inr_mixture.train", "planar_flow.train"]


def test_kernels_are_compiled_ahead_of_time_as_when_they_are_launched(tmp_path):
    script = (
        LAUNCHES
        + """
for op in ("log_likelihood", "expected", "mean", "outputs", "outputs_backward"):
    network(op, 64, 10, 4096, (256, 64, 64, 64, 3), op != "outputs", ("logistic", 1 / 512, 1e-7, False))
gates(64, 4096, (32, 32, 5), 0)
flow(64, 4096, 64, 80)
launched = {code.hash(): options for code, options in compiled.values()}
for case in cases():
    code, options = source(case, "tf32x3" if "tf32x3" in case.precisions else "ieee", 90)
    if code.hash() in launched:
        wanted = launched.pop(code.hash())
        assert all(getattr(wanted, name) == value for name, value in options.items()), (case, wanted)
        print(case.op)
print(len(launched))
"""
    )
    *found, unknown = compiled(script, tmp_path)
    networks = ["log_likelihood", "expected", "mean", "outputs", "outputs_backward"]
    assert found == [*networks, "expected", "gating", "gating_backward"]
    assert unknown == "2"  # kl_forward and kl_train of 5 components; the table has 10


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
