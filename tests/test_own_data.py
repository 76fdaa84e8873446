"""Runs on data of the user's own: what is left out, what is refused before the first step, what moved or changed."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("tyro", reason="the command line needs tyro")

from tests.tiny import SIZES
from vamoh import load_config, open_dataset
from vamoh.cli import main
from vamoh.data import Dataset, source
from vamoh.data.dataset import random_splits
from vamoh.evaluate import completable, evaluate_model
from vamoh.model import VaMoH
from vamoh.points import PointSet, grid_coords
from vamoh.runlog import read_log

TINY = shlex.split("""
    --model.latent_dim 3 --model.components 2 --model.frequencies 4 --model.encoder_centroids 16 8
    --model.encoder_neighbors 4 4 --model.encoder_channels 4 4 --model.weight_net 4 --model.flow_layers 2
    --model.hypernet_widths 6 --model.inr_widths 5 --model.gating_widths 6 --model.pool_centroids --model.pool_neighbors
    --model.kl_samples 2 --train.steps 2 --train.batch_size 4 --train.evaluate_every 2 --train.flow_warmup 0
""")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(name: str, path: str, out: str, *more: str) -> int:
    return main(["train", "digits", *TINY, "--data.name", name, "--data.path", path, "--out", out, *more])


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    assert main(list(args)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    return error[0]


def photographs(folder: str, count: int = 10, seed: int = 0) -> None:
    Path(folder).mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(f"{folder}/{i:02d}.png")


def cloud(**change: Any) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    arrays = {"coords": generator.random((64, 2)), "values": generator.random((20, 64, 1))}
    return {**arrays, "mask": np.ones((20, 64), bool), **change}


def test_what_a_mask_cannot_complete_is_named_and_the_rest_measured(capsys: pytest.CaptureFixture[str]) -> None:
    mask = np.ones((20, 64), bool)
    mask[:, 16:48] = False
    np.savez("gap.npz", **cloud(mask=mask))
    assert train("arrays", "gap.npz", "run") == 0
    result = json.loads(Path("run/evaluation.json").read_text())
    test = open_dataset("arrays", "gap.npz").splits["test"].tolist()
    assert result["completion_left_out"] == test
    assert "completion_psnr" not in result and result["psnr"] > 0
    assert f"completion without 2 functions ({test[0]}, {test[1]})" in capsys.readouterr().out


def test_functions_left_out_do_not_alter_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    values, mask = torch.rand(6, 36, 1, generator=generator), torch.ones(6, 36, dtype=torch.bool)
    model = VaMoH(coord_dim=2, channels=1, **SIZES, likelihood="logistic").eval()

    def measure(indices: list[int], mask: torch.Tensor) -> dict[str, Any]:
        splits = {"train": torch.tensor([5]), "validation": torch.tensor([5]), "test": torch.tensor(indices)}
        data = Dataset("toy", "image", (6, 6), grid_coords((6, 6)), values, splits, "logistic", mask)
        return evaluate_model(model, data, samples=2, mask="half")

    left = torch.arange(36) % 6 < 3
    mask[1] = left  # nothing that is observed is hidden
    mask[3] = ~left | (torch.arange(36) < 2)  # two points are shown, the encoder needs 4
    result = measure([0, 1, 2, 3, 4], mask)
    assert result["completion_left_out"] == [1, 3]
    assert result["completion_psnr"] == pytest.approx(measure([0, 2, 4], mask)["completion_psnr"], rel=1e-5)
    assert completable(PointSet(grid_coords((6, 6)), values, mask), left, 4).tolist() == [1, 0, 1, 0, 1, 1]


@pytest.mark.parametrize("command", ["evaluate", "reconstruct", "superres", "complete", "segment"])
@pytest.mark.parametrize("change", ["added", "removed", "renamed", "altered"])
def test_changed_images_are_noticed(
    folder: Path, run: Path, capsys: pytest.CaptureFixture[str], command: str, change: str
) -> None:
    shutil.copytree(run / "photos", "photos")
    if change == "added":
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("photos/00a.png")
    elif change == "removed":
        Path("photos/09.png").unlink()
    elif change == "renamed":
        Path("photos/00.png").rename("photos/99.png")
    else:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("photos/03.png")
    message = fails(capsys, command, str(run / "run"), "--data.path", "photos", "--out", "out")
    assert "data set images must be the one the run in" in message and "checksum: " in message


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the data `photos` and the run `run`, which was trained by a relative path."""
    folder = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        photographs("photos")
        assert train("images", "photos", "run") == 0
    return folder


@pytest.mark.slow
def test_data_may_move_and_need_not_be_there_to_sample(
    run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, "copy")
    assert load_config("copy/run/config.yaml").data.path == str(run / "photos")
    assert main(["evaluate", "copy/run", "--samples", "1"]) == 0
    shutil.move("copy/photos", "elsewhere")
    (run / "photos").rename(run / "gone")
    try:
        assert main(["sample", "copy/run", "--count", "2"]) == 0
        with np.load("copy/run/sample.npz") as file:
            assert file["mean"].shape == (2, 8, 8, 3)
        assert "(data that moved are named by --data.path)" in fails(capsys, "evaluate", "copy/run")
        assert main(["evaluate", "copy/run", "--samples", "1", "--data.path", "elsewhere"]) == 0
        more = ["--train.steps", "4", "--data.path", "elsewhere"]
        assert main(["train", "--resume", "copy/run", *more]) == 0
    finally:
        (run / "gone").rename(run / "photos")
    assert load_config("copy/run/config.yaml").data.path == str(folder / "elsewhere")
    assert train("images", str(run / "photos"), "straight", "--train.steps", "4") == 0
    ends = [[e["elbo"] for e in read_log(f"{r}/metrics.jsonl") if e["step"] == 4] for r in ("copy/run", "straight")]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    "change", [{"coords": np.random.default_rng(1).random((64, 2))}, {"coords": cloud()["coords"] * 2}]
)
def test_other_coordinates_are_noticed(capsys: pytest.CaptureFixture[str], change: dict[str, Any]) -> None:
    np.savez("a.npz", **cloud())
    assert train("arrays", "a.npz", "run") == 0
    np.savez("a.npz", **cloud(**change))
    assert "coordinates: " in fails(capsys, "evaluate", "run")
    assert "coordinates: " in fails(capsys, "train", "--resume", "run", "--train.steps", "4")


