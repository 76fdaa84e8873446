"""Compare every stage, term and gradient with a file of reference results.

python tests/parity.py FILE.npz ...    one line per stage: its largest error relative to the array's largest value
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vamoh import PointSet, VaMoH
from vamoh.compat.config import LIKELIHOODS
from vamoh.compat.state import from_reference, translate
from vamoh.elbo import ElboTerms
from vamoh.encoder import SLOPE
from vamoh.generator import Reconstruction
from vamoh.geometry import Neighborhood, Neighborhoods
from vamoh.latent import Posterior
from vamoh.model import Noise
from vamoh.ops.inr_mixture import inr_mixture
from vamoh.ops.likelihood import log_likelihood
from vamoh.ops.planar_flow import planar_flow_inverse_reference, planar_flow_sample
from vamoh.points import grid_coords, sphere_coords

STAGE_TOLERANCE = 1e-9
GRADIENT_TOLERANCE = 1e-6
"""The stored gradients are float32."""


class Case:
    """One file: its arrays, the model with its weights, and its data as points, on a device."""

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.float64, device: str = "cpu") -> None:
        with np.load(path) as file:
            self.arrays = {name: file[name] for name in file.files}
        self.meta: dict[str, Any] = json.loads(str(self.arrays["meta_json"]))
        self.dtype, self.device = dtype, device
        values = self.arrays["data/batch"]
        if self.meta["task"] == "era":
            values = values[:, 2:3]
        self.shape = values.shape[2:]
        self.points = PointSet.from_grid(torch.from_numpy(values).to(device, dtype), self.tensor("coords"))
        self.model = self._build().to(device, dtype)

    def tensor(self, name: str) -> Tensor:
        """An array of the file, floating arrays in the case's dtype."""
        array = torch.from_numpy(self.arrays[name]).to(self.device)
        return array.to(self.dtype) if array.is_floating_point() else array

    def neighborhoods(self, prefix: str) -> Neighborhoods:
        """The stored indices of every encoder stage."""
        stages = [i for i, kind in enumerate(self.meta["encoder_layers"]) if kind in ("PointConv", "AvgPool")]
        return tuple(
            Neighborhood(
                self.tensor(f"{prefix}/enc/{i}/centroid_idx")[None], self.tensor(f"{prefix}/enc/{i}/neighbor_idx")[None]
            )
            for i in stages
        )

    def observed(self, tag: str) -> PointSet:
        """All points with the mask of case `tag`."""
        return self.points.with_mask(self.tensor(f"{tag}/obs_mask"))

    def noise(self) -> Noise:
        return Noise(self.tensor("noise/eps_z"), self.tensor("noise/eps_kl"))

    def _build(self) -> VaMoH:
        config = self.meta["cfg"]
        conv_net = config["params_pointconvnet"]
        convs = [c for c in conv_net["layer_configs"] if "out_channels" in c]
        pools = [c for c in conv_net["layer_configs"] if "out_channels" not in c]
        model = VaMoH(
            coord_dim=self.points.coord_dim,
            channels=self.points.channels,
            latent_dim=config["model"]["dim_z"],
            components=self.meta["K"],
            frequencies=config["params_encoding"]["num_frequencies"],
            encoder_centroids=[c["num_output_points"] for c in convs],
            encoder_neighbors=[c["num_neighbors"] for c in convs],
            encoder_channels=[c["out_channels"] for c in convs],
            pool_centroids=[c["num_output_points"] for c in pools],
            pool_neighbors=[c["num_neighbors"] for c in pools],
            weight_net=convs[0]["mid_channels"],
            centroids="points",
            flow_layers=config["params_nf"]["L"],
            hypernet_widths=config["params_hyper"]["c_dim_list"][1:],
            inr_widths=config["params_fnrep"]["c_dim_list"][1:-1],
            gating_widths=config["params_cat_prior"]["layers"],
            gating_bound="tanh",
            likelihood=LIKELIHOODS[self.meta["distr_x"]],
            max_scale=0.1,
            learn_scale=False,
            kl="cross_entropy",
            kl_samples=self.meta["n_kl_samples"],
            initialization="published",
        ).to(torch.float64)
        from_reference(self.state(), model)
        return model

    def state(self) -> dict[str, Tensor]:
        """State dict of the reference, without repetitions."""
        return {
            name.removeprefix("state/"): torch.from_numpy(a)
            for name, a in self.arrays.items()
            if name.startswith("state/")
        }


