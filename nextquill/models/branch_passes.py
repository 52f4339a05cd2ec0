"""The forward passes of one batch, with or without gradient, and the loss over their branches.

    gradient through both    one forward of both branches, with the loss in its head
    constant counterfactual  one forward without gradient, whose head keeps the hidden states; then the factual forward
    factual only             the factual forward

A batch comes from one of the collators of `nextquill.data`, as trees or padded. The head function first selects the
rows that predict a label, so the loss never sees a prompt or a padding position.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nextquill.data import PaddedCollator, TreeCollator
from nextquill.data.collator import (
    ANCHOR,
    CONSTANT_COUNTERFACTUAL,
    FACTUAL,
    IGNORE_INDEX,
    JOINT,
    Collator,
    Forwards,
    LimitedTreeCollator,
    empty_like,
)
from nextquill.errors import ArgumentError, UnsupportedModelError
from nextquill.functional import linear_token_nll
from nextquill.losses import PairLoss
from nextquill.models import ATTENTIONS
from nextquill.models.attention import TreeAttention
from nextquill.models.head import HeadState, LossInHead
from nextquill.models.router import RouterLoss, asks_for_router_loss, without_router_loss
from nextquill.models.self_check import check_padded_rows
from nextquill.models.stored_effects import check_stored_weighting, stored_weights
from nextquill.outputs import AnchorRows, PreferenceLossOutput

Part = Mapping[str, Any]


class PartScores(NamedTuple):
    """The scores of a part with n labels.

    Attributes:
        output: the loss's output over the labels.
        placebo_nll: float32 (float64 for a model in float64) [n], nats, under another user's history; or None.
        sequence_ids: int64 [n], the index in the batch of each label's example.
    """

    output: PreferenceLossOutput
    placebo_nll: Tensor | None
    sequence_ids: Tensor


class PairPasses(AbstractContextManager["PairPasses"]):
    """Runs a loss over batches of one model. As a context manager it calls `close` at the end.

    Args:
        model: the unwrapped model.
        loss: the loss; `self.loss` is a copy with the model's own softcap and logit_scale.
        attention: the kernel for rows of trees, or "padded" for a row per branch; see `models.attention`. "auto" takes
            the fastest that is exact for the model, and says once, as a RuntimeWarning, why it pads: all branches,
            those beyond the limit of a rotary embedding, or those of training with dropout.
        stored_effects: in training, take token weights from the examples' stored effects (`load_effects`), and run the
            counterfactual only if a term of the loss reads it.

    Raises:
        ArgumentError: the loss has a softcap or logit_scale other than the model's, `attention` is unknown, or the
            loss cannot use stored effects.
        UnsupportedModelError: the model's head cannot be handled exactly, nor its attention by the one that is named.

    Attributes:
        attention: as given.
        trees: the attention over trees, or None where all branches are padded.
    """

    def __init__(
        self, model: nn.Module, loss: PairLoss, attention: str = "auto", *, stored_effects: bool = False
    ) -> None:
        if attention not in ATTENTIONS:
            raise ArgumentError(f"attention: expected one of {', '.join(ATTENTIONS)}, got {attention!r}")
        if stored_effects:
            check_stored_weighting(loss)
        self.stored_effects = stored_effects
        self.runner = LossInHead(model)
        self.loss = _fit_to_head(loss, self.runner)
        self.router = RouterLoss(model) if asks_for_router_loss(model) else None
        self.attention = attention
        self.trees = None if attention == "padded" else self._exact_trees(model)
        self._noise: Exception | None = None
        if attention == "padded":
            check_padded_rows(model)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Restore the model's own attention; a later call replaces it again."""
        if self.trees is not None:
            self.trees.close()

    def check_training(self, max_length: int) -> None:
        """Raise before training the errors that would occur during it; none with attention="auto", which pads instead.

        Raises:
            UnsupportedModelError: branches may be longer than the model's rotary embedding allows, or it has dropout.
        """
        if self.trees is not None and self.attention != "auto":
            self.trees.check_training(max_length)

    def pad_training(self, why: Exception) -> None:
        """Pad training batches for a reason outside the model; raises it if an attention over trees was named."""
        if self.trees is not None and self.attention != "auto":
            raise why
        self._noise = why

    def _exact_trees(self, model: nn.Module) -> TreeAttention | None:
        try:
            return TreeAttention(model, self.attention)
        except UnsupportedModelError as error:
            if self.attention != "auto":
                raise
            check_padded_rows(model)
            self._say_padded("every branch", error)
        return None

    def _say_padded(self, what: str, why: object) -> None:
        # From one line of one module, so that Python shows each message once.
        warnings.warn(
            f"attention: 'auto' computes {what} in a padded row of its own: {why}", RuntimeWarning, stacklevel=1
        )

    def _why_training_pads(self) -> Exception | None:
        """Why trees cannot be exact in training with this model, if "auto" may pad instead."""
        if self.trees is None or self.attention != "auto":
            return None
        try:
            self.trees.check_dropout()
        except UnsupportedModelError as error:
            return error
        return self._noise

    # ---- batches ---------------------------------------------------------------------------------

    def collator(self, pad_token_id: int = 0, max_tokens: int | None = None, *, training: bool = True) -> Collator:
        """The collator that makes batches of the branches that the loss needs.

        Args:
            pad_token_id: fills padded rows; trees need none.
            max_tokens: see `TreeCollator` and `PaddedCollator`.
            training: False for batches that are only computed in eval mode, where a model has no dropout.

        Raises:
            ArgumentError: `max_tokens` does not fit the loss's reduction.
        """
        loss = self.loss
        if max_tokens is not None and loss.reduction == "micro_batch":
            raise ArgumentError(
                "max_tokens: expected None with reduction='micro_batch', whose result depends on the examples in a "
                f"forward; got {max_tokens}"
            )
        both = CONSTANT_COUNTERFACTUAL if loss.detaches_counterfactual and not loss.joins_forwards else JOINT
        paired = loss.terms_need_counterfactual if self.stored_effects else loss.needs_counterfactual
        forwards = both if paired else FACTUAL
        if loss.needs_anchor:
            forwards = (*forwards[:-1], (*forwards[-1], ANCHOR))
        why = self._why_training_pads() if training else None
        if why is None:
            return self._collator(forwards, pad_token_id, max_tokens)
        self._say_padded("every branch of a training batch", why)
        return PaddedCollator(pad_token_id, forwards, max_tokens=max_tokens)

    def scoring_collator(
        self, pad_token_id: int = 0, max_tokens: int | None = None, *, placebo: bool = False
    ) -> Collator:
        """The collator that makes batches for `scores`: all branches in one row of trees, or padded in turn."""
        others = ("counterfactual", *(["placebo"] if placebo else []))
        # The first branch decides which examples share a row, so it is the one with the user's own history.
        forwards: Forwards = (("factual", *others),)
        if self.trees is None:
            forwards = (*((name,) for name in others), ("factual",))
        return self._collator(forwards, pad_token_id, max_tokens)

    def _collator(self, forwards: Forwards, pad_token_id: int, max_tokens: int | None) -> Collator:
        limit = 0 if self.trees is None else self.trees.max_depth if self.attention == "auto" else None
        if limit is None:
            return TreeCollator(forwards, max_tokens)
        padded = PaddedCollator(pad_token_id, forwards, max_tokens=max_tokens)
        return LimitedTreeCollator(TreeCollator(forwards, max_tokens), padded, limit) if limit else padded

    # ---- training ----------------------------------------------------------------------------------

    def count_items(self, batch: Mapping[str, Any]) -> int:
        """The number that the loss's reduction divides by, for this batch."""
        parts = batch["parts"]
        if self.loss.reduction == "sequence":
            return sum(part["num_sequences"] for part in parts)
        return sum(part["num_labels"] for part in parts) if self.loss.reduction == "token" else len(parts)

    def training_loss(
        self, batch: Mapping[str, Any], num_items: float | Tensor | None = None, call: nn.Module | None = None
    ) -> tuple[Tensor, list[PreferenceLossOutput]]:
        """The loss of a batch with its gradient, and the diagnostics of each of its parts.

        Args:
            batch: made by `self.collator`.
            num_items: the reduction's divisor, a number or a scalar; by default `count_items(batch)`. See
                `PairLoss.forward`.
            call: the model in its DDP or FSDP wrapper.

        Returns:
            The loss, a scalar in nats, float32 (float64 for a model in float64), and one output per part.
        """
        items = self.count_items(batch) if num_items is None else num_items
        results = [self.part_loss(part, items, call) for part in batch["parts"]]
        return torch.stack([loss for loss, _ in results]).sum(), [output for _, output in results]

    def backward(
        self,
        batch: Mapping[str, Any],
        num_items: float | Tensor | None = None,
        call: nn.Module | None = None,
        backward: Callable[[Tensor], object] = Tensor.backward,
    ) -> Tensor:
        """Run forward and backward of a batch part by part, holding the activations of one part at a time.

        Args:
            batch, num_items, call: as in `training_loss`. With `call`, every rank of a process group runs the same
                number of backwards, some over empty parts, because engines synchronise in each.
            backward: called with each part's loss, such as `accelerator.backward`.

        Returns:
            The loss without gradient, a scalar of the dtype that `training_loss` returns.
        """
        items = self.count_items(batch) if num_items is None else num_items
        losses = []
        for part in batch["parts"] if call is None else with_empty_parts(batch["parts"]):
            loss, _ = self.part_loss(part, items, call)
            backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def part_loss(
        self, part: Part, num_items: float | Tensor | None = None, call: nn.Module | None = None
    ) -> tuple[Tensor, PreferenceLossOutput]:
        """The loss of one part with its gradient, and its diagnostics; as `training_loss`.

        Raises:
            ArgumentError: the part does not fit the current loss, or was cut after the collator made it.
        """
        constant = any("counterfactual" in forward["rows"] for forward in part["forwards"][:-1])
        if constant and self.loss.needs_counterfactual and not self.loss.detaches_counterfactual:
            raise ArgumentError(
                "batch: its counterfactual is a constant, but the loss now has a gradient through it; "
                "make a new collator after changing the objective, or start with an alpha above 0"
            )
        weights = self._stored_weights(part) if self.stored_effects else None
        return self._loss(self.loss, part, num_items, call, token_weights=weights)

    def weighted_nll(self, part: Part, token_weights: Tensor, call: nn.Module | None = None) -> Tensor:
        """Σ w · nll over a part's labels, with its gradient.

        With w = −∂L/∂logprob it has the gradient of any loss L of log-probabilities.

        Args:
            part: with one forward, made by a collator with `FACTUAL`.
            token_weights: floating [n], one for each label, of either sign; constants.
            call: the model in its DDP or FSDP wrapper.

        Returns:
            A float32 scalar (float64 for a model in float64), in nats times weight.
        """
        (forward,) = part["forwards"]

        def compute(state: HeadState) -> Tensor:
            nll = _token_nll(self.loss, _select(state, forward)["factual"], state, part["labels"])
            return (nll * token_weights.to(nll)).sum()

        return self.runner.forward(compute, self._model_inputs(forward), call)

    # ---- evaluation --------------------------------------------------------------------------------

    @torch.no_grad()
    def scores(
        self, part: Part, call: nn.Module | None = None, look: Callable[[Tensor, HeadState], None] | None = None
    ) -> PartScores:
        """Score all branches of a part of a batch of `scoring_collator`, without gradient.

        The reduction's items count as 1, so each sequence's `token_loss` adds up to its own loss. A "micro_batch"
        reduction has no loss per sequence and is scored as "sequence". `look` is called inside the head with the
        factual rows [n, D] that predict the labels, and the head's state.
        """
        loss, placebo = self._scoring_loss(), list[Tensor]()

        def score_placebo(streams: Mapping[str, Tensor], state: HeadState) -> None:
            if look is not None:
                look(streams["factual"], state)
            if "placebo" in streams:
                placebo.append(_token_nll(loss, streams["placebo"], state, part["labels"]))

        _, output = self._loss(loss, part, 1.0, call, score_placebo)
        return PartScores(output, placebo[0] if placebo else None, part["sequence_ids"])

    # ---- forwards ----------------------------------------------------------------------------------

    def _model_inputs(self, forward: Mapping[str, Any]) -> dict[str, Any]:
        in_trees, trees = "layout" in forward, self.trees
        if in_trees is not (trees is not None) and not (trees is not None and self.attention == "auto"):
            raise ArgumentError("batch: expected a batch of this object's own collator, got another layout")
        if trees and in_trees:
            inputs = trees.model_inputs(forward)
        else:
            inputs = {name: forward[name] for name in ("input_ids", "attention_mask")}
            if trees and trees.max_depth is not None and forward["input_ids"].shape[1] > trees.max_depth:
                self._say_padded("every branch of some batches", trees.why_limited)
        return {**inputs, **without_router_loss(self.runner.model)}

    @torch.no_grad()
    def _constant_streams(self, part: Part, call: nn.Module | None) -> dict[str, Tensor]:
        """Final hidden states [n, D] of the rows that predict labels, by branch, of all forwards but the last."""
        kept: dict[str, Tensor] = {}
        for forward in part["forwards"][:-1]:

            def keep(state: HeadState, forward: Mapping[str, Any] = forward) -> Tensor:
                kept.update(_select(state, forward))
                return state.hidden_states.new_zeros(())

            self.runner.forward(keep, self._model_inputs(forward), call)
        return kept

    def _loss(
        self,
        loss: PairLoss,
        part: Part,
        num_items: float | Tensor | None,
        call: nn.Module | None,
        afterwards: Callable[[Mapping[str, Tensor], HeadState], None] | None = None,
        token_weights: Tensor | None = None,
    ) -> tuple[Tensor, PreferenceLossOutput]:
        if part["labels"].numel() != part["num_labels"]:
            raise ArgumentError(
                f"batch: expected {part['num_labels']} labels, got {part['labels'].numel()}; it was cut, as Accelerate "
                "does with dispatch_batches=True"
            )
        hidden = self._constant_streams(part, call)
        forward, kept = part["forwards"][-1], list[PreferenceLossOutput]()
        router = self.router if torch.is_grad_enabled() else None

        def compute(state: HeadState) -> Tensor:
            streams = {name: _as_rows(rows, state) for name, rows in hidden.items()} | _select(state, forward)
            more: dict[str, Any] = {}
            if ANCHOR in streams:
                more["anchor"] = AnchorRows(streams[ANCHOR], part["anchor_labels"], part["anchor_ids"])
            kept.append(
                loss.compute(
                    streams["factual"], streams.get("counterfactual"), state.weight, part["labels"], state.bias,
                    part["sequence_ids"], num_items, token_weights, effect_nll=False, **more,
                )
            )  # fmt: skip
            if afterwards is not None:
                afterwards(streams, state)
            if router is None:
                return kept[0].loss
            return kept[0].loss + router.value(forward) * self._share(part, num_items)

        with nullcontext() if router is None else router.recorded():
            return self.runner.forward(compute, self._model_inputs(forward), call), kept[0]

    def _share(self, part: Part, num_items: float | Tensor | None) -> float | Tensor:
        """The part's share of the whole batch, the weight of a loss that is a mean over tokens."""
        own = self.count_items({"parts": [part]})
        return own / (max(1, own) if num_items is None else num_items)

    def _stored_weights(self, part: Part) -> Tensor:
        effects = part.get("effects")
        if effects is None:
            if part["labels"].numel():
                raise ArgumentError("batch: expected examples with stored effects, got some without")
            effects = torch.empty(2, 0, device=part["labels"].device)
        return stored_weights(self.loss, effects, part["sequence_ids"])

    def _scoring_loss(self) -> PairLoss:
        loss = self.loss.scoring
        if loss.reduction != "micro_batch":
            return loss
        scoring = copy.copy(loss)
        scoring.objective = replace(loss.objective, reduction="sequence")
        return scoring


