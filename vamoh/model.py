"""VaMoH: the wiring of all rooms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints, overload

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
from vamoh.encoder import Encoder, check_neighborhoods
from vamoh.encoding import FourierFeatures
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
from vamoh.geometry import (
    Geometry,
    Neighborhoods,
    Search,
    Stage,
    copy_to_device,
    features,
    find_mirror,
    geometry,
    measure,
    observed_counts,
)
from vamoh.hypernet import Hypernet
from vamoh.latent import FlowPrior, NormalPrior, Posterior, kl_cross_entropy, kl_exact
from vamoh.likelihood import Likelihood
from vamoh.ops import CounterNoise
from vamoh.ops._noise import check_noise, counter_noise_reference
from vamoh.ops.gating import categorical_kl
from vamoh.ops.inr_mixture import Inr
from vamoh.points import PointSet, domain, observed_coords, upload

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
        self._cache: ContentCache[Any] = ContentCache()
        self._sampling_checked = False

    @property
    def min_points(self) -> int:
        """Fewest observed points per function that the encoder accepts."""
        return self._search.min_points

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
        distances = len(coords) * len(fixed.centroids)
        metric, table = measure(coords, self.encoding, self.neighbor_metric == "encoded", self._cache, distances)
        fixed.set(coords, metric, table, self.encoder.stages)

    def prepare(self, points: PointSet, *, again: bool = True) -> PointSet:
        """Copy points from host memory to the model's device. Copies are asynchronous; no later step synchronises with
        the device.

        What `neighborhoods` and `elbo` must know of the contents is read here, in host memory. Points that no function
        observes still make them wait: give `points.compact()`. again: the same coordinates will come again; copy and
        search them once, and look for their mirror.
        """
        self._check_points(points, anywhere=True)
        device, mask = self.encoder.head.weight.device, points.mask
        if device.type == "cpu":
            return points
        self._check_sampling(points.coords, mask)
        own = points.coords.dim() == 3
        coords, masked = copy_to_device(points.coords, mask if own else None, self.encoding, self._cache, again)
        values = upload(points.values, device)
        self._cache.put((values,), points.value_range(), "range")
        if mask is None:
            return points._with(coords, values, None)
        masked = self.prepare_mask(mask, masked)
        copy, compact = points._with(coords, values, masked), points.compact()
        if compact.mask is not None and torch.equal(compact.values, points.values):
            self._cache.put((masked, coords, values), copy, "compact")
        return copy

    def prepare_mask(self, mask: Tensor, copy: Tensor | None = None) -> Tensor:
        """Copy a mask or context [B, N] likewise, or take that copy: neighbours are searched without reading it."""
        copy = upload(mask, self.encoder.head.weight.device) if copy is None else copy
        if copy is not mask:
            self._cache.put((copy,), observed_counts(mask), "observed")
        return copy

    def neighborhoods(self, points: PointSet) -> Neighborhoods:
        """Centroids and neighbours of every encoder stage; remembered for coordinates and masks that come again.

        With a mask shared by the batch the indices count the observed points only (`PointSet.compact`).
        """
        self._check_points(points)
        return self._geometry(self._compact(points), mirrored=False).neighborhoods

    @torch.no_grad()
    def geometry(self, points: PointSet, *, context: Tensor | None = None) -> Geometry:
        """What follows from where the observed points are, as `elbo` uses it; remembered as the neighbourhoods are."""
        self._check_points(points)
        if context is None:
            return self._geometry(self._compact(points))
        points, context = self._in_context(points, context)
        return self._geometry(self._compact(points), seen=self._seen(points, context))

    def encode(self, points: PointSet, *, neighborhoods: Neighborhoods | None = None) -> Posterior:
        """q(z | observed points) of every function."""
        self._check_points(points)
        points = self._compact(points)
        return self._posterior(points, self._geometry(points, neighborhoods, mirrored=False))

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
        if context is not None:
            points, context = self._in_context(points, context)
            seen = points._with(points.coords, points.values, self._seen(points, context))
        points = self._compact(points)
        self._check_values(points)
        noise = (
            self.draw_noise(points.batch, generator=generator) if noise is None else self._check_noise(noise, points)
        )
        if context is None:
            place = self._geometry(points, neighborhoods)
            posterior = self._posterior(points, place)
        elif neighborhoods is None:
            place = self._geometry(points, seen=seen.mask)
            posterior = self._posterior(points, place)
        else:
            place, seen = self._geometry(points, search=False), self._compact(seen)
            posterior = self._posterior(seen, self._geometry(seen, neighborhoods))
        z = posterior.sample(noise.z)
        theta = self.hypernet(z)
        if self.gating_posterior is None:
            log_p = self._log_prior_c(place.features, z)
            log_q = self._log_responsibilities(theta, place, points, log_p, beta_c)
        else:
            log_q, log_p = self._log_q_and_p(self.gating_posterior, place.features, z, points.values)
            if context is not None:  # where the encoder sees nothing, nothing knows the value
                log_q = torch.where(context.expand(points.batch, -1)[:, None], log_q, log_p)
        q, kl_c = categorical_kl(log_q, log_p, points.mask)
        log_likelihood = expected_log_likelihood(
            theta, place.features, points.values, q, points.mask, self.inr, self.likelihood, place.mirror
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
        proposals: Sequence[Posterior] = (),
        prior: Posterior | None = None,
    ) -> Tensor:
        """Importance-weighted bound [B] in nats of log p(observed values), by `samples` draws of z; no gradient.

        The components are summed out exactly. proposals: draw z from them in turn, not from
        q(z | observed values). prior: take it for p(z). With q(z | what was seen) for the prior, and the hidden points
        observed, this is a bound of the probability that a completion gives to the hidden values. `proper` scores
        8-bit values with a normalised probability over 256 levels, whatever bins the model was trained with (logistic
        only): what bits per dimension need.
        """
        self._check_points(points)
        check_positive("iwae", "samples", samples)
        check_type("iwae", "proper", proper, bool)
        points = self._compact(points)
        self._check_values(points)
        check_type("iwae", "proposals", proposals, tuple, list)
        for name, given in (*(("proposals", q) for q in proposals), ("prior", prior)):
            check_type("iwae", name, given, *(Posterior, type(None))[: 1 if name == "proposals" else 2])
            if given is not None:
                check_tensor("iwae", f"{name}.mean", given.mean, [points.batch, self.latent_dim], like=points.values)
        place = self._geometry(points, neighborhoods, search=not proposals)
        proposals = proposals or [self._posterior(points, place)]
        shares = [len(range(i, samples, len(proposals))) / samples for i in range(len(proposals))]
        log_weights = []
        for i in range(samples):
            z = proposals[i % len(proposals)].sample(self._randn(points.batch, generator=generator))
            log_likelihood = marginal_log_likelihood(
                self.hypernet(z),
                place.features,
                points.values,
                self._log_prior_c(place.features, z),
                points.mask,
                self.inr,
                self.likelihood,
                proper,
                place.mirror,
            )
            log_prior = self._prior_z.log_prob(z) if prior is None else prior.log_prob(z)
            # Weighed by the mixture of all proposals, in which each has its share of the draws.
            log_q = [q.log_prob(z) + math.log(share) for q, share in zip(proposals, shares, strict=True) if share]
            log_weights.append(log_likelihood + log_prior - torch.stack(log_q).logsumexp(0))
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
            return self._decode(self.hypernet(z), z, coords, progress)
        check_tensor(where, "posterior_at", posterior_at, [points.count], dtypes=[torch.int64])
        if posterior_at.numel() and (posterior_at.min() < 0 or posterior_at.max() >= coords.shape[-2]):
            raise ValueError(f"{where}: posterior_at must index the {coords.shape[-2]} coords")
        theta = self.hypernet(z)
        if self.gating_posterior is None:
            place = self._geometry(points, search=False)
            known = self._log_responsibilities(theta, place, points, self._log_prior_c(place.features, z))
        else:
            known = self.gating_posterior(features(points.coords, self.encoding, self._cache), z, points.values)
        observed = (
            torch.ones(points.batch, points.count, dtype=torch.bool, device=z.device)
            if points.mask is None
            else points.mask.expand(points.batch, -1)
        )
        return self._decode(theta, z, coords, progress, (known, observed, posterior_at))

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
            return self._decode(self.hypernet(z), z, coords, progress, with_pi=with_pi)

    @torch.no_grad()
    def sample(self, count: int, coords: Tensor, *, generator: torch.Generator | None = None) -> Reconstruction:
        """`count` new functions from the prior, at coords [M, D]; means, without observation noise."""
        return self.decode(self.sample_prior(count, generator=generator), coords)

    @torch.no_grad()
    def sample_values(self, z: Tensor, coords: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Values [B, M, C] of functions of latents z [B, Z] at coords [M, D] or [B, M, D], with observation noise.

        At every point a component is drawn from p(c | x, z), then a value from p(y | x, z, c).
        """
        check_tensor("sample_values", "z", z, ["B", self.latent_dim], like=self.encoder.head.weight)
        check_type("sample_values", "generator", generator, torch.Generator, type(None))
        self._check_coords("sample_values", coords, z.shape[0])
        device = generator.device if generator else z.device
        shape = (len(z), self.components, coords.shape[-2])
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=device).to(z.device)
        ahead = -(-uniform.clamp(min=1e-300).log()).log()  # Gumbel noise: the largest sum is a draw by log_p
        component = torch.zeros(shape[0], shape[2], dtype=torch.int64, device=z.device)

        def choose(log_p: Tensor, index: Part) -> Tensor:
            component[:, index] = (log_p + ahead[:, :, index]).argmax(1)
            return torch.full_like(ahead[:, :, index], -math.inf, dtype=z.dtype).scatter(
                1, component[:, None, index], 0.0
            )

        mean = self._decode(self.hypernet(z), z, coords, False, with_pi=False, choose=choose).mean
        return self.likelihood.sample(mean, component, generator)

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

    def _check_sampling(self, coords: Tensor, mask: Tensor | None) -> None:
        """Once in training, for coords [N, D] or [B, N, D] in host memory: warn of units that cannot work."""
        if self._sampling_checked or not self.training or coords.device.type != "cpu" or torch.compiler.is_compiling():
            return
        self._sampling_checked = True
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
        self, theta: Tensor, place: Geometry, points: PointSet, log_p: Tensor, beta: float = 1.0
    ) -> Tensor:
        return log_responsibilities(
            theta, place.features, points.values, log_p, points.mask, self.inr, self.likelihood, place.mirror, beta
        )

    @property
    def _search(self) -> Search:
        fixed = self.encoder.fixed
        return Search(
            self.encoder.stages,
            self.neighbor_metric == "encoded",
            self.centroids != "points",
            None if fixed is None else fixed.where(),
        )

    def _geometry(
        self,
        points: PointSet,
        neighborhoods: Neighborhoods | None = None,
        *,
        seen: Tensor | None = None,
        mirrored: bool = True,
        search: bool = True,
    ) -> Geometry:
        """Of compacted points, with these neighborhoods or those of what the encoder sees: all observed points, or
        those where seen [N] or [B, N] is True.
        """
        fixed, mask = self.encoder.fixed, points.mask
        if fixed is not None and not fixed.is_set:
            raise ValueError(
                'encoder: centroids="fixed" must be set before anything is encoded: '
                "model.set_centroids(coords [N, D]) with points that cover the domain"
            )
        if neighborhoods is not None:
            behind = 0 if fixed is None else len(fixed.centroids)
            check_neighborhoods(neighborhoods, self.encoder.stages, points.batch, points.count, behind)
        # On a GPU the kernels would wait to know which points of the mirror are observed.
        mirrored = mirrored and (mask is None or mask.device.type == "cpu")
        seen = mask if seen is None else seen if seen.dim() == 2 else seen[None]
        wanted = self._search if search and neighborhoods is None else None
        if wanted is not None:
            self._check_sampling(points.coords, mask)
        found = geometry(points.coords, seen, self.encoding, self._cache, wanted, mirrored)
        return found if neighborhoods is None else found._replace(neighborhoods=neighborhoods)

    def _posterior(self, points: PointSet, place: Geometry) -> Posterior:
        """q(z) of points of that geometry."""
        fixed, encoded = self.encoder.fixed, place.features
        encoded = encoded if encoded.dim() == 3 else encoded[None]
        anchors = None if fixed is None else features(fixed.centroids, self.encoding, self._cache)[None]
        with skip_value_checks():
            return Posterior.from_logits(self.encoder(points.values, encoded, place.neighborhoods, anchors))

    def _compact(self, points: PointSet) -> PointSet:
        if points.mask is None:
            return points
        found: PointSet = self._cache.read((points.mask, points.coords, points.values), points.compact, "compact")
        return found

    def _seen(self, points: PointSet, context: Tensor) -> Tensor:
        mask = points.mask
        if mask is None:
            return context
        found: Tensor = self._cache.read((mask, context), lambda: mask & context, "seen")
        return found

    def _in_context(self, points: PointSet, context: Tensor) -> tuple[PointSet, Tensor]:
        """The points that any function observes, and the context of these."""
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
                return points.select(index), context[..., index]
        return points, context

    def _decode(
        self,
        theta: Tensor,
        z: Tensor,
        coords: Tensor,
        progress: bool,
        posterior: tuple[Tensor, Tensor, Tensor] | None = None,
        with_pi: bool = True,
        choose: Callable[[Tensor, Part], Tensor] | None = None,
    ) -> Reconstruction:
        """Decode with the prior over components, or the posterior where `posterior` has an observed point.

        posterior: log-probabilities [B, K, N], observed [B, N], positions [N] in coords. choose: what to take instead
        of the prior's log-probabilities [B, K, m] or [B, K, 1] at m points.
        """

        given = None
        if posterior is not None:
            given = torch.full((coords.shape[-2],), -1, device=z.device)  # which point each coordinate is, -1: none
            given[posterior[2]] = torch.arange(len(posterior[2]), device=z.device)

        def log_pi(features: Tensor, index: Part) -> Tensor:
            log_p = self._log_prior_c(features, z)
            if posterior is None or given is None:
                return log_p if choose is None else choose(log_p, index)
            known, observed, _ = posterior
            here = given[index]
            point = here.clamp(min=0)
            replaced = (here >= 0) & observed.index_select(1, point)
            return torch.where(replaced[:, None], known.index_select(2, point), log_p)

        every = None
        if coords.shape[:-1].numel() * self.encoding.out_dim <= _REMEMBERED:
            every = features(coords, self.encoding, self._cache)

        def encode(index: Part) -> Tensor:
            if every is None:
                return self.encoding(coords[..., index, :])  # type: ignore[no-any-return]
            return every[..., index, :]

        return decode(
            theta,
            coords.shape[-2],
            encode,
            log_pi,
            self.inr,
            self.likelihood,
            shared=coords.dim() == 2,
            mirror=find_mirror(coords, self.encoding, self._cache),
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
            self.likelihood.check_values(*self._cache.read((points.values,), points.value_range, "range"))

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


def _check_memory(model: nn.Module, build: Callable[[torch.Generator], None]) -> None:
    """Raise ValueError where the parameters would take more memory than there is."""
    try:
        build(torch.Generator())
    except RuntimeError as error:  # the number of bytes is beyond 64 bits
        raise ValueError("VaMoH: the parameters would take more than 2^63 bytes of memory") from error
    check_memory("VaMoH", "the parameters", sum(value.nbytes for value in model.state_dict().values()))
