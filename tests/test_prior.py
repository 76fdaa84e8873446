"""Second-stage priors: distributions that are known, densities by quadrature, files, commands, and better digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.tiny import SIZES
from vamoh import VaMoH, grid_coords, load_config, open_dataset
from vamoh.data import Dataset
from vamoh.prior import (
    KINDS,
    NAME,
    CouplingPrior,
    DiffusionPrior,
    SecondPrior,
    aggregated_posterior,
    fit_latents,
    fit_prior,
    has_prior,
    load_prior,
    save_prior,
)
from vamoh.trainer import Trainer

every_kind = pytest.mark.parametrize("kind", sorted(KINDS))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_model(seed: int = 0) -> VaMoH:
    return VaMoH(coord_dim=2, channels=1, **SIZES, seed=seed).eval()


def dataset(count: int = 12) -> Dataset:
    values = torch.rand(count, 36, 1, generator=seeded())
    splits = {"train": torch.arange(8), "validation": torch.arange(8, 9), "test": torch.arange(9, count)}
    return Dataset("noise", "image", (6, 6), grid_coords((6, 6)), values, splits, "logistic")


def perturbed(kind: str, latent_dim: int, dtype: torch.dtype = torch.float32) -> SecondPrior:
    """A prior whose parameters and buffers are random, so that nothing in it is neutral."""
    prior = KINDS[kind](latent_dim, seeded()).to(dtype)
    generator = seeded(1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
        prior.loc.copy_(torch.randn(latent_dim, generator=generator, dtype=dtype))
        prior.scale.copy_(0.5 + torch.rand(latent_dim, generator=generator, dtype=dtype))
    return prior


@every_kind
def test_two_clusters_are_found(kind: str) -> None:
    """Of unequal weight and width, far apart for their widths: no normal distribution has such shares."""
    centres, widths = torch.tensor([[3.0, -1.0], [-1.0, 2.0]]), torch.tensor([0.3, 0.6])
    which = (torch.arange(400) % 4 == 0).long()
    prior = fit_latents(centres[which], widths[which, None].expand(-1, 2), kind=kind, steps=300)
    z = prior.sample(4000, generator=seeded())
    distance = (z[:, None] - centres).norm(dim=-1)
    near = distance < 3 * widths
    # Of a normal distribution in the plane, 1 - exp(-9 / 2) = 98.9 % lies within three standard deviations.
    assert near.any(1).float().mean() > 0.93
    assert near.float().mean(0).tolist() == pytest.approx([0.75, 0.25], abs=0.06)
    for cluster in (0, 1):
        inside = z[near[:, cluster]]
        assert inside.std(0).mean().item() == pytest.approx(widths[cluster].item(), rel=0.25)


def test_the_density_of_couplings_is_one_and_that_of_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CouplingPrior, "WIDTH", 8)
    prior = perturbed("coupling", 2, torch.float64)
    assert isinstance(prior, CouplingPrior)
    axis = torch.linspace(-16, 16, 801, dtype=torch.float64)
    with torch.no_grad():
        density = prior.log_prob(torch.cartesian_prod(axis, axis) + prior.loc).exp()
    assert (density.sum() * (axis[1] - axis[0]) ** 2).item() == pytest.approx(1, abs=1e-6)
    noise = torch.randn(5, 2, generator=seeded(), dtype=torch.float64)

    def sample(e: Tensor) -> Tensor:
        return prior.loc + prior.scale * prior._from_noise(e[None])[0]

    for e in noise:
        slope = torch.autograd.functional.jacobian(sample, e)
        normal = -0.5 * (e.square().sum() + 2 * math.log(2 * math.pi))
        expected = normal - torch.linalg.slogdet(slope)[1]
        assert prior.log_prob(sample(e)[None]).item() == pytest.approx(expected.item(), abs=1e-9)


def test_couplings_change_every_dimension() -> None:
    for latent_dim in (1, 2, 5):
        prior = CouplingPrior(latent_dim, seeded())
        changed = ~prior.halves
        assert changed.sum(0).min() >= 1 and (latent_dim == 1 or changed.sum(0).max() < prior.LAYERS)
        assert torch.isfinite(perturbed("coupling", latent_dim).sample(3)).all()


def test_diffusion_recovers_what_its_best_network_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a single point the network that removes all noise is known; the loss is then 0, and the point comes out."""
    point = torch.tensor([[0.7, -1.3, 0.2]], dtype=torch.float64)

    def best(prior: DiffusionPrior, x: Tensor, t: Tensor) -> Tensor:
        signal, sigma = (0.5 * math.pi * t[:, None]).cos(), (0.5 * math.pi * t[:, None]).sin()
        return signal * (x - signal * point) / sigma - sigma * point

    monkeypatch.setattr(DiffusionPrior, "forward", best)
    prior = DiffusionPrior(3, seeded()).double()
    assert prior.loss(point.expand(64, 3), seeded()).item() < 1e-20
    assert prior._from_noise(torch.randn(9, 3, generator=seeded(), dtype=torch.float64)).sub(point).abs().max() < 1e-9


