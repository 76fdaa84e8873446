"""Wrong arguments, thousands of them: a clear error that names the argument, and nothing else."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("tyro", reason="the command line needs tyro")

from tests.tiny import SIZES
from vamoh import (
    PointSet,
    VaMoH,
    checkpoint,
    commands,
    grid_coords,
    load,
    load_config,
    metrics,
    open_dataset,
    ops,
    sphere_grid,
)
from vamoh.cli import main
from vamoh.config import (
    BetaConfig,
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
    config_from_dict,
    preset,
    save_config,
)
from vamoh.data import Dataset
from vamoh.evaluate import evaluate_model, split_indices
from vamoh.masks import completion_mask
from vamoh.model import Noise
from vamoh.points import sphere_coords, to_grid
from vamoh.runlog import read_log
from vamoh.train import Trainer, train


class Thing:
    """No value of any kind."""


JUNK: list[Any] = [
    *(None, "x", "", b"x", 0, -1, 3, 1.5, math.nan, math.inf, -math.inf, True, 2**70),
    *([], [1], ["a"], [None], {}, {"a": 1}, (), (0,), (-1, 2), Thing(), len, Path("/proc/none/x")),
    *(torch.tensor(1.0), torch.tensor([1, 2]), torch.tensor([-1]), torch.arange(5), torch.empty(0), torch.zeros(0, 3)),
    torch.zeros(2, 3, dtype=torch.complex64),
    torch.zeros(3, 20, 1, dtype=torch.float16),
    torch.full((3, 20, 1), math.nan),
    torch.full((3, 20, 1), 2.0),
    torch.zeros(3, 20, 1, 1),
    torch.zeros(1, 20, 1, dtype=torch.float64),
    torch.zeros(3, 20, 1, device="meta"),
    torch.zeros(3, 20, 1).to_sparse(),
    torch.zeros(20, 2, dtype=torch.int64),
    torch.zeros(20, dtype=torch.bool),
    *(np.zeros((3, 20, 1)), np.zeros(3, dtype=object)),
]

# What a message may say instead of an argument's name: the thing that it is.
OTHER_NAMES = {
    "coords": ("shape must hold N", "points must have at least"),
    "shape": ("rows", "on a grid"),
    "encoder_centroids": ("encoder centroids",),
    "encoder_neighbors": ("encoder neighbors",),
    "run_folder": ("checkpoint: no checkpoint in",),
    "source": ("preset: name", "no configuration file"),
    "content": ("config: expected keys and values", "config: unknown key"),
    "path": ("must be a readable", "cannot write"),
    "num_points": ("points must have at least",),
    "out": ("another configuration", "cannot write"),
}


def wanted(name: str, arguments: dict[str, Any], message: str) -> bool:
    """Whether a message names an argument, the wrong one or one that does not fit it."""
    named = any(re.search(rf"\b{re.escape(word)}", message) for word in arguments)
    return named or any(words in message for words in OTHER_NAMES.get(name, ()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file and a run of one step."""
    folder = tmp_path_factory.mktemp("bad")
    values = np.random.default_rng(0).integers(0, 256, (20, 4, 5), dtype=np.uint8)
    np.save(folder / "data.npy", values)
    torch.set_num_threads(1)
    train(config_of(folder), folder / "run", progress=False)
    return folder


def config_of(folder: Path) -> Config:
    data = DataConfig("arrays", path=str(folder / "data.npy"))
    return Config(data=data, model=ModelConfig(**SIZES), train=TrainConfig(steps=1, batch_size=4, threads=1))


