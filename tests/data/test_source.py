"""Data that stay in their file: the same bits as in memory, found out as early, within bounds of memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vamoh.data import Dataset, open_dataset, source
from vamoh.data.source import Source

Array = np.ndarray[Any, Any]


def images(folder: Path, channels: int) -> tuple[str, str]:
    rng = np.random.default_rng(0)
    for i in range(30):
        shape = (7, 8, 3) if channels == 3 and i == 20 else (7, 8)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return "images", str(folder)


def array(folder: Path, dtype: Any) -> tuple[str, str]:
    values = np.random.default_rng(0).random((30, 5, 6, 2))
    np.save(folder / "a.npy", (values * 255).astype(dtype) if dtype == np.uint8 else values.astype(dtype))
    return "arrays", str(folder / "a.npy")


def fields(folder: Path, missing: str, layout: str = "NETCDF4") -> tuple[str, str]:
    netcdf = pytest.importorskip("netCDF4")
    values = np.random.default_rng(0).normal(280, 10, (5, 6, 3, 4))
    if missing == "same":
        values[..., 1, 2] = np.nan
    elif missing == "each":
        values[np.random.default_rng(1).random(values.shape) < 0.2] = np.nan
    with netcdf.Dataset(folder / "a.nc", "w", format=layout) as out:
        for name, size in (("member", 5), ("lat", 3), ("time", 6), ("lon", 4)):
            out.createDimension(name, size)
        out.createVariable("lat", "f8", ("lat",))[:] = [-90, 0, 90]
        out.createVariable("lon", "f8", ("lon",))[:] = [-180, -90, 0, 90]
        out.createVariable("t", "f8", ("member", "lat", "time", "lon"))[:] = values.transpose(0, 2, 1, 3)
    return "netcdf", str(folder / "a.nc")


KINDS: dict[str, Callable[[Path], tuple[str, str]]] = {
    "grey images": lambda folder: images(folder, 1),
    "colour images": lambda folder: images(folder, 3),
    "uint8": lambda folder: array(folder, np.uint8),
    "float64": lambda folder: array(folder, ">f8"),
    "fields": lambda folder: fields(folder, "none"),
    "fields of a classic file": lambda folder: fields(folder, "none", "NETCDF3_CLASSIC"),
    "fields with a hole": lambda folder: fields(folder, "same"),
    "fields with holes": lambda folder: fields(folder, "each"),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for little, and blocks of a few functions."""
    monkeypatch.setattr(source, "memory_share", lambda: 1000)
    monkeypatch.setattr(source, "BLOCK_BYTES", 2000)


@pytest.mark.parametrize("kind", KINDS)
def test_functions_in_their_file_are_those_in_memory(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, path = KINDS[kind](tmp_path)
    held = open_dataset(name, path)
    assert isinstance(held.values, torch.Tensor)
    monkeypatch.setattr(source, "memory_share", lambda: 1000)
    monkeypatch.setattr(source, "BLOCK_BYTES", 2000)
    read = open_dataset(name, path)
    assert isinstance(read.values, Source)
    assert held.fingerprint() == read.fingerprint()
    assert (len(held), held.points, held.channels, held.units) == (len(read), read.points, read.channels, read.units)
    assert torch.equal(held.observed(), read.observed()) and held.masked_each == read.masked_each
    assert all(torch.equal(index, read.splits[split]) for split, index in held.splits.items())
    rng = np.random.default_rng(0)
    for index in ([3], [0, 1, 2, 3, 4, 5, 6], [29, 28, 5, 6, 7, 5], rng.integers(0, 30, 50).tolist()):
        a, b = held.batch(torch.tensor(index)), read.batch(torch.tensor(index))
        assert torch.equal(a.values, b.values) and torch.equal(a.coords, b.coords)
        assert (a.mask is None) == (b.mask is None)
        assert a.mask is None or torch.equal(a.mask, b.mask)


@pytest.mark.parametrize("order", ["columns", "npz"])
def test_what_cannot_be_read_in_parts_must_fit(tmp_path: Path, small: None, order: str) -> None:
    values = np.random.default_rng(0).random((30, 5, 6))
    file = tmp_path / ("a.npz" if order == "npz" else "a.npy")
    np.savez(file, values) if order == "npz" else np.save(file, np.asfortranarray(values))
    message = f"{file}: array must fit 1000 bytes of memory, got 3600; larger ones are read in parts from .npy files"
    with pytest.raises(ValueError, match=re.escape(message)):
        open_dataset("arrays", str(file))


def test_a_bad_value_anywhere_is_found_when_the_data_are_opened(tmp_path: Path, small: None) -> None:
    values = np.random.default_rng(0).random((30, 5, 6))
    values[29, 4, 5] = np.nan
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ValueError, match=r"a\.npy: values must be finite, got 1 NaN"):
        open_dataset("arrays", str(tmp_path / "a.npy"))


def test_files_that_change_while_they_are_read_are_named(tmp_path: Path, small: None) -> None:
    _, path = array(tmp_path, np.uint8)
    data = open_dataset("arrays", path)
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match=r"a\.npy: must be a readable \.npy file, got EOFError"):
        data.batch(torch.tensor([29]))
    folder = tmp_path / "images"
    folder.mkdir()
    data = open_dataset(*images(folder, 1))
    assert isinstance(data.values, Source)
    absent = next(i for i in range(30) if i not in data.values._kept)  # type: ignore[attr-defined]
    (folder / f"{absent:02d}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{absent:02d}\.png: must be a readable image, got"):
        data.batch(torch.tensor([absent]))


