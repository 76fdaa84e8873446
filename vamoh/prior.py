"""Second-stage priors: p(z) fitted again, to the latents of a trained model's data, where nothing else depends on it.

    second = fit_prior(model, dataset)
    new = model.decode(second.sample(16), dataset.coords)

The prior of the bound has to be evaluated, and trained, at every step; what q(z) really is, averaged over the data
(the aggregated posterior), it matches but roughly. A second model of z closes that gap (Dai and Wipf, "Diagnosing and
enhancing VAE models", 2019). It leaves model and bound as they are, and serves for drawing new functions.
"""

from __future__ import annotations

import math
import os
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from vamoh._checks import check_choice, check_finite, check_positive, check_seed, check_type, shown
from vamoh._files import check_path, read_file, write_file
from vamoh._initial import linear_layer, own_generator
from vamoh._progress import Progress
from vamoh.checkpoint import check_tensors, read_tensors
from vamoh.data import Dataset
from vamoh.evaluate import MAX_POINTS, split_indices, subsample
from vamoh.model import VaMoH

NAME = "prior.safetensors"
"""The file of a run folder."""
FORMAT = 1
FUNCTIONS = 20_000
"""Most functions whose latents are taken; of more, so many are drawn at random."""
_BATCH = 256
_CLIP = 5.0
"""Largest norm of a gradient."""
_DECAY = 0.998
"""Of the moving average of the weights that is kept in the end."""


