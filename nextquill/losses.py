"""The losses: `nn.Module`s that take two streams of hidden states and the head's weight and return one scalar.

They never hold logits. A class here chooses a weighting and the terms of `PairObjective`; the chunked engine computes
the loss, and every gradient is finished when `forward` returns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nextquill.defaults import DEFAULT_THRESHOLD
from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.ops.dispatch import check_impl
from nextquill.ops.fused_loss import unpack_rows
from nextquill.ops.loss_operator import pair_loss_operator
from nextquill.ops.objective import REDUCTIONS, PairObjective
from nextquill.ops.objective_spec import encode
from nextquill.ops.validation import (
    HeadInputs,
    check_chunk_bytes,
    check_head_inputs,
    check_head_options,
    check_ignore_index,
    check_sequence_ids,
    check_token_weights,
)
from nextquill.outputs import PairNLL, PreferenceLossOutput
from nextquill.vocabulary_shard import VocabularyShard
from nextquill.weighting import (
    ClipWeighting,
    ExpClipWeighting,
    ThresholdWeighting,
    UniformWeighting,
    Weighting,
    check_number,
)


class PairLoss(nn.Module):
    """Weighted cross-entropy over factual / counterfactual pairs, for any weighting.

    Per sequence, with n supervised tokens, weights w = weighting(NLLs) taken as constants, and Z = Σw if
    `normalize_weights` else n:

        L = Σ w nll_f / Z  +  alpha · mean(nll_e)  +  anchor · mean(nll_c)

    The published losses are subclasses that fix the weighting.

    Args:
        weighting: callable `PairNLL -> weights`; see `nextquill.weighting` for its contract.
        alpha: factor of the effect term, at least 0.
        normalize_weights: divide the weighted sum by Σw instead of by n.
        weighted_effect: weight the effect term like the first, alpha · Σ w nll_e / Z.
        detach_counterfactual: treat z0 as a constant: h0 gets no gradient, and z0 adds none to W and b.
        anchor: factor of the counterfactual's own nll, at least 0; needs a counterfactual with gradient.
        reduction: "sequence" (mean over sequences; exact for any split of the batch), "token" (every sum divided by the
            number of supervised tokens) or "micro_batch" (all rows of a call as one sequence, as NextQuill's code).
            Under "token" the weighted sum is not divided by Σw, so with weights below 1 the same `alpha` gives the
            effect term a larger share.
        ignore_index: label of rows that do not count.
        softcap, logit_scale: cap and factor that the architecture applies to its logits; see `linear_token_nll`.
        impl: "auto", "triton", "native" or "torch".
        chunk_bytes: bound on the memory for the logits held at once and for their gradient, in bytes; by default 128
            MiB on a CPU and 1,920 MiB on an accelerator.

    Raises:
        ArgumentError, ArgumentTypeError: a hyper-parameter is impossible; the message names it.
    """

    #: `share_above_threshold` counts tokens whose effect_prob exceeds this.
    threshold: float = DEFAULT_THRESHOLD
    #: Whether the loss can be computed without a counterfactual stream.
    needs_counterfactual: bool = True
    #: Whether a constant counterfactual runs in the factual's forward: it then computes no shared beginning again, but
    #: takes part in the backward, where its own tokens get a gradient of 0.
    joins_forwards: bool = False
    #: Whether a batch needs each example's anchor, which `compute` then gets as `anchor`.
    needs_anchor: bool = False

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
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        if not callable(weighting):
            raise ArgumentTypeError(f"weighting: expected a callable, got {type(weighting).__name__}")
        alpha, anchor = check_number("alpha", alpha, low=0.0), check_number("anchor", anchor, low=0.0)
        if anchor > 0 and detach_counterfactual:
            raise ArgumentError(
                "anchor: expected 0 with detach_counterfactual=True (the counterfactual is then a constant), "
                f"got {anchor!r}"
            )
        if reduction not in REDUCTIONS:
            raise ArgumentError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        check_head_options(softcap, logit_scale)
        check_chunk_bytes(chunk_bytes)
        self.objective = PairObjective(
            weighting=weighting,
            normalize_weights=normalize_weights,
            alpha=alpha,
            weighted_effect=weighted_effect,
            detach_counterfactual=detach_counterfactual,
            anchor=anchor,
            reduction=reduction,
        )
        self.ignore_index = check_ignore_index(ignore_index)
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.impl = check_impl(impl)
        self.chunk_bytes = chunk_bytes

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # With a caller's own weighting the text names one object in one process: a copy needs a text of its own.
        self.objective = self._objective

    @property
    def objective(self) -> PairObjective:
        """Weights, terms and reduction. It may be replaced, for example by a schedule of `alpha`."""
        return self._objective

    @objective.setter
    def objective(self, objective: PairObjective) -> None:
        self._objective, self._objective_spec = objective, encode(objective)

    @property
    def reduction(self) -> str:
        """The objective's reduction: "sequence", "token" or "micro_batch"."""
        return self.objective.reduction

    @property
    def detaches_counterfactual(self) -> bool:
        """Whether the counterfactual pass needs no gradient, so that it may run under `torch.no_grad`."""
        return self.objective.counterfactual_is_constant

    @property
    def terms_need_counterfactual(self) -> bool:
        """Whether the counterfactual stream is needed even where `token_weights` are given."""
        return self.objective.terms_need_counterfactual

    @property
    def scoring(self) -> PairLoss:
        """The loss that an evaluation reports for people's own texts: this one."""
        return self

    def forward(
        self,
        hidden_factual: Tensor,
        hidden_counterfactual: Tensor | None,
        lm_head_weight: Tensor | VocabularyShard,
        labels: Tensor,
        bias: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a batch, a float32 (float64) scalar in nats.

        Args:
            hidden_factual, hidden_counterfactual: [N, D] or [B, T, D], final hidden states of the same labels with and
                without the user's history, at the predicting positions. `None` for the second where
                `needs_counterfactual` is False, or `token_weights` are given and `terms_need_counterfactual` is False.
            lm_head_weight: [V, D]. If processes divide the vocabulary, a DTensor sharded on dimension 0, or a
                `VocabularyShard`; `bias` is divided alike.
            labels: [N] or [B, T] integers, not shifted; `ignore_index` rows give 0 and get 0 gradient.
            bias: [V] or None.
            sequence_ids: labels' shape; rows with equal ids form one sequence wherever they stand. By default each row
                of [B, T] is one sequence, and an [N] batch is a single one.
            num_items_in_batch: number that the reduction divides by if this call is one part of a larger batch:
                sequences ("sequence"), tokens ("token") or micro-batches ("micro_batch") of the whole batch; a number
                or a scalar tensor. Default: those of this call.
            token_weights: labels' shape, floating, finite and at least 0 where labels count. Constants that replace the
                weighting's result, for effects that another model has measured; normalised like the weighting's.

        A batch without a supervised row gives an exact 0 that is connected to the graph.

        Raises:
            ArgumentError, ArgumentTypeError: an argument does not fit; the message names it.
        """
        streams = (hidden_factual, hidden_counterfactual)
        _, loss, _, _ = self._run(
            *streams, lm_head_weight, labels, bias, sequence_ids, num_items_in_batch, token_weights, effect=False
        )
        return loss

    def compute(
        self,
        hidden_factual: Tensor,
        hidden_counterfactual: Tensor | None,
        lm_head_weight: Tensor | VocabularyShard,
        labels: Tensor,
        bias: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        token_weights: Tensor | None = None,
        *,
        effect_nll: bool = True,
    ) -> PreferenceLossOutput:
        """Compute the loss as `forward` does, with the diagnostics of `PreferenceLossOutput`, all of one dtype.

        Args:
            effect_nll: compute `pair_nll.effect` even if the loss has no effect term; False saves a pass over the
                logits and leaves it None.
        """
        streams = (hidden_factual, hidden_counterfactual)
        inputs, loss, rows, counts = self._run(
            *streams, lm_head_weight, labels, bias, sequence_ids, num_items_in_batch, token_weights, effect=effect_nll
        )
        paired, shape = hidden_counterfactual is not None, inputs.shape
        objective = self.objective if token_weights is None else self.objective.of_given_weights()
        coefficients, pair = unpack_rows(rows, paired, objective.computes_effect(paired=paired, asked=effect_nll))
        terms = objective.terms(coefficients, pair, rows[-1])
        num_tokens, num_sequences = counts.tolist()
        zero, count = rows.new_zeros(()), max(1, num_tokens)
        effect_prob = pair.effect_prob if paired else zero
        above = (effect_prob > self.threshold) & (inputs.labels != self.ignore_index) if paired else zero
        return PreferenceLossOutput(
            loss=loss,
            factual=terms.factual.sum(),
            effect=zero if terms.effect is None or objective.alpha == 0 else terms.effect.sum(),
            counterfactual=zero if terms.counterfactual is None else terms.counterfactual.sum(),
            token_weights=coefficients.weights.view(shape),
            token_loss=objective.token_loss(terms).view(shape),
            pair_nll=PairNLL(*(None if t is None else t.view(shape) for t in pair)),  # type: ignore[arg-type]
            mean_effect_logprob=pair.effect_logprob.sum() / count if paired else zero,
            mean_effect_prob=effect_prob.sum() / count,
            share_above_threshold=above.sum() / count,
            weight_sum=coefficients.weights.sum(),
            num_tokens=num_tokens,
            num_sequences=num_sequences,
        )

    def extra_repr(self) -> str:
        """Return the settings that `repr` shows."""
        objective = self.objective
        return (
            f"weighting={objective.weighting}, alpha={objective.alpha}, weighted_effect={objective.weighted_effect}, "
            f"detach_counterfactual={objective.detach_counterfactual}, anchor={objective.anchor}, "
            f"reduction={objective.reduction!r}, impl={self.impl!r}, chunk_bytes={self.chunk_bytes}"
        )

    def _run(
        self,
        hidden_factual: Tensor,
        hidden_counterfactual: Tensor | None,
        lm_head_weight: Tensor | VocabularyShard,
        labels: Tensor,
        bias: Tensor | None,
        sequence_ids: Tensor | None,
        num_items_in_batch: float | Tensor | None,
        token_weights: Tensor | None,
        *,
        effect: bool,
    ) -> tuple[HeadInputs, Tensor, Tensor, Tensor]:
        """Check a call's arguments and compute: the flat inputs, loss, rows [7, N], and (tokens, sequences) [2]."""
        needed = self.needs_counterfactual if token_weights is None else self.terms_need_counterfactual
        if hidden_counterfactual is None and needed:
            raise ArgumentTypeError(f"hidden_counterfactual: {type(self).__name__} expects a tensor, got None")
        # Check again, as in the constructor: these are attributes, and a caller may have set them.
        check_head_options(self.softcap, self.logit_scale)
        check_ignore_index(self.ignore_index)
        check_chunk_bytes(self.chunk_bytes)
        inputs = check_head_inputs(hidden_factual, hidden_counterfactual, lm_head_weight, labels, bias)
        ids = check_sequence_ids(sequence_ids, labels)
        differentiable = (inputs.factual, inputs.counterfactual, inputs.weight, inputs.bias)
        enabled = torch.is_grad_enabled()
        needs = [enabled and t is not None and t.requires_grad for t in differentiable]
        needs[1] = needs[1] and not self.objective.counterfactual_is_constant
        loss, rows, counts, *_ = pair_loss_operator(
            factual=inputs.factual,
            counterfactual=inputs.counterfactual,
            weight=inputs.weight,
            bias=inputs.bias,
            labels=inputs.labels,
            sequence_ids=None if self.reduction == "micro_batch" else ids,
            num_items=_check_items(num_items_in_batch, labels.device),
            token_weights=check_token_weights(token_weights, labels),
            objective=self._objective_spec,
            effect=effect,
            needs=needs,
            ignore_index=self.ignore_index,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            impl=self.impl,
            chunk_bytes=self.chunk_bytes,
            vocabulary_shard=inputs.vocabulary_shard,
            product_dtype=None,  # filled in under autocast
        )
        return inputs, loss, rows, counts


class NextQuillLoss(PairLoss):
    """NextQuill's preference loss (arXiv 2506.02368).

        ω = high_weight where effect_prob > threshold else low_weight       (constants)
        L = Σ ω nll_f / Σ ω  +  alpha · mean(nll_e)                          per sequence

    That is the objective of the official code; `weighted_effect=True` gives the paper's, alpha · Σ ω nll_e / Σ ω.
    Gradients flow through both passes unless `detach_counterfactual`. Through both, training can lower the effect term
    by making the no-history pass *wrong*, and then the measured effects are an artefact. Detached, it can only raise
    the labels' logits, generic labels too, which makes the model overconfident.

    Args:
        threshold: a token with a larger effect_prob counts as personal.
        high_weight, low_weight: weights of personal and of other tokens; 0 <= low_weight <= high_weight.
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

    `hidden_counterfactual` may be None. If it is given, `compute()` also reports effects; the gradient is the same.

    Args:
        options: reduction, ignore_index, softcap, logit_scale, impl, chunk_bytes, as in `PairLoss`.
    """

    needs_counterfactual = False

    def __init__(self, **options: Any) -> None:
        super().__init__(UniformWeighting(), **options)


def _check_items(num_items_in_batch: float | Tensor | None, device: torch.device) -> Tensor | None:
    """Return `num_items_in_batch` as a float64 scalar tensor. The operator reads its value if it is on the CPU."""
    if num_items_in_batch is None:
        return None
    if not isinstance(num_items_in_batch, Tensor):
        return torch.tensor(check_number("num_items_in_batch", num_items_in_batch, above=0.0), dtype=torch.float64)
    if num_items_in_batch.numel() != 1:
        raise ArgumentError(f"num_items_in_batch: expected one number, got shape {list(num_items_in_batch.shape)}")
    if num_items_in_batch.device.type != "cpu" and num_items_in_batch.device != device:
        raise ArgumentError(
            f"num_items_in_batch: expected a number on {device} or the CPU, got one on {num_items_in_batch.device}"
        )
    return num_items_in_batch.detach().reshape(()).double()
