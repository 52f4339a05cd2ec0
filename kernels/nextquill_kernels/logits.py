"""Logits from products: z = cap(scale · (x + b)) with x = h Wᵀ, and the derivative of z by x."""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton.language as tl

from nextquill_kernels.launch import jit

LOG2E = tl.constexpr(1.4426950408889634)


@jit()
def exp(x):
    """Return e^x as 2^(x·log2 e): one multiplication and one instruction, where `tl.exp` takes several."""
    return tl.exp2(x * LOG2E)


@jit()
def tanh(x):
    """Return tanh to 1e-6 relative from exp, which every backend has; a series where 1 - 2 / (e^2x + 1) cancels."""
    square = x * x
    near = x + x * square * (-0.33333144 + square * (0.13325879 + square * (-0.05304549 + square * 0.01724148)))
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.5, near, far)


@jit()
def finish(b_x, b_bias, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr):
    """Return z of products x; `b_bias` broadcasts to them."""
    if HAS_BIAS:
        b_x += b_bias
    if HAS_SCALE:
        b_x *= logit_scale
    if HAS_CAP:
        b_x = softcap * tanh(b_x * (1.0 / softcap))
    return b_x


@jit()
def load(x_ptr, bias_ptr, cols, mask, logit_scale, softcap, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr):
    """Load products of one row and return their z; -inf where not `mask`, which may be None."""
    b_x = tl.load(x_ptr + cols, mask=mask)
    b_bias = 0.0
    if bias_ptr is not None:
        b_bias = tl.load(bias_ptr + cols, mask=mask).to(tl.float32)
    b_z = finish(b_x, b_bias, logit_scale, softcap, bias_ptr is not None, HAS_SCALE, HAS_CAP)
    # A cap would turn -inf into -softcap, so columns that do not exist are masked after it.
    return b_z if mask is None else tl.where(mask, b_z, float("-inf"))


@jit()
def backward(b_dz, b_z, softcap, factor, HAS_CAP: tl.constexpr):
    """Return dx = dz · scale · cap'(z). With a cap `factor` is scale / c²: cap' = (c - z)(c + z) / c², exact at z = c.

    Without one it is the scale.
    """
    if HAS_CAP:
        b_dz = b_dz * ((softcap - b_z) * (softcap + b_z))
    return b_dz * factor
