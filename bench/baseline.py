"""An eager plain-torch model in the style of the published code, to compare with.

It computes the same loss as `VaMoH` with `kl="cross_entropy"` from the same weights, the way that code does: Fourier
features expanded to every function and component, one batched product per layer of the coordinate networks, all points
of the grid decoded before the observed ones are picked, weight nets evaluated on every pair of centroid and neighbour,
categorical networks on concatenated inputs, a flow density layer by layer with every intermediate kept for autograd,
neighbours by `torch.cdist` and a Python loop. Written from the mathematics; only dead computations are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, ContinuousBernoulli, kl_divergence

from vamoh import VaMoH
from vamoh.layout import unpack

Hoods = Sequence[tuple[Tensor, Tensor]]
"""Per encoder stage: centroids [1, M] and neighbours [1, M, S], as `VaMoH.neighborhoods` returns them."""


class Baseline(nn.Module):
    """Holds copies of the weights of `model`, split into modules as the published code has them.

    cache_neighbors: search them once (fixed grids); otherwise in every call.
    """

    def __init__(self, model: VaMoH, cache_neighbors: bool) -> None:
        super().__init__()
        if model.kl != "cross_entropy":
            raise ValueError(f"Baseline: the model must have kl='cross_entropy', got {model.kl!r}")
        self.components, self.channels = model.components, model.channels
        self.stages, self.inr, self.op = model.encoder.stages, model.inr, model.likelihood.op
        self.bounded, self.cache_neighbors = model.gating_prior.bounded, cache_neighbors
        self.register_buffer("frequencies", model.encoding.frequencies.detach().clone())
        self.register_buffer("scale", model.likelihood.scale.detach().clone())
        convs = list(model.encoder.convs)
        if any(conv.slope is not None for conv in convs):
            raise ValueError("Baseline: the weight net must be affine, as in the published code")
        self.weight_nets = nn.ModuleList(
            nn.Sequential(*(_linear(layer.weight, layer.bias) for layer in conv.weight_net)) for conv in convs
        )
        self.linears = nn.ModuleList(_linear(conv.linear.weight, conv.linear.bias) for conv in convs)
        self.head = _linear(model.encoder.head.weight, model.encoder.head.bias)
        flow = model.prior
        self.u, self.w, self.b = (nn.ParameterList(p.detach().clone().unbind()) for p in (flow.u, flow.w, flow.b))
        self.loc, self.log_scale = (nn.Parameter(p.detach().clone()) for p in (flow.loc, flow.log_scale))
        layers = list(zip(model.hypernet.weights, model.hypernet.biases, strict=True))
        self.hypernets = nn.ModuleList(
            _mlp([(weight[k], bias[k]) for weight, bias in layers]) for k in range(self.components)
        )
        self.prior_net, self.posterior_net = (
            _mlp([_first_layer(net), *((layer.weight, layer.bias) for layer in net.rest)])
            for net in (model.gating_prior, model.gating_posterior)
        )
        self._grid: tuple[Tensor, Tensor] | None = None
        self._hoods: list[tuple[Tensor, Tensor, Tensor]] | None = None

    def loss(
        self,
        coords: Tensor,
        values: Tensor,
        mask: Tensor,
        noise_z: Tensor,
        noise_kl: Tensor,
        hoods: Hoods | None = None,
    ) -> Tensor:
        """Minus the bound, batch mean: coords [P, D], values [B, P, C], mask [P], noise [B, Z] and [S, B, Z]."""
        batch, points = values.shape[:2]
        encoded = self._encode_grid(coords).expand(batch, -1, -1)
        mask = mask.expand(batch, points)
        seen, seen_values = (x[mask].reshape(batch, -1, x.shape[2]) for x in (encoded, values))
        mean, std = self._posterior(seen, seen_values, hoods)
        z = mean + std * noise_z
        p = Categorical(probs=self._gate(self.prior_net, seen, z).softmax(-1))
        q = Categorical(probs=self._gate(self.posterior_net, seen, z, seen_values).softmax(-1))
        logits = self._decode(encoded, z)  # [B, P, C, K]
        log_p = self._log_likelihood(logits, values[..., None].expand(-1, -1, -1, self.components))
        log_p = log_p[mask].reshape(batch, -1, self.channels, self.components)
        likelihood = (log_p * q.probs[:, :, None]).sum((1, 2, 3)).mean()
        samples = (mean + std * noise_kl).detach().flatten(0, 1)
        kl_z = -self._flow_log_prob(samples).mean()
        return -(likelihood - kl_z - kl_divergence(q, p).sum(-1).mean())

    @torch.no_grad()
    def reconstruct(
        self, coords: Tensor, values: Tensor, out: Tensor, posterior_at: Tensor, hoods: Hoods | None = None
    ) -> tuple[Tensor, ...]:
        """Mean, most probable mean [B, M, C], π [B, M, K], entropy and segmentation [B, M] at the coordinates `out`.

        Every given point is observed; posterior_at [P] is its position in `out`. Neighbours not given are searched.
        Coordinates are encoded once per function.
        """
        batch = len(values)
        encoded, wanted = (torch.cat([self._encode(x) for _ in range(batch)]) for x in (coords, out))
        z = self._posterior(encoded, values, self.search(encoded[:1]) if hoods is None else hoods)[0]
        logits = self._decode(wanted, z)
        if self.op.kind == "continuous_bernoulli":
            means = ContinuousBernoulli(logits=logits).mean
        else:
            means = torch.sigmoid(logits)
        gate = self._gate(self.prior_net, wanted, z)
        gate[:, posterior_at] = self._gate(self.posterior_net, encoded, z, values)
        pi = gate.softmax(-1)
        best = pi.argmax(-1)
        chosen = F.one_hot(best, self.components)
        mean, mean_map = ((means * weights[:, :, None]).sum(-1) for weights in (pi, chosen))
        return mean, mean_map, pi, -(pi * pi.log()).sum(-1), best

    def search(self, encoded: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Centroids and neighbours of every stage, from encoded coordinates [1, N, E] of the batch's first function."""
        found = []
        for stage in self.stages:
            count = min(stage.centroids, encoded.shape[1])
            centroids = _farthest(encoded, count)
            chosen = _take(encoded, centroids)
            distance = torch.cdist(chosen, encoded)
            found.append((centroids, distance.topk(stage.neighbors, largest=False, sorted=False).indices))
            encoded = chosen
        return found

    def gradients(self) -> dict[str, Tensor]:
        """Gradients under the names that `VaMoH` has for these parameters."""
        grads: dict[str, Tensor] = {}

        def put(name: str, linear: nn.Linear) -> None:
            grads[f"{name}.weight"], grads[f"{name}.bias"] = linear.weight.grad, linear.bias.grad

        for i, (net, linear) in enumerate(zip(self.weight_nets, self.linears, strict=True)):
            for j, layer in enumerate(net):
                put(f"encoder.convs.{i}.weight_net.{j}", layer)
            put(f"encoder.convs.{i}.linear", linear)
        put("encoder.head", self.head)
        for name in ("u", "w", "b"):
            grads[f"prior.{name}"] = torch.stack([p.grad for p in getattr(self, name)])
        grads["prior.loc"], grads["prior.log_scale"] = self.loc.grad, self.log_scale.grad
        for i, layers in enumerate(zip(*(_layers(net) for net in self.hypernets), strict=True)):
            grads[f"hypernet.weights.{i}"] = torch.stack([layer.weight.grad for layer in layers])
            grads[f"hypernet.biases.{i}"] = torch.stack([layer.bias.grad for layer in layers])
        for name, net, channels in (("prior", self.prior_net, 0), ("posterior", self.posterior_net, self.channels)):
            first, *rest = _layers(net)
            encoded = 2 * len(self.frequencies)
            latent = first.in_features - encoded - channels
            by_coords, by_value, by_z = first.weight.grad.split([encoded, channels, latent], 1)
            grads[f"gating_{name}.by_coords.weight"], grads[f"gating_{name}.by_coords.bias"] = (
                by_coords,
                first.bias.grad,
            )
            grads[f"gating_{name}.by_z.weight"] = by_z
            if channels:
                grads[f"gating_{name}.by_value.weight"] = by_value
            for i, layer in enumerate(rest):
                put(f"gating_{name}.rest.{i}", layer)
        return grads

    def _encode(self, coords: Tensor) -> Tensor:
        phase = 2 * math.pi * (coords @ self.frequencies.T)
        return torch.cat([phase.cos(), phase.sin()], -1)[None]

    def _encode_grid(self, coords: Tensor) -> Tensor:
        """Features of the whole grid, made once."""
        if self._grid is None or self._grid[0] is not coords:
            self._grid = (coords, self._encode(coords))
        return self._grid[1]

    def _groups(self, encoded: Tensor, hoods: Hoods | None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per stage: neighbours [B, M, S] and their encoded offsets from the centroid [1, M, S, E]."""
        if hoods is None and self._hoods is not None:
            return self._hoods
        batch, first = len(encoded), encoded[:1]
        groups = []
        for centroids, neighbors in self.search(first) if hoods is None else hoods:
            center = _take(first, centroids)
            groups.append((neighbors.repeat(batch, 1, 1), _take(first, neighbors) - center[:, :, None]))
            first = center
        if hoods is None and self.cache_neighbors:
            self._hoods = groups
        return groups

    def _posterior(self, encoded: Tensor, features: Tensor, hoods: Hoods | None) -> tuple[Tensor, Tensor]:
        batch = len(features)
        convs = iter(zip(self.weight_nets, self.linears, strict=True))
        for stage, (neighbors, offsets) in zip(self.stages, self._groups(encoded, hoods), strict=True):
            gathered = _take(features, neighbors)  # [B, M, S, C]
            if stage.channels is None:
                features = gathered.mean(2)
                continue
            weight_net, linear = next(convs)
            weights = weight_net(offsets).expand(batch, -1, -1, -1)  # [B, M, S, Q]
            features = F.leaky_relu(linear((gathered.mT @ weights).flatten(2)), 0.2)
        mean, log_variance = self.head(features.flatten(1)).chunk(2, -1)
        return mean, torch.exp(log_variance.clamp(-70, 70) / 2).clamp(max=10)

    def _gate(self, net: nn.Module, encoded: Tensor, z: Tensor, values: Tensor | None = None) -> Tensor:
        """Logits [B, N, K]."""
        repeated = z[:, None].expand(-1, encoded.shape[1], -1)
        inputs = torch.cat([encoded, repeated] if values is None else [encoded, values, repeated], -1)
        logits = net(inputs.flatten(0, 1)).view(*inputs.shape[:2], -1)
        return torch.tanh(logits) if self.bounded else logits

    def _decode(self, encoded: Tensor, z: Tensor) -> Tensor:
        """Outputs [B, P, C, K] of every network at every point [B, P, E]."""
        batch, points, _ = encoded.shape
        theta = torch.cat([net(z) for net in self.hypernets])  # [K·B, packed]
        h = encoded.expand(self.components, -1, -1, -1).reshape(-1, points, encoded.shape[2])
        layers = unpack(theta, self.inr.widths)
        for i, (weight, bias) in enumerate(layers):
            h = torch.baddbmm(bias[:, None], h, weight.mT)
            if i < len(layers) - 1:
                h = F.leaky_relu(h, self.inr.slope)
        return h.view(self.components, batch, points, -1).permute(1, 2, 3, 0)

    def _log_likelihood(self, logits: Tensor, values: Tensor) -> Tensor:
        if self.op.kind == "bernoulli":
            return -F.binary_cross_entropy_with_logits(logits, values, reduction="none")
        if self.op.kind == "continuous_bernoulli":
            return ContinuousBernoulli(logits=logits).log_prob(values)
        distance = values - torch.sigmoid(logits)
        upper = torch.sigmoid((distance + self.op.half_bin) / self.scale.T)
        lower = torch.sigmoid((distance - self.op.half_bin) / self.scale.T)
        return torch.log(upper - lower + self.op.epsilon)

    def _flow_log_prob(self, z: Tensor) -> Tensor:
        """Log-density [S] of samples z [S, Z], with the per-sample vectors leak·û of every layer."""
        log_det = torch.zeros(len(z), dtype=z.dtype, device=z.device)
        for u, w, b in zip(reversed(self.u), reversed(self.w), reversed(self.b), strict=True):
            inner = (w * u).sum()
            u_hat = u + (F.softplus(inner) - 1 - inner) * w / w.square().sum()
            linear = (w * z).sum(-1, keepdim=True) + b
            leaked = torch.where(linear < 0, z.new_full((), 0.2), 1) * u_hat  # [S, Z]
            stretch = 1 + (w * leaked).sum(-1)
            z = z - leaked * (linear / stretch[:, None])
            log_det = log_det - stretch.abs().log()
        standard = (z - self.loc) / self.log_scale.exp()
        density = -0.5 * math.log(2 * math.pi) * z.shape[1] - (self.log_scale + 0.5 * standard.square()).sum(-1)
        return log_det + density


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.weight, layer.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
    return layer


def _mlp(layers: list[tuple[Tensor, Tensor]]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for weight, bias in layers:
        modules += [_linear(weight, bias), nn.LeakyReLU(0.1)]
    return nn.Sequential(*modules[:-1])


def _layers(net: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in net if isinstance(layer, nn.Linear)]


def _first_layer(net: nn.Module) -> tuple[Tensor, Tensor]:
    """The first layer of a categorical network, on [γ(x), y, z] concatenated."""
    parts = [net.by_coords, net.by_z] if net.by_value is None else [net.by_coords, net.by_value, net.by_z]
    return torch.cat([part.weight for part in parts], 1), net.by_coords.bias


def _take(points: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, ...] of points [B, N, C], by advanced indexing."""
    items = torch.arange(len(index), device=index.device).view(-1, *(1,) * (index.dim() - 1))
    return points[items, index]


def _farthest(points: Tensor, count: int) -> Tensor:
    """Farthest-point sampling [1, count] of points [1, N, E], from the first point; in order if it is all of them."""
    if count == points.shape[1]:
        return torch.arange(count, device=points.device)[None]
    chosen = torch.zeros(1, count, dtype=torch.int64, device=points.device)
    nearest = points.new_full(points.shape[:2], math.inf)
    for i in range(1, count):
        distance = torch.linalg.vector_norm(points - points[:, chosen[0, i - 1]][:, None], dim=-1)
        closer = distance < nearest
        nearest[closer] = distance[closer]
        chosen[0, i] = nearest.argmax()
    return chosen
