"""What the compiler makes of the kernels, without a GPU: registers, spills, shared memory, tensor-core instructions.

`python -m vamoh.kernels.ahead_of_time docs/kernels.md` writes the table of all plans that ship. It needs Triton, and a
process without TRITON_INTERPRET.
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import subprocess
import sys
import tempfile
import tokenize
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import gating, gating_plan, inr_mixture, inr_mixture_plan, planar_flow, planar_flow_plan
from ._plan import Device
from .inr_mixture_plan import PRECISIONS

CHIPS = {80: 163 << 10, 90: 227 << 10}
"""Shared memory [bytes] that a block may use, by compute capability."""
MOST_SPILLED = {"forward": 0, "train": 64}
"""Bytes of registers per thread that a kernel may spill."""

EVERY_CONSTANT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
"""Whether Triton lists constants among the arguments it knows something of, or only those that are text: its cache
tells the two apart."""

_OPTIONS = ("num_warps", "num_stages", "maxnreg")
_TYPES = {"first_ptr": "*i32", "second_ptr": "*i32", "seed_ptr": "*i64", "mask_ptr": "*i1"}
_TYPES |= dict.fromkeys(("half_bin", "epsilon", "slope", "omega", "share", "constant"), "fp32")
"""Types of arguments; all other pointers are to float32, all other numbers int32."""


@dataclass(frozen=True)
class Compilation:
    """A kernel and the constants it is compiled for: None for tensors it does not get. block: in words."""

    kernel: triton.JITFunction
    kind: str
    block: str
    constants: dict[str, object]


@dataclass(frozen=True)
class Case:
    """A kernel of `inr_mixture.py`: layer widths, whether mirrored, activation, likelihood as in the ops.

    size: B, K and pairs or points; blocks: those of the plan by default.
    """

    op: str
    widths: tuple[int, ...]
    mirrored: bool = True
    sine: bool = False
    likelihood: tuple[str, float, float, bool] = ("logistic", 1 / 512, 1e-7, False)
    size: tuple[int, int, int] = (64, 10, 4096)
    blocks: inr_mixture_plan.Blocks | None = None
    precisions = PRECISIONS

    def cells(self) -> list[str]:
        """Op, sizes and variant in the table."""
        sizes = "-".join(map(str, self.widths)) + " sine" * self.sine + " mirrored" * self.mirrored
        score = self.likelihood[0] + (", open ends, ε 0" if self.likelihood[3] else "")
        return [self.op, sizes, "" if "outputs" in self.op else score]

    def compilation(self, precision: str, capability: int) -> Compilation:
        """How the op compiles it."""
        training = self.op in ("expected", "outputs_backward")
        device = Device(capability, 132)
        p = inr_mixture_plan.plan(
            self.op, *self.size, self.widths, precision, device, self.mirrored, self.blocks
        )  # fmt: skip
        likelihood = (self.likelihood[0], 0.0, 0.0, False) if self.op == "mean" else self.likelihood
        likelihood = ("none", 0.0, 0.0, False) if "outputs" in self.op else likelihood
        meta = inr_mixture.constants(p, self.widths, self.mirrored, self.sine, likelihood, precision)
        meta |= {"MODE": self.op} | ({"TILE": p.tile} if training else {})
        meta |= {} if self.mirrored else {"first_ptr": None, "second_ptr": None}
        unused = {
            "log_likelihood": ["log_pi_ptr"],
            "outputs": ["values_ptr", "scale_ptr", "log_pi_ptr"],
            "mean": ["values_ptr", "scale_ptr"],
            "outputs_backward": ["weights_ptr", "scale_ptr", "log_p_out_ptr"],
        }
        meta |= dict.fromkeys(unused.get(self.op, []))
        kernel, kind = (inr_mixture.train, "train") if training else (inr_mixture.forward, "forward")
        return Compilation(kernel, kind, f"{p.rows}×{p.outputs}×{p.inputs}, {_machine(meta)}", meta)


@dataclass(frozen=True)
class FlowCase:
    """A kernel of `planar_flow.py`: T, Z, and whether the noise is made in the kernel.

    samples: per function; blocks: those of the plan by default.
    """

    op: str
    layers: int
    latent: int
    counted: bool = False
    samples: int = 4096
    blocks: planar_flow_plan.Blocks | None = None
    precisions = ("ieee",)

    def cells(self) -> list[str]:
        """Op, sizes and variant in the table."""
        noise = "counter noise" if self.counted else "noise" if self.op in ("value", "expected") else ""
        return [f"flow {self.op}", f"T {self.layers}, Z {self.latent}", noise]

    def compilation(self, precision: str, capability: int) -> Compilation:
        """How the op compiles it."""
        single = self.op in ("log_prob", "sample", "backward")
        batch = 1 if single else 64
        device = Device(capability, 132)
        p = planar_flow_plan.plan(self.op, self.samples, batch, self.latent, self.layers, device, self.blocks)
        meta = planar_flow.constants(p, self.latent, self.op)
        unused = {
            "log_prob": ["drawn_ptr"],
            "value": ["drawn_ptr"],
            "expected": ["weights_ptr", "grad_x_ptr"],
            "backward": ["total_out_ptr", "grad_mean_ptr", "grad_std_ptr"],
        }.get(self.op, [])
        made = "noise_ptr" if self.counted else "seed_ptr"
        unused += ["mean_ptr", "std_ptr", "noise_ptr", "seed_ptr"] if single else ["x_ptr", made]
        kind = planar_flow_plan.kernel_of(self.op)
        block = f"{p.rows} samples, {_machine(meta)}"
        return Compilation(getattr(planar_flow, kind), kind, block, meta | dict.fromkeys(unused))


@dataclass(frozen=True)
class GatingCase:
    """A kernel of a network of `gating.py`: layer widths H, ..., K, channels, whether functions share coordinates."""

    op: str
    widths: tuple[int, ...]
    channels: int
    shared: bool = True
    bounded: bool = False

    @property
    def precisions(self) -> tuple[str, ...]:
        """All, but where there are no products."""
        return PRECISIONS if len(self.widths) > 1 else ("ieee",)

    def cells(self) -> list[str]:
        """Op, sizes and variant in the table."""
        variant = f"C {self.channels}" + ", shared" * self.shared + ", tanh" * self.bounded
        return [self.op, "-".join(map(str, self.widths)), variant]

    def compilation(self, precision: str, capability: int) -> Compilation:
        """How the op compiles it."""
        p = gating_plan.plan(self.op, 64, 4096, self.widths, precision, Device(capability, 132))
        meta = gating.constants(p, self.widths, self.channels, self.bounded, precision)
        block = f"{p.rows}×{max(p.outputs)}×{p.inputs}, {_machine(meta)}"
        if self.op == "gating":
            return Compilation(gating.forward, "forward", block, meta)
        meta |= {"SHARED": self.shared} | ({} if self.channels else {"grad_values_ptr": None})
        return Compilation(gating.train, "train", block, meta)


@dataclass(frozen=True)
class KlCase:
    """A kernel of `categorical_kl` with K components."""

    op: str
    components: int
    masked: bool = False
    precisions = ("ieee",)

    def cells(self) -> list[str]:
        """Op, sizes and variant in the table."""
        return [self.op, f"K {self.components}", "mask" if self.masked else ""]

    def compilation(self, precision: str, capability: int) -> Compilation:
        """How the op compiles it."""
        meta = gating.kl_constants(self.components)
        block = f"{gating_plan.KL_POINTS} points, {_machine(meta)}"
        if self.op == "categorical_kl":
            meta |= {} if self.masked else {"mask_ptr": None}
            return Compilation(gating.kl_forward, "forward", block, meta)
        return Compilation(gating.kl_train, "train", block, meta)


AnyCase = Case | FlowCase | GatingCase | KlCase


def _machine(meta: dict[str, object]) -> str:
    warps, stages = meta["num_warps"], meta["num_stages"]
    return f"{warps} warp{'s' * (warps != 1)}, {stages} stage{'s' * (stages != 1)}"


@dataclass(frozen=True)
class Report:
    """What one compiled kernel uses; spilled in bytes per thread, shared in bytes per block."""

    block: str
    registers: int
    spilled: int
    shared: int
    wgmma: int
    mma: int


def cases() -> list[AnyCase]:
    """The kernels of the table: the sizes of the presets and the widest, every likelihood, activation and op."""
    exact = ("logistic", 1 / 512, 0.0, True)
    continuous, bernoulli = ("continuous_bernoulli", 0.0, 0.0, False), ("bernoulli", 0.0, 0.0, False)
    found: list[AnyCase] = []
    for op in ("log_likelihood", "expected"):
        found += [
            Case(op, (256, 64, 64, 64, 3)),
            Case(op, (256, 32, 32, 3), likelihood=exact),
            Case(op, (256, 4, 4, 4, 1), likelihood=bernoulli),
            Case(op, (64, 64, 64, 1), mirrored=False, sine=True, likelihood=continuous),
            Case(op, (2, 256, 256, 256, 256, 256, 3), mirrored=False),
            Case(op, (256, 128, 128, 17), mirrored=False, likelihood=exact),
        ]
    found += [
        Case("mean", (256, 64, 64, 64, 3)),
        Case("outputs", (256, 64, 64, 64, 3), mirrored=False),
        Case("outputs_backward", (256, 64, 64, 64, 3)),
    ]
    for op in planar_flow_plan.OPS:
        for layers, latent in ((80, 64), (40, 32), (3, 16), (6, 1), (10, 200), (10, 512), (10, 1024)):
            found += [FlowCase(op, layers, latent, counted) for counted in (True, False)[op not in _NOISY :]]
    for op in ("gating", "gating_backward"):
        found += [
            GatingCase(op, (64, 32, 10), 3, bounded=True),
            GatingCase(op, (32, 32, 5), 0),
            GatingCase(op, (16, 2), 1),
            GatingCase(op, (256, 256, 64), 17, shared=False),
            GatingCase(op, (64, 64, 64, 32, 10), 3, bounded=True),
            GatingCase(op, (10,), 3),
        ]
    return [
        *found,
        KlCase("categorical_kl", 10, True),
        KlCase("categorical_kl", 10),
        KlCase("categorical_kl_backward", 10),
    ]


_NOISY = ("value", "expected")


def source(case: AnyCase, precision: str, capability: int) -> tuple[ASTSource, dict[str, object]]:
    """What is compiled of a kernel, and how, as when it is launched: tensors lie at multiples of 16 bytes."""
    c = case.compilation(precision, capability)
    kernel, meta = c.kernel, dict(c.constants)
    options = {name: meta.pop(name) for name in _OPTIONS}
    signature = {
        name: _TYPES.get(name, "*fp32" if name.endswith("_ptr") else "i32") if name not in meta else "constexpr"
        for name in kernel.arg_names
    }
    attributes: dict[tuple[int], list[list[object]]] = {}
    for i, kind in enumerate(signature.values()):
        if kind == "constexpr" and (EVERY_CONSTANT or isinstance(meta[kernel.arg_names[i]], str)):
            attributes[i,] = []
        elif kind.startswith("*"):
            attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, meta, attributes), options


def report(case: AnyCase, precision: str, capability: int) -> Report:
    """Compile one kernel for one chip."""
    code, options = source(case, precision, capability)
    compiled = triton.compile(code, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    said = _assemble(ptx)
    return Report(
        case.compilation(precision, capability).block,
        max(int(n) for n in re.findall(r"Used (\d+) registers", said)),
        sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said)),
        compiled.metadata.shared,
        ptx.count("wgmma.mma_async"),
        len(re.findall(r"\bmma\.sync\.aligned\.m", ptx)),
    )


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


def row(case: AnyCase, precision: str, capability: int) -> str:
    """Line of the table."""
    r = report(case, precision, capability)
    chip = f"sm_{capability}"
    cells = [*case.cells(), precision, chip, r.block, r.registers, r.spilled, r.shared, r.wgmma, r.mma]
    return "| " + " | ".join(map(str, cells)) + " |"


HEADER = """# Triton kernels: what the compiler reports

