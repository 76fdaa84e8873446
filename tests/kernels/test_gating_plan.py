from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vamoh.kernels._plan import Device
from vamoh.kernels.gating_plan import KL_POINTS, MOST_COMPONENTS, kl_splits, plan, refusal
from vamoh.kernels.inr_mixture_plan import PRECISIONS

H200, A100 = Device(90, 132), Device(80, 108)
DEVICES = st.sampled_from([H200, A100, Device(90, 3)])


@given(st.data())
def test_work_of_networks_is_covered_once(data):
    training = data.draw(st.booleans())
    batch, points = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 70_000))
    widths = (*data.draw(st.lists(st.integers(1, 300), max_size=4)), data.draw(st.integers(1, MOST_COMPONENTS)))
    precision, device = data.draw(st.sampled_from(PRECISIONS)), data.draw(DEVICES)
    p = plan("gating_backward" if training else "gating", batch, points, widths, precision, device)

    for size in (p.rows, p.inputs, *p.outputs):
        assert size >= 16 and size & (size - 1) == 0
    for width, padded, block in zip(widths, p.widths, p.outputs, strict=True):
        assert width <= padded < width + block and padded % block == 0 and padded % p.inputs == 0 and block >= p.inputs
    assert p.widths[-1] == p.outputs[-1] or training  # the logits of a point are in one block
    assert p.rows % p.inputs == 0
    assert (p.tiles - 1) * p.rows < points <= p.tiles * p.rows
    if not training:
        assert 1 <= p.programs <= p.tiles * batch and p.scratch == 2 * p.rows * max(p.widths)
        return
    assert p.programs == p.groups * p.shares
    for count, parts in ((p.tiles, p.groups), (batch, p.shares)):
        assert (parts - 1) * -(-count // parts) < count  # none is empty
    assert p.scratch == p.rows * (sum(p.widths) + 2 * max(p.widths))


def test_training_keeps_the_device_busy():
    for batch, points in ((64, 4096), (22, 4096), (256, 784), (1, 65536), (64, 4140)):
        p = plan("gating_backward", batch, points, (64, 32, 10), "tf32x3", H200)
        steps = -(-p.tiles // p.groups) * -(-batch // p.shares)
        assert p.tiles * batch >= 0.75 * steps * H200.programs(255, p.warps)


def test_divergences_of_few_functions_are_split():
    assert kl_splits(1, 100 * KL_POINTS, H200) == 100
    assert kl_splits(1, 1, H200) == 1
    assert kl_splits(10_000, 4 * KL_POINTS, H200) == 1


def test_a_plan_is_a_function_of_its_arguments():
    arguments = ("gating_backward", 64, 4096, (64, 32, 10), "tf32x3", H200)
    assert plan(*arguments) == plan(*arguments)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan(*arguments).rows = 1


def test_what_it_refuses():
    assert refusal((4, MOST_COMPONENTS)) is None
    assert refusal((4, 65)) == "takes at most 64 components, got 65"
    with pytest.raises(ValueError, match="^gating: backend 'triton' takes at most 64 components, got 65"):
        plan("gating", 1, 1, (4, 65), "ieee", H200)
