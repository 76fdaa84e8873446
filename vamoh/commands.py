"""What the commands do: each opens a run, calls the model, and writes a figure and the arrays behind it.

Every function takes the arguments of its command and returns the text to show. Unless `out` names a folder, results go
to the run folder.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import vamoh
from vamoh import checkpoint, figures
from vamoh._checks import check_device, check_memory, check_positive
from vamoh._files import whole_file, write_json, writing
from vamoh._progress import Progress
from vamoh._shown import shown
from vamoh.arguments import (
    Choice,
    Complete,
    Convert,
    Evaluate,
    Export,
    FitPrior,
    Info,
    Reconstruct,
    Sample,
    Segment,
    Superres,
)
from vamoh.compat.config import is_reference_config, load_reference_config
from vamoh.compat.state import convert as convert_checkpoint
from vamoh.compat.state import save_reference
from vamoh.config import Config, load_run_config
from vamoh.data import Dataset, Domain, open_dataset
from vamoh.data.function import Function, read_function
from vamoh.distributed import init_process_group
from vamoh.evaluate import completable, evaluate_model, infer, observe, point_masks, split_indices, subsample
from vamoh.export import FORMATS, export_model
from vamoh.figures import Column, Look
from vamoh.generator import Reconstruction
from vamoh.masks import completion_mask
from vamoh.metrics import MAX_PSNR, psnr
from vamoh.model import VaMoH
from vamoh.ops import status
from vamoh.points import PointSet, grid_shape, sphere_grid_shape
from vamoh.prior import SecondPrior, has_prior, load_prior, save_prior
from vamoh.prior import fit_prior as fit_second_prior
from vamoh.runlog import read_log
from vamoh.train import check_data
from vamoh.train import train as train_model

Array = NDArray[Any]

# What the evaluation after training may cost: points to reconstruct, and points times importance samples to score.
RECONSTRUCTED_POINTS = 800_000
SCORED_POINTS = 3_200_000
# Points of one batch of a command, which bounds its memory; functions of a figure, and completions of a function there:
# arrays hold all of them.
BATCH_POINTS = 2**18
DRAWN_SAMPLES = 64
DRAWN_ROWS = 32
DRAWN_COMPLETIONS = 6


@dataclass(frozen=True)
class Run:
    """A trained run, opened: its configuration and model, and its data once they are asked for.

    facts: what the run has stored of its data.
    """

    folder: Path
    config: Config
    model: VaMoH
    device: torch.device
    seed: int
    facts: Mapping[str, Any]

    @cached_property
    def dataset(self) -> Dataset:
        """The data it was trained on; ValueError if they are gone or have changed since."""
        try:
            dataset = open_dataset(**vars(self.config.data))
        except (ValueError, TypeError) as error:
            raise type(error)(f"{error} (data that moved are named by --data.path)") from error
        if isinstance(self.facts.get("data"), dict):
            check_data(self.facts["data"], dataset, self.folder)
        return dataset

    @cached_property
    def domain(self) -> Domain:
        """Where its functions live, which needs no data."""
        return Domain.from_dict(self.facts["domain"]) if "domain" in self.facts else self.dataset.domain

    @property
    def look(self) -> Look:
        """How its data is drawn."""
        return Look(self.domain.kind, self.model.components, self.domain.units, self.domain.axes)

    def points(self, index: Tensor) -> PointSet:
        """Functions of the data set on the run's device."""
        return self.dataset.batch(index).to(self.device)

    @torch.no_grad()
    def infer(self, points: PointSet) -> Tensor:
        """Posterior mean [B, Z] of z, from as many points as training showed the encoder."""
        return infer(self.model, points, self.config.train.num_points, torch.Generator().manual_seed(self.seed))

    def grid(self, values: Tensor, scale: int = 1) -> Array:
        """Reorder values [B, M, ...] at the points of the `scale` times refined grid to [B, *shape, ...]."""
        array: Array = values.cpu().numpy()
        return array.reshape(len(array), *self.domain.grid(scale)[1], *array.shape[2:])

    def observed(self, points: PointSet) -> Array:
        """Which points are observed, [B, *shape] bool."""
        mask = torch.ones(points.count, dtype=torch.bool) if points.mask is None else points.mask
        return self.grid(mask.expand(points.batch, -1))


