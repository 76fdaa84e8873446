"""The data sets that ship with the package: content, splits, licences."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vamoh.data
from vamoh.data import Dataset, open_dataset
from vamoh.points import grid_coords, sphere_grid

BUNDLED = Path(vamoh.data.__file__).parent / "bundled"

# name: functions, kind, shape, channels, likelihood, sizes of the splits, start of the SHA-256 of the test split
SETS = {
    "digits": (10_000, "image", (28, 28), 1, "logistic", (8500, 500, 1000), "6616d1eb395d"),
    "polymnist": (10_000, "image", (28, 28), 3, "logistic", (8500, 500, 1000), "6616d1eb395d"),
    "chairs": (68, "voxels", (32, 32, 32), 1, "bernoulli", (56, 6, 6), "2d81ca2cc813"),
    "furniture": (748, "voxels", (32, 32, 32), 1, "bernoulli", (605, 71, 72), "b951ebd5fbfc"),
    "climate": (78, "sphere", (46, 90), 1, "continuous_bernoulli", (54, 6, 18), "4190cb0b842b"),
}


@pytest.fixture(scope="module")
def opened() -> dict[str, Dataset]:
    return {name: open_dataset(name) for name in SETS}


@pytest.mark.parametrize("name", SETS)
def test_layout_and_splits_stay_as_documented(opened: dict[str, Dataset], name: str) -> None:
    data = opened[name]
    count, kind, shape, channels, likelihood, sizes, digest = SETS[name]
    assert (len(data), data.kind, data.shape, data.channels, data.likelihood) == (
        count,
        kind,
        shape,
        channels,
        likelihood,
    )
    assert tuple(len(data.splits[s]) for s in ("train", "validation", "test")) == sizes
    everything = torch.cat(list(data.splits.values()))
    assert everything.dtype == torch.int64
    assert torch.equal(everything.sort().values, torch.arange(count))
    assert hashlib.sha256(data.splits["test"].numpy().tobytes()).hexdigest()[:12] == digest


@pytest.mark.parametrize("name", SETS)
def test_batches_hold_floats_in_range_on_the_grid(opened: dict[str, Dataset], name: str) -> None:
    data = opened[name]
    points = data.batch(torch.tensor([0, len(data) - 1, 3]))
    assert points.values.shape == (3, np.prod(data.shape), data.channels)
    assert points.values.dtype == torch.float32
    assert float(points.values.min()) >= 0
    assert float(points.values.max()) <= 1
    expected = sphere_grid(data.shape) if data.kind == "sphere" else grid_coords(data.shape)
    assert torch.equal(points.coords, expected)
    coords, shape = data.grid(2)
    assert len(coords) == np.prod(shape)


def test_digits_are_the_reference_split(opened: dict[str, Dataset]) -> None:
    data = opened["digits"]
    order = np.random.default_rng(0).permutation(10_000)
    assert np.array_equal(data.splits["test"], order[9000:])
    assert set(data.splits["validation"].tolist()) <= set(order[:9000].tolist())
    with np.load(BUNDLED / "mnist10k.npz") as file:
        item = int(order[9000])
        assert np.array_equal(data.batch(torch.tensor([item])).values[0, :, 0] * 255, file["x"][item].ravel())
        assert int(data.labels[item]) == file["y"][item]


def test_polymnist_inverts_a_patch_of_one_photograph(opened: dict[str, Dataset]) -> None:
    photographs = [np.asarray(Image.open(path)) for path in BUNDLED.glob("photo_*.png")]
    assert len(photographs) >= 5
    ink = opened["digits"].values.reshape(-1, 28, 28).numpy() > 127
    families = set()
    for item in range(0, 10_000, 700):
        image = opened["polymnist"].values[item].reshape(28, 28, 3).numpy()
        patch = np.where(ink[item][..., None], 255 - image, image)
        for family, photograph in enumerate(photographs):
            rows, columns = (n - 27 for n in photograph.shape[:2])
            starts = np.argwhere((photograph[:rows, :columns] == patch[0, 0]).all(-1))
            if any(np.array_equal(photograph[r : r + 28, c : c + 28], patch) for r, c in starts):
                families.add(family)
                break
        else:
            pytest.fail(f"image {item} is no patch of a photograph")
    assert len(families) >= 4


@pytest.mark.parametrize("name", ["chairs", "furniture"])
def test_voxels_are_the_bits_of_the_file(opened: dict[str, Dataset], name: str) -> None:
    values = opened[name].values.flatten()
    with np.load(BUNDLED / f"{name}32.npz") as file:
        data = file["vox"]
    for position in np.random.default_rng(1).integers(len(values), size=2000):
        bit = (data[position // 8] >> (7 - position % 8)) & 1
        assert int(values[position]) == 255 * bit


def test_chairs_stand_upright(opened: dict[str, Dataset]) -> None:
    occupied = opened["chairs"].batch(torch.arange(68)).values.reshape(68, 32, 32, 32)
    mirrored = (occupied - occupied.flip(1)).abs().mean()
    for other in (2, 3):
        assert mirrored < (occupied - occupied.flip(other)).abs().mean(), "left and right are the most alike"
    height = occupied.mean((0, 1, 3))
    assert height[8:16].mean() > 1.5 * height[24:].mean(), "the seat is fuller than the back"


def test_variants_of_furniture_share_a_split(opened: dict[str, Dataset]) -> None:
    data = opened["furniture"]
    occupied = (data.values[..., 0] > 0).float()
    for name, other in (("test", "train"), ("validation", "train"), ("test", "validation")):
        a, b = occupied[data.splits[name]], occupied[data.splits[other]]
        common = a @ b.T
        overlap = common / (a.sum(1)[:, None] + b.sum(1) - common)
        assert float(overlap.max()) <= 0.9
    assert data.labels.shape == (748,)
    assert data.labels.unique().tolist() == list(range(10))


def test_climate_is_the_earth(opened: dict[str, Dataset]) -> None:
    data = opened["climate"]
    unit, low, high = data.units
    assert unit == "K"
    assert (float(data.values.min()), float(data.values.max())) == (0, 1)

    def kelvin(latitude: float, longitude: float, month: int) -> float:
        lat, lon = np.deg2rad([latitude, longitude])
        place = torch.tensor([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], dtype=torch.float32)
        nearest = (data.coords - place).norm(dim=1).argmin()
        return low + (high - low) * float(data.values[month, nearest, 0])

    august, january = 0, 5
    assert kelvin(24, 44, august) > 305, "Arabia in summer"
    assert kelvin(24, 316, august) < 303, "the Atlantic at the same latitude"
    assert kelvin(-80, 60, august) < 225, "Antarctica in winter"
    assert kelvin(-24, 132, january) > 302, "Australia in summer"
    assert kelvin(64, 128, january) < 245, "Yakutia in winter"
    assert kelvin(0, 180, january) == pytest.approx(300, abs=4), "the Pacific at the equator"


def test_members_of_the_climate_ensemble_stay_whole(opened: dict[str, Dataset]) -> None:
    members = {name: set((index // 6).tolist()) for name, index in opened["climate"].splits.items()}
    assert members == {"train": set(range(9)), "validation": {9}, "test": {10, 11, 12}}


def test_every_bundled_file_has_a_licence() -> None:
    text = (BUNDLED / "LICENSES.md").read_text("utf-8")
    rows = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")}
    names = {path.name for path in BUNDLED.iterdir()} - {"LICENSES.md"}
    assert names <= rows
    assert all(f"* {name}: " in text for name in names if name.startswith("photo_"))


def test_the_collections_of_the_voxels_are_attributed() -> None:
    text = (BUNDLED / "LICENSES.md").read_text("utf-8")
    for name in ("chairs32.npz", "furniture32.npz"):
        with np.load(BUNDLED / name) as file:
            for collection in {str(model).split("/")[0] for model in file["names"]}:
                assert f"| {collection} |" in text


def test_the_bundle_stays_small() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 6_000_000
