"""One training run in memory: the model, its optimizer, its random streams and its schedules."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vamoh import checkpoint
from vamoh._checks import check_device, check_type
from vamoh._files import writing
from vamoh.config import BetaConfig, Config, config_from_dict, config_to_dict, save_config
from vamoh.data import Dataset
from vamoh.distributed import ALONE, Workers, full_tensor, shard, to_local, wrap
from vamoh.elbo import ElboTerms
from vamoh.masks import context_mask
from vamoh.metrics import MAX_PSNR, psnr
from vamoh.model import VaMoH
from vamoh.points import PointSet, domain, observed_coords
from vamoh.resume import check_config, check_data, check_state, moments

_ORDER, _POINTS, _NOISE, _VALIDATION, _COVERING = range(5)
_LEAST_SCALE = 0.25
"""Bare points that span less of [-1, 1] are of other units."""
_MAX_PENDING = 1000
"""Most updates queued on a GPU before their losses are read back."""


class NonFiniteLoss(RuntimeError):
    """A term of the loss, the gradient or a parameter became NaN or infinite.

    term: its name. step: the update that was being computed, counted from 1. indices: the functions of the batch.
    culprits: those of them whose term is bad.
    """

    def __init__(self, term: str, step: int, indices: list[int], culprits: list[int], note: str = "") -> None:
        super().__init__(
            f"train: {term} became NaN or infinite in step {step} for data {culprits} of the batch {indices}{note}"
        )
        self.term, self.step, self.indices, self.culprits = term, step, indices, culprits


class Trainer:
    """Model, optimizer and random states of a run; `step` does one update.

    An epoch is a new permutation of the training split in whole batches (the rest is left out; a split smaller than a
    batch is one batch). Schedules follow the epochs done so far, a fraction within an epoch: the learning rate is
    lr · lr_decay^epochs (grown linearly over the first lr_warmup steps), warm-ups and β ramps end when `epochs` reaches
    their bound. `seconds` counts the steps alone, without evaluations and checkpoints.

    Raises ValueError when the data set has too few points for the configuration.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        *,
        device: str | torch.device = "cpu",
        model: VaMoH | None = None,
        workers: Workers = ALONE,
    ) -> None:
        check_type("Trainer", "config", config, Config)
        check_type("Trainer", "dataset", dataset, Dataset)
        check_type("Trainer", "model", model, VaMoH, type(None))
        self.dataset, self.workers = dataset, workers
        self.device = check_device("Trainer", device)
        coord_dim, channels = dataset.coord_dim, dataset.channels
        if model is None:
            config = _normalizing(config, dataset)
            model = checkpoint.new_model(config, coord_dim, channels)
        elif not config.model.coord_offset:
            config = _with_normalization(config, *model.domain)
        self.config = config
        if (model.coord_dim, model.channels) != (coord_dim, channels):
            raise ValueError(
                f"Trainer: data set {dataset.name} must have {model.coord_dim} coordinate dimensions and "
                f"{model.channels} channels as the model, got {coord_dim} and {channels}"
            )
        if model.needs_centroids:
            model.set_centroids(_covering_coords(config, dataset).to(model.encoder.head.weight))
        self.model = model.to(self.device).train()
        _check_points(config, dataset, self.model.min_points)
        self.indices = dataset.splits["train"]
        if len(self.indices) == 0:
            raise ValueError(f"Trainer: the train split of data set {dataset.name} must not be empty")
        self.batch_size = min(config.train.batch_size, len(self.indices))
        if self.batch_size < workers.count:
            raise ValueError(
                f"Trainer: train.batch_size and the train split of data set {dataset.name} must have a function for "
                f"each of {workers.count} processes, got {self.batch_size}"
            )
        phases = config.train.flow_warmup > 0 or config.train.gating_warmup > 0
        self._call = wrap(
            self.model, self.model.hypernet, workers, self.device, phases=phases, shard=config.train.shard
        )
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(
            self.parameters,
            lr=config.train.lr,
            weight_decay=config.train.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.steps_per_epoch = len(self.indices) // self.batch_size
        self.steps_done = 0
        self.seconds = 0.0
        self._points = _generator(config.seed, _POINTS)
        self._noise = _generator(config.seed, _NOISE)
        self._order = (-1, self.indices)
        self._fingerprint = dataset.fingerprint()
        self._pending: deque[_PendingLine] = deque()
        # Fused Adam cannot combine DTensor parameters with a plain `found_inf`.
        self._asynchronous = self.device.type == "cuda" and (workers.count == 1 or not config.train.shard)
        self._side_stream: torch.cuda.Stream | None = None
        if self._asynchronous:
            self._side_stream = torch.cuda.Stream(self.device)
            self._side_stream.wait_stream(torch.cuda.current_stream(self.device))

    @classmethod
    def resume(
        cls,
        config: Config,
        dataset: Dataset,
        run_folder: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        workers: Workers = ALONE,
    ) -> Trainer:
        """Continue from the checkpoint of a run folder; ValueError when the data are not those it was trained on."""
        state = checkpoint.load_training_state(run_folder)
        if "optimizer" not in state:
            raise ValueError(f"train: nothing to resume in {run_folder}: a converted model comes without an optimizer")
        check_state(run_folder, state)
        check_config(run_folder, config_from_dict(state["config"]), config)
        check_data(state["data"], dataset, run_folder)
        trainer = cls(config, dataset, device=device, model=checkpoint.load(run_folder, device), workers=workers)
        restored = moments(run_folder, state["optimizer"], trainer.parameters)
        # Everything else that the optimizer knows follows from the configuration.
        optimizer = {**trainer.optimizer.state_dict(), "state": restored}
        trainer.optimizer.load_state_dict(shard(optimizer, trainer.parameters))
        trainer.steps_done, trainer.seconds = state["step"], state["seconds"]
        trainer._points.set_state(state["points"])
        trainer._noise.set_state(state["noise"])
        return trainer

    def save(self, run_folder: str | os.PathLike[str]) -> None:
        """Write a checkpoint, if the parameters and the bound of a batch are finite; NonFiniteLoss otherwise."""
        self.check()
        indices = self.indices[: self.batch_size]
        if self.workers.largest(not all(bool(to_local(p).isfinite().all()) for p in self.parameters)):
            raise NonFiniteLoss("a parameter", self.steps_done, indices.tolist(), [])
        self._bound(indices, _generator(self.config.seed, _VALIDATION))
        state = {
            "seconds": self.seconds,
            "config": config_to_dict(self.config),
            "data": self._fingerprint,
            "domain": self.dataset.domain.to_dict(),
            "optimizer": full_tensor(self.optimizer.state_dict(), "cpu"),
            "points": self._points.get_state(),
            "noise": self._noise.get_state(),
        }
        tensors = full_tensor(self.model.state_dict(), "cpu")

        def write() -> None:
            path = Path(run_folder) / "config.yaml"
            if not path.exists():
                # Before the first checkpoint, which is of no use without.
                with writing("train", path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                save_config(self.config, path)
            checkpoint.save(run_folder, self.model, self.config, self.steps_done, state, tensors)

        self.workers.by_main(write)

    def whole_model(self) -> VaMoH:
        """The model, with all its parameters in this process."""
        if self.workers.count == 1 or not self.config.train.shard:
            return self.model
        model = checkpoint.new_model(self.config, self.model.coord_dim, self.model.channels)
        model.load_state_dict(full_tensor(self.model.state_dict()))
        model.use_flow, model.use_gating_prior = self.model.use_flow, self.model.use_gating_prior
        return model.to(self.device)

    def step(self) -> Mapping[str, float]:
        """Do one update and return its line of the log (terms are batch means in nats).

        Raises NonFiniteLoss before a bad update reaches the parameters. On a GPU it only enqueues: a bad update is
        skipped there, and `check`, or the first read of a term of a line, raises NonFiniteLoss.
        """
        start = time.perf_counter()
        settings, epoch = self.config.train, self.steps_done / self.steps_per_epoch
        indices = self._batch_indices()
        drawn, context = self._draw(indices)
        points, context = self._place(drawn, context)
        self.model.use_flow = epoch >= settings.flow_warmup
        self.model.use_gating_prior = epoch >= settings.gating_warmup
        beta_z, beta_c = beta_at(settings.beta_z, epoch), beta_at(settings.beta_c, epoch)
        warmth = min(1.0, (self.steps_done + 1) / max(settings.lr_warmup, 1))
        lr = settings.lr * settings.lr_decay**epoch * warmth
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        half = settings.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            terms = self._elbo(points, len(indices), self._noise, context=context, beta_z=beta_z, beta_c=beta_c)
        (terms.loss * self.workers.weight(len(indices))).backward()
        terms = self._gather(terms, len(indices))
        facts = {"beta_z": beta_z, "beta_c": beta_c, "lr": lr, "points": drawn.count}
        if self._asynchronous:
            line: Mapping[str, float] = self._update_asynchronously(terms, indices, facts)
        else:
            norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip))
            result = _batch_means(terms, self.steps_done + 1, indices, norm)
            self.optimizer.step()
            epoch = (self.steps_done + 1) / self.steps_per_epoch
            line = {"step": self.steps_done + 1, "epoch": epoch, **result, **facts}
        self.steps_done += 1
        self.seconds += time.perf_counter() - start
        return line

    def check(self) -> None:
        """Wait for the updates enqueued on a GPU; NonFiniteLoss for the first bad one that was not yet read."""
        start = time.perf_counter()
        try:
            while self._pending:
                self._pending.popleft().read()
        finally:
            self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def evaluate(self, split: str = "validation") -> dict[str, float]:
        """Means over the first `evaluate_count` functions of a split.

        The terms of the bound with β = 1 [nats] and the PSNR of the reconstruction [dB]. Draws the same noise, and the
        same `num_points` points, every time; no point dropout.
        Raises ValueError for an empty split, NonFiniteLoss for a bad term.
        """
        self.check()
        every = self.dataset.splits[split][: self.config.train.evaluate_count]
        if len(every) == 0:
            raise ValueError(f"Trainer.evaluate: split {split} of data set {self.dataset.name} must not be empty")
        generator = _generator(self.config.seed, _VALIDATION)
        totals: dict[str, float] = {}
        for indices in every.split(self.batch_size):
            terms, points = self._bound(indices, generator)
            mean = self._call("reconstruct", points)["mean"]
            decibel = psnr(mean, points.values, points.mask).clamp(max=MAX_PSNR)
            decibel = self.workers.gather({"psnr": decibel}, len(indices))["psnr"]
            for name, value in {**terms, "psnr": decibel.mean().item()}.items():
                totals[name] = totals.get(name, 0.0) + value * len(indices) / len(every)
        return totals

    def _batch_indices(self) -> Tensor:
        epoch, position = divmod(self.steps_done, self.steps_per_epoch)
        if self._order[0] != epoch:
            generator = _generator(self.config.seed, _ORDER, epoch)
            self._order = (epoch, self.indices[torch.randperm(len(self.indices), generator=generator)])
        return self._order[1][position * self.batch_size : (position + 1) * self.batch_size]

    def _draw(self, indices: Tensor) -> tuple[PointSet, Tensor | None]:
        """This process's part of a batch, in host memory, and what the encoder sees of it: bool [B, N], None for all.

        Every process draws for the whole batch. A function of which the encoder would see too little is seen whole.
        """
        settings = self.config.train
        if settings.context.whole:
            return self._share(indices, self._drop_points), None
        points = self._drop_points(self.dataset.batch(indices))
        context = context_mask(points.coords, points.batch, **vars(settings.context), generator=self._points)
        context = context if points.mask is None else context & points.mask
        enough = context.sum(-1, keepdim=True) >= self.model.min_points
        context = context.where(enough, torch.ones_like(context) if points.mask is None else points.mask)
        part = self.workers.share(len(indices))
        points, context = points.part(part), context[part]
        return (points, context) if settings.target == "all" else (points.restrict(context), None)

    def _drop_points(self, points: PointSet) -> PointSet:
        """Subsample and drop points at random (Alg. 1); the encoder always keeps as many as it needs.

        Where functions observe different points and one would keep too few, no point is dropped.
        """
        settings = self.config.train
        if settings.num_points is not None:
            points = _subsample(points, settings.num_points, self._points, self.model.min_points)
        if settings.point_dropout > 0:
            rate = settings.point_dropout * float(torch.rand((), generator=self._points))
            fewer = points.compact().drop(rate, self._points, at_least=self.model.min_points)
            points = fewer if _fewest(fewer) >= self.model.min_points else points
        return points

    def _place(self, points: PointSet, context: Tensor | None = None) -> tuple[PointSet, Tensor | None]:
        """Points and context on the device. On a GPU, copies and neighbour search run on a side stream, beside the step
        before.
        """
        if not self._asynchronous:
            return points.to(self.device), None if context is None else context.to(self.device)
        settings, side = self.config.train, self._side_stream
        again = settings.num_points is None and settings.point_dropout == 0
        learned = self.model.encoding.frequencies.requires_grad
        if side is not None and learned:
            side.wait_stream(torch.cuda.current_stream(self.device))  # the search reads what the step before updates
        with torch.cuda.stream(side):
            placed = self.model.prepare(points.compact() if context is None else points, again=again)
            context = None if context is None else self.model.prepare_mask(context)
            place = self.model.geometry(placed, context=context)
            used = [placed.coords, placed.values, placed.mask, context, place.mirror]
            used += [index for hood in place.neighborhoods for index in hood]
            if not learned:  # cached, and read by the main stream
                used.append(place.features)
        if side is not None:
            main = torch.cuda.current_stream(self.device)
            main.wait_stream(side)
            for tensor in used:
                if tensor is not None:
                    tensor.record_stream(main)
        return placed, context

    def _update_asynchronously(self, terms: ElboTerms, indices: Tensor, facts: dict[str, float]) -> _PendingLine:
        """Clip and update without synchronising: the device skips an update whose terms or gradient are bad."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        means = torch.stack([*(value.mean() for value in _terms(terms).values()), norm])
        optimizer: Any = self.optimizer  # declares neither of these attributes
        optimizer.grad_scale = (norm / self.config.train.clip).clamp(min=1)
        optimizer.found_inf = (~means.isfinite()).any().to(norm.dtype)
        self.optimizer.step()
        done = self.steps_done + 1
        line = _PendingLine(self, done, terms, indices, norm, {"epoch": done / self.steps_per_epoch, **facts})
        self._pending.append(line)
        if len(self._pending) > _MAX_PENDING:
            self.check()
        return line

    @torch.no_grad()
    def _bound(self, indices: Tensor, generator: torch.Generator) -> tuple[dict[str, float], PointSet]:
        count = self.config.train.num_points
        least = self.model.min_points
        points = self._share(indices, lambda p: p if count is None else _subsample(p, count, generator, least))
        points = self.model.prepare(points, again=count is None)
        terms = self._gather(self._elbo(points, len(indices), generator), len(indices))
        return _batch_means(terms, self.steps_done, indices), points

    def _share(self, indices: Tensor, subsample: Callable[[PointSet], PointSet]) -> PointSet:
        """This process's part of a batch, in host memory; `subsample` keeps the same points in every process."""
        part = self.workers.share(len(indices))
        if self.dataset.masked_each:
            # `compact` depends on the whole batch's masks, so subsample first, then split.
            return subsample(self.dataset.batch(indices)).part(part)
        return subsample(self.dataset.batch(indices[part]))

    def _elbo(
        self,
        points: PointSet,
        functions: int,
        generator: torch.Generator,
        context: Tensor | None = None,
        **betas: float,
    ) -> ElboTerms:
        """Terms of this process's part of a batch, with its part of the noise of the whole one."""
        noise = self.model.draw_noise(functions, generator=generator).part(self.workers.share(functions))
        return ElboTerms(**self._call("elbo", points, context=context, noise=noise, **betas))

    def _gather(self, terms: ElboTerms, functions: int) -> ElboTerms:
        """Terms of the whole batch."""
        return ElboTerms(**self.workers.gather(vars(terms), functions))


