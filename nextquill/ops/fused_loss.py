"""The chunked engine: a pair loss whose gradients are finished in its forward.

For each group of whole sequences the engine computes the logits of both streams, their statistics, the weights and the
gradient by the logits, which is multiplied for dh1, dh0 and dW. The backward only scales. The cost
in matrix products of N·D·V multiplications (U), for a trainable / frozen head:

    gradient through both passes (NextQuill)                6U / 4U
    counterfactual a constant (PerCE, detached NextQuill)   4U / 3U
    divergence from a constant (MIRROR)                     4U / 3U
    one stream (SFT)                                        3U / 2U

If the logits of a sequence exceed the byte budget, those beyond the budget are computed twice.
"""

from __future__ import annotations

import functools

from torch import Tensor

from nextquill.ops.chunks import Chunk, ChunkedHead, GradientBuffer, LogitsBuffer
from nextquill.ops.dispatch import JSD_STATS, PAIR_STATS
from nextquill.ops.gradients import HeadGradients, Needs
from nextquill.ops.jsd import jsd_statistics, told_from_0_and_1
from nextquill.ops.objective import PairObjective, RowCoefficients
from nextquill.ops.row_groups import RowGroup, RowPlan, group_rows
from nextquill.outputs import PairNLL

#: Numbers per row that the engine returns, see `unpack_rows`.
NUM_ROWS = 7


