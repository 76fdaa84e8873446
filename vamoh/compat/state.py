"""Tensors under the published code's names, to ours and back; its checkpoints to run folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vamoh import checkpoint
from vamoh._files import reading, write_file
from vamoh._lock import locked
from vamoh._shown import listed, reason, shown, unquoted
from vamoh.compat.config import Translation
from vamoh.config import save_config
from vamoh.gating import Gating
from vamoh.latent import FlowPrior
from vamoh.model import VaMoH

SCALES = "lik_x_logscales"
FREQUENCIES = "decoder.encoding.frequency_matrix"
TEMPLATE = "decoder.mlp."
"""A coordinate network whose weights the published code never uses: the hypernetworks make them."""
COPY = "fmodel.stateless_model."
"""A copy of the template, without values."""

_PRIORS = "vamoh_priors"

Parts = list[Tensor]


class Entry(NamedTuple):
    """Tensors of ours that hold the same numbers as tensors of the published code, and how one becomes the other."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Callable[[Parts], Parts]
    write: Callable[[Parts], Parts]


class TensorRow(NamedTuple):
    """Line of the table of a conversion: what became of a tensor of the published code."""

    theirs: str
    status: str
    ours: str


@dataclass(frozen=True)
class Conversion:
    """A model of a checkpoint, the epoch after which it was saved, and what became of every tensor."""

    model: VaMoH
    epoch: int
    rows: tuple[TensorRow, ...]


def entries(model: VaMoH) -> Iterator[Entry]:
    """Every tensor that the model and the published code share."""
    if len(model.encoding.frequencies):
        yield _same("encoding.frequencies", FREQUENCIES)
    if model.likelihood.op.kind == "logistic":
        yield Entry(("likelihood.raw_scale",), (SCALES,), lambda x: [x[0].mT], lambda x: [x[0].mT])
    at = 0
    for i, stage in enumerate(model.encoder.stages):
        if stage.channels is None:
            at += 1
            continue
        conv = sum(s.channels is not None for s in model.encoder.stages[:i])
        ours, theirs = f"encoder.convs.{conv}", f"encoder_z.layers.{at}"
        for n in range(len(model.encoder.convs[conv].weight_net)):  # type: ignore[arg-type]
            net = f"{theirs}.weight_net.forward_layers.{2 * n}"
            yield Entry(
                (f"{ours}.weight_net.{n}.weight",),
                (f"{net}.weight",),
                lambda x: [x[0][:, :, 0, 0]],
                lambda x: [x[0][:, :, None, None]],
            )
            yield _same(f"{ours}.weight_net.{n}.bias", f"{net}.bias")
        yield from (_same(f"{ours}.linear.{kind}", f"{theirs}.linear.{kind}") for kind in ("weight", "bias"))
        at += 2  # the convolution and its activation
    yield from (_same(f"encoder.head.{kind}", f"encoder_z.linear_layers.0.{kind}") for kind in ("weight", "bias"))
    for n in range(len(model.hypernet.weights)):
        for ours, theirs in (("weights", "weight"), ("biases", "bias")):
            heads = tuple(f"hyper_list.{k}.mlp.layers.{n}.0.{theirs}" for k in range(model.components))
            yield Entry((f"hypernet.{ours}.{n}",), heads, lambda x: [torch.stack(x)], lambda x: list(x[0]))
    if isinstance(model.prior, FlowPrior):
        for name in ("u", "w", "b"):
            layers = tuple(f"prior_z.prior_distr_z.flows.{t}.{name}" for t in range(len(model.prior.b)))
            yield Entry((f"prior.{name}",), layers, lambda x: [torch.cat(x)], lambda x: list(x[0].split(1)))
        for name in ("loc", "log_scale"):
            theirs = f"prior_z.prior_distr_z.q0.{name}"
            yield Entry((f"prior.{name}",), (theirs,), lambda x: [x[0][0]], lambda x: [x[0][None]])
    yield from _gating("gating_prior", "prior_cat_encoder", model.gating_prior)
    if model.gating_posterior is not None:
        yield from _gating("gating_posterior", "post_cat_encoder", model.gating_posterior)


def translate(theirs: Mapping[str, Tensor], model: VaMoH) -> dict[str, Tensor]:
    """Tensors under the published code's names (weights, or their gradients) under ours; absent ones are left out."""
    found: dict[str, Tensor] = {}
    for entry in entries(model):
        if all(name in theirs for name in entry.theirs):
            found.update(zip(entry.ours, entry.read([theirs[name] for name in entry.theirs]), strict=True))
    return found


