from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("tyro", reason="the command line needs tyro")

from vamoh import VaMoH, cli, load
from vamoh.compat.config import load_reference_config, translate_config
from vamoh.compat.state import convert, from_reference, read_checkpoint, save_reference, to_reference
from vamoh.config import Config

Write = Callable[..., Path]


def model_of(config: Config, coord_dim: int, channels: int, seed: int = 0) -> VaMoH:
    return VaMoH(coord_dim=coord_dim, channels=channels, seed=seed, **vars(config.model))


def save(path: Path, state: dict[str, Any], epoch: Any = 12, **more: Any) -> Path:
    torch.save({"epoch": epoch, "model_state": state, "optimizer_state": {"state": {}}, **more}, path)
    return path


def test_configuration_of_a_case_makes_its_model(golden: Any) -> None:
    theirs = translate_config(golden.values())
    model = model_of(theirs.config, theirs.coord_dim, theirs.channels).double()
    wanted = golden.case.model.state_dict()
    assert {n: v.shape for n, v in model.state_dict().items()} == {n: v.shape for n, v in wanted.items()}
    from_reference(golden.state(), model)
    unused = set() if golden.meta["distr_x"] == "logistic" else {"likelihood.raw_scale"}
    assert {n for n, value in model.state_dict().items() if not torch.equal(value, wanted[n])} == unused


def test_there_and_back_is_the_reference_to_the_last_bit(golden: Any) -> None:
    wanted, back = golden.state(), to_reference(golden.case.model)
    assert set(back) == set(wanted)
    for name, value in wanted.items():
        assert (back[name].shape, back[name].dtype) == (value.shape, value.dtype), name
        template = name.startswith(("decoder.mlp.", "fmodel.")) or ".function_representation.mlp." in name
        assert template or torch.equal(back[name], value), name


def test_rows_name_every_tensor_once(golden: Any) -> None:
    state = golden.state()
    rows = from_reference(state, golden.case.model)
    named = [row.theirs for row in rows if row.theirs]
    assert sorted(named) == sorted(state)
    repeated = {row.theirs: row.ours for row in rows if row.status == "derived" and row.theirs}
    assert repeated == {name: f"repeats {origin}" for name, origin in golden.meta["state_alias"].items()}
    ignored = {row.theirs for row in rows if row.status == "ignored"}
    assert ignored and all(name.startswith(("decoder.mlp.", "fmodel.stateless_model.")) for name in ignored)
    ours = {part for row in rows if row.status == "mapped" for part in row.ours.split(", ")}
    absent = set(golden.case.model.state_dict()) - ours
    assert absent == (set() if golden.meta["distr_x"] == "logistic" else {"likelihood.raw_scale"})


def test_a_converted_checkpoint_is_the_model(golden: Any, tmp_path: Path) -> None:
    """Weights as float32, like those of real checkpoints; in float64 the cases' stages are compared in parity.py."""
    config = tmp_path / "theirs.yaml"
    config.write_text(yaml.safe_dump(golden.sections()))
    state = {name: value.float() for name, value in golden.state().items()}
    conversion = convert(save(tmp_path / "7.ckpt", state), load_reference_config(config), tmp_path / "run")
    model = load(tmp_path / "run")
    wanted = golden.case.model.state_dict()
    assert set(model.state_dict()) == set(wanted)
    for name, value in model.state_dict().items():
        if name in wanted and not (name == "likelihood.raw_scale" and golden.meta["distr_x"] != "logistic"):
            assert torch.equal(value, wanted[name].float()), name
    assert conversion.epoch == 12
    for tag in golden.meta["masks"]:
        points, hoods = golden.case.observed(tag), golden.case.neighborhoods(tag)
        mean = model.double().encode(points, neighborhoods=hoods).mean
        reference = golden.case.tensor(f"{tag}/enc/mu")
        assert (mean - reference).norm() / reference.norm() < 1e-5


