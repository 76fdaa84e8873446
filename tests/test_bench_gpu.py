"""What `bench.gpu` does around its measurements, tried on the CPU: order, budget, lines, ratios, report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cases, gpu, op_cases
from bench.counts import Count
from bench.gpu import Clock, Job, Peaks, Session, check_op, findings, schedule, take_turns, work
from bench.op_cases import OpCase
from bench.report import GRAPH, HEADER, main, read, report
from bench.timing import SLOW
from vamoh import ops

CPU = torch.device("cpu")
PEAKS = Peaks(fp32=50e3, tf32=300e3, bf16=800e3, copy=4e3)


def session(lines: list[dict[str, Any]], left: float = 100.0, takes: float = 10.0) -> tuple[Session, list[float]]:
    """A session whose clock goes on by hand."""
    time = [0.0]
    return Session(CPU, lines.append, left, Clock(CPU), now=lambda: time[0]), time


def job(name: str, time: list[float], seconds: float, *lines: dict[str, Any], **limits: float) -> Job:
    def run(_: Session) -> Iterator[dict[str, Any]]:
        time[0] += seconds
        yield from lines
        if not lines:
            raise ValueError("planted\nsecond line")

    return Job(name, run, **limits)


def test_jobs_are_done_in_order_while_there_is_time() -> None:
    lines: list[dict[str, Any]] = []
    made, time = session(lines)
    jobs = [
        job("a", time, 30, {"kind": "x"}, {"kind": "y"}),
        job("b", time, 40),
        job("c", time, 10, {"kind": "z"}, need=31),
        job("d", time, 10, {"kind": "z"}, need=30),
        job("e", time, 95, {"kind": "z"}),
        job("f", time, 1, {"kind": "z"}),
    ]
    assert work(made, jobs) == {"done": 3, "failed": 1, "skipped": 2}
    told = [(line["kind"], line["job"]) for line in lines if line["kind"] != "time"]
    assert told == [
        ("x", "a"), ("y", "a"), ("failed", "b"), ("skipped", "c"), ("z", "d"), ("z", "e"), ("skipped", "f"),
    ]  # fmt: skip
    by_job = {line["job"]: line for line in lines if line["kind"] in ("failed", "skipped")}
    assert by_job["b"]["error"] == "ValueError: planted"
    assert (by_job["c"]["why"], by_job["f"]["why"]) == ("30 s were left", "0 s were left")
    assert [line["seconds"] for line in lines if line["kind"] == "time"] == [30, 40, 10, 95]


def test_a_job_that_hangs_is_given_up() -> None:
    lines: list[dict[str, Any]] = []
    made, _ = session(lines)

    def hang(_: Session) -> Iterator[dict[str, Any]]:
        yield {"kind": "x"}
        while True:
            pass

    assert work(made, [Job("hang", hang, limit=0.1)]) == {"done": 0, "failed": 1, "skipped": 0}
    assert [line["kind"] for line in lines] == ["x", "failed", "time"]
    assert lines[1]["error"].startswith("TooSlow: took more than")


def test_contestants_take_turns() -> None:
    calls: list[str] = []
    takes = {"ours": 1.0, "oracle": 4.0, "baseline": SLOW + 1}

    def clock(run: Callable[[], object]) -> float:
        return takes[str(run())]

    runs = {name: lambda name=name: calls.append(name) or name for name in takes}
    seconds = take_turns(clock, runs, budget=30)
    assert calls == ["ours", "ours", "oracle", "oracle", "baseline", "baseline"] + 6 * ["oracle", "ours"]
    assert seconds == {"ours": [1.0] * 6, "oracle": [4.0] * 6, "baseline": [SLOW + 1]}


def test_ratios_and_shares() -> None:
    seconds = {"ours": [2e-3, 4e-3, 4e-3], "baseline": [20e-3, 20e-3, 40e-3]}
    count = Count(operations=100_000_000_000, bytes=1_000_000_000)
    found = findings(seconds, count, PEAKS)
    assert found["contestants"]["baseline"] == {"seconds": 20e-3, "rounds": 3, "ratio": 10.0}
    assert found["rated"] == "ours"
    assert found["gflops"] == pytest.approx(25e3) and found["gbytes"] == pytest.approx(250)
    # plain float32 gives 50 TFLOP/s, three products of 300 TFLOP/s in TF32 100: that is the ceiling
    assert found["share_fma"] == pytest.approx(0.25) and found["share_copy"] == pytest.approx(0.0625)
    assert found["roofline"] == pytest.approx(max(100e9 / 100e12, 1e9 / 4e12) / 4e-3)
    graphed = findings({**seconds, "graph": [1e-3, 2e-3, 2e-3]}, count, PEAKS)
    assert graphed["rated"] == "graph" and graphed["roofline"] == pytest.approx(2 * found["roofline"])
    assert graphed["contestants"]["graph"]["ratio"] == 0.5
    assert set(findings(seconds, None, PEAKS)) == {"contestants"}
    assert "roofline" not in findings(seconds, count, None)


def test_peaks_are_measured() -> None:
    peaks = gpu.measure_peaks(Clock(CPU), 32, 1 << 16)
    assert min(peaks.fp32, peaks.tf32, peaks.bf16, peaks.copy) > 0
    assert torch.get_float32_matmul_precision() == "highest"


def op_case(error: float) -> OpCase:
    """A linear layer that is off by some factor, but where plain torch is asked for."""

    def build() -> Any:
        x, weight = torch.randn(1, 3, 4), torch.randn(1, 5, 4, requires_grad=True)

        def call() -> torch.Tensor:
            asked = gpu.os.environ.get("VAMOH_BACKEND") == "reference"
            return ops.linear(x, weight, None) * (1 if asked else 1 + error)

        return call, [weight]

    return OpCase("polymnist", "linear", build, Count(1, 1), Count(1, 1))


def test_wrong_results_are_noticed() -> None:
    assert max(check_op(op_case(0), CPU).values()) < 1e-6
    assert check_op(op_case(0.01), CPU) == pytest.approx({"result": 0.01, "gradient": 0.01}, rel=1e-3)
    assert check_op(op_case(float("nan")), CPU)["result"] == float("inf")
    index = OpCase("p", "knn", lambda: (lambda: torch.randint(9, (5,)), ()), Count(1, 1))
    assert check_op(index, CPU) == {"result": 1.0, "gradient": 0.0}
    lines = list(gpu._ops_are_right(session([])[0], "polymnist", [op_case(0), op_case(0.01)]))
    assert [line["right"] for line in lines] == [True, False]


def test_the_schedule_covers_everything() -> None:
    names = [job.name for job in schedule()]
    assert len(names) == len(set(names))
    assert names[:3] == ["check/polymnist/ops", "peaks", "check/polymnist/step"]
    for preset in cases.NAMES:
        assert {f"train/{preset}/{samples}" for samples in (16, 4096)} < set(names)
        assert {f"reconstruct/{preset}/{b}/{x}x" for b in ("one", "batch") for x in (1, 2)} < set(names)
        checked = names.index(f"check/{preset}/ops")
        assert all(checked < i for i, name in enumerate(names) if name.startswith(f"op/{preset}-"))
        assert names.index(f"check/{preset}/step") < names.index(f"train/{preset}/4096")
        assert f"compile/{preset}/16" in names
    assert {f"op/{case.label}" for case in op_cases.op_cases()} < set(names)
    assert {f"memory/{side}" for side in (64, 128, 256, 512, 1024)} < set(names)


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "gpu.jsonl")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks; polymnist on 8 x 9 points, shapenet on 120 of 6 x 6 x 6."""
    full = cases.config

    def config(name: str, **sizes: object) -> Any:
        small = {
            "encoder_centroids": (12, 8, 6), "encoder_neighbors": (5, 4, 4), "encoder_channels": (4, 4, 4),
            "frequencies": 6, "hypernet_widths": (4,), "kl_samples": 8,
        }  # fmt: skip
        if name == "shapenet":
            small |= {"pool_centroids": (10, 8), "pool_neighbors": (4, 4), "inr_widths": (4, 4)}
        elif name != "polymnist":
            return full(name, **sizes)
        of = full(name, **sizes)
        drawn = of.train.num_points and 120
        return replace(of, model=replace(of.model, **small), train=replace(of.train, num_points=drawn))

    for module in (cases, op_cases):
        monkeypatch.setattr(module, "config", config)
        for name, shape in (("polymnist", (8, 9)), ("shapenet", (6, 6, 6))):
            monkeypatch.setitem(module.SHAPE, name, shape)
            monkeypatch.setitem(module.BATCH, name, 2)


