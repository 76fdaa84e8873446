from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vamoh.kernels._plan import MOST_PARTIAL, Device
from vamoh.kernels.inr_mixture_plan import MOST_SCRATCH, OPS, PRECISIONS, plan

H200, A100 = Device(90, 132), Device(80, 108)
CELEBA = (256, 64, 64, 64, 3)


@given(st.data())
def test_work_is_covered_once(data):
    op, precision = data.draw(st.sampled_from(OPS)), data.draw(st.sampled_from(PRECISIONS))
    batch, components, points = (data.draw(st.integers(1, m)) for m in (70, 12, 5000))
    width, layers = data.draw(st.integers(1, 256)), data.draw(st.integers(1, 5))
    widths = (data.draw(st.integers(1, 300)), *[width] * layers, data.draw(st.integers(1, 64)))
    device, mirrored = data.draw(st.sampled_from([H200, A100, Device(90, 3)])), data.draw(st.booleans())
    p = plan(op, batch, components, points, widths, precision, device, mirrored)
    training = op in ("expected", "outputs_backward")

    for block in (p.rows, p.outputs, p.inputs, p.channels, p.tile):
        assert block >= 16 and block & (block - 1) == 0
    assert p.rows >= (32 if mirrored else 16) and p.tile % p.rows == 0 and p.inputs <= p.rows // (2 if mirrored else 1)
    assert p.hidden >= width and p.hidden % p.outputs == 0 and p.hidden % p.inputs == 0 and p.hidden < width + p.outputs
    assert p.channels >= widths[-1]

    per_tile = p.tile // (2 if mirrored else 1)
    assert (p.tiles - 1) * per_tile < points <= p.tiles * per_tile
    each = -(-p.tiles // p.splits)
    assert (p.splits - 1) * each < p.tiles  # no share is empty
    share = -(-components // p.groups)
    assert (p.groups - 1) * share < components
    assert p.splits == 1 or training
    assert p.groups == 1 or op in ("log_likelihood", "outputs")

    items = batch * components * p.splits if training else p.tiles * batch * p.groups
    assert 1 <= p.programs <= items
    assert p.scratch == (p.tile * (2 * layers * p.hidden + p.channels) if training else 2 * p.rows * p.hidden)
    assert p.tile == p.rows or p.programs * p.scratch * 4 <= MOST_SCRATCH
    size = 4 * sum(a * b + b for a, b in zip(widths, widths[1:], strict=False))
    assert p.splits == 1 or p.splits * batch * components * size <= MOST_PARTIAL


def busy(batch: int, components: int, points: int) -> float:
    """Share of the time for which the programs of a training pass have work."""
    p = plan("expected", batch, components, points, CELEBA, "tf32x3", H200, False)
    programs = H200.multiprocessors * (65536 // (255 * 32 * p.warps))
    each = -(-p.tiles // p.splits)
    waves = -(-batch * components * p.splits // programs)
    return batch * components * p.tiles / (programs * waves * each)


def test_few_networks_are_split():
    assert plan("expected", 64, 10, 4096, CELEBA, "tf32x3", H200, False).splits <= 4
    assert plan("expected", 1, 1, 4096, CELEBA, "tf32x3", H200, False).splits > 8
    assert min(busy(64, 10, 4096), busy(22, 3, 4096), busy(64, 3, 4140)) >= 0.75
    assert plan("expected", 1, 1, 1, CELEBA, "tf32x3", H200, False).splits == 1


def test_components_run_side_by_side_only_where_points_are_few():
    assert plan("log_likelihood", 64, 10, 4096, CELEBA, "tf32x3", H200, True).groups == 1
    assert plan("log_likelihood", 1, 10, 256, CELEBA, "tf32x3", H200, True).groups == 10
    assert plan("mean", 1, 10, 256, CELEBA, "tf32x3", H200, True).groups == 1


def test_a_plan_is_a_function_of_its_arguments():
    arguments = ("expected", 64, 10, 4096, CELEBA, "tf32x3", H200, True)
    assert plan(*arguments) == plan(*arguments)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan(*arguments).tile = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp8"}, "precision must be one of ieee, tf32x3, tf32, bf16, got 'fp8'"),
        ({"widths": (4, 5, 6, 1)}, "takes hidden layers of one width"),
        ({"widths": (4, 1)}, "at least one, got widths"),
        ({"widths": (4, 5, 100)}, "takes at most 64 channels, got 100"),
    ],
)
def test_what_it_refuses(change, message):
    arguments = {"op": "mean", "batch": 1, "components": 1, "points": 1, "widths": (2, 4, 1), "precision": "ieee"}
    with pytest.raises(ValueError, match=f"^inr_mixture: .*{message}"):
        plan(**{**arguments, **change}, device=H200, mirrored=False)
