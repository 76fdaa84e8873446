"""Every op between pages that may not be touched: a step beyond a tensor or scratch memory ends the process.

More cases, of sizes drawn at random: `python tests/ops/test_guard_pages.py CASES SEED [MODULE]`; MODULE is a build of
the CUDA kernels for the host, which then run too (`cuda_on_host_module` of conftest.py makes it).
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from conftest import let_cuda_run_here
from test_every_op import Call, Size, calls, draw, index, results, uniform

sys.path.pop(0)
from vamoh import ops
from vamoh.ops import _native
from vamoh.ops._native import native, native_unavailable
from vamoh.ops._op import OPS

ROOT = Path(__file__).parents[2]
EDGES = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
PER_SIZE = 8
"""Most cases of each size."""
OFF, END, BEGIN = range(3)
"""Guard pages, see guard.cpp: none, after every block, before every block."""


class Case(NamedTuple):
    """A call of tensors that are still to be laid out, and how it is made."""

    label: str
    call: Call
    layout: str
    isa: str
    threads: int
    backend: str
    dtype: torch.dtype = torch.float32


def draw_size(generator: random.Random) -> Size:
    """Sizes at which loops over vectors, tiles and panels leave a rest or have nothing to do."""

    def number(most: int, least: int = 1) -> int:
        if least == 0 and generator.random() < 0.05:
            return 0
        return generator.choice([n for n in EDGES if n <= most] + [generator.randint(1, most)] * 6)

    points = number(160)
    return Size(
        B=number(4, 0),
        N=points,
        M=number(points, 0),
        S=number(min(points, 40)),
        K=number(4),
        H=number(40),
        C=number(5),
        Z=number(70),
    )


def styled(tensor: Tensor, style: str) -> Tensor:
    """Other numbers of the same kind: ties, what saturates, zeros, what is not finite."""
    if not tensor.is_floating_point() or not tensor.numel() or style == "plain":
        return tensor
    if style == "ties":
        return (2 * tensor).round() / 2
    if style == "saturated":
        return 64 * tensor if float(tensor.min()) < 0 else tensor
    if style == "zero":
        return torch.zeros_like(tensor)
    tensor = tensor.clone()
    tensor.view(-1)[tensor.numel() // 2] = float(style)
    return tensor


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A copy in memory of its own, which ends with the last number that it reaches."""
    strides = list(torch.empty(tensor.shape, device="meta").stride())
    if layout == "transposed":
        strides = list(torch.empty(tensor.shape[::-1], device="meta").stride())[::-1]
    elif layout == "gaps":
        strides = [2 * stride for stride in strides]
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    memory = torch.empty(reach if tensor.numel() else 0, dtype=tensor.dtype)
    return memory.as_strided(tensor.shape, strides).copy_(tensor)


def clouds(s: Size, dims: int) -> Iterator[Call]:
    """Searches in many dimensions, which are quantized first, and on lattices."""
    wide, places, table = draw(s.B, s.N, dims), index(20, s.N, 1), uniform(41)
    count = min(s.S, s.N)
    yield Call("knn", lambda x: ops.knn(x, x[:, : s.M], count), [wide], exact=True)
    yield Call("knn", lambda x, t: ops.knn(x, x[: s.M], count, table=t), [places, table], exact=True)
    yield Call("farthest_point_sample", lambda x: ops.farthest_point_sample(x, s.M), [wide], exact=True)
    yield Call("farthest_point_sample", lambda x, t: ops.farthest_point_sample(x, s.M, table=t), [places, table])


