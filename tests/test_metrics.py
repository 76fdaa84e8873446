"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vamoh import metrics


def test_mse_averages_points_and_channels_of_each_function() -> None:
    target = torch.zeros(2, 2, 2)
    prediction = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]]])
    assert metrics.mse(prediction, target).tolist() == [0.25, 0.25]


def test_masks_leave_points_out_shared_or_per_function() -> None:
    target = torch.zeros(2, 2, 1)
    prediction = torch.tensor([[[3.0], [1.0]], [[2.0], [5.0]]])
    assert metrics.mse(prediction, target, torch.tensor([False, True])).tolist() == [1.0, 25.0]
    assert metrics.mse(prediction, target, torch.tensor([[False, True], [True, False]])).tolist() == [1.0, 4.0]


def test_psnr_is_minus_ten_log10_of_the_error() -> None:
    target = torch.zeros(3, 4, 1, dtype=torch.float64)
    prediction = torch.stack([target[0] + 0.1, target[1] + 0.01, target[2]])
    assert metrics.psnr(prediction, target)[:2].tolist() == pytest.approx([20.0, 40.0])
    assert metrics.psnr(prediction, target)[2].item() == math.inf


def test_rmse_is_in_natural_units() -> None:
    target = torch.zeros(1, 4, 1)
    prediction = torch.tensor([[[0.3], [0.4], [0.0], [0.0]]])
    assert metrics.rmse(prediction, target, span=120.0).item() == pytest.approx(120 * 0.25)


def test_rmse_by_area_of_a_sphere() -> None:
    target, prediction = torch.zeros(1, 3, 1), torch.tensor([[[0.3], [0.6], [0.5]]])
    weight = torch.tensor([1.0, 0.5, 0.0])
    expected = math.sqrt((0.09 + 0.5 * 0.36) / 1.5)
    assert metrics.rmse(prediction, target, weight=weight).item() == pytest.approx(expected)
    seen = torch.tensor([False, True, True])
    assert metrics.rmse(prediction, target, seen, span=2.0, weight=weight).item() == pytest.approx(2 * 0.6)
    with pytest.raises(ValueError, match=r"rmse: weight must have shape \[3\], got \[2\]"):
        metrics.rmse(prediction, target, weight=weight[:2])


def test_ranks_count_the_draws_below() -> None:
    draws = torch.tensor([0.1, 0.5, 0.9])[:, None, None, None].expand(-1, 1, 4, 1)
    target = torch.tensor([0.0, 0.2, 0.6, 1.0])[None, :, None]
    assert metrics.ranks(draws, target).flatten().tolist() == [0, 1, 2, 3]


def test_ranks_among_equals_are_drawn() -> None:
    draws = torch.tensor([0.0, 0.5, 0.5, 1.0])[:, None, None, None].expand(-1, 1, 3000, 1)
    found = metrics.ranks(draws, torch.full((1, 3000, 1), 0.5), torch.Generator().manual_seed(0))
    counts = found.flatten().bincount(minlength=5).tolist()
    # Three places of 1000 expected counts; their standard deviation is 26.
    assert counts[0] == counts[4] == 0 and all(abs(count - 1000) < 110 for count in counts[1:4])


def test_ranks_of_what_is_drawn_alike_are_alike() -> None:
    """Values of eight levels, so that many are equal."""
    values = torch.randint(8, (5, 1, 20_000, 1), generator=torch.Generator().manual_seed(0)).float()
    found = metrics.ranks(values[:4], values[4], torch.Generator().manual_seed(1))
    counts = found.flatten().bincount(minlength=5)
    assert (counts - 4000).abs().max() < 5 * math.sqrt(4000)


def test_iou_counts_points_at_or_above_the_threshold() -> None:
    target = torch.tensor([[[1.0], [1.0], [0.0], [0.0]]])
    prediction = torch.tensor([[[0.5], [0.49], [0.9], [0.1]]])
    assert metrics.iou(prediction, target).item() == pytest.approx(1 / 3)
    assert metrics.iou(prediction, target, torch.tensor([True, True, False, True])).item() == pytest.approx(1 / 2)


def test_iou_of_two_empty_functions_is_one() -> None:
    assert metrics.iou(torch.zeros(1, 3, 1), torch.zeros(1, 3, 1)).item() == 1.0


def test_uniform_probability_over_256_levels_takes_eight_bits() -> None:
    points, channels = 5, 3
    nats = torch.tensor([points * channels * math.log(1 / 256)], dtype=torch.float64)
    assert metrics.bits_per_dim(nats, points, channels).item() == pytest.approx(8.0)


def test_a_function_without_a_counted_point_is_nan() -> None:
    target = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]])[..., None]
    mask = torch.tensor([[True, False, True], [False, False, False]])
    halved = target / 2
    for result, first in (
        (metrics.mse(halved, target, mask), 0.125),
        (metrics.rmse(halved, target, mask), 0.125**0.5),
        (metrics.iou(target, target, mask), 1.0),
    ):
        assert float(result[0]) == pytest.approx(first)
        assert bool(result[1].isnan())


def test_mismatched_arguments_are_named() -> None:
    good = torch.zeros(2, 3, 1)
    with pytest.raises(ValueError, match=r"psnr: prediction must have shape \[2, 3, 1\], got \[2, 4, 1\]"):
        metrics.psnr(torch.zeros(2, 4, 1), good)
    with pytest.raises(TypeError, match=r"mse: prediction must have dtype torch.float32, got torch.float64"):
        metrics.mse(good.double(), good)
    with pytest.raises(ValueError, match=r"iou: mask must have shape \[3\] or \[2, 3\], got \[4\]"):
        metrics.iou(good, good, torch.ones(4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mse: mask must have dtype bool, got float32"):
        metrics.mse(good, good, torch.ones(3))
    with pytest.raises(ValueError, match=r"bits_per_dim: points must be at least 1, got 0"):
        metrics.bits_per_dim(torch.zeros(1), 0, 1)


def test_crps_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(5, 2, 7, 3, dtype=torch.float64, generator=generator)
    target = torch.rand(2, 7, 3, dtype=torch.float64, generator=generator)
    mask = torch.rand(2, 7, generator=generator) < 0.7
    for b, score in enumerate(metrics.crps(draws, target, mask).tolist()):
        each = []
        for n in mask[b].nonzero()[:, 0].tolist():
            for c in range(3):
                x, y = draws[:, b, n, c].tolist(), float(target[b, n, c])
                apart = sum(abs(p - q) for p in x for q in x) / 25
                each.append(sum(abs(p - y) for p in x) / 5 - apart / 2)
        assert score == pytest.approx(sum(each) / len(each), rel=1e-12)
    one = metrics.crps(draws[:1], target)
    torch.testing.assert_close(one, (draws[0] - target).abs().mean((1, 2)))
    # Of a normal distribution, at its mean: sd (sqrt 2 - 1) / sqrt pi.
    normal = torch.randn(4000, 1, 20, 1, dtype=torch.float64, generator=generator)
    found = metrics.crps(normal, torch.zeros(1, 20, 1, dtype=torch.float64))
    assert found.item() == pytest.approx((2**0.5 - 1) / torch.pi**0.5, rel=0.02)
