from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from vamoh import PointSet, VaMoH
from vamoh.compat.imagegym import VAMOH
from vamoh.points import grid_coords, sphere_grid

Write = Callable[..., Path]


def arguments(cfg: dict[str, Any], task: str, dims: list[int]) -> dict[str, Any]:
    """Constructor arguments as the published script takes them from its configuration."""
    model = cfg["model"]
    names = ("params_encoding", "params_hyper", "params_fnrep", "params_pointconvnet", "params_nf")
    gating = ("params_cat_prior", "params_cat_post", "params_cat_x")
    return {
        "device": "cpu",
        "task": task,
        "dims_x": dims,
        "coordinate_dim": 2 if task == "image" else 3,
        "feature_dim": dims[0],
        "params_convnet": None,
        **{name: cfg[name] for name in (*names, *gating)},
        **{name: model[name] for name in ("distr_x", "name_encoding", "dim_z", "distr_z", "beta_z", "beta_c")},
        "drop_input": 0.0,
        "encoder_type": "pointconv",
        "K": cfg["params_k_mixture"]["K"],
        "loss_fun": "elbo",
        "beta_c_scheduler": "Linear",
        "two_step_training": True,
        "first_step_ratio": 0.0,
        "learn_residual_posterior": False,
        "post_cat_has_z": True,
        "fix_categorical_prior": False,
        "distr_x_logscales": -1,
    }


def small(write: Write, task: str = "image", dims: tuple[int, ...] = (3, 9, 7), seed: int = 0, **more: Any) -> VAMOH:
    likelihood = {"image": "logistic", "era5_polar": "cb", "voxels_chairs": "ber"}.get(task, "logistic")
    cfg = yaml.safe_load(write(likelihood=likelihood, pool=(16, 4)).read_text())
    torch.manual_seed(seed)
    np.random.seed(seed)
    return VAMOH(**arguments(cfg, task, list(dims)) | more)


def of_golden(golden: Any) -> VAMOH:
    """The class with the weights of a case, in float64."""
    model = VAMOH(**arguments(golden.sections(), golden.meta["cfg"]["dataset"]["task"], golden.meta["dims"])).double()
    model.load_state_dict(golden.state())
    return model


def close(ours: torch.Tensor, reference: Any, tolerance: float = 1e-9) -> bool:
    reference = torch.as_tensor(reference).double()
    return ours.shape == reference.shape and bool((ours.double() - reference).norm() <= tolerance * reference.norm())


