from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SMALL = Path(__file__).with_name("theirs.yaml").read_text(encoding="utf-8")


def yaml_text(data: str = "PolyMNIST", likelihood: str = "logistic", pool: tuple[int, int] | None = None) -> str:
    """The small configuration with other data, likelihood, or pooling (points, neighbours) after the first layer."""
    changes = {"name: PolyMNIST": f"name: {data}", "distr_x: logistic": f"distr_x: {likelihood}"}
    if pool:
        for key, size in zip(("num_output_points", "num_neighbors"), pool, strict=True):
            changes[f"avg_pooling_{key}: [None"] = f"avg_pooling_{key}: [{size}"
    text = SMALL
    for before, after in changes.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    return text


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a configuration of the published code into a file."""

    def file(text: str | None = None, **options: object) -> Path:
        path = tmp_path / "theirs.yaml"
        path.write_text(yaml_text(**options) if text is None else text, encoding="utf-8")  # type: ignore[arg-type]
        return path

    return file


GOLDEN = Path(__file__).parents[1] / "golden"
spec = importlib.util.spec_from_file_location("parity", GOLDEN.with_name("parity.py"))
assert spec is not None and spec.loader is not None
parity = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parity)


class Golden:
    """A file of reference results, and what the published code would have saved of it."""

    def __init__(self, name: str) -> None:
        self.case = parity.Case(GOLDEN / f"{name}_tiny.npz")
        self.meta = self.case.meta

    def values(self) -> dict[str, Any]:
        """Its configuration by dotted keys, as a file has it: building the model changed some of it."""
        keys: dict[str, Any] = {}
        for name, entry in self.meta["cfg"].items():
            keys.update({f"{name}.{k}": v for k, v in entry.items()} if isinstance(entry, dict) else {name: entry})
        layers = keys["params_pointconvnet.layer_configs"]
        convs = [c for c in layers if "out_channels" in c]
        pools = [c for c in layers if "out_channels" not in c]
        nones = ["None"] * (len(convs) - len(pools))
        lists = {
            "layer_configs": [],
            "linear_layer_sizes": [],
            "mid_channels": convs[0]["mid_channels"],
            **{k: [c[k] for c in convs] for k in ("out_channels", "num_output_points", "num_neighbors")},
            **{f"avg_pooling_{k}": [c[k] for c in pools] + nones for k in ("num_output_points", "num_neighbors")},
        }
        keys.update({f"params_pointconvnet.{name}": entry for name, entry in lists.items()})
        made = (".c_dim_list", "params_cat_x.dims", "params_cat_prior.dims", "params_cat_post.dims")
        return {key: value for key, value in keys.items() if not key.endswith(made)}

    def sections(self) -> dict[str, Any]:
        """The same, nested."""
        nested: dict[str, Any] = {}
        for key, value in self.values().items():
            section, _, name = key.partition(".")
            if name:
                nested.setdefault(section, {})[name] = value
            else:
                nested[section] = value
        return nested

    def state(self) -> dict[str, torch.Tensor]:
        """The whole state dict: every tensor, the repetitions, and a copy of the template without values."""
        state = dict(self.case.state())
        for repeated, origin in self.meta["state_alias"].items():
            state[repeated] = state[origin]
        for name in [n for n in state if n.startswith("decoder.mlp.")]:
            copy = name.replace("decoder.mlp.", "fmodel.stateless_model.")
            state[copy] = torch.empty_like(state[name], device="meta")
        return state


@pytest.fixture(params=["celebahq", "chairs", "era", "polymnist", "shapes"])
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each of the stored cases."""
    return Golden(request.param)
