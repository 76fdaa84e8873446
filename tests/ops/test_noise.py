from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.precision import UNIT
from vamoh.ops import CounterNoise
from vamoh.ops._native import native
from vamoh.ops._noise import _box_muller, check_noise, counter_noise_reference, philox

WORD = st.integers(0, 2**32 - 1)
SEEDS = [0, 5, -123_456_789_012_345, 2**63 - 1, -(2**63)]


def words(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox by the paper, in Python's integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ k, q & 0xFFFFFFFF, (p >> 32) ^ d ^ m, p & 0xFFFFFFFF
        k, m = (k + 0x9E3779B9) & 0xFFFFFFFF, (m + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d


def run(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(x) for x in philox(*(tuple(map(torch.tensor, part)) for part in (counter, key))))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_published_vectors(counter, key, expected):
    counter, key, expected = (tuple(int(x, 16) for x in part.split()) for part in (counter, key, expected))
    assert run(counter, key) == expected == words(counter, key)


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_any_words(counter, key):
    assert run(counter, key) == words(counter, key)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_layout(seed):
    noise = counter_noise_reference(torch.tensor(seed), range(3, 8), 2, 7, torch.float64)
    assert noise.shape == (5, 2, 7)
    for s, b, z in ((0, 0, 0), (4, 1, 6), (2, 1, 3), (1, 0, 5)):
        w = words((z // 4, 3 + s, b, 0), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))[z % 4 // 2 * 2 :]
        angle = (w[1] - 2**32 * (w[1] >= 2**31)) / 2**31 * math.pi
        radius = math.sqrt(-2 * math.log((w[0] + 1) / 2**32))
        expected = radius * (math.sin(angle) if z % 2 else math.cos(angle))
        assert float(noise[s, b, z]) == pytest.approx(expected, abs=1e-6)


def test_noise_does_not_depend_on_how_much_there_is():
    seed = torch.tensor(1)
    whole = counter_noise_reference(seed, range(20), 4, 9)
    assert torch.equal(counter_noise_reference(seed, range(5, 9), 3, 6), whole[5:9, :3, :6])
    assert not torch.equal(counter_noise_reference(seed + 1, range(20), 4, 9), whole)


def native_noise(seed: int, samples: int, batch: int, latent: int, isa: str) -> Tensor:
    out = torch.empty(samples, batch, latent)
    native().counter_noise(seed=seed, out=out.data_ptr(), samples=samples, batch=batch, latent=latent, isa=isa)
    return out


@pytest.mark.parametrize("size", [(1, 1, 1), (65, 3, 5), (130, 2, 16), (1000, 1, 7)])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_isa_makes_the_noise_of_the_reference(isas, seed, size):
    """Within roundings: a wrong bit among the twenty that matter most of a word would show."""
    samples, batch, latent = size
    pairs = counter_noise_reference(torch.tensor(seed), range(samples), batch, latent + latent % 2, torch.float64)
    radius = pairs.unflatten(2, (-1, 2)).norm(dim=3).repeat_interleave(2, 2)[..., :latent]
    expected = pairs[..., :latent]
    # Units of the radius: logarithm, root and product one each, sine and cosine two (vectors.inl). Thrice that.
    bound = 15 * UNIT * radius
    for isa in isas:
        error = (native_noise(seed, *size, isa) - expected).abs()
        assert bool((error <= bound).all()), isa


def test_samples_beyond_the_first_task(isas):
    first, batch = 1 << 20, 1
    expected = counter_noise_reference(torch.tensor(3), range(first - 3, first), batch, 1)
    torch.testing.assert_close(native_noise(3, first, batch, 1, isas[0])[-3:], expected)


def test_moments_and_independence():
    noise = counter_noise_reference(torch.tensor(7), range(20_000), 3, 8, torch.float64)
    count, flat = noise.numel(), noise.flatten()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((flat**power).mean()) - moment) < 4 * math.sqrt(variance / count)
    columns = noise.flatten(1)
    for transform in (lambda x: x, lambda x: x.square() - 1):
        correlation = torch.corrcoef(transform(columns).T).fill_diagonal_(0)
        assert correlation.abs().max() < 5 / math.sqrt(len(columns))
        along = torch.corrcoef(torch.stack([transform(columns)[1:].flatten(), transform(columns)[:-1].flatten()]))
        assert abs(float(along[0, 1])) < 4 / math.sqrt(count)
    other = counter_noise_reference(torch.tensor(8), range(20_000), 3, 8, torch.float64).flatten()
    assert abs(float((flat * other).mean())) < 4 / math.sqrt(count)
    uniform = torch.special.ndtr(flat).sort().values
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert float((uniform - steps).abs().max()) < 1.95 / math.sqrt(count)  # Kolmogorov-Smirnov, p = 0.001


def test_extreme_words_give_finite_values():
    least, most, half = torch.tensor(0), torch.tensor(2**32 - 1), torch.tensor(2**31)
    for angle in (least, most, half):
        assert [float(x) for x in _box_muller(most, angle)] == pytest.approx([0, 0])  # log 1
        assert all(x.isfinite() for x in _box_muller(least, angle))
    assert float(_box_muller(least, least)[0]) == pytest.approx(math.sqrt(64 * math.log(2)))


@pytest.mark.parametrize(
    ("noise", "error", "message"),
    [
        (torch.zeros(2, 3), ValueError, r"noise must have shape \[S, 3, 2\], got \[2, 3\]"),
        (torch.zeros(0, 3, 2), ValueError, r"noise must hold at least one sample, got \[0, 3, 2\]"),
        (torch.zeros(1, 3, 2).double(), TypeError, "noise must have dtype torch.float32, got torch.float64"),
        (torch.zeros(1, 3, 2).requires_grad_(), ValueError, "noise must not require a gradient"),
        (CounterNoise(torch.zeros(1).long(), 1), ValueError, r"noise.seed must have shape \[\], got \[1\]"),
        (CounterNoise(torch.tensor(0.5), 1), TypeError, "noise.seed must have dtype int64, got float32"),
        (CounterNoise(5, 1), TypeError, "noise.seed must be a torch.Tensor, got int"),
        (CounterNoise(torch.tensor(5, device="meta"), 1), TypeError, "noise.seed must be on cpu, got meta"),
        (CounterNoise(torch.tensor(5), 0), ValueError, "noise.samples must be at least 1, got 0"),
    ],
)
def test_errors_name_the_argument(noise, error, message):
    with pytest.raises(error, match=f"^here: {message}"):
        check_noise("here", "noise", noise, torch.zeros(3, 2))
