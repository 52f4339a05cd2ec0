"""The losses: `nn.Module`s that take two streams of hidden states and the head's weight and return one scalar.

They never see logits. A class here chooses a weighting and the terms of `PairObjective`; the chunked engine does the
rest and has finished every gradient when `forward` returns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.functional import restore_rows
from nextquill.ops.dispatch import check_impl, resolve_impl
from nextquill.ops.fused_loss import FusedPairLossFunction, LossCall, RowResults
from nextquill.ops.generic import DEFAULT_CHUNK_BYTES, HeadCall
from nextquill.ops.gradients import Needs
from nextquill.ops.objective import REDUCTIONS, PairObjective
from nextquill.ops.plan import plan_rows
from nextquill.ops.validation import (
    HeadInputs,
    check_head_inputs,
    check_head_options,
    check_ignore_index,
    check_sequence_ids,
)
from nextquill.outputs import PairNLL, PreferenceLossOutput
from nextquill.weighting import (
    ClipWeighting,
    ExpClipWeighting,
    ThresholdWeighting,
    UniformWeighting,
    Weighting,
    check_number,
)

DEFAULT_THRESHOLD = 0.05


class PairLoss(nn.Module):
    """Weighted cross-entropy over factual / counterfactual pairs, for any weighting.

    Per sequence, with n supervised tokens, weights w = weighting(nll's) taken as constants, and Z = Σw if
    `normalize_weights` else n:

        L = Σ w nll_f / Z  +  alpha · mean(nll_e)  +  anchor · mean(nll_c)

    The published losses are subclasses that fix the weighting.

    Args:
        weighting: callable `PairNLL -> weights`; see `nextquill.weighting` for its contract.
        alpha: factor of the effect term, at least 0.
        normalize_weights: divide the weighted sum by Σw instead of by n.
        weighted_effect: weight the effect term like the first, alpha · Σ w nll_e / Z.
        detach_counterfactual: treat z0 as a constant: no gradient to h0, nor to W and b through it.
        anchor: factor of the counterfactual's own nll, at least 0; it needs a counterfactual with gradient.
        reduction: "sequence" (mean over sequences; exact for any split of the batch), "token" (every sum divided by the
            number of supervised tokens) or "micro_batch" (all rows of a call as one sequence, as NextQuill's code).
            Under "token" the weighted sum is not divided by Σw, so with weights below 1 `alpha` counts for more.
        ignore_index: label of rows that do not count.
        softcap, logit_scale: what the architecture does to its logits; see `linear_pair_nll`.
        impl: "auto", "triton", "native" or "torch".
        chunk_bytes: bound on the logits held at once, in bytes.

    Raises:
        ArgumentError, ArgumentTypeError: a hyper-parameter is impossible; the message names it.
    """

    #: `share_above_threshold` counts tokens whose effect_prob exceeds this.
    threshold: float = DEFAULT_THRESHOLD
    #: Whether the loss can be computed without a counterfactual stream.
    needs_counterfactual: bool = True

    def __init__(
        self,
        weighting: Weighting,
        *,
        alpha: float = 0.0,
        normalize_weights: bool = False,
        weighted_effect: bool = False,
        detach_counterfactual: bool = False,
        anchor: float = 0.0,
        reduction: str = "sequence",
        ignore_index: int = -100,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        impl: str = "auto",
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    ) -> None:
        super().__init__()
        if not callable(weighting):
            raise ArgumentTypeError(f"weighting: expected a callable, got {type(weighting).__name__}")
        check_number("alpha", alpha, low=0.0)
        check_number("anchor", anchor, low=0.0)
        if anchor > 0 and detach_counterfactual:
            raise ArgumentError(
                "anchor: expected 0 with detach_counterfactual=True (the counterfactual is then a constant), "
                f"got {anchor!r}"
            )
        if reduction not in REDUCTIONS:
            raise ArgumentError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        check_head_options(softcap, logit_scale)
        if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int):
            raise ArgumentTypeError(f"chunk_bytes: expected an int, got {type(chunk_bytes).__name__} {chunk_bytes!r}")
        if chunk_bytes <= 0:
            raise ArgumentError(f"chunk_bytes: expected a positive number of bytes, got {chunk_bytes!r}")
        self.objective = PairObjective(
            weighting=weighting,
            normalize_weights=normalize_weights,
            alpha=float(alpha),
            weighted_effect=weighted_effect,
            detach_counterfactual=detach_counterfactual,
            anchor=float(anchor),
            reduction=reduction,
        )
        self.ignore_index = check_ignore_index(ignore_index)
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.impl = check_impl(impl)
        self.chunk_bytes = chunk_bytes

    @property
    def reduction(self) -> str:
        return self.objective.reduction

    @property
    def detaches_counterfactual(self) -> bool:
        """Whether the counterfactual pass needs no gradient, so that it may run under `torch.no_grad`."""
        return self.objective.counterfactual_is_constant

    def forward(
        self,
        hidden_factual: Tensor,
        hidden_counterfactual: Tensor | None,
        lm_head_weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch, a float32 (float64) scalar.

        Args:
            hidden_factual, hidden_counterfactual: [N, D] or [B, T, D], final hidden states of the same labels with and
                without the user's history, at the predicting positions. `None` for the second where
                `needs_counterfactual` is False.
            lm_head_weight: [V, D].
            labels: [N] or [B, T] integers, not shifted; `ignore_index` rows give 0 and get 0 gradient.
            bias: [V] or None.
            sequence_ids: labels' shape; rows with equal ids form one sequence wherever they stand. By default each row
                of [B, T] is one sequence, and an [N] batch is a single one.
            num_items_in_batch: what the reduction divides by when this call is one part of a larger batch: sequences
                ("sequence"), tokens ("token") or micro-batches ("micro_batch") of the whole batch. Default: those of
                this call.

        A batch without a supervised row gives an exact 0 that is connected to the graph.

        Raises:
            ArgumentError, ArgumentTypeError: an argument does not fit; the message names it.
        """
        inputs, call = self._prepare(
            hidden_factual, hidden_counterfactual, lm_head_weight, labels, bias, sequence_ids, num_items_in_batch, False
        )
        loss: Tensor = FusedPairLossFunction.apply(*_tensors(inputs), call)[0]  # type: ignore[no-untyped-call]
        return loss

    def compute(
        self,
        hidden_factual: Tensor,
        hidden_counterfactual: Tensor | None,
        lm_head_weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        *,
        effect_nll: bool = True,
    ) -> PreferenceLossOutput:
        """As `forward`, with the diagnostics of `PreferenceLossOutput`.

        Args:
            effect_nll: compute `pair_nll.effect` also where the loss has no effect term; False saves that pass over the
                logits and leaves it None.
        """
        inputs, call = self._prepare(
            hidden_factual, hidden_counterfactual, lm_head_weight, labels, bias, sequence_ids, num_items_in_batch,
            effect_nll,
        )  # fmt: skip
        loss, *rows = FusedPairLossFunction.apply(*_tensors(inputs), call)  # type: ignore[no-untyped-call]
        return self._output(loss, RowResults(*rows), inputs, call)

    def extra_repr(self) -> str:
        objective = self.objective
        return (
            f"weighting={objective.weighting}, alpha={objective.alpha}, weighted_effect={objective.weighted_effect}, "
            f"detach_counterfactual={objective.detach_counterfactual}, anchor={objective.anchor}, "
            f"reduction={objective.reduction!r}"
        )

    def _prepare(
        self,
        hidden_factual: Tensor,
        hidden_counterfactual: Tensor | None,
        lm_head_weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        sequence_ids: Tensor | None,
        num_items_in_batch: float | Tensor | None,
        effect_nll: bool,
    ) -> tuple[HeadInputs, LossCall]:
        if hidden_counterfactual is None and self.needs_counterfactual:
            raise ArgumentTypeError(f"hidden_counterfactual: {type(self).__name__} expects a tensor, got None")
        inputs = check_head_inputs(
            hidden_factual, hidden_counterfactual, lm_head_weight, labels, bias, self.ignore_index
        )
        ids = check_sequence_ids(sequence_ids, labels)
        plan = plan_rows(inputs.labels, None if self.reduction == "micro_batch" else ids, self.ignore_index)
        kernels = resolve_impl(self.impl, inputs.factual.device)
        head_call = HeadCall(plan, kernels, self.softcap, self.logit_scale, self.chunk_bytes)
        enabled = torch.is_grad_enabled()
        needs = Needs(*(enabled and t is not None and t.requires_grad for t in _tensors(inputs)))
        effect = inputs.counterfactual is not None and (effect_nll or self.objective.needs_effect)
        items = _check_items(num_items_in_batch, self.objective.default_items(plan))
        return inputs, LossCall(head_call, self.objective, items, needs, effect)

    def _output(self, loss: Tensor, rows: RowResults, inputs: HeadInputs, call: LossCall) -> PreferenceLossOutput:
        plan, pair = call.head_call.plan, rows.pair
        terms = self.objective.terms(rows.coefficients, pair)
        zero, count = rows.weights.new_zeros(()), max(1, plan.num_rows)
        paired = pair.counterfactual is not None
        effect_prob = pair.effect_prob if paired else zero
        return PreferenceLossOutput(
            loss=loss,
            factual=terms.factual.sum(),
            effect=zero if terms.effect is None or self.objective.alpha == 0 else terms.effect.sum(),
            counterfactual=zero if terms.counterfactual is None else terms.counterfactual.sum(),
            token_weights=restore_rows(rows.weights, plan, inputs),
            token_loss=restore_rows(self.objective.token_loss(terms), plan, inputs),
            pair_nll=PairNLL(*(None if t is None else restore_rows(t, plan, inputs) for t in pair)),  # type: ignore[arg-type]
            mean_effect_logprob=pair.effect_logprob.sum() / count if paired else zero,
            mean_effect_prob=effect_prob.sum() / count,
            share_above_threshold=(effect_prob > self.threshold).sum() / count,
            weight_sum=rows.weights.sum(),
            num_tokens=plan.num_rows,
            num_sequences=plan.num_sequences,
        )


class NextQuillLoss(PairLoss):
    """NextQuill's preference loss (arXiv 2506.02368).

        ω = high_weight where effect_prob > threshold else low_weight       (constants)
        L = Σ ω nll_f / Σ ω  +  alpha · mean(nll_e)                          per sequence

    That is the official code's objective; `weighted_effect=True` is the paper's, alpha · Σ ω nll_e / Σ ω. Gradients
    flow through both passes unless `detach_counterfactual`. Prefer the detached form for training: through both passes
    the effect term can be lowered by making the no-history pass *wrong*, and then measured effects are an artefact.

    Args:
        threshold: least effect_prob of a personal token.
        high_weight, low_weight: weights above and not above it; 0 <= low_weight <= high_weight.
        alpha, weighted_effect, detach_counterfactual, anchor: see `PairLoss`.
        options: reduction, ignore_index, softcap, logit_scale, impl, chunk_bytes, as in `PairLoss`.
    """

    def __init__(
        self,
        threshold: float = DEFAULT_THRESHOLD,
        high_weight: float = 0.9,
        low_weight: float = 0.1,
        alpha: float = 0.1,
        weighted_effect: bool = False,
        detach_counterfactual: bool = False,
        anchor: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(
            ThresholdWeighting(threshold, high_weight, low_weight),
            alpha=alpha,
            normalize_weights=True,
            weighted_effect=weighted_effect,
            detach_counterfactual=detach_counterfactual,
            anchor=anchor,
            **options,
        )
        self.threshold = float(threshold)


class PerCELoss(PairLoss):
    """PerContrast's cross-entropy (arXiv 2603.06595): mean(w nll_f) with w = clip(effect_logprob, min, max).

    The counterfactual is a constant, so its pass may run under `torch.no_grad`.

    Args:
        min_weight, max_weight: bounds of the weight, 0 <= min_weight <= max_weight, in nats.
        options: reduction, ignore_index, softcap, logit_scale, impl, chunk_bytes, as in `PairLoss`.
    """

    def __init__(self, min_weight: float = 0.8, max_weight: float = 5.0, **options: Any) -> None:
        super().__init__(ClipWeighting(min_weight, max_weight), **options)


class LongCELoss(PairLoss):
    """LongCE (arXiv 2410.23771): mean(w nll_f) with w = min(exp(effect_logprob), max_weight), a constant.

    Args:
        max_weight: bound of the weight, positive.
        options: reduction, ignore_index, softcap, logit_scale, impl, chunk_bytes, as in `PairLoss`.
    """

    def __init__(self, max_weight: float = 5.0, **options: Any) -> None:
        super().__init__(ExpClipWeighting(max_weight), **options)


class SFTLoss(PairLoss):
    """Plain supervised fine-tuning, mean(nll_f): the baseline, on the same engine.

    `hidden_counterfactual` may be None. Given one, `compute()` also reports effects; the gradient is the same.

    Args:
        options: reduction, ignore_index, softcap, logit_scale, impl, chunk_bytes, as in `PairLoss`.
    """

    needs_counterfactual = False

    def __init__(self, **options: Any) -> None:
        super().__init__(UniformWeighting(), **options)


def _tensors(inputs: HeadInputs) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    return inputs.factual, inputs.counterfactual, inputs.weight, inputs.bias


def _check_items(num_items_in_batch: float | Tensor | None, default: int) -> float:
    if num_items_in_batch is None:
        return float(max(1, default))
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ArgumentError(f"num_items_in_batch: expected one number, got shape {list(num_items_in_batch.shape)}")
        # Reading it waits for the device, as the check of the labels has already done.
        num_items_in_batch = num_items_in_batch.item()
    return check_number("num_items_in_batch", num_items_in_batch, above=0.0)
