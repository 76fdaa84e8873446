"""VaMoH: the wiring of all rooms."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_type_hints, overload

import torch
from torch import Tensor, nn

from vamoh._cache import ContentCache
from vamoh._checks import (
    check_finite,
    check_memory,
    check_number,
    check_positive,
    check_seed,
    check_tensor,
    check_type,
    skip_value_checks,
    values_readable,
)
from vamoh._initial import own_generator
from vamoh._options import check_model, check_types, encoder_stages
from vamoh.elbo import ElboTerms, combine, importance_bound
from vamoh.encoder import Encoder, Neighborhood, Stage, check_neighborhoods
from vamoh.encoding import FourierFeatures, raw_metric
from vamoh.gating import Gating, posterior_and_prior, uniform
from vamoh.generator import (
    Draws,
    Part,
    Reconstruction,
    decode,
    expected_log_likelihood,
    log_responsibilities,
    marginal_log_likelihood,
)
from vamoh.hypernet import Hypernet
from vamoh.latent import FlowPrior, NormalPrior, Posterior, kl_cross_entropy, kl_exact
from vamoh.likelihood import Likelihood
from vamoh.ops import CounterNoise
from vamoh.ops._noise import check_noise, counter_noise_reference
from vamoh.ops.gating import categorical_kl
from vamoh.ops.inr_mixture import Inr
from vamoh.ops.knn import knn
from vamoh.ops.point_conv import gather
from vamoh.points import PointSet, domain, lexicographic, observed_coords, upload

Neighborhoods = tuple[Neighborhood, ...]

_REMEMBERED = 1 << 23
"""Most encoded values of a grid to remember (32 MB in float32)."""


@dataclass(frozen=True, eq=False)
class Noise:
    """Standard normal noise of one evaluation of the bound.

    z [B, Z]; kl [S, B, Z], or the seed of it (unused by a normal prior).
    """

    z: Tensor
    kl: Tensor | CounterNoise

    def part(self, functions: slice) -> Noise:
        """The noise of a slice of the batch, the same as it has in the whole one."""
        z, kl = self.z[functions], self.kl
        if isinstance(kl, Tensor):
            return Noise(z, kl[:, functions])
        if functions.start:  # a seed makes the noise of a batch from its start
            kl = counter_noise_reference(kl.seed, range(kl.samples), len(z), z.shape[1], z.dtype, functions.start)
        return Noise(z, kl)


class VaMoH(nn.Module):
    """Variational mixture of hypergenerators (Koyuncu et al., ICML 2023): a VAE over functions.

    A function is a cloud of (coordinate, value) pairs, given as a `PointSet`. Every part of the paper is an argument:

    coord_dim, channels:    D and C of the data.
    latent_dim, components: Z and K.
    frequencies, frequency_scale, learn_frequencies: random Fourier features; 0 frequencies take raw coordinates.
    encoder_centroids, encoder_neighbors, encoder_channels: one PointConv per entry.
    pool_centroids, pool_neighbors: average pooling after the first convolutions, one per entry.
    weight_net, weight_net_slope: widths of the weight net; LeakyReLU slope between its layers, None for an affine map
                            (the published code).
    coord_offset, coord_scale: coordinates of other units than [-1, 1] are normalised to (coords - offset) / scale; D
                            numbers each, or none. `set_domain` measures them.
    neighbor_metric:        "encoded" (published code) or "raw": the coordinates in which neighbours are nearest.
    centroids:              of the encoder: points of the cloud, "ordered" by their coordinates, so that the order in
                            which they come plays no part; "points" in the order given (published code), which the
                            first point and ties then depend on; or "fixed" coordinates, chosen once
                            by `set_centroids`; z then depends neither on the order of points nor on padding.
    encoder_density:        the encoder sees a value y as 2y - 1 with a constant 1 beside it, so that it notices where
                            there are points.
    prior, flow_layers:     "flow" (planar, T layers) or "normal".
    hypernet_widths, inr_widths: hidden widths of the K hypernetworks and of the coordinate networks they make.
    inr_activation, inr_slope, inr_omega: "leaky_relu", "relu" or "sine"; slope of the leak, frequency of the sine.
    gating_widths, gating_bound: hidden widths of both categorical networks; "tanh" bounds their logits (published
                            code), "none" does not (paper).
    likelihood:             "logistic", "bernoulli" or "continuous_bernoulli"; the six arguments after it belong to the
                            logistic, see `vamoh.likelihood.Likelihood`.
    kl, kl_samples:         "exact": the true bound, analytic entropy of q and a reparametrised estimate of
                            E_q[-log p(z)]. "cross_entropy": the published code's term for a flow prior, which lacks the
                            entropy and gives the encoder no gradient. The number of samples of the estimate.
    objective:              "elbo": a network q(c | x, y, z) says which component explains a point. "marginal": the
                            components are summed out exactly, and there is no such network; a tighter bound.
    initialization:         "stable": coordinate networks start at their usual scale, flow and gating near neutral.
                            "published": default linear initialisation and a far-off flow, as the published code.
    seed:                   of all initial values; the global random state is left alone.

    `use_flow` and `use_gating_prior` are the phases of the warm-up: False holds p(z) at N(0, I) and p(c) uniform.
    """

    def __init__(
        self,
        *,
        coord_dim: int,
        channels: int,
        latent_dim: int = 32,
        components: int = 4,
        frequencies: int = 128,
        frequency_scale: float = 2.0,
        learn_frequencies: bool = False,
        coord_offset: Sequence[float] = (),
        coord_scale: Sequence[float] = (),
        encoder_centroids: Sequence[int] = (196, 49, 25),
        encoder_neighbors: Sequence[int] = (9, 9, 9),
        encoder_channels: Sequence[int] = (32, 32, 32),
        pool_centroids: Sequence[int] = (),
        pool_neighbors: Sequence[int] = (),
        weight_net: Sequence[int] = (16, 16),
        weight_net_slope: float | None = None,
        neighbor_metric: str = "encoded",
        centroids: str = "ordered",
        encoder_density: bool = False,
        prior: str = "flow",
        flow_layers: int = 10,
        hypernet_widths: Sequence[int] = (128, 256),
        inr_widths: Sequence[int] = (32, 32),
        inr_activation: str = "leaky_relu",
        inr_slope: float = 0.1,
        inr_omega: float = 30.0,
        gating_widths: Sequence[int] = (32, 32),
        gating_bound: str = "none",
        likelihood: str = "logistic",
        scale: float = 0.1,
        learn_scale: bool = True,
        max_scale: float = 1.0,
        bin_width: float = 1 / 256,
        epsilon: float = 1e-7,
        open_ends: bool = False,
        kl: str = "exact",
        kl_samples: int = 16,
        objective: str = "elbo",
        initialization: str = "stable",
        seed: int = 0,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        for name in ("coord_dim", "channels"):
            check_positive("VaMoH", name, options.pop(name))
        check_seed("VaMoH", "seed", options.pop("seed"))
        options = check_types("VaMoH: ", get_type_hints(VaMoH.__init__), options)
        check_model("VaMoH: ", options)
        if len(coord_offset) not in (0, coord_dim):
            raise ValueError(f"VaMoH: coord_offset must list {coord_dim} numbers or none, got {list(coord_offset)}")
        stages = [Stage(*stage) for stage in encoder_stages(options)]
        self.coord_dim, self.channels, self.latent_dim, self.components = coord_dim, channels, latent_dim, components
        self.neighbor_metric, self.centroids = neighbor_metric, centroids
        self.kl, self.kl_samples = kl, kl_samples
        self.use_flow = self.use_gating_prior = True
        stable = initialization == "stable"
        bounded = gating_bound == "tanh"

        def build(draw: torch.Generator) -> None:
            self.encoding = FourierFeatures(coord_dim, frequencies, frequency_scale, learn_frequencies, draw)
            encoded = self.encoding.out_dim
            self.encoder = Encoder(
                encoded,
                channels,
                latent_dim,
                stages,
                weight_net,
                weight_net_slope,
                published=not stable,
                generator=draw,
                density=encoder_density,
                fixed_in=coord_dim if centroids == "fixed" else None,
            )
            self.prior = FlowPrior(latent_dim, flow_layers, stable, draw) if prior == "flow" else NormalPrior()
            self.inr = Inr((encoded, *inr_widths, channels), inr_activation, inr_slope, inr_omega)
            self.hypernet = Hypernet(latent_dim, components, hypernet_widths, self.inr.widths, not stable, draw)
            self.gating_prior = Gating(encoded, 0, latent_dim, gating_widths, components, bounded, draw)
            self.gating_posterior = (
                Gating(encoded, channels, latent_dim, gating_widths, components, bounded, draw)
                if objective == "elbo"
                else None
            )

        with torch.device("meta"):  # of sizes alone, to know what it will take
            _check_memory(self, build)
        build(own_generator(seed))
        if len(coord_offset):
            self.encoding.set_domain(torch.tensor(coord_offset), torch.tensor(coord_scale))
        self.likelihood = Likelihood(
            likelihood,
            components,
            channels,
            scale=scale,
            learn_scale=learn_scale,
            max_scale=max_scale,
            bin_width=bin_width,
            epsilon=epsilon,
            open_ends=open_ends,
        )
        self._standard_normal = NormalPrior()
        self._neighborhoods: ContentCache[Neighborhoods] = ContentCache()
        self._looked = False
        self._site_neighbors: ContentCache[Tensor] = ContentCache()

    @property
    def min_points(self) -> int:
        """Fewest observed points per function that the encoder accepts."""
        return self.encoder.min_points

    @torch.no_grad()
    def set_domain(self, coords: Tensor, mask: Tensor | None = None) -> None:
        """Normalise coordinates of any units from now on, such that these, of training data, lie within [-1, 1].

        coords and mask as in a `PointSet`; `vamoh.points.domain` says by what offset and scale. They become part of the
        model's state. Coordinates are given in their own units everywhere, and gradients to them have these units too.
        """
        self._check_coords("set_domain", coords, coords.shape[0])
        offset, scale = domain(observed_coords(coords, mask))
        self.encoding.set_domain(torch.tensor(offset), torch.tensor(scale))

    @property
    def needs_centroids(self) -> bool:
        """Whether `set_centroids` must come before the encoder can be used."""
        return self.encoder.fixed is not None and not self.encoder.fixed.is_set

    @torch.no_grad()
    def set_centroids(self, coords: Tensor) -> None:
        """Choose the fixed centroids of all encoder stages among coords [N, D], which cover the functions' domain.

        They are farthest-point samples, in the metric of `neighbor_metric`, and kept in the state. `set_domain`, where
        it is needed, comes first. The points nearest to a centroid are the sites at which the encoder looks for
        its neighbours, so coords as dense as the clouds to come are best: a grid itself, or as many points. Denser
        clouds are seen at this density.
        Raises ValueError for a model of centroids="points".
        """
        fixed = self.encoder.fixed
        if fixed is None:
            raise ValueError(f'set_centroids: the model must have centroids="fixed", got centroids="{self.centroids}"')
        check_tensor("set_centroids", "coords", coords, ["N", self.coord_dim], like=fixed.centroids)
        check_finite("set_centroids", "coords", coords)
        if len(coords) == 0:
            raise ValueError("set_centroids: coords must hold at least one point, got none")
        place = coords if self._metric else self.encoding.normalized(coords)
        metric, table = _distances(place, None, len(coords) * len(fixed.centroids), self._metric)
        fixed.set(coords, metric, table, self.encoder.stages)

    def prepare(self, points: PointSet, *, again: bool = True) -> PointSet:
        """Copy points from host memory to the model's device; nothing waits for a GPU's copy, or looks at it later.

        What `neighborhoods` and `elbo` must know of the contents is looked at here, in host memory. A mask shared by
        the batch still makes them wait: give `points.compact()`. again: the same coordinates will come again; copy and
        search them once, and look for opposite points among them.
        """
        self._check_points(points, anywhere=True)
        device = self.encoder.head.weight.device
        if device.type == "cpu":
            return points
        points.value_range()
        points.observed()
        self._look_at_sampling(points.coords, points.mask)
        own = points.coords.dim() == 3
        coords, mask = self.encoding.copied(points.coords, points.mask if own else None, again)
        if not own and points.mask is not None:
            mask = upload(points.mask, device)
        return points.copied(coords, upload(points.values, device), mask)

    def neighborhoods(self, points: PointSet) -> Neighborhoods:
        """Centroids and neighbours of every encoder stage; remembered for coordinates and masks that come again.

        With a mask shared by the batch the indices count the observed points only (`PointSet.compact`).
        """
        self._check_points(points)
        return self._find_neighborhoods(points.compact())

    def encode(self, points: PointSet, *, neighborhoods: Neighborhoods | None = None) -> Posterior:
        """q(z | observed points) of every function."""
        self._check_points(points)
        return self._encode(points.compact(), neighborhoods)[0]

    def elbo(
        self,
        points: PointSet,
        *,
        context: Tensor | None = None,
        neighborhoods: Neighborhoods | None = None,
        beta_z: float = 1.0,
        beta_c: float = 1.0,
        noise: Noise | None = None,
        generator: torch.Generator | None = None,
    ) -> ElboTerms:
        """Terms [B] of the bound on the observed points, by one sample of z; differentiable.

        context [N] or [B, N] bool: which of the observed points the encoder sees, all by default. The likelihood is of
        all of them in any case: the bound then trains q(z) to fill in what is hidden.
        neighborhoods, of what the encoder sees, and noise default to `neighborhoods(points)` and `draw_noise(B)`.
        Raises ValueError for values outside [0, 1].
        """
        self._check_points(points)
        check_number("elbo", "beta_z", beta_z)
        check_number("elbo", "beta_c", beta_c)
        seen = points = points.compact() if context is None else points
        if context is not None:
            points, context, seen = self._in_context(points, context)
        self._check_values(points)
        noise = (
            self.draw_noise(points.batch, generator=generator) if noise is None else self._check_noise(noise, points)
        )
        posterior, features = self._encode(seen, neighborhoods)
        if context is not None:
            features = self.encoding.cached(points.coords)
        z = posterior.sample(noise.z)
        theta, mirror = self.hypernet(z), self._mirror(points)
        if self.gating_posterior is None:
            log_p = self._log_prior_c(features, z)
            log_q = self._log_responsibilities(theta, features, points, log_p, mirror, beta_c)
        else:
            log_q, log_p = self._log_q_and_p(self.gating_posterior, features, z, points.values)
            if context is not None:  # where the encoder sees nothing, nothing knows the value
                log_q = torch.where(context.expand(points.batch, -1)[:, None], log_q, log_p)
        q, kl_c = categorical_kl(log_q, log_p, points.mask)
        log_likelihood = expected_log_likelihood(
            theta, features, points.values, q, points.mask, self.inr, self.likelihood, mirror
        )
        estimate = kl_exact if self.kl == "exact" else kl_cross_entropy
        kl_z = estimate(posterior, self._prior_z, noise.kl)
        return combine(log_likelihood, kl_z, kl_c, beta_z, beta_c)

    @torch.no_grad()
    def iwae(
        self,
        points: PointSet,
        *,
        samples: int = 64,
        neighborhoods: Neighborhoods | None = None,
        generator: torch.Generator | None = None,
        proper: bool = False,
    ) -> Tensor:
        """Importance-weighted bound [B] in nats of log p(observed values), by `samples` draws of z; no gradient.

        The components are summed out exactly. `proper` scores 8-bit values with a normalised probability over 256
        levels, whatever bins the model was trained with (logistic only): what bits per dimension need.
        """
        self._check_points(points)
        check_positive("iwae", "samples", samples)
        check_type("iwae", "proper", proper, bool)
        points = points.compact()
        self._check_values(points)
        posterior, features = self._encode(points, neighborhoods)
        log_weights = []
        for _ in range(samples):
            z = posterior.sample(self._randn(points.batch, generator=generator))
            log_likelihood = marginal_log_likelihood(
                self.hypernet(z),
                features,
                points.values,
                self._log_prior_c(features, z),
                points.mask,
                self.inr,
                self.likelihood,
                proper,
                self.encoding.mirror(points.coords),
            )
            log_weights.append(log_likelihood + self._prior_z.log_prob(z) - posterior.log_prob(z))
        return importance_bound(torch.stack(log_weights))

    @overload
    def reconstruct(
        self,
        points: PointSet,
        coords: Tensor | None = None,
        *,
        z: Tensor | None = None,
        posterior_at: Tensor | None = None,
        neighborhoods: Neighborhoods | None = None,
        progress: bool = False,
        draws: None = None,
        generator: torch.Generator | None = None,
    ) -> Reconstruction: ...

    @overload
    def reconstruct(
        self,
        points: PointSet,
        coords: Tensor | None = None,
        *,
        posterior_at: Tensor | None = None,
        neighborhoods: Neighborhoods | None = None,
        progress: bool = False,
        draws: int,
        generator: torch.Generator | None = None,
    ) -> Draws: ...

    @torch.no_grad()
    def reconstruct(
        self,
        points: PointSet,
        coords: Tensor | None = None,
        *,
        z: Tensor | None = None,
        posterior_at: Tensor | None = None,
        neighborhoods: Neighborhoods | None = None,
        progress: bool = False,
        draws: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Reconstruction | Draws:
        """Encode the observed points, decode anywhere: reconstruction, completion, super-resolution.

        coords: [M, D] or [B, M, D], default the points' own coordinates, observed or not.
        z: [B, Z], default the posterior mean.
        posterior_at: [N] int64, the position in `coords` of every given point; there, where a point is observed, the
        posterior over components replaces the prior. Default: every point, if `coords` is not given, else none.
        progress: show a bar on standard error, for fine grids.
        draws: decode so many draws from q(z), by `generator`, instead of its mean; see `Draws`. The encoder runs once.
        Without gradients; `decode(encode(points).mean, coords)` has them.
        """
        where = "reconstruct"
        self._check_points(points)
        check_type(where, "progress", progress, bool)
        if draws is not None:
            check_positive(where, "draws", draws)
            if z is not None:
                raise ValueError(f"{where}: z must be left out with draws, which are of q(z)")
            q = self.encode(points, neighborhoods=neighborhoods)
            drawn = torch.cat([q.sample(self._randn(points.batch, generator=generator)) for _ in range(draws)])
            again = points.repeat(draws)
            if coords is not None and coords.dim() == 3:
                coords = coords.repeat(draws, 1, 1)
            result = self.reconstruct(again, coords, z=drawn, posterior_at=posterior_at, progress=progress)
            return Draws(result.mean.unflatten(0, (draws, points.batch)))
        if coords is None:
            coords, posterior_at = points.coords, torch.arange(points.count, device=points.values.device)
        else:
            self._check_coords(where, coords, points.batch)
        if z is None:
            z = self.encode(points, neighborhoods=neighborhoods).mean
        else:
            check_tensor(where, "z", z, [points.batch, self.latent_dim], like=points.values)
        if posterior_at is None:
            return self._decode(z, coords, progress)
        check_tensor(where, "posterior_at", posterior_at, [points.count], dtypes=[torch.int64])
        if posterior_at.numel() and (posterior_at.min() < 0 or posterior_at.max() >= coords.shape[-2]):
            raise ValueError(f"{where}: posterior_at must index the {coords.shape[-2]} coords")
        features = self.encoding.cached(points.coords)
        if self.gating_posterior is None:
            theta, log_p = self.hypernet(z), self._log_prior_c(features, z)
            known = self._log_responsibilities(theta, features, points, log_p, self._mirror(points))
        else:
            known = self.gating_posterior(features, z, points.values)
        observed = (
            torch.ones(points.batch, points.count, dtype=torch.bool, device=z.device)
            if points.mask is None
            else points.mask.expand(points.batch, -1)
        )
        return self._decode(z, coords, progress, (known, observed, posterior_at))

    @torch.no_grad()
    def complete(self, points: PointSet, *, neighborhoods: Neighborhoods | None = None) -> Tensor:
        """Values [B, N, C] of all points: those observed as they are, the model's mean where the mask hides them."""
        mean = self.reconstruct(points, neighborhoods=neighborhoods).mean
        return points.values if points.mask is None else torch.where(points.mask[..., None], points.values, mean)

    def decode(self, z: Tensor, coords: Tensor, *, with_pi: bool = True, progress: bool = False) -> Reconstruction:
        """Functions of latents z [B, Z] at coords [M, D] or [B, M, D], mixed by the prior over components.

        Where z or coords need a gradient, the result is differentiable: in them and in the model's parameters. It then
        holds what the gradient needs. Gradients to coords take plain torch, which keeps every activation, and have
        second derivatives. Elsewhere, and under `torch.no_grad`, there is no gradient, and besides the result and three
        indices per point, memory does not grow with M. with_pi False leaves the component probabilities, the largest
        part, out of the result; progress shows a bar on standard error.
        """
        check_tensor("decode", "z", z, ["B", self.latent_dim], like=self.encoder.head.weight)
        check_type("decode", "with_pi", with_pi, bool)
        check_type("decode", "progress", progress, bool)
        self._check_coords("decode", coords, z.shape[0])
        with torch.set_grad_enabled(torch.is_grad_enabled() and (z.requires_grad or coords.requires_grad)):
            return self._decode(z, coords, progress, with_pi=with_pi)

    @torch.no_grad()
    def sample(self, count: int, coords: Tensor, *, generator: torch.Generator | None = None) -> Reconstruction:
        """`count` new functions from the prior, at coords [M, D]; means, without observation noise."""
        return self.decode(self.sample_prior(count, generator=generator), coords)

    @torch.no_grad()
    def sample_prior(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Latents [count, Z] from the prior."""
        check_positive("sample_prior", "count", count)
        return self._prior_z.sample(self._randn(count, generator=generator))

    def draw_noise(self, batch: int, *, generator: torch.Generator | None = None) -> Noise:
        """Standard normal noise for one evaluation of the bound on a batch of that size.

        The samples for the flow prior are a seed: they are made where they are used and never stored.
        """
        check_positive("draw_noise", "batch", batch)
        z = self._randn(batch, generator=generator)
        seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device if generator else z.device)
        return Noise(z, CounterNoise(upload(seed, z.device), self.kl_samples))

    def _look_at_sampling(self, coords: Tensor, mask: Tensor | None) -> None:
        """Once in training, for coords [N, D] or [B, N, D] in host memory: warn of units that cannot work."""
        if self._looked or not self.training or coords.device.type != "cpu" or torch.compiler.is_compiling():
            return
        self._looked = True
        one = coords if coords.dim() == 2 else coords[0]
        problem = self.encoding.problem(observed_coords(one, mask if mask is None or mask.dim() == 1 else mask[0]))
        if problem:
            warnings.warn(f"VaMoH: {problem}", stacklevel=2)

    @property
    def domain(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Offset and scale of the coordinates; () and () where they are taken as they are."""
        offset, scale = self.encoding.offset, self.encoding.scale
        return () if offset is None else tuple(offset.tolist()), () if scale is None else tuple(scale.tolist())

    @property
    def _prior_z(self) -> NormalPrior | FlowPrior:
        return self.prior if self.use_flow else self._standard_normal

    def _log_prior_c(self, features: Tensor, z: Tensor) -> Tensor:
        return self.gating_prior(features, z) if self.use_gating_prior else uniform(len(z), self.components, z)

    def _log_q_and_p(self, posterior: Gating, features: Tensor, z: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.use_gating_prior:
            return posterior_and_prior(posterior, self.gating_prior, features, z, values)
        return posterior(features, z, values), self._log_prior_c(features, z)

    def _log_responsibilities(
        self, theta: Tensor, features: Tensor, points: PointSet, log_p: Tensor, mirror: Tensor | None, beta: float = 1.0
    ) -> Tensor:
        return log_responsibilities(
            theta, features, points.values, log_p, points.mask, self.inr, self.likelihood, mirror, beta
        )

    @property
    def _metric(self) -> FourierFeatures | None:
        """The encoding between whose values distances are measured; None: between coordinates."""
        return self.encoding if self.neighbor_metric == "encoded" and len(self.encoding.frequencies) else None

    def _find_neighborhoods(self, points: PointSet) -> Neighborhoods:
        fixed = self.encoder.fixed
        if fixed is not None:
            if not fixed.is_set:
                raise ValueError(
                    'encoder: centroids="fixed" must be set before anything is encoded: '
                    "model.set_centroids(coords [N, D]) with points that cover the domain"
                )
            if torch.compiler.is_compiling() and points.mask is None:
                frequencies = self.encoding.frequencies.detach() if self._metric else None
                coords = points.coords if points.coords.dim() == 3 else points.coords[None]
                coords, sites = self.encoding.normalized(coords.detach()), self.encoding.normalized(fixed.sites)
                return fixed.neighborhoods(points.count, site_neighbors_in_graph(coords, sites, frequencies))
            return fixed.neighborhoods(points.count, self._remembered_site_neighbors(points, fixed.sites))
        if torch.compiler.is_compiling() and points.mask is None:
            metric = self.encoding.frequencies if self.neighbor_metric == "encoded" else None
            coords = points.coords if points.coords.dim() == 3 else points.coords[None]
            sizes = [size for stage in self.encoder.stages for size in stage[:2]]
            coords = self.encoding.normalized(coords)
            pairs = neighborhoods_in_graph(
                coords.detach(), None if metric is None else metric.detach(), sizes, self.centroids == "ordered"
            )
            return tuple(Neighborhood(*pair) for pair in zip(pairs[::2], pairs[1::2], strict=True))
        found: Neighborhoods = self._remembered_neighborhoods(points)
        return found

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _remembered_neighborhoods(self, points: PointSet) -> Neighborhoods:
        metric = self.encoding.frequencies if self.neighbor_metric == "encoded" else None
        key = (points.coords, points.mask, metric, self.encoding.offset, self.encoding.scale)
        return self._neighborhoods.get(key, lambda: self._search_neighborhoods(points))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _remembered_site_neighbors(self, points: PointSet, sites: Tensor) -> Tensor:
        frequencies = self.encoding.frequencies if self._metric else None

        def search() -> Tensor:
            self._look_at_sampling(points.coords, points.mask)
            self.encoder.check_observed(points.observed()[0])
            if self._metric:
                return _nearest_to_sites(points.coords, points.mask, sites, self._metric)
            coords, wanted = self.encoding.normalized(points.coords), self.encoding.normalized(sites)
            return _nearest_to_sites(coords, points.mask, wanted, None)

        key = (points.coords, points.mask, sites, frequencies, self.encoding.offset, self.encoding.scale)
        return self._site_neighbors.get(key, search)

    @torch.no_grad()
    def _search_neighborhoods(self, points: PointSet) -> Neighborhoods:
        self._look_at_sampling(points.coords, points.mask)
        encoding = self.encoding if self.neighbor_metric == "encoded" else None
        observed = None if points.mask is None else points.observed()
        coords = self.encoding.normalized(points.coords) if encoding is None else points.coords
        return _search(coords, points.mask, observed, encoding, self.encoder, self.centroids == "ordered")

    def _encode(self, points: PointSet, neighborhoods: Neighborhoods | None) -> tuple[Posterior, Tensor]:
        """q(z) and the encoded coordinates of compacted points."""
        fixed = self.encoder.fixed
        if neighborhoods is None:
            neighborhoods = self._find_neighborhoods(points)
        else:
            behind = 0 if fixed is None else len(fixed.centroids)
            check_neighborhoods(neighborhoods, self.encoder.stages, points.batch, points.count, behind)
        features = self.encoding.cached(points.coords)
        encoded = features if features.dim() == 3 else features[None]
        anchors = None if fixed is None else self.encoding.cached(fixed.centroids)[None]
        with skip_value_checks():
            logits = self.encoder(points.values, encoded, neighborhoods, anchors)
        return Posterior.from_logits(logits), features

    def _in_context(self, points: PointSet, context: Tensor) -> tuple[PointSet, Tensor, PointSet]:
        """The points that any function observes, the context of these, and what of them the encoder sees."""
        shapes = ((points.count,), (points.batch, points.count))
        if not isinstance(context, Tensor) or tuple(context.shape) not in shapes:
            got = list(context.shape) if isinstance(context, Tensor) else type(context).__name__
            raise ValueError(
                f"elbo: context must have shape [{points.count}] or [{points.batch}, {points.count}], got {got}"
            )
        check_tensor("elbo", "context", context, list(context.shape), dtypes=[torch.bool])
        if points.mask is not None:
            observed = points.mask if points.mask.dim() == 1 else points.mask.any(0)
            if not bool(observed.all()):
                index = observed.nonzero()[:, 0]
                points, context = points.select(index), context[..., index]
        seen = points.restrict(context)
        # Fixed centroids need no other points, and these have been seen before.
        seen = seen if self.encoder.fixed is not None and context.dim() == 2 else seen.compact()
        return points.compact(), context, seen

    def _mirror(self, points: PointSet) -> Tensor | None:
        """Opposite points; not where a GPU would have to wait to know which of them are observed."""
        masked = points.mask is not None and points.mask.device.type != "cpu"
        return None if masked else self.encoding.mirror(points.coords)

    def _decode(
        self,
        z: Tensor,
        coords: Tensor,
        progress: bool,
        posterior: tuple[Tensor, Tensor, Tensor] | None = None,
        with_pi: bool = True,
    ) -> Reconstruction:
        """Decode with the prior over components, or the posterior where `posterior` has an observed point.

        posterior: log-probabilities [B, K, N], observed [B, N], positions [N] in coords.
        """

        given = None
        if posterior is not None:
            given = torch.full((coords.shape[-2],), -1, device=z.device)  # which point each coordinate is, -1: none
            given[posterior[2]] = torch.arange(len(posterior[2]), device=z.device)

        def log_pi(features: Tensor, index: Part) -> Tensor:
            log_p = self._log_prior_c(features, z)
            if posterior is None or given is None:
                return log_p
            known, observed, _ = posterior
            here = given[index]
            point = here.clamp(min=0)
            replaced = (here >= 0) & observed.index_select(1, point)
            return torch.where(replaced[:, None], known.index_select(2, point), log_p)

        # features of a grid that is not too large are remembered: it comes again
        whole = (
            self.encoding.cached(coords) if coords.shape[:-1].numel() * self.encoding.out_dim <= _REMEMBERED else None
        )

        def encode(index: Part) -> Tensor:
            if whole is None:
                return self.encoding(coords[..., index, :])  # type: ignore[no-any-return]
            return whole[..., index, :]

        return decode(
            self.hypernet(z),
            coords.shape[-2],
            encode,
            log_pi,
            self.inr,
            self.likelihood,
            shared=coords.dim() == 2,
            mirror=self.encoding.mirror(coords),
            with_pi=with_pi,
            progress=progress,
            differentiable=torch.is_grad_enabled(),
        )

    def _randn(self, *shape: int, generator: torch.Generator | None) -> Tensor:
        check_type("VaMoH", "generator", generator, torch.Generator, type(None))
        like = self.encoder.head.weight
        noise = torch.randn(
            *shape,
            self.latent_dim,
            generator=generator,
            dtype=like.dtype,
            device=generator.device if generator else like.device,
        )
        return upload(noise, like.device)

    def _check_values(self, points: PointSet) -> None:
        if values_readable(points.values):
            self.likelihood.check_values(*points.value_range())

    def _check_points(self, points: PointSet, *, anywhere: bool = False) -> None:
        where, like = "VaMoH", self.encoder.head.weight
        if not isinstance(points, PointSet):
            raise TypeError(f"{where}: points must be a PointSet, got {type(points).__name__}")
        if points.coord_dim != self.coord_dim:
            raise ValueError(
                f"{where}: coords must have D={self.coord_dim} dimensions, got {list(points.coords.shape)}"
            )
        shape: list[int | str | None] = ["B", "N", self.channels]
        if anywhere:
            check_tensor(where, "values", points.values, shape, dtypes=[like.dtype])
        else:
            check_tensor(where, "values", points.values, shape, like=like)

    def _check_noise(self, noise: Noise, points: PointSet) -> Noise:
        where, like = "elbo", points.values
        check_type(where, "noise", noise, Noise)
        check_tensor(where, "noise.z", noise.z, [points.batch, self.latent_dim], like=like)
        if not isinstance(self._prior_z, NormalPrior):
            check_noise(where, "noise.kl", noise.kl, noise.z)
        return noise

    def _check_coords(self, where: str, coords: Tensor, batch: int) -> None:
        if not isinstance(coords, Tensor) or coords.dim() not in (2, 3):
            got = list(coords.shape) if isinstance(coords, Tensor) else type(coords).__name__
            raise ValueError(
                f"{where}: coords must have shape [M, {self.coord_dim}] or [B, M, {self.coord_dim}], got {got}"
            )
        shape: list[int | str | None] = ["M", self.coord_dim] if coords.dim() == 2 else [batch, "M", self.coord_dim]
        check_tensor(where, "coords", coords, shape, like=self.encoder.head.weight)


def _search(
    coords: Tensor,
    mask: Tensor | None,
    observed: tuple[int, int] | None,
    encoding: FourierFeatures | None,
    encoder: Encoder,
    ordered: bool,
) -> Neighborhoods:
    """Neighbourhoods of points at coords [N, D] or [B, N, D], nearest in encoded coordinates or, without encoding, in
    these. mask [B, N]; observed as in `Encoder.neighborhoods`. ordered: take them in the order of their coordinates.
    """
    metric, table = coords, None
    if encoding is not None:
        # shared coordinates have no point that no function observes
        kept = mask if coords.dim() == 3 else None
        metric, table = encoding.metric(coords, kept, coords.shape[-2] * encoder.stages[0].centroids)
    batched = metric if metric.dim() == 3 else metric[None]
    order = lexicographic(coords if coords.dim() == 3 else coords[None]) if ordered else None  # [B|1, N]
    with skip_value_checks():
        if order is None or _is_identity(order):
            return encoder.neighborhoods(batched, mask, table, observed)
        batched = gather(batched, order)
        mask = None if mask is None else mask.gather(1, order.expand(len(mask), -1))
        (centroids, neighbors), *later = encoder.neighborhoods(batched, mask, table, observed)
        order = order.expand(len(centroids), -1)
        given = order.gather(1, centroids.clamp(min=0)).where(centroids >= 0, -1)
        return Neighborhood(given, order.gather(1, neighbors.flatten(1)).view_as(neighbors)), *later


def _is_identity(order: Tensor) -> bool:
    """Whether an order changes nothing, as that of a grid; where a GPU would wait for the answer, False."""
    return order.device.type == "cpu" and bool((order == torch.arange(order.shape[1])).all())


def _distances(
    coords: Tensor, mask: Tensor | None, distances: int, encoding: FourierFeatures | None
) -> tuple[Tensor, Tensor | None]:
    """As `FourierFeatures.metric`, between coordinates if there is no encoding. A GPU would wait for a table."""
    if coords.device.type != "cpu":
        return coords if encoding is None else encoding.cached(coords), None
    return raw_metric(coords, mask, distances) if encoding is None else encoding.metric(coords, mask, distances)


def _nearest_to_sites(coords: Tensor, mask: Tensor | None, sites: Tensor, encoding: FourierFeatures | None) -> Tensor:
    """Index [B|1, M, S] of the point nearest to each of sites [M, S, D], among those at coords [N, D] or [B, N, D] that
    mask [B, N] leaves. Neither the order of points nor what else is in the batch decides between equally near ones.
    """
    unique, place = _UNIQUE.get((sites,), lambda: sites.flatten(0, 1).unique(dim=0, return_inverse=True))
    order = lexicographic(coords)  # [N] or [B, N]
    own = coords.dim() == 3
    ordered = coords.gather(1, order[..., None].expand_as(coords)) if own else coords[order]
    known = None if mask is None else mask.gather(1, order) if own else mask[:, order]
    both = torch.cat([ordered, unique.expand(*coords.shape[:-2], -1, -1)], -2)
    # shared coordinates have no point that no function observes
    kept = None if known is None or not own else torch.cat([known, known.new_ones(len(known), len(unique))], 1)
    metric, table = _distances(both, kept, order.shape[-1] * len(unique), encoding)
    points, queries = metric.split([order.shape[-1], len(unique)], -2)
    if known is not None and not own:
        points, queries = points.expand(len(known), -1, -1), queries.expand(len(known), -1, -1)
    with skip_value_checks():
        nearest = knn(points, queries, 1, known, table=table)[..., 0]  # [B, R] or [R]
    nearest = order.gather(1, nearest) if own else order[nearest]
    return nearest[..., place.flatten()].view(-1, *sites.shape[:2])


_UNIQUE: ContentCache[tuple[Tensor, Tensor]] = ContentCache()
"""Sites [R, D] without repetitions, and where each of them went."""

_ENCODINGS: ContentCache[FourierFeatures] = ContentCache()
"""What `neighborhoods_in_graph` remembers, by frequencies: a compiled or exported program has no model to do so."""


@torch.library.custom_op(
    "vamoh::neighborhoods",
    mutates_args=(),
    schema="(Tensor coords, Tensor? frequencies, int[] sizes, bool ordered) -> Tensor[]",
)
def neighborhoods_in_graph(
    coords: Tensor, frequencies: Tensor | None, sizes: Sequence[int], ordered: bool
) -> list[Tensor]:
    """The search of `VaMoH.neighborhoods` as one step of a traced graph, because values decide on its way.

    coords [B|1, N, D], all observed; frequencies [E/2, D], or None for neighbours in raw coordinates; sizes: M and S of
    every encoder stage in turn. Returns centroids [B|1, M] and neighbors [B|1, M, S], int64, of every stage in turn.
    """
    stages = [Stage(m, s, None) for m, s in zip(sizes[::2], sizes[1::2], strict=True)]
    encoding = None
    if frequencies is not None:
        encoding = _ENCODINGS.get((frequencies,), lambda: FourierFeatures.of(frequencies))
    found = _search(coords, None, None, encoding, Encoder.without_weights(stages), ordered)
    return [index for hood in found for index in hood]


@neighborhoods_in_graph.register_fake
def _(coords: Tensor, frequencies: Tensor | None, sizes: Sequence[int], ordered: bool) -> list[Tensor]:
    batch, count, _ = coords.shape
    found = []
    for m, s in zip(sizes[::2], sizes[1::2], strict=True):
        count = min(m, count)
        found += [coords.new_empty((batch, count, *more), dtype=torch.int64) for more in ((), (s,))]
    return found


def _check_memory(model: nn.Module, build: Callable[[torch.Generator], None]) -> None:
    """Raise ValueError where the parameters would take more memory than there is."""
    try:
        build(torch.Generator())
    except RuntimeError as error:  # the number of bytes is beyond 64 bits
        raise ValueError("VaMoH: the parameters would take more than 2^63 bytes of memory") from error
    check_memory("VaMoH", "the parameters", sum(value.nbytes for value in model.state_dict().values()))


@torch.library.custom_op(
    "vamoh::site_neighbors", mutates_args=(), schema="(Tensor coords, Tensor sites, Tensor? frequencies) -> Tensor"
)
def site_neighbors_in_graph(coords: Tensor, sites: Tensor, frequencies: Tensor | None) -> Tensor:
    """As `neighborhoods_in_graph`, for fixed centroids: neighbours [B|1, M, S] of the first stage.

    coords [B|1, N, D], all observed; sites [M, S, D].
    """
    encoding = None
    if frequencies is not None:
        encoding = _ENCODINGS.get((frequencies,), lambda: FourierFeatures.of(frequencies))
    return _nearest_to_sites(coords, None, sites, encoding)


@site_neighbors_in_graph.register_fake
def _(coords: Tensor, sites: Tensor, frequencies: Tensor | None) -> Tensor:
    return coords.new_empty((coords.shape[0], *sites.shape[:2]), dtype=torch.int64)