def with_empty_parts(parts: Sequence[Part]) -> list[Part]:
    """A rank's parts with empty ones added, so that every rank has the same number; every rank must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(parts)
    count = torch.tensor(len(parts), device=parts[0]["labels"].device)
    torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
    return add_empty_parts(parts, int(count))


def add_empty_parts(parts: Sequence[Part], count: int) -> list[Part]:
    """The parts and copies of the first without labels, `count` in total."""
    return [*parts, *(empty_like(parts[0]) for _ in range(count - len(parts)))]


def _token_nll(loss: PairLoss, rows: Tensor, state: HeadState, labels: Tensor) -> Tensor:
    return linear_token_nll(
        rows, state.weight, labels,
        bias=state.bias, softcap=loss.softcap, logit_scale=loss.logit_scale, impl=loss.impl,
    )  # fmt: skip


def _select(state: HeadState, forward: Mapping[str, Any]) -> dict[str, Tensor]:
    """The hidden states [n, D] of the rows that predict labels, by branch."""
    shape, got = forward["input_ids"].shape, state.hidden_states.shape[:2]
    if got != shape:
        raise UnsupportedModelError(
            f"output embedding: expected hidden states for {list(shape)} positions, got {list(got)}; a model that adds "
            "or drops positions is not supported"
        )
    rows = forward["rows"]
    selected = state.select(torch.cat(list(rows.values())))
    sizes = [positions.numel() for positions in rows.values()]
    return dict(zip(rows, selected.split(sizes), strict=True))


def _fit_to_head(loss: PairLoss, head: LossInHead) -> PairLoss:
    """A copy of the loss with the model's own soft cap and scale.

    Raises:
        ArgumentError: the loss was given other values.
    """
    fitted = copy.copy(loss)
    for name, neutral in (("softcap", None), ("logit_scale", 1.0)):
        given, probed = getattr(loss, name), getattr(head, name)
        if given != neutral and given != probed:
            raise ArgumentError(f"loss: its {name} is {given!r}, but the model applies {probed!r}")
        setattr(fitted, name, probed)
    fitted.ignore_index = IGNORE_INDEX  # every label of a batch counts; the loss's own could be a token of a response
    return fitted


def _as_rows(hidden: Tensor, state: HeadState) -> Tensor:
    """Rows of an earlier pass, in the dtype of this pass's own rows."""
    return hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(state.weight.dtype)
