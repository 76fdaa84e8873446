from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("tyro", reason="the command line needs tyro")

from vamoh import VaMoH, cli, commands, load_config, open_dataset
from vamoh.compat import config
from vamoh.compat.config import (
    DEFAULTS,
    IDLE,
    SOURCES,
    is_reference_config,
    load_reference_config,
    table,
    translate_config,
)
from vamoh.config import PRESETS, BetaConfig, save_config

Write = Callable[..., Path]


def given(path: Path) -> dict[str, Any]:
    """Keys and values of a file, read apart from the code under test."""
    found = {}
    for key, value in yaml.safe_load(path.read_text()).items():
        found.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    return found


def test_a_file_becomes_a_configuration(write: Write) -> None:
    theirs = load_reference_config(write(pool=(16, 4)))
    model, train = theirs.config.model, theirs.config.train
    assert (theirs.coord_dim, theirs.channels, theirs.device, theirs.config.seed) == (2, 3, "cpu", 3)
    assert theirs.config.data.name == "polymnist"
    assert (model.latent_dim, model.components, model.frequencies, model.frequency_scale) == (4, 3, 6, 2.0)
    assert (model.encoder_centroids, model.encoder_neighbors) == ((32, 16, 4), (7, 6, 5))
    assert (model.encoder_channels, model.weight_net) == ((5, 6, 7), (6, 5))
    assert (model.pool_centroids, model.pool_neighbors) == ((16,), (4,))
    assert (model.prior, model.flow_layers, model.gating_widths) == ("flow", 3, (9, 8))
    assert (model.hypernet_widths, model.inr_widths) == ((5, 10), (6, 6))
    assert (model.inr_activation, model.inr_slope) == ("leaky_relu", 0.1)
    assert (model.likelihood, model.learn_scale, model.max_scale) == ("logistic", False, 0.1)
    assert model.scale == pytest.approx(1 / (1 + math.e))
    assert (model.gating_bound, model.kl, model.kl_samples) == ("tanh", "cross_entropy", 4096)
    assert (model.initialization, model.weight_net_slope) == ("published", None)
    epoch = 8500 // 8
    assert (train.steps, train.evaluate_every, train.checkpoint_every) == (20 * epoch, 5 * epoch, 10 * epoch)
    assert (train.batch_size, train.lr, train.lr_decay, train.clip, train.weight_decay) == (8, 0.001, 1.0, 200.0, 0.0)
    assert (train.flow_warmup, train.gating_warmup, train.point_dropout) == (12.0, 10.0, 0.0)
    assert train.beta_z == train.beta_c == BetaConfig(value=1.0)
    assert (train.threads, train.num_points) == (1, None)


def test_every_key_of_a_file_is_accounted_for(write: Write) -> None:
    path = write()
    rows = load_reference_config(path).rows
    assert {row.key: row.value for row in rows} == given(path)
    text = table(rows)
    assert all(row.text in text and row.key in text for row in rows)
    assert {row.status for row in rows} == {"mapped", "without effect"}


def test_every_key_there_is_has_a_place(write: Write) -> None:
    everything = DEFAULTS | given(write())
    rows = {row.key: row for row in translate_config(everything).rows}
    assert set(rows) == set(DEFAULTS)
    assert {key for key, row in rows.items() if row.status == "without effect"} == set(IDLE)


def test_the_configuration_is_saved_in_our_format(write: Write, tmp_path: Path) -> None:
    config = load_reference_config(write(), ["train.clip", "0.0"]).config
    assert config.train.clip == math.inf
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert not is_reference_config(tmp_path / "config.yaml")


def test_a_wrong_indentation_is_corrected_and_reported(write: Write) -> None:
    path = write()
    whole = load_reference_config(path)
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  scenerio:"))
    lines[at] = " " + lines[at]
    write("\n".join(lines))
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(path.read_text())
    corrected = load_reference_config(path)
    assert corrected.config == whole.config
    assert [row.text for row in corrected.rows if row.status == "corrected"] == [
        f"line {at + 1}: indentation of scenerio corrected"
    ]


