"""Which backend serves which op here, and how the native module was built."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vamoh.ops import _op
from vamoh.ops._native import (
    native,
    native_isa,
    native_unavailable,
    triton_kernels,
    triton_precision,
    triton_unavailable,
)
from vamoh.ops._op import Implementation


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
                misfit = implementation.misfit(torch.device(device), dtype) or implementation.unavailable()
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
    for name, op in sorted(_op.OPS.items()):
        served = _served(op.implementations)
        for implementation in op.implementations:
            backend, reason = implementation.backend, implementation.unavailable()
            takes, serves = _takes(implementation), tuple(served[backend])
            rows.append(Row(name, backend, reason is None, reason or "", takes, serves))
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
