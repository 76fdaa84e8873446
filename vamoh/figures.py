"""PNG figures of data, reconstructions and training: the only room that draws.

Panels are RGB pictures [h, w, 3], float in [0, 1]; `show_*` makes them from arrays on a grid, `write_*` lays them out.
Arrays are numpy in grid order: values [*shape, C], masks, components and entropies [*shape].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vamoh._files import whole_file

Array = NDArray[Any]

# The same component has the same colour in every figure; distinct for colour-blind readers up to seven.
PALETTE = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb",
    "#ee8866", "#44bb99", "#222255", "#aaaa00", "#ffaabb",
)  # fmt: skip
# Kelvin and colour: the change from cold to warm colours is at the freezing point.
TEMPERATURES = (
    (200, "#2a0a4a"), (225, "#3b3a9e"), (250, "#4a90d9"), (264, "#9fd0ee"), (273, "#f4f6f2"), (280, "#fbe8a6"),
    (288, "#f9bf5c"), (296, "#ef7d3a"), (303, "#cf3a2c"), (320, "#6e0d25"),
)  # fmt: skip
SOLID = np.array([0.50, 0.63, 0.80])
FLOOR = np.array([0.86, 0.88, 0.91])
MISSING = np.array([0.80, 0.85, 0.93])
# What a ray through voxels meets: solid cells end it, and so does the border around the grid.
_EMPTY, _SOLID, _FOG, _BORDER = range(4)
INK = "#2b2f36"
DPI = 160
ROW_HEIGHT = {"image": 1.35, "sphere": 1.15, "voxels": 1.6}


@dataclass(frozen=True)
class Look:
    """How values of a data set are drawn.

    kind: "image", "voxels" or "sphere". components: K, the scale of component and entropy maps.
    units: name of the natural unit and its numbers at value 0 and value 1; drawn for the sphere.
    axes: latitudes and longitudes in degrees of its rows and columns, where they are not those from pole to pole and
    from 0.
    """

    kind: str
    components: int
    units: tuple[str, float, float] = ("", 0.0, 1.0)
    axes: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Column:
    """A titled column of panels.

    key: the legend drawn below, "values", "components", "entropy" or None. frame: whether panels have a thin frame and
    hard pixels, as grids have, or neither, as drawings of solids and globes.
    """

    title: str
    panels: Sequence[Array]
    key: str | None = None
    frame: bool = True


def show_values(values: Array, look: Look, mask: Array | None = None) -> Array:
    """Panel of a function's values [*shape, C] in [0, 1]; points where `mask` [*shape] is False are left out.

    Images of one channel are grey, of three RGB; of others the first channel is drawn. Voxels are drawn as solids
    where the value is at least 0.5.
    """
    values = np.clip(np.asarray(values, dtype=np.float64), 0.0, 1.0)
    if look.kind == "voxels":
        solid = values[..., 0] >= 0.5
        return render_voxels(solid) if mask is None else render_voxels(solid & mask, hidden=~mask)
    if look.kind == "sphere":
        picture = _colors(values[..., 0], _field_colors(look))
    elif values.shape[-1] == 3:
        picture = values
    else:
        picture = np.repeat(values[..., :1], 3, -1)
    if mask is not None:
        picture = np.where(mask[..., None], picture, MISSING)
    return _centred(picture, look)


def show_components(index: Array, look: Look, solid: Array | None = None) -> Array:
    """Panel of component numbers [*shape]; for voxels the colours lie on the solid where `solid` [*shape] is True."""
    palette = np.array([to_rgb(PALETTE[k % len(PALETTE)]) for k in range(look.components)])
    return _paint(palette[index], look, solid)


def show_entropy(entropy: Array, look: Look, solid: Array | None = None) -> Array:
    """Panel of entropies [*shape] in nats, from 0 to log K; for voxels painted on `solid` as in `show_components`."""
    return _paint(_colors(entropy / _entropy_top(look), colormaps.get_cmap("magma")), look, solid)


def show_spread(spread: Array, top: float, look: Look) -> Array:
    """Panel of standard deviations [*shape, C], the largest of the channels, from 0 to `top`.

    Voxels are painted where the deviation is at least half of `top`.
    """
    largest = np.asarray(spread, dtype=np.float64).max(-1)
    colors = _colors(largest / max(top, np.finfo(np.float64).tiny), colormaps.get_cmap("magma"))
    return _paint(colors, look, largest >= top / 2 if look.kind == "voxels" else None)


def show_globe(values: Array, look: Look, *, latitude: float = 25.0, longitude: float = 10.0, size: int = 240) -> Array:
    """Panel of a latitude-longitude field [rows, columns, C] seen from far above a point of the sphere (degrees)."""
    half = (np.arange(2 * size) + 0.5) / size - 1.0
    x, y = np.meshgrid(half, -half)
    depth2 = 1.0 - x**2 - y**2
    depth = np.sqrt(np.clip(depth2, 0.0, None))
    tilt = math.radians(latitude)
    up = np.clip(y * math.cos(tilt) + depth * math.sin(tilt), -1.0, 1.0)
    towards = depth * math.cos(tilt) - y * math.sin(tilt)
    rows, columns = values.shape[:2]
    row, start = (0.5 - np.arcsin(up) / math.pi) * (rows - 1), 0.0
    if look.axes:
        given, start = look.axes[0], look.axes[1][0]
        nodes = np.interp(np.linspace(0, len(given) - 1, rows), np.arange(len(given)), given)  # of a refined grid too
        row = np.interp(-np.degrees(np.arcsin(up)), -nodes, np.arange(rows))
    column = (np.degrees(np.arctan2(x, towards)) + longitude - start) / 360 * columns
    top = np.clip(np.floor(row).astype(int), 0, max(rows - 2, 0))
    left = np.floor(column).astype(int)
    a, b = np.clip(row - top, 0, 1), column - left
    field = np.asarray(values[..., 0], dtype=np.float64)
    low = np.minimum(top + 1, rows - 1)
    value = (1 - a) * ((1 - b) * field[top, left % columns] + b * field[top, (left + 1) % columns]) + a * (
        (1 - b) * field[low, left % columns] + b * field[low, (left + 1) % columns]
    )
    shade = 0.72 + 0.28 * depth[..., None]
    picture = np.where(depth2[..., None] > 0, _colors(value, _field_colors(look)) * shade, 1.0)
    return _halve(picture)


def render_voxels(solid: Array, *, colors: Array | None = None, hidden: Array | None = None, size: int = 200) -> Array:
    """Shaded parallel projection [size, size, 3] of the cells where `solid` [D, H, W] is True.

    The second axis points up. `colors` [D, H, W, 3] paints the cells; `hidden` [D, H, W] marks unobserved cells, which
    are drawn as fog. One ray per pixel walks exactly from cell to cell, so edges are sharp at any grid size.
    """
    # Directions of the picture, right, up and into it, in (x, y, z) = (W, H, D) with y up.
    yaw, pitch = math.radians(35.0), math.radians(24.0)
    right = np.array([math.cos(yaw), 0.0, -math.sin(yaw)])
    forward = np.array([-math.sin(yaw) * math.cos(pitch), -math.sin(pitch), -math.cos(yaw) * math.cos(pitch)])
    upward = np.cross(right, forward)

    cells = solid.transpose(2, 1, 0)
    kinds = np.full(np.array(cells.shape) + 2, _BORDER, dtype=np.int8)
    inner = kinds[1:-1, 1:-1, 1:-1]
    inner[...] = _EMPTY if hidden is None else np.where(hidden.transpose(2, 1, 0), _FOG, _EMPTY)
    inner[cells] = _SOLID

    # The picture just holds the grid, whatever its shape; twice as fine, for smooth edges.
    centre = np.array(cells.shape) / 2
    extent = 1.01 * max(np.abs(right) @ centre, np.abs(upward) @ centre)
    pixels = 2 * size
    span = (2 * (np.arange(pixels) + 0.5) / pixels - 1) * extent
    u, v = (a.ravel() for a in np.meshgrid(span, -span))
    origin = centre - 2 * np.linalg.norm(centre) * forward + u[:, None] * right + v[:, None] * upward
    hit, face, fog = _walk(kinds, origin, forward)

    picture = np.ones((pixels, pixels, 3))
    # The outline of the floor, so that an empty grid does not look like a missing panel.
    corners = 2 * centre * [[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0]] - centre
    edges = np.concatenate([np.linspace(a, b, 2 * pixels) for a, b in pairwise(corners)])
    floor = np.stack([-edges @ upward, edges @ right], -1) / extent
    row, column = np.clip(np.round((floor + 1) * pixels / 2).astype(int), 1, pixels - 1).T
    for i, j in ((0, 0), (-1, 0), (0, -1), (-1, -1)):
        picture[row + i, column + j] = FLOOR

    flat = picture.reshape(-1, 3)
    seen = np.flatnonzero(hit)
    x, y, z = (i - 1 for i in np.unravel_index(hit[seen], kinds.shape))
    normal = 1.2 * _slope(cells)[x, y, z]
    normal[np.arange(len(seen)), face[seen]] -= np.sign(forward)[face[seen]]
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    light = np.array([0.2, 0.8, 0.6]) / np.linalg.norm([0.2, 0.8, 0.6])
    shade = 0.56 + 0.56 * np.clip(normal @ light, 0, None)
    base = SOLID if colors is None else colors.transpose(2, 1, 0, 3)[x, y, z]
    flat[seen] = np.clip(base * shade[:, None], 0, 1)
    veil = 1 - np.exp(-2.2 * fog / np.mean(cells.shape))
    flat += veil[:, None] * (MISSING - flat)
    return _halve(picture)


def write_strip(path: str | Path, columns: Sequence[Column], look: Look, labels: Sequence[str] | None = None) -> Path:
    """Write rows of data by titled columns of panels, with legends below the columns that ask for one.

    labels: one short text per row, drawn on its left. Every column must have the same number of panels.
    """
    count = len(columns[0].panels)
    if count == 0 or any(len(column.panels) != count for column in columns):
        raise ValueError(
            f"write_strip: columns must hold the same number of panels, at least 1, "
            f"got {[len(column.panels) for column in columns]}"
        )
    height = ROW_HEIGHT[look.kind]
    widths = [height * c.panels[0].shape[1] / c.panels[0].shape[0] for c in columns]
    gap, left, top = 0.09, 0.62 if labels else 0.12, 0.34
    bottom = 0.5 if any(_has_key(c, look) for c in columns) else 0.12
    size = (left + sum(widths) + gap * (len(columns) - 1) + 0.12, top + count * (height + gap) - gap + bottom)
    figure = _figure(size)
    x = left
    for column, width in zip(columns, widths, strict=True):
        for row, panel in enumerate(column.panels):
            y = size[1] - top - height - row * (height + gap)
            axes = _picture(figure, (x, y, width, height), panel, frame=column.frame and look.kind != "voxels")
            if row == 0:
                axes.set_title(column.title, fontsize=8.5, color=INK, pad=5)
        if column.key and _has_key(column, look):
            _key(figure, column.key, (x, bottom - 0.09, width), look)
        x += width + gap
    for row, label in enumerate(labels or ()):
        y = size[1] - top - height / 2 - row * (height + gap)
        figure.text((left - 0.08) / size[0], y / size[1], label, ha="right", va="center", fontsize=7.5, color=INK)
    return _save(figure, path)


def write_samples(path: str | Path, samples: Array, look: Look) -> Path:
    """Write a nearly square sheet of functions [n, *shape, C]; on the sphere each map has its globe beside it."""
    if len(samples) == 0:
        raise ValueError("write_samples: samples must hold at least one function, got none")
    cells = [[show_values(values, look)] for values in samples]
    if look.kind == "sphere":
        cells = [[panel[0], show_globe(values, look)] for panel, values in zip(cells, samples, strict=True)]
    height = {"image": 0.8, "sphere": 1.15, "voxels": 1.3}[look.kind]
    gap = 0.06
    widths = [height * panel.shape[1] / panel.shape[0] for panel in cells[0]]
    cell_width = sum(widths) + gap * (len(widths) - 1)
    across = min(len(cells), max(1, round(math.sqrt(len(cells) * height / cell_width))))
    down = math.ceil(len(cells) / across)
    bottom = 0.5 if look.kind == "sphere" else 0.12
    size = (0.24 + across * (cell_width + gap) - gap, 0.12 + down * (height + gap) - gap + bottom)
    figure = _figure(size)
    for i, panels in enumerate(cells):
        x = 0.12 + (i % across) * (cell_width + gap)
        y = size[1] - 0.12 - height - (i // across) * (height + gap)
        for part, (panel, width) in enumerate(zip(panels, widths, strict=True)):
            _picture(figure, (x, y, width, height), panel, frame=part == 0 and look.kind != "voxels")
            x += width + gap
    if look.kind == "sphere":
        _key(figure, "values", (0.12, bottom - 0.09, widths[0]), look)
    return _save(figure, path)


def write_losses(path: str | Path, records: Sequence[Mapping[str, Any]], points: int | None = None) -> Path:
    """Write the ELBO terms (nats per function) and the validation PSNR against the step.

    records: lines of metrics.jsonl; a record with `split` "validation" is drawn as a marked line, the others as a
    thin line with its running mean. points: N of a function; terms of batches that point dropout has thinned are scaled
    to it, so that they compare. Raises ValueError where no record holds a step and an ELBO.
    """
    names = {
        "elbo": "ELBO", "log_likelihood": "log-likelihood", "kl_z": "KL of the latent", "kl_c": "KL of the components",
        "psnr": "reconstruction PSNR",
    }  # fmt: skip
    units = {"psnr": "dB"}
    usable = [_scaled(r, points) for r in records if "step" in r]
    if not any("elbo" in r for r in usable):
        raise ValueError(f"write_losses: records must hold lines with step and elbo, got {len(records)} without")
    shown = [name for name in names if any(isinstance(r.get(name), (int, float)) for r in usable)]
    figure = Figure(figsize=(10.2, 2.75 * math.ceil(len(shown) / 3)), dpi=DPI, facecolor="white", layout="constrained")
    grid = figure.subplots(math.ceil(len(shown) / 3), 3, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, shown, strict=False):
        edges: list[float] = []
        for split, color in (("train", "#4477aa"), ("validation", "#d1495b")):
            found = [
                (r["step"], r[name])
                for r in usable
                if r.get("split", "train") == split and isinstance(r.get(name), (int, float)) and math.isfinite(r[name])
            ]
            if not found:
                continue
            step, value = (np.array(column, dtype=np.float64) for column in zip(*found, strict=True))
            if split == "train" and len(step) >= 20:
                axes.plot(step, value, color=color, alpha=0.25, linewidth=0.7)
                value = _running_mean(value, max(len(step) // 25, 3))
            marker = "o" if split == "validation" or len(step) < 20 else ""
            axes.plot(step, value, color=color, linewidth=1.5, marker=marker, markersize=3, label=split)
            edges += [*np.quantile(value, [0.04, 0.96] if len(value) >= 25 else [0, 1]), value[-1], value.max()]
        # The first steps are far off; the limits follow the rest of the curve.
        if name in ("elbo", "log_likelihood") and edges and max(edges) > min(edges):
            margin = 0.08 * (max(edges) - min(edges))
            axes.set_ylim(min(edges) - margin, max(edges) + margin)
        axes.set_title(names[name], fontsize=9.5, color=INK, loc="left")
        axes.set_ylabel(units.get(name, "nats"), fontsize=8, color=INK)
        axes.tick_params(labelsize=7.5, colors=INK, length=2.5)
        axes.grid(True, color="#e6e8ec", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color("#9aa0a8")
        axes.set_xlabel("step", fontsize=8, color=INK)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    grid.flat[0].legend(handles.values(), handles.keys(), fontsize=7.5, frameon=False, loc="lower right")
    return _save(figure, path)


def _scaled(record: Mapping[str, Any], points: int | None) -> Mapping[str, Any]:
    """The record as if all `points` had been observed: sums over points grow, the KL of the latent stays."""
    if points is None or not {"points", "elbo", "log_likelihood", "kl_c"} <= set(record):
        return record
    factor = points / record["points"]
    sums = record["log_likelihood"] - record.get("beta_c", 1.0) * record["kl_c"]
    return {
        **record,
        "elbo": record["elbo"] + (factor - 1) * sums,
        "log_likelihood": factor * record["log_likelihood"],
        "kl_c": factor * record["kl_c"],
    }


def _paint(colors: Array, look: Look, solid: Array | None) -> Array:
    if look.kind == "voxels":
        full = np.ones(colors.shape[:-1], dtype=bool) if solid is None else solid
        return render_voxels(full, colors=colors)
    return _centred(colors, look)


def _centred(picture: Array, look: Look) -> Array:
    """Maps start at longitude 0; turn them so that the Greenwich meridian is in the middle."""
    return np.roll(picture, picture.shape[1] // 2, axis=1) if look.kind == "sphere" else picture


def _colors(values: Array, colors: Colormap) -> Array:
    rgba: Array = np.asarray(colors(np.clip(values, 0.0, 1.0)))
    return rgba[..., :3]


def _field_colors(look: Look) -> Colormap:
    """Colours of a field on the sphere from value 0 to value 1."""
    unit, low, high = look.units
    if unit != "K":
        return colormaps.get_cmap("viridis")
    kelvin, names = zip(*TEMPERATURES, strict=True)
    stops = np.array([to_rgb(name) for name in names])
    scale = np.linspace(low, high, 256)
    return ListedColormap(np.stack([np.interp(scale, kelvin, stops[:, i]) for i in range(3)], 1))


def _entropy_top(look: Look) -> float:
    return math.log(max(look.components, 2))


def _walk(kinds: Array, origin: Array, forward: Array) -> tuple[Array, Array, Array]:
    """Follow parallel rays from `origin` [R, 3] outside a bordered grid to the first solid cell.

    Returns per ray the flat index of that cell in `kinds` (0: none), the axis of the face it is met through, and the
    number of foggy cells before it.
    """
    sizes = np.array(kinds.shape) - 2
    strides = np.array([kinds.shape[1] * kinds.shape[2], kinds.shape[2], 1])
    step = np.sign(forward).astype(int)
    near = (np.where(forward > 0, 0, sizes) - origin) / forward
    far = (np.where(forward > 0, sizes, 0) - origin) / forward
    entry = near.max(1)
    alive = np.flatnonzero(entry < far.min(1) - 1e-9)
    axis = near.argmax(1)[alive]
    first = np.floor(origin[alive] + (entry[alive, None] + 1e-7) * forward).astype(int)
    first = np.clip(first, 0, sizes - 1)
    # Distance along the ray at which it leaves its cell through each axis' face.
    until = ((first + (step > 0) - origin[alive]) / forward).T.copy()
    at = (first + 1) @ strides

    met = kinds.ravel()
    hit, face, fog = (np.zeros(len(origin), dtype=int) for _ in range(3))
    while len(alive):
        now = met[at]
        ended = now == _SOLID
        hit[alive[ended]], face[alive[ended]] = at[ended], axis[ended]
        fog[alive[now == _FOG]] += 1
        going = (now == _EMPTY) | (now == _FOG)
        alive, at, until = alive[going], at[going], until[:, going]
        axis = until.argmin(0)
        at += (step * strides)[axis]
        until[axis, np.arange(len(alive))] += np.abs(1 / forward)[axis]
    return hit, face, fog


def _slope(cells: Array) -> Array:
    """Direction out of the solid [X, Y, Z, 3], at most about 1 long: the negative gradient of a blurred occupancy."""
    blurred = np.pad(cells.astype(np.float64), 3)
    for axis in range(3):
        for _ in range(2):
            blurred = (np.roll(blurred, 1, axis) + blurred + np.roll(blurred, -1, axis)) / 3
    inner = (slice(3, -3),) * 3
    return -3 * np.moveaxis(np.asarray(np.gradient(blurred)), 0, -1)[inner]


def _halve(picture: Array) -> Array:
    """Average blocks of 2 by 2 pixels."""
    h, w = picture.shape[0] // 2, picture.shape[1] // 2
    mean: Array = picture.reshape(h, 2, w, 2, 3).mean((1, 3))
    return mean


def _running_mean(value: Array, window: int) -> Array:
    total = np.concatenate([[0.0], np.cumsum(value)])
    end = np.arange(1, len(value) + 1)
    start = np.maximum(end - window, 0)
    mean: Array = (total[end] - total[start]) / (end - start)
    return mean


def _figure(size: tuple[float, float]) -> Figure:
    return Figure(figsize=size, dpi=DPI, facecolor="white")


def _axes(figure: Figure, box: tuple[float, float, float, float]) -> Axes:
    """Axes in a box (left, bottom, width, height) given in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))


