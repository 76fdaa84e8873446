"""Triton kernels run under Triton's interpreter where there is no GPU, and as contract tests on the GPU where there is.

Triton reads TRITON_INTERPRET when a kernel is defined, so it is set before any test imports one.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the reference on a GPU, with deterministic algorithms


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors hold NaN or the largest integer, so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
