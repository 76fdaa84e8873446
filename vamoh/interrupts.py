"""What ends a training run before its last step: signals, and the loss of another process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from vamoh._checks import reason
from vamoh.distributed import is_lost


class TrainingInterrupted(RuntimeError):
    """SIGINT or SIGTERM ended the run after a whole step, and the checkpoint was saved.

    signal: its number. step: the updates done. run_folder: where to resume.
    """

    def __init__(self, signal_number: int, step: int, run_folder: Path) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(
            f"train: stopped by {name} after step {step}, saved; continue with: vamoh train --resume {run_folder}"
        )
        self.signal, self.step, self.run_folder = signal_number, step, run_folder


class WorkerLost(RuntimeError):
    """Another process of the job ended, so this one could not go on. The last checkpoint is whole.

    step: the updates done. run_folder: where to resume.
    """

    def __init__(self, step: int, run_folder: Path, reason: str) -> None:
        super().__init__(
            f"train: another process of the job was lost after step {step} ({reason}); the last checkpoint is kept, "
            f"continue with: vamoh train --resume {run_folder}"
        )
        self.step, self.run_folder = step, run_folder


@contextmanager
def lost_workers(run_folder: Path, steps_done: Callable[[], int]) -> Iterator[None]:
    """Raise WorkerLost for an error that says that another process is gone. steps_done: the updates until then."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise WorkerLost(steps_done(), run_folder, reason(error)) from error


@contextmanager
def stop_signals(patient: bool = False) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying; after the first one they act as before again.

    patient: not before the end, for `torchrun` sends a signal again that the terminal has sent already.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if not patient:
            restore()

    # Python delivers signals to the main thread only and lets no other install handlers.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note) or signal.SIG_DFL
    try:
        yield received
    finally:
        restore()
