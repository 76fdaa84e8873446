"""What `bench.gpu` does around its measurements, tried on the CPU: order, limits, lines, ratios, checks, report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from bench import cases, gpu, op_cases
from bench.counts import Count
from bench.gpu import Clock, Job, Peaks, Session, check_op, findings, take_turns, work
from bench.op_cases import OpCase
from bench.report import read, report
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
    class Millisecond(Clock):
        def __call__(self, run: Callable[[], object]) -> float:
            run()
            return 1e-3

    peaks = gpu.measure_peaks(Millisecond(CPU), 32, 1 << 16)
    assert peaks.fp32 == peaks.tf32 == peaks.bf16 == pytest.approx(2 * 32**3 / 1e-3 / 1e9)
    assert peaks.copy == pytest.approx(2 * (1 << 16) / 1e-3 / 1e9)
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


def test_a_check_survives_whatever_an_op_does() -> None:
    def breaks() -> Any:
        raise TypeError("planted\nmore")

    lines = list(gpu._ops_are_right(session([])[0], "p", [OpCase("p", "knn", breaks, Count(1, 1)), op_case(0)]))
    assert [line["right"] for line in lines] == [False, True]
    assert lines[0]["errors"] == {"error": "TypeError: planted"} == lines[0]["ieee"]["errors"]


def test_what_fails_is_repeated_with_plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAMOH_TRITON_PRECISION", "tf32")
    seen = []

    def check() -> tuple[bool, dict[str, Any]]:
        seen.append(gpu.os.environ["VAMOH_TRITON_PRECISION"])
        return seen[-1] == "ieee", {"result": 0.5}

    line = gpu.checked("era5", "x", check)
    assert seen == ["tf32", "ieee"] and gpu.os.environ["VAMOH_TRITON_PRECISION"] == "tf32"
    assert line["right"] is False and line["ieee"]["right"] is True
    assert "ieee" not in gpu.checked("era5", "x", lambda: (True, {}))


def test_stages_cover_everything() -> None:
    for preset in cases.NAMES:
        amounts = gpu.Amounts()
        names = [job.name for job in gpu.STAGES["time"](preset, amounts)]
        assert {f"step/{preset}/{samples}" for samples in (16, 4096)} < set(names)
        assert {f"trainer/{preset}/16", f"reconstruct/{preset}/one", f"profile/{preset}"} < set(names)
        assert (f"compiled/{preset}" in names) == (preset in gpu.COMPILED)
        ops_timed = [job.name for job in gpu.STAGES["ops"](preset, amounts)]
        assert ops_timed == [f"op/{case.label}" for case in op_cases.op_cases() if case.preset == preset]
    assert [job.name for job in gpu.STAGES["memory"]("celebahq", gpu.Amounts())][0] == "memory/64"


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["check", "--out", str(tmp_path / "gpu.jsonl")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seconds", "line", "status"),
    [
        (1, {"kind": "check", "preset": "p", "what": "x", "right": True, "errors": {}}, 0),
        (1, {"kind": "check", "preset": "p", "what": "x", "right": False, "errors": {}}, 1),
        (1, None, 1),  # the job fails
        (-1, {"kind": "x"}, 1),  # there was no time for any
    ],
)
def test_exit_status(seconds: float, line: Any, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: Session) -> Iterator[dict[str, Any]]:
        if line is None:
            raise ValueError("planted")
        yield line

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(gpu.STAGES, "check", lambda preset, amounts: [Job("j", run)])
    out = tmp_path / "gpu.jsonl"
    assert gpu.main(["check", "--out", str(out), "--budget", str(10 * seconds)]) == status
    kinds = [json.loads(text)["kind"] for text in out.read_text().splitlines()]
    assert kinds == {1: [(line or {"kind": "failed"})["kind"], "time"], -1: ["skipped"]}[int(seconds)]


def test_kernels_are_sorted_by_time() -> None:
    def event(name: str, device: DeviceType, taken: float) -> Any:
        return SimpleNamespace(
            key=name, count=2, device_type=device, self_device_time_total=taken, self_cpu_time_total=taken
        )

    on_gpu = [event("a", DeviceType.CUDA, 1.0), event("b", DeviceType.CUDA, 3.0), event("c", DeviceType.CPU, 9.0)]
    rows = gpu.kernel_rows(on_gpu, DeviceType.CUDA)
    assert [(row["kernel"], row["calls"], row["us"], row["share"]) for row in rows] == [
        ("b", 2, 3, 0.75),
        ("a", 2, 1, 0.25),
    ]
    assert [row["kernel"] for row in gpu.kernel_rows(on_gpu, DeviceType.CPU)] == ["c"]


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
