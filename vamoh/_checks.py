"""Argument checks shared by every room: one place for the wording of error messages."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64)


class _Trust(threading.local):
    depth = 0


_trust = _Trust()


class _Trusted:
    def __enter__(self) -> None:
        _trust.depth += 1

    def __exit__(self, *_: object) -> None:
        _trust.depth -= 1


def trusted() -> AbstractContextManager[None]:
    """Leave out checks of contents in this thread: these tensors were made or checked before, and a GPU would wait."""
    return nullcontext() if torch.compiler.is_compiling() else _Trusted()


def may_look(value: Tensor) -> bool:
    """Whether the contents can be looked at: not while torch.compile traces or a CUDA graph is captured, nor where
    they are `trusted`.
    """
    if torch.compiler.is_compiling() or _trust.depth:
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


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
    sizes = value.shape
    fits = len(sizes) == len(shape)
    if fits:
        for wanted, size in zip(shape, sizes, strict=True):  # a loop: this runs a hundred times in a small decode
            if isinstance(wanted, int) and wanted != size:
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

    Left out where contents cannot be looked at, see `may_look`.
    """
    if not may_look(value):
        return
    bad = ~torch.isfinite(value)
    if bad.any():
        first = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{where}: {name} must be finite, got {int(bad.sum())} NaN or infinite values, first at {first}"
        )


def check_positive(where: str, name: str, value: int) -> int:
    """Return `value` if it is an int of at least 1; raise TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}: {name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{where}: {name} must be at least 1, got {value}")
    return value


def check_choice(where: str, name: str, value: str, choices: Sequence[str]) -> str:
    """Return `value` if it is one of `choices`; raise ValueError naming them otherwise."""
    if value not in choices:
        raise ValueError(f"{where}: {name} must be one of {', '.join(choices)}, got {value!r}")
    return value


@contextmanager
def writing(where: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an OSError, such as a full disk's, name the file that could not be written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{where}: cannot write {path} ({error.strerror or error})") from error
