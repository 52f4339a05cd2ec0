"""The gradient of a chunk of logits, in their place: in float32, or in a half dtype in the first half of each row.

See `nextquill_kernels.chunk` for the mathematics.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from nextquill_kernels.crosscompile import CompileCase, row_case, with_odd_vocabulary
from nextquill_kernels.launch import RowTile, check_logits, check_rows, check_tensor, check_together, jit, on_device

# To read 4.8 TB/s at a latency of 0.7 us, 3.4 MB must be in flight: 25 KiB on each of 132 multiprocessors. Each of
# these programs has 16 KiB in flight, because it loads the next tile while it works on one. At 64 registers four
# programs share a multiprocessor.
TOKEN_GRAD = RowTile(block_v=4096, num_warps=8)
PAIR_GRAD = RowTile(block_v=2048, num_warps=8)

_NARROW_DTYPES = (torch.bfloat16, torch.float16)


@jit()
def _load_softmax(stats_ptr, row, stride, index, grad):
    """Load max and weight of stream `index`, so that g p = weight · exp(z - max), and the label's entry g (p - 1)."""
    stats_ptr += row + 3 * index * tl.cast(stride, tl.int64)
    s = tl.load(stats_ptr + tl.cast(stride, tl.int64))
    nll = tl.load(stats_ptr + 2 * tl.cast(stride, tl.int64))
    return tl.load(stats_ptr), grad / s, grad * (tl.exp(-nll) - 1.0)


@jit()
def _through_cap(b_dz, b_z, softcap, factor, HAS_CAP: tl.constexpr):
    """Return dz · scale · cap'(z). With a cap, `factor` is scale / c²: cap' = (c - z)(c + z) / c², exact near z = c."""
    if HAS_CAP:
        b_dz = b_dz * ((softcap - b_z) * (softcap + b_z))
    return b_dz * factor


# Writing a half dtype in place. Row r of the float32 logits and row r of the result begin at the same address, so with
# tiles of B columns the store of tile t covers the bytes [2tB, 2(t+1)B), which hold the logits [tB/2, (t+1)B/2): for
# t = 0 the first half of its own tile, for t >= 1 only tiles before t, as (t+1)/2 <= t. Hence:
#   - No store touches a tile after its own, so the kernel and the compiler may load the next tile early.
#   - A store may hit tile t or an earlier one, which another warp might not have read yet. One barrier between the
#     load of a tile and its store is enough: after it, every warp has loaded all tiles up to t. A warp that runs ahead
#     to tile t+1 waits at the next barrier before it stores; the bytes that it loads before are not stored to yet.
#   - Rows do not share memory, and a row belongs to one program.
#   - The last, partial tile comes last, with its own load, barrier and store. It is loaded after the stores of the
#     whole tiles, and none of them touches it. (The statistics start with it; here its store would overwrite logits
#     that are still to be read.)
# The compiler keeps the order: a barrier clobbers memory, and the two pointers are not declared to be distinct.
# In float32 the thread that loaded a value overwrites it, and no barrier is needed.
#
# Only the partial tile has a mask of single columns, which makes accesses 4 bytes wide if V is odd. The prefetch in the
# loop has one mask value for all columns of a tile, which keeps accesses at 16 bytes, and loads nothing beyond the last
# whole tile. So the kernel waits for the load of the partial tile: 1 us of the 60 that a row of 150,000 columns takes.
# The mask must not repeat the loop's own condition: ptxas would then peel off the last iteration, with 104 registers
# instead of 64.


