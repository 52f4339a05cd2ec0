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


class SupervisedRows(NamedTuple):
    """The rows of a batch that have a label: their positions in [B * T], labels and sequences (0 … B - 1), each [n]."""

    shape: torch.Size
    positions: Tensor
    labels: Tensor
    sequence_ids: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> SupervisedRows:
        # One wait for the device, here; everything below selects by index.
        positions = (labels != -100).flatten().nonzero().squeeze(1)
        return cls(labels.shape, positions, labels.flatten()[positions], positions // labels.shape[1])

    def select(self, state: HeadState) -> Tensor:
        """The hidden states of these rows [n, D]."""
        if state.hidden_states.shape[:2] != self.shape:
            raise UnsupportedModelError(
                f"output embedding: expected hidden states for {list(self.shape)} positions, "
                f"got {list(state.hidden_states.shape[:2])}; a model that adds or drops positions is not supported"
            )
        return state.select(self.positions)


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
            return self._loss_pass(self.loss, factual, None, num_items, call)
        if self.loss.detaches_counterfactual:
            with torch.no_grad():
                hidden = self._hidden_pass(batch["counterfactual"], call)
            return self._loss_pass(self.loss, factual, hidden, num_items, call)
        return self._joint_pass(factual, batch["counterfactual"], num_items, call)

    @torch.no_grad()
    def scores(self, batch: Mapping[str, Branch], call: nn.Module | None = None) -> BatchScores:
        """All branches of a batch without gradient.

        The reduction's items count as 1, so each sequence's `token_loss` adds up to its own loss. A "micro_batch"
        reduction, which has no loss per sequence, is scored as "sequence".
        """
        counterfactual = self._hidden_pass(batch["counterfactual"], call)
        placebo = self._hidden_pass(batch["placebo"], call) if "placebo" in batch else None
        loss, factual, kept = self._scoring_loss(), batch["factual"], list[Tensor]()
        rows = SupervisedRows.of(factual["labels"])

        def score_placebo(state: HeadState) -> None:
            if placebo is not None:
                kept.append(
                    linear_token_nll(
                        _as_rows(placebo, state), state.weight, rows.labels,
                        bias=state.bias, softcap=loss.softcap, logit_scale=loss.logit_scale, impl=loss.impl,
                    )
                )  # fmt: skip

        _, output = self._loss_pass(loss, factual, counterfactual, 1.0, call, score_placebo)
        return BatchScores(output, kept[0] if kept else None, rows.sequence_ids)

    def _hidden_pass(self, branch: Branch, call: nn.Module | None) -> Tensor:
        """Final hidden states of the supervised rows [n, D]."""
        rows, kept = SupervisedRows.of(branch["labels"]), list[Tensor]()

        def keep(state: HeadState) -> Tensor:
            kept.append(rows.select(state))
            return state.hidden_states.new_zeros(())

        self.runner.forward(keep, _model_inputs(branch), call)
        return kept[0]

    def _loss_pass(
        self,
        loss: PairLoss,
        branch: Branch,
        hidden_counterfactual: Tensor | None,
        num_items: float | Tensor | None,
        call: nn.Module | None,
        afterwards: Callable[[HeadState], None] | None = None,
    ) -> tuple[Tensor, PreferenceLossOutput]:
        rows, kept = SupervisedRows.of(branch["labels"]), list[PreferenceLossOutput]()

        def compute(state: HeadState) -> Tensor:
            hidden = rows.select(state)
            other = None if hidden_counterfactual is None else _as_rows(hidden_counterfactual, state)
            kept.append(_compute(loss, hidden, other, state, rows, num_items))
            if afterwards is not None:
                afterwards(state)
            return kept[0].loss

        return self.runner.forward(compute, _model_inputs(branch), call), kept[0]

    def _joint_pass(
        self, factual: Branch, counterfactual: Branch, num_items: float | Tensor | None, call: nn.Module | None
    ) -> tuple[Tensor, PreferenceLossOutput]:
        stacked = stack_branches(factual, counterfactual)
        rows, both = SupervisedRows.of(factual["labels"]), SupervisedRows.of(stacked["labels"])
        kept: list[PreferenceLossOutput] = []

        def compute(state: HeadState) -> Tensor:
            # Row-major selection puts every factual row first, and both halves in the same order of labels.
            first, second = both.select(state).split(len(rows.labels)) if len(rows.labels) else [both.select(state)] * 2
            kept.append(_compute(self.loss, first, second, state, rows, num_items))
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
    rows: SupervisedRows,
    num_items: float | Tensor | None,
) -> PreferenceLossOutput:
    return loss.compute(
        factual, counterfactual, state.weight, rows.labels, state.bias, rows.sequence_ids, num_items, effect_nll=False
    )


def _as_rows(hidden: Tensor, state: HeadState) -> Tensor:
    """Rows of an earlier pass in the dtype this pass selects its own in."""
    return hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(state.weight.dtype)


def _model_inputs(branch: Branch) -> dict[str, Tensor]:
    return {"input_ids": branch["input_ids"], "attention_mask": branch["attention_mask"]}
