"""What the compiler makes of the kernels, without a GPU: registers, spills, shared memory, tensor-core instructions.

`python -m vamoh.kernels.ahead_of_time docs/kernels.md` writes the table of all plans that ship. It needs Triton, and a
process without TRITON_INTERPRET.
"""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import inr_mixture
from .inr_mixture_plan import PRECISIONS, Device, Plan, plan

CHIPS = {80: 163 << 10, 90: 227 << 10}
"""Shared memory [bytes] that a block may use, by compute capability."""
MOST_SPILLED = {"forward": 0, "train": 64}
"""Bytes of registers per thread that a kernel may spill."""

_OPTIONS = ("num_warps", "num_stages", "maxnreg")
_INDICES = ("first", "second")
_FLOATS = ("half_bin", "epsilon", "slope", "omega")
_INTEGERS = (
    "theta_b", "theta_k", "features_b", "log_pi_k", "log_pi_n", "points", "rows_total", "tiles", "batch", "components",
    "groups", "pairs", "splits",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A kernel for one architecture: layer widths, whether mirrored, activation, likelihood as in the ops."""

    op: str
    widths: tuple[int, ...]
    mirrored: bool = True
    sine: bool = False
    likelihood: tuple[str, float, float, bool] = ("logistic", 1 / 512, 1e-7, False)


@dataclass(frozen=True)
class Report:
    """What one compiled kernel uses; spilled in bytes per thread, shared in bytes per block."""

    kernel: str
    plan: Plan
    registers: int
    spilled: int
    shared: int
    wgmma: int
    mma: int


def cases() -> list[Case]:
    """The kernels of the table: the widths of the presets and the widest, every likelihood, activation and op."""
    exact = ("logistic", 1 / 512, 0.0, True)
    continuous, bernoulli = ("continuous_bernoulli", 0.0, 0.0, False), ("bernoulli", 0.0, 0.0, False)
    found = []
    for op in ("log_likelihood", "expected"):
        found += [
            Case(op, (256, 64, 64, 64, 3)),
            Case(op, (256, 32, 32, 3), likelihood=exact),
            Case(op, (256, 4, 4, 4, 1), likelihood=bernoulli),
            Case(op, (64, 64, 64, 1), mirrored=False, sine=True, likelihood=continuous),
            Case(op, (2, 256, 256, 256, 256, 256, 3), mirrored=False),
            Case(op, (256, 128, 128, 17), mirrored=False, likelihood=exact),
        ]
    return [
        *found,
        Case("mean", (256, 64, 64, 64, 3)),
        Case("outputs", (256, 64, 64, 64, 3), mirrored=False),
        Case("outputs_backward", (256, 64, 64, 64, 3)),
    ]


def report(case: Case, precision: str, capability: int, *, ones: bool = False) -> Report:
    """Compile one kernel for one chip; ones: all sizes and strides that are arguments are 1, which compiles them in."""
    training = case.op in ("expected", "outputs_backward")
    kernel = inr_mixture.train if training else inr_mixture.forward
    chosen = plan(case.op, 64, 10, 4096, case.widths, precision, Device(capability, 132), case.mirrored)
    meta = inr_mixture.constants(chosen, case.widths, case.mirrored, case.sine, case.likelihood, precision)
    meta |= {"MODE": case.op} | ({"TILE": chosen.tile} if training else {})
    options = {name: meta.pop(name) for name in _OPTIONS}
    if not case.mirrored:
        meta |= dict.fromkeys(_INDICES)
    if ones:
        meta |= {name: 1 for name in _INTEGERS if name in kernel.arg_names}
    signature = {name: _type(name) if name not in meta else "constexpr" for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, meta, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    said = _assemble(ptx)
    return Report(
        "train" if training else "forward",
        chosen,
        max(int(n) for n in re.findall(r"Used (\d+) registers", said)),
        sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said)),
        compiled.metadata.shared,
        ptx.count("wgmma.mma_async"),
        len(re.findall(r"\bmma\.sync\.aligned\.m", ptx)),
    )


def _type(name: str) -> str:
    if name in _INDICES:
        return "*i32"
    return "fp32" if name in _FLOATS else "i32" if name in _INTEGERS else "*fp32"


def _assemble(ptx: str) -> str:
    """What ptxas tells of a kernel."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    chip = re.search(r"\.target (sm_\w+)", ptx)
    if chip is None:
        raise ValueError("ahead_of_time: the compiler's output names no chip")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-v", f"-arch={chip[1]}", source, "-o", Path(folder) / "kernel.cubin"]
        return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stderr


def row(case: Case, precision: str, capability: int) -> str:
    """Line of the table."""
    r = report(case, precision, capability)
    p = r.plan
    network = "-".join(map(str, case.widths)) + (" sine" if case.sine else "") + (" mirrored" if case.mirrored else "")
    score = case.likelihood[0] + (", open ends, ε 0" if case.likelihood[3] else "")
    score = "" if "outputs" in case.op else score
    block = f"{p.rows}×{p.outputs}×{p.inputs}, {p.warps} warps, {p.stages} stage{'s' if p.stages > 1 else ''}"
    cells = [
        case.op,
        network,
        score,
        precision,
        f"sm_{capability}",
        block,
        r.registers,
        r.spilled,
        r.shared,
        r.wgmma,
        r.mma,
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


HEADER = """# Triton kernels: what the compiler reports

No GPU has run these kernels yet and no time of theirs is known: this is what the compiler says of them, Triton {triton}
with its own ptxas. `python -m vamoh.kernels.ahead_of_time docs/kernels.md` writes this page, of sources with the digest
{digest}. `tests/kernels/test_ahead_of_time.py` holds the limits: {limit} KB (sm_80) and {other} KB (sm_90) of shared
memory per block, no spilled register in the forward kernel, and at most {spilled} bytes of them per thread in training.

Block: rows × outputs × inputs of one product. Registers and spilled bytes are per thread, shared memory in bytes per
block; the last two columns count instructions in the code, not executed ones. `ieee` has no tensor-core instructions.

| op | network | likelihood | precision | chip | block | registers | spilled | shared | wgmma | mma.sync |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def digest() -> str:
    """Of the code that the table describes, without its docstrings and comments."""
    code = []
    for name in ("_math", "inr_mixture", "inr_mixture_plan", "ahead_of_time"):
        tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                texts = [n for n in body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
                node.body = [n for n in body if n not in texts]  # type: ignore[attr-defined]
        code.append(ast.unparse(tree))
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:12]


def write(path: Path) -> None:
    """Compile all cases for all chips in all precisions and write the table: some minutes."""
    rows = [row(case, p, c) for case in cases() for p in PRECISIONS for c in CHIPS]
    head = HEADER.format(
        triton=triton.__version__,
        digest=digest(),
        limit=CHIPS[80] >> 10,
        other=CHIPS[90] >> 10,
        spilled=MOST_SPILLED["train"],
    )
    path.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
