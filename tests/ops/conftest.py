"""What the tests of ops share."""

from __future__ import annotations

import pytest
import torch

from vamoh.ops._backend import native, native_unavailable


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors hold NaN or the largest integer, so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend of the ops on point clouds that runs on this machine."""
    if request.param == "cpu" and native_unavailable():
        pytest.skip(str(native_unavailable()))
    return request.param


@pytest.fixture
def isas() -> list[str]:
    """Instruction sets of this machine."""
    if native_unavailable():
        pytest.skip(str(native_unavailable()))
    return native().supported_isas()
