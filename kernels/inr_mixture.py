"""Mixture of coordinate networks (INRs) in Triton: the kernels and what calls them.

A program works on blocks of BR rows. A row is a point; with a mirror, the first half of the rows are points and the
second half the points opposite to them: for both, the even and the odd half of the features go through the first layer
once, and the rows are even + odd and even - odd. Hidden values go through `scratch`, memory of the program's own that
stays in its cache, so neither width nor depth is bound by registers; every product has an inner loop of its own. Only
those inner loops, which store nothing, may be pipelined: the others read what they wrote before. And nothing is moved
out of the others: kept addresses would spill registers.

Letters beyond those of docs/architecture.md: HS is H, and CP is C, padded to whole blocks; BO and BI are the blocks of
outputs and inputs of a layer; TILE is the rows between two updates of the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vamoh._cache import version

from . import _blocks, _math, _mlp
from ._launch import device_of, kernel, on, products
from .inr_mixture_plan import REGISTERS, Plan, plan


@triton.jit
def _features(start, at, there, e0, STOP: tl.constexpr, E: tl.constexpr, BI: tl.constexpr):
    """Columns e0 .. e0 + BI of the features of the points `at`, 0 from column STOP on and where not `there`."""
    e = e0 + tl.arange(0, BI)[None, :]
    start = start + at.to(tl.int64)[:, None] * E
    if STOP % BI == 0:
        return tl.load(start + e, mask=there[:, None], other=0.0)
    else:
        return tl.load(start + e, mask=there[:, None] & (e < STOP), other=0.0)


@triton.jit
def _rows(first, second, row0, rows_total, BR: tl.constexpr, MIRROR: tl.constexpr):
    """Points of the block of rows that starts at pair (or point) row0, and whether there are such points."""
    r = tl.arange(0, BR)
    if MIRROR:
        pair = row0 + r % (BR // 2)
        inside = pair < rows_total
        at = tl.load(first + pair, mask=inside, other=0)
        opposite = tl.load(second + pair, mask=inside, other=-1)
        at = tl.where(r < BR // 2, at, opposite)
        there = inside & (at >= 0)
    else:
        at = row0 + r
        there = at < rows_total
    return tl.where(there, at, 0), there


@triton.jit
def _leading(first, row0, rows_total, BP: tl.constexpr, MIRROR: tl.constexpr):
    """Points whose features the block loads: all, or the first ones of pairs."""
    p = row0 + tl.arange(0, BP)
    there = p < rows_total
    if MIRROR:
        return tl.load(first + p, mask=there, other=0), there
    else:
        return tl.where(there, p, 0), there


@triton.jit
def _first_layer(
    t, bias, x, at, there, to, E: tl.constexpr, H: tl.constexpr, HS: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, MIRROR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Values before the activation of a block of rows, to scratch."""
    EH: tl.constexpr = E // 2 if MIRROR else E
    for j in tl.range(0, HS, BO, num_stages=1, disable_licm=True):
        even = tl.zeros((BP, BO), tl.float32)
        for e in range(0, EH, BI):
            w = _blocks.matrix(t, j, e, H, EH, E, BO, BI)
            even = _math.dot(_features(x, at, there, e, EH, E, BI), tl.trans(w), even, PRECISION)
        even += _blocks.bias(bias, j, H, BO)
        if MIRROR:
            odd = tl.zeros((BP, BO), tl.float32)
            for e in range(0, EH, BI):
                w = _blocks.matrix(t + EH, j, e, H, EH, E, BO, BI)
                odd = _math.dot(_features(x + EH, at, there, e, EH, E, BI), tl.trans(w), odd, PRECISION)
            tl.store(_blocks.at(to, 0, j, HS, BP, BO), even + odd)
            tl.store(_blocks.at(to, BP, j, HS, BP, BO), even - odd)
        else:
            tl.store(_blocks.at(to, 0, j, HS, BP, BO), even)


