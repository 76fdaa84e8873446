"""Configuration: frozen dataclasses, presets, YAML in and out."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from vamoh._files import check_name, check_path, read_file, reading, write_file
from vamoh._options import (
    Activation,
    Centroids,
    GatingBound,
    Initialization,
    Kl,
    LikelihoodKind,
    NeighborMetric,
    Objective,
    Prior,
    check_model,
    check_types,
    nearest,
    plain,
)
from vamoh._shown import shown, unquoted

T = TypeVar("T")

_LARGEST = 100_000
"""Most characters of a YAML file, and values with its aliases written out; a configuration has some thousand."""
_DEEPEST = 20


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of the model: the keywords of `VaMoH`, which documents them.

    Coordinate dimensions and channels come from the data, the seed from `Config.seed`.
    """

    latent_dim: int = 32
    """latent dimensions Z"""
    components: int = 4
    """mixture components K"""
    frequencies: int = 128
    """random Fourier frequencies; 0 encodes nothing (raw coordinates)"""
    frequency_scale: float = 2.0
    """standard deviation of the frequencies"""
    learn_frequencies: bool = False
    """train the frequencies"""
    encoder_centroids: tuple[int, ...] = (196, 49, 25)
    """points left by each convolution of the encoder"""
    encoder_neighbors: tuple[int, ...] = (9, 9, 9)
    """neighbours of each convolution"""
    encoder_channels: tuple[int, ...] = (32, 32, 32)
    """channels of each convolution"""
    pool_centroids: tuple[int, ...] = ()
    """points left by the average pooling after each convolution; none after the rest"""
    pool_neighbors: tuple[int, ...] = ()
    """neighbours of each average pooling"""
    weight_net: tuple[int, ...] = (16, 16)
    """widths of the weight net of every convolution"""
    weight_net_slope: float | None = None
    """LeakyReLU slope of the weight net; None: affine, as in the published code"""
    coord_offset: tuple[float, ...] = ()
    """what is taken from the coordinates; none: nothing, but training measures bare points of other units"""
    coord_scale: tuple[float, ...] = ()
    """what they are then divided by, along every axis"""
    neighbor_metric: NeighborMetric = "encoded"
    """coordinates in which neighbours are near"""
    centroids: Centroids = "ordered"
    """of the encoder: points of the cloud, or coordinates chosen once from the data's domain"""
    encoder_density: bool = False
    """the encoder sees values as 2y - 1, with a constant 1 beside them"""
    prior: Prior = "flow"
    """p(z): standard normal or planar flow"""
    flow_layers: int = 10
    """planar layers T of the flow"""
    hypernet_widths: tuple[int, ...] = (128, 256)
    """hidden widths of each hypernetwork"""
    inr_widths: tuple[int, ...] = (32, 32)
    """hidden widths of each generated network"""
    inr_activation: Activation = "leaky_relu"
    """activation of the generated networks"""
    inr_slope: float = 0.1
    """slope of the leaky activation"""
    inr_omega: float = 30.0
    """frequency of the sine activation"""
    gating_widths: tuple[int, ...] = (32, 32)
    """hidden widths of p(c | x, z) and q(c | x, y, z)"""
    gating_bound: GatingBound = "none"
    """bound on the gating logits; tanh, as in the published code"""
    likelihood: LikelihoodKind = "logistic"
    """p(y | x, z, c)"""
    scale: float = 0.1
    """initial scale of the logistic"""
    learn_scale: bool = True
    """train the scale of the logistic"""
    max_scale: float = 1.0
    """largest scale of the logistic"""
    bin_width: float = 1 / 256
    """width of a bin of the logistic"""
    epsilon: float = 1e-7
    """added to a bin's probability"""
    open_ends: bool = False
    """the first and last bin reach to infinity"""
    kl: Kl = "exact"
    """objective: the true bound, or what the published code computes"""
    kl_samples: int = 16
    """samples of z of the KL estimate"""
    objective: Objective = "elbo"
    """which component explains a point: a network says, or the components are summed out, without that network"""
    initialization: Initialization = "stable"
    """initial values: near neutral, or as in the published code"""

    def __post_init__(self) -> None:
        _check_types(self, "model")
        check_model("config: model.", vars(self))


