"""CUDA kernels where there is no GPU: run on the host, under sanitizers and in several orders of their threads."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vamoh._checks import skip_value_checks
from vamoh.ops import farthest_point_sample, knn, neighbor_difference, point_conv, status
from vamoh.ops._native import cuda_unavailable, native

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
ON_HOST = ROOT / "tests" / "ops" / "cuda_on_host"
OPS = sorted(path.stem.removesuffix("_cuda") for path in CUDA.glob("*_cuda.cu"))
PROGRAM = [ON_HOST / "main.cpp", ON_HOST / "seed.cu"]
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CHECKS = [ON_HOST / f"{op}.cpp" for op in OPS]


def run(*program: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, program)], capture_output=True, text=True, timeout=200, env={**os.environ, **environment}
    )


@pytest.mark.slow
def test_kernels_under_sanitizers(build_on_host, tmp_path):
    program = build_on_host(tmp_path / "checks", [*CUDA.glob("*_cuda.cu"), *CHECKS, *PROGRAM], SANITIZE)
    result = run(program, "quick")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_every_missing_barrier_is_noticed(build_on_host, tmp_path):
    program = build_on_host(tmp_path / "checks", [*CUDA.glob("*_cuda.cu"), *CHECKS, *PROGRAM])
    assert run(program).returncode == 0
    barriers = [
        f"{path.name}:{number}"
        for path in [*CUDA.glob("*.cu"), *CUDA.glob("*.cuh")]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "__syncthreads();" in line
    ]
    assert barriers
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda barrier: run(program, CUDA_ON_HOST_WITHOUT=barrier), barriers)
    missed = [barrier for barrier, result in zip(barriers, results, strict=True) if result.returncode == 0]
    assert not missed


MISTAKES = [
    ("knn", "row < count && d < dims ?", "row <= count && d < dims ?", SANITIZE),
    ("knn", "sums[q][p] < kLargest<T> ? sums[q][p] : kLargest<T>", "sums[q][p]", ()),
    ("knn", "value == own.value && index < own.index", "false", ()),
    ("farthest_point_sample", "near > best.value", "near >= best.value", ()),
    (
        "farthest_point_sample",
        "__fadd_rn(sum, __fmul_rn(difference, difference))",
        "fmaf(difference, difference, sum)",
        (),
    ),
    ("point_conv", "value > 0 ? value : value * slope", "value < 0 ? value : value * slope", ()),
    ("point_conv", "s.shared && b0 > 0 ? to[at] : 0", "0", ()),
    ("point_conv", "k0 + j <= inputs", "k0 + j < inputs", ()),
    ("point_conv", "d < depth ? left(i, k + d) : 0.0f", "left(i, k + d)", SANITIZE),
    ("farthest_point_sample", "__shfl_xor_sync(kAllLanes, own.value", "__shfl_xor_sync(0xffffu, own.value", ()),
]


@pytest.mark.slow
@pytest.mark.parametrize(("op", "right", "wrong", "options"), MISTAKES)
def test_mistakes_are_noticed(build_on_host, tmp_path, op, right, wrong, options):
    changed = 0
    for path in CUDA.parent.rglob("*.*"):
        copy = tmp_path / "csrc" / path.relative_to(CUDA.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text()
        if path.parent == CUDA and (path.suffix == ".cuh" or path.stem == f"{op}_cuda"):
            changed += right in text
            text = text.replace(right, wrong)
        copy.write_text(text)
    assert changed == 1
    sources = [tmp_path / "csrc" / "cuda" / f"{op}_cuda.cu", ON_HOST / f"{op}.cpp", *PROGRAM]
    assert run(build_on_host(tmp_path / "checks", sources, options)).returncode != 0


@pytest.mark.parametrize("seed", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbors_have_the_bits_of_the_reference(cuda_on_host, cuda_on_host_module, dtype, seed):
    cuda_on_host_module.set_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    phase = 2 * math.pi * torch.rand(90, 2, generator=generator) @ torch.randn(2, 40, generator=generator)
    for cloud in (torch.cat([phase.cos(), phase.sin()], 1), torch.randn(3, 201, 33, generator=generator)):
        points = cloud.to(dtype)
        mask = torch.rand(points.shape[:-1], generator=generator) < 0.8
        for m in (None, mask):
            expected = farthest_point_sample(points, 30, m, backend="reference")
            assert torch.equal(farthest_point_sample(points, 30, m, backend="cuda"), expected)
            queries = points[..., :20, :]
            expected = knn(points, queries, 9, m, backend="reference")
            assert torch.equal(knn(points, queries, 9, m, backend="cuda"), expected)


@pytest.mark.parametrize("shared", [True, False])
def test_point_conv_has_the_same_bits_in_every_order(cuda_on_host, cuda_on_host_module, shared):
    generator = torch.Generator().manual_seed(0)
    lead = 1 if shared else 3
    features = torch.randn(3, 20, 5, generator=generator)
    neighbors = torch.randint(20, (lead, 90, 7), generator=generator)
    weights = torch.randn(lead, 90, 7, 4, generator=generator)
    linear = [torch.randn(70, 20, generator=generator), torch.randn(70, generator=generator)]
    leaves = [t.requires_grad_() for t in (features, weights, *linear)]
    results = []
    for seed in (0, 1, 2, 3):
        cuda_on_host_module.set_seed(seed)
        out = point_conv(features, neighbors, weights, *linear, 0.2, backend="cuda")
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def resources(nvcc: str, source: Path, arch: str) -> dict[str, dict[str, int]]:
    """What ptxas says of every kernel of a file: registers, bytes of shared memory, stack and spills."""
    command = [nvcc, "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Xptxas", "-v", "-o", os.devnull, str(source)]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    names = subprocess.run(["c++filt"], input=report, check=True, capture_output=True, text=True).stdout
    names = names.replace("(anonymous namespace)::", "").replace("vamoh::", "")
    found = {}
    for part in names.split("Compiling entry function")[1:]:
        name = re.search(r"(?:void )?([^(\s']+(?:, [^(]+)?)\(.*\)' for", part)
        numbers = {
            key: sum(int(n) for n in re.findall(pattern, part))
            for key, pattern in {
                "registers": r"Used (\d+) registers",
                "shared": r"(\d+) bytes smem",
                "stack": r"(\d+) bytes stack frame",
                "spills": r"(\d+) bytes spill",
            }.items()
        }
        found[name[1]] = numbers
    return found


@pytest.mark.slow
def test_nothing_spills_and_the_table_of_resources_is_right():
    nvcc = shutil.which("nvcc")
    if nvcc is None or shutil.which("c++filt") is None:
        pytest.skip("no nvcc, or no c++filt")
    jobs = [(source, arch) for source in sorted(CUDA.glob("*_cuda.cu")) for arch in ("sm_80", "sm_90")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = dict(zip(jobs, pool.map(lambda job: resources(nvcc, *job), jobs), strict=True))
    for job, report in reports.items():
        assert report
        spilling = {name for name, numbers in report.items() if numbers["stack"] or numbers["spills"]}
        assert not spilling, (job, spilling)
    lines = []
    for source in sorted(CUDA.glob("*_cuda.cu")):
        for name, old in sorted(reports[source, "sm_80"].items()):
            new = reports[source, "sm_90"][name]
            op, registers = source.stem.removesuffix("_cuda"), f"{old['registers']} | {new['registers']}"
            lines.append(f"| `{op}` | `{name}` | {registers} | {new['shared']} |")
    document = (ROOT / "docs" / "kernels-cuda.md").read_text()
    version = re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))
    if f"nvcc {version[1]}" not in document:
        pytest.skip(f"the table was made with another nvcc than {version[1]}; nothing spills here")
    table = re.findall(r"^\| `.*\|$", document, re.MULTILINE)
    assert table == lines, "put these lines into docs/kernels-cuda.md:\n" + "\n".join(lines)


@pytest.mark.parametrize("op", ["farthest_point_sample", "knn"])
def test_distances_are_not_contracted(tmp_path, op):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    code = tmp_path / "code.ptx"
    source = CUDA / f"{op}_cuda.cu"
    subprocess.run([nvcc, "-std=c++17", "-O3", "-arch=compute_80", "-ptx", source, "-o", code], check=True)
    used = set(re.findall(r"\b((?:fma|mad|add|sub|mul)[\w.]*\.f(?:32|64))\b", code.read_text()))
    assert used == {f"{step}.rn.f{bits}" for step in ("add", "sub", "mul") for bits in (32, 64)}


class Unread(TorchDispatchMode):
    """Refuses to read contents, for which the host would wait; looks into the ops of vamoh too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vamoh":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"), func
        return func(*args, **(kwargs or {}))


