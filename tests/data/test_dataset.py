"""Dataset and open_dataset: batches, grids, masks and refusals."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vamoh.data import NAMES, Dataset, open_dataset
from vamoh.data.dataset import grid_dataset, random_splits


def points_dataset(**change: Any) -> Dataset:
    """Five point lists of three points in two dimensions."""
    values = torch.arange(15, dtype=torch.float32).reshape(5, 3, 1) / 15
    data = Dataset(
        name="toy",
        kind="points",
        shape=(),
        coords=torch.arange(30, dtype=torch.float32).reshape(5, 3, 2),
        values=values,
        splits=random_splits("toy", 5),
        likelihood="logistic",
        mask=torch.arange(15).reshape(5, 3) % 2 == 0,
    )
    return replace(data, **change)


def test_own_coordinates_and_masks_follow_the_index() -> None:
    data = points_dataset()
    points = data.batch(torch.tensor([4, 1]))
    assert torch.equal(points.coords, data.coords[[4, 1]])
    assert torch.equal(points.values, data.values[[4, 1]])
    assert torch.equal(points.mask, data.mask[[4, 1]])
    assert (data.coord_dim, data.channels, len(data)) == (2, 1, 5)


def test_shared_masks_stay_shared() -> None:
    mask = torch.tensor([True, False, True])
    assert torch.equal(points_dataset(mask=mask).batch(torch.tensor([0, 2])).mask, mask)


def test_bytes_become_fractions_of_255() -> None:
    grids = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5, 1)
    values = grid_dataset("toy", grids).batch(torch.tensor([2])).values
    assert torch.equal(values[0, :, 0], torch.arange(40, 60) / 255)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_every_scale_th_point_of_the_finer_grid_is_given(scale: int) -> None:
    data = grid_dataset("toy", np.zeros((3, 4, 5, 1), np.uint8))
    coords, shape = data.grid(scale)
    finer = coords.reshape(*shape, 2)[::scale, ::scale].reshape(-1, 2)
    torch.testing.assert_close(finer, data.coords)


def test_points_have_no_grid() -> None:
    with pytest.raises(ValueError, match="must have a kind with a grid, got kind points"):
        points_dataset().grid(2)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (torch.tensor([5]), ValueError, "index must lie in [0, 5), got 5 to 5"),
        (torch.tensor([-1, 2]), ValueError, "index must lie in [0, 5), got -1 to 2"),
        (torch.tensor([], dtype=torch.int64), ValueError, "index must name at least one of n=5"),
        (torch.tensor([0.0]), TypeError, "index must have dtype int64"),
        (torch.tensor(0), ValueError, "index must have shape [B]"),
        ([0], TypeError, "index must be a torch.Tensor"),
    ],
)
def test_wrong_index(index: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        points_dataset().batch(index)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "video"}, ValueError, "kind must be one of image, voxels, sphere, points, got 'video'"),
        ({"kind": "image", "shape": (2, 2)}, ValueError, "shape [2, 2] must hold N=3 points"),
        ({"values": torch.zeros(5, 3, 1).double()}, TypeError, "values must have dtype float32 or uint8"),
        ({"coords": torch.zeros(4, 2)}, ValueError, "coords must have shape [3, *]"),
        ({"splits": {"train": torch.arange(5)}}, ValueError, "splits must be train, validation, test"),
    ],
)
def test_wrong_dataset(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message).replace(r"\*", ".*")):
        points_dataset(**change)


@pytest.mark.parametrize("count", [3, 9, 10, 68, 101])
def test_splits_cover_everything_once(count: int) -> None:
    splits = random_splits("toy", count)
    tenth = max(1, count // 10)
    assert [len(splits[s]) for s in ("train", "validation", "test")] == [count - 2 * tenth, tenth, tenth]
    assert np.array_equal(torch.cat(list(splits.values())), np.random.default_rng(0).permutation(count))


def test_too_little_to_split() -> None:
    with pytest.raises(ValueError, match="toy: data must hold at least 3 functions, one for each split, got 2"):
        random_splits("toy", 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "digit"}, ValueError, "got 'digit', did you mean digits?"),
        ({"name": "imagenet22k!"}, ValueError, f"name must be one of {', '.join(NAMES)}, got"),
        ({"name": "digits", "path": "here"}, ValueError, "path must be None for digits, got 'here'"),
        ({"name": "images"}, ValueError, "path must name your file or folder for images, got None"),
        ({"name": "digits", "size": 32}, ValueError, "size must be None for digits of shape [28, 28], got 32"),
        ({"name": "digits", "size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"name": "digits", "size": "28"}, TypeError, "size must be an int, got '28'"),
    ],
)
def test_wrong_request(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        open_dataset(**arguments)


def test_the_size_the_data_has_is_accepted() -> None:
    assert open_dataset("digits", size=28).shape == (28, 28)