def cases(seed: int, cuda: bool) -> Iterator[Case]:
    """Without end, every op as often. cuda: of the ops that have CUDA kernels alone, by these."""
    for number in itertools.count():
        generator = random.Random(f"{seed} {number}")
        size = draw_size(generator)
        mine: dict[str, list[Call]] = {}
        for call in itertools.chain(calls(size), clouds(size, generator.choice([64, 65, 70, 127, 128, 130]))):
            if not cuda or any(i.backend == "cuda" for i in OPS[call.op].implementations):
                mine.setdefault(call.op, []).append(call)
        for op in generator.sample(list(mine), min(PER_SIZE, len(mine))):
            call = generator.choice(mine[op])
            style = generator.choice(["plain"] * 5 + ["ties", "saturated", "zero", "nan", "inf"])
            layout = generator.choice(["contiguous", "contiguous", "transposed", "gaps"])
            isa, threads = generator.choice(native().supported_isas()), generator.choice([1, 1, 1, 3])
            backend = "cuda" if cuda else "cpu"
            double = generator.random() < 0.3 and any(
                i.backend == backend and torch.float64 in (i.dtypes or ()) for i in OPS[op].implementations
            )
            dtype = torch.float64 if double else torch.float32
            label = f"{call.op} {tuple(size)} {style} {layout} {'cuda' if cuda else isa} {threads} {dtype}"
            call = call._replace(tensors=[styled(t, style) for t in call.tensors])
            yield Case(label, call, layout, isa, threads, backend, dtype)


def planted(plant: str) -> Iterator[Case]:
    """What must be noticed: one number too many, by hand, or one point too many, by an op that is told of it."""
    how, where = plant.split()

    def access(x: Tensor) -> Tensor:
        if how == "point" or not _on:
            return ops.fourier_features(x, x)
        place = ctypes.c_float.from_address(x.data_ptr() + (4 * x.numel() if where == "after" else -4))
        if how == "read":
            return x + place.value
        place.value = 1.0
        return x.clone()

    if how == "point":
        both, function = ModuleType("both"), native().fourier_features
        vars(both).update(vars(native()))
        both.fourier_features = lambda points, **rest: function(points=points + _on, **rest)  # type: ignore[attr-defined]
        _native._load = lambda: (both, None)  # type: ignore[assignment]
    yield Case(f"planted: {plant}", Call("planted", access, [torch.rand(9, 3)]), "contiguous", "", 1, "")


_on = False


def attempt(case: Case, guard: Callable[[int], int]) -> str:
    """Make the call without guard pages, and with them on either side; "same" or "refused", or what is wrong."""
    global _on
    torch.set_num_threads(case.threads)
    os.environ.update(VAMOH_ISA=case.isa, VAMOH_BACKEND=case.backend)
    found: list[str | list[Tensor]] = []
    for mode in (OFF, END, BEGIN):
        _on = mode != OFF
        guard(mode)
        try:
            tensors = [laid_out(tensor, case.layout) for tensor in case.call.tensors]
            found.append(results(case.call._replace(tensors=tensors), "cpu", case.dtype))
        except (ValueError, TypeError) as error:
            found.append(str(error))
        finally:
            guard(OFF)
    plain, *others = found
    if isinstance(plain, str):
        return "refused" if others == [plain, plain] else f"refused once: {plain}"
    for other in others:
        if isinstance(other, str) or not all(map(equal, plain, other)):
            return "another result"
    return "same"


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether they hold the same numbers, and NaN in the same places."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def serve(count: int, seed: int, first: int, plant: str, module: str) -> None:
    """Say which case comes, then how it ended."""
    guard, guard_code = ctypes.CDLL(None).guard, ctypes.CDLL(None).guard_code
    guard.restype = ctypes.c_long
    if module:
        spec = importlib.util.spec_from_file_location("cuda_on_host", module)
        assert spec and spec.loader
        on_host = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(on_host)
        let_cuda_run_here(on_host, setattr)
    native()
    maps = Path("/proc/self/maps").read_text()
    code = re.findall(r"^(\w+)-(\w+) r-xp .*/(?:_native\.|cuda_on_host)", maps, re.MULTILINE)
    if not code:
        raise RuntimeError("no code of the native module")
    for begin, end in code:
        guard_code(ctypes.c_size_t(int(begin, 16)), ctypes.c_size_t(int(end, 16)))
    all_cases = planted(plant) if plant else cases(seed, bool(module))
    for number, case in itertools.islice(enumerate(all_cases), first, count):
        print(json.dumps([number, case.label]), flush=True)
        end = attempt(case, guard)
        print(json.dumps([end, guard(OFF)]), flush=True)


