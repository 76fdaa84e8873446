"""The training loop: schedules, resuming, interruption and errors."""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import SIZES
from vamoh import checkpoint
from vamoh.config import BetaConfig, Config, ContextConfig, DataConfig, ModelConfig, TrainConfig, load_config
from vamoh.data import Dataset, open_dataset
from vamoh.data.dataset import grid_dataset
from vamoh.metrics import psnr
from vamoh.points import PointSet
from vamoh.runlog import read_log
from vamoh.train import NonFiniteLoss, Trainer, TrainingInterrupted, beta_at, train

# `vamoh.train` is also the name of the function in the package's namespace.
module = importlib.import_module("vamoh.train")

CONFIG = Config(
    data=DataConfig(name="arrays"),
    model=ModelConfig(**SIZES),
    train=TrainConfig(
        steps=23,
        batch_size=6,
        lr=5e-3,
        lr_decay=0.9,
        point_dropout=0.9,
        flow_warmup=2,
        gating_warmup=1.5,
        beta_z=BetaConfig(1.0, "linear", 0, 3),
        checkpoint_every=5,
        log_every=2,
        evaluate_every=4,
        threads=1,
    ),
    seed=3,
)


def images(count: int = 30, shape: tuple[int, ...] = (6, 7)) -> np.ndarray:
    """Smooth random blobs [count, *shape, 1], uint8."""
    generator = np.random.default_rng(0)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    phase = generator.uniform(0, 6, (count, *[1] * len(shape)))
    waves = np.stack([np.sin(3 * axes[0] + p) * np.cos(2 * axes[-1] - p) for p in phase])
    return ((waves * 0.5 + 0.5) * 255).astype(np.uint8)[..., None]


@pytest.fixture
def dataset() -> Dataset:
    return grid_dataset("arrays", images())


