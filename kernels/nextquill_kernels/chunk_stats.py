"""Statistics of a chunk of logits and its labels: softmax and nll, from one read of the logits.

Each lane of a program keeps a running maximum and sum of its own columns, with one exponential per value; the lanes are
combined once, at the end of the row. See `nextquill_kernels.chunk` for the mathematics.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

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
from nextquill_kernels.logits import exp, load

# Start of a running maximum: finite, so that a lane that has only seen -inf never computes (-inf) - (-inf).
LOWEST = tl.constexpr(-3.4e38)

# To read 4.8 TB/s at a latency of 0.7 us, 3.4 MB must be in flight: 25 KiB on each of 132 multiprocessors. Two tiles of
# 4 KiB a stream are under way while a program works on a third; at 64 registers or fewer four programs share a
# multiprocessor. Larger tiles take more registers for the lanes' state, and fewer programs fit.
TOKEN_STATS = RowTile(block_v=1024, threads=256)
PAIR_STATS = RowTile(block_v=1024, threads=256)
PAIR_MOMENTS = RowTile(block_v=1024, threads=256)


@jit()
def accumulate(b_max, b_sum, b_z):
    """Add exp(z) to each lane's b_sum * exp(b_max), with one exponential; rescaling and adding would take two.

    The larger of z and b_max becomes the new maximum, and the term of the smaller one is scaled by exp(-|z - b_max|). A
    NaN fails the comparison and reaches b_sum through that factor; `maximum` would drop it.
    """
    b_gap = b_z - b_max
    b_exp = exp(-tl.abs(b_gap))
    b_sum = tl.where(b_gap > 0, b_sum * b_exp + 1.0, b_sum + b_exp)
    return tl.maximum(b_max, b_z), b_sum


@jit()
def _accumulate_moments(b_max, b_sum, b_zsum, b_esum, b_z, b_e):
    """Accumulate as `accumulate` does, and also the sums of exp(z - b_max) (z - b_max) and exp(z - b_max) e."""
    b_gap = b_z - b_max
    b_exp = exp(-tl.abs(b_gap))
    b_above = b_gap > 0
    b_zsum = tl.where(b_above, (b_zsum - b_gap * b_sum) * b_exp, b_zsum + tl.where(b_exp > 0, b_exp * b_gap, 0.0))
    b_esum = tl.where(b_above, b_esum * b_exp + b_e, b_esum + tl.where(b_exp > 0, b_exp * b_e, 0.0))
    b_sum = tl.where(b_above, b_sum * b_exp + 1.0, b_sum + b_exp)
    return tl.maximum(b_max, b_z), b_sum, b_zsum, b_esum


@jit()
def combine(b_max, b_sum):
    """Return the lanes' maximum m and s = sum(exp(z - m)), from which (m - z[y]) + log(s) is exact at |z| = 1e4."""
    m = tl.max(b_max, axis=0)
    return m, tl.sum(b_sum * exp(b_max - m), axis=0)


@jit()
def _label_logit(x_row, bias_ptr, label, V, logit_scale, softcap, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr):
    """Load z[y]; NaN for a label of V or more."""
    known = (label >= 0) & (label < V)
    z = load(x_row, bias_ptr, tl.where(known, label, 0), None, logit_scale, softcap, HAS_SCALE, HAS_CAP)
    return tl.where(known, z, float("nan"))


@jit()
def _store_row(out_ptr, row, stride, index, label, value):
    """Write `value` to out[index, row], or 0 if the row is ignored."""
    tl.store(out_ptr + index * tl.cast(stride, tl.int64) + row, tl.where(label < 0, 0.0, value))


@jit()
def _store_softmax(out_ptr, row, stride, index, label, m, s, y):
    """Write the three statistics of stream `index`, where y is the label's logit."""
    _store_row(out_ptr, row, stride, 3 * index, label, m)
    _store_row(out_ptr, row, stride, 3 * index + 1, label, s)
    _store_row(out_ptr, row, stride, 3 * index + 2, label, (m - y) + tl.log(s))


# A mask of single columns makes accesses 4 bytes wide if V is odd, so only the last, partial tile has one.


@jit(do_not_specialize=["out_stride"], do_not_specialize_on_alignment=["label_ptr", "out_ptr"])
def _token_stats_kernel(
    x_ptr, bias_ptr, label_ptr, out_ptr, x_stride, out_stride, V, logit_scale, softcap,
    BLOCK_V: tl.constexpr, STAGES: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    x_row = x_ptr + row * x_stride
    lanes = tl.arange(0, BLOCK_V)
    b_max = tl.full([BLOCK_V], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_V], tl.float32)

    whole = V // BLOCK_V * BLOCK_V
    for start in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
        b_z = load(x_row, bias_ptr, start + lanes, None, logit_scale, softcap, HAS_SCALE, HAS_CAP)
        b_max, b_sum = accumulate(b_max, b_sum, b_z)
    if whole < V:
        b_z = load(x_row, bias_ptr, whole + lanes, whole + lanes < V, logit_scale, softcap, HAS_SCALE, HAS_CAP)
        b_max, b_sum = accumulate(b_max, b_sum, b_z)

    m, s = combine(b_max, b_sum)
    y = _label_logit(x_row, bias_ptr, label, V, logit_scale, softcap, HAS_SCALE, HAS_CAP)
    _store_softmax(out_ptr, row, out_stride, 0, label, m, s, y)


