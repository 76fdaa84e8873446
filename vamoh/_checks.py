"""Argument checks shared by every room: one place for the wording of error messages."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from vamoh._shown import listed as listed
from vamoh._shown import reason as reason
from vamoh._shown import shown as shown
from vamoh._shown import unquoted as unquoted

FLOATING = (torch.float32, torch.float64)


class _Skipping(threading.local):
    depth = 0


_skipping = _Skipping()


class _SkipValueChecks:
    def __enter__(self) -> None:
        _skipping.depth += 1

    def __exit__(self, *_: object) -> None:
        _skipping.depth -= 1


def skip_value_checks() -> AbstractContextManager[None]:
    """Skip value checks in this thread (each would synchronise with the GPU); inputs were validated before."""
    return nullcontext() if torch.compiler.is_compiling() else _SkipValueChecks()


def values_readable(value: Tensor) -> bool:
    """Whether the values can be read: not while torch.compile traces, a CUDA graph is captured, or checks of values are
    skipped (`skip_value_checks`).
    """
    if torch.compiler.is_compiling() or _skipping.depth:
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def check_type(where: str, name: str, value: object, *types: type) -> None:
    """Raise TypeError unless `value` is of one of `types`; True is no int."""
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        wanted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
        raise TypeError(f"{where}: {name} must be {wanted}, got {shown(value)}")


def check_tensor(
    where: str,
    name: str,
    value: object,
    shape: Sequence[int | str | None],
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    like: Tensor | None = None,
) -> Tensor:
    """Return `value` if it is a tensor of the given shape, dtype and device; raise otherwise.

    `shape` lists a size, a letter (any size, shown in the message) or None (any size) per dimension.
    `like` asks for the dtype and device of another tensor.
    Raises TypeError for a wrong type, dtype or device and ValueError for a wrong shape.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{where}: {name} must be dense, got {value.layout}")
    sizes = value.shape
    fits = len(sizes) == len(shape)
    if fits:
        for wanted, size in zip(shape, sizes):  # noqa: B905 - a loop: this runs a hundred times in a small decode
            if wanted != size and isinstance(wanted, int):
                fits = False
    if not fits:
        letters = ", ".join("*" if s is None else str(s) for s in shape)
        raise ValueError(f"{where}: {name} must have shape [{letters}], got {list(sizes)}")
    if dtypes is not None and value.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{where}: {name} must have dtype {names}, got {str(value.dtype).removeprefix('torch.')}")
    if like is not None and value.dtype != like.dtype:
        raise TypeError(f"{where}: {name} must have dtype {like.dtype}, got {value.dtype}")
    if like is not None and value.device != like.device:
        raise TypeError(f"{where}: {name} must be on {like.device}, got {value.device}")
    return value


def check_finite(where: str, name: str, value: Tensor) -> None:
    """Raise ValueError when `value` holds NaN or infinite entries; says how many and where the first is.

    Skipped where values cannot be read, see `values_readable`.
    """
    if not values_readable(value):
        return
    bad = ~torch.isfinite(value)
    if bad.any():
        first = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{where}: {name} must be finite, got {int(bad.sum())} NaN or infinite values, first at {first}"
        )


def check_positive(where: str, name: str, value: int) -> int:
    """Return `value` if it is an int from 1 to 2^63 - 1; raise TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: {name} must be an int, got {shown(value)}")
    if value < 1:
        raise ValueError(f"{where}: {name} must be at least 1, got {shown(value)}")
    if value >= 1 << 63:
        raise ValueError(f"{where}: {name} must be below 2^63, got {shown(value)}")
    return value


def check_sizes(where: str, name: str, values: object, each: str = "size") -> tuple[int, ...]:
    """Return `values` if it is a list of ints of at least 1; raise TypeError or ValueError otherwise."""
    check_type(where, name, values, list, tuple)
    return tuple(check_positive(where, f"every {each} of {name}", value) for value in values)  # type: ignore[attr-defined]


def check_number(where: str, name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise unless `value` is a finite int or float from `low` to `high`."""
    check_type(where, name, value, int, float)
    if torch.compiler.is_compiling():
        return
    largest = 2.0**63 if isinstance(value, int) else sys.float_info.max  # torch scalars cannot hold more
    if not (low <= value <= high and abs(value) <= largest):  # type: ignore[operator, arg-type]
        limits = f" from {low:g} to {high:g}" if math.isfinite(low) or math.isfinite(high) else ""
        raise ValueError(f"{where}: {name} must be a finite number{limits}, got {shown(value)}")


def check_seed(where: str, name: str, value: int) -> None:
    """Raise unless `value` is an int from 0 to 2^63 - 1."""
    check_type(where, name, value, int)
    if not 0 <= value < 1 << 63:
        raise ValueError(f"{where}: {name} must be between 0 and 2^63 - 1, got {shown(value)}")


def check_device(where: str, device: str | torch.device) -> torch.device:
    """Return the device; ValueError when it is not a device's name or this machine has none."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        kind = ValueError if isinstance(device, str | torch.device | int) else TypeError
        raise kind(
            f"{where}: device must be one this machine has, got {shown(str(device))} ({reason(error)})"
        ) from error
    return found


def check_memory(where: str, what: str, size: int, device: torch.device | None = None) -> None:
    """Raise ValueError when `size` bytes are more than the whole memory of the device (the CPU's by default)."""
    cuda = device is not None and device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if cuda else memory()
    if size > total:
        raise ValueError(f"{where}: {what} would take {_bytes(size)} of memory, this machine has {_bytes(total)}")


def memory() -> int:
    """Bytes of memory that this machine has, or that its control group leaves to this process."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return 1 << 63
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return total


def _bytes(size: int) -> str:
    return f"{size} bytes ({size / 1e9:,.1f} GB)"


def check_choice(where: str, name: str, value: str, choices: Sequence[str]) -> str:
    """Return `value` if it is one of `choices`; raise ValueError naming them otherwise."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{where}: {name} must be one of {', '.join(choices)}, got {shown(value)}")
    return value
