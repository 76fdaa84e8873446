"""Run folders of several hands: crafted files, two processes, neighbours, links, and disks that lack something."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("tyro", reason="the command line needs tyro")

from tests.tiny import SIZES
from vamoh import checkpoint
from vamoh._lock import locked
from vamoh.cli import main
from vamoh.config import Config, DataConfig, ModelConfig, TrainConfig, load_run_config, save_config
from vamoh.runlog import read_log
from vamoh.train import train

MODEL = ModelConfig(**SIZES)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = tmp_path_factory.mktemp("data") / "a.npy"
    np.save(path, np.random.default_rng(0).random((20, 4, 5)))
    training = TrainConfig(steps=4, batch_size=4, checkpoint_every=2, log_every=1, evaluate_every=9, threads=1)
    return Config(data=DataConfig("arrays", path=str(path)), model=MODEL, train=training)


@pytest.fixture(scope="module")
def trained(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(config, folder, progress=False)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A finished run to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def more(config: Config, steps: int = 6) -> Config:
    return replace(config, train=replace(config.train, steps=steps))


def newest(run: Path) -> Path:
    return max(run.glob("checkpoint/step-*"))


def content(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and not p.is_symlink()}


def seal(folder: Path) -> None:
    files = [folder / "model.safetensors", folder / "trainer.pt"]
    (folder / "SHA256SUMS").write_text("".join(f"{sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files))


def craft(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Let a training state be another one, with sums that agree."""
    path = newest(run) / "trainer.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    seal(path.parent)