def test_diffusion_leaves_a_normal_distribution_nearly_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiffusionPrior, "forward", lambda prior, x, t: torch.zeros_like(x))  # the best one of N(0, I)
    noise = torch.randn(9, 3, generator=seeded(), dtype=torch.float64)
    found = DiffusionPrior(3)._from_noise(noise)
    steps = DiffusionPrior.STEPS
    assert torch.allclose(found, noise * math.cos(math.pi / 2 / steps) ** steps, rtol=1e-12)
    assert math.cos(math.pi / 2 / steps) ** steps > 0.97


@every_kind
def test_fitting_follows_the_seed_and_leaves_all_else_alone(kind: str) -> None:
    model, data = tiny_model(), dataset()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    first, second, other = (fit_prior(model, data, kind=kind, steps=3, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    a, b, c = (prior.sample(5, generator=seeded()) for prior in (first, second, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.shape == (5, 3) and not any(parameter.requires_grad for parameter in first.parameters())


def test_latents_are_those_of_the_training_functions() -> None:
    model, data = tiny_model(), dataset()
    q = model.encode(data.batch(data.splits["train"]))
    mean, std = aggregated_posterior(model, data)
    assert torch.equal(mean, q.mean) and torch.equal(std, q.std)
    assert aggregated_posterior(model, data, split="test")[0].shape == (3, 3)
    prior = fit_prior(model, data, steps=1)
    assert torch.allclose(prior.loc, q.mean.mean(0))
    spread = (q.mean - q.mean.mean(0)).square().mean(0) + q.std.square().mean(0)
    assert torch.allclose(prior.scale, spread.sqrt())
    assert not torch.equal(aggregated_posterior(model, data, num_points=20)[0], mean)


def test_of_many_functions_some_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vamoh.prior.FUNCTIONS", 5)
    model, data = tiny_model(), dataset()
    every = model.encode(data.batch(data.splits["train"])).mean
    drawn = aggregated_posterior(model, data)[0]
    assert drawn.shape == (5, 3)
    assert torch.cdist(drawn, every).amin(1).max() < 1e-6 and torch.cdist(drawn, drawn).fill_diagonal_(1).min() > 0


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"kind": "flow"}, "kind must be one of diffusion, coupling, got 'flow'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seed": -1}, "seed must be between"),
        ({"split": "all"}, "split must be one of"),
        ({"num_points": 0}, "num_points must be at least 1"),
    ],
)
def test_mistakes_are_named(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit_prior(tiny_model(), dataset(), **wrong)  # type: ignore[arg-type]


@every_kind
def test_a_file_gives_the_same_prior(kind: str, tmp_path: Path) -> None:
    model = tiny_model()
    prior = perturbed(kind, 3)
    assert not has_prior(tmp_path)
    with pytest.raises(FileNotFoundError, match="vamoh fit-prior makes it"):
        load_prior(tmp_path, model)
    assert save_prior(tmp_path, prior, model) == tmp_path / NAME
    assert has_prior(tmp_path) and [path.name for path in tmp_path.iterdir()] == [NAME]
    loaded = load_prior(tmp_path, model)
    assert loaded.kind == kind
    assert torch.equal(loaded.sample(4, generator=seeded()), prior.sample(4, generator=seeded()))
    with pytest.raises(ValueError, match="fitted to other parameters than the run has now"):
        load_prior(tmp_path, tiny_model(seed=1))


def edited(**metadata: str) -> Callable[[Path, dict[str, str]], None]:
    return lambda path, stored: save_file(load_file(path), path, {**stored, **metadata})


def without_loc(path: Path, stored: dict[str, str]) -> None:
    tensors = load_file(path)
    del tensors["loc"]
    save_file(tensors, path, stored)


def longer_loc(path: Path, stored: dict[str, str]) -> None:
    save_file({**load_file(path), "loc": torch.zeros(4)}, path, stored)


def linked(path: Path, stored: dict[str, str]) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path, stored: path.write_bytes(path.read_bytes()[:-1]), "damaged or not a safetensors file"),
        (lambda path, stored: path.write_bytes(b"\x80\x04N."), "damaged or not a safetensors file"),
        (edited(format="2"), "must have format 1, got '2'"),
        (edited(kind="flow"), "must be of kind diffusion or coupling, got 'flow'"),
        (edited(kind="coupling"), "does not fit the model"),
        (edited(model="0"), "fitted to other parameters"),
        (without_loc, "loc is missing"),
        (longer_loc, r"loc is torch.float32 \[4\], the model has torch.float32 \[3\]"),
        (linked, "must be a file, got a link"),
    ],
)
def test_damaged_files_are_refused(damage: Callable[[Path, dict[str, str]], None], words: str, tmp_path: Path) -> None:
    model = tiny_model()
    path = save_prior(tmp_path, perturbed("diffusion", 3), model)
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        stored = file.metadata()
    damage(path, stored)
    with pytest.raises(ValueError, match=words) as caught:
        load_prior(tmp_path, model)
    assert NAME in str(caught.value)


