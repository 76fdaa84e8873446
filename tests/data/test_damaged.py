"""Damaged files of every kind: an error that names the file, or values that are right in themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vamoh.data import fields, fields_process, open_dataset

sys.path.insert(0, str(Path(__file__).parent))
from mutations import kinds, mutate, open_damaged

sys.path.pop(0)

QUICK = [kind for kind in kinds() if not kind.startswith("netcdf")]
WHOLE = {kind: kinds()[kind][2]() for kind in QUICK}


@pytest.mark.parametrize("kind", QUICK)
def test_the_whole_file_is_read(tmp_path: Path, kind: str) -> None:
    assert open_damaged(tmp_path, kind, WHOLE[kind]) == "read"


@settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(QUICK), seed=st.integers(0, 2**63))
def test_damage_is_named_or_harmless(tmp_path: Path, kind: str, seed: int) -> None:
    open_damaged(tmp_path, kind, mutate(WHOLE[kind], np.random.default_rng(seed)))


@pytest.mark.parametrize("kind", [pytest.param("netcdf 3", marks=pytest.mark.slow), "netcdf 4"])
def test_damage_to_netcdf(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("netCDF4")
    whole = kinds()[kind][2]()
    assert open_damaged(tmp_path, kind, whole) == "read"
    for seed in range(8):
        open_damaged(tmp_path, kind, mutate(whole, np.random.default_rng(seed)))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("while True: pass", "got a reader that came to no end in 1 s of computing"),
        ("import os; os.abort()", "got a crash of its reader (SIGABRT)"),
        ("raise SystemExit(3)", "got a crash of its reader (status 3)"),
        ("print('no', flush=True)", "got "),
        ("print('{\"bytes\": 99}', flush=True)", "got "),
    ],
)
@pytest.mark.parametrize("library", ["netCDF4", "xarray"])
def test_a_reader_that_hangs_or_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str, library: str
) -> None:
    pytest.importorskip(library)
    file, kind = tmp_path / ("a.nc" if library == "netCDF4" else "a.grib"), "NetCDF file"
    file.write_bytes(b"CDF")
    if library == "xarray":
        kind = "file for xarray"
    limits = "import resource as r; r.setrlimit(r.RLIMIT_CPU, (1, 2)); r.setrlimit(r.RLIMIT_CORE, (0, 0))"
    (tmp_path / "reader.py").write_text(f"{limits}\n{script}\n")
    monkeypatch.setattr(fields_process, "__file__", str(tmp_path / "reader.py"))
    monkeypatch.setattr(fields_process, "SECONDS", 1)
    with pytest.raises(ValueError) as error:
        open_dataset("netcdf", str(file))
    assert str(error.value).startswith(f"{file}: must be a readable {kind}, {message}")


@pytest.mark.slow
def test_damage_to_zarr(tmp_path: Path) -> None:
    """Of a store as of a file: an error that names it, whatever its metadata say."""
    xarray, _ = pytest.importorskip("xarray"), pytest.importorskip("zarr")
    coords = {"time": np.arange(6), "lat": np.linspace(90, -90, 7), "lon": np.arange(12) * 30.0 - 180}
    values = np.random.default_rng(0).normal(280, 20, (6, 7, 12))
    xarray.Dataset({"t": (("time", "lat", "lon"), values, {"units": "K"})}, coords).to_zarr(tmp_path / "a.zarr")
    path = str(tmp_path / "a.zarr")
    assert len(open_dataset("netcdf", path)) == 6
    files = [file for file in sorted((tmp_path / "a.zarr").rglob("*")) if file.is_file() and file.suffix == ".json"]
    assert files
    for seed, file in enumerate(files * 2):
        whole = file.read_bytes()
        file.write_bytes(mutate(whole, np.random.default_rng(seed)))
        try:
            open_dataset("netcdf", path)
        except ValueError as error:
            assert str(error).startswith(path) and "\n" not in str(error) and len(str(error)) < 300 + len(path)
        file.write_bytes(whole)


def test_the_reader_is_bounded(tmp_path: Path) -> None:
    script = "import fields_process as p; p.SECONDS = 1; p._allow(0)\nwhile True: pass"
    folder = Path(fields_process.__file__).parent
    code = f"import sys; sys.path.append({str(folder)!r})\n{script}"
    start = time.process_time(), os.times().children_user
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60)
    assert done.returncode == -signal.SIGXCPU
    assert os.times().children_user - start[1] < 8


def test_interrupts_leave_the_reader_alone(tmp_path: Path) -> None:
    pytest.importorskip("netCDF4")
    (tmp_path / "a.nc").write_bytes(kinds()["netcdf 4"][2]())
    file: Any = fields.ReadFile(str(tmp_path / "a.nc"), "netCDF4")
    process = file._process
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert file.read("lat", [slice(0, 3)]).tolist() == [90, 0, -90]
    file.close()
    assert process.poll() is not None
    assert file.read("lat", [slice(1, 3)]).tolist() == [0, -90], "another reader starts"
    file.close()


def test_a_variable_larger_than_its_file_can_hold(tmp_path: Path) -> None:
    netcdf = pytest.importorskip("netCDF4")
    with netcdf.Dataset(tmp_path / "a.nc", "w") as out:
        for name, values in (("lat", [90, 0, -90]), ("lon", [0, 90, 180, 270])):
            out.createDimension(name, len(values))
            out.createVariable(name, "f8", (name,))[:] = values
        out.createDimension("time", 10**9)
        out.createVariable("t", "f8", ("time", "lat", "lon"), zlib=True)
    with pytest.raises(
        ValueError, match=r"a\.nc: must be a readable NetCDF file, got .*96000000000 bytes by its header"
    ):
        open_dataset("netcdf", str(tmp_path / "a.nc"))
