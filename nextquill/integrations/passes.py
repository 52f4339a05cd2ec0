"""The forward passes of one batch: which branches run, with or without gradient, and where the loss meets them.

    through both passes     one forward of both branches stacked, loss in its head
    counterfactual constant one forward without gradient whose head keeps the hidden states, then the factual one
    one stream              the factual forward alone

Only supervised rows leave the head function's first line, so the loss never sees a prompt or a padding position.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nextquill.data import stack_branches
from nextquill.errors import ArgumentError, UnsupportedModelError
from nextquill.functional import linear_token_nll
from nextquill.integrations.head import HeadState, LossInHead
from nextquill.losses import PairLoss
from nextquill.outputs import PreferenceLossOutput

Branch = Mapping[str, Tensor]


class BatchScores(NamedTuple):
    """What an evaluation pass leaves: the loss's output over supervised rows [n], and the placebo's nll or None."""

    output: PreferenceLossOutput
    placebo_nll: Tensor | None
    sequence_ids: Tensor


class PairPasses:
    """Runs a loss over collated batches (`PairCollator`) of one model.

    Args:
        model: the unwrapped model.
        loss: the loss; `self.loss` is a copy with the model's own softcap and logit_scale.

    Raises:
        ArgumentError: the loss was given a softcap or logit_scale that is not the model's.
        UnsupportedModelError: the model's head cannot be handled exactly.
    """

    def __init__(self, model: nn.Module, loss: PairLoss) -> None:
        self.runner = LossInHead(model)
        self.loss = fit_to_head(loss, self.runner)

    def training_loss(
        self, batch: Mapping[str, Branch], num_items: float | Tensor | None = None, call: nn.Module | None = None
    ) -> tuple[Tensor, PreferenceLossOutput]:
        """The loss with its gradient, and its diagnostics.

        Args:
            batch: `{"factual": …, "counterfactual": …}`, each with input_ids, attention_mask and labels [B, T].
            num_items: what the reduction divides by; see `PairLoss.forward`.
            call: the model in its DDP or FSDP wrapper.
        """
        factual = batch["factual"]
        if not self.loss.needs_counterfactual:
            return self._loss_pass(factual, None, num_items, call)
        if self.loss.detaches_counterfactual:
            with torch.no_grad():
                hidden = self._hidden_pass(batch["counterfactual"], call)
            return self._loss_pass(factual, hidden, num_items, call)
        return self._joint_pass(factual, batch["counterfactual"], num_items, call)

    @torch.no_grad()
    def scores(self, batch: Mapping[str, Branch], call: nn.Module | None = None) -> BatchScores:
        """All branches of a batch without gradient.

        The reduction's items count as 1, so each sequence's `token_loss` adds up to its own loss. A "micro_batch"
        reduction, which has no loss per sequence, is scored as "sequence".
        """
        counterfactual = self._hidden_pass(batch["counterfactual"], call)
        placebo = self._hidden_pass(batch["placebo"], call) if "placebo" in batch else None
        factual, kept = batch["factual"], list[Tensor]()

        def after_factual(state: HeadState, labels: Tensor) -> None:
            if placebo is not None:
                options = {"softcap": self.loss.softcap, "logit_scale": self.loss.logit_scale, "impl": self.loss.impl}
                kept.append(linear_token_nll(placebo, state.weight, labels, bias=state.bias, **options))  # type: ignore[arg-type]

        _, output = self._loss_pass(factual, counterfactual, 1.0, call, self._scoring_loss(), after_factual)
        return BatchScores(output, kept[0] if kept else None, _sequence_ids(factual["labels"]))

    def _hidden_pass(self, branch: Branch, call: nn.Module | None) -> Tensor:
        """Final hidden states of the supervised rows [n, D]."""
        kept: list[Tensor] = []

        def keep(state: HeadState) -> Tensor:
            kept.append(_supervised(state.hidden_states, branch["labels"]))
            return state.hidden_states.new_zeros(())

        self.runner.forward(keep, _model_inputs(branch), call)
        return kept[0]

    def _loss_pass(
        self,
        branch: Branch,
        hidden_counterfactual: Tensor | None,
        num_items: float | Tensor | None,
        call: nn.Module | None,
        loss: PairLoss | None = None,
        afterwards: Callable[[HeadState, Tensor], None] | None = None,
    ) -> tuple[Tensor, PreferenceLossOutput]:
        kept: list[PreferenceLossOutput] = []

        def compute(state: HeadState) -> Tensor:
            labels = branch["labels"]
            rows, targets = _supervised(state.hidden_states, labels), labels[_mask(labels)]
            other = None if hidden_counterfactual is None else hidden_counterfactual.to(rows.dtype)
            kept.append(_compute(loss or self.loss, rows, other, state, targets, _sequence_ids(labels), num_items))
            if afterwards is not None:
                afterwards(state, targets)
            return kept[0].loss

        return self.runner.forward(compute, _model_inputs(branch), call), kept[0]

    def _joint_pass(
        self, factual: Branch, counterfactual: Branch, num_items: float | Tensor | None, call: nn.Module | None
    ) -> tuple[Tensor, PreferenceLossOutput]:
        stacked = stack_branches(factual, counterfactual)
        kept: list[PreferenceLossOutput] = []

        def compute(state: HeadState) -> Tensor:
            # Row-major selection puts every factual row first, and both halves in the same order of labels.
            rows = _supervised(state.hidden_states, stacked["labels"])
            labels = factual["labels"]
            first, second = rows.chunk(2) if len(rows) else (rows, rows)
            targets = labels[_mask(labels)]
            kept.append(_compute(self.loss, first, second, state, targets, _sequence_ids(labels), num_items))
            return kept[0].loss

        return self.runner.forward(compute, _model_inputs(stacked), call), kept[0]

    def _scoring_loss(self) -> PairLoss:
        if self.loss.reduction != "micro_batch":
            return self.loss
        scoring = copy.copy(self.loss)
        scoring.objective = replace(self.loss.objective, reduction="sequence")
        return scoring


def fit_to_head(loss: PairLoss, head: LossInHead) -> PairLoss:
    """A copy of the loss with the model's own soft cap and scale.

    Raises:
        ArgumentError: the loss was given others.
    """
    fitted = copy.copy(loss)
    for name, neutral in (("softcap", None), ("logit_scale", 1.0)):
        given, probed = getattr(loss, name), getattr(head, name)
        if given != neutral and given != probed:
            raise ArgumentError(f"loss: its {name} is {given!r}, but the model applies {probed!r}")
        setattr(fitted, name, probed)
    return fitted


def _compute(
    loss: PairLoss,
    factual: Tensor,
    counterfactual: Tensor | None,
    state: HeadState,
    labels: Tensor,
    sequence_ids: Tensor,
    num_items: float | Tensor | None,
) -> PreferenceLossOutput:
    return loss.compute(
        factual, counterfactual, state.weight, labels, state.bias, sequence_ids, num_items, effect_nll=False
    )


def _model_inputs(branch: Branch) -> dict[str, Tensor]:
    return {"input_ids": branch["input_ids"], "attention_mask": branch["attention_mask"]}


def _mask(labels: Tensor) -> Tensor:
    return labels != -100


def _supervised(hidden: Tensor, labels: Tensor) -> Tensor:
    if hidden.shape[:2] != labels.shape:
        raise UnsupportedModelError(
            f"output embedding: expected hidden states for {list(labels.shape)} positions, got {list(hidden.shape[:2])}; "
            "prompt-learning adapters that insert positions are not supported"
        )
    return hidden[_mask(labels)]


def _sequence_ids(labels: Tensor) -> Tensor:
    rows = torch.arange(labels.shape[0], device=labels.device)[:, None].expand(labels.shape)
    return rows[_mask(labels)]
