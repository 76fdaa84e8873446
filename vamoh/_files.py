"""Paths and errors while writing; without torch, which the configuration does not need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_path(where: str, name: str, value: object) -> Path:
    """Return a str or path as a Path; raise TypeError otherwise."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{where}: {name} must be a str or a path, got {type(value).__name__}")
    return Path(value)


@contextmanager
def writing(where: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an OSError, such as a full disk's, name the file that could not be written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{where}: cannot write {path} ({error.strerror or error})") from error