class _PendingLine(Mapping[str, float]):
    """Line of the log of an update that a GPU may not have done yet; reading a term synchronises.

    facts: the values that are known at once.
    """

    def __init__(
        self, trainer: Trainer, step: int, terms: ElboTerms, indices: Tensor, norm: Tensor, facts: dict[str, float]
    ) -> None:
        self._trainer, self._step, self._indices = trainer, step, indices
        self._values = {**_terms(terms), "grad_norm": norm}
        self._known = {"step": step, **facts}

    def read(self) -> None:
        """Copy the terms to the host; NonFiniteLoss for a bad one."""
        self._known.update(_finite_means(self._values, self._step, self._indices))

    def __getitem__(self, name: str) -> float:
        if name not in self._known and name in self._values:
            self._trainer.check()
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._known, **self._values})

    def __len__(self) -> int:
        return len({**self._known, **self._values})


def beta_at(config: BetaConfig, epoch: float) -> float:
    """Weight of a KL term after `epoch` epochs (see `BetaConfig`)."""
    if config.schedule == "constant" or epoch >= config.end:
        return config.value
    if epoch <= config.start:
        return config.initial
    t = (epoch - config.start) / (config.end - config.start)
    ramp = {"linear": t, "quadratic": t * t, "exponential": math.pow(2.0, t) - 1.0}
    return config.initial + (config.value - config.initial) * ramp[config.schedule]


