"""The gradient of a chunk of logits, written over float32 logits or to other memory in any dtype.

See `nextquill_kernels.chunk` for the mathematics.
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
from nextquill_kernels.logits import backward, exp, load

# As in `chunk_stats`: two tiles of 4 KiB a stream are under way while a program works on a third.
TOKEN_GRAD = RowTile(block_v=1024, threads=256)
PAIR_GRAD = RowTile(block_v=1024, threads=256)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@jit()
def _load_softmax(stats_ptr, row, stride, index, grad):
    """Load max and weight of stream `index`, so that g p = weight · exp(z - max), and the label's entry g (p - 1)."""
    stats_ptr += row + 3 * index * tl.cast(stride, tl.int64)
    s = tl.load(stats_ptr + tl.cast(stride, tl.int64))
    nll = tl.load(stats_ptr + 2 * tl.cast(stride, tl.int64))
    return tl.load(stats_ptr), grad / s, grad * (exp(-nll) - 1.0)


@jit()
def _store(out_row, cols, mask, label, b_dz, b_z, softcap, factor, HAS_CAP: tl.constexpr):
    """Write dx of dz; 0 if the row is ignored."""
    b_dx = tl.where(label < 0, 0.0, backward(b_dz, b_z, softcap, factor, HAS_CAP))
    tl.store(out_row + cols, b_dx.to(out_row.dtype.element_ty), mask=mask)


# The logits may be overwritten: a tile is stored after it has been read, to its own place, and the tiles that are being
# loaded meanwhile are later ones.