@pytest.fixture(autouse=True)
def opened(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `train` open the small data set, and leave torch's threads as they were."""
    monkeypatch.setattr(module, "open_dataset", lambda *args, **kwargs: dataset)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_train(config: Config = CONFIG, **values: Any) -> Config:
    return replace(config, train=replace(config.train, **values))


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log without the times, which differ between any two runs."""
    entries = read_log(folder / "metrics.jsonl")
    return [{k: v for k, v in e.items() if k not in ("seconds", "datum_per_second")} for e in entries]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, list | tuple):
        return {k: v for i, entry in enumerate(value) for k, v in flatten(entry, f"{prefix}/{i}").items()}
    return {prefix: value}


def assert_same_run(a: Path, b: Path) -> None:
    """Equal to the last bit: parameters, phases, optimizer, generators and the log but for times."""
    left, right = checkpoint.load(a), checkpoint.load(b)
    tensors = right.state_dict()
    for name, value in left.state_dict().items():
        assert torch.equal(value, tensors[name]), name
    assert (left.use_flow, left.use_gating_prior) == (right.use_flow, right.use_gating_prior)
    states = [flatten({**checkpoint.load_training_state(folder), "seconds": 0, "config": 0}) for folder in (a, b)]
    assert states[0].keys() == states[1].keys()
    assert len(states[0]) > 20
    for key, value in states[0].items():
        same = torch.equal(value, states[1][key]) if isinstance(value, torch.Tensor) else value == states[1][key]
        assert same, key
    assert log_of(a) == log_of(b)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of CONFIG."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    original, module.open_dataset = module.open_dataset, lambda *a, **k: grid_dataset("arrays", images())  # type: ignore[attr-defined]
    try:
        train(CONFIG, folder, progress=False)
    finally:
        module.open_dataset = original  # type: ignore[attr-defined]
    return folder


# The loop


def test_a_run_folder_holds_everything(reference: Path) -> None:
    assert sorted(p.name for p in reference.iterdir()) == [
        "checkpoint",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
    ]
    assert load_config(reference / "config.yaml") == CONFIG
    assert json.loads((reference / "environment.json").read_text())["versions"]["torch"] == torch.__version__
    assert checkpoint.load_training_state(reference)["step"] == 23


def test_the_log(reference: Path) -> None:
    entries = read_log(reference / "metrics.jsonl")
    trained = [e for e in entries if e["split"] == "train"]
    checked = [e for e in entries if e["split"] == "validation"]
    assert [e["step"] for e in trained] == [1, *range(2, 23, 2), 23]
    assert [e["step"] for e in checked] == [4, 8, 12, 16, 20, 23]
    # 24 data in batches of 6 are 4 steps an epoch.
    for e in trained:
        before = (e["step"] - 1) / 4
        assert e["epoch"] == e["step"] / 4
        assert e["lr"] == pytest.approx(5e-3 * 0.9**before, rel=1e-12)
        assert e["beta_z"] == pytest.approx(min(before / 3, 1), rel=1e-12)
        assert e["beta_c"] == 1.0
        bound = e["log_likelihood"] - e["beta_z"] * e["kl_z"] - e["kl_c"]
        assert e["elbo"] == pytest.approx(bound, rel=1e-4)
        assert 12 <= e["points"] <= 42
        assert e["grad_norm"] > 0
        assert e["seconds"] > 0
        assert e["datum_per_second"] > 0
    assert len({e["points"] for e in trained}) > 3
    for e in checked:
        assert e["elbo"] == pytest.approx(e["log_likelihood"] - e["kl_z"] - e["kl_c"], rel=1e-4)
    assert 3 < checked[-1]["psnr"] < 40


def test_training_learns(dataset: Dataset) -> None:
    trainer = Trainer(with_train(point_dropout=0.0, lr=1e-2, lr_decay=1.0), dataset)
    before = trainer.evaluate()
    for _ in range(200):
        trainer.step()
    after = trainer.evaluate()
    assert after["elbo"] > before["elbo"] + 20
    assert after["psnr"] > before["psnr"] + 1


def test_an_epoch_visits_every_datum_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(with_train(batch_size=7), dataset)
    seen: list[list[int]] = []
    original = Dataset.batch
    monkeypatch.setattr(Dataset, "batch", lambda self, index: (seen.append(index.tolist()), original(self, index))[1])
    for _ in range(6):
        trainer.step()
    every = set(dataset.splits["train"].tolist())
    epochs = [sum(seen[:3], []), sum(seen[3:], [])]
    for visited in epochs:
        # 24 = 3 batches of 7, the last 3 of the permutation are left out.
        assert len(visited) == 21 == len(set(visited) & every)
    assert epochs[0] != epochs[1]


def test_a_split_smaller_than_a_batch_is_one_batch(dataset: Dataset) -> None:
    trainer = Trainer(with_train(batch_size=100), dataset)
    assert (trainer.batch_size, trainer.steps_per_epoch) == (24, 1)
    assert trainer.step()["epoch"] == 1.0


def test_warm_up_phases(dataset: Dataset) -> None:
    trainer, phases = Trainer(CONFIG, dataset), []
    for _ in range(10):
        trainer.step()
        phases.append((trainer.model.use_gating_prior, trainer.model.use_flow))
    # 4 steps an epoch: uniform p(c) for 1.5 epochs, N(0, I) for 2.
    assert phases == [(False, False)] * 6 + [(True, False)] * 2 + [(True, True)] * 2


def test_the_learning_rate_grows_over_its_warm_up(dataset: Dataset) -> None:
    trainer = Trainer(with_train(lr=1e-2, lr_decay=1.0, lr_warmup=4), dataset)
    assert [trainer.step()["lr"] for _ in range(6)] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2, 1e-2])


def test_the_gradient_is_clipped(dataset: Dataset) -> None:
    trainer = Trainer(with_train(clip=0.5), dataset)
    assert trainer.step()["grad_norm"] > 0.5
    norm = torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(0.5, rel=1e-3)


def test_one_step_is_adam(dataset: Dataset) -> None:
    """Adam's first update moves every parameter by lr against the sign of its gradient."""
    trainer = Trainer(with_train(clip=math.inf), dataset)
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.step()
    for old, new in zip(before, trainer.parameters, strict=True):
        if new.grad is not None:
            large = new.grad.abs() > 1e-3
            moved = (new - old)[large]
            torch.testing.assert_close(moved, -5e-3 * new.grad[large].sign(), rtol=1e-3, atol=1e-6)


def test_mixed_precision_is_close_and_saved(dataset: Dataset, tmp_path: Path) -> None:
    mixed = with_train(precision="bfloat16", steps=3)
    exact, steps = Trainer(with_train(steps=3), dataset).step(), [Trainer(mixed, dataset).step() for _ in range(2)]
    assert steps[0] | {"seconds": 0} == steps[1] | {"seconds": 0}
    assert steps[0]["elbo"] != exact["elbo"] and steps[0]["elbo"] == pytest.approx(exact["elbo"], rel=1e-2)
    train(mixed, tmp_path, progress=False)
    assert load_config(tmp_path / "config.yaml").train.precision == "bfloat16"
    assert {p.dtype for p in checkpoint.load(tmp_path).parameters()} == {torch.float32}


def test_point_dropout_leaves_the_encoder_enough(dataset: Dataset) -> None:
    trainer = Trainer(with_train(point_dropout=1.0), dataset)
    points = dataset.batch(torch.arange(3))
    counts = [trainer._drop_points(points).count for _ in range(300)]
    assert min(counts) == trainer.model.min_points
    assert max(counts) > 36
    # p ~ U(0, 1) keeps half of the 42 points on average (a little more, by the lower bound).
    assert 20 < sum(counts) / len(counts) < 27


def test_point_dropout_counts_observed_points(dataset: Dataset) -> None:
    trainer = Trainer(with_train(point_dropout=1.0), dataset)
    least = trainer.model.min_points
    plain = dataset.batch(torch.arange(2))
    shared = plain.with_mask(torch.arange(42) < least + 3)
    mask = torch.ones(2, 42, dtype=torch.bool)
    mask[1, least:] = False
    for _ in range(50):
        assert least <= trainer._drop_points(shared).count <= least + 3
        each = trainer._drop_points(plain.with_mask(mask))
        assert each.mask is None or int(each.mask.sum(1).min()) >= least
        trainer.model.elbo(each)


def test_a_fixed_number_of_points(dataset: Dataset, tmp_path: Path) -> None:
    config = with_train(num_points=20, point_dropout=0.0, steps=3, log_every=1)
    train(config, tmp_path / "run", progress=False)
    entries = read_log(tmp_path / "run" / "metrics.jsonl")
    assert [e["points"] for e in entries if e["split"] == "train"] == [20, 20, 20]


CONTEXT = ContextConfig(random=0.3, rate=0.7, box=0.3, outside=0.1, half=0.2)


def watched(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[PointSet, Any]]:
    """Points and context of every bound from now on."""
    calls: list[tuple[PointSet, Any]] = []
    original = trainer.model.elbo

    def elbo(points: PointSet, context: Any = None, **kwargs: Any) -> Any:
        calls.append((points, context))
        return original(points, context=context, **kwargs)

    monkeypatch.setattr(trainer.model, "elbo", elbo)
    return calls


def test_the_encoder_sees_a_context_of_every_function(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_train(context=CONTEXT, target="all", point_dropout=0.0, batch_size=12)
    trainer = Trainer(config, dataset)
    calls = watched(trainer, monkeypatch)
    for _ in range(4):
        trainer.step()
    contexts = torch.cat([context for _, context in calls])
    assert contexts.shape == (48, 42) and all(points.mask is None and points.count == 42 for points, _ in calls)
    shares = contexts.float().mean(1)
    assert contexts.sum(1).min() >= trainer.model.min_points and len(shares.unique()) > 10
    assert (shares == 1).any() and (shares < 0.6).any()


def test_the_target_may_be_what_the_encoder_sees(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    every, seen = (
        Trainer(with_train(context=CONTEXT, target=target, point_dropout=0.0), dataset)
        for target in ("all", "observed")
    )
    calls, others = watched(every, monkeypatch), watched(seen, monkeypatch)
    for _ in range(3):
        every.step()
        seen.step()
    for (points, context), (other, nothing) in zip(calls, others, strict=True):
        assert nothing is None and torch.equal(other.mask, context) and torch.equal(other.values, points.values)


def test_a_context_respects_what_the_data_observe(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.rand(30, 42, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[0] = False
    mask[0, :7] = True
    trainer = Trainer(
        with_train(context=replace(CONTEXT, outside=0.2), target="all", point_dropout=0.0), replace(dataset, mask=mask)
    )
    calls = watched(trainer, monkeypatch)
    for _ in range(5):
        trainer.step()
    for points, context in calls:
        assert not (context & ~points.mask).any() and context.sum(1).min() >= trainer.model.min_points
        assert points.mask.sum() > context.sum()


FIXED = replace(with_train(context=CONTEXT, target="all"), model=replace(CONFIG.model, centroids="fixed"))


def test_fixed_centroids_cover_the_data(dataset: Dataset) -> None:
    fixed = Trainer(FIXED, dataset).model.encoder.fixed
    assert fixed is not None and fixed.is_set
    assert (fixed.centroids[:, None] == dataset.coords).all(-1).any(1).all()
    model = checkpoint.new_model(FIXED, 2, 1)
    model.set_centroids(dataset.coords)
    assert torch.equal(model.encoder.fixed.centroids, fixed.centroids)

    seen = torch.rand(30, 42, generator=torch.Generator().manual_seed(0)) < 0.6
    seen[:, :10] = False  # as land is in a field of the sea
    fixed = Trainer(FIXED, replace(dataset, mask=seen)).model.encoder.fixed
    assert not (fixed.sites.flatten(0, 1)[:, None] == dataset.coords[:10]).all(-1).any()

    own = torch.rand(30, 42, 2, generator=torch.Generator().manual_seed(0))
    own[~seen] = 5.0  # padding
    for mask in (seen, None):
        points = replace(dataset, kind="points", shape=(), coords=own, mask=mask)
        fixed = Trainer(FIXED, points).model.encoder.fixed
        train = dataset.splits["train"]
        known = own[train].flatten(0, 1) if mask is None else own[train][mask[train]]
        assert (fixed.centroids[:, None] == known).all(-1).any(1).all()
        assert len(fixed.centroids.unique(dim=0)) == 12


def test_a_model_with_centroids_keeps_them(dataset: Dataset) -> None:
    model = checkpoint.new_model(FIXED, 2, 1)
    model.set_centroids(dataset.coords + 0.25)
    before = model.encoder.fixed.centroids.clone()
    assert torch.equal(Trainer(FIXED, dataset, model=model).model.encoder.fixed.centroids, before)


def test_contexts_and_centroids_resume_to_the_bit(dataset: Dataset, tmp_path: Path) -> None:
    train(FIXED, tmp_path / "whole", progress=False)
    train(with_train(FIXED, steps=8), tmp_path / "parts", progress=False)
    train(FIXED, tmp_path / "parts", resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_evaluation_disturbs_nothing_and_repeats(dataset: Dataset) -> None:
    a, b = Trainer(CONFIG, dataset), Trainer(CONFIG, dataset)
    assert a.evaluate() == a.evaluate()
    assert [a.step() for _ in range(3)] == [b.step() for _ in range(3)]


def test_evaluation_is_a_mean_over_the_split(dataset: Dataset) -> None:
    """Batches of different sizes weigh by their number of data."""
    trainer = Trainer(CONFIG, dataset)
    split = dataset.splits["train"][:20]
    whole = replace(dataset, splits={**dataset.splits, "test": split})
    trainer.dataset = whole
    points = dataset.batch(split)
    expected = psnr(trainer.model.reconstruct(points).mean, points.values).mean()
    assert trainer.evaluate("test")["psnr"] == pytest.approx(float(expected), rel=1e-5)


def test_another_seed_is_another_run(dataset: Dataset) -> None:
    a, b = Trainer(CONFIG, dataset).step(), Trainer(replace(CONFIG, seed=4), dataset).step()
    assert a["elbo"] != b["elbo"]
    assert a["points"] != b["points"]
    orders = [Trainer(replace(CONFIG, seed=seed), dataset)._batch_indices().tolist() for seed in (3, 4)]
    assert orders[0] != orders[1]


def test_global_random_state_is_neither_used_nor_changed(dataset: Dataset) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = Trainer(CONFIG, dataset).step()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert Trainer(CONFIG, dataset).step() == first


@pytest.mark.parametrize("kind", ["voxels", "sphere"])
def test_other_kinds_of_data(kind: str, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "voxels":
        likelihood, other = "bernoulli", grid_dataset("voxels", (images(shape=(4, 4, 4)) > 127).astype(np.float32))
    else:
        coords = torch.nn.functional.normalize(torch.randn(42, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
        values = dataset.values.float() / 255
        likelihood, other = "continuous_bernoulli", replace(dataset, kind="sphere", coords=coords, values=values)
    monkeypatch.setattr(module, "open_dataset", lambda *args, **kwargs: other)
    config = with_train(replace(CONFIG, model=replace(CONFIG.model, likelihood=likelihood)), steps=3, flow_warmup=0)
    model = train(config, tmp_path / "run", progress=False)
    assert (model.coord_dim, model.channels, model.training) == (3, 1, False)


def test_a_file_of_the_users_own(reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_dataset", open_dataset)
    np.save(tmp_path / "mine.npy", images())
    config = replace(with_train(steps=3), data=DataConfig("arrays", path=str(tmp_path / "mine.npy")))
    train(config, tmp_path / "run", progress=False)
    assert log_of(tmp_path / "run")[:2] == log_of(reference)[:2]


def test_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(with_train(steps=2), tmp_path / "a", progress=False)
    assert capsys.readouterr() == ("", "")
    train(with_train(steps=2), tmp_path / "b")
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("2/2", "elbo=", "log_likelihood=", "kl_z=", "kl_c="):
        assert part in err


def test_threads_are_restored(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    train(with_train(steps=1, threads=1), tmp_path / "run", progress=False)
    assert torch.get_num_threads() == 2
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["threads"] == 1


# Schedules


def test_beta_schedules() -> None:
    values = {
        name: [beta_at(BetaConfig(2.0, name, 1.0, 5.0), e) for e in (0, 1, 2, 3, 5, 9)]  # type: ignore[arg-type]
        for name in ("constant", "linear", "quadratic", "exponential")
    }
    assert values["constant"] == [2.0] * 6
    assert values["linear"] == [0.0, 0.0, 0.5, 1.0, 2.0, 2.0]
    assert values["quadratic"] == [0.0, 0.0, 0.125, 0.5, 2.0, 2.0]
    expected = [0.0, 0.0, 2 * (2**0.25 - 1), 2 * (2**0.5 - 1), 2.0, 2.0]
    assert values["exponential"] == pytest.approx(expected, rel=1e-15)
    assert [beta_at(BetaConfig(1.0, "linear", 1.0, 5.0, initial=3.0), e) for e in (0, 1, 2, 5)] == [3.0, 3.0, 2.5, 1.0]


@pytest.mark.parametrize("name", ["linear", "quadratic", "exponential"])
def test_a_ramp_without_length_is_a_step(name: Any) -> None:
    assert beta_at(BetaConfig(0.7, name), 0.0) == 0.7
    assert [beta_at(BetaConfig(0.7, name, 2.0, 2.0), e) for e in (1.9, 2.0, 2.1)] == [0.0, 0.7, 0.7]


# Resuming


@pytest.mark.parametrize("stop", [3, 5, 14])
def test_resume_equals_an_uninterrupted_run(
    stop: int, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop anywhere (mid-epoch, at an epoch's end, after the flow's start) and continue to the last bit."""
    folder = tmp_path / "run"
    interrupt_after(monkeypatch, stop)
    with pytest.raises(TrainingInterrupted):
        train(CONFIG, folder, progress=False)
    model = train(CONFIG, folder, resume=True, progress=False)
    assert not model.training
    assert_same_run(folder, reference)


def test_a_crash_loses_only_the_steps_since_the_checkpoint(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    original = Trainer.step

    def crash(self: Trainer) -> dict[str, float]:
        if self.steps_done == 9:
            raise RuntimeError("crash")
        return original(self)

    monkeypatch.setattr(Trainer, "step", crash)
    with pytest.raises(RuntimeError, match="crash"):
        train(CONFIG, folder, progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(module, "open_dataset", lambda *a, **k: grid_dataset("arrays", images()))
    assert read_log(folder / "metrics.jsonl")[-1]["step"] == 8
    assert checkpoint.load_training_state(folder)["step"] == 5
    train(CONFIG, folder, resume=True, progress=False)
    assert_same_run(folder, reference)


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import importlib, time
case = importlib.import_module("tests.test_train")
case.module.open_dataset = lambda *a, **k: case.grid_dataset("arrays", case.images())
step = case.Trainer.step
case.Trainer.step = lambda self: (time.sleep({pause}), step(self))[1]
config = case.with_train(**{changes!r})
try:
    case.train(config, {folder!r}, progress=False)
except case.TrainingInterrupted as error:
    sys.exit(str(error))
"""


def start(folder: Path, pause: float, **changes: Any) -> subprocess.Popen[str]:
    script = SCRIPT.format(root=str(Path(__file__).parents[1]), folder=str(folder), pause=pause, changes=changes)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    for _ in range(3000):
        log = folder / "metrics.jsonl"
        if log.exists() and any(f'"step": {n},' in log.read_text() for n in (step, step + 1)):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    raise AssertionError("the run never got there")


@pytest.mark.slow
def test_kill_9_then_resume(reference: Path, tmp_path: Path) -> None:
    """Kill at a random moment, with a checkpoint being written after every step, and continue to the last bit."""
    folder = tmp_path / "run"
    process = start(folder, 0.02, checkpoint_every=1)
    wait_for_step(process, folder, random.choice([1, 4, 8]))
    time.sleep(random.uniform(0, 0.1))
    process.kill()
    process.communicate()
    done = checkpoint.load_training_state(folder)["step"]
    assert 0 <= done < 23
    train(with_train(checkpoint_every=1), folder, resume=True, progress=False)
    assert_same_run(folder, reference)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_save_and_say_how_to_resume(name: str, reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder, 0.05, checkpoint_every=1000)
    wait_for_step(process, folder, 4)
    process.send_signal(getattr(signal, name))
    error = process.communicate(timeout=60)[1]
    done = checkpoint.load_training_state(folder)["step"]
    assert 4 <= done < 23
    assert error.strip().endswith(
        f"train: stopped by {name} after step {done}, saved; continue with: vamoh train --resume {folder}"
    )
    train(CONFIG, folder, resume=True, progress=False)
    assert_same_run(folder, reference)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Send SIGINT to this process at the end of that step."""
    original = Trainer.step

    def step(self: Trainer) -> dict[str, float]:
        result = original(self)
        if self.steps_done == steps:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(Trainer, "step", step)


def test_handlers_are_restored_and_a_second_signal_acts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, own))
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    train(with_train(steps=1), tmp_path / "a", progress=False)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    interrupt_after(monkeypatch, 1)
    with pytest.raises(TrainingInterrupted) as caught:
        train(CONFIG, tmp_path / "b", progress=False)
    assert (caught.value.signal, caught.value.step, caught.value.run_folder) == (signal.SIGINT, 1, tmp_path / "b")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    with module.stop_signals() as received:  # type: ignore[attr-defined]
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_in_the_last_step_ends_normally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(monkeypatch, 2)
    train(with_train(steps=2), tmp_path / "run", progress=False)
    assert checkpoint.load_training_state(tmp_path / "run")["step"] == 2


def test_training_in_another_thread(tmp_path: Path) -> None:
    """Only the main thread may install signal handlers."""
    models: list[Any] = []
    job = lambda: models.append(train(with_train(steps=1), tmp_path / "run", progress=False))  # noqa: E731
    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    assert len(models) == 1


def test_a_finished_run_can_be_extended(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(with_train(steps=20), folder, progress=False)
    train(CONFIG, folder, resume=True, progress=False)
    assert load_config(folder / "config.yaml") == CONFIG
    assert_same_run(folder, reference)
    train(CONFIG, folder, resume=True, progress=False)
    assert_same_run(folder, reference)


# Divergence


def spoil(monkeypatch: pytest.MonkeyPatch, term: str, at: int, value: float = math.nan) -> None:
    """Let one term of the second datum of the batch become `value` in the bound's evaluation number `at`."""
    calls = iter(range(1000))
    original = module.VaMoH.elbo  # type: ignore[attr-defined]

    def elbo(self: Any, points: PointSet, **kwargs: Any) -> Any:
        terms = original(self, points, **kwargs)
        if next(calls) == at:
            factor = torch.ones_like(terms.elbo)
            factor[1] = value
            parts = {name: getattr(terms, name) for name in ("log_likelihood", "kl_z", "kl_c")}
            parts[term] = parts[term] * factor
            return replace(terms, **parts, elbo=parts["log_likelihood"] - parts["kl_z"] - parts["kl_c"])
        return terms

    monkeypatch.setattr(module.VaMoH, "elbo", elbo)  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("term", ["log_likelihood", "kl_z", "kl_c"])
def test_a_bad_term_stops_the_run(
    term: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Dataset
) -> None:
    folder = tmp_path / "run"
    config = with_train(checkpoint_every=2, evaluate_every=1000)
    # Evaluations of the bound: the check of the first checkpoint, two steps, a check, the third step.
    spoil(monkeypatch, term, at=4, value=value)
    with pytest.raises(NonFiniteLoss) as caught:
        train(config, folder, progress=False)
    trainer = Trainer(config, dataset)
    trainer.steps_done = 2
    batch = trainer._batch_indices().tolist()
    error = caught.value
    assert (error.term, error.step, error.indices, error.culprits) == (term, 3, batch, [batch[1]])
    assert str(error) == (
        f"train: {term} became NaN or infinite in step 3 for data [{batch[1]}] of the batch {batch}; "
        f"the last good checkpoint is kept in {folder / 'checkpoint'}"
    )
    assert checkpoint.load_training_state(folder)["step"] == 2
    assert read_log(folder / "metrics.jsonl")[-1]["step"] == 2
    monkeypatch.undo()
    assert all(p.isfinite().all() for p in checkpoint.load(folder).parameters())


def test_a_bad_gradient_never_reaches_the_parameters(dataset: Dataset) -> None:
    trainer = Trainer(CONFIG, dataset)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.parameters[0].register_hook(lambda grad: grad * math.nan)
    with pytest.raises(NonFiniteLoss, match="grad_norm became NaN or infinite in step 1") as caught:
        trainer.step()
    assert len(caught.value.culprits) == 6
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.steps_done == 0


def test_a_diverged_state_is_never_saved(tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(CONFIG, dataset)
    trainer.save(tmp_path)
    trainer.step()
    parameter = trainer.parameters[-1]
    good = parameter.detach().clone()
    with torch.no_grad():
        parameter.flatten()[0] = math.inf
    with pytest.raises(NonFiniteLoss, match="a parameter became NaN or infinite in step 1"):
        trainer.save(tmp_path)
    with torch.no_grad():
        parameter.copy_(good)
    # Finite parameters whose bound is not.
    spoil(monkeypatch, "kl_z", at=0)
    with pytest.raises(NonFiniteLoss, match="kl_z became NaN or infinite in step 1"):
        trainer.save(tmp_path)
    assert checkpoint.load_training_state(tmp_path)["step"] == 0
    trainer.save(tmp_path)
    assert checkpoint.load_training_state(tmp_path)["step"] == 1


def test_a_bad_validation_stops_before_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "kl_c", at=3)
    with pytest.raises(NonFiniteLoss, match="kl_c became NaN or infinite in step 2"):
        train(with_train(steps=2, checkpoint_every=2, evaluate_every=2), tmp_path / "run", progress=False)
    assert checkpoint.load_training_state(tmp_path / "run")["step"] == 0


# Errors


def test_a_folder_in_use_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out must be a new or empty folder, got .* --resume .* or choose"):
        train(CONFIG, tmp_path, progress=False)
    with pytest.raises(FileExistsError, match="out must be a new or empty folder, got .*notes.txt"):
        train(CONFIG, tmp_path / "notes.txt", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    train(with_train(steps=1), tmp_path, progress=False)
    assert (tmp_path / "config.yaml").exists()


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing to resume in .*none: no checkpoint in .*none/checkpoint"):
        train(CONFIG, tmp_path / "none", resume=True, progress=False)
    assert not (tmp_path / "none").exists()


def test_resume_of_another_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(with_train(steps=1), folder, progress=False)
    other = replace(with_train(steps=2, lr=1e-2), seed=9)
    with pytest.raises(ValueError, match=r"another configuration: seed: 3 != 9; train.lr: 0.005 != 0.01 \(on resume"):
        train(other, folder, resume=True, progress=False)


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.num_points must be from \d+ .* to 42 .*, got 43"):
        train(with_train(num_points=43), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"train.num_points must be from 6 \(what the encoder needs\) to 42 .*, got 5"):
        train(with_train(num_points=5), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="train: device must be one this machine has, got 'toaster'"):
        train(CONFIG, tmp_path / "run", device="toaster", progress=False)
    assert not (tmp_path / "run").exists()


def test_data_that_do_not_fit(dataset: Dataset) -> None:
    few = grid_dataset("few", images(shape=(2, 2)))
    with pytest.raises(ValueError, match=r"data set few must have the \d+ points that the encoder needs, got 4"):
        Trainer(CONFIG, few)
    model = checkpoint.new_model(CONFIG, 3, 2)
    with pytest.raises(ValueError, match="must have 3 coordinate dimensions and 2 channels as the model, got 2 and 1"):
        Trainer(CONFIG, dataset, model=model)
    nothing = torch.empty(0, dtype=torch.int64)
    empty = replace(dataset, splits={**dataset.splits, "train": nothing, "validation": nothing})
    with pytest.raises(ValueError, match="the train split of data set arrays must not be empty"):
        Trainer(CONFIG, empty)
    trainer = Trainer(CONFIG, dataset)
    trainer.dataset = empty
    with pytest.raises(ValueError, match="split validation of data set arrays must not be empty"):
        trainer.evaluate()


def test_without_a_validation_split(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = replace(dataset, splits={**dataset.splits, "validation": torch.empty(0, dtype=torch.int64)})
    monkeypatch.setattr(module, "open_dataset", lambda *args, **kwargs: bare)
    train(with_train(steps=2), tmp_path / "run", progress=False)
    assert {e["split"] for e in read_log(tmp_path / "run" / "metrics.jsonl")} == {"train"}


def test_tensorboard_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r'the tensorboard package .*: pip install "vamoh\[tensorboard\]"'):
        train(with_train(tensorboard=True), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[tuple[str, int], float] = {}

    class Writer:
        def __init__(self, folder: Path, purge_step: int) -> None:
            seen["start", purge_step] = 0.0
            assert folder == tmp_path / "run" / "tensorboard"

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen[name, step] = value

        def close(self) -> None:
            seen["closed", 0] = 0.0

    monkeypatch.setattr(module, "_summary_writer", lambda: Writer)
    train(with_train(tensorboard=True, steps=4), tmp_path / "run", progress=False)
    for entry in read_log(tmp_path / "run" / "metrics.jsonl"):
        assert seen[f"{entry['split']}/elbo", entry["step"]] == entry["elbo"]
    assert {("start", 1), ("closed", 0)} <= seen.keys()
