"""Completion masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vamoh.masks import completion_mask


def test_patch_hides_a_centred_block_of_half_the_size() -> None:
    mask = completion_mask("patch", (4, 6))
    expected = [[1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 1, 1], [1, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == expected


def test_patch_of_voxels_is_a_cube() -> None:
    hidden = (~completion_mask("patch", (8, 8, 8))).nonzero()
    assert len(hidden) == 64
    assert (hidden.min(0).values.tolist(), hidden.max(0).values.tolist()) == ([2, 2, 2], [5, 5, 5])


def test_outside_is_the_opposite_of_patch() -> None:
    assert torch.equal(completion_mask("outside", (5, 7)), ~completion_mask("patch", (5, 7)))


def test_half_shows_the_left_columns() -> None:
    assert completion_mask("half", (2, 5)).int().tolist() == [[1, 1, 0, 0, 0]] * 2


def test_random_hides_at_the_rate_and_follows_the_seed() -> None:
    mask = completion_mask("random:0.25", (200, 200), seed=3)
    # 40000 draws: the standard deviation of the share is 0.0022.
    assert mask.float().mean().item() == pytest.approx(0.75, abs=0.011)
    assert torch.equal(mask, completion_mask("random:0.25", (200, 200), seed=3))
    assert not torch.equal(mask, completion_mask("random:0.25", (200, 200), seed=4))


@pytest.mark.parametrize("scale, dtype", [(1, np.bool_), (1, np.float32), (255, np.uint8)])
def test_array_files_are_read(tmp_path: Path, scale: int, dtype: type) -> None:
    wanted = np.array([[1, 0, 1], [0, 0, 1]])
    np.save(tmp_path / "m.npy", (wanted * scale).astype(dtype))
    assert completion_mask(str(tmp_path / "m.npy"), (2, 3)).int().tolist() == wanted.tolist()


def test_white_pixels_of_a_picture_are_observed(tmp_path: Path) -> None:
    Image.fromarray(np.array([[255, 0], [200, 10]], dtype=np.uint8)).save(tmp_path / "m.png")
    assert completion_mask(str(tmp_path / "m.png"), (2, 2)).tolist() == [[True, False], [True, False]]


def test_bad_names_are_explained() -> None:
    with pytest.raises(ValueError, match=r"got 'pach'; did you mean 'patch'\?"):
        completion_mask("pach", (4, 4))
    for name in ("random", "random:", "random:x", "random:1.5", "random:0", "random:nan"):
        with pytest.raises(ValueError, match=f"number between 0 and 1, got '{name}'"):
            completion_mask(name, (4, 4))
    with pytest.raises(ValueError, match=r"'half' must leave some points observed .* got 0 of 1 observed"):
        completion_mask("half", (1, 1))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (1, 4), (1, 1, 4)])
def test_axes_of_size_one_are_hidden_or_shown_as_a_whole(shape: tuple[int, ...]) -> None:
    assert completion_mask("half", shape).flatten().tolist() == [True, True, False, False]
    assert completion_mask("patch", shape).flatten().tolist() == [True, False, False, True]
    assert completion_mask("outside", shape).flatten().tolist() == [False, True, True, False]


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.npy"
    with pytest.raises(FileNotFoundError, match=r"mask: no file .*m\.npy"):
        completion_mask(str(path), (2, 2))
    np.save(path, np.ones((2, 3), dtype=bool))
    with pytest.raises(ValueError, match=r"m\.npy' must have shape \[2, 2\], got \[2, 3\]"):
        completion_mask(str(path), (2, 2))
    np.save(path, np.array([[0.0, 0.5], [1.0, 1.0]]))
    with pytest.raises(ValueError, match=r"must be bool, .* got float64 with values from 0.0 to 1.0"):
        completion_mask(str(path), (2, 2))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"m\.npy' cannot be read"):
        completion_mask(str(path), (2, 2))
    (tmp_path / "m.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"m\.png' cannot be read"):
        completion_mask(str(tmp_path / "m.png"), (2, 2))
