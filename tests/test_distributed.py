"""Training by several processes equals training by one; and what happens when one of them goes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.precision import UNIT
from tests.tiny import SIZES
from vamoh import checkpoint
from vamoh.config import BetaConfig, Config, ContextConfig, DataConfig, ModelConfig, TrainConfig, save_config
from vamoh.data import Dataset, open_dataset
from vamoh.distributed import Workers, init_process_group, is_lost
from vamoh.model import Noise, VaMoH
from vamoh.ops import CounterNoise
from vamoh.ops._noise import counter_noise_reference
from vamoh.runlog import read_log
from vamoh.train import NonFiniteLoss, Trainer, train

ROOT = Path(__file__).parents[1]
CONFIG = Config(
    data=DataConfig(name="arrays"),
    model=ModelConfig(**SIZES),
    train=TrainConfig(
        steps=23,
        batch_size=7,
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
PHASES = (0, 5, 10)
"""Steps done before a gradient is looked at: nothing warm, the gating, and the flow as well."""


def with_train(**values: Any) -> Config:
    return replace(CONFIG, train=replace(CONFIG.train, **values))


def config_of(folder: Path, **values: Any) -> Config:
    return replace(with_train(**values), data=DataConfig("arrays", path=str(folder / "data.npy")))


def masked(dataset: Dataset) -> Dataset:
    """The data with a mask of its own for every function; some points are observed by none."""
    mask = torch.rand(dataset.values.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.8
    mask[:, :3] = False
    return replace(dataset, mask=mask)


def gradient(config: Config, dataset: Dataset, done: int, workers: Workers) -> tuple[dict[str, float], Any]:
    """The log line and the gradients of one step, whole."""
    trainer = Trainer(config, dataset, workers=workers)
    trainer.steps_done = done
    line = trainer.step()
    grads = [p.grad for p in trainer.parameters]
    full = [g.full_tensor() if g is not None and hasattr(g, "full_tensor") else g for g in grads]
    return line, full


def log_of(folder: Path) -> list[dict[str, Any]]:
    entries = read_log(folder / "metrics.jsonl")
    return [{k: v for k, v in e.items() if k not in ("seconds", "datum_per_second")} for e in entries]


def job(folder: Path) -> None:
    """What two processes do for the tests; results lie in `folder` under the rank."""
    torch.set_num_threads(1)
    config = config_of(folder)
    dataset = open_dataset("arrays", path=config.data.path)
    with init_process_group("test", torch.device("cpu")) as (workers, _):
        results: dict[str, Any] = {"count": workers.count}
        for name, data, values in CASES:
            chosen = dataset if data == "plain" else masked(dataset)
            with_values = config_of(folder, clip=math.inf, **values)
            results[name] = [gradient(with_values, chosen, done, workers) for done in PHASES]
        results["tell"] = workers.from_main(f"from {workers.rank} é")
        results["largest"] = workers.largest(workers.rank * 5)
        try:
            workers.by_main(lambda: (_ for _ in ()).throw(OSError("full")))
        except Exception as error:
            results["error"] = repr(error)

        train(config, folder / "ddp", progress=False)
        model = train(config_of(folder, shard=True), folder / "fsdp", progress=False)
        results["returned"] = dict(model.state_dict())
        train(config, folder / "continued", resume=True, progress=False)
        train(config_of(folder, shard=True), folder / "continued_fsdp", resume=True, progress=False)
        train(config_of(folder, steps=11), folder / "begun", progress=False)
        train(config_of(folder, steps=11, shard=True), folder / "begun_fsdp", progress=False)

        original = VaMoH.elbo

        def spoiled(self: VaMoH, points: Any, **kwargs: Any) -> Any:
            terms = original(self, points, **kwargs)
            if workers.rank == 1 and kwargs.get("beta_z") is not None:
                terms.kl_c[1] = math.nan
            return terms

        VaMoH.elbo = spoiled  # type: ignore[method-assign]
        try:
            train(config, folder / "spoiled", progress=False)
        except NonFiniteLoss as error:
            results["spoiled"] = (error.term, error.step, error.indices, error.culprits)
        VaMoH.elbo = original  # type: ignore[method-assign]
        torch.save(results, folder / f"rank{workers.rank}.pt")


CONTEXT = ContextConfig(random=0.3, box=0.3, outside=0.2)

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("plain", "plain", {}),
    ("masked", "masked", {}),
    ("fixed", "masked", {"num_points": 20, "point_dropout": 0.0}),
    ("shard", "plain", {"shard": True}),
    ("context", "plain", {"context": CONTEXT, "target": "all", "point_dropout": 0.0}),
    ("context of masked", "masked", {"context": CONTEXT, "point_dropout": 0.3}),
]


def torchrun(*arguments: str, processes: int = 2) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VAMOH_DEBUG": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*command, *arguments], env=environment, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, and the run of one process."""
    folder = tmp_path_factory.mktemp("runs")
    generator = np.random.default_rng(0)
    axes = np.meshgrid(np.linspace(-1, 1, 6), np.linspace(-1, 1, 7), indexing="ij")
    phase = generator.uniform(0, 6, (30, 1, 1))
    waves = np.sin(3 * axes[0] + phase) * np.cos(2 * axes[1] - phase)
    np.save(folder / "data.npy", ((waves * 0.5 + 0.5) * 255).astype(np.uint8))
    torch.set_num_threads(1)
    train(config_of(folder), folder / "one", progress=False)
    for name in ("continued", "continued_fsdp"):
        train(config_of(folder, steps=11), folder / name, progress=False)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """What two processes found."""
    process = torchrun("-m", "tests.test_distributed", str(folder))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def norm(tensors: list[torch.Tensor | None]) -> float:
    return float(torch.cat([t.flatten() for t in tensors if t is not None]).double().norm())


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)), ids=[name for name, *_ in CASES])
@pytest.mark.parametrize("phase", range(len(PHASES)))
def test_a_step_is_that_of_one_process(
    case: int, phase: int, folder: Path, results: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 functions, in parts of 3 and 4; every gradient, every number of the log, the same bits in both processes."""
    name, data, values = CASES[case]
    dataset = open_dataset("arrays", path=str(folder / "data.npy"))
    config = config_of(folder, clip=math.inf, **values)
    chosen = dataset if data == "plain" else masked(dataset)
    line, expected = gradient(config, chosen, PHASES[phase], Workers())
    (found_line, found), (other_line, other) = (result[name][phase] for result in results)
    assert [g is None for g in found] == [g is None for g in expected]
    assert any(g is None for g in expected) == (phase < 2)
    for a, b, c in zip(expected, found, other, strict=True):
        if a is not None:
            # a small gradient may be what is left of terms as large as the whole one, each rounded
            assert norm([a - b]) <= 1e-6 * norm([a]) + UNIT * norm(expected)
            assert torch.equal(b, c)
    difference = [None if a is None else a - b for a, b in zip(expected, found, strict=True)]
    assert norm(difference) <= 1e-6 * norm(expected)
    assert found_line == pytest.approx(line, rel=1e-5)
    assert found_line == other_line


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_run_is_that_of_one_process(name: str, folder: Path, results: list[dict[str, Any]]) -> None:
    for a, b in zip(log_of(folder / "one"), log_of(folder / name), strict=True):
        assert a.pop("split") == b.pop("split")
        assert a == pytest.approx(b, rel=1e-4)
    assert_close(folder / "one", folder / name)
    files = ["checkpoint", "config.yaml", "environment.json", "metrics.jsonl"]
    assert sorted(path.name for path in (folder / name).iterdir()) == files


def assert_close(a: Path, b: Path) -> None:
    """Equal up to rounding: parameters, optimizer and generators."""
    left, right = checkpoint.load(a).state_dict(), checkpoint.load(b).state_dict()
    for key, value in left.items():
        assert norm([value - right[key]]) <= 1e-4 * norm([value]), key
    left, right = checkpoint.load_training_state(a), checkpoint.load_training_state(b)
    assert all(torch.equal(left[key], right[key]) for key in ("points", "noise"))
    assert left["optimizer"]["param_groups"] == right["optimizer"]["param_groups"]
    assert left["optimizer"]["state"].keys() == right["optimizer"]["state"].keys()
    for key, entry in left["optimizer"]["state"].items():
        for name, value in entry.items():
            other = right["optimizer"]["state"][key][name]
            assert norm([value - other]) <= 1e-3 * max(norm([value]), 1e-6), (key, name)


@pytest.mark.parametrize("name", ["continued", "continued_fsdp"])
def test_two_processes_continue_the_run_of_one(name: str, folder: Path, results: list[dict[str, Any]]) -> None:
    assert checkpoint.load_training_state(folder / name)["step"] == 23
    assert_close(folder / "one", folder / name)


@pytest.mark.parametrize("name", ["begun", "begun_fsdp"])
def test_one_process_continues_the_run_of_two(name: str, folder: Path, results: list[dict[str, Any]]) -> None:
    assert checkpoint.load_training_state(folder / name)["step"] == 11
    train(config_of(folder), folder / name, resume=True, progress=False)
    assert_close(folder / "one", folder / name)


def test_every_process_gets_the_whole_model(folder: Path, results: list[dict[str, Any]]) -> None:
    for result in results:
        for name, value in checkpoint.load(folder / "fsdp").state_dict().items():
            assert torch.equal(result["returned"][name], value)


def test_a_bad_term_of_one_process_stops_all(folder: Path, results: list[dict[str, Any]]) -> None:
    first, second = (result["spoiled"] for result in results)
    assert first == second
    term, step, indices, culprits = first
    # The second function of the second process, which has the last four of seven.
    assert (term, step, len(indices), culprits) == ("kl_c", 1, 7, [indices[4]])
    assert checkpoint.load_training_state(folder / "spoiled")["step"] == 0


def test_what_processes_tell_each_other(results: list[dict[str, Any]]) -> None:
    assert [result["count"] for result in results] == [2, 2]
    assert [result["tell"] for result in results] == ["from 0 é"] * 2
    assert [result["largest"] for result in results] == [5, 5]
    assert results[0]["error"] == "OSError('full')"
    assert results[1]["error"] == "RuntimeError('train: the main process failed: OSError: full')"


# One process


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("functions", [1, 2, 7, 64])
def test_shares_make_up_the_batch(count: int, functions: int) -> None:
    workers = [Workers(rank, count) for rank in range(count)]
    values = torch.arange(functions, dtype=torch.float64).square()
    means = [values[w.share(functions)].mean() * w.weight(functions) for w in workers]
    assert float(sum(means)) / count == pytest.approx(float(values.mean()), rel=1e-12)
    if functions >= count:
        assert [i for w in workers for i in range(functions)[w.share(functions)]] == list(range(functions))
        sizes = {len(range(functions)[w.share(functions)]) for w in workers}
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("seeded", [True, False])
def test_a_part_of_the_noise_is_that_of_the_batch(seeded: bool) -> None:
    seed = torch.tensor(5)
    whole = counter_noise_reference(seed, range(3), 7, 5)
    noise = Noise(torch.randn(7, 5), CounterNoise(seed, 3) if seeded else whole)
    for part in (slice(0, 3), slice(3, 7)):
        cut = noise.part(part)
        kl = cut.kl
        if isinstance(kl, CounterNoise):
            kl = counter_noise_reference(kl.seed, range(kl.samples), len(cut.z), 5)
        assert torch.equal(kl, whole[:, part])
        assert torch.equal(cut.z, noise.z[part])


def test_one_process_talks_to_nobody() -> None:
    with init_process_group("test", torch.device("cpu")) as (workers, place):
        assert (workers, place) == (Workers(), torch.device("cpu"))
        assert not dist.is_initialized()
        assert workers.by_main(lambda: 3) == 3
        assert (workers.largest(4), workers.from_main("a")) == (4, "a")


@pytest.mark.parametrize("device", ["meta", "cuda:1"])
def test_devices_that_processes_cannot_share(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = f"train: device must be cpu or cuda for 2 processes, got '{device}'"
    with pytest.raises(ValueError, match=words), init_process_group("train", torch.device(device)):
        pass


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"prior": "normal"},
        {"kl": "cross_entropy"},
        {"likelihood": "bernoulli"},
        {"components": 1},
        {"frequencies": 0},
        {"learn_frequencies": True},
        {"learn_scale": False},
        {"gating_widths": ()},
        {"weight_net_slope": 0.2},
    ],
)
def test_without_a_warm_up_every_parameter_has_a_gradient(values: dict[str, Any], folder: Path) -> None:
    """Then DistributedDataParallel need not look for those that have none."""
    dataset = open_dataset("arrays", path=str(folder / "data.npy"))
    config = config_of(folder, flow_warmup=0, gating_warmup=0)
    trainer = Trainer(replace(config, model=replace(config.model, **values)), dataset)
    trainer.step()
    assert all(p.grad is not None for p in trainer.parameters)


def test_more_processes_than_functions(folder: Path) -> None:
    dataset = open_dataset("arrays", path=str(folder / "data.npy"))
    with pytest.raises(ValueError, match="train.batch_size .* a function for each of 8 processes, got 7"):
        Trainer(CONFIG, dataset, workers=Workers(0, 8))


def test_a_lost_process_is_told_from_other_errors() -> None:
    assert is_lost(RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:1"))
    assert is_lost(dist.DistBackendError("NCCL error"))
    assert not is_lost(RuntimeError("shapes differ"))
    assert not is_lost(ValueError("Connection closed by peer"))


# The command


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    for _ in range(6000):
        entries = read_log(run / "metrics.jsonl")
        if entries and entries[-1]["step"] >= step:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    raise AssertionError("the run never got there")


def options(folder: Path, **values: Any) -> list[str]:
    save_config(config_of(folder, **values), folder / "mine.yaml")
    return ["train", str(folder / "mine.yaml")]


@pytest.mark.slow
def test_torchrun_stops_and_continues_a_run(folder: Path) -> None:
    run = folder / "stopped"
    process = torchrun("-m", "vamoh", *options(folder, steps=10**6, checkpoint_every=10**6), "--out", str(run))
    wait_for_step(process, run, 4)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    done = checkpoint.load_training_state(run)["step"]
    assert 4 <= done < 10**6
    assert f"train: stopped by SIGTERM after step {done}, saved; continue with: vamoh train --resume {run}" in err

    process = torchrun("-m", "vamoh", "train", "--resume", str(run), "--train.steps", str(done + 3))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert checkpoint.load_training_state(run)["step"] == done + 3
    # One process draws, evaluates and reports.
    assert out.count("reconstruction PSNR") == out.count(f"wrote {run / 'strip.png'}") == 1
    assert json.loads((run / "evaluation.json").read_text())["functions"] == 3


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_loses_little(folder: Path) -> None:
    run = folder / "killed"
    process = torchrun("-m", "tests.test_distributed", str(folder), "die")
    err = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert "WorkerLost: train: another process of the job was lost after step 8" in err, err
    assert f"the last checkpoint is kept, continue with: vamoh train --resume {run}" in err
    assert checkpoint.load_training_state(run)["step"] == 5
    train(config_of(folder), run, resume=True, progress=False)
    assert_close(folder / "one", run)


def die(folder: Path) -> None:
    """Train until the second process is killed in step 9."""
    step = Trainer.step

    def killed(self: Trainer) -> dict[str, float]:
        if self.steps_done == 8 and self.workers.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    Trainer.step = killed  # type: ignore[method-assign]
    train(config_of(folder), folder / "killed", progress=False)


if __name__ == "__main__":
    (die if sys.argv[2:] else job)(Path(sys.argv[1]))