class SecondPrior(nn.Module):
    """A distribution of z [.., Z], fitted to samples; `loc` and `scale` [Z] standardise them."""

    kind: str
    rate: float
    """Learning rate at its highest."""
    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.register_buffer("loc", torch.zeros(latent_dim))
        self.register_buffer("scale", torch.ones(latent_dim))

    def loss(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """What fitting minimises, for samples z [B, Z]."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Latents [count, Z], for `VaMoH.decode`."""
        check_positive("sample", "count", count)
        check_type("sample", "generator", generator, torch.Generator, type(None))
        device = generator.device if generator else self.loc.device
        noise = torch.randn(count, self.latent_dim, generator=generator, dtype=self.loc.dtype, device=device)
        return self.loc + self.scale * self._from_noise(noise.to(self.loc.device))

    def _from_noise(self, noise: Tensor) -> Tensor:
        raise NotImplementedError

    def _standardised(self, z: Tensor) -> Tensor:
        return (z - self.loc) / self.scale


class DiffusionPrior(SecondPrior):
    """A diffusion model: a residual MLP that removes noise from z, in `STEPS` steps from noise alone.

    x_t = cos(πt/2) x + sin(πt/2) ε; the network predicts v = cos(πt/2) ε − sin(πt/2) x (Salimans and Ho 2022) and is
    sampled without new noise (DDIM, Song et al. 2021). Better samples than the flow's, but no density.
    """

    kind = "diffusion"
    rate = 4e-3
    WIDTH, BLOCKS, FREQUENCIES, STEPS = 256, 2, 32, 50

    def __init__(self, latent_dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__(latent_dim)
        width = self.WIDTH
        self.by_z = linear_layer(latent_dim, width, generator)
        self.by_time = linear_layer(2 * self.FREQUENCIES, width, generator, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                linear_layer(width, width, generator),
                nn.SiLU(),
                linear_layer(width, width, generator),
            )
            for _ in range(self.BLOCKS)
        )
        self.head = _zero(linear_layer(width, latent_dim, generator))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """v [B, Z] at x [B, Z] and times t [B] in [0, 1]."""
        frequencies = torch.logspace(0, 3, self.FREQUENCIES, dtype=x.dtype, device=x.device)
        phase = t[:, None] * frequencies
        h = self.by_z(x) + self.by_time(torch.cat([phase.sin(), phase.cos()], -1))
        for block in self.blocks:
            h = h + block(h)
        v: Tensor = self.head(F.silu(h))
        return v

    def loss(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of v at times spread evenly over [0, 1]."""
        x = self._standardised(z)
        noise = torch.randn(x.shape, generator=generator, dtype=z.dtype, device=z.device)
        offset = torch.rand((), generator=generator, dtype=z.dtype, device=z.device)
        t = (torch.arange(len(x), device=z.device) + offset) / len(x)
        signal, sigma = (0.5 * math.pi * t[:, None]).cos(), (0.5 * math.pi * t[:, None]).sin()
        return F.mse_loss(self(signal * x + sigma * noise, t), signal * noise - sigma * x)

    def _from_noise(self, noise: Tensor) -> Tensor:
        x = noise
        for t, following in pairwise(torch.linspace(1, 0, self.STEPS + 1).tolist()):
            signal, sigma = math.cos(0.5 * math.pi * t), math.sin(0.5 * math.pi * t)
            v = self(x, x.new_full((len(x),), t))
            clean, left = signal * x - sigma * v, sigma * x + signal * v
            x = math.cos(0.5 * math.pi * following) * clean + math.sin(0.5 * math.pi * following) * left
        return x


class CouplingPrior(SecondPrior):
    """A normalizing flow of affine couplings (Dinh et al. 2017), fitted by maximum likelihood; it has a density.

    Each layer scales and shifts half of the dimensions by an MLP of the other half; halves are drawn at random, and
    swapped from one layer to the next.
    """

    kind = "coupling"
    rate = 3e-3
    halves: Tensor
    LAYERS, WIDTH, MOST = 8, 128, 2.0

    def __init__(self, latent_dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__(latent_dim)
        halves: list[Tensor] = []
        while len(halves) < self.LAYERS:
            first = torch.randperm(latent_dim, generator=generator) < latent_dim // 2
            halves += [first, ~first]
        self.register_buffer("halves", torch.stack(halves[: self.LAYERS]))
        width = self.WIDTH
        self.networks = nn.ModuleList(
            nn.Sequential(
                linear_layer(latent_dim, width, generator),
                nn.SiLU(),
                linear_layer(width, width, generator),
                nn.SiLU(),
                _zero(linear_layer(width, 2 * latent_dim, generator)),
            )
            for _ in range(self.LAYERS)
        )

    def _map(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """log-scale and shift [B, Z] of the half that a layer changes, by the other; 0 for the other."""
        half = self.halves[layer]
        log_scale, shift = self.networks[layer](torch.where(half, x, 0)).chunk(2, -1)
        log_scale = self.MOST * torch.tanh(log_scale / self.MOST)
        return torch.where(half, 0, log_scale), torch.where(half, 0, shift)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density [B] in nats at z [B, Z]."""
        x, total = self._standardised(z), -self.scale.log().sum()
        for layer in reversed(range(self.LAYERS)):
            log_scale, shift = self._map(layer, x)
            x = (x - shift) * torch.exp(-log_scale)
            total = total - log_scale.sum(-1)
        return total - 0.5 * (x.square() + math.log(2 * math.pi)).sum(-1)

    def loss(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Mean negative log-density in nats."""
        return -self.log_prob(z).mean()

    def _from_noise(self, noise: Tensor) -> Tensor:
        x = noise
        for layer in range(self.LAYERS):
            log_scale, shift = self._map(layer, x)
            x = x * torch.exp(log_scale) + shift
        return x


KINDS: dict[str, type[DiffusionPrior] | type[CouplingPrior]] = {p.kind: p for p in (DiffusionPrior, CouplingPrior)}


@torch.no_grad()
def aggregated_posterior(
    model: VaMoH, dataset: Dataset, *, split: str = "train", num_points: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [n, Z] of q(z) of every function of a split, or of `FUNCTIONS` of more.

    num_points: the encoder sees at most so many random points of each function (None: all).
    """
    generator = torch.Generator().manual_seed(seed)
    indices = split_indices(dataset, split)
    if len(indices) > FUNCTIONS:
        indices = indices[torch.randperm(len(indices), generator=generator)[:FUNCTIONS]]
    batch = max(1, min(_BATCH, MAX_POINTS // dataset.points))
    found = []
    for part in indices.split(batch):
        points = model.prepare(dataset.batch(part))
        q = model.encode(subsample(points, num_points, generator, model.min_points))
        found.append((q.mean, q.std))
    mean, std = (torch.cat(parts) for parts in zip(*found, strict=True))
    return mean, std


def fit_prior(
    model: VaMoH,
    dataset: Dataset,
    *,
    kind: str = "diffusion",
    steps: int = 2000,
    split: str = "train",
    num_points: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> DiffusionPrior | CouplingPrior:
    """Fit a second-stage prior to samples of q(z | y) of the functions of a split; the model stays as it is.

    kind: "diffusion" or "coupling". steps: updates of `_BATCH` samples each. num_points: as the model was trained, see
    `TrainConfig`. seed: of initial values and all draws; the global random state is left alone.
    progress: a bar on a terminal. Raises ValueError for an unknown kind or an empty split.
    """
    check_type("fit_prior", "model", model, VaMoH)
    check_type("fit_prior", "dataset", dataset, Dataset)
    check_choice("fit_prior", "kind", kind, tuple(KINDS))
    check_positive("fit_prior", "steps", steps)
    check_seed("fit_prior", "seed", seed)
    if num_points is not None:
        check_positive("fit_prior", "num_points", num_points)
    mean, std = aggregated_posterior(model, dataset, split=split, num_points=num_points, seed=seed)
    return fit_latents(mean, std, kind=kind, steps=steps, seed=seed, progress=progress)


def fit_latents(
    mean: Tensor,
    std: Tensor,
    *,
    kind: str = "diffusion",
    steps: int = 2000,
    seed: int = 0,
    progress: bool = False,
) -> DiffusionPrior | CouplingPrior:
    """Fit a second-stage prior to samples of normal distributions, of that mean and std [n, Z]; see `fit_prior`."""
    check_finite("fit_prior", "z", torch.stack([mean, std]))
    prior = KINDS[kind](mean.shape[1], own_generator(seed)).to(mean)
    prior.loc.copy_(mean.mean(0))
    prior.scale.copy_((mean.var(0, correction=0) + std.square().mean(0)).sqrt())
    generator = torch.Generator(mean.device).manual_seed(seed)
    parameters: list[Tensor] = list(prior.parameters())
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, prior.rate, betas=(0.9, 0.99), weight_decay=0.01)
    for step in Progress(range(steps), desc=f"fit {kind}", disable=None if progress else True, leave=False):
        for group in optimizer.param_groups:
            group["lr"] = prior.rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.randint(len(mean), (_BATCH,), generator=generator, device=mean.device)
        noise = torch.randn(_BATCH, mean.shape[1], generator=generator, dtype=mean.dtype, device=mean.device)
        with torch.enable_grad():
            loss = prior.loss(mean[chosen] + std[chosen] * noise, generator)
            optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(kept, parameters, 1 - min(_DECAY, (1 + step) / (10 + step)))
    with torch.no_grad():
        for parameter, average in zip(parameters, kept, strict=True):
            parameter.copy_(average)
    return prior.eval().requires_grad_(False)


def save_prior(run_folder: str | os.PathLike[str], prior: SecondPrior, model: VaMoH) -> Path:
    """Write prior.safetensors into a run folder, whole or not at all, and return its path; one that is there goes.

    model: the one it was fitted to, with which alone it can be loaded.
    """
    path = check_path("prior", "run_folder", run_folder) / NAME
    content = {name: value.detach().cpu().contiguous() for name, value in prior.state_dict().items()}
    metadata = {"format": str(FORMAT), "kind": prior.kind, "model": _fingerprint(model)}
    write_file("prior", path, tensors_to_bytes(content, metadata))
    return path


def has_prior(run_folder: str | os.PathLike[str]) -> bool:
    """Whether a run folder has a second-stage prior."""
    return os.path.lexists(check_path("prior", "run_folder", run_folder) / NAME)


def load_prior(run_folder: str | os.PathLike[str], model: VaMoH) -> DiffusionPrior | CouplingPrior:
    """Read the second-stage prior of a run folder, for its model and on its device.

    Raises FileNotFoundError where there is none, ValueError where the file is damaged or belongs to other parameters
    than the model's, such as those before training went on.
    """
    path = check_path("prior", "run_folder", run_folder) / NAME
    if not os.path.lexists(path):
        raise FileNotFoundError(f"prior: no {NAME} in {run_folder}: vamoh fit-prior makes it")
    metadata, tensors = read_tensors("prior", path, read_file("prior", path))
    version, kind = metadata.get("format"), metadata.get("kind")
    if version != str(FORMAT):
        raise ValueError(f"prior: {path} must have format {FORMAT}, got {shown(version)}")
    if kind not in KINDS:
        raise ValueError(f"prior: {path} must be of kind {' or '.join(KINDS)}, got {shown(kind)}")
    if metadata.get("model") != _fingerprint(model):
        raise ValueError(
            f"prior: {path} was fitted to other parameters than the run has now; fit it again: vamoh fit-prior"
        )
    prior = KINDS[kind](model.latent_dim)
    check_tensors("prior", path, tensors, prior.state_dict())
    prior.load_state_dict(tensors)
    return prior.to(model.encoder.head.weight).eval().requires_grad_(False)


def _zero(layer: nn.Linear) -> nn.Linear:
    """The layer, giving 0 at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _fingerprint(model: VaMoH) -> str:
    """SHA-256 of a model's parameters and buffers."""
    digest = sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
