"""What the tests of ops share."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import pytest
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vamoh.ops import _native
from vamoh.ops._native import native, native_unavailable
from vamoh.ops._op import all_ops, forget_choices

ROOT = Path(__file__).parents[2]
ON_HOST = ROOT / "tests" / "ops" / "cuda_on_host"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors hold NaN or the largest integer, so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


class OnGpu(TorchDispatchMode):
    """Runs the ops of vamoh on copies of their tensors in GPU memory, so that one test serves all devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "vamoh":
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Tensor, lambda t: t.cuda(), (args, kwargs or {}))
        return tree_map_only(Tensor, lambda t: t.cpu(), func(*args, **kwargs))


HOST_BACKENDS = ["cpu", "reference", "cuda-on-host"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs CUDA kernels on the host waits for a compiler."""
    for item in items:
        chosen = item.callspec.params.values() if hasattr(item, "callspec") else ()
        fixtures = getattr(item, "fixturenames", ())
        if "cuda-on-host" in map(str, chosen) or {"cuda_on_host", "build_on_host"} & set(fixtures):
            item.add_marker(pytest.mark.slow)


def on_host(request: pytest.FixtureRequest) -> str:
    """Prepare the backend that the parameter names."""
    if request.param == "cpu" and native_unavailable():
        pytest.skip(str(native_unavailable()))
    return request.getfixturevalue("cuda_on_host") if request.param == "cuda-on-host" else request.param


@pytest.fixture(params=HOST_BACKENDS)
def host_backend(request: pytest.FixtureRequest) -> str:
    """Every backend of the ops on point clouds that runs on this machine's memory: CUDA kernels do there too."""
    return on_host(request)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The backends that the fixture `backend` goes through: with CUDA where the test file says HAS_CUDA."""
    own = any("backend" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "backend" in metafunc.fixturenames and not own:
        cuda = ["cuda-on-host", pytest.param("cuda", marks=pytest.mark.gpu)]
        more = cuda if getattr(metafunc.module, "HAS_CUDA", False) else []
        metafunc.parametrize("backend", ["cpu", "reference", *more], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend, on a GPU too. Not for torch.compile and opcheck of CUDA ops, which do not see through OnGpu."""
    if request.param == "cuda":
        with OnGpu():
            yield "cuda"
    else:
        yield on_host(request)


@pytest.fixture
def isas() -> list[str]:
    """Instruction sets of this machine."""
    if native_unavailable():
        pytest.skip(str(native_unavailable()))
    return native().supported_isas()


def _outlier() -> Tensor:
    coords = torch.rand(150, 70)
    coords[17] = 1e6
    return coords


def _between_codes() -> Tensor:
    values = torch.randint(0, 127, (150, 1)) + 0.5 + 0.01 * torch.randn(150, 1)
    values[:2] = torch.tensor([[0.0], [127.0]])
    return values.expand(-1, 64).contiguous()  # rounding errs as far as it can, in all dimensions alike


def _with(values: Sequence[float]) -> Tensor:
    coords = torch.randn(150, 80)
    for i, value in enumerate(values):
        coords[7 * i, 11 * i] = value
    return coords


WIDE_CLOUDS: dict[str, Callable[[], Tensor]] = {
    "whole_numbers": lambda: torch.randint(-2, 3, (200, 64)).float(),  # ties
    "waves": lambda: torch.sin(torch.rand(300, 2) @ torch.randn(2, 256) * 20),
    "one_more_than_fours": lambda: torch.randn(130, 65),
    "one_less_than_fours": lambda: torch.randn(129, 127),
    "corners": lambda: torch.randint(0, 2, (40, 8192)) * 2.0 - 1,  # quantized, as far apart as they can be
    "twins": lambda: torch.rand(20, 90)[torch.randint(0, 20, (160,))] + 1e-6 * torch.randn(160, 90),
    "far_from_the_origin": lambda: 1e5 + torch.rand(140, 66),
    "outlier": _outlier,  # the others are alike to seven bits
    "tiny": lambda: 1e-30 * torch.randn(90, 64),
    "huge": lambda: 1e15 * torch.randn(90, 64),
    "constant": lambda: torch.full((90, 64), 0.3),
    "between_codes": _between_codes,
    "infinite": lambda: _with([float("inf"), 0, -float("inf"), float("nan")]),
    "nan": lambda: _with([0, 0, float("nan")]),
    "many_dimensions": lambda: torch.randn(45, 8193),
}


WIDEST = {"corners", "many_dimensions"}  # for whose many dimensions the reference takes seconds


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in WIDEST)) for name in WIDE_CLOUDS])
def wide_cloud(request: pytest.FixtureRequest) -> Tensor:
    """Clouds [N, D] of at least 64 dimensions, which CPU kernels quantize first where they can."""
    torch.manual_seed(0)
    return WIDE_CLOUDS[request.param]()


