"""Presets, YAML files and the errors of a bad configuration."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

pytest.importorskip("tyro", reason="the command line needs tyro")

import tyro

import vamoh.config
from vamoh._options import Activation, LikelihoodKind
from vamoh.config import (
    PRESETS,
    BetaConfig,
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
    differences,
    load_config,
    preset,
    save_config,
)
from vamoh.model import VaMoH
from vamoh.ops.inr_mixture import ACTIVATIONS
from vamoh.ops.likelihood import KINDS

# The paper's Table 3.
TABLE_3: dict[str, dict[str, Any]] = {
    "celebahq": {
        "latent_dim": 64,
        "components": 10,
        "flow_layers": 80,
        "hypernet_widths": (256, 512),
        "inr_widths": (64, 64, 64),
        "encoder_centroids": (4096, 1024, 256, 64, 1),
        "encoder_neighbors": (9, 9, 9, 9, 9),
        "encoder_channels": (64, 128, 256, 512, 512),
        "pool_centroids": (1024, 256, 64, 16),
        "likelihood": "logistic",
        "lr": 1e-4,
        "batch_size": 64,
    },
    "shapes3d": {
        "latent_dim": 32,
        "components": 5,
        "flow_layers": 20,
        "hypernet_widths": (128, 256),
        "inr_widths": (32, 32),
        "encoder_centroids": (1024, 256, 64),
        "encoder_neighbors": (16, 16, 16),
        "encoder_channels": (32, 64, 256),
        "likelihood": "logistic",
        "lr": 1e-4,
        "batch_size": 64,
        "gating_warmup": 0,
    },
    "polymnist": {
        "latent_dim": 16,
        "components": 4,
        "flow_layers": 3,
        "hypernet_widths": (16, 32),
        "inr_widths": (4, 4, 4),
        "encoder_centroids": (196, 49, 25),
        "encoder_neighbors": (9, 9, 9),
        "encoder_channels": (32, 32, 32),
        "likelihood": "logistic",
        "lr": 1e-3,
        "batch_size": 256,
    },
    "shapenet": {
        "latent_dim": 32,
        "components": 3,
        "flow_layers": 40,
        "hypernet_widths": (256, 512),
        "inr_widths": (64, 64, 64),
        "encoder_centroids": (4096, 512, 64, 16, 16),
        "encoder_neighbors": (8, 27, 27, 27, 8),
        "encoder_channels": (32, 64, 128, 256, 16),
        "likelihood": "bernoulli",
        "lr": 1e-3,
        "batch_size": 22,
        "num_points": 4096,
    },
    "era5": {
        "latent_dim": 32,
        "components": 3,
        "flow_layers": 10,
        "hypernet_widths": (256, 512),
        "inr_widths": (64, 64, 64),
        "encoder_centroids": (1024, 256, 64, 32, 16),
        "encoder_neighbors": (9, 9, 9, 9, 9),
        "encoder_channels": (32, 64, 256, 512, 32),
        "likelihood": "continuous_bernoulli",
        "lr": 1e-4,
        "batch_size": 64,
    },
}


@pytest.mark.parametrize("name", TABLE_3)
def test_presets_have_the_sizes_of_the_paper(name: str) -> None:
    config = preset(name)
    found = {key: getattr(config.model, key, None) or getattr(config.train, key, None) for key in TABLE_3[name]}
    assert {**found, "gating_warmup": config.train.gating_warmup} == {"gating_warmup": 100.0, **TABLE_3[name]}
    assert config.model.frequencies == 128
    assert config.model.frequency_scale == 2.0
    assert config.train.clip == 200.0
    assert config.train.flow_warmup == 200.0
    assert config.preset == name


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_models(name: str) -> None:
    channels = 3 if preset(name).data.name in ("avatars", "shapes3d", "polymnist") else 1
    with torch.device("meta"):
        model = VaMoH(coord_dim=3, channels=channels, **vars(preset(name).model))
    assert model.latent_dim == preset(name).model.latent_dim


def test_every_file_is_a_preset() -> None:
    files = Path(vamoh.config.__file__).with_name("presets").iterdir()
    assert sorted(path.name for path in files) == sorted(f"{name}.yaml" for name in PRESETS)


def test_model_section_mirrors_the_constructor() -> None:
    parameters = inspect.signature(VaMoH).parameters
    wanted = {k: p.default for k, p in parameters.items() if k not in ("coord_dim", "channels", "seed")}
    assert vars(ModelConfig()) == wanted


def test_choices_are_those_of_the_ops() -> None:
    assert list(get_args(LikelihoodKind)) == list(KINDS)
    assert list(get_args(Activation)) == list(ACTIVATIONS)


@pytest.mark.parametrize("name", PRESETS)
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    save_config(preset(name), tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == preset(name) == load_config(name)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_yaml_round_trip_of_awkward_values(tmp_path: Path) -> None:
    config = Config(
        data=DataConfig(name="images", path="1e-3", size=7),
        model=ModelConfig(weight_net_slope=0.1 + 0.2, inr_widths=(), pool_centroids=(50,), pool_neighbors=(2,)),
        train=TrainConfig(lr=1.2345678901234567e-7, clip=float("inf"), beta_z=BetaConfig(0.5, "linear", 1, 2)),
        seed=2**62 + 1,
    )
    save_config(config, tmp_path / "c.yaml")
    loaded = load_config(str(tmp_path / "c.yaml"))
    assert loaded == config
    assert loaded.model.weight_net_slope == 0.30000000000000004
    assert isinstance(loaded.model.inr_widths, tuple)


def test_a_file_may_say_only_what_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: shapenet\ntrain: {lr: 1e-5, beta_c: {value: 2}}\nmodel:\n  inr_widths: [8, 8]\n")
    base = preset("shapenet")
    assert load_config(path) == replace(
        base,
        model=replace(base.model, inr_widths=(8, 8)),
        train=replace(base.train, lr=0.00001, beta_c=BetaConfig(2.0)),
    )
    path.write_text("model: {coord_offset: [0, 1.5], coord_scale: [100, 2]}\n")
    assert load_config(path).model.coord_scale == (100.0, 2.0)
    path.write_text("")
    assert load_config(path) == Config()


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text, value in {"1e-3": 0.001, "2E+2": 200.0, "5.e-1": 0.5, ".5e1": 5.0, "1.5e-07": 1.5e-7, "3": 3.0}.items():
        path.write_text(f"train: {{lr: {text}}}\ndata: {{path: '1e-3'}}\n")
        assert load_config(path).train.lr == value
        assert load_config(path).data.path == "1e-3"


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"modle": {}}, ValueError, "unknown key modle; did you mean 'model'?"),
        ({"model": {"componets": 3}}, ValueError, "unknown key model.componets; did you mean 'components'?"),
        ({"train": {"beta_z": {"vlaue": 1}}}, ValueError, "unknown key train.beta_z.vlaue; did you mean 'value'?"),
        ({"data": {"qqq": 1}}, ValueError, "unknown key data.qqq; data has name, path, size, root"),
        ({"preset": "digit"}, ValueError, "preset: name must be one of celebahq, .*'digit'; did you mean 'digits'?"),
        ({"model": {"components": "four"}}, TypeError, r"model.components must be an int, got 'four' \(str\)"),
        ({"model": {"components": 2.0}}, TypeError, r"model.components must be an int, got 2.0 \(float\)"),
        ({"model": {"components": True}}, TypeError, r"model.components must be an int, got True \(bool\)"),
        ({"model": {"learn_scale": 1}}, TypeError, r"model.learn_scale must be true or false, got 1 \(int\)"),
        ({"model": {"inr_widths": 8}}, TypeError, r"model.inr_widths must be a list of ints, got 8 \(int\)"),
        ({"model": {"inr_widths": [8, "a"]}}, TypeError, r"model.inr_widths must be a list of ints, got \[8, 'a'\]"),
        ({"model": {"weight_net_slope": "x"}}, TypeError, "model.weight_net_slope must be a number or null, got 'x'"),
        ({"model": {"prior": "flwo"}}, ValueError, "model.prior must be one of normal, flow, got 'flwo'.*mean 'flow'?"),
        ({"model": {"prior": 3}}, TypeError, r"model.prior must be one of normal, flow, got 3 \(int\)"),
        ({"model": 3}, TypeError, r"model must be a section of keys and values, got 3 \(int\)"),
        ({"train": {"beta_c": {"value": "a"}}}, TypeError, r"train.beta_c.value must be a number, got 'a' \(str\)"),
        ({"train": {"beta_z": {"end": -1}}}, ValueError, r"train.beta_z.end must be at least train.beta_z.start"),
        ({"train": {"lr": None}}, TypeError, r"train.lr must be a number, got None \(NoneType\)"),
        ({"data": {"name": 3}}, TypeError, r"data.name must be a string, got 3 \(int\)"),
        ([1], TypeError, r"config: expected keys and values, got \[1\] \(list\)"),
    ],
)
def test_bad_keys_and_types(content: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        config_from_dict(content)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("model", {"components": 0}, "model.components must be at least 1, got 0"),
        ("model", {"frequencies": -1}, "model.frequencies must be at least 0, got -1"),
        ("model", {"scale": 0.0}, "model.scale must be above 0 and below 1, got 0.0"),
        ("model", {"inr_slope": float("nan")}, "model.inr_slope must be a number, finite and below 2.63, got nan"),
        ("model", {"inr_widths": [8, 0]}, r"model.inr_widths must be a list of ints of at least 1, got \[8, 0\]"),
        ("model", {"weight_net": []}, r"model.weight_net must be a list of at least one int, got \[\]"),
        ("model", {"encoder_neighbors": [9]}, r"model.encoder_neighbors must be as long as encoder_centroids \(3\)"),
        ("model", {"encoder_channels": [9] * 4}, r"model.encoder_channels must be as long as encoder_centroids \(3\)"),
        ("model", {"pool_centroids": [9] * 4}, "model.pool_centroids must be at most 3 long"),
        ("model", {"pool_centroids": [9]}, r"model.pool_neighbors must be as long as pool_centroids \(1\)"),
        ("model", {"encoder_neighbors": [9, 9, 50]}, r"model.encoder_neighbors .* stage before \(here 49\), got \[9, "),
        ("data", {"size": 0}, "data.size must be at least 1, got 0"),
        ("train", {"steps": 0}, "train.steps must be at least 1, got 0"),
        ("train", {"num_points": 0}, "train.num_points must be at least 1, got 0"),
        ("train", {"lr": 0}, "train.lr must be above 0, got 0.0"),
        ("train", {"lr_decay": 1.5}, "train.lr_decay must be above 0 and at most 1, got 1.5"),
        ("train", {"point_dropout": 1.1}, "train.point_dropout must be between 0 and 1, got 1.1"),
        ("train", {"flow_warmup": -1}, "train.flow_warmup must be at least 0, got -1.0"),
        ("train", {"beta_z": {"value": -1}}, "train.beta_z.value must be at least 0, got -1.0"),
    ],
)
def test_bad_values(section: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict({section: values})


def test_bad_seed() -> None:
    with pytest.raises(ValueError, match="config: seed must be between 0 and 2"):
        Config(seed=-1)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be one of .* got 'polymnits'; did you mean 'polymnist'"):
        load_config("polymnits")
    for missing in ("nothing.yaml", str(tmp_path / "nothing"), tmp_path):
        with pytest.raises(FileNotFoundError, match="no configuration file"):
            load_config(missing)
    path = tmp_path / "broken.yaml"
    path.write_text("model: [1,")
    with pytest.raises(ValueError, match="broken.yaml is damaged or not a YAML file"):
        load_config(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="broken.yaml is damaged or not a YAML file"):
        load_config(path)
    path.write_text("train: {lr: fast}")
    with pytest.raises(TypeError, match="broken.yaml: config: train.lr must be a number, got 'fast'"):
        load_config(path)


def bomb(entry: str) -> str:
    """Sections of the model that repeat each other eightfold; entry: how one repeats another."""
    sections = ["inr_widths: &a {x: 1}"]
    for i, name in enumerate(("gating_widths", "hypernet_widths", "weight_net", "pool_centroids", "pool_neighbors")):
        repeated = ", ".join([f"*{'abcde'[i]}"] * 10)
        sections.append(f"{name}: &{'bcdef'[i]} {entry.format(repeated)}")
    return f"model: {{{', '.join(sections)}}}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb("[{}]"), "its aliases stand for more than 100000 values"),
        (bomb("{{<<: [{}]}}"), "its aliases stand for more than 100000 values"),
        ("model: &a [*a]", "an alias lies in what it repeats"),
        ("model: " + "[" * 5000, "nested more than 20 deep"),
        ("model: " + "[" * 5000 + "]" * 5000, "nested more than 20 deep"),
        ("#" * 100_001, "larger than 100000 characters"),
        ("model: !!int ''", "damaged or not a YAML file"),
        ("model: !!bool x", "damaged or not a YAML file"),
        ("model: !!timestamp x", "damaged or not a YAML file"),
        ("model: 2024-13-45", "damaged or not a YAML file"),
        ("model: !!python/object/apply:os.getpid []", "damaged or not a YAML file"),
    ],
)
def test_yaml_files_that_are_traps(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "trap.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        load_config(path)
    assert len(str(caught.value)) < 300 + len(str(path))
    assert "trap.yaml" in str(caught.value)


def test_anchors_work(tmp_path: Path) -> None:
    path = tmp_path / "anchors.yaml"
    path.write_text(
        "model: {inr_widths: &w [8, 8], gating_widths: *w}\ntrain: {beta_z: &b {value: 2}, beta_c: {<<: *b}}"
    )
    config = load_config(path)
    assert config.model.inr_widths == config.model.gating_widths == (8, 8)
    assert config.train.beta_z.value == config.train.beta_c.value == 2


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("train", {"lr": math.inf}),
        ("train", {"clip": math.nan}),
        ("train", {"steps": 2**63}),
        ("train", {"lr": 10**400}),
        ("model", {"inr_widths": [8, 10**30]}),
    ],
)
def test_numbers_are_finite(section: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"config: {section}.{next(iter(values))} must be .*finite.*, got") as caught:
        config_from_dict({section: values})
    assert len(str(caught.value)) < 200


def test_clip_may_be_infinite_and_threads_are_few() -> None:
    assert config_from_dict({"train": {"clip": math.inf}}).train.clip == math.inf
    with pytest.raises(ValueError, match="train.threads must be at most 1024, got 20000"):
        config_from_dict({"train": {"threads": 20000}})


@pytest.mark.parametrize("content", ["x" * 10**6, ["y" * 50] * 100, {"z" * 500: 1}, {"model": {"k" * 500: 1}}])
def test_long_values_are_cut(content: Any) -> None:
    for value in (content, {"data": content}, {"train": {"lr": content}}):
        with pytest.raises((TypeError, ValueError)) as caught:
            config_from_dict(value)
        assert len(str(caught.value)) < 900  # the names of all keys are the longest message


def test_names_no_file_can_have() -> None:
    for path in ("a\0b", "a\udcffb"):
        with pytest.raises(ValueError, match=r"data.path must be a path in UTF-8 without NUL, got 'a.*b'"):
            DataConfig(path=path)
        with pytest.raises(ValueError, match=r"source must be a path in UTF-8 without NUL"):
            load_config(path)


def test_differences() -> None:
    a = config_to_dict(preset("polymnist"))
    assert differences(a, a) == []
    b = config_to_dict(
        replace(preset("polymnist"), seed=3, train=replace(preset("polymnist").train, beta_z=BetaConfig(2.0)))
    )
    assert differences(a, b) == ["seed: 0 != 3", "train.beta_z.value: 1.0 != 2.0"]
    assert differences({"x": 1}, {}) == ["x: 1 != nothing"]


def test_command_line_overrides() -> None:
    args = ["--model.inr-widths", "8", "9", "--train.beta-z.schedule", "linear", "--train.num-points", "7"]
    config = tyro.cli(Config, default=preset("era5"), args=args)
    base = preset("era5")
    assert config == replace(
        base,
        model=replace(base.model, inr_widths=(8, 9)),
        train=replace(base.train, num_points=7, beta_z=BetaConfig(schedule="linear")),
    )


def test_every_option_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(Config, default=preset("digits"), args=["--help"])
    text = capsys.readouterr().out
    for section in (ModelConfig, DataConfig, TrainConfig):
        for field in fields(section):
            assert field.name.replace("_", "-") in text
