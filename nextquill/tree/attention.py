"""Attention over a row of trees that computes only visible entries, on whole dense pieces.

Each segment has two visible pieces: its own triangle, and the rectangle of its descendants' queries on its keys
(`segments.py`). Each piece is an ordinary attention with its own softmax. Pieces of one query are merged by their
logsumexps:

    l = logaddexp(l_a, l_b)        out = exp(l_a - l) out_a + exp(l_b - l) out_b

The gradient of a piece depends on the other pieces only through `out` and `l`, so the backward runs piece by piece with
the merged `out` and `l`. Nothing is gathered, sums run in a fixed order, and the only masked entries that are computed
are the upper halves of the triangles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.tree.dense_blocks import pieces
from nextquill.tree.kernels import choose_kernel
from nextquill.tree.segments import TreeLayout


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of every row over the rows on its path to the root.

        out_i = Σ_j softmax_j(cap(scale · q_i · k_j)) v_j      over j <= i < subtree_end[j], depth_i - depth_j < window

    Args:
        query: [1, H, T, D].
        key, value: [1, H_kv, T, D], in query's dtype. H is a multiple of H_kv: heads are shared as in grouped-query
            attention.
        layout: the row's trees.
        scale: 1/√D by default.
        window: keys a query sees along its path, itself included; None for all.
        softcap: c of c · tanh(x / c) on the scores, or None.

    Returns:
        [1, H, T, D], in query's dtype, differentiable in query, key and value.

    Raises:
        ArgumentError, ArgumentTypeError: shapes or dtypes do not fit each other or the layout.
    """
    if query.dim() != 4 or query.shape[0] != 1 or query.shape[2] != layout.num_rows or not query.shape[3]:
        raise ArgumentError(f"query: expected [1, H, {layout.num_rows}, D], got {list(query.shape)}")
    expected = [1, key.shape[1] if key.dim() == 4 else 0, *query.shape[2:]]
    if (
        list(key.shape) != expected
        or list(value.shape) != expected
        or not key.shape[1]
        or query.shape[1] % key.shape[1]
    ):
        raise ArgumentError(
            f"key, value: expected [1, H_kv, {layout.num_rows}, {query.shape[3]}] with H_kv dividing {query.shape[1]}, "
            f"got {list(key.shape)} and {list(value.shape)}"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ArgumentTypeError(f"query, key, value: expected one dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    if not query.is_floating_point():
        raise ArgumentTypeError(f"query, key, value: expected floating point, got {query.dtype}")
    for name, number in (("scale", scale), ("softcap", softcap)):
        if number is not None and not 0 < number < math.inf:
            raise ArgumentError(f"{name}: expected a positive number or None, got {number}")
    if window is not None and window < 1:
        raise ArgumentError(f"window: expected a positive number or None, got {window}")
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    if window is not None and window >= layout.depth:
        window = None  # it cuts nothing, and without it no mask is needed
    out: Tensor = _forward(query, key, value, layout.segments, scale, window, softcap)[0]
    return out


@torch.library.custom_op("nextquill::tree_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return out [1, H, T, D], heads innermost in memory, and the logsumexps [1, H, T] in float32 (float64)."""
    with torch.autocast(query.device.type, enabled=False):
        kernel = choose_kernel(query, softcap)
        merged = torch.promote_types(query.dtype, torch.float32)
        out = _heads_last(query, merged)
        logsumexp = query.new_empty(query.shape[:3], dtype=merged)
        for piece in pieces(segments, window):
            q, k = piece.queries, piece.keys
            part, lse = kernel.forward((query[:, :, q], key[:, :, k], value[:, :, k]), piece, scale, softcap)
            if not piece.is_own:
                before = logsumexp[:, :, q]
                both = torch.logaddexp(before, lse)
                theirs, ours = (before - both).exp_()[..., None], (lse - both).exp_()[..., None]
                part, lse = (out[:, :, q] * theirs).addcmul_(part, ours), both
            out[:, :, q] = part.to(merged)
            logsumexp[:, :, q] = lse
        return _heads_last(query, query.dtype).copy_(out) if merged != query.dtype else out, logsumexp


@torch.library.custom_op("nextquill::tree_attention_backward", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        kernel = choose_kernel(query, softcap)
        summed = torch.promote_types(query.dtype, torch.float32)
        grads = tuple(_heads_last(tensor, summed).zero_() for tensor in (query, key, value))
        for piece in pieces(segments, window):
            q, k = piece.queries, piece.keys
            inputs = (query[:, :, q], key[:, :, k], value[:, :, k])
            parts = kernel.backward(grad[:, :, q], inputs, out[:, :, q], logsumexp[:, :, q], piece, scale, softcap)
            for total, rows, part in zip(grads, (q, k, k), parts, strict=True):
                total[:, :, rows] += part.to(summed)
        return tuple(
            _heads_last(total, query.dtype).copy_(total) if summed != query.dtype else total for total in grads
        )  # type: ignore[return-value]


def _heads_last(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an empty [1, H, T, D] in the memory order of [1, T, H, D]: models reshape it to [1, T, H * D] for free."""
    batch, heads, rows, size = like.shape
    return like.new_empty((batch, rows, heads, size), dtype=dtype).transpose(1, 2)


@_forward.register_fake
def _forward_fake(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    return _heads_last(query, query.dtype), lse


@_backward.register_fake
def _backward_fake(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: object) -> tuple[Tensor, ...]:
    return tuple(_heads_last(tensor, query.dtype) for tensor in (query, key, value))


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, segments, *options = inputs
    ctx.save_for_backward(query, key, value, *output, segments)
    ctx.options = options
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):  # type: ignore[no-untyped-def]
    query, key, value, out, logsumexp, segments = ctx.saved_tensors
    grads = _backward(grad, query, key, value, out, logsumexp, segments, *ctx.options)
    return (*grads, None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup)
