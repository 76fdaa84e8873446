from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vamoh import generator
from vamoh.generator import Reconstruction, decode, expected_log_likelihood, marginal_log_likelihood
from vamoh.layout import packed_size
from vamoh.likelihood import Likelihood
from vamoh.ops import inr_mixture
from vamoh.ops.inr_mixture import Inr
from vamoh.ops.likelihood import log_likelihood

INR = Inr((3, 5, 2))
B, K, N = 2, 4, 7


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors hold NaN, so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def inputs() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    return {
        "theta": draw(B, K, packed_size(INR.widths)),
        "features": draw(N, 3),
        "values": draw(B, N, 2).sigmoid(),
        "log": draw(B, K, N).log_softmax(1),
        "mask": draw(B, N) > 0,
    }


def log_p(inputs: dict[str, Any], kind: Any, likelihood: Likelihood) -> Tensor:
    logits = inr_mixture(inputs["theta"], inputs["features"], INR)
    return log_likelihood(kind, logits, inputs["values"][:, None], likelihood.scale[:, None]).sum(-1)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", ["logistic", "bernoulli"])
def test_expected_log_likelihood(inputs, kind, masked):
    likelihood = Likelihood(kind, K, 2).double()
    mask = inputs["mask"] if masked else None
    result = expected_log_likelihood(
        inputs["theta"], inputs["features"], inputs["values"], inputs["log"], mask, INR, likelihood
    )
    seen = inputs["mask"].double() if masked else torch.ones(B, N).double()
    expected = torch.einsum("bkn,bkn,bn->b", inputs["log"].exp(), log_p(inputs, likelihood.op, likelihood), seen)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("proper", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_marginal_log_likelihood(inputs, masked, proper):
    likelihood = Likelihood("logistic", K, 2).double()
    mask = inputs["mask"] if masked else None
    seen = inputs["mask"].double() if masked else torch.ones(B, N).double()
    per_component = log_p(inputs, likelihood.as_pmf() if proper else likelihood.op, likelihood)
    for log_prior in (inputs["log"], inputs["log"][..., :1]):
        result = marginal_log_likelihood(
            inputs["theta"], inputs["features"], inputs["values"], log_prior, mask, INR, likelihood, proper
        )
        expected = ((log_prior.exp() * per_component.exp()).sum(1).log() * seen).sum(1)
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["logistic", "continuous_bernoulli"])
def test_decode_in_chunks(inputs, monkeypatch, kind, shared):
    likelihood, coords = Likelihood(kind, K, 2), torch.linspace(-1, 1, 2 * 11 * 3).double().reshape(2, 11, 3)
    coords = coords[0] if shared else coords
    sizes: list[int] = []

    def encode(x: Tensor) -> Tensor:
        sizes.append(x.shape[-2])
        return x.sin()

    table = torch.randn(B, K, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(1)

    def run(log_pi: Any) -> Reconstruction:
        sizes.clear()
        return decode(inputs["theta"], coords, encode, log_pi, INR, likelihood)

    whole = run(lambda features, part: table[..., part])
    assert sizes == [11]
    means = likelihood.mean(inr_mixture(inputs["theta"], coords.sin(), INR))
    torch.testing.assert_close(whole.pi, table.exp().transpose(1, 2))
    torch.testing.assert_close(whole.mean, torch.einsum("bkm,bkmc->bmc", table.exp(), means))
    for b in range(B):
        for m in range(11):
            assert torch.equal(whole.mean_map[b, m], means[b, int(table[b, :, m].argmax()), m])
    for limit, largest in ((1, 1), (B * K * 5 * 4, 4)):
        monkeypatch.setattr(generator, "_CHUNK", limit)
        parts = run(lambda features, part: table[..., part])
        assert max(sizes) == largest and sum(sizes) == 11
        for a, b in zip(vars(parts).values(), vars(whole).values(), strict=True):
            torch.testing.assert_close(a, b)
        constant = run(lambda features, part: table[..., :1])
        repeated = run(lambda features, part: table[..., :1].expand(-1, -1, part.stop - part.start))
        for a, b in zip(vars(constant).values(), vars(repeated).values(), strict=True):
            torch.testing.assert_close(a, b)


def test_no_points(inputs):
    result = decode(
        inputs["theta"],
        torch.zeros(0, 3).double(),
        torch.sin,
        lambda f, p: inputs["log"][..., :1],
        INR,
        Likelihood("logistic", K, 2),
    )
    assert result.mean.shape == (B, 0, 2) and result.pi.shape == (B, 0, K)


def test_maps():
    pi = torch.tensor([[[0.5, 0.5, 0.0], [0.1, 0.2, 0.7], [0.0, 1.0, 0.0]]])
    result = Reconstruction(torch.zeros(1, 3, 1), torch.zeros(1, 3, 1), pi)
    assert result.segmentation.tolist() == [[0, 2, 1]]
    assert result.segmentation.dtype == torch.int64
    expected = torch.distributions.Categorical(probs=pi).entropy()
    torch.testing.assert_close(result.entropy, expected, atol=1e-6, rtol=0)
    assert result.entropy[0, 2] == 0


def test_the_chunk_limits_what_the_networks_see(inputs, monkeypatch):
    """The number of hidden values of one call stays below the limit, for any number of points."""
    seen: list[int] = []

    def spy(theta: Tensor, features: Tensor, inr: Inr) -> Tensor:
        seen.append(theta.shape[0] * theta.shape[1] * features.shape[-2] * max(inr.widths[1:]))
        return inr_mixture(theta, features, inr)

    monkeypatch.setattr(generator, "inr_mixture", spy)
    monkeypatch.setattr(generator, "_CHUNK", 1000)
    for count in (10, 500):
        decode(
            inputs["theta"],
            torch.zeros(count, 3).double(),
            torch.sin,
            lambda f, p: inputs["log"][..., :1],
            INR,
            Likelihood("bernoulli", K, 2),
        )
    assert max(seen) <= 1000 and sum(seen) == 510 * B * K * 5
