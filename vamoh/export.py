"""Encoder and decoder as programs that need no VaMoH object: torch.export and ONNX, for any batch and points."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vamoh._checks import check_choice
from vamoh._files import write_file
from vamoh._shown import shown
from vamoh.gating import uniform
from vamoh.model import VaMoH
from vamoh.ops import inr_mixture_mean
from vamoh.ops._op import plain_torch
from vamoh.points import PointSet

PARTS = ("encoder", "decoder")
FORMATS = {"torch": ".pt2", "onnx": ".onnx"}
"""Each with the usual ending of its files."""


class _Encoder(nn.Module):
    """coords [B, N, D] and values [B, N, C] to mean and log-variance [B, Z] of q(z)."""

    def __init__(self, model: VaMoH) -> None:
        super().__init__()
        self.model = model
        for unused in ("prior", "hypernet", "gating_prior", "gating_posterior", "likelihood"):
            delattr(model, unused)

    def forward(self, coords: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.model.encode(PointSet(coords, values))
        return posterior.mean, 2 * posterior.std.log()


class _Decoder(nn.Module):
    """z [B, Z] and coords [B, M, D] to what `VaMoH.decode` gives: mean and mean_map [B, M, C], pi [B, M, K]."""

    def __init__(self, model: VaMoH) -> None:
        super().__init__()
        self.encoding, self.hypernet = model.encoding, model.hypernet
        self.gating_prior = model.gating_prior if model.use_gating_prior else None
        self.components, self.inr, self.likelihood = model.components, model.inr, model.likelihood.op

    def forward(self, z: Tensor, coords: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.encoding(coords)
        if self.gating_prior is None:
            log_pi = uniform(z.shape[0], self.components, z)
        else:
            log_pi = self.gating_prior(features, z)
        mean, mean_map = inr_mixture_mean(self.hypernet(z), features, log_pi, self.inr, self.likelihood)
        # A view as output would have torch.export compare its sizes with its base's, and tie M to K.
        return mean, mean_map, log_pi.expand(-1, -1, coords.shape[1]).mT.exp()


def export_encoder(model: VaMoH) -> ExportedProgram:
    """The encoder as a program: (coords [B, N, D], values [B, N, C]) to (mean, log_variance) [B, Z].

    For any B >= 1 and N at least the centroids of the first stage, all points observed; the dtype is the model's. It
    calls ops of vamoh, so `import vamoh.model` must come before it is loaded.
    """
    model = _copy(model)
    count = max(model.min_points, model.encoder.stages[0].centroids) + 1
    like = model.encoder.head.weight
    coords, values = (torch.zeros(2, count, size).to(like) for size in (model.coord_dim, model.channels))
    batch, points = Dim("batch", min=1), Dim("points", min=model.min_points)
    return _export(_Encoder(model), (coords, values), ({0: batch, 1: points},) * 2)


def export_decoder(model: VaMoH) -> ExportedProgram:
    """The decoder as a program: (z [B, Z], coords [B, M, D]) to (mean [B, M, C], mean_map [B, M, C], pi [B, M, K]).

    For any B and M >= 1; the dtype is the model's. It is plain torch and runs without vamoh. Memory grows with B·M, by
    K times the widest coordinate network: decode fine grids in parts.
    """
    model = _copy(model)
    like = model.encoder.head.weight
    z, coords = torch.zeros(2, model.latent_dim).to(like), torch.zeros(2, 3, model.coord_dim).to(like)
    batch, points = Dim("batch", min=1), Dim("points", min=1)
    program = _export(_Decoder(model), (z, coords), ({0: batch}, {0: batch, 1: points}))
    with _quiet():
        plain: ExportedProgram = program.run_decompositions(plain_torch())
    return plain


def decoder_onnx(model: VaMoH) -> bytes:
    """The decoder as an ONNX model, with the inputs z and coords and the outputs of `export_decoder`.

    Raises ImportError with the command that installs what is missing.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export: ONNX needs {' and '.join(missing)}; pip install vamoh[export]")
    decoder = export_decoder(model)
    with _quiet():
        program = torch.onnx.export(
            decoder,
            input_names=["z", "coords"],
            output_names=["mean", "mean_map", "pi"],
            dynamic_shapes=({0: "batch"}, {0: "batch", 1: "points"}),  # their names in the file
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("export: torch.onnx.export returned no program")
    content: bytes = program.model_proto.SerializeToString()
    return content


def export_model(model: VaMoH, path: str | os.PathLike[str], *, part: str = "decoder", format: str = "torch") -> Path:
    """Write one part of a model to a new file and return its path: whole, or not at all.

    part "encoder" or "decoder"; format "torch" (for `torch.export.load`) or "onnx" (the decoder only).
    Raises ValueError for another part or format, FileExistsError where there is a file, ImportError where the packages
    for ONNX are missing, OSError when the disk refuses.
    """
    path = Path(path)
    check_choice("export", "part", part, PARTS)
    check_choice("export", "format", format, list(FORMATS))
    if format == "onnx" and part != "decoder":
        raise ValueError(f"export: part must be 'decoder' for format 'onnx', got {shown(part)}")
    _refuse_existing(path)
    if format == "onnx":
        content = decoder_onnx(model)
    else:
        buffer = io.BytesIO()
        torch.export.save(export_encoder(model) if part == "encoder" else export_decoder(model), buffer)
        content = buffer.getvalue()
    write_file("export", path, content, new=True)
    return path


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise FileExistsError(f"export: {path} exists; remove it or choose another name")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of torch and onnxscript about their own insides."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _copy(model: VaMoH) -> VaMoH:
    return copy.deepcopy(model).cpu().eval()


def _export(module: nn.Module, inputs: tuple[Tensor, ...], sizes: tuple[dict[int, Dim], ...]) -> ExportedProgram:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad(), _quiet():
        return torch.export.export(module, inputs, dynamic_shapes=sizes)
