"""Coordinates of any units: measured by training, kept with the run, and the same results as in [-1, 1]."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import SIZES
from vamoh import checkpoint
from vamoh.config import Config, DataConfig, ModelConfig, TrainConfig, load_config, save_config
from vamoh.data import Dataset, open_dataset
from vamoh.data.dataset import grid_dataset, random_splits
from vamoh.export import export_decoder
from vamoh.runlog import read_log
from vamoh.train import Trainer, train

CONFIG = Config(
    model=ModelConfig(**SIZES),
    train=TrainConfig(batch_size=6, threads=1),
)


def with_train(config: Config = CONFIG, **values: Any) -> Config:
    return replace(config, train=replace(config.train, **values))


def clouds(units: float, offset: float, path: Path) -> DataConfig:
    """Waves at points that every function has for itself, in the square with corners -1 and 1 in other units."""
    generator = np.random.default_rng(0)
    coords = generator.uniform(-1, 1, (24, 40, 2))
    coords[:, 0], coords[:, 1] = -1, 1
    values = 0.5 + 0.4 * np.sin(3 * coords[..., :1] + generator.uniform(0, 6, (24, 1, 1)))
    np.savez(path, coords=coords * units + offset, values=values.astype(np.float32))
    return DataConfig("arrays", path=str(path))


def test_coordinates_of_other_units_train_alike(tmp_path, caplog):
    caplog.set_level("INFO")
    finals = {}
    for name, units, offset in (("unit", 1.0, 0.0), ("pixels", 127.5, 127.5), ("metres", 250.0, 4.5e6)):
        config = replace(with_train(steps=6, evaluate_every=6), data=clouds(units, offset, tmp_path / f"{name}.npz"))
        train(config, tmp_path / name)
        told = [line for line in caplog.messages if "are normalised" in line]
        caplog.clear()
        saved = load_config(tmp_path / name / "config.yaml").model
        wanted = ((), ()) if name == "unit" else ((offset,) * 2, (units,) * 2)
        assert len(told) == (name != "unit") and (saved.coord_offset, saved.coord_scale) == wanted
        assert checkpoint.load(tmp_path / name).domain == (saved.coord_offset, saved.coord_scale)
        finals[name] = [line for line in read_log(tmp_path / name / "metrics.jsonl") if line["split"] == "validation"][
            -1
        ]
    for key in ("elbo", "psnr", "kl_z"):
        assert finals["pixels"][key] == pytest.approx(finals["unit"][key], rel=1e-3)
        assert finals["metres"][key] == pytest.approx(
            finals["unit"][key], rel=2e-2
        )  # coordinates lose digits in float32


def test_the_command_says_it_once(tmp_path, capsys):
    main = pytest.importorskip("vamoh.cli").main

    path = clouds(127.5, 127.5, tmp_path / "pixels.npz").path
    save_config(with_train(steps=2), tmp_path / "tiny.yaml")
    options = ["--data.name", "arrays", "--data.path", path, "--out", str(tmp_path / "run")]
    assert main(["train", str(tmp_path / "tiny.yaml"), *options]) == 0
    told = "are normalised, minus (127.5, 127.5) and over (127.5, 127.5)"
    assert capsys.readouterr().err.count(told) == 1
    assert main(["evaluate", str(tmp_path / "run"), "--samples", "2"]) == 0
    assert "normalised" not in capsys.readouterr().err


def test_a_run_of_other_units_goes_on(tmp_path):
    config = replace(with_train(steps=4), data=clouds(127.5, 127.5, tmp_path / "data.npz"))
    whole = train(config, tmp_path / "whole", progress=False)
    train(replace(config, train=replace(config.train, steps=2)), tmp_path / "parts", progress=False)
    parts = train(config, tmp_path / "parts", resume=True, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    assert parts.domain == whole.domain != ((), ())


def test_coordinates_that_stay():
    """Grids, points that fill [-1, 1], and the unit sphere."""
    sphere = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    cases = [
        grid_dataset("images", np.zeros((24, 5, 8, 1), dtype=np.uint8)),
        bare(torch.rand(40, 2)),
        bare(torch.rand(24, 40, 2) * 2 - 1),
        bare(sphere / sphere.norm(dim=-1)[:, None]),
    ]
    assert [Trainer(CONFIG, data).model.domain for data in cases] == [((), ())] * 4
    assert Trainer(CONFIG, bare(torch.rand(40, 2) * 0.1)).model.domain != ((), ())
    given = replace(CONFIG, model=replace(CONFIG.model, coord_offset=(1.0, 2.0), coord_scale=(3.0, 3.0)))
    assert Trainer(given, bare(torch.rand(40, 2) * 9)).model.domain == ((1.0, 2.0), (3.0, 3.0))


def bare(coords: torch.Tensor) -> Dataset:
    values = torch.rand(24, 40, 1, generator=torch.Generator().manual_seed(1))
    return Dataset("points", "points", (), coords, values, random_splits("points", 24), "logistic")


def test_an_exported_decoder_takes_the_units_of_the_data():
    model = Trainer(CONFIG, bare(torch.rand(40, 2) * 255)).model.eval()
    z, coords = torch.randn(2, 3), torch.rand(2, 7, 2) * 255
    with torch.no_grad():
        mean = export_decoder(model).module()(z, coords)[0]
        torch.testing.assert_close(mean, model.decode(z, coords).mean)


def test_coordinates_that_float32_cannot_hold(tmp_path):
    data = clouds(1.0, 4.5e6, tmp_path / "near.npz")
    with pytest.raises(
        ValueError, match=r"near.npz: coords must differ by more than float32 rounds off, .* along axis 0"
    ):
        open_dataset("arrays", data.path)
    assert open_dataset("arrays", clouds(250.0, 4.5e6, tmp_path / "far.npz").path).kind == "points"
    level = np.stack([np.full(40, 4.5e6 + 0.3), np.linspace(0, 1, 40)], -1)  # nothing to tell apart along the first
    np.savez(tmp_path / "level.npz", coords=level, values=np.zeros((24, 40, 1)))
    assert open_dataset("arrays", str(tmp_path / "level.npz")).kind == "points"
