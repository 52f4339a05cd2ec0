"""One piece of tree attention: softmax attention with its logsumexp, and its gradient under a given softmax.

    forward     queries [1, H, q, D], keys and values [1, H_kv, k, D]  ->  out, logsumexp [1, H, q]
    backward    takes `out` and `logsumexp` merged over *all* pieces of a query, so that p = exp(scores - logsumexp) is
                this piece's part of the whole softmax

`flash` is PyTorch's fused CPU kernel. `math` holds the scores in memory; it works on any device, in any dtype and with
soft caps. Tests compare `flash` with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nextquill.devices import send
from nextquill.tree.dense_blocks import Piece


class ScoreRule(NamedTuple):
    """The score of a query and a key: cap(scale · q · k), with cap(x) = softcap · tanh(x / softcap), or x for None."""

    scale: float
    softcap: float | None


class AttentionKernel(NamedTuple):
    """A forward and its backward. `where` says what each query sees: a `Piece`, or a `VarlenPlan` of all segments.

    forward: (query, key, value, where, rule) -> out, logsumexp
    backward: (grad, query, key, value, out, logsumexp, where, rule) -> gradients of query, key, value
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def choose_kernel(query: Tensor, softcap: float | None) -> AttentionKernel:
    """Return the fastest kernel that is exact for these arguments.

    Args:
        query: [1, H, q, D], any floating dtype; only its device matters.
        softcap: c of c · tanh(x / c) on the scores, or None.
    """
    return FLASH if query.device.type == "cpu" and softcap is None and _HAS_FLASH else MATH


# ---- PyTorch's fused kernel for CPUs -----------------------------------------------------------------

_HAS_FLASH = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, piece: Piece, rule: ScoreRule) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]  # shared heads are repeated: PyTorch 2.8 and older cannot share them
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *map(_dense, (query, _repeated(key, group), _repeated(value, group))), 0.0, piece.is_causal,
        attn_mask=_bias(piece, query), scale=rule.scale,
    )  # fmt: skip
    return out, lse


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: Piece, rule: ScoreRule
) -> tuple[Tensor, Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *map(_dense, (grad, query, _repeated(key, group), _repeated(value, group))), out, lse,
        0.0, piece.is_causal, attn_mask=_bias(piece, query), scale=rule.scale,
    )  # fmt: skip
    return grads[0], _summed(grads[1], group), _summed(grads[2], group)


def _dense(tensor: Tensor) -> Tensor:
    """Make the last stride 1: the fused kernel assumes it without checking."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _bias(piece: Piece, query: Tensor) -> Tensor | None:
    if piece.mask is None:
        return None
    return torch.zeros(piece.mask.shape, dtype=query.dtype).masked_fill_(~piece.mask, -math.inf)


# ---- plain PyTorch -----------------------------------------------------------------------------------


def _math_forward(query: Tensor, key: Tensor, value: Tensor, piece: Piece, rule: ScoreRule) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    scores, _ = _scores(query, _repeated(key, group), piece, rule)
    lse = scores.logsumexp(-1)
    p = (scores - lse[..., None]).exp_()
    return p @ _repeated(value, group).to(p.dtype), lse


def _math_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: Piece, rule: ScoreRule
) -> tuple[Tensor, Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    k, v = _repeated(key, group), _repeated(value, group)
    scores, slope = _scores(query, k, piece, rule)
    p = (scores - lse[..., None]).exp_()
    grad = grad.to(p.dtype)
    dp = grad @ v.to(p.dtype).mT
    dscores = p * (dp - (grad * out).sum(-1, keepdim=True)) * rule.scale
    if slope is not None:
        dscores *= slope
    dq, dk, dv = dscores @ k.to(p.dtype), dscores.mT @ query.to(p.dtype), p.mT @ grad
    return dq, _summed(dk, group), _summed(dv, group)


def _scores(query: Tensor, key: Tensor, piece: Piece, rule: ScoreRule) -> tuple[Tensor, Tensor | None]:
    """Return scores [1, H, q, k] in float32 (float64), -inf where masked, and the derivative of the cap or None."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores, slope = query.to(wide) @ key.to(wide).mT * rule.scale, None
    if rule.softcap is not None:
        capped = torch.tanh(scores / rule.softcap)
        scores, slope = rule.softcap * capped, 1 - capped.square()
    if piece.is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_()
        scores = scores.masked_fill(~mask, -math.inf)
    elif piece.mask is not None:
        scores = scores.masked_fill(~send(piece.mask, scores.device), -math.inf)
    return scores, slope


# ---- grouped heads -----------------------------------------------------------------------------------


def _repeated(tensor: Tensor, group: int) -> Tensor:
    return tensor if group == 1 else tensor.repeat_interleave(group, dim=1)


def _summed(grad: Tensor, group: int) -> Tensor:
    return grad if group == 1 else grad.unflatten(1, (-1, group)).sum(2)


FLASH = AttentionKernel("flash", _flash_forward, _flash_backward)
MATH = AttentionKernel("math", _math_forward, _math_backward)