class Stage(NamedTuple):
    """Our value of a stage and what it may differ by: `tolerance` of the array's largest value, plus `doubt`.

    doubt is the rounding of the reference itself, zero but for saturated continuous Bernoulli outputs.
    """

    name: str
    ours: Tensor
    doubt: Tensor | float = 0.0
    tolerance: float = STAGE_TOLERANCE


def compare(case: Case) -> Iterator[tuple[Stage, Tensor]]:
    """Yield (our stage, reference) for everything the file holds."""
    for stage in _ours(case):
        if stage.name in case.arrays:
            yield stage, torch.from_numpy(case.arrays[stage.name])


def _ours(case: Case) -> Iterator[Stage]:
    yield from _under("", _coordinates(case))
    yield from _under("", _flow_samples(case))
    for tag in case.meta["masks"]:
        yield from _under(f"{tag}/", _stages(case, tag))
        yield from _under(f"{tag}/", _terms(case, tag))
        yield from _gradients(case, tag)
    for prefix in ("recon", "recon_half", "recon_inpaint", "recon_sr"):
        if f"{prefix}/mask" in case.arrays:
            yield from _under(f"{prefix}/", _reconstructions(case, prefix))
    for prefix in ("sample", "sample_sr"):
        if f"{prefix}/mean" in case.arrays:
            z, coords = case.tensor("sample/z"), case.tensor(f"{prefix}/out_coords")
            yield from _under(f"{prefix}/", _maps(case, case.model.decode(z, coords), z, coords, prefix))


def _under(prefix: str, stages: Iterator[tuple[Any, ...]]) -> Iterator[Stage]:
    return (Stage(prefix + name, *rest) for name, *rest in stages)


def _doubt(case: Case, logits: Tensor) -> tuple[Tensor, Tensor]:
    """What the reference's mean and log-likelihood may be off by at these logits.

    It computes a continuous Bernoulli from the rounded probability p, and 1 - p loses digits as p nears 1.
    """
    if case.meta["distr_x"] != "cb":
        return torch.zeros_like(logits), torch.zeros_like(logits)
    size = logits.detach().abs().clamp(min=1)
    loss = 2 * torch.finfo(torch.float64).eps * size.clamp(max=36).exp()
    beyond = (size - 36).clamp(min=0)  # where the reference clamps p
    return loss / size.square() + beyond / size.square(), loss / size + beyond / size


def _coordinates(case: Case) -> Iterator[tuple[Any, ...]]:
    if case.meta["task"] == "era":
        latitude, longitude = case.tensor("data/batch")[0, :2]
        yield "coords", sphere_coords(latitude, longitude).flatten(0, 1)
    else:
        yield "coords", grid_coords(case.shape, dtype=case.dtype)
    yield "coords_encoded", case.model.encoding(case.tensor("coords"))


def _flow_samples(case: Case) -> Iterator[tuple[Any, ...]]:
    z, log_q = planar_flow_sample(case.tensor("flow_fwd/eps"), case.model.prior.flow)
    yield "flow_fwd/z", z
    yield "flow_fwd/log_q", log_q


