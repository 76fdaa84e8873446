"""The stages of `bench/on_gpu.sh`: each a process under a `timeout` of its own, so that one that hangs ends alone.

Needs the standard library alone: the first stage installs the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.predictions import FLOOR, GOAL, PREDICTIONS, Key  # noqa: E402
from bench.report import read_lines  # noqa: E402

PRESETS = ("celebahq", "era5", "shapes3d", "polymnist", "shapenet")
COMPILED = ("polymnist", "shapes3d")
BUDGET = {"first": 520.0, "second": 165.0, "third": 165.0}
"""Seconds that all stages of a call may take together."""
MISSING = "failed to run command|LibraryNotLoaded|ERR_NVGPUCTRPERM|[Nn]ot supported|Unable to"
GRACE = 5
SLOWER = 8
"""How many times longer a stage of a rehearsal may take: the machine may have other work, and time proves nothing."""
MOST_PRINTED = 11500
INSTALL = ("-m", "pip", "install", "--no-build-isolation", "--no-deps")
READY = """
import torch
from vamoh.kernels import gating, inr_mixture, planar_flow
from vamoh.ops import status
report = status()
print(report)
assert report.build, "the native module is missing"
assert not torch.cuda.is_available() or (report.triton and report.build["cuda"] != "not built"), "no GPU kernels"
"""


@dataclass(frozen=True)
class Stage:
    """A command and the seconds after which it is ended."""

    name: str
    command: Sequence[str]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)
    excused: str = ""
    """Pattern of output that excuses a failure: a tool that this machine does not have or allow."""


@dataclass
class Call:
    """One call of the script: where results and logs of running stages go, until when, whether it is a rehearsal.

    environment: of all stages.
    """

    out: Path
    logs: Path
    deadline: float
    rehearse: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def results(self) -> Path:
        """The lines of all processes."""
        return self.out / "results.jsonl"

    def write(self, line: dict[str, Any]) -> None:
        """Append a line of our own."""
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "at": round(time.time(), 2)}) + "\n")

    def run(self, stages: Sequence[Stage]) -> None:
        """Run stages side by side, each until its limit or the deadline of the call."""
        started = []
        for stage in stages:
            wanted = stage.limit * (SLOWER if self.rehearse else 1)
            limit = min(wanted, self.deadline - time.monotonic() - GRACE)
            if limit < 1:
                self.write({"kind": "stage", "name": stage.name, "rc": None, "why": "no time was left"})
                continue
            command = [word.replace("{limit}", f"{max(limit - 3, 1):.0f}") for word in stage.command]
            log = self.logs / f"{stage.name.replace('/', '.')}.log"
            with log.open("w", encoding="utf-8") as file:
                process = subprocess.Popen(
                    ["timeout", "-k", str(GRACE), f"{limit:.1f}", *command],
                    cwd=ROOT,
                    env={**os.environ, **self.environment, **stage.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            started.append((stage, process, log, time.monotonic()))
        while started:
            for entry in [e for e in started if e[1].poll() is not None]:
                started.remove(entry)
                stage, process, log, start = entry
                text = log.read_text(encoding="utf-8", errors="replace")
                log.unlink()
                line = {"kind": "stage", "name": stage.name, "rc": process.returncode}
                line |= {"seconds": round(time.monotonic() - start, 1), "limit": stage.limit}
                excuse = re.search(f".*({stage.excused}).*", text) if stage.excused else None
                if process.returncode:
                    line |= {"excused": excuse[0].strip()[:200]} if excuse else {"last": _last(text)}
                self.write(line)
                with (self.out / "log.txt").open("a", encoding="utf-8") as file:
                    file.write(f"{stage.name}: {shlex.join(stage.command)}\n{text[-20000:]}\n")
                print(f"{stage.name}: exit status {process.returncode}, {line['seconds']} s", flush=True)
            time.sleep(0.05)


def _last(text: str) -> str:
    """The last line that says something."""
    return next((line.strip()[:200] for line in reversed(text.splitlines()) if line.strip()), "")


def gpu(stage: str, *presets: str, limit: float, call: Call, name: str = "", more: Sequence[str] = ()) -> Stage:
    """A stage of `bench.gpu`."""
    command = [sys.executable, "-m", "bench.gpu", stage, "--presets", *presets, "--out", str(call.results)]
    command += ["--folder", str(call.out), "--budget", "{limit}", *more] + ["--rehearse"] * call.rehearse
    interpreted = {"TRITON_INTERPRET": "1"} if call.rehearse and stage == "sweep" else {}
    return Stage(name or f"{stage}/{'+'.join(presets)}", command, limit, interpreted)


def install(call: Call) -> list[list[Stage]]:
    """Build where this runs, and see that everything of it can be imported."""
    command = [sys.executable, *INSTALL, *(["--dry-run"] if call.rehearse else []), "-e", "."]
    native = {} if call.rehearse else {"VAMOH_NATIVE": "1", "VAMOH_CUDA": "1"}
    ready = [sys.executable, "-c", READY]
    return [[Stage("install", command, 150, native)], [Stage("ready", ready, 40)]]


def pytest(*arguments: str) -> list[str]:
    """A command that runs tests that need a GPU; in parallel where that can be done and is asked for by `-n`."""
    if find_spec("xdist") is None and "-n" in arguments:
        at = arguments.index("-n")
        arguments = arguments[:at] + arguments[at + 2 :]
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *arguments]


def stages(call: Call, which: str) -> list[list[Stage]]:
    """Stages of the first call, the second or the third; those of a list run side by side."""
    presets, compiled = (("polymnist", "shapenet"), ("polymnist",)) if call.rehearse else (PRESETS, COMPILED)
    peaks = [gpu("peaks", presets[0], limit=30, call=call, name="peaks")]
    if which == "first":
        return [
            *install(call),
            peaks,
            [
                *(gpu("check", preset, limit=110, call=call) for preset in presets),
                *(gpu("compile", preset, limit=110, call=call) for preset in compiled),
                gpu("precompile", presets[0], limit=110, call=call, name="precompile"),
            ],
            [Stage("tests", pytest("tests/test_gpu.py"), 70)],
            *([gpu("time", preset, limit=32, call=call)] for preset in presets),
            [gpu("sweep", presets[0], limit=90, call=call, name="sweep")],
            [gpu("tuned", presets[0], limit=20, call=call)],
            [counters(call, presets[0])],
        ]
    if which == "second":
        contract = ["tests/test_parity.py"] if call.rehearse else ["tests", "--ignore=tests/test_gpu.py"]
        sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
        checked = gpu("check", "polymnist", limit=120, call=call, more=["--tiny"])
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return [
            *install(call),
            [
                Stage("contract", pytest(*contract, "-k", "not sanitizer", "-n", "8"), 120),
                Stage("sanitize/cuda", pytest("tests/ops/test_cuda.py", "-k", "sanitizer", "-n", "4"), 120),
                Stage("sanitize/triton", [*sanitizer, *checked.command], 120, uncached, MISSING),
            ],
        ]
    kept = presets[:1] if call.rehearse else ("celebahq", "era5")
    return [
        *install(call),
        peaks,
        *([gpu("ops", preset, limit=45, call=call)] for preset in kept),
        [gpu("memory", presets[0], limit=45, call=call, name="memory")],
    ]


def counters(call: Call, preset: str) -> Stage:
    """Hardware counters of the five largest kernels, clocks as they are."""
    step = gpu("counters", preset, limit=45, call=call, name="counters")
    tool = ["ncu", "--clock-control", "none", "--set", "full", "--profile-from-start", "off", "--csv", "-c", "10"]
    tool += ["--kernel-name", "regex:{kernels}", "--log-file", str(call.out / "counters.csv")]
    return Stage(step.name, [*tool, *step.command], step.limit, excused=MISSING)


def largest(lines: Sequence[Mapping[str, Any]], count: int = 5) -> list[str]:
    """Names, without arguments and namespaces, of the kernels that took most of the profiled steps."""
    total: dict[str, float] = {}
    for line in lines:
        for row in line["rows"] if line["kind"] == "kernels" else []:
            name = re.split(r"[<(]", row["kernel"].removeprefix("void "))[0].split("::")[-1].strip()
            total[name] = total.get(name, 0.0) + row["us"]
    return sorted(total, key=lambda name: -total[name])[:count]


def problems(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What went wrong, in order: wrong results, failed jobs, stages that ended badly or never began."""
    found = []
    for line in lines:
        if line.get("right") is False:
            plain = line.get("ieee", {}).get("right")
            found.append(f"{line['preset']}, {line['what']}: {json.dumps(line['errors'])}; right under ieee: {plain}")
        elif line["kind"] == "failed":
            found.append(f"{line['job']}: {line['error']}")
        elif line["kind"] == "stage" and line["rc"] != 0 and "excused" not in line:
            killed = "ran out of time and had to be killed"
            ended = {None: "never began", 124: "ran out of time", 137: killed, -9: killed}
            said = ended.get(line["rc"], f"exit status {line['rc']}")
            found.append(f"stage {line['name']}: {said}; {line.get('last', line.get('why'))}")
    return found