def train(source: str, config: Config, *, out: Path | None, device: str, resume: bool) -> str:
    """Train `config` into a run folder, then draw and evaluate it.

    source: what the default folder runs/NAME is named after.
    Of several processes, the first one draws and evaluates; the others have nothing to show.
    """
    with init_process_group("train", check_device("train", device)) as (workers, place):
        folder = Path(workers.from_main(str(_run_folder(source, resume) if out is None else out)))
        train_model(config, folder, device=device, resume=resume)
    return summarize(open_run(folder, str(place), config.seed)) if workers.main else ""


def reconstruct(given: Reconstruct) -> str:
    """Encode functions and decode them at their own points."""
    opened = open_run(given.run, given.device, given.seed, given.data)
    if given.files:
        return _of_files(opened, given.out, "reconstruct", given.files)
    indices = _chosen(opened, given)

    def one(points: PointSet) -> dict[str, Array]:
        result = opened.model.reconstruct(points, z=opened.infer(points))
        return {
            "input": opened.grid(points.values),
            "mean": opened.grid(result.mean),
            "mean_map": opened.grid(result.mean_map),
            "pi": opened.grid(result.pi),
            "psnr": _decibel(result.mean, points.values, points.mask),
        }

    arrays = _in_batches(opened, indices, one)
    columns = [
        Column("Input", _values(arrays["input"], opened.look, _seen(opened, indices)), "values"),
        Column("Reconstruction", _values(arrays["mean"], opened.look)),
        Column("Most probable component", _values(arrays["mean_map"], opened.look)),
    ]
    return _write(opened, given.out, "reconstruct", columns, arrays, [f"{value:.1f} dB" for value in arrays["psnr"]])


def sample(given: Sample) -> str:
    """Draw new functions from the prior, by default the second-stage one, where the run has it."""
    opened = open_run(given.run, given.device, given.seed, given.data)
    _need_grid(opened)
    _check_room("sample", opened, given.count)
    second = given.prior == "second" or (given.prior is None and has_prior(given.run))
    prior = load_prior(given.run, opened.model) if second else None
    samples = _sample(opened, given.count, prior)
    folder = _folder(opened, given.out)
    saved = _save_arrays(folder / "sample.npz", samples)
    figure = figures.write_samples(folder / "sample.png", samples["mean"][:DRAWN_SAMPLES], opened.look)
    source = "the model's own prior" if prior is None else f"the second-stage prior, {prior.kind}"
    return f"drawn from {source}\n{_drawn(figure, saved, given.count, DRAWN_SAMPLES)}"


def fit_prior(given: FitPrior) -> str:
    """Fit a second-stage prior to the latents of the training functions, and keep it in the run folder."""
    opened = open_run(given.run, given.device, given.seed, given.data)
    prior = fit_second_prior(
        opened.model,
        opened.dataset,
        kind=given.kind,
        steps=given.steps,
        num_points=opened.config.train.num_points,
        seed=given.seed,
        progress=True,
    )
    return _written(save_prior(given.run, prior, opened.model))


