"""One Markdown table from the JSON of pytest-benchmark, or from the JSON lines of `bench.gpu`.

python -m bench.report results.json ... > table.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HEADER = (
    "preset",
    "what",
    "batch",
    "ours, ms",
    "oracle",
    "compile",
    "baseline",
    "GFLOP/s",
    "of FMA peak",
    "of copy peak",
    "MB: ours, oracle, baseline",
)
OTHERS = ("oracle", "compile", "baseline")
GRAPH = ("graph", "roofline")
"""Columns of results from a GPU alone."""


def report(results: Iterable[dict[str, Any]]) -> str:
    """Facts of the machine and one table, from the contents of JSON files; later files replace rows of earlier ones."""
    facts: list[str] = []
    rows: dict[tuple[Any, ...], tuple[str, ...]] = {}
    missing: dict[tuple[Any, ...], dict[str, str]] = {}
    notes: list[str] = []
    results = list(results)
    wide = any(
        "roofline" in b["extra_info"] or "graph" in b["extra_info"].get("contestants", {})
        for result in results
        for b in result["benchmarks"]
    )
    header = HEADER + GRAPH if wide else HEADER
    for result in results:
        notes += result.get("notes", [])
        fact = _facts(result)
        if fact not in facts:
            facts.append(fact)
        for benchmark in result["benchmarks"]:
            extra = benchmark["extra_info"]
            if "contestants" in extra or "memory" in extra:
                key = (extra["preset"], extra["what"], extra.get("batch"))
                rows[key] = _row(extra) + (_graph(extra) if wide else ())
                missing[key] = extra.get("left_out", {})
    lines = [*(f"{fact}  " for fact in facts), "", _line(header), _line(["---"] * len(header))]
    lines += map(_line, rows.values())
    lines += [
        "",
        "Oracle, compile and baseline: median of the ratios to ours, round by round; above 1 ours is faster.",
        "n: rounds, if under 5.",
    ]
    if wide:
        lines.append(
            "Graph: time of ours replayed as a CUDA graph over that of ours. Roofline: least time over time taken."
        )
    left_out: dict[str, list[str]] = {}
    for (preset, what, _), reasons in missing.items():
        for name, reason in reasons.items():
            left_out.setdefault(f"{name}: {reason}", []).append(f"{preset}, {what}")
    lines += [f"Left out, {what} ({'; '.join(where)})." for what, where in left_out.items()]
    lines += notes
    return "\n".join(lines) + "\n"


def _facts(result: dict[str, Any]) -> str:
    machine, commit = result["machine_info"]["torch"], result["commit_info"]
    dirty = ", with uncommitted changes" if commit.get("dirty") else ""
    return (
        f"{machine['processor']}, {machine['cpus']} CPUs; {machine['threads']} threads; torch {machine['version']}; "
        f"commit {commit['id'][:10]}{dirty}; {result['datetime'][:10]}"
    )


def _row(extra: dict[str, Any]) -> tuple[str, ...]:
    contestants = extra.get("contestants", {})
    own = next(iter(contestants), None)
    what = extra["what"]
    if "exponent" in extra:
        times = ", ".join(f"{name}: {of['seconds'] * 1e3:.4g}" for name, of in reversed(contestants.items()))
        what += f": exponent {extra['exponent']:.2f} ({times} ms)"
    memory = extra.get("memory", {})
    return (
        extra["preset"],
        what,
        str(extra.get("batch", "")),
        "" if own is None else f"{contestants[own]['seconds'] * 1e3:.4g}",
        *(_ratio(contestants.get(name)) for name in OTHERS),
        _number(extra.get("gflops")),
        _percent(extra.get("share_fma")),
        _percent(extra.get("share_copy")),
        ", ".join(_number(memory.get(name)) or "-" for name in ("ours", "oracle", "baseline")) if memory else "",
    )


def _graph(extra: dict[str, Any]) -> tuple[str, ...]:
    return _ratio(extra.get("contestants", {}).get("graph")), _percent(extra.get("roofline"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON; [] where there is no file. What a killed process tore is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def read(path: Path) -> dict[str, Any]:
    """A file as `report` takes it; JSON lines, torn at the end or not, are brought into that form."""
    if path.suffix != ".jsonl":
        return dict(json.loads(path.read_text(encoding="utf-8")))
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in read_lines(path):
        lines.setdefault(line["kind"], []).append(line)
    of = lines["environment"][0]
    driver = f", driver {of['driver']}" if of.get("driver") else ""
    machine = {"processor": of["device_name"] + driver, "version": of["versions"]["torch"]}
    notes = []
    if "peaks" in lines:
        peaks = lines["peaks"][-1]
        rates = ", ".join(f"{name} {peaks[name] / 1e3:.4g} TFLOP/s" for name in ("fp32", "tf32", "bf16"))
        notes.append(f"Ceilings: {rates}, copy {peaks['copy']:.4g} GB/s; FMA peak: {peaks['flops'] / 1e3:.4g} TFLOP/s.")
    checks = lines.get("check", [])
    notes.append(f"Checks: {sum(c['right'] for c in checks)} of {len(checks)} right.")
    notes += [f"WRONG: {c['preset']}, {c['what']}: {json.dumps(c['errors'])}." for c in checks if not c["right"]]
    notes += [f"Failed, {f['job']}: {f['error']}." for f in lines.get("failed", [])]
    skipped: dict[str, list[str]] = {}
    for line in lines.get("skipped", []):
        skipped.setdefault(line["why"], []).append(line["job"])
    notes += [f"Not measured, {why}: {', '.join(jobs)}." for why, jobs in skipped.items()]
    measured = [*lines.get("measurement", []), *lines.get("memory", [])]
    return {
        "machine_info": {"torch": {**machine, "cpus": of["cpus"], "threads": of["threads"]}},
        "commit_info": {"id": of["commit"], "dirty": of["dirty"]},
        "datetime": of["time"],
        "benchmarks": [{"extra_info": m} for m in measured],
        "notes": notes,
    }


def _ratio(of: dict[str, float] | None) -> str:
    return "" if of is None else f"{of['ratio']:.2f}" + (f" (n={of['rounds']:.0f})" if of["rounds"] < 5 else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.1f} %"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(paths: Sequence[str]) -> int:
    """Print the report of files, or how to call this."""
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    print(report(map(read, map(Path, paths))), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
