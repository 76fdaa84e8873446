"""Memory of large gradients, kept from one training step to the next."""

from __future__ import annotations

import mmap
import weakref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_LEAST = 1 << 22
"""Size in bytes above which page faults on fresh memory dominate."""

_FREE: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Of every weight, the memory that no gradient uses now: a list of at most one block."""


def empty_gradient(weight: Tensor) -> Tensor:
    """Uninitialised contiguous tensor like `weight`.

    In host memory a large one lies where the last one lay, if that is gone, as after `optimizer.zero_grad()`: fresh
    memory would be cleared by the system page by page. What is kept is returned when the weight is gone.
    """
    size = weight.numel() * weight.element_size()
    if weight.device.type != "cpu" or size < _LEAST:
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    free: list[mmap.mmap] = _FREE.setdefault(weight, [])
    block = free.pop() if free else mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(block)  # lives as long as the tensor's storage
    weakref.finalize(view, _keep, free, block).atexit = False
    return torch.frombuffer(view, dtype=weight.dtype).view(weight.shape)


def _keep(free: list[mmap.mmap], block: mmap.mmap) -> None:
    if not free:
        free.append(block)
