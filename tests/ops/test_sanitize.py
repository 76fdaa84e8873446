from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted((ROOT / "tests" / "ops" / "sanitize").glob("*.cpp")), *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]


@pytest.mark.slow
@pytest.mark.parametrize(("sanitizer", "level"), [("address,undefined", "-O0"), ("thread", "-O1")])  # the quickest
def test_kernels_under_a_sanitizer(tmp_path, sanitizer, level):
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++17", level, "-g1", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }")
    if subprocess.run([*command, probe, "-o", tmp_path / "probe"], capture_output=True).returncode:
        pytest.skip(f"the compiler has no {sanitizer} sanitizer")

    def build(source: Path) -> Path:
        target = tmp_path / f"{source.stem}.o"
        strict = ["-Werror", "-Wall", "-Wextra", "-I", ROOT / "csrc"]
        subprocess.run([*command, *strict, "-c", source, "-o", target], check=True)
        return target

    program = tmp_path / "sanitize"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        subprocess.run([*command, *pool.map(build, SOURCES), "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
