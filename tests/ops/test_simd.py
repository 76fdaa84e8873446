"""Vector functions of the CPU kernels against the C library in double precision."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "simd"
STRIDE = 1009  # a prime; 1 takes all floats, most of an hour
UNITS = {"exp": 1.5, "log": 1, "log_normal": 1, "log1p": 1.5, "tanh": 1.5, "sigmoid": 3}
ABSOLUTE = {
    "sine": 1.2e-7,
    "cosine": 1.2e-7,
    "sine_quarter": 1.2e-7,
    "cosine_quarter": 1.2e-7,
    "continuous_bernoulli": 5e-7,
}


@pytest.mark.slow
def test_errors_are_those_that_the_source_states(tmp_path, build_on_host, isas):
    program = build_on_host(tmp_path / "functions", [HERE / "functions.cpp"], ["-O3"])
    lines = subprocess.run([program, str(STRIDE)], check=True, text=True, capture_output=True).stdout.splitlines()
    found = [line.split() for line in lines]
    assert {(isa, name) for isa, name, *_ in found} == {(isa, name) for isa in isas for name in (*UNITS, *ABSOLUTE)}
    for isa, name, units, absolute, worst in found:
        error, bound = (float(units), UNITS[name]) if name in UNITS else (float(absolute), ABSOLUTE[name])
        assert error <= bound, (isa, name, worst)
