"""Times contestants in turn, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

SLOW = 10.0
"""Seconds of a call above which its first run is its only one."""

SHORT = 0.02
"""Seconds of a call below which it runs once untimed before every timed run: others have emptied the caches."""

MOST_ROUNDS = 60


class TooSlow(RuntimeError):
    """Something took longer than its limit."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooSlow in the body after that many seconds (main thread, Unix)."""

    def stop(*_: object) -> None:
        raise TooSlow(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interleave(
    benchmark: Any, runs: Mapping[str, Callable[[], object]], budget: float, before: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of every call, by contestant; the first contestant is what pytest-benchmark itself times.

    Every contestant runs once to warm up. Then each round runs all others and the first one last. Rounds fill
    `budget` seconds, at least 5; a contestant that would take more than half of the budget in them joins fewer, at
    least 2, and one slower than SLOW is timed in its first run alone. `before` starts every round, untimed.
    """
    first, *others = runs
    warm = {name: _timed(run) for name, run in runs.items()}
    once = {name for name in others if warm[name] > SLOW}
    rounds, joined = plan({name: t for name, t in warm.items() if name not in once}, budget)
    seconds: dict[str, list[float]] = {name: [warm[name]] if name in once else [] for name in runs}

    def others_turn() -> None:
        before()
        turn = len(seconds[first])
        for name in others:
            if name not in once and turn < joined[name]:
                if warm[name] < SHORT:
                    runs[name]()
                seconds[name].append(_timed(runs[name]))
        if warm[first] < SHORT:
            runs[first]()
        seconds[first].append(0.0)

    benchmark.pedantic(runs[first], setup=others_turn, rounds=rounds, iterations=1, warmup_rounds=0)
    if benchmark.stats is not None:
        seconds[first] = list(benchmark.stats.stats.data)
    return seconds


def plan(warm: Mapping[str, float], budget: float) -> tuple[int, dict[str, int]]:
    """Rounds in all, and in how many of them each contestant joins, from the seconds of one call."""
    total = sum(warm.values())
    affordable = int(budget / total)
    if affordable >= 5:
        rounds = min(affordable, MOST_ROUNDS)
        return rounds, dict.fromkeys(warm, rounds)
    return 5, {name: 5 if 5 * t < budget / 2 else max(2, affordable) for name, t in warm.items()}


def ratios(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Per contestant: median seconds, rounds, and the median ratio to the first contestant in the same round.

    A contestant timed once is compared with the median of the first.
    """
    first = next(iter(seconds.values()))
    summary = {}
    for name, times in seconds.items():
        paired = [t / own for t, own in zip(times, first, strict=False)]
        ratio = times[0] / statistics.median(first) if len(times) == 1 else statistics.median(paired)
        summary[name] = {"seconds": statistics.median(times), "rounds": len(times), "ratio": ratio}
    return summary


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
