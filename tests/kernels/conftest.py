"""Triton kernels run under Triton's interpreter where there is no GPU, and as contract tests on the GPU where there is.

Triton reads TRITON_INTERPRET when it is imported, which any test may cause: tests/conftest.py sets it.
"""

from __future__ import annotations

import dataclasses
import importlib
import os

import pytest
import torch

from vamoh.ops._op import all_ops


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors hold NaN or the largest integer, so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def quick_interpreter(monkeypatch):
    """Leave out what the interpreter repeats at every call of a device function: its changes to the language hold."""
    function = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
    whole = function.__call__

    def call(self, *args, **kwargs):
        ours = self.fn.__module__.startswith("vamoh.")
        return self.rewrite()(*args, **kwargs) if ours else whole(self, *args, **kwargs)

    monkeypatch.setattr(function, "__call__", call)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch, quick_interpreter) -> str:
    """Where the kernels of the test file's OPS run: "cpu" is the interpreter, for which they are registered here."""
    monkeypatch.setenv("VAMOH_TRITON_PRECISION", "ieee")
    if request.param == "cpu":
        if "TRITON_INTERPRET" not in os.environ:
            pytest.skip("kernels are compiled in this process: there is a CUDA device")
        for op in all_ops():
            if op.name in request.module.OPS:
                triton, *others = op.implementations
                here = dataclasses.replace(triton, devices=("cpu",), unavailable=lambda: None)
                monkeypatch.setattr(op, "implementations", [here, *others])
                monkeypatch.setattr(op, "_chosen", {})
    return request.param
