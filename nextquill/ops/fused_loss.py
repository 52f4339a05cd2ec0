"""The chunked engine: a pair loss whose gradients are finished in its forward.

For each group of whole sequences: logits of both streams, their statistics, the weights, the gradient of every nll with
respect to the logits in place, and the products for dh1, dh0 and dW. The backward only scales. Counted in products of
N·D·V (U), trainable / frozen head:

    gradient through both passes (NextQuill)                6U / 4U
    counterfactual a constant (PerCE, detached NextQuill)   4U / 3U
    one stream (SFT)                                        3U / 2U

A sequence whose logits exceed the byte budget costs those of its rows beyond the budget twice.
"""

from __future__ import annotations

from torch import Tensor

from nextquill.ops.chunks import Chunk, ChunkedHead, LogitsBuffer
from nextquill.ops.dispatch import PAIR_STATS
from nextquill.ops.gradients import HeadGradients, Needs
from nextquill.ops.objective import PairObjective, RowCoefficients
from nextquill.ops.row_groups import RowGroup, RowPlan, group_rows
from nextquill.outputs import PairNLL


class PairLossEngine:
    """One call's buffers and results.

    Args:
        factual, counterfactual: hidden states [N, D]; the second is None for a loss of one stream.
        plan: which n of the N rows count, by sequence.
        num_items: what the reduction averages over: sequences, tokens or micro-batches.
        needs: which gradients are wanted.
        effect: compute nll_e, which takes two streams.
        token_weights: [n], in place of the objective's weighting.
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
        # Without an effect term the counterfactual's logits are used up by their nll, and one buffer serves both.
        self.together = self.paired and (effect or self.through_counterfactual)
        self.buffer = LogitsBuffer(head, 2 if self.together else 1, plan)
        self.stats = factual.new_empty(PAIR_STATS, plan.num_rows, dtype=head.dtype)
        self.rows = factual.new_zeros(6, plan.num_rows, dtype=head.dtype)

    def run(self) -> tuple[Tensor, Tensor, HeadGradients]:
        """The loss (scalar) and rows [6, n] for `unpack_rows`, in the compute dtype; the gradients of the inputs."""
        whole = self.objective.needs_whole_sequences
        for group in group_rows(self.plan, self.buffer.max_rows, whole_sequences=whole):
            self._run_group(group)
        coefficients, pair = unpack_rows(self.rows, self.paired, self.effect)
        loss = self.objective.token_loss(self.objective.terms(coefficients, pair)).sum()
        return loss, self.rows, self.gradients

    def _run_group(self, group: RowGroup) -> None:
        for rows in group.chunks:
            chunk = self._statistics(rows)
        own, pair = unpack_rows(self.rows[:, group.rows], self.paired, self.effect)
        given = None if self.token_weights is None else self.token_weights[group.rows]
        fused = self.head.kernels.row_coefficients
        coefficients = self.objective.coefficients(pair, group, self.num_items, fused, given)
        for target, values in zip(own, coefficients, strict=True):
            target.copy_(values)
        if not self.with_gradient:
            return
        # Backwards, because the last chunk's logits still stand in the buffer.
        for rows in reversed(group.chunks):
            if rows != chunk.rows:
                chunk = self._fill(rows)
            self._gradient(chunk)

    def _statistics(self, rows: slice) -> Chunk:
        """Fill the rows' statistics and return the chunk whose logits stand in the buffer: that of the gradient."""
        kernels, found = self.head.kernels, self.stats[:, rows]
        if self.together:
            chunk = self._fill(rows)
            kernels.pair_stats(chunk.stream(0), chunk.stream(1), chunk.labels, found)
            streams = 3 if self.effect else 2
            self.rows[3 : 3 + streams, rows] = found[2 : 3 * streams : 3]
            return chunk
        for stream in reversed(range(len(self.streams))):
            chunk = self.buffer.fill(self.streams[stream : stream + 1], rows)
            own = found[3 * stream : 3 * stream + 3]
            kernels.token_stats(chunk.logits, chunk.labels, own)
            self.rows[3 + stream, rows] = own[2]
        return chunk

    def _fill(self, rows: slice) -> Chunk:
        return self.buffer.fill(self.streams if self.together else self.streams[:1], rows)

    def _gradient(self, chunk: Chunk) -> None:
        """Overwrite the chunk's logits with their gradient, and add what it gives to the inputs."""
        head, kernels, stats = self.head, self.head.kernels, self.stats[:, chunk.rows]
        grads = self.objective.gradients(RowCoefficients(*self.rows[:3, chunk.rows]))
        options = (head.softcap, head.logit_scale, head.grad_dtype)
        streams = (0, 1) if self.through_counterfactual else (0,)
        if grads.effect is not None:
            dz, _ = kernels.pair_grad_(
                chunk.stream(0),
                chunk.stream(1),
                chunk.labels,
                stats,
                grads.factual,
                grads.counterfactual,
                grads.effect,
                *options,
                detach_counterfactual=not self.through_counterfactual,
            )
        else:
            dz = kernels.token_grad_(chunk.stream(0), chunk.labels, stats[:3], grads.factual, *options)
            if grads.counterfactual is None:
                streams = (0,)
            elif self.through_counterfactual:
                kernels.token_grad_(chunk.stream(1), chunk.labels, stats[3:6], grads.counterfactual, *options)
        chunk.add_gradient(self.gradients, dz.dtype, streams)


def unpack_rows(rows: Tensor, paired: bool, effect: bool) -> tuple[RowCoefficients, PairNLL]:
    """The coefficients and the nll's in `rows` [6, n]; without `paired` or `effect` that nll was not computed."""
    weights, weighted, uniform, factual, counterfactual, difference = rows
    pair = PairNLL(factual, counterfactual if paired else None, difference if effect else None)
    return RowCoefficients(weights, weighted, uniform), pair