@dataclass(frozen=True)
class DataConfig:
    """What to train on: the arguments of `open_dataset`."""

    name: str = "digits"
    """a bundled data set, or images, arrays, netcdf, voxels for files of your own"""
    path: str | None = None
    """folder or file of your own data"""
    size: int | None = None
    """resolution to bring the data to; None: as it comes"""
    root: str | None = None
    """folder for generated data; None: the user's cache folder"""
    splits: str | None = None
    """.json or .npz file of the train, validation and test functions; None: as docs/data.md says"""

    def __post_init__(self) -> None:
        _check_types(self, "data")
        _check("data", self, "size", self.size is None or self.size >= 1, "at least 1")
        for name in ("path", "root"):
            if getattr(self, name) is not None:
                check_name("config", f"data.{name}", getattr(self, name))


@dataclass(frozen=True)
class BetaConfig:
    """Weight of a KL term: `initial` before epoch `start`, `value` from epoch `end` on, a ramp between.

    With t from 0 to 1 over the ramp the way from one to the other is gone by t (linear), t² (quadratic) or 2^t - 1
    (exponential).
    """

    value: float = 1.0
    """final weight"""
    schedule: Literal["constant", "linear", "quadratic", "exponential"] = "constant"
    """shape of the ramp; constant: no ramp"""
    start: float = 0.0
    """epoch at which the ramp leaves the initial weight"""
    end: float = 0.0
    """epoch at which the ramp reaches the final weight"""
    initial: float = 0.0
    """weight before the ramp"""

    def __post_init__(self) -> None:
        _check_types(self, "beta")
        for name in ("value", "initial"):
            _check("beta", self, name, getattr(self, name) >= 0, "at least 0")
        _check("beta", self, "start", self.start >= 0, "at least 0")
        _check("beta", self, "end", self.end >= self.start, f"at least beta.start ({self.start})")


