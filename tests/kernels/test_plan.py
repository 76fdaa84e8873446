"""Measured plans: found by the GPU's name and compute capability, else those of the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vamoh.kernels import _plan, inr_mixture_plan, planar_flow_plan
from vamoh.kernels._plan import Device, measured, origin, table_path

NAME = "NVIDIA H200"
WIDTHS = (256, 64, 64, 64, 3)
H200 = Device(90, 132, NAME)
INR = {"rows": 64, "outputs": 32, "inputs": 32, "warps": 4, "stages": 2, "tile": 128}
TABLE = {
    "device": NAME,
    "capability": 90,
    "plans": [
        {"op": "inr_mixture.expected", "sizes": WIDTHS, "variant": ["tf32x3", True], "blocks": INR},
        {"op": "planar_flow.expected", "sizes": [64, 80], "variant": [64, 16], "blocks": {"rows": 8, "warps": 2}},
    ],
}


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(_plan, "TUNED", tmp_path)
    _plan._table.cache_clear()
    path = tmp_path / "nvidia_h200.json"
    path.write_text(json.dumps(TABLE))
    yield path
    _plan._table.cache_clear()


def inr(device: Device = H200, **change: Any) -> inr_mixture_plan.Plan:
    given = {"op": "expected", "batch": 64, "components": 10, "points": 2048, "widths": WIDTHS, "mirrored": True}
    return inr_mixture_plan.plan(**{**given, "precision": "tf32x3", **change}, device=device)


def test_what_was_measured_is_used(table: Path) -> None:
    assert table_path(NAME) == table and table_path("NVIDIA H100 80GB HBM3").name == "nvidia_h100_80gb_hbm3.json"
    p = inr()
    assert (p.rows, p.outputs, p.inputs, p.warps, p.stages, p.tile) == (64, 32, 32, 4, 2, 128)
    assert inr(batch=1) != p and inr(batch=1).inputs == 32  # of any batch
    flow = planar_flow_plan.plan("expected", 16, 64, 64, 80, H200)
    assert (flow.rows, flow.warps, flow.tiles) == (8, 2, 2)
    assert origin(NAME, 90) == "2 measured on this GPU (nvidia_h200.json), else modelled"


@pytest.mark.parametrize(
    "change",
    [{"op": "log_likelihood"}, {"precision": "ieee"}, {"mirrored": False}, {"widths": (256, 64, 64, 3)}],
    ids=str,
)
def test_the_rest_is_modelled(change: dict[str, Any]) -> None:
    assert inr(**change) == inr(Device(90, 132), **change)


@pytest.mark.parametrize("device", [Device(90, 132), Device(90, 132, "NVIDIA H100"), Device(80, 132, NAME)], ids=str)
def test_another_gpu_is_modelled(device: Device) -> None:
    assert inr(device) == inr(device, blocks=inr_mixture_plan.model(True, "tf32x3", device.capability))
    assert measured(device, "planar_flow.expected", (64, 80), 64, 16) is None
    assert origin(device.name, device.capability) == "modelled"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"capability": 90, "plans": [{"op": 1}]}'])
def test_a_damaged_table_is_named(text: str, table: Path) -> None:
    table.write_text(text)
    with pytest.raises(ValueError, match=r"nvidia_h200\.json must be a table as a sweep writes it"):
        inr()


def test_tables_that_ship_are_whole() -> None:
    for path in (Path(_plan.__file__).parent / "tuned").glob("*.json"):
        table = json.loads(path.read_text())
        assert table_path(table["device"]).name == path.name
        for entry in table["plans"]:
            kernel = {"inr_mixture": inr_mixture_plan, "planar_flow": planar_flow_plan}[entry["op"].split(".")[0]]
            kernel.Blocks(**entry["blocks"])
