"""Gating networks and the categorical divergence in Triton: the kernels and what calls them.

A program works on tiles of BR points of one function; rows of a tile are points. Hidden values go through `scratch`,
memory of the program's own that stays in its cache, as in `inr_mixture.py`: only the inner loops of products, which
store nothing, may be pipelined. The gradient computes the hidden values again. A program in training has a group of
the tiles and a share of the functions, and adds to partial sums of its own: of the coordinates' part per share, of the
shift per group, and of the parameters.

Letters beyond those of docs/architecture.md: WIDTHS are H, ..., K, STRIDES the same padded to whole blocks BLOCKS, KP
the last of them, MOST and TOTAL the largest and the sum; L layers come after the first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import _blocks, _math, _mlp
from ._launch import device_of, kernel, on, products
from .gating_plan import KL_POINTS, REGISTERS, Plan, kl_splits, plan


@triton.jit
def _first_layer(
    coords, shift, values, weight, at, to, points, H: tl.constexpr, STRIDE: tl.constexpr, C: tl.constexpr,
    BR: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Values before the activation at the points `at`, to scratch."""
    for j in tl.range(0, STRIDE, BO, num_stages=1, disable_licm=True):
        c = j + tl.arange(0, BO)
        inside = (c < H)[None, :]
        h = tl.load(coords + c.to(tl.int64)[None, :] * points + at[:, None], mask=inside, other=0.0)
        h += tl.load(shift + c, mask=c < H, other=0.0)[None, :]
        for i in range(C):
            y = tl.load(values + at.to(tl.int64) * C + i)
            h += y[:, None] * tl.load(weight + c * C + i, mask=c < H, other=0.0)[None, :]
        tl.store(_blocks.at(to, 0, j, STRIDE, BR, BO), h)


