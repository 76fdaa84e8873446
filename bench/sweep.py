"""Which plans of the Triton kernels are fastest on this GPU, how far off their results are, and what else there is.

The fastest ones go to `kernels/tuned/<device>.json`, from which `plan` takes them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from bench.op_cases import Preset, op_cases, presets
from bench.timing import TooSlow
from vamoh import ops
from vamoh.kernels import _plan, inr_mixture, inr_mixture_plan, planar_flow, planar_flow_plan
from vamoh.kernels._plan import Device
from vamoh.kernels.ahead_of_time import Case, FlowCase, source
from vamoh.latent import FlowPrior
from vamoh.ops.likelihood import Likelihood
from vamoh.runlog import environment

if TYPE_CHECKING:
    from bench.gpu import Session

NETWORKS = ("celebahq", "era5", "shapes3d", "polymnist")
FLOW = CONVOLVED = "celebahq"
PRECISIONS = ("tf32x3", "ieee", "tf32", "bf16")
TILES = (64, 128, 256)
SLACK = 2.0
"""How many times the error of the model's plan one may have and still be chosen."""
WORKERS = 10
RESERVE = 20.0
"""Seconds that the networks leave to the flow and PointConv."""
GROUP = 32
"""Pairs of a function and a component whose first layer one batched product computes."""


def shapes(small: bool) -> Iterator[inr_mixture_plan.Blocks]:
    """Blocks of the networks' training kernel, the most promising first."""
    for inputs, warps, stages in [(16, 8, 1)] if small else [
        (16, 8, 1), (32, 4, 2), (64, 8, 1), (64, 8, 2), (32, 8, 1), (32, 8, 2), (32, 4, 1), (16, 4, 1), (16, 4, 2),
        (16, 8, 2), (64, 4, 1), (64, 4, 2),
    ]:  # fmt: skip
        yield inr_mixture_plan.Blocks(64, 64, inputs, warps, stages)


def flow_shapes(small: bool, samples: int) -> Iterator[planar_flow_plan.Blocks]:
    """Rows and warps of the flow's training kernel."""
    for rows in (4,) if small else (8, 16, 32, 64):
        for warps in (1,) if small else (1, 2, 4, 8):
            if rows <= samples:
                yield planar_flow_plan.Blocks(rows, warps)


@dataclass(frozen=True)
class Network:
    """The training kernel of a preset's networks on random data."""

    preset: Preset
    kind: Likelihood
    mirrored: bool
    size: tuple[int, int, int]

    @classmethod
    def of(cls, preset: Preset) -> Network:
        """With the likelihood that the preset has."""
        m, s = preset.model, preset.sizes
        kind = Likelihood(m.likelihood, m.bin_width / 2, m.epsilon, m.open_ends)
        mirror = preset.encoded()[1]
        rows = s.points if mirror is None else int(((mirror < 0) | (mirror >= torch.arange(len(mirror)))).sum())
        return cls(preset, kind, mirror is not None, (s.batch, s.components, rows))

    def case(self, blocks: inr_mixture_plan.Blocks) -> Case:
        """The kernel as it is compiled ahead of time."""
        widths, sine = self.preset.sizes.inr, self.preset.inr.activation == "sine"
        return Case("expected", widths, self.mirrored, sine, tuple(self.kind), self.size, blocks)

    def runs(self) -> Callable[[str], Callable[[], tuple[Tensor, ...]]]:
        """A function of the precision that gives the call."""
        p = self.preset
        theta, values, (features, mirror) = p.theta().detach(), p.values(), p.encoded()
        weights = torch.rand(theta.shape[0], theta.shape[1], p.sizes.points).softmax(1)
        scale = torch.full((p.sizes.components, values.shape[2]), 0.1)
        given = (theta, features, values, weights, scale, mirror, *p.inr, *self.kind)
        return lambda precision: functools.partial(inr_mixture.expected_log_likelihood, *given, precision)

    def error(self, call: functools.partial[tuple[Tensor, ...]], grad: Tensor) -> float:
        """Of the gradient of two components of the first function, in norm, against float64 in plain torch."""
        theta, features, values, weights, scale, mirror, *_ = call.args
        exact = [t.double() for t in (theta[:1, :2], features, values[:1], weights[:1, :2], scale[:2])]
        run = ops.inr_mixture_expected_log_likelihood
        leaf = exact[0].requires_grad_()
        bound = run(leaf, *exact[1:], self.preset.inr, self.kind, mirror=mirror, backend="reference")[0]
        (expected,) = torch.autograd.grad(bound.sum(), leaf)
        return float((grad[:1, :2] - expected).norm() / expected.norm())


