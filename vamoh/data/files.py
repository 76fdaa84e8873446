"""Reading the files behind the data sets, and caching what is generated."""

from __future__ import annotations

import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

BUNDLED_FOLDER = Path(__file__).parent / "bundled"

# What numpy raises for files that are missing, cut short or of another kind.
_UNREADABLE = (OSError, EOFError, ValueError, TypeError, SyntaxError, zipfile.BadZipFile, zlib.error)

Arrays = dict[str, np.ndarray[Any, Any]]


def read_bundled(name: str) -> Arrays:
    """Arrays of an .npz file that ships with the package."""
    return read_arrays(BUNDLED_FOLDER / name)


def read_arrays(path: Path) -> Arrays:
    """Arrays of an .npz file by name, or the one of an .npy file under the name "".

    Raises ValueError naming the file when it is missing, truncated or of another kind.
    """
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            return {"": content} if isinstance(content, np.ndarray) else {key: content[key] for key in content.files}
    except _UNREADABLE as error:
        raise ValueError(
            f"{path}: must be a readable .npy or .npz file, got {type(error).__name__}: {error}"
        ) from error


def read_array(path: Path) -> np.ndarray[Any, Any]:
    """The only array of an .npy or .npz file. Raises ValueError naming the file when there are several."""
    arrays = read_arrays(path)
    if len(arrays) != 1:
        raise ValueError(f"{path}: must hold one array, got {len(arrays)} ({', '.join(sorted(arrays))})")
    return next(iter(arrays.values()))


def list_files(where: str, path: str, suffixes: Collection[str]) -> list[Path]:
    """Files with one of `suffixes` (lower case) below the folder `path`, sorted; or `path` itself if it is a file.

    Hidden files are left out. Raises ValueError when there is nothing at `path` or no such file below it.
    """
    start = Path(path).expanduser()
    if start.is_file():
        return [start]
    if not start.is_dir():
        raise ValueError(f"{where}: path must be a file or folder, got {path!r}, which does not exist")
    found = sorted(f for f in start.rglob("*") if f.suffix.lower() in suffixes and not f.name.startswith("."))
    if not found:
        raise ValueError(f"{where}: path must hold {', '.join(sorted(suffixes))} files, got none below {path!r}")
    return found


def unit_values(where: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return values to store: uint8 as they are, bool as 0 and 255, floating ones as float32.

    Raises TypeError for other dtypes, ValueError when floating values are NaN, infinite or outside [0, 1].
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array * np.uint8(255)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"{where}: values must be uint8, bool or floating, got {array.dtype}")
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(f"{where}: values must be finite, got {bad} NaN or infinite ones")
    if array.size and (array.min() < 0 or array.max() > 1):
        raise ValueError(f"{where}: floating values must lie in [0, 1], got {array.min():g} to {array.max():g}")
    return array.astype(np.float32)


def cached(root: str | None, name: str, build: Callable[[], Arrays]) -> Arrays:
    """Arrays of the .npz file `name` in the cache folder, made by `build` when there is no whole one.

    root: the cache folder; by default `vamoh` below $XDG_CACHE_HOME or ~/.cache.
    The file appears under its name only when complete. A damaged one is made again.
    """
    if root is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vamoh"
    else:
        folder = Path(root).expanduser()
    path = folder / name
    log = logging.getLogger(__name__)
    if path.exists():
        try:
            return read_arrays(path)
        except ValueError as error:
            log.warning("making the cached data again: %s", error)
    else:
        log.info("making %s, once", path)
    arrays = build()
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.{os.getpid()}.part"
    write: Any = np.savez_compressed  # its annotation takes any keyword for one of its options
    try:
        with part.open("wb") as file:
            write(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return arrays
