"""Checkpoints: exact, whole whatever happens, and clear about what is wrong with one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.tiny import SIZES
from vamoh import checkpoint
from vamoh.config import Config, ModelConfig, save_config
from vamoh.points import PointSet, grid_coords

CONFIG = Config(
    model=ModelConfig(**SIZES),
    seed=5,
)


def write(folder: Path, step: int = 7, config: Config = CONFIG, seed: int = 0) -> Any:
    """A run folder with one checkpoint of a model whose parameters are random."""
    model = checkpoint.new_model(config, 2, 1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder.mkdir(exist_ok=True)
    save_config(config, folder / "config.yaml")
    checkpoint.save(folder, model, config, step, {"seconds": 1.5, "nested": {"a": [torch.arange(3)]}})
    return model


def weights(folder: Path) -> Path:
    return next(folder.glob("checkpoint/step-*/model.safetensors"))


def seal(folder: Path) -> None:
    """Let SHA256SUMS agree with what lies there."""
    path = weights(folder)
    sums = [f"{sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in (path, path.with_name("trainer.pt"))]
    path.with_name("SHA256SUMS").write_text("".join(sums))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_load_returns_the_same_model(tmp_path: Path) -> None:
    model = write(tmp_path)
    model.use_flow, model.use_gating_prior = False, True
    checkpoint.save(tmp_path, model, CONFIG, 8, {})
    loaded = checkpoint.load(tmp_path)
    assert same(model, loaded)
    assert (loaded.use_flow, loaded.use_gating_prior, loaded.training) == (False, True, False)
    points = PointSet(grid_coords((4, 5)), torch.rand(2, 20, 1, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(loaded.reconstruct(points).mean, model.reconstruct(points).mean)


def test_the_model_file_describes_itself(tmp_path: Path) -> None:
    write(tmp_path)
    with safe_open(weights(tmp_path), "pt") as file:  # type: ignore[no-untyped-call]
        metadata = file.metadata()
    assert json.loads(metadata.pop("model"))["components"] == 2
    assert metadata == {
        "format": "1",
        "step": "7",
        "use_flow": "true",
        "use_gating_prior": "true",
        "coord_dim": "2",
        "channels": "1",
    }


def test_training_state_round_trip(tmp_path: Path) -> None:
    write(tmp_path)
    state = checkpoint.load_training_state(tmp_path)
    assert state["step"] == 7
    assert state["seconds"] == 1.5
    assert torch.equal(state["nested"]["a"][0], torch.arange(3))


def test_a_new_checkpoint_replaces_the_old_one(tmp_path: Path) -> None:
    write(tmp_path, step=7)
    model = write(tmp_path, step=100_000_000, seed=1)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-100000000"]
    assert same(checkpoint.load(tmp_path), model)
    with pytest.raises(ValueError, match="step must be later than .*step-100000000, got 100000000"):
        write(tmp_path, step=100_000_000)


def fail(monkeypatch: pytest.MonkeyPatch, name: str, call: int, error: BaseException) -> None:
    """Raise in the n-th call of a function, after a part of what it writes or removes."""
    holder, attribute = {
        "write": (checkpoint, "_write"),
        "mkdir": (Path, "mkdir"),
        "rmtree": (shutil, "rmtree"),
    }.get(name, (os, name))
    original, calls = getattr(holder, attribute), iter(range(1000))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) != call:
            return original(*args, **kwargs)
        if name == "write":
            args[0].write_bytes(bytes(args[1])[:100])
        if name == "rmtree":
            next(iter(args[0].iterdir())).unlink()
        raise error

    monkeypatch.setattr(holder, attribute, failing)


@pytest.mark.parametrize("call", range(9))
@pytest.mark.parametrize("name", ["write", "fsync", "replace", "mkdir"])
def test_a_full_disk_leaves_the_old_checkpoint_whole(
    name: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail the n-th system call of each kind while a checkpoint is written."""
    old = write(tmp_path, step=7)
    new = checkpoint.new_model(CONFIG, 2, 1)
    fail(monkeypatch, name, call, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    try:
        checkpoint.save(tmp_path, new, CONFIG, 8, {})
        failed = False
    except OSError as error:
        failed = True
        assert error.errno == errno.ENOSPC
        assert "cannot write the checkpoint of step 8 (No space left on device)" in str(error)
        assert "step-00000007 is untouched" in str(error)
    monkeypatch.undo()
    # Each kind of call happens at least once, so its first failure must show.
    assert failed or call > 0
    done = (tmp_path / "checkpoint" / "step-00000008").exists()
    assert same(checkpoint.load(tmp_path), new if done else old)
    assert checkpoint.load_training_state(tmp_path)["step"] == (8 if done else 7)
    assert not list(tmp_path.glob("checkpoint/*.tmp"))
    if not done:
        checkpoint.save(tmp_path, new, CONFIG, 8, {})
        assert same(checkpoint.load(tmp_path), new)


@pytest.mark.parametrize(
    ("name", "call"),
    [(name, call) for name in ("write", "fsync", "replace", "mkdir") for call in range(5)] + [("rmtree", 1)],
)
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(
    name: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop dead, without cleaning up, at the n-th call of each kind while a checkpoint is written."""
    old = write(tmp_path, step=7)
    new = checkpoint.new_model(CONFIG, 2, 1)
    fail(monkeypatch, name, call, KeyboardInterrupt())
    with contextlib.suppress(KeyboardInterrupt):
        checkpoint.save(tmp_path, new, CONFIG, 8, {})
    monkeypatch.undo()
    done = (tmp_path / "checkpoint" / "step-00000008").exists()
    assert same(checkpoint.load(tmp_path), new if done else old)
    assert checkpoint.load_training_state(tmp_path)["step"] == (8 if done else 7)
    checkpoint.save(tmp_path, new, CONFIG, 9, {})
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-00000009"]


def test_left_overs_of_a_killed_writer_do_not_count(tmp_path: Path) -> None:
    model = write(tmp_path, step=7)
    unfinished = tmp_path / "checkpoint" / "step-00000009.tmp"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    older = tmp_path / "checkpoint" / "step-00000003"
    older.mkdir()
    assert same(checkpoint.load(tmp_path), model)
    write(tmp_path, step=9)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-00000009"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*none \(no such folder\)"):
        checkpoint.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .* \(looked for .*checkpoint/step-\*\)"):
        checkpoint.load_training_state(tmp_path)
    assert not checkpoint.has_checkpoint(tmp_path)
    write(tmp_path)
    assert checkpoint.has_checkpoint(tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="no configuration file .*config.yaml"):
        checkpoint.load(tmp_path)


READERS = {
    "model.safetensors": [checkpoint.load],
    "trainer.pt": [checkpoint.load_training_state],
    "SHA256SUMS": [checkpoint.load, checkpoint.load_training_state],
}


@pytest.mark.parametrize("file", READERS)
def test_missing_truncated_and_corrupt_files(file: str, tmp_path: Path) -> None:
    """Any cut, any flipped bit; with sums that agree, what is no checkpoint is still refused."""
    write(tmp_path)
    path = weights(tmp_path).with_name(file)
    content = path.read_bytes()
    damages = [content[:size] for size in {0, 1, 5, *range(0, len(content), len(content) // 50), len(content) - 1}]
    for position in {*range(0, len(content), max(1, len(content) // 400)), len(content) - 1}:
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        damages.append(bytes(flipped))
    refused = 0
    for damaged in damages:
        path.write_bytes(damaged)
        for read in READERS[file]:
            try:
                read(tmp_path)
            except ValueError as error:
                refused += 1
                assert "is damaged: its SHA-256 is not the one in SHA256SUMS" in str(error)
    # A sum of the other file may go, and the newline at the end.
    assert refused == len(damages) if file != "SHA256SUMS" else refused >= len(damages)
    if file != "SHA256SUMS":
        for damaged in (b"", content[:5], content[: len(content) // 2], b"\xff" * len(content)):
            path.write_bytes(damaged)
            seal(tmp_path)
            with pytest.raises(ValueError, match=f"{file} is damaged or not a"):
                READERS[file][0](tmp_path)
    path.unlink()
    for read in READERS[file]:
        with pytest.raises(FileNotFoundError, match=f"{file} is missing"):
            read(tmp_path)
    write(tmp_path, step=8)
    for read in READERS[file]:
        read(tmp_path)


def test_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    write(tmp_path)
    folder = weights(tmp_path).parent
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert [line[64:] for line in lines] == ["  model.safetensors", "  trainer.pt"]
    assert all(line[:64] == sha256((folder / line[66:]).read_bytes()).hexdigest() for line in lines)


def test_a_training_state_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    write(tmp_path)
    torch.save({"format": 1, "x": Payload()}, weights(tmp_path).with_name("trainer.pt"))
    seal(tmp_path)
    with pytest.raises(ValueError, match="trainer.pt is damaged or not a training state"):
        checkpoint.load_training_state(tmp_path)


def test_another_format(tmp_path: Path) -> None:
    write(tmp_path)
    torch.save({"format": 2}, weights(tmp_path).with_name("trainer.pt"))
    seal(tmp_path)
    with pytest.raises(ValueError, match="trainer.pt must have format 1, got 2"):
        checkpoint.load_training_state(tmp_path)
    tensors = load_file(weights(tmp_path))
    save_file(tensors, weights(tmp_path), {"format": "3"})
    seal(tmp_path)
    with pytest.raises(ValueError, match="model.safetensors must have format 1, got 3"):
        checkpoint.load(tmp_path)
    save_file(tensors, weights(tmp_path))
    seal(tmp_path)
    with pytest.raises(ValueError, match="model.safetensors must have format 1, got None"):
        checkpoint.load(tmp_path)
    save_file(tensors, weights(tmp_path), {"format": "1", "step": "1"})
    seal(tmp_path)
    with pytest.raises(ValueError, match="lacks the metadata use_flow, use_gating_prior, coord_dim, channels, model"):
        checkpoint.load(tmp_path)


def test_keys_that_an_older_version_did_not_know(tmp_path: Path) -> None:
    model = write(tmp_path)
    with safe_open(weights(tmp_path), "pt") as file:  # type: ignore[no-untyped-call]
        metadata = file.metadata()
    known = json.loads(metadata["model"])
    del known["coord_offset"], known["coord_scale"]
    save_file(load_file(weights(tmp_path)), weights(tmp_path), {**metadata, "model": json.dumps(known)})
    seal(tmp_path)
    assert same(checkpoint.load(tmp_path), model)


def test_a_checkpoint_of_another_configuration_names_the_keys(tmp_path: Path) -> None:
    write(tmp_path)
    other = replace(CONFIG, model=replace(CONFIG.model, components=3, inr_slope=0.2))
    save_config(other, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="model.components: 2 != 3; model.inr_slope: 0.1 != 0.2"):
        checkpoint.load(tmp_path)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    with safe_open(weights(tmp_path), "pt") as file:  # type: ignore[no-untyped-call]
        metadata = file.metadata()
    tensors = load_file(weights(tmp_path))
    first, second, *_ = tensors
    shape = list(tensors[second].shape)
    tensors["extra"] = tensors.pop(first)
    tensors[second] = torch.zeros(9, 9)
    save_file(tensors, weights(tmp_path), metadata)
    seal(tmp_path)
    with pytest.raises(ValueError, match="does not fit the model: ") as caught:
        checkpoint.load(tmp_path)
    assert "extra is unknown" in str(caught.value)
    assert f"{first} is missing" in str(caught.value)
    assert f"{second} is torch.float32 [9, 9], the model has torch.float32 {shape}" in str(caught.value)


def test_devices_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match="checkpoint.load: device must be one this machine has, got 'toaster'"):
        checkpoint.load(tmp_path, "toaster")
    with pytest.raises(ValueError, match="device must be one this machine has, got 'cuda:99'"):
        checkpoint.load(tmp_path, "cuda:99")
