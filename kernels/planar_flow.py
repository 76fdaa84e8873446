"""Planar flow in Triton: the kernels and what calls them.

A program works on tiles of BS samples of one function. A tile stays in registers while it goes through the layers, one
by one; all arithmetic is float32 without tensor cores. The training kernel goes through the layers three times:
from z to the base, from there back with the gradient, and from z to the base again, for the gradient of w, which needs
every layer's input: undoing the layers instead would leave the rounding of a large base point in a small z. Between
these it keeps a few values per layer and sample in `scratch`, memory of the program's own that stays in its cache. Sums
over samples go to partial sums of the program's own.

Letters beyond those of docs/architecture.md: ZP is Z, padded to a power of two.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._launch import device_of, kernel, on
from .planar_flow_plan import REGISTERS, Plan, kernel_of, plan


@triton.jit
def philox(c0, c1, c2, c3, seed):
    """Philox4x32-10: four words from the counter (c0, c1, c2, c3) of words; all uint64, words below 2^32."""
    k0 = seed & 0xFFFFFFFF
    k1 = seed >> 32
    for _ in tl.static_range(10):
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0 = (p1 >> 32) ^ c1 ^ k0
        c2 = (p0 >> 32) ^ c3 ^ k1
        c1 = p1 & 0xFFFFFFFF
        c3 = p0 & 0xFFFFFFFF
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@triton.jit
def box_muller(first, second):
    """Two normals from two words, as `vamoh/ops/_noise.py` says."""
    uniform = (first >> 1).to(tl.int32).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10
    turn = second.to(tl.uint32).to(tl.int32, bitcast=True).to(tl.float32) * 9.313225746154785e-10  # in quarters
    radius = tl.sqrt(-2.0 * tl.log(uniform))
    quarter = tl.floor(turn + 0.5)
    angle = (turn - quarter) * 1.5707963267948966
    square = angle * angle
    sine = 1.0 / 120 + square * (-1.0 / 5040 + square * (1.0 / 362880))
    sine = angle + angle * square * (-1.0 / 6 + square * sine)
    cosine = 1.0 / 24 + square * (-1.0 / 720 + square * (1.0 / 40320 + square * (-1.0 / 3628800)))
    cosine = 1.0 + square * (-0.5 + square * cosine)
    side = quarter.to(tl.int32) & 3
    swap = (side & 1) == 1
    x = tl.where(swap, sine, cosine)
    y = tl.where(swap, cosine, sine)
    x = tl.where((side == 1) | (side == 2), -x, x)
    y = tl.where(side >= 2, -y, y)
    return radius * x, radius * y


@triton.jit
def counter_noise(s, b, seed, BS: tl.constexpr, ZP: tl.constexpr):
    """Noise [BS, ZP] of the samples s [BS] of function b."""
    block = tl.arange(0, ZP // 4)[None, :].to(tl.uint64) + tl.zeros((BS, 1), tl.uint64)
    sample = s[:, None].to(tl.uint64) + tl.zeros((1, ZP // 4), tl.uint64)
    zero = tl.zeros((BS, ZP // 4), tl.uint64)
    w0, w1, w2, w3 = philox(block, sample, zero + b.to(tl.uint64), zero, seed.to(tl.uint64))
    x0, x1 = box_muller(w0, w1)
    x2, x3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))


@triton.jit
def _row(start, Z: tl.constexpr, ZP: tl.constexpr):
    """[1, ZP]: Z values, then 0."""
    z = tl.arange(0, ZP)[None, :]
    if Z == ZP:
        return tl.load(start + z)
    else:
        return tl.load(start + z, mask=z < Z, other=0.0)


@triton.jit
def _rows(start, at, Z: tl.constexpr, ZP: tl.constexpr):
    """[BS, ZP]: the rows `at`, int64, of a matrix of Z columns, then 0."""
    z = tl.arange(0, ZP)[None, :]
    if Z == ZP:
        return tl.load(start + at[:, None] * Z + z)
    else:
        return tl.load(start + at[:, None] * Z + z, mask=z < Z, other=0.0)


@triton.jit
def _tabulate(table, gain, slope, layers):
    """[4, T] of the layers: leak / stretch and log stretch, each where linear >= 0 and below."""
    for start in range(0, layers, 64):
        t = start + tl.arange(0, 64)
        inside = t < layers
        above = tl.load(gain + t, mask=inside, other=1.0)
        below = 1.0 - slope + slope * above
        tl.store(table + t, 1.0 / above, mask=inside)
        tl.store(table + layers + t, slope / below, mask=inside)
        tl.store(table + 2 * layers + t, tl.log(above), mask=inside)
        tl.store(table + 3 * layers + t, tl.log(below), mask=inside)


@triton.jit
def _drawn(x, mean, std, noise, seed, s, b, batch, BS: tl.constexpr, Z: tl.constexpr, ZP: tl.constexpr):
    """Samples s of function b, [BS, ZP], and their noise: rows of x, or mean + std · noise, which `seed` may make."""
    at = s.to(tl.int64) * batch + b
    if x is not None:
        drawn = _rows(x, at, Z, ZP)
        return drawn, drawn
    else:
        eps = _rows(noise, at, Z, ZP) if noise is not None else counter_noise(s, b, tl.load(seed), BS, ZP)
        return _row(mean + b * Z, Z, ZP) + _row(std + b * Z, Z, ZP) * eps, eps


@triton.jit
def _inverse(
    x, u, w, b, table, kept, layers, BS: tl.constexpr, Z: tl.constexpr, ZP: tl.constexpr
):  # fmt: skip
    """Base points of the samples x and minus the log-determinant; `kept` [T, BS] gets w·x + b of every layer."""
    s = tl.arange(0, BS)
    log_det = tl.zeros((BS,), tl.float32)
    for i in range(layers):
        t = layers - 1 - i
        linear = tl.sum(x * _row(w + t * Z, Z, ZP), 1) + tl.load(b + t)
        low = linear < 0
        log_det -= tl.where(low, tl.load(table + 3 * layers + t), tl.load(table + 2 * layers + t))
        if kept is not None:
            tl.store(kept + t * BS + s, linear)
        c = tl.where(low, tl.load(table + layers + t), tl.load(table + t)) * linear
        x -= c[:, None] * _row(u + t * Z, Z, ZP)
    return x, log_det


@kernel
def forward(
    x_ptr, mean_ptr, std_ptr, noise_ptr, seed_ptr, u_ptr, gain_ptr, w_ptr, b_ptr, loc_ptr, log_scale_ptr, out_ptr,
    drawn_ptr, scratch_ptr, slope, samples, batch, layers, tiles, splits, constant, Z: tl.constexpr,
    ZP: tl.constexpr, BS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """MODE "log_prob": out [S] of x [S, Z]; "sample": also `drawn_ptr` [S, Z], with x the noise; batch 1 for both.

    MODE "value": out [splits, B], sums of the log-densities over a share of the samples. An item of work is a function
    and a share of its tiles.
    """
    table = scratch_ptr + tl.program_id(0) * (4 * layers)
    _tabulate(table, gain_ptr, slope, layers)
    middle = _row(loc_ptr, Z, ZP)
    width = _row(log_scale_ptr, Z, ZP)
    constant -= tl.sum(width)
    z = tl.arange(0, ZP)[None, :]
    each = tl.cdiv(tiles, splits)
    tl.debug_barrier()
    for item in tl.range(tl.program_id(0), batch * splits, tl.num_programs(0), num_stages=1, disable_licm=True):
        function = tl.full((), item % batch, tl.int64)
        split = item // batch
        total = tl.zeros((BS,), tl.float32)
        for tile in tl.range(split * each, tl.minimum(split * each + each, tiles), num_stages=1, disable_licm=True):
            s = tile * BS + tl.arange(0, BS)
            there = s < samples
            s = tl.minimum(s, samples - 1)
            if MODE == "sample":
                base = _rows(x_ptr, s.to(tl.int64), Z, ZP)
                log_p = constant - 0.5 * tl.sum(base * base, 1)
                v = tl.exp(width) * base + middle
                for t in range(layers):
                    linear = tl.sum(v * _row(w_ptr + t * Z, Z, ZP), 1) + tl.load(b_ptr + t)
                    low = linear < 0
                    log_p -= tl.where(low, tl.load(table + 3 * layers + t), tl.load(table + 2 * layers + t))
                    v += tl.where(low, slope * linear, linear)[:, None] * _row(u_ptr + t * Z, Z, ZP)
                tl.store(drawn_ptr + s.to(tl.int64)[:, None] * Z + z, v, mask=there[:, None] & (z < Z))
            else:
                v, _ = _drawn(x_ptr, mean_ptr, std_ptr, noise_ptr, seed_ptr, s, function, batch, BS, Z, ZP)
                v, log_p = _inverse(v, u_ptr, w_ptr, b_ptr, table, None, layers, BS, Z, ZP)
                standard = (v - middle) * tl.exp(-width)
                log_p += constant - 0.5 * tl.sum(standard * standard, 1)
            if MODE == "value":
                total += tl.where(there, log_p, 0.0)
            else:
                tl.store(out_ptr + s, log_p, mask=there)
        if MODE == "value":
            tl.store(out_ptr + item, tl.sum(total, 0))


@triton.jit
def _add(to, x, fresh, Z: tl.constexpr, ZP: tl.constexpr):
    """Add the row x [ZP] to the Z values at `to`; with `fresh` they were nothing yet."""
    z = tl.arange(0, ZP)
    tl.store(to + z, tl.load(to + z, mask=(z < Z) & (not fresh), other=0.0) + x, mask=z < Z)


@triton.jit
def _add_one(to, x, fresh):
    """Add the number x to the one at `to`; with `fresh` it was nothing yet."""
    tl.store(to, tl.load(to, mask=not fresh, other=0.0) + x)


@kernel
def train(
    x_ptr, mean_ptr, std_ptr, noise_ptr, seed_ptr, weights_ptr, u_ptr, gain_ptr, w_ptr, b_ptr, loc_ptr,
    log_scale_ptr, total_out_ptr, grad_x_ptr, grad_mean_ptr, grad_std_ptr, grad_u_ptr, grad_gain_ptr, grad_w_ptr,
    grad_b_ptr, grad_loc_ptr, grad_log_scale_ptr, scratch_ptr, slope, share, samples, batch, layers, tiles, splits,
    constant, Z: tl.constexpr, ZP: tl.constexpr, BS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Gradients of weighted log-densities, summed over a share of the samples: [splits, B, ...], those wanted.

    MODE "backward": samples x [S, Z] with `weights_ptr` [S], batch 1, and grad_x [S, Z]. MODE "expected": every sample
    has the weight `share`; also total_out [splits, B], the sums of the log-densities, grad_mean and grad_std. An item
    of work is a function and a share of its tiles.
    """
    table = scratch_ptr + tl.program_id(0).to(tl.int64) * (layers * (4 + 3 * BS))
    kept_linear = table + 4 * layers
    kept_c = kept_linear + layers * BS
    kept_by_linear = kept_c + layers * BS
    _tabulate(table, gain_ptr, slope, layers)
    middle = _row(loc_ptr, Z, ZP)
    width = _row(log_scale_ptr, Z, ZP)
    inverse = tl.exp(-width)
    constant -= tl.sum(width)
    z = tl.arange(0, ZP)[None, :]
    row = tl.arange(0, BS)
    each = tl.cdiv(tiles, splits)
    tl.debug_barrier()
    for item in tl.range(tl.program_id(0), batch * splits, tl.num_programs(0), num_stages=1, disable_licm=True):
        own = tl.full((), item, tl.int64)
        function = own % batch
        split = item // batch
        total = tl.zeros((BS,), tl.float32)
        for tile in tl.range(split * each, tl.minimum(split * each + each, tiles), num_stages=1, disable_licm=True):
            fresh = tile == split * each
            s = tile * BS + row
            there = s < samples
            s = tl.minimum(s, samples - 1)
            v, eps = _drawn(x_ptr, mean_ptr, std_ptr, noise_ptr, seed_ptr, s, function, batch, BS, Z, ZP)
            v, log_p = _inverse(v, u_ptr, w_ptr, b_ptr, table, kept_linear, layers, BS, Z, ZP)
            standard = (v - middle) * inverse
            if MODE == "backward":
                weight = tl.load(weights_ptr + s, mask=there, other=0.0)
            else:
                total += tl.where(there, log_p + constant - 0.5 * tl.sum(standard * standard, 1), 0.0)
                weight = tl.where(there, share, 0.0)
            weighted = weight[:, None] * standard
            grad = -weighted * inverse
            if grad_u_ptr is not None:
                squares = weighted * standard - weight[:, None]
                _add(grad_loc_ptr + own * Z, -tl.sum(grad, 0), fresh, Z, ZP)
                _add(grad_log_scale_ptr + own * Z, tl.sum(squares, 0), fresh, Z, ZP)
            tl.debug_barrier()
            for t in range(layers):
                linear = tl.load(kept_linear + t * BS + row)
                ratio = tl.where(linear < 0, tl.load(table + layers + t), tl.load(table + t))
                u_row = _row(u_ptr + t * Z, Z, ZP)
                by_c = -tl.sum(grad * u_row, 1)
                by_linear = by_c * ratio
                if grad_u_ptr is not None:
                    c = ratio * linear
                    at = own * layers + t
                    _add(grad_u_ptr + at * Z, -tl.sum(c[:, None] * grad, 0), fresh, Z, ZP)
                    _add_one(grad_gain_ptr + at, -tl.sum(ratio * (by_c * c + weight), 0), fresh)
                    _add_one(grad_b_ptr + at, tl.sum(by_linear, 0), fresh)
                    tl.store(kept_c + t * BS + row, c)
                    tl.store(kept_by_linear + t * BS + row, by_linear)
                grad += by_linear[:, None] * _row(w_ptr + t * Z, Z, ZP)
            if grad_x_ptr is not None:
                tl.store(grad_x_ptr + s.to(tl.int64)[:, None] * Z + z, grad, mask=there[:, None] & (z < Z))
            if grad_mean_ptr is not None:
                _add(grad_mean_ptr + own * Z, tl.sum(grad, 0), fresh, Z, ZP)
                _add(grad_std_ptr + own * Z, tl.sum(eps * grad, 0), fresh, Z, ZP)
            tl.debug_barrier()
            if grad_u_ptr is not None:
                v = eps
                if x_ptr is None:
                    v = _row(mean_ptr + function * Z, Z, ZP) + _row(std_ptr + function * Z, Z, ZP) * eps
                for i in range(layers):
                    t = layers - 1 - i
                    by_linear = tl.load(kept_by_linear + t * BS + row)
                    _add(grad_w_ptr + (own * layers + t) * Z, tl.sum(by_linear[:, None] * v, 0), fresh, Z, ZP)
                    v -= tl.load(kept_c + t * BS + row)[:, None] * _row(u_ptr + t * Z, Z, ZP)
                tl.debug_barrier()
        if MODE == "expected":
            tl.store(total_out_ptr + item, tl.sum(total, 0))