@kernel
def forward(
    coords_ptr, stride_coords_b, shift_ptr, values_ptr, parameters_ptr, log_p_ptr, scratch_ptr, slope, points,
    tiles, batch, C: tl.constexpr, L: tl.constexpr, WIDTHS: tl.constexpr, STRIDES: tl.constexpr, BLOCKS: tl.constexpr,
    MOST: tl.constexpr, TOTAL: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr, BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-probabilities [B, K, N] of networks of L layers after the first. An item of work is a tile and a function."""
    H: tl.constexpr = WIDTHS[0]
    K: tl.constexpr = WIDTHS[L]
    KP: tl.constexpr = STRIDES[L]
    k = tl.arange(0, KP)[None, :]
    one = scratch_ptr + tl.program_id(0).to(tl.int64) * (2 * BR * MOST)
    for item in tl.range(tl.program_id(0), tiles * batch, tl.num_programs(0), num_stages=1, disable_licm=True):
        b = tl.full((), item // tiles, tl.int64)
        row = item % tiles * BR + tl.arange(0, BR)
        at = tl.minimum(row, points - 1)
        y = values_ptr + b * points * C
        x = coords_ptr + b * stride_coords_b
        _first_layer(x, shift_ptr + b * H, y, parameters_ptr, at, one, points, H, STRIDES[0], C, BR, BLOCKS[0])
        tl.debug_barrier()
        w = parameters_ptr + H * C
        source = one
        target = one + BR * MOST
        for i in tl.static_range(L - 1):
            _mlp.hidden_layer(
                w, w + WIDTHS[i + 1] * WIDTHS[i], source, target, slope, 0.0, WIDTHS[i], WIDTHS[i + 1], STRIDES[i],
                STRIDES[i + 1], BR, BLOCKS[i + 1], BI, False, PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
            w += WIDTHS[i + 1] * (WIDTHS[i] + 1)
            swap = source
            source = target
            target = swap
        if L == 0:
            logits = tl.load(_blocks.at(one, 0, 0, KP, BR, KP))
        else:
            logits = _mlp.layer(
                w, w + K * WIDTHS[L - 1], source, slope, 0.0, 0, WIDTHS[L - 1], K, STRIDES[L - 1], BR, KP, BI, False,
                PRECISION,
            )  # fmt: skip
        tl.debug_barrier()
        if BOUNDED:
            logits = _math.tanh(logits)
        logits = tl.where(k < K, logits, float("-inf"))
        logits -= tl.max(logits, 1)[:, None]
        logits -= tl.log(tl.sum(tl.exp(logits), 1))[:, None]
        tl.store(log_p_ptr + (b * K + k) * points + row[:, None], logits, mask=(row < points)[:, None] & (k < K))


@kernel
def train(
    grad_ptr, log_p_ptr, coords_ptr, stride_coords_b, shift_ptr, values_ptr, parameters_ptr, grad_coords_ptr,
    grad_shift_ptr, grad_values_ptr, grad_parameters_ptr, scratch_ptr, slope, points, tiles, batch, groups, shares,
    size, C: tl.constexpr, L: tl.constexpr, WIDTHS: tl.constexpr, STRIDES: tl.constexpr, BLOCKS: tl.constexpr,
    MOST: tl.constexpr, TOTAL: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr, BOUNDED: tl.constexpr,
    SHARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients from those of log_p, both [B, K, N].

    grad_coords [shares, H, N] if the coordinates' part is SHARED by the functions, else [B, H, N]; grad_shift
    [groups, B, H]; grad_values [B, N, C] or None; grad_parameters [groups · shares, size]. A program has one group of
    the tiles and one share of the functions.
    """
    H: tl.constexpr = WIDTHS[0]
    K: tl.constexpr = WIDTHS[L]
    KP: tl.constexpr = STRIDES[L]
    k = tl.arange(0, KP)[None, :]
    program = tl.program_id(0).to(tl.int64)
    before = scratch_ptr + program * (BR * (TOTAL + 2 * MOST))
    one = before + BR * TOTAL
    mine = grad_parameters_ptr + program * size
    group = tl.program_id(0) % groups
    share = tl.program_id(0) // groups
    each = tl.cdiv(tiles, groups)
    many = tl.cdiv(batch, shares)
    for tile in tl.range(group * each, tl.minimum(group * each + each, tiles), num_stages=1, disable_licm=True):
        row = tile * BR + tl.arange(0, BR)
        at = tl.minimum(row, points - 1)
        for function in tl.range(share * many, tl.minimum(share * many + many, batch), num_stages=1, disable_licm=True):
            first_tile = tile == group * each
            first = function == share * many
            fresh = first_tile & first
            b = tl.full((), function, tl.int64)
            y = values_ptr + b * points * C
            x = coords_ptr + b * stride_coords_b
            _first_layer(x, shift_ptr + b * H, y, parameters_ptr, at, before, points, H, STRIDES[0], C, BR, BLOCKS[0])
            tl.debug_barrier()
            w = parameters_ptr + H * C
            g = mine + H * C
            source = before
            for i in tl.static_range(L - 1):
                _mlp.hidden_layer(
                    w, w + WIDTHS[i + 1] * WIDTHS[i], source, source + BR * STRIDES[i], slope, 0.0, WIDTHS[i],
                    WIDTHS[i + 1], STRIDES[i], STRIDES[i + 1], BR, BLOCKS[i + 1], BI, False, PRECISION,
                )  # fmt: skip
                tl.debug_barrier()
                w += WIDTHS[i + 1] * (WIDTHS[i] + 1)
                g += WIDTHS[i + 1] * (WIDTHS[i] + 1)
                source += BR * STRIDES[i]
            inside = (row < points)[:, None] & (k < K)
            to = (b * K + k) * points + row[:, None]
            d = tl.load(grad_ptr + to, mask=inside, other=0.0)
            d -= tl.exp(tl.load(log_p_ptr + to, mask=inside, other=float("-inf"))) * tl.sum(d, 1)[:, None]
            if BOUNDED:
                if L == 0:
                    logits = tl.load(_blocks.at(before, 0, 0, KP, BR, KP))
                else:
                    logits = _mlp.layer(
                        w, w + K * WIDTHS[L - 1], source, slope, 0.0, 0, WIDTHS[L - 1], K, STRIDES[L - 1], BR, KP, BI,
                        False, PRECISION,
                    )  # fmt: skip
                bounded = _math.tanh(logits)
                d *= 1.0 - bounded * bounded
            tl.store(_blocks.at(one, 0, 0, KP, BR, KP), tl.where(inside, d, 0.0))
            tl.debug_barrier()
            after = one
            target = one + BR * MOST
            for j in tl.static_range(L):
                _mlp.weight_gradient(
                    g, g + WIDTHS[L - j] * WIDTHS[L - 1 - j], after, source, fresh, slope, 0.0, WIDTHS[L - 1 - j],
                    WIDTHS[L - j], STRIDES[L - 1 - j], STRIDES[L - j], BR, BLOCKS[L - j], BLOCKS[L - 1 - j], BI, False,
                    PRECISION,
                )  # fmt: skip
                _mlp.hidden_gradient(
                    w, after, source, target, slope, 0.0, WIDTHS[L - 1 - j], WIDTHS[L - j], STRIDES[L - 1 - j],
                    STRIDES[L - j], BR, BLOCKS[L - 1 - j], BI, False, PRECISION,
                )  # fmt: skip
                tl.debug_barrier()
                if j < L - 1:
                    w -= WIDTHS[L - 1 - j] * (WIDTHS[L - 2 - j] + 1)
                    g -= WIDTHS[L - 1 - j] * (WIDTHS[L - 2 - j] + 1)
                    source -= BR * STRIDES[L - 2 - j]
                swap = after
                after = target
                target = swap
            own_coords = grad_coords_ptr + (tl.full((), share, tl.int64) if SHARED else b) * H * points
            _first_gradient(
                own_coords, first | (not SHARED), grad_shift_ptr + (group * batch + b) * H, first_tile, mine, fresh,
                after, y, at, row, points, H, STRIDES[0], C, BR, BLOCKS[0],
            )  # fmt: skip
            if grad_values_ptr is not None:
                to_values = grad_values_ptr + b * points * C
                _value_gradient(to_values, after, parameters_ptr, row, points, H, STRIDES[0], C, BR, BLOCKS[0])
            tl.debug_barrier()


@triton.jit
def _first_gradient(
    to_coords, first, to_shift, first_tile, to_weight, fresh, grad, values, at, row, points, H: tl.constexpr,
    STRIDE: tl.constexpr, C: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Add the gradients of what the first layer is a sum of: coordinates' part, shift and the values' weight."""
    for j in tl.range(0, STRIDE, BO, num_stages=1, disable_licm=True):
        c = j + tl.arange(0, BO)
        known = c < H
        inside = known[None, :] & (row < points)[:, None]
        d = tl.load(_blocks.at(grad, 0, j, STRIDE, BR, BO))
        to = to_coords + c.to(tl.int64)[None, :] * points + row[:, None]
        tl.store(to, d + tl.load(to, mask=inside & (not first), other=0.0), mask=inside)
        shifted = tl.load(to_shift + c, mask=known & (not first_tile), other=0.0)
        tl.store(to_shift + c, shifted + tl.sum(d, 0), mask=known)
        for i in range(C):
            y = tl.load(values + at.to(tl.int64) * C + i)
            weighted = tl.load(to_weight + c * C + i, mask=known & (not fresh), other=0.0)
            tl.store(to_weight + c * C + i, weighted + tl.sum(d * y[:, None], 0), mask=known)


@triton.jit
def _value_gradient(
    to, grad, weight, row, points, H: tl.constexpr, STRIDE: tl.constexpr, C: tl.constexpr, BR: tl.constexpr,
    BO: tl.constexpr,
):  # fmt: skip
    """Gradient of the values of the rows."""
    for i in range(C):
        total = tl.zeros((BR,), tl.float32)
        for j in tl.range(0, STRIDE, BO, num_stages=1, disable_licm=True):
            c = j + tl.arange(0, BO)
            v = tl.load(weight + c * C + i, mask=c < H, other=0.0)
            total += tl.sum(tl.load(_blocks.at(grad, 0, j, STRIDE, BR, BO)) * v[None, :], 1)
        tl.store(to + row.to(tl.int64) * C + i, total, mask=row < points)


@kernel
def kl_forward(
    log_q_ptr, stride_q_b, stride_q_k, stride_q_n, log_p_ptr, stride_p_b, stride_p_k, stride_p_n, mask_ptr,
    stride_mask_b, stride_mask_n, q_ptr, kl_ptr, points, batch, splits, K: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """q [B, K, N] and the divergences [splits, B]. A program has a function and a share of its steps of BN points."""
    b = (tl.program_id(0) % batch).to(tl.int64)
    split = tl.program_id(0) // batch
    tiles = tl.cdiv(points, BN)
    each = tl.cdiv(tiles, splits)
    total = tl.zeros((BN,), tl.float32)
    for tile in range(split * each, tl.minimum(split * each + each, tiles)):
        n = tile * BN + tl.arange(0, BN).to(tl.int64)
        there = n < points
        seen = there
        if mask_ptr is not None:
            seen = there & (tl.load(mask_ptr + b * stride_mask_b + n * stride_mask_n, mask=there, other=0) != 0)
        for component in range(K):
            k = tl.full((), component, tl.int64)
            from_q = log_q_ptr + b * stride_q_b + k * stride_q_k + n * stride_q_n
            log_q_n = tl.load(from_q, mask=seen, other=float("-inf"))
            log_p_n = tl.load(log_p_ptr + b * stride_p_b + k * stride_p_k + n * stride_p_n, mask=seen, other=0.0)
            value = tl.exp(log_q_n)
            tl.store(q_ptr + (b * K + k) * points + n, value, mask=there)
            total += tl.where(value == 0.0, 0.0, value * (log_q_n - log_p_n))
    tl.store(kl_ptr + tl.program_id(0), tl.sum(total, 0))


@kernel
def kl_train(
    grad_q_ptr, grad_kl_ptr, q_ptr, log_q_ptr, stride_q_b, stride_q_k, stride_q_n, log_p_ptr, stride_p_b,
    stride_p_k, stride_p_n, grad_log_q_ptr, grad_log_p_ptr, points, K: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients [B, K, N] of both log-probabilities. A program has BN points of a function and a component."""
    tiles = tl.cdiv(points, BN)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    b = pair // K
    k = pair % K
    n = tl.program_id(0) % tiles * BN + tl.arange(0, BN).to(tl.int64)
    there = n < points
    at = pair * points + n
    by_kl = tl.load(grad_kl_ptr + b)
    value = tl.load(q_ptr + at, mask=there, other=0.0)
    log_q_n = tl.load(log_q_ptr + b * stride_q_b + k * stride_q_k + n * stride_q_n, mask=there, other=0.0)
    log_p_n = tl.load(log_p_ptr + b * stride_p_b + k * stride_p_k + n * stride_p_n, mask=there, other=0.0)
    by_q = tl.load(grad_q_ptr + at, mask=there, other=0.0) + by_kl * (log_q_n - log_p_n + 1.0)
    tl.store(grad_log_q_ptr + at, tl.where(value == 0.0, 0.0, value * by_q), mask=there)
    tl.store(grad_log_p_ptr + at, -by_kl * value, mask=there)


def gating(
    coords: Tensor, shift: Tensor, values: Tensor | None, parameters: Tensor, widths: Sequence[int], slope: float,
    bounded: bool, precision: str,
) -> Tensor:  # fmt: skip
    """Log-probabilities [B, K, N]; arguments as those of the op `vamoh::gating`."""
    log_p = shift.new_empty(shift.shape[0], widths[-1], coords.shape[2])
    if log_p.numel():
        call = _Call("gating", coords, shift, values, parameters, widths, slope, bounded, precision)
        with on(call.device):
            forward[(call.plan.programs,)](*call.network, log_p, call.scratch, *call.sizes, **call.constants)
    return log_p


def gating_backward(
    grad: Tensor, log_p: Tensor, coords: Tensor, shift: Tensor, values: Tensor | None, parameters: Tensor,
    widths: Sequence[int], slope: float, bounded: bool, by_values: bool, precision: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of coords, shift, values (empty unless asked for) and parameters; arguments as those of the op."""
    new = shift.new_empty
    grad_values = new(values.shape if by_values and values is not None else 0)
    if not log_p.numel():
        zeros = (coords, shift, grad_values, parameters)
        return tuple(t.new_zeros(t.shape) for t in zeros)
    call = _Call("gating_backward", coords, shift, values, parameters, widths, slope, bounded, precision)
    p, shared = call.plan, coords.shape[0] == 1
    grad_coords = new(p.shares if shared else len(shift), *coords.shape[1:])
    grad_shift, grad_parameters = new(p.groups, *shift.shape), new(p.programs, *parameters.shape)
    wanted = grad_values if grad_values.numel() else None
    with on(call.device):
        train[(p.programs,)](
            grad.contiguous(), log_p.contiguous(), *call.network, grad_coords, grad_shift, wanted, grad_parameters,
            call.scratch, *call.sizes, p.groups, p.shares, parameters.numel(), SHARED=shared, **call.constants,
        )  # fmt: skip
    by_coords = _sum(grad_coords)[None] if shared else grad_coords
    return by_coords, _sum(grad_shift), grad_values, _sum(grad_parameters)


def categorical_kl(log_q: Tensor, log_p: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """q [B, K, N] and the divergence [B]; arguments as those of the op `vamoh::categorical_kl`."""
    batch, components, points = log_q.shape
    q = log_q.new_empty(log_q.shape)
    if not q.numel():
        return q, log_q.new_zeros(batch)
    shares = kl_splits(batch, points, device_of(log_q.device))
    kl = log_q.new_empty(shares, batch)
    step = (0, 0) if mask is None else mask.stride()
    with on(log_q.device):
        kl_forward[(batch * shares,)](
            log_q, *log_q.stride(), log_p, *log_p.stride(), mask, *step, q, kl, points, batch, shares,
            **kl_constants(components),
        )  # fmt: skip
    return q, _sum(kl)


def categorical_kl_backward(
    grad_q: Tensor, grad_kl: Tensor, q: Tensor, log_q: Tensor, log_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients [B, K, N] of both log-probabilities; arguments as those of the op."""
    batch, components, points = log_q.shape
    grads = q.new_empty(q.shape), q.new_empty(q.shape)
    if q.numel():
        programs = batch * components * -(-points // KL_POINTS)
        with on(q.device):
            kl_train[(programs,)](
                grad_q.contiguous(), grad_kl.contiguous(), q.contiguous(), log_q, *log_q.stride(), log_p,
                *log_p.stride(), *grads, points, **kl_constants(components),
            )  # fmt: skip
    return grads


def constants(chosen: Plan, widths: Sequence[int], channels: int, bounded: bool, precision: str) -> dict[str, object]:
    """Constants for which `forward` and `train` are compiled."""
    return {
        "C": channels,
        "L": len(widths) - 1,
        "WIDTHS": tuple(widths),
        "STRIDES": chosen.widths,
        "BLOCKS": chosen.outputs,
        "MOST": max(chosen.widths),
        "TOTAL": sum(chosen.widths),
        "BR": chosen.rows,
        "BI": chosen.inputs,
        "BOUNDED": bounded,
        "PRECISION": precision,
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
        "maxnreg": REGISTERS,
    }


def kl_constants(components: int) -> dict[str, object]:
    """Constants for which `kl_forward` and `kl_train` are compiled."""
    return {"K": components, "BN": KL_POINTS, "num_warps": 4, "num_stages": 1, "maxnreg": REGISTERS}


class _Call:
    """What `forward` and `train` have in common."""

    def __init__(
        self, op: str, coords: Tensor, shift: Tensor, values: Tensor | None, parameters: Tensor, widths: Sequence[int],
        slope: float, bounded: bool, precision: str,
    ) -> None:  # fmt: skip
        batch, points = len(shift), coords.shape[2]
        self.device = shift.device
        self.plan = _plan(op, batch, points, tuple(widths), precision, device_of(self.device))
        coords, shift = coords.contiguous(), shift.contiguous()
        known = shift if values is None else values.contiguous()  # without channels nothing of it is read
        step = 0 if len(coords) == 1 else coords.stride(0)
        self.network = (coords, step, shift, known, parameters.contiguous())
        self.sizes = (slope, points, self.plan.tiles, batch)
        channels = 0 if values is None else values.shape[2]
        self.constants = constants(self.plan, widths, channels, bounded, products(precision))
        self.scratch = shift.new_empty(self.plan.programs * self.plan.scratch)


def _sum(shares: Tensor) -> Tensor:
    return shares[0] if len(shares) == 1 else shares.sum(0)


_plan = functools.lru_cache(plan)