def moments(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["optimizer"]["state"][3].update(values)


STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "small": (moments(exp_avg=torch.zeros(3)), r"entry 3: exp_avg must be torch.float32 \[.*\], got .*\[3\]"),
    "empty": (moments(exp_avg_sq=torch.zeros(0)), r"entry 3: exp_avg_sq must be torch.float32 \[.*\], got .*\[0\]"),
    "double": (
        lambda s: s["optimizer"]["state"][3].update(exp_avg=s["optimizer"]["state"][3]["exp_avg"].double()),
        r"entry 3: exp_avg must be torch.float32 \[.*\], got torch.float64",
    ),
    "steps of another shape": (moments(step=torch.zeros(2)), r"step must be torch.float32 \[\], got .* \[2\]"),
    "number": (moments(step=3.0), "entry 3: step must be a tensor in memory, got 3.0"),
    "list": (moments(exp_avg=[0.0] * 1000), r"entry 3: exp_avg must be a tensor in memory, got \[0.0, "),
    "sparse": (moments(exp_avg=torch.zeros(3, 4).to_sparse()), "entry 3: exp_avg must be a tensor in memory"),
    "meta": (moments(exp_avg=torch.zeros(9, device="meta")), "entry 3: exp_avg must be a tensor in memory"),
    "missing": (lambda s: s["optimizer"]["state"][3].pop("exp_avg"), "entry 3 must have step, exp_avg and exp_avg_sq"),
    "unknown": (moments(max_exp_avg_sq=torch.zeros(1)), "entry 3 must have step, exp_avg and exp_avg_sq, got"),
    "no parameter": (lambda s: s["optimizer"]["state"].update({99: {}}), "entry 99 belongs to none of"),
    "no entry": (lambda s: s["optimizer"]["state"].update({3: torch.zeros(9)}), "entry 3 belongs to none of"),
    "no state": (lambda s: s["optimizer"].pop("state"), "its state is None"),
    "no table": (lambda s: s.update(optimizer=[1]), "optimizer is list, expected dict"),
    "no seconds": (lambda s: s.pop("seconds"), "seconds is missing"),
    "negative": (lambda s: s.update(seconds=-1.0), "seconds is -1.0"),
    "more": (lambda s: s.update({"x" * 1000: 1}), "'x.* is unknown"),
    "short generator": (lambda s: s.update(noise=torch.zeros(9, dtype=torch.uint8)), r"noise must be torch.uint8 \["),
    "float generator": (lambda s: s.update(points=s["points"].float()), "points must be torch.uint8"),
    "bad generator": (lambda s: s["noise"].fill_(255), "training state in .* is damaged"),
    "tensor as data": (lambda s: s["data"].update(functions=torch.zeros(9, 9)), "not JSON serializable"),
    "tensor as configuration": (lambda s: s["config"]["train"].update(lr=torch.zeros(9)), "not JSON serializable"),
    "other step": (lambda s: s.update(step=3), "step of .* must be that of its folder, got 3"),
    "step of another type": (lambda s: s.update(step="4"), "step of .* must be that of its folder, got '4'"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_crafted_training_state_is_refused(name: str, run: Path, config: Config) -> None:
    """The sums agree, so nothing but a look at the content tells."""
    change, words = STATES[name]
    craft(run, change)
    before = content(run)
    with pytest.raises(ValueError, match=words) as caught:
        train(more(config), run, resume=True, progress=False)
    message = str(caught.value).replace(str(run), "RUN")
    assert len(message) < 300 and "tensor(" not in message
    assert content(run) == before


def test_moments_are_copied(run: Path, config: Config) -> None:
    """Whose strides repeat one number as many are read, not written through."""
    shutil.copytree(run, run.with_name("plain"))

    def repeat(state: dict[str, Any]) -> None:
        entry = state["optimizer"]["state"][3]
        entry["exp_avg"] = torch.full((1,), 0.25).expand(entry["exp_avg"].shape)

    def plain(state: dict[str, Any]) -> None:
        state["optimizer"]["state"][3]["exp_avg"].fill_(0.25)

    craft(run, repeat)
    craft(run.with_name("plain"), plain)
    models = [train(more(config), folder, resume=True, progress=False) for folder in (run, run.with_name("plain"))]
    left, right = (model.state_dict() for model in models)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_what_the_configuration_says_of_the_optimizer_counts(run: Path, config: Config) -> None:
    wanted = train(more(config), Path(shutil.copytree(run, run.with_name("other"))), resume=True, progress=False)
    craft(run, lambda s: s["optimizer"]["param_groups"][0].update(maximize=True, betas=("a", None), lr=torch.zeros(3)))
    found = train(more(config), run, resume=True, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), found.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("coord_dim", '"two"', "coord_dim must be int .got 'two'"),
        ("coord_dim", "{", "coord_dim must be int"),
        ("channels", "true", "channels must be int .got True"),
        ("use_flow", "1", "use_flow must be bool .got 1"),
        ("model", "[" * 100_000, "model must be dict"),
        ("step", "9", "step of .* must be that of its folder, got 9"),
    ],
)
def test_crafted_metadata_is_refused(name: str, value: str, words: str, run: Path) -> None:
    path = newest(run) / "model.safetensors"
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, name: value})
    seal(path.parent)
    with pytest.raises(ValueError, match=words) as caught:
        checkpoint.load(run)
    assert len(str(caught.value).replace(str(run), "RUN")) < 300


def test_a_model_of_other_sizes_names_a_few(run: Path) -> None:
    path = newest(run) / "model.safetensors"
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        metadata = file.metadata()
    save_file({f"{'x' * 500}{i}": value for i, value in enumerate(load_file(path).values())}, path, metadata)
    seal(path.parent)
    with pytest.raises(ValueError, match=r"does not fit the model: .*; and \d\d more") as caught:
        checkpoint.load(run)
    assert len(str(caught.value).replace(str(run), "RUN")) < 350


def test_two_threads_one_folder(tmp_path: Path, config: Config) -> None:
    """One wins, the other is told who has it."""
    found: list[str] = []
    long = replace(config, train=replace(config.train, steps=30))

    def job() -> None:
        try:
            train(long, tmp_path / "run", progress=False)
            found.append("done")
        except FileExistsError as error:
            found.append(str(error))

    jobs = [threading.Thread(target=job) for _ in range(2)]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join()
    other, done = sorted(found, key=lambda text: text == "done")
    assert done == "done"
    assert f"run is in use by process {os.getpid()} on " in other or "new or empty folder" in other
    assert [entry["step"] for entry in read_log(tmp_path / "run" / "metrics.jsonl") if entry["split"] == "train"] == [
        *range(1, 31)
    ]
    assert "lock" not in os.listdir(tmp_path / "run")


