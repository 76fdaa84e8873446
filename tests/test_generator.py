from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vamoh import generator
from vamoh.generator import Part, Reconstruction, decode, expected_log_likelihood, marginal_log_likelihood
from vamoh.layout import packed_size
from vamoh.likelihood import Likelihood
from vamoh.ops import inr_mixture, inr_mixture_mean
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
    seen = inputs["mask"].double() if masked else torch.ones(B, N).double()
    q = inputs["log"].exp() * seen[:, None]
    mask = inputs["mask"] if masked else None
    result = expected_log_likelihood(inputs["theta"], inputs["features"], inputs["values"], q, mask, INR, likelihood)
    expected = torch.einsum("bkn,bkn->b", q, log_p(inputs, likelihood.op, likelihood))
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
    likelihood, features = Likelihood(kind, K, 2), torch.linspace(-1, 1, 2 * 11 * 3).double().reshape(2, 11, 3).sin()
    features = features[0] if shared else features
    sizes: list[int] = []

    def encode(index: Part) -> Tensor:
        sizes.append(len(torch.arange(11)[index]))
        return features[..., index, :]

    table = torch.randn(B, K, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(1)

    def run(log_pi: Any) -> Reconstruction:
        sizes.clear()
        return decode(inputs["theta"], 11, encode, log_pi, INR, likelihood, shared=shared)

    whole = run(lambda features, index: table[..., index])
    assert sizes == [11]
    means = likelihood.mean(inr_mixture(inputs["theta"], features, INR))
    torch.testing.assert_close(whole.pi, table.exp().transpose(1, 2))
    torch.testing.assert_close(whole.mean, torch.einsum("bkm,bkmc->bmc", table.exp(), means))
    for b in range(B):
        for m in range(11):
            torch.testing.assert_close(whole.mean_map[b, m], means[b, int(table[b, :, m].argmax()), m])
    per_point = (1 if shared else B) * 3 + B * (K + generator._GATING)
    for limit, largest in ((1, 1), (4 * per_point, 4)):
        monkeypatch.setattr(generator, "_CHUNK", limit)
        parts = run(lambda features, index: table[..., index])
        assert max(sizes) == largest and sum(sizes) == 11
        for a, b in zip(vars(parts).values(), vars(whole).values(), strict=True):
            torch.testing.assert_close(a, b)
        constant = run(lambda features, index: table[..., :1])
        repeated = run(lambda features, index: table[..., :1].expand(-1, -1, 11)[..., index])
        for a, b in zip(vars(constant).values(), vars(repeated).values(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk", [1 << 22, 1500, 700, 1])
def test_decode_keeps_opposite_points_together(inputs, monkeypatch, chunk):
    """Points 1-5, 2-9 and 3-8 lie opposite to each other, 4 to itself."""
    mirror = torch.tensor([-1, 5, 9, 8, 4, 1, -1, -1, 3, 2, -1])
    features = torch.randn(11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    seen: list[tuple[list[int], list[int]]] = []

    def spy(theta: Tensor, features: Tensor, log_pi: Tensor, *_: Any, mirror: Tensor | None) -> tuple[Tensor, Tensor]:
        if mirror is not None:
            seen[-1][1].extend(mirror.tolist())
        return inr_mixture_mean(theta, features, log_pi, *_)

    def encode(index: Part) -> Tensor:
        seen.append((torch.arange(11)[index].tolist(), []))
        return features[index]

    monkeypatch.setattr(generator, "inr_mixture_mean", spy)
    monkeypatch.setattr(generator, "_CHUNK", chunk)

    def log_pi(features: Tensor, index: Part) -> Tensor:
        return inputs["log"][..., :1]

    result = decode(inputs["theta"], 11, encode, log_pi, INR, Likelihood("bernoulli", K, 2), mirror=mirror)
    assert sorted(i for index, _ in seen for i in index) == list(range(11))
    for index, opposite in seen:
        for here, there in enumerate(opposite):
            assert int(mirror[index[here]]) == (index[there] if there >= 0 else -1)
    assert chunk == 1 or all(len(opposite) == len(index) for index, opposite in seen)
    monkeypatch.setattr(generator, "_CHUNK", 1 << 22)
    plain = decode(inputs["theta"], 11, lambda i: features[i], log_pi, INR, Likelihood("bernoulli", K, 2))
    for a, b in zip(vars(result).values(), vars(plain).values(), strict=True):
        torch.testing.assert_close(a, b)


def test_no_points(inputs):
    features = torch.zeros(0, 3).double()
    result = decode(
        inputs["theta"],
        0,
        lambda index: features,
        lambda f, i: inputs["log"][..., :1],
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


def test_probabilities_are_left_out_on_demand(inputs):
    arguments = (inputs["theta"], 4, lambda index: inputs["features"][index], lambda f, i: inputs["log"][..., :1], INR)
    whole, part = (decode(*arguments, Likelihood("bernoulli", K, 2), with_pi=keep) for keep in (True, False))
    assert whole.pi.shape == (B, 4, K) and part.pi.shape == (B, 0, K)
    assert torch.equal(whole.mean, part.mean) and torch.equal(whole.mean_map, part.mean_map)


def test_progress_is_shown_on_demand(inputs, capsys):
    for progress in (False, True):
        decode(
            inputs["theta"],
            4,
            lambda index: inputs["features"][index],
            lambda f, i: inputs["log"][..., :1],
            INR,
            Likelihood("bernoulli", K, 2),
            progress=progress,
        )
        assert ("decode: 100%" in capsys.readouterr().err) == progress
