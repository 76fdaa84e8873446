"""What follows from the coordinates of a batch: features, mirror, and the neighbourhoods of the encoder's stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vamoh._cache import ContentCache
from vamoh._checks import skip_value_checks, values_readable
from vamoh.encoding import FourierFeatures
from vamoh.ops.farthest_point_sample import farthest_point_sample
from vamoh.ops.knn import knn
from vamoh.ops.point_conv import gather
from vamoh.points import upload


class Neighborhood(NamedTuple):
    """Where one encoder stage looks: int64 indices into the points of the stage before (the first: the N points).

    centroids [B, M] and neighbors [B, M, S], of batch 1 where the whole batch shares them. A centroid of -1 pads a
    function that has fewer points than M.
    """

    centroids: Tensor
    neighbors: Tensor


Neighborhoods = tuple[Neighborhood, ...]


class Stage(NamedTuple):
    """Sizes of one stage: M centroids, S neighbours, and output channels of a convolution (None: average pooling)."""

    centroids: int
    neighbors: int
    channels: int | None


class Sites(NamedTuple):
    """Where fixed centroids look.

    coords [R, D], without repetition: a neighbour is the observed point nearest to one of them. members int64
    [M, S]: which of them belong to each. later: the neighbourhoods of the stages after the first, which no data change.
    """

    coords: Tensor
    members: Tensor
    later: Neighborhoods


class Search(NamedTuple):
    """How neighbours are found.

    encoded: nearest by features, else by coordinates. ordered: points are taken in the order of their coordinates, so
    that the order in which they come plays no part. sites: of fixed centroids; None: centroids are points of the cloud.
    """

    stages: Sequence[Stage]
    encoded: bool
    ordered: bool
    sites: Sites | None = None

    @property
    def min_points(self) -> int:
        """Fewest observed points of a function: enough neighbours everywhere, and every point the head reads.

        One is enough for fixed centroids.
        """
        if self.sites is not None:
            return 1
        return max(self.stages[-1].centroids, *(stage.neighbors for stage in self.stages))


class Geometry(NamedTuple):
    """What a model needs to know of where the points of a batch are.

    features [N, E], or [B, N, E] of coordinates of their own for every function; mirror int64 [N], the point at -x for
    the point at x, -1 where there is none; None where it saves nothing. neighborhoods: one per encoder stage.
    """

    features: Tensor
    mirror: Tensor | None
    neighborhoods: Neighborhoods


def geometry(
    coords: Tensor,
    mask: Tensor | None,
    encoding: FourierFeatures,
    cache: ContentCache[Any],
    search: Search | None,
    mirrored: bool = True,
) -> Geometry:
    """The geometry of points at coords [N, D] or [B, N, D], observed where mask [B, N] (None: everywhere) is True.

    Without a search there are no neighborhoods, unless mirrored no mirror. What one function gets never depends on
    which points the others observe, nor on where the others' are. Everything is remembered in `cache`, for coordinates
    and masks that are used again; but features that need a gradient are computed anew, as all is under torch.compile,
    where the search is one step of the graph and there is no mirror.

    Raises ValueError for a function with too few observed points.
    """
    found = () if search is None else _neighborhoods(coords, mask, encoding, cache, search)
    mirror = find_mirror(coords, encoding, cache) if mirrored else None
    return Geometry(features(coords, encoding, cache), mirror, found)


def features(coords: Tensor, encoding: FourierFeatures, cache: ContentCache[Any]) -> Tensor:
    """Features [..., E] of coords [..., D]."""
    frequencies = encoding.frequencies
    raw = not len(frequencies)  # a remembered result would be the caller's own tensor
    if raw or torch.compiler.is_compiling() or coords.requires_grad or frequencies.requires_grad:
        return encoding(coords)  # type: ignore[no-any-return]
    key = (coords, frequencies, *encoding.domain)
    result: Tensor = cache.get(key, lambda: encoding(coords), "features")
    return result


def find_mirror(coords: Tensor, encoding: FourierFeatures, cache: ContentCache[Any]) -> Tensor | None:
    """The mirror of normalised coords [N, D]: cosines of x and -x are equal, sines opposite.

    None where that saves nothing: raw coordinates, coordinates of their own for every function, few such points; and
    under torch.compile, as it depends on the values.
    """
    if not len(encoding.frequencies) or coords.dim() != 2 or torch.compiler.is_compiling():
        return None
    if len(coords) > _REMEMBERED and coords.device.type == "cpu":
        return mirror(encoding.normalized(coords.detach()))
    key = (coords, *encoding.domain)
    found: Tensor | None = cache.get(key, lambda: mirror(encoding.normalized(coords.detach())), "mirror")
    return found


_REMEMBERED = 1 << 18
"""Most points of a grid whose mirror is remembered."""


def copy_to_device(
    coords: Tensor, mask: Tensor | None, encoding: FourierFeatures, cache: ContentCache[Any], again: bool
) -> tuple[Tensor, Tensor | None]:
    """Copies of coords [..., N, D] and mask [..., N] from host memory in that of the frequencies.

    The mirror and the lattice are found here, in host memory: reading the copies would wait for the device. again: the
    same coordinates will be used again; they have one copy then. Otherwise there is no mirror.
    """

    def copy() -> tuple[Tensor, Tensor | None]:
        device = encoding.frequencies.device
        copies = upload(coords, device), None if mask is None else upload(mask, device)
        if len(encoding.frequencies):
            found = _lattice(coords, mask)
            found = found and Lattice(upload(found.cells, device), found.sizes, found.step)
            cache.put(copies, found, "lattice")
            there = find_mirror(coords, encoding, cache) if again else None
            there = None if there is None else upload(there, device)
            cache.put((copies[0], *encoding.domain), there, "mirror")
        return copies

    if not again:
        return copy()
    copies: tuple[Tensor, Tensor | None] = cache.get((coords, mask), copy, "copies")
    return copies


def _neighborhoods(
    coords: Tensor, mask: Tensor | None, encoding: FourierFeatures, cache: ContentCache[Any], search: Search
) -> Neighborhoods:
    sites = search.sites
    if torch.compiler.is_compiling() and mask is None:
        sizes = [size for stage in search.stages for size in stage[:2]]
        index = neighborhoods_in_graph(
            encoding.normalized(coords.detach() if coords.dim() == 3 else coords.detach()[None]),
            encoding.frequencies.detach() if search.encoded else None,
            sizes,
            search.ordered,
            None if sites is None else encoding.normalized(sites.coords),
            None if sites is None else sites.members,
        )
    else:
        index = _remembered(coords, mask, encoding, cache, search)
    if sites is None:
        return tuple(Neighborhood(*pair) for pair in zip(index[::2], index[1::2], strict=True))
    (neighbors,) = index
    centroids = torch.arange(coords.shape[-2], coords.shape[-2] + len(sites.members), device=coords.device)
    return (Neighborhood(centroids.expand(neighbors.shape[0], -1), neighbors), *sites.later)


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def _remembered(
    coords: Tensor, mask: Tensor | None, encoding: FourierFeatures, cache: ContentCache[Any], search: Search
) -> list[Tensor]:
    frequencies = encoding.frequencies if search.encoded else None
    sites = None if search.sites is None else search.sites.coords
    key = (coords, mask, sites, frequencies, *encoding.domain)
    found: list[Tensor] = cache.get(key, lambda: find_neighbors(coords, mask, encoding, cache, search), "neighbors")
    return found


def find_neighbors(
    coords: Tensor, mask: Tensor | None, encoding: FourierFeatures, cache: ContentCache[Any], search: Search
) -> list[Tensor]:
    """Indices of every stage in turn, centroids [B|1, M] and neighbors [B|1, M, S]; with sites those neighbors alone.

    coords and mask as in `geometry`.
    """
    counts = [coords.shape[-2]]
    if mask is not None and values_readable(mask):
        counts = cache.read((mask,), partial(observed_counts, mask), "observed")
    fewest, most = min(counts), max(counts)
    if fewest < search.min_points:
        raise ValueError(
            f"encoder: points must have at least {search.min_points} observed points per function "
            f"(neighbours and last centroids of the encoder), got {fewest}"
        )
    own, sites = coords.dim() == 3, search.sites
    encoded = search.encoded and len(encoding.frequencies) > 0
    cloud, seen = coords, mask if own else None
    if sites is not None:  # points that every function observes, behind its own
        cloud = torch.cat([coords, sites.coords.expand(*coords.shape[:-2], -1, -1)], -2)
        seen = None if seen is None else torch.cat([seen, seen.new_ones(len(seen), len(sites.coords))], 1)
    targets = search.stages[0].centroids if sites is None else len(sites.coords)
    found = None
    in_host = coords.device.type == "cpu"
    if encoded if sites is None else in_host:  # else distances are as quick without, or the device would be waited for
        found = _lattice_worth_a_table(cloud, seen, fewest * targets, cache)
        if found is None and in_host and (mask is not None or (own and len(coords) > 1)):
            each = _each_alone(coords, mask, search, targets)
            if each is not None:
                return _one_by_one(coords, each, encoding, cache, search)
    metric, table = _measure(cloud, found, encoding, encoded, cache)
    metric = metric if own else metric[None]
    order = lexicographic(coords if own else coords[None]) if search.ordered else None  # [B|1, N]
    order = None if order is None or _is_identity(order) else order
    points, queries = metric[:, : coords.shape[-2]], metric[:, coords.shape[-2] :]
    if order is not None:
        points = gather(points, order)
        mask = None if mask is None else mask.gather(1, order.expand(len(mask), -1))
    batch = len(points) if mask is None else len(mask)
    with skip_value_checks():
        if sites is None:
            index = [i for hood in stage_neighborhoods(search.stages, points, mask, table, most) for i in hood]
        else:
            points, queries = points.expand(batch, -1, -1), queries.expand(batch, -1, -1)
            index = [knn(points, queries, 1, mask, table=table)[:, sites.members.flatten(), 0]]
            index = [index[0].view(-1, *sites.members.shape)]
    return index if order is None else _numbered(index, order.expand(batch, -1), sites is None)


def observed_counts(mask: Tensor) -> list[int]:
    """Observed points of every function."""
    counts: list[int] = mask.sum(-1).flatten().tolist()
    return counts


def stage_neighborhoods(
    stages: Sequence[Stage], metric: Tensor, mask: Tensor | None, table: Tensor | None = None, most: int | None = None
) -> Neighborhoods:
    """Neighborhood of every stage: farthest-point samples of the points before, and the nearest of these to each.

    metric [B|1, N, E] and table as the ops on point clouds take them; mask [B, N]. most: points of the function that
    observes most of them, N by default.
    """
    found = []
    if mask is not None:
        metric = metric.expand(mask.shape[0], -1, -1)
    most = metric.shape[1] if most is None else most
    for stage in stages:
        most = min(stage.centroids, most)
        centroids = farthest_point_sample(metric, most, mask, table=table)  # [B|1, M]
        queries = gather(metric, centroids.clamp(min=0))
        found.append(Neighborhood(centroids, knn(metric, queries, stage.neighbors, mask, table=table)))
        metric, mask = queries, None if mask is None else centroids >= 0
    return tuple(found)


def _numbered(index: list[Tensor], numbers: Tensor, centroids: bool) -> list[Tensor]:
    """The first stage's indices, which count some points, by the numbers [B, n] of these; later ones stay."""
    first, later = index[: 1 + centroids], index[1 + centroids :]
    return [numbers.gather(1, i.clamp(min=0).flatten(1)).view_as(i).where(i >= 0, -1) for i in first] + later


