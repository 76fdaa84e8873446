"""Kills, full disks, long runs: nothing is lost, nothing leaks, every error says what is wrong.

What needs a process of its own runs in `python tests/test_hard_use.py JOB FOLDER`, which forks: torch is loaded once.
More kills than here: `... kill FOLDER KILLS PROCESSES SHARD`.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tyro", reason="the command line needs tyro")

from vamoh import checkpoint
from vamoh._progress import Progress
from vamoh.cli import main
from vamoh.config import Config, DataConfig, ModelConfig, TrainConfig, load_config
from vamoh.runlog import read_log
from vamoh.train import Trainer, train

KILLS = 100
STEPS = 30


def config_of(folder: Path, **values: Any) -> Config:
    return Config(
        data=DataConfig("arrays", path=str(folder / "data.npy")),
        model=ModelConfig(
            latent_dim=3,
            components=2,
            frequencies=4,
            encoder_centroids=(8, 4),
            encoder_neighbors=(4, 3),
            encoder_channels=(4, 4),
            weight_net=(4,),
            flow_layers=2,
            hypernet_widths=(6,),
            inr_widths=(5,),
            gating_widths=(4,),
            kl_samples=2,
        ),
        train=TrainConfig(
            **{
                "steps": STEPS,
                "batch_size": 4,
                "lr": 5e-3,
                "point_dropout": 0.5,
                "flow_warmup": 1,
                "gating_warmup": 0.5,
                "checkpoint_every": 3,
                "log_every": 2,
                "evaluate_every": 7,
                "evaluate_count": 3,
                "threads": 1,
                **values,
            }
        ),
        seed=1,
    )


def write_data(folder: Path, count: int = 20) -> None:
    values = np.random.default_rng(0).integers(0, 256, (count, 4, 5), dtype=np.uint8)
    values[0, 0, 0] = 255
    np.save(folder / "data.npy", values)


def content(run: Path) -> tuple[Any, ...]:
    """Everything a run has to show but times, as bytes."""
    state = checkpoint.load_training_state(run)
    tensors = checkpoint.load(run).state_dict()
    optimizer = state["optimizer"]["state"]
    return (
        state["step"],
        {name: value.numpy().tobytes() for name, value in tensors.items()},
        {i: {name: value.numpy().tobytes() for name, value in entry.items()} for i, entry in optimizer.items()},
        state["points"].numpy().tobytes(),
        state["noise"].numpy().tobytes(),
        [
            {k: v for k, v in e.items() if k not in ("seconds", "datum_per_second")}
            for e in read_log(run / "metrics.jsonl")
        ],
    )


def begin_or_go_on(folder: Path, name: str, **values: Any) -> None:
    """What a script does that is started again and again until it ends."""
    run, config = folder / name, config_of(folder, **values)
    train(config, run, resume=(run / "config.yaml").exists(), progress=False)


def fork(job: Callable[[], None]) -> int:
    """Run it in a child, whose status is 0 only if it returns; return the child's number."""
    pid = os.fork()
    if pid == 0:
        try:
            job()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return pid


# Jobs of the process that forks


def step_of(run: Path) -> int:
    return int(checkpoint.load_training_state(run)["step"]) if checkpoint.has_checkpoint(run) else -1