def superres(given: Superres) -> str:
    """Decode functions on a grid refined `scale` times."""
    opened = open_run(given.run, given.device, given.seed, given.data)
    if given.files:
        return _of_files(opened, given.out, "superres", given.files, scale=given.scale)
    indices, scale = _chosen(opened, given), given.scale
    _check_room("superres", opened, len(indices), scale)
    coords = opened.dataset.grid(scale)[0].to(opened.device)

    def one(points: PointSet) -> dict[str, Array]:
        # The prior over components everywhere: the posterior at the given points alone would draw a dotted grid.
        result = opened.model.decode(opened.infer(points), coords)
        return {
            "input": opened.grid(points.values),
            "mean": opened.grid(result.mean, scale),
            "mean_map": opened.grid(result.mean_map, scale),
        }

    arrays = _in_batches(opened, indices, one, len(coords))
    columns = [
        Column("Input", _values(arrays["input"], opened.look, _seen(opened, indices)), "values"),
        Column(f"{scale}× super-resolution", _values(arrays["mean"], opened.look)),
    ]
    columns += _globes(arrays["mean"], opened.look)
    return _write(opened, given.out, "superres", columns, arrays)


def complete(given: Complete) -> str:
    """Fill in the points that a mask hides; by several draws of z, where they are asked for."""
    opened = open_run(given.run, given.device, given.seed, given.data)
    if given.files:
        return _of_files(opened, given.out, "complete", given.files, mask=given.mask, draws=given.draws)
    indices = _chosen(opened, given)
    mask, draws = given.mask or "patch", given.draws
    every = point_masks(mask, opened.dataset.shape, len(indices), given.seed).to(opened.device)
    masks = iter(every if every.dim() == 2 else every.expand(len(indices), -1))
    generator = torch.Generator(opened.device).manual_seed(given.seed)

    def one(points: PointSet) -> dict[str, Array]:
        each = torch.stack([next(masks) for _ in range(points.batch)])
        seen = each if every.dim() == 2 else every
        partial = observe(points, seen)
        left = partial.observed()[0]
        if left < opened.model.min_points:
            raise ValueError(
                f"complete: mask must leave every function the {opened.model.min_points} observed points that the "
                f"encoder needs, got {shown(mask)}, which leaves {left}"
            )
        result = opened.model.reconstruct(partial, z=opened.infer(partial))
        hidden = ~seen if points.mask is None else points.mask & ~seen
        return {
            "input": opened.grid(points.values),
            "observed": opened.observed(partial),
            "mean": opened.grid(result.mean),
            "mean_map": opened.grid(result.mean_map),
            "completed": _completed(opened, partial, result),
            "psnr_missing": _decibel(result.mean, points.values, hidden),
            **({} if draws is None else _completions(opened, partial, draws, generator, opened.grid)),
        }

    arrays = _in_batches(opened, indices, one, opened.dataset.points * (draws or 1))
    columns = [
        Column("Input", _values(arrays["input"], opened.look, _seen(opened, indices)), "values"),
        Column("Masked input", _values(arrays["input"], opened.look, arrays["observed"])),
        Column("Completion", _values(arrays["completed"], opened.look)),
    ]
    if draws is not None:
        for i, drawn in enumerate(np.moveaxis(arrays["draws"], 1, 0)[:DRAWN_COMPLETIONS]):
            columns.append(Column(f"Draw {i + 1}", _values(drawn, opened.look)))
        top = float(arrays["spread"].max())
        panels = [figures.show_spread(spread, top, opened.look) for spread in arrays["spread"]]
        columns.append(Column(f"Standard deviation, to {top:.2g}", panels))
    labels = ["nothing hidden" if math.isnan(value) else f"{value:.1f} dB" for value in arrays["psnr_missing"]]
    return _write(opened, given.out, "complete", columns, arrays, labels)


def segment(given: Segment) -> str:
    """Show which component explains each point, and how certain that is."""
    opened = open_run(given.run, given.device, given.seed, given.data)
    if given.files:
        return _of_files(opened, given.out, "segment", given.files)
    indices = _chosen(opened, given)

    def one(points: PointSet) -> dict[str, Array]:
        result = opened.model.reconstruct(points, z=opened.infer(points))
        return {
            "input": opened.grid(points.values),
            "pi": opened.grid(result.pi),
            "segmentation": opened.grid(result.segmentation),
            "entropy": opened.grid(result.entropy),
        }

    arrays = _in_batches(opened, indices, one)
    columns = [Column("Input", _values(arrays["input"], opened.look, _seen(opened, indices)), "values")]
    columns += _maps(arrays["segmentation"], arrays["entropy"], arrays["input"], opened.look)
    return _write(opened, given.out, "segment", columns, arrays)