def _is_identity(order: Tensor) -> bool:
    """Whether an order changes nothing, as that of a grid; False where reading it would wait for the device."""
    return order.device.type == "cpu" and bool((order == torch.arange(order.shape[1])).all())


def _each_alone(coords: Tensor, mask: Tensor | None, search: Search, targets: int) -> list[Tensor] | None:
    """Which points [n] each function observes, if the points of one of them are worth a table of its own."""
    batch = len(coords) if mask is None else len(mask)
    each = [torch.arange(coords.shape[-2])] * batch if mask is None else [row.nonzero()[:, 0] for row in mask]
    sites = coords[..., :0, :] if search.sites is None else search.sites.coords
    for b, index in enumerate(each):
        cloud = torch.cat([(coords[b] if coords.dim() == 3 else coords)[index], sites.view(-1, coords.shape[-1])])
        if _worth_a_table(find_lattice(cloud), len(index) * targets):
            return each
    return None


def _one_by_one(
    coords: Tensor, each: list[Tensor], encoding: FourierFeatures, cache: ContentCache[Any], search: Search
) -> list[Tensor]:
    """As `find_neighbors`, one function after another: of points `each` [n], as if these were all there is."""
    rows = []
    for b, index in enumerate(each):
        cloud = (coords[b] if coords.dim() == 3 else coords)[index]
        alone = find_neighbors(cloud, None, encoding, cache, search)
        rows.append(_numbered(alone, index[None], search.sites is None))
    pad = torch.nn.utils.rnn.pad_sequence
    return [
        pad([i[0] for i in stage], batch_first=True, padding_value=-1 if stage[0].dim() == 2 else 0)
        for stage in zip(*rows, strict=True)
    ]


