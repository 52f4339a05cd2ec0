"""Differentiable per-token operators: any upstream gradient per token, nothing of size [N, V] kept.

The forward walks row chunks and keeps only nll's; the backward computes each chunk's logits again. That is 2U forward
and up to 6U backward for a pair, against 6U in all for a loss that finishes its gradient in its forward: fused_loss.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from nextquill.ops.dispatch import ChunkKernels
from nextquill.ops.gradients import HeadGradients, Needs, first_order_only, scaled
from nextquill.ops.head import LinearHead
from nextquill.ops.plan import RowPlan, split_rows
from nextquill.ops.precision import autocast_off, product_dtype

DEFAULT_CHUNK_BYTES = 2**28


@dataclass(frozen=True)
class HeadCall:
    """Everything of one operator call that is not a differentiable tensor."""

    plan: RowPlan
    kernels: ChunkKernels
    softcap: float | None = None
    logit_scale: float = 1.0
    chunk_bytes: int = DEFAULT_CHUNK_BYTES

    def head(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> LinearHead:
        bias = None if bias is None else bias.detach().to(dtype)
        return LinearHead(weight.detach().to(dtype), bias, self.softcap, self.logit_scale)

    def max_rows(self, head: LinearHead, buffers: int) -> int:
        """Rows whose `buffers` logits tensors fit `chunk_bytes`; at least one."""
        return max(1, self.chunk_bytes // (buffers * head.vocabulary * head.dtype.itemsize))


class TokenNLLFunction(Function):
    """nll [n] of the planned rows of one stream."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall) -> Tensor:
        ctx.call, ctx.dtype = call, product_dtype(hidden, weight)
        ctx.save_for_backward(hidden, weight, bias)
        with autocast_off(hidden.device):
            head = call.head(weight, bias, ctx.dtype)
            nll = hidden.new_empty(call.plan.num_rows, dtype=head.dtype)
            for chunk, (logits,), _ in _chunks(call, head, (hidden,)):
                nll[chunk] = call.kernels.token_stats(logits, call.plan.labels[chunk])
        return nll

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        call: HeadCall = ctx.call
        needs = Needs(ctx.needs_input_grad[0], False, *ctx.needs_input_grad[1:3])
        with autocast_off(hidden.device):
            head = call.head(weight, bias, ctx.dtype)
            grads = HeadGradients(head, hidden, None, needs)
            grad_nll = grad_nll.to(head.dtype).contiguous()
            for chunk, (logits,), (rows_hidden,) in _chunks(call, head, (hidden,)):
                call.kernels.token_grad_(
                    logits, call.plan.labels[chunk], grad_nll[chunk], call.softcap, call.logit_scale
                )
                grads.add(grads.factual, call.plan.rows[chunk], logits, rows_hidden)
        return (
            scaled(grads.factual, None, hidden.dtype),
            scaled(grads.weight, None, weight.dtype),
            None if bias is None else scaled(grads.bias, None, bias.dtype),
            None,
        )


class PairNLLFunction(Function):
    """(nll_f, nll_c, nll_e), each [n], of the planned rows of both streams."""

    @staticmethod
    def forward(
        ctx: Any, factual: Tensor, counterfactual: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.call, ctx.dtype = call, product_dtype(factual, weight)
        ctx.save_for_backward(factual, counterfactual, weight, bias)
        ctx.set_materialize_grads(False)
        kernels, labels = call.kernels, call.plan.labels
        with autocast_off(factual.device):
            head = call.head(weight, bias, ctx.dtype)
            nll_f, nll_c, nll_e = (factual.new_empty(call.plan.num_rows, dtype=head.dtype) for _ in range(3))
            for chunk, (z1, z0), _ in _chunks(call, head, (factual, counterfactual)):
                nll_f[chunk] = kernels.token_stats(z1, labels[chunk])
                nll_c[chunk] = kernels.token_stats(z0, labels[chunk])
                nll_e[chunk] = kernels.effect_stats(z1, z0, labels[chunk])
        return nll_f, nll_c, nll_e

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grad_nlls: Tensor | None) -> tuple[Tensor | None, ...]:
        factual, counterfactual, weight, bias = ctx.saved_tensors
        call: HeadCall = ctx.call
        with autocast_off(factual.device):
            head = call.head(weight, bias, ctx.dtype)
            grads = HeadGradients(head, factual, counterfactual, Needs(*ctx.needs_input_grad[:4]))
            g_f, g_c, g_e = (None if g is None else g.to(head.dtype).contiguous() for g in grad_nlls)
            zero = factual.new_zeros(call.plan.num_rows, dtype=head.dtype)
            g_f, g_e = (zero if g is None else g for g in (g_f, g_e))
            for chunk, (z1, z0), (h1, h0) in _chunks(call, head, (factual, counterfactual)):
                call.kernels.pair_grad_(
                    z1,
                    z0,
                    call.plan.labels[chunk],
                    g_f[chunk],
                    None if g_c is None else g_c[chunk],
                    g_e[chunk],
                    call.softcap,
                    call.logit_scale,
                )
                grads.add(grads.factual, call.plan.rows[chunk], z1, h1)
                grads.add(grads.counterfactual, call.plan.rows[chunk], z0, h0)
        return (
            scaled(grads.factual, None, factual.dtype),
            scaled(grads.counterfactual, None, counterfactual.dtype),
            scaled(grads.weight, None, weight.dtype),
            None if bias is None else scaled(grads.bias, None, bias.dtype),
            None,
        )


def _chunks(
    call: HeadCall, head: LinearHead, streams: tuple[Tensor, ...]
) -> Iterator[tuple[slice, tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Yield (rows of the plan, each stream's logits, each stream's hidden rows); the logits' buffers are reused."""
    max_rows = min(call.max_rows(head, len(streams)), max(1, call.plan.num_rows))
    buffers = [streams[0].new_empty(max_rows, head.vocabulary, dtype=head.dtype) for _ in streams]
    for chunk in split_rows(0, call.plan.num_rows, max_rows):
        rows = call.plan.rows[chunk]
        hidden = tuple(gather_rows(stream, rows, head) for stream in streams)
        logits = tuple(head.logits(h, buffer[: rows.numel()]) for h, buffer in zip(hidden, buffers, strict=True))
        yield chunk, logits, hidden


def gather_rows(hidden: Tensor, rows: Tensor, head: LinearHead) -> Tensor:
    """The chunk's rows [n, D], in the dtype of the head's weight."""
    return hidden.detach().index_select(0, rows).to(head.weight.dtype)
