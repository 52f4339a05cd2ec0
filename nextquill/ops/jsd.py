"""The Jensen-Shannon divergence of two streams per token and its gradient by the first; no logits are kept.

The second stream, the teacher, is a constant. The forward takes 2U. The backward takes 4U, or 3U with a frozen head: it
computes the logits of each chunk again, reads them for their statistics, writes dz1 and multiplies it for dh1 and dW.

A loss that finishes its gradient in its forward saves the second computation of the logits: fused_loss.py.

These functions do not use autograd; nll_operators.py registers them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nextquill.ops.chunks import Chunk, ChunkedHead, GradientBuffer, LogitsBuffer
from nextquill.ops.dispatch import JSD_STATS, TOKEN_STATS
from nextquill.ops.gradients import HeadGradients, Needs
from nextquill.ops.row_groups import RowPlan, plan_rows

_IGNORED = -1


def head_jsd(streams: tuple[Tensor, Tensor], head: ChunkedHead, counts: Tensor, beta: float) -> Tensor:
    """Compute the divergence of every row.

    Args:
        streams: hidden states [N, D] of student and teacher, any floating dtype.
        head: the output head and its kernels.
        counts: [N], bool, whether the row counts.
        beta: weight of the teacher in the mixture, in [0, 1].

    Returns:
        [N], float32 (float64), nats; 0 in rows that do not count.
    """
    plan, beta = _plan(counts), told_from_0_and_1(beta, head.dtype)
    found = streams[0].new_empty(JSD_STATS, plan.num_rows, dtype=head.dtype)
    for chunk in LogitsBuffer(head, 2, plan, head.memory(plan.num_rows, 2, 0).rows).chunks(streams):
        jsd_statistics(chunk, plan.labels[chunk.rows], beta, found[:, chunk.rows])
    return found.new_zeros(counts.numel()).index_copy_(0, plan.rows, found[JSD_STATS - 1])


def head_jsd_gradients(
    grad_jsd: Tensor, streams: tuple[Tensor, Tensor], head: ChunkedHead, counts: Tensor, beta: float, needs: Needs
) -> HeadGradients:
    """Compute the gradients of Σ g·jsd through the student; those of the teacher's hidden states are 0.

    Args:
        grad_jsd: g [N], any floating dtype, per nat.
        streams, head, counts, beta: as in `head_jsd`.
        needs: which gradients are wanted.
    """
    plan, beta = _plan(counts), told_from_0_and_1(beta, head.dtype)
    gradients = HeadGradients(head, *streams, needs)
    upstream = grad_jsd.to(head.dtype).index_select(0, plan.rows)
    memory = head.memory(plan.num_rows, 2, 1)
    buffer = GradientBuffer(gradients, (0,), memory.gradient_rows)
    for chunk in LogitsBuffer(head, 2, plan, memory.rows).chunks(streams):
        # Computed again, for the reason in `head_gradients`.
        stats = chunk.logits.new_empty(JSD_STATS, chunk.labels.numel())
        jsd_statistics(chunk, plan.labels[chunk.rows], beta, stats)
        buffer.add(chunk, functools.partial(chunk.jsd_gradient, beta, stats, upstream[chunk.rows]))
    buffer.finish()
    return gradients


def jsd_statistics(chunk: Chunk, labels: Tensor, beta: float, out: Tensor) -> Tensor | None:
    """Write the statistics of `chunk_torch.jsd_stats` over the whole vocabulary.

    If processes divide it, they exchange the normalisers of both streams, which m needs, and then add up their shares
    of the divergences.

    Args:
        chunk: the rows, with logits of student and teacher.
        labels: [n], int64, of these rows.
        beta: weight of the teacher, as `told_from_0_and_1` returns it.
        out: [6, n], float32 (float64).

    Returns:
        The NLLs of both streams [2, n], in nats, if processes divide the vocabulary; they come with the exchange.
    """
    shard = chunk.head.shard
    if shard is None:
        chunk.jsd_statistics(beta, out)
        return None
    found = out.new_empty(2 * TOKEN_STATS, labels.numel())
    chunk.own_statistics(found)
    shard.combine_(found, labels)
    out[:2], out[2:4] = found[:2], found[3:5]
    chunk.jsd_statistics(beta, out, normalised=True)
    shard.add_shares_(out[4:])
    return found[2::3]


def _plan(counts: Tensor) -> RowPlan:
    return plan_rows(torch.where(counts, 0, _IGNORED), None, _IGNORED, 1)


def told_from_0_and_1(beta: float, dtype: torch.dtype) -> float:
    """Return `beta` rounded to `dtype`, where beta and 1 - beta must not vanish unless they are 0.

    A number of 1e-9 would be 0 in 1 - beta, and mean another divergence. The result is wrong by at most one rounding.
    """
    if beta in (0, 1):
        return float(beta)
    tiny = torch.finfo(dtype).eps / 2
    return float(torch.tensor(min(max(beta, tiny), 1 - tiny), dtype=dtype))