def test_a_whole_call(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.jsonl"
    given = ["--device", "cpu", "--presets", "polymnist", "--samples", "8", "--budget", "29", "--seconds", "0.01"]
    assert gpu.main([*given, "--out", str(out)]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds[0] == "environment" and kinds[-1] == "end"
    assert lines[0]["versions"]["torch"] == torch.__version__ and lines[0]["commit"]
    assert "failed" not in kinds, [line for line in lines if line["kind"] == "failed"]
    assert all(line["right"] for line in lines if line["kind"] == "check") and kinds.count("check") > 15
    steps = {line["what"]: line for line in lines if line["kind"] == "measurement" and line.get("batch")}
    assert set(steps) == {
        "train step, 8 flow samples", "train step, 8 flow samples, Adam", "reconstruct, 1x", "reconstruct, 2x",
        "Trainer.step, 8 flow samples, 8 in a row",
    }  # fmt: skip
    steps.pop("Trainer.step, 8 flow samples, 8 in a row")
    for line in steps.values():
        assert list(line["contestants"]) == ["ours", "oracle", "baseline"]
        assert line["contestants"]["ours"]["ratio"] == 1 and line["roofline"] > 0
    assert {line["job"] for line in lines if line["kind"] == "skipped"} == {
        "compile/polymnist/8", *(f"memory/{side}" for side in gpu.MEMORY_SIDES),
    }  # fmt: skip
    times = [line["at"] for line in lines]
    assert times == sorted(times)

    # cut short anywhere, even within a line, what was written can be reported
    whole = out.read_text()
    out.write_text(whole[: whole.index('"train step') + 300])
    assert "train step" in whole and read(out)["notes"]
    out.write_text(whole)
    main([str(out)])
    printed = capsys.readouterr().out
    table = [[c.strip() for c in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("|")]
    assert table[0] == [*HEADER, *GRAPH] and all(len(row) == len(table[0]) for row in table)
    assert len(table) == 2 + kinds.count("measurement")
    assert "Ceilings: fp32" in printed and f"Checks: {kinds.count('check')} of {kinds.count('check')} right." in printed


def test_points_drawn_anew(tiny: None, tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    given = ["--device", "cpu", "--presets", "shapenet", "--samples", "8", "--budget", "29", "--seconds", "0.01"]
    assert gpu.main([*given, "--out", str(out), "--only", "shapenet/8"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    measured = [line for line in lines if line["kind"] == "measurement"]
    what = [
        "train step, 8 flow samples",
        "Trainer.step, 8 flow samples, 8 in a row",
        "train step, 8 flow samples, Adam",
    ]
    assert [line["what"] for line in measured] == what
    for line in measured[::2]:
        assert list(line["contestants"]) == ["ours", "oracle", "baseline"], line["left_out"]


def test_report_of_a_gpu(tmp_path: Path) -> None:
    of = {"device_name": "a GPU", "driver": "1.2", "versions": {"torch": "2.13"}, "cpus": 4, "threads": 2}
    seconds = {"ours": [4e-3] * 5, "baseline": [40e-3] * 5, "graph": [2e-3] * 5}
    measured = {"preset": "era5", "what": "train step", "batch": 3, "errors": {}, "left_out": {"oracle": "too slow"}}
    lines = [
        {"kind": "environment", "commit": "0123456789abcdef", "dirty": False, "time": "2026-01-02T03", **of},
        {"kind": "peaks", "fp32": 5e4, "tf32": 3e5, "bf16": 8e5, "copy": 4e3, "flops": 1e5},
        {"kind": "check", "preset": "era5", "what": "knn", "right": False, "errors": {"result": 1.0}},
        {"kind": "measurement", **measured, **findings(seconds, Count(10**11, 10**9), PEAKS)},
        {"kind": "memory", "preset": "era5", "what": "memory, 64 x 64", "memory": {"ours": 12.0}, "failed": []},
        {"kind": "failed", "job": "op/x", "error": "ValueError: y"},
        {"kind": "skipped", "job": "a", "why": "1 s were left"},
        {"kind": "skipped", "job": "b", "why": "1 s were left"},
    ]
    path = tmp_path / "gpu.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "mea')
    printed = report([read(path)]).splitlines()
    assert printed[0].startswith("a GPU, driver 1.2, 4 CPUs; 2 threads; torch 2.13; commit 0123456789; 2026-01-02")
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in printed if line.startswith("| era5")]
    assert rows[0] == [
        "era5", "train step", "3", "4", "", "", "10.00", "50000", "50 %", "12 %", "", "0.50", "50 %",
    ]  # fmt: skip
    assert rows[1] == ["era5", "memory, 64 x 64", *8 * [""], "12, -, -", "", ""]
    for note in (
        'WRONG: era5, knn: {"result": 1.0}.',
        "Failed, op/x: ValueError: y.",
        "Not measured, 1 s were left: a, b.",
        "Left out, oracle: too slow (era5, train step).",
        "Checks: 0 of 1 right.",
    ):
        assert note in printed
