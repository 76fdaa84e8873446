"""What was predicted before any GPU ran this, so that measurements stand beside it.

Within ±50 %, of an H200; times in seconds, of the presets' own batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Key = tuple[str, str]
"""Key of a line of results, and the contestant in it; "" where a line has one time."""


@dataclass(frozen=True)
class Prediction:
    """That `of`, or its ratio to `over`, lies between `low` and `high`."""

    claim: str
    of: Key
    low: float = 0.0
    high: float = float("inf")
    over: Key | None = None

    def measured(self, seconds: Mapping[Key, float]) -> float | None:
        """What was found, or None."""
        value = seconds.get(self.of)
        if value is None or self.over is None:
            return value
        other = seconds.get(self.over)
        return value / other if other else None

    def expected(self) -> str:
        """The interval in words: milliseconds, or a ratio."""
        scale, unit = (1e3, " ms") if self.over is None else (1, "x")
        if self.high == float("inf"):
            return f"at least {self.low * scale:.3g}{unit}"
        if not self.low:
            return f"at most {self.high * scale:.3g}{unit}"
        return f"{self.low * scale:.3g} to {self.high * scale:.3g}{unit}"

    def found(self, seconds: Mapping[Key, float]) -> str:
        """What was measured and whether it agrees."""
        value = self.measured(seconds)
        if value is None:
            return "not measured"
        shown = f"{value * 1e3:.3g} ms" if self.over is None else f"{value:.3g}x"
        return f"{shown}, {'as predicted' if self.low <= value <= self.high else 'NOT as predicted'}"


FLOOR = {"celebahq": 2.0e-3, "shapes3d": 0.23e-3, "polymnist": 0.05e-3, "shapenet": 0.4e-3, "era5": 0.55e-3}
"""Seconds of a step that the ceilings allow."""
GOAL = {"celebahq": 4.0e-3, "shapes3d": 0.5e-3, "polymnist": 0.2e-3, "shapenet": 0.9e-3, "era5": 1.1e-3}
"""Seconds of a step aimed at."""

_STEP = {
    "celebahq": (35e-3, 60e-3, 5e-3, 1.5),
    "shapes3d": (7e-3, 8e-3, 3.5e-3, 1.5),
    "polymnist": (4e-3, 5e-3, 3.5e-3, 1.0),
    "shapenet": (4e-3, 5e-3, 6.5e-3, 5.0),
    "era5": (9e-3, 11e-3, 5e-3, 0.9),
}
"""GPU time of a step from and to, host time, and how many times longer the eager baseline takes."""


def _network(precision: str, shape: str) -> Key:
    return f"networks/celebahq/{precision}/{shape}-0", ""


def _convolution(stage: int, backend: str) -> Key:
    return f"convolution/point_conv{stage}/{backend}", ""


_DEFAULT = _network("tf32x3", "16-8-1")

PREDICTIONS = (
    *(Prediction(f"{n}: step, captured", (f"step/{n}/16", "graph"), 0.5 * a, 1.5 * b)
      for n, (a, b, _, _) in _STEP.items()),
    *(Prediction(f"{n}: step, host", (f"step/{n}/16", "host"), 0.5 * h, 1.5 * h) for n, (_, _, h, _) in _STEP.items()),
    *(Prediction(f"{n}: eager baseline over ours", (f"step/{n}/16", "baseline"), 0.5 * r, 1.5 * r,
                 over=(f"step/{n}/16", "ours")) for n, (_, _, _, r) in _STEP.items()),
    *(Prediction(f"{n} is bound by the host: enqueued over captured", (f"step/{n}/16", "ours"), 1.1,
                 over=(f"step/{n}/16", "graph")) for n in ("polymnist", "shapenet")),
    Prediction("networks: tf32x3, inputs 16, 8 warps, 1 stage", _DEFAULT, 9e-3, 14e-3),
    Prediction("networks: ieee over tf32x3", _network("ieee", "16-8-1"), 0, 1.0, over=_DEFAULT),
    Prediction("networks: default over inputs 32, 4 warps, 2 stages", _DEFAULT, 2.0, over=_network("tf32x3", "32-4-2")),
    Prediction("networks: tf32, inputs 16, 8 warps, 1 stage", _network("tf32", "16-8-1"), 3.5e-3, 5e-3),
    Prediction("networks: tf32, inputs 64, 8 warps, 1 stage", _network("tf32", "64-8-1"), 2.3e-3, 3.5e-3),
    *(Prediction(f"PointConv, stage {i}: CUDA kernels over plain torch", _convolution(i, "cuda"), 1.0,
                 over=_convolution(i, "reference")) for i in (1, 2, 3, 4)),
)  # fmt: skip