def test_the_reading_process_ends_with_the_data(tmp_path: Path, small: None) -> None:
    data: Dataset | None = open_dataset(*fields(tmp_path, "none"))
    assert data is not None
    process = data.values._natural.__self__._file._process  # type: ignore[union-attr]
    assert process.poll() is None
    data = None
    assert process.poll() is not None


@pytest.mark.parametrize("kind", ["uint8", "fields with holes", "grey images"])
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_other_processes_read_for_themselves(tmp_path: Path, small: None, kind: str, start: str) -> None:
    data = open_dataset(*KINDS[kind](tmp_path))
    wanted = [data.batch(torch.tensor([i, 29 - i])).values for i in range(8)]
    with multiprocessing.get_context(start).Pool(2, _give, (data,)) as pool:
        found = pool.map(_batch, range(8))
    assert all(torch.equal(a, torch.from_numpy(b)) for a, b in zip(wanted, found, strict=True))
    assert torch.equal(data.batch(torch.tensor([3, 26])).values, wanted[3])


_given: list[Dataset] = []


def _give(data: Dataset) -> None:
    _given[:] = [data]


def _batch(i: int) -> Array:
    values: Array = _given[0].batch(torch.tensor([i, 29 - i])).values.numpy()
    return values


MEASURE = """
import json, sys
from vamoh.data import open_dataset
open_dataset("digits")
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak()
data = open_dataset(sys.argv[1], sys.argv[2])
kept = data.values.nbytes
print(json.dumps([kept, peak() - before]))
"""


def large(folder: Path, kind: str) -> tuple[str, str]:
    values = np.random.default_rng(0).random((600, 200, 200))
    if kind == "images":
        image = Image.fromarray((values[0] * 255).astype(np.uint8).repeat(4, 0).repeat(4, 1))
        for i in range(150):
            image.save(folder / f"{i:03d}.bmp")
        return "images", str(folder)
    if kind == "netcdf":
        with pytest.importorskip("netCDF4").Dataset(folder / "a.nc", "w") as out:
            for name, axis in (("time", np.arange(600)), ("lat", np.linspace(-50, 50, 200)), ("lon", np.arange(200))):
                out.createDimension(name, len(axis))
                out.createVariable(name, "f8", (name,))[:] = axis
            out.createVariable("t", "f8", ("time", "lat", "lon"))[:] = values
        return "netcdf", str(folder / "a.nc")
    if kind == "voxels":
        np.save(folder / "a.npy", values.reshape(-1, 20, 20, 40).round())
        return "voxels", str(folder / "a.npy")
    file = folder / ("a.npz" if kind == "npz" else "a.npy")
    np.savez(file, values) if kind == "npz" else np.save(
        file, np.asfortranarray(values) if kind == "columns" else values
    )
    return "arrays", str(file)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell the peak")
@pytest.mark.parametrize("kind", ["rows", "columns", "npz", "images", "netcdf", "voxels"])
def test_opening_takes_at_most_twice_what_is_kept(tmp_path: Path, kind: str) -> None:
    name, path = large(tmp_path, kind)
    done = subprocess.run([sys.executable, "-c", MEASURE, name, path], capture_output=True, text=True, check=True)
    kept, grown = json.loads(done.stdout)
    print(f"{kind}: kept {kept / 1e6:.0f} MB, peak {grown / 1e6:.0f} MB, {grown / kept:.2f} times")
    assert grown <= 2 * kept


TRAIN = """
import resource, sys
limit = 2 << 30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from vamoh.cli import main
status = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(status)
"""


@pytest.mark.slow
def test_twenty_gigabytes_are_trained_on_in_two(tmp_path: Path) -> None:
    pytest.importorskip("tyro", reason="the command line needs tyro")
    file, count = tmp_path / "large.npy", 20 * 2**30 // 2**14
    with file.open("wb") as out:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, 128, 128)}
        np.lib.format.write_array_header_1_0(out, header)
        start = out.tell()
        out.write(np.random.default_rng(0).bytes(1 << 20))
        out.truncate(start + count * 2**14)  # the rest are zeros, which take no room
    tiny = shlex.split("""
        --model.latent_dim 3 --model.components 2 --model.frequencies 4 --model.encoder_centroids 16 8
        --model.encoder_neighbors 4 4 --model.encoder_channels 4 4 --model.weight_net 4 --model.flow_layers 2
        --model.hypernet_widths 6 --model.inr_widths 5 --model.gating_widths 6 --model.pool_centroids
        --model.pool_neighbors --model.kl_samples 2 --train.steps 3 --train.batch_size 4 --train.num_points 64
        --train.evaluate_every 3 --train.evaluate_count 8 --train.threads 1
    """)
    args = ["train", "digits", *tiny, "--data.name", "arrays", "--data.path", str(file), "--out", str(tmp_path / "run")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", TRAIN, *args], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split("peak ")[1]) < 2 << 30
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["functions"] >= 8