def _normalizing(config: Config, dataset: Dataset) -> Config:
    """`config` with offset and scale of the data's coordinates, if it has none and they are bare points of other units.

    Points in [-1, 1] that span a good part of it, and on the unit sphere, stay as they are, as do grids.
    """
    if config.model.coord_offset or dataset.kind != "points":
        return config
    coords = observed_coords(dataset.coords, dataset.mask)
    offset, scale = domain(coords)
    on_sphere = dataset.coord_dim == 3 and bool((coords.square().sum(-1) - 1).abs().max() < 1e-4)
    if on_sphere or (bool((coords.abs() <= 1).all()) and max(scale) >= _LEAST_SCALE):
        return config
    return _with_normalization(config, offset, scale)


def _with_normalization(config: Config, offset: tuple[float, ...], scale: tuple[float, ...]) -> Config:
    return replace(config, model=replace(config.model, coord_offset=offset, coord_scale=scale))


def _check_points(config: Config, dataset: Dataset, min_points: int) -> None:
    settings = config.train
    used = torch.cat([dataset.splits[name] for name in ("train", "validation", "test")])
    observed = dataset.observed()[used]
    count, fewest = int(observed.max()), int(observed.argmin())
    if int(observed[fewest]) < min_points:
        which = "" if count == int(observed[fewest]) else f" observed in every function, got {int(observed[fewest])} "
        which = which + f"in function {int(used[fewest])}" if which else f", got {count}"
        raise ValueError(
            f"Trainer: data set {dataset.name} must have the {min_points} points that the encoder needs{which}"
        )
    if settings.num_points is not None and not min_points <= settings.num_points <= count:
        raise ValueError(
            f"Trainer: train.num_points must be from {min_points} (what the encoder needs) to {count} (the points of "
            f"data set {dataset.name}), got {settings.num_points}"
        )


