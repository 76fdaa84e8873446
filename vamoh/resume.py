"""What a run may go on from: configuration, data and training state must be those it was started with."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vamoh._checks import listed, reason, shown, unquoted
from vamoh.config import Config, config_to_dict, differences
from vamoh.data import Dataset

# What may change between a run and its continuation: nothing that alters the steps themselves.
_FREE = (
    "steps",
    "checkpoint_every",
    "log_every",
    "evaluate_every",
    "evaluate_count",
    "threads",
    "shard",
    "tensorboard",
)
PLACES = ("path", "root", "splits")
"""Where the data lie may change too: that they are the same shows in their checksum."""
_STATE = {"seconds": float, "config": dict, "data": dict, "optimizer": dict, "points": Tensor, "noise": Tensor}


def check_config(out: str | os.PathLike[str], run: Config, config: Config) -> None:
    """Raise ValueError unless a run of the configuration `run` may go on with `config`."""
    if not config.model.coord_offset:  # measured when the run began
        offset, scale = run.model.coord_offset, run.model.coord_scale
        config = replace(config, model=replace(config.model, coord_offset=offset, coord_scale=scale))
    freed = replace(run.train, **{name: getattr(config.train, name) for name in _FREE})
    moved = replace(run.data, **{name: getattr(config.data, name) for name in PLACES})
    lines = differences(config_to_dict(replace(run, train=freed, data=moved)), config_to_dict(config))
    if lines:
        raise ValueError(
            f"train: {out} was started with another configuration: {listed(lines)} "
            f"(on resume only train.{', '.join(_FREE)} and data.{', '.join(PLACES)} may change)"
        )


def check_data(stored: Mapping[str, Any], dataset: Dataset, run_folder: str | os.PathLike[str]) -> None:
    """Raise ValueError unless the data are those whose fingerprint a run has stored."""
    found = dataset.fingerprint()
    lines = differences(stored, {name: found[name] for name in stored if name in found})
    if lines:
        raise ValueError(
            f"train: data set {dataset.name} must be the one the run in {run_folder} started with, got another: "
            f"{listed(lines)} (files added, removed, renamed or changed make another data set)"
        )


def check_state(run_folder: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Raise ValueError for a training state that holds something else than a trainer saves."""
    lines = [f"{name} is missing" for name in _STATE if name not in state]
    lines += [f"{unquoted(name)} is unknown" for name in state if name not in {*_STATE, "domain", "format", "step"}]
    for name, kind in _STATE.items():
        if name in state and type(state[name]) is not kind:
            lines.append(f"{name} is {type(state[name]).__name__}, expected {kind.__name__}")
    try:
        if not lines:
            json.dumps([state["config"], state["data"]])  # plain values, which can be compared
            for name in ("points", "noise"):
                generator = torch.Generator()
                generator.set_state(_alike(name, state[name], generator.get_state()))
            if not 0 <= state["seconds"] < math.inf:
                lines.append(f"seconds is {state['seconds']}")
    except (TypeError, ValueError, RuntimeError) as error:
        lines.append(reason(error))
    if lines:
        raise ValueError(f"Trainer.resume: the training state in {run_folder} is damaged: {listed(lines)}")


def moments(
    run_folder: str | os.PathLike[str], state: Mapping[str, Any], parameters: Sequence[Tensor]
) -> dict[int, dict[str, Tensor]]:
    """Adam's moments of each parameter, in fresh tensors; ValueError unless they fit the parameters.

    The optimizer itself checks no shapes, and its kernels would write out of bounds.
    """
    found: dict[int, dict[str, Tensor]] = {}
    lines = []
    entries = state.get("state")
    if not isinstance(entries, dict):
        lines.append(f"its state is {shown(entries)}")
        entries = {}
    for index, entry in entries.items():
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(entry, dict):
            lines.append(f"entry {shown(index)} belongs to none of {len(parameters)} parameters")
        elif entry.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            lines.append(f"entry {index} must have step, exp_avg and exp_avg_sq, got {shown([*entry])}")
        else:
            like = torch.empty(parameters[index].shape, dtype=parameters[index].dtype, device="meta")
            wanted = {"step": torch.empty((), device="meta"), "exp_avg": like, "exp_avg_sq": like}
            try:
                found[index] = {name: _alike(name, entry[name], wanted[name]) for name in wanted}
            except ValueError as error:
                lines.append(f"entry {index}: {error}")
    if lines:
        raise ValueError(f"Trainer.resume: the optimizer's state in {run_folder} does not fit: {listed(lines)}")
    return found


def _alike(name: str, value: object, wanted: Tensor) -> Tensor:
    """A copy of a tensor in memory of its own; ValueError unless it is a plain one of the wanted shape and dtype."""
    if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
        raise ValueError(f"{name} must be a tensor in memory, got {shown(value)}")
    if value.shape != wanted.shape or value.dtype != wanted.dtype:
        raise ValueError(
            f"{name} must be {wanted.dtype} {list(wanted.shape)}, got {value.dtype} {shown(list(value.shape))}"
        )
    return torch.empty(value.shape, dtype=value.dtype).copy_(value)
