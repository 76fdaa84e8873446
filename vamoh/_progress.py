"""Progress bars."""

from __future__ import annotations

import threading

from tqdm import tqdm


class Progress(tqdm):  # type: ignore[type-arg]
    """A tqdm bar whose lock belongs to its process.

    tqdm's own lock is shared by forked processes, and bars that are never shown take it too: one process killed while
    it holds it would stop all others for good.
    """


Progress.set_lock(threading.RLock())
