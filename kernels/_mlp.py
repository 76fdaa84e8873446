"""Layers of the networks that kernels run on blocks of points, forward and backward, from scratch to scratch.

Scratch holds the values before the activation, rows IN_STRIDE or OUT_STRIDE apart, which are the widths IN and OUT of
the layer padded to whole blocks. Weights are [OUT, IN]. BR, BO and BI are the blocks of rows, outputs and inputs of a
product; BS is that of the sum in it, the only loop that may be pipelined: the others read what was written before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _blocks, _math


@triton.jit
def layer(
    w, bias, before, slope, omega, j, IN: tl.constexpr, OUT: tl.constexpr, IN_STRIDE: tl.constexpr, BR: tl.constexpr,
    BO: tl.constexpr, BS: tl.constexpr, SINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs [BR, BO] from j on, from the values `before` the activation."""
    acc = tl.zeros((BR, BO), tl.float32)
    for i in range(0, IN_STRIDE, BS):
        h = _math.activate(tl.load(_blocks.at(before, 0, i, IN_STRIDE, BR, BS)), slope, omega, SINE)
        acc = _math.dot(h, tl.trans(_blocks.matrix(w, j, i, OUT, IN, IN, BO, BS)), acc, PRECISION)
    return acc + _blocks.bias(bias, j, OUT, BO)


@triton.jit
def hidden_layer(
    w, bias, before, to, slope, omega, IN: tl.constexpr, OUT: tl.constexpr, IN_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr, BS: tl.constexpr, SINE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The next layer's values before the activation."""
    for j in tl.range(0, OUT_STRIDE, BO, num_stages=1, disable_licm=True):
        h = layer(w, bias, before, slope, omega, j, IN, OUT, IN_STRIDE, BR, BO, BS, SINE, PRECISION)
        tl.store(_blocks.at(to, 0, j, OUT_STRIDE, BR, BO), h)


@triton.jit
def hidden_gradient(
    w, grad, before, to, slope, omega, IN: tl.constexpr, OUT: tl.constexpr, IN_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr, BS: tl.constexpr, SINE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient before the activation from that of the next layer's outputs."""
    for i in tl.range(0, IN_STRIDE, BI, num_stages=1, disable_licm=True):
        acc = tl.zeros((BR, BI), tl.float32)
        for j in range(0, OUT_STRIDE, BS):
            d = tl.load(_blocks.at(grad, 0, j, OUT_STRIDE, BR, BS))
            acc = _math.dot(d, _blocks.matrix(w, j, i, OUT, IN, IN, BS, BI), acc, PRECISION)
        h = tl.load(_blocks.at(before, 0, i, IN_STRIDE, BR, BI))
        tl.store(_blocks.at(to, 0, i, IN_STRIDE, BR, BI), _math.activate_backward(acc, h, slope, omega, SINE))


@triton.jit
def weight_gradient(
    to, to_bias, grad, before, fresh, slope, omega, IN: tl.constexpr, OUT: tl.constexpr, IN_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr, ROWS: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BS: tl.constexpr,
    SINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the gradients of a layer's weights and biases, summed over ROWS rows; with `fresh` there was nothing yet."""
    for j in tl.range(0, OUT_STRIDE, BO, num_stages=1, disable_licm=True):
        bias = tl.zeros((1, BO), tl.float32)
        for r in range(0, ROWS, BS):
            bias += tl.sum(tl.load(_blocks.at(grad, r, j, OUT_STRIDE, BS, BO)), 0)[None, :]
        _blocks.accumulate(to_bias, 0, j, bias, fresh, 1, OUT, OUT, 1, BO)
        for i in tl.range(0, IN_STRIDE, BI, num_stages=1, disable_licm=True):
            acc = tl.zeros((BO, BI), tl.float32)
            for r in range(0, ROWS, BS):
                d = tl.load(_blocks.at(grad, r, j, OUT_STRIDE, BS, BO))
                h = _math.activate(tl.load(_blocks.at(before, r, i, IN_STRIDE, BS, BI)), slope, omega, SINE)
                acc = _math.dot(tl.trans(d), h, acc, PRECISION)
            _blocks.accumulate(to, j, i, acc, fresh, OUT, IN, IN, BO, BI)