def _covering_coords(config: Config, dataset: Dataset) -> Tensor:
    """Coordinates [N, D] that cover what the functions are known at: for fixed centroids.

    Of a shared grid what is observed of any training function, else a sample of all their points; as many as the
    encoder sees at once.
    """
    train, count = dataset.splits["train"], config.train.num_points
    generator = _generator(config.seed, _COVERING)
    mask = dataset.mask[train] if dataset.mask is not None and dataset.mask.dim() == 2 else dataset.mask
    if dataset.coords.dim() == 2:
        coords = dataset.coords if mask is None else dataset.coords[mask if mask.dim() == 1 else mask.any(0)]
        if count is not None and count < len(coords):
            coords = coords[torch.randperm(len(coords), generator=generator)[:count].sort().values]
        return coords
    count = count or dataset.coords.shape[1]
    function = torch.randint(len(train), (count,), generator=generator)
    if mask is None:
        point = torch.randint(dataset.coords.shape[1], (count,), generator=generator)
    else:
        weight = (mask if mask.dim() == 1 else mask[function]).double().expand(count, -1)
        point = torch.multinomial(weight, 1, generator=generator)[:, 0]
    return dataset.coords[train[function], point]


def _batch_means(terms: ElboTerms, step: int, indices: Tensor, norm: Tensor | None = None) -> dict[str, float]:
    """Means of the terms [B] and the gradient norm, copied from the device at once; NonFiniteLoss for a bad one."""
    return _finite_means({**_terms(terms), **({} if norm is None else {"grad_norm": norm})}, step, indices)