@jit()
def _write_token_grad(
    b_z, out_row, cols, mask, label, m, weight, at_label, softcap, factor,
    HAS_CAP: tl.constexpr, IS_NARROW: tl.constexpr,
):  # fmt: skip
    b_dz = tl.where(cols == label, at_label, weight * tl.exp(b_z - m))
    b_dz = _through_cap(b_dz, b_z, softcap, factor, HAS_CAP)
    if IS_NARROW:
        tl.debug_barrier()
    tl.store(out_row + cols, tl.where(label < 0, 0.0, b_dz).to(out_row.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["stats_stride"], do_not_specialize_on_alignment=["label_ptr", "stats_ptr", "grad_ptr"])
def _token_grad_kernel(
    z_ptr, out_ptr, label_ptr, stats_ptr, grad_ptr, z_stride, out_stride, stats_stride, V, softcap, factor,
    BLOCK_V: tl.constexpr, HAS_CAP: tl.constexpr, IS_NARROW: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    m, weight, at_label = _load_softmax(stats_ptr, row, stats_stride, 0, tl.load(grad_ptr + row))
    z_row = z_ptr + row * z_stride
    out_row = out_ptr + row * out_stride
    lanes = tl.arange(0, BLOCK_V)

    whole = V // BLOCK_V * BLOCK_V
    b_next = tl.load(z_row + lanes, mask=BLOCK_V <= V, other=0.0)
    for start in range(0, V - BLOCK_V + 1, BLOCK_V):
        b_z = b_next
        cols = start + lanes
        b_next = tl.load(z_row + cols + BLOCK_V, mask=start + 2 * BLOCK_V <= V, other=0.0)
        _write_token_grad(b_z, out_row, cols, None, label, m, weight, at_label, softcap, factor, HAS_CAP, IS_NARROW)
    if whole < V:
        cols = whole + lanes
        inside = cols < V
        b_z = tl.load(z_row + cols, mask=inside, other=0.0)
        _write_token_grad(b_z, out_row, cols, inside, label, m, weight, at_label, softcap, factor, HAS_CAP, IS_NARROW)


def token_grad_(
    logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    grad_nll: Tensor,
    softcap: float | None,
    logit_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Overwrite z with the gradient of g·nll before cap and scale: scale·cap'(z)·g·(softmax(z) - onehot(y)).

    Args:
        logits: z [n, V] float32 after scale and cap, last stride 1, any row stride. Overwritten.
        labels: [n] int64; negative is ignored and gets 0.
        stats: [3, n] float32, written by `token_stats` for the same logits; last stride 1.
        grad_nll: g [n] float32, per nat.
        softcap: the cap c, with cap'(z) = 1 - (z/c)²; None for no cap.
        logit_scale: the scale.
        dtype: dtype of the result: float32, bfloat16 or float16.

    Returns:
        [n, V] in `dtype`, in the memory of `logits`; a half dtype fills the first half of each row.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, layout or device.
        RuntimeError: not a device Triton runs on.
    """
    n, vocabulary = check_logits("logits", logits)
    check_together(logits=logits, labels=labels, stats=stats, grad_nll=grad_nll)
    check_rows(n, torch.int64, labels=labels)
    check_tensor("stats", stats, torch.float32, 3, n)
    check_rows(n, torch.float32, grad_nll=grad_nll)
    out = _in_place("logits", logits, dtype)
    if n == 0:
        return out
    tile = TOKEN_GRAD
    with on_device(logits):
        _token_grad_kernel[(n,)](
            logits, out, labels.contiguous(), stats, grad_nll.contiguous(),
            logits.stride(0), out.stride(0), stats.stride(0), vocabulary, *_cap_arguments(softcap, logit_scale),
            BLOCK_V=tile.block_v, HAS_CAP=softcap is not None, IS_NARROW=dtype != torch.float32,
            num_warps=tile.num_warps, num_stages=1,
        )  # fmt: skip
    return out


@jit()
def _write_pair_grad(
    b_z1, b_z0, out1_row, out0_row, cols, mask, label, softmax1, softmax0, softmaxe, at_label1, at_label0,
    softcap, factor, HAS_CAP: tl.constexpr, IS_NARROW: tl.constexpr,
):  # fmt: skip
    m1, weight1 = softmax1
    me, weighte = softmaxe
    b_effect = weighte * tl.exp(b_z1 - b_z0 - me)
    b_dz1 = tl.where(cols == label, at_label1, weight1 * tl.exp(b_z1 - m1) + b_effect)
    b_dz1 = _through_cap(b_dz1, b_z1, softcap, factor, HAS_CAP)
    if IS_NARROW:
        tl.debug_barrier()
    tl.store(out1_row + cols, tl.where(label < 0, 0.0, b_dz1).to(out1_row.dtype.element_ty), mask=mask)
    if out0_row is not None:
        b_dz0 = -b_effect
        if softmax0 is not None:
            m0, weight0 = softmax0
            b_dz0 += weight0 * tl.exp(b_z0 - m0)
        b_dz0 = tl.where(cols == label, at_label0, b_dz0)
        b_dz0 = _through_cap(b_dz0, b_z0, softcap, factor, HAS_CAP)
        tl.store(out0_row + cols, tl.where(label < 0, 0.0, b_dz0).to(out0_row.dtype.element_ty), mask=mask)


@jit(
    do_not_specialize=["stats_stride"],
    do_not_specialize_on_alignment=["label_ptr", "stats_ptr", "grad1_ptr", "grad0_ptr", "grade_ptr"],
)
def _pair_grad_kernel(
    z1_ptr, z0_ptr, out1_ptr, out0_ptr, label_ptr, stats_ptr, grad1_ptr, grad0_ptr, grade_ptr,
    z1_stride, z0_stride, out1_stride, out0_stride, stats_stride, V, softcap, factor,
    BLOCK_V: tl.constexpr, HAS_CAP: tl.constexpr, IS_NARROW: tl.constexpr,
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
    z1_row = z1_ptr + row * z1_stride
    z0_row = z0_ptr + row * z0_stride
    out1_row = out1_ptr + row * out1_stride
    if out0_ptr is not None:
        out0_row = out0_ptr + row * out0_stride
    lanes = tl.arange(0, BLOCK_V)

    whole = V // BLOCK_V * BLOCK_V
    b_next1 = tl.load(z1_row + lanes, mask=BLOCK_V <= V, other=0.0)
    b_next0 = tl.load(z0_row + lanes, mask=BLOCK_V <= V, other=0.0)
    for start in range(0, V - BLOCK_V + 1, BLOCK_V):
        b_z1 = b_next1
        b_z0 = b_next0
        cols = start + lanes
        b_next1 = tl.load(z1_row + cols + BLOCK_V, mask=start + 2 * BLOCK_V <= V, other=0.0)
        b_next0 = tl.load(z0_row + cols + BLOCK_V, mask=start + 2 * BLOCK_V <= V, other=0.0)
        _write_pair_grad(b_z1, b_z0, out1_row, out0_row, cols, None, label, (m1, weight1), softmax0, (me, weighte),
                         at_label1, at_label0, softcap, factor, HAS_CAP, IS_NARROW)  # fmt: skip
    if whole < V:
        cols = whole + lanes
        inside = cols < V
        b_z1 = tl.load(z1_row + cols, mask=inside, other=0.0)
        b_z0 = tl.load(z0_row + cols, mask=inside, other=0.0)
        _write_pair_grad(b_z1, b_z0, out1_row, out0_row, cols, inside, label, (m1, weight1), softmax0, (me, weighte),
                         at_label1, at_label0, softcap, factor, HAS_CAP, IS_NARROW)  # fmt: skip


def pair_grad_(
    logits: tuple[Tensor, Tensor],
    labels: Tensor,
    stats: Tensor,
    grad_nlls: tuple[Tensor, Tensor | None, Tensor],
    softcap: float | None,
    logit_scale: float,
    dtype: torch.dtype,
    detach_counterfactual: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Overwrite z1, z0 with scale·cap'·dz1 and scale·cap'·dz0, as `nextquill_kernels.chunk` defines them.

    Args:
        logits: z1 and z0, each [n, V] float32 after scale and cap, last stride 1, any row stride; in different memory.
        labels: [n] int64; negative is ignored and gets 0.
        stats: [9, n] float32, written by `pair_stats` for the same logits; last stride 1.
        grad_nlls: g_f, g_c and g_e, each [n] float32, per nat; None for g_c means 0 and saves its exponentials.
        softcap, logit_scale, dtype: as in `token_grad_`.
        detach_counterfactual: leave z0 as it is, and return None for dz0.

    Returns:
        dz1 and dz0 [n, V] in `dtype`, in the memory of the logits; a half dtype fills the first half of each row.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, layout or device.
        RuntimeError: not a device Triton runs on.
    """
    (z1, z0), (grad1, grad0, grade) = logits, grad_nlls
    n, vocabulary = check_logits("logits_factual", z1)
    grads = {"grad_factual": grad1, "grad_counterfactual": grad0, "grad_effect": grade}
    check_together(logits_factual=z1, logits_counterfactual=z0, labels=labels, stats=stats, **grads)
    check_tensor("logits_counterfactual", z0, torch.float32, n, vocabulary)
    check_rows(n, torch.int64, labels=labels)
    check_tensor("stats", stats, torch.float32, 9, n)
    check_rows(n, torch.float32, **grads)
    out1 = _in_place("logits_factual", z1, dtype)
    out0 = None if detach_counterfactual else _in_place("logits_counterfactual", z0, dtype)
    if n == 0:
        return out1, out0
    tile = PAIR_GRAD
    with on_device(z1):
        _pair_grad_kernel[(n,)](
            z1, z0, out1, out0, labels.contiguous(), stats,
            grad1.contiguous(), None if grad0 is None or out0 is None else grad0.contiguous(), grade.contiguous(),
            z1.stride(0), z0.stride(0), out1.stride(0), 0 if out0 is None else out0.stride(0), stats.stride(0),
            vocabulary, *_cap_arguments(softcap, logit_scale),
            BLOCK_V=tile.block_v, HAS_CAP=softcap is not None, IS_NARROW=dtype != torch.float32,
            num_warps=tile.num_warps, num_stages=1,
        )  # fmt: skip
    return out1, out0


def _in_place(name: str, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [n, V] in `dtype` over the memory of `logits`: themselves, or the first half of each row."""
    if logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(
            f"{name}: expected a row stride of at least {logits.shape[1]}, so that rows do not overlap, "
            f"got {logits.stride(0)}"
        )
    if dtype == torch.float32:
        return logits
    if dtype not in _NARROW_DTYPES:
        raise TypeError(f"dtype: expected torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    return logits.view(dtype)[:, : logits.shape[1]]


def _cap_arguments(softcap: float | None, logit_scale: float) -> tuple[float, float]:
    """Return the kernels' `softcap` and `factor`."""
    return (0.0, float(logit_scale)) if softcap is None else (float(softcap), logit_scale / softcap**2)


def compile_cases() -> list[CompileCase]:
    """Return the configurations that training uses, for `nextquill_kernels.crosscompile`."""
    rows = {"label_ptr": "*i64", "stats_ptr": "*fp32", **dict.fromkeys(("stats_stride", "V"), "i32")}
    rows |= {"softcap": "fp32", "factor": "fp32"}
    token = {**rows, "z_ptr": "*fp32", "z_stride": "i32", "out_stride": "i32", "grad_ptr": "*fp32"}
    pair = {
        **rows,
        **dict.fromkeys(("z1_ptr", "z0_ptr", "grad1_ptr", "grad0_ptr", "grade_ptr"), "*fp32"),
        **dict.fromkeys(("z1_stride", "z0_stride", "out1_stride", "out0_stride"), "i32"),
    }
    aligned = ("z", "out")
    cases = []
    for out in ("fp32", "bf16"):
        flags = {"HAS_CAP": True, "IS_NARROW": out != "fp32"}
        one, two = {**token, "out_ptr": f"*{out}"}, {**pair, "out1_ptr": f"*{out}", "out0_ptr": f"*{out}"}
        cases += [
            row_case(f"token_grad/{out}", _token_grad_kernel, TOKEN_GRAD, one, aligned, **flags),
            row_case(f"pair_grad/{out}", _pair_grad_kernel, PAIR_GRAD, two, aligned, **flags),
        ]
    detached = {**two, **dict.fromkeys(("out0_ptr", "out0_stride", "grad0_ptr"))}
    flags = {"HAS_CAP": False, "IS_NARROW": True}
    cases.append(row_case("pair_grad/detached_bf16", _pair_grad_kernel, PAIR_GRAD, detached, aligned, **flags))
    return with_odd_vocabulary(cases)
