"""The cache of generated data: whole files only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vamoh.data import files
from vamoh.data.files import cached


class Builder:
    """Counts how often the data is made."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, np.ndarray[Any, Any]]:
        self.calls += 1
        return {"x": np.random.default_rng(0).integers(0, 255, 5000, dtype=np.uint8)}


def test_second_opening_reads_the_file(tmp_path: Path) -> None:
    build = Builder()
    first = cached(str(tmp_path / "deep" / "cache"), "a.npz", build)
    second = cached(str(tmp_path / "deep" / "cache"), "a.npz", build)
    assert build.calls == 1
    assert np.array_equal(first["x"], second["x"])
    assert [path.name for path in (tmp_path / "deep" / "cache").iterdir()] == ["a.npz"]


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_half_written_file_is_made_again(tmp_path: Path, keep: int) -> None:
    build = Builder()
    cached(str(tmp_path), "a.npz", build)
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[:keep])
    assert np.array_equal(cached(str(tmp_path), "a.npz", build)["x"], build()["x"])
    assert (tmp_path / "a.npz").read_bytes() == whole


def test_flipped_bit_is_noticed(tmp_path: Path) -> None:
    build = Builder()
    cached(str(tmp_path), "a.npz", build)
    damaged = bytearray((tmp_path / "a.npz").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(damaged)
    cached(str(tmp_path), "a.npz", build)
    assert build.calls == 2


def test_failure_while_building_leaves_nothing(tmp_path: Path) -> None:
    def build() -> dict[str, np.ndarray[Any, Any]]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached(str(tmp_path), "a.npz", build)
    assert list(tmp_path.iterdir()) == []


def test_failure_while_writing_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cached(str(tmp_path), "a.npz", Builder())
    assert list(tmp_path.iterdir()) == []


def test_left_over_part_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "a.npz.123.part").write_bytes(b"half")
    build = Builder()
    assert len(cached(str(tmp_path), "a.npz", build)["x"]) == 5000
    assert build.calls == 1


def test_default_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached(None, "a.npz", Builder())
    assert (tmp_path / "vamoh" / "a.npz").is_file()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cached(None, "a.npz", Builder())
    assert (tmp_path / "home" / ".cache" / "vamoh" / "a.npz").is_file()


def test_bundled_file_that_is_damaged_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BUNDLED_FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"mnist10k\.npz: must be a readable .npy or .npz file, got FileNotFoundError"):
        files.read_bundled("mnist10k.npz")
