"""Data sets: bundled with the package, generated from seeds, or the user's own."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from vamoh._checks import check_positive, check_type
from vamoh._files import check_name
from vamoh._shown import shown
from vamoh.data import arrays, avatars, images, shapes, sphere, voxels
from vamoh.data.dataset import Dataset, Domain, resplit

__all__ = ["NAMES", "Dataset", "Domain", "open_dataset"]

_BUNDLED: dict[str, Callable[[], Dataset]] = {
    "digits": images.digits,
    "polymnist": images.polymnist,
    "chairs": voxels.chairs,
    "furniture": voxels.furniture,
    "climate": sphere.climate,
}
_GENERATED: dict[str, Callable[[str | None], Dataset]] = {"shapes3d": shapes.shapes3d, "avatars": avatars.avatars}
_FILES: dict[str, Callable[[str], Dataset]] = {
    "arrays": arrays.array_file,
    "netcdf": sphere.netcdf,
    "voxels": voxels.voxel_files,
}
NAMES = (*_BUNDLED, *_GENERATED, "images", *_FILES)


def open_dataset(
    name: str,
    path: str | None = None,
    size: int | None = None,
    root: str | None = None,
    splits: str | None = None,
) -> Dataset:
    """Open a data set by its name, one of `NAMES`.

    path: file or folder of "images", "arrays", "netcdf" and "voxels"; None for every other name.
    size: "images" are cut and resized to size x size; for other names None, or the rows the data has anyway.
    root: cache folder of the generated sets "shapes3d" and "avatars"; None for ~/.cache/vamoh.
    splits: a .json or .npz file that says which functions to train, validate and test on, see `resplit`; None for the
    splits of the data set.

    Raises ValueError for an unknown name, a path that is missing, needless or unreadable, or a size that cannot be had;
    ImportError when the data needs an optional package. See docs/data.md for what each set holds.
    """
    where = "open_dataset"
    check_type(where, "name", name, str)
    check_type(where, "path", path, str, type(None))
    check_type(where, "root", root, str, type(None))
    check_type(where, "splits", splits, str, type(None))
    if name not in NAMES:
        nearest = difflib.get_close_matches(str(name), NAMES, 1)
        hint = f", did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"{where}: name must be one of {', '.join(NAMES)}, got {shown(name)}{hint}")
    if size is not None:
        check_positive(where, "size", size)
    files: list[str] | None = None
    if path is not None:
        check_name(where, "path", path)
    if name in _BUNDLED or name in _GENERATED:
        if path is not None:
            raise ValueError(f"{where}: path must be None for {name}, got {shown(path)}")
        dataset = _BUNDLED[name]() if name in _BUNDLED else _GENERATED[name](root)
    elif path is None:
        raise ValueError(f"{where}: path must name your file or folder for {name}, got None")
    elif name == "images":
        dataset, files = images.image_folder(path, size)
    else:
        dataset = _FILES[name](path)
    if size is not None and dataset.shape[:1] != (size,):
        raise ValueError(f"{where}: size must be None for {name} of shape {list(dataset.shape)}, got {size}")
    return dataset if splits is None else resplit(dataset, splits, files)
