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

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from nextquill.ops.chunks import Chunk, HeadCall, LogitsBuffer
from nextquill.ops.dispatch import PAIR_STATS
from nextquill.ops.gradients import HeadGradients, Needs
from nextquill.ops.head import LinearHead
from nextquill.ops.objective import PairObjective, RowCoefficients, RowGradients
from nextquill.ops.row_groups import RowGroup, RowPlan, group_rows
from nextquill.outputs import PairNLL

FACTUAL, COUNTERFACTUAL, EFFECT = range(3)


class RowResults(NamedTuple):
    """What the engine leaves per row [n]; no gradient. `None` where a stream or term was not computed."""

    weights: Tensor
    weighted: Tensor
    uniform: Tensor
    nll_factual: Tensor
    nll_counterfactual: Tensor | None
    nll_effect: Tensor | None

    @property
    def coefficients(self) -> RowCoefficients:
        return RowCoefficients(*self[:3])

    @property
    def pair(self) -> PairNLL:
        return PairNLL(*self[3:])

    @classmethod
    def unpack(cls, rows: Tensor, paired: bool, effect: bool) -> RowResults:
        """The results that `pair_loss` returned as one tensor [6, n]."""
        computed = (True, True, True, True, paired, effect)
        return cls(*(row if have else None for row, have in zip(rows, computed, strict=True)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class LossCall:
    """A head call together with the objective and what is to be computed of it.

    `token_weights` [n] of the planned rows take the place of the objective's weighting.
    """

    head_call: HeadCall
    objective: PairObjective
    plan: RowPlan
    num_items: float | Tensor
    needs: Needs
    effect: bool
    token_weights: Tensor | None = None


class PairLossResult(NamedTuple):
    """The loss, the results per planned row [6, n] (absent ones are 0), and the gradients of the inputs."""

    loss: Tensor
    rows: Tensor
    gradients: HeadGradients


def pair_loss(call: LossCall, head: LinearHead, factual: Tensor, counterfactual: Tensor | None) -> PairLossResult:
    """Compute a pair loss and its gradients; see the module's docstring."""
    engine = _Engine(call, head, factual, counterfactual)
    engine.run()
    objective, rows = call.objective, engine.rows
    results = RowResults.unpack(rows, counterfactual is not None, call.effect)
    loss = objective.token_loss(objective.terms(results.coefficients, results.pair)).sum()
    return PairLossResult(loss, rows, engine.gradients)


class _Engine:
    """One call's buffers and results."""

    def __init__(self, call: LossCall, head: LinearHead, factual: Tensor, counterfactual: Tensor | None) -> None:
        self.call, self.head, self.plan, self.kernels = call, head, call.plan, call.head_call.kernels
        self.streams = (factual,) if counterfactual is None else (factual, counterfactual)
        paired = counterfactual is not None
        with_gradient = any(call.needs)
        self.through_counterfactual = with_gradient and paired and not call.objective.counterfactual_is_constant
        needs = call.needs if self.through_counterfactual else call.needs._replace(counterfactual=False)
        self.with_gradient = with_gradient
        self.gradients = HeadGradients(head, factual, counterfactual, needs)
        # Without an effect term the counterfactual's logits are used up by their nll, and one buffer serves both.
        self.together = paired and (call.effect or self.through_counterfactual)
        count = self.plan.num_rows
        self.max_rows = call.head_call.max_rows(head, 2 if self.together else 1)
        self.buffer = LogitsBuffer(head, 2 if self.together else 1, min(self.max_rows, max(1, count)))
        self.stats = factual.new_empty(PAIR_STATS, count, dtype=head.dtype)
        self.rows = factual.new_zeros(6, count, dtype=head.dtype)

    def run(self) -> None:
        whole = self.call.objective.needs_whole_sequences
        for group in group_rows(self.plan, self.max_rows, whole_sequences=whole):
            self._run_group(group)

    def _run_group(self, group: RowGroup) -> None:
        for rows in group.chunks:
            chunk = self._statistics(rows)
        call = self.call
        own = RowResults.unpack(self.rows[:, group.rows], len(self.streams) == 2, call.effect)
        given = None if call.token_weights is None else call.token_weights[group.rows]
        coefficients = call.objective.coefficients(
            own.pair, group, self.plan, call.num_items, self.kernels.row_coefficients, given
        )
        for target, values in zip(own.coefficients, coefficients, strict=True):
            target.copy_(values)
        if not self.with_gradient:
            return
        # Backwards, because the last chunk's logits still stand in the buffer.
        for rows in reversed(group.chunks):
            if rows != group.chunks[-1]:
                chunk = self._fill(rows)
            self._gradient(chunk, rows, call.objective.gradients(RowCoefficients(*self.rows[:3, rows])))

    def _statistics(self, rows: slice) -> Chunk:
        """Fill the rows' statistics and return the chunk whose logits stand in the buffer: that of the gradient."""
        labels = self.plan.labels[rows]
        if self.together:
            chunk, found = self._fill(rows), self.stats[:, rows]
            self.kernels.pair_stats(chunk.stream(0), chunk.stream(1), labels, found)
            streams = 3 if self.call.effect else 2
            self.rows[3 : 3 + streams, rows] = found[2 : 3 * streams : 3]
            return chunk
        for stream in reversed(range(len(self.streams))):
            chunk = self.buffer.fill(self.streams[stream : stream + 1], self.plan.rows[rows])
            found = self.stats[3 * stream : 3 * stream + 3, rows]
            self.kernels.token_stats(chunk.logits, labels, found)
            self.rows[3 + stream, rows] = found[2]
        return chunk

    def _fill(self, rows: slice) -> Chunk:
        return self.buffer.fill(self.streams if self.together else self.streams[:1], self.plan.rows[rows])

    def _gradient(self, chunk: Chunk, rows: slice, grads: RowGradients) -> None:
        labels, head, kernels, stats = self.plan.labels[rows], self.head, self.kernels, self.stats[:, rows]
        options = (head.softcap, head.logit_scale, head.grad_dtype)
        streams = (0, 1) if self.through_counterfactual else (0,)
        if grads.effect is not None:
            dz, _ = kernels.pair_grad_(
                chunk.stream(0),
                chunk.stream(1),
                labels,
                stats,
                grads.factual,
                grads.counterfactual,
                grads.effect,
                *options,
                detach_counterfactual=not self.through_counterfactual,
            )
        else:
            dz = kernels.token_grad_(chunk.stream(0), labels, stats[:3], grads.factual, *options)
            if grads.counterfactual is None:
                streams = (0,)
            elif self.through_counterfactual:
                kernels.token_grad_(chunk.stream(1), labels, stats[3:6], grads.counterfactual, *options)
        chunk.add_gradient(self.gradients, dz.dtype, streams)
