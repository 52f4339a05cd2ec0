"""Attention over a row of trees by kernels for sequences of different lengths: one sequence per segment.

The queries of a segment are its rows; its keys are the rows on the path from the root to its end. Causal attention that
aligns the last query with the last key (bottom-right aligned) therefore gives each row exactly the keys it sees. A
row's depth is its index on the path, so the kernel's own sliding window is a window by depth.

One call serves all segments, but every key row is gathered once per segment below it (`num_gathered_rows`). The copies
are not kept for the backward, which gathers again. The key gradient of a row is the sum of its copies' gradients, read
in a fixed order and summed in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.tree.segments import TreeLayout
from nextquill.tree.varlen_kernels import VARLEN_KERNELS, choose_kernel
from nextquill.tree.varlen_plan import gather, sum_copies, varlen_plan


def varlen_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Attention of every row over the rows on its path to the root, as `tree_attention` computes it.

        out_i = Σ_j softmax_j(cap(scale · q_i · k_j)) v_j      over j <= i < subtree_end[j], depth_i - depth_j < window

    The kernels' gradient of `query` repeats bit for bit under `torch.use_deterministic_algorithms(True)` only; those of
    `key` and `value` always do.

    Args:
        query: [1, H, T, D], float16 or bfloat16; any floating dtype for "emulated".
        key, value: [1, H_kv, T, D], in query's dtype; H is a multiple of H_kv.
        layout: the row's trees.
        scale: 1/√D by default.
        window: keys a query sees along its path, itself included; None for all.
        softcap: c of c · tanh(x / c) on the scores, or None; "torch" has none.
        kernel: "torch", "flash_attn", "emulated", or "auto" for "torch" if it can run, else "flash_attn".

    Returns:
        [1, H, T, D], in query's dtype, differentiable in query, key and value.

    Raises:
        ArgumentError, ArgumentTypeError: shapes or dtypes do not fit each other, the layout or the kernel.
        BackendUnavailableError: the kernel cannot run here (`why_not`), or its results are wrong, for example because
            it aligns the first query with the first key.
    """
    _check(query, key, value, layout, scale, window, softcap)
    if kernel not in VARLEN_KERNELS:
        raise ArgumentError(f"kernel: expected one of {', '.join(VARLEN_KERNELS)}, got {kernel!r}")
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    if window is not None and window >= layout.depth:
        window = None
    out: Tensor = _forward(query, key, value, layout.segments, scale, window, softcap, kernel)[0]
    return out


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> None:
    if query.dim() != 4 or query.shape[0] != 1 or query.shape[2] != layout.num_rows or not query.shape[3]:
        raise ArgumentError(f"query: expected [1, H, {layout.num_rows}, D], got {list(query.shape)}")
    heads, size = query.shape[1], query.shape[3]
    fits = key.dim() == 4 and key.shape == value.shape and key.shape[1] > 0 and heads % key.shape[1] == 0
    if not fits or key.shape[0] != 1 or key.shape[2] != layout.num_rows or key.shape[3] != size:
        raise ArgumentError(
            f"key, value: expected [1, H_kv, {layout.num_rows}, {size}] with H_kv dividing {heads}, "
            f"got {list(key.shape)} and {list(value.shape)}"
        )
    if not query.dtype == key.dtype == value.dtype or not query.dtype.is_floating_point:
        raise ArgumentTypeError(
            f"query, key, value: expected one floating dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    for name, number in (("scale", scale), ("window", window), ("softcap", softcap)):
        if number is not None and number <= 0:
            raise ArgumentError(f"{name}: expected a positive number or None, got {number}")


# ---- the operator ------------------------------------------------------------------------------------


@torch.library.custom_op("nextquill::varlen_tree_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Return out [1, H, T, D], heads innermost in memory, and the logsumexps [H, T] in float32 (float64)."""
    chosen = choose_kernel(kernel, query, softcap)
    plan = varlen_plan(segments, window, query.device)
    with torch.autocast(query.device.type, enabled=False):
        out, lse = chosen.forward(
            _rows_first(query), gather(key, plan), gather(value, plan), plan, scale, window, softcap
        )
    return _as_given(out, query.dtype), lse


@torch.library.custom_op("nextquill::varlen_tree_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    segments: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = choose_kernel(kernel, query, softcap)
    plan = varlen_plan(segments, window, query.device)
    with torch.autocast(query.device.type, enabled=False):
        dq, dk, dv = chosen.backward(
            _rows_first(grad), _rows_first(query), gather(key, plan), gather(value, plan), _rows_first(out),
            logsumexp, plan, scale, window, softcap,
        )  # fmt: skip
    dk, dv = sum_copies(dk, plan), sum_copies(dv, plan)
    return _as_given(dq, query.dtype), _as_given(dk, key.dtype), _as_given(dv, value.dtype)


def _rows_first(tensor: Tensor) -> Tensor:
    """Return [1, H, T, D] as a contiguous [T, H, D]; no copy for the tensors of most models."""
    return tensor[0].transpose(0, 1).contiguous()


def _as_given(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [T, H, D] as [1, H, T, D], heads innermost in memory."""
    return tensor.to(dtype).contiguous()[None].transpose(1, 2)


def _like(tensor: Tensor) -> Tensor:
    batch, heads, rows, size = tensor.shape
    return tensor.new_empty((batch, rows, heads, size)).transpose(1, 2)


@_forward.register_fake
def _forward_fake(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return _like(query), query.new_empty(query.shape[1:3], dtype=dtype)


@_backward.register_fake
def _backward_fake(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: object) -> tuple[Tensor, ...]:
    return _like(query), _like(key), _like(value)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, segments, *options = inputs
    ctx.save_for_backward(query, key, value, *output, segments)
    ctx.options = options
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):  # type: ignore[no-untyped-def]
    query, key, value, out, logsumexp, segments = ctx.saved_tensors
    grads = _backward(grad, query, key, value, out, logsumexp, segments, *ctx.options)
    return (*grads, None, None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup)
