"""Evaluation of a model over a split of a data set."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from vamoh import metrics
from vamoh._checks import check_positive, check_seed, check_type
from vamoh._progress import Progress
from vamoh._shown import shown
from vamoh.data import Dataset
from vamoh.masks import MIXTURES, completion_mask
from vamoh.metrics import MAX_PSNR
from vamoh.model import VaMoH
from vamoh.points import PointSet

COMPLETIONS = ("patch", "half", "outside", "random:0.5")
"""Masks that every evaluation completes."""
DRAWS = 8
RANKED = 19
"""Draws with observation noise among which a value is ranked: between the least and the greatest lie 90 %."""
# Points of one batch, which bounds the memory.
MAX_POINTS = 2**18


def split_indices(dataset: Dataset, split: str, index: tuple[int, ...] = (), count: int | None = None) -> Tensor:
    """Indices [n] int64 of the functions at positions `index` of a split, or of its first `count`, or of all.

    Raises ValueError for an unknown or empty split, a position outside it, or a count below 1.
    """
    check_type("data", "dataset", dataset, Dataset)
    check_type("data", "split", split, str)
    check_type("data", "index", index, tuple, list)
    for position in index:
        check_type("data", "index", position, int)
    if split not in dataset.splits:
        raise ValueError(f"data: split must be one of {', '.join(dataset.splits)}, got {shown(split)}")
    found = dataset.splits[split]
    if len(found) == 0:
        raise ValueError(f"data: split {split} of {dataset.name} must not be empty")
    if index:
        if min(index) < 0 or max(index) >= len(found):
            raise ValueError(
                f"data: index must lie from 0 to {len(found) - 1} in split {split} of {dataset.name}, got {list(index)}"
            )
        return found[torch.tensor(index)]
    return found if count is None else found[: check_positive("data", "count", count)]


def subsample(points: PointSet, count: int | None, generator: torch.Generator, at_least: int = 0) -> PointSet:
    """Keep `count` points that any function observes, drawn at random, or all of fewer; None keeps all.

    A model trained on that many points meets, at inference, the density it was trained on. at_least: see
    `PointSet.subsample`.
    """
    points = points.compact()
    return points if count is None or count >= points.count else points.subsample(count, generator, at_least)


def infer(model: VaMoH, points: PointSet, num_points: int | None, generator: torch.Generator) -> Tensor:
    """Posterior mean [B, Z] from the observed points, of which the encoder sees at most `num_points`."""
    return model.encode(subsample(points, num_points, generator, model.min_points)).mean


def observe(points: PointSet, seen: Tensor | None) -> PointSet:
    """Restrict what is observed to `seen` [N] or [B, N] bool; None leaves it as it is."""
    if seen is None:
        return points
    seen = seen.to(points.values.device)
    return points.with_mask(seen if points.mask is None else points.mask & seen)


def point_masks(name: str, shape: tuple[int, ...], count: int, seed: int) -> Tensor:
    """`completion_mask` of the points of a grid: [N] for all of `count` functions, of a mixture [count, N]."""
    if name in MIXTURES:
        return completion_mask(name, shape, seed=seed, count=count).flatten(1)
    return completion_mask(name, shape, seed=seed).flatten()


def completable(points: PointSet, seen: Tensor, at_least: int) -> Tensor:
    """Which functions have observed points that `seen` [N] or [B, N] hides, and `at_least` that it shows, [B] bool."""
    observed = torch.ones_like(points.values[..., 0], dtype=torch.bool) if points.mask is None else points.mask
    seen = seen.to(observed.device)
    shown, hidden = (observed & seen).sum(-1), (observed & ~seen).any(-1)
    return ((shown >= at_least) & hidden).expand(points.batch)


@torch.no_grad()
def evaluate_model(
    model: VaMoH,
    dataset: Dataset,
    *,
    split: str = "test",
    count: int | None = None,
    importance_count: int | None = None,
    samples: int = 64,
    mask: str = "patch",
    num_points: int | None = None,
    seed: int = 0,
    progress: bool = False,
    uncertainty: bool = True,
) -> dict[str, Any]:
    """Measure a model on a split; averages over its functions.

    count, importance_count: use the first so many functions of the split (None: all), the second one for the
    importance-weighted bound of `samples` samples. mask: of the completion, see `completion_mask`.
    num_points: the encoder and the bounds see at most so many random points of each function (None: all).

    Returns plain values: data, split, functions, points; elbo, log_likelihood, kl_z, kl_c (nats per function, by one
    sample); importance_samples, importance_functions, importance_bound (nats), bits_per_dim (from that bound, with a
    normalised probability of 8-bit values for the logistic; a density's for the continuous Bernoulli); psnr (dB) and
    mse of the reconstruction, in which the components know the values; latent_psnr (dB) from z alone, the components by
    p(c | x, z); completion_mask, completion_psnr (dB, missing points only). Voxels add iou and completion_iou
    (threshold 0.5); data with a unit add rmse, completion_rmse and unit, and on a sphere weighted_rmse and
    completion_weighted_rmse, by the cosine of the latitude. completion_left_out lists the functions of
    which the mask hides no observed point, or leaves fewer than the encoder needs; where it lists all, there is no
    completion to measure.
    completions: of the mask and each of `COMPLETIONS`, over the missing points: psnr (dB), as completion_psnr;
    best_psnr (dB), of the best of 8 draws of z; crps of these draws, see `metrics.crps`; functions, their number.
    uncertainty adds to them, of the functions of the importance-weighted bound: log_likelihood, nats per missing point,
    an importance-weighted bound of what the completion says of them (docs/model.md); ranks, the shares of missing
    values of rank 0 to 19 among 19 draws with observation noise, see `metrics.ranks`, alike where the draws are right;
    coverage, that of missing values from the least to the greatest of these draws: a right model's have 90 %, more
    where values and draws are often equal.
    Raises ValueError for an unknown split or mask.
    """
    check_type("evaluate", "model", model, VaMoH)
    check_type("evaluate", "dataset", dataset, Dataset)
    check_type("evaluate", "mask", mask, str)
    check_seed("evaluate", "seed", seed)
    if num_points is not None:
        check_positive("evaluate", "num_points", num_points)
    device = next(model.parameters()).device
    batch_size = max(1, min(32, MAX_POINTS // dataset.points))
    indices = split_indices(dataset, split, count=count)
    weighted = split_indices(dataset, split, count=importance_count if importance_count is not None else count)
    shape = dataset.shape or (dataset.points,)
    most = max(len(indices), len(weighted))
    masks = {name: seen.to(device) for name, seen in _masks(mask, shape, most, seed).items()}
    # None: a bar on a terminal only.
    quiet = None if progress else True
    noise = torch.Generator(device=device).manual_seed(seed)
    latents = torch.Generator(device=device).manual_seed(seed)
    choice = torch.Generator().manual_seed(seed)
    columns: dict[str, list[Tensor]] = {}
    left_out: list[int] = []
    completions: dict[str, dict[str, list[Tensor]]] = {}

    def collect(**values: Tensor) -> None:
        for name, value in values.items():
            columns.setdefault(name, []).append(value.double().cpu())

    def compare(prefix: str, mean: Tensor, points: PointSet, where: Tensor | None) -> None:
        target = points.values
        collect(**{f"{prefix}psnr": metrics.psnr(mean, target, where).clamp(max=MAX_PSNR)})
        if not prefix:
            collect(mse=metrics.mse(mean, target, where))
        if dataset.kind == "voxels":
            collect(**{f"{prefix}iou": metrics.iou(mean, target, where)})
        if dataset.units[0]:
            span = dataset.units[2] - dataset.units[1]
            collect(**{f"{prefix}rmse": metrics.rmse(mean, target, where, span=span)})
            if dataset.kind == "sphere":
                area = (1 - points.coords[:, 2].square()).clamp(min=0).sqrt()  # cosine of the latitude
                collect(**{f"{prefix}weighted_rmse": metrics.rmse(mean, target, where, span=span, weight=area)})

    def complete(name: str, points: PointSet, seen: Tensor) -> None:
        partial, hidden = observe(points, seen), ~seen if points.mask is None else points.mask & ~seen
        q = model.encode(subsample(partial, num_points, choice, model.min_points))
        mean = model.reconstruct(partial, z=q.mean).mean
        if name == mask:
            compare("completion_", mean, points, hidden)
        z = torch.cat([q.sample(torch.randn(q.mean.shape, generator=latents, device=device)) for _ in range(DRAWS)])
        coords = points.coords if points.coords.dim() == 2 else points.coords.repeat(DRAWS, 1, 1)
        draws = model.decode(z, coords, with_pi=False).mean.unflatten(0, (DRAWS, -1))
        best = torch.stack([metrics.psnr(draw, points.values, hidden) for draw in draws]).amax(0)
        scores = completions.setdefault(name, {"psnr": [], "best_psnr": [], "crps": []})
        scores["psnr"].append(metrics.psnr(mean, points.values, hidden).clamp(max=MAX_PSNR).double().cpu())
        scores["best_psnr"].append(best.clamp(max=MAX_PSNR).double().cpu())
        scores["crps"].append(metrics.crps(draws, points.values, hidden).double().cpu())

    def judge(name: str, points: PointSet, seen: Tensor) -> None:
        if name not in completions:
            return
        partial, hidden = observe(points, seen), ~seen if points.mask is None else points.mask & ~seen
        q = model.encode(subsample(partial, num_points, choice, model.min_points))
        whole = model.encode(subsample(points, num_points, choice, model.min_points))
        missing = points.with_mask(hidden)
        bound = model.iwae(missing, samples=samples, generator=noise, proper=True, proposals=(q, whole), prior=q)
        z = torch.cat([q.sample(torch.randn(q.mean.shape, generator=latents, device=device)) for _ in range(RANKED)])
        coords = points.coords if points.coords.dim() == 2 else points.coords.repeat(RANKED, 1, 1)
        draws = model.sample_values(z, coords, generator=latents).unflatten(0, (RANKED, -1))
        inside = ((points.values >= draws.amin(0)) & (points.values <= draws.amax(0))).double().mean(-1)
        rank = metrics.ranks(draws, points.values, latents)
        shares = torch.stack([(rank == i).double().mean(-1) for i in range(RANKED + 1)], -1)  # [B, N, S + 1]
        counted = hidden.double().expand(points.batch, -1)
        shares = (shares * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)
        scores = completions[name]
        scores.setdefault("log_likelihood", []).append((bound / counted.sum(1)).double().cpu())
        scores.setdefault("coverage", []).append(((inside * counted).sum(1) / counted.sum(1)).cpu())
        scores.setdefault("ranks", []).append(shares.cpu())

    def by_masks(start: int, points: PointSet, do: Callable[[str, PointSet, Tensor], None]) -> Tensor:
        """Do it for every mask with the functions that it leaves enough of; which ones `mask` does not, [B] bool."""
        without = torch.zeros(points.batch, dtype=torch.bool)
        for name, every in masks.items():
            seen = every if every.dim() == 1 else every[start : start + points.batch]
            can = completable(points, seen, model.min_points)
            without = ~can.cpu() if name == mask else without
            if can.all():
                do(name, points, seen)
            elif can.any():
                chosen = can.nonzero()[:, 0]
                do(name, points.part(chosen), seen if seen.dim() == 1 else seen[chosen])
        return without

    done = 0
    for part in Progress(torch.split(indices, batch_size), desc="evaluate", disable=quiet, leave=False):
        points = model.prepare(dataset.batch(part))
        terms = model.elbo(subsample(points, num_points, choice, model.min_points), generator=noise)
        collect(elbo=terms.elbo, log_likelihood=terms.log_likelihood, kl_z=terms.kl_z, kl_c=terms.kl_c)
        z = infer(model, points, num_points, choice)
        compare("", model.reconstruct(points, z=z).mean, points, points.mask)
        from_z = model.decode(z, points.coords, with_pi=False).mean
        collect(latent_psnr=metrics.psnr(from_z, points.values, points.mask).clamp(max=MAX_PSNR))
        left_out += part[by_masks(done, points, complete)].tolist()
        done += len(part)

    done = 0
    for part in Progress(torch.split(weighted, batch_size), desc="bits per dimension", disable=quiet, leave=False):
        whole = model.prepare(dataset.batch(part))
        points = subsample(whole, num_points, choice, model.min_points)
        bound = model.iwae(points, samples=samples, generator=noise, proper=True)
        observed = points.values.new_tensor(points.count) if points.mask is None else points.mask.sum(-1)
        bits = metrics.bits_per_dim(bound * (points.count / observed), points.count, points.channels)
        collect(importance_bound=bound, bits_per_dim=bits)
        if uncertainty:
            by_masks(done, whole, judge)
        done += len(part)

    average = {name: torch.cat(parts).mean().item() for name, parts in columns.items()}
    return {
        "data": dataset.name,
        "split": split,
        "functions": len(indices),
        "points": dataset.points if num_points is None else min(num_points, dataset.points),
        **average,
        "importance_samples": samples,
        "importance_functions": len(weighted),
        "completion_mask": mask,
        "completions": {name: _averages(scores) for name, scores in completions.items()},
        **({"completion_left_out": left_out} if left_out else {}),
        **({"unit": dataset.units[0]} if dataset.units[0] else {}),
    }


def _masks(mask: str, shape: tuple[int, ...], count: int, seed: int) -> dict[str, Tensor]:
    """The mask of that name, and those of `COMPLETIONS`, but for those that this grid is too small for: [N] for all
    functions, of mixtures [count, N].
    """
    masks = {mask: point_masks(mask, shape, count, seed)}
    for name in COMPLETIONS:
        with suppress(ValueError):
            masks.setdefault(name, point_masks(name, shape, count, seed))
    return masks


def _averages(scores: dict[str, list[Tensor]]) -> dict[str, Any]:
    values = {name: torch.cat(parts) for name, parts in scores.items()}
    return {"functions": len(values["psnr"]), **{name: value.mean(0).tolist() for name, value in values.items()}}
