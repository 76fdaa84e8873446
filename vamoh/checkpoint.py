"""Checkpoints: a model with its configuration, and what training needs to continue.

    RUN/config.yaml
    RUN/checkpoint/step-00001000/model.safetensors    tensors; metadata: format, step, phase, sizes, model configuration
    RUN/checkpoint/step-00001000/trainer.pt           optimizer and generator states
    RUN/checkpoint/step-00001000/SHA256SUMS           of both files, as sha256sum writes and checks it

A checkpoint is a folder that is written under a temporary name, flushed to the disk and then renamed, so a folder
named `step-*` is always whole. The newest one counts; older ones are removed after it is in place, and nothing else is.
Links are neither read nor written through, and what a file holds is checked before anything is made of it.
"""

from __future__ import annotations

import errno
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
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from vamoh._checks import check_device, listed, shown, unquoted
from vamoh._files import check_path, is_unfinished, read_file, reading, sync, sync_folder
from vamoh._lock import NAME as LOCK
from vamoh.config import Config, config_to_dict, config_to_yaml, differences, load_run_config
from vamoh.model import VaMoH

FORMAT = 1
_METADATA = {"step": int, "use_flow": bool, "use_gating_prior": bool, "coord_dim": int, "channels": int, "model": dict}
_UNFINISHED = re.compile(r"step-\d{1,20}\.tmp")


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
    root = _root(run_folder)
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
        _remove(unfinished)
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
        sync_folder(unfinished)
        _rename(unfinished, target)
        sync_folder(root)
        sync_folder(root.parent)
    except OSError as error:
        _remove(unfinished)
        kept = "there is no earlier one" if previous is None else f"{previous} is untouched"
        raise OSError(
            error.errno, f"checkpoint.save: cannot write the checkpoint of step {step} ({error.strerror}); {kept}"
        ) from error
    for other in root.iterdir():
        if _UNFINISHED.fullmatch(other.name) or (_is_checkpoint(other) and _step_of(other) < step):
            _remove(other)
    return target


