"""Reading the files behind the data sets, and caching what is generated."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, Any

import numpy as np

from vamoh._shown import reason, unquoted

BUNDLED_FOLDER = Path(__file__).parent / "bundled"

EDGE = 1e-6
"""How far beyond 0 and 1 rounding may take a value that is meant to lie between them."""

_BLOCK_BYTES = 1 << 22
_MOST_PACKED = 2000
"""Bytes that one byte of a compressed file may stand for: deflate makes at most 1032 of it."""

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]


@contextmanager
def reading(path: object, kind: str) -> Iterator[None]:
    """Turn whatever a reader raises into a ValueError of one line: the file's name, and what came instead of `kind`."""
    try:
        yield
    except Exception as error:  # readers of damaged files raise of all kinds
        raise ValueError(f"{path}: must be a readable {kind}, got {type(error).__name__}: {reason(error)}") from error


def check_packed(path: object, size: int, packed: int) -> None:
    """Raise ValueError for a header that claims more bytes than any compression makes of so few."""
    if size > _MOST_PACKED * packed + (1 << 20):
        raise ValueError(f"{size} bytes by its header where the file has {packed} for them")


class StoredArray:
    """An array of an .npy file, or of an .npz file's member; read in parts, from the first axis on.

    shape, dtype: as its header says, which is checked against the size of the file.
    """

    def __init__(self, path: Path, member: str | None = None) -> None:
        self.path, self._member = path, member
        self._file: FileIO | None = None
        with reading(path, ".npy or .npz file"), self._open() as file:
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                header = np.lib.format.read_array_header_1_0(file)
            elif version == (2, 0):
                header = np.lib.format.read_array_header_2_0(file)
            else:
                raise ValueError(f"version {version} of the format")
            self.shape, self._by_columns, self.dtype = header
            if self.dtype.hasobject or self.dtype.itemsize == 0:
                raise ValueError(f"an array of {self.dtype}, which would need allow_pickle")
            self._offset = file.tell()
            size = self.dtype.itemsize
            for axis in self.shape:
                if not 0 <= axis < 1 << 63:
                    raise ValueError(f"shape {list(self.shape)}")
                size *= axis
            self.bytes = size
            held = self._held() - self._offset
            if held != size:
                raise ValueError(f"{held} bytes of values where shape {list(self.shape)} of {self.dtype} needs {size}")
            self._by_columns = self._by_columns and len(self.shape) > 1

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_file": None}

    @property
    def rows_at_hand(self) -> bool:
        """Whether rows can be read one by one, in any order."""
        return self._member is None and not self._by_columns

    def _open(self) -> IO[bytes]:
        if self._member is None:
            return self.path.open("rb")
        archive = zipfile.ZipFile(self.path)
        return archive.open(self._member)

    def _held(self) -> int:
        if self._member is None:
            return self.path.stat().st_size
        with zipfile.ZipFile(self.path) as archive:
            info = archive.getinfo(self._member)
            check_packed(self.path, info.file_size, info.compress_size)
            return info.file_size

    def read(self, index: Array) -> Array:
        """Rows `index` [B] int64, [B, *shape[1:]]."""
        row = self.shape[1:]
        size = self.bytes // max(self.shape[0], 1)
        rows = np.empty((len(index), *row), self.dtype)
        flat = rows.reshape(len(index), -1).view(np.uint8) if rows.size else rows
        with reading(self.path, ".npy file"):
            if self._file is None:
                self._file = FileIO(self.path)
            runs = np.split(np.arange(len(index)), np.flatnonzero(np.diff(index) != 1) + 1)
            for run in runs if rows.size else []:
                self._fill(self._file.fileno(), flat[run[0] : run[-1] + 1], self._offset + int(index[run[0]]) * size)
            _check_bool(rows)
        return rows

    def _fill(self, descriptor: int, rows: Array, offset: int) -> None:
        rest = memoryview(rows.reshape(-1).data)
        while rest:
            got = os.preadv(descriptor, [rest], offset)
            if not got:
                raise EOFError("an end before the last value")
            rest, offset = rest[got:], offset + got

    def blocks(self) -> Iterator[tuple[Any, Array]]:
        """The array in the order of the file, some at a time: where, as an index, and what."""
        if not self.bytes:
            return
        axis = len(self.shape) - 1 if self._by_columns else 0
        others = [n for i, n in enumerate(self.shape) if i != axis]
        step = max(1, _BLOCK_BYTES * self.shape[axis] // self.bytes) if self.shape else 1
        with reading(self.path, ".npy or .npz file"), self._open() as file:
            _skip(file, self._offset)
            for start in range(0, self.shape[axis] if self.shape else 1, step):
                stop = min(start + step, self.shape[axis]) if self.shape else 1
                count = (stop - start) * int(np.prod(others, dtype=np.int64))
                block = np.empty(count, self.dtype)
                _read_into(file, block)
                _check_bool(block)
                if not self.shape:
                    yield (), block[0]
                elif self._by_columns:
                    yield (..., slice(start, stop)), block.reshape(*others, stop - start, order="F")
                else:
                    yield slice(start, stop), block.reshape(stop - start, *others)
            while file.read(1 << 16):  # a damaged member shows at its end, by its checksum
                pass

    def load(self) -> Array:
        """The whole array."""
        whole = np.empty(self.shape, self.dtype)
        for where, block in self.blocks():
            whole[where] = block
        return whole


def _check_bool(values: Array) -> None:
    if values.dtype == np.bool_ and values.size and values.view(np.uint8).max() > 1:
        raise ValueError("bool values that are neither 0 nor 1")


def _skip(file: IO[bytes], count: int) -> None:
    while count:
        got = len(file.read(min(count, 1 << 16)))
        if not got:
            raise EOFError("an end within the header")
        count -= got


def _read_into(file: IO[bytes], block: Array) -> None:
    rest = memoryview(block.view(np.uint8).data)
    while rest:
        part = file.read(min(len(rest), 1 << 20))
        if not part:
            raise EOFError("an end before the last value")
        rest[: len(part)] = part
        rest = rest[len(part) :]


def stored_arrays(path: Path) -> dict[str, StoredArray]:
    """Arrays of an .npz file by name, or the one of an .npy file under the name "", not read yet.

    Raises ValueError naming the file when it is missing, truncated or of another kind.
    """
    with reading(path, ".npy or .npz file"):
        with path.open("rb") as file:
            packed = file.read(4) in (b"PK\3\4", b"PK\5\6")
        members = []
        if packed:
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
            other = [name for name in members if not name.endswith(".npy")]
            if other or len(set(members)) < len(members):
                raise ValueError(f"an archive of other files ({', '.join(map(unquoted, other or members))[:80]})")
    if not packed:
        return {"": StoredArray(path)}
    return {name.removesuffix(".npy"): StoredArray(path, name) for name in members}


def read_bundled(name: str) -> Arrays:
    """Arrays of an .npz file that ships with the package."""
    return read_arrays(BUNDLED_FOLDER / name)


def read_arrays(path: Path) -> Arrays:
    """Arrays of an .npz file by name, or the one of an .npy file under the name "".

    Raises ValueError naming the file when it is missing, truncated or of another kind.
    """
    return {name: array.load() for name, array in stored_arrays(path).items()}


def list_files(where: str, path: str, suffixes: Collection[str]) -> list[Path]:
    """Files with one of `suffixes` (lower case) below the folder `path`, sorted; or `path` itself if it is a file.

    Hidden files and folders are left out, linked ones are followed. Raises ValueError when there is nothing at `path`
    or no such file below it, when a folder cannot be read, or when links lead to one twice.
    """
    start = Path(path).expanduser()
    if start.is_file():
        return [start]
    if not start.is_dir():
        raise ValueError(f"{where}: path must be a file or folder, got {path!r}, which does not exist")
    found: list[Path] = []
    seen: dict[tuple[int, int], Path] = {}

    def refuse(error: OSError) -> None:
        raise ValueError(f"{where}: cannot list {error.filename} ({error.strerror})") from error

    for name, folders, files in os.walk(start, onerror=refuse, followlinks=True):
        folder = Path(name)
        state = folder.stat()
        first = seen.setdefault((state.st_dev, state.st_ino), folder)
        if first != folder:
            raise ValueError(f"{where}: {folder} must not lead to a folder that is read already, got {first} again")
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [folder / f for f in files if Path(f).suffix.lower() in suffixes and not f.startswith(".")]
    if not found:
        raise ValueError(f"{where}: path must hold {', '.join(sorted(suffixes))} files, got none below {path!r}")
    return sorted(found)


def unit_dtype(where: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What values of a dtype are kept as: uint8 for uint8 and bool, float32 for floating ones; TypeError for others."""
    if dtype == np.uint8 or dtype == np.bool_:
        return np.dtype(np.uint8)
    if not np.issubdtype(dtype, np.floating):
        raise TypeError(f"{where}: values must be uint8, bool or floating, got {dtype}")
    return np.dtype(np.float32)


def unit_values(where: str, array: Array, seen: Array | None = None) -> Array:
    """Return values to store: uint8 as they are, bool as 0 and 255, floating ones as float32.

    seen: bool, broadcast to the array, True where a value counts; others that are NaN or out of range become 0.
    Rounding may leave the range by `EDGE`: such values are taken for 0 and 1, which is said once for a file.
    Raises TypeError for other dtypes, ValueError when floating values are NaN, infinite or outside [0, 1].
    """
    kept = unit_dtype(where, array.dtype)
    if seen is not None and array.dtype.kind == "f":
        array = np.where(seen | ((array >= 0) & (array <= 1)), array, array.dtype.type(0))
    if kept == np.uint8:
        return array if array.dtype == np.uint8 else array * np.uint8(255)
    if not array.size:
        return array.astype(np.float32)
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(
            f"{where}: values must be finite, got {bad} NaN or infinite ones; an .npz file with coords, values and a "
            "mask may leave points out"
        )
    if low < -EDGE or high > 1 + EDGE:
        raise ValueError(f"{where}: floating values must lie in [0, 1], got {low!s} to {high!s}")
    if low < 0 or high > 1:
        _say_once(f"{where}: values from {low!s} to {high!s} are taken for numbers in [0, 1] that were rounded")
    return np.clip(array, 0, 1).astype(np.float32) if low < 0 or high > 1 else array.astype(np.float32)


_said: set[str] = set()


def _say_once(text: str) -> None:
    where = text.split(": ")[0]
    if where not in _said:
        _said.add(where)
        logging.getLogger(__name__).warning(text)


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
