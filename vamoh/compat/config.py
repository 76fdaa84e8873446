"""The published code's YAML files, with its trailing overrides, as a `Config`; says what became of every key."""

from __future__ import annotations

import ast
import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from vamoh._files import read_file, reading
from vamoh._shown import shown, unquoted
from vamoh.config import BetaConfig, BoundedLoader, Config, DataConfig, ModelConfig, TrainConfig, config_to_dict

Status = Literal["mapped", "without effect", "corrected"]


class KeyRow(NamedTuple):
    """What became of a key of the file: its status, and where its value went or why it has no effect."""

    key: str
    value: Any
    status: Status
    text: str


@dataclass(frozen=True)
class Translation:
    """A configuration of the published code in our terms.

    config: what to train. device: where. rows: what became of every key that was given.
    coord_dim, channels: D and C of its data. steps_per_epoch: updates in an epoch of theirs over the data of `config`.
    flow_warmup, gating_warmup: the epoch of theirs at whose start the flow and the learned prior over components begin.
    """

    config: Config
    device: str
    rows: tuple[KeyRow, ...]
    coord_dim: int
    channels: int
    steps_per_epoch: int
    flow_warmup: float
    gating_warmup: float


class _Source(NamedTuple):
    """A data set of the published code: ours in its place, its training functions, D and C."""

    name: str
    train: int
    coord_dim: int
    channels: int


SOURCES = {
    "PolyMNIST": _Source("polymnist", 8500, 2, 3),
    "shapes3d": _Source("shapes3d", 8000, 2, 3),
    "shapes3d_10": _Source("shapes3d", 8000, 2, 3),
    "shapes3d_50": _Source("shapes3d", 8000, 2, 3),
    "celebahq256": _Source("avatars", 3200, 2, 3),
    "voxels": _Source("chairs", 56, 3, 1),
    "era5": _Source("climate", 54, 3, 1),
}
PRIORS = {"nf": "flow", "normal": "normal"}
LIKELIHOODS = {"logistic": "logistic", "ber": "bernoulli", "cb": "continuous_bernoulli"}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "lrelu_01": {"inr_activation": "leaky_relu", "inr_slope": 0.1},
    "lrelu_025": {"inr_activation": "leaky_relu", "inr_slope": 0.25},
    "lrelu_05": {"inr_activation": "leaky_relu", "inr_slope": 0.5},
    "relu": {"inr_activation": "relu"},
    "sinus": {"inr_activation": "sine", "inr_omega": 1.0},
}
VOXEL_POINTS = 4096
"""Points of every batch of voxels, a constant of the published code."""
KL_SAMPLES = 4096
_MOST_LAYERS = 1000

