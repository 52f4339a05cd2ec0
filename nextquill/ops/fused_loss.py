"""The chunked engine: a pair loss whose gradients are finished in its forward.

For each group of whole sequences: logits of both streams, their nll's, the weights, the gradient of every nll with
respect to the logits in place, and the products for dh1, dh0 and dW. The backward only scales. Counted in products of
N·D·V (U), trainable / frozen head:

    gradient through both passes (NextQuill)                6U / 4U
    counterfactual a constant (PerCE, detached NextQuill)   4U / 3U
    one stream (SFT)                                        3U / 2U

A sequence whose logits exceed the byte budget costs its logits twice, and only it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import Function

from nextquill.ops.generic import HeadCall, gather_rows
from nextquill.ops.gradients import HeadGradients, Needs, first_order_only, scaled
from nextquill.ops.head import LinearHead
from nextquill.ops.objective import PairObjective, RowCoefficients, RowGradients
from nextquill.ops.plan import RowGroup, group_rows
from nextquill.ops.precision import autocast_off, product_dtype
from nextquill.outputs import PairNLL


class RowResults(NamedTuple):
    """What the engine leaves per planned row [n]; no gradient. `None` where a stream or term was not computed."""

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

    def rows(self, chunk: slice) -> RowResults:
        return RowResults(*(None if t is None else t[chunk] for t in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class LossCall:
    """A head call together with the objective and what is to be computed of it."""

    head_call: HeadCall
    objective: PairObjective
    num_items: float
    needs: Needs
    effect: bool


class FusedPairLossFunction(Function):
    """(loss, *RowResults); only the loss is differentiable."""

    @staticmethod
    def forward(
        ctx: Any, factual: Tensor, counterfactual: Tensor | None, weight: Tensor, bias: Tensor | None, call: LossCall
    ) -> tuple[Tensor | None, ...]:
        dtype = product_dtype(factual, weight)  # which asks whether autocast is on
        with autocast_off(factual.device):
            head = call.head_call.head(weight, bias, dtype)
            engine = _Engine(call, head, factual, counterfactual)
            results = engine.run()
        grads = engine.gradients
        ctx.save_for_backward(grads.factual, grads.counterfactual, grads.weight, grads.bias)
        ctx.dtypes = [None if t is None else t.dtype for t in (factual, counterfactual, weight, bias)]
        ctx.mark_non_differentiable(*(t for t in results if t is not None))
        objective = call.objective
        loss = objective.token_loss(objective.terms(results.coefficients, results.pair)).sum()
        return loss, *results

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(scaled(gradient, grad_loss, dtype) for gradient, dtype in pairs), None


class _Engine:
    """One call's buffers and results."""

    def __init__(self, call: LossCall, head: LinearHead, factual: Tensor, counterfactual: Tensor | None) -> None:
        self.call, self.head = call, head
        self.plan, self.kernels = call.head_call.plan, call.head_call.kernels
        self.factual, self.counterfactual = factual, counterfactual
        needs = call.needs
        self.with_gradient = any(needs)
        self.through_counterfactual = (
            self.with_gradient and counterfactual is not None and not call.objective.counterfactual_is_constant
        )
        if not self.through_counterfactual:
            needs = needs._replace(counterfactual=False)
        self.gradients = HeadGradients(head, factual, counterfactual, needs)
        self._allocate()

    def _allocate(self) -> None:
        # Without an effect term the counterfactual's logits are used up by their nll, and one buffer serves both.
        keep_both = self.counterfactual is not None and (self.call.effect or self.through_counterfactual)
        streams = 2 if keep_both else 1
        self.max_rows = self.call.head_call.max_rows(self.head, streams)
        size = (min(self.max_rows, max(1, self.plan.num_rows)), self.head.vocabulary)
        self.buffers = [self.factual.new_empty(size, dtype=self.head.dtype) for _ in range(streams)]

    def run(self) -> RowResults:
        def rows(wanted: bool = True) -> Tensor | None:
            return self.factual.new_empty(self.plan.num_rows, dtype=self.head.dtype) if wanted else None

        paired = self.counterfactual is not None
        results = RowResults(rows(), rows(), rows(), rows(), rows(paired), rows(paired and self.call.effect))  # type: ignore[arg-type]
        for group in group_rows(self.plan, self.max_rows, whole_sequences=self.call.objective.needs_whole_sequences):
            self._run_group(group, results)
        return results

    def _run_group(self, group: RowGroup, results: RowResults) -> None:
        for chunk in group.chunks:
            self._nlls(chunk, results)
        own, objective = results.rows(slice(group.start, group.stop)), self.call.objective
        coefficients = objective.coefficients(own.pair, group, self.plan, self.call.num_items)
        for target, values in zip(own.coefficients, coefficients, strict=True):
            target.copy_(values)
        if not self.with_gradient:
            return
        for chunk in group.chunks:
            if len(group.chunks) > 1:
                self._fill_logits(chunk)
            self._gradient(chunk, objective.gradients(results.rows(chunk).coefficients))

    def _nlls(self, chunk: slice, results: RowResults) -> None:
        labels = self.plan.labels[chunk]
        if results.nll_counterfactual is not None:
            z0 = self._logits(self.counterfactual, chunk, self.buffers[-1])
            results.nll_counterfactual[chunk] = self.kernels.token_stats(z0, labels)
        z1 = self._logits(self.factual, chunk, self.buffers[0])
        results.nll_factual[chunk] = self.kernels.token_stats(z1, labels)
        if results.nll_effect is not None:
            results.nll_effect[chunk] = self.kernels.effect_stats(z1, z0, labels)

    def _fill_logits(self, chunk: slice) -> None:
        self._logits(self.factual, chunk, self.buffers[0])
        if len(self.buffers) == 2:
            self._logits(self.counterfactual, chunk, self.buffers[1])

    def _logits(self, hidden: Tensor | None, chunk: slice, buffer: Tensor) -> Tensor:
        assert hidden is not None
        return self.head.logits(self._hidden(hidden, chunk), buffer[: chunk.stop - chunk.start])

    def _hidden(self, hidden: Tensor, chunk: slice) -> Tensor:
        return gather_rows(hidden, self.plan.rows[chunk], self.head)

    def _gradient(self, chunk: slice, grads: RowGradients) -> None:
        labels, size = self.plan.labels[chunk], chunk.stop - chunk.start
        options = (self.head.softcap, self.head.logit_scale)
        z1, z0 = self.buffers[0][:size], self.buffers[-1][:size]
        if grads.effect is not None:
            self.kernels.pair_grad_(z1, z0, labels, grads.factual, grads.counterfactual, grads.effect, *options)
        else:
            self.kernels.token_grad_(z1, labels, grads.factual, *options)
            if self.through_counterfactual and grads.counterfactual is not None:
                self.kernels.token_grad_(z0, labels, grads.counterfactual, *options)
        rows, into = self.plan.rows[chunk], self.gradients
        into.add(into.factual, rows, z1, self._hidden(self.factual, chunk))
        if self.through_counterfactual:
            assert self.counterfactual is not None
            into.add(into.counterfactual, rows, z0, self._hidden(self.counterfactual, chunk))
