"""Per-token likelihoods of one or two streams and their gradients, for any upstream gradient; no logits are kept.

The forward takes 1U (2U for a pair) and returns the NLLs. The backward takes 3U (6U): it computes the logits of each
chunk again with their statistics, overwrites them with their gradient and multiplies. A loss that finishes its gradient
in its forward saves the second computation of the logits: fused_loss.py.

These functions do not use autograd; nll_operators.py registers them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from nextquill.ops.chunks import ChunkedHead, GradientBuffer, LogitsBuffer
from nextquill.ops.dispatch import PAIR_STATS, PAIR_STATS_DIVERGENCE, TOKEN_STATS
from nextquill.ops.gradients import HeadGradients, Needs
from nextquill.ops.label_check import check_labels
from nextquill.ops.row_groups import plan_rows


def head_nll(
    streams: tuple[Tensor, ...], head: ChunkedHead, labels: Tensor, ignore_index: int, *, divergence: bool = False
) -> Tensor:
    """Compute the nll of every row: without logits in memory if the kernels can, otherwise chunk by chunk.

    Chunk by chunk too if the head has a bound on the memory: which is faster may depend on the shape.

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
    if head.kernels.stream_nll is not None and head.chunk_bytes is None and head.shard is None and not divergence:
        check_labels(labels, ignore_index, head.num_labels)
        # The kernel ignores rows with label -1, and gives NaN to rows with label V, which is out of range.
        known = torch.where(labels < 0, head.vocabulary, labels)
        return head.kernels.stream_nll(streams, head, torch.where(labels == ignore_index, -1, known))
    plan = plan_rows(labels, None, ignore_index, head.num_labels)
    kinds = TOKEN_STATS if len(streams) == 1 else PAIR_STATS_DIVERGENCE if divergence else PAIR_STATS
    found = streams[0].new_empty(kinds, plan.num_rows, dtype=head.dtype)
    for chunk in LogitsBuffer(head, len(streams), plan, head.memory(plan.num_rows, len(streams), 0).rows).chunks(
        streams
    ):
        chunk.statistics(found[:, chunk.rows])
    if head.shard is not None:
        head.shard.combine_(found, plan.labels)
    wanted = torch.cat((found[2:PAIR_STATS:3], found[PAIR_STATS:]))
    return found.new_zeros(len(wanted), labels.numel()).index_copy_(1, plan.rows, wanted)


def head_gradients(
    grad_nlls: Sequence[Tensor | None],
    streams: tuple[Tensor, ...],
    head: ChunkedHead,
    labels: Tensor,
    ignore_index: int,
    needs: Needs,
) -> HeadGradients:
    """Compute the gradients of Σ g_f nll_f + g_c nll_c + g_e nll_e, or of Σ g nll for one stream.

    Args:
        grad_nlls: g_f, g_c and g_e, or only g, each [N], any floating dtype, per nat; None means zero.
        streams: one or two tensors of hidden states [N, D], any floating dtype.
        head: the output head and its kernels.
        labels: [N], int64.
        ignore_index: label of rows that do not count.
        needs: which gradients are wanted.
    """
    plan = plan_rows(labels, None, ignore_index, head.num_labels)
    grads = HeadGradients(head, streams[0], streams[1] if len(streams) == 2 else None, needs)
    of_rows = [None if g is None else g.to(head.dtype).index_select(0, plan.rows) for g in (*grad_nlls, None, None)[:3]]
    if len(streams) == 2:
        # The kernel of a pair computes all terms but that of g_c.
        zero = head.weight.new_zeros(plan.num_rows, dtype=head.dtype)
        of_rows = [zero if g is None and index != 1 else g for index, g in enumerate(of_rows)]
    memory = head.memory(plan.num_rows, len(streams), len(streams))
    buffer = GradientBuffer(grads, (0, 1)[: len(streams)], memory.gradient_rows)
    for chunk in LogitsBuffer(head, len(streams), plan, memory.rows).chunks(streams):
        # The statistics are computed again, because the logits may differ from the forward's in their last bits: it may
        # use another matrix product. At |z| = 1e4 those bits are 1e-3 of a probability. Reading the chunk once takes
        # little time beside its products.
        stats = chunk.logits.new_empty(PAIR_STATS if len(streams) == 2 else TOKEN_STATS, chunk.labels.numel())
        chunk.statistics(stats)
        if head.shard is not None:
            head.shard.combine_(stats, plan.labels[chunk.rows])
        own = [None if g is None else g[chunk.rows] for g in of_rows]
        buffer.add(chunk, functools.partial(chunk.gradient, stats, own))
    buffer.finish()
    return grads