def calls(folder: Path) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    """Every public function with arguments that are right."""
    config = config_of(folder)
    data, model = open_dataset("arrays", path=str(folder / "data.npy")), load(folder / "run")
    points = data.batch(torch.arange(3))
    z = model.encode(points).mean.detach()
    values, mask = points.values, torch.ones(20, dtype=torch.bool)
    lists = {"coords": [torch.rand(4, 2), torch.rand(5, 2)], "values": [torch.rand(4, 1), torch.rand(5, 1)]}
    grid = {"shape": (3, 4), "scale": 2, "dtype": torch.float32, "device": "cpu"}
    angles = torch.rand(3)
    index = torch.randint(20, (3, 6, 4), generator=torch.Generator().manual_seed(0))
    everything = {"model": model, "dataset": data, "split": "test", "count": 1, "importance_count": 1, "mask": "patch"}
    build: dict[str, Any] = {"coord_dim": 2, "channels": 1, "seed": 0, **vars(config.model)}
    return [
        (PointSet, {"coords": points.coords, "values": values, "mask": mask}),
        (PointSet.from_grid, {"values": torch.rand(2, 1, 4, 5), "mask": torch.ones(4, 5, dtype=torch.bool)}),
        (PointSet.from_lists, lists),
        (points.with_mask, {"mask": None}),
        (points.to, {"target": "cpu"}),
        (points.select, {"index": torch.arange(3)}),
        (points.drop, {"rate": 0.5, "generator": None, "at_least": 2}),
        (points.subsample, {"count": 3, "generator": None}),
        (grid_coords, grid),
        (sphere_grid, grid),
        (sphere_coords, {"latitude": angles, "longitude": angles}),
        (to_grid, {"values": values, "shape": (4, 5)}),
        (VaMoH, build),
        (model.encode, {"points": points, "neighborhoods": None}),
        (model.neighborhoods, {"points": points}),
        (model.elbo, {"points": points, "neighborhoods": None, "beta_z": 1.0, "beta_c": 1.0, "noise": None}),
        (model.elbo, {"points": points, "generator": None}),
        (model.iwae, {"points": points, "samples": 2, "generator": None, "proper": False}),
        (
            model.reconstruct,
            {"points": points, "coords": points.coords, "z": z, "posterior_at": torch.arange(20), "progress": False},
        ),
        (model.decode, {"z": z, "coords": points.coords, "with_pi": True}),
        (model.sample, {"count": 2, "coords": points.coords, "generator": None}),
        (model.sample_prior, {"count": 2, "generator": None}),
        (model.draw_noise, {"batch": 2, "generator": None}),
        (load, {"run_folder": folder / "run", "device": "cpu"}),
        (checkpoint.load_training_state, {"run_folder": folder / "run"}),
        (load_config, {"source": "digits"}),
        (preset, {"name": "digits"}),
        (config_from_dict, {"content": {"seed": 1}}),
        (save_config, {"config": config, "path": folder / "saved.yaml"}),
        (open_dataset, {"name": "arrays", "path": str(folder / "data.npy"), "size": None, "root": None}),
        (data.batch, {"index": torch.arange(3)}),
        (data.grid, {"scale": 2}),
        (Dataset, dict(vars(data))),
        (split_indices, {"dataset": data, "split": "train", "index": (0,), "count": 2}),
        (evaluate_model, {**everything, "samples": 2, "num_points": None, "seed": 0}),
        (completion_mask, {"name": "patch", "shape": (4, 5), "seed": 0}),
        (metrics.psnr, {"prediction": values, "target": values, "mask": None}),
        (metrics.rmse, {"prediction": values, "target": values, "mask": None, "span": 1.0}),
        (metrics.iou, {"prediction": values, "target": values, "mask": None, "threshold": 0.5}),
        (metrics.bits_per_dim, {"log_likelihood": torch.zeros(3), "points": 3, "channels": 1}),
        (train, {"config": config, "out": folder / "run", "device": "cpu"}),
        (Trainer, {"config": config, "dataset": data, "device": "cpu", "model": None}),
        (ops.knn, {"points": points.coords, "queries": points.coords, "num_neighbors": 3, "mask": None}),
        (ops.farthest_point_sample, {"coords": points.coords, "num_samples": 3, "mask": None}),
        (ops.fourier_features, {"coords": points.coords, "frequencies": torch.rand(4, 2)}),
        (ops.linear, {"x": torch.rand(2, 3, 4), "weight": torch.rand(2, 5, 4), "bias": torch.rand(2, 5)}),
        (ops.neighbor_mean, {"features": values, "neighbors": index}),
        *[(kind, dict(vars(kind()))) for kind in (ModelConfig, TrainConfig, DataConfig, BetaConfig, Config)],
    ]


