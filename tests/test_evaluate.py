"""Evaluation: its averages against numbers computed here with numpy."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import SIZES
from vamoh.data import Dataset
from vamoh.evaluate import evaluate_model, infer, split_indices, subsample
from vamoh.generator import Reconstruction
from vamoh.masks import completion_mask
from vamoh.metrics import MAX_PSNR, crps, psnr
from vamoh.model import VaMoH
from vamoh.points import PointSet, grid_coords, sphere_grid


def tiny_model(coord_dim: int = 2, likelihood: str = "logistic") -> VaMoH:
    return VaMoH(coord_dim=coord_dim, channels=1, **SIZES, likelihood=likelihood).eval()


def dataset(shape: tuple[int, ...] = (6, 6), count: int = 10, mask: Tensor | None = None, unit: str = "") -> Dataset:
    values = torch.rand(count, math.prod(shape), 1, generator=torch.Generator().manual_seed(0))
    voxels = len(shape) == 3
    return Dataset(
        name="noise", kind="voxels" if voxels else "image", shape=shape, coords=grid_coords(shape),
        values=values.round() if voxels else (values * 255).to(torch.uint8), mask=mask,
        splits={"train": torch.arange(4), "validation": torch.arange(4, 5), "test": torch.arange(5, count)},
        likelihood="bernoulli" if voxels else "logistic", units=(unit, 200.0, 320.0),
    )  # fmt: skip


def test_reconstruction_and_completion_are_measured_as_defined() -> None:
    data, model = dataset(unit="K"), tiny_model()
    result = evaluate_model(model, data, samples=2, mask="half")
    points = data.batch(data.splits["test"])
    target = points.values.numpy().astype(np.float64)
    mean = model.reconstruct(points).mean.numpy()
    errors = ((mean - target) ** 2).mean((1, 2))
    assert result["psnr"] == pytest.approx(np.mean(-10 * np.log10(errors)), rel=1e-4)
    assert result["mse"] == pytest.approx(errors.mean(), rel=1e-4)
    assert result["rmse"] == pytest.approx(np.mean(120 * np.sqrt(errors)), rel=1e-4)
    assert result["unit"] == "K"
    seen = completion_mask("half", (6, 6)).flatten()
    mean = model.reconstruct(points.with_mask(seen)).mean.numpy()
    errors = ((mean - target)[:, ~seen.numpy()] ** 2).mean((1, 2))
    assert result["completion_psnr"] == pytest.approx(np.mean(-10 * np.log10(errors)), rel=1e-4)
    assert (result["functions"], result["points"], result["completion_mask"]) == (5, 36, "half")


def test_completions_of_every_mask_and_what_z_alone_gives() -> None:
    data, model = dataset(), tiny_model()
    result = evaluate_model(model, data, samples=2, mask="random:0.4", seed=3)
    points = data.batch(data.splits["test"])
    from_z = model.decode(model.encode(points).mean, points.coords).mean
    assert result["latent_psnr"] == pytest.approx(psnr(from_z, points.values).mean().item(), rel=1e-4)
    assert result["latent_psnr"] != pytest.approx(result["psnr"], rel=1e-4)
    assert list(result["completions"]) == ["random:0.4", "patch", "half", "outside", "random:0.5"]
    for name, scores in result["completions"].items():
        seen = completion_mask(name, (6, 6), seed=3).flatten()
        partial = points.with_mask(seen)
        found = psnr(model.reconstruct(partial).mean, points.values, ~seen)
        assert scores["psnr"] == pytest.approx(found.mean().item(), rel=1e-4) and scores["functions"] == 5
        # Few draws scatter around the mean completion: the best is better than most, the score no exact zero.
        assert scores["psnr"] - 1 < scores["best_psnr"] < MAX_PSNR and 0 < scores["crps"] < 1
    assert result["completions"]["random:0.4"]["psnr"] == pytest.approx(result["completion_psnr"], rel=1e-6)
    assert evaluate_model(model, data, samples=2, mask="random:0.4", seed=3) == result


def test_the_best_draw_and_the_score_of_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = dataset(), tiny_model()
    points = data.batch(data.splits["test"])
    calls: list[Tensor] = []
    original = VaMoH.decode

    def decode(self: VaMoH, z: Tensor, coords: Tensor, **kwargs: bool) -> Reconstruction:
        result = original(self, z, coords, **kwargs)
        if len(z) == 8 * 5:
            calls.append(result.mean.unflatten(0, (8, 5)))
        return result

    monkeypatch.setattr(VaMoH, "decode", decode)
    result = evaluate_model(model, data, samples=2, mask="half")
    seen = completion_mask("half", (6, 6)).flatten()
    every = torch.stack([psnr(draw, points.values, ~seen) for draw in calls[0]])
    scores = result["completions"]["half"]
    assert len(calls) == 4 and every.std(0).min() > 0
    assert scores["best_psnr"] == pytest.approx(every.amax(0).mean().item(), rel=1e-5)
    assert scores["crps"] == pytest.approx(crps(calls[0], points.values, ~seen).mean().item(), rel=1e-5)


def test_missing_values_are_ranked_among_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among 19 known draws, their places and the share within are counted here, of the missing points only."""
    data, model = dataset(), tiny_model()
    levels = torch.linspace(0.05, 0.95, 19)
    monkeypatch.setattr(
        VaMoH,
        "sample_values",
        lambda self, z, coords, generator: levels.repeat_interleave(len(z) // 19)[:, None, None].expand(-1, 36, 1),
    )
    scores = evaluate_model(model, data, samples=2, mask="half")["completions"]["half"]
    hidden = ~completion_mask("half", (6, 6)).flatten()
    values = data.batch(data.splits["test"]).values[:, hidden, 0].numpy()
    places = np.searchsorted(levels.numpy(), values)
    expected = [float((places == i).mean()) for i in range(20)]
    assert scores["ranks"] == pytest.approx(expected, abs=1e-9)
    assert scores["coverage"] == pytest.approx(sum(expected[1:-1]), abs=1e-9)


def test_the_likelihood_of_missing_values_is_of_the_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = dataset(), tiny_model()
    points, seen = data.batch(data.splits["test"]), completion_mask("half", (6, 6)).flatten()
    part, whole = model.encode(points.with_mask(seen)), model.encode(points)
    original, asked = VaMoH.iwae, []

    def iwae(self: VaMoH, given: PointSet, **options: Any) -> Tensor:
        if options.get("prior") is not None:
            asked.append((given, options))
        return original(self, given, **options)

    monkeypatch.setattr(VaMoH, "iwae", iwae)
    result = evaluate_model(model, data, samples=3, mask="half")
    given, options = asked[0]
    assert given.mask is not None and torch.equal(given.mask, ~seen) and options["proper"] and options["samples"] == 3
    assert torch.allclose(options["prior"].mean, part.mean) and torch.allclose(options["prior"].std, part.std)
    assert [torch.allclose(q.mean, p.mean) for q, p in zip(options["proposals"], (part, whole), strict=True)] == [
        True
    ] * 2
    bound = original(model, given, **{**options, "samples": 2000, "generator": torch.Generator().manual_seed(1)})
    # 18 missing points; by three samples the bound is a little lower.
    few = result["completions"]["half"]["log_likelihood"]
    assert few <= bound.mean().item() / 18 + 0.01 and few == pytest.approx(bound.mean().item() / 18, abs=0.3)
    assert "log_likelihood" not in evaluate_model(model, data, samples=1, uncertainty=False)["completions"]["patch"]


def test_masks_of_a_mixture_differ_between_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = dataset(count=8), tiny_model()
    name = "posterior-matching-mnist"
    masks = completion_mask(name, (6, 6), seed=1, count=3).flatten(1)
    points = data.batch(data.splits["test"])
    monkeypatch.setattr("vamoh.evaluate.MAX_POINTS", 72)  # two functions at a time
    result = evaluate_model(model, data, samples=2, mask=name, seed=1)
    enough = (masks.sum(1) >= model.min_points) & ~masks.all(1)
    assert enough.any() and result.get("completion_left_out", []) == points_left_out(data, enough)
    found = [
        psnr(
            model.reconstruct(points.part(slice(i, i + 1)).with_mask(masks[i])).mean,
            points.values[i : i + 1],
            ~masks[i],
        )
        for i in enough.nonzero()[:, 0].tolist()
    ]
    assert result["completion_psnr"] == pytest.approx(torch.cat(found).mean().item(), rel=1e-4)


def points_left_out(data: Dataset, enough: Tensor) -> list[int]:
    left: list[int] = data.splits["test"][~enough].tolist()
    return left


def test_errors_on_a_sphere_are_weighed_by_area() -> None:
    coords, shape = sphere_grid((5, 8)), (5, 8)
    data = replace(dataset(shape, unit="K"), kind="sphere", coords=coords)
    model = tiny_model(3)
    result = evaluate_model(model, data, samples=1, uncertainty=False)
    points = data.batch(data.splits["test"])
    squared = (model.reconstruct(points).mean - points.values).square()[..., 0].numpy().reshape(5, *shape)
    weights = np.cos(np.deg2rad(np.linspace(90, -90, 5)))[None, :, None]
    expected = np.sqrt((squared * weights).sum((1, 2)) / (weights.sum() * 8)) * 120
    assert result["weighted_rmse"] == pytest.approx(expected.mean(), rel=1e-4)
    assert result["weighted_rmse"] != pytest.approx(result["rmse"], rel=1e-4)


def test_terms_and_bits_are_consistent() -> None:
    result = evaluate_model(tiny_model(), dataset(), samples=3, importance_count=2)
    assert result["elbo"] == pytest.approx(result["log_likelihood"] - result["kl_z"] - result["kl_c"], rel=1e-5)
    assert result["bits_per_dim"] == pytest.approx(-result["importance_bound"] / (36 * math.log(2)), rel=1e-6)
    assert (result["importance_samples"], result["importance_functions"]) == (3, 2)
    # A normalised probability of random bytes cannot do better than 8 bits on average.
    assert result["bits_per_dim"] > 7.5


def test_voxels_have_an_intersection_over_union() -> None:
    data, model = dataset((4, 4, 4)), tiny_model(3, "bernoulli")
    result = evaluate_model(model, data, samples=2)
    points = data.batch(data.splits["test"])
    guess, target = model.reconstruct(points).mean.numpy() >= 0.5, points.values.numpy() >= 0.5
    expected = np.mean([(g & t).sum() / (g | t).sum() for g, t in zip(guess, target, strict=True)])
    assert result["iou"] == pytest.approx(expected, rel=1e-6)
    assert 0 <= result["completion_iou"] <= 1


def test_values_at_unobserved_points_do_not_matter() -> None:
    mask = torch.rand(10, 36, generator=torch.Generator().manual_seed(1)) < 0.8
    data = dataset(mask=mask)
    other = replace(data, values=torch.where(mask[..., None], data.values, 255 - data.values))
    model = tiny_model()
    first, second = (evaluate_model(model, d, samples=2) for d in (data, other))
    numbers = [name for name, value in first.items() if isinstance(value, float)]
    assert len(numbers) >= 9
    assert [first[name] for name in numbers] == pytest.approx([second[name] for name in numbers], rel=1e-6)
    observed = mask[5:].sum(-1).double().mean().item()
    assert first["bits_per_dim"] == pytest.approx(-first["importance_bound"] / (observed * math.log(2)), rel=0.1)


def test_the_encoder_sees_at_most_num_points() -> None:
    data, model = dataset(), tiny_model()
    points = data.batch(torch.arange(3))
    generator = torch.Generator().manual_seed(0)
    assert subsample(points, 20, generator).count == 20
    assert subsample(points, None, generator) is points
    assert subsample(points, 36, generator) is points
    half = points.with_mask(torch.arange(36) < 18)
    assert subsample(half, 15, generator).count == 15
    assert infer(model, points, 20, generator).shape == (3, 3)
    assert evaluate_model(model, data, samples=2, num_points=20)["points"] == 20


def test_same_seed_same_result_and_plain_json() -> None:
    data, model = dataset(), tiny_model()
    first = evaluate_model(model, data, samples=2, count=3, mask="random:0.5", seed=4)
    assert first == evaluate_model(model, data, samples=2, count=3, mask="random:0.5", seed=4)
    assert first != evaluate_model(model, data, samples=2, count=3, mask="random:0.5", seed=5)
    assert json.loads(json.dumps(first, allow_nan=False)) == first


def test_an_exact_reconstruction_has_a_finite_psnr(monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(model: VaMoH, points: PointSet, z: Tensor) -> Reconstruction:
        return Reconstruction(points.values, points.values, torch.ones(*points.values.shape[:2], 1))

    monkeypatch.setattr(VaMoH, "reconstruct", exact)
    result = evaluate_model(tiny_model(), dataset(), samples=1)
    assert (result["psnr"], result["completion_psnr"], result["mse"]) == (MAX_PSNR, MAX_PSNR, 0.0)


def test_choices_of_data_are_checked() -> None:
    data = dataset()
    assert split_indices(data, "test", index=(2, 0)).tolist() == [7, 5]
    assert split_indices(data, "test", count=2).tolist() == [5, 6]
    assert split_indices(data, "test", count=99).tolist() == [5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match=r"split must be one of train, validation, test, got 'tests'"):
        split_indices(data, "tests")
    with pytest.raises(ValueError, match=r"index must lie from 0 to 4 in split test of noise, got \[1, 5\]"):
        split_indices(data, "test", index=(1, 5))
    with pytest.raises(ValueError, match=r"data: count must be at least 1, got 0"):
        split_indices(data, "test", count=0)
    empty = replace(data, splits={**data.splits, "test": torch.arange(0)})
    with pytest.raises(ValueError, match=r"split test of noise must not be empty"):
        split_indices(empty, "test")
