"""Completion masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vamoh import grid_coords, sphere_grid
from vamoh.masks import completion_mask, context_mask


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


HALVES = [(slice(0, 28), slice(0, 14)), (slice(0, 14), slice(0, 28)), (slice(0, 28), slice(14, 28)),
          (slice(14, 28), slice(0, 28))]  # fmt: skip


def hidden_box(mask: torch.Tensor) -> tuple[slice, slice] | None:
    """Rows and columns of what is hidden, if that is a rectangle."""
    rows, columns = ((~mask).any(axis).nonzero()[:, 0] for axis in (1, 0))
    box = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    return None if mask[box].any() else box


def test_mixture_of_posterior_matching_for_mnist() -> None:
    masks = completion_mask("posterior-matching-mnist", (28, 28), count=2000)
    kinds = {"random": 0, "half": 0, "square": 0, "rectangle": 0}
    for mask in masks:
        box = hidden_box(mask)
        if box is None:
            kinds["random"] += 1
            assert 0.35 < mask.float().mean() < 0.65
        elif box in HALVES:
            kinds["half"] += 1
        elif all(side.stop - side.start == 14 for side in box) and all(side.start < 14 for side in box):
            kinds["square"] += 1
        else:
            kinds["rectangle"] += 1
            assert (~mask).float().mean() >= 0.3
    # Shares 0.2, 0.4, 0.2, 0.2; standard deviations of the counts at most 22.
    expected = {"random": 400, "half": 800, "square": 400, "rectangle": 400}
    assert all(abs(kinds[name] - count) < 100 for name, count in expected.items()), kinds


@pytest.mark.parametrize("name, side", [("posterior-matching-celeba", 64), ("vaeac-celeba", 128)])
def test_mixtures_for_faces(name: str, side: int) -> None:
    """The parts of a face that Li et al. hide, as the code of both papers has them, in an eighth of the masks each."""
    parts = {
        64: {(26, 17, 58, 36), (26, 29, 58, 48), (26, 15, 37, 50), (26, 15, 37, 34), (26, 31, 37, 50),
             (43, 20, 62, 44)},
        128: {(52, 33, 116, 71), (52, 57, 116, 95), (52, 29, 74, 99), (52, 29, 74, 67), (52, 61, 74, 99),
              (86, 40, 124, 88)},
    }[side]  # fmt: skip
    seen, counts = set(), {"face": 0, "centre": 0, "blobs": 0, "few": 0, "other": 0}
    for mask in completion_mask(name, (side, side), count=800):
        box, share = hidden_box(mask), (~mask).float().mean().item()
        if box is None:
            assert 0.2 < share < 0.3 or share == pytest.approx(0.8 if side == 64 else 0.95, abs=0.05)
            counts["blobs" if share < 0.5 else "few"] += 1
            if share < 0.5:  # no dust: neighbours mostly agree
                assert (mask[1:] == mask[:-1]).float().mean() > 0.9
            continue
        corners = (box[0].start, box[1].start, box[0].stop, box[1].stop)
        quarter = side // 4
        if corners in parts:
            seen.add(corners)
            counts["face"] += 1
        elif corners == (quarter, quarter, 3 * quarter, 3 * quarter):
            counts["centre"] += 1
        else:
            counts["other"] += 1
            assert share >= 0.3
    assert seen == parts
    expected = {"face": 200, "centre": 40, "blobs": 40, "few": 40, "other": 480}
    assert all(abs(counts[kind] - count) < 5 * count**0.5 for kind, count in expected.items()), counts


def test_mixtures_follow_the_seed_and_need_their_size() -> None:
    name = "posterior-matching-mnist"
    masks = completion_mask(name, (28, 28), seed=2, count=3)
    assert masks.shape == (3, 28, 28)
    assert torch.equal(masks, completion_mask(name, (28, 28), seed=2, count=3))
    assert torch.equal(masks[0], completion_mask(name, (28, 28), seed=2))
    assert not torch.equal(masks, completion_mask(name, (28, 28), seed=3, count=3))
    assert torch.equal(completion_mask("half", (4, 6), count=2), completion_mask("half", (4, 6)).expand(2, 4, 6))
    for name, shape, wanted in (
        ("posterior-matching-mnist", (28, 26), "an even square"),
        ("posterior-matching-mnist", (9, 9), "an even square"),
        ("posterior-matching-mnist", (8, 8, 8), "an even square"),
        ("posterior-matching-celeba", (128, 128), "64 x 64"),
        ("vaeac-celeba", (64, 64), "128 x 128"),
    ):
        with pytest.raises(ValueError, match=f"{name} must have a grid of {wanted}, got"):
            completion_mask(name, shape)


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
    path.write_bytes(b"\x93NUMPY\1\0\x10\0{'descr': ((((((\n")
    with pytest.raises(ValueError, match=r"m\.npy' cannot be read"):
        completion_mask(str(path), (2, 2))
    Image.fromarray(np.array([[300, 0], [0, 65535]], dtype=np.uint16)).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"m\.png' cannot be read: it must have 8 bits per channel, got mode I;16"):
        completion_mask(str(tmp_path / "m.png"), (2, 2))
    (tmp_path / "m.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"m\.png' cannot be read"):
        completion_mask(str(tmp_path / "m.png"), (2, 2))


def context(**shares: float) -> torch.Tensor:
    """Of 2000 functions on a 16 x 20 grid."""
    coords = grid_coords((16, 20))
    generator = torch.Generator().manual_seed(0)
    return context_mask(coords, 2000, generator=generator, **shares).unflatten(1, (16, 20))


def rectangle(mask: torch.Tensor) -> tuple[int, int, int, int] | None:
    """First and last row and column of what is True, if that is a full rectangle."""
    rows, columns = mask.any(1).nonzero()[:, 0].tolist(), mask.any(0).nonzero()[:, 0].tolist()
    box = rows[0], rows[-1], columns[0], columns[-1]
    full = mask[box[0] : box[1] + 1, box[2] : box[3] + 1].all() and int(mask.sum()) == len(rows) * len(columns)
    return box if full else None


def test_contexts_hide_points_at_random() -> None:
    seen = context(random=1.0, rate=0.8).float().mean((1, 2))
    # Rates are uniform from 0 to 0.8: mean 0.4, standard deviation of a share 0.23 and of the mean of 2000 0.005.
    assert seen.mean().item() == pytest.approx(0.6, abs=0.02)
    assert seen.min() < 0.25 and seen.max() > 0.97


@pytest.mark.parametrize("kind", ["box", "outside", "half"])
def test_contexts_are_boxes_and_halves(kind: str) -> None:
    masks = context(**{kind: 1.0})
    boxes = [rectangle(~mask if kind == "box" else mask) for mask in masks]
    assert None not in boxes
    extents = torch.tensor([(b - a, d - c) for a, b, c, d in boxes]) / torch.tensor([15, 19])  # type: ignore[misc]
    corners = torch.tensor(boxes)
    if kind == "half":
        whole = extents > 0.99
        assert (whole.sum(1) == 1).all() and 0.45 < whole[:, 0].float().mean() < 0.55
        first = (corners[:, [0, 2]] == 0).all(1).float().mean()
        assert 0.45 < first < 0.55  # the side that is seen
        extents = extents[~whole]
    assert extents.min() >= 0.25 - 2 / 15 and extents.max() <= 0.75
    assert extents.mean().item() == pytest.approx(0.5 - 0.5 / 17 * (1 if kind == "half" else 2), abs=0.04)
    assert len({tuple(box) for box in boxes if box}) > (20 if kind == "half" else 1000)


def test_contexts_are_mixed_by_share() -> None:
    masks = context(random=0.1, box=0.2, outside=0.3, half=0.1)
    whole = masks.flatten(1).all(1)
    # Standard deviation of a share of 2000: at most 0.011. A random rate near 0 leaves everything, too.
    assert whole.float().mean().item() == pytest.approx(0.3, abs=0.04)
    boxes = torch.tensor([rectangle(~mask) is not None for mask in masks[~whole]])
    assert boxes.float().sum().item() / 2000 == pytest.approx(0.3, abs=0.04)  # a half is hidden as a box, too


def test_contexts_follow_the_generator_and_not_the_coordinates() -> None:
    again = [context_mask(grid_coords((4, 5)), 7, box=0.5, random=0.5, generator=generator(3)) for _ in range(2)]
    assert torch.equal(*again)
    own = context_mask(grid_coords((4, 5)).expand(7, -1, -1), 7, box=0.5, random=0.5, generator=generator(3))
    assert torch.equal(own, again[0])
    moved = context_mask(5 + 3 * grid_coords((4, 5)).double(), 7, box=0.5, random=0.5, generator=generator(3))
    assert torch.equal(moved, again[0])


@pytest.mark.parametrize("coords", [grid_coords((5, 5, 5)), sphere_grid((7, 9)), torch.zeros(4, 1)])
def test_contexts_of_any_domain(coords: torch.Tensor) -> None:
    for kind in ("random", "box", "outside", "half"):
        masks = context_mask(coords, 50, generator=generator(0), **{kind: 1.0})
        assert masks.shape == (50, len(coords)) and masks.dtype == torch.bool
        if len(coords) > 4:
            assert masks.any() and not masks.all()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["x" * 200, "random:" + "1" * 200, "x" * 10**5 + ".npy", "random:0.5\0"])
def test_long_names_are_cut_in_messages(name: str) -> None:
    with pytest.raises(ValueError, match="^mask: ") as caught:
        completion_mask(name, (4, 5))
    assert len(str(caught.value)) < 280