@pytest.mark.slow
def test_every_wrong_argument_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each argument of each function, replaced by each of forty wrong things, or things that happen to be right."""
    monkeypatch.chdir(tmp_path)  # "x" is a fine name of a file
    tried, refused, problems = 0, 0, []
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for function, arguments in calls(folder):
            function(**arguments) if function is not train else None
            for name in arguments:
                for junk in JUNK:
                    if name == "samples" and isinstance(junk, int) and junk > 9:
                        continue  # an endless loop, as asked for
                    tried += 1
                    try:
                        function(**{**arguments, name: junk})
                    except (ValueError, TypeError, OSError) as error:
                        refused += 1
                        if wanted(name, arguments, str(error)):
                            continue
                        problem = f"{type(error).__name__}: {error}"
                    except Exception as error:
                        problem = f"not a ValueError, TypeError or OSError: {type(error).__name__}: {error}"
                    else:
                        continue
                    problems.append(f"{function.__qualname__}({name}={junk!r}) -> {problem}"[:300])
    assert not problems, f"{len(problems)} of {tried}\n" + "\n".join(problems[:40])
    assert tried > 5000 and refused > 4000, (tried, refused)
    assert {path: path.read_bytes() for path in before} == before


def test_lists_of_other_things(folder: Path) -> None:
    good = [torch.rand(4, 2), torch.rand(5, 2)]
    values = [torch.rand(4, 1), torch.rand(5, 1)]
    with pytest.raises(TypeError, match=r"^PointSet.from_lists: coords\[1\] must be a torch.Tensor, got list$"):
        PointSet.from_lists([good[0], [[0.0, 1.0]]], values)  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"^PointSet.from_lists: values\[0\] must be a torch.Tensor, got ndarray$"):
        PointSet.from_lists(good, [np.zeros((4, 1)), values[1]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"^PointSet.from_lists: coords\[0\] must have shape \[N, \*\], got \[4\]$"):
        PointSet.from_lists([good[0][:, 0], good[1]], values)
    with pytest.raises(TypeError, match=r"^elbo: noise must be Noise, got Tensor$"):
        model = load(folder / "run")
        model.elbo(PointSet(torch.rand(20, 2), torch.rand(1, 20, 1)), noise=torch.zeros(3))  # type: ignore[arg-type]
    assert Noise


WORDS = st.one_of(
    st.sampled_from(
        ["", "-1", "0", "3", "1.5", "nan", "inf", "True", "None", "null", "x", "é", "--", "-", "a=b", "[]"]
    ),
    st.sampled_from(["1e400", str(2**70), "../..", "/dev/null", "/proc/self/mem", "\t", "{}", "random:0.5", "\x00"]),
    st.text(max_size=6),
)
OPTIONS = {
    "train": ["--train.steps", "--model.components", "--data.name", "--seed", "--out", "--device", "--resume"],
    "reconstruct": ["--split", "--index", "--count", "--seed", "--device"],
    "sample": ["--count", "--seed", "--device", "--prior"],
    "fit-prior": ["--kind", "--seed", "--device"],
    "superres": ["--scale", "--split"],
    "complete": ["--mask", "--index"],
    "segment": ["--index"],
    "evaluate": ["--samples", "--mask", "--split", "--count"],
    "info": [],
}


@pytest.mark.slow
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_every_wrong_command_is_explained(
    data: st.DataObject,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Right commands with wrong words in them: status 0 or 2, an explanation on stderr, never an exception."""
    monkeypatch.chdir(tmp_path)
    # What is right so far is not done.
    done = lambda *args, **kwargs: pytest.skip.Exception  # noqa: E731
    for name in (
        "_write",
        "_written",
        "_sample",
        "evaluate_model",
        "fit_second_prior",
        "save_prior",
        "_save_arrays",
        "_save_json",
        "train_model",
        "table",
    ):
        monkeypatch.setattr(commands, name, done)
    monkeypatch.setattr(commands, "summarize", lambda run: "done")
    command = data.draw(st.sampled_from(list(OPTIONS)))
    words = [command, "digits" if command == "train" else str(folder / "run")]
    if command == "info":
        words.pop()
    for option in data.draw(st.lists(st.sampled_from(OPTIONS[command] or ["--x"]), max_size=2)):
        words += [option, data.draw(WORDS)]
    for _ in range(data.draw(st.integers(0, 1))):
        words.insert(data.draw(st.integers(0, len(words))), data.draw(WORDS))
    capsys.readouterr()
    status = main(words)
    out, err = capsys.readouterr()
    assert status in (0, 2), (words, status, err)
    assert "Traceback" not in err
    if status == 2:
        assert err.strip(), words


@pytest.mark.slow
def test_files_of_rubbish(tmp_path: Path, folder: Path) -> None:
    """Bytes at random, and good files with bytes at random, in the place of every file that is read."""
    generator = np.random.default_rng(0)
    good = {
        "data.npy": (folder / "data.npy").read_bytes(),
        "config.yaml": (folder / "run" / "config.yaml").read_bytes(),
        "metrics.jsonl": (folder / "run" / "metrics.jsonl").read_bytes(),
    }
    read: dict[str, Callable[[Path], Any]] = {
        "data.npy": lambda path: open_dataset("arrays", path=str(path)),
        "config.yaml": load_config,
        "metrics.jsonl": read_log,
        "mask.npy": lambda path: completion_mask(str(path), (4, 5)),
        "mask.png": lambda path: completion_mask(str(path), (4, 5)),
        "data.npz": lambda path: open_dataset("arrays", path=str(path)),
        "image.png": lambda path: open_dataset("images", path=str(path)),
        "grid.binvox": lambda path: open_dataset("voxels", path=str(path)),
        "field.nc": lambda path: open_dataset("netcdf", path=str(path)),
    }
    refused = 0
    for i in range(1000):
        name = list(read)[i % len(read)]
        content = bytearray(good.get(name, b""))
        if content and i % 2:
            for position in generator.integers(len(content), size=generator.integers(1, 9)):
                content[position] = generator.integers(256)
            content = content[: generator.integers(1, len(content) + 1)] if i % 3 else content
        else:
            content = bytearray(generator.integers(256, size=generator.integers(0, 300), dtype=np.uint8).tobytes())
        path = tmp_path / name
        path.write_bytes(content)
        try:
            read[name](path)
        except (ValueError, TypeError, OSError) as error:
            refused += 1
            assert name in str(error), (i, name, error)
    assert refused > 700
