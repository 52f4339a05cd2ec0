"""Token weights and denominators of a loss, from the NLLs of a chunk: one small kernel instead of some twenty.

With w the weight of a row, n the rows of its sequence, and Z = Σ w over them (n if weights are not normalised; n and Z
are both 1 if the loss is a mean over tokens):

    weights = w        weighted = w / (Z · items)        uniform = 1 / (n · items)

    scheme        w, with d = nll_counterfactual - nll_factual
    uniform       1
    threshold     high if exp(-nll_factual) - exp(-nll_counterfactual) > threshold else low
    clip          min(max(d, low), high)
    exp_clip      min(exp(d), high)

A Z of exactly 0 is replaced by 1. An nll of NaN makes the weight NaN. Nothing is read back to the host.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from nextquill_kernels.crosscompile import CompileCase
from nextquill_kernels.launch import check_tensor, check_together, jit, on_device

SCHEMES = ("uniform", "threshold", "clip", "exp_clip")

# Rows per step: most sequences have some hundred rows, and longer ones take a few steps.
BLOCK_N = 1024
_NUM_WARPS = 4


@jit()
def _token_weights(nll1_ptr, nll0_ptr, rows, live, low, high, threshold, SCHEME: tl.constexpr):
    """Return w of some rows; 0 where not live."""
    if SCHEME == "uniform":
        b_weights = tl.full(rows.shape, 1.0, tl.float32)
    else:
        b_nll1 = tl.load(nll1_ptr + rows, mask=live, other=0.0)
        b_nll0 = tl.load(nll0_ptr + rows, mask=live, other=0.0)
        if SCHEME == "threshold":
            b_effect = tl.exp(-b_nll1) - tl.exp(-b_nll0)
            b_weights = tl.where(b_effect > threshold, high, low)
        else:
            b_effect = b_nll0 - b_nll1
            if SCHEME == "clip":
                b_weights = tl.minimum(tl.maximum(b_effect, low), high)
            else:
                b_weights = tl.minimum(tl.exp(b_effect), high)
        # Minimum, maximum and comparison drop a NaN, and the loss of a broken forward pass would look normal.
        b_weights = tl.where(b_effect != b_effect, b_effect, b_weights)
    return tl.where(live, b_weights, 0.0)


@jit(
    do_not_specialize=["out_stride"],
    do_not_specialize_on_alignment=["nll1_ptr", "nll0_ptr", "offset_ptr", "items_ptr", "out_ptr"],
)
def _row_coefficients_kernel(
    nll1_ptr, nll0_ptr, offset_ptr, items_ptr, out_ptr, out_stride, low, high, threshold, items,
    SCHEME: tl.constexpr, NORMALIZE: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    base = tl.load(offset_ptr)
    start = tl.load(offset_ptr + sequence) - base
    stop = tl.load(offset_ptr + sequence + 1) - base
    lanes = tl.arange(0, BLOCK_N)
    if items_ptr is not None:
        items = tl.load(items_ptr).to(tl.float32)

    if PER_TOKEN:
        uniform = 1.0 / items
        denominator = items
    else:
        count = (stop - start).to(tl.float32)
        uniform = 1.0 / (count * items)
        denominator = count * items
    if NORMALIZE and not PER_TOKEN:
        # Each lane adds its rows in order, then a fixed tree adds the lanes: the sum is bitwise repeatable.
        b_sum = tl.zeros([BLOCK_N], tl.float32)
        for first in range(start, stop, BLOCK_N):
            rows = first + lanes
            b_sum += _token_weights(nll1_ptr, nll0_ptr, rows, rows < stop, low, high, threshold, SCHEME)
        total = tl.sum(b_sum, axis=0)
        denominator = tl.where(total == 0, 1.0, total) * items

    stride = tl.cast(out_stride, tl.int64)
    for first in range(start, stop, BLOCK_N):
        rows = first + lanes
        live = rows < stop
        b_weights = _token_weights(nll1_ptr, nll0_ptr, rows, live, low, high, threshold, SCHEME)
        tl.store(out_ptr + rows, b_weights, mask=live)
        tl.store(out_ptr + stride + rows, b_weights / denominator, mask=live)
        tl.store(out_ptr + 2 * stride + rows, tl.full([BLOCK_N], 1.0, tl.float32) * uniform, mask=live)


def row_coefficients(
    nll_factual: Tensor,
    nll_counterfactual: Tensor | None,
    offsets: Tensor,
    *,
    scheme: str,
    low: float,
    high: float,
    threshold: float,
    normalize: bool,
    per_token: bool,
    num_items: float | Tensor,
    out: Tensor,
) -> None:
    """Compute w, w / (Z · items) and 1 / (n · items) of every row.

    Args:
        nll_factual: [n] float32, nats, sequence after sequence.
        nll_counterfactual: [n] float32, nats; None for the uniform scheme only.
        offsets: [S + 1] int64; sequence s has the rows offsets[s] - offsets[0] up to offsets[s + 1] - offsets[0]. They
            ascend and cover the n rows: values are on the device and cannot be checked here.
        scheme: "uniform", "threshold", "clip" or "exp_clip".
        low: weight below the threshold, or the lower bound of "clip".
        high: weight above the threshold, or the upper bound of "clip" and "exp_clip".
        threshold: bound of effect_prob = exp(-nll_factual) - exp(-nll_counterfactual).
        normalize: Z is the sum of w in the sequence, rather than its number of rows.
        per_token: n and Z are 1.
        num_items: number of items that the loss averages over, or a scalar tensor on the same device.
        out: [3, n] float32, last stride 1: receives the three numbers of each row, which have no unit.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, layout or device.
        RuntimeError: not a device Triton runs on.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
    if nll_factual.ndim != 1 or offsets.ndim != 1 or offsets.numel() == 0:
        raise ValueError(
            f"nll_factual, offsets: expected shapes [n] and [S + 1], "
            f"got {list(nll_factual.shape)} and {list(offsets.shape)}"
        )
    if nll_counterfactual is None and scheme != "uniform":
        raise ValueError(f"nll_counterfactual: expected a tensor for scheme {scheme!r}, got None")
    items = num_items if isinstance(num_items, Tensor) else None
    if items is not None and items.numel() != 1:
        raise ValueError(f"num_items: expected one number, got shape {list(items.shape)}")
    n = nll_factual.numel()
    check_together(
        nll_factual=nll_factual, nll_counterfactual=nll_counterfactual, offsets=offsets, num_items=items, out=out
    )
    check_tensor("nll_factual", nll_factual, torch.float32, n)
    if nll_counterfactual is not None:
        check_tensor("nll_counterfactual", nll_counterfactual, torch.float32, n)
    check_tensor("offsets", offsets, torch.int64, offsets.numel())
    check_tensor("out", out, torch.float32, 3, n)
    if n == 0 or offsets.numel() == 1:
        return
    with on_device(nll_factual):
        _row_coefficients_kernel[(offsets.numel() - 1,)](
            nll_factual, None if scheme == "uniform" else nll_counterfactual, offsets, items, out, out.stride(0),
            float(low), float(high), float(threshold), 0.0 if items is not None else float(num_items),
            SCHEME=scheme, NORMALIZE=normalize, PER_TOKEN=per_token, BLOCK_N=BLOCK_N,
            num_warps=_NUM_WARPS, num_stages=1,
        )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """Return one configuration of every scheme, for `nextquill_kernels.crosscompile`."""
    signature = {"nll1_ptr": "*fp32", "offset_ptr": "*i64", "out_ptr": "*fp32", "out_stride": "i32"}
    signature |= dict.fromkeys(("low", "high", "threshold", "items"), "fp32")
    cases = []
    for scheme in SCHEMES:
        # "clip" is compiled with num_items on the device and without normalisation, as a mean over tokens.
        per_token = scheme == "clip"
        optional = {"nll0_ptr": None if scheme == "uniform" else "*fp32", "items_ptr": "*fp32" if per_token else None}
        flags = {"SCHEME": scheme, "NORMALIZE": not per_token, "PER_TOKEN": per_token, "BLOCK_N": BLOCK_N}
        name = f"row_coefficients/{scheme}"
        cases.append(CompileCase(name, _row_coefficients_kernel, {**signature, **optional}, flags, _NUM_WARPS, 1))
    return cases
