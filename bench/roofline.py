"""What the machine can do, measured beside what is judged by it.

`torch.mm` is no probe: on AMD processors MKL stays far below the peak. A small C++ file is compiled for this machine
into a temporary folder; without a compiler there are no shares.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

SOURCE = Path(__file__).with_name("roofline.cpp")
COPY_BYTES = 1 << 28


class Peak(NamedTuple):
    """Multiply-adds in 10⁹ float32 operations per second; copying in 10⁹ bytes per second, read and written."""

    gflops: float
    gbytes: float


class Probe:
    """Measures the peak of the threads that torch uses. Raises RuntimeError where no C++ compiler works."""

    def __init__(self) -> None:
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
        if compiler is None:
            raise RuntimeError("roofline: no C++ compiler found")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "roofline.so"
            flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
            built = subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], capture_output=True, text=True)
            if built.returncode:
                raise RuntimeError(f"roofline: {compiler} failed: {built.stderr.strip()}")
            self._library = ctypes.CDLL(str(library))
        self._library.fma_rate.restype = self._library.copy_rate.restype = ctypes.c_double
        count = COPY_BYTES // 4
        self._source, self._target = torch.zeros(count), torch.zeros(count)

    def measure(self) -> Peak:
        """Best of three short tries of each, some 50 milliseconds in all."""
        threads, count = torch.get_num_threads(), self._source.numel()
        to, source = (ctypes.c_void_p(x.data_ptr()) for x in (self._target, self._source))
        flops = max(self._library.fma_rate(threads, ctypes.c_long(4_000_000)) for _ in range(3))
        copied = max(self._library.copy_rate(threads, to, source, ctypes.c_size_t(count)) for _ in range(3))
        return Peak(flops / 1e9, copied / 1e9)