def test_calls_of_the_model_only_enqueue(cuda_on_host):
    points = torch.randn(2, 12, 3)
    mask = torch.arange(24).reshape(2, 12) % 3 != 1
    cells, table = torch.randint(0, 4, (2, 12, 1)), torch.rand(7)

    def calls():
        for m in (None, mask):
            farthest_point_sample(points, 5, m, backend="cuda")
            knn(points, points[:, :4], 5, m, backend="cuda")
        farthest_point_sample(cells, 5, table=table, backend="cuda")
        neighbors = knn(cells, cells[:, :4], 5, table=table, backend="cuda")
        leaf, linear, bias = points.clone().requires_grad_(), torch.randn(7, 18, requires_grad=True), torch.zeros(6)
        weights = neighbor_difference(torch.randn(2, 12, 6, requires_grad=True), neighbors, neighbors[..., 0], bias)
        out = point_conv(leaf, neighbors, weights, linear, linear[:, 0], 0.2, backend="cuda")
        out.sum().backward()

    with pytest.raises(AssertionError, match="_local_scalar_dense"), Unread():
        calls()
    with skip_value_checks(), Unread():
        calls()


@pytest.fixture
def built() -> None:
    if native() is None or not native().cuda:
        pytest.skip("the native module is built without CUDA")


