"""Reading and writing files; without torch, which the configuration does not need.

`whole_file` writes every file of the package, and `reading` words what is wrong with one that comes from outside.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vamoh._shown import reason, shown

_UNFINISHED = re.compile(r"\.vamoh-[0-9a-f]{16}\.tmp")
_FORGOTTEN = 3600.0
"""Seconds after which an unfinished file is one that its writer did not live to finish."""

_UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What a file system answers that cannot do what it is asked for: network shares, FUSE, object stores."""


def check_path(where: str, name: str, value: object) -> Path:
    """Return a str or path as a Path; TypeError for anything else, ValueError for what no file can be called."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{where}: {name} must be a str or a path, got {type(value).__name__}")
    check_name(where, name, os.fspath(value))
    return Path(value)


def check_name(where: str, name: str, value: str) -> None:
    """Raise ValueError for a path that holds a NUL or bytes that are not UTF-8, or is longer than paths can be."""
    if not isinstance(value, str) or "\0" in value or any(0xD800 <= ord(letter) < 0xE000 for letter in value):
        raise ValueError(f"{where}: {name} must be a path in UTF-8 without NUL, got {shown(value)}")
    path = value.partition("::")[0]  # a variable may follow
    if len(value) > 4095 or any(len(part.encode()) > 255 for part in path.split(os.sep)):
        raise ValueError(f"{where}: {name} must be a path of names of at most 255 bytes, got {shown(value)}")


@contextmanager
def writing(where: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an OSError, such as a full disk's, name the file that could not be written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{where}: cannot write {path} ({error.strerror or error})") from error


@contextmanager
def reading(where: str, path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """Turn whatever the reader of a damaged file raises into a ValueError that names the file.

    kind: what it should be, "a YAML file". A missing file, or one that the system refuses, keeps its own error.
    """
    try:
        yield
    except OSError as error:
        # Without a name it is a library's own, or the system's about a place that a damaged file points to.
        if error.filename is None and not isinstance(error, FileNotFoundError):
            raise ValueError(f"{where}: {path} is damaged or not {kind} ({reason(error)})") from error
        raise
    except Exception as error:
        raise ValueError(f"{where}: {path} is damaged or not {kind} ({reason(error)})") from error


@contextmanager
def whole_file(where: str, path: str | os.PathLike[str], *, new: bool = False) -> Iterator[BinaryIO]:
    """Write a file that appears under its name only when it is whole and on the disk; a file of that name goes.

    What is written lies beside it under a name of its own until then, so writers never meet, and a link that has the
    name is replaced, not followed. new: FileExistsError where there is such a file. OSError names the file.
    """
    path = Path(path)
    with writing(where, path):
        _check_target(where, path, new)
        unfinished = path.with_name(f".vamoh-{secrets.token_hex(8)}.tmp")
        file = unfinished.open("xb")
    try:
        with writing(where, path):
            with file:
                yield file
                file.flush()
                sync(file.fileno())
                _remove_forgotten(path.parent, os.fstat(file.fileno()).st_mtime)
            _check_target(where, path, new)
            os.replace(unfinished, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            file.close()
        with contextlib.suppress(OSError):
            unfinished.unlink()


def write_file(
    where: str, path: str | os.PathLike[str], content: bytes | memoryview | str, *, new: bool = False
) -> None:
    """Write a file whole or not at all, see `whole_file`; text as UTF-8."""
    with whole_file(where, path, new=new) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(where: str, path: Path, content: Mapping[str, Any]) -> Path:
    """Write plain values, indented, and return the path; NaN and infinity have no place in JSON."""
    write_file(where, path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return path


def read_file(where: str, path: str | os.PathLike[str], *, follow: bool = False) -> bytes:
    """Content of a regular file; ValueError for anything else: a pipe would never end, a link leads elsewhere.

    The folders of the path may be links. follow: the file too.
    """
    descriptor = open_inside(where, os.path.realpath(path) if follow else path, os.O_RDONLY)
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def open_inside(where: str, path: str | os.PathLike[str], flags: int) -> int:
    """Descriptor of a regular file that is no link; ValueError for anything else."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO) or Path(path).is_symlink():
            raise ValueError(f"{where}: {path} must be a file, got a link or a device") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{where}: {path} must be a file, got {'a folder' if Path(path).is_dir() else 'a device'}")
    return descriptor


def is_unfinished(path: Path) -> bool:
    """Whether it is a file that `whole_file` has not finished."""
    return _UNFINISHED.fullmatch(path.name) is not None


def sync(descriptor: int) -> None:
    """Wait until a file or folder is on the disk; file systems that cannot tell do without."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make names in a folder durable; systems that cannot open folders do without."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in {*_UNKNOWN, errno.EACCES, errno.EISDIR}:
            return
        raise
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def cannot(error: OSError) -> str:
    """What the disk said; what it lacks, where it said that it cannot do such a thing."""
    said = error.strerror or str(error)
    return f"this file system cannot do it: {said}" if error.errno in _UNKNOWN else said


def _check_target(where: str, path: Path, new: bool) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if new:
        raise FileExistsError(errno.EEXIST, f"{path} exists; remove it or choose another name")
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise OSError(errno.EEXIST, "there is something that is not a file")


def _remove_forgotten(folder: Path, now: float) -> None:
    for path in folder.glob(".vamoh-*.tmp"):
        with contextlib.suppress(OSError):
            if is_unfinished(path) and now - path.lstat().st_mtime > _FORGOTTEN:
                path.unlink()
