"""Images of the 3D Shapes factors, drawn by a small ray caster.

A solid stands on the floor of a square room, seen through an orbiting camera. The solid, its size and the camera fix
which material each ray meets and how bright it is; the three hues only colour it. So every geometry is drawn once, as
one brightness map per material, and an image is the sum of the maps times the colours of the materials.
"""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np

from vamoh.data.dataset import Dataset, grid_dataset
from vamoh.data.files import Arrays, cached

# The factors of 3D Shapes, in the order of the labels: hues of floor, wall and solid, scale, shape, degrees of orbit.
FACTORS = (
    np.arange(10) / 10,
    np.arange(10) / 10,
    np.arange(10) / 10,
    np.linspace(0.75, 1.25, 8),
    np.arange(4),
    np.linspace(-30, 30, 15),
)
CUBE, CYLINDER, SPHERE, CAPSULE = range(4)
COUNT = 10_000
SIZE = 64

_SKY = (0.62, 0.78, 0.93)
_ROOM, _WALL = 3.2, 2.6  # half width and height
_LIGHT = np.array([0.45, 0.8, 0.4]) / np.linalg.norm([0.45, 0.8, 0.4])
_AMBIENT = 0.45

Array = np.ndarray[Any, Any]


def shapes3d(root: str | None = None) -> Dataset:
    """10 000 of the 480 000 combinations of six factors, 64x64, three channels; cached under `root`.

    labels: [n, 6] float32, the values of `FACTORS`: hues of floor, wall and solid, scale, shape, degrees of orbit.
    """
    file = cached(root, f"shapes3d-{COUNT}-1.npz", _build)
    return grid_dataset("shapes3d", file["images"], labels=file["factors"])


def _build() -> Arrays:
    sizes = [len(values) for values in FACTORS]
    chosen = np.random.default_rng(0).choice(np.prod(sizes), COUNT, replace=False)
    factors = np.stack([v[i] for v, i in zip(FACTORS, np.unravel_index(chosen, sizes), strict=True)], 1)
    return {"images": draw(factors), "factors": factors.astype(np.float32)}


def draw(factors: Array, size: int = SIZE, samples: int = 3) -> Array:
    """Draw images [n, size, size, 3] uint8 of factor values [n, 6], each pixel the mean of samples x samples rays."""
    images = np.empty((len(factors), size, size, 3), np.uint8)
    geometries, which = np.unique(factors[:, 3:], axis=0, return_inverse=True)
    for i, (scale, shape, orbit) in enumerate(geometries):
        maps = _brightness(scale, int(shape), orbit, size * samples)
        maps = maps.reshape(4, size, samples, size, samples).mean((2, 4))
        for j in np.flatnonzero(which == i):
            colours = [colorsys.hsv_to_rgb(hue, 1, 1) for hue in factors[j, :3]] + [_SKY]
            images[j] = np.rint(255 * np.tensordot(maps, np.array(colours), (0, 0)))
    return images


def _brightness(scale: float, shape: int, orbit: float, size: int) -> Array:
    """Brightness [4, size, size] in [0, 1] of floor, walls, solid and sky; 0 where the ray meets another of them."""
    angle = np.deg2rad(orbit)
    eye = np.array([5.5 * np.sin(angle), 2.6, 5.5 * np.cos(angle)])
    ahead = np.array([0, 0.8, 0]) - eye
    ahead /= np.linalg.norm(ahead)
    right = np.cross(ahead, [0, 1, 0])
    right /= np.linalg.norm(right)
    across = 0.72 * ((np.arange(size) + 0.5) / size - 0.5)
    ray = ahead + across[None, :, None] * right - across[:, None, None] * np.cross(right, ahead)
    ray /= np.linalg.norm(ray, axis=-1, keepdims=True)

    # The room is seen from inside, or through its near walls: a ray ends at the far wall or on the floor before it.
    with np.errstate(divide="ignore"):
        to_wall = (np.sign(ray) * _ROOM - eye)[..., [0, 2]] / ray[..., [0, 2]]
        to_floor = np.where(ray[..., 1] < 0, -eye[1] / ray[..., 1], np.inf)
    side = to_wall.argmin(-1)
    to_wall = to_wall.min(-1)
    to_solid = _enter(shape, scale, eye, ray)
    distance = np.minimum(to_floor, to_wall)
    point = eye + distance[..., None] * ray

    solid = to_solid < distance
    floor = ~solid & (to_floor <= to_wall)
    wall = ~solid & ~floor & (point[..., 1] < _WALL)
    inward = -np.sign(np.take_along_axis(ray[..., [0, 2]], side[..., None], -1))[..., 0]
    shaded = np.isfinite(_enter(shape, scale, point[floor] + 1e-6 * _LIGHT, np.broadcast_to(_LIGHT, (floor.sum(), 3))))

    maps = np.zeros((4, size, size))
    maps[0, floor] = np.where(shaded, _AMBIENT, _lambert(_LIGHT[1]))
    maps[1, wall] = _lambert(inward * _LIGHT[[0, 2]][side])[wall]
    surface = eye + to_solid[solid][:, None] * ray[solid]
    maps[2, solid] = _lambert(_normal(shape, scale, surface) @ _LIGHT)
    maps[3] = ~solid & ~floor & ~wall
    return maps