def load(run_folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> VaMoH:
    """Load the model of a run folder, ready for inference.

    Raises FileNotFoundError when something is missing, ValueError when a file is damaged, was written by another
    version, or does not belong to the folder's config.yaml (it names the keys or tensors that differ).
    """
    place = check_device("checkpoint.load", device)
    path, content = _read(run_folder, "model.safetensors")
    config = load_run_config(run_folder)
    metadata, tensors = _parse_model(path, content)
    # What an older version did not know has its default.
    stored = {**config_to_dict(Config())["model"], **metadata["model"]}
    wanted = config_to_dict(config)["model"]
    if stored != wanted:
        lines = listed(differences(stored, wanted, "model."))
        raise ValueError(f"checkpoint.load: {path} is of another configuration than config.yaml: {lines}")
    model = new_model(config, metadata["coord_dim"], metadata["channels"])
    check_tensors("checkpoint.load", path, tensors, model.state_dict())
    model.load_state_dict(tensors)
    model.use_flow, model.use_gating_prior = metadata["use_flow"], metadata["use_gating_prior"]
    return model.to(place).eval()


def load_training_state(run_folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Load what `save` was given as `state`, and `step`; tensors on the CPU. Raises as `load`."""
    path, content = _read(run_folder, "trainer.pt")
    with reading("checkpoint", path, "a training state"):
        state = dict(torch.load(BytesIO(content), map_location="cpu", weights_only=True))
        version = state["format"]
    _check_format(path, version)
    if not isinstance(state.get("step"), int) or state["step"] != _step_of(path.parent):
        raise ValueError(f"checkpoint: step of {path} must be that of its folder, got {shown(state.get('step'))}")
    return state


def read_tensors(where: str, path: Path, content: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of the safetensors file at `path`; ValueError where its content is none."""
    with reading(where, path, "a safetensors file"):
        tensors = tensors_from_bytes(content)
        # The file starts with the length of its JSON header in 8 bytes.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return dict(header.get("__metadata__", {})), tensors


def check_tensors(where: str, path: Path, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a file's tensors are those that a model wants, by name, shape and dtype."""
    lines = [f"{name} is missing" for name in wanted if name not in stored]
    lines += [f"{unquoted(name)} is unknown" for name in stored if name not in wanted]
    for name in wanted.keys() & stored.keys():
        a, b = stored[name], wanted[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            lines.append(f"{name} is {a.dtype} {shown(list(a.shape))}, the model has {b.dtype} {list(b.shape)}")
    if lines:
        raise ValueError(f"{where}: {path} does not fit the model: {listed(sorted(lines))}")


def has_checkpoint(run_folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds a checkpoint."""
    return _newest(_root(run_folder)) is not None


def check_free(where: str, run_folder: str | os.PathLike[str], config: Config, advice: str = "") -> None:
    """Raise FileExistsError unless a run of `config` can begin in a folder.

    It may be new or empty, or hold what is left of a writer that was killed before its first checkpoint.
    """
    folder = Path(run_folder)
    if folder.exists() and (not folder.is_dir() or not all(_is_left_over(path, config) for path in folder.iterdir())):
        raise FileExistsError(f"{where}: out must be a new or empty folder, got {folder}, which is in use{advice}")


def _is_left_over(path: Path, config: Config) -> bool:
    if path.name == "config.yaml":
        return not path.is_symlink() and path.is_file() and path.read_bytes() == config_to_yaml(config).encode()
    if path.name == "checkpoint":
        return path.is_dir() and all(_UNFINISHED.fullmatch(entry.name) for entry in path.iterdir())
    return path.name == LOCK or is_unfinished(path)


def _root(run_folder: str | os.PathLike[str]) -> Path:
    root = check_path("checkpoint", "run_folder", run_folder) / "checkpoint"
    if root.is_symlink():
        raise ValueError(f"checkpoint: {root} must be a folder of the run, got a link")
    return root


def _newest(root: Path) -> Path | None:
    return max(filter(_is_checkpoint, root.glob("step-*")), key=_step_of, default=None)


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"step-\d{1,20}", path.name) is not None and path.is_dir() and not path.is_symlink()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _read(run_folder: str | os.PathLike[str], name: str) -> tuple[Path, bytes]:
    """A file of the newest checkpoint, its path and content, if it is what was written.

    Where training replaces the checkpoint between listing the folder and reading it, the next one is read.
    """
    root = _root(run_folder)
    while True:
        newest = next(filter(None, (_newest(root) for _ in range(3))), None)  # a listing can miss what is being renamed
        if newest is None:
            reason = "no such folder" if not Path(run_folder).exists() else f"looked for {root / 'step-*'}"
            raise FileNotFoundError(f"checkpoint: no checkpoint in {run_folder} ({reason})")
        try:
            content, sums = (read_file("checkpoint", newest / file) for file in (name, "SHA256SUMS"))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                raise
            if _newest(root) != newest:
                continue
            raise FileNotFoundError(f"checkpoint: {error.filename} is missing") from None
        if f"{sha256(content).hexdigest()}  {name}".encode() not in sums.splitlines():
            raise ValueError(f"checkpoint: {newest / name} is damaged: its SHA-256 is not the one in SHA256SUMS")
        return newest / name, content


def _parse_model(path: Path, content: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    metadata, tensors = read_tensors("checkpoint", path, content)
    _check_format(path, metadata.pop("format", None))
    absent = [name for name in _METADATA if name not in metadata]
    if absent:
        raise ValueError(f"checkpoint: {path} lacks the metadata {', '.join(absent)}")
    found = {}
    for name, kind in _METADATA.items():
        with reading("checkpoint", path, f"a model: {name} must be {kind.__name__}"):
            found[name] = json.loads(metadata[name])
            if type(found[name]) is not kind:
                raise ValueError(f"got {shown(found[name])}")
    if found["step"] != _step_of(path.parent):
        raise ValueError(f"checkpoint: step of {path} must be that of its folder, got {shown(found['step'])}")
    return found, tensors


def _check_format(path: Path, version: object) -> None:
    if str(version) != str(FORMAT):
        raise ValueError(f"checkpoint: {path} must have format {FORMAT}, got {unquoted(version)}")


def _write(path: Path, content: bytes | memoryview) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        sync(file.fileno())


def _rename(path: Path, target: Path) -> None:
    try:
        os.replace(path, target)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL):
            lacks = f"this file system cannot rename a folder, which keeps checkpoints whole: {error.strerror}"
            raise OSError(error.errno, lacks) from error
        raise


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