def _terms(terms: ElboTerms) -> dict[str, Tensor]:
    values = {"elbo": terms.elbo, "log_likelihood": terms.log_likelihood, "kl_z": terms.kl_z, "kl_c": terms.kl_c}
    return {name: value.detach() for name, value in values.items()}


def _finite_means(values: dict[str, Tensor], step: int, indices: Tensor) -> dict[str, float]:
    means = torch.stack([value.mean() for value in values.values()]).tolist()
    result = dict(zip(values, means, strict=True))
    bad = [name for name, mean in result.items() if not math.isfinite(mean)]
    if bad:
        # The bound and the gradient are bad whenever a term is; name the term.
        cause = next((name for name in bad if name not in ("elbo", "grad_norm")), bad[0])
        where = ~values[cause].isfinite().cpu() if cause != "grad_norm" else torch.ones(len(indices)).bool()
        raise NonFiniteLoss(cause, step, indices.tolist(), indices[where].tolist())
    return result


def _subsample(points: PointSet, count: int, generator: torch.Generator, at_least: int) -> PointSet:
    points = points.compact()
    return points.subsample(min(count, points.count), generator, at_least)


def _fewest(points: PointSet) -> int:
    """Observed points of the function that has the fewest."""
    return points.count if points.mask is None else int(points.mask.sum(-1).min())


def _generator(*keys: int) -> torch.Generator:
    """Independent stream of random numbers for each sequence of keys; on the CPU, so the draws fit any device."""
    seed = np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))
