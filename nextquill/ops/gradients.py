"""Accumulators for the gradients of the head's inputs, filled chunk by chunk."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextquill.errors import GradientError
from nextquill.ops.head import LinearHead


class Needs(NamedTuple):
    """Which inputs want a gradient."""

    factual: bool
    counterfactual: bool
    weight: bool
    bias: bool


class HeadGradients:
    """dh1, dh0 [N, D], dW [V, D] and db [V]; `None` where not needed.

    dW and db accumulate in the compute dtype (float32 for half-precision weights: accumulating them in bfloat16 is
    known to harm training). Rows that are never added stay exactly 0.
    """

    def __init__(self, head: LinearHead, factual: Tensor, counterfactual: Tensor | None, needs: Needs) -> None:
        self.head = head
        self.factual = _rows_like(factual) if needs.factual else None
        self.counterfactual = None
        if needs.counterfactual and counterfactual is not None:
            self.counterfactual = _rows_like(counterfactual)
        self.weight = torch.zeros_like(head.weight, dtype=head.dtype) if needs.weight else None
        bias_needed = needs.bias and head.bias is not None
        self.bias = head.weight.new_zeros(head.vocabulary, dtype=head.dtype) if bias_needed else None

    def add(self, into: Tensor | None, rows: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
        """Add what dz [n, V] of `rows`, computed from `hidden` [n, D], contributes; `into` is one of the dh's."""
        if into is not None:
            into.index_copy_(0, rows, self.head.hidden_grad(grad_logits).to(into.dtype))
        if self.weight is not None:
            self.head.add_weight_grad(self.weight, grad_logits, hidden)
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(0))


def scaled(gradient: Tensor | None, scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """gradient · scale in `dtype`, in one pass and never in place, so that a graph can be walked twice."""
    if gradient is None:
        return None
    if scale is None:
        return gradient.to(dtype)
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def _rows_like(hidden: Tensor) -> Tensor:
    # Gradients of a mean over many tokens underflow in float16 before a loss scaler can lift them.
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)


def first_order_only(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Refuse a backward that should itself be differentiable.

    torch's `once_differentiable` notices only upstream gradients that require grad. A gradient penalty on top of a loss
    has none, and would silently train as if the penalty were a constant.
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise GradientError(
                "nextquill's operators have a first derivative only: expected a backward without create_graph=True; "
                "for second derivatives use the plain PyTorch twins in nextquill.reference"
            )
        return backward(ctx, *grad_outputs)

    return refusing