# Every key and the value it has when a file leaves it out.
DEFAULTS: dict[str, Any] = {
    "print": "both",
    "device": "cpu",
    "out_dir": "results",
    "cfg_dest": "config.yaml",
    "seed": 1,
    "round": 4,
    "use_tqdm": False,
    "tensorboard_each_run": False,
    "tensorboard_agg": True,
    "num_workers": 2,
    "pin_memory": False,
    "num_threads": 6,
    "metric_best": "auto",
    "metric_agg": "argmax",
    "view_emb": False,
    "log_gpu_mem": False,
    "use_profiler": False,
    "note": "",
    "example_arg": "example",
    "example_group.example_arg": "example",
    "dataset.name": "MNIST",
    "dataset.threshold": 0.0,
    "dataset.format": "torch",
    "dataset.dir": "./datasets",
    "dataset.task": "image",
    "dataset.task_type": "classification",
    "dataset.dims": None,
    "dataset.label_dim": None,
    "dataset.coordinate_dim": None,
    "dataset.size": 64,
    "dataset.use_subset": 1.0,
    "dataset.use_number_batch": 0,
    "dataset.use_bn_initial": True,
    "dataset.missing_perc": 0.0,
    "dataset.use_one_hot": False,
    "dataset.fourier": False,
    "dataset.use_train_as_valid": False,
    "dataset.modality": "m1",
    "dataset.check_data": False,
    "train.mode": "standard",
    "train.batch_size": 16,
    "train.eval_period": 10,
    "train.ckpt_period": 100,
    "train.auto_resume": False,
    "train.epoch_resume": -1,
    "train.ckpt_clean": True,
    "train.iter_per_epoch": 32,
    "train.clip": 0.0,
    "model.type": "vamoh",
    "model.match_upper": True,
    "model.loss_fun": "elbo",
    "model.dim_z": 8,
    "model.distr_z": "normal",
    "model.beta_z": 1.0,
    "model.beta_c": 0.00001,
    "model.beta_c_scheduler": "Linear",
    "model.beta_z_scheduler": "Linear",
    "model.start_scheduler": 0,
    "model.end_scheduler": 0,
    "model.dim_cond": 0,
    "model.distr_cond": None,
    "model.beta_cond": 1,
    "model.distr_x": "logistic",
    "model.distr_x_logscales": -1.0,
    "model.distr_x_logscales_learn": False,
    "model.name_encoding": None,
    "model.encoder_type": "pointconv",
    "model.use_k_mixture": True,
    "model.drop_input": 0.0,
    "model.dropout": 0.0,
    "model.two_step_training": False,
    "model.first_step_ratio": 0.0,
    "model.scenerio": [],
    "model.scenerio_start": [],
    "model.scenerio_end": [],
    "model.learn_residual_posterior": False,
    "model.post_cat_has_z": True,
    "model.simple_cat": False,
    "model.cat_encoder_x": False,
    "model.fix_categorical_prior": False,
    "params_nf.type": "planar",
    "params_nf.L": 10,
    "params_nf.act": "leaky_relu",
    "params_hyper.dim_inner": 32,
    "params_hyper.num_layers": 2,
    "params_hyper.act": "relu",
    "params_hyper.dropout": 0.0,
    "params_hyper.coords_dim": 0,
    "params_fnrep.dim_inner": 32,
    "params_fnrep.num_layers": 2,
    "params_fnrep.act": "relu",
    "params_fnrep.dropout": 0.0,
    "params_pointconvnet.coordinate_dim": 0,
    "params_pointconvnet.feature_dim": 0,
    "params_pointconvnet.same_coordinates": "none",
    "params_pointconvnet.deterministic": True,
    "params_pointconvnet.add_batchnorm": True,
    "params_pointconvnet.add_weightnet_batchnorm": False,
    "params_pointconvnet.linear_layer_sizes": [],
    "params_pointconvnet.layer_configs": [],
    "params_pointconvnet.out_channels": [],
    "params_pointconvnet.num_output_points": [],
    "params_pointconvnet.num_neighbors": [],
    "params_pointconvnet.mid_channels": [],
    "params_pointconvnet.avg_pooling_num_output_points": [],
    "params_pointconvnet.avg_pooling_num_neighbors": [],
    "params_pointconvnet.add_sigmoid": False,
    "params_pointconvnet.use_encoded_coors": False,
    "params_k_mixture.K": 7,
    **{
        f"params_cat_{part}.{key}": value
        for part in ("x", "prior", "post")
        for key, value in {
            "layers": [5, 5],
            "batchnorm": False,
            "l2norm": False,
            "act": "softmax",
            "dropout": 0.0,
            "output_dropout": 0.0,
        }.items()
    },
    "params_encoding.num_frequencies": 10,
    "params_encoding.std": 0.1,
    "params_encoding.learn_feats": False,
    "plotting.super_res_epoch": 50,
    "plotting.res_epoch": 50,
    "plotting.use_neighbors": False,
    "plotting.figure_type": ".png",
    "optim.optimizer": "adam",
    "optim.base_lr": 0.01,
    "optim.weight_decay": 5e-4,
    "optim.momentum": 0.9,
    "optim.scheduler": "cos",
    "optim.use_scheduler": True,
    "optim.steps": [30, 60, 90],
    "optim.lr_decay": 0.1,
    "optim.gamma": 0.99,
    "optim.max_epoch": 200,
    "bn.eps": 1e-5,
    "bn.mom": 0.1,
    "mem.inplace": False,
    "inference.save_samples": False,
    "inference.reconstruct": False,
    "inference.ckpt_numbers": [49],
    "inference.first_batch": False,
}
SECTIONS = {key.split(".")[0] for key in DEFAULTS if "." in key} | {"val"}
NULLABLE = {"model.beta_c_scheduler", "model.beta_z_scheduler"}

