from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vamoh.kernels._plan import MOST_PARTIAL, Device
from vamoh.kernels.planar_flow_plan import MOST_LATENT, MOST_ROWS, OPS, kernel_of, plan, refusal

H200, A100 = Device(90, 132), Device(80, 108)


@given(st.data())
def test_work_is_covered_once(data):
    op = data.draw(st.sampled_from(OPS))
    samples, latent, layers = (data.draw(st.integers(1, m)) for m in (9000, MOST_LATENT, 100))
    batch = 1 if op in ("log_prob", "sample", "backward") else data.draw(st.integers(1, 300))
    device = data.draw(st.sampled_from([H200, A100, Device(90, 3)]))
    p = plan(op, samples, batch, latent, layers, device)

    for size in (p.rows, p.latent, p.warps):
        assert size & (size - 1) == 0
    assert latent <= p.latent < max(2 * latent, 5)
    assert 1 <= p.rows <= MOST_ROWS and p.rows < 2 * samples
    assert p.rows * p.latent <= 512 * p.warps or p.warps == 1 or p.rows * p.latent // 512 < 2 * p.warps
    assert p.rows * p.latent <= 4096
    assert (p.tiles - 1) * p.rows < samples <= p.tiles * p.rows
    each = -(-p.tiles // p.splits)
    assert (p.splits - 1) * each < p.tiles  # no share is empty
    assert 1 <= p.programs <= batch * p.splits
    training = kernel_of(op) == "train"
    assert p.scratch == layers * (4 + 3 * training * p.rows)
    size = 4 * (2 * layers * latent + 2 * layers + 4 * latent)
    assert p.splits == 1 or not training or p.splits * batch * size <= MOST_PARTIAL


def test_few_samples_are_spread():
    assert plan("expected", 16, 64, 64, 80, H200).rows == 4
    assert plan("expected", 4096, 64, 64, 80, H200).rows == 32
    assert plan("expected", 4096, 1, 64, 80, H200).splits > 100
    assert plan("log_prob", 1, 1, 64, 80, H200).splits == 1


def test_a_plan_is_a_function_of_its_arguments():
    arguments = ("expected", 4096, 64, 64, 80, H200)
    assert plan(*arguments) == plan(*arguments)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan(*arguments).rows = 1


def test_what_it_refuses():
    assert refusal(MOST_LATENT) is None
    assert refusal(MOST_LATENT + 1) == "takes at most 1024 dimensions, got 1025"
    with pytest.raises(ValueError, match="^planar_flow: backend 'triton' takes at most 1024 dimensions, got 1025"):
        plan("value", 1, 1, 1025, 1, H200)
