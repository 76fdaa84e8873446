from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SECTIONS = {
    "dataset": "format: torch, name: {data}, dir: here, size: 64, use_bn_initial: False, missing_perc: 0.0",
    "train": "mode: standard, batch_size: 8, eval_period: 5, ckpt_period: 10, ckpt_clean: False, clip: 200.0",
    "model": (
        "type: vamoh, dim_z: 4, distr_z: nf, beta_z: 1.0, beta_c: 1.0, start_scheduler: -1, end_scheduler: -1, "
        "distr_x: {likelihood}, name_encoding: fourier, two_step_training: True, {scenarios}"
    ),
    "params_nf": "type: planar, act: leaky_relu, L: 3",
    "params_pointconvnet": (
        "add_batchnorm: false, add_sigmoid: false, deterministic: true, linear_layer_sizes: [], layer_configs: [], "
        "avg_pooling_num_output_points: {pool_points}, avg_pooling_num_neighbors: {pool_neighbors}, "
        "mid_channels: [6,5], num_neighbors: [7,6,5], num_output_points: [32,16,4], out_channels: [5,6,7], "
        'same_coordinates: "all", use_encoded_coors: True'
    ),
    "params_k_mixture": "K: 3",
    "params_cat_x": "act: lrelu_01, layers: [16,2]",
    "params_cat_prior": "act: lrelu_01, dropout: 0.0, layers: [9,8], batchnorm: False",
    "params_cat_post": "act: lrelu_01, dropout: 0.0, layers: [9,8], batchnorm: False",
    "params_encoding": "num_frequencies: 6, std: 2.0, learn_feats: False",
    "params_hyper": "dim_inner: 5, num_layers: 2, act: lrelu_01, coords_dim: 0",
    "params_fnrep": "dim_inner: 6, num_layers: 2, act: lrelu_01",
    "optim": "optimizer: adam, base_lr: 0.001, max_epoch: 20, scheduler: exp, use_scheduler: False, weight_decay: 0.0",
    "plotting": "res_epoch: 50",
}
TOP = 'out_dir: results\nseed: 3\nnote: "a small run"\ndevice: cpu\nnum_threads: 1\nnum_workers: 0\n'


def yaml_text(
    data: str = "PolyMNIST",
    likelihood: str = "logistic",
    scenarios: str = "scenerio: [4;6], scenerio_end: [12;10], scenerio_start: [0;0]",
    pool: tuple[int, int] | None = None,
) -> str:
    """A configuration in the format of the published code, one key to a line."""
    lists = [[n, None, None] if pool else [None] * 3 for n in pool or (0, 0)]
    fill = {
        "data": data,
        "likelihood": likelihood,
        "scenarios": scenarios,
        "pool_points": str(lists[0]).replace(", ", ","),
        "pool_neighbors": str(lists[1]).replace(", ", ","),
    }
    lines = [TOP.rstrip()]
    for section, entries in SECTIONS.items():
        lines += [f"{section}:", *(f"  {entry}" for entry in entries.format(**fill).split(", "))]
    return "\n".join(lines).replace(";", ",") + "\n"


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