# Keys that change nothing here, and why.
_UNREAD = "the published code never reads it"
_REPORTS = "vamoh has one form of log and pictures"
_NO_DROPOUT_NET = "belongs to cat_encoder_x, which is off"
IDLE: dict[str, str] = {
    **dict.fromkeys(
        [
            "use_tqdm",
            "tensorboard_agg",
            "metric_best",
            "metric_agg",
            "view_emb",
            "log_gpu_mem",
            "use_profiler",
            "note",
            "example_arg",
            "example_group.example_arg",
            "dataset.use_subset",
            "dataset.fourier",
            "dataset.check_data",
            "train.iter_per_epoch",
            "model.match_upper",
            "model.loss_fun",
            "model.dim_cond",
            "model.distr_cond",
            "model.beta_cond",
            "model.distr_x_logscales_learn",
            "model.use_k_mixture",
            "model.drop_input",
            "model.dropout",
            "model.two_step_training",
            "model.first_step_ratio",
            "plotting.use_neighbors",
            "inference.save_samples",
            "inference.reconstruct",
            "inference.ckpt_numbers",
            "inference.first_batch",
        ],
        _UNREAD,
    ),
    **dict.fromkeys(
        ["print", "round", "cfg_dest", "plotting.super_res_epoch", "plotting.res_epoch", "plotting.figure_type"],
        _REPORTS,
    ),
    **dict.fromkeys(["num_workers", "pin_memory"], "data are held in memory, no workers load them"),
    **dict.fromkeys(["bn.eps", "bn.mom"], "there is no batch normalisation"),
    **{
        f"params_cat_x.{key}": _NO_DROPOUT_NET
        for key in ("layers", "batchnorm", "l2norm", "act", "dropout", "output_dropout")
    },
    "out_dir": "results go to runs/NAME; say --out FOLDER",
    "mem.inplace": "only the memory of an activation",
    "dataset.dir": "files of your own are named by --data.name and --data.path",
    "dataset.task": "follows from dataset.name",
    "dataset.task_type": "follows from dataset.name",
    "dataset.size": "only celebahq256 is resized",
    "dataset.dims": "follows from the data",
    "dataset.label_dim": "labels are not used",
    "dataset.coordinate_dim": "follows from the data",
    "dataset.threshold": "chooses between two forms of one formula",
    "dataset.use_one_hot": "labels are not used",
    "dataset.modality": "belongs to the authors' files",
    "dataset.use_train_as_valid": "a validation split is held out, and training is shuffled",
    "train.auto_resume": "say vamoh train --resume RUN",
    "train.epoch_resume": "say vamoh train --resume RUN",
    "train.ckpt_clean": "the newest checkpoint is kept",
    "params_pointconvnet.coordinate_dim": "follows from the data",
    "params_pointconvnet.feature_dim": "follows from the data",
    "params_pointconvnet.add_sigmoid": "the published code switches it off",
    "params_pointconvnet.same_coordinates": "neighbours are those of the points at hand, found once where they repeat",
    "optim.momentum": "belongs to sgd",
    "optim.steps": "belongs to the scheduler step",
    "optim.lr_decay": "belongs to the scheduler step",
}


class _Keys:
    """Values by key, and where those that were asked for go."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.ours: dict[str, str] = {}

    def take(self, key: str, ours: str) -> Any:
        """Value of a key that goes to `ours`."""
        self.ours[key] = ours
        return self.values[key]

    def must(self, key: str, allowed: Sequence[Any], why: str, ours: str = "as here") -> Any:
        """Value of a key of which only the `allowed` ones can be reproduced; ValueError for another."""
        self.ours[key] = ours
        if self.values[key] not in allowed:
            choices = " or ".join(map(shown, allowed))
            raise ValueError(f"{key} must be {choices}, got {shown(self.values[key])}: {why}")
        return self.values[key]


def is_reference_config(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a configuration of the published code: a YAML file with one of its sections."""
    file = Path(path)
    if file.suffix not in (".yaml", ".yml") or not file.is_file():
        return False
    text = file.read_text(encoding="utf-8", errors="replace")
    return re.search(r"^(dataset|optim|params_\w+)\s*:", text, re.MULTILINE) is not None


def load_reference_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Translation:
    """Translate a YAML file of the published code; `overrides` alternates keys and values, as its main.py takes them.

    Raises FileNotFoundError, and ValueError for a file that is not YAML, an unknown key, a value of the wrong kind or
    one that cannot be reproduced; each names the key and the reason.
    """
    content, corrected = _read(Path(path))
    given: dict[str, Any] = {}
    for key, value in content.items():
        if key in SECTIONS:
            if value is not None and not isinstance(value, Mapping):
                raise ValueError(f"{path}: {key} must be a section of keys and values, got {shown(value)}")
            given.update({f"{key}.{name}": _decoded(entry) for name, entry in (value or {}).items()})
        else:
            given[str(key)] = _decoded(value)
    if len(overrides) % 2:
        raise ValueError(f"{path}: overrides must be pairs of a key and a value, got {shown(' '.join(overrides))}")
    given.update({k: _decoded(v) for k, v in zip(overrides[::2], overrides[1::2], strict=True)})
    try:
        return translate_config(given, corrected)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None