def log_prob(z: Tensor, parameters: Sequence[Tensor], slope: float) -> Tensor:
    """Log-density [S]; arguments as those of the op `vamoh::planar_flow_log_prob`."""
    out = z.new_empty(len(z))
    if len(z):
        call = _Call("log_prob", len(z), 1, parameters, slope)
        call.forward(z.contiguous(), out)
    return out


def sample(noise: Tensor, parameters: Sequence[Tensor], slope: float) -> tuple[Tensor, Tensor]:
    """Samples [S, Z] and their log-density [S]; arguments as those of the op `vamoh::planar_flow_sample`."""
    z, log_p = noise.new_empty(noise.shape), noise.new_empty(len(noise))
    if len(noise):
        call = _Call("sample", len(noise), 1, parameters, slope)
        call.forward(noise.contiguous(), log_p, drawn=z)
    return z, log_p


def log_prob_backward(
    grad: Tensor, z: Tensor, parameters: Sequence[Tensor], slope: float, grad_z: bool, grad_flow: bool
) -> tuple[Tensor, ...]:
    """Gradients of z and the parameters, empty where not wanted; arguments as those of the op."""
    by_z = z.new_empty(z.shape if grad_z else 0)
    if not len(z):
        return (by_z, *(p.new_zeros(p.shape if grad_flow else 0) for p in parameters))
    call = _Call("backward", len(z), 1, parameters, slope)
    by_flow = call.train(z.contiguous(), weights=grad.contiguous(), grad_x=by_z if grad_z else None, flow=grad_flow)[3:]
    return (by_z, *(g.reshape(g.shape[1:]) if grad_flow else g for g in by_flow))


