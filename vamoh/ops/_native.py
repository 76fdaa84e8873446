"""Compiled code: whether it can run here, and the only way to call it.

`call_cpu` and `call_cuda` call the native module, which takes the memory of tensors and keeps it while a kernel runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vamoh._version import __version__


@functools.cache
def _load() -> tuple[Any, str | None]:
    """Import the native module once: (module, None), or (None, why not)."""
    try:
        module = importlib.import_module("vamoh._native")
    except ImportError as error:
        return None, f"the native module is not built ({error}); reinstall vamoh where a C++17 compiler works"
    if module.version != __version__:
        return None, f"the native module is of vamoh {module.version}, not {__version__}; reinstall vamoh"
    return module, None


def native() -> Any:
    """The native module; only for implementations that `native_unavailable` lets run."""
    return _load()[0]


def native_unavailable() -> str | None:
    """Why the native module cannot be used here, or None."""
    return _load()[1]


def setting(name: str) -> str | None:
    """An environment variable as it is now, for code that is not traced: several times as fast as os.environ."""
    module = native()
    return os.environ.get(name) if module is None else module.getenv(name)


def native_isa() -> str:
    """Instruction set the native kernels use: VAMOH_ISA if set, else the best of this CPU.

    Raises ValueError when VAMOH_ISA names none, or one that this CPU or build lacks.
    """
    return isa_of(setting("VAMOH_ISA"))


@functools.cache
def isa_of(wanted: str | None) -> str:
    """What `native_isa` says for a value of VAMOH_ISA."""
    supported: list[str] = native().supported_isas()
    wanted = wanted or supported[0]
    if wanted not in ("avx512", "avx2", "portable"):
        raise ValueError(f"VAMOH_ISA must be one of avx512, avx2, portable, got {wanted!r}")
    if wanted not in supported:
        raise ValueError(f"VAMOH_ISA must be one of {', '.join(supported)} on this machine, got {wanted!r}")
    return wanted


def cuda_unavailable() -> str | None:
    """Why the native module's CUDA kernels cannot be used here, or None."""
    reason = native_unavailable()
    if reason is not None:
        return reason
    if not native().cuda:
        return "the native module is built without CUDA; reinstall vamoh where nvcc is found (VAMOH_CUDA=1)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    problem = native().cuda_problem()
    if problem:
        return f"the CUDA {native().cuda.split()[0]} of the native module says: {problem}"
    major, minor = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return None if major >= 8 else f"needs GPUs of compute capability 8.0 or more, got {major}.{minor}"


def items(x: Tensor | None) -> tuple[Tensor | None, int]:
    """Memory of a batch [B, ...] for a kernel: a contiguous tensor, and how many values lie from item to item.

    A batch that `expand` made of one item stays one item, with stride 0. (None, 0) for None.
    """
    if x is None:
        return None, 0
    if x.shape[0] > 1 and x.stride(0) == 0:
        return x[0].contiguous(), 0
    return x.contiguous(), x[0].numel() if x.shape[0] else 0


def call_cpu(function: str, **arguments: Any) -> None:
    """Call a function of the native module on torch's threads.

    Tensors are passed as they are: it takes their memory, contiguous, and keeps it until it returns. An int in their
    place is the address of memory that it takes as it lies.
    """
    module = native()
    isa = isa_of(module.getenv("VAMOH_ISA"))
    getattr(module, function)(**arguments, threads=torch.get_num_threads(), isa=isa)


def call_cuda(function: str, **arguments: Any) -> None:
    """Call a CUDA function of the native module on torch's stream, with the work space that it asks for.

    It only enqueues; torch keeps memory that is freed meanwhile for later work of the same stream. Raises RuntimeError,
    naming the op and the CUDA error, if a kernel cannot be launched.
    """
    arguments = {name: _contiguous(value) for name, value in arguments.items()}
    launch = getattr(native(), f"{function}_cuda")
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with _current_stream(device) as stream:
        size = launch(**arguments, run=(None, stream))
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        launch(**arguments, run=(workspace, stream))


def _contiguous(value: Any) -> Any:
    """For both calls."""
    if isinstance(value, list):
        return [_contiguous(each) for each in value]
    return value.contiguous() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _current_stream(device: torch.device) -> Iterator[int]:
    """Make `device` the current one; the handle of torch's current stream there."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def triton_kernels(name: str) -> Any:
    """A module of `vamoh.kernels`."""
    return importlib.import_module(f"vamoh.kernels.{name}")


@functools.cache
def triton_unavailable() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install vamoh[triton])"
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"needs a GPU of compute capability 8.0 or higher, this one has {major}.{minor}"
    try:
        for name in ("gating", "inr_mixture", "planar_flow"):
            triton_kernels(name)
    except ImportError as error:
        return f"vamoh.kernels cannot be imported ({error}); install vamoh with pip, which maps it to kernels/"
    return None


def triton_precision() -> str:
    """Precision of products in Triton kernels: VAMOH_TRITON_PRECISION if set, else "tf32x3".

    Raises ValueError when VAMOH_TRITON_PRECISION names none.
    """
    precision = os.environ.get("VAMOH_TRITON_PRECISION") or "tf32x3"
    known: Sequence[str] = triton_kernels("inr_mixture_plan").PRECISIONS
    if precision not in known:
        raise ValueError(f"VAMOH_TRITON_PRECISION must be one of {', '.join(known)}, got {precision!r}")
    return precision