def translate_config(given: Mapping[str, Any], corrected: Sequence[KeyRow] = ()) -> Translation:
    """Translate values by their dotted keys, as in `DEFAULTS`; raises as `load_reference_config`."""
    values = DEFAULTS | {key: _checked(key, value) for key, value in given.items()}
    keys = _Keys(values)
    keys.must("model.type", ["vamoh"], "there is no other model")
    keys.must("train.mode", ["standard"], "the published code has no other")
    keys.must("dataset.format", ["torch"], "the published code has no other")
    keys.must("dataset.use_bn_initial", [False], "the published model has no such layer")
    name = keys.must("dataset.name", list(SOURCES), "the published code loads no other")
    source = SOURCES[name]
    stand_in = f"{source.train} training functions in place of the authors' files"
    keys.take("dataset.name", f"data.name {source.name}: {stand_in}; --data.name and --data.path name yours")
    size = keys.take("dataset.size", "data.size") if name == "celebahq256" else None
    model = _model(keys, images=source.coord_dim == 2)
    train, epochs = _train(keys, source, name)
    config = Config(
        data=DataConfig(name=source.name, size=size), model=model, train=train, seed=keys.take("seed", "seed")
    )
    device = keys.take("device", "--device")
    given_rows = []
    for key in given:
        status: Status = "mapped" if key in keys.ours else "without effect"
        given_rows.append(KeyRow(key, values[key], status, keys.ours[key] if key in keys.ours else IDLE[key]))
    return Translation(config, device, (*corrected, *given_rows), source.coord_dim, source.channels, *epochs)


def translate_model(given: Mapping[str, Any], coord_dim: int) -> ModelConfig:
    """Translate the sizes and choices of a model by their dotted keys; raises as `load_reference_config`."""
    values = DEFAULTS | {key: _checked(key, value) for key, value in given.items()}
    return _model(_Keys(values), images=coord_dim == 2)


_OURS = re.compile(r"(?<!-)\b(?:data|model|train)(?:\.\w+)+")
"""Keys of ours in the text of a row, but not options that it advises."""


