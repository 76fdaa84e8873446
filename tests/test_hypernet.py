from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vamoh.hypernet import Hypernet
from vamoh.layout import packed_size, unpack

INR = (16, 12, 12, 2)


def build(
    published: bool, latent: int = 3, components: int = 4, widths: tuple[int, ...] = (7, 9), seed: int = 0
) -> Hypernet:
    torch.manual_seed(seed)
    return Hypernet(latent, components, widths, INR, published)


@pytest.mark.parametrize("widths", [(), (5,), (7, 9)])
def test_every_head_is_its_own_mlp(widths):
    net = build(True, widths=widths).double()
    z = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theta = net(z)
    assert theta.shape == (6, 4, packed_size(INR)) and theta.stride(-1) == 1
    for k in range(4):
        layers: list[nn.Module] = []
        for weight, bias in zip(net.weights, net.biases, strict=True):
            linear = nn.Linear(weight.shape[2], weight.shape[1]).double()
            linear.load_state_dict({"weight": weight[k], "bias": bias[k]})
            layers += [linear, nn.LeakyReLU(0.1)]
        torch.testing.assert_close(theta[:, k], nn.Sequential(*layers[:-1])(z))


def test_published_initialisation_is_that_of_linear_layers():
    net = build(True, latent=64, widths=(50,))
    for weight, bias in zip(net.weights, net.biases, strict=True):
        bound = weight.shape[2] ** -0.5
        for parameter in (weight, bias):
            assert 0.9 * bound < float(parameter.detach().abs().max()) <= bound
            assert float(parameter.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("widths", [(), (256,), (128, 256)])
def test_stable_networks_keep_the_scale_of_their_input(widths):
    """Whatever the widths: coordinate networks of random z neither explode nor vanish, and z matters to them."""
    net = build(False, latent=32, components=8, widths=widths)
    g = torch.Generator().manual_seed(1)
    features = torch.randn(64, INR[0], generator=g)

    def outputs(z: torch.Tensor) -> torch.Tensor:
        h = features.mT
        layers = unpack(net(z), INR)
        for i, (weight, bias) in enumerate(layers):
            h = weight @ (F.leaky_relu(h, 0.1) if i else h) + bias[..., None]
        return h

    with torch.no_grad():
        out = outputs(torch.randn(16, 32, generator=g))
        still = outputs(torch.zeros(1, 32))
    assert 0.3 < float(out.square().mean().sqrt()) < 5
    assert 0.2 < float((out - out.mean(0)).square().mean().sqrt() / still.square().mean().sqrt()) < 5


def test_gradients():
    net = Hypernet(2, 2, (3,), (1, 2, 1), False).double()
    z = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, *_: net(z), (z, *net.parameters()))
