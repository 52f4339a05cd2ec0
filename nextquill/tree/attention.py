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

from collections.abc import Sequence

import torch
from torch import Tensor

from nextquill.devices import reads_on_host
from nextquill.tree.dense_blocks import pieces
from nextquill.tree.kernels import ScoreRule, choose_kernel
from nextquill.tree.operators import add_sinks, check_arguments, heads_last, register_gradient
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
    sinks: Tensor | None = None,
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
        sinks: floating [H], the score of one more key of every query, whose value is 0; None for no such key.

    Returns:
        [1, H, T, D], in query's dtype, differentiable in query, key, value and sinks.

    Raises:
        ArgumentError, ArgumentTypeError: shapes or dtypes do not fit each other or the layout.
    """
    scale, window = check_arguments(query, key, value, layout, scale, window, softcap, sinks)
    out: Tensor = _forward(query, key, value, layout.segments, sinks, scale, window, softcap)[0]
    return out


@torch.library.custom_op("nextquill::tree_attention", mutates_args=(), **reads_on_host())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Return out [1, H, T, D], heads innermost in memory, and the logsumexps [1, H, T] in float32 (float64)."""
    with torch.autocast(query.device.type, enabled=False):
        kernel, rule = choose_kernel(query, softcap), ScoreRule(scale, softcap)
        merged = torch.promote_types(query.dtype, torch.float32)
        out = heads_last(query, merged)
        logsumexp = query.new_empty(query.shape[:3], dtype=merged)
        for piece in pieces(segments, window):
            k, v = key[:, :, piece.keys], value[:, :, piece.keys]
            part, lse = kernel.forward(query[:, :, piece.queries], k, v, piece, rule)
            if not piece.is_own:
                before = logsumexp[:, :, piece.queries]
                both = torch.logaddexp(before, lse)
                theirs, ours = (before - both).exp_()[..., None], (lse - both).exp_()[..., None]
                part, lse = (out[:, :, piece.queries] * theirs).addcmul_(part, ours), both
            out[:, :, piece.queries] = part.to(merged)
            logsumexp[:, :, piece.queries] = lse
        out = add_sinks(out, logsumexp, sinks)
        return heads_last(query, query.dtype).copy_(out) if merged != query.dtype else out, logsumexp


@torch.library.custom_op("nextquill::tree_attention_backward", mutates_args=(), **reads_on_host())
def _backward(
    grad: Tensor, saved: Sequence[Tensor], scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, out, logsumexp, segments = saved
    with torch.autocast(query.device.type, enabled=False):
        kernel, rule = choose_kernel(query, softcap), ScoreRule(scale, softcap)
        summed = torch.promote_types(query.dtype, torch.float32)
        grads = tuple(heads_last(tensor, summed).zero_() for tensor in (query, key, value))
        for piece in pieces(segments, window):
            q, k = piece.queries, piece.keys
            parts = kernel.backward(
                grad[:, :, q], query[:, :, q], key[:, :, k], value[:, :, k], out[:, :, q], logsumexp[:, :, q],
                piece, rule,
            )  # fmt: skip
            for total, rows, part in zip(grads, (q, k, k), parts, strict=True):
                total[:, :, rows] += part.to(summed)
        return tuple(heads_last(total, query.dtype).copy_(total) if summed != query.dtype else total for total in grads)  # type: ignore[return-value]


register_gradient(_forward, _backward)