@jit()
def _token_tile(
    x_row, bias_ptr, out_row, cols, mask, label, m, weight, at_label, logit_scale, softcap, factor,
    HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    b_z = load(x_row, bias_ptr, cols, mask, logit_scale, softcap, HAS_SCALE, HAS_CAP)
    b_dz = tl.where(cols == label, at_label, weight * exp(b_z - m))
    _store(out_row, cols, mask, label, b_dz, b_z, softcap, factor, HAS_CAP)


@jit(do_not_specialize=["stats_stride"], do_not_specialize_on_alignment=["label_ptr", "stats_ptr", "grad_ptr"])
def _token_grad_kernel(
    x_ptr, bias_ptr, out_ptr, label_ptr, stats_ptr, grad_ptr, x_stride, out_stride, stats_stride, V,
    logit_scale, softcap, factor,
    BLOCK_V: tl.constexpr, STAGES: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    m, weight, at_label = _load_softmax(stats_ptr, row, stats_stride, 0, tl.load(grad_ptr + row))
    x_row = x_ptr + row * x_stride
    out_row = out_ptr + row * out_stride
    lanes = tl.arange(0, BLOCK_V)

    whole = V // BLOCK_V * BLOCK_V
    for start in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
        _token_tile(x_row, bias_ptr, out_row, start + lanes, None, label, m, weight, at_label,
                    logit_scale, softcap, factor, HAS_SCALE, HAS_CAP)  # fmt: skip
    if whole < V:
        _token_tile(x_row, bias_ptr, out_row, whole + lanes, whole + lanes < V, label, m, weight, at_label,
                    logit_scale, softcap, factor, HAS_SCALE, HAS_CAP)  # fmt: skip


def token_grad(
    logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    grad_nll: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Compute the gradient of g·nll by x, with z = cap(scale (x + b)): scale·cap'(z)·g·(softmax(z) - onehot(y)).

    Args:
        logits: x [n, V] float32, last stride 1, any row stride.
        labels: [n] int64; negative is ignored and gets 0.
        stats: [3, n] float32, written by `token_stats` for the same logits; last stride 1.
        grad_nll: g [n] float32, per nat.
        out: [n, V] float32, bfloat16 or float16, last stride 1, any row stride: receives the gradient. The logits
            themselves, or other memory.
        bias, softcap, logit_scale: as in `token_stats`; cap'(z) = 1 - (z/c)².

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, layout or device.
        RuntimeError: not a device Triton runs on.
    """
    n, vocabulary = check_logits("logits", logits)
    check_together(logits=logits, labels=labels, stats=stats, grad_nll=grad_nll, out=out, bias=bias)
    check_rows(n, torch.int64, labels=labels)
    check_tensor("stats", stats, torch.float32, 3, n)
    check_rows(n, torch.float32, grad_nll=grad_nll)
    check_bias(bias, vocabulary)
    check_out("out", out, n, vocabulary)
    if n == 0:
        return
    tile = TOKEN_GRAD
    with on_device(logits):
        _token_grad_kernel[(n,)](
            logits, bias, out, labels.contiguous(), stats, grad_nll.contiguous(),
            logits.stride(0), out.stride(0), stats.stride(0), vocabulary, *factors(softcap, logit_scale),
            HAS_SCALE=logit_scale != 1, HAS_CAP=softcap is not None, **tile.constants, num_warps=tile.num_warps,
        )  # fmt: skip


@jit()
def _pair_tile(
    x1_row, x0_row, bias_ptr, out1_row, out0_row, cols, mask, label, softmax1, softmax0, softmaxe, at_label1, at_label0,
    logit_scale, softcap, factor, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    m1, weight1 = softmax1
    me, weighte = softmaxe
    b_z1 = load(x1_row, bias_ptr, cols, mask, logit_scale, softcap, HAS_SCALE, HAS_CAP)
    b_z0 = load(x0_row, bias_ptr, cols, mask, logit_scale, softcap, HAS_SCALE, HAS_CAP)
    b_effect = weighte * exp(b_z1 - b_z0 - me)
    b_dz1 = tl.where(cols == label, at_label1, weight1 * exp(b_z1 - m1) + b_effect)
    _store(out1_row, cols, mask, label, b_dz1, b_z1, softcap, factor, HAS_CAP)
    if out0_row is not None:
        b_dz0 = -b_effect
        if softmax0 is not None:
            m0, weight0 = softmax0
            b_dz0 += weight0 * exp(b_z0 - m0)
        b_dz0 = tl.where(cols == label, at_label0, b_dz0)
        _store(out0_row, cols, mask, label, b_dz0, b_z0, softcap, factor, HAS_CAP)


@jit(
    do_not_specialize=["stats_stride"],
    do_not_specialize_on_alignment=["label_ptr", "stats_ptr", "grad1_ptr", "grad0_ptr", "grade_ptr"],
)
def _pair_grad_kernel(
    x1_ptr, x0_ptr, bias_ptr, out1_ptr, out0_ptr, label_ptr, stats_ptr, grad1_ptr, grad0_ptr, grade_ptr,
    x1_stride, x0_stride, out1_stride, out0_stride, stats_stride, V, logit_scale, softcap, factor,
    BLOCK_V: tl.constexpr, STAGES: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    # A None pointer leaves a part out: grad0 the term g_c, out0 all of dz0.
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    m1, weight1, at_label1 = _load_softmax(stats_ptr, row, stats_stride, 0, tl.load(grad1_ptr + row))
    me, weighte, at_labele = _load_softmax(stats_ptr, row, stats_stride, 2, tl.load(grade_ptr + row))
    softmax0, at_label0, out0_row = None, -at_labele, None
    at_label1 += at_labele
    if grad0_ptr is not None:
        m0, weight0, own = _load_softmax(stats_ptr, row, stats_stride, 1, tl.load(grad0_ptr + row))
        softmax0 = m0, weight0
        at_label0 += own
    x1_row = x1_ptr + row * x1_stride
    x0_row = x0_ptr + row * x0_stride
    out1_row = out1_ptr + row * out1_stride
    if out0_ptr is not None:
        out0_row = out0_ptr + row * out0_stride
    lanes = tl.arange(0, BLOCK_V)

    whole = V // BLOCK_V * BLOCK_V
    for start in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
        _pair_tile(x1_row, x0_row, bias_ptr, out1_row, out0_row, start + lanes, None, label,
                   (m1, weight1), softmax0, (me, weighte), at_label1, at_label0,
                   logit_scale, softcap, factor, HAS_SCALE, HAS_CAP)  # fmt: skip
    if whole < V:
        _pair_tile(x1_row, x0_row, bias_ptr, out1_row, out0_row, whole + lanes, whole + lanes < V, label,
                   (m1, weight1), softmax0, (me, weighte), at_label1, at_label0,
                   logit_scale, softcap, factor, HAS_SCALE, HAS_CAP)  # fmt: skip


def pair_grad(
    logits: tuple[Tensor, Tensor],
    labels: Tensor,
    stats: Tensor,
    grad_nlls: tuple[Tensor, Tensor | None, Tensor],
    outs: tuple[Tensor, Tensor | None],
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Compute scale·cap'·dz1 and scale·cap'·dz0, the gradients by x1 and x0; `nextquill_kernels.chunk` defines dz.

    Args:
        logits: x1 and x0, each [n, V] float32, last stride 1, any row stride; in different memory.
        labels: [n] int64; negative is ignored and gets 0.
        stats: [9, n] float32, written by `pair_stats` for the same logits; last stride 1.
        grad_nlls: g_f, g_c and g_e, each [n] float32, per nat; None for g_c means 0 and saves its exponentials.
        outs: two as in `token_grad`, for x1 and for x0; each may be its own logits. None for a constant x0.
        bias, softcap, logit_scale: as in `token_grad`.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, layout or device.
        RuntimeError: not a device Triton runs on.
    """
    (x1, x0), (grad1, grad0, grade), (out1, out0) = logits, grad_nlls, outs
    n, vocabulary = check_logits("logits_factual", x1)
    grads = {"grad_factual": grad1, "grad_counterfactual": grad0, "grad_effect": grade}
    results = {"out_factual": out1, "out_counterfactual": out0}
    check_together(
        logits_factual=x1, logits_counterfactual=x0, labels=labels, stats=stats, bias=bias, **grads, **results
    )
    check_tensor("logits_counterfactual", x0, torch.float32, n, vocabulary)
    check_rows(n, torch.int64, labels=labels)
    check_tensor("stats", stats, torch.float32, 9, n)
    check_rows(n, torch.float32, **grads)
    check_bias(bias, vocabulary)
    for name, out in results.items():
        if out is not None:
            check_out(name, out, n, vocabulary)
    if n == 0:
        return
    tile = PAIR_GRAD
    with on_device(x1):
        _pair_grad_kernel[(n,)](
            x1, x0, bias, out1, out0, labels.contiguous(), stats,
            grad1.contiguous(), None if grad0 is None or out0 is None else grad0.contiguous(), grade.contiguous(),
            x1.stride(0), x0.stride(0), out1.stride(0), 0 if out0 is None else out0.stride(0), stats.stride(0),
            vocabulary, *factors(softcap, logit_scale),
            HAS_SCALE=logit_scale != 1, HAS_CAP=softcap is not None, **tile.constants, num_warps=tile.num_warps,
        )  # fmt: skip


def check_out(name: str, out: Tensor, n: int, vocabulary: int) -> None:
    """Raise unless `out` is [n, V] in float32, bfloat16 or float16, with rows that do not overlap."""
    if out.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected dtype torch.float32, torch.bfloat16 or torch.float16, got {out.dtype}")
    check_tensor(name, out, out.dtype, n, vocabulary)
    if n > 1 and out.stride(0) < vocabulary:
        raise ValueError(
            f"{name}: expected a row stride of at least {vocabulary}, so that rows do not overlap, got {out.stride(0)}"
        )


def factors(softcap: float | None, logit_scale: float) -> tuple[float, float, float]:
    """Return the kernels' `logit_scale`, `softcap` and `factor`."""
    if softcap is None:
        return float(logit_scale), 0.0, float(logit_scale)
    return float(logit_scale), float(softcap), logit_scale / softcap**2


def compile_cases() -> list[CompileCase]:
    """Return the configurations that training uses, for `nextquill_kernels.crosscompile`."""
    rows = {"label_ptr": "*i64", "stats_ptr": "*fp32", **dict.fromkeys(("stats_stride", "V"), "i32"), "bias_ptr": None}
    rows |= dict.fromkeys(("logit_scale", "softcap", "factor"), "fp32")
    token = {**rows, "x_ptr": "*fp32", "x_stride": "i32", "out_stride": "i32", "grad_ptr": "*fp32"}
    pair = {
        **rows,
        **dict.fromkeys(("x1_ptr", "x0_ptr", "grad1_ptr", "grad0_ptr", "grade_ptr"), "*fp32"),
        **dict.fromkeys(("x1_stride", "x0_stride", "out1_stride", "out0_stride"), "i32"),
    }
    cases = []
    for out in ("fp32", "bf16"):
        one, two = {**token, "out_ptr": f"*{out}"}, {**pair, "out1_ptr": f"*{out}", "out0_ptr": f"*{out}"}
        cases += [
            row_case(f"token_grad/{out}", _token_grad_kernel, TOKEN_GRAD, one),
            row_case(f"pair_grad/{out}", _pair_grad_kernel, PAIR_GRAD, two),
        ]
    detached = {**two, **dict.fromkeys(("out0_ptr", "out0_stride", "grad0_ptr"))}
    cases.append(row_case("pair_grad/detached_bf16", _pair_grad_kernel, PAIR_GRAD, detached))
    return [variant for case in cases for variant in variants(case)]