def evaluate(given: Evaluate) -> str:
    """Measure the model on a split and write evaluation.json."""
    opened = open_run(given.run, given.device, given.seed, given.data)
    result = evaluate_model(
        opened.model,
        opened.dataset,
        split=given.split,
        count=given.count,
        samples=given.samples,
        mask=given.mask,
        num_points=opened.config.train.num_points,
        seed=given.seed,
        progress=True,
    )
    path = _save_json(_folder(opened, given.out) / "evaluation.json", result)
    return f"{table(result)}\n{_written(path)}"


def export(given: Export) -> str:
    """Write the encoder or decoder of a run as a program of its own."""
    path = given.run / f"{given.part}{FORMATS[given.format]}" if given.out is None else given.out
    model = checkpoint.load(given.run)
    path.parent.mkdir(parents=True, exist_ok=True)
    return _written(export_model(model, path, part=given.part, format=given.format))


def convert(given: Convert) -> str:
    """Convert a checkpoint of the published code into a run folder, or a run folder into such a checkpoint."""
    source, out, config = given.source, given.out, given.config
    if given.to_reference:
        if config is not None:
            raise ValueError("convert: config must be left out with --to-reference; the run folder has its own")
        save_reference(checkpoint.load(source), out)
        return _written(out)
    beside = source.parent.parent / "config.yaml"  # RESULTS/ckpt/N.ckpt
    if config is None and not is_reference_config(beside):
        raise ValueError("convert: config must name the YAML file that the checkpoint was trained with, got none")
    used = beside if config is None else config
    translation = load_reference_config(used)
    conversion = convert_checkpoint(source, translation, out)
    model, epochs = conversion.model, conversion.epoch + 1
    step = epochs * translation.steps_per_epoch
    lines = [f"{row.status:8} {row.theirs or '(nothing)'} -> {row.ours}" for row in conversion.rows]
    priors = f"flow prior {'on' if model.use_flow else 'off'}, gating prior {'on' if model.use_gating_prior else 'off'}"
    lines.append(f"epoch {conversion.epoch}: {priors}, by {used}")
    if is_reference_config(beside) and not beside.samefile(used):
        lines.append(f"the run has a configuration of its own, with its overrides: --config {beside}")
    elif not (model.use_flow and model.use_gating_prior) or step > translation.config.train.steps:
        lines.append("a run with overrides has them in the config.yaml of its results: --config that file")
    data, each = translation.config.data.name, translation.steps_per_epoch
    lines.append(
        f"step {step}: {epochs} epochs of {each} steps, counted for {data}, which stands in for the authors' data"
    )
    return "\n".join([*lines, _written(out)])


def info(given: Info) -> str:
    """Report versions, devices, threads and the backends of every op."""
    lines = [
        f"vamoh    {vamoh.__version__}",
        f"python   {sys.version.split()[0]}",
        f"torch    {torch.__version__}",
        f"device   {_devices()}",
        f"threads  {torch.get_num_threads()}",
    ]
    return "\n".join([*lines, "", str(status())])


def open_run(run: Path, device: str, seed: int, data: str | None = None) -> Run:
    """Open a run folder. data: where its data are now, if not where the run's configuration says.

    Raises FileNotFoundError where there is no run, ValueError for a damaged one, a missing device or a bad seed.
    """
    place = check_device("vamoh", device)
    if not 0 <= seed < 2**63:
        raise ValueError(f"vamoh: seed must be between 0 and 2^63 - 1, got {seed}")
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"no run in {run}: a run folder has a config.yaml, as vamoh train writes it")
    config = load_run_config(run)
    model = checkpoint.load(run, place)
    if data is not None:
        config = replace(config, data=replace(config.data, path=data))
    facts = checkpoint.load_training_state(run)
    return Run(run, config, model, place, seed, {name: facts[name] for name in ("data", "domain") if name in facts})