def _picture(figure: Figure, box: tuple[float, float, float, float], panel: Array, *, frame: bool) -> Axes:
    axes = _axes(figure, box)
    axes.imshow(panel, interpolation="nearest" if frame else "bilinear", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(frame)
        spine.set_color("#c4c9d1")
        spine.set_linewidth(0.5)
    return axes


def _has_key(column: Column, look: Look) -> bool:
    """Values of images and solids need no legend."""
    return column.key is not None and (column.key != "values" or look.kind == "sphere")


def _key(figure: Figure, key: str, place: tuple[float, float, float], look: Look) -> None:
    """Draw a legend whose top left corner and width are `place`, in inches."""
    left, top, width = place
    if key == "components":
        axes = _axes(figure, (left, top - 0.28, width, 0.28))
        axes.set_xlim(0, look.components)
        axes.set_ylim(0, 1)
        axes.axis("off")
        for k in range(look.components):
            axes.bar(k + 0.5, 0.42, width=0.86, bottom=0.58, color=PALETTE[k % len(PALETTE)])
            axes.text(k + 0.5, 0.42, str(k + 1), ha="center", va="top", fontsize=6.5, color=INK)
        return
    if key == "entropy":
        label, low, high, colors = "nats", 0.0, _entropy_top(look), colormaps.get_cmap("magma")
        ticks = [low, high]
    else:
        (label, low, high), colors = look.units, _field_colors(look)
        ticks = [low, (low + high) / 2, high]
    axes = _axes(figure, (left, top - 0.12, width, 0.12))
    bar = figure.colorbar(ScalarMappable(Normalize(low, high), colors), cax=axes, orientation="horizontal", ticks=ticks)
    bar.outline.set_visible(False)
    texts = [f"{tick:.3g}" for tick in ticks]
    texts[-1] += f" {label}"
    bar.ax.set_xticklabels(texts, fontsize=6.5, color=INK)
    bar.ax.tick_params(length=0, pad=2)
    # Keep the outer numbers inside the column.
    bar.ax.get_xticklabels()[0].set_horizontalalignment("left")
    bar.ax.get_xticklabels()[-1].set_horizontalalignment("right")


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file("vamoh", path) as file:
        figure.savefig(file, format=path.suffix[1:] or None, dpi=DPI, facecolor="white")
    return path
