"""Cartoon faces, where the optional packages are installed, and the error where not."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vamoh.data import avatars, open_dataset

INSTALLED = all(find_spec(name) for name in ("dicebear", "dicebear_styles", "resvg_py"))


@pytest.mark.skipif(not INSTALLED, reason="needs vamoh[avatars]")
def test_faces_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(avatars, "COUNT", 8)
    data = open_dataset("avatars", size=64, root=str(tmp_path))
    assert (len(data), data.kind, data.shape, data.channels) == (8, "image", (64, 64), 3)
    assert data.labels.tolist() == [0, 1] * 4
    faces = data.values.reshape(8, -1).float()
    assert (faces.std(1) > 20).all(), "no face is blank"
    assert len(faces.unique(dim=0)) == 8
    backgrounds = {tuple(bytes.fromhex(colour)) for colour in avatars.BACKGROUNDS}
    assert {tuple(corner.tolist()) for corner in data.values[:, 0]} <= backgrounds

    monkeypatch.setitem(sys.modules, "dicebear", None)
    assert torch.equal(open_dataset("avatars", root=str(tmp_path)).values, data.values)


@pytest.mark.parametrize("missing", ["dicebear", "resvg_py", "dicebear_styles"])
def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r'pip install "vamoh\[avatars\]"; or use the data set "images"'):
        open_dataset("avatars", root=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