def summarize(run: Run) -> str:
    """Write samples.png, strip.png, losses.png and evaluation.json of a finished run; return a short report."""
    paths, points = [], run.dataset.points
    if run.dataset.kind != "points":
        count = {"image": 64, "sphere": 8, "voxels": 16}[run.dataset.kind]
        paths.append(figures.write_samples(run.folder / "samples.png", _sample(run, count)["mean"], run.look))
        paths.append(_strip(run))
    log = read_log(run.folder / "metrics.jsonl")
    if log:
        seen = run.config.train.num_points or points
        paths.append(figures.write_losses(run.folder / "losses.png", log, seen))
    split = _held_out(run.dataset)
    samples = 32
    result = evaluate_model(
        run.model,
        run.dataset,
        split=split,
        count=max(8, RECONSTRUCTED_POINTS // points),
        importance_count=max(4, SCORED_POINTS // (points * samples)),
        samples=samples,
        num_points=run.config.train.num_points,
        seed=run.seed,
        progress=True,
        uncertainty=False,
    )
    paths.append(_save_json(run.folder / "evaluation.json", result))
    return f"{table(result)}\n{_written(*paths)}"


def table(result: Mapping[str, Any]) -> str:
    """Lay out an evaluation as lines of name, value and unit."""
    unit, given = result.get("unit", ""), result["completion_mask"]
    completions = result.get("completions", {})
    names = ("best_psnr", "log_likelihood", "coverage")
    best = {f"completion_{name}": completions[given][name] for name in names if name in completions.get(given, {})}
    others = {name: scores["psnr"] for name, scores in completions.items() if name != given}
    result = {**result, **best, **others}
    rows = [
        ("reconstruction PSNR", "psnr", "dB"),
        ("  from z alone", "latent_psnr", "dB"),
        ("reconstruction RMSE", "rmse", unit),
        ("  by area", "weighted_rmse", unit),
        ("reconstruction IoU", "iou", ""),
        (f"completion PSNR ({result['completion_mask']})", "completion_psnr", "dB"),
        ("  best of 8 draws", "completion_best_psnr", "dB"),
        ("  log-likelihood", "completion_log_likelihood", "nats per hidden point"),
        ("  in the central 90 % of draws", "completion_coverage", ""),
        (f"completion RMSE ({result['completion_mask']})", "completion_rmse", unit),
        ("  by area", "completion_weighted_rmse", unit),
        (f"completion IoU ({result['completion_mask']})", "completion_iou", ""),
        *((f"completion PSNR ({name})", name, "dB") for name in others),
        ("ELBO", "elbo", "nats"),
        ("  log-likelihood", "log_likelihood", "nats"),
        ("  KL of the latent", "kl_z", "nats"),
        ("  KL of the components", "kl_c", "nats"),
        ("bits per dimension", "bits_per_dim", f"at most, {result['importance_samples']} importance samples "
         f"of {result['importance_functions']} functions"),
    ]  # fmt: skip
    left_out, notes = result.get("completion_left_out", []), []
    if left_out:
        why = f"{result['completion_mask']} hides nothing observed of them, or leaves too few points"
        notes.append(f"completion without {len(left_out)} functions ({_listed(left_out)}): {why}")
    rows = [(label, f"{result[name]:.4g}" if abs(result[name]) < 100 else f"{result[name]:.1f}", unit)
             for label, name, unit in rows if name in result]  # fmt: skip
    width, digits = max(len(label) for label, _, _ in rows), max(len(number) for _, number, _ in rows)
    title = f"{result['data']}, {result['split']} split, {result['functions']} functions of {result['points']} points"
    return "\n".join([title, *(f"{a:<{width}}  {b:>{digits}} {c}".rstrip() for a, b, c in rows), *notes])


def _held_out(dataset: Dataset) -> str:
    """The split to show: test, or what there is instead."""
    return next(name for name in ("test", "validation", "train") if len(dataset.splits[name]))


def _listed(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:10])) + (f" and {len(indices) - 10} more" if len(indices) > 10 else "")


