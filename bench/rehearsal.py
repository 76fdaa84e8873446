"""What lets `bench.gpu` run without a GPU: small sizes, stand-ins for its clocks, interpreted kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench import cases, op_cases

SHAPES = {"polymnist": (6, 7), "shapes3d": (6, 6), "era5": (5, 8), "shapenet": (5, 5, 5), "celebahq": (6, 6)}
NAME = "Stand-in GPU"


def shrink() -> None:
    """Make every preset of `bench.cases` tiny, in this process for good."""
    full = cases.config

    def config(name: str, **sizes: object) -> Any:
        of = full(name, **sizes)
        stages = len(of.model.encoder_centroids)
        small: dict[str, Any] = {
            "encoder_centroids": (12, 8, 6, 5, 4)[:stages],
            "encoder_neighbors": (5, 4, 4, 4, 3)[:stages],
            "encoder_channels": (4,) * stages,
            "pool_centroids": (10, 7, 5, 4)[: len(of.model.pool_centroids)],
            "pool_neighbors": (4, 4, 3, 3)[: len(of.model.pool_neighbors)],
            "frequencies": 6,
            "components": 2,
            "latent_dim": 4,
            "flow_layers": 2,
            "hypernet_widths": (4,),
            "inr_widths": (4,) * len(of.model.inr_widths),
            "kl_samples": 8,
        }
        drawn = of.train.num_points and 60
        return replace(of, model=replace(of.model, **{**small, **sizes}), train=replace(of.train, num_points=drawn))

    for module in (cases, op_cases):
        module.config = config  # type: ignore[attr-defined]
    cases.SHAPE.update(SHAPES)
    cases.BATCH.update(dict.fromkeys(cases.BATCH, 2))


class Event:
    """An event of a GPU; a second passes between any two."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self) -> None:
        """Nothing to wait for."""

    synchronize = record

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return 1e3


class Stream:
    """A stream of a GPU."""

    def wait_stream(self, other: Stream) -> None:
        """Everything is done at once."""


class Graph:
    """A captured graph."""

    def replay(self) -> None:
        """What was captured was done then."""


@contextmanager
def _within(*_: object) -> Iterator[None]:
    yield


def pretend(folder: Path) -> None:
    """Let CPU tensors stand for those of a GPU, and interpret the Triton kernels, in this process for good."""
    properties = SimpleNamespace(name=NAME, major=9, minor=0, multi_processor_count=132, total_memory=1 << 30)
    stand_ins: dict[str, Any] = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "current_stream": lambda device=None: Stream(),
        "stream": _within,
        "graph": _within,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 1 << 20,
        "reset_peak_memory_stats": lambda: None,
        "get_device_properties": lambda device: properties,
    }
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)
    torch.cuda.profiler.start = torch.cuda.profiler.stop = lambda: None
    compile = torch.compile
    torch.compile = lambda *a, mode=None, **k: compile(*a, **k, backend="eager")  # type: ignore[assignment]
    if os.environ.get("TRITON_INTERPRET"):
        _interpret(folder)


def _interpret(folder: Path) -> None:
    """Take the Triton kernels on the CPU, where Triton interprets them; tables of plans lie in the folder."""
    import triton.runtime.interpreter as interpreter

    from vamoh.kernels import _plan
    from vamoh.ops._op import all_ops

    patch = interpreter._patch_lang_tensor

    def patch_index(tensor: Any, scope: Any) -> None:
        """Triton 3.6 makes a number of an array of one value, which numpy 2.5 refuses."""
        set_attr, number = scope.set_attr, lambda self: int(self.handle.data.squeeze())
        scope.set_attr = lambda of, name, value: set_attr(of, name, number if name == "__index__" else value)
        try:
            patch(tensor, scope)
        finally:
            del scope.set_attr

    interpreter._patch_lang_tensor = patch_index
    _plan.TUNED = folder
    for op in all_ops():
        for i, implementation in enumerate(op.implementations):
            if implementation.backend == "triton":
                op.implementations[i] = replace(implementation, devices=("cpu",), unavailable=lambda: None)