class PairLossEngine:
    """The buffers and results of one call.

    Args:
        factual, counterfactual: hidden states [N, D], any floating dtype; the second is None for a loss of one stream.
        head: the output head and its kernels.
        objective: the weights and terms of the loss.
        plan: which n of the N rows count, by sequence.
        num_items: number of sequences, tokens or micro-batches that the reduction averages over; a number or a scalar
            tensor.
        needs: which gradients are wanted.
        effect: compute nll_e; needs two streams.
        token_weights: [n], floating, in place of the objective's weighting.
    """

    def __init__(
        self,
        factual: Tensor,
        counterfactual: Tensor | None,
        head: ChunkedHead,
        objective: PairObjective,
        plan: RowPlan,
        *,
        num_items: float | Tensor,
        needs: Needs,
        effect: bool,
        token_weights: Tensor | None = None,
    ) -> None:
        self.head, self.objective, self.plan = head, objective, plan
        self.num_items, self.effect, self.token_weights = num_items, effect, token_weights
        self.streams = (factual,) if counterfactual is None else (factual, counterfactual)
        self.paired = counterfactual is not None
        self.with_gradient = any(needs)
        self.through_counterfactual = self.with_gradient and self.paired and not objective.counterfactual_is_constant
        if not self.through_counterfactual:
            needs = needs._replace(counterfactual=False)
        self.gradients = HeadGradients(head, factual, counterfactual, needs)
        self.beta = None if objective.jsd_beta is None else told_from_0_and_1(objective.jsd_beta, head.dtype)
        # Without an effect term the counterfactual's logits are needed only for their nll: one buffer serves both.
        self.together = self.paired and (effect or self.through_counterfactual or self.beta is not None)
        streams = 2 if self.together else 1
        with_gradient = (0, 1) if self.through_counterfactual else (0,)
        self.whole_sequences = objective.needs_whole_sequences
        longest = max(plan.lengths, default=0) if self.whole_sequences else 0
        memory = head.memory(plan.num_rows, streams, len(with_gradient) if self.with_gradient else 0, longest)
        self.max_rows = memory.rows
        self.buffer = LogitsBuffer(head, streams, plan, memory.rows)
        self.gradient_buffer = GradientBuffer(self.gradients, with_gradient, memory.gradient_rows)
        self.stats = factual.new_empty(PAIR_STATS, plan.num_rows, dtype=head.dtype)
        self.jsd_stats = self.stats.new_empty(0 if self.beta is None else JSD_STATS, plan.num_rows)
        self.rows = self.stats.new_zeros(NUM_ROWS, plan.num_rows)

    def run(self) -> tuple[Tensor, Tensor, HeadGradients]:
        """Return the loss (scalar), rows [7, n] for `unpack_rows` (float32 or float64), and the inputs' gradients."""
        for group in group_rows(self.plan, self.max_rows, whole_sequences=self.whole_sequences):
            self._run_group(group)
        self.gradient_buffer.finish()
        coefficients, pair = unpack_rows(self.rows, self.paired, self.effect)
        loss = self.objective.token_loss(self.objective.terms(coefficients, pair, self.rows[-1])).sum()
        return loss, self.rows, self.gradients

    def _run_group(self, group: RowGroup) -> None:
        for rows in group.chunks:
            chunk = self._statistics(rows)
        self._finish_statistics(group)
        own, pair = unpack_rows(self.rows[:, group.rows], self.paired, self.effect)
        given = None if self.token_weights is None else self.token_weights[group.rows]
        fused = self.head.kernels.row_coefficients
        coefficients = self.objective.coefficients(pair, group, self.num_items, fused, given)
        for target, values in zip(own, coefficients, strict=True):
            target.copy_(values)
        if not self.with_gradient:
            return
        # Backwards, because the logits of the last chunk are still in the buffer.
        for rows in reversed(group.chunks):
            if rows != chunk.rows:
                chunk = self._fill(rows)
            self._gradient(chunk)

    def _statistics(self, rows: slice) -> Chunk:
        """Compute the rows' statistics and return the chunk whose logits are left in the buffer for the gradient."""
        found = self.stats[:, rows]
        if self.together:
            chunk = self._fill(rows)
            if self.beta is not None:
                self._jsd_statistics(chunk, self.beta, found)
            if self.effect or self.beta is None:
                chunk.statistics(found)
            return chunk
        for stream in reversed(range(len(self.streams))):
            chunk = self.buffer.fill(self.streams[stream : stream + 1], rows)
            chunk.statistics(found[3 * stream : 3 * stream + 3])
        return chunk

    def _jsd_statistics(self, chunk: Chunk, beta: float, found: Tensor) -> None:
        stats = self.jsd_stats[:, chunk.rows]
        nlls = jsd_statistics(chunk, self.plan.labels[chunk.rows], beta, stats)
        self.rows[-1, chunk.rows] = stats[-1]
        found[2:6:3] = chunk.jsd_nlls(stats) if nlls is None else nlls

    def _finish_statistics(self, group: RowGroup) -> None:
        """Complete the statistics of a group's chunks, in one exchange if processes divide the vocabulary.

        `jsd_statistics` has completed those of a divergence.
        """
        kinds = 3 if self.effect else len(self.streams)
        found = self.stats[: 3 * kinds, group.rows]
        if self.head.shard is not None and (self.effect or self.beta is None):
            self.head.shard.combine_(found, self.plan.labels[group.rows])
        self.rows[3 : 3 + kinds, group.rows] = found[2::3]

    def _fill(self, rows: slice) -> Chunk:
        return self.buffer.fill(self.streams if self.together else self.streams[:1], rows)

    def _gradient(self, chunk: Chunk) -> None:
        """Compute the gradient by the chunk's logits, and hand it over to be multiplied."""
        stats = self.stats[:, chunk.rows]
        grads = self.objective.gradients(RowCoefficients(*self.rows[:3, chunk.rows]))
        write = functools.partial(chunk.gradient, stats, grads)
        if self.beta is not None:
            write = functools.partial(chunk.jsd_gradient, self.beta, self.jsd_stats[:, chunk.rows], grads.factual)
        self.gradient_buffer.add(chunk, write)


def unpack_rows(rows: Tensor, paired: bool, effect: bool) -> tuple[RowCoefficients, PairNLL]:
    """Split the rows that `PairLossEngine` computes into coefficients and NLLs.

    Args:
        rows: [7, n], float32 (float64): three coefficients, then the NLLs factual, counterfactual and effect in nats,
            and the divergence in nats, which is not among the results; 0 where the loss has none.
        paired: whether the counterfactual nll was computed; if not, it is None.
        effect: likewise for the effect nll.
    """
    weights, weighted, uniform, factual, counterfactual, difference, _ = rows
    pair = PairNLL(factual, counterfactual if paired else None, difference if effect else None)
    return RowCoefficients(weights, weighted, uniform), pair