What Triton {triton} and its ptxas say of the kernels, compiled as they are when they are launched; [gpu.md](gpu.md) has
what is known of their speed. `python -m vamoh.kernels.ahead_of_time docs/kernels.md` writes this page, of sources with
the digest {digest}. `tests/kernels/test_ahead_of_time.py` holds the limits: {limit} KB (sm_80) and {other} KB (sm_90)
of shared memory per block, no spilled register in forward kernels, and at most {spilled} bytes of them per thread in
training.

The first ops are those of `inr_mixture`; `flow` are those of `planar_flow`, where value is the expected log-density
alone, expected that with its gradients, and backward the gradients of log_prob. Block: rows × outputs × inputs of one
product, or the samples or points of a tile. Registers and spilled bytes are per thread, shared memory in bytes per
block; the last two columns count instructions in the code, not executed ones. `ieee` has no tensor-core instructions.

| op | sizes | variant | precision | chip | block | registers | spilled | shared | wgmma | mma.sync |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def digest() -> str:
    """Of the code that the table describes, without its docstrings and comments; the same under every Python."""
    code = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
        for node in ast.walk(ast.parse(text)):
            match node:
                case ast.Expr(value=ast.Constant(value=str())):
                    lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
        code += [line.rstrip() for line in lines if line.strip()]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:12]


def write(path: Path) -> None:
    """Compile all cases for all chips in all precisions and write the table: some minutes."""
    rows = [row(case, p, c) for case in cases() for p in case.precisions for c in CHIPS]
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