def _strip(run: Run) -> Path:
    """Draw what the model makes of a few held-out functions, side by side."""
    look, kind = run.look, run.dataset.kind
    split = _held_out(run.dataset)
    indices = split_indices(run.dataset, split, count={"image": 6, "sphere": 4, "voxels": 3}[kind])
    points = run.points(indices)
    z = run.infer(points)
    result = run.model.reconstruct(points, z=z)
    seen = completion_mask("patch", run.dataset.shape).flatten()
    completed = []
    if bool(completable(points, seen, run.model.min_points).all()):
        partial = observe(points, seen)
        completion = run.model.reconstruct(partial, z=run.infer(partial))
        completed = [
            Column("Masked input", _values(run.grid(points.values), look, run.observed(partial))),
            Column("Completion", _values(_completed(run, partial, completion), look)),
        ]
    # A solid refined four times has 64 times as many points, and looks the same at this size.
    scale = 2 if kind == "voxels" else 4
    finer = run.grid(run.model.decode(z, run.dataset.grid(scale)[0].to(run.device)).mean, scale)
    given, mean = run.grid(points.values), run.grid(result.mean)
    columns = [
        Column("Input", _values(given, look, run.observed(points)), "values"),
        Column("Reconstruction", _values(mean, look)),
        *completed,
        Column(f"{scale}× super-resolution", _values(finer, look)),
        *_globes(finer, look),
        *_maps(run.grid(result.segmentation), run.grid(result.entropy), given, look),
    ]
    return figures.write_strip(run.folder / "strip.png", columns, look)


def _completions(
    run: Run, partial: PointSet, draws: int, generator: torch.Generator, grid: Callable[[Tensor], Array]
) -> dict[str, Array]:
    """Completions [B, S, *shape, C], each by its own draw of z, and their standard deviation [B, *shape, C].

    The observed points are as they are given.
    """
    choice = torch.Generator().manual_seed(run.seed)
    shown = subsample(partial, run.config.train.num_points, choice, run.model.min_points)
    values = run.model.reconstruct(shown, partial.coords, draws=draws, generator=generator).decoded
    observed = torch.ones_like(values[0, ..., 0], dtype=torch.bool) if partial.mask is None else partial.mask
    values = torch.where(observed[..., None], partial.values, values)  # [S, B, N, C]
    spread = values.std(0, correction=min(1, draws - 1))
    return {"draws": np.stack([grid(draw) for draw in values], 1), "spread": grid(spread)}


