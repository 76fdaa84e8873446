"""Exported programs: they agree with the model on sizes other than those they were traced with."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.precision import near
from vamoh import PointSet, VaMoH, grid_coords
from vamoh import export as module
from vamoh.export import decoder_onnx, export_decoder, export_encoder, export_model

SIZES: dict[str, Any] = {
    "coord_dim": 2,
    "channels": 2,
    "latent_dim": 4,
    "components": 3,
    "frequencies": 6,
    "encoder_centroids": (12, 5),
    "encoder_neighbors": (5, 4),
    "encoder_channels": (4, 4),
    "hypernet_widths": (6,),
    "inr_widths": (6, 6),
    "gating_widths": (6,),
    "flow_layers": 2,
}
DECODERS = {
    "logistic": {},
    "raw": {"frequencies": 0, "components": 1, "gating_bound": "tanh", "inr_widths": (), "hypernet_widths": ()},
    "sine": {"inr_activation": "sine", "inr_omega": 5.0, "likelihood": "continuous_bernoulli", "gating_widths": ()},
    "warm-up": {"learn_frequencies": True, "channels": 1},
}
ENCODERS = {
    "encoded": {},
    "raw": {"neighbor_metric": "raw", "weight_net_slope": 0.2, "prior": "normal"},
    "fixed": {"centroids": "fixed", "encoder_density": True},
    "pooled": {"pool_centroids": (8,), "pool_neighbors": (3,), "frequencies": 0},
}


def build(name: str, variants: dict[str, Any]) -> VaMoH:
    model = VaMoH(**{**SIZES, **variants[name]})
    model.use_gating_prior = name != "warm-up"
    if model.needs_centroids:
        model.set_centroids(grid_coords((6, 6)))
    return model.double() if name == "raw" else model


@cache
def decoder(name: str) -> tuple[VaMoH, torch.export.ExportedProgram]:
    """A model and its decoder, exported once for all tests."""
    model = build(name, DECODERS)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    program = export_decoder(model)
    assert torch.equal(torch.get_rng_state(), state)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n][0]) and p.requires_grad == before[n][1]
    return model, program


def reloaded(program: torch.export.ExportedProgram, folder: Path) -> torch.nn.Module:
    torch.export.save(program, folder / "program.pt2")
    return torch.export.load(folder / "program.pt2").module()


def agree(results: Any, expected: tuple[Tensor, ...]) -> None:
    """Alike up to the order of sums, 1e-5 in float32."""
    for a, b in zip(results, expected, strict=True):
        a = torch.as_tensor(a)
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).norm() <= (1e-5 if a.dtype == torch.float32 else 1e-12) * b.norm()


def agree_decoded(results: Any, model: VaMoH, z: Tensor, coords: Tensor) -> None:
    """In float32, up to its roundings in every sum of the networks."""
    if z.dtype == torch.float64:
        return agree(results, decoded(model, z, coords))
    whole = Decode(model)
    names, values = zip(*whole.named_parameters(), strict=True)

    def exact(z: Tensor, coords: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return torch.func.functional_call(whole, dict(zip(names, values, strict=True)), (z, coords))

    widths = [2 * SIZES["frequencies"], *SIZES["hypernet_widths"], *SIZES["inr_widths"], *SIZES["gating_widths"]]
    results = [torch.as_tensor(r) for r in results]
    assert all(r.dtype == torch.float32 for r in results)
    with torch.no_grad():
        assert near(results, exact, [z, coords, *values], widths)


class Decode(nn.Module):
    """`VaMoH.decode` of a model in float64, as a module."""

    def __init__(self, model: VaMoH) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).double()

    def forward(self, z: Tensor, coords: Tensor) -> tuple[Tensor, ...]:
        return decoded(self.model, z, coords)


@cache
def inputs(batch: int, count: int, latent: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + 100 * count)
    return (
        torch.randn(batch, latent, generator=generator),
        2 * torch.rand(batch, count, 2, generator=generator) - 1,
    )


def decoded(model: VaMoH, z: Tensor, coords: Tensor) -> tuple[Tensor, ...]:
    return tuple(vars(model.decode(z, coords)).values())


@pytest.mark.parametrize(
    "name", ["logistic", *(pytest.param(name, marks=pytest.mark.slow) for name in DECODERS if name != "logistic")]
)
def test_decoder(name, tmp_path):
    model, exported = decoder(name)
    program, dtype = reloaded(exported, tmp_path), model.encoder.head.weight.dtype
    for batch, count in ((1, 1), (2, 3), (5, 40), (1, 200), (7, 1)):
        z, coords = (t.to(dtype) for t in inputs(batch, count))
        agree_decoded(program(z, coords), model, z, coords)


@pytest.mark.slow
def test_decoder_runs_without_vamoh(tmp_path):
    model, program = decoder("logistic")
    z, coords = inputs(3, 9)
    torch.save((z, coords), tmp_path / "inputs.pt")
    torch.export.save(program, tmp_path / "program.pt2")
    code = (
        "import sys, torch; sys.modules['vamoh'] = None\n"
        "program = torch.export.load('program.pt2').module()\n"
        "torch.save(program(*torch.load('inputs.pt')), 'outputs.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    agree_decoded(torch.load(tmp_path / "outputs.pt"), model, z, coords)


@pytest.mark.parametrize(
    "name", ["encoded", "fixed", *(pytest.param(name, marks=pytest.mark.slow) for name in ("raw", "pooled"))]
)
def test_encoder(name, tmp_path):
    model = build(name, ENCODERS)
    program, dtype = reloaded(export_encoder(model), tmp_path), model.encoder.head.weight.dtype
    grid = grid_coords((6, 5))
    for batch, count in ((1, 12), (2, 13), (5, 40), (1, 200), (3, model.min_points), (2, len(grid))):
        _, coords = inputs(batch, count)
        coords = (grid.expand(batch, -1, -1) if count == len(grid) else coords).to(dtype)
        values = torch.rand(batch, count, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
        q = model.encode(PointSet(coords, values))
        agree(program(coords, values), (q.mean, 2 * q.std.log()))
    with pytest.raises(Exception, match=str(model.min_points)):
        few = model.min_points - 1
        program(torch.rand(2, few, 2, dtype=dtype), torch.rand(2, few, 2, dtype=dtype))


def test_programs_hold_only_what_they_use():
    model, program = decoder("logistic")
    parts = {name.split(".")[0] for name in program.state_dict}
    assert parts == {"encoding", "hypernet", "gating_prior"}
    parts = {name.split(".")[1] for name in export_encoder(model).state_dict}
    assert parts == {"encoding", "encoder"}


@pytest.mark.parametrize("name", ["sine", "warm-up"])
@pytest.mark.slow
def test_onnx(name, monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, program = decoder(name)
    monkeypatch.setattr(module, "export_decoder", lambda given: program)
    session = runtime.InferenceSession(decoder_onnx(model), providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape[:-1]) for i in session.get_inputs()] == [("z", ["batch"]), ("coords", ["batch", "points"])]
    assert [o.name for o in session.get_outputs()] == ["mean", "mean_map", "pi"]
    for batch, count in ((1, 1), (2, 3), (5, 40), (1, 200)):
        z, coords = inputs(batch, count)
        results = session.run(None, {"z": z.numpy(), "coords": coords.numpy()})
        agree_decoded(results, model, z, coords)
        for a, b in zip(results, decoded(model, z, coords), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_file(part, tmp_path, monkeypatch):
    model, program = decoder("logistic")
    monkeypatch.setattr(module, "export_decoder", lambda given: program)
    path = export_model(model, tmp_path / "new.pt2", part=part)
    assert os.listdir(tmp_path) == ["new.pt2"] and path == tmp_path / "new.pt2"
    content = path.read_bytes()
    with pytest.raises(FileExistsError, match="^export: .*new.pt2 exists"):
        export_model(model, path, part=part)
    assert path.read_bytes() == content


def test_nothing_is_left_of_a_failure(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export_model(build("logistic", DECODERS), tmp_path / "new.pt2", part="encoder")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"part": "prior"}, "export: part must be one of encoder, decoder, got 'prior'"),
        ({"format": "pt"}, "export: format must be one of torch, onnx, got 'pt'"),
        ({"part": "encoder", "format": "onnx"}, "export: part must be 'decoder' for format 'onnx', got 'encoder'"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}"):
        export_model(build("logistic", DECODERS), tmp_path / "new", **arguments)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^export: ONNX needs onnx and onnxscript; pip install vamoh\[export\]"):
        export_model(build("logistic", DECODERS), tmp_path / "new.onnx", format="onnx")
    assert os.listdir(tmp_path) == []
