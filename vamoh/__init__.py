"""VaMoH: variational mixtures of hypergenerators, generative models of functions given at points.

The names below load their modules on first use, so `import vamoh` is quick and needs nothing compiled.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vamoh._version import __version__

if TYPE_CHECKING:
    from vamoh.checkpoint import load
    from vamoh.config import Config, load_config
    from vamoh.data import Dataset, open_dataset
    from vamoh.elbo import ElboTerms
    from vamoh.generator import Reconstruction
    from vamoh.model import VaMoH
    from vamoh.points import PointSet, collate, grid_coords, sphere_grid

__all__ = [
    "Config",
    "Dataset",
    "ElboTerms",
    "PointSet",
    "Reconstruction",
    "VaMoH",
    "__version__",
    "collate",
    "grid_coords",
    "load",
    "load_config",
    "open_dataset",
    "sphere_grid",
]

_HOMES = {
    "Config": "config",
    "Dataset": "data",
    "ElboTerms": "elbo",
    "PointSet": "points",
    "Reconstruction": "generator",
    "VaMoH": "model",
    "collate": "points",
    "grid_coords": "points",
    "load": "checkpoint",
    "load_config": "config",
    "open_dataset": "data",
    "sphere_grid": "points",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