def test_a_function_with_too_few_points_is_named_before_the_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    mask = np.ones((20, 64), bool)
    mask[7, 5:] = False
    np.savez("few.npz", **cloud(mask=mask))
    assert train("arrays", "few.npz", "run", "--model.centroids", "points") == 2
    wanted = "the 8 points that the encoder needs observed in every function, got 5 in function 7"
    assert wanted in capsys.readouterr().err
    assert not Path("run").exists()


def test_random_points_leave_every_function_enough() -> None:
    mask = np.random.default_rng(0).random((20, 64)) < 0.3
    mask[:, :8] = True
    np.savez("some.npz", **cloud(mask=mask))
    assert train("arrays", "some.npz", "run", "--train.num_points", "9", "--train.steps", "40") == 0


def test_points_that_no_function_observes_do_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("half.npz", **cloud(mask=np.arange(64) < 30))
    assert train("arrays", "half.npz", "run", "--model.centroids", "points", "--train.num_points", "40") == 2
    assert "train.num_points must be from 8 (what the encoder needs) to 30" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [pytest.param((10, 1, 28), marks=pytest.mark.slow), (10, 28, 1)])
def test_signals_are_trained_and_drawn(shape: tuple[int, ...]) -> None:
    np.save("signals.npy", np.random.default_rng(0).random(shape).astype(np.float32))
    assert train("arrays", "signals.npy", "run") == 0
    for name in ("samples.png", "strip.png", "evaluation.json"):
        assert Path("run", name).exists()


def test_a_file_of_splits_is_used_and_kept_with_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    photographs("photos")
    names = [f"{i:02d}.png" for i in range(10)]
    Path("splits.json").write_text(json.dumps({"train": names[:6], "test": [7, "08.png"]}))
    data = open_dataset("images", "photos", splits="splits.json")
    assert {k: v.tolist() for k, v in data.splits.items()} == {"train": [*range(6)], "validation": [], "test": [7, 8]}
    assert train("images", "photos", "run", "--data.splits", "splits.json") == 0
    assert json.loads(Path("run/evaluation.json").read_text())["functions"] == 2
    Path("splits.json").write_text(json.dumps({"train": names[:6], "test": [8, "07.png"]}))
    assert "checksum: " in fails(capsys, "evaluate", "run")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": [0, 1], "test": [1]}, "1 must be in one split, got it in train and test"),
        ({"train": [0, 10]}, "train must hold indices from 0 to 9 or names of its files of images, got 10"),
        ({"train": ["x.png"]}, "got 'x.png'"),
        ({"test": [0]}, "must hold train and maybe validation and test, got test"),
        ({"train": [0], "dev": [1]}, "got train, dev"),
        ({"train": []}, "train must name at least one function, got none"),
        ({"train": 3}, "train must be a list of indices or file names, got int"),
        ([0], "got list"),
    ],
)
def test_wrong_splits(content: Any, message: str) -> None:
    photographs("photos")
    Path("splits.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        open_dataset("images", "photos", splits="splits.json")
    assert str(error.value).startswith("splits.json: ") and message in str(error.value)


def test_folders_of_splits_are_used() -> None:
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        photographs("photos", 0)
        photographs(f"photos/{split}", count, seed=count)
    data = open_dataset("images", "photos")
    assert {name: len(index) for name, index in data.splits.items()} == {"train": 4, "validation": 2, "test": 3}
    first = np.asarray(Image.open("photos/val/01.png")).reshape(-1, 3)
    assert np.array_equal(data.values[data.splits["validation"][1]], first)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("photos/extra.png")
    with pytest.raises(ValueError, match=r"no images beside the folders train, validation and test, got extra\.png"):
        open_dataset("images", "photos")


def test_a_folder_called_train_alone_is_a_folder() -> None:
    photographs("photos", 0)
    photographs("photos/train", 10)
    splits = open_dataset("images", "photos").splits
    assert all(torch.equal(splits[name], index) for name, index in random_splits("images", 10).items())


@pytest.mark.slow
def test_data_that_stay_in_their_file_train_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    np.save("a.npy", np.random.default_rng(0).random((30, 6, 7)).astype(np.float32))

    def losses(run: str) -> list[tuple[str, float]]:
        return [(entry["split"], entry["elbo"]) for entry in read_log(f"{run}/metrics.jsonl")]

    assert train("arrays", "a.npy", "held", "--train.steps", "6", "--train.log_every", "1") == 0
    monkeypatch.setattr(source, "memory_share", lambda: 1000)
    assert isinstance(open_dataset("arrays", "a.npy").values, source.Source)
    assert train("arrays", "a.npy", "read", "--train.steps", "3", "--train.log_every", "1") == 0
    assert main(["train", "--resume", "read", "--train.steps", "5"]) == 0
    monkeypatch.setattr(source, "memory_share", lambda: 10**6)
    assert main(["train", "--resume", "read", "--train.steps", "6"]) == 0
    assert [e for e in losses("read") if e[0] == "train"] == [e for e in losses("held") if e[0] == "train"]