@pytest.mark.slow
def test_digits_are_closer_to_the_real_ones() -> None:
    """Fréchet distance of 1000 samples to held-out digits in the features of a classifier that is trained here."""
    data, config = open_dataset("digits"), load_config("digits")
    trainer = Trainer(replace(config, train=replace(config.train, steps=500)), data)
    for _ in range(500):
        trainer.step()
    model = trainer.model.eval()
    features = classifier_features(data)
    real = features(data.batch(data.splits["test"]).values)

    def distance(z: Tensor) -> float:
        return frechet(features(model.decode(z, data.coords, with_pi=False).mean), real)

    first = distance(model.sample_prior(1000, generator=seeded()))
    for kind in KINDS:
        second = distance(fit_prior(model, data, kind=kind).sample(1000, generator=seeded()))
        assert second < 0.7 * first, (kind, first, second)


def classifier_features(data: Dataset) -> Callable[[Tensor], Tensor]:
    """The 64 features before the last layer of a convolutional network that tells the digits apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
        train, labels = data.splits["train"], data.labels
        assert labels is not None
        images = data.batch(torch.arange(len(data))).values.reshape(-1, 1, 28, 28)
        optimizer = torch.optim.Adam(network.parameters(), 2e-3)
        for _ in range(3):
            for batch in train[torch.randperm(len(train))].split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(images[batch]), labels[batch].long()).backward()
                optimizer.step()
    held_out = data.splits["test"]
    assert (network(images[held_out]).argmax(1) == labels[held_out]).float().mean() > 0.9
    return torch.no_grad()(lambda values: network[:-1](values.reshape(-1, 1, 28, 28)).double())


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the normal distributions with the means and covariances of two samples [n, F]."""
    first, second = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * root)
