"""`bench/on_gpu.sh`: stages end alone, nothing that was found is lost, the table is short, and all of it can run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import on_gpu
from bench.on_gpu import Call, Stage, largest, problems, seconds, stages, table
from bench.predictions import PREDICTIONS, Prediction
from bench.report import read_lines

ROOT = Path(__file__).parents[1]


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setattr(on_gpu, "GRACE", 1)
    for name in ("out", "logs"):
        (tmp_path / name).mkdir()
    return Call(tmp_path / "out", tmp_path / "logs", time.monotonic() + 60)


def test_a_stage_that_hangs_or_dies_ends_alone(call: Call) -> None:
    hang = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    call.run(
        [Stage("hangs", python(hang), 1.5), Stage("dies", python("import os; print(7, flush=True); os.abort()"), 20)]
    )
    call.run([Stage("fine", python("print(8)"), 20)])
    found = {line["name"]: line for line in read_lines(call.results)}
    assert found["fine"]["rc"] == 0 and found["hangs"]["rc"] in (137, -9) and found["dies"]["rc"] == -6
    assert found["dies"]["last"] == "7" and found["hangs"]["seconds"] < 20
    told = problems(read_lines(call.results))
    assert len(told) == 2 and any("hangs: ran out of time and had to be killed" in problem for problem in told)
    assert "8" in (call.out / "log.txt").read_text() and not list(call.logs.iterdir())


def test_nothing_begins_after_the_deadline(call: Call) -> None:
    call.deadline = time.monotonic() + 1.5
    call.run([Stage("late", python("print(8)"), 20)])
    assert problems(read_lines(call.results)) == ["stage late: never began; no time was left"]


def test_a_missing_tool_is_told_but_no_problem(call: Call) -> None:
    call.run([Stage("tool", ["no-such-tool"], 20, excused=on_gpu.MISSING), Stage("other", ["no-such-tool"], 20)])
    lines = read_lines(call.results)
    assert [line["name"] for line in lines if "excused" in line] == ["tool"]
    assert len(problems(lines)) == 1 and "stage other" in problems(lines)[0]


def test_results_so_far_survive_a_torn_line(call: Call) -> None:
    call.write({"kind": "stage", "name": "a", "rc": 0})
    with call.results.open("a") as file:
        file.write('{"kind": "meas')
    assert [line["name"] for line in read_lines(call.results)] == ["a"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"kind": "check", "preset": "era5", "what": "knn", "right": False, "errors": {"result": 1.0}}, "era5, knn"),
        ({"kind": "failed", "job": "step/x", "error": "ValueError: y"}, "step/x: ValueError: y"),
    ],
)
def test_the_first_reason_and_the_exit_status(
    line: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    code = f"import sys; open(sys.argv[1], 'a').write({json.dumps(line)!r} + chr(10))"
    out = tmp_path / "out"
    made = [[Stage("a", [*python(code), str(out / "results.jsonl")], 20)], [Stage("b", python("exit(3)"), 20)]]
    monkeypatch.setattr(on_gpu, "stages", lambda call, which: made)
    monkeypatch.setattr(on_gpu, "ROOT", tmp_path)
    assert on_gpu.main(["--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"bench/on_gpu.sh: {reason}")
    assert printed.out.rstrip().endswith((out / "table.txt").read_text().rstrip())
    assert on_gpu.main(["--out", str(tmp_path / "new"), "--only", "nothing"]) == 1
    with pytest.raises(SystemExit, match="2"):
        on_gpu.main(["--out", str(out)])
    assert "must name a new or empty folder" in capsys.readouterr().err


def test_calls_fit_into_their_time(call: Call) -> None:
    for which, budget in on_gpu.BUDGET.items():
        assert budget + on_gpu.SLOWER < (540 if which == "first" else 180)
        names = [stage.name for group in stages(call, which) for stage in group]
        assert len(names) == len(set(names)) and names[:2] == ["install", "ready"]
        if which == "first":
            assert {f"{s}/{p}" for s in ("check", "time") for p in on_gpu.PRESETS} < set(names)
            assert {"peaks", "tests", "precompile", "sweep", "counters"} < set(names)


def test_predictions_stand_beside_measurements() -> None:
    ratio = Prediction("a over b", ("a", ""), low=2.0, over=("b", "x"))
    assert (ratio.expected(), ratio.found({})) == ("at least 2x", "not measured")
    assert ratio.found({("a", ""): 3.0, ("b", "x"): 1.0}) == "3x, as predicted"
    assert ratio.found({("a", ""): 1.0, ("b", "x"): 1.0}) == "1x, NOT as predicted"
    time = Prediction("a", ("a", ""), 1e-3, 2e-3)
    assert (time.expected(), time.found({("a", ""): 5e-3})) == ("1 to 2 ms", "5 ms, NOT as predicted")
    lines = [
        {"kind": "plan", "key": "p", "seconds": 2.0},
        {"kind": "measurement", "key": "s", "contestants": {"ours": {"seconds": 1.0}}, "host": 0.5},
    ]
    assert seconds(lines) == {("p", ""): 2.0, ("s", "ours"): 1.0, ("s", "host"): 0.5}
    assert len({p.claim for p in PREDICTIONS}) == len(PREDICTIONS)


def test_the_largest_kernels_by_name() -> None:
    rows = [
        {"kernel": "void vamoh::grad_linear<float>(int)", "us": 5},
        {"kernel": "train", "us": 9},
        {"kernel": "train", "us": 1},
        {"kernel": "x", "us": 2},
    ]
    assert largest([{"kind": "kernels", "rows": rows}, {"kind": "x"}], 2) == ["train", "grad_linear"]


def test_the_table_is_short() -> None:
    lines = [{"kind": "failed", "job": "j" * 400, "error": "e" * 4000}] * 100
    assert len(table(lines)) <= on_gpu.MOST_PRINTED < 12000 and table(lines).startswith("100 problems")


@pytest.mark.slow
def test_a_rehearsal_runs_every_stage(tmp_path: Path) -> None:
    """Without a GPU, with interpreted kernels, tiny sizes and stand-ins for clocks: no stage has a typing error."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("VAMOH_", "TRITON_"))}
    out = tmp_path / "out"
    environment |= {"OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [ROOT / "bench" / "on_gpu.sh", "--rehearse"]
    result = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=3000)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(list(out.iterdir())) <= 8 and result.stdout.rstrip().endswith((out / "table.txt").read_text().rstrip())
    lines = read_lines(out / "results.jsonl")
    done = {line["name"]: line["rc"] for line in lines if line["kind"] == "stage"}
    everything = Call(out, tmp_path, 0, rehearse=True)
    assert done == {s.name: 0 for which in on_gpu.BUDGET for group in stages(everything, which) for s in group}
    kinds = {line["kind"] for line in lines}
    assert kinds >= {
        "environment",
        "peaks",
        "check",
        "measurement",
        "kernels",
        "plan",
        "convolution",
        "product",
        "table",
    }
    assert kinds >= {"precompiled", "compiled", "counters", "memory"} and not kinds & {"failed", "skipped"}
    assert all(line["right"] for line in lines if line["kind"] == "check")
    assert all("seconds" in line and line["error"] < 1e-5 for line in lines if line["kind"] == "plan")
    assert all(not line["left_out"] for line in lines if line["kind"] == "measurement")
    compiled = next(line for line in lines if line["kind"] == "precompiled")
    assert compiled["kernels"] == compiled["of"] > 0
    written = json.loads((out / "stand_in_gpu.json").read_text())
    assert written["capability"] == 90 and {"inr_mixture.expected", "planar_flow.expected"} == {
        entry["op"] for entry in written["plans"]
    }
    assert "no problem" in result.stdout and (out / "counters.csv").read_text().startswith('"ID"')