def token_stats(
    logits: Tensor,
    labels: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Compute max(z), sum(exp(z - max)) and nll = logsumexp(z) - z[y] of every row, with z = cap(scale (x + b)).

    Args:
        logits: x [n, V] float32, last stride 1, any row stride.
        labels: y [n] int64; negative is ignored.
        out: [3, n] float32, last stride 1: receives max, sum, nll (nats).
        bias: b [V] float32, last stride 1; None for no bias.
        softcap: c of cap(x) = c tanh(x / c); None for no cap.
        logit_scale: the scale.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, layout or device.
        RuntimeError: not a device Triton runs on.
    """
    n, vocabulary = check_logits("logits", logits)
    check_together(logits=logits, labels=labels, out=out, bias=bias)
    check_rows(n, torch.int64, labels=labels)
    check_tensor("out", out, torch.float32, 3, n)
    check_bias(bias, vocabulary)
    if n == 0:
        return
    tile = TOKEN_STATS
    with on_device(logits):
        _token_stats_kernel[(n,)](
            logits, bias, labels.contiguous(), out, logits.stride(0), out.stride(0), vocabulary,
            float(logit_scale), float(softcap or 0), HAS_SCALE=logit_scale != 1, HAS_CAP=softcap is not None,
            **tile.constants, num_warps=tile.num_warps,
        )  # fmt: skip


@jit()
def _accumulate_pair(
    b_max1, b_sum1, b_max0, b_sum0, b_maxe, b_sume, b_zsum, b_esum, b_z1, b_z0, b_ze, origin, HAS_MOMENTS: tl.constexpr
):
    if HAS_MOMENTS:
        b_max1, b_sum1, b_zsum, b_esum = _accumulate_moments(b_max1, b_sum1, b_zsum, b_esum, b_z1, b_ze - origin)
    else:
        b_max1, b_sum1 = accumulate(b_max1, b_sum1, b_z1)
    b_max0, b_sum0 = accumulate(b_max0, b_sum0, b_z0)
    b_maxe, b_sume = accumulate(b_maxe, b_sume, b_ze)
    return b_max1, b_sum1, b_max0, b_sum0, b_maxe, b_sume, b_zsum, b_esum


@jit(do_not_specialize=["out_stride"], do_not_specialize_on_alignment=["label_ptr", "out_ptr"])
def _pair_stats_kernel(
    x1_ptr, x0_ptr, bias_ptr, label_ptr, out_ptr, x1_stride, x0_stride, out_stride, V, logit_scale, softcap,
    BLOCK_V: tl.constexpr, STAGES: tl.constexpr, HAS_MOMENTS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    x1_row = x1_ptr + row * x1_stride
    x0_row = x0_ptr + row * x0_stride
    lanes = tl.arange(0, BLOCK_V)
    b_max1 = tl.full([BLOCK_V], LOWEST, tl.float32)
    b_max0 = tl.full([BLOCK_V], LOWEST, tl.float32)
    b_maxe = tl.full([BLOCK_V], LOWEST, tl.float32)
    b_sum1 = tl.zeros([BLOCK_V], tl.float32)
    b_sum0 = tl.zeros([BLOCK_V], tl.float32)
    b_sume = tl.zeros([BLOCK_V], tl.float32)
    b_zsum = tl.zeros([BLOCK_V], tl.float32)  # this and the next are for the moments only
    b_esum = tl.zeros([BLOCK_V], tl.float32)
    y1 = _label_logit(x1_row, bias_ptr, label, V, logit_scale, softcap, HAS_SCALE, HAS_CAP)
    y0 = _label_logit(x0_row, bias_ptr, label, V, logit_scale, softcap, HAS_SCALE, HAS_CAP)
    # The mean of z1 - z0 is taken relative to the label's difference: relative to 0 it would lose digits if all
    # differences share a large offset.
    origin = tl.where(tl.abs(y1 - y0) < float("inf"), y1 - y0, 0.0)

    whole = V // BLOCK_V * BLOCK_V
    for start in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
        cols = start + lanes
        b_z1 = load(x1_row, bias_ptr, cols, None, logit_scale, softcap, HAS_SCALE, HAS_CAP)
        b_z0 = load(x0_row, bias_ptr, cols, None, logit_scale, softcap, HAS_SCALE, HAS_CAP)
        b_max1, b_sum1, b_max0, b_sum0, b_maxe, b_sume, b_zsum, b_esum = _accumulate_pair(
            b_max1, b_sum1, b_max0, b_sum0, b_maxe, b_sume, b_zsum, b_esum, b_z1, b_z0, b_z1 - b_z0, origin, HAS_MOMENTS
        )
    if whole < V:
        cols = whole + lanes
        b_z1 = load(x1_row, bias_ptr, cols, cols < V, logit_scale, softcap, HAS_SCALE, HAS_CAP)
        b_z0 = load(x0_row, bias_ptr, cols, cols < V, logit_scale, softcap, HAS_SCALE, HAS_CAP)
        # Beyond V this is -inf - 0: the difference is masked there too, and not NaN.
        b_ze = b_z1 - tl.where(cols < V, b_z0, 0.0)
        b_max1, b_sum1, b_max0, b_sum0, b_maxe, b_sume, b_zsum, b_esum = _accumulate_pair(
            b_max1, b_sum1, b_max0, b_sum0, b_maxe, b_sume, b_zsum, b_esum, b_z1, b_z0, b_ze, origin, HAS_MOMENTS
        )

    m1, s1 = combine(b_max1, b_sum1)
    m0, s0 = combine(b_max0, b_sum0)
    me, se = combine(b_maxe, b_sume)
    _store_softmax(out_ptr, row, out_stride, 0, label, m1, s1, y1)
    _store_softmax(out_ptr, row, out_stride, 1, label, m0, s0, y0)
    _store_softmax(out_ptr, row, out_stride, 2, label, me, se, y1 - y0)
    if HAS_MOMENTS:
        # KL = sum(p1 ze) - lse1 + lse0,  entropy = log(s1) - sum(exp(z1 - m1) (z1 - m1)) / s1.
        b_gap = b_max1 - m1
        b_scale = exp(b_gap) / s1
        mean_effect = tl.sum(b_scale * b_esum, axis=0)
        mean_gap = tl.sum(b_scale * (b_zsum + b_gap * b_sum1), axis=0)
        _store_row(out_ptr, row, out_stride, 9, label, mean_effect + (origin - (m1 - m0)) - (tl.log(s1) - tl.log(s0)))
        _store_row(out_ptr, row, out_stride, 10, label, tl.log(s1) - mean_gap)


def pair_stats(
    logits: tuple[Tensor, Tensor],
    labels: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Compute the statistics of two streams and of their difference, reading each stream once.

    Args:
        logits: x1 (factual) and x0 (counterfactual), each [n, V] float32, last stride 1, any row stride.
        labels: [n] int64; negative is ignored.
        out: [9, n] float32, last stride 1: receives max, sum, nll (nats) of z1, of z0, of z1 - z0. With [11, n] also
            KL(p1 || p0) and the entropy of p1, in nats.
        bias, softcap, logit_scale: as in `token_stats`.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, layout or device.
        RuntimeError: not a device Triton runs on.
    """
    x1, x0 = logits
    n, vocabulary = check_logits("logits_factual", x1)
    check_together(logits_factual=x1, logits_counterfactual=x0, labels=labels, out=out, bias=bias)
    check_tensor("logits_counterfactual", x0, torch.float32, n, vocabulary)
    check_rows(n, torch.int64, labels=labels)
    has_moments = out.ndim == 2 and out.shape[0] == 11
    check_tensor("out", out, torch.float32, 11 if has_moments else 9, n)
    check_bias(bias, vocabulary)
    if n == 0:
        return
    tile = PAIR_MOMENTS if has_moments else PAIR_STATS
    with on_device(x1):
        _pair_stats_kernel[(n,)](
            x1, x0, bias, labels.contiguous(), out, x1.stride(0), x0.stride(0), out.stride(0), vocabulary,
            float(logit_scale), float(softcap or 0), HAS_MOMENTS=has_moments, HAS_SCALE=logit_scale != 1,
            HAS_CAP=softcap is not None, **tile.constants, num_warps=tile.num_warps,
        )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """Return the configurations that training uses, for `nextquill_kernels.crosscompile`."""
    common: dict[str, str | None] = {"label_ptr": "*i64", "out_ptr": "*fp32", "out_stride": "i32", "V": "i32"}
    common |= {"bias_ptr": None, "logit_scale": "fp32", "softcap": "fp32"}
    token = {**common, "x_ptr": "*fp32", "x_stride": "i32"}
    pair = {**common, "x1_ptr": "*fp32", "x0_ptr": "*fp32", "x1_stride": "i32", "x0_stride": "i32"}
    cases = [
        row_case("token_stats", _token_stats_kernel, TOKEN_STATS, token),
        row_case("pair_stats", _pair_stats_kernel, PAIR_STATS, pair, HAS_MOMENTS=False),
        row_case("pair_stats/moments", _pair_stats_kernel, PAIR_MOMENTS, pair, HAS_MOMENTS=True),
    ]
    return [variant for case in cases for variant in variants(case)]
