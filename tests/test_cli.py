"""The command line, run in this process on tiny runs of image, sphere and voxel data."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

pytest.importorskip("tyro", reason="the command line needs tyro")

from vamoh import PointSet, VaMoH, commands, load
from vamoh.cli import COMMANDS, main
from vamoh.config import PRESETS, load_config
from vamoh.masks import completion_mask
from vamoh.prior import load_prior
from vamoh.train import TrainingInterrupted

TINY = shlex.split("""
    --model.latent_dim 3 --model.components 2 --model.frequencies 4 --model.encoder_centroids 16 4
    --model.encoder_neighbors 4 4 --model.encoder_channels 4 4 --model.weight_net 4 --model.flow_layers 2
    --model.hypernet_widths 6 --model.inr_widths 5 --model.gating_widths 6 --model.pool_centroids --model.pool_neighbors
    --train.steps 3 --train.batch_size 4 --train.log_every 1 --train.evaluate_every 2 --train.flow_warmup 0
""")
TRAINED = {"config.yaml", "metrics.jsonl", "environment.json", "checkpoint"}
"""What training leaves in a run folder."""
SHAPES = {"image": (8, 9), "sphere": (46, 90), "voxels": (6, 6, 6)}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def tiny_train(kind: str, folder: Path, *more: str) -> int:
    generator = np.random.default_rng(0)
    if kind == "sphere":
        source = ["climate", "--train.num_points", "100"]
    else:
        grids = generator.random((20, *SHAPES[kind]))
        likelihood = "bernoulli" if kind == "voxels" else "logistic"
        np.save(folder / "data.npy", grids > 0.5 if kind == "voxels" else (grids * 255).astype(np.uint8))
        source = ["digits", "--data.name", "arrays", "--data.path", str(folder / "data.npy")]
        source += ["--model.likelihood", likelihood]
    return main(["train", *source, *TINY, "--out", str(folder / "run"), *more])


@pytest.fixture(scope="module", params=["image", "sphere", pytest.param("voxels", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Kind and folder of a run that `vamoh train` has made."""
    folder = tmp_path_factory.mktemp(request.param)
    assert tiny_train(request.param, folder) == 0
    return request.param, folder / "run"


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image")
    assert tiny_train("image", folder) == 0
    return folder / "run"


def assert_picture(path: Path) -> None:
    with Image.open(path) as image:
        picture = np.asarray(image.convert("RGB"))
    assert min(picture.shape[:2]) >= 120
    assert picture.std() > 2


def fails(capsys: pytest.CaptureFixture[str], *args: str, status: int = 2) -> str:
    """Run a command that must fail; return its one line on stderr."""
    capsys.readouterr()
    assert main(list(args)) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_train_writes_figures_and_an_evaluation(run: tuple[str, Path]) -> None:
    kind, folder = run
    for name in ("samples.png", "strip.png", "losses.png"):
        assert_picture(folder / name)
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["split"] == "test"
    assert np.isfinite([result["psnr"], result["bits_per_dim"], result["elbo"], result["completion_psnr"]]).all()
    assert ("iou" in result) == (kind == "voxels")
    assert (result.get("unit") == "K") == (kind == "sphere")