def test_a_file_beyond_repair_is_refused(write: Write) -> None:
    with pytest.raises(ValueError, match="not a YAML file"):
        load_reference_config(write("dataset: [1, 2"))
    with pytest.raises(ValueError, match="must hold keys and values"):
        load_reference_config(write("- dataset"))
    with pytest.raises(ValueError, match="dataset must be a section"):
        load_reference_config(write("dataset: 3"))
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml"):
        load_reference_config("nothing.yaml")


def test_overrides_win_and_read_python_values(write: Write) -> None:
    pairs = ["device", "cuda:0", "dataset.missing_perc", "0.3", "params_pointconvnet.mid_channels", "[4, 3]"]
    theirs = load_reference_config(write(), [*pairs, "optim.max_epoch", "2", "optim.base_lr", "1e-4", "seed", "7"])
    assert (theirs.device, theirs.config.seed, theirs.config.model.weight_net) == ("cuda:0", 7, (4, 3))
    train = theirs.config.train
    assert (train.point_dropout, train.lr, train.steps) == (0.3, 1e-4, 2 * (8500 // 8))


def test_the_text_none_is_nothing(write: Write) -> None:
    pairs = ["model.beta_z_scheduler", "None", "model.end_scheduler", "4", "model.start_scheduler", "0"]
    train = load_reference_config(write(), pairs).config.train
    assert train.beta_z == BetaConfig(value=1.0)
    assert train.beta_c == BetaConfig(value=1.0, schedule="linear", end=4.0)


@pytest.mark.parametrize("kind, ours", [("Linear", "linear"), ("Poly", "quadratic"), ("Exp", "exponential")])
def test_ramps(write: Write, kind: str, ours: Any) -> None:
    pairs = ["model.beta_c_scheduler", kind, "model.start_scheduler", "0", "model.end_scheduler", "5"]
    train = load_reference_config(write(), [*pairs, "model.beta_c", "0.5"]).config.train
    assert train.beta_c == BetaConfig(value=0.5, schedule=ours, end=5.0)
    with pytest.raises(
        ValueError, match="model.beta_z_scheduler must be one of Linear, Poly, Exp or None, got 'Cosine'"
    ):
        load_reference_config(write(), [*pairs, "model.beta_z_scheduler", "Cosine"])


def test_a_limit_on_batches_shortens_epochs(write: Write) -> None:
    pairs = ["dataset.use_number_batch", "2", "optim.use_scheduler", "True", "optim.gamma", "0.9"]
    theirs = load_reference_config(write(data="era5", likelihood="cb"), pairs)
    train, ours = theirs.config.train, 54 // 8
    assert theirs.steps_per_epoch == 2
    assert (train.steps, train.evaluate_every) == (40, 10)
    assert train.flow_warmup * ours == pytest.approx(12 * 2)
    assert train.gating_warmup * ours == pytest.approx(10 * 2)
    assert train.lr_decay ** (2 / ours) == pytest.approx(0.9)  # over one epoch of theirs


@pytest.mark.parametrize(
    "data, likelihood, name, dims",
    [
        ("voxels", "ber", "chairs", (3, 1)),
        ("era5", "cb", "climate", (3, 1)),
        ("shapes3d_10", "logistic", "shapes3d", (2, 3)),
        ("celebahq256", "logistic", "avatars", (2, 3)),
    ],
)
def test_data(write: Write, data: str, likelihood: str, name: str, dims: tuple[int, int]) -> None:
    theirs = load_reference_config(write(data=data, likelihood=likelihood), ["dataset.missing_perc", "1"])
    train = theirs.config.train
    assert (theirs.config.data.name, (theirs.coord_dim, theirs.channels)) == (name, dims)
    assert theirs.config.data.size == (64 if data == "celebahq256" else None)
    assert (train.num_points, train.point_dropout) == ((4096, 0.0) if data == "voxels" else (None, 0.9))


@pytest.mark.parametrize("name", ["PolyMNIST", "voxels", "era5"])
def test_sizes_of_the_data_are_those_of_the_data(name: str) -> None:
    data = open_dataset(SOURCES[name].name)
    assert SOURCES[name][1:] == (len(data.splits["train"]), data.coord_dim, data.channels)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("dataset.name", "MNIST", "must be 'PolyMNIST' or"),
        ("dataset.use_bn_initial", "True", "no such layer"),
        ("dataset.missing_perc", "2.0", "between 0 and 1"),
        ("dataset.missing_perc", "some", "must be a number"),
        ("dataset.nam", "x", "did you mean dataset.name"),
        ("train.epochs", "2", "unknown key train.epochs"),
        ("train.batch_size", "0", "at least 1"),
        ("train.batch_size", "2.5", "must be an int"),
        ("model.distr_x", "beta", "'logistic' or 'ber' or 'cb'"),
        ("model.distr_z", "mixture", "'nf' or 'normal'"),
        ("model.name_encoding", "None", "use_encoded_coors must be False"),
        ("model.encoder_type", "mlp", "'pointconv'"),
        ("model.scenerio", "[4, 5]", "4 and 6 alone"),
        ("model.scenerio_start", "[1, 0]", "start of training"),
        ("model.scenerio_end", "[12]", "one length"),
        ("model.cat_encoder_x", "True", "not built"),
        ("model.post_cat_has_z", "False", "True"),
        ("model.beta_c_scheduler", "3", "must be a string"),
        ("model.end_scheduler", "9", "divides by their difference"),
        ("params_nf.act", "tanh", "leaky_relu"),
        ("params_hyper.act", "relu", "lrelu_01"),
        ("params_fnrep.act", "selu", "'sinus'"),
        ("params_cat_post.layers", "[3]", "same widths"),
        ("params_cat_prior.dropout", "0.1", "no dropout"),
        ("params_pointconvnet.add_batchnorm", "True", "no batch normalisation"),
        ("params_pointconvnet.deterministic", "False", "first point"),
        ("params_pointconvnet.linear_layer_sizes", "[8]", "one linear layer"),
        ("params_pointconvnet.avg_pooling_num_neighbors", "[4]", "3 entries"),
        ("params_pointconvnet.avg_pooling_num_output_points", "['None', 16, 'None']", "None only after"),
        ("optim.optimizer", "sgd", "no other optimizer"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(write: Write, key: str, value: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load_reference_config(write(), [key, value])
    assert "theirs.yaml: " in str(caught.value)


def test_other_schedules_of_the_learning_rate_are_refused(write: Write) -> None:
    pairs = ["optim.use_scheduler", "True", "optim.scheduler", "cos"]
    with pytest.raises(ValueError, match="'exp' or 'none'"):
        load_reference_config(write(), pairs)


def test_activations_of_the_coordinate_networks(write: Write) -> None:
    model = load_reference_config(write(), ["params_fnrep.act", "sinus"]).config.model
    assert (model.inr_activation, model.inr_omega) == ("sine", 1.0)
    model = load_reference_config(write(), ["params_fnrep.act", "lrelu_025"]).config.model
    assert (model.inr_activation, model.inr_slope) == ("leaky_relu", 0.25)


def test_raw_coordinates(write: Write) -> None:
    pairs = ["model.name_encoding", "None", "params_pointconvnet.use_encoded_coors", "False"]
    config = load_reference_config(write(), pairs).config
    assert config.model.frequencies == 0
    assert VaMoH(coord_dim=2, channels=3, **vars(config.model)).encoding.out_dim == 2
    with pytest.raises(ValueError, match="fails for these data"):
        load_reference_config(write(data="voxels"), pairs)


def test_overrides_come_in_pairs(write: Write) -> None:
    with pytest.raises(ValueError, match="pairs of a key and a value"):
        load_reference_config(write(), ["seed"])


@pytest.mark.parametrize("preset", ["polymnist", "era5"])
def test_our_own_files_are_told_apart(preset: str, tmp_path: Path, write: Write) -> None:
    save_config(PRESETS[preset], tmp_path / "ours.yaml")
    assert not is_reference_config(tmp_path / "ours.yaml")
    assert is_reference_config(write())
    assert not is_reference_config(preset)


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(commands, "train", lambda **options: asked.append(options) or "done")
    assert cli.main(words) == 0
    return asked[0]


def test_command_line(write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write())
    theirs = load_reference_config(path, ["model.start_scheduler", "-1", "optim.max_epoch", "2"])
    words = ["train", path, "model.start_scheduler", "-1", "--out", "folder", "optim.max_epoch", "2"]
    asked = parse([*words, "--train.steps", "9"], monkeypatch)
    expected = replace(theirs.config, train=replace(theirs.config.train, steps=9))
    assert asked["config"] == expected
    assert (asked["out"], asked["device"], asked["source"]) == (Path("folder"), "cpu", path)
    shown = capsys.readouterr().err
    assert "optim.max_epoch 2 -> not used: --train.steps 9" in shown and "without effect" in shown
    assert parse(["train", path, "device", "cuda:1"], monkeypatch)["device"] == "cuda:1"
    assert parse(["train", path, "device", "cuda:1", "--device", "cpu"], monkeypatch)["device"] == "cpu"


def test_command_line_errors_are_one_line(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(write()), "train.epochs", "2"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "unknown key train.epochs" in error


def test_what_stands_in_place_of_the_file_is_told(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(write()), "--data.name", "arrays", "--data.path", "mine.npy", "--train.gating_warmup", "3"]
    parse(words, monkeypatch)
    shown = capsys.readouterr().err
    assert "dataset.name 'PolyMNIST' -> not used: --data.name arrays\n" in shown
    assert "train.flow_warmup (4), train.gating_warmup (6); --train.gating_warmup 3" in shown
    assert "epochs are counted for polymnist: --train.steps sets the steps for other data" in shown
    parse([*words, "--train.steps", "9"], monkeypatch)
    shown = capsys.readouterr().err
    assert "-> not used: --train.steps 9\n" in shown and "epochs are counted" not in shown
    parse(words[:2], monkeypatch)
    assert "not used" not in capsys.readouterr().err


@pytest.mark.parametrize("joined", [True, False])
def test_cfg_names_the_file(write: Write, monkeypatch: pytest.MonkeyPatch, joined: bool) -> None:
    path = str(write())
    option = [f"--cfg={path}"] if joined else ["--cfg", path]
    wanted = parse(["train", path, "optim.max_epoch", "2", "--seed", "4"], monkeypatch)
    assert parse(["train", *option, "optim.max_epoch", "2", "--seed", "4"], monkeypatch) == wanted
    assert parse(["train", "--seed", "4", *option, "optim.max_epoch", "2"], monkeypatch) == wanted


ODD: list[Any] = ["{[]: 1}", "(" * 3000, "1" + "0" * 400, "1e999", "-1e5", "[[1]]", "100000000", "x" * 3000, math.nan]


@pytest.mark.parametrize("value", ODD, ids=[str(value)[:12] for value in ODD])
def test_odd_values_of_every_key(write: Write, monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    """Each is taken, or refused with the file's name, in one short line and little memory."""
    path = write()
    content = config._read(path)
    monkeypatch.setattr(config, "_read", lambda _: content)
    for key in DEFAULTS:
        try:
            load_reference_config(path, [key, value])
        except ValueError as error:
            text = str(error).removeprefix(f"{path}: ")
            assert len(text) < len(str(error)) and len(text) < 300 and "\n" not in text, (key, text)


def test_odd_keys_and_too_many_layers(tmp_path: Path, write: Write) -> None:
    with pytest.raises(ValueError, match="params_fnrep.num_layers must be at most 1000, got 1001"):
        load_reference_config(write(), ["params_fnrep.num_layers", "1001"])
    path = tmp_path / "c.yaml"
    for text, message in {
        "1: 2": "unknown key 1",
        f"{'x' * 500}: 2": "unknown key 'xxx",
        "optim: {base_lr: 1" + "0" * 400 + "}": "optim.base_lr must be below 2^63, got an int of 1329 bits",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=f"c.yaml: {re.escape(message)}") as caught:
            load_reference_config(path)
        assert len(str(caught.value)) < 300 + len(str(path))
