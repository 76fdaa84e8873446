from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vamoh.gating import Gating, _coordinate_parts, uniform


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("channels", [0, 3])
@pytest.mark.parametrize("widths", [(), (5,), (7, 4)])
@pytest.mark.parametrize("shared", [True, False])
def test_is_an_mlp_on_the_concatenation(widths, channels, bounded, shared):
    net = Gating(6, channels, 2, widths, 4, bounded).double()
    encoded = draw(9, 6) if shared else draw(3, 9, 6)
    z, values = draw(3, 2), draw(3, 9, channels) if channels else None
    parts = [encoded.expand(3, -1, -1), *([values] if channels else []), z[:, None].expand(-1, 9, -1)]
    first = [net.by_coords.weight, *([net.by_value.weight] if channels else []), net.by_z.weight]
    h = F.linear(torch.cat(parts, -1), torch.cat(first, 1), net.by_coords.bias)
    for layer in net.rest:
        h = layer(F.leaky_relu(h, 0.1))
    expected = (h.tanh() if bounded else h).softmax(-1).log().transpose(1, 2)
    result = net(encoded, z, values)
    assert result.shape == (3, 4, 9)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(result.exp().sum(1), torch.ones(3, 9, dtype=torch.float64))


@pytest.mark.parametrize(
    ("lead", "points", "encoded_dim", "widths"),
    [((), 1, 1, (1, 1)), ((), 1470, 256, (32, 32)), ((3,), 130, 3, (5, 2)), ((2,), 64, 65, (64, 16))],
)
def test_parts_of_the_coordinates_are_the_same_for_any_number_of_threads(lead, points, encoded_dim, widths):
    """Values and gradients to the bit, and those of float64 within rounding."""
    encoded = draw(*lead, points, encoded_dim)
    networks = [Gating(encoded_dim, 0, 2, (width,), 3, True) for width in widths]

    def parts_and_gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        weights = [network.to(dtype).by_coords.weight for network in networks]
        leaf = encoded.to(dtype, copy=True).requires_grad_()
        parts = _coordinate_parts(leaf, networks)
        grads = [draw(*part.shape).to(dtype) for part in parts]
        return [*(part.detach() for part in parts), *torch.autograd.grad(parts, [leaf, *weights], grads)]

    torch.set_num_threads(1)
    expected, one = parts_and_gradients(torch.float64), parts_and_gradients(torch.float32)
    torch.set_num_threads(2)
    two = parts_and_gradients(torch.float32)
    for a, b, exact in zip(one, two, expected, strict=True):
        assert torch.equal(a, b)
        assert float((a - exact).norm()) <= 1e-5 * float(exact.norm())
    weight = networks[1].by_coords.weight.detach().double()
    torch.testing.assert_close(expected[1], torch.einsum("he,...ne->...hn", weight, encoded), rtol=1e-5, atol=1e-5)


def test_parts_of_the_coordinates_of_no_points_and_no_functions():
    network = Gating(4, 0, 2, (3,), 2, True)
    for shape in ((0, 4), (0, 5, 4), (2, 0, 4)):
        (part,) = _coordinate_parts(torch.zeros(shape), [network])
        assert part.shape == (*shape[:-2], 3, shape[-2])
        assert not torch.autograd.grad(part.sum(), network.by_coords.weight)[0].any()


def test_parts_of_the_coordinates_are_float32_under_autocast():
    network, encoded = Gating(4, 0, 2, (3,), 2, True), draw(9, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        (part,) = _coordinate_parts(encoded, [network])
    assert torch.equal(part, _coordinate_parts(encoded, [network])[0])


def test_the_bound_limits_certainty():
    for bounded in (True, False):
        net = Gating(2, 0, 1, (8,), 3, bounded).double()
        for parameter in net.parameters():
            parameter.data.mul_(100)
        p = net(draw(50, 2), draw(4, 1)).exp()
        limit = math.exp(2) / (math.exp(2) + 2)  # logits of 1, -1, -1
        assert (float(p.detach().max()) <= limit + 1e-12) == bounded


def test_one_component_is_certain():
    net = Gating(2, 1, 1, (3,), 1, True)
    assert not net(torch.rand(5, 2), torch.rand(2, 1), torch.rand(2, 5, 1)).any()


def test_initial_range_is_that_of_the_whole_first_layer():
    torch.manual_seed(0)
    net = Gating(60, 3, 37, (64,), 4, False)
    for parameter in (net.by_coords.weight, net.by_coords.bias, net.by_value.weight, net.by_z.weight):
        assert 0.08 < float(parameter.detach().abs().max()) <= 0.1


def test_uniform():
    like = torch.zeros(1, dtype=torch.float64)
    assert uniform(2, 5, like).shape == (2, 5, 1)
    torch.testing.assert_close(uniform(2, 5, like).exp(), torch.full((2, 5, 1), 0.2, dtype=torch.float64))
