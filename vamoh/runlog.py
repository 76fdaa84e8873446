"""Run log: metrics as JSON lines, and a report of the environment."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vamoh._files import open_inside, read_file, sync, write_file, writing
from vamoh._shown import shown


class RunLog:
    """Append-only file of JSON objects, one a line, each with an int `step`.

    after_step: keep only the existing lines up to this step, so that a resumed run continues the log of an
    uninterrupted one; a last line torn by a crash goes too. Raises ValueError for any other line that is not such an
    object of numbers, naming the file and the line. Use as a context manager or call `close`.
    """

    def __init__(self, path: str | os.PathLike[str], *, after_step: int = 0) -> None:
        self.path = Path(path)
        content = _content(self.path)
        kept = "".join(line + "\n" for line, entry in _parse(self.path, content) if entry["step"] <= after_step)
        if content != kept.encode():
            write_file("run log", self.path, kept)
        with writing("run log", self.path):
            descriptor = open_inside("run log", self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            # Without a buffer, which a full disk would leave to be written when the file is closed.
            self._file = os.fdopen(descriptor, "ab", buffering=0)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one line and hand it to the operating system."""
        rest = memoryview((json.dumps(entry, allow_nan=False) + "\n").encode())
        with writing("run log", self.path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        with writing("run log", self.path):
            sync(self._file.fileno())

    def close(self) -> None:
        """Close the file; nothing can be written after."""
        self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Entries of a run log, oldest first; [] when there is none. A torn last line is left out.

    Raises ValueError for any other line that is not a JSON object of numbers, with an int `step`.
    """
    return [entry for _, entry in _parse(Path(path), _content(Path(path)))]


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, machine, device and threads, as plain values."""
    device = torch.device(device)
    names = ("vamoh", "torch", "numpy", "safetensors", "triton")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {**{name: _version(name) for name in names}, "torch": str(torch.__version__)},
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _content(path: Path) -> bytes:
    try:
        return read_file("run log", path)
    except FileNotFoundError:
        return b""


def _parse(path: Path, content: bytes) -> list[tuple[str, dict[str, Any]]]:
    lines = content.decode("utf-8", errors="replace").split("\n")
    # Every whole line ends in a newline, so what follows the last one is empty or torn.
    entries = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or type(entry.get("step")) is not int or not _holds_numbers(entry):
            raise ValueError(
                f"run log: line {number} of {path} must be a JSON object with an int step and finite numbers, "
                f"got {shown(line)}"
            )
        entries.append((line, entry))
    return entries


def _holds_numbers(entry: Mapping[str, Any]) -> bool:
    """Whether every value but the name of a split is a number that can be drawn."""
    return all(
        isinstance(value, str) if name == "split" else type(value) in (int, float) and abs(value) < sys.float_info.max
        for name, value in entry.items()
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
