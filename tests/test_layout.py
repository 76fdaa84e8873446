from __future__ import annotations

import pytest
import torch

from vamoh.layout import packed_size, unpack


def test_all_weights_before_all_biases_row_major():
    widths = (2, 3, 1)
    assert packed_size(widths) == 2 * 3 + 3 * 1 + 3 + 1
    theta = torch.arange(13.0)
    (w0, b0), (w1, b1) = unpack(theta, widths)
    assert w0.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert w1.tolist() == [[6, 7, 8]]
    assert b0.tolist() == [9, 10, 11]
    assert b1.tolist() == [12]


def test_parts_are_views_of_any_batch():
    theta = torch.zeros(4, 5, 13)
    for weight, bias in unpack(theta, (2, 3, 1)):
        assert weight.shape[:2] == bias.shape[:2] == (4, 5)
        weight += 1
        bias += 1
    assert (theta == 1).all()


@pytest.mark.parametrize(
    ("widths", "error", "message"),
    [
        ((3,), ValueError, r"widths must list at least input and output, got \[3\]"),
        ((3, 0), ValueError, "every width must be at least 1, got 0"),
        ((3, 2.0), TypeError, "every width must be an int, got 2.0"),
    ],
)
def test_bad_widths(widths, error, message):
    with pytest.raises(error, match=f"^layout: {message}"):
        packed_size(widths)


def test_wrong_size():
    with pytest.raises(ValueError, match=r"theta must have shape \[\.\.\., P\] with P=13 .*, got \[2, 12\]"):
        unpack(torch.zeros(2, 12), (2, 3, 1))