def _of_files(
    run: Run,
    out: Path | None,
    command: str,
    files: tuple[str, ...],
    *,
    scale: int = 1,
    mask: str | None = None,
    draws: int | None = None,
) -> str:
    """What a command makes of the user's own files: FILE-COMMAND.npz, and beside it in the file's format."""
    stems = [f"{Path(file.partition('::')[0]).stem}-{command}" for file in files]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise ValueError(f"{command}: files must differ in name, got several whose results would be {twice[0]}.npz")
    given = [read_function(file, run.domain, run.model.coord_dim, run.model.channels) for file in files]
    folder, written = _folder(run, out), []
    generator = torch.Generator(run.device).manual_seed(run.seed)
    for function, stem in zip(given, stems, strict=True):
        points, target = _observed_of(run, command, function, mask), function
        coords, z = points.coords, run.infer(points)
        if command == "superres":
            coords, target = function.finer(scale)
            result = run.model.decode(z, coords.to(run.device))
        else:
            result = run.model.reconstruct(points, z=z)
        maps = {"mean": result.mean, "mean_map": result.mean_map}
        shown = result.mean
        if command == "complete" and points.mask is not None:
            maps["observed"] = points.mask.expand(points.batch, -1)
            maps["completed"] = shown = torch.where(maps["observed"][..., None], points.values, result.mean)
        if command == "segment":
            maps |= {"segmentation": result.segmentation, "entropy": result.entropy, "pi": result.pi}
            last = max(run.model.components - 1, 1)
            shown, target = result.segmentation[..., None].to(shown) / last, replace(target, units=("1", 0.0, last))
        arrays = {name: target.on_grid(value) for name, value in maps.items()}
        if draws is not None:
            arrays |= _completions(run, points, draws, generator, target.on_grid)
        arrays |= {"z": z.cpu().numpy(), "coords": coords.cpu().numpy()}
        written.append(_save_arrays(folder / f"{stem}.npz", arrays))
        if command == "segment" and target.kind == "voxels":
            continue  # a mesh shows no components
        own = target.write(folder / stem, target.on_grid(shown))
        written += [] if own is None else [own]
    return _written(*written)


def _observed_of(run: Run, command: str, function: Function, mask: str | None) -> PointSet:
    """Functions of a file as the encoder may see them: without what is missing in it or hidden by a mask."""
    points = function.points.to(run.device)
    if mask is not None:
        shape = function.shape or (points.count,)
        points = observe(points, completion_mask(mask, shape, seed=run.seed).flatten())
    if command == "complete" and points.mask is None:
        raise ValueError(f"complete: {function.path} must miss something, or --mask must hide it, got a whole one")
    if points.observed()[0] < run.model.min_points:
        raise ValueError(
            f"{command}: {function.path} must have the {run.model.min_points} observed points that the encoder needs, "
            f"got {points.observed()[0]}"
        )
    return points


def _completed(run: Run, partial: PointSet, result: Reconstruction) -> Array:
    """The observed points as they are given and the model's mean elsewhere, on the grid."""
    observed = run.observed(partial)[..., None]
    return np.where(observed, run.grid(partial.values), run.grid(result.mean))


def _chosen(run: Run, given: Choice) -> Tensor:
    _need_grid(run)
    return split_indices(run.dataset, given.split, given.index, given.count)


def _seen(run: Run, indices: Tensor) -> Array:
    """What is observed of the functions that a figure shows."""
    return run.observed(run.points(indices[:DRAWN_ROWS]))


def _decibel(mean: Tensor, values: Tensor, mask: Tensor | None) -> Array:
    decibel: Array = psnr(mean, values, mask).clamp(max=MAX_PSNR).double().cpu().numpy()
    return decibel


def _in_batches(
    run: Run, indices: Tensor, one: Callable[[PointSet], dict[str, Array]], points: int = 0
) -> dict[str, Array]:
    """What `one` makes of functions, a few at a time, with their indices; points: how many it decodes of each."""
    size = max(1, BATCH_POINTS // max(run.dataset.points, points))
    parts = [one(run.points(part)) for part in indices.split(size)]
    return {"index": indices.numpy(), **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]}}


def _need_grid(run: Run) -> None:
    if run.domain.kind == "points":
        raise ValueError(f"{run.folder} is of bare points; figures need data on a grid, use the Python interface")


def _check_room(where: str, run: Run, functions: int, scale: int = 1) -> None:
    """Raise ValueError where the coordinates and decoded functions alone, float32, would fill the memory."""
    check_positive(where, "count", functions)
    check_positive(where, "scale", scale)
    sizes = sphere_grid_shape if run.domain.kind == "sphere" else grid_shape
    points, model = math.prod(sizes(run.domain.shape, scale)), run.model
    decoded = functions * points * 2 * model.channels
    size = 4 * (decoded + points * model.coord_dim + functions * model.latent_dim)
    check_memory(where, f"{functions} functions at {points} points", size)


