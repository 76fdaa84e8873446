"""The package as others get it: sdist, wheel, import, with and without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vamoh
from vamoh.config import PRESETS
from vamoh.ops._native import native_unavailable

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"


def run(*command: object, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VAMOH_", "PYTHONPATH"))} | env
    result = subprocess.run([*map(str, command)], cwd=cwd, env=environment, text=True, capture_output=True, timeout=900)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def build(kind: str, source: Path, out: Path, **env: str) -> Path:
    return out / run(sys.executable, "-c", BUILD, kind, out, cwd=source, **env).stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Source distribution, built in a copy so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("sdist")
    skipped = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "tree", ignore=skipped)
    return build("sdist", folder / "tree", folder)


@pytest.fixture
def source(sdist, tmp_path) -> Path:
    """The unpacked source distribution."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path)
    return tmp_path / sdist.name.removesuffix(".tar.gz")


def install(wheel: Path, target: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel]
    run(*pip, cwd=target.parent)


def run_installed(script: str, target: Path) -> list[str]:
    """Lines printed by a script that sees `target`, but not this environment's own installation of the package."""
    path = os.pathsep.join([str(target), sysconfig.get_path("purelib")])
    return run(sys.executable, "-S", "-c", script, cwd=target.parent, PYTHONPATH=path).stdout.splitlines()


def test_sdist_holds_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tracked = {
        str(p.relative_to(ROOT)) for d in ("csrc", "kernels") for p in (ROOT / d).rglob("*.*") if p.suffix != ".pyc"
    }
    presets = {f"vamoh/presets/{name}.yaml" for name in PRESETS}
    assert tracked | presets | {"LICENSE", "constraints.txt", "pyproject.toml", "setup.py", "vamoh/py.typed"} <= names
    assert not [name for name in names if name.startswith("tests/") or name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_wheel_from_sdist(source, tmp_path):
    native = "auto" if native_unavailable() else "1"
    cuda = "1" if native == "1" and shutil.which("nvcc") else "auto"
    (source / "kernels" / "tuned").mkdir(exist_ok=True)
    (source / "kernels" / "tuned" / "a_gpu.json").write_text("{}")
    wheel = build("wheel", source, tmp_path, VAMOH_NATIVE=native, VAMOH_CUDA=cuda)
    names = zipfile.ZipFile(wheel).namelist()
    assert len([n for n in names if n.startswith("vamoh/_native.")]) == (0 if native_unavailable() else 1)
    bundled = {f"vamoh/data/bundled/{p.name}" for p in (ROOT / "vamoh" / "data" / "bundled").iterdir()}
    bundled |= {f"vamoh/presets/{name}.yaml" for name in PRESETS}
    python = {str(p.relative_to(ROOT)) for p in (ROOT / "vamoh").rglob("*.py")}
    kernels = {"vamoh/kernels/__init__.py", "vamoh/kernels/tuned/a_gpu.json"}
    assert bundled | python | kernels | {"vamoh/py.typed"} <= set(names)
    assert {n.split("/")[0] for n in names} == {"vamoh", f"vamoh-{vamoh.__version__}.dist-info"}
    assert wheel.stat().st_size < 8 << 20

    metadata = zipfile.ZipFile(wheel).read(f"vamoh-{vamoh.__version__}.dist-info/METADATA").decode()
    needs = {Requirement(text).name.lower() for text in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)}
    pinned = {Requirement(line).name.lower() for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]}
    assert {"torch", "numpy", "ruff", "tensorboard"} <= needs
    assert {name.replace("-", "_") for name in needs - {"vamoh"}} <= {name.replace("-", "_") for name in pinned}

    install(wheel, tmp_path / "target")
    script = f"""
import vamoh, vamoh.kernels, vamoh.ops
assert vamoh.__file__.startswith({str(tmp_path)!r}), vamoh.__file__
assert vamoh.kernels.__file__.startswith({str(tmp_path)!r})
assert len(vamoh.open_dataset("digits").splits["test"]) == 1000
assert vamoh.load_config("era5").model.components == 3
print(vamoh.ops.knn(vamoh.grid_coords((4, 4)), vamoh.grid_coords((2, 2)), 1).tolist())
report = vamoh.ops.status()
print([row.available for row in report.rows if row.op == "knn" and row.backend != "cuda"])
print(report.build.get("cuda"))
"""
    lines = run_installed(script, tmp_path / "target")
    assert lines[:2] == ["[[0], [3], [12], [15]]", str([not native_unavailable(), True])]
    if cuda == "1":
        assert re.fullmatch(r"[\d.]+ for sm_80, sm_90, compute_90", lines[2])