def expected_log_prob(
    mean: Tensor, std: Tensor, parameters: Sequence[Tensor], slope: float, noise: Tensor | None, seed: Tensor | None,
    samples: int, grad_posterior: bool, grad_flow: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Value [B] and gradients, empty where not wanted; arguments as those of the op."""
    batch = len(mean)
    if not batch:
        posterior = [t.new_empty(t.shape if grad_posterior else 0) for t in (mean, std)]
        return (mean.new_empty(0), *posterior, *(p.new_empty((0, *p.shape) if grad_flow else 0) for p in parameters))
    draw = (mean.contiguous(), std.contiguous(), None if noise is None else noise.contiguous(), seed)
    if not (grad_posterior or grad_flow):
        call = _Call("value", samples, batch, parameters, slope)
        totals = mean.new_empty(call.plan.splits, batch)
        call.forward(None, totals, draw=draw)
        return (totals.sum(0) / samples, *(mean.new_empty(0) for _ in range(8)))
    call = _Call("expected", samples, batch, parameters, slope)
    totals, *grads = call.train(None, draw=draw, posterior=grad_posterior, flow=grad_flow)
    return (totals / samples, *grads)


def constants(chosen: Plan, latent: int, op: str) -> dict[str, object]:
    """Constants for which both kernels are compiled."""
    return {
        "Z": latent,
        "ZP": chosen.latent,
        "BS": chosen.rows,
        "MODE": op,
        "num_warps": chosen.warps,
        "num_stages": 1,
        "maxnreg": REGISTERS[kernel_of(op)],
    }


class _Call:
    """What every call has in common; each of its methods launches one kernel."""

    def __init__(self, op: str, samples: int, batch: int, parameters: Sequence[Tensor], slope: float) -> None:
        self.op, self.samples, self.batch, self.slope = op, samples, batch, slope
        self.parameters = [p.contiguous() for p in parameters]
        self.layers, self.latent = self.parameters[0].shape
        self.device = self.parameters[0].device
        self.plan = _plan(op, samples, batch, self.latent, self.layers, device_of(self.device))
        self.constant = -0.5 * self.latent * math.log(2 * math.pi)

    def forward(
        self, x: Tensor | None, out: Tensor, *, drawn: Tensor | None = None,
        draw: Sequence[Tensor | None] = (None,) * 4,
    ) -> None:  # fmt: skip
        chosen = self.plan
        scratch = out.new_empty(chosen.programs * chosen.scratch)
        with on(self.device):
            forward[(chosen.programs,)](
                x, *draw, *self.parameters, out, drawn, scratch, self.slope, self.samples, self.batch, self.layers,
                chosen.tiles, chosen.splits, self.constant, **constants(chosen, self.latent, self.op),
            )  # fmt: skip

    def train(
        self, x: Tensor | None, *, weights: Tensor | None = None, grad_x: Tensor | None = None,
        draw: Sequence[Tensor | None] = (None,) * 4, posterior: bool = False, flow: bool = False,
    ) -> list[Tensor]:  # fmt: skip
        """Sums of log-densities [B], gradients of mean and std, and of the parameters [B, ...]; empty if not wanted."""
        chosen, new = self.plan, self.parameters[0].new_empty
        rows = [[self.latent]] * 2 if posterior else []
        shapes = [[], *rows, *(p.shape for p in self.parameters if flow)]
        shares = [new(chosen.splits, self.batch, *shape) for shape in shapes]
        total, *grads = shares
        by_mean = [*grads[:2]] if posterior else [None] * 2
        by_flow = grads[-6:] if flow else [None] * 6
        scratch = new(chosen.programs * chosen.scratch)
        with on(self.device):
            train[(chosen.programs,)](
                x, *draw, weights, *self.parameters, total, grad_x, *by_mean, *by_flow, scratch, self.slope,
                1 / self.samples, self.samples, self.batch, self.layers, chosen.tiles, chosen.splits, self.constant,
                **constants(chosen, self.latent, self.op),
            )  # fmt: skip
        return [new(0) if g is None else g[0] if chosen.splits == 1 else g.sum(0) for g in (total, *by_mean, *by_flow)]


_plan = functools.lru_cache(plan)
