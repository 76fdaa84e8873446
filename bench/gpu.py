"""What is found out on a GPU, one stage and usually one preset per process; `bench/on_gpu.sh` runs all of them.

python -m bench.gpu time --presets celebahq --out results.jsonl

Every finding is a line of JSON, appended at once: what is there stays when the process is ended. What does not fit into
the budget is a line that says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import counts
from bench.cases import (
    BATCH,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    NAMES,
    Case,
    Draw,
    Reconstruct,
    clear_gradients,
    reference_backend,
    train_step,
)
from bench.counts import Count
from bench.op_cases import NOTHING, OpCase, op_cases
from bench.report import read_lines
from bench.timing import SLOW, TooSlow, plan, ratios, time_limit
from vamoh.config import PRESETS
from vamoh.data import Dataset
from vamoh.data.dataset import SPLITS
from vamoh.ops import status
from vamoh.runlog import environment
from vamoh.train import Trainer

ROOT = Path(__file__).resolve().parents[1]
COMPILED = ("polymnist", "shapes3d")
"""Presets for which `torch.compile` takes part."""
TRACED = ("celebahq", "polymnist")
"""Presets whose step is kept as a trace."""


@dataclass(frozen=True)
class Amounts:
    """How much is done. samples: of the flow, the trainer's default first. sides: of grids whose memory is counted.

    flushed: bytes written before every call that is timed, more than a GPU's cache holds; they also give the host a
    lead. ceilings: side of the matrices, and bytes copied. repeats: of a step whose bits are compared; in_a_row: steps
    of the trainer.
    """

    samples: tuple[int, int] = (16, 4096)
    flushed: int = 1 << 28
    ceilings: tuple[int, int] = (8192, 1 << 31)
    repeats: int = 20
    in_a_row: int = 8
    sides: tuple[int, ...] = (64, 128, 256, 512, 1024)


SMALL = Amounts((4, 8), 1 << 10, (64, 1 << 16), 2, 2, (8,))


@dataclass
class Clock:
    """Times calls on the GPU by its events."""

    device: torch.device
    flushed: int = Amounts.flushed
    _flushed: Tensor | None = None

    def __call__(self, run: Callable[[], object]) -> float:
        """Seconds of one call, nothing of its inputs in the GPU's cache."""
        if self._flushed is None:
            self._flushed = torch.empty(self.flushed // 4, device=self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def host(self, run: Callable[[], object], calls: int = 5) -> float:
        """Seconds the host needs to enqueue one call, median of some, each on an idle GPU."""
        taken = []
        for _ in range(calls):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return statistics.median(taken)


def take_turns(
    clock: Callable[[Callable[[], object]], float], runs: Mapping[str, Callable[[], object]], budget: float
) -> dict[str, list[float]]:
    """Seconds of every call by contestant, round by round as `bench.timing.interleave`: each once to warm up.

    A contestant slower than SLOW after that is timed once.
    """
    first, *others = runs
    warm = {}
    for name, run in runs.items():
        run()
        warm[name] = clock(run)
    once = {name for name in others if warm[name] > SLOW}
    rounds, joined = plan({name: t for name, t in warm.items() if name not in once}, budget)
    seconds: dict[str, list[float]] = {name: [warm[name]] if name in once else [] for name in runs}
    for turn in range(rounds):
        for name in [*(n for n in others if n not in once and turn < joined[n]), first]:
            seconds[name].append(clock(runs[name]))
    return seconds


@dataclass(frozen=True)
class Peaks:
    """What the device can do: 10⁹ operations per second of matrix products, 10⁹ bytes per second read and written."""

    fp32: float
    tf32: float
    bf16: float
    copy: float

    @property
    def flops(self) -> float:
        """Ceiling of products as good as float32: plain, or each of three in tf32."""
        return max(self.fp32, self.tf32 / 3)


def measure_peaks(clock: Clock, side: int, copied: int) -> Peaks:
    """Best of some products of random matrices [side, side], and of copies of `copied` bytes, each three times warm."""
    generator = torch.Generator(clock.device).manual_seed(0)
    a, b = (torch.randn(side, side, device=clock.device, generator=generator) for _ in range(2))

    def best(run: Callable[[], object]) -> float:
        run()
        return min(clock(run) for _ in range(5))

    before = torch.get_float32_matmul_precision()
    rates = {}
    try:
        for name, precision in (("fp32", "highest"), ("tf32", "high")):
            torch.set_float32_matmul_precision(precision)
            rates[name] = 2 * side**3 / best(lambda: a @ b) / 1e9
    finally:
        torch.set_float32_matmul_precision(before)
    half = a.bfloat16(), b.bfloat16()
    rates["bf16"] = 2 * side**3 / best(lambda: half[0] @ half[1]) / 1e9
    source = torch.randn(copied // 4, device=clock.device, generator=generator)
    target = torch.empty_like(source)
    return Peaks(**rates, copy=2 * copied / best(lambda: target.copy_(source)) / 1e9)


def findings(seconds: Mapping[str, list[float]], count: Count | None, peaks: Peaks | None) -> dict[str, Any]:
    """What the report shows of timed contestants, the first of which is ours; count: what one call of ours needs.

    share_fma and share_copy: of the ceilings of `Peaks`. roofline: the least time that both allow, over the time taken;
    of a replayed graph, where there is one, as its launches cost nothing.
    """
    result: dict[str, Any] = {"contestants": ratios(seconds)}
    if count is None:
        return result
    name = "graph" if "graph" in seconds else next(iter(seconds))
    own = statistics.median(seconds[name])
    result |= {"operations": count.operations, "bytes": count.bytes, "rated": name}
    result |= {"gflops": count.operations / own / 1e9, "gbytes": count.bytes / own / 1e9}
    if peaks is not None:
        result |= {"share_fma": result["gflops"] / peaks.flops, "share_copy": result["gbytes"] / peaks.copy}
        result["roofline"] = max(result["share_fma"], result["share_copy"])
    return result


@dataclass
class Session:
    """One process: where lines go, how much time is left, and what was measured that later jobs need.

    folder: for files that are no lines.
    """

    device: torch.device
    write: Callable[[dict[str, Any]], None]
    deadline: float
    clock: Clock
    folder: Path = Path()
    now: Callable[[], float] = time.monotonic
    per_contest: float = 1.5
    amounts: Amounts = Amounts()
    peaks: Peaks | None = None
    cases: dict[str, Case] = field(default_factory=dict)
    plans: list[dict[str, Any]] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - self.now()

    def case(self, name: str) -> Case:
        """A preset's case; the others are forgotten."""
        if name not in self.cases:
            self.cases.clear()
            self.free()
            self.cases[name] = Case(name, device=self.device)
        return self.cases[name]

    def free(self) -> None:
        """Give memory back."""
        gc.collect()
        torch.cuda.empty_cache()

    def graph(self, run: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> Callable[[], None]:
        """`run` as a captured CUDA graph; RuntimeError where it cannot be. prepare: before the capture."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(2):
                prepare()
                run()
        torch.cuda.current_stream().wait_stream(beside)
        prepare()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        return captured.replay  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Job:
    """One thing to find out. need: seconds below which it is not begun; limit: seconds after which it is given up."""

    name: str
    run: Callable[[Session], Iterator[dict[str, Any]]]
    need: float = 2.0
    limit: float = 60.0


def work(session: Session, jobs: Sequence[Job]) -> dict[str, int]:
    """Do the jobs in order while there is time; one that fails leaves a line and the rest go on. Counts of outcomes."""
    outcomes = {"done": 0, "failed": 0, "skipped": 0}
    for job in jobs:
        if session.left < job.need:
            session.write({"kind": "skipped", "job": job.name, "why": f"{max(session.left, 0):.0f} s were left"})
            outcomes["skipped"] += 1
            continue
        start = session.now()
        try:
            with time_limit(max(min(job.limit, session.left), 1.0)):
                for line in job.run(session):
                    session.write({"job": job.name, **line})
            outcomes["done"] += 1
        except Exception as error:  # whatever one job meets, the others are still worth their time
            session.write({"kind": "failed", "job": job.name, "error": _message(error)})
            outcomes["failed"] += 1
        session.write({"kind": "time", "job": job.name, "seconds": round(session.now() - start, 2)})
    return outcomes


def facts(device: torch.device) -> dict[str, Any]:
    """The machine, its software and this checkout."""
    found: dict[str, Any] = {"kind": "environment", "time": datetime.now(timezone.utc).isoformat()}
    found |= environment(device) | {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}
    found |= {"backends": [asdict(row) for row in status().rows], "native": status().build, "triton": status().triton}
    of = torch.cuda.get_device_properties(device)
    found |= {"device_name": of.name, "cuda": torch.version.cuda, "capability": [of.major, of.minor]}
    found |= {"multiprocessors": of.multi_processor_count, "memory": of.total_memory}
    query = ["nvidia-smi", f"--id={device.index or 0}", "--query-gpu=driver_version", "--format=csv,noheader"]
    found["driver"] = _run(query)
    return found


def _git(*arguments: str) -> str:
    return _run(["git", "-C", str(ROOT), *arguments])


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def check_op(case: OpCase, device: torch.device) -> dict[str, float]:
    """Relative error in norm of an op's results and gradients against plain torch; 1 for indices that differ."""
    torch.manual_seed(0)
    with torch.device(device):
        call, leaves = case.build()
    found = []
    for context in (nullcontext(), reference_backend()):
        with context:
            out = call()
            results = [out] if isinstance(out, Tensor) else list(out)
            for leaf in leaves:
                leaf.grad = None
            if leaves:
                results[0].backward(torch.ones_like(results[0]))
            found.append([*results, *(leaf.grad for leaf in leaves)])
    errors = [_error(a, b) for a, b in zip(*found, strict=True)]
    count = len(errors) - len(leaves)
    return {"result": max(errors[:count]), "gradient": max(errors[count:], default=0.0)}


def _error(found: Tensor, expected: Tensor) -> float:
    if not found.is_floating_point():
        return float(not torch.equal(found, expected))
    found, expected = found.detach().double(), expected.detach().double()
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


@contextmanager
def ieee_products() -> Iterator[None]:
    """Triton kernels with plain float32 products: what is right under it was off by rounding alone."""
    before = os.environ.get("VAMOH_TRITON_PRECISION")
    os.environ["VAMOH_TRITON_PRECISION"] = "ieee"
    try:
        yield
    finally:
        del os.environ["VAMOH_TRITON_PRECISION"]
        if before is not None:
            os.environ["VAMOH_TRITON_PRECISION"] = before


def checked(preset: str, what: str, check: Callable[[], tuple[bool, dict[str, Any]]]) -> dict[str, Any]:
    """Line of a check, whatever it meets; one that fails is repeated with plain float32 products."""

    def once() -> tuple[bool, dict[str, Any]]:
        try:
            return check()
        except TooSlow:
            raise
        except Exception as error:  # a wrong result, a kernel that does not compile: either is what the check is for
            return False, {"error": _message(error)}

    right, errors = once()
    line = {"kind": "check", "preset": preset, "what": what, "right": right, "errors": errors}
    if not right:
        with ieee_products():
            line["ieee"] = dict(zip(("right", "errors"), once(), strict=True))
    return line


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _ops_are_right(session: Session, preset: str, cases: Sequence[OpCase]) -> Iterator[dict[str, Any]]:
    for case in cases:

        def check(case: OpCase = case) -> tuple[bool, dict[str, float]]:
            errors = check_op(case, session.device)
            return errors["result"] < LOSS_TOLERANCE and errors["gradient"] < GRADIENT_TOLERANCE, errors

        yield checked(preset, case.op, check)


def _steps_are_right(session: Session, name: str) -> Iterator[dict[str, Any]]:
    case = session.case(name)
    case.model.kl_samples = 16
    for contestant in ("oracle", "baseline"):
        check = lambda c=contestant: (True, asdict(case.check(c)))  # noqa: E731
        yield checked(name, f"step against {contestant}", check)


def _bits_repeat(session: Session, name: str) -> Iterator[dict[str, Any]]:
    case = session.case(name)
    case.model.kl_samples = 16
    step, _ = _fixed_step(case)

    def bits() -> list[Tensor]:
        clear_gradients(case.model)
        loss = step()
        return [loss.detach().clone(), *(p.grad.clone() for p in case.model.parameters() if p.grad is not None)]

    def check() -> tuple[bool, dict[str, Any]]:
        first = bits()
        others = [
            sum(not torch.equal(a, b) for a, b in zip(first, bits(), strict=True))
            for _ in range(session.amounts.repeats)
        ]
        return not any(others), {"tensors": len(first), "differ": max(others)}

    yield checked(name, f"the same bits {session.amounts.repeats} times", check)


def _fixed_step(case: Case) -> tuple[Callable[[], Tensor], Draw]:
    """Forward and backward of the same points and noise every time, which a graph can hold."""
    draw = case.draw()
    points = case.observed(draw)
    hoods = case.model.neighborhoods(points)

    def step() -> Tensor:
        loss = case.model.elbo(points, noise=draw.noise, neighborhoods=hoods).loss
        loss.backward()
        return loss

    return step, draw


def _peaks(session: Session) -> Iterator[dict[str, Any]]:
    session.peaks = measure_peaks(session.clock, *session.amounts.ceilings)
    yield {"kind": "peaks", **asdict(session.peaks), "flops": session.peaks.flops}


def _train(session: Session, name: str, samples: int) -> Iterator[dict[str, Any]]:
    """Forward and backward: ours enqueued call by call, captured, and the eager baseline."""
    case = session.case(name)
    case.model.kl_samples = samples
    left_out: dict[str, str] = {}
    runs = {"ours": train_step(case, "ours")}
    for other, made in (
        ("graph", lambda: session.graph(_fixed_step(case)[0], lambda: clear_gradients(case.model))),
        ("baseline", lambda: train_step(case, "baseline")),
    ):
        _try(made, other, runs, left_out)
    count = counts.train_step(case.sizes, mirrored=case.mirrored)
    seconds = take_turns(session.clock, runs, session.per_contest)
    found = findings(seconds, count, session.peaks) | {"host": session.clock.host(runs["ours"])}
    clear_gradients(case.model)
    clear_gradients(case.baseline)
    yield _measured(f"step/{name}/{samples}", name, f"train step, {samples} flow samples", case.batch, found, left_out)


def _try(
    make: Callable[[], Callable[[], object]], name: str, runs: dict[str, Callable[[], object]], left_out: dict[str, str]
) -> None:
    """Add a contestant that has run once, or why there is none: memory that does not suffice, say."""
    try:
        run = make()
        run()
        runs[name] = run
    except TooSlow:
        raise
    except Exception as error:  # a contestant that cannot take part leaves the others their race
        left_out[name] = _message(error)


def _trainer(session: Session, name: str, samples: int) -> Iterator[dict[str, Any]]:
    """`Trainer.step` as `vamoh train` calls it: points from host memory, neighbours searched beside the step before."""
    case = session.case(name)
    case.model.kl_samples = samples
    host = case.host.values
    data = Dataset(
        name, "points", (), case.host.coords, host, dict.fromkeys(SPLITS, torch.arange(len(host))), "logistic"
    )
    begun = {"flow_warmup": 0.0, "gating_warmup": 0.0}  # the whole bound from the first step
    at_rest = replace(case.config.train, lr=1e-12, point_dropout=0.0, batch_size=case.batch, **begun)
    trainer = Trainer(replace(case.config, train=at_rest), data, device=session.device, model=case.model)

    in_a_row = session.amounts.in_a_row

    def steps() -> None:
        for _ in range(in_a_row):
            trainer.step()

    seconds = take_turns(session.clock, {"ours": steps}, session.per_contest)
    trainer.check()
    each = {n: [t / in_a_row for t in times] for n, times in seconds.items()}
    found = findings(each, counts.train_step(case.sizes, mirrored=case.mirrored), session.peaks)
    what = f"Trainer.step, {samples} flow samples, {in_a_row} in a row"
    yield _measured(f"trainer/{name}/{samples}", name, what, case.batch, found, {})


def _reconstruct(session: Session, name: str, single: bool) -> Iterator[dict[str, Any]]:
    case = session.case(name)
    made = Reconstruct(case, 1 if single else case.batch, 1)
    count = counts.reconstruct(made.sizes, len(made.out), mirrored=made.mirrored)
    runs: dict[str, Callable[[], object]] = {"ours": made.run("ours")}
    left_out: dict[str, str] = {}
    with torch.inference_mode():
        _try(lambda: made.run("baseline"), "baseline", runs, left_out)
        found = findings(take_turns(session.clock, runs, session.per_contest / 2), count, session.peaks)
        found["host"] = session.clock.host(runs["ours"])
    key = f"reconstruct/{name}/{'one' if single else 'batch'}"
    yield _measured(key, name, "reconstruct, 1x", len(made.values), found, left_out)


def _op(session: Session, case: OpCase) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    with torch.device(session.device):
        call, leaves = case.build()

    def forward() -> None:
        with torch.no_grad():
            call()

    directions = [(forward, "forward", case.forward)] if case.backward != NOTHING else []
    if case.backward is not None:
        ones = torch.ones_like(call())
        grads = lambda: torch.autograd.grad(call(), leaves, ones)  # noqa: E731
        directions.append((grads, "forward + backward", case.forward + case.backward))
    for run, direction, count in directions:
        runs: dict[str, Callable[[], object]] = {"ours": run}
        left_out: dict[str, str] = {}
        if not case.op.startswith(("farthest_point_sample", "knn")):
            runs["oracle"] = reference_backend()(run)
        _try(lambda run=run: session.graph(run), "graph", runs, left_out)
        found = findings(take_turns(session.clock, runs, session.per_contest / 10), count, session.peaks)
        what = f"{case.op}, {direction}"
        yield _measured(f"op/{case.preset}/{what}", case.preset, what, None, found, left_out)


def _compile(session: Session, name: str, samples: int) -> Iterator[dict[str, Any]]:
    """Fill the compiler's cache on disk, so that a later process need not."""
    case = session.case(name)
    case.model.kl_samples = samples
    start = session.now()
    try:
        case.compile(max(session.left - 1, 1), mode="max-autotune")
    except TooSlow as error:  # the compiler's slowness is no failure of ours
        yield {"kind": "skipped", "why": f"torch.compile {error}"}
        return
    yield {"kind": "compiled", "preset": name, "seconds": session.now() - start}


def _compiled(session: Session, name: str, samples: int) -> Iterator[dict[str, Any]]:
    case = session.case(name)
    case.model.kl_samples = samples
    try:
        case.compile(max(session.left - 2, 1), mode="max-autotune")
    except TooSlow as error:
        yield {"kind": "skipped", "why": f"torch.compile {error}"}
        return
    runs = {n: train_step(case, n) for n in ("ours", "compile")}
    count = counts.train_step(case.sizes, mirrored=case.mirrored)
    found = findings(take_turns(session.clock, runs, session.per_contest), count, session.peaks)
    what = f"train step, {samples} flow samples, compiled"
    yield _measured(f"compile/{name}/{samples}", name, what, case.batch, found, {})


def _profile(session: Session, name: str, samples: int) -> Iterator[dict[str, Any]]:
    """Every kernel of one step, the longest first, and a trace of one preset."""
    case = session.case(name)
    case.model.kl_samples = samples
    run = train_step(case, "ours")
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    clear_gradients(case.model)
    rows = kernel_rows(profiled.key_averages(), DeviceType.CPU if session.device.type == "cpu" else DeviceType.CUDA)
    line: dict[str, Any] = {"kind": "kernels", "preset": name, "rows": rows[:25], "kernels": len(rows)}
    line["us"] = sum(row["us"] for row in rows)
    count = counts.train_step(case.sizes, mirrored=case.mirrored)
    if session.peaks is not None:
        line["floor_us"] = 1e-3 * max(count.operations / session.peaks.flops, count.bytes / session.peaks.copy)
    yield line
    if name in TRACED:
        profiled.export_chrome_trace(str(session.folder / f"trace_{name}.json.gz"))


def kernel_rows(events: Iterable[Any], where: DeviceType) -> list[dict[str, Any]]:
    """Kernels by total time: name, calls, microseconds and share of all."""
    rows = []
    for event in events:
        taken = event.self_cpu_time_total if where == DeviceType.CPU else event.self_device_time_total
        if event.device_type == where and taken > 0:
            rows.append({"kernel": event.key[:100], "calls": event.count, "us": round(float(taken), 1)})
    total = sum(row["us"] for row in rows)
    rows.sort(key=lambda row: -row["us"])
    return [{**row, "share": row["us"] / total} for row in rows]


def _counters(session: Session, name: str, samples: int) -> Iterator[dict[str, Any]]:
    """One step within the range that Nsight Compute looks at."""
    case = session.case(name)
    case.model.kl_samples = samples
    run = train_step(case, "ours")
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    yield {"kind": "counters", "preset": name}


def _memory(session: Session, side: int) -> Iterator[dict[str, Any]]:
    """Peak of one training step of celebahq on a grid of side² points above what model and data take."""
    session.cases.clear()
    session.free()
    case = Case("celebahq", batch=1, shape=(side, side), device=session.device, kl_samples=16)
    hoods = [(c.to(session.device), n.to(session.device)) for c, n in _windows(case)]
    draw = case.draw()
    peaks = {}
    for name in ("ours", "oracle", "baseline"):
        run = case.theirs if name == "baseline" else case.ours
        _ = case.baseline if name == "baseline" else None
        session.free()
        try:
            peaks[name] = _peak(case, run, draw, hoods, reference_backend() if name == "oracle" else nullcontext())
        except torch.OutOfMemoryError:
            peaks[name] = float("inf")
    of = {n: p / 2**20 for n, p in peaks.items() if p < float("inf")}
    failed = [n for n, p in peaks.items() if p == float("inf")]
    yield {"kind": "memory", "preset": "celebahq", "what": f"memory, {side} x {side}", "memory": of, "failed": failed}


def _peak(case: Case, run: Callable[..., Tensor], draw: Draw, hoods: Any, context: Any) -> int:
    for module in (case.model, case.baseline):
        clear_gradients(module)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with context:
        for _ in range(2):
            run(draw, hoods).backward()
            clear_gradients(case.model)
            clear_gradients(case.baseline)
    return int(torch.cuda.max_memory_allocated()) - before


def _windows(case: Case) -> Iterator[tuple[Tensor, Tensor]]:
    """Neighbourhoods that need no search, for which memory is not measured: windows of consecutive points."""
    for stage in case.sizes.convs:
        first = torch.linspace(0, stage.points - stage.neighbors, stage.centroids).long()[None]
        yield first + stage.neighbors // 2, first[..., None] + torch.arange(stage.neighbors)


def _measured(
    key: str, preset: str, what: str, batch: int | None, found: dict[str, Any], left_out: dict[str, str]
) -> dict[str, Any]:
    line = {"kind": "measurement", "key": key, "preset": preset, "what": what, **found, "left_out": left_out}
    return line if batch is None else {**line, "batch": batch}


def _ops_of(name: str) -> list[OpCase]:
    return [case for case in op_cases() if case.preset == name]


def _sweep(session: Session, what: str) -> Iterator[dict[str, Any]]:
    from bench import sweep  # needs Triton

    yield from getattr(sweep, what)(session)


STAGES: dict[str, Callable[[str, Amounts], list[Job]]] = {
    "peaks": lambda n, a: [Job("peaks", _peaks)],
    "check": lambda n, a: [
        Job(f"check/{n}/ops", lambda s: _ops_are_right(s, n, _ops_of(n))),
        Job(f"check/{n}/step", lambda s: _steps_are_right(s, n)),
        Job(f"check/{n}/bits", lambda s: _bits_repeat(s, n)),
    ],
    "compile": lambda n, a: [Job(f"compile/{n}", lambda s: _compile(s, n, a.samples[0]), limit=300)],
    "time": lambda n, a: [
        Job(f"step/{n}/{a.samples[0]}", lambda s: _train(s, n, a.samples[0])),
        Job(f"trainer/{n}/{a.samples[0]}", lambda s: _trainer(s, n, a.samples[0])),
        Job(f"profile/{n}", lambda s: _profile(s, n, a.samples[0])),
        Job(f"reconstruct/{n}/one", lambda s: _reconstruct(s, n, True)),
        Job(f"reconstruct/{n}/batch", lambda s: _reconstruct(s, n, False)),
        Job(f"step/{n}/{a.samples[1]}", lambda s: _train(s, n, a.samples[1])),
        *([Job(f"compiled/{n}", lambda s: _compiled(s, n, a.samples[0]), need=4)] if n in COMPILED else []),
    ],
    "precompile": lambda n, a: [Job("precompile", lambda s: _sweep(s, "precompile"), limit=300)],
    "sweep": lambda n, a: [
        Job("sweep/networks", lambda s: _sweep(s, "networks"), limit=300),
        Job("sweep/flows", lambda s: _sweep(s, "flows")),
        Job("sweep/convolutions", lambda s: _sweep(s, "convolutions")),
        Job("sweep/table", lambda s: _sweep(s, "table"), need=0),
    ],
    "tuned": lambda n, a: [Job(f"tuned/{n}", lambda s: _tuned(s, n))],
    "counters": lambda n, a: [Job(f"counters/{n}", lambda s: _counters(s, n, a.samples[0]))],
    "ops": lambda n, a: [Job(f"op/{c.label}", lambda s, c=c: _op(s, c), limit=20) for c in _ops_of(n)],
    "memory": lambda n, a: [Job(f"memory/{side}", lambda s, x=side: _memory(s, x), need=5) for side in a.sides],
}
"""Jobs of a stage for a preset, the most telling first."""


def _tuned(session: Session, name: str) -> Iterator[dict[str, Any]]:
    """The step again, with the plans that the sweep has just written."""
    samples = session.amounts.samples[0]
    for line in _train(session, name, samples):
        yield {**line, "key": f"tuned/{name}/{samples}", "what": line["what"] + ", measured plans"}


def known_peaks(path: Path) -> Peaks | None:
    """The ceilings that an earlier process found."""
    found = [line for line in read_lines(path) if line["kind"] == "peaks"]
    return Peaks(**{name: found[-1][name] for name in ("fp32", "tf32", "bf16", "copy")}) if found else None


def main(arguments: Sequence[str]) -> int:
    """Run a stage; exit status 1 if a check or a job failed, or nothing could be done, 2 without the device."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--presets", nargs="+", choices=NAMES, default=["celebahq"])
    parser.add_argument("--out", type=Path, default=Path("results.jsonl"), help="JSON lines are appended here")
    parser.add_argument("--folder", type=Path, default=Path(), help="for other files")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds in all (default 60)")
    parser.add_argument("--seconds", type=float, default=1.5, help="of rounds per contest (default 1.5)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, as for sanitizers")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: small sizes, stand-ins for its clocks")
    options = parser.parse_args(arguments)
    if options.tiny or options.rehearse:
        from bench import rehearsal

        rehearsal.shrink()
        if options.rehearse:
            rehearsal.pretend(options.folder)
    elif options.stage not in ("check", "memory"):  # checks run side by side, and a smaller batch is as telling
        BATCH.update({name: PRESETS[name].train.batch_size for name in BATCH})
    if not options.rehearse and not torch.cuda.is_available():
        print(f"bench.gpu: needs a CUDA device, torch {torch.__version__} finds none (--rehearse)", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.rehearse else "cuda")
    wrong: list[dict[str, Any]] = []

    def write(line: dict[str, Any]) -> None:
        """Append a line in one go, so that processes side by side do not tear theirs."""
        text = json.dumps({**line, "stage": options.stage, "at": round(time.time(), 2)}) + "\n"
        with options.out.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if line["kind"] == "failed" or line.get("right") is False:
            wrong.append(line)
            print(json.dumps(line), file=sys.stderr)

    amounts = SMALL if options.tiny or options.rehearse else Amounts()
    clock = Clock(device, amounts.flushed)
    session = Session(device, write, time.monotonic() + options.budget, clock, folder=options.folder, amounts=amounts)
    session.per_contest, session.peaks = options.seconds, known_peaks(options.out)
    if options.stage == "peaks":
        write(facts(device))
    jobs = [job for name in options.presets for job in STAGES[options.stage](name, amounts)]
    if options.rehearse:
        jobs = [replace(job, limit=options.budget) for job in jobs]
    outcomes = work(session, jobs)
    print(f"bench.gpu {options.stage} {' '.join(options.presets)}: {outcomes}; {len(wrong)} wrong or failed")
    return 1 if wrong or not outcomes["done"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