@pytest.mark.slow
def test_install_without_a_compiler(source, tmp_path):
    broken = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    options = {"VAMOH_NATIVE": "1", "VAMOH_CUDA": "0", **broken}
    forced = run(sys.executable, "-c", BUILD, "wheel", tmp_path, cwd=source, check=False, **options)
    assert forced.returncode != 0
    assert "vamoh._native could not be built" in forced.stdout + forced.stderr

    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\nexit 3\n")
    nvcc.chmod(0o755)
    broken["CUDA_HOME"] = str(tmp_path / "cuda")
    result = run(sys.executable, "-c", BUILD, "wheel", tmp_path, cwd=source, **broken)
    assert "vamoh will run on plain torch" in result.stdout + result.stderr
    assert "CUDA kernels could not be compiled" in result.stdout + result.stderr
    install(tmp_path / result.stdout.split()[-1], tmp_path / "target")
    script = """
import vamoh
from vamoh.config import PRESETS
from vamoh.ops import knn, status
print(knn(vamoh.grid_coords((4, 4)), vamoh.grid_coords((2, 2)), 1).tolist())
print([row.reason for row in status().rows if (row.op, row.backend) == ("knn", "cpu")])
"""
    lines = run_installed(script, tmp_path / "target")
    assert lines[0] == "[[0], [3], [12], [15]]"
    assert "the native module is not built" in lines[1]
    assert "reinstall vamoh where a C++17 compiler works" in lines[1]


@pytest.mark.slow
def test_native_can_be_left_out(source, tmp_path):
    wheel = build("wheel", source, tmp_path, VAMOH_NATIVE="0")
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("vamoh/_native.")]
    result = run(sys.executable, "-c", BUILD, "wheel", tmp_path, cwd=source, check=False, VAMOH_NATIVE="yes")
    assert result.returncode != 0
    assert "VAMOH_NATIVE must be auto, 0 or 1, got 'yes'" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"VAMOH_CUDA": "yes"}, "VAMOH_CUDA must be auto, 0 or 1, got 'yes'"),
        ({"VAMOH_CUDA": "1", "CUDA_HOME": "/nonexistent"}, "VAMOH_CUDA=1 needs nvcc, which is not in CUDA_HOME"),
    ],
)
def test_cuda_that_cannot_be_built(source, tmp_path, options, message):
    result = run(sys.executable, "-c", BUILD, "wheel", tmp_path, cwd=source, check=False, **options)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr


def test_import_is_lazy():
    script = """
import sys, vamoh
loaded = {"torch", "numpy", "vamoh._native", "vamoh.model"} & set(sys.modules)
assert not loaded, loaded
vamoh.PointSet
assert "vamoh._native" not in sys.modules
"""
    run(sys.executable, "-c", script, cwd=ROOT)


def test_public_names():
    assert vamoh.__all__ == [
        "Config",
        "Dataset",
        "ElboTerms",
        "PointSet",
        "Reconstruction",
        "VaMoH",
        "__version__",
        "collate",
        "grid_coords",
        "load",
        "load_config",
        "open_dataset",
        "sphere_grid",
    ]
    for name in vamoh.__all__:
        assert getattr(vamoh, name).__doc__, name
    with pytest.raises(AttributeError, match="module 'vamoh' has no attribute 'nothing'"):
        _ = vamoh.nothing