FLAT_CLOUDS: dict[str, Callable[[], Tensor]] = {
    "line": lambda: torch.randn(4097, 1),
    "plane": lambda: torch.rand(4200, 2),
    "whole_numbers": lambda: torch.randint(-9, 9, (4500, 3)).float(),  # ties
    "four": lambda: torch.randn(4160, 4),
    "outlier": lambda: torch.cat([torch.tensor([[1e6, -1e6]]), torch.rand(4300, 2)]),
    "far_from_the_origin": lambda: 1e5 + torch.rand(4100, 2),
    "constant": lambda: torch.full((4100, 2), 0.3),
    "tiny": lambda: 1e-30 * torch.randn(4100, 3),  # squares vanish
    "huge": lambda: 1e25 * torch.randn(4100, 3),  # squares overflow
    "nan": lambda: torch.cat([torch.rand(4100, 2), torch.tensor([[0.5, float("nan")]])]),
    "infinite": lambda: torch.cat([torch.tensor([[float("inf"), 0.5]]), torch.rand(4100, 2)]),
}


@pytest.fixture(params=FLAT_CLOUDS)
def flat_cloud(request: pytest.FixtureRequest) -> Tensor:
    """Clouds [N, D] of at most 4 dimensions and so many points that CPU kernels put them into a tree where they can."""
    torch.manual_seed(0)
    return FLAT_CLOUDS[request.param]()


@pytest.fixture(scope="session")
def build_on_host(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function (target, sources, options, link) that compiles C++ and, against our stand-in header, CUDA.

    The options, say sanitizers, are for CUDA sources and for linking.
    """
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None or (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("CUDA kernels run on the host where there are Linux, x86-64 and a C++ compiler")
    strict = ["-Werror", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    folders = [ON_HOST, ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = ["-std=c++17", "-g1", "-O1", "-fPIC", "-ffp-contract=off", *strict, *(f"-I{folder}" for folder in folders)]
    objects: dict[tuple[object, ...], Path] = {}
    folder = tmp_path_factory.mktemp("objects")

    def build(target: Path, sources: Sequence[Path], options: Sequence[object] = (), link: Sequence[object] = ()):
        def compiled(numbered: tuple[int, Path]) -> Path:
            number, source = numbered
            own = options if source.suffix == ".cu" else ()
            key = (source, *own)
            if key not in objects:
                path = folder / f"{len(objects)}.{number}.{source.stem}.o"
                command = [compiler, *flags, f"-I{source.parent}", *own, "-x", "c++", "-c", source, "-o", path]
                subprocess.run([*map(str, command)], check=True)
                objects[key] = path
            return objects[key]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            linked = [compiler, *pool.map(compiled, enumerate(sources)), *options, *link, "-o", target]
        subprocess.run([*map(str, linked)], check=True)
        return target

    return build


@pytest.fixture(scope="session")
def cuda_on_host_module(build_on_host: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The CUDA functions of the native module for host memory; parallel test processes share one build."""
    run = tmp_path_factory.getbasetemp()
    folder = (run.parent if "PYTEST_XDIST_WORKER" in os.environ else run) / "cuda_on_host"
    path = folder / "cuda_on_host.so"
    with FileLock(f"{folder}.lock"):
        if not path.exists():
            folder.mkdir(exist_ok=True)
            kernels = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ON_HOST / "seed.cu"]
            library = build_on_host(folder / "libcuda_kernels.so", kernels, link=["-shared"])
            sources = [ON_HOST / "module.cpp", ROOT / "csrc" / "bindings" / "cuda.cpp"]
            build_on_host(path, sources, link=["-shared", library, f"-Wl,-rpath,{folder}"])
    spec = importlib.util.spec_from_file_location("cuda_on_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """Let a test change what is available here."""
    forget_choices()
    yield
    forget_choices()


@pytest.fixture
def cuda_on_host(cuda_on_host_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let the backend "cuda" take CPU tensors and run its kernels on the host, threads in random order."""
    let_cuda_run_here(cuda_on_host_module, monkeypatch.setattr)
    return "cuda"


def let_cuda_run_here(on_host: ModuleType, set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Replace the backend "cuda" by a module for host memory."""
    on_host.set_seed(2)
    both = ModuleType("both")
    both.getenv = os.environ.get
    for module in (native(), on_host):
        both.__dict__.update(vars(module) if module else {})
    for op in all_ops():
        here = [
            dataclasses.replace(i, devices=("cpu",), unavailable=lambda: None) if i.backend == "cuda" else i
            for i in op.implementations
        ]
        set_attribute(op, "implementations", here)
        set_attribute(op, "_chosen", {})
    set_attribute(_native, "_load", lambda: (both, None))
    set_attribute(_native, "_current_stream", lambda device: contextlib.nullcontext(0))