def test_launch_without_a_device_says_so(built):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert {row.reason for row in status().rows if row.backend == "cuda"} == {"torch finds no CUDA device"}
    assert re.search(r"\(cudaError\w+\)$", native().cuda_problem())
    cloud = (0, 1, 1, 1)
    arguments = {"points": cloud, "queries": cloud, "mask": (0, 1), "out": 0, "batch": 1, "neighbors": 1}
    launch = native().knn_float32_cuda
    assert launch(**arguments, run=(0, 0)) > 0
    with pytest.raises(RuntimeError, match=r"knn: CUDA kernel could not be launched: .*\(cudaError\w+\)"):
        launch(**arguments, run=(256, 0))


@pytest.mark.parametrize(
    ("cuda", "problem", "capability", "reason"),
    [
        ("", "", (9, 0), "the native module is built without CUDA; reinstall vamoh where nvcc is found (VAMOH_CUDA=1)"),
        ("13.0 for sm_80", "driver too old", (9, 0), "the CUDA 13.0 of the native module says: driver too old"),
        ("13.0 for sm_80", "", (7, 5), "needs GPUs of compute capability 8.0 or more, got 7.5"),
        ("13.0 for sm_80", "", (8, 0), None),
    ],
)
def test_why_cuda_is_not_available(monkeypatch, cuda, problem, capability, reason):
    module = SimpleNamespace(cuda=cuda, cuda_problem=lambda: problem)
    monkeypatch.setattr("vamoh.ops._native._load", lambda: (module, None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), capability][i])
    assert cuda_unavailable() == reason