def from_reference(theirs: Mapping[str, Tensor], model: VaMoH) -> tuple[TensorRow, ...]:
    """Load a state dict of the published code into `model`; return what became of every tensor.

    Raises ValueError, and leaves the model alone, when a tensor is missing, unknown, of another shape or dtype, or a
    repetition that differs from what it repeats.
    """
    lines: list[str] = []
    rows: list[TensorRow] = []
    used: set[str] = set()
    wanted = model.state_dict()
    state = dict(wanted)
    for entry in entries(model):
        used.update(entry.theirs)
        expected = dict(zip(entry.theirs, entry.write([wanted[name] for name in entry.ours]), strict=True))
        good = True
        for name, tensor in expected.items():
            problem = _differs(theirs.get(name), tensor)
            lines += [f"{name} {problem}"] if problem else []
            good &= not problem
            rows.append(TensorRow(name, "mapped", ", ".join(entry.ours)))
        if good:
            state.update(zip(entry.ours, entry.read([theirs[name] for name in entry.theirs]), strict=True))
    for name in theirs:
        origin = _origin(name)
        if name in used:
            continue
        if origin != name and origin in theirs:
            if _differs(theirs[name], theirs[origin]) or not torch.equal(theirs[name], theirs[origin]):
                lines.append(f"{unquoted(name)} repeats {origin} but differs from it")
            rows.append(TensorRow(name, "derived", f"repeats {origin}"))
        elif name.startswith((TEMPLATE, COPY)):
            rows.append(TensorRow(name, "ignored", "a template whose weights are never used"))
        else:
            lines.append(f"{unquoted(name)} is unknown")
    if lines:
        raise ValueError(f"from_reference: the checkpoint does not fit the configuration: {listed(lines)}")
    if model.likelihood.op.kind != "logistic":
        rows.append(TensorRow("", "derived", "likelihood.raw_scale, which this likelihood does not use"))
    model.load_state_dict(state)
    return tuple(rows)


def to_reference(model: VaMoH) -> dict[str, Tensor]:
    """State dict as the published code saves it, repetitions included; its unused template is zero, a copy of it empty.

    Raises ValueError for a model that the published code would compute differently.
    """
    logistic = model.likelihood.op
    fixed: dict[str, tuple[object, object]] = {
        "weight_net_slope": (model.encoder.convs[0].slope, None),
        "neighbor_metric": (model.neighbor_metric, "encoded"),
        "coord_scale": (list(model.domain[1]), []),
        "centroids": (model.centroids, "points"),
        "encoder_density": (model.encoder.density, False),
        "objective": ("marginal" if model.gating_posterior is None else "elbo", "elbo"),
        "gating_bound": ("tanh" if model.gating_prior.bounded else "none", "tanh"),
    }
    if logistic.kind == "logistic":
        fixed |= {
            "max_scale": (model.likelihood.max_scale, 0.1),
            "bin_width": (2 * logistic.half_bin, 1 / 256),
            "epsilon": (logistic.epsilon, 1e-7),
            "open_ends": (logistic.open_ends, False),
        }
    for name, (found, wanted) in fixed.items():
        if found != wanted:
            raise ValueError(f"to_reference: {name} must be {wanted!r}, as in the published code, got {shown(found)}")
    own = model.state_dict()
    state: dict[str, Tensor] = {}
    for entry in entries(model):
        parts = entry.write([own[name] for name in entry.ours])
        state.update((name, part.clone()) for name, part in zip(entry.theirs, parts, strict=True))
    like = model.encoder.head.weight
    for n, (a, b) in enumerate(zip(model.inr.widths[:-1], model.inr.widths[1:], strict=True)):
        state[f"{TEMPLATE}layers.{n}.0.weight"] = like.new_zeros(b, a)
        state[f"{TEMPLATE}layers.{n}.0.bias"] = like.new_zeros(b)
    for name in list(state):
        if name.startswith("decoder."):
            for k in range(model.components):
                state[f"hyper_list.{k}.function_representation.{name.removeprefix('decoder.')}"] = state[name]
        if name.startswith("prior_z.prior_distr_z."):
            state[f"prior_distr_z.{name.removeprefix('prior_z.')}"] = state[name]
        if name.startswith(TEMPLATE):
            state[f"{COPY}{name.removeprefix(TEMPLATE)}"] = torch.empty_like(state[name], device="meta")
    return state


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of the published code without running any code that it may hold.

    Raises FileNotFoundError when it is missing, ValueError when it is damaged, holds anything but tensors and plain
    values, or is no checkpoint of that kind.
    """
    where = "read_checkpoint"
    try:
        with reading(where, path, "a checkpoint"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: no checkpoint {path}") from None
    except ValueError as error:
        if not isinstance(error.__cause__, UnpicklingError):
            raise
        raise ValueError(
            f"{where}: {path} must hold tensors and plain values alone; objects in it are not loaded, as they could "
            f"run code ({reason(error.__cause__)})"
        ) from error
    if not isinstance(content, Mapping) or not {"epoch", "model_state"} <= set(content):
        raise ValueError(f"{where}: {path} must hold epoch and model_state, as the published code saves them")
    state = content["model_state"]
    named = isinstance(state, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not named:
        raise ValueError(f"{where}: model_state of {path} must map names to tensors")
    epoch, priors = content["epoch"], content.get(_PRIORS, {})
    if isinstance(epoch, bool) or not isinstance(epoch, int) or not -1 <= epoch < 1 << 31:
        raise ValueError(f"{where}: epoch of {path} must be an int from -1 to 2^31 - 1, got {shown(epoch)}")
    if not isinstance(priors, Mapping) or not all(isinstance(value, bool) for value in priors.values()):
        raise ValueError(f"{where}: {_PRIORS} of {path} must map names to true or false, got {shown(priors)}")
    return {str(key): value for key, value in content.items()}


def convert(path: str | os.PathLike[str], translation: Translation, out: str | os.PathLike[str]) -> Conversion:
    """Write the run folder `out` with the model of a checkpoint of the published code.

    Which priors are active follows from the checkpoint's epoch and the warm-ups of the configuration.
    Raises FileExistsError when `out` is in use, and as `read_checkpoint` and `from_reference`.
    """
    folder = Path(out)
    config = translation.config
    checkpoint.check_free("convert", folder, config)
    content = read_checkpoint(path)
    model = checkpoint.new_model(config, translation.coord_dim, translation.channels)
    rows = from_reference(content["model_state"], model)
    others = sorted({*content} - {"epoch", "model_state", _PRIORS})
    rows += tuple(TensorRow(name, "ignored", "not part of the model") for name in others)
    epoch = content["epoch"]
    priors = content.get(_PRIORS, {})
    model.use_flow = priors.get("use_flow", epoch >= translation.flow_warmup)
    model.use_gating_prior = priors.get("use_gating_prior", epoch >= translation.gating_warmup)
    with locked("convert", folder):
        checkpoint.check_free("convert", folder, config)
        save_config(config, folder / "config.yaml")
        checkpoint.save(folder, model, config, (epoch + 1) * translation.steps_per_epoch, {})
    return Conversion(model, epoch, rows)


def save_reference(model: VaMoH, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint from which the published code loads the model; it has no optimizer, and epoch 0.

    Which priors are active is noted beside, for `convert`; the published code has no place for it.
    Raises FileExistsError rather than overwrite, and as `to_reference`.
    """
    file = Path(path)
    if file.exists():
        raise FileExistsError(f"save_reference: out must be a new file, got {file}, which exists")
    state = to_reference(model)
    file.parent.mkdir(parents=True, exist_ok=True)
    priors = {"use_flow": model.use_flow, "use_gating_prior": model.use_gating_prior}
    content = BytesIO()  # torch.save does not tell what the disk said
    torch.save({"epoch": 0, "model_state": state, _PRIORS: priors}, content)
    write_file("save_reference", file, content.getbuffer(), new=True)