def run(count: int, seed: int, library: Path, plant: str = "", module: str = "") -> tuple[Counter[str], list[str]]:
    """How so many cases ended, and blocks that lay between guard pages; what is wrong with those that ended badly."""
    ends: Counter[str] = Counter()
    wrong: list[str] = []
    first = 0
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    while first < count:
        command = [sys.executable, "-W", "ignore", __file__, "serve", count, seed, first, plant, module]
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        for (number, label), (end, _) in zip(lines[::2], lines[1::2], strict=False):
            ends[end if end in ("same", "refused") else "wrong"] += 1
            if end not in ("same", "refused"):
                wrong.append(f"case {number} of seed {seed}, {label}: {end}")
        ends["blocks"] += lines[len(lines) // 2 * 2 - 1][1] if len(lines) > 1 else 0
        if done.returncode == 0:
            break
        if len(lines) % 2 == 0:
            raise RuntimeError(f"between cases: {done.stderr}")
        number, label = lines[-1]
        said = done.stderr.strip().splitlines()[-1:]
        wrong.append(f"case {number} of seed {seed}, {label}: status {done.returncode} {said}")
        ends["wrong"] += 1
        first = number + 1
    return ends, wrong


def build(folder: Path) -> Path:
    """The allocator."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None or platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        pytest.skip("guard pages need Linux with glibc and a C++ compiler")
    source, library = Path(__file__).parent / "guard_pages" / "guard.cpp", folder / "guard.so"
    strict = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, "-std=c++17", "-O2", *strict, "-shared", "-fPIC", source, "-o", library], check=True)
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if native_unavailable():
        pytest.skip(str(native_unavailable()))
    return build(tmp_path_factory.mktemp("guard"))


def test_no_step_beyond(library: Path) -> None:
    ends, wrong = run(50, 0, library)
    assert not wrong
    assert ends["same"] > 40 and ends["same"] + ends["refused"] == 50 and ends["blocks"] > 2000


@pytest.mark.slow
def test_no_step_beyond_in_cuda_kernels(library: Path, cuda_on_host_module: ModuleType) -> None:
    ends, wrong = run(50, 0, library, module=str(cuda_on_host_module.__file__))
    assert not wrong and ends["same"] > 40


PLANTS = {
    "read after": "status -11",
    "write after": "status -11",
    "read before": "status -11",
    "write before": "guard pages: written beside a block",
    "point after": "status -11",
}


@pytest.mark.parametrize("plant", [pytest.param(p, marks=[pytest.mark.slow] * (p != "write before")) for p in PLANTS])
def test_a_step_beyond_is_noticed(library: Path, plant: str) -> None:
    """And the case is named."""
    ends, (wrong,) = run(1, 0, library, plant)
    assert ends["wrong"] == 1 and f"planted: {plant}: " in wrong and PLANTS[plant] in wrong, wrong


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*map(int, sys.argv[2:5]), *sys.argv[5:])
    else:
        total: Counter[str] = Counter()
        with tempfile.TemporaryDirectory() as temporary:
            built = build(Path(temporary))
            for part in range(0, int(sys.argv[1]), 1000):
                size = min(1000, int(sys.argv[1]) - part)
                ends, wrong = run(size, int(sys.argv[2]) + part // 1000, built, module="".join(sys.argv[3:4]))
                total += ends
                print(part + size, dict(total), *wrong, sep="\n  ", flush=True)
        sys.exit(total["wrong"] > 0)
