"""Checkpoints: a model with its configuration, and what training needs to continue.

    RUN/config.yaml
    RUN/checkpoint/step-00001000/model.safetensors    tensors; metadata: format, step, phase, sizes, model configuration
    RUN/checkpoint/step-00001000/trainer.pt           optimizer and generator states
    RUN/checkpoint/step-00001000/SHA256SUMS           of both files, as sha256sum writes and checks it

A checkpoint is a folder that is written under a temporary name, flushed to the disk and then renamed, so a folder
named `step-*` is always whole. The newest one counts; older ones are removed after it is in place.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from vamoh._checks import check_device
from vamoh._files import check_path
from vamoh.config import Config, config_to_dict, differences, load_config
from vamoh.model import VaMoH

FORMAT = 1
_METADATA = ("step", "use_flow", "use_gating_prior", "coord_dim", "channels", "model")


def new_model(config: Config, coord_dim: int, channels: int) -> VaMoH:
    """Freshly initialised model of a configuration for functions from `coord_dim` dimensions to `channels`."""
    return VaMoH(coord_dim=coord_dim, channels=channels, seed=config.seed, **vars(config.model))


def save(
    run_folder: str | os.PathLike[str],
    model: VaMoH,
    config: Config,
    step: int,
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the checkpoint of `step` and return its folder; the previous one is removed only when it is in place.

    state: nested plain values and tensors, what `load_training_state` returns.
    tensors: the model's state, where the model itself holds only a part of it.
    Raises ValueError unless `step` is later than the newest checkpoint, OSError when the disk refuses (the previous
    checkpoint is then untouched).
    """
    root = Path(run_folder) / "checkpoint"
    previous = _newest(root)
    if previous is not None and _step_of(previous) >= step:
        raise ValueError(f"checkpoint.save: step must be later than {previous}, got {step}")
    metadata = {
        "format": str(FORMAT),
        "step": str(step),
        "use_flow": json.dumps(model.use_flow),
        "use_gating_prior": json.dumps(model.use_gating_prior),
        "coord_dim": str(model.coord_dim),
        "channels": str(model.channels),
        "model": json.dumps(config_to_dict(config)["model"]),
    }
    named = model.state_dict() if tensors is None else tensors
    content = {name: value.detach().cpu().contiguous() for name, value in named.items()}
    target = root / f"step-{step:08d}"
    unfinished = root / f"{target.name}.tmp"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        # Serialised in memory first: an error while writing is then an OSError that says what the disk said.
        buffer = BytesIO()
        torch.save({"format": FORMAT, "step": step, **state}, buffer)
        files: dict[str, bytes | memoryview] = {
            "model.safetensors": tensors_to_bytes(content, metadata),
            "trainer.pt": buffer.getbuffer(),
        }
        sums = [f"{sha256(data).hexdigest()}  {name}\n" for name, data in files.items()]
        for name, data in {**files, "SHA256SUMS": "".join(sums).encode()}.items():
            _write(unfinished / name, data)
        _sync_folder(unfinished)
        os.replace(unfinished, target)
        _sync_folder(root)
        _sync_folder(root.parent)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        kept = "there is no earlier one" if previous is None else f"{previous} is untouched"
        raise OSError(
            error.errno, f"checkpoint.save: cannot write the checkpoint of step {step} ({error.strerror}); {kept}"
        ) from error
    for other in root.iterdir():
        if other != target:
            shutil.rmtree(other, ignore_errors=True)
    return target


def load(run_folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> VaMoH:
    """Load the model of a run folder, ready for inference.

    Raises FileNotFoundError when something is missing, ValueError when a file is damaged, was written by another
    version, or does not belong to the folder's config.yaml (it names the keys or tensors that differ).
    """
    place = check_device("checkpoint.load", device)
    path = _current(run_folder) / "model.safetensors"
    config = load_config(Path(run_folder) / "config.yaml")
    metadata, tensors = _read_model(path)
    stored, wanted = json.loads(metadata["model"]), config_to_dict(config)["model"]
    if stored != wanted:
        lines = "; ".join(differences(stored, wanted, "model."))
        raise ValueError(f"checkpoint.load: {path} is of another configuration than config.yaml: {lines}")
    model = new_model(config, int(metadata["coord_dim"]), int(metadata["channels"]))
    _check_tensors(path, tensors, model.state_dict())
    model.load_state_dict(tensors)
    model.use_flow = json.loads(metadata["use_flow"])
    model.use_gating_prior = json.loads(metadata["use_gating_prior"])
    return model.to(place).eval()


def load_training_state(run_folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Load what `save` was given as `state`, and `step`; tensors on the CPU. Raises as `load`."""
    path = _current(run_folder) / "trainer.pt"
    content = _read(path)
    try:
        state = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
        version = state["format"]
    except Exception as error:  # torch.load raises a different type for each kind of damage
        raise ValueError(f"checkpoint: {path} is damaged or not a training state ({_first_line(error)})") from error
    _check_format(path, version)
    return dict(state)


def has_checkpoint(run_folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds a checkpoint."""
    return _newest(Path(run_folder) / "checkpoint") is not None


def _newest(root: Path) -> Path | None:
    found = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return max(found, key=_step_of, default=None)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _current(run_folder: str | os.PathLike[str]) -> Path:
    root = check_path("checkpoint", "run_folder", run_folder) / "checkpoint"
    newest = _newest(root)
    if newest is None:
        reason = "no such folder" if not Path(run_folder).exists() else f"looked for {root / 'step-*'}"
        raise FileNotFoundError(f"checkpoint: no checkpoint in {run_folder} ({reason})")
    return newest


def _read_model(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    content = _read(path)
    try:
        tensors = tensors_from_bytes(content)
        # The file starts with the length of its JSON header in 8 bytes.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"checkpoint: {path} is damaged or not a safetensors file ({_first_line(error)})") from error
    metadata = header.get("__metadata__", {})
    _check_format(path, metadata.get("format"))
    absent = [name for name in _METADATA if name not in metadata]
    if absent:
        raise ValueError(f"checkpoint: {path} lacks the metadata {', '.join(absent)}")
    return metadata, tensors


def _read(path: Path) -> bytes:
    """Content of a file of a checkpoint, if it is what was written."""
    contents = []
    for file in (path, path.with_name("SHA256SUMS")):
        try:
            contents.append(file.read_bytes())
        except FileNotFoundError:
            raise FileNotFoundError(f"checkpoint: {file} is missing") from None
    content, sums = contents
    if f"{sha256(content).hexdigest()}  {path.name}".encode() not in sums.splitlines():
        raise ValueError(f"checkpoint: {path} is damaged: its SHA-256 is not the one in SHA256SUMS")
    return content


def _check_format(path: Path, version: object) -> None:
    if str(version) != str(FORMAT):
        raise ValueError(f"checkpoint: {path} must have format {FORMAT}, got {version}")


def _check_tensors(path: Path, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    lines = [f"{name} is missing" for name in wanted if name not in stored]
    lines += [f"{name} is unknown" for name in stored if name not in wanted]
    for name in wanted.keys() & stored.keys():
        a, b = stored[name], wanted[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            lines.append(f"{name} is {a.dtype} {list(a.shape)}, the model has {b.dtype} {list(b.shape)}")
    if lines:
        raise ValueError(f"checkpoint.load: {path} does not fit the model: {'; '.join(sorted(lines))}")


def _write(path: Path, content: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make names in a folder durable; systems that cannot open folders do without."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