@pytest.mark.parametrize(
    "command, arrays",
    [
        ("reconstruct --count 3", {"input", "mean", "mean_map", "pi", "psnr", "index"}),
        ("superres --count 3 --scale 2", {"input", "mean", "mean_map", "index"}),
        (
            "complete --count 3 --mask half",
            {"input", "observed", "mean", "mean_map", "completed", "psnr_missing", "index"},
        ),
        ("segment --count 3", {"input", "pi", "segmentation", "entropy", "index"}),
        ("sample --count 3", {"z", "mean", "mean_map", "segmentation", "entropy"}),
    ],
)
def test_commands_write_a_figure_and_its_arrays(
    run: tuple[str, Path], tmp_path: Path, command: str, arrays: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    kind, folder = run
    name, *options = command.split()
    split = [] if name == "sample" else ["--split", "train"]
    assert main([name, str(folder), *options, *split, "--out", str(tmp_path / "new")]) == 0
    shown = capsys.readouterr().out
    assert f"wrote {tmp_path / 'new' / name}.png" in shown and f"{name}.npz" in shown
    assert_picture(tmp_path / "new" / f"{name}.png")
    with np.load(tmp_path / "new" / f"{name}.npz") as file:
        assert set(file) == arrays
        shape = SHAPES[kind]
        if name == "superres":
            shape = (91, 180) if kind == "sphere" else tuple(2 * n - 1 for n in shape)
        assert file["mean" if "mean" in arrays else "input"].shape == (3, *shape, 1)
        assert all(np.isfinite(file[key]).all() for key in file)
        if "pi" in arrays:
            assert file["pi"].shape == (3, *shape, 2)
            assert file["pi"].sum(-1) == pytest.approx(1, abs=1e-5)


def test_reconstruct_takes_data_by_position(image_run: Path, tmp_path: Path) -> None:
    assert main(["reconstruct", str(image_run), "--split", "train", "--index", "5", "2", "--out", str(tmp_path)]) == 0
    config = load_config(image_run / "config.yaml")
    data = np.load(str(config.data.path))
    with np.load(tmp_path / "reconstruct.npz") as file:
        assert file["input"][..., 0] * 255 == pytest.approx(data[file["index"]].astype(float), abs=1e-3)
        train = commands.open_run(image_run, "cpu", 0).dataset.splits["train"]
        assert file["index"].tolist() == train[[5, 2]].tolist()


def test_complete_takes_a_mask_from_a_file(image_run: Path, tmp_path: Path) -> None:
    mask = np.zeros((8, 9), dtype=bool)
    mask[:6] = True
    np.save(tmp_path / "mask.npy", mask)
    assert main(["complete", str(image_run), "--mask", str(tmp_path / "mask.npy"), "--out", str(tmp_path)]) == 0
    with np.load(tmp_path / "complete.npz") as file:
        assert (file["observed"] == mask).all()
        assert np.array_equal(file["completed"][:, :6], file["input"][:, :6])
        assert np.array_equal(file["completed"][:, 6:], file["mean"][:, 6:])
        assert not np.array_equal(file["mean"][:, :6], file["input"][:, :6])


def test_complete_draws_a_mask_of_a_mixture_for_each_function(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    np.save(tmp_path / "data.npy", (generator.random((20, 10, 10)) * 255).astype(np.uint8))
    source = ["digits", "--data.name", "arrays", "--data.path", str(tmp_path / "data.npy")]
    run = str(tmp_path / "run")
    assert main(["train", *source, *TINY, "--out", run]) == 0
    options = ["--split", "train", "--count", "4", "--mask", "posterior-matching-mnist"]
    assert main(["complete", run, *options, "--out", str(tmp_path)]) == 0
    expected = completion_mask("posterior-matching-mnist", (10, 10), count=4).numpy()
    with np.load(tmp_path / "complete.npz") as file:
        assert np.array_equal(file["observed"], expected)
    assert (expected[0] != expected[1]).any()


def test_complete_draws_several(image_run: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        arguments = ["complete", str(image_run), "--mask", "half", "--count", "2", "--draws", "3", "--out"]
        assert main([*arguments, str(tmp_path / out)]) == 0
    assert main(["complete", str(image_run), "--mask", "half", "--count", "2", "--out", str(tmp_path / "c")]) == 0
    with np.load(tmp_path / "a" / "complete.npz") as file:
        drawn, observed = file["draws"], file["observed"]
        assert drawn.shape == (2, 3, 8, 9, file["input"].shape[-1])
        assert np.array_equal(drawn[:, 0][observed], file["input"][observed])
        assert (drawn.std(1)[~observed] > 0).all()
        np.testing.assert_allclose(file["spread"], drawn.std(1, ddof=1), atol=1e-6)
        with np.load(tmp_path / "b" / "complete.npz") as again:
            assert np.array_equal(again["draws"], drawn)
    with Image.open(tmp_path / "a" / "complete.png") as wide, Image.open(tmp_path / "c" / "complete.png") as narrow:
        assert wide.width > 1.5 * narrow.width  # three draws and their spread beside the other three columns


def test_sampling_follows_the_seed(image_run: Path, tmp_path: Path) -> None:
    means = []
    for i, seed in enumerate(("1", "1", "2")):
        assert main(["sample", str(image_run), "--count", "2", "--seed", seed, "--out", str(tmp_path / str(i))]) == 0
        with np.load(tmp_path / str(i) / "sample.npz") as file:
            means.append(file["z"])
    assert np.array_equal(means[0], means[1]) and not np.array_equal(means[0], means[2])


def test_samples_come_from_a_second_prior_once_it_is_fitted(
    image_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(image_run, run)

    def drawn(*options: str) -> tuple[str, Any]:
        assert main(["sample", str(run), "--count", "2", "--out", str(tmp_path), *options]) == 0
        with np.load(tmp_path / "sample.npz") as file:
            return capsys.readouterr().out.splitlines()[0], file["z"]

    assert "prior.safetensors" in fails(capsys, "sample", str(run), "--prior", "second")
    own = drawn()
    assert own[0] == "drawn from the model's own prior"
    assert main(["fit-prior", str(run), "--kind", "coupling", "--steps", "2"]) == 0
    assert f"wrote {run / 'prior.safetensors'}" in capsys.readouterr().out
    second = drawn()
    assert second[0] == "drawn from the second-stage prior, coupling"
    assert np.array_equal(drawn("--prior", "second")[1], second[1])
    first = drawn("--prior", "first")
    assert first[0] == own[0] and np.array_equal(first[1], own[1]) and not np.array_equal(own[1], second[1])
    model = load(run)
    expected = load_prior(run, model).sample(2, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(second[1], expected.numpy())
    assert main(["train", "--resume", str(run), "--train.steps", "4"]) == 0
    assert "fit it again" in fails(capsys, "sample", str(run), "--out", str(tmp_path))
    assert drawn("--prior", "first")[0] == own[0]


def test_evaluate_prints_a_table_and_writes_json(
    image_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--samples", "2", "--count", "1", "--mask", "random:0.5", "--split", "validation"]
    assert main(["evaluate", str(image_run), *options, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert (result["split"], result["functions"], result["importance_samples"]) == ("validation", 1, 2)
    for words in (f"{result['psnr']:.4g} dB", "bits per dimension", "completion PSNR (random:0.5)", "ELBO"):
        assert words in shown


def test_export_writes_a_program(
    image_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "program.pt2"
    arguments = ["export", str(image_run), "--part", "encoder", "--out", str(path)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"wrote {path}\n"
    model = commands.open_run(image_run, "cpu", 0).model
    points = PointSet(torch.rand(3, 40, 2), torch.rand(3, 40, 1))
    mean, _ = torch.export.load(path).module()(points.coords, points.values)
    torch.testing.assert_close(mean, model.encode(points).mean)
    assert f"{path} exists" in fails(capsys, *arguments)
    assert "got 'encoder'" in fails(capsys, *arguments, "--format", "onnx")
    assert "no checkpoint in" in fails(capsys, "export", str(tmp_path / "none")) and not (tmp_path / "none").exists()
    monkeypatch.setattr(commands, "export_model", lambda model, path, **options: path)
    assert main(["export", str(image_run), "--format", "onnx"]) == 0
    assert capsys.readouterr().out == f"wrote {image_run / 'decoder.onnx'}\n"


@pytest.mark.slow
def test_resume_continues_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny_train("image", tmp_path) == 0
    folder = tmp_path / "run"
    assert main(["train", "--resume", str(folder), "--train.steps", "5"]) == 0
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 5
    assert tiny_train("image", tmp_path, "--resume", "--train.steps", "6") == 0
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6
    assert "is in use" in fails(capsys, "train", str(folder / "config.yaml"), "--out", str(folder))


def test_overrides_reach_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(commands, "train", lambda **options: seen.append(options) or "done")
    arguments = "--out a --device cpu digits --seed 3 --model.components 7 --model.learn_scale False --data.size 9"
    assert main(["train", *arguments.split(), "--train.beta_z.schedule", "linear", "--train.threads", "2"]) == 0
    options = seen[0]
    config = options["config"]
    assert (options["source"], options["out"], options["resume"]) == ("digits", Path("a"), False)
    assert (config.preset, config.seed, config.data.name, config.data.size) == ("digits", 3, "digits", 9)
    assert (config.model.components, config.model.learn_scale) == (7, False)
    assert (config.train.beta_z.schedule, config.train.threads) == ("linear", 2)
    assert config.model.hypernet_widths == PRESETS["digits"].model.hypernet_widths


def test_switches_are_spelled_as_in_yaml_or_python(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(commands, "train", lambda **options: seen.append(options) or "done")
    for line in ("--model.learn_scale false", "--model.learn-scale=false", "--model.learn_scale=False"):
        assert main(["train", "digits", *line.split(), "--model.open_ends", "true", "--data.path", "true"]) == 0
        config = seen.pop()["config"]
        assert (config.model.learn_scale, config.model.open_ends, config.data.path) == (False, True, "true")


@pytest.mark.parametrize(
    "line, out, resume",
    [
        ("digits --resume --out a", "a", True),
        ("--resume --out a digits", "a", True),
        ("--resume runs/b digits", "runs/b", True),
        ("--seed=2 digits", None, False),
        ("digits --resume=a --out=a", "a", True),
    ],
)
def test_resume_takes_a_folder_or_the_default(
    line: str, out: str | None, resume: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(commands, "train", lambda **options: seen.append(options) or "done")
    assert main(["train", *line.split()]) == 0
    assert (seen[0]["out"], seen[0]["resume"]) == (None if out is None else Path(out), resume)


def test_default_run_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert commands._run_folder("digits", False) == Path("runs/digits")
    Path("runs/digits").mkdir(parents=True)
    assert commands._run_folder("digits", False) == Path("runs/digits-2")
    Path("runs/digits-2").mkdir()
    assert commands._run_folder("some/digits.yaml", False) == Path("runs/digits-3")
    assert commands._run_folder("digits", True) == Path("runs/digits-2")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    wanted = {
        "info": [],
        "export": ["--out", "--part", "--format"],
        "convert": ["--out", "--config", "--to-reference"],
        "fit-prior": ["--kind", "--steps", "--device", "--seed"],
    }.get(name, ["--out", "--device", "--seed"])
    wanted += [] if name in ("info", "train") else ["RUN"]
    wanted += {"superres": ["--scale"], "complete": ["--mask", "random:RATE"], "sample": ["--count"]}.get(name, [])
    assert all(word in shown for word in wanted)


def test_help_of_a_preset_lists_every_override_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "era5", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    config = PRESETS["era5"]
    for section in ("data", "model", "train"):
        for name in vars(getattr(config, section)):
            assert f"--{section}.{name}" in shown
    assert "continuous_bernoulli)" in shown and f"(default: {config.train.steps})" in shown
    assert "--preset" not in shown


def test_main_help_lists_the_commands_without_loading_torch() -> None:
    code = (
        "import sys; from vamoh.cli import main; status = main(['--help']); sys.exit(status or 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in COMMANDS)


def test_info_reports_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for words in (torch.__version__, "threads", "device", "knn", "reference", "native module"):
        assert words in shown


def test_mistakes_are_one_line_and_status_two(
    image_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(image_run)
    assert "did you mean 'digits'?" in fails(capsys, "train", "digit")
    assert "first argument must be a preset" in fails(capsys, "train")
    assert "first argument must be a preset" in fails(capsys, "train", "--model.components", "3", "digits")
    assert "no configuration file" in fails(capsys, "train", str(tmp_path / "none.yaml"))
    assert "no configuration file" in fails(capsys, "train", "--resume", str(tmp_path / "none"))
    assert "--out must be left out or name the resumed run" in fails(capsys, "train", "--resume", run, "--out", "a")
    assert f"no run in {tmp_path}" in fails(capsys, "sample", str(tmp_path))
    assert "split must be one of" in fails(capsys, "segment", run, "--split", "tset")
    assert "index must lie from 0 to" in fails(capsys, "reconstruct", run, "--index", "99")
    assert "count must be at least 1, got 0" in fails(capsys, "sample", run, "--count", "0")
    assert "scale must be at least 1, got 0" in fails(capsys, "superres", run, "--scale", "0")
    assert "did you mean 'patch'?" in fails(capsys, "complete", run, "--mask", "pach")
    assert "between 0 and 1, got 'random:2'" in fails(capsys, "complete", run, "--mask", "random:2")
    assert "samples must be at least 1" in fails(capsys, "evaluate", run, "--samples", "0")
    assert "seed must be between 0 and 2^63 - 1, got -1" in fails(capsys, "sample", run, "--seed", "-1")
    assert "'abacus'" in fails(capsys, "sample", run, "--device", "abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_device_is_explained(image_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["sample", str(image_run)], ["train", "digits", "--out", str(image_run.parent / "other")]):
        assert "device must be one this machine has, got 'cuda'" in fails(capsys, *command, "--device", "cuda")


MISTAKES = {
    "": "Expected one of {train, reconstruct, .*}.; see vamoh --help",
    "trian": "Unrecognized options: trian; available subcommands: train, .*; see vamoh --help",
    "sample": "Missing from vamoh sample: RUN run folder, as vamoh train writes it .required.; see vamoh sample --help",
    "sample run --cuont 3": "Unrecognized options: --cuont, 3; did you mean --count.; see vamoh sample --help",
    "sample run --count x": "--count: invalid literal for int.. with base 10: 'x'; see vamoh sample --help",
    "train digits --model.componentz 3": "Unrecognized options: .*; did you mean --model.components.; see .* --help",
    "train digits --model.components 0": "model: config: model.components must be at least 1, got 0; see .* --help",
    "train digits --train.lr inf": "train: config: train.lr must be a number, finite and below .*, got inf; see .*",
    "train digits --train.threads 20000": "train: config: train.threads must be at most 1024, got 20000; see .*",
    "train digits --out o --model.latent-dim 1000000000": "VaMoH: the parameters would take .* bytes .* of memory, .*",
    "export run --part core": "invalid choice 'core' for argument '--part'. Expected one of .*; see .* --help",
    "sample a\udcff": r"vamoh: run must be a path in UTF-8 without NUL, got 'a\\udcff'",
}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("args", MISTAKES)
def test_mistakes_in_options_are_one_line(args: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the boxes that a terminal may show."""
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(said, encoding=encoding, errors="backslashreplace"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert main(args.split()) == 2
    sys.stderr.flush()
    assert re.fullmatch(f"vamoh: error: {MISTAKES[args]}\n", said.getvalue().decode(encoding))


def test_requests_that_no_memory_holds_are_refused(image_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is allocated, with the bytes that they would take."""
    run = str(image_run)
    words = r"2 functions at 224000030000001 points would take \d{16} bytes \(.* GB\) of memory, this machine has"
    assert re.search(words, fails(capsys, "superres", run, "--scale", "2000000"))
    assert re.search(r"would take \d{20,} bytes", fails(capsys, "sample", run, "--count", f"{10**18}"))
    assert "count must be below 2^63" in fails(capsys, "sample", run, "--count", f"{10**30}")


def test_memory_that_runs_out_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def info(given: object) -> str:
        raise MemoryError

    monkeypatch.setattr(commands, "info", info)
    assert fails(capsys, "info", status=1) == "vamoh: error: not enough memory"


def test_the_traceback_comes_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["sample", str(tmp_path), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("VAMOH_DEBUG", "1")
    assert main(["sample", str(tmp_path)]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_ends_of_training_have_their_own_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(error: Exception) -> None:
        def train(**options: object) -> str:
            raise error

        monkeypatch.setattr(commands, "train", train)

    end(TrainingInterrupted(signal.SIGTERM, 5, Path("runs/a")))
    line = fails(capsys, "train", "digits", status=128 + 15)
    assert "vamoh train --resume runs/a" in line and "error" not in line
    end(RuntimeError("kl_z became\nNaN"))
    assert fails(capsys, "train", "digits", status=1) == "vamoh: error: kl_z became NaN"


def test_bare_points_have_no_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    np.savez(
        tmp_path / "points.npz",
        coords=generator.random((20, 30, 2), dtype=np.float32),
        values=generator.random((20, 30, 1), dtype=np.float32),
    )
    run = tmp_path / "run"
    source = ["digits", "--data.name", "arrays", "--data.path", str(tmp_path / "points.npz")]
    assert main(["train", *source, *TINY, "--out", str(run)]) == 0
    assert (run / "evaluation.json").is_file() and not (run / "strip.png").exists()
    assert "bare points" in fails(capsys, "reconstruct", str(run))
    (tmp_path / "points.npz").unlink()  # a file of one's own needs no data
    coords, values = generator.random((40, 2)), generator.random((40, 1))
    np.savez(tmp_path / "mine.npz", coords=coords, values=values, mask=np.arange(40) % 4 > 0)
    assert main(["complete", str(run), str(tmp_path / "mine.npz"), "--out", str(tmp_path)]) == 0
    with np.load(tmp_path / "mine-complete.npz") as file:
        kept = np.arange(40) % 4 > 0
        np.testing.assert_allclose(file["completed"][0][kept], values[kept], rtol=1e-6)
        assert np.isfinite(file["completed"]).all() and not np.allclose(file["completed"][0][~kept], values[~kept])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_output_on_any_terminal(
    image_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """Help of every command, and a folder whose name the terminal cannot show."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    for words in (["--help"], *([command, "--help"] for command in COMMANDS)):
        assert main(words) == 0
    out = tmp_path / "l\u00e4ufe-\u2192"
    assert main(["sample", str(image_run), "--count", "2", "--out", str(out)]) == 0
    assert main(["evaluate", str(image_run), "--count", "2", "--samples", "2", "--out", str(out)]) == 0
    sys.stdout.flush()
    text = written.getvalue().decode(encoding)
    assert "draw new functions from the trained model" in text and "vamoh complete" in text
    assert str(out / "sample.npz").encode(encoding, errors="replace") in written.getvalue()
    assert (out / "evaluation.json").is_file()


@pytest.mark.parametrize("moment", ["half a figure", pytest.param("the evaluation", marks=pytest.mark.slow)])
def test_ctrl_c_after_training(
    moment: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """130, and what is there is whole."""
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, own))
    savefig, calls = Figure.savefig, iter(range(9))

    def interrupted(self: Figure, file: io.BytesIO, **options: Any) -> None:
        if next(calls) == 1:
            file.write(b"\x89PNG")
            signal.raise_signal(signal.SIGINT)
        savefig(self, file, **options)

    def evaluation(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    if moment == "half a figure":
        monkeypatch.setattr(Figure, "savefig", interrupted)
    else:
        monkeypatch.setattr(commands, "evaluate_model", evaluation)
    assert tiny_train("image", tmp_path) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "vamoh: interrupted"
    pictures = {"samples.png"} if moment == "half a figure" else {"samples.png", "strip.png", "losses.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {*TRAINED, *pictures}
    for name in pictures:
        assert_picture(tmp_path / "run" / name)
    assert load(tmp_path / "run").latent_dim == 3


def test_help_in_the_c_locale() -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-m", "vamoh", "--help"]
    done = subprocess.run(words, env=os.environ | plain, capture_output=True)
    assert done.returncode == 0 and not done.stderr and b"vamoh train digits" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
@pytest.mark.parametrize("command", ["info", "--help"])
def test_output_that_nobody_reads(command: str) -> None:
    """The reader has gone: no word, and the status of a tool that SIGPIPE ends."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "vamoh", command], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk")
def test_output_that_finds_no_space() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "vamoh", "info"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert re.fullmatch(rb"vamoh: error: [^\n]*No space left on device\)?\n", done.stderr), done.stderr


def test_many_samples_are_drawn_in_batches(
    image_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sample(name: str) -> dict[str, np.ndarray]:
        assert main(["sample", str(image_run), "--count", "11", "--out", str(tmp_path / name)]) == 0
        with np.load(tmp_path / name / "sample.npz") as file:
            return dict(file)

    sizes: list[int] = []
    decode, drawn = VaMoH.decode, commands.figures.write_samples
    monkeypatch.setattr(VaMoH, "decode", lambda m, z, *a, **k: (sizes.append(len(z)), decode(m, z, *a, **k))[1])
    whole = sample("whole")
    assert "the figure shows" not in capsys.readouterr().out
    monkeypatch.setattr(commands, "BATCH_POINTS", 4 * 72)
    monkeypatch.setattr(commands, "DRAWN_SAMPLES", 5)
    shown: list[int] = []
    monkeypatch.setattr(
        commands.figures, "write_samples", lambda path, s, look: (shown.append(len(s)), drawn(path, s, look))[1]
    )
    parts = sample("parts")
    assert sizes == [11, 4, 4, 3] and shown == [5]
    assert "the figure shows 5 of 11" in capsys.readouterr().out
    assert set(parts) == set(whole) and all(np.allclose(parts[k], whole[k], rtol=1e-5, atol=1e-6) for k in whole)

    def full(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(commands.figures, "write_samples", full)
    assert main(["sample", str(image_run), "--count", "2", "--out", str(tmp_path / "kept")]) == 2
    with np.load(tmp_path / "kept" / "sample.npz") as file:
        assert len(file["mean"]) == 2


@pytest.mark.parametrize("command", ["reconstruct", "superres", "complete", "segment"])
def test_many_functions_go_in_batches(
    image_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    def run(name: str) -> dict[str, np.ndarray]:
        assert main([command, str(image_run), "--split", "train", "--count", "7", "--out", str(tmp_path / name)]) == 0
        with np.load(tmp_path / name / f"{command}.npz") as file:
            return dict(file)

    whole = run("whole")
    sizes: list[int] = []
    encode = VaMoH.encode
    monkeypatch.setattr(VaMoH, "encode", lambda m, p, **k: (sizes.append(p.batch), encode(m, p, **k))[1])
    monkeypatch.setattr(commands, "BATCH_POINTS", 3 * (29 * 33 if command == "superres" else 72))
    monkeypatch.setattr(commands, "DRAWN_ROWS", 2)
    capsys.readouterr()
    parts = run("parts")
    assert sizes == [3, 3, 1] and "the figure shows 2 of 7" in capsys.readouterr().out
    assert set(parts) == set(whole) and len(parts["index"]) == 7
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-4, atol=1e-5)
    with (
        Image.open(tmp_path / "parts" / f"{command}.png") as few,
        Image.open(tmp_path / "whole" / f"{command}.png") as all_,
    ):
        assert few.height < all_.height


def test_files_that_were_never_in_the_data(image_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (13, 11, 2), dtype=np.uint8)
    pixels[..., 1] = 255
    pixels[2:6, 3:8, 1] = 0
    picture = str(tmp_path / "scan.png")
    Image.fromarray(pixels, "LA").save(picture)
    out = tmp_path / "out"
    for command, shape in (
        ("complete", (13, 11)),
        ("reconstruct", (13, 11)),
        ("superres", (49, 41)),
        ("segment", (13, 11)),
    ):
        assert main([command, str(image_run), picture, "--out", str(out)]) == 0
        assert f"wrote {out / f'scan-{command}.npz'}" in capsys.readouterr().out
        with Image.open(out / f"scan-{command}.png") as image:
            assert (image.height, image.width) == shape
    seen = pixels[..., 1] > 0
    completed = np.asarray(Image.open(out / "scan-complete.png"))
    assert np.array_equal(completed[seen], pixels[..., 0][seen])
    model = load(image_run)
    with np.load(out / "scan-complete.npz") as file:
        points = PointSet(
            torch.from_numpy(file["coords"]), torch.from_numpy(pixels[..., :1].reshape(1, -1, 1) / np.float32(255))
        )
        points = points.with_mask(torch.from_numpy(seen.reshape(1, -1)))
        torch.testing.assert_close(torch.from_numpy(file["completed"]).view(1, -1, 1), model.complete(points))
        assert file["completed"].shape == (1, 13, 11, 1) and np.array_equal(file["observed"][0], seen)
    levels = np.rint(np.load(out / "scan-complete.npz")["completed"][0, ..., 0] * 255)
    assert np.array_equal(completed, levels)
    np.save(tmp_path / "whole.npy", pixels[..., 0])
    whole = str(tmp_path / "whole.npy")
    assert "whole.npy must miss something, or --mask must hide it" in fails(capsys, "complete", str(image_run), whole)
    options = ["--mask", "half", "--draws", "3", "--out", str(out)]
    assert main(["complete", str(image_run), whole, picture, *options]) == 0
    with np.load(out / "whole-complete.npz") as file:
        assert file["draws"].shape == (1, 3, 13, 11, 1) and file["spread"].shape == (1, 13, 11, 1)
        assert not file["spread"][:, :, :5].any() and file["spread"][:, :, 5:].all()
    assert np.array_equal(np.load(out / "whole-complete.npy")[:, :5], (pixels[:, :5, 0] / 255).astype(np.float32))
    assert "must differ in name" in fails(capsys, "segment", str(image_run), whole, whole)
    np.save(tmp_path / "few.npy", np.full((1, 2), np.nan))
    assert "few.npy must have the 1 observed" in fails(capsys, "reconstruct", str(image_run), str(tmp_path / "few.npy"))


def test_fields_and_solids_that_were_never_in_the_data(run: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = run
    if kind == "image":
        return
    if kind == "voxels":
        np.save(tmp_path / "mine.npy", np.random.default_rng(0).random((5, 7, 6)) < 0.5)
    else:
        kelvin = np.random.default_rng(0).uniform(250, 300, (1, 9, 12))
        with pytest.importorskip("netCDF4").Dataset(tmp_path / "mine.nc", "w") as file:
            for name, axis in (("lat", np.linspace(30, 60, 9)), ("lon", np.linspace(0, 40, 12))):
                file.createDimension(name, len(axis))
                file.createVariable(name, "f8", (name,))[:] = axis
            file.createDimension("time", 1)
            variable = file.createVariable("t", "f4", ("time", "lat", "lon"), fill_value=-1.0)
            variable.units, variable[:] = "K", kelvin
            variable[0, 3:6, 4:8] = -1.0
    source = str(tmp_path / ("mine.npy" if kind == "voxels" else "mine.nc"))
    for command in ("complete", "superres", "segment"):
        extra = ["--mask", "patch"] if command == "complete" and kind == "voxels" else []
        extra += ["--scale", "2"] if command == "superres" else []
        assert main([command, str(folder), source, "--out", str(tmp_path), *extra]) == 0
        assert (tmp_path / f"mine-{command}.npz").is_file()
    if kind == "voxels":
        assert (tmp_path / "mine-complete.obj").read_text().startswith("v ")
        assert not (tmp_path / "mine-segment.obj").exists()
        return
    netcdf = pytest.importorskip("netCDF4")
    with netcdf.Dataset(tmp_path / "mine-complete.nc") as file:
        found = np.asarray(file["value"])[0, ::-1]
    hidden = np.zeros((9, 12), bool)
    hidden[3:6, 4:8] = True
    np.testing.assert_allclose(found[~hidden], kelvin[0][~hidden], rtol=1e-5)
    assert ((found[hidden] > 150) & (found[hidden] < 350)).all()
    with netcdf.Dataset(tmp_path / "mine-superres.nc") as file:
        assert file["value"].shape == (1, 17, 23)
    with netcdf.Dataset(tmp_path / "mine-segment.nc") as file, np.load(tmp_path / "mine-segment.npz") as arrays:
        assert np.array_equal(np.asarray(file["value"]), arrays["segmentation"])