def seconds(lines: Sequence[Mapping[str, Any]]) -> dict[Key, float]:
    """Every time by the key of its line and the contestant."""
    found: dict[Key, float] = {}
    for line in lines:
        if "seconds" in line and "key" in line:
            found[line["key"], ""] = line["seconds"]
        for name, of in line.get("contestants", {}).items():
            found[line["key"], name] = of["seconds"]
        if "host" in line:
            found[line["key"], "host"] = line["host"]
    return found


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """What matters, the verdict and the predictions first; no longer than MOST_PRINTED."""
    wrong, times = problems(lines), seconds(lines)
    of = next((line for line in lines if line["kind"] == "environment"), {})
    checks = [line for line in lines if line["kind"] == "check"]
    text = [f"{len(wrong)} problems" if wrong else "no problem", *(f"  {problem[:300]}" for problem in wrong[:12])]
    if of:
        text.append(f"{of['device_name']}, driver {of['driver']}, {of['versions']}, commit {of['commit'][:10]}")
    for peaks in (line for line in lines if line["kind"] == "peaks"):
        rates = ", ".join(f"{n} {peaks[n] / 1e3:.4g} TFLOP/s" for n in ("fp32", "tf32", "bf16"))
        text.append(f"ceilings: {rates}, copy {peaks['copy']:.4g} GB/s")
    text.append(f"checks: {sum(line['right'] for line in checks)} of {len(checks)} right")
    text += ["", "prediction | predicted | measured"]
    text += [f"{p.claim} | {p.expected()} | {p.found(times)}" for p in PREDICTIONS]

    def ms(key: str, name: str) -> str:
        value = times.get((key, name))
        return "-" if value is None else f"{value * 1e3:.3g}"

    text += ["", "ms | captured | enqueued | host | Trainer.step | baseline | compile | floor | goal"]
    for line in lines:
        if line["kind"] == "measurement" and line["key"].startswith(("step/", "reconstruct/", "tuned/")):
            key, preset = line["key"], line["preset"]
            other = key.split("/", 1)[1]
            cells = [ms(key, "graph"), ms(key, "ours"), ms(key, "host"), ms(f"trainer/{other}", "ours")]
            cells += [ms(key, "baseline"), ms(f"compile/{other}", "compile")]
            known = [f"{1e3 * of[preset]:.3g}" if key.startswith("step") else "-" for of in (FLOOR, GOAL)]
            text.append(" | ".join([key, *cells, *known]))
    for line in (line for line in lines if line["kind"] == "kernels"):
        floor = f", floor {line['floor_us']:.0f} us" if "floor_us" in line else ""
        text += ["", f"kernels of a step of {line['preset']}: {line['kernels']}, {line['us']:.0f} us{floor}"]
        for row in line["rows"][:6]:
            times_floor = f" | {row['us'] / line['floor_us']:.2g} floors" if line.get("floor_us") else ""
            text.append(f"{row['kernel'][:60]} | {row['calls']} | {row['us']} us | {row['share']:.0%}{times_floor}")
    plans: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        if line["kind"] == "plan" and "seconds" in line:
            plans.setdefault(line["key"].rsplit("/", 1)[0], []).append(line)
    text += ["", "plans (inputs-warps-stages-tile, rows-warps): the model's, then the fastest, with errors"]
    for key, tried in plans.items():
        best = sorted(tried, key=lambda line: line["seconds"])[:3]
        shown = (
            f"{p['key'].rsplit('/', 1)[1]} {p['seconds'] * 1e3:.3g} ms {p['error']:.1e}" for p in (tried[0], *best)
        )
        text.append(f"{key} ({len(tried)}): {', '.join(shown)}")
    for line in lines:
        if line["kind"] in ("convolution", "product"):
            text.append(f"{line['key']}: {line['seconds'] * 1e3:.3g} ms")
    text += [
        "",
        "stages, s: " + ", ".join(f"{s['name']} {s.get('seconds', '-')}" for s in lines if s["kind"] == "stage"),
    ]
    return "\n".join(text)[:MOST_PRINTED]