def _sample(run: Run, count: int, second: SecondPrior | None = None) -> dict[str, Array]:
    """New functions from the model's own prior, or from a second one."""
    generator = torch.Generator(device=run.device).manual_seed(run.seed)
    draw = run.model.sample_prior if second is None else second.sample
    z = draw(count, generator=generator)
    coords = run.domain.grid()[0].to(run.device)
    parts: list[dict[str, Array]] = []
    for part in Progress(z.split(max(1, BATCH_POINTS // len(coords))), desc="sample", disable=None, leave=False):
        result = run.model.decode(part, coords)
        parts.append(
            {
                "mean": run.grid(result.mean),
                "mean_map": run.grid(result.mean_map),
                "segmentation": run.grid(result.segmentation),
                "entropy": run.grid(result.entropy),
            }
        )
    return {"z": z.cpu().numpy(), **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]}}


def _values(values: Array, look: Look, masks: Array | None = None) -> list[Array]:
    shown = values[:DRAWN_ROWS]
    return [figures.show_values(v, look, None if masks is None else masks[i]) for i, v in enumerate(shown)]


def _globes(values: Array, look: Look) -> list[Column]:
    if look.kind != "sphere":
        return []
    return [Column("Globe", [figures.show_globe(v, look) for v in values[:DRAWN_ROWS]], frame=False)]


def _maps(index: Array, entropy: Array, solid: Array, look: Look) -> list[Column]:
    index, entropy, solid = index[:DRAWN_ROWS], entropy[:DRAWN_ROWS], solid[:DRAWN_ROWS]
    solids = solid[..., 0] >= 0.5 if look.kind == "voxels" else [None] * len(index)
    return [
        Column("Components", [figures.show_components(i, look, s) for i, s in zip(index, solids, strict=True)],
               "components"),
        Column("Entropy", [figures.show_entropy(e, look, s) for e, s in zip(entropy, solids, strict=True)], "entropy"),
    ]  # fmt: skip


def _write(
    run: Run,
    out: Path | None,
    name: str,
    columns: list[Column],
    arrays: Mapping[str, Array],
    labels: list[str] | None = None,
) -> str:
    folder = _folder(run, out)
    saved = _save_arrays(folder / f"{name}.npz", arrays)
    figure = figures.write_strip(folder / f"{name}.png", columns, run.look, labels and labels[:DRAWN_ROWS])
    return _drawn(figure, saved, len(arrays["index"]), DRAWN_ROWS)


def _folder(run: Run, out: Path | None) -> Path:
    folder = run.folder if out is None else out
    with writing("vamoh", folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run_folder(source: str, resume: bool) -> Path:
    """runs/NAME, or the first of runs/NAME-2, -3, ... that does not exist; to resume, the last one that does."""
    folder = Path("runs") / Path(source).stem
    last, number = folder, 2
    while folder.exists():
        last, folder, number = folder, folder.with_name(f"{Path(source).stem}-{number}"), number + 1
    return last if resume else folder


def _save_arrays(path: Path, arrays: Mapping[str, Any]) -> Path:
    write: Any = np.savez_compressed  # its annotation takes any keyword for one of its options
    with whole_file("vamoh", path) as file:
        write(file, **arrays)
    return path


def _save_json(path: Path, content: Mapping[str, Any]) -> Path:
    return write_json("vamoh", path, content)


def _written(*paths: Path) -> str:
    return "\n".join(f"wrote {path}" for path in paths)


def _drawn(figure: Path, arrays: Path, count: int, most: int) -> str:
    """Report of arrays that hold `count` functions, and of a figure that shows the first `most` at most."""
    return _written(figure, arrays) + (f"\nthe figure shows {most} of {count}" if count > most else "")


def _devices() -> str:
    if not torch.cuda.is_available():
        return "cpu (no CUDA device)"
    return "cpu, " + ", ".join(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))
