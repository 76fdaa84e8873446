"""Which implementation of an op runs: the registry, the choice, and what is behind "cpu", "cuda" and "triton".

The choice is made when the op runs, never while it is traced: the `backend=` argument, else the environment variable
VAMOH_BACKEND, else the first registered implementation that takes the device and dtype and is available. An explicit
choice never falls back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from vamoh._version import __version__

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. `devices` and `dtypes` None: any. `unavailable` returns the reason, or None if it runs.

    limits: in words, what else it asks of sizes or gradients; without that the next one runs.
    """

    backend: str
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...] | None
    unavailable: Callable[[], str | None]
    limits: str = ""


_REGISTRY: dict[str, list[Implementation]] = {}


def register(
    op: str,
    backend: str,
    *,
    devices: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    unavailable: Callable[[], str | None] = lambda: None,
    limits: str = "",
) -> None:
    """Add an implementation of `op`; those registered first are preferred. Every op ends with "reference"."""
    entry = Implementation(
        backend,
        None if devices is None else tuple(devices),
        None if dtypes is None else tuple(dtypes),
        unavailable,
        limits,
    )
    _REGISTRY.setdefault(op, []).append(entry)


_PLAIN: dict[str, Callable[..., Any]] = {}


def register_plain(op: str, function: Callable[..., Any]) -> None:
    """Give `op` in plain torch for sizes that are not known: `function` takes the arguments of its schema."""
    _PLAIN[op] = function


def plain_torch() -> dict[Any, Callable[..., Any]]:
    """What to put in place of ops in an exported program, for one that runs without vamoh."""
    return {getattr(torch.ops.vamoh, op).default: function for op, function in _PLAIN.items()}


def resolve(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None = None,
    refusal: Callable[[str], str | None] = lambda backend: None,
) -> str:
    """Name of the backend that runs `op` on tensors of this device and dtype.

    refusal says why a backend cannot do what is asked besides, worded as "takes ..., got ...", or None.
    Raises ValueError when the backend asked for is unknown or does not take them, RuntimeError when it is missing
    here; both say why.
    """
    chosen = backend or os.environ.get("VAMOH_BACKEND") or None
    known = _REGISTRY[op]
    if chosen is None:
        fit = (i for i in known if _misfit(i, device, dtype) is None and i.unavailable() is None)
        return next(i.backend for i in fit if refusal(i.backend) is None)
    asked = f"{chosen!r}" if backend else f"{chosen!r} (from VAMOH_BACKEND)"
    for implementation in known:
        if implementation.backend != chosen:
            continue
        misfit = _misfit(implementation, device, dtype) or refusal(chosen)
        if misfit is not None:
            raise ValueError(f"{op}: backend {asked} {misfit}")
        reason = implementation.unavailable()
        if reason is not None:
            raise RuntimeError(f"{op}: backend {asked} is not available: {reason}")
        return chosen
    raise ValueError(f"{op}: backend must be one of {', '.join(i.backend for i in known)}, got {asked}")


def require_reference(op: str, wish: str, backend: str | None) -> None:
    """Raise ValueError if another backend than "reference" was asked for, where only that one does what is wished."""
    chosen = backend or os.environ.get("VAMOH_BACKEND") or "reference"
    if chosen != "reference":
        raise ValueError(f"{op}: backend must be 'reference' for {wish}, got {chosen!r}")


def refuse_second_derivatives(op: str, instead: str = "") -> None:
    """Raise RuntimeError in a backward that autograd records: what it computes would count as constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: has no second derivatives (create_graph=True){instead and '; ' + instead}")


_AUTOCAST = ("cpu", "cuda")


def under_autocast(x: Tensor) -> bool:
    """Whether torch.autocast is on for tensors of this device."""
    return x.device.type in _AUTOCAST and torch.is_autocast_enabled(x.device.type)


def float32_under_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which under torch.autocast runs with autocast off and half-precision arguments cast to float32.

    Tensors may lie in lists and tuples. float64 stays, as everywhere under autocast; where autocast is off nothing is
    cast.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                args, kwargs = _float32(args, device), _float32(kwargs, device)
                with torch.autocast(device, enabled=False):
                    return run(*args, **kwargs)
        return function(*args, **kwargs)

    return run


def _float32(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        half = value.dtype in (torch.bfloat16, torch.float16) and value.device.type == device
        return value.float() if half else value
    if isinstance(value, dict):
        return {name: _float32(each, device) for name, each in value.items()}
    if isinstance(value, list | tuple):
        parts = [_float32(each, device) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _misfit(implementation: Implementation, device: torch.device, dtype: torch.dtype) -> str | None:
    if implementation.devices is not None and device.type not in implementation.devices:
        return f"takes tensors on {' or '.join(implementation.devices)}, got {device}"
    if implementation.dtypes is not None and dtype not in implementation.dtypes:
        return f"takes dtype {' or '.join(str(d) for d in implementation.dtypes)}, got {dtype}"
    return None


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


def native_isa() -> str:
    """Instruction set the native kernels use: VAMOH_ISA if set, else the best of this CPU.

    Raises ValueError when VAMOH_ISA names none, or one that this CPU or build lacks.
    """
    supported: list[str] = native().supported_isas()
    wanted = os.environ.get("VAMOH_ISA") or supported[0]
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


@contextlib.contextmanager
def _current_stream(device: torch.device) -> Iterator[int]:
    """Make `device` the current one; the handle of torch's current stream there."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def call_native(function: str, backend: str, device: torch.device, **arguments: Any) -> None:
    """Call a function of the native module with addresses and sizes: "cpu" on torch's threads, "cuda" on its stream.

    On CUDA it only enqueues; torch keeps memory that is freed meanwhile for later work of the same stream. Raises
    RuntimeError, naming the op and the CUDA error, if a kernel cannot be launched.
    """
    if backend == "cpu":
        getattr(native(), function)(**arguments, threads=torch.get_num_threads(), isa=native_isa())
        return
    launch = getattr(native(), f"{function}_cuda")
    with _current_stream(device) as stream:
        size = launch(**arguments, workspace=0, stream=stream)
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        launch(**arguments, workspace=workspace.data_ptr(), stream=stream)


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
    known = triton_kernels("inr_mixture_plan").PRECISIONS
    if precision not in known:
        raise ValueError(f"VAMOH_TRITON_PRECISION must be one of {', '.join(known)}, got {precision!r}")
    return precision


