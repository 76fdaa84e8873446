from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vamoh.encoder import Encoder, PointConvLayer, check_neighborhoods
from vamoh.geometry import Neighborhood, Search, Stage, stage_neighborhoods
from vamoh.model import VaMoH
from vamoh.points import PointSet

STAGES = [Stage(8, 4, 3), Stage(6, 3, None), Stage(4, 3, 5)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build(stages: Any = STAGES, channels: int = 2, published: bool = True, slope: float | None = None) -> Encoder:
    torch.manual_seed(0)
    return Encoder(6, channels, 3, stages, (7, 4), slope, published).double()


def loops(encoder: Encoder, values: np.ndarray, encoded: np.ndarray, hoods: Any, slope: float | None) -> np.ndarray:
    """One function: every stage as the published code describes it."""
    convs = iter(encoder.convs)
    for stage, (centroids, neighbors) in zip(encoder.stages, hoods, strict=True):
        conv = None if stage.channels is None else next(convs)
        out = []
        for centroid, row in zip(centroids[0].tolist(), neighbors[0].tolist(), strict=True):
            if conv is None:
                out.append(values[row].mean(0))
                continue
            summed = 0
            for j in row:
                w = encoded[j] - encoded[centroid]
                for i, layer in enumerate(conv.weight_net):
                    w = np.where(w >= 0, w, slope * w) if i and slope is not None else w
                    w = layer.weight.detach().numpy() @ w + layer.bias.detach().numpy()
                summed = summed + np.outer(values[j], w)
            h = conv.linear.weight.detach().numpy() @ summed.ravel() + conv.linear.bias.detach().numpy()
            out.append(np.where(h >= 0, h, 0.2 * h))
        values, encoded = np.stack(out), encoded[centroids[0]]
    head = encoder.head
    return head.weight.detach().numpy() @ values.ravel() + head.bias.detach().numpy()


@pytest.mark.parametrize("slope", [None, 0.2])
def test_matches_loops(slope):
    encoder, values, encoded = build(slope=slope), draw(2, 20, 2), draw(1, 20, 6)
    hoods = stage_neighborhoods(encoder.stages, encoded, None)
    expected = np.stack([loops(encoder, v.numpy(), encoded[0].numpy(), hoods, slope) for v in values])
    torch.testing.assert_close(encoder(values, encoded, hoods).detach(), torch.from_numpy(expected))


def test_without_gradients_the_weights_of_the_moment_count():
    encoder, values, encoded = build(), draw(2, 20, 2), draw(1, 20, 6)
    hoods = stage_neighborhoods(encoder.stages, encoded, None)
    for layer in (encoder.convs[0].weight_net[0], encoder.convs[1].weight_net[1]):
        for parameter in (layer.weight, layer.bias):
            with torch.no_grad():
                parameter[0] += 1
                result = encoder(values, encoded, hoods)
                assert torch.equal(encoder(values, encoded, hoods), result)
            torch.testing.assert_close(result, encoder(values, encoded, hoods).detach())


def test_gradients():
    encoder = Encoder(2, 1, 1, [Stage(3, 2, 2), Stage(2, 2, 2)], (2,), 0.2, True).double()
    values, encoded = draw(2, 5, 1).requires_grad_(), draw(1, 5, 2, seed=1).requires_grad_()
    hoods = stage_neighborhoods(encoder.stages, encoded, None)
    assert torch.autograd.gradcheck(
        lambda v, e, *_: encoder(v, e, hoods), (values, encoded, *encoder.parameters()), atol=1e-6
    )


def test_neighborhoods_are_spread_centroids_and_nearest_points():
    encoder, metric = build(), draw(1, 30, 2)
    hoods = stage_neighborhoods(encoder.stages, metric, None)
    points = metric[0]
    for stage, (centroids, neighbors) in zip(STAGES, hoods, strict=True):
        assert centroids.shape == (1, stage.centroids) and neighbors.shape == (1, stage.centroids, stage.neighbors)
        chosen = centroids[0]
        assert chosen[0] == 0 and len(chosen.unique()) == len(chosen)
        for i in range(1, len(chosen)):
            gap = torch.cdist(points, points[chosen[:i]]).amin(1)
            assert gap[chosen[i]] == pytest.approx(float(gap.max()))
        distance = torch.cdist(points[chosen], points)
        nearest = distance.sort(1).indices[:, : stage.neighbors]
        assert torch.equal(neighbors[0].sort(1).values, nearest.sort(1).values)
        points = points[chosen]


def test_masked_items_see_only_their_points():
    """Also an item with fewer points than the first stage has centroids, and one with the least that is allowed."""
    encoder, metric, values = build(), draw(1, 12, 6), draw(3, 12, 2, seed=1)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 3:9] = False  # 6 points
    mask[2, 2:10] = False  # 4 points
    hoods = stage_neighborhoods(encoder.stages, metric, mask)
    assert hoods[0].centroids.shape == (3, 8) and (hoods[0].centroids[2] == -1).sum() == 4
    result = encoder(values, metric, hoods)
    for b in range(3):
        own = mask[b].nonzero()[:, 0]
        alone = stage_neighborhoods(encoder.stages, metric[:, own], None)
        torch.testing.assert_close(encoder(values[b : b + 1, own], metric[:, own], alone)[0], result[b])
        for i, (one, many) in enumerate(zip(alone, hoods, strict=True)):
            m = one.centroids.shape[1]
            to = own if i == 0 else torch.arange(99)
            assert torch.equal(to[one.centroids[0]], many.centroids[b, :m])
            assert torch.equal(to[one.neighbors[0]], many.neighbors[b, :m])


