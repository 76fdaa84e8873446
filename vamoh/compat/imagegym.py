"""The published code's model class on this package's kernels: for its own training script, with one import changed.

from vamoh.compat.imagegym import VAMOH    # instead of: from imagegym.models.vamoh import VAMOH
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from vamoh._cache import ContentCache
from vamoh._checks import check_choice
from vamoh._shown import shown
from vamoh.compat.config import KL_SAMPLES, VOXEL_POINTS, translate_model
from vamoh.compat.state import FREQUENCIES, SCALES, TEMPLATE, from_reference, to_reference
from vamoh.gating import Gating
from vamoh.generator import Reconstruction
from vamoh.geometry import Neighborhood, Neighborhoods
from vamoh.latent import FlowPrior
from vamoh.model import Noise, VaMoH
from vamoh.points import PointSet, to_grid

TASKS = ("image", "era5_polar", "voxels_chairs")
FITTED = ("celebahq256", "shapes3d", "shapes3d_10", "shapes3d_50", "era5")
"""Data sets whose range the published code measures for a Bernoulli likelihood."""


class VAMOH(nn.Module):
    """The model with the constructor and the methods of the published class.

    The arguments are those of the published class, and are not changed. Where the published code reads its global
    configuration (`params_nf` and variants of the gating), so does this class, if `imagegym.config` is loaded; else
    they are arguments. What cannot be reproduced is a ValueError that names it.

    replay: True draws initial values, masks and noise from torch's and numpy's global generators in the order of the
    published code, and breaks ties among neighbours as it does: the same seeds give the same losses up to rounding.
    False searches neighbours and makes the flow's samples with the compiled kernels: another random stream and other
    choices among equals, less time. It may be changed at any time.

    `state_dict` and `load_state_dict` speak the published code's names, so checkpoints go both ways. `vamoh` is the
    model itself.
    """

    def __init__(
        self,
        task: str,
        feature_dim: int,
        coordinate_dim: int,
        dims_x: Sequence[int],
        distr_x: str,
        name_encoding: str | None,
        params_encoding: Mapping[str, Any],
        params_hyper: Mapping[str, Any],
        params_fnrep: Mapping[str, Any],
        dim_z: int,
        distr_z: str,
        beta_z: float,
        beta_c: float,
        loss_fun: str,
        drop_input: float,
        params_convnet: Any,
        params_cat_prior: Mapping[str, Any],
        params_cat_post: Mapping[str, Any],
        params_cat_x: Mapping[str, Any],
        params_pointconvnet: Mapping[str, Any],
        encoder_type: str,
        K: int,
        device: str | torch.device,
        name: str = "vamoh",
        *,
        params_nf: Mapping[str, Any] | None = None,
        replay: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        where = "VAMOH"
        check_choice(where, "task", task, TASKS)
        shape = tuple(dims_x[1:])
        wanted = 3 if task == "voxels_chairs" else 2
        if len(shape) != wanted or any(n < 2 for n in shape):
            raise ValueError(
                f"{where}: dims_x must have {wanted} sizes of at least 2 after the channels, got {shown(dims_x)}"
            )
        if dims_x[0] != feature_dim:
            raise ValueError(
                f"{where}: feature_dim must be the channels of dims_x, {shown(dims_x[0])}, got {shown(feature_dim)}"
            )
        if params_nf is None:
            params_nf = _global("params_nf")
            if params_nf is None:
                raise ValueError(f"{where}: params_nf must be given where imagegym.config is not loaded, got None")
        sections = {
            "params_encoding": params_encoding,
            "params_hyper": params_hyper,
            "params_fnrep": params_fnrep,
            "params_cat_prior": params_cat_prior,
            "params_cat_post": params_cat_post,
            "params_cat_x": params_cat_x,
            "params_pointconvnet": params_pointconvnet,
            "params_nf": params_nf,
        }
        given = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
        settings = _global("model") or {}
        for key in ("simple_cat", "cat_encoder_x", "post_cat_has_z", "learn_residual_posterior", "distr_x_logscales"):
            if key in kwargs or key in settings:
                given[f"model.{key}"] = kwargs.get(key, settings.get(key))
        named = {"dim_z": dim_z, "distr_z": distr_z, "distr_x": distr_x, "name_encoding": name_encoding}
        given |= {f"model.{key}": value for key, value in (named | {"encoder_type": encoder_type}).items()}
        given["params_k_mixture.K"] = K
        coord_dim = 2 if task == "image" else 3
        self.task, self.name, self.device, self.K, self.replay = task, name, device, K, replay
        self.dims_x, self.feature_dim, self.dim_z = list(dims_x), feature_dim, dim_z
        self.distr_x, self.distr_z, self.encoder_type = distr_x, distr_z, encoder_type
        self.beta_z, self.beta_c = beta_z, beta_c
        config = translate_model(given, coord_dim)
        self.vamoh = VaMoH(coord_dim=coord_dim, channels=feature_dim, **vars(config))
        from_reference(_initial_state(self.vamoh, config.frequency_scale), self.vamoh)
        self.prior_z = Prior(self.vamoh, distr_z)
        self.fix_categorical_prior = bool(kwargs.get("fix_categorical_prior", False))
        self.data_converter = Sphere(shape) if task == "era5_polar" else Grid(shape)
        self.input_scaler = Scaler()
        self._neighborhoods: ContentCache[Neighborhoods] = ContentCache()

    def forward(self, batch: Sequence[Any], missingness: float = 0.0, **kwargs: Any) -> dict[str, Tensor]:
        """Bound on a batch (data, labels), at observed points: scalars elbo, loss, log_prob_x, kl, kl_cat, betas.

        Data are [B, C, *shape] in [0, 1]; of the sphere [B, 3, rows, columns] with latitude and longitude in degrees.
        missingness: points are lost at a rate drawn up to this (1: up to 0.9), the same for the batch; of voxels
        exactly 4096 are seen, whatever it is.
        """
        observed = self._draw_observed(batch[0], missingness)
        coords, values = self._points(batch[0])
        points = PointSet(coords, values, None if bool(observed.all()) else observed).compact()
        z = torch.randn(points.batch, self.dim_z, dtype=values.dtype, device=values.device)
        terms = self.vamoh.elbo(
            points,
            neighborhoods=self._search(points.coords),
            noise=self._noise(z),
            beta_z=self.beta_z,
            beta_c=self.beta_c,
        )
        return {
            "elbo": terms.elbo.mean(),
            "loss": terms.loss,
            "log_prob_x": terms.log_likelihood.mean(),
            "kl": terms.kl_z.mean(),
            "kl_cat": terms.kl_c.mean(),
            "beta_c": torch.tensor(self.beta_c),
            "beta_z": torch.tensor(self.beta_z),
        }

    def elbo(self, batch: Sequence[Any], missingness: float = 0.0, **kwargs: Any) -> Tensor:
        """The bound alone; the published method of this name fails."""
        return self.forward(batch, missingness)["elbo"]

    @torch.no_grad()
    def sample(
        self,
        sample_size: Sequence[int],
        resolution: Sequence[int],
        out_coordinates: Tensor,
        z: Tensor | None = None,
        mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """New functions on a grid: maps [B, C, *resolution] mean and mean_map, [B, 1, *resolution] segm and entropy.

        sample_size: [B]; out_coordinates: [B, M, D], those of `create_outcoordinates`; z: [B, Z], else drawn.
        """
        if mask is not None:
            raise ValueError("sample: mask must be None, got a tensor: hidden voxels are not set to zero here")
        z = self.prior_z.sample(sample_size) if z is None else z
        maps = self._maps(self.vamoh.decode(z, out_coordinates[0]), resolution)
        del maps["pi"]
        return maps, {"sample": z}

    @torch.no_grad()
    def reconstruct(
        self,
        coordinates_features: Sequence[Tensor],
        resolution: Sequence[int],
        out_coordinates: Tensor,
        mask: Tensor,
        **kwargs: Any,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Encode observed points (coordinates [B, n, D], values [B, n, C]) and decode them on a grid.

        mask: [*shape] bool, True at the n points. Components have their posterior probabilities there, on every s-th
        point of a finer grid. Maps as of `sample`, and pi [B, 1, *resolution, K]; mean_z and qz_x of the latents.
        """
        points = PointSet(coordinates_features[0][0], coordinates_features[1])
        resolution = tuple(resolution)
        step = math.ceil(resolution[0] / mask.shape[0])
        index = torch.arange(math.prod(resolution), device=points.values.device).reshape(resolution)
        at = index[tuple(slice(None, None, step) for _ in resolution)][mask.to(index.device)]
        posterior = self.vamoh.encode(points, neighborhoods=self._search(points.coords))
        result = self.vamoh.reconstruct(points, out_coordinates[0], z=posterior.mean, posterior_at=at)
        if self.replay:
            self._draw_values(points, resolution)
        distribution = torch.distributions.Normal(posterior.mean, posterior.std)
        return self._maps(result, resolution), {"mean_z": posterior.mean, "qz_x": distribution}

    def create_outcoordinates(self, resolution: Sequence[int], number_of_samples: int = 1) -> Tensor:
        """Coordinates [B, M, D] of a grid, repeated for every sample."""
        return self._place(self.data_converter.superresolve_coordinates(resolution)).repeat(number_of_samples, 1, 1)

    def create_meta_model(self) -> None:
        """Nothing to do: the coordinate networks have no copies."""

    def set_input_scaler(self, dataset: Any) -> None:
        """Leave data in [0, 1] as they are; for a Bernoulli of `FITTED` data, find the range to bring there.

        As the published code it goes through all batches of the data set for that, in an order that it draws.
        """
        settings = _global("dataset")
        if self.vamoh.likelihood.op.kind == "bernoulli" and settings is not None and settings["name"] in FITTED:
            loader = torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True)
            bounds = [batch[0].aminmax() for batch in loader]
            self.input_scaler = Scaler(min(float(b.min) for b in bounds), max(float(b.max) for b in bounds))

    def _encoder_to_inference(self, mode: str) -> None:
        """Nothing to do: neighbours always belong to the points at hand."""

    def _to_coordinates_and_features(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates [B, N, D] and values [B, N, C] of data."""
        coords, values = self._points(batch)
        return coords.expand(len(values), -1, -1), values

    def print_params_count(self, log: Any = logging) -> int:
        """Log and return the number of parameters as the published code counts them: without the prior over latents."""
        parts = {
            "encoder_z": self.vamoh.encoder,
            "prior_cat_encoder": self.prior_cat_encoder,
            "post_cat_encoder": self.post_cat_encoder,
            "hyper": self.vamoh.hypernet,
        }
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        for name, count in counts.items():
            log.info(f"\tNum parameters {name}: {count}")
        total = sum(counts.values())
        log.info(f"Num of total parameters: {total}")
        return total

    @property
    def fparams(self) -> tuple[Tensor, ...]:
        """Parameters, for a look at their device."""
        return tuple(self.parameters())

    @property
    def encoder_z(self) -> nn.Module:
        """Encoder of the latents."""
        return self.vamoh.encoder

    @property
    def prior_cat_encoder(self) -> nn.Module:
        """Network of the prior over components."""
        return self.vamoh.gating_prior

    @property
    def post_cat_encoder(self) -> nn.Module:
        """Network of the posterior over components."""
        return cast(Gating, self.vamoh.gating_posterior)  # the published code has no other objective

    @property
    def fix_categorical_prior(self) -> bool:
        """Whether the prior over components is uniform."""
        return not self.vamoh.use_gating_prior

    @fix_categorical_prior.setter
    def fix_categorical_prior(self, fixed: bool) -> None:
        self.vamoh.use_gating_prior = not fixed

    def state_dict(  # type: ignore[override]
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Tensors under the published code's names; its template of a coordinate network, never used, is zero."""
        destination = {} if destination is None else destination
        destination.update({prefix + name: value for name, value in to_reference(self.vamoh).items()})
        return destination

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Load tensors under the published code's names; ValueError unless all of them fit, whatever `strict` says."""
        from_reference(state_dict, self.vamoh)
        return _IncompatibleKeys([], [])

    def _points(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates [N, D] and values [B, N, C] of data."""
        coords, values = self.data_converter.points(self.input_scaler.transform(data))
        return self._place(coords), values

    def _place(self, coords: Tensor) -> Tensor:
        return coords.to(self.vamoh.encoder.head.weight)

    def _draw_observed(self, data: Tensor, missingness: float) -> Tensor:
        """Which points [N] are seen, by the published code's draws from the global generators."""
        shape = tuple(data.shape[2:])
        if self.task == "voxels_chairs":
            seen = torch.zeros(math.prod(shape), dtype=torch.bool)
            seen[torch.randperm(len(seen))[:VOXEL_POINTS]] = True
            return seen.to(data.device)
        if not 0 <= missingness <= 1:
            raise ValueError(f"forward: missingness must be between 0 and 1, got {missingness}")
        rate = -1.0
        if missingness == 1:
            rate = np.random.rand(1).item() * 0.9
        elif missingness > 0:
            rate = np.random.uniform(0, missingness)
        return torch.from_numpy(np.random.rand(*shape) > rate).flatten().to(data.device)

    def _draw_values(self, points: PointSet, resolution: Sequence[int]) -> None:
        """Spend the random numbers of values that the published code draws at every point and does not use."""
        kind, like = self.vamoh.likelihood.op.kind, points.values
        shape = (points.batch, points.channels, *resolution, self.K)
        if kind == "bernoulli":
            torch.bernoulli(like.new_zeros(shape))
        elif kind == "continuous_bernoulli":
            torch.rand(shape, dtype=like.dtype, device=like.device)

    def _noise(self, z: Tensor) -> Noise:
        if not self.vamoh.use_flow or self.distr_z == "normal":
            return Noise(z, z[None])  # the second is not used
        if not self.replay:
            return Noise(z, self.vamoh.draw_noise(len(z)).kl)
        return Noise(z, torch.randn(KL_SAMPLES, *z.shape, dtype=z.dtype, device=z.device))

    def _search(self, coords: Tensor) -> Neighborhoods | None:
        """Neighbourhoods of points [N, D] that all functions share; None leaves the search to the model."""
        if not self.replay:
            return None
        return self._neighborhoods.get((coords, self.vamoh.encoding.frequencies), lambda: self._search_replayed(coords))

    @torch.no_grad()
    def _search_replayed(self, coords: Tensor) -> Neighborhoods:
        """Farthest points and neighbours by the arithmetic of the published code: on a grid, rounding breaks the ties.

        The compiled search agrees wherever the choice is clear.
        """
        phase = coords @ self.vamoh.encoding.frequencies.T
        points = torch.cat([torch.cos(2 * math.pi * phase), torch.sin(2 * math.pi * phase)], 1)
        points = points[None] if len(self.vamoh.encoding.frequencies) else coords[None]
        found = []
        for stage in self.vamoh.encoder.stages:
            centroids = _farthest(points, min(stage.centroids, points.shape[1]))
            chosen = points[:, centroids]
            if stage.neighbors > points.shape[1]:
                raise ValueError(
                    f"VAMOH: the encoder must have {stage.neighbors} observed points, got {points.shape[1]}"
                )
            neighbors = torch.cdist(chosen, points).topk(stage.neighbors, largest=False, sorted=False).indices
            found.append(Neighborhood(centroids[None], neighbors))
            points = chosen
        return tuple(found)

    def _maps(self, result: Reconstruction, resolution: Sequence[int]) -> dict[str, Tensor]:
        segm = result.segmentation[..., None].float() / (self.K - 1 + 1e-6)
        return {
            "mean": self.input_scaler.inverse_transform(to_grid(result.mean, resolution)),
            "mean_map": self.input_scaler.inverse_transform(to_grid(result.mean_map, resolution)),
            "segm": to_grid(segm, resolution),
            "pi": result.pi.unflatten(1, tuple(resolution))[:, None],
            "entropy": to_grid(result.entropy[..., None], resolution),
        }


class Prior:
    """The prior over latents as the published code's schedules know it: `params_nf_fixed` holds it at N(0, I)."""

    def __init__(self, model: VaMoH, name: str) -> None:
        self.model, self.name = model, name

    @property
    def params_nf_fixed(self) -> bool:
        """Whether the prior is N(0, I)."""
        return self.name == "normal" or not self.model.use_flow

    @params_nf_fixed.setter
    def params_nf_fixed(self, fixed: bool) -> None:
        self.model.use_flow = not fixed

    def sample(self, n: Sequence[int]) -> Tensor:
        """Latents [n[0], Z]."""
        return self.model.sample_prior(n[0])


class Scaler:
    """Data from `low` to `high` to [0, 1] and back."""

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        self.low, self.high = low, high

    def transform(self, x: Tensor) -> Tensor:
        """Data to what the model sees."""
        return (x - self.low) / (self.high - self.low)

    def inverse_transform(self, x: Tensor) -> Tensor:
        """What the model gives to data."""
        return x * (self.high - self.low) + self.low


class Grid:
    """Images and voxels [B, C, *shape] as points and back."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.coordinates = self.superresolve_coordinates(self.shape)

    def superresolve_coordinates(self, resolution: Sequence[int]) -> Tensor:
        """Coordinates [N, D] of a grid; all axes are scaled by the first size.

        In float32 as the published code computes them: neighbours depend on the last digit.
        """
        axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in resolution), indexing="ij")
        return (torch.stack(axes, -1).flatten(0, -2) / (resolution[0] - 1) - 0.5) * 2

    def points(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates [N, D] and values [B, N, C]."""
        if tuple(data.shape[2:]) != self.shape:
            raise ValueError(f"VAMOH: data must have shape [B, C, {', '.join(map(str, self.shape))}], got {data.shape}")
        return self.coordinates, data.flatten(2).mT

    def batch_to_coordinates_and_features(self, data_batch: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates [B, N, D] and values [B, N, C]."""
        coords, values = self.points(data_batch)
        return coords.to(data_batch.device).expand(len(values), -1, -1), values

    def batch_to_data(
        self, coordinates: Tensor | None = None, features: Tensor | None = None, resolution: Sequence[int] | None = None
    ) -> Tensor:
        """Values [B, N, C] as [B, C, *resolution]; coordinates are not used."""
        if features is None:
            raise ValueError("batch_to_data: features must be a tensor, got None")
        return to_grid(features, self.shape if resolution is None else resolution)


class Sphere(Grid):
    """Fields [B, 3, rows, columns] of latitude, longitude (degrees) and value as points on the unit sphere and back."""

    def superresolve_coordinates(self, resolution: Sequence[int]) -> Tensor:
        """Coordinates [N, 3]: rows from 90 to -90 degrees, columns from 0 up to one step before 360."""
        return _on_sphere(*self._degrees(resolution))

    def points(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates [N, 3], those of the first field, and values [B, N, 1]."""
        if data.shape[1:] != (3, *self.shape):
            sizes = ", ".join(map(str, self.shape))
            raise ValueError(f"VAMOH: data must have shape [B, 3, {sizes}], got {list(data.shape)}")
        return _on_sphere(data[0, 0], data[0, 1]), data[:, 2:].flatten(2).mT

    def batch_to_data(
        self, coordinates: Tensor | None = None, features: Tensor | None = None, resolution: Sequence[int] | None = None
    ) -> Tensor:
        """Values [B, N, 1] or [B, rows, columns, 1] with latitude and longitude: [B, 3, rows, columns]."""
        if features is None:
            raise ValueError("batch_to_data: features must be a tensor, got None")
        shape = self.shape if resolution is None else tuple(resolution)
        degrees = torch.stack(self._degrees(shape)).to(features).expand(len(features), -1, -1, -1)
        return torch.cat([degrees, features.reshape(len(features), 1, *shape)], 1)

    @staticmethod
    def _degrees(shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows, columns = shape
        longitude, latitude = np.meshgrid(
            np.linspace(0.0, 360.0 - 360.0 / columns, columns), np.linspace(90.0, -90.0, rows)
        )
        return torch.from_numpy(latitude).float(), torch.from_numpy(longitude).float()


def _on_sphere(latitude: Tensor, longitude: Tensor) -> Tensor:
    """Points [N, 3] from degrees, in float32 as the published code computes them."""
    lat, lon = np.pi * latitude / 180.0, np.pi * longitude / 180.0
    return torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], -1).reshape(-1, 3)


def _farthest(points: Tensor, count: int) -> Tensor:
    """Farthest-point sample [count] of points [1, N, E] from the first one; all in order where count is N."""
    if count == points.shape[1]:
        return torch.arange(count, device=points.device)
    chosen = torch.zeros(count, dtype=torch.int64, device=points.device)
    nearest = torch.full(points.shape[:2], 1e10, device=points.device, dtype=points.dtype)
    for i in range(1, count):
        nearest = torch.minimum(nearest, torch.linalg.norm(points - points[:, chosen[i - 1], None], dim=-1, ord=2))
        chosen[i] = nearest.max(-1).indices[0]
    return chosen


def _initial_state(model: VaMoH, frequency_scale: float) -> dict[str, Tensor]:
    """Initial values under the published code's names, drawn from the global generator in its order."""
    state: dict[str, Tensor] = {}

    def take(name: str, layer: nn.Linear | nn.Conv2d) -> None:
        state[f"{name}.weight"] = layer.weight.detach()
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias.detach()

    def mlp(name: str, sizes: Sequence[int]) -> None:
        for n, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            take(f"{name}layers.{n}.0", nn.Linear(a, b))

    if model.likelihood.op.kind == "logistic":
        state[SCALES] = model.likelihood.raw_scale.detach().mT.clone()
    if len(model.encoding.frequencies):
        state[FREQUENCIES] = torch.normal(torch.zeros(model.encoding.frequencies.shape), frequency_scale)
    mlp(TEMPLATE, model.inr.widths)
    hyper = [model.latent_dim, *(weight.shape[1] for weight in model.hypernet.weights)]
    for k in range(model.components):
        mlp(f"hyper_list.{k}.mlp.", hyper)
    at = 0
    convs = iter(model.encoder.convs)
    for stage in model.encoder.stages:
        if stage.channels is None:
            at += 1
            continue
        conv: Any = next(convs)
        for n, layer in enumerate(conv.weight_net):
            net = nn.Conv2d(layer.in_features, layer.out_features, 1)
            take(f"encoder_z.layers.{at}.weight_net.forward_layers.{2 * n}", net)
        take(f"encoder_z.layers.{at}.linear", nn.Linear(conv.linear.in_features, conv.linear.out_features))
        at += 2
    head = model.encoder.head
    take("encoder_z.linear_layers.0", nn.Linear(head.in_features, head.out_features))
    gates = {
        "prior_cat_encoder.": (model.gating_prior, 0),
        "post_cat_encoder.": (cast(Gating, model.gating_posterior), model.channels),
    }
    for name, (gate, channels) in gates.items():
        layers: list[Any] = [gate.by_coords, *gate.rest]
        outs = [layer.out_features for layer in layers]
        mlp(name, [layers[0].in_features + channels + model.latent_dim, *outs])
    if isinstance(model.prior, FlowPrior):
        start = "prior_z.prior_distr_z"
        for part in ("loc", "log_scale"):
            state[f"{start}.q0.{part}"] = torch.zeros(1, model.latent_dim)
        for t in range(len(model.prior.b)):
            for part, bound in (("u", math.sqrt(2)), ("w", math.sqrt(2 / model.latent_dim))):
                state[f"{start}.flows.{t}.{part}"] = torch.empty(1, model.latent_dim).uniform_(-bound, bound)
            state[f"{start}.flows.{t}.b"] = torch.zeros(1)
    return state


def _global(section: str) -> Mapping[str, Any] | None:
    """A section of the published code's global configuration, if it is loaded."""
    module = sys.modules.get("imagegym.config")
    return None if module is None else getattr(module.cfg, section)