def main(arguments: Sequence[str]) -> int:
    """Run the stages of a call, print the table and, if anything went wrong, the first reason; exit status 1 then."""
    parser = argparse.ArgumentParser(prog="bench/on_gpu.sh")
    parser.add_argument("call", nargs="?", choices=BUDGET, default="first", help="first is under 9 minutes")
    parser.add_argument("--rehearse", action="store_true", help="all calls without a GPU, at small sizes")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="stages whose names begin so")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-results"))
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        parser.error(f"--out must name a new or empty folder, got {out}")
    work = ROOT / "build" / "on_gpu"
    with tempfile.TemporaryDirectory() as folder:
        if options.rehearse:
            work = Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        tools = _stand_ins(work) if options.rehearse else "/usr/local/cuda/bin"
        environment = {"PATH": os.pathsep.join([tools, *os.get_exec_path()]), "PYTHONUNBUFFERED": "1"}
        environment |= {"TRITON_CACHE_DIR": str(work / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
        environment["PIP_BREAK_SYSTEM_PACKAGES"] = "1"  # the machine is there for this alone
        seconds = SLOWER * sum(BUDGET.values()) if options.rehearse else BUDGET[options.call]
        call = Call(out, work, time.monotonic() + seconds, options.rehearse, environment)
        groups = stages(call, options.call)
        if options.rehearse:
            groups = [*stages(call, "first"), *stages(call, "second")[2:], *stages(call, "third")[3:]]
        for group in groups:
            names = "|".join(map(re.escape, largest(read_lines(call.results))))
            call.run([_named(s, names) for s in group if not options.only or s.name.startswith(tuple(options.only))])
    lines = read_lines(call.results)
    wrong = problems(lines) if any(line["kind"] == "stage" for line in lines) else ["no stage of that name"]
    text = table(lines)
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    if wrong:
        print(f"bench/on_gpu.sh: {wrong[0][:400]}", file=sys.stderr)
    return 1 if wrong else 0


def _stand_ins(folder: Path) -> str:
    """A folder of tools that only run the program they are given, and write the file that `--log-file` names."""
    script = """#!/bin/sh
while [ "$#" -gt 0 ]; do
  case "$1" in
    --log-file) echo '"ID","Kernel Name","Metric Name","Metric Value"' > "$2"; shift 2;;
    *python*) exec "$@";;
    *) shift;;
  esac
done
exit 9
"""
    folder = folder / "tools"
    folder.mkdir()
    for name in ("ncu", "compute-sanitizer"):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return str(folder)


def _named(stage: Stage, names: str) -> Stage:
    """With the names of kernels in its command, any if none are known."""
    command = [word.replace("{kernels}", f"^({names})$" if names else ".*") for word in stage.command]
    return replace(stage, command=command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