def _same(ours: str, theirs: str) -> Entry:
    return Entry((ours,), (theirs,), list, list)


def _gating(ours: str, theirs: str, net: Gating) -> Iterator[Entry]:
    parts = ("by_coords", "by_z") if net.by_value is None else ("by_coords", "by_value", "by_z")
    sizes = [getattr(net, part).in_features for part in parts]

    def cut(x: Parts, sizes: Sequence[int] = tuple(sizes)) -> Parts:
        return list(x[0].split(list(sizes), 1))

    first = tuple(f"{ours}.{part}.weight" for part in parts)
    yield Entry(first, (f"{theirs}.layers.0.0.weight",), cut, lambda x: [torch.cat(x, 1)])
    yield _same(f"{ours}.by_coords.bias", f"{theirs}.layers.0.0.bias")
    for n in range(len(net.rest)):
        for kind in ("weight", "bias"):
            yield _same(f"{ours}.rest.{n}.{kind}", f"{theirs}.layers.{n + 1}.0.{kind}")


def _origin(name: str) -> str:
    """What a tensor of the published code repeats, or its own name: its state dicts hold shared modules twice."""
    if name.startswith("prior_distr_z.prior_distr_z."):
        return f"prior_z.{name.removeprefix('prior_distr_z.')}"
    parts = name.split(".")
    if len(parts) > 3 and parts[0] == "hyper_list" and parts[2] == "function_representation":
        return ".".join(["decoder", *parts[3:]])
    return name


def _differs(found: Tensor | None, wanted: Tensor) -> str:
    if found is None:
        return "is missing"
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"is {found.dtype} {list(found.shape)}, expected {wanted.dtype} {list(wanted.shape)}"
    if found.layout != torch.strided or found.device != wanted.device:
        return f"is {found.layout} on {found.device}, expected {wanted.layout} on {wanted.device}"
    return ""
