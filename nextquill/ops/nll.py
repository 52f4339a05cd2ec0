"""Per-token likelihoods of one or two streams and their gradients, for any upstream gradient; no logits are kept.

The forward computes 1U (2U for a pair) and leaves the nll's; the backward computes the logits of each chunk again and
their statistics, overwrites them with their gradient and multiplies: 3U (6U). A loss that finishes its gradient in its
forward saves the second computation of the logits: fused_loss.py.

These functions know nothing of autograd; nll_operators.py registers them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nextquill.ops.chunks import Chunk, ChunkedHead, LogitsBuffer
from nextquill.ops.dispatch import PAIR_STATS, PAIR_STATS_DIVERGENCE, TOKEN_STATS, ChunkKernels
from nextquill.ops.gradients import HeadGradients, Needs
from nextquill.ops.label_check import check_labels
from nextquill.ops.row_groups import RowPlan, plan_rows, split_rows


def head_nll(
    streams: tuple[Tensor, ...], head: ChunkedHead, labels: Tensor, ignore_index: int, *, divergence: bool = False
) -> Tensor:
    """nll of every row in nats: [1, N] for one stream [N, D], [3, N] for two; ignored rows are 0.

    With `divergence` [5, N]: KL(p1 ‖ p0) and the entropy of p1 follow. Streams whole vocabulary tiles without logits in
    memory where the kernels can, else chunk by chunk.
    """
    if head.kernels.stream_nll is not None and not divergence:
        check_labels(labels, ignore_index, head.vocabulary)
        # For the kernel -1 is an ignored row, and V a label out of range, whose nll is NaN.
        known = torch.where(labels < 0, head.vocabulary, labels)
        return head.kernels.stream_nll(streams, head, torch.where(labels == ignore_index, -1, known))
    plan = plan_rows(labels, None, ignore_index, head.vocabulary)
    kinds = TOKEN_STATS if len(streams) == 1 else PAIR_STATS_DIVERGENCE if divergence else PAIR_STATS
    found = streams[0].new_empty(kinds, plan.num_rows, dtype=head.dtype)
    for chunk in _chunks(plan, head, streams):
        found[:, chunk.rows] = _statistics(chunk, head.kernels, kinds)
    wanted = torch.cat((found[2:PAIR_STATS:3], found[PAIR_STATS:]))
    return found.new_zeros(len(wanted), labels.numel()).index_copy_(1, plan.rows, wanted)


def token_gradients(
    grad_nll: Tensor, hidden: Tensor, head: ChunkedHead, labels: Tensor, ignore_index: int, needs: Needs
) -> HeadGradients:
    """Gradients of Σ g·nll; `grad_nll` [N], `hidden` [N, D], `labels` [N]."""
    plan = plan_rows(labels, None, ignore_index, head.vocabulary)
    grads = HeadGradients(head, hidden, None, needs)
    g = grad_nll.to(head.dtype).index_select(0, plan.rows)
    options = (head.softcap, head.logit_scale, head.grad_dtype)
    for chunk in _chunks(plan, head, (hidden,)):
        stats = _statistics(chunk, head.kernels, TOKEN_STATS)
        dz = head.kernels.token_grad_(chunk.logits, chunk.labels, stats, g[chunk.rows], *options)
        chunk.add_gradient(grads, dz.dtype, (0,))
    return grads


def pair_gradients(
    grad_nlls: tuple[Tensor | None, Tensor | None, Tensor | None],
    streams: tuple[Tensor, Tensor],
    head: ChunkedHead,
    labels: Tensor,
    ignore_index: int,
    needs: Needs,
) -> HeadGradients:
    """Gradients of Σ g_f nll_f + g_c nll_c + g_e nll_e; each g [N] or None for zero, each stream [N, D]."""
    plan = plan_rows(labels, None, ignore_index, head.vocabulary)
    grads = HeadGradients(head, *streams, needs)
    g_f, g_c, g_e = (None if g is None else g.to(head.dtype).index_select(0, plan.rows) for g in grad_nlls)
    zero = head.weight.new_zeros(plan.num_rows, dtype=head.dtype)
    g_f, g_e = (zero if g is None else g for g in (g_f, g_e))
    options = (head.softcap, head.logit_scale, head.grad_dtype)
    for chunk in _chunks(plan, head, streams):
        rows = chunk.rows
        dz, _ = head.kernels.pair_grad_(
            chunk.stream(0),
            chunk.stream(1),
            chunk.labels,
            _statistics(chunk, head.kernels, PAIR_STATS),
            g_f[rows],
            None if g_c is None else g_c[rows],
            g_e[rows],
            *options,
        )
        chunk.add_gradient(grads, dz.dtype, (0, 1))
    return grads


def _statistics(chunk: Chunk, kernels: ChunkKernels, kinds: int) -> Tensor:
    """Statistics [kinds, n] of the logits at hand.

    A backward computes them anew, for its logits may differ from the forward's in their last bits, which at |z| = 1e4
    are 1e-3 of a probability: the product was another one, or rounded otherwise. One read of the chunk is small beside
    its products.
    """
    found = chunk.logits.new_empty(kinds, chunk.labels.numel())
    if kinds == TOKEN_STATS:
        kernels.token_stats(chunk.logits, chunk.labels, found)
    else:
        kernels.pair_stats(chunk.stream(0), chunk.stream(1), chunk.labels, found)
    return found


def _chunks(plan: RowPlan, head: ChunkedHead, streams: tuple[Tensor, ...]) -> Iterator[Chunk]:
    """Yield the plan's rows with their logits; each chunk overwrites the one before."""
    buffer = LogitsBuffer(head, len(streams), plan)
    for rows in split_rows(0, plan.num_rows, buffer.max_rows):
        yield buffer.fill(streams, rows)
