"""What options may be: types by annotation, and the choices and ranges of a model's, for its configuration too.

Without torch, which a configuration does not need.
"""

from __future__ import annotations

import collections.abc
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from vamoh._shown import LENGTH, shown

NeighborMetric = Literal["encoded", "raw"]
Centroids = Literal["ordered", "points", "fixed"]
Prior = Literal["normal", "flow"]
Activation = Literal["leaky_relu", "relu", "sine"]
GatingBound = Literal["none", "tanh"]
LikelihoodKind = Literal["logistic", "bernoulli", "continuous_bernoulli"]
Kl = Literal["exact", "cross_entropy"]
Objective = Literal["elbo", "marginal"]
Initialization = Literal["stable", "published"]

_CHOICES = {
    "neighbor_metric": NeighborMetric,
    "centroids": Centroids,
    "prior": Prior,
    "inr_activation": Activation,
    "gating_bound": GatingBound,
    "kl": Kl,
    "objective": Objective,
    "initialization": Initialization,
}
_SIZES = (
    "encoder_centroids", "encoder_neighbors", "encoder_channels", "pool_centroids", "pool_neighbors", "weight_net",
    "hypernet_widths", "inr_widths", "gating_widths",
)  # fmt: skip


def check_types(where: str, hints: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, of the annotated types, ints given for floats as floats; numbers must be finite and below 2^63.

    Names are preceded by `where`, as "VaMoH: " or "config: model.". Raises TypeError or ValueError.
    """
    checked = {}
    for name, value in values.items():
        hint = hints[name]
        if not _is_bounded(value) and not (name == "clip" and value == math.inf):
            raise ValueError(f"{where}{name} must be {_describe(hint)}, finite and below 2^63, got {shown(value)}")
        value = _as_float(value, hint)
        if not _fits(value, hint):
            got = f"{shown(plain(value))} ({type(plain(value)).__name__})"
            error = ValueError if typing.get_origin(hint) is Literal and isinstance(value, str) else TypeError
            near = nearest(value[:LENGTH], typing.get_args(hint)) if error is ValueError else ""
            raise error(f"{where}{name} must be {_describe(hint)}, got {got}{near}")
        checked[name] = value
    return checked


def check_model(where: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError unless a model can have these options, which are of the right types.

    options: the keywords of `vamoh.VaMoH`, but for its dimensions and seed. where: as in `check_types`.
    """
    for name, kinds in _CHOICES.items():
        _check(where, options, name, options[name] in typing.get_args(kinds), _describe(kinds))
    for name in ("latent_dim", "components", "flow_layers", "kl_samples"):
        _check(where, options, name, options[name] >= 1, "at least 1")
    for name in ("frequencies", "inr_slope"):
        _check(where, options, name, options[name] >= 0, "at least 0")
    for name in ("frequency_scale", "inr_omega"):
        _check(where, options, name, options[name] > 0, "above 0")
    for name in _SIZES:
        _check(where, options, name, all(n >= 1 for n in options[name]), "a list of ints of at least 1")
    for name in ("encoder_centroids", "weight_net"):
        _check(where, options, name, len(options[name]) >= 1, "a list of at least one int")
    _check(where, options, "coord_scale", all(s > 0 for s in options["coord_scale"]), "a list of numbers above 0")
    _check_length(where, options, "coord_scale", "coord_offset")
    _check_length(where, options, "encoder_neighbors", "encoder_centroids")
    _check_length(where, options, "encoder_channels", "encoder_centroids")
    layers = len(options["encoder_centroids"])
    _check(where, options, "pool_centroids", len(options["pool_centroids"]) <= layers, f"at most {layers} long")
    _check_length(where, options, "pool_neighbors", "pool_centroids")
    left = None
    for centroids, neighbors, channels in encoder_stages(options):
        kind = "pool" if channels is None else "encoder"
        if left is not None:
            wanted = f"at most the centroids of the stage before (here {left})"
            _check(where, options, f"{kind}_centroids", centroids <= left, wanted)
            _check(where, options, f"{kind}_neighbors", neighbors <= left, wanted)
        left = centroids
    check_likelihood(where, options)


def check_likelihood(where: str, options: Mapping[str, Any]) -> None:
    """As `check_model`, for the options of `vamoh.likelihood.Likelihood`; its kind is the one called likelihood."""
    kinds = typing.get_args(LikelihoodKind)
    _check(where, options, "likelihood", options["likelihood"] in kinds, _describe(LikelihoodKind))
    _check(where, options, "scale", 0 < options["scale"] < 1, "above 0 and below 1")
    for name in ("max_scale", "bin_width"):
        _check(where, options, name, options[name] > 0, "above 0")
    _check(where, options, "epsilon", options["epsilon"] >= 0, "at least 0")


def encoder_stages(options: Mapping[str, Any]) -> list[tuple[int, int, int | None]]:
    """Centroids, neighbours and channels of every stage of the encoder; None: average pooling has no channels.

    The first convolutions are followed by a pooling each, as many as `pool_centroids` lists.
    """
    convolutions = zip(*(options[f"encoder_{name}"] for name in ("centroids", "neighbors", "channels")), strict=True)
    poolings = list(zip(options["pool_centroids"], options["pool_neighbors"], strict=True))
    stages: list[tuple[int, int, int | None]] = []
    for i, convolution in enumerate(convolutions):
        stages.append(convolution)
        stages += [(*pooling, None) for pooling in poolings[i : i + 1]]
    return stages


def plain(value: Any) -> Any:
    """The value with tuples as lists, as YAML and messages show them."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: which known one may be meant."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def _check(where: str, options: Mapping[str, Any], name: str, good: bool, wanted: str) -> None:
    if not good:
        raise ValueError(f"{where}{name} must be {wanted}, got {shown(plain(options[name]))}")


def _check_length(where: str, options: Mapping[str, Any], name: str, other: str) -> None:
    length = len(options[other])
    _check(where, options, name, len(options[name]) == length, f"as long as {other} ({length})")


def _is_bounded(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_bounded(entry) for entry in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) < 2**63


def _as_float(value: Any, hint: Any) -> Any:
    """The value, with ints as floats where these are wanted."""
    if isinstance(value, tuple | list) and typing.get_origin(hint) in (tuple, collections.abc.Sequence):
        return type(value)(_as_float(entry, typing.get_args(hint)[0]) for entry in value)
    return float(value) if type(value) is int and _fits(1.0, hint) and not _fits(1, hint) else value


def _fits(value: object, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin in (tuple, collections.abc.Sequence):
        kinds = (tuple,) if origin is tuple else (tuple, list)
        return isinstance(value, kinds) and all(_fits(entry, arguments[0]) for entry in value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in arguments)
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin in (tuple, collections.abc.Sequence):
        return f"a list of {arguments[0].__name__}s"
    names = {int: "an int", float: "a number", str: "a string", bool: "true or false", types.NoneType: "null"}
    return names.get(hint) or f"a {hint.__name__}"