@kernel
def forward(
    theta_ptr, stride_theta_b, stride_theta_k, features_ptr, stride_features_b, first_ptr, second_ptr, values_ptr,
    scale_ptr, log_pi_ptr, stride_pi_k, stride_pi_n, out_ptr, out_map_ptr, scratch_ptr, half_bin, epsilon, slope,
    omega, points, rows_total, tiles, batch, components, groups, E: tl.constexpr, H: tl.constexpr, L: tl.constexpr,
    C: tl.constexpr, HS: tl.constexpr, CP: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    MIRROR: tl.constexpr, SINE: tl.constexpr, KIND: tl.constexpr, OPEN_ENDS: tl.constexpr, PADDED: tl.constexpr,
    MODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """MODE "outputs": out [B, K, N, C]; "log_likelihood": out [B, K, N]; "mean": out, out_map [B, N, C].

    An item of work is a block of rows, a function and one of `groups` shares of the components.
    """
    BP: tl.constexpr = BR // 2 if MIRROR else BR
    OUTPUT: tl.constexpr = H * E + (L - 1) * H * H
    BIASES: tl.constexpr = OUTPUT + C * H
    c = tl.arange(0, CP)[None, :]
    one = scratch_ptr + tl.program_id(0).to(tl.int64) * (2 * BR * HS)
    two = one + BR * HS
    each = tl.cdiv(components, groups)
    for item in tl.range(tl.program_id(0), tiles * groups * batch, tl.num_programs(0), num_stages=1, disable_licm=True):
        row0 = (item % tiles) * BP
        group = (item // tiles) % groups
        b = tl.full((), item // tiles // groups, tl.int64)
        at, there = _rows(first_ptr, second_ptr, row0, rows_total, BR, MIRROR)
        leading, known = _leading(first_ptr, row0, rows_total, BP, MIRROR)
        shown = there[:, None] & (c < C)
        if MODE == "log_likelihood":
            y = tl.load(values_ptr + (b * points + at)[:, None] * C + c, mask=shown, other=0.0)
        mixed = tl.zeros((BR, CP), tl.float32)
        likely = tl.zeros((BR, CP), tl.float32)
        best = tl.full((BR,), float("-inf"), tl.float32)
        for k in tl.range(group * each, tl.minimum(group * each + each, components), num_stages=1, disable_licm=True):
            t = theta_ptr + b * stride_theta_b + k * stride_theta_k
            pair = b * components + k
            x = features_ptr + b * stride_features_b
            _first_layer(t, t + BIASES, x, leading, known, one, E, H, HS, BP, BO, BI, MIRROR, PRECISION)
            tl.debug_barrier()
            source = one
            target = two
            for layer in tl.range(1, L, num_stages=1, disable_licm=True):
                w = t + H * E + (layer - 1) * H * H
                _mlp.hidden_layer(
                    w, t + BIASES + layer * H, source, target, slope, omega, H, H, HS, HS, BR, BO, BI, SINE, PRECISION
                )
                tl.debug_barrier()
                swap = source
                source = target
                target = swap
            logits = _mlp.layer(
                t + OUTPUT, t + BIASES + L * H, source, slope, omega, 0, H, C, HS, BR, CP, BI, SINE, PRECISION
            )
            tl.debug_barrier()
            if MODE == "outputs":
                tl.store(out_ptr + (pair * points + at)[:, None] * C + c, logits, mask=shown)
            elif MODE == "log_likelihood":
                width = 1.0
                if KIND == "logistic":
                    width = tl.load(scale_ptr + k * C + c, mask=c < C, other=1.0)
                log_p, _, _ = _math.score(logits, y, width, half_bin, epsilon, KIND, OPEN_ENDS, PADDED)
                tl.store(out_ptr + pair * points + at, tl.sum(tl.where(c < C, log_p, 0.0), 1), mask=there)
            else:
                mean = _math.mean_of(logits, KIND)
                share = tl.load(log_pi_ptr + pair * stride_pi_k + at * stride_pi_n, mask=there, other=0.0)
                better = (k == 0) | (share > best)
                best = tl.where(better, share, best)
                likely = tl.where(better[:, None], mean, likely)
                mixed += tl.exp(share)[:, None] * mean
        if MODE == "mean":
            to = (b * points + at)[:, None] * C + c
            tl.store(out_ptr + to, mixed, mask=shown)
            tl.store(out_map_ptr + to, likely, mask=shown)


@triton.jit
def _first_gradient(
    to, to_bias, grad, x, first, row0, rows_total, fresh, E: tl.constexpr, H: tl.constexpr, HS: tl.constexpr,
    TILE: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, MIRROR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the gradients of the first layer's weights [H, E] and biases, summed over the rows of the tile."""
    SIDES: tl.constexpr = 2 if MIRROR else 1
    BP: tl.constexpr = BR // SIDES
    EH: tl.constexpr = E // SIDES
    for j in tl.range(0, HS, BO, num_stages=1, disable_licm=True):
        bias = tl.zeros((1, BO), tl.float32)
        for r in range(0, TILE, BI):
            bias += tl.sum(tl.load(_blocks.at(grad, r, j, HS, BI, BO)), 0)[None, :]
        _blocks.accumulate(to_bias, 0, j, bias, fresh, 1, H, H, 1, BO)
        for half in tl.range(SIDES, num_stages=1, disable_licm=True):
            for e in tl.range(0, EH, BO, num_stages=1, disable_licm=True):
                acc = tl.zeros((BO, BO), tl.float32)
                for r in range(0, TILE // SIDES, BI):
                    at, there = _leading(first, row0 + r, rows_total, BI, MIRROR)
                    here = r // BP * BR + r % BP
                    d = tl.load(_blocks.at(grad, here, j, HS, BI, BO))
                    if MIRROR:
                        d += (1 - 2 * half) * tl.load(_blocks.at(grad, here + BP, j, HS, BI, BO))
                    acc = _math.dot(tl.trans(d), _features(x + half * EH, at, there, e, EH, E, BO), acc, PRECISION)
                _blocks.accumulate(to + half * EH, j, e, acc, fresh, H, EH, E, BO, BO)


@kernel
def train(
    theta_ptr, stride_theta_b, stride_theta_k, features_ptr, stride_features_b, first_ptr, second_ptr, values_ptr,
    weights_ptr, scale_ptr, log_p_out_ptr, grad_theta_ptr, grad_scale_ptr, totals_ptr, scratch_ptr, half_bin,
    epsilon, slope, omega, points, rows_total, tiles, pairs, components, splits, E: tl.constexpr, H: tl.constexpr,
    L: tl.constexpr, C: tl.constexpr, HS: tl.constexpr, CP: tl.constexpr, TILE: tl.constexpr, BR: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, MIRROR: tl.constexpr, SINE: tl.constexpr, KIND: tl.constexpr,
    OPEN_ENDS: tl.constexpr, PADDED: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients summed over the points of a share of the tiles, one share per split, and what belongs to them.

    MODE "outputs_backward": `values_ptr` holds the gradients of the outputs [B, K, N, C], the result is grad_theta
    [splits, B·K, P]. MODE "expected": also log_p_out [B, K, N], grad_scale [splits, B·K, C] and totals [splits, B·K],
    the sums of weights · log-likelihood. An item of work is a function, a component and a split.
    """
    SIDES: tl.constexpr = 2 if MIRROR else 1
    BP: tl.constexpr = BR // SIDES
    OUTPUT: tl.constexpr = H * E + (L - 1) * H * H
    BIASES: tl.constexpr = OUTPUT + C * H
    LAYER: tl.constexpr = TILE * HS
    c = tl.arange(0, CP)[None, :]
    oc = tl.arange(0, CP)
    before = scratch_ptr + tl.program_id(0).to(tl.int64) * (2 * L * LAYER + TILE * CP)
    grads = before + L * LAYER
    grad_out = grads + L * LAYER
    each = tl.cdiv(tiles, splits)
    for item in tl.range(tl.program_id(0), pairs * splits, tl.num_programs(0), num_stages=1, disable_licm=True):
        split = item // pairs
        pair = tl.full((), item % pairs, tl.int64)
        b = pair // components
        k = pair % components
        t = theta_ptr + b * stride_theta_b + k * stride_theta_k
        x = features_ptr + b * stride_features_b
        g = grad_theta_ptr + tl.full((), item, tl.int64) * (BIASES + L * H + C)
        width = 1.0
        if KIND == "logistic":
            width = tl.load(scale_ptr + k * C + c, mask=c < C, other=1.0)
        by_scale = tl.zeros((CP,), tl.float32)
        total = tl.zeros((BR,), tl.float32)
        for tile in tl.range(split * each, tl.minimum(split * each + each, tiles), num_stages=1, disable_licm=True):
            fresh = tile == split * each
            tile0 = tile * (TILE // SIDES)
            for r in tl.range(0, TILE, BR, num_stages=1, disable_licm=True):
                row0 = tile0 + r // SIDES
                at, there = _rows(first_ptr, second_ptr, row0, rows_total, BR, MIRROR)
                leading, known = _leading(first_ptr, row0, rows_total, BP, MIRROR)
                pre = before + r * HS
                _first_layer(t, t + BIASES, x, leading, known, pre, E, H, HS, BP, BO, BI, MIRROR, PRECISION)
                tl.debug_barrier()
                for layer in tl.range(1, L, num_stages=1, disable_licm=True):
                    w = t + H * E + (layer - 1) * H * H
                    to = pre + LAYER
                    _mlp.hidden_layer(
                        w, t + BIASES + layer * H, pre, to, slope, omega, H, H, HS, HS, BR, BO, BI, SINE, PRECISION
                    )
                    tl.debug_barrier()
                    pre = to
                shown = there[:, None] & (c < C)
                if MODE == "outputs_backward":
                    grad = tl.load(values_ptr + (pair * points + at)[:, None] * C + c, mask=shown, other=0.0)
                else:
                    logits = _mlp.layer(
                        t + OUTPUT, t + BIASES + L * H, pre, slope, omega, 0, H, C, HS, BR, CP, BI, SINE, PRECISION
                    )
                    y = tl.load(values_ptr + (b * points + at)[:, None] * C + c, mask=shown, other=0.0)
                    log_p, grad, scaled = _math.score(logits, y, width, half_bin, epsilon, KIND, OPEN_ENDS, PADDED)
                    log_p = tl.sum(tl.where(c < C, log_p, 0.0), 1)
                    tl.store(log_p_out_ptr + pair * points + at, log_p, mask=there)
                    q = tl.load(weights_ptr + pair * points + at, mask=there, other=0.0)
                    total += tl.where(there, q * log_p, 0.0)
                    by_scale += tl.sum(tl.where(shown, q[:, None] * scaled, 0.0), 0)
                    grad = tl.where(shown, q[:, None] * grad, 0.0)
                tl.store(_blocks.at(grad_out, r, 0, CP, BR, CP), grad)
                tl.debug_barrier()
                to = grads + (L - 1) * LAYER + r * HS
                w = t + OUTPUT
                _mlp.hidden_gradient(
                    w, grad_out + r * CP, pre, to, slope, omega, H, C, HS, CP, BR, BO, 16, SINE, PRECISION
                )
                tl.debug_barrier()
                for _ in tl.range(1, L, num_stages=1, disable_licm=True):
                    w = w - H * H
                    pre = pre - LAYER
                    after = to
                    to = to - LAYER
                    _mlp.hidden_gradient(w, after, pre, to, slope, omega, H, H, HS, HS, BR, BO, BI, SINE, PRECISION)
                    tl.debug_barrier()
            _mlp.weight_gradient(
                g + OUTPUT, g + BIASES + L * H, grad_out, before + (L - 1) * LAYER, fresh, slope, omega,
                H, C, HS, CP, TILE, CP, BO, BI, SINE, PRECISION,
            )  # fmt: skip
            for layer in tl.range(1, L, num_stages=1, disable_licm=True):
                w = g + H * E + (layer - 1) * H * H
                pre = before + (layer - 1) * LAYER
                _mlp.weight_gradient(
                    w, g + BIASES + layer * H, grads + layer * LAYER, pre, fresh, slope, omega,
                    H, H, HS, HS, TILE, BO, BO, BI, SINE, PRECISION,
                )  # fmt: skip
            _first_gradient(
                g, g + BIASES, grads, x, first_ptr, tile0, rows_total, fresh, E, H, HS, TILE, BR, BO, BI, MIRROR,
                PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
        if MODE == "expected":
            tl.store(grad_scale_ptr + tl.full((), item, tl.int64) * C + oc, by_scale, mask=oc < C)
            tl.store(totals_ptr + item, tl.sum(total, 0))


def outputs(
    theta: Tensor, features: Tensor, mirror: Tensor | None, widths: Sequence[int], activation: str, slope: float,
    omega: float, precision: str,
) -> Tensor:  # fmt: skip
    """Outputs [B, K, N, C]; arguments as those of the op `vamoh::inr_mixture`."""
    call = _Call(theta, features, mirror, widths, activation, slope, omega, precision)
    out = theta.new_empty(*theta.shape[:2], call.points, widths[-1])
    call.forward("outputs", out, out)
    return out


def log_likelihood(
    theta: Tensor, features: Tensor, values: Tensor, scale: Tensor, mirror: Tensor | None, widths: Sequence[int],
    activation: str, slope: float, omega: float, kind: str, half_bin: float, epsilon: float, open_ends: bool,
    precision: str,
) -> Tensor:  # fmt: skip
    """Log-likelihoods [B, K, N]; arguments as those of the op `vamoh::inr_mixture_log_likelihood`."""
    call = _Call(theta, features, mirror, widths, activation, slope, omega, precision)
    out = theta.new_empty(*theta.shape[:2], call.points)
    likelihood = (kind, half_bin, epsilon, open_ends)
    call.forward("log_likelihood", out, out, values=values, scale=scale, likelihood=likelihood)
    return out


def mean(
    theta: Tensor, features: Tensor, log_pi: Tensor, mirror: Tensor | None, widths: Sequence[int], activation: str,
    slope: float, omega: float, kind: str, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Means [B, N, C] of the mixture and of its most probable component; arguments as of `vamoh::inr_mixture_mean`."""
    call = _Call(theta, features, mirror, widths, activation, slope, omega, precision)
    out = theta.new_empty(theta.shape[0], call.points, widths[-1])
    out_map = torch.empty_like(out)
    call.forward("mean", out, out_map, log_pi=log_pi, likelihood=(kind, 0.0, 0.0, False))
    return out, out_map


def outputs_backward(
    grad_outputs: Tensor, theta: Tensor, features: Tensor, mirror: Tensor | None, widths: Sequence[int],
    activation: str, slope: float, omega: float, precision: str,
) -> Tensor:  # fmt: skip
    """Gradient [B, K, P] of theta from that of the outputs."""
    call = _Call(theta, features, mirror, widths, activation, slope, omega, precision)
    return call.train("outputs_backward", grad_outputs)[0]


def expected_log_likelihood(
    theta: Tensor, features: Tensor, values: Tensor, weights: Tensor, scale: Tensor, mirror: Tensor | None,
    widths: Sequence[int], activation: str, slope: float, omega: float, kind: str, half_bin: float, epsilon: float,
    open_ends: bool, precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Value [B], log-likelihoods [B, K, N], gradients of theta [B, K, P] and scale [B, K, C], of one pass.

    Arguments as those of the op `vamoh::inr_mixture_expected_log_likelihood`.
    """
    call = _Call(theta, features, mirror, widths, activation, slope, omega, precision)
    log_p = theta.new_empty(*theta.shape[:2], call.points)
    likelihood = (kind, half_bin, epsilon, open_ends)
    grad_theta, grad_scale, totals = call.train("expected", values, weights, scale, log_p, likelihood)
    return totals.sum(1), log_p, grad_theta, grad_scale


def constants(
    chosen: Plan, widths: Sequence[int], mirrored: bool, sine: bool, likelihood: tuple[str, float, float, bool],
    precision: str,
) -> dict[str, object]:  # fmt: skip
    """Constants for which both kernels are compiled."""
    kind, _, epsilon, open_ends = likelihood
    return {
        "E": widths[0],
        "H": widths[1],
        "L": len(widths) - 2,
        "C": widths[-1],
        "HS": chosen.hidden,
        "CP": chosen.channels,
        "BR": chosen.rows,
        "BO": chosen.outputs,
        "BI": chosen.inputs,
        "MIRROR": mirrored,
        "SINE": sine,
        "KIND": kind,
        "OPEN_ENDS": open_ends,
        "PADDED": epsilon != 0,
        "PRECISION": precision,
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
        "maxnreg": REGISTERS,
    }


class _Call:
    """What every call has in common; each of its methods launches one kernel."""

    def __init__(
        self, theta: Tensor, features: Tensor, mirror: Tensor | None, widths: Sequence[int], activation: str,
        slope: float, omega: float, precision: str,
    ) -> None:  # fmt: skip
        self.theta = theta if theta.stride(2) == 1 else theta.contiguous()
        once = features.dim() == 3 and features.shape[0] > 1 and features.stride(0) == 0
        self.features = (features[0] if once else features).contiguous()
        self.features_b = self.features.stride(0) if self.features.dim() == 3 else 0
        self.points = features.shape[-2]
        self.first, self.second = (None, None) if mirror is None else _pairs(mirror)
        self.rows = self.points if self.first is None else len(self.first)
        self.batch, self.components, _ = theta.shape
        self.empty = 0 in (self.batch, self.components, self.points)
        self.widths, self.activation, self.precision = tuple(widths), activation, precision
        self.slope = slope if activation == "leaky_relu" else 0.0
        self.omega = omega

    def plan(self, op: str) -> Plan:
        device, mirrored = device_of(self.theta.device), self.first is not None
        return _plan(op, self.batch, self.components, self.rows, self.widths, self.precision, device, mirrored)

    def constants(self, chosen: Plan, likelihood: tuple[str, float, float, bool]) -> dict[str, object]:
        sine, precision = self.activation == "sine", products(self.precision)
        return constants(chosen, self.widths, self.first is not None, sine, likelihood, precision)

    def forward(
        self, op: str, out: Tensor, out_map: Tensor, *, values: Tensor | None = None, scale: Tensor | None = None,
        log_pi: Tensor | None = None, likelihood: tuple[str, float, float, bool] = ("none", 0.0, 0.0, False),
    ) -> None:  # fmt: skip
        if self.empty:
            out.zero_()
            out_map.zero_()
            return
        _, half_bin, epsilon, _ = likelihood
        chosen = self.plan(op)
        scratch = self.theta.new_empty(chosen.programs * chosen.scratch)
        values, scale, log_pi = (None if t is None else t.contiguous() for t in (values, scale, log_pi))
        pi_k = 0 if log_pi is None else log_pi.shape[2]
        with on(self.theta.device):
            forward[(chosen.programs,)](
                self.theta, self.theta.stride(0), self.theta.stride(1), self.features, self.features_b, self.first,
                self.second, values, scale, log_pi, pi_k, int(pi_k > 1), out, out_map, scratch, half_bin, epsilon,
                self.slope, self.omega, self.points, self.rows, chosen.tiles, self.batch, self.components,
                chosen.groups, MODE=op, **self.constants(chosen, likelihood),
            )  # fmt: skip

    def train(
        self, op: str, values: Tensor, weights: Tensor | None = None, scale: Tensor | None = None,
        log_p: Tensor | None = None, likelihood: tuple[str, float, float, bool] = ("none", 0.0, 0.0, False),
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of theta and scale, and the sums [B, K] of weights times log-likelihood."""
        lead, channels = self.theta.shape[:2], self.widths[-1]
        if self.empty:
            new = self.theta.new_zeros
            return new(self.theta.shape), new(*lead, channels), new(lead)
        _, half_bin, epsilon, _ = likelihood
        chosen = self.plan(op)
        new = self.theta.new_empty
        scratch = new(chosen.programs * chosen.scratch)
        shares = [new(chosen.splits, *lead, *rest) for rest in ([self.theta.shape[2]], [channels], [])]
        values, weights, scale = (None if t is None else t.contiguous() for t in (values, weights, scale))
        with on(self.theta.device):
            train[(chosen.programs,)](
                self.theta, self.theta.stride(0), self.theta.stride(1), self.features, self.features_b, self.first,
                self.second, values, weights, scale, log_p, *shares, scratch, half_bin, epsilon, self.slope, self.omega,
                self.points, self.rows, chosen.tiles, self.batch * self.components, self.components, chosen.splits,
                TILE=chosen.tile, MODE=op, **self.constants(chosen, likelihood),
            )  # fmt: skip
        return tuple(share[0] if chosen.splits == 1 else share.sum(0) for share in shares)  # type: ignore[return-value]


_plan = functools.lru_cache(plan)


_PAIRS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Pairs of each mirror seen, with its version: finding them waits for the GPU."""


def _pairs(mirror: Tensor) -> tuple[Tensor, Tensor]:
    """Points that have the features computed, and the points opposite to them or -1; both int32."""
    written, *pairs = _PAIRS.get(mirror, (None,))
    if written is None or written != version(mirror):
        points = torch.arange(len(mirror), device=mirror.device)
        partner = mirror.clamp(0, max(len(mirror) - 1, 0))
        if ((mirror >= len(mirror)) | ((mirror >= 0) & (mirror[partner] != points))).any():
            raise ValueError("inr_mixture: mirror must hold -1 or pairs, mirror[mirror[n]] = n, of the N points")
        first = ((mirror < 0) | (mirror >= points)).nonzero()[:, 0]
        second = torch.where(mirror[first] == first, -1, mirror[first])
        pairs = [first.int(), second.int()]
        _PAIRS[mirror] = (version(mirror), *pairs)
    return pairs[0], pairs[1]