@dataclass(frozen=True)
class ContextConfig:
    """What the encoder sees of a function in training: for which share of the functions it is which part.

    The rest of the functions it sees whole. Sizes are drawn uniformly for each function.
    """

    random: float = 0.0
    """share of functions of which points are hidden at random, at a rate from 0 to `rate`"""
    rate: float = 0.9
    """largest rate of `random`"""
    box: float = 0.0
    """share of functions with a hidden box, along every axis a quarter to three quarters of the domain"""
    outside: float = 0.0
    """share of functions of which only such a box is seen"""
    half: float = 0.0
    """share of functions of which one side is seen, a quarter to three quarters of the domain along one axis"""

    def __post_init__(self) -> None:
        _check_types(self, "context")
        for name in ("random", "rate", "box", "outside", "half"):
            _check("context", self, name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        if self.random + self.box + self.outside + self.half > 1 + 1e-9:
            _check("context", self, "random", False, "at most 1 together with box, outside and half")

    @property
    def whole(self) -> bool:
        """Whether every function is seen whole."""
        return self.random + self.box + self.outside + self.half == 0


@dataclass(frozen=True)
class TrainConfig:
    """The training loop. An epoch is one pass over the training split."""

    steps: int = 2000
    """updates in all"""
    batch_size: int = 64
    """functions per update"""
    lr: float = 1e-3
    """learning rate of Adam"""
    lr_decay: float = 1.0
    """factor on the learning rate per epoch, applied smoothly; 1: constant"""
    lr_warmup: int = 0
    """first steps over which the learning rate grows linearly to its full value"""
    clip: float = 200.0
    """largest global norm of the gradient; .inf: any"""
    weight_decay: float = 0.0
    """weight decay of Adam"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: linear layers in it, by torch.autocast; the rest stays float32"""
    point_dropout: float = 0.0
    """each batch loses points at a rate drawn uniformly from 0 to this; 0: off"""
    context: ContextConfig = field(default_factory=ContextConfig)
    """what the encoder sees of each function"""
    target: Literal["observed", "all"] = "observed"
    """the likelihood is of the points that the encoder sees, or of all, those that `context` hides too"""
    num_points: int | None = None
    """exactly this many random points per batch; None: all"""
    flow_warmup: float = 0.0
    """epochs with a standard normal prior before the flow"""
    gating_warmup: float = 0.0
    """epochs with a uniform prior over components"""
    beta_z: BetaConfig = field(default_factory=BetaConfig)
    """weight of the KL term of z"""
    beta_c: BetaConfig = field(default_factory=BetaConfig)
    """weight of the KL term of the components"""
    checkpoint_every: int = 500
    """steps between checkpoints"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    evaluate_every: int = 500
    """steps between evaluations on the validation split"""
    evaluate_count: int = 200
    """functions of the validation split in an evaluation, the first ones"""
    threads: int | None = None
    """CPU threads; None: torch's choice"""
    shard: bool = False
    """several processes share out the parameters of the model (FSDP2) instead of each holding all"""
    tensorboard: bool = False
    """also write TensorBoard events"""

    def __post_init__(self) -> None:
        _check_types(self, "train")
        for name in ("steps", "batch_size", "checkpoint_every", "log_every", "evaluate_every", "evaluate_count"):
            _check("train", self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("num_points", "threads"):
            value = getattr(self, name)
            _check("train", self, name, value is None or value >= 1, "at least 1")
        _check("train", self, "threads", self.threads is None or self.threads <= 1024, "at most 1024")
        for name in ("lr", "clip"):
            _check("train", self, name, getattr(self, name) > 0, "above 0")
        _check("train", self, "lr_decay", 0 < self.lr_decay <= 1, "above 0 and at most 1")
        for name in ("lr_warmup", "weight_decay", "flow_warmup", "gating_warmup"):
            _check("train", self, name, getattr(self, name) >= 0, "at least 0")
        _check("train", self, "point_dropout", 0 <= self.point_dropout <= 1, "between 0 and 1")


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    preset: str | None = None
    """the preset this started from"""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    """seed of the initial values and of every random draw"""

    def __post_init__(self) -> None:
        _check_types(self, "")
        _check("", self, "seed", 0 <= self.seed < 2**63, "between 0 and 2^63 - 1")


def preset(name: str) -> Config:
    """Return the preset `name`; ValueError naming the nearest one when there is none."""
    if not isinstance(name, str):
        raise TypeError(f"preset: name must be a str, got {type(name).__name__}")
    if name not in PRESETS:
        raise ValueError(f"preset: name must be one of {', '.join(PRESETS)}, got {shown(name)}{nearest(name, PRESETS)}")
    return PRESETS[name]


def load_config(source: str | os.PathLike[str]) -> Config:
    """Return the preset of that name, or read a YAML file.

    A file may leave out what it does not change: the rest comes from the preset it names under `preset`, or from the
    defaults. Raises ValueError for an unknown preset, an unknown key or a bad value, TypeError for a value of the
    wrong type, FileNotFoundError for a missing file; each names the key and what was expected.
    """
    if isinstance(source, str) and source in PRESETS:
        return PRESETS[source]
    path = check_path("load_config", "source", source)
    if not path.is_file():
        if isinstance(source, str) and path.name == source and not path.suffix:
            return preset(source)
        raise FileNotFoundError(f"load_config: no configuration file {path}")
    content = _read(path)
    try:
        return config_from_dict(content)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def load_run_config(folder: str | os.PathLike[str]) -> Config:
    """Read the configuration of a run folder, as `load_config`; ValueError where it is a link."""
    path = check_path("load_config", "folder", folder) / "config.yaml"
    if path.is_symlink():
        raise ValueError(f"load_config: {path} must be a file of the run, got a link")
    return load_config(path)


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write a YAML file from which `load_config` reads back an equal configuration; whole or not at all."""
    path = check_path("save_config", "path", path)
    if not isinstance(config, Config):
        raise TypeError(f"save_config: config must be a Config, got {type(config).__name__}")
    if not path.name:
        raise ValueError(f"save_config: path must name a file, got {shown(str(path))}")
    write_file("save_config", path, config_to_yaml(config))


def config_to_yaml(config: Config) -> str:
    """Text of the file that `save_config` writes."""
    text: str = yaml.dump(config_to_dict(config), Dumper=_Dumper, sort_keys=False)
    return text


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionary of plain values; tuples become lists."""
    return typing.cast(dict[str, Any], plain(asdict(config)))


def config_from_dict(content: Mapping[str, Any]) -> Config:
    """Inverse of `config_to_dict`; missing keys come from the preset that `content` names, or from the defaults."""
    if not isinstance(content, Mapping):
        raise TypeError(f"config: expected keys and values, got {shown(content)} ({type(content).__name__})")
    name = content.get("preset")
    return _build(preset(name) if isinstance(name, str) else Config(), content, "")


def differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines "key: a != b" for every value in which two nested dictionaries differ; an absent value reads "nothing"."""
    lines = []
    for key in sorted({*left, *right}, key=str):
        a, b = left.get(key, "nothing"), right.get(key, "nothing")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{unquoted(key)}: {unquoted(a)} != {unquoted(b)}")
    return lines


class BoundedLoader(yaml.SafeLoader):
    """Plain values alone, no deeper and no more than a configuration has: a few bytes of aliases can stand for any
    memory.
    """

    def __init__(self, stream: str) -> None:
        if len(stream) > _LARGEST:
            raise yaml.YAMLError(f"it is larger than {_LARGEST} characters")
        super().__init__(stream)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Count nodes as if aliases were written out, and how deep they lie."""
        start, alias = self._nodes, self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {_DEEPEST} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if alias and id(node) not in self._sizes:
            raise yaml.YAMLError("an alias lies in what it repeats")
        self._nodes += self._sizes[id(node)] if alias else 1
        if self._nodes > _LARGEST:
            raise yaml.YAMLError(f"its aliases stand for more than {_LARGEST} values")
        self._sizes.setdefault(id(node), self._nodes - start)
        return node


class _Loader(BoundedLoader):
    """YAML 1.1 takes 1e-3 for text; here it is a number."""


class _Dumper(yaml.SafeDumper):
    """Lists on one line; text that looks like 1e-3 in quotes."""


_Dumper.add_representer(
    list, lambda dumper, entries: dumper.represent_sequence("tag:yaml.org,2002:seq", entries, flow_style=True)
)
_EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
for _style in (_Loader, _Dumper):
    _style.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def _build(base: T, content: Mapping[str, Any], section: str) -> T:
    """Copy of the dataclass `base` with the values of `content`."""
    hints = typing.get_type_hints(type(base))
    values = {f.name: getattr(base, f.name) for f in fields(base)}  # type: ignore[arg-type]
    for key, value in content.items():
        where = f"{section}.{unquoted(key)}" if section else unquoted(key)
        if key not in values:
            hint = nearest(unquoted(key), values) or f"; {section or 'config'} has {', '.join(values)}"
            raise ValueError(f"config: unknown key {where}{hint}")
        if is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                got = f"{shown(value)} ({type(value).__name__})"
                raise TypeError(f"config: {where} must be a section of keys and values, got {got}")
            values[key] = _build(values[key], value, where)
        else:
            values[key] = tuple(value) if isinstance(value, list) else value
    try:
        return type(base)(**values)
    except (TypeError, ValueError) as error:
        # A BetaConfig does not know which of the two it is.
        text = str(error).replace(" beta.", f" {section}.").replace(" context.", f" {section}.")
        raise type(error)(text) from None


def _check(section: str, config: object, name: str, good: bool, wanted: str) -> None:
    if not good:
        key = f"{section}.{name}" if section else name
        raise ValueError(f"config: {key} must be {wanted}, got {shown(plain(getattr(config, name)))}")


def _check_types(config: Any, section: str) -> None:
    """Check every field against its annotation; ints given for floats become floats."""
    hints = typing.get_type_hints(type(config))
    where = f"config: {section}." if section else "config: "
    for name, value in check_types(where, hints, vars(config)).items():
        object.__setattr__(config, name, value)


def _read(path: Path) -> Any:
    """Plain values of a YAML file; of an empty one, no keys."""
    with reading("load_config", path, "a YAML file"):
        content = yaml.load(read_file("load_config", path, follow=True).decode(), Loader=_Loader)
    return {} if content is None else content


def _read_preset(name: str) -> Config:
    return _build(Config(preset=name), _read(Path(__file__).with_name("presets") / f"{name}.yaml"), "")


# In vamoh/presets, files as a user's own. The first five are the configurations of the paper's Table 3. Where the
# authors' YAML file differs, the paper's value stands and the file's is in a comment. Common to all five: 128
# frequencies of standard deviation 2, a standard normal prior for 200 epochs, a uniform p(c) for 100 (not shapes3d),
# point dropout off. The paper describes LeakyReLU weight nets, the published code has affine ones: the code's stand
# there (weight_net_slope None). The paper's unbounded gating logits and learnable scale stand against the code's tanh
# and constant 0.1. `steps` is the paper's number of epochs over the bundled training split; the first hundred steps at
# a lower learning rate are ours. The last two are not the paper's.
PRESETS = {
    name: _read_preset(name) for name in ("celebahq", "shapes3d", "polymnist", "shapenet", "era5", "digits", "climate")
}
