"""A process that reads a file of fields for another one: whatever a damaged file does to its C library stays in here.

Run as a program, with the library, netCDF4 or xarray, and the file's path: writes a line of JSON that lists the
variables; for every line {"name": ..., "slices": [[start, stop], ...]} it reads, it writes a line of JSON and the bytes
of the values. A request may use some seconds of the processor and a multiple of the file's size in memory.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules belong to a package

import importlib
import json
import mmap
import os
import resource
import signal
from typing import Any

SECONDS = 10
_BYTES_PER_SECOND = 20_000_000
_MEMORY = 1 << 30
_FOLDER = 1 << 30
"""Bytes that a folder is taken for, whose files nobody counts."""


def serve(name: str, path: str) -> None:
    """Answer requests from standard input on standard output, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks, which may still need data
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def send(answer: dict[str, Any], content: bytes = b"") -> None:
        answers.write(json.dumps(answer, default=str).encode() + b"\n")
        answers.write(content)
        answers.flush()

    try:
        import numpy as np

        library = importlib.import_module(name)
        size = _FOLDER if os.path.isdir(path) else os.stat(path).st_size
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = _MEMORY + 4 * size
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
        _allow(0 if name == "netCDF4" else size)  # xarray may have to look at the whole file
        variables, described = (_netcdf if name == "netCDF4" else _xarray)(np, library, path)
        send({"variables": described})
    except Exception as error:
        send({"error": f"{type(error).__name__}: {error}"})
        return
    for line in sys.stdin.buffer:
        try:
            request = json.loads(line)
            variable = variables[request["name"]]
            slices = tuple(slice(*bounds) for bounds in request["slices"])
            wanted = np.dtype(variable.dtype).itemsize
            for start, stop in request["slices"]:
                wanted *= stop - start
            _allow(wanted)
            values = np.ascontiguousarray(variable[slices] if name == "netCDF4" else variable[slices].values)
            send({"dtype": values.dtype.str, "shape": values.shape, "bytes": values.nbytes}, values.tobytes())
        except Exception as error:
            send({"error": f"{type(error).__name__}: {error}"})


def _allow(size: int) -> None:
    """Let this process use so much more of the processor as a request for so many bytes may need."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(usage.ru_utime + usage.ru_stime) + SECONDS + size // _BYTES_PER_SECOND
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _netcdf(np: Any, library: Any, path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    opened = _open(library, path)
    opened.set_auto_maskandscale(False)
    variables = dict(_walk(opened, ""))
    defaults = {kind[:2]: value for kind, value in library.default_fillvals.items()}
    return variables, [_describe(np, name, variable, defaults) for name, variable in variables.items()]


def _xarray(np: Any, library: Any, path: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    def plain(value: Any) -> Any:
        if isinstance(value, str | int | float):
            return value
        return np.asarray(value).tolist() if isinstance(value, np.ndarray | np.generic | list | tuple) else str(value)

    opened = library.open_dataset(path, decode_cf=False, mask_and_scale=False, chunks=None, cache=False)
    variables = {str(name): variable for name, variable in opened.variables.items()}
    described = [
        {
            "name": name,
            "dims": [str(dim) for dim in variable.dims],
            "shape": variable.shape,
            "dtype": variable.dtype.str if variable.dtype.kind in "iufb" else None,
            "attributes": {str(key): plain(value) for key, value in variable.attrs.items()},
        }
        for name, variable in variables.items()
    ]
    return variables, described


def _open(library: Any, path: str) -> Any:
    with open(path, "rb") as file:
        if file.read(3) != b"CDF":
            return library.Dataset(path)
        # Of a classic file on disk the library reads zeros beyond its end; of one in memory it does not.
        return library.Dataset(path, memory=mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _walk(group: Any, prefix: str) -> Any:
    for name, variable in group.variables.items():
        yield prefix + name, variable
    for name, inner in group.groups.items():
        yield from _walk(inner, f"{prefix}{name}/")


def _describe(np: Any, name: str, variable: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    plain = isinstance(variable.dtype, np.dtype) and variable.dtype.kind in "iuf"
    attributes: dict[str, Any] = {}
    for key in variable.ncattrs():
        value = variable.getncattr(key)
        if isinstance(value, str):
            attributes[key] = value
        elif isinstance(value, list):
            attributes[key] = [str(entry) for entry in value]
        else:
            attributes[key] = np.asarray(value).tolist()
    if plain and variable.dtype.itemsize > 1 and "_FillValue" not in attributes:
        attributes["_FillValue"] = defaults[variable.dtype.str[1:]]  # what was never written
    return {
        "name": name,
        "dims": variable.dimensions,
        "shape": variable.shape,
        "dtype": variable.dtype.str if plain else None,
        "attributes": attributes,
    }


if __name__ == "__main__":
    serve(*sys.argv[1:])
