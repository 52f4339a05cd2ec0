"""The parts that the operators of tree attention share: checks of arguments, results in memory, and autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.tree.segments import TreeLayout


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> tuple[float, int | None]:
    """Check arguments as in `tree_attention`; return the scale, and the window, or None if it cuts nothing."""
    rows = layout.num_rows
    if query.dim() != 4 or query.shape[0] != 1 or query.shape[2] != rows or not query.shape[3]:
        raise ArgumentError(f"query: expected [1, H, {rows}, D], got {list(query.shape)}")
    heads, size = query.shape[1], query.shape[3]
    shared = key.shape[1] if key.dim() == 4 else 0
    if not shared or heads % shared or not list(key.shape) == list(value.shape) == [1, shared, rows, size]:
        raise ArgumentError(
            f"key, value: expected [1, H_kv, {rows}, {size}] with H_kv dividing {heads}, "
            f"got {list(key.shape)} and {list(value.shape)}"
        )
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ArgumentTypeError(
            f"query, key, value: expected one floating dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if sinks is not None and (list(sinks.shape) != [heads] or not sinks.is_floating_point()):
        raise ArgumentError(f"sinks: expected a floating [{heads}] or None, got {sinks.dtype} {list(sinks.shape)}")
    for name, number in (("scale", scale), ("window", window), ("softcap", softcap)):
        if number is not None and not 0 < number < math.inf:
            raise ArgumentError(f"{name}: expected a positive number or None, got {number}")
    scale = 1 / math.sqrt(size) if scale is None else scale
    return scale, None if window is None or window >= layout.depth else window


def heads_last(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an empty [1, H, T, D] in the memory order of [1, T, H, D]: models reshape it to [1, T, H * D] for free.

    `like` is [1, H, T, D] of any dtype.
    """
    batch, heads, rows, size = like.shape
    return like.new_empty((batch, rows, heads, size), dtype=dtype).transpose(1, 2)


def add_sinks(out: Tensor, logsumexp: Tensor, sinks: Tensor | None) -> Tensor:
    """Count each head's sink, a key with a score of its own and a value of 0, in the softmax; in place.

        logsumexp' = logaddexp(logsumexp, sink)        out' = exp(logsumexp - logsumexp') out

    The gradient of query, key and value then needs no more than `out'` and `logsumexp'`, as for pieces.

    Args:
        out: [1, H, T, D].
        logsumexp: [1, H, T], float32 (float64).
        sinks: floating [H], or None for no sinks.

    Returns:
        `out`, [1, H, T, D].
    """
    if sinks is None:
        return out
    before = logsumexp.clone()
    torch.logaddexp(before, sinks.to(before)[:, None], out=logsumexp)
    return out.copy_(out * (before - logsumexp).exp_()[..., None])


def _sinks_gradient(grad: Tensor, out: Tensor, logsumexp: Tensor, sinks: Tensor) -> Tensor:
    """-Σ p(sink) · (grad · out) over the queries, [H] in the dtype of `sinks`; shapes as in `add_sinks`."""
    p = (sinks.to(logsumexp)[:, None] - logsumexp).exp()
    return -(p * (grad.to(p.dtype) * out).sum(-1)).sum((0, 2)).to(sinks.dtype)


def register_gradient(forward: Any, backward: Any) -> None:
    """Make the operator `backward` the gradient of the operator `forward`, and describe the results of both.

    forward: (query, key, value, segments, sinks or None, *options) -> out, logsumexp [1, H, T] in float32 (float64)
    backward: (grad, saved, *options) -> gradients of query, key, value
              with saved = [query, key, value, out, logsumexp, segments]
    """

    def forward_fake(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        logsumexp = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        return heads_last(query, query.dtype), logsumexp

    def backward_fake(_: Tensor, saved: Sequence[Tensor], *__: object) -> tuple[Tensor, ...]:
        return tuple(heads_last(tensor, tensor.dtype) for tensor in saved[:3])

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        query, key, value, segments, sinks, *ctx.options = inputs
        ctx.save_for_backward(query, key, value, *output, segments, sinks)
        ctx.mark_non_differentiable(output[1])

    def gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *saved, sinks = ctx.saved_tensors
        own = _sinks_gradient(grad, saved[3], saved[4], sinks) if ctx.needs_input_grad[4] else None
        return (*backward(grad, saved, *ctx.options), None, own, *(None for _ in ctx.options))

    forward.register_fake(forward_fake)
    backward.register_fake(backward_fake)
    forward.register_autograd(gradient, setup_context=setup)