_TRACED: ContentCache[Any] = ContentCache()
"""What `neighborhoods_in_graph` remembers: a compiled or exported program has no model to do so."""


@torch.library.custom_op(
    "vamoh::neighborhoods",
    mutates_args=(),
    schema="(Tensor coords, Tensor? frequencies, int[] sizes, bool ordered, Tensor? sites, Tensor? members)"
    " -> Tensor[]",
)
def neighborhoods_in_graph(
    coords: Tensor,
    frequencies: Tensor | None,
    sizes: Sequence[int],
    ordered: bool,
    sites: Tensor | None,
    members: Tensor | None,
) -> list[Tensor]:
    """`find_neighbors` as one step of a traced graph, because values decide on its way.

    coords [B|1, N, D], all observed; frequencies [E/2, D], or None for neighbours in raw coordinates; sizes: M and S of
    every encoder stage in turn; sites [R, D] and members [M, S] as in `Sites`.
    """
    stages = [Stage(m, s, None) for m, s in zip(sizes[::2], sizes[1::2], strict=True)]
    encoding = FourierFeatures.of(coords.new_empty(0, coords.shape[-1]) if frequencies is None else frequencies)
    where = None if sites is None or members is None else Sites(sites, members, ())
    return find_neighbors(coords, None, encoding, _TRACED, Search(stages, frequencies is not None, ordered, where))