def _lambert(cosine: Array | float) -> Array:
    return np.asarray(_AMBIENT + (1 - _AMBIENT) * np.clip(cosine, 0, 1))


def _enter(shape: int, scale: float, origin: Array, ray: Array) -> Array:
    """Distance along rays (..., 3) to the solid that stands on the floor at the centre; infinite where they miss it."""
    origin = origin - [0, _half_height(shape, scale), 0]
    if shape == CUBE:
        half = _half_height(shape, scale)
        return _first(*(_slab(origin, ray, axis, half) for axis in range(3)))
    if shape == CYLINDER:
        upright = _slab(origin, ray, 1, _half_height(shape, scale))
        return _first(upright, _round(origin, ray, [0, 2], 0.65 * scale))
    if shape == SPHERE:
        return _first(_round(origin, ray, [0, 1, 2], 0.85 * scale))
    radius, straight = 0.55 * scale, 0.45 * scale
    ends = [_first(_round(origin - [0, y, 0], ray, [0, 1, 2], radius)) for y in (-straight, straight)]
    middle = _first(_slab(origin, ray, 1, straight), _round(origin, ray, [0, 2], radius))
    return np.minimum(np.minimum(*ends), middle)


def _half_height(shape: int, scale: float) -> float:
    return scale * {CUBE: 0.65, CYLINDER: 0.75, SPHERE: 0.85, CAPSULE: 1.0}[shape]


def _normal(shape: int, scale: float, point: Array) -> Array:
    """Outward unit normals at points [m, 3] of the surface."""
    point = point - [0, _half_height(shape, scale), 0]
    if shape == CUBE:
        face = np.abs(point).argmax(-1)
        return np.asarray(np.eye(3)[face] * np.sign(point))
    if shape == CYLINDER:
        cap = np.abs(point[:, 1:2]) > _half_height(shape, scale) - 1e-6
        return np.where(cap, [0, 1, 0] * np.sign(point), point * [1, 0, 1] / (0.65 * scale))
    if shape == CAPSULE:
        straight = 0.45 * scale
        point = point - [0, 1, 0] * np.clip(point, -straight, straight)
    return np.asarray(point / np.linalg.norm(point, axis=-1, keepdims=True))


def _slab(origin: Array, ray: Array, axis: int, half: float) -> tuple[Array, Array]:
    """Distances at which rays enter and leave the space between two planes across an axis."""
    with np.errstate(divide="ignore"):
        a, b = ((end - origin[..., axis]) / ray[..., axis] for end in (-half, half))
    return np.minimum(a, b), np.maximum(a, b)


def _round(origin: Array, ray: Array, axes: list[int], radius: float) -> tuple[Array, Array]:
    """Distances at which rays enter and leave a sphere (three axes) or an endless cylinder (two)."""
    o, d = origin[..., axes], ray[..., axes]
    a, b, c = (d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - radius**2
    reach = b * b - a * c
    root = np.sqrt(np.maximum(reach, 0))
    return np.where(reach > 0, (-b - root) / a, np.inf), np.where(reach > 0, (-b + root) / a, -np.inf)


def _first(*spans: tuple[Array, Array]) -> Array:
    """Distance at which rays enter the common part of convex bodies, infinite where there is none ahead."""
    enter = np.maximum.reduce([span[0] for span in spans])
    leave = np.minimum.reduce([span[1] for span in spans])
    return np.where((enter < leave) & (leave > 0), enter, np.inf)
