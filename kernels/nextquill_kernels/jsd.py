"""The Jensen-Shannon divergence of two streams of logits, and its gradient by the first.

Both launchers walk products x = h Wᵀ as those of `nextquill_kernels.chunk` do, one program per row. With p1 and p0 the
softmaxes of student and teacher, and m = beta p0 + (1 - beta) p1:

    jsd = beta KL(p0 || m) + (1 - beta) KL(p1 || m)        dz1 = g (1 - beta) p1 (log(p1 / m) - KL(p1 || m))
    beta = 0:  KL(p0 || p1)                                dz1 = g (p1 - p0)
    beta = 1:  KL(p1 || p0)                                dz1 = g p1 (log(p1 / p0) - KL(p1 || p0))

The teacher is a constant. The statistics read a row twice, because m needs both sums of exponentials first; if those
are given, once. The
logarithms come from the difference d of log-probabilities, so that they are exact where a probability underflows:

    d = log(p0 / p1) = (z0 - max0) - (z1 - max1) - log(sum0 / sum1)
    r = log(m / max(p0, p1)) = log(beta + (1 - beta) exp(-d)) if d > 0, else log(1 - beta + beta exp(d))
    log(m / p1) = r + max(d, 0)        log(m / p0) = r + max(-d, 0)

A divergence KL(p || m) sums p log(p / m) + m - p, which is never negative. All m - p of a row add up to 0, up to the
rounding of the softmaxes: without them that rounding would be an error of the divergence.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from nextquill_kernels.chunk_grad import check_out, factors
from nextquill_kernels.chunk_stats import LOWEST, accumulate, combine
from nextquill_kernels.crosscompile import CompileCase, row_case, variants
from nextquill_kernels.launch import (
    RowTile,
    check_bias,
    check_logits,
    check_rows,
    check_tensor,
    check_together,
    jit,
    on_device,
)
from nextquill_kernels.logits import backward, exp, load

# As in `chunk_stats`: two tiles of 4 KiB a stream are under way while a program works on a third.
JSD_STATS = RowTile(block_v=1024, threads=256)
JSD_GRAD = RowTile(block_v=1024, threads=256)

_STATS = 6


@jit()
def _mixture(b_z1, b_z0, softmax1, softmax0, gap, beta, END: tl.constexpr):
    """Return p1, p0, log(m / p1) and log(m / p0). END is beta if it is 0 or 1, else None."""
    m1, weight1 = softmax1
    m0, weight0 = softmax0
    # Finite also in a masked column, where d would be inf - inf; its probabilities stay 0. NaN passes.
    b_x1, b_x0 = b_z1 - m1, b_z0 - m0
    b_x1 = tl.where(b_x1 < LOWEST, LOWEST, b_x1)
    b_x0 = tl.where(b_x0 < LOWEST, LOWEST, b_x0)
    b_d = b_x0 - b_x1 - gap
    if END is None:
        b_near = tl.where(b_d > 0, beta, 1.0 - beta)
        b_r = tl.log(b_near + (1.0 - b_near) * exp(-tl.abs(b_d)))
        b_above1, b_above0 = b_r + tl.maximum(b_d, 0.0), b_r + tl.maximum(-b_d, 0.0)
    elif END == 0:
        b_above1, b_above0 = tl.zeros_like(b_d), -b_d
    else:
        b_above1, b_above0 = b_d, tl.zeros_like(b_d)
    return weight1 * exp(b_x1), weight0 * exp(b_x0), b_above1, b_above0


@jit()
def _accumulate_divergences(b_kl1, b_kl0, b_z1, b_z0, softmax1, softmax0, gap, beta, END: tl.constexpr):
    b_p1, b_p0, b_above1, b_above0 = _mixture(b_z1, b_z0, softmax1, softmax0, gap, beta, END)
    b_surplus = b_p0 - b_p1
    b_kl1 += beta * b_surplus - b_p1 * b_above1
    b_kl0 -= (1.0 - beta) * b_surplus + b_p0 * b_above0
    return b_kl1, b_kl0


@jit(do_not_specialize=["out_stride"], do_not_specialize_on_alignment=["out_ptr"])
def _jsd_stats_kernel(
    x1_ptr, x0_ptr, bias_ptr, out_ptr, x1_stride, x0_stride, out_stride, V, beta, logit_scale, softcap,
    BLOCK_V: tl.constexpr, STAGES: tl.constexpr, END: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
    NORMALISED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x1_row = x1_ptr + row * x1_stride
    x0_row = x0_ptr + row * x0_stride
    lanes = tl.arange(0, BLOCK_V)
    whole = V // BLOCK_V * BLOCK_V

    out_ptr += row
    stride = tl.cast(out_stride, tl.int64)
    if NORMALISED:
        m1, s1 = tl.load(out_ptr), tl.load(out_ptr + stride)
        m0, s0 = tl.load(out_ptr + 2 * stride), tl.load(out_ptr + 3 * stride)
    else:
        b_max1 = tl.full([BLOCK_V], LOWEST, tl.float32)
        b_max0 = tl.full([BLOCK_V], LOWEST, tl.float32)
        b_sum1 = tl.zeros([BLOCK_V], tl.float32)
        b_sum0 = tl.zeros([BLOCK_V], tl.float32)
        for start in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
            cols = start + lanes
            b_z1 = load(x1_row, bias_ptr, cols, None, logit_scale, softcap, HAS_SCALE, HAS_CAP)
            b_z0 = load(x0_row, bias_ptr, cols, None, logit_scale, softcap, HAS_SCALE, HAS_CAP)
            b_max1, b_sum1 = accumulate(b_max1, b_sum1, b_z1)
            b_max0, b_sum0 = accumulate(b_max0, b_sum0, b_z0)
        if whole < V:
            cols = whole + lanes
            b_z1 = load(x1_row, bias_ptr, cols, cols < V, logit_scale, softcap, HAS_SCALE, HAS_CAP)
            b_z0 = load(x0_row, bias_ptr, cols, cols < V, logit_scale, softcap, HAS_SCALE, HAS_CAP)
            b_max1, b_sum1 = accumulate(b_max1, b_sum1, b_z1)
            b_max0, b_sum0 = accumulate(b_max0, b_sum0, b_z0)
        m1, s1 = combine(b_max1, b_sum1)
        m0, s0 = combine(b_max0, b_sum0)
        tl.store(out_ptr, m1)
        tl.store(out_ptr + stride, s1)
        tl.store(out_ptr + 2 * stride, m0)
        tl.store(out_ptr + 3 * stride, s0)

    gap = tl.log(s0 / s1)
    weight1, weight0 = 1.0 / s1, 1.0 / s0
    b_kl1 = tl.zeros([BLOCK_V], tl.float32)
    b_kl0 = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
        cols = start + lanes
        b_z1 = load(x1_row, bias_ptr, cols, None, logit_scale, softcap, HAS_SCALE, HAS_CAP)
        b_z0 = load(x0_row, bias_ptr, cols, None, logit_scale, softcap, HAS_SCALE, HAS_CAP)
        b_kl1, b_kl0 = _accumulate_divergences(b_kl1, b_kl0, b_z1, b_z0, (m1, weight1), (m0, weight0), gap, beta, END)
    if whole < V:
        cols = whole + lanes
        b_z1 = load(x1_row, bias_ptr, cols, cols < V, logit_scale, softcap, HAS_SCALE, HAS_CAP)
        b_z0 = load(x0_row, bias_ptr, cols, cols < V, logit_scale, softcap, HAS_SCALE, HAS_CAP)
        b_kl1, b_kl0 = _accumulate_divergences(b_kl1, b_kl0, b_z1, b_z0, (m1, weight1), (m0, weight0), gap, beta, END)
    kl1, kl0 = tl.sum(b_kl1, axis=0), tl.sum(b_kl0, axis=0)
    if END is None:
        jsd = beta * kl0 + (1.0 - beta) * kl1
    elif END == 0:
        jsd = kl0
    else:
        jsd = kl1

    tl.store(out_ptr + 4 * stride, kl1)
    tl.store(out_ptr + 5 * stride, tl.where(jsd < 0, 0.0, jsd))  # below 0 by rounding only; NaN passes


def jsd_stats(
    logits: tuple[Tensor, Tensor],
    out: Tensor,
    beta: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    normalised: bool = False,
) -> None:
    """Compute max(z1), sum(exp(z1 - max)), the same of z0, KL(p1 || m) and jsd, with z = cap(scale (x + b)).

    Args:
        logits: x1 (student) and x0 (teacher), each [n, V] float32, last stride 1, any row stride.
        out: [6, n] float32, last stride 1: receives the statistics, divergences in nats.
        beta: weight of p0 in m: 0, 1, or a number between that float32 tells from both.
        bias, softcap, logit_scale: as in `token_stats`.
        normalised: the first four statistics are given in `out`. They may be those of more columns than the logits
            have; the divergences are then these columns' shares.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, layout or device.
        RuntimeError: not a device Triton runs on.
    """
    x1, x0 = logits
    n, vocabulary = _check_pair(x1, x0, bias, out=out)
    check_tensor("out", out, torch.float32, _STATS, n)
    if n == 0:
        return
    tile = JSD_STATS
    with on_device(x1):
        _jsd_stats_kernel[(n,)](
            x1, x0, bias, out, x1.stride(0), x0.stride(0), out.stride(0), vocabulary, float(beta), float(logit_scale),
            float(softcap or 0), END=_end(beta), HAS_SCALE=logit_scale != 1, HAS_CAP=softcap is not None,
            NORMALISED=normalised, **tile.constants, num_warps=tile.num_warps,
        )  # fmt: skip


@jit()
def _jsd_tile(
    x1_row, x0_row, bias_ptr, out_row, cols, mask, softmax1, softmax0, gap, kl1, grad, beta, logit_scale, softcap,
    factor, END: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    b_z1 = load(x1_row, bias_ptr, cols, mask, logit_scale, softcap, HAS_SCALE, HAS_CAP)
    b_z0 = load(x0_row, bias_ptr, cols, mask, logit_scale, softcap, HAS_SCALE, HAS_CAP)
    b_p1, b_p0, b_above1, _ = _mixture(b_z1, b_z0, softmax1, softmax0, gap, beta, END)
    if END is None:
        b_dz = -grad * (1.0 - beta) * b_p1 * (b_above1 + kl1)
    elif END == 0:
        b_dz = grad * (b_p1 - b_p0)
    else:
        b_dz = -grad * b_p1 * (b_above1 + kl1)
    b_dx = backward(b_dz, b_z1, softcap, factor, HAS_CAP)
    tl.store(out_row + cols, b_dx.to(out_row.dtype.element_ty), mask=mask)


# The logits may be overwritten: a tile is stored after it has been read, to its own place, and the tiles that are being
# loaded meanwhile are later ones.


@jit(do_not_specialize=["stats_stride"], do_not_specialize_on_alignment=["stats_ptr", "grad_ptr"])
def _jsd_grad_kernel(
    x1_ptr, x0_ptr, bias_ptr, out_ptr, stats_ptr, grad_ptr, x1_stride, x0_stride, out_stride, stats_stride, V, beta,
    logit_scale, softcap, factor,
    BLOCK_V: tl.constexpr, STAGES: tl.constexpr, END: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    stats_ptr += row
    stride = tl.cast(stats_stride, tl.int64)
    m1, s1 = tl.load(stats_ptr), tl.load(stats_ptr + stride)
    m0, s0 = tl.load(stats_ptr + 2 * stride), tl.load(stats_ptr + 3 * stride)
    kl1, grad = tl.load(stats_ptr + 4 * stride), tl.load(grad_ptr + row)
    gap = tl.log(s0 / s1)
    weight1, weight0 = 1.0 / s1, 1.0 / s0
    x1_row = x1_ptr + row * x1_stride
    x0_row = x0_ptr + row * x0_stride
    out_row = out_ptr + row * out_stride
    lanes = tl.arange(0, BLOCK_V)

    whole = V // BLOCK_V * BLOCK_V
    for start in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
        _jsd_tile(x1_row, x0_row, bias_ptr, out_row, start + lanes, None, (m1, weight1), (m0, weight0), gap, kl1, grad,
                  beta, logit_scale, softcap, factor, END, HAS_SCALE, HAS_CAP)  # fmt: skip
    if whole < V:
        _jsd_tile(x1_row, x0_row, bias_ptr, out_row, whole + lanes, whole + lanes < V, (m1, weight1), (m0, weight0),
                  gap, kl1, grad, beta, logit_scale, softcap, factor, END, HAS_SCALE, HAS_CAP)  # fmt: skip


def jsd_grad(
    logits: tuple[Tensor, Tensor],
    stats: Tensor,
    grad_jsd: Tensor,
    out: Tensor,
    beta: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Compute scale·cap'·dz1, the gradient of g·jsd by x1; the module's text defines dz1.

    Args:
        logits: x1 and x0, each [n, V] float32, last stride 1, any row stride.
        stats: [6, n] float32, written by `jsd_stats` for the same logits and `beta`; last stride 1.
        grad_jsd: g [n] float32, per nat.
        out: [n, V] float32, bfloat16 or float16, last stride 1, any row stride: receives the gradient. The logits x1
            themselves, or other memory.
        beta: as in `jsd_stats`.
        bias, softcap, logit_scale: as in `token_grad`.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, layout or device.
        RuntimeError: not a device Triton runs on.
    """
    x1, x0 = logits
    n, vocabulary = _check_pair(x1, x0, bias, stats=stats, grad_jsd=grad_jsd, out=out)
    check_tensor("stats", stats, torch.float32, _STATS, n)
    check_rows(n, torch.float32, grad_jsd=grad_jsd)
    check_out("out", out, n, vocabulary)
    if n == 0:
        return
    tile = JSD_GRAD
    with on_device(x1):
        _jsd_grad_kernel[(n,)](
            x1, x0, bias, out, stats, grad_jsd.contiguous(),
            x1.stride(0), x0.stride(0), out.stride(0), stats.stride(0), vocabulary, float(beta),
            *factors(softcap, logit_scale), END=_end(beta), HAS_SCALE=logit_scale != 1, HAS_CAP=softcap is not None,
            **tile.constants, num_warps=tile.num_warps,
        )  # fmt: skip


