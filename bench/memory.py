"""Peak memory of a contestant in a process of its own.

python -m bench.memory PRESET CONTESTANT SAMPLES               forward and backward of a training step
python -m bench.memory PRESET CONTESTANT reconstruct BATCH SCALE

Prints the most memory above what model and data took before, in MB (2^20 bytes).
"""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def peak(*arguments: object, seconds: float = 300) -> float:
    """Run this file in a fresh process and return what it prints; RuntimeError with the reason if it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.memory", *map(str, arguments)]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"memory: took more than {seconds:.0f} s") from error
    if done.returncode:
        raise RuntimeError(f"memory: {(done.stderr.strip().splitlines() or [f'status {done.returncode}'])[-1]}")
    return float(done.stdout)


def _main(preset: str, contestant: str, work: str, *rest: str) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from bench.cases import Case, Reconstruct, train_step

    case = Case(preset)
    _ = case.baseline if contestant == "baseline" else None
    if work == "reconstruct":
        batch, scale = map(int, rest)
        run = Reconstruct(case, batch, scale).run(contestant)
    else:
        case.model.kl_samples = int(work)
        run = train_step(case, contestant)
    gc.collect()
    before = _start()
    run()
    run()
    print((_highest() - before) / 2**20)


def _start() -> int:
    """Resident bytes now; from here on the highest are counted, where the system allows."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return int(_status("VmRSS"))
    except OSError:
        return _highest()


def _highest() -> int:
    """Most resident bytes so far. getrusage would start a child at its parent's peak, so Linux is asked elsewhere."""
    try:
        return int(_status("VmHWM"))
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name + ":")))


if __name__ == "__main__":
    _main(*sys.argv[1:])