def items(x: Tensor) -> tuple[Tensor, int]:
    """Memory of a batch [B, ...] for a kernel: a contiguous tensor, and how many values lie from item to item.

    A batch that `expand` made of one item stays one item, with step 0.
    """
    if x.shape[0] > 1 and x.stride(0) == 0:
        return x[0].contiguous(), 0
    return x.contiguous(), x[0].numel() if x.shape[0] else 0


@dataclass(frozen=True)
class Row:
    """One implementation of one op; `reason` says why it is not available, empty if it is.

    takes: dtypes and devices, and within which limits. serves: those of this machine for which it is chosen.
    """

    op: str
    backend: str
    available: bool
    reason: str
    takes: str = ""
    serves: tuple[str, ...] = ()


@dataclass(frozen=True)
class Status:
    """What runs here: a row per op and backend in order of preference, facts on the native build and on Triton.

    build and triton are empty where there is none.
    """

    rows: tuple[Row, ...]
    build: dict[str, str] = field(default_factory=dict)
    triton: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        cells = [("op", "backend", "serves", "takes"), *map(_cells, self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        lines = ["  ".join([f"{c:<{w}}" for c, w in zip(row, widths, strict=False)] + [row[3]]) for row in cells]
        for title, facts, missing in (
            ("triton", self.triton, triton_unavailable()),
            ("native module", self.build, native_unavailable()),
        ):
            lines += ["", title, *(f"  {k:<9} {v}" for k, v in facts.items())] + [f"  {missing}"] * (not facts)
        return "\n".join(lines)


def _cells(row: Row) -> tuple[str, str, str, str]:
    note = "" if row.available else f"; not here: {row.reason}"
    return row.op, row.backend, ", ".join(row.serves) or "-", row.takes + note


def _takes(implementation: Implementation) -> str:
    dtypes, devices = implementation.dtypes, implementation.devices
    which = "any dtype" if dtypes is None else ", ".join(_short(d) for d in dtypes if d.is_floating_point)
    where = "any device" if devices is None else " or ".join(devices)
    return f"{which} on {where}" + (f"; {implementation.limits}" if implementation.limits else "")


def _served(implementations: Sequence[Implementation]) -> dict[str, list[str]]:
    """By backend, dtypes and devices of this machine for which it is chosen; beyond the limits of one, the next is."""
    served: dict[str, list[str]] = {i.backend: [] for i in implementations}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in (torch.float32, torch.float64):
            beyond = ""
            for implementation in implementations:
                misfit = _misfit(implementation, torch.device(device), dtype) or implementation.unavailable()
                if misfit is None:
                    served[implementation.backend].append(f"{_short(dtype)} on {device}{beyond}")
                    if not implementation.limits:
                        break
                    beyond = " (rest)"
    return served


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def status() -> Status:
    """Report every op's backends and how the native module was built; `str` of it is a table.

    Raises ValueError for a bad VAMOH_ISA or VAMOH_TRITON_PRECISION.
    """
    rows = []
    for op, implementations in sorted(_REGISTRY.items()):
        served = _served(implementations)
        for implementation in implementations:
            backend, reason = implementation.backend, implementation.unavailable()
            rows.append(Row(op, backend, reason is None, reason or "", _takes(implementation), tuple(served[backend])))
    module, build, triton = native(), {}, {}
    if module is not None:
        build = {
            "version": module.version,
            "compiler": module.compiler,
            "flags": module.flags,
            "isa": f"{native_isa()} (of {', '.join(module.supported_isas())})",
            "cuda": module.cuda or "not built",
        }
    if triton_unavailable() is None:
        device, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        triton = {
            "version": importlib.import_module("triton").__version__,
            "device": device,
            "plans": triton_kernels("_plan").origin(device, 10 * major + minor),
            "precision": triton_precision(),
        }
    return Status(tuple(rows), build, triton)