def _check_pair(x1: Tensor, x0: Tensor, bias: Tensor | None, **others: Tensor) -> tuple[int, int]:
    """Return n and V of both logits [n, V], or raise; the shapes of the others are not checked."""
    n, vocabulary = check_logits("logits_student", x1)
    check_together(logits_student=x1, logits_teacher=x0, bias=bias, **others)
    check_tensor("logits_teacher", x0, torch.float32, n, vocabulary)
    check_bias(bias, vocabulary)
    return n, vocabulary


def _end(beta: float) -> int | None:
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta!r}")
    return int(beta) if beta in (0, 1) else None


def compile_cases() -> list[CompileCase]:
    """Return the configurations that training uses, for `nextquill_kernels.crosscompile`."""
    rows: dict[str, str | None] = {"V": "i32", "bias_ptr": None}
    rows |= dict.fromkeys(("beta", "logit_scale", "softcap"), "fp32")
    rows |= {"x1_ptr": "*fp32", "x0_ptr": "*fp32", "x1_stride": "i32", "x0_stride": "i32", "out_stride": "i32"}
    stats = {**rows, "out_ptr": "*fp32"}
    grad = {**rows, "stats_ptr": "*fp32", "stats_stride": "i32", "grad_ptr": "*fp32", "factor": "fp32"}
    cases = []
    for end in (None, 0, 1):
        of_end = "" if end is None else f"/beta_{end}"
        mine = [
            row_case(f"jsd_stats{given}{of_end}", _jsd_stats_kernel, JSD_STATS, stats, END=end, NORMALISED=bool(given))
            for given in ("", "/normalised")
        ]
        mine += [
            row_case(f"jsd_grad/{out}{of_end}", _jsd_grad_kernel, JSD_GRAD, {**grad, "out_ptr": f"*{out}"}, END=end)
            for out in ("fp32", "bf16")
        ]
        cases += [variant for case in mine for variant in variants(case)] if end is None else mine
    return cases