@neighborhoods_in_graph.register_fake
def _(
    coords: Tensor,
    frequencies: Tensor | None,
    sizes: Sequence[int],
    ordered: bool,
    sites: Tensor | None,
    members: Tensor | None,
) -> list[Tensor]:
    batch, count, _ = coords.shape
    if members is not None:
        return [coords.new_empty((batch, *members.shape), dtype=torch.int64)]
    found = []
    for m, s in zip(sizes[::2], sizes[1::2], strict=True):
        count = min(m, count)
        found += [coords.new_empty((batch, count, *more), dtype=torch.int64) for more in ((), (s,))]
    return found


def measure(
    coords: Tensor, encoding: FourierFeatures, encoded: bool, cache: ContentCache[Any], distances: int
) -> tuple[Tensor, Tensor | None]:
    """Points [N, E] and table, as the ops on point clouds take them, at coords [N, D].

    distances: about how many will be read. encoded: between features, not between coordinates.
    """
    encoded = encoded and len(encoding.frequencies) > 0
    found = _lattice_worth_a_table(coords, None, distances, cache) if coords.device.type == "cpu" else None
    return _measure(coords, found, encoding, encoded, cache)


@torch.no_grad()
def _measure(
    coords: Tensor, lattice: Lattice | None, encoding: FourierFeatures, encoded: bool, cache: ContentCache[Any]
) -> tuple[Tensor, Tensor | None]:
    """As `measure`, for coords [..., N, D] on that lattice, or on none.

    In the table δ and -δ are equally far; between features rounding decides.
    """
    if lattice is None:
        return (features(coords, encoding, cache) if encoded else encoding.normalized(coords)), None
    step, like = encoding.steps(lattice.step), encoding.frequencies
    key = (like if encoded else None, torch.tensor(lattice.sizes), step)

    def table() -> Tensor:
        squared = _encoded_distances(lattice.sizes, step, like) if encoded else _distances(lattice.sizes, step)
        return squared.to(like)

    return lattice.cell_index(), cache.get(key, table, "table")


