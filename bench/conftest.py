"""Options and fixtures of the benchmarks."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

# Before torch is imported, as under the command `vamoh`: threads sleep, large tensors lie in huge pages.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from bench.cases import Case  # noqa: E402
from bench.counts import Count  # noqa: E402
from bench.roofline import Peak, Probe  # noqa: E402
from bench.timing import interleave, ratios  # noqa: E402
from vamoh.runlog import environment  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the benchmarks."""
    group = parser.getgroup("vamoh benchmarks")
    group.addoption("--budget", type=float, default=12.0, help="seconds of rounds per test (default 12)")
    group.addoption("--threads", type=int, default=None, help="CPU threads (default: torch's choice)")
    group.addoption(
        "--compile-limit", type=float, default=300.0, help="seconds a compilation may take; 0 leaves compile out"
    )
    group.addoption("--no-memory", action="store_true", help="do not measure peak memory")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Keep what explains a time; leave out the machine's name."""
    facts = environment()
    machine_info.pop("node", None)
    machine_info["torch"] = {
        "version": facts["versions"]["torch"],
        "threads": facts["threads"],
        "processor": facts["device_name"],
        "cpus": facts["cpus"],
        "wait_policy": os.environ["OMP_WAIT_POLICY"],
    }


@pytest.fixture(scope="session", autouse=True)
def threads(request: pytest.FixtureRequest) -> int:
    """Threads of torch and of the native kernels."""
    wanted = request.config.getoption("--threads")
    if wanted is not None:
        torch.set_num_threads(wanted)
    return torch.get_num_threads()


@pytest.fixture(scope="session")
def probe() -> Probe | None:
    """The roofline probe; None without a compiler, and then no shares."""
    try:
        return Probe()
    except RuntimeError:
        return None


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """A preset at full size; one at a time is kept."""
    yield Case(request.param)


@dataclass
class Contest:
    """Times contestants, the first of which is ours, and writes what it finds into the test's extra_info."""

    benchmark: Any
    probe: Probe | None
    budget: float
    compile_limit: float
    memory: bool
    left_out: dict[str, str] = field(default_factory=dict)

    def run(self, runs: dict[str, Callable[[], object]], count: Count | None = None, **info: object) -> None:
        """Time them. count: operations and bytes of one call of ours, for rates and shares of the peak."""
        peaks: list[Peak] = []
        probe = self.probe if count is not None else None
        seconds = interleave(
            self.benchmark, runs, self.budget, (lambda: peaks.append(probe.measure())) if probe else (lambda: None)
        )
        summary = ratios(seconds)
        extra = self.benchmark.extra_info
        extra.update(info, threads=torch.get_num_threads(), contestants=summary, left_out=self.left_out)
        if count is None:
            return
        own = seconds[next(iter(runs))]
        extra["operations"], extra["bytes"] = count
        extra["gflops"] = count.operations / statistics.median(own) / 1e9
        extra["gbytes"] = count.bytes / statistics.median(own) / 1e9
        if peaks:
            extra["peak_gflops"] = statistics.median(p.gflops for p in peaks)
            extra["peak_gbytes"] = statistics.median(p.gbytes for p in peaks)
            pairs = list(zip(own, peaks, strict=True))
            extra["share_fma"] = statistics.median(count.operations / t / p.gflops / 1e9 for t, p in pairs)
            extra["share_copy"] = statistics.median(count.bytes / t / p.gbytes / 1e9 for t, p in pairs)

    def slow(self, name: str, seconds: float) -> bool:
        """Whether a contestant took longer than this per call, once it was timed."""
        found = self.benchmark.extra_info.get("contestants", {}).get(name)
        return found is not None and found["seconds"] > seconds


@pytest.fixture
def contest(request: pytest.FixtureRequest, benchmark: Any, probe: Probe | None) -> Contest:
    """What a test times its contestants with."""
    option = request.config.getoption
    return Contest(benchmark, probe, option("--budget"), option("--compile-limit"), memory=not option("--no-memory"))