@torch.no_grad()
def _stages(case: Case, tag: str) -> Iterator[tuple[Any, ...]]:
    model, points = case.model, case.observed(tag)
    seen = points.compact()
    hoods = case.neighborhoods(tag)
    yield "features_all", points.values
    yield "enc/features_in", seen.values
    encoded = model.encoding(seen.coords)
    activated: list[Tensor] = []
    hooks = [conv.register_forward_hook(lambda *a: activated.append(a[2])) for conv in model.encoder.convs]
    outputs = iter(model.encoder.stage_outputs(seen.values, encoded[None], hoods))
    for hook in hooks:
        hook.remove()
    convolved = (torch.where(x > 0, x, x / SLOPE) for x in activated)
    for i, kind in enumerate(case.meta["encoder_layers"]):
        yield f"enc/{i}/out_features", next(convolved if kind == "PointConv" else outputs)
    logits = model.encoder(seen.values, encoded[None], hoods)
    posterior = Posterior.from_logits(logits)
    yield "enc/logits", logits
    yield "enc/mu", posterior.mean
    yield "enc/logvar", logits.chunk(2, -1)[1]
    yield "enc/std", model.encode(points, neighborhoods=hoods).std
    z = posterior.sample(case.tensor("noise/eps_z"))
    yield "z", z
    theta = model.hypernet(z)
    for k in range(model.components):
        yield f"hyper/{k}/out", theta[:, k]
    inr = inr_mixture(theta, model.encoding(points.coords), model.inr)  # [B, K, P, C]
    yield "inr/logits", inr.permute(0, 2, 3, 1)
    mean_doubt, log_doubt = (d.permute(0, 2, 3, 1) for d in _doubt(case, inr))
    yield "lik/mean_x", model.likelihood.mean(inr).permute(0, 2, 3, 1), mean_doubt
    log_prob = log_likelihood(model.likelihood.op, inr, points.values[:, None], model.likelihood.scale[:, None])
    yield "lik/log_prob", log_prob.permute(0, 2, 3, 1), log_doubt
    log_q = model.gating_posterior(encoded, z, seen.values)
    log_p = model.gating_prior(encoded, z)
    yield "cat/pi_post", log_q.exp().mT
    yield "cat/pi_prior", log_p.exp().mT
    yield "klz_normal/per_item", posterior.kl_standard()
    yield "klz_normal/mean", posterior.kl_standard().mean()
    samples = posterior.sample(case.tensor("noise/eps_kl"))
    yield "flow/z_samples", samples
    base, log_det = planar_flow_inverse_reference(samples.flatten(0, 1), model.prior.flow)
    yield "flow/z_base", base
    yield "flow/logdet_inv", log_det
    yield "flow/log_prob", model.prior.log_prob(samples.flatten(0, 1))
    yield "flow/kl", -model.prior.log_prob(samples.flatten(0, 1)).mean()


def _bound(case: Case, tag: str, use_flow: bool = True, use_gating_prior: bool = True) -> ElboTerms:
    model = case.model
    model.use_flow, model.use_gating_prior = use_flow, use_gating_prior
    try:
        return model.elbo(
            case.observed(tag),
            neighborhoods=case.neighborhoods(tag),
            noise=case.noise(),
            beta_z=case.meta["beta_z"],
            beta_c=case.meta["beta_c"],
        )
    finally:
        model.use_flow = model.use_gating_prior = True


def _terms(case: Case, tag: str) -> Iterator[tuple[Any, ...]]:
    phases = {"term": (True, True), "phase_normal/term": (False, True), "phase_normal_uniformcat/term": (False, False)}
    model, points = case.model, case.observed(tag).compact()
    with torch.no_grad():
        posterior = model.encode(points, neighborhoods=case.neighborhoods(tag))
        theta = model.hypernet(posterior.sample(case.tensor("noise/eps_z")))
        logits = inr_mixture(theta, model.encoding(points.coords), model.inr)
    doubt = _doubt(case, logits)[1].amax(1).sum((1, 2)).mean()
    for prefix, phase in phases.items():
        terms = _bound(case, tag, *phase)
        yield f"{prefix}/log_prob_x", terms.log_likelihood.mean(), doubt
        yield f"{prefix}/kl_z", terms.kl_z.mean()
        yield f"{prefix}/kl_c_per_item", terms.kl_c
        yield f"{prefix}/kl_c", terms.kl_c.mean()
        yield f"{prefix}/elbo", terms.elbo.mean(), doubt


