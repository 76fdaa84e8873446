"""Files of named variables with dimensions and attributes, and what the CF conventions say about their numbers."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np

from vamoh._shown import shown, unquoted
from vamoh.data import fields_process
from vamoh.data.files import Array, check_packed, reading
from vamoh.data.source import BLOCK_BYTES

_NORTH = {"degrees_north", "degree_north", "degree_n", "degrees_n", "degreen", "degreesn"}
_EAST = {"degrees_east", "degree_east", "degree_e", "degrees_e", "degreee", "degreese"}
_DEGREES = {"degrees", "degree", "deg", "radians", "radian", "rad"}
_LATITUDES = {"lat", "lats", "latitude", "latitudes", "nav_lat", "xlat"}
_LONGITUDES = {"lon", "lons", "long", "longitude", "longitudes", "nav_lon", "xlong"}


@dataclass(frozen=True)
class Variable:
    """A variable of a file. dtype: None unless it holds numbers. attributes: text, numbers, or lists of them."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    attributes: Mapping[str, Any]


class FieldFile(Protocol):
    """An open file: its variables by name, and their numbers as stored."""

    variables: dict[str, Variable]

    def read(self, name: str, slices: Sequence[slice]) -> Array:
        """Stored numbers of a variable, one slice with start and stop for each of its dimensions."""


_KINDS = {"netCDF4": ("NetCDF", "netcdf"), "xarray": ("what xarray opens", "xarray")}
"""By the library that reads them: files in words, and what installs it."""