def test_too_few_points():
    model = VaMoH(coord_dim=2, channels=1, encoder_centroids=(8, 4), encoder_neighbors=(4, 3), encoder_channels=(3, 5))
    coords, values, mask = torch.rand(9, 2), torch.rand(2, 9, 1), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 3:] = False
    with pytest.raises(ValueError, match="^encoder: points must have at least 4 observed points per function .* got 3"):
        model.encode(PointSet(coords, values, mask))
    with pytest.raises(ValueError, match="at least 4 .* got 3"):
        model.encode(PointSet(coords[:3], values[:, :3]))


def test_the_fewest_points_cover_neighbors_and_the_head():
    assert Search([Stage(8, 7, 3), Stage(2, 2, 3)], True, True).min_points == 7
    assert Search([Stage(8, 2, 3), Stage(6, 2, 3)], True, True).min_points == 6
    encoder = build([Stage(8, 2, 3), Stage(6, 2, 3)])
    encoder(draw(1, 6, 2), draw(1, 6, 6), stage_neighborhoods(encoder.stages, draw(1, 6, 6), None))


def test_published_initialisation_is_that_of_linear_layers():
    torch.manual_seed(0)
    encoder = Encoder(32, 3, 5, [Stage(8, 4, 30)], (40, 50), None, published=True)
    for name, parameter in encoder.named_parameters():
        bound = encoder.get_parameter(name.replace("bias", "weight")).shape[1] ** -0.5
        assert float(parameter.detach().abs().max()) <= bound
        if name.endswith("weight"):
            assert float(parameter.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("neighbors", [3, 16])
def test_stable_layers_keep_the_scale_of_features(neighbors, width):
    torch.manual_seed(0)
    stages = [Stage(40, neighbors, width)] * 4
    encoder = Encoder(32, 3, 5, stages, (16, 16), None, published=False).double()
    phase = 2 * np.pi * torch.rand(40, 2, dtype=torch.float64) @ (2 * draw(2, 16))
    encoded = torch.cat([phase.cos(), phase.sin()], 1)[None]
    values = torch.rand(8, 40, 3, dtype=torch.float64)
    with torch.no_grad():
        for out in encoder.stage_outputs(values, encoded, stage_neighborhoods(encoder.stages, encoded, None)):
            assert 0.1 < float(out.square().mean().sqrt()) < 10
        logits = encoder(values, encoded, stage_neighborhoods(encoder.stages, encoded, None))
    assert (logits[:, 5:] == -3).all() and logits[:, :5].std() > 0.05


def test_first_layer_projects_points_not_pairs():
    """The projection is linear in the offset, so a shift of all coordinates changes nothing."""
    torch.manual_seed(0)
    layer = PointConvLayer(6, 2, 3, (5, 4), 0.2).double()
    features, encoded = draw(2, 9, 2), draw(1, 9, 6)
    centroids, neighbors = torch.tensor([[0, 4]]), torch.tensor([[[0, 1, 2], [4, 8, 8]]])
    shifted = layer(features, encoded + 3, centroids, neighbors)
    torch.testing.assert_close(shifted, layer(features, encoded, centroids, neighbors))


def hood(m: int, s: int, batch: int = 1, **changes: Tensor) -> Neighborhood:
    indices = Neighborhood(torch.zeros(batch, m, dtype=torch.int64), torch.zeros(batch, m, s, dtype=torch.int64))
    return indices._replace(**changes)


@pytest.mark.parametrize(
    ("hoods", "message"),
    [
        ([hood(8, 4)], "neighborhoods must have one entry per stage, 2, got 1"),
        (
            [hood(8, 4), hood(4, 3, 3)],
            r"centroids of neighborhoods\[1\] must be int64 with 2 dimensions and batch 1 or 2",
        ),
        ([hood(8, 4), hood(4, 3, centroids=torch.zeros(1, 4))], r"centroids of neighborhoods\[1\] must be int64"),
        ([hood(8, 4), hood(4, 3, neighbors=torch.zeros(4, 3).long())], r"neighbors of .* got torch.int64 \[4, 3\]"),
        ([hood(8, 4), hood(4, 2)], r"neighbors of neighborhoods\[1\] must have shape \[1, 4, 3\], got \[1, 4, 2\]"),
        ([hood(8, 4), hood(5, 3)], "the last neighborhood must have 4 centroids, got 5"),
        ([hood(8, 4, centroids=torch.full((1, 8), 9)), hood(4, 3)], "must index the 9 points before, got 9"),
        ([hood(8, 4), hood(4, 3, neighbors=torch.full((1, 4, 3), 8))], "must index the 8 points before, got 8"),
        ([hood(8, 4, neighbors=torch.full((1, 8, 4), -1)), hood(4, 3)], "must index the 9 points before, got -1"),
        ([hood(8, 4, centroids=torch.full((1, 8), -2)), hood(4, 3)], "must index the 9 points before, got -2"),
    ],
)
def test_wrong_neighborhoods(hoods, message):
    with pytest.raises(ValueError, match=f"^encoder: .*{message}"):
        check_neighborhoods(hoods, [Stage(8, 4, 3), Stage(4, 3, 5)], 2, 9)


def test_padding_centroids_pass_the_check():
    check_neighborhoods(
        [hood(8, 4, centroids=torch.full((1, 8), -1)), hood(4, 3)], [Stage(8, 4, 3), Stage(4, 3, 5)], 2, 9
    )


def test_features_keep_their_scale_at_any_depth() -> None:
    generator = torch.Generator().manual_seed(0)
    coords = torch.rand(512, 3, generator=generator) * 2 - 1
    points = PointSet(coords, (torch.rand(4, 512, 1, generator=generator) > 0.5).float())
    model = VaMoH(
        coord_dim=3,
        channels=1,
        encoder_centroids=(512, 256, 64, 32, 16),
        encoder_neighbors=(8, 27, 27, 27, 8),
        encoder_channels=(32, 64, 64, 64, 16),
        weight_net=(16, 16, 16, 16),
    )
    with torch.no_grad():
        encoded = model.encoding(coords)[None]
        stages = model.encoder.stage_outputs(points.values, encoded, model.neighborhoods(points))
    sizes = [stage.square().mean().sqrt().item() for stage in stages]
    assert all(0.2 < size < 2 for size in sizes), sizes
