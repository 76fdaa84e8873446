"""Everything worth knowing of one GPU, in one call of less than ten minutes.

python -m bench.gpu --out gpu.jsonl
python -m bench.report gpu.jsonl > gpu.md

First whether the results are right, then the machine's ceilings, then training steps, reconstructions, ops, memory and
compiled contestants, the most telling first. Every finding is a line of JSON, written at once: what is there stays when
the call is cut short. What does not fit into the budget is a line that says so.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import counts
from bench.cases import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    NAMES,
    Case,
    Disagreement,
    Draw,
    Reconstruct,
    adam,
    clear_gradients,
    reference_backend,
    train_step,
)
from bench.counts import Count
from bench.op_cases import NOTHING, OpCase, op_cases
from bench.timing import SLOW, TooSlow, plan, ratios, time_limit
from vamoh.data import Dataset
from vamoh.data.dataset import SPLITS
from vamoh.ops import status
from vamoh.runlog import environment
from vamoh.train import Trainer

ROOT = Path(__file__).resolve().parents[1]
MEMORY_SIDES = (64, 128, 256, 512, 1024)
SAMPLES = (4096, 16)
FLUSHED = 1 << 28
"""Bytes written before every call that is timed, more than a GPU's cache holds; they also give the host a lead."""


@dataclass
class Clock:
    """Times calls on a device: by events on a GPU, by the host's clock on the CPU."""

    device: torch.device
    _flushed: Tensor | None = None

    def __call__(self, run: Callable[[], object]) -> float:
        """Seconds of one call, nothing of its inputs in the GPU's cache."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        if self._flushed is None:
            self._flushed = torch.empty(FLUSHED // 4, device=self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


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
    """One call: where lines go, how much time is left, and what was measured that later jobs need."""

    device: torch.device
    write: Callable[[dict[str, Any]], None]
    deadline: float
    clock: Clock
    now: Callable[[], float] = time.monotonic
    compile_limit: float = 120.0
    per_contest: float = 3.0
    peaks: Peaks | None = None
    cases: dict[str, Case] = field(default_factory=dict)

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
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def graph(self, run: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> Callable[[], None]:
        """`run` as a captured CUDA graph; RuntimeError where there is none. prepare: before the capture."""
        if self.device.type != "cuda":
            raise RuntimeError("CUDA graphs need a CUDA device")
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
        return captured.replay


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
            message = (str(error).strip().splitlines() or [""])[0]
            session.write({"kind": "failed", "job": job.name, "error": f"{type(error).__name__}: {message}"})
            outcomes["failed"] += 1
        session.write({"kind": "time", "job": job.name, "seconds": round(session.now() - start, 2)})
    return outcomes


def facts(device: torch.device) -> dict[str, Any]:
    """The machine, its software and this checkout."""
    found: dict[str, Any] = {"kind": "environment", "time": datetime.now(timezone.utc).isoformat()}
    found |= environment(device) | {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}
    found |= {"backends": [asdict(row) for row in status().rows], "native": status().build, "triton": status().triton}
    if device.type == "cuda":
        of = torch.cuda.get_device_properties(device)
        found |= {"cuda": torch.version.cuda, "capability": [of.major, of.minor]}
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


def _ops_are_right(session: Session, preset: str, cases: Sequence[OpCase]) -> Iterator[dict[str, Any]]:
    for case in cases:
        try:
            errors: dict[str, Any] = check_op(case, session.device)
            right = errors["result"] < LOSS_TOLERANCE and errors["gradient"] < GRADIENT_TOLERANCE
        except TooSlow:
            raise
        except RuntimeError as error:
            errors, right = {"error": str(error).splitlines()[0]}, False
        yield {"kind": "check", "preset": preset, "what": case.op, "right": right, "errors": errors}


def _steps_are_right(session: Session, name: str) -> Iterator[dict[str, Any]]:
    case = session.case(name)
    case.model.kl_samples = 16
    for contestant in ("oracle", "baseline"):
        try:
            errors: dict[str, Any] = asdict(case.check(contestant))
            yield {"kind": "check", "preset": name, "what": f"step of {contestant}", "right": True, "errors": errors}
        except Disagreement as error:
            errors = {"error": str(error)}
            yield {"kind": "check", "preset": name, "what": f"step of {contestant}", "right": False, "errors": errors}


def _peaks(session: Session) -> Iterator[dict[str, Any]]:
    on_gpu = session.device.type == "cuda"
    session.peaks = measure_peaks(session.clock, 8192 if on_gpu else 256, 1 << (31 if on_gpu else 22))
    yield {"kind": "peaks", **asdict(session.peaks), "flops": session.peaks.flops}


def _train(session: Session, name: str, samples: int, optimizer: bool) -> Iterator[dict[str, Any]]:
    case = session.case(name)
    case.model.kl_samples = samples
    left_out, errors = {"compile": "see the jobs named compile"}, {}
    names = ["ours"]
    for other in ("oracle", "baseline"):
        try:
            errors[other] = asdict(case.check(other))
            names.append(other)
        except TooSlow:
            raise
        except (Disagreement, RuntimeError) as error:
            left_out[other] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    runs = {n: train_step(case, n, adam(case, n) if optimizer else None) for n in names}
    if not optimizer and case.drawn is None:
        try:
            draw = case.draw()
            step = lambda: case.model.elbo(case.points, noise=draw.noise).loss.backward()  # noqa: E731
            runs["graph"] = session.graph(step, lambda: clear_gradients(case.model))
        except TooSlow:
            raise
        except RuntimeError as error:
            left_out["graph"] = str(error).splitlines()[0]
    count = counts.train_step(case.sizes, mirrored=case.mirrored)
    seconds = take_turns(session.clock, runs, session.per_contest)
    clear_gradients(case.model)
    clear_gradients(case.baseline)
    what = f"train step, {samples} flow samples" + (", Adam" if optimizer else "")
    yield _measured(name, what, case.batch, findings(seconds, count, session.peaks), errors, left_out)


IN_A_ROW = 8


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

    def steps() -> None:
        for _ in range(IN_A_ROW):
            trainer.step()

    seconds = take_turns(session.clock, {"ours": steps}, session.per_contest)
    trainer.check()
    each = {n: [t / IN_A_ROW for t in times] for n, times in seconds.items()}
    found = findings(each, counts.train_step(case.sizes, mirrored=case.mirrored), session.peaks)
    yield _measured(name, f"Trainer.step, {samples} flow samples, {IN_A_ROW} in a row", case.batch, found, {}, {})


def _reconstruct(session: Session, name: str, single: bool, scale: int) -> Iterator[dict[str, Any]]:
    case = session.case(name)
    made = Reconstruct(case, 1 if single else case.batch, scale)
    one = Reconstruct(case, 1, scale)
    names, errors, left_out = ["ours"], {}, {"compile": "see the jobs named compile"}
    for other in ("oracle", "baseline"):
        try:
            errors[other] = {"mean": one.check(other)}
            names.append(other)
        except TooSlow:
            raise
        except (Disagreement, RuntimeError) as error:
            left_out[other] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    count = counts.reconstruct(made.sizes, len(made.out), mirrored=made.mirrored)
    seconds = take_turns(session.clock, {n: made.run(n) for n in names}, session.per_contest / 2)
    found = findings(seconds, count, session.peaks)
    yield _measured(name, f"reconstruct, {scale}x", len(made.values), found, errors, left_out)


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
        left_out = {}
        if not case.op.startswith(("farthest_point_sample", "knn")):
            runs["oracle"] = reference_backend()(run)
        try:
            runs["graph"] = session.graph(run)
        except TooSlow:
            raise
        except RuntimeError as error:
            left_out["graph"] = str(error).splitlines()[0]
        seconds = take_turns(session.clock, runs, session.per_contest / 10)
        found = findings(seconds, count, session.peaks)
        yield _measured(case.preset, f"{case.op}, {direction}", None, found, {}, left_out)


def _compiled(session: Session, name: str, samples: int) -> Iterator[dict[str, Any]]:
    case = session.case(name)
    case.model.kl_samples = samples
    case.compile(min(session.compile_limit, session.left), mode="max-autotune")
    errors = {"compile": asdict(case.check("compile"))}
    runs = {n: train_step(case, n) for n in ("ours", "compile")}
    count = counts.train_step(case.sizes, mirrored=case.mirrored)
    found = findings(take_turns(session.clock, runs, session.per_contest), count, session.peaks)
    yield _measured(name, f"train step, {samples} flow samples, compiled", case.batch, found, errors, {})


def _memory(session: Session, side: int) -> Iterator[dict[str, Any]]:
    """Peak of one training step of celebahq on a grid of side² points above what model and data take."""
    if session.device.type != "cuda":
        yield {"kind": "skipped", "why": "memory is counted on a CUDA device only; see bench.memory for the CPU"}
        return
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
    preset: str, what: str, batch: int | None, found: dict[str, Any], errors: object, left_out: dict[str, str]
) -> dict[str, Any]:
    line = {"kind": "measurement", "preset": preset, "what": what, **found, "errors": errors, "left_out": left_out}
    return line if batch is None else {**line, "batch": batch}


def schedule(names: Sequence[str] = NAMES, samples: Sequence[int] = SAMPLES) -> list[Job]:
    """All jobs, the most telling first."""
    ops: dict[str, list[OpCase]] = {name: [] for name in names}
    for case in op_cases():
        if case.preset in ops:
            ops[case.preset].append(case)
    jobs = [Job(f"check/{n}/ops", lambda s, n=n: _ops_are_right(s, n, ops[n]), limit=60) for n in names[:1]]
    jobs += [Job("peaks", _peaks)]
    for n in names:
        jobs.append(Job(f"check/{n}/step", lambda s, n=n: _steps_are_right(s, n), limit=60))
        jobs += [Job(f"train/{n}/{m}", lambda s, n=n, m=m: _train(s, n, m, False), need=5) for m in samples]
        jobs += [Job(f"trainer/{n}/{m}", lambda s, n=n, m=m: _trainer(s, n, m), need=5) for m in samples]
        jobs += [Job(f"train/{n}/{m}/adam", lambda s, n=n, m=m: _train(s, n, m, True), need=5) for m in samples[-1:]]
    for n in names:
        jobs += [
            Job(
                f"reconstruct/{n}/{'one' if one else 'batch'}/{x}x", lambda s, n=n, o=one, x=x: _reconstruct(s, n, o, x)
            )
            for one in (True, False)
            for x in (1, 2)
        ]
    jobs += [Job(f"memory/{side}", lambda s, side=side: _memory(s, side), need=5) for side in MEMORY_SIDES]
    for n in names:
        if n != names[0]:
            jobs.append(Job(f"check/{n}/ops", lambda s, n=n: _ops_are_right(s, n, ops[n]), limit=60))
        jobs += [Job(f"op/{case.label}", lambda s, case=case: _op(s, case), limit=20) for case in ops[n]]
    jobs += [
        Job(f"compile/{n}/{m}", lambda s, n=n, m=m: _compiled(s, n, m), need=30, limit=200)
        for m in samples[-1:]
        for n in names
    ]
    return jobs


def main(arguments: Sequence[str]) -> int:
    """Run from the command line; exit status 1 if a check failed, 2 without the device."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="JSON lines are written here")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in all (default 540)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the schedule")
    parser.add_argument("--presets", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--samples", nargs="+", type=int, default=list(SAMPLES), help="samples of the flow")
    parser.add_argument("--compile-limit", type=float, default=120.0, help="seconds a compilation may take")
    parser.add_argument("--seconds", type=float, default=3.0, help="of rounds per contest (default 3)")
    parser.add_argument("--only", default="", help="only jobs whose name has this in it")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"bench.gpu: needs a CUDA device, torch {torch.__version__} finds none (--device cpu)", file=sys.stderr)
        return 2
    start, wrong = time.monotonic(), []
    with options.out.open("w", encoding="utf-8") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps({**line, "at": round(time.monotonic() - start, 2)}) + "\n")
            file.flush()
            os.fsync(file.fileno())
            if line["kind"] == "failed" or line.get("right") is False:
                wrong.append(line)
                print(json.dumps(line), file=sys.stderr)

        write(facts(device))
        limits = {"compile_limit": options.compile_limit, "per_contest": options.seconds}
        session = Session(device, write, start + options.budget, Clock(device), **limits)
        jobs = [job for job in schedule(options.presets, options.samples) if options.only in job.name]
        outcomes = work(session, jobs)
        write({"kind": "end", **outcomes})
    print(f"bench.gpu: {outcomes}; {len(wrong)} wrong or failed; in {options.out}")
    return 1 if any(line.get("right") is False for line in wrong) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