def _gradients(case: Case, tag: str) -> Iterator[Stage]:
    for name, use_flow in (("grad_nf", True), ("grad_normal", False)):
        prefix = f"{tag}/{name}/"
        reference = {n[len(prefix) :]: torch.from_numpy(a) for n, a in case.arrays.items() if n.startswith(prefix)}
        if not reference:
            continue
        case.model.zero_grad(set_to_none=True)
        _bound(case, tag, use_flow).loss.backward()
        ours = {n: p.grad for n, p in case.model.named_parameters()}
        for parameter, stored in translate(reference, case.model).items():
            gradient = ours[parameter]
            assert gradient is not None, f"{parameter} has no gradient"
            key = f"{prefix}{parameter}"
            case.arrays[key] = stored.numpy()
            yield Stage(key, gradient, tolerance=GRADIENT_TOLERANCE)


def _reconstructions(case: Case, prefix: str) -> Iterator[tuple[Any, ...]]:
    out_shape = case.arrays[f"{prefix}/mean"].shape[2:]
    step = -(-out_shape[0] // case.shape[0])
    index = torch.arange(int(np.prod(out_shape))).reshape(out_shape)
    at = index[tuple(slice(None, None, step) for _ in out_shape)].flatten().to(case.device)
    points = case.points.with_mask(case.tensor(f"{prefix}/mask").flatten())
    hoods = case.neighborhoods(prefix)
    yield "z_mean", case.model.encode(points, neighborhoods=hoods).mean
    coords = case.tensor(f"{prefix}/out_coords")
    result = case.model.reconstruct(points, coords, posterior_at=at, neighborhoods=hoods)
    yield from _maps(case, result, case.tensor(f"{prefix}/z_mean"), coords, prefix)
    yield "pi", result.pi.unflatten(1, out_shape)[:, None]


def _maps(case: Case, result: Reconstruction, z: Tensor, coords: Tensor, prefix: str) -> Iterator[tuple[Any, ...]]:
    shape = case.arrays[f"{prefix}/mean"].shape[2:]

    def grid(values: Tensor) -> Tensor:
        return values.mT.unflatten(2, shape)

    with torch.no_grad():
        logits = inr_mixture(case.model.hypernet(z), case.model.encoding(coords), case.model.inr)
    doubt = grid(_doubt(case, logits)[0].amax(1))
    yield "mean", grid(result.mean), doubt
    yield "mean_map", grid(result.mean_map), doubt
    yield "entropy", grid(result.entropy[..., None])
    # Stored as float32.
    yield "segm", (grid(result.segmentation[..., None]) / (case.model.components - 1 + 1e-6)).float()


def error(stage: Stage, reference: Tensor) -> float:
    """Largest difference beyond doubt, relative to the reference's largest value; infinite for another shape."""
    if tuple(stage.ours.shape) != tuple(reference.shape):
        return float("inf")
    if not reference.numel():
        return 0.0
    doubt = stage.doubt.cpu() if isinstance(stage.doubt, Tensor) else stage.doubt
    excess = ((stage.ours.detach().double().cpu() - reference.double()).abs() - doubt).clamp(min=0).max()
    return float(excess / reference.double().abs().max().clamp(min=1e-300))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE.npz")
    failed = 0
    for path in parser.parse_args(arguments).files:
        print(path)
        seen = 0
        for stage, reference in compare(Case(path)):
            relative = error(stage, reference)
            good = relative <= stage.tolerance
            failed += not good
            seen += 1
            print(f"  {relative:9.2e}  {'' if good else f'> {stage.tolerance:.0e}  '}{stage.name}")
        if seen == 0:
            raise SystemExit(f"{path}: no stage to compare")
    print(f"{failed} above tolerance" if failed else "all within tolerance")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
