"""Training into a run folder: the loop around `Trainer`, its log, and how it is stopped and continued."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vamoh import checkpoint
from vamoh._checks import check_device, check_type
from vamoh._files import check_path, write_json
from vamoh._lock import locked
from vamoh._progress import Progress
from vamoh.config import Config, DataConfig, load_run_config, save_config
from vamoh.data import Dataset, open_dataset
from vamoh.distributed import Workers, init_process_group
from vamoh.interrupts import TrainingInterrupted, WorkerLost, lost_workers, stop_signals
from vamoh.model import VaMoH
from vamoh.resume import PLACES, check_config, check_data
from vamoh.runlog import RunLog, environment
from vamoh.trainer import NonFiniteLoss, Trainer, beta_at

__all__ = ["NonFiniteLoss", "Trainer", "TrainingInterrupted", "WorkerLost", "beta_at", "check_data", "train"]


def train(
    config: Config,
    out: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: bool = True,
) -> VaMoH:
    """Train the model of `config` into the run folder `out` and return it, ready for inference.

    Writes config.yaml, environment.json, metrics.jsonl and checkpoint/ (the first one before the first step).
    resume: continue the run in `out` from its checkpoint; the configuration must be the run's own, except how long it
    trains and how often it reports. On the CPU the result equals that of an uninterrupted run to the last bit.
    progress: show a progress bar on stderr.
    Started by `torchrun`, the processes share out every batch, see docs/training.md; the first one writes.

    Raises FileExistsError if `out` is in use and `resume` is False, FileNotFoundError if it holds no checkpoint and
    `resume` is True, ValueError for a device, configuration or data set that does not fit, NonFiniteLoss when
    training diverges (the last good checkpoint stays), TrainingInterrupted on SIGINT or SIGTERM, WorkerLost when
    another process of the job ended.
    """
    check_type("train", "config", config, Config)
    out, place = check_path("train", "out", out), check_device("train", device)
    config = replace(config, data=_absolute(config.data))
    trainer: Trainer | None = None
    with ExitStack() as stack:
        stack.enter_context(lost_workers(out, lambda: 0 if trainer is None else trainer.steps_done))
        workers, place = stack.enter_context(init_process_group("train", place))
        begun = workers.largest(bool(workers.by_main(lambda: _claim(stack, out, config, resume))))
        stack.enter_context(_threads(config.train.threads))
        board_class = _summary_writer() if config.train.tensorboard else None
        dataset = _open(config, workers)
        if begun:
            trainer = Trainer.resume(config, dataset, out, device=place, workers=workers)
        else:
            trainer = Trainer(config, dataset, device=place, workers=workers)
            if workers.main and trainer.config.model != config.model:
                offset, scale = (", ".join(f"{v:g}" for v in values) for values in trainer.model.domain)
                logging.getLogger(__name__).info(
                    "train: coordinates of %s are normalised, minus (%s) and over (%s); all else keeps their units",
                    *(dataset.name, offset, scale),
                )
            trainer.save(out)
        records = workers.by_main(lambda: stack.enter_context(_Records(trainer, out, board_class)))
        try:
            _run(trainer, out, records, progress and workers.main)
        except NonFiniteLoss as error:
            note = f"; the last good checkpoint is kept in {out / 'checkpoint'}"
            raise NonFiniteLoss(error.term, error.step, error.indices, error.culprits, note) from None
        return trainer.whole_model().eval()


def _run(trainer: Trainer, out: Path, records: _Records | None, progress: bool) -> None:
    settings, workers = trainer.config.train, trainer.workers
    logged_step, logged_seconds, shown = trainer.steps_done, trainer.seconds, -math.inf

    def record(split: str, values: Mapping[str, float]) -> None:
        workers.by_main(lambda: None if records is None else records.write(split, values))

    bar = Progress(
        total=settings.steps,
        initial=trainer.steps_done,
        disable=not progress,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5,
    )
    with bar, stop_signals(patient=workers.count > 1) as received:
        while trainer.steps_done < settings.steps:
            values = trainer.step()
            step, last = trainer.steps_done, trainer.steps_done == settings.steps
            reported = step % settings.log_every == 0 or step == 1 or last
            # Reading a loss synchronises, and may end this process; ranks must do it at the same step.
            if reported or (workers.count == 1 and time.monotonic() > shown + 0.5):
                terms = {name: f"{values[name]:.1f}" for name in ("elbo", "log_likelihood", "kl_z", "kl_c")}
                bar.set_postfix(terms, refresh=False)
                shown = time.monotonic()
            bar.update()
            if reported:
                data = (step - logged_step) * trainer.batch_size
                rate = data / max(trainer.seconds - logged_seconds, 1e-9)
                record("train", {**values, "seconds": trainer.seconds, "datum_per_second": rate})
                logged_step, logged_seconds = step, trainer.seconds
            if (step % settings.evaluate_every == 0 or last) and len(trainer.dataset.splits["validation"]):
                times = {"epoch": values["epoch"], "seconds": trainer.seconds}
                record("validation", {"step": step, **times, **trainer.evaluate()})
            stop = workers.largest(received[0] if received else 0)
            if step % settings.checkpoint_every == 0 or last or stop:
                if records is not None:
                    records.log.sync()
                trainer.save(out)
            if stop and not last:
                raise TrainingInterrupted(stop, step, out)


class _Records:
    """What a run writes besides checkpoints: configuration, environment, log, and TensorBoard events on request."""

    def __init__(self, trainer: Trainer, out: Path, board_class: Any) -> None:
        save_config(trainer.config, out / "config.yaml")
        write_json("train", out / "environment.json", environment(trainer.device))
        self.log = RunLog(out / "metrics.jsonl", after_step=trainer.steps_done)
        if (out / "tensorboard").is_symlink():
            raise ValueError(f"train: {out / 'tensorboard'} must be a folder of the run, got a link")
        self.board = board_class(out / "tensorboard", purge_step=trainer.steps_done + 1) if board_class else None

    def __enter__(self) -> _Records:
        return self

    def __exit__(self, *error: object) -> None:
        self.log.close()
        if self.board is not None:
            self.board.close()

    def write(self, split: str, values: Mapping[str, float]) -> None:
        self.log.write({"split": split, **values})
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{split}/{name}", value, values["step"])


def _claim(stack: ExitStack, out: Path, config: Config, resume: bool) -> bool:
    """Lock the folder while the stack lasts; raise unless the run can begin or go on there; return which."""
    _check_folder(out, config, resume)  # before a lock is left in a folder that is none of ours
    stack.enter_context(locked("train", out))
    return _check_folder(out, config, resume)


def _check_folder(out: Path, config: Config, resume: bool) -> bool:
    """Raise unless a run can begin or go on here; return whether there is a checkpoint to go on from."""
    if not resume:
        advice = f"; continue it with vamoh train --resume {out} or choose another"
        checkpoint.check_free("train", out, config, advice)
        return False
    begun = checkpoint.has_checkpoint(out)
    if not begun and not (out / "config.yaml").exists():
        raise FileNotFoundError(f"train: nothing to resume in {out}: no checkpoint in {out / 'checkpoint'}")
    check_config(out, load_run_config(out), config)
    return begun


def _absolute(data: DataConfig) -> DataConfig:
    """The same places from wherever the run is opened again."""
    given = {name: getattr(data, name) for name in PLACES}
    places = {n: None if p is None else os.path.abspath(os.path.expanduser(p)) for n, p in given.items()}
    return replace(data, path=places["path"], root=places["root"], splits=places["splits"])


def _open(config: Config, workers: Workers) -> Dataset:
    """Open the data set, the main process first: it makes what the others find in the cache."""

    def load() -> Dataset:
        return open_dataset(**vars(config.data))

    dataset = workers.by_main(load) or load()
    mine = json.dumps(dataset.fingerprint())
    wanted = workers.from_main(mine)
    if mine != wanted:
        raise ValueError(
            f"train: data set {dataset.name} must be the same for every process, got {mine} where the first one has "
            f"{wanted}"
        )
    return dataset


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            f'train: train.tensorboard needs the tensorboard package ({error}): pip install "vamoh[tensorboard]"'
        ) from error
    return SummaryWriter


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