def test_a_run_that_goes_on_is_left_alone(run: Path, config: Config) -> None:
    before = content(run)
    with locked("test", run):
        holder = json.loads((run / "lock").read_text())
        with pytest.raises(FileExistsError) as caught:
            train(more(config), run, resume=True, progress=False)
        assert {k: v for k, v in content(run).items() if k != "lock"} == before
    assert str(caught.value) == (
        f"train: {run} is in use by process {os.getpid()} on {holder['host']} since {holder['since']}; "
        "wait for it or stop it"
    )
    train(more(config), run, resume=True, progress=False)
    assert checkpoint.load_training_state(run)["step"] == 6


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    code = "from vamoh._lock import locked\nwith locked('x', sys.argv[1]): print(1, flush=True); time.sleep(60)"
    command = [sys.executable, "-c", f"import sys, time\n{code}", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(FileExistsError, match=f"in use by process {process.pid} on"), locked("test", tmp_path):
            pass
        process.kill()
        process.wait()
    assert (tmp_path / "lock").exists()
    with locked("test", tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("text", ["", "{", '{"pid": 1}', '"pid"', "x" * 5000])
def test_a_lock_without_a_name(text: str, tmp_path: Path) -> None:
    with locked("test", tmp_path):
        (tmp_path / "lock").write_text(text)
        with pytest.raises(FileExistsError, match="in use by another process"), locked("test", tmp_path):
            pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    with locked("test", tmp_path / "run"):
        pass
    assert "has no locks" in caplog.text
    assert not (tmp_path / "run").exists()


def test_a_failed_start_leaves_nothing(tmp_path: Path, config: Config) -> None:
    with pytest.raises(ValueError, match=r"gone.npy"):
        train(replace(config, data=DataConfig("arrays", path="gone.npy")), tmp_path / "run", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_readers_during_training(run: Path) -> None:
    """The checkpoint is replaced again and again while it is read."""
    model, config = checkpoint.load(run), load_run_config(run)
    state = {name: value for name, value in checkpoint.load_training_state(run).items() if name != "step"}
    ended = threading.Event()

    def write() -> None:
        step = 5
        while not ended.is_set():
            checkpoint.save(run, model, config, step, state)
            step += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(150):
            checkpoint.load(run)
            checkpoint.load_training_state(run)
    finally:
        ended.set()
        writer.join()


def test_a_replaced_checkpoint_is_read_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between choosing and reading, every time but the last."""
    original, left = checkpoint.read_file, [3]

    def read(where: str, path: Path, **options: Any) -> bytes:
        if left[0]:
            left[0] -= 1
            step = int(path.parent.name[5:])
            for name in ("model.safetensors", "SHA256SUMS"):
                assert (path.parent / name).exists()
            path.parent.rename(path.parent.with_name(f"step-{step + 1:08d}"))
        return original(where, path, **options)

    monkeypatch.setattr(checkpoint, "read_file", read)
    with pytest.raises(ValueError, match="step of .* must be that of its folder, got 4"):
        checkpoint.load_training_state(run)  # found at last; it is renamed, not written
    assert left == [0]


def test_only_what_vamoh_wrote_is_removed(run: Path, config: Config) -> None:
    """Neighbours of the checkpoints stay, whatever they are called."""
    folder = run / "checkpoint"
    outside = run.parent / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    kept = ["best-by-me", "step-best", "step-00000004-copy", "step-4.bak", "notes.tmp"]
    for name in kept:
        shutil.copytree(newest(run), folder / name)
    (folder / "file").write_text("mine")
    (folder / "step-00000001").symlink_to(outside)
    (folder / "step-00000009.tmp").mkdir()
    train(more(config), run, resume=True, progress=False)
    assert sorted(os.listdir(folder)) == sorted([*kept, "file", "step-00000001", "step-00000006"])
    assert (outside / "mine").read_text() == "mine"


def test_nothing_is_read_through_links(run: Path) -> None:
    """A run folder that comes from elsewhere cannot show other files of the reader."""
    outside = run.parent / "outside"
    for name, read in (
        ("config.yaml", lambda: checkpoint.load(run)),
        ("metrics.jsonl", lambda: read_log(run / "metrics.jsonl")),
        (str(newest(run).relative_to(run) / "model.safetensors"), lambda: checkpoint.load(run)),
        (str(newest(run).relative_to(run) / "trainer.pt"), lambda: checkpoint.load_training_state(run)),
        (str(newest(run).relative_to(run) / "SHA256SUMS"), lambda: checkpoint.load(run)),
        ("checkpoint", lambda: checkpoint.load(run)),
    ):
        (run / name).rename(outside)
        (run / name).symlink_to(outside)
        with pytest.raises(ValueError, match=f"{name} must be a (file|folder of the run|file of the run), got a link"):
            read()
        (run / name).unlink()
        outside.rename(run / name)
    checkpoint.load(run)


@pytest.mark.parametrize(
    "name",
    ["environment.json", "environment.json.tmp", "metrics.jsonl.tmp", "config.yaml.tmp", "sample.png", "sample.npz"],
)
def test_nothing_is_written_through_links(name: str, run: Path, config: Config) -> None:
    outside = run.parent / "outside"
    outside.write_text("mine")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside)
    train(more(config), run, resume=True, progress=False)
    assert main(["sample", str(run), "--count", "1"]) == 0
    assert outside.read_text() == "mine"


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint", "tensorboard", "lock", "config.yaml"])
def test_links_that_stop_a_run(name: str, run: Path, config: Config) -> None:
    outside = run.parent / "outside"
    if (run / name).exists():
        (run / name).rename(outside)
    else:
        outside.mkdir()
    (run / name).symlink_to(outside)
    before = content(run), content(outside) if outside.is_dir() else outside.read_bytes()
    board = replace(config, train=replace(config.train, steps=6, tensorboard=name == "tensorboard"))
    if name == "tensorboard":
        pytest.importorskip("tensorboard")
    with pytest.raises(ValueError, match=f"{name} must be a .*, got a link"):
        train(board, run, resume=True, progress=False)
    after = content(run), content(outside) if outside.is_dir() else outside.read_bytes()
    if name in ("metrics.jsonl", "tensorboard"):
        before[0].pop("environment.json"), after[0].pop("environment.json")
        before[0].pop("config.yaml"), after[0].pop("config.yaml")
    assert after == before


def test_a_disk_that_cannot_sync_folders(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFS, DrvFs and some of FUSE answer EINVAL."""
    real, refused = os.fsync, []

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    train(config, tmp_path / "run", progress=False)
    assert checkpoint.load_training_state(tmp_path / "run")["step"] == 4
    assert refused


def test_a_disk_that_cannot_rename_folders(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Object stores as file systems."""
    real = os.replace

    def rename(old: Path, new: Path) -> None:
        if os.path.isdir(old):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        real(old, new)

    monkeypatch.setattr(os, "replace", rename)
    with pytest.raises(
        OSError, match=r"step 0 \(this file system cannot rename a folder, which keeps checkpoints whole"
    ):
        train(config, tmp_path / "run", progress=False)


def test_killed_before_its_first_checkpoint_a_run_begins_anew(tmp_path: Path, config: Config) -> None:
    """What is left does not count; a configuration of the user's does."""
    run = tmp_path / "run"
    (run / "checkpoint" / "step-00000000.tmp").mkdir(parents=True)
    (run / "lock").write_text('{"pid": 1}')
    (run / f".vamoh-{'0' * 16}.tmp").write_text("half")
    save_config(config, run / "config.yaml")
    train(config, run, progress=False)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("# mine\ntrain: {steps: 4}\n")
    with pytest.raises(FileExistsError, match="out must be a new or empty folder"):
        train(config, other, progress=False)
    assert (other / "config.yaml").read_text().startswith("# mine")
