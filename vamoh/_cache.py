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
    """Remembers the results of the last `size` distinct keys of every kind; a key is a sequence of tensors.

    Tensors in host memory are compared by value. Reading those of a GPU would synchronise: there only the very
    same tensor matches, unless it was written to since. Writing through `.data` is not noticed.
    """

    def __init__(self, size: int = 4) -> None:
        self._size = size
        self._entries: dict[str, list[tuple[tuple[_Known, ...], Result]]] = {}

    def get(self, key: Sequence[Tensor | None], compute: Callable[[], Result], kind: str = "") -> Result:
        """Return the remembered result of that kind for `key`, or compute and remember it."""
        entries = self._entries.get(kind, [])
        for i, (known, result) in enumerate(entries):
            if len(known) == len(key) and all(_same(a, b) for a, b in zip(known, key, strict=True)):
                entries.append(entries.pop(i))
                return result
        with torch.inference_mode(False):  # what is remembered may later be trained with
            result = compute()
        self.put(key, result, kind)
        return result

    def read(self, key: Sequence[Tensor | None], compute: Callable[[], Result], kind: str) -> Result:
        """As `get`, for what is quickly computed: computed every time where the first tensor is in host memory."""
        in_host = key[0] is not None and key[0].device.type == "cpu"
        return compute() if in_host else self.get(key, compute, kind)

    def put(self, key: Sequence[Tensor | None], result: Result, kind: str = "") -> None:
        """Remember the result for `key`, which is not remembered yet."""
        self._entries[kind] = [*self._entries.get(kind, []), (tuple(map(_known, key)), result)][-self._size :]

    def __reduce__(self) -> tuple[type, tuple[int]]:
        """A copy starts empty."""
        return type(self), (self._size,)


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