@pytest.mark.gpu
def test_contract_of_torch_library_on_a_gpu():
    torch.use_deterministic_algorithms(False)
    points = torch.randn(2, 12, 3, device="cuda")
    mask = torch.arange(24, device="cuda").reshape(2, 12) % 3 != 1
    for m in (None, mask):
        torch.library.opcheck(torch.ops.vamoh.knn, (points, points[:, :4], 5, m, None, "cuda"))
        torch.library.opcheck(torch.ops.vamoh.farthest_point_sample, (points, m, 5, None, "cuda"))
    neighbors = knn(points, points[:, :4], 5)
    weights, linear = torch.randn(2, 4, 5, 6, device="cuda"), torch.randn(7, 18, device="cuda")
    arguments = (points.requires_grad_(), neighbors, weights, linear, linear[:, 0].clone())
    torch.library.opcheck(torch.ops.vamoh.point_conv.default, (*arguments, 0.2, "cuda"))
    compiled = torch.compile(point_conv, fullgraph=True, backend="aot_eager", dynamic=False)
    assert torch.equal(compiled(*arguments, 0.2, backend="cuda"), point_conv(*arguments, 0.2, backend="cuda"))


@pytest.mark.gpu
def test_kernels_are_the_default_and_shared_inputs_stay_shared():
    points = torch.randn(1, 50, 3, device="cuda").expand(4, -1, -1)
    expected = knn(points, points, 4, backend="reference")
    assert torch.equal(knn(points, points, 4), expected)
    assert torch.equal(knn(points, points, 4, backend="cuda"), expected)


EVERY_KERNEL = """
import torch
from vamoh.ops import farthest_point_sample, knn, neighbor_difference, point_conv
torch.manual_seed(0)
for batch, points, queries, neighbors, channels, width, outputs in ((1, 1, 1, 1, 1, 1, 1), (3, 71, 70, 9, 5, 3, 66)):
    for dtype in (torch.float32, torch.float64):
        cloud = torch.randn(batch, points, channels, device="cuda", dtype=dtype)
        mask = torch.rand(batch, points, device="cuda") < 0.8
        mask[:, :neighbors] = True
        cells = torch.randint(0, 9, (batch, points, 1), device="cuda")
        table = torch.rand(17, device="cuda", dtype=dtype)
        for m in (None, mask):
            farthest_point_sample(cloud, queries, m, backend="cuda")
            farthest_point_sample(cells, queries, m, table=table, backend="cuda")
            index = knn(cloud, cloud[:, :queries], neighbors, m, backend="cuda")
            knn(cells, cells[:, :queries], neighbors, m, table=table, backend="cuda")
    for shared in (True, False):
        at = index[:1] if shared else index
        features, table = (torch.randn(batch, points, n, device="cuda", requires_grad=True) for n in (channels, width))
        bias = torch.randn(width, device="cuda", requires_grad=True)
        linear = torch.randn(outputs, channels * width, device="cuda", requires_grad=True)
        weights = neighbor_difference(table[:1] if shared else table, at, at[..., 0], bias, backend="cuda")
        out = point_conv(features, at, weights, linear, linear[:, 0], 0.2, backend="cuda")
        out.square().sum().backward()
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_kernels_under_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", EVERY_KERNEL]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    report = result.stdout + result.stderr
    if re.search("not supported|LibraryNotLoaded|Unable to", report) and "done" not in result.stdout:
        pytest.skip(f"compute-sanitizer does not work on this machine: {report.strip().splitlines()[0]}")
    # what torch's own kernels leave unwritten is not ours
    faults = [part for part in report.split("=========")[1:] if "vamoh" in part]
    assert "done" in result.stdout, report
    assert not faults and (result.returncode == 0 or tool == "initcheck"), report


@pytest.mark.gpu
def test_current_stream_is_used_and_not_waited_for():
    points = torch.randn(3000, 3, device="cuda")
    expected = knn(points, points, 4, backend="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        later = points * 2
        result = knn(later, later, 4, backend="cuda")
        assert not stream.query()
    stream.synchronize()
    assert torch.equal(result, expected)
