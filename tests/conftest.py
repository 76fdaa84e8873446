"""What all tests share."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("vamoh", derandomize=True, deadline=None, database=None)
settings.load_profile("vamoh")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch's deterministic mode asks for it on a GPU


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors are fastest on one thread; a test may ask for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a process per core, but each imports torch and some compile."""
    return min(8, os.cpu_count() or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
