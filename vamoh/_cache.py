"""A small cache keyed by tensors, so that it can never serve a stale answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
_Known = tuple[Tensor | None, int | None]
"""A tensor of a key: a copy in host memory; elsewhere the tensor itself and its version."""


class ContentCache(Generic[Result]):
    """Remembers the results of the last `size` distinct keys; a key is a sequence of tensors.

    Tensors in host memory are compared by value. Reading those of a GPU would synchronise: there only the very
    same tensor matches, unless it was written to since. Writing through `.data` is not noticed.
    """

    def __init__(self, size: int = 4) -> None:
        self._size = size
        self._entries: list[tuple[tuple[_Known, ...], Result]] = []

    def get(self, key: Sequence[Tensor | None], compute: Callable[[], Result]) -> Result:
        """Return the remembered result for `key`, or compute and remember it."""
        for i, (known, result) in enumerate(self._entries):
            if len(known) == len(key) and all(_same(a, b) for a, b in zip(known, key, strict=True)):
                self._entries.append(self._entries.pop(i))
                return result
        with torch.inference_mode(False):  # what is remembered may later be trained with
            result = compute()
        self.put(key, result)
        return result

    def put(self, key: Sequence[Tensor | None], result: Result) -> None:
        """Remember the result for `key`, which is not remembered yet."""
        self._entries = [*self._entries, (tuple(map(_known, key)), result)][-self._size :]

    def __deepcopy__(self, memo: dict[int, object]) -> ContentCache[Result]:
        return ContentCache(self._size)


def version(value: Tensor) -> int | None:
    """Number that grows when the tensor is written to; None where torch keeps none, in inference mode."""
    return None if value.is_inference() else value._version


def _known(value: Tensor | None) -> _Known:
    if value is None:
        return None, None
    return (value.detach().clone(), None) if value.device.type == "cpu" else (value, version(value))


def _same(known: _Known, value: Tensor | None) -> bool:
    held, written = known
    if held is None or value is None:
        return held is value
    if value.device.type != "cpu":
        return held is value and written is not None and written == version(value)
    return (
        held.shape == value.shape
        and held.dtype == value.dtype
        and held.device == value.device
        and torch.equal(held, value)
    )