def _distances(sizes: Sequence[int], step: Tensor) -> Tensor:
    """Squared length of every displacement on a lattice, float64, numbered as by `Lattice.cell_index`."""
    relative = (step / step[0]).tolist()  # whole numbers where steps are equal, so that equal distances are
    offsets = [torch.arange(1 - n, n, dtype=torch.float64) * r for n, r in zip(sizes, relative, strict=True)]
    squared = [offset.square() for offset in torch.meshgrid(*offsets, indexing="ij")]
    return torch.stack(squared).sum(0).flatten() * step[0].square()


def _encoded_distances(sizes: Sequence[int], step: Tensor, frequencies: Tensor) -> Tensor:
    """As `_distances`, between the features of both ends.

    Σ_f 2 - 2 cos 2πf·δ, where the angle is a sum over the axes: its cosine and sine come from theirs, axis by axis,
    and the last axis is a matrix product. δ and -δ are equally far, so half of the displacements will do.
    """
    waves: list[tuple[Tensor, Tensor]] = []
    for n, width, frequency in zip(sizes, step.tolist(), frequencies.mT, strict=True):
        offset = torch.arange(1 - n, n if waves else 1, dtype=torch.float64, device=frequency.device)[:, None]
        angle = offset * (2 * math.pi * width * frequency.double())
        waves.append((angle.cos(), angle.sin()))
    last = waves.pop()
    cosine, sine = waves[0] if waves else (torch.ones_like(last[0][:1]), torch.zeros_like(last[1][:1]))
    for c, s in waves[1:]:
        cosine, sine = cosine[:, None], sine[:, None]
        cosine, sine = (cosine * c - sine * s).flatten(0, 1), (sine * c + cosine * s).flatten(0, 1)
    total = torch.cat([cosine, -sine], 1) @ torch.cat(last, 1).mT
    half = 2 * (len(frequencies) - total.flatten()[: math.prod(2 * n - 1 for n in sizes) // 2])
    squared: Tensor = torch.cat([half, half.new_zeros(1), half.flip(0)])
    return squared.clamp_(min=0)


_SMALL_TABLE = 1 << 18
"""Entries of a table that is always worth its computation: that of 32^3 voxels has fewer."""

_LARGEST_TABLE = 1 << 22


def _worth_a_table(lattice: Lattice | None, distances: int) -> bool:
    """Whether a table of its distances is small, or has fewer entries than distances will be read."""
    return lattice is not None and lattice.displacements <= min(max(distances, _SMALL_TABLE), _LARGEST_TABLE)


def _lattice_worth_a_table(
    coords: Tensor, mask: Tensor | None, distances: int, cache: ContentCache[Any]
) -> Lattice | None:
    found: Lattice | None = cache.get((coords, mask), lambda: _lattice(coords, mask), "lattice")
    return found if _worth_a_table(found, distances) else None


@dataclass(frozen=True, eq=False)
class Lattice:
    """Points at whole multiples of a step per axis, as those of a regular grid or some of them.

    cells [..., D] int64, from 0; sizes: cells per axis; step [D] float64 in host memory, in units of the coordinates.
    """

    cells: Tensor
    sizes: tuple[int, ...]
    step: Tensor

    @property
    def displacements(self) -> int:
        """Number T of displacements between cells: 2n - 1 per axis of n cells."""
        return math.prod(2 * n - 1 for n in self.sizes)

    def cell_index(self) -> Tensor:
        """Flat index of every point's cell, int64 [..., 1], such that T // 2 + p - q is that of the displacement q to p
        in a row-major table [2n - 1, ...] of all displacements, from -(n - 1) to n - 1 per axis.
        """
        index = torch.zeros_like(self.cells[..., :1])
        for axis, n in enumerate(self.sizes):
            index = index * (2 * n - 1) + self.cells[..., axis : axis + 1]
        return index


def find_lattice(coords: Tensor) -> Lattice | None:
    """The coarsest lattice that coords [..., D] lie on; None if it has more than 4096 cells an axis.

    A coordinate may be off by what rounding to float32 leaves of it. Some of the points of a lattice lie on one with no
    more cells.
    """
    flat = coords.detach().double().flatten(0, -2)
    if not flat.numel():
        return None
    cells: list[Tensor] = []
    sizes: list[int] = []
    steps: list[float] = []
    for x in flat.unbind(-1):
        tolerance = float(x.abs().max()) * 2**-21
        values = x.unique()
        gaps = values.diff()
        gaps = gaps[gaps > tolerance]
        low, extent = values[0], float(values[-1] - values[0])
        intervals, step, cell = 0, 1.0, torch.zeros_like(x)
        if not len(gaps) and extent > tolerance:
            return None
        while len(gaps):  # Euclid's algorithm, for all gaps at once
            least = gaps.min()
            intervals = round(extent / float(least))
            if intervals >= _MOST_CELLS:
                return None
            step = extent / intervals
            if steps and abs(step - steps[0]) * intervals < tolerance / 4:
                step = steps[0]
            cell = ((x - low) / step).round()
            if ((x - low - cell * step).abs() <= tolerance).all():
                break
            rest = (gaps - least * (gaps / least).round()).abs()
            rest = rest[rest > extent / (2 * _MOST_CELLS)]
            if not len(rest):
                return None
            gaps = torch.cat([rest, least[None]])
        cells.append(cell.long())
        sizes.append(intervals + 1)
        steps.append(step)
    shape = (*coords.shape[:-1], len(sizes))
    return Lattice(torch.stack(cells, -1).reshape(shape), tuple(sizes), torch.tensor(steps, dtype=torch.float64))


_MOST_CELLS = 4096
"""Per axis of a lattice."""


def _lattice(coords: Tensor, mask: Tensor | None) -> Lattice | None:
    """Lattice of the points that mask [..., N] leaves of coords [..., N, D]; the others count as one of them."""
    return find_lattice(coords if mask is None else coords.where(mask[..., None], coords[mask][:1]))


_CHUNK = 1 << 20
"""Points of a fine grid that are compared at once, which bounds the memory."""


def mirror(coords: Tensor) -> Tensor | None:
    """The point at -x for the point at x: index int64 [N], -1 where there is none, or None if few have one.

    coords [N, D]. -x is what rounding to float32 leaves of it; a point at the origin is its own. Symmetric grids let
    the coordinate networks be computed for half of the points.
    """
    count = coords.shape[0]
    largest = coords.abs().max() if coords.numel() else coords.new_zeros(())
    tolerance = largest * 2**-22
    parts = [slice(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK)]
    reflected = ((coords[p] + coords[count - p.stop : count - p.start].flip(0)).abs() <= tolerance for p in parts)
    if all(bool(same.all()) for same in reflected):  # the usual grid, in row-major order
        return torch.arange(count - 1, -1, -1, device=coords.device)
    index = torch.arange(count, device=coords.device)
    cells = torch.round(coords / largest * 2**14).long()
    key = coords.new_zeros(count, dtype=torch.int64)
    for column in cells.unbind(-1):  # odd in x, so that -x has the negative key; wraps around
        key = key * 0x9E3779B1 + column
    order = key.argsort(stable=True)
    sorted_key = key[order]
    if torch.equal(sorted_key, -sorted_key.flip(0)):  # every point has one, unless keys coincide
        partner = torch.empty_like(index)
        partner[order] = (-key).argsort(stable=True)
        if ((coords + coords[partner]).abs() <= tolerance).all():
            return partner
    first, end = torch.searchsorted(sorted_key, -key), torch.searchsorted(sorted_key, -key, right=True)
    rank = torch.empty_like(index)
    rank[order] = index - torch.searchsorted(sorted_key, sorted_key)
    partner = order[(first + rank).clamp(max=count - 1)]
    near = (coords + coords[partner]).abs().le(tolerance).all(-1)
    found = torch.where((first + rank < end) & near, partner, -1)
    return found if int((found >= 0).sum()) >= 7 / 8 * count else None


def lexicographic(coords: Tensor) -> Tensor:
    """Order int64 [..., N] in which points at coords [..., N, D] are sorted by their first coordinate, then the next.

    The same for the same points in any order.
    """
    order = coords[..., -1].argsort(dim=-1, stable=True)
    for column in reversed(coords.unbind(-1)[:-1]):
        order = order.gather(-1, column.gather(-1, order).argsort(dim=-1, stable=True))
    return order
