"""Per-token likelihoods of one or two streams and their gradients, for any upstream gradient; no logits are kept.

The forward takes 1U (2U for a pair) and returns the NLLs. The backward takes 3U (6U): it computes the logits of each
chunk again with their statistics, overwrites them with their gradient and multiplies. A loss that finishes its gradient
in its forward saves the second computation of the logits: fused_loss.py.

These functions do not use autograd; nll_operators.py registers them.
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
    """Compute the nll of every row: without logits in memory if the kernels can, otherwise chunk by chunk.

    Args:
        streams: one or two tensors of hidden states [N, D], any floating dtype.
        head: the output head and its kernels.
        labels: [N], int64.
        ignore_index: label of rows that do not count.
        divergence: with two streams, compute KL(p1 ‖ p0) and the entropy of p1 too.

    Returns:
        float32 (float64), nats, 0 in ignored rows: [1, N] for one stream; [3, N] for two (factual, counterfactual,
        effect); [5, N] with `divergence`.
    """
    if head.kernels.stream_nll is not None and not divergence:
        check_labels(labels, ignore_index, head.vocabulary)
        # The kernel ignores rows with label -1, and gives NaN to rows with label V, which is out of range.
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
    """Compute the gradients of Σ g·nll.

    Args:
        grad_nll: g [N], any floating dtype, per nat.
        hidden: [N, D], any floating dtype.
        head: the output head and its kernels.
        labels: [N], int64.
        ignore_index: label of rows that do not count.
        needs: which gradients are wanted.
    """
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
    """Compute the gradients of Σ g_f nll_f + g_c nll_c + g_e nll_e.

    Args:
        grad_nlls: g_f, g_c and g_e, each [N], any floating dtype, per nat; None means zero.
        streams: hidden states factual and counterfactual, each [N, D], any floating dtype.
        head, labels, ignore_index, needs: as in `token_gradients`.
    """
    plan = plan_rows(labels, None, ignore_index, head.vocabulary)
    grads = HeadGradients(head, *streams, needs)
    g_f, g_c, g_e = (None if g is None else g.to(head.dtype).index_select(0, plan.rows) for g in grad_nlls)
    zero = head.weight.new_zeros(plan.num_rows, dtype=head.dtype)
    g_f, g_e = (zero if g is None else g for g in (g_f, g_e))
    options = (head.softcap, head.logit_scale, head.grad_dtype)
    for chunk in _chunks(plan, head, streams):
        rows, stats = chunk.rows, _statistics(chunk, head.kernels, PAIR_STATS)
        g = (g_f[rows], None if g_c is None else g_c[rows], g_e[rows])
        dz, _ = head.kernels.pair_grad_(chunk.streams, chunk.labels, stats, g, *options)
        chunk.add_gradient(grads, dz.dtype, (0, 1))
    return grads


def _statistics(chunk: Chunk, kernels: ChunkKernels, kinds: int) -> Tensor:
    """Compute the statistics [kinds, n] of a chunk's logits.

    A backward computes them again, because its logits may differ from the forward's in their last bits: it may use
    another matrix product. At |z| = 1e4 those bits are 1e-3 of a probability. Reading the chunk once takes little time
    beside its products.
    """
    found = chunk.logits.new_empty(kinds, chunk.labels.numel())
    if kinds == TOKEN_STATS:
        kernels.token_stats(chunk.logits, chunk.labels, found)
    else:
        kernels.pair_stats(chunk.streams, chunk.labels, found)
    return found


def _chunks(plan: RowPlan, head: ChunkedHead, streams: tuple[Tensor, ...]) -> Iterator[Chunk]:
    """Yield the plan's rows with their logits; each chunk overwrites the previous one."""
    buffer = LogitsBuffer(head, len(streams), plan)
    for rows in split_rows(0, plan.num_rows, buffer.max_rows):
        yield buffer.fill(streams, rows)