def changes(left: Config, right: Config) -> dict[str, Any]:
    """Values of `right`, plain, by the dotted keys in which it differs from `left`."""

    def flat(content: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in content.items():
            found.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
        return found

    before, after = (flat(config_to_dict(config), "") for config in (left, right))
    return {key: value for key, value in after.items() if value != before[key]}


def table(rows: Iterable[KeyRow], instead: Mapping[str, Any] | None = None) -> str:
    """Lay out what became of every key; instead: values by our dotted keys that are taken in place of the file's."""
    kept, instead = list(rows), instead or {}
    lines = []
    for row in kept:
        if row.status == "mapped":
            ours = _OURS.findall(row.text)
            taken = " ".join(f"--{key} {instead[key]}" for key in ours if key in instead)
            text = (
                f"not used: {taken}" if taken and instead.keys() >= set(ours) else f"{row.text}{taken and '; ' + taken}"
            )
            lines.append(f"  {row.key} {shown(row.value)} -> {text}")
    lines += [f"  {row.text}" for row in kept if row.status == "corrected"]
    reasons: dict[str, list[str]] = {}
    for row in kept:
        if row.status == "without effect":
            reasons.setdefault(row.text, []).append(row.key)
    if reasons:
        lines.append("without effect:")
        lines += [f"  {', '.join(keys)}: {why}" for why, keys in reasons.items()]
    return "\n".join(lines)


def _model(keys: _Keys, *, images: bool) -> ModelConfig:
    keys.must("model.encoder_type", ["pointconv"], "there is no other encoder")
    for key in ("learn_residual_posterior", "simple_cat", "cat_encoder_x"):
        keys.must(f"model.{key}", [False], "this variant of the gating is not built")
    keys.must("model.post_cat_has_z", [True], "the published code has no other")
    keys.must("params_nf.type", ["planar"], "the published code has no other flow")
    keys.must("params_nf.act", ["leaky_relu"], "the flow is built with this activation")
    net = "params_pointconvnet"
    for key in ("add_batchnorm", "add_weightnet_batchnorm"):
        keys.must(f"{net}.{key}", [False], "the encoder has no batch normalisation")
    keys.must(f"{net}.deterministic", [True], "sampling starts at the first point")
    for key in ("linear_layer_sizes", "layer_configs"):
        keys.must(f"{net}.{key}", [[]], "the head is one linear layer, and layers are given by the other lists")
    encoding = keys.must("model.name_encoding", ["fourier", None], "there is no other encoding")
    keys.must(f"{net}.use_encoded_coors", [encoding is not None], "the published code fails otherwise")
    if encoding is None and not images:
        raise ValueError("model.name_encoding must be 'fourier', got None: the published code fails for these data")
    frequencies = keys.take("params_encoding.num_frequencies", "model.frequencies")
    for part in ("prior", "post"):
        for key, value in (("act", "lrelu_01"), ("batchnorm", False), ("l2norm", False)):
            keys.must(f"params_cat_{part}.{key}", [value], "the gating networks are built so")
        for key in ("dropout", "output_dropout"):
            keys.must(f"params_cat_{part}.{key}", [0.0], "there is no dropout of units")
    gating = keys.take("params_cat_prior.layers", "model.gating_widths")
    keys.must("params_cat_post.layers", [gating], "prior and posterior over components have the same widths")
    keys.must("params_hyper.act", ["lrelu_01"], "the hypernetworks are built with this activation")
    keys.must("params_hyper.dropout", [0.0], "there is no dropout of units")
    keys.must("params_hyper.coords_dim", [0], "the published code has no other")
    keys.must("params_fnrep.dropout", [0.0], "there is no dropout of units")
    why = "the coordinate networks have no other activation"
    act = keys.must("params_fnrep.act", list(ACTIVATIONS), why, "model.inr_activation and its slope or frequency")
    prior = PRIORS[keys.must("model.distr_z", list(PRIORS), "there is no other prior", "model.prior")]
    why = "there is no other likelihood"
    kind = LIKELIHOODS[keys.must("model.distr_x", list(LIKELIHOODS), why, "model.likelihood")]
    pools = _pools(keys.values)
    for key in ("num_output_points", "num_neighbors"):
        keys.take(f"{net}.avg_pooling_{key}", "model.pool_centroids" if "output" in key else "model.pool_neighbors")
    log_scale = keys.take("model.distr_x_logscales", "model.scale, its sigmoid")
    hyper, inr = (
        [keys.take(f"params_{part}.{key}", f"model.{ours}") for key in ("dim_inner", "num_layers")]
        for part, ours in (("hyper", "hypernet_widths"), ("fnrep", "inr_widths"))
    )
    for part, (_, layers) in (("hyper", hyper), ("fnrep", inr)):
        if layers > _MOST_LAYERS:
            raise ValueError(f"params_{part}.num_layers must be at most {_MOST_LAYERS}, got {layers}")
    return ModelConfig(
        latent_dim=keys.take("model.dim_z", "model.latent_dim"),
        components=keys.take("params_k_mixture.K", "model.components"),
        frequencies=frequencies if encoding else 0,
        frequency_scale=keys.take("params_encoding.std", "model.frequency_scale"),
        learn_frequencies=keys.take("params_encoding.learn_feats", "model.learn_frequencies"),
        encoder_centroids=tuple(keys.take(f"{net}.num_output_points", "model.encoder_centroids")),
        encoder_neighbors=tuple(keys.take(f"{net}.num_neighbors", "model.encoder_neighbors")),
        encoder_channels=tuple(keys.take(f"{net}.out_channels", "model.encoder_channels")),
        pool_centroids=tuple(pool[0] for pool in pools),
        pool_neighbors=tuple(pool[1] for pool in pools),
        weight_net=tuple(keys.take(f"{net}.mid_channels", "model.weight_net")),
        centroids="points",
        prior=prior,  # type: ignore[arg-type]
        flow_layers=keys.take("params_nf.L", "model.flow_layers"),
        hypernet_widths=tuple(hyper[0] * (i + 1) for i in range(hyper[1])),
        inr_widths=(inr[0],) * inr[1],
        **ACTIVATIONS[act],
        gating_widths=tuple(gating),
        gating_bound="tanh",
        likelihood=kind,  # type: ignore[arg-type]
        scale=1 / (1 + math.exp(min(-log_scale, 700.0))),
        learn_scale=False,
        max_scale=0.1,
        kl="cross_entropy",
        kl_samples=KL_SAMPLES,
        initialization="published",
    )


def _pools(values: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Centroids and neighbours of the average poolings; the text None stands for no pooling after a convolution."""
    keys = [f"params_pointconvnet.avg_pooling_{key}" for key in ("num_output_points", "num_neighbors")]
    centroids, neighbors = ([None if n in ("None", None) else n for n in values[key]] for key in keys)
    count = len(values["params_pointconvnet.num_output_points"])
    if len(centroids) != len(neighbors) or len(centroids) not in (0, count):
        raise ValueError(f"{keys[0]} and {keys[1]} must be empty or have {count} entries, one for each convolution")
    pools = [(m, s) for m, s in zip(centroids, neighbors, strict=True) if m is not None and s is not None]
    if len(pools) != sum(m is not None for m in centroids) or None in centroids[: len(pools)]:
        raise ValueError(f"{keys[0]} must have None only after its numbers, and {keys[1]} a number for each of them")
    return pools


def _train(keys: _Keys, source: _Source, name: str) -> tuple[TrainConfig, tuple[int, float, float]]:
    keys.must("optim.optimizer", ["adam"], "there is no other optimizer")
    batch = keys.take("train.batch_size", "train.batch_size")
    if batch < 1:
        raise ValueError(f"train.batch_size must be at least 1, got {shown(batch)}")
    whole = max(1, source.train // batch)
    limit = keys.take("dataset.use_number_batch", "train.steps: so many updates make an epoch, drawn from all the data")
    updates = min(limit, whole) if limit > 0 else whole
    per = f"{updates} updates an epoch"
    decay = 1.0
    if keys.take("optim.use_scheduler", "train.lr_decay"):
        kind = keys.must("optim.scheduler", ["exp", "none"], "there is no other decay of the learning rate")
        decay = keys.values["optim.gamma"] if kind == "exp" else 1.0
    rows_decay = "train.lr_decay" if keys.values["optim.use_scheduler"] else "off: optim.use_scheduler is False"
    keys.take("optim.scheduler", rows_decay)
    keys.take("optim.gamma", rows_decay)
    missing = keys.take("dataset.missing_perc", "train.point_dropout")
    if not 0 <= missing <= 1:
        raise ValueError(f"dataset.missing_perc must be between 0 and 1, got {missing}")
    if name == "voxels":
        keys.take("dataset.missing_perc", f"none: every batch of voxels has {VOXEL_POINTS} points (train.num_points)")
        missing = 0.0
    clip = keys.take("train.clip", "train.clip")
    flow, gating = _warmups(keys)
    scale = updates / whole  # epochs of theirs in ours
    train = TrainConfig(
        steps=keys.take("optim.max_epoch", f"train.steps, {per}") * updates,
        batch_size=batch,
        lr=keys.take("optim.base_lr", "train.lr"),
        lr_decay=decay ** (1 / scale),
        clip=clip if clip > 0 else math.inf,
        weight_decay=keys.take("optim.weight_decay", "train.weight_decay"),
        point_dropout=0.9 if missing == 1 else missing,
        num_points=VOXEL_POINTS if name == "voxels" else None,
        flow_warmup=flow * scale,
        gating_warmup=gating * scale,
        beta_z=_beta(keys, "z", scale),
        beta_c=_beta(keys, "c", scale),
        checkpoint_every=keys.take("train.ckpt_period", f"train.checkpoint_every, {per}") * updates,
        evaluate_every=keys.take("train.eval_period", f"train.evaluate_every, {per}") * updates,
        threads=keys.take("num_threads", "train.threads"),
        tensorboard=keys.take("tensorboard_each_run", "train.tensorboard"),
    )
    return train, (updates, flow, gating)


def _warmups(keys: _Keys) -> tuple[float, float]:
    """Epochs of the standard normal prior (scenario 4) and of the uniform p(c) (scenario 6)."""
    names = ("model.scenerio", "model.scenerio_start", "model.scenerio_end")
    for key in names:
        keys.take(key, "train.flow_warmup (4), train.gating_warmup (6)")
    numbers, starts, ends = (keys.values[key] for key in names)
    if not len(numbers) == len(starts) == len(ends) or len(set(numbers)) != len(numbers):
        raise ValueError(
            f"{', '.join(names)} must have one length, and every number once, got "
            f"{shown(numbers)}, {shown(starts)}, {shown(ends)}"
        )
    epochs = {4: 0.0, 6: 0.0}
    if keys.take("model.fix_categorical_prior", "train.gating_warmup"):
        epochs[6] = math.inf
    for number, start, end in zip(numbers, starts, ends, strict=True):
        if number not in epochs:
            raise ValueError(
                f"model.scenerio must list 4 and 6 alone, got {shown(number)}: the published code has no other"
            )
        if start != 0 or end < 0:
            raise ValueError(
                f"model.scenerio_start must be 0 and model.scenerio_end at least 0, got {shown(start)} and "
                f"{shown(end)}: a warm-up is at the start of training"
            )
        epochs[number] = float(end)
    return epochs[4], epochs[6]


def _beta(keys: _Keys, part: str, scale: float) -> BetaConfig:
    weight = keys.take(f"model.beta_{part}", f"train.beta_{part}.value")
    kind = keys.take(f"model.beta_{part}_scheduler", f"train.beta_{part}.schedule")
    start = keys.take("model.start_scheduler", "train.beta_z.start, train.beta_c.start")
    end = keys.take("model.end_scheduler", "train.beta_z.end, train.beta_c.end")
    if kind is None or end < 0:
        return BetaConfig(value=weight)
    schedules = {"Linear": "linear", "Poly": "quadratic", "Exp": "exponential"}
    if kind not in schedules:
        known = ", ".join(schedules)
        raise ValueError(f"model.beta_{part}_scheduler must be one of {known} or None, got {shown(kind)}")
    if start != 0 or end == 0:
        raise ValueError(
            f"model.start_scheduler and model.end_scheduler must be 0 and above 0, or both -1 for no ramp, got "
            f"{shown(start)} and {shown(end)}: the published code divides by their difference, and before a later "
            "start its weight is full"
        )
    return BetaConfig(value=weight, schedule=schedules[kind], end=end * scale)  # type: ignore[arg-type]


def _read(path: Path) -> tuple[dict[str, Any], list[KeyRow]]:
    """Content of the file; lines of a section that are not indented as the others are corrected and reported.

    Files have two levels, and lists stand on one line, so a wrong indentation leaves no doubt.
    """
    where = "load_reference_config"
    corrected = []
    with reading(where, path, "a YAML file"):
        try:
            text = read_file(where, path, follow=True).decode()
        except FileNotFoundError:
            raise FileNotFoundError(f"{where}: no configuration file {path}") from None
        try:
            content = yaml.load(text, Loader=BoundedLoader)
        except yaml.YAMLError as error:
            lines = text.splitlines()
            for i, line in enumerate(lines):
                found = re.match(r"(\s+)(\w+)(:\s.*)", line)
                if found and found[1] != "  ":
                    lines[i] = f"  {found[2]}{found[3]}"
                    note = f"line {i + 1}: indentation of {found[2]} corrected"
                    corrected.append(KeyRow(found[2], None, "corrected", note))
            try:
                content = yaml.load("\n".join(lines), Loader=BoundedLoader)
            except yaml.YAMLError:
                raise error from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: {path} must hold keys and values, got {shown(content)}")
    return content, corrected


def _decoded(value: Any) -> Any:
    """Python's value of a text such as 'None' or '1e-3'; other text, and lists, as they are."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # what literal_eval has for a text
        return value


def _checked(key: str, value: Any) -> Any:
    """`value` if its kind is that of the key's default; ints become floats where those are wanted."""
    if key not in DEFAULTS:
        near = difflib.get_close_matches(key, DEFAULTS, n=1, cutoff=0.6)
        raise ValueError(f"unknown key {unquoted(key)}" + (f"; did you mean {near[0]}?" if near else ""))
    default = DEFAULTS[key]
    if default is None or (value is None and key in NULLABLE) or (key in IDLE and key != "dataset.size"):
        return value
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise ValueError(f"{key} must be below 2^63, got {shown(value)}")
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, list) and isinstance(value, tuple):
        return list(value)
    if type(value) is not type(default):
        kinds = {bool: "true or false", int: "an int", float: "a number", str: "a string", list: "a list"}
        raise ValueError(f"{key} must be {kinds[type(default)]}, got {shown(value)}")
    return value