def start(folder: Path, name: str, processes: int, **values: Any) -> list[int]:
    """Start or go on, in one process or in several that train together, as `torchrun` starts them."""
    if processes == 1:
        return [fork(lambda: begin_or_go_on(folder, name, **values))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def job(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({key: str(value) for key, value in {**place, "MASTER_PORT": port}.items()})
        begin_or_go_on(folder, name, **values)

    return [fork(lambda rank=rank: job(rank)) for rank in range(processes)]


def wait(pids: list[int], seconds: float) -> list[int]:
    """Exit statuses, negative where a signal ended it; what goes on gets SIGTERM and, seconds later, SIGKILL."""
    found: dict[int, int] = {}
    for number in (signal.SIGTERM, signal.SIGKILL, None):
        until = time.monotonic() + seconds
        while len(found) < len(pids) and time.monotonic() < until:
            for pid in pids:
                if pid not in found and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    found[pid] = os.waitstatus_to_exitcode(ended[1])
            time.sleep(0.005)
        for pid in pids:
            if pid not in found and number is not None:
                os.kill(pid, number)
    return [found[pid] for pid in pids]


def kill(folder: Path, wanted_kills: int = KILLS, processes: int = 1, shard: int = 0) -> dict[str, Any]:
    """Kill runs at random moments and go on, run after run, until there were enough kills.

    Of several processes one is killed, or all; one that is left must find out and end.
    """

    def whole_run(name: str) -> None:
        statuses = wait(start(folder, name, processes, shard=shard == 1), 120)
        if statuses != [0] * processes:
            raise RuntimeError(f"a run that nobody killed ended with {statuses}")

    whole_run("whole")
    started = time.monotonic()
    whole_run("timed")
    length = time.monotonic() - started
    wanted, generator = content(folder / "whole"), random.Random()
    kills, runs, steps = 0, 0, []
    while kills < wanted_kills:
        name, in_vain = f"run{runs}", 0
        while True:
            pids = start(folder, name, processes, shard=shard == 1)
            # On a machine that has become slower the next checkpoint takes longer than before.
            time.sleep(generator.uniform(0, (0.5 if processes == 1 else 1) * length * (1 + in_vain / 4)))
            victims = generator.choice([[pid] for pid in pids] + [pids] * (processes > 1))
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            statuses = wait(pids, 10 if processes > 1 else 300)
            if 0 in statuses and -signal.SIGKILL in statuses and step_of(folder / name) < STEPS:
                return {"ended too early": name, "statuses": statuses}
            if -signal.SIGKILL not in statuses:
                break
            kills += 1
            step = step_of(folder / name)
            in_vain = in_vain + 1 if steps and step == steps[-1] else 0
            if in_vain == 50:
                return {"stuck": name, "step": step}
            steps.append(step)
        if set(statuses) != {0} or content(folder / name) != wanted:
            return {"failed": name, "statuses": statuses}
        shutil.rmtree(folder / name)
        runs += 1
    return {"kills": kills, "runs": runs, "steps": sorted(set(steps))}


def lock(folder: Path) -> dict[str, Any]:
    """Kill a process that holds the lock of its progress bars, then train in another."""

    def job() -> None:
        Progress.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    begin_or_go_on(folder, "before")
    killed = os.waitpid(fork(job), 0)[1]
    signal.alarm(60)  # rather than wait forever
    begin_or_go_on(folder, "run")
    return {"killed": os.WIFSIGNALED(killed), "step": checkpoint.load_training_state(folder / "run")["step"]}


def disk(folder: Path) -> dict[str, Any]:
    """Train where no file may grow beyond a size, then go on where it may."""
    found = {}
    often = {"log_every": 1, "evaluate_every": 1000, "checkpoint_every": 1000, "steps": 2 * STEPS}
    for values, files in (({}, ("config.yaml", "*.safetensors", "trainer.pt")), (often, ("metrics.jsonl",))):
        begin_or_go_on(folder, files[0], **values)
        wanted = content(folder / files[0])
        for file in files:
            limit = next((folder / files[0]).rglob(file)).stat().st_size * 9 // 10
            read, write = os.pipe()

            def job(file: str = file, write: int = write, limit: int = limit, values: Any = values) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                try:
                    begin_or_go_on(folder, f"limit {file}", **values)
                except OSError as error:
                    os.write(write, f"{error.errno} {error}".encode())

            status = os.waitpid(fork(job), 0)[1]
            os.close(write)
            with os.fdopen(read) as pipe:
                message = pipe.read()
            begin_or_go_on(folder, f"limit {file}", **values)
            found[file] = [os.waitstatus_to_exitcode(status), message, content(folder / f"limit {file}") == wanted]
    return found


def read_only(folder: Path) -> dict[str, Any]:
    """Train, continue and draw in folders that cannot be written, as a user who is not root."""
    begin_or_go_on(folder, "run")
    before = content(folder / "run")
    main(["sample", str(folder / "run"), "--count", "1", "--out", str(folder / "other")])  # loads what it needs
    (folder / "empty").mkdir()
    for path in [folder / "empty", folder / "run", *(folder / "run").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    for path in [folder, *list(folder.parents)[:-2]]:
        path.chmod(0o755)
    found = []
    for job in (
        lambda: begin_or_go_on(folder, "empty"),
        lambda: begin_or_go_on(folder, "run", steps=STEPS + 3),
        lambda: sys.exit(main(["sample", str(folder / "run"), "--count", "1"])),
    ):
        read, write = os.pipe()

        def attempt(job: Any = job, write: int = write) -> None:
            if os.geteuid() == 0:
                os.setuid(65534)
            os.dup2(write, 2)
            job()

        status = os.waitpid(fork(attempt), 0)[1]
        os.close(write)
        with os.fdopen(read) as pipe:
            found.append([os.waitstatus_to_exitcode(status), pipe.read()])
    return {"found": found, "kept": content(folder / "run") == before}


def long(folder: Path) -> dict[str, Any]:
    """2000 steps with everything that goes with them; memory and open files along the way."""
    config = config_of(folder, steps=2000, checkpoint_every=200, evaluate_every=200)
    memory, objects, files = [], [], []
    step = Trainer.step

    def watched(self: Trainer) -> dict[str, float]:
        if self.steps_done % 250 == 0:
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            objects.append(len(gc.get_objects()))
            files.append(len(os.listdir("/dev/fd")))
        return step(self)

    Trainer.step = watched  # type: ignore[method-assign]
    train(config, folder / "long", progress=False)
    return {"memory": memory, "objects": objects, "files": files}


def run_job(name: str, folder: Path, *options: int) -> dict[str, Any]:
    """Run a job in a process of its own, and return what it found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, name, str(folder), *map(str, options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path) -> None:
    """kill -9 at random moments, each time continued: to the last bit what was never stopped."""
    found = run_job("kill", tmp_path)
    assert found.get("kills", 0) >= KILLS, found
    assert len(found["steps"]) >= 4, found


@pytest.mark.slow
@pytest.mark.parametrize("shard", [0, 1])
def test_two_processes_killed(shard: int, tmp_path: Path) -> None:
    """One of them or both, at random moments: the other ends, and the run goes on to the last bit."""
    found = run_job("kill", tmp_path, 5, 2, shard)
    assert found.get("kills", 0) >= 5, found


@pytest.mark.slow
def test_killed_with_the_lock_of_its_bars(tmp_path: Path) -> None:
    """Processes forked from one another share no lock that outlives them."""
    assert run_job("lock", tmp_path) == {"killed": True, "step": STEPS}


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    """Wherever it strikes, the error names the file, and the run goes on to the last bit."""
    found = run_job("disk", tmp_path)
    saved = "the checkpoint of step"
    words = {
        "config.yaml": "config.yaml",
        "*.safetensors": saved,
        "trainer.pt": saved,
        "metrics.jsonl": "metrics.jsonl",
    }
    assert found.keys() == words.keys()
    for file, (status, message, continued) in found.items():
        assert status == 0
        assert message.startswith(f"{errno.EFBIG} "), (file, message)
        assert f"cannot write {words[file]}" in message.replace(f"{tmp_path}/limit {file}/", ""), message
        assert "File too large" in message
        assert continued, file


@pytest.mark.slow
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    found = run_job("read_only", tmp_path)
    assert found["kept"]
    for (status, message), path in zip(found["found"], ("empty", "run", "run"), strict=True):
        assert status != 0
        assert "cannot write" in message and "Permission denied" in message and str(tmp_path / path) in message, message
        assert "Traceback" not in message


def test_data_that_change_under_a_run(tmp_path: Path) -> None:
    """A run in progress holds its data; one that is continued asks for the same."""
    write_data(tmp_path)
    begin_or_go_on(tmp_path, "whole")
    wanted = content(tmp_path / "whole")
    original, calls = Trainer.step, iter(range(1000))

    def step(self: Trainer) -> dict[str, float]:
        if next(calls) == 5:
            with (tmp_path / "data.npy").open("r+b") as file:
                file.truncate(200)
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        begin_or_go_on(tmp_path, "run")
    assert content(tmp_path / "run") == wanted
    with pytest.raises(ValueError, match=r"data.npy: must be a readable .npy or .npz file"):
        begin_or_go_on(tmp_path, "run", steps=STEPS + 1)
    write_data(tmp_path, count=25)
    with pytest.raises(ValueError, match=r"data set arrays must be the one the run in .* functions: 20 != 25"):
        begin_or_go_on(tmp_path, "run", steps=STEPS + 1)
    write_data(tmp_path)
    values = np.load(tmp_path / "data.npy")
    values[3, 2, 1] ^= 1
    np.save(tmp_path / "data.npy", values)
    with pytest.raises(ValueError, match=r"must be the one .*, got another: checksum: \d+ != \d+"):
        begin_or_go_on(tmp_path, "run", steps=STEPS + 1)
    assert content(tmp_path / "run") == wanted
    write_data(tmp_path)
    begin_or_go_on(tmp_path, "run", steps=STEPS + 1)
    assert checkpoint.load_training_state(tmp_path / "run")["step"] == STEPS + 1


def test_a_configuration_that_changes_under_a_run(tmp_path: Path) -> None:
    """Even where config.yaml and the command agree: the checkpoint knows."""
    write_data(tmp_path)
    begin_or_go_on(tmp_path, "run")
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.005", "lr: 0.105"))
    with pytest.raises(ValueError, match="was started with another configuration: train.lr: 0.005 != 0.105"):
        train(load_config(path), tmp_path / "run", resume=True, progress=False)


@pytest.mark.parametrize("moment", [f".vamoh-{'0' * 16}.tmp", "config.yaml"])
def test_killed_before_the_first_checkpoint(moment: str, tmp_path: Path) -> None:
    """What lies there of a run that has not begun is no obstacle."""
    write_data(tmp_path)
    begin_or_go_on(tmp_path, "whole")
    run = tmp_path / "run"
    run.mkdir()
    text = (tmp_path / "whole" / "config.yaml").read_text()
    (run / moment).write_text(text if moment == "config.yaml" else text[:50])
    begin_or_go_on(tmp_path, "run")
    assert content(run) == content(tmp_path / "whole")


@pytest.mark.slow
def test_a_long_run_leaks_nothing(tmp_path: Path) -> None:
    found = run_job("long", tmp_path)
    assert len(found["memory"]) == 8
    # The largest resident size so far; the heap settles during the first hundreds of steps.
    unit = 1 if sys.platform == "darwin" else 1024
    assert (found["memory"][-1] - found["memory"][2]) * unit < 2 << 20, found
    assert max(found["objects"][2:]) - min(found["objects"][2:]) < 2000, found
    assert len(set(found["files"])) == 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs: dict[str, Callable[..., dict[str, Any]]] = {
        "kill": kill,
        "lock": lock,
        "disk": disk,
        "read_only": read_only,
        "long": long,
    }
    write_data(Path(sys.argv[2]))
    print(json.dumps(jobs[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))))