@pytest.mark.parametrize(
    "epoch, flow, gating", [(0, False, False), (9, False, False), (10, False, True), (12, True, True)]
)
def test_the_epoch_says_which_priors_are_active(
    write: Write, tmp_path: Path, epoch: int, flow: bool, gating: bool
) -> None:
    theirs = load_reference_config(write(pool=(16, 4)))
    state = to_reference(model_of(theirs.config, 2, 3))
    convert(save(tmp_path / "a.ckpt", state, epoch), theirs, tmp_path / "run")
    model = load(tmp_path / "run")
    assert (model.use_flow, model.use_gating_prior) == (flow, gating)


@pytest.mark.parametrize(
    "options, pairs",
    [
        ({}, []),
        ({"pool": (16, 4)}, ["params_k_mixture.K", "1"]),
        ({"data": "era5", "likelihood": "cb"}, ["model.distr_z", "normal"]),
        ({"data": "voxels", "likelihood": "ber"}, ["params_encoding.learn_feats", "True"]),
        ({}, ["model.name_encoding", "None", "params_pointconvnet.use_encoded_coors", "False"]),
    ],
)
def test_round_trip_through_files(write: Write, tmp_path: Path, options: Any, pairs: list[str]) -> None:
    theirs = load_reference_config(write(**options), pairs)
    model = model_of(theirs.config, theirs.coord_dim, theirs.channels, seed=5)
    model.use_gating_prior = False
    save_reference(model, tmp_path / "0.ckpt")
    convert(tmp_path / "0.ckpt", theirs, tmp_path / "run")
    again = load(tmp_path / "run")
    assert (again.use_flow, again.use_gating_prior) == (True, False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("encoder_z.linear_layers.0.bias"), "encoder_z.linear_layers.0.bias is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda s: s.update({"bn_initial.weight": torch.zeros(3)}), "bn_initial.weight is unknown"),
        (
            lambda s: s.update({"lik_x_logscales": torch.zeros(3, 4)}),
            r"lik_x_logscales is torch.float32 \[3, 4\], expected torch.float32 \[3, 3\]",
        ),
        (lambda s: s.update({"post_cat_encoder.layers.1.0.bias": torch.zeros(8).double()}), "torch.float64"),
        (
            lambda s: s.update({"prior_distr_z.prior_distr_z.q0.loc": torch.ones(1, 4)}),
            "repeats prior_z.prior_distr_z.q0.loc but differs",
        ),
    ],
)
def test_what_does_not_fit_is_refused(write: Write, change: Callable[[Any], Any], words: str) -> None:
    model = model_of(load_reference_config(write()).config, 2, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = to_reference(model_of(load_reference_config(write()).config, 2, 3, seed=1))
    change(state)
    with pytest.raises(ValueError, match=words):
        from_reference(state, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Trap:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists()
    mark.unlink()
    torch.save({"epoch": 0, "model_state": {}, "config": Trap(mark)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="tensors and plain values alone"):
        read_checkpoint(tmp_path / "a.ckpt")
    assert not mark.exists()


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*gone\.ckpt"):
        read_checkpoint(tmp_path / "gone.ckpt")
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(save(tmp_path / "whole.ckpt", {"a": torch.zeros(1000)}).read_bytes()[:900])
    text = tmp_path / "text.ckpt"
    text.write_text("not a checkpoint")
    empty = tmp_path / "empty.ckpt"
    empty.write_bytes(b"")
    for path in (damaged, text, empty):
        with pytest.raises(ValueError, match=path.name):
            read_checkpoint(path)
    torch.save({"a": 1}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="must hold epoch and model_state"):
        read_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="must map names to tensors"):
        read_checkpoint(save(tmp_path / "names.ckpt", {"a": 1}))
    with pytest.raises(ValueError, match="epoch of .* must be an int"):
        read_checkpoint(save(tmp_path / "epoch.ckpt", {}, epoch="3"))


@pytest.mark.parametrize(
    "change",
    [
        {"weight_net_slope": 0.2},
        {"neighbor_metric": "raw"},
        {"centroids": "fixed"},
        {"encoder_density": True},
        {"gating_bound": "none"},
        {"max_scale": 1.0},
        {"bin_width": 1 / 255},
        {"epsilon": 0.0},
        {"open_ends": True},
    ],
)
def test_models_that_the_reference_cannot_compute(write: Write, change: dict[str, Any]) -> None:
    sizes = vars(load_reference_config(write()).config.model) | change
    with pytest.raises(ValueError, match=f"to_reference: {next(iter(change))} must be"):
        to_reference(VaMoH(coord_dim=2, channels=3, **sizes))


def test_commands(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = load_reference_config(write())
    checkpoint = save(tmp_path / "12.ckpt", to_reference(model_of(theirs.config, 2, 3)))
    run, back = tmp_path / "run", tmp_path / "back" / "12.ckpt"
    words = ["convert", str(checkpoint), "--config", str(write()), "--out", str(run)]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "mapped   encoder_z.linear_layers.0.weight -> encoder.head.weight" in shown
    assert "ignored  optimizer_state -> not part of the model" in shown
    assert "epoch 12: flow prior on, gating prior on" in shown
    assert cli.main(words) == 2
    assert "which is in use" in capsys.readouterr().err
    assert cli.main(["convert", str(run), "--to-reference", "--out", str(back)]) == 0
    first, second = read_checkpoint(checkpoint)["model_state"], read_checkpoint(back)["model_state"]
    assert set(first) == set(second)
    assert all(torch.equal(first[n], second[n]) for n in first if first[n].device.type != "meta")
    assert cli.main(["convert", str(run), "--to-reference", "--out", str(back)]) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.main(["convert", str(checkpoint), "--out", str(tmp_path / "b")]) == 2
    assert "config must name" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(run)]) == 2
    assert "comes without an optimizer" in capsys.readouterr().err
    assert cli.main(["sample", str(run), "--count", "2"]) == 0


def test_every_scale_goes_to_its_component_and_channel(write: Write) -> None:
    """The stored cases have one scale for all."""
    model = model_of(load_reference_config(write(), ["params_k_mixture.K", "2"]).config, 2, 3)
    state = to_reference(model)
    state["lik_x_logscales"] = torch.arange(6.0).view(3, 2)  # [C, K]
    from_reference(state, model)
    assert model.likelihood.raw_scale.tolist() == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    assert torch.equal(to_reference(model)["lik_x_logscales"], state["lik_x_logscales"])


def test_the_first_gating_layer_is_cut_where_its_inputs_meet(write: Write) -> None:
    """Coordinates, then values, then latents: columns of one weight."""
    model = model_of(load_reference_config(write()).config, 2, 3)
    weight = to_reference(model)["post_cat_encoder.layers.0.0.weight"]
    net = model.gating_posterior
    assert net.by_value is not None
    assert torch.equal(weight[:, :12], net.by_coords.weight)
    assert torch.equal(weight[:, 12:15], net.by_value.weight)
    assert torch.equal(weight[:, 15:], net.by_z.weight)


def test_the_configuration_of_the_results_is_found(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """RESULTS/ckpt/N.ckpt has its overrides in RESULTS/config.yaml: another file may keep the priors off."""
    theirs = load_reference_config(write())
    results = tmp_path / "results"
    (results / "ckpt").mkdir(parents=True)
    path = save(results / "ckpt" / "1.ckpt", to_reference(model_of(theirs.config, 2, 3)), epoch=1)
    base, own = write().read_text(encoding="utf-8"), results / "config.yaml"
    assert cli.main(["convert", str(path), "--config", str(write()), "--out", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert "prior off" in shown and "a run with overrides has them in the config.yaml of its results" in shown
    assert (
        f"step {2 * theirs.steps_per_epoch}: 2 epochs of {theirs.steps_per_epoch} steps, counted for polymnist" in shown
    )
    own.write_text(re.sub(r"scenerio_end: \[.*\]", "scenerio_end: [1, 1]", base), encoding="utf-8")
    assert cli.main(["convert", str(path), "--config", str(write()), "--out", str(tmp_path / "b")]) == 0
    assert f"with its overrides: --config {own}" in capsys.readouterr().out
    assert cli.main(["convert", str(path), "--out", str(tmp_path / "c")]) == 0
    shown = capsys.readouterr().out
    assert f"epoch 1: flow prior on, gating prior on, by {own}" in shown and "overrides" not in shown
    assert load(tmp_path / "c").use_flow and not load(tmp_path / "b").use_flow
