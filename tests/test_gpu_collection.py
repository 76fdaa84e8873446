"""`pytest -m gpu` on a machine of GPUs, which has neither the command line's parser nor the checkers of style."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MISSING = ("tyro", "ruff", "mypy", "onnx", "onnxscript", "onnxruntime", "netCDF4", "dicebear_core", "resvg_py")


@pytest.mark.slow
def test_collection_needs_no_optional_package(tmp_path: Path) -> None:
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in MISSING)]
    (tmp_path / "missing.py").write_text("\n".join(lines) + "\n")
    code = "import missing, sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "tests/test_gpu.py::test_no_step_waits" in result.stdout