def _networks(session: Session) -> Iterator[Network]:
    with torch.device("cpu"):
        found = {p.name: p for p in presets()}
        names = NETWORKS[-1:] if _small(session) else NETWORKS
        yield from (Network.of(found[name]) for name in names)


def _small(session: Session) -> bool:
    return session.amounts.repeats < 20


def _compile(case: Case | FlowCase, precision: str, capability: int) -> str:
    """Compile a kernel into Triton's cache on disk, in a process of its own; what went wrong, if anything."""
    try:
        code, options = source(case, precision, capability)
        triton.compile(code, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # a plan that does not fit the chip is no candidate
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _compile_all(session: Session, wanted: Iterable[tuple[Case | FlowCase, str]]) -> Iterator[dict[str, Any]]:
    """Compile in parallel, in order, until the time is up."""
    start, wanted = session.now(), list(wanted)
    capability = _capability()
    interpreted = os.environ.pop("TRITON_INTERPRET", None)  # the processes compile
    pool = ProcessPoolExecutor(1 if _small(session) else WORKERS, multiprocessing.get_context("spawn"))
    try:
        jobs = [pool.submit(_compile, case, precision, capability) for case, precision in wanted]
        problems = [job.result() for job in as_completed(jobs, timeout=max(session.left - 3, 1))]
    except TimeoutError:
        problems = [job.result() for job in jobs if job.done()]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted
    failed = [problem for problem in problems if problem]
    line = {"kind": "precompiled", "kernels": len(problems) - len(failed), "of": len(wanted), "failed": failed[:3]}
    yield {**line, "seconds": round(session.now() - start, 1)}


def _capability() -> int:
    of = torch.cuda.get_device_properties(0)
    return int(10 * of.major + of.minor)


def precompile(session: Session) -> Iterator[dict[str, Any]]:
    """Compile the candidates of the sweep beside other stages, so that it need not wait for them."""
    small = _small(session)
    wanted: list[tuple[Case | FlowCase, str]] = []
    for network in _networks(session):
        cases = [network.case(blocks) for blocks in shapes(small)]
        wanted += [(case, precision) for case in cases for precision in (PRECISIONS[:1] if small else PRECISIONS)]
    wanted += [(case, "ieee") for case in _flow_cases(session)]
    yield from _compile_all(session, wanted)


@contextlib.contextmanager
def planned(module: Any, plan: Callable[..., Any], blocks: Any) -> Iterator[None]:
    """Let a module of kernels cut its work so."""
    before = module._plan
    module._plan = functools.partial(plan, blocks=blocks)
    try:
        yield
    finally:
        module._plan = before


def _seconds(session: Session, run: Callable[[], object]) -> float:
    run()
    return statistics.median(session.clock(run) for _ in range(1 if _small(session) else 5))


def networks(session: Session) -> Iterator[dict[str, Any]]:
    """Time and error of every plan of the networks' training kernel, then with other tiles of the best."""
    precisions = PRECISIONS[:1] if _small(session) else PRECISIONS
    for network in _networks(session):
        name = network.preset.name
        with torch.device(session.device):
            calls = network.runs()
        found: dict[str, list[dict[str, Any]]] = {precision: [] for precision in precisions}

        def measure(
            precision: str, blocks: inr_mixture_plan.Blocks, network: Network = network, calls: Any = calls
        ) -> dict[str, Any]:
            line: dict[str, Any] = {"kind": "plan", "preset": network.preset.name, "precision": precision}
            line |= {"key": f"networks/{network.preset.name}/{precision}/{'-'.join(map(str, blocks[2:]))}"}
            line |= {"op": "inr_mixture.expected", "sizes": network.preset.sizes.inr, "blocks": blocks._asdict()}
            line["variant"] = [precision, network.mirrored]
            try:
                with planned(inr_mixture, inr_mixture_plan.plan, blocks):
                    call = calls(precision)
                    grad = call()[2]
                    return {**line, "seconds": _seconds(session, call), "error": network.error(call, grad)}
            except TooSlow:
                raise
            except Exception as error:  # more registers or memory than the chip has: no candidate
                return {**line, "left_out": f"{type(error).__name__}: {error}".splitlines()[0]}

        for precision in precisions:
            for blocks in shapes(_small(session)):
                if session.left < RESERVE:
                    yield {"kind": "skipped", "job": f"sweep/{name}", "why": "the rest of the sweep needs the time"}
                    break
                found[precision].append(measure(precision, blocks))
                yield found[precision][-1]
        best = {p: _best(lines) for p, lines in found.items()}
        again = [
            (precision, inr_mixture_plan.Blocks(**{**line["blocks"], "tile": tile}))
            for precision, line in best.items()
            if line is not None
            for tile in (TILES[:1] if _small(session) else TILES)
        ]
        if not _small(session) and session.left > RESERVE:
            yield from _compile_all(session, [(network.case(blocks), precision) for precision, blocks in again])
        for precision, blocks in again if session.left > RESERVE else []:
            found[precision].append(measure(precision, blocks))
            yield found[precision][-1]
        for lines in found.values():
            session.plans += [line for line in [_best(lines)] if line is not None]
        if session.left > RESERVE:
            yield from _first_layer(session, name, calls("ieee").args)


def _best(lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest whose error is about that of the model's plan, which comes first."""
    done = [line for line in lines if "seconds" in line]
    if not done:
        return None
    right = [line for line in done if line["error"] <= SLACK * done[0]["error"]]
    return {**min(right, key=lambda line: line["seconds"]), "model_seconds": done[0]["seconds"]}


def _first_layer(session: Session, name: str, given: Sequence[Tensor]) -> Iterator[dict[str, Any]]:
    """The first layer as batched products, group by group, there and back: what a design built on them would pay."""
    theta, features, widths = given[0], given[1], given[6]
    weight = theta[..., : widths[1] * widths[0]].reshape(-1, widths[1], widths[0]).mT

    def run() -> None:
        for group in weight.split(GROUP):
            torch.matmul(features.mT, torch.matmul(features, group))

    yield from _products(session, f"networks/{name}/first layer", name, run)


def _products(session: Session, key: str, name: str, run: Callable[[], object]) -> Iterator[dict[str, Any]]:
    """Matrix products of torch in float32 and TF32."""
    before = torch.get_float32_matmul_precision()
    try:
        for precision, setting in (("ieee", "highest"), ("tf32", "high")):
            torch.set_float32_matmul_precision(setting)
            seconds = _seconds(session, run)
            yield {"kind": "product", "key": f"{key}/{precision}", "preset": name, "seconds": seconds}
    finally:
        torch.set_float32_matmul_precision(before)


def _flow_cases(session: Session) -> Iterator[FlowCase]:
    with torch.device("cpu"):
        sizes = {p.name: p for p in presets()}[FLOW].sizes
    for samples in session.amounts.samples:
        for blocks in flow_shapes(_small(session), samples):
            yield FlowCase("expected", sizes.flow_layers, sizes.latent, True, samples, blocks)


def flows(session: Session) -> Iterator[dict[str, Any]]:
    """Time and error of every plan of the flow's training kernel."""
    with torch.device("cpu"):
        sizes = {p.name: p for p in presets()}[FLOW].sizes
        prior = FlowPrior(sizes.latent, sizes.flow_layers, identity=True)
    prior = prior.to(session.device)
    torch.manual_seed(0)
    with torch.device(session.device):
        mean, std, seed = torch.randn(sizes.batch, sizes.latent), torch.ones(sizes.batch, sizes.latent), torch.tensor(0)
    mean.requires_grad_()
    for samples in session.amounts.samples:
        noise = ops.CounterNoise(seed, samples)
        with torch.no_grad():
            exact = [p.double() if isinstance(p, Tensor) else p for p in prior.flow]
            run = ops.planar_flow_expected_log_prob
            expected = run(mean.double(), std.double(), type(prior.flow)(*exact), noise, backend="reference")
        lines = []
        model = planar_flow_plan.model(samples, sizes.batch, _plan.power(sizes.latent, 4), _device())
        candidates = [model, *(b for b in flow_shapes(_small(session), samples) if b != model)]
        for blocks in candidates:
            line: dict[str, Any] = {"kind": "plan", "preset": FLOW, "op": "planar_flow.expected"}
            line |= {"key": f"flows/{samples}/{'-'.join(map(str, blocks))}", "sizes": [sizes.latent, sizes.flow_layers]}
            line |= {"variant": [sizes.batch, samples], "blocks": blocks._asdict()}
            try:
                with planned(planar_flow, planar_flow_plan.plan, blocks):
                    call = functools.partial(run, mean, std, prior.flow, noise, backend="triton")
                    error = float((call().detach() - expected).norm() / expected.norm())
                    line |= {"seconds": _seconds(session, call), "error": error}
            except TooSlow:
                raise
            except Exception as error_met:  # more registers or memory than the chip has: no candidate
                line["left_out"] = f"{type(error_met).__name__}: {error_met}".splitlines()[0]
            lines.append(line)
            yield line
        session.plans += [line for line in [_best(lines)] if line is not None]


def _device() -> Device:
    of = torch.cuda.get_device_properties(0)
    return Device(_capability(), of.multi_processor_count, of.name)


def convolutions(session: Session) -> Iterator[dict[str, Any]]:
    """PointConv by its CUDA kernels, in plain torch, and its matrix products alone, forward and backward."""
    native = "cuda" if session.device.type == "cuda" else "cpu"
    with torch.device("cpu"):
        stages = [c for c in {p.name: p for p in presets()}[CONVOLVED].sizes.convs if c.out is not None]
    cases = [c for c in op_cases() if c.preset == CONVOLVED and c.op.startswith("point_conv")]
    for stage, case in list(zip(stages, cases, strict=True))[: 1 if _small(session) else None]:
        torch.manual_seed(0)
        with torch.device(session.device):
            call, leaves = case.build()
        ones = torch.ones_like(call())
        line = {"kind": "convolution", "preset": CONVOLVED, "what": case.op, "channels": stage.channels}
        for backend in (native, "reference"):
            with _backend(backend):
                run = lambda: torch.autograd.grad(call(), leaves, ones)  # noqa: B023, E731
                key = f"convolution/{case.op}/{'reference' if backend == 'reference' else 'cuda'}"
                yield {**line, "key": key, "outputs": stage.out, "seconds": _seconds(session, run)}
        linear = next(leaf for leaf in leaves if leaf.dim() == 2 and leaf.shape[0] == stage.out).detach()
        rows = torch.randn(ones.shape[0] * ones.shape[1], linear.shape[1], device=session.device)
        grad = torch.randn(len(rows), stage.out, device=session.device)

        def products(rows: Tensor = rows, linear: Tensor = linear, grad: Tensor = grad) -> None:
            torch.matmul(rows, linear.mT), torch.matmul(grad, linear), torch.matmul(grad.mT, rows)

        yield from _products(session, f"convolution/{case.op}/products", CONVOLVED, products)


@contextlib.contextmanager
def _backend(name: str) -> Iterator[None]:
    before = os.environ.get("VAMOH_BACKEND")
    os.environ["VAMOH_BACKEND"] = name
    try:
        yield
    finally:
        del os.environ["VAMOH_BACKEND"]
        if before is not None:
            os.environ["VAMOH_BACKEND"] = before


def table(session: Session) -> Iterator[dict[str, Any]]:
    """Write what was fastest where `plan` looks for it, and beside the other results."""
    if not session.plans:
        raise RuntimeError("no plan could be measured")
    device = _device()
    facts = {"device": device.name, "capability": device.capability, "time": time.strftime("%Y-%m-%d")}
    versions = environment(session.device)["versions"]
    facts |= {name: versions[name] for name in ("torch", "triton")}
    keep = ("op", "sizes", "variant", "blocks", "seconds", "model_seconds", "error")
    plans = [{name: line[name] for name in keep} for line in session.plans]
    path = _plan.table_path(device.name)
    text = json.dumps({**facts, "plans": plans}, indent=1) + "\n"
    for target in (path, session.folder / path.name):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    yield {"kind": "table", "path": path.name, "plans": len(plans)}