def test_loss_is_the_reference(golden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every phase of the warm-up, with the stored noise, masks and neighbours in place of drawn ones."""
    model, case = of_golden(golden), golden.case
    model.data_converter.coordinates = case.tensor("coords")  # these are not rounded to float32
    batch = [case.tensor("data/batch"), None]
    phases = {"term": (False, False), "phase_normal/term": (True, False), "phase_normal_uniformcat/term": (True, True)}
    monkeypatch.setattr(model, "_noise", lambda z: case.noise())
    for tag in case.meta["masks"]:
        monkeypatch.setattr(model, "_draw_observed", lambda data, rate, tag=tag: case.tensor(f"{tag}/obs_mask"))
        monkeypatch.setattr(model, "_search", lambda coords, tag=tag: case.neighborhoods(tag))
        for prefix, (normal, uniform) in phases.items():
            model.prior_z.params_nf_fixed, model.fix_categorical_prior = normal, uniform
            terms = model(batch, missingness=0.0)
            assert set(terms) == {"elbo", "loss", "log_prob_x", "kl", "kl_cat", "beta_c", "beta_z"}
            # The reference's own rounding of a saturated continuous Bernoulli, see parity.py.
            tolerance = 1e-9 if golden.meta["distr_x"] != "cb" else 1e-6
            for ours, theirs in (("log_prob_x", "log_prob_x"), ("kl", "kl_z"), ("kl_cat", "kl_c"), ("elbo", "elbo")):
                assert close(terms[ours], case.tensor(f"{tag}/{prefix}/{theirs}"), tolerance), (tag, prefix, ours)
            assert torch.equal(terms["loss"], -terms["elbo"])


def test_reconstructions_are_the_reference(golden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, case = of_golden(golden), golden.case
    model.data_converter.coordinates = case.tensor("coords")  # these are not rounded to float32
    seen = 0
    for prefix in ("recon", "recon_half", "recon_inpaint", "recon_sr"):
        if f"{prefix}/mask" not in case.arrays:
            continue
        seen += 1
        mask = case.tensor(f"{prefix}/mask")
        resolution = case.arrays[f"{prefix}/mean"].shape[2:]
        monkeypatch.setattr(model, "_search", lambda coords, prefix=prefix: case.neighborhoods(prefix))
        coords, values = model._to_coordinates_and_features(case.tensor("data/batch"))
        out = case.tensor(f"{prefix}/out_coords").expand(len(values), -1, -1)
        kept = mask.flatten()
        maps, latents = model.reconstruct([coords[:, kept], values[:, kept]], resolution, out, mask)
        assert close(latents["mean_z"], case.tensor(f"{prefix}/z_mean"))
        for name in ("mean", "mean_map", "entropy", "pi", "segm"):
            assert close(maps[name], case.tensor(f"{prefix}/{name}")), (prefix, name)
        made = model.create_outcoordinates(resolution, len(values))
        assert close(made, out, 1e-6)
    assert seen >= 3


def test_samples_are_the_reference(golden: Any) -> None:
    model, case = of_golden(golden), golden.case
    z = case.tensor("sample/z")
    out = case.tensor("sample/out_coords").expand(len(z), -1, -1)
    resolution = case.arrays["sample/mean"].shape[2:]
    maps, drawn = model.sample([len(z)], resolution, out, z=z)
    assert drawn["sample"] is z and set(maps) == {"mean", "mean_map", "segm", "entropy"}
    for name, found in maps.items():
        assert close(found, case.tensor(f"sample/{name}"), 1e-6), name


def test_state_dict_has_the_names_of_the_reference(golden: Any) -> None:
    model, wanted = of_golden(golden), golden.state()
    found = model.state_dict()
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in wanted.items()}
    assert set(model.state_dict(prefix="module.")) == {f"module.{name}" for name in wanted}
    assert all(
        torch.equal(found[n], wanted[n]) for n in found if n.startswith(("encoder_z", "prior_z", "hyper_list.0.mlp"))
    )
    with pytest.raises(ValueError, match="is missing"):
        model.load_state_dict({n: v for n, v in wanted.items() if "encoder_z" not in n}, strict=False)


def test_initial_values_are_drawn_in_the_order_of_the_reference(write: Write) -> None:
    """Frequencies, unused template, hypernetworks, encoder, gating networks, flow: default layers one after another."""
    state = small(write, seed=4).state_dict()
    torch.manual_seed(4)
    assert torch.equal(state["decoder.encoding.frequency_matrix"], torch.normal(torch.zeros(6, 2), 2.0))
    for a, b in ((12, 6), (6, 6), (6, 3)):
        nn.Linear(a, b)
    packed = 12 * 6 + 6 + 6 * 6 + 6 + 6 * 3 + 3

    def equal(name: str, layer: nn.Module) -> None:
        assert torch.equal(state[f"{name}.weight"], layer.weight) and torch.equal(state[f"{name}.bias"], layer.bias)

    for k in range(3):
        for n, (a, b) in enumerate(((4, 5), (5, 10), (10, packed))):
            equal(f"hyper_list.{k}.mlp.layers.{n}.0", nn.Linear(a, b))
    for at, (a, b) in {0: (3, 5), 3: (5, 6), 5: (6, 7)}.items():
        for n, (c, d) in enumerate(((12, 6), (6, 5))):
            equal(f"encoder_z.layers.{at}.weight_net.forward_layers.{2 * n}", nn.Conv2d(c, d, 1))
        equal(f"encoder_z.layers.{at}.linear", nn.Linear(5 * a, b))
    equal("encoder_z.linear_layers.0", nn.Linear(4 * 7, 8))
    for name, first in (("prior_cat_encoder", 12 + 4), ("post_cat_encoder", 12 + 3 + 4)):
        for n, (a, b) in enumerate(((first, 9), (9, 8), (8, 3))):
            equal(f"{name}.layers.{n}.0", nn.Linear(a, b))
    for t in range(3):
        for part, bound in (("u", 2**0.5), ("w", (2 / 4) ** 0.5)):
            drawn = nn.init.uniform_(torch.empty(1, 4), -bound, bound)
            assert torch.equal(state[f"prior_z.prior_distr_z.flows.{t}.{part}"], drawn)
    after = torch.rand(3)
    small(write, seed=4)
    assert torch.equal(torch.rand(3), after)


def test_masks_and_noise_are_drawn_in_the_order_of_the_reference(write: Write) -> None:
    model, data = small(write), torch.rand(2, 3, 9, 7)
    for rate, scaled in (
        (0.0, lambda: -1.0),
        (0.4, lambda: np.random.uniform(0, 0.4)),
        (1, lambda: np.random.rand() * 0.9),
    ):
        np.random.seed(7)
        wanted = scaled()
        wanted = np.random.rand(9, 7) > wanted
        np.random.seed(7)
        assert np.array_equal(model._draw_observed(data, rate).view(9, 7).numpy(), wanted)
    torch.manual_seed(1)
    eps, kl = torch.randn(2, 4), torch.randn(4096, 2, 4)
    drawn: list[Any] = []
    original = model._noise
    model._noise = lambda z: drawn.append((z, original(z))) or drawn[-1][1]  # type: ignore[method-assign]
    torch.manual_seed(1)
    model([data, None])
    assert torch.equal(drawn[0][0], eps) and torch.equal(drawn[0][1].kl, kl)
    model.prior_z.params_nf_fixed = True
    torch.manual_seed(1)
    model([data, None])
    torch.manual_seed(1)
    torch.randn(2, 4)
    after = torch.rand(1)
    torch.manual_seed(1)
    model([data, None])
    assert torch.equal(torch.rand(1), after)  # nothing drawn for a normal prior


def test_voxels_show_4096_points(write: Write) -> None:
    model = small(write, "voxels_chairs", (1, 17, 17, 17))
    torch.manual_seed(3)
    wanted = torch.zeros(17**3, dtype=torch.bool)
    wanted[torch.randperm(17**3)[:4096]] = True
    torch.manual_seed(3)
    assert torch.equal(model._draw_observed(torch.zeros(1, 1, 17, 17, 17), 0.5), wanted)


def test_replayed_neighbors_are_the_nearest(write: Write) -> None:
    """Where there are no ties: the search of the model itself, by other arithmetic."""
    model = small(write).double()
    for count in (40, 25):  # fewer points than centroids of the first stage
        coords = torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
        points = PointSet(coords, torch.zeros(1, count, 3, dtype=torch.float64))
        replayed, own = model._search(coords), model.vamoh.neighborhoods(points)
        assert replayed is not None
        for a, b in zip(replayed, own, strict=True):
            assert torch.equal(a.centroids, b.centroids[:, : a.centroids.shape[1]])
            assert torch.equal(a.neighbors.sort(-1).values, b.neighbors[:, : a.centroids.shape[1]].sort(-1).values)
    with pytest.raises(ValueError, match="must have 7 observed points, got 5"):
        model._search(coords[:5])


@pytest.mark.parametrize(
    "task, dims", [("image", (3, 9, 7)), ("era5_polar", (1, 8, 10)), ("voxels_chairs", (1, 6, 6, 6))]
)
@pytest.mark.parametrize("replay", [True, False])
def test_a_training_script(write: Write, task: str, dims: tuple[int, ...], replay: bool) -> None:
    """What the published script does with the model, its schedules included."""
    model = small(write, task, dims, replay=replay)
    model.create_meta_model()
    assert not model.fparams[0].is_cuda
    model.set_input_scaler(object())
    model.print_params_count()
    optimizer = torch.optim.Adam(filter(lambda p: p.requires_grad, model.parameters()), lr=1e-3)
    data = torch.rand(3, *dims)
    if task == "era5_polar":
        grid = torch.stack(model.data_converter._degrees(dims[1:]))
        data = torch.cat([grid.expand(3, -1, -1, -1), data], 1)
    before = copy.deepcopy(model.state_dict())
    losses = []
    for epoch in range(3):
        model.prior_z.params_nf_fixed = epoch < 1
        model.fix_categorical_prior = epoch < 2
        for parameter in model.prior_cat_encoder.parameters():
            parameter.requires_grad = epoch >= 2
        model.beta_c = 0.5
        optimizer.zero_grad(set_to_none=True)
        terms = model([data, torch.zeros(3)], missingness=0.1)
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 200.0)
        optimizer.step()
        losses.append({name: value.item() for name, value in terms.items()})
        assert losses[-1]["elbo"] == pytest.approx(
            losses[-1]["log_prob_x"] - losses[-1]["kl"] - 0.5 * losses[-1]["kl_cat"], rel=1e-5
        )
    after = model.state_dict()
    changed = {n for n in after if after[n].device.type != "meta" and not torch.equal(after[n], before[n])}
    assert {n.split(".")[0] for n in changed} == {
        "encoder_z", "hyper_list", "prior_z", "prior_distr_z", "prior_cat_encoder", "post_cat_encoder"
    }  # fmt: skip
    model.eval()
    with torch.no_grad():
        assert model.elbo([data, None]).shape == ()
    model._encoder_to_inference("inference")
    coords, values = model._to_coordinates_and_features(data)
    mask = torch.ones(dims[1:], dtype=torch.bool)
    mask[1:3, 1:3] = False
    kept = mask.flatten()
    finer = tuple(2 * n - 1 for n in dims[1:])
    maps, _ = model.reconstruct([coords[:, kept], values[:, kept]], finer, model.create_outcoordinates(finer, 3), mask)
    assert maps["mean"].shape == (3, dims[0], *finer) and maps["pi"].shape == (3, 1, *finer, 3)
    maps, drawn = model.sample([2], dims[1:], model.create_outcoordinates(dims[1:], 2))
    assert maps["segm"].shape == (2, 1, *dims[1:]) and drawn["sample"].shape == (2, 4)
    again = small(write, task, dims, seed=9)
    again.load_state_dict(after, strict=False)
    assert all(torch.equal(v, after[n]) for n, v in again.state_dict().items() if v.device.type != "meta")


def test_the_same_seeds_give_the_same_run(write: Write) -> None:
    def run() -> list[float]:
        model = small(write, seed=2)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        found = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model([torch.rand(2, 3, 9, 7), None], missingness=0.3)["loss"]
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert run() == run()


def test_grids_are_those_of_the_package(write: Write) -> None:
    image, sphere = small(write), small(write, "era5_polar", (1, 8, 10))
    assert close(image.create_outcoordinates((9, 7), 1)[0], grid_coords((9, 7)), 1e-6)
    assert close(sphere.create_outcoordinates((8, 10), 1)[0], sphere_grid((8, 10)), 1e-6)
    assert sphere.create_outcoordinates((15, 19), 2).shape == (2, 285, 3)


def test_data_converters_go_back(write: Write) -> None:
    image, sphere = small(write).data_converter, small(write, "era5_polar", (1, 8, 10)).data_converter
    data = torch.rand(2, 3, 9, 7)
    coords, values = image.batch_to_coordinates_and_features(data)
    assert coords.shape == (2, 63, 2) and torch.equal(image.batch_to_data(coords, values), data)
    field = torch.rand(2, 8, 10, 1)
    full = sphere.batch_to_data(coordinates=None, features=field)
    assert full.shape == (2, 3, 8, 10) and torch.equal(full[:, 2], field[..., 0])
    assert torch.allclose(full[0, 0, :, 0], torch.linspace(90, -90, 8))
    assert torch.allclose(full[1, 1, 3], 36.0 * torch.arange(10))
    coords, values = sphere.batch_to_coordinates_and_features(full)
    assert torch.equal(values[..., 0], field.flatten(1)) and torch.allclose(coords.norm(dim=-1), torch.ones(2, 80))
    assert sphere.batch_to_data(features=torch.rand(2, 15, 19, 1), resolution=(15, 19)).shape == (2, 3, 15, 19)


def test_a_copy_has_a_prior_of_its_own(write: Write) -> None:
    model = small(write)
    other = copy.deepcopy(model)
    other.prior_z.params_nf_fixed = True
    assert other.prior_z.params_nf_fixed and not model.prior_z.params_nf_fixed
    assert not other.vamoh.use_flow and model.vamoh.use_flow


def test_global_configuration_is_read_where_it_is_loaded(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = yaml.safe_load(write().read_text())
    given = arguments(cfg, "image", [3, 9, 7])
    layers = given.pop("params_nf")
    with pytest.raises(ValueError, match="params_nf must be given where imagegym.config is not loaded"):
        VAMOH(**given)
    module = types.ModuleType("imagegym.config")
    module.cfg = types.SimpleNamespace(params_nf=layers | {"L": 2}, model={"simple_cat": False})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "imagegym.config", module)
    model = VAMOH(**given)
    assert isinstance(model.vamoh, VaMoH) and len(model.vamoh.prior.b) == 2
    module.cfg.model["simple_cat"] = True
    with pytest.raises(ValueError, match=r"model\.simple_cat must be False"):
        VAMOH(**given)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"task": "audio"}, "task must be one of image"),
        ({"dims_x": [3, 9]}, "dims_x must have 2 sizes"),
        ({"feature_dim": 1}, "feature_dim must be the channels"),
        ({"distr_x": "beta"}, "model.distr_x must be"),
        ({"learn_residual_posterior": True}, "learn_residual_posterior must be False"),
        ({"encoder_type": "mlp"}, "encoder_type must be"),
    ],
)
def test_arguments_that_cannot_be_reproduced(write: Write, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(write, **change)


def test_bad_batches(write: Write) -> None:
    model = small(write)
    with pytest.raises(ValueError, match="missingness must be between 0 and 1"):
        model([torch.rand(2, 3, 9, 7), None], missingness=1.5)
    with pytest.raises(ValueError, match="data must have shape"):
        model([torch.rand(2, 3, 9, 8), None])
    with pytest.raises(ValueError, match=r"values must lie in \[0, 1\]"):
        model([torch.rand(2, 3, 9, 7) * 255, None])
    with pytest.raises(ValueError, match="mask must be None"):
        model.sample([1], (9, 7), model.create_outcoordinates((9, 7)), mask=torch.ones(9, 7))


def spent(action: Callable[[], Any]) -> torch.Tensor:
    """State of the global generator after an action that starts at seed 5."""
    torch.manual_seed(5)
    action()
    return torch.get_rng_state()


@pytest.mark.parametrize("likelihood", ["logistic", "ber", "cb"])
def test_every_method_draws_what_the_reference_draws(write: Write, likelihood: str) -> None:
    """The reference draws values of every component when it reconstructs, and does not use them."""
    cfg = yaml.safe_load(write(likelihood=likelihood, pool=(16, 4)).read_text())
    model = VAMOH(**arguments(cfg, "image", [3, 9, 7]))
    data, finer = torch.rand(2, 3, 9, 7), (17, 13)
    coords, values = model._to_coordinates_and_features(data)
    out, mask = model.create_outcoordinates(finer, 2), torch.ones(9, 7, dtype=torch.bool)
    logits = torch.randn(2, 3, *finer, model.K)

    def reference() -> None:
        if likelihood == "ber":
            torch.distributions.Bernoulli(logits=logits).sample()
        elif likelihood == "cb":
            torch.distributions.ContinuousBernoulli(logits=logits).sample()

    def reconstruct() -> None:
        model.reconstruct([coords, values], finer, out, mask)

    nothing = spent(lambda: None)
    assert torch.equal(spent(reconstruct), spent(reference))
    assert torch.equal(spent(reconstruct), nothing) == (likelihood == "logistic")
    assert torch.equal(spent(lambda: model.sample([2], finer, out)), spent(lambda: torch.randn(2, 4)))
    for quiet in (
        lambda: model.sample([2], finer, out, z=torch.zeros(2, 4)),
        lambda: model.create_outcoordinates(finer, 2),
        lambda: model._to_coordinates_and_features(data),
        model.create_meta_model,
        model.print_params_count,
        lambda: model.set_input_scaler(object()),
        lambda: model.load_state_dict(model.state_dict()),
    ):
        assert torch.equal(spent(quiet), nothing)
    numpy = np.random.get_state()[1].copy()
    reconstruct()
    assert np.array_equal(np.random.get_state()[1], numpy)
    model.replay = False
    assert torch.equal(spent(reconstruct), nothing)


def test_a_bernoulli_measures_the_range_of_its_data(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the reference's order of drawing; only of data that it does not take to be in [0, 1]."""
    cfg = yaml.safe_load(write(likelihood="ber", pool=(16, 4)).read_text())
    data = torch.utils.data.TensorDataset(torch.rand(70, 3, 9, 7) * 0.5 + 0.25, torch.zeros(70))
    module = types.ModuleType("imagegym.config")
    module.cfg = types.SimpleNamespace(model={}, params_nf=cfg["params_nf"], dataset={"name": "shapes3d"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "imagegym.config", module)
    model = VAMOH(**arguments(cfg, "image", [3, 9, 7]))

    def reference() -> None:
        list(torch.utils.data.DataLoader(data, batch_size=64, shuffle=True))

    assert torch.equal(spent(lambda: model.set_input_scaler(data)), spent(reference))
    values = model._to_coordinates_and_features(data.tensors[0])[1]
    low, high = data.tensors[0].aminmax()
    torch.testing.assert_close(values, ((data.tensors[0] - low) / (high - low)).flatten(2).mT)
    torch.testing.assert_close(model.input_scaler.inverse_transform(values).mT.unflatten(2, (9, 7)), data.tensors[0])
    module.cfg.dataset["name"] = "PolyMNIST"  # type: ignore[attr-defined]
    model = VAMOH(**arguments(cfg, "image", [3, 9, 7]))
    assert torch.equal(spent(lambda: model.set_input_scaler(data)), spent(lambda: None))
    assert model.input_scaler.transform(low) == low


def test_parameters_are_counted_as_in_the_reference(golden: Any) -> None:
    """Networks of its encoder, its gating and its hypernetworks, by the names of its state."""
    model, lines = of_golden(golden), []
    parts = ("encoder_z.", "prior_cat_encoder.", "post_cat_encoder.")
    wanted = {part: sum(v.numel() for n, v in golden.state().items() if n.startswith(part)) for part in parts}
    wanted["hyper_list."] = sum(
        v.numel()
        for n, v in golden.state().items()
        if n.startswith("hyper_list.") and ".mlp.layers" in n and "function" not in n
    )
    assert model.print_params_count(types.SimpleNamespace(info=lines.append)) == sum(wanted.values())
    assert lines[-1] == f"Num of total parameters: {sum(wanted.values())}"
    assert f"\tNum parameters encoder_z: {wanted['encoder_z.']}" in lines
