"""Files are written whole or not at all, read from regular files only, and values in messages stay short."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from vamoh._checks import listed, shown
from vamoh._files import check_path, is_unfinished, read_file, reading, whole_file, write_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with whole_file("test", path) as file:
        file.write(b"one")
        assert not path.exists()
        assert [is_unfinished(p) for p in tmp_path.iterdir()] == [True]
    write_file("test", path, "zwei ü")
    assert path.read_bytes() == "zwei ü".encode()
    assert names(tmp_path) == ["a.bin"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), TypeError()])
def test_what_fails_leaves_the_old_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)) as caught, whole_file("test", path) as file:
        file.write(b"half")
        raise error
    if isinstance(error, OSError):
        assert "test: cannot write" in str(caught.value) and str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_links_are_replaced_not_followed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "run"
    folder.mkdir()
    outside.write_text("mine")
    (folder / "a").symlink_to(outside)
    (folder / "a.tmp").symlink_to(outside)
    write_file("test", folder / "a", "new")
    assert outside.read_text() == "mine"
    assert (folder / "a").read_text() == "new" and not (folder / "a").is_symlink()


def test_only_a_file_is_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match=f"cannot write .*{name}"):
            write_file("test", tmp_path / name, "x")
    write_file("test", tmp_path / "new", "x", new=True)
    with pytest.raises(FileExistsError, match="new exists; remove it or choose another name"):
        write_file("test", tmp_path / "new", "y", new=True)
    assert (tmp_path / "new").read_text() == "x"
    assert names(tmp_path) == ["folder", "new", "pipe"]


def test_only_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert read_file("test", tmp_path / "file") == b"x"
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises(ValueError, match=f"test: .*{name} must be a file, got a"):
            read_file("test", tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_file("test", tmp_path / "nothing")


def test_forgotten_files_go(tmp_path: Path) -> None:
    old, young = tmp_path / f".vamoh-{'0' * 16}.tmp", tmp_path / f".vamoh-{'1' * 16}.tmp"
    other = tmp_path / ".vamoh-mine.tmp"
    for path in (old, young, other):
        path.write_bytes(b"")
    for path in (old, other):
        os.utime(path, (1e9, 1e9))
    write_file("test", tmp_path / "a", "x")
    assert names(tmp_path) == sorted([young.name, other.name, "a"])


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_disk_that_cannot_sync(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_file("test", tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


@pytest.mark.parametrize(
    "error", [IndexError("x"), AttributeError(), AssertionError("a\nb"), RecursionError(), OSError("z")]
)
def test_whatever_a_reader_raises_names_the_file(error: Exception) -> None:
    with (
        pytest.raises(ValueError, match=r"test: a/b is damaged or not a picture \("),
        reading("test", "a/b", "a picture"),
    ):
        raise error
    with pytest.raises(FileNotFoundError), reading("test", "a/b", "a picture"):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_values_in_messages_are_short() -> None:
    nested: Any = [1] * 10
    for _ in range(30):
        nested = [nested] * 10
    for value in (nested, "x" * 10**6, 10**5000, dict.fromkeys(range(100), nested), b"y" * 1000, torch.zeros(9, 9)):
        assert len(shown(value)) <= 80
    assert shown(torch.zeros(3)) == "Tensor" and shown([torch.zeros(2)]) == "[Tensor]"
    assert shown([1, "a", None, 2.5]) == "[1, 'a', None, 2.5]"
    assert shown(10**5000) == "an int of 16610 bits"


def test_lists_in_messages_are_short() -> None:
    assert listed(["a"]) == "a"
    assert listed(["a", "b"]) == "a; b"
    assert listed(["a" * 50] * 1000, 120) == f"{'a' * 50}; {'a' * 50}; and 998 more"


def test_names_no_file_can_have() -> None:
    for name in ("a\0b", "a\udcff"):
        with pytest.raises(ValueError, match="test: out must be a path in UTF-8 without NUL, got 'a"):
            check_path("test", "out", name)
    for name in ("a/" * 2048, "a" * 256):
        with pytest.raises(
            ValueError, match="test: out must be a path of names of at most 255 bytes, got 'a"
        ) as caught:
            check_path("test", "out", name)
        assert len(str(caught.value)) < 200
    check_path("test", "out", f"{'a' * 255}/a.nc::{'variable,' * 99}")
