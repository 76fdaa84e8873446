from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vamoh.ops import _native, _op, _status, farthest_point_sample, knn, status
from vamoh.ops._op import Implementation, Op

CPU = torch.device("cpu")


def op_of(name: str, *implementations: Implementation) -> Op:
    """An op that torch does not know, with these implementations."""
    op = Op.__new__(Op)
    op.name, op.implementations, op._chosen = name, list(implementations), {}
    return op


def backend(name: str, **limits: object) -> Implementation:
    return Implementation(name, lambda: None, **limits)


@pytest.fixture
def toy(monkeypatch, fresh_choice) -> Op:
    """One op "toy": "fast" takes float32 on the CPU, "broken" is never there, "reference" takes all."""
    monkeypatch.delenv("VAMOH_BACKEND", raising=False)
    broken = backend("broken", unavailable=lambda: "it is broken")
    toy = op_of("toy", broken, backend("fast", devices=("cpu",), dtypes=(torch.float32,)), backend("reference"))
    monkeypatch.setattr(_op, "OPS", {"toy": toy})
    return toy


def test_automatic_choice_takes_the_first_that_fits(toy):
    assert toy.choose(CPU, torch.float32).backend == "fast"
    assert toy.choose(CPU, torch.float64).backend == "reference"
    assert toy.choose(torch.device("meta"), torch.float32).backend == "reference"


def test_argument_beats_environment(toy, monkeypatch):
    assert toy.choose(CPU, torch.float32).backend == "fast"
    monkeypatch.setenv("VAMOH_BACKEND", "reference")
    assert toy.choose(CPU, torch.float32).backend == "reference"
    assert toy.choose(CPU, torch.float32, "fast").backend == "fast"
    monkeypatch.setenv("VAMOH_BACKEND", "")
    assert toy.choose(CPU, torch.float32).backend == "fast"


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "error", "message"),
    [
        ("broken", "cpu", torch.float32, RuntimeError, "toy: backend 'broken' is not available: it is broken"),
        ("fast", "cpu", torch.float64, ValueError, "toy: backend 'fast' takes dtype torch.float32, got torch.float64"),
        ("fast", "meta", torch.float32, ValueError, "toy: backend 'fast' takes tensors on cpu, got meta"),
        ("slow", "cpu", torch.float32, ValueError, "toy: backend must be one of broken, fast, reference, got 'slow'"),
    ],
)
def test_explicit_choice_never_falls_back(toy, monkeypatch, backend, device, dtype, error, message):
    for _ in range(2):
        with pytest.raises(error, match=message):
            toy.choose(torch.device(device), dtype, backend)
    monkeypatch.setenv("VAMOH_BACKEND", backend)
    with pytest.raises(error, match=r"\(from VAMOH_BACKEND\)"):
        toy.choose(torch.device(device), dtype)


def test_refusal_goes_to_the_next_or_is_an_error(toy):
    """It depends on the arguments, so that it is asked in every call."""

    def refusal(colour: str) -> str | None:
        return f"takes red, got {colour}" if colour != "red" else None

    toy.implementations.insert(0, backend("picky", devices=("cpu",), refusal=refusal))
    for colour, chosen in (("red", "picky"), ("blue", "fast"), ("red", "picky")):
        assert toy.choose(CPU, torch.float32, arguments=[colour]).backend == chosen
    assert toy.choose(CPU, torch.float32, "picky", ["red"]).backend == "picky"
    with pytest.raises(ValueError, match="toy: backend 'picky' takes red, got blue"):
        toy.choose(CPU, torch.float32, "picky", ["blue"])