class ReadFile:
    """A file read by a library, netCDF4 or xarray, in a process of its own, which a damaged one may stop or fill.

    Raises ImportError without the package, ValueError naming the file when it cannot be read.
    """

    def __init__(self, path: str, library: str) -> None:
        self._path, self._library, self._lock = path, library, threading.Lock()
        kind, extra = _KINDS[library]
        if not _installed(library):
            raise ImportError(f'{extra}: reading {kind} needs the {library} package: pip install "vamoh[{extra}]"')
        self._kind = "NetCDF file" if library == "netCDF4" else "file for xarray"
        if library == "netCDF4":
            with reading(path, self._kind), Path(path).open("rb") as file:
                file.read(1)
                self._size = os.fstat(file.fileno()).st_size
        self._process: subprocess.Popen[bytes] | None = None
        self.variables = {}
        for entry in self._start()["variables"]:
            dtype = None if entry["dtype"] is None else np.dtype(entry["dtype"])
            variable = Variable(entry["name"], tuple(entry["dims"]), tuple(entry["shape"]), dtype, entry["attributes"])
            self.variables[variable.name] = variable

    def _start(self) -> dict[str, Any]:
        self._process, self._owner = None, os.getpid()  # the reader of a forked process's parent is the parent's
        self._process = subprocess.Popen(
            [sys.executable, fields_process.__file__, self._library, os.path.abspath(self._path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Locks are of no use to a reader, and disks of clusters often have none.
            env={**os.environ, "HDF5_USE_FILE_LOCKING": "FALSE", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        return self._answer(self._process)[0]

    def read(self, name: str, slices: Sequence[slice]) -> Array:
        """Stored numbers of a variable."""
        variable = self.variables[name]
        if variable.dtype is not None and self._library == "netCDF4":
            with reading(self._path, self._kind):
                check_packed(self._path, variable.dtype.itemsize * _product(variable.shape), self._size)
        request = {"name": name, "slices": [[part.start, part.stop] for part in slices]}
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._start()
            process = cast("subprocess.Popen[bytes]", self._process)
            with suppress(BrokenPipeError):
                _pipe(process.stdin).write(json.dumps(request).encode() + b"\n")
                _pipe(process.stdin).flush()
            answer, content = self._answer(process)
        values = np.frombuffer(content, np.dtype(answer["dtype"])).reshape(answer["shape"])
        if values.shape != tuple(part.stop - part.start for part in slices):
            shape = list(values.shape)
            raise ValueError(f"{self._path}: must be a readable {self._kind}, got {shape} values of {unquoted(name)}")
        return values

    def close(self) -> None:
        """End the process; the next reading starts another."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        for pipe in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                _pipe(pipe).close()
        process.kill()
        process.wait()

    def __del__(self) -> None:
        if hasattr(self, "_owner"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_process": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def _answer(self, process: subprocess.Popen[bytes]) -> tuple[dict[str, Any], bytes]:
        line = _pipe(process.stdout).readline()
        answer: dict[str, Any] = json.loads(line) if line.startswith(b"{") and line.endswith(b"}\n") else {}
        content = _pipe(process.stdout).read(answer.get("bytes", 0))
        if not answer or len(content) < answer.get("bytes", 0):
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            number = -(process.poll() or 0)
            self.close()
            if number == signal.SIGXCPU:
                reason = f"a reader that came to no end in {fields_process.SECONDS} s of computing"
            else:
                reason = f"a crash of its reader ({signal.Signals(number).name if number > 0 else f'status {-number}'})"
            raise ValueError(f"{self._path}: must be a readable {self._kind}, got {reason}")
        if "error" in answer:
            text = " ".join(answer["error"].split())[:200]
            raise ValueError(f"{self._path}: must be a readable {self._kind}, got {text}")
        return answer, content


def open_fields(path: str) -> FieldFile:
    """Open a folder (Zarr) or a GRIB file by xarray, anything else as NetCDF, which HDF5 counts for."""
    if Path(path).is_dir() or Path(path).suffix.lower() in (".zarr", ".grib", ".grib2", ".grb"):
        return ReadFile(path, "xarray")
    return ReadFile(path, "netCDF4")


class FieldArray:
    """A variable as a plain array, read in parts from its first axis on."""

    rows_at_hand = True

    def __init__(self, path: str, file: FieldFile, variable: Variable, dtype: np.dtype[Any]) -> None:
        self._path, self._file, self._variable = path, file, variable
        self.shape, self.dtype, self.bytes = variable.shape, dtype, dtype.itemsize * _product(variable.shape)
        for name, plain in (("scale_factor", 1.0), ("add_offset", 0.0)):
            if _number(path, variable, name, plain) != plain:
                raise ValueError(f"{path}: {unquoted(variable.name)} must hold plain numbers for arrays, got a {name}")

    def read(self, index: Array) -> Array:
        """Rows `index` [B] int64, [B, *shape[1:]]."""
        rest = [slice(0, size) for size in self.shape[1:]]
        parts = []
        for run in np.split(index, np.flatnonzero(np.diff(index) != 1) + 1):
            rows = slice(int(run[0]), int(run[-1]) + 1)
            parts.append(self._file.read(self._variable.name, [rows, *rest]))
        return np.concatenate(parts)

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """The array in order, some rows at a time: where, and what."""
        step = max(1, BLOCK_BYTES * self.shape[0] // max(self.bytes, 1))
        for start in range(0, self.shape[0], step):
            part = slice(start, min(start + step, self.shape[0]))
            yield part, self.read(np.arange(part.start, part.stop))


def open_array(path: str, wanted: str) -> FieldArray:
    """The variable `wanted` of a file, or its only one of three axes or more; ValueError naming the file without."""
    file = open_fields(path)
    fitting = {v.name: v for v in file.variables.values() if len(v.shape) >= 3}
    if not wanted and len(fitting) != 1:
        known = ", ".join(map(unquoted, fitting))[:200] or "none"
        raise ValueError(f"{path}: must hold one array of three axes or more, got {known}; choose FILE::NAME")
    variable = file.variables.get(wanted) if wanted else next(iter(fitting.values()))
    if variable is None or variable.dtype is None:
        known = ", ".join(map(unquoted, file.variables))[:200] or "nothing"
        raise ValueError(f"{path}: array must be one of numbers in the file ({known}), got {shown(wanted)}")
    return FieldArray(path, file, variable, variable.dtype)


def natural_values(path: str, variable: Variable, stored: Array) -> Array:
    """Numbers in the variable's unit, float64, NaN where they are missing.

    By the attributes scale_factor, add_offset, _FillValue, missing_value, valid_min, valid_max, valid_range and
    _Unsigned. Raises ValueError naming the file for one that is no number.
    """
    attributes = variable.attributes
    if str(attributes.get("_Unsigned", "")).lower() == "true" and stored.dtype.kind == "i":
        stored = stored.view(stored.dtype.str.replace("i", "u"))
    scale, offset = _number(path, variable, "scale_factor", 1.0), _number(path, variable, "add_offset", 0.0)
    values: Array = stored.astype(np.float64)
    missing = np.zeros(stored.shape, np.bool_)
    for name in ("_FillValue", "missing_value"):
        for mark in _numbers(path, variable, name):
            missing |= stored == _as_stored(mark, stored.dtype)
    low, high = _valid_range(path, variable, stored.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        natural = values * scale + offset if (scale, offset) != (1.0, 0.0) else values
    # Limits are of the packed numbers; those of whole numbers that are not whole themselves are of the natural ones.
    packed = stored.dtype.kind == "f" or all(isinstance(n, int) or not np.isfinite(n) for n in (low, high))
    limited = values if packed else natural
    missing |= (limited < low) | (limited > high)
    natural[missing] = np.nan
    return natural


def find_variables(path: str, file: FieldFile, wanted: str) -> tuple[list[Variable], Variable, Variable]:
    """The variables `wanted`, separated by commas, or the only one over latitude and longitude; and these two.

    Latitudes and longitudes have one dimension each, or share one that counts places. Raises ValueError naming the file
    when no variable fits, several do, or latitudes and longitudes have two dimensions.
    """
    variables = file.variables
    latitudes = [v for v in variables.values() if _is_axis(v, "latitude", "Y", _NORTH, _LATITUDES, "y")]
    longitudes = [v for v in variables.values() if _is_axis(v, "longitude", "X", _EAST, _LONGITUDES, "x")]
    axes = {v.name for v in (*latitudes, *longitudes)}
    fitting: dict[str, tuple[Variable, Variable]] = {}
    curved: dict[str, Variable] = {}
    for name, variable in variables.items():
        if name in axes:
            continue
        lat, lon = _axis_of(variable, latitudes), _axis_of(variable, longitudes)
        if lat is None or lon is None or name.endswith(("_bnds", "_bounds")):
            continue
        if len(lat.dims) == 1 and len(lon.dims) == 1:
            fitting[name] = lat, lon
        else:
            curved[name] = lat if len(lat.dims) != 1 else lon
    names = [name for name in wanted.split(",") if name] if wanted else list(fitting)
    known = ", ".join(map(unquoted, fitting))[:200] or "none"
    bent = next((name for name in (names or curved) if name in curved), None)
    if bent is not None:
        axis = curved[bent]
        raise ValueError(
            f"{path}: {bent} must lie over latitudes and longitudes of one dimension, got {unquoted(axis.name)}("
            f"{', '.join(map(unquoted, axis.dims))[:80]}), a curvilinear grid; an .npz file of coords and values can "
            "hold it"
        )
    if wanted and (not names or not set(names) <= set(fitting) or len(set(names)) < len(names)):
        raise ValueError(f"{path}: variable must be one over latitude and longitude ({known}), got {shown(wanted)}")
    if not wanted and len(names) != 1:
        raise ValueError(
            f"{path}: must hold one variable over latitude and longitude, got {known}; choose FILE::VARIABLE"
        )
    found = [variables[name] for name in names]
    for variable in found:
        if variable.dtype is None or variable.dtype.kind not in "iuf":
            raise ValueError(
                f"{path}: {unquoted(variable.name)} must hold numbers, got {variable.dtype or 'another type'}"
            )
        if (variable.dims, *fitting[variable.name]) != (found[0].dims, *fitting[names[0]]):
            wanted, got = (", ".join(map(unquoted, v.dims))[:80] for v in (found[0], variable))
            raise ValueError(
                f"{path}: {unquoted(variable.name)} must have the dimensions of {names[0]}, ({wanted}), got ({got})"
            )
    return found, *fitting[names[0]]


def degrees(path: str, file: FieldFile, axis: Variable) -> Array:
    """Values of a latitude or longitude in degrees, float64; ValueError naming the file where one is missing."""
    stored = file.read(axis.name, [slice(0, size) for size in axis.shape])
    values = natural_values(path, axis, stored)
    if str(axis.attributes.get("units", "")).lower().startswith("rad"):
        values = np.degrees(values)
    if not np.isfinite(values).all():
        raise ValueError(
            f"{path}: {unquoted(axis.name)} must be finite, got {int((~np.isfinite(values)).sum())} missing values"
        )
    return values


def _is_axis(variable: Variable, standard: str, letter: str, units: set[str], names: set[str], short: str) -> bool:
    if variable.dtype is None or not 1 <= len(variable.dims) <= 2:
        return False
    text = {key: str(variable.attributes.get(key, "")).strip() for key in ("standard_name", "units", "axis")}
    unit, name = text["units"].lower(), variable.name.rsplit("/", 1)[-1].lower()
    if name.endswith(("_bnds", "_bounds")):
        return False
    if text["standard_name"]:
        return text["standard_name"] == standard
    if unit in units or name in names:
        return unit in units | _DEGREES | {"", "1"}
    return unit in _DEGREES and (text["axis"].upper() == letter or name == short)


def _axis_of(variable: Variable, axes: list[Variable]) -> Variable | None:
    """The axis over dimensions of the variable: one it names, else one of one dimension, else of the nearest group."""
    group, _ = _split_name(variable.name)
    named = str(variable.attributes.get("coordinates", "")).split()

    def rank(axis: Variable) -> tuple[bool, int, int]:
        above, name = _split_name(axis.name)
        return name in named, -len(axis.dims), len(above)

    fitting = [a for a in axes if set(a.dims) <= set(variable.dims) and group.startswith(_split_name(a.name)[0])]
    return max(fitting, key=rank, default=None)


def _split_name(name: str) -> tuple[str, str]:
    """Group and own name of a variable."""
    group, _, own = name.rpartition("/")
    return group, own


def _valid_range(path: str, variable: Variable, dtype: np.dtype[Any]) -> tuple[float, float]:
    both = _numbers(path, variable, "valid_range")
    if both and len(both) != 2:
        raise ValueError(f"{path}: {unquoted(variable.name)}: valid_range must hold two numbers, got {len(both)}")
    low, high = both or (-np.inf, np.inf)
    low, high = _number(path, variable, "valid_min", low), _number(path, variable, "valid_max", high)
    if dtype.kind == "f":  # as the numbers were rounded to their type, so are their limits
        return float(_as_stored(low, dtype)), float(_as_stored(high, dtype))
    return low, high


def _as_stored(mark: float, dtype: np.dtype[Any]) -> Any:
    """A number as the dtype holds it; the number itself where the dtype has none such."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            return dtype.type(mark)
    limits = np.iinfo(dtype)
    if not np.isfinite(mark) or mark != int(mark):
        return mark
    if dtype.kind == "u" and mark < 0 and int(mark) >= -(limits.max + 1) // 2:
        return dtype.type(int(mark) + limits.max + 1)  # the mark of unsigned numbers that are stored as signed ones
    return dtype.type(int(mark)) if limits.min <= mark <= limits.max else mark


def _numbers(path: str, variable: Variable, name: str) -> list[float]:
    value = variable.attributes.get(name)
    if value is None:
        return []
    found = []
    for entry in value if isinstance(value, list) else [value]:
        text = re.sub(r"(?<=\d)[a-zA-Z]$", "", entry.strip()) if isinstance(entry, str) else entry
        try:
            found.append(text if isinstance(text, int) else float(text))
        except (TypeError, ValueError):
            raise ValueError(
                f"{path}: {unquoted(variable.name)}: {name} must hold numbers, got {shown(value)}"
            ) from None
    return found


def _number(path: str, variable: Variable, name: str, default: float) -> float:
    found = _numbers(path, variable, name)
    if len(found) > 1 or (found and name in ("scale_factor", "add_offset") and not np.isfinite(found[0])):
        raise ValueError(f"{path}: {unquoted(variable.name)}: {name} must be one finite number, got {shown(found)}")
    return found[0] if found else default


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:
        return False


def _product(shape: Sequence[int]) -> int:
    size = 1
    for axis in shape:
        size *= axis
    return size


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ValueError("a process without pipes")
    return pipe
