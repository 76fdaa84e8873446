"""One Markdown table from the JSON of pytest-benchmark.

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


def report(results: Iterable[dict[str, Any]]) -> str:
    """Facts of the machine and one table, from the contents of JSON files; later files replace rows of earlier ones."""
    facts: list[str] = []
    rows: dict[tuple[Any, ...], tuple[str, ...]] = {}
    left_out: dict[str, list[str]] = {}
    for result in results:
        fact = _facts(result)
        if fact not in facts:
            facts.append(fact)
        for benchmark in result["benchmarks"]:
            extra = benchmark["extra_info"]
            if "contestants" in extra:
                key = (extra["preset"], extra["what"], extra.get("batch"))
                rows[key] = _row(extra)
                for name, reason in extra["left_out"].items():
                    left_out.setdefault(f"{name}: {reason}", []).append(f"{key[0]}, {key[1]}")
    lines = [*(f"{fact}  " for fact in facts), "", _line(HEADER), _line(["---"] * len(HEADER))]
    lines += map(_line, rows.values())
    lines += [
        "",
        "Oracle, compile and baseline: median of the ratios to ours, round by round; above 1 ours is faster.",
        "n: rounds, if under 5.",
    ]
    lines += [f"Left out, {what} ({'; '.join(where)})." for what, where in left_out.items()]
    return "\n".join(lines) + "\n"


def _facts(result: dict[str, Any]) -> str:
    machine, commit = result["machine_info"]["torch"], result["commit_info"]
    dirty = ", with uncommitted changes" if commit.get("dirty") else ""
    return (
        f"{machine['processor']}, {machine['cpus']} CPUs; {machine['threads']} threads; torch {machine['version']}; "
        f"commit {commit['id'][:10]}{dirty}; {result['datetime'][:10]}"
    )


def _row(extra: dict[str, Any]) -> tuple[str, ...]:
    contestants = extra["contestants"]
    own = next(iter(contestants))
    what = extra["what"]
    if "exponent" in extra:
        times = ", ".join(f"{name}: {of['seconds'] * 1e3:.4g}" for name, of in reversed(contestants.items()))
        what += f": exponent {extra['exponent']:.2f} ({times} ms)"
    memory = extra.get("memory", {})
    return (
        extra["preset"],
        what,
        str(extra.get("batch", "")),
        f"{contestants[own]['seconds'] * 1e3:.4g}",
        *(_ratio(contestants.get(name)) for name in OTHERS),
        _number(extra.get("gflops")),
        _percent(extra.get("share_fma")),
        _percent(extra.get("share_copy")),
        ", ".join(_number(memory.get(name)) or "-" for name in ("ours", "oracle", "baseline")) if memory else "",
    )


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
    print(report(json.loads(Path(path).read_text(encoding="utf-8")) for path in paths), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