@pytest.mark.parametrize(
    ("found", "version", "capability", "reason"),
    [
        (None, "13.0", (9, 0), "Triton is not installed (pip install vamoh[triton])"),
        ("here", None, (9, 0), "no CUDA device"),
        ("here", "13.0", (7, 5), "needs a GPU of compute capability 8.0 or higher, this one has 7.5"),
        ("here", "13.0", (8, 0), None),
    ],
)
def test_why_triton_cannot_run(monkeypatch, found, version, capability, reason):
    monkeypatch.setattr(_native.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(_native, "triton_kernels", lambda name: None)
    assert _native.triton_unavailable.__wrapped__() == reason


def test_kernels_that_cannot_be_imported_are_noticed(monkeypatch):
    """As after `setup.py build_ext --inplace`, which builds but does not map vamoh.kernels to its folder."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert _native.triton_unavailable.__wrapped__() is None
    for name in [m for m in sys.modules if m.startswith("vamoh.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vamoh.kernels", None)
    reason = _native.triton_unavailable.__wrapped__()
    assert reason.startswith("vamoh.kernels cannot be imported (") and "install vamoh with pip" in reason


def test_status_of_triton(toy, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(_status, "triton_unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("VAMOH_TRITON_PRECISION", "bf16")
    report = status()
    assert report.triton["plans"] == "modelled"
    assert report.triton["device"] == "a GPU" and report.triton["precision"] == "bf16"
    assert "triton\n  version" in str(report)


def test_status_rows_and_table(toy, monkeypatch):
    monkeypatch.setattr(_native, "_load", lambda: (None, "not built"))
    report = status()
    assert [(r.backend, r.available, r.reason) for r in report.rows] == [
        ("broken", False, "it is broken"),
        ("fast", True, ""),
        ("reference", True, ""),
    ]
    assert report.build == {}
    assert [" ".join(row.split()) for row in str(report).splitlines()[:4]] == [
        "op backend serves takes",
        "toy broken - any dtype on any device; not here: it is broken",
        "toy fast float32 on cpu float32 on cpu",
        "toy reference float64 on cpu any dtype on any device",
    ]
    assert str(report).endswith("not built")


def test_status_says_what_each_backend_serves(toy, monkeypatch):
    """The same as `choose` takes; beyond the limits of one backend the next serves."""
    float32 = (torch.float32,)
    quick = backend("quick", devices=("cuda",), dtypes=float32, limits="at most 64 channels")
    net = op_of("net", quick, backend("fast", devices=("cpu", "cuda"), dtypes=float32), backend("reference"))
    monkeypatch.setitem(_op.OPS, "net", net)
    for found in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        rows = {row.backend: row for row in status().rows if row.op == "net"}
        on_gpu = ("float32 on cuda",) if found else ()
        assert rows["quick"].serves == on_gpu
        assert rows["fast"].serves == ("float32 on cpu", *(f"{name} (rest)" for name in on_gpu))
        assert rows["reference"].serves == ("float64 on cpu", "float64 on cuda")[: 1 + found]
        assert rows["quick"].takes == "float32 on cuda; at most 64 channels"
        for row in rows.values():
            for served in row.serves:
                dtype, _, device = served.removesuffix(" (rest)").split()
                chosen = net.choose(torch.device(device), getattr(torch, dtype))
                assert served.endswith("(rest)") or chosen.backend == row.backend


def test_status_of_the_package():
    rows = {(r.op, r.backend): r for r in status().rows}
    for op in ("farthest_point_sample", "knn"):
        assert rows[op, "reference"].available
        assert rows[op, "cpu"].available == (_native.native_unavailable() is None)


def test_build_facts(isas):
    build = status().build
    assert set(build) == {"version", "compiler", "flags", "isa", "cuda"}
    assert "-ffp-contract=off" in build["flags"]
    assert "fast-math" not in build["flags"]
    assert "march" not in build["flags"]
    assert build["isa"].split()[0] in isas


def test_without_the_native_module(monkeypatch, fresh_choice):
    monkeypatch.setattr(_native, "_load", lambda: (None, "not built"))
    coords = torch.rand(9, 2)
    assert torch.equal(farthest_point_sample(coords, 3), farthest_point_sample(coords, 3, backend="reference"))
    with pytest.raises(RuntimeError, match="knn: backend 'cpu' is not available: not built"):
        knn(coords, coords, 2, backend="cpu")


def test_module_of_another_version_is_refused(monkeypatch, isas):
    monkeypatch.setattr(_native, "__version__", "0.0.0")
    _native._load.cache_clear()
    try:
        assert "not 0.0.0; reinstall vamoh" in str(_native.native_unavailable())
    finally:
        _native._load.cache_clear()


@pytest.mark.parametrize("isa", ["sse9", "AVX2"])
def test_unknown_isa(isas, monkeypatch, isa):
    monkeypatch.setenv("VAMOH_ISA", isa)
    with pytest.raises(ValueError, match=f"VAMOH_ISA must be one of avx512, avx2, portable, got '{isa}'"):
        knn(torch.zeros(3, 2), torch.zeros(1, 2), 1, backend="cpu")


def test_isa_that_this_cpu_lacks(isas, monkeypatch, fresh_choice):
    class OldMachine:
        supported_isas = staticmethod(lambda: ["portable"])
        getenv = staticmethod(os.environ.get)

    monkeypatch.setattr(_native, "_load", lambda: (OldMachine, None))
    assert _native.native_isa() == "portable"
    monkeypatch.setenv("VAMOH_ISA", "avx512")
    with pytest.raises(ValueError, match="VAMOH_ISA must be one of portable on this machine, got 'avx512'"):
        _native.native_isa()


def test_native_module_refuses_an_unsupported_isa(isas):
    with pytest.raises(ValueError, match="unsupported instruction set neon"):
        _native.native().knn_float32(
            points=(None, 0, 0, 0), queries=(None, 0, 0, 0), mask=(None, 0), out=None, batch=0, neighbors=0, threads=1,
            isa="neon",
        )  # fmt: skip


def test_calls_from_several_python_threads(isas):
    torch.set_num_threads(2)
    clouds = [torch.rand(500, 20, generator=torch.Generator().manual_seed(i)) for i in range(12)]
    expected = [knn(c, c, 5) for c in clouds]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(lambda c: knn(c, c, 5), clouds), expected))


def test_threads_after_fork(isas):
    script = """
import os, sys, torch
from vamoh.ops import knn
torch.set_num_threads(3)
x = torch.rand(400, 5)
expected = knn(x, x, 4, backend="cpu")
for _ in range(3):
    child = os.fork()
    if child == 0:
        same = torch.equal(knn(x, x, 4, backend="cpu"), expected)
        threads = len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 3
        os._exit(0 if same and threads == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0
assert torch.equal(knn(x, x, 4, backend="cpu"), expected)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
