"""MIRROR's loss: the divergence of student and teacher on the student's responses; and MIRROR-F's anchor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from nextquill.errors import ArgumentError
from nextquill.losses import PairLoss, SFTLoss
from nextquill.outputs import AnchorRows, PreferenceLossOutput
from nextquill.vocabulary_shard import VocabularyShard
from nextquill.weighting import UniformWeighting, check_number


class MirrorLoss(PairLoss):
    """The generalised Jensen-Shannon divergence of teacher and student (MIRROR, arXiv 2610.09795).

    With p1 the student's distribution, p0 the teacher's, a constant, and m = beta·p0 + (1 - beta)·p1, per token

        jsd = beta·KL(p0 ‖ m) + (1 - beta)·KL(p1 ‖ m)

    and its mean J over a response, then over responses. The labels are the sampled responses: they say which rows
    count, and the likelihoods among the diagnostics are theirs. `factual` is the student, `counterfactual` the teacher.

    MIRROR-F, with alpha above 0, adds A, the mean NLL of the counted tokens of the users' own responses (the *anchor*),
    over an example's tokens, then over the examples that have any:

        loss = (1 - alpha)·J / mean_J + alpha·A / mean_A

    mean_J and mean_A are constants, `term_means`: `MirrorTrainer` sets them to the terms' running means.

    Args:
        beta: weight of the teacher in the mixture, in [0, 1]; 0 is KL(p0 ‖ p1), 1 is KL(p1 ‖ p0).
        alpha: weight of the anchor, in [0, 1]; 0 is MIRROR, with J alone and undivided. MIRROR-F's is 0.5.
        options: reduction ("sequence" or "token"), ignore_index, softcap, logit_scale, impl, chunk_bytes, as in
            `PairLoss`. With "token" both means are over all tokens.

    Attributes:
        term_means: mean_J and mean_A, in nats; (1, 1) at first.
        num_anchors: the number that A is divided by if a call is one part of a larger batch: the examples ("sequence")
            or tokens ("token") of the whole batch that count; by default those of the call.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit; the message names it.
    """

    #: Student and teacher begin with the same history and query, which are most of their tokens.
    joins_forwards = True

    def __init__(self, beta: float = 0.5, alpha: float = 0.0, **options: Any) -> None:
        super().__init__(UniformWeighting(), detach_counterfactual=True, **options)
        if self.reduction == "micro_batch":
            raise ArgumentError("reduction: expected 'sequence' or 'token', got 'micro_batch'")
        self.objective = replace(self.objective, jsd_beta=_share("beta", beta))
        self.alpha = _share("alpha", alpha)
        self.needs_anchor = self.alpha > 0
        self.term_means = (1.0, 1.0)
        self.num_anchors: float | None = None

    def forward(self, *arguments: Any, anchor: AnchorRows | None = None, **options: Any) -> Tensor:
        """Return the loss of a batch, a float32 (float64) scalar in nats; arguments as in `compute`."""
        if anchor is None and not self.needs_anchor:
            return super().forward(*arguments, **options)
        return self.compute(*arguments, effect_nll=False, anchor=anchor, **options).loss

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
        anchor: AnchorRows | None = None,
    ) -> PreferenceLossOutput:
        """Compute the loss, and the likelihoods of the sampled tokens under student and teacher.

        Among the results, `factual` is J, `effect` is A, `counterfactual` the mean NLL of the sampled tokens under the
        teacher, and `token_loss` the divergence's part of the loss.

        Args:
            hidden_factual, hidden_counterfactual: [N, D] or [B, T, D], final hidden states of student and teacher at
                the predicting positions; the second gets no gradient.
            lm_head_weight, labels, bias, sequence_ids, num_items_in_batch: as in `PairLoss.forward`.
            token_weights: labels' shape, floating, as there; they weigh the divergences.
            effect_nll: compute `pair_nll.effect` too, in another pass over the logits.
            anchor: the rows of the users' own responses; expected with alpha above 0, and not without.
        """
        if (anchor is not None) is not self.needs_anchor:
            got, needs = "None" if anchor is None else "some", "rows" if self.needs_anchor else "None"
            raise ArgumentError(f"anchor: expected {needs} with alpha={self.alpha:g}, got {got}")
        tensors = (hidden_factual, hidden_counterfactual, lm_head_weight, labels, bias)
        output = super().compute(*tensors, sequence_ids, num_items_in_batch, token_weights, effect_nll=effect_nll)
        if anchor is None:
            return output
        rows, own_labels, own_ids = anchor
        nll = self.scoring(rows, None, lm_head_weight, own_labels, bias, own_ids, self.num_anchors)
        share, own_share = (1 - self.alpha) / self.term_means[0], self.alpha / self.term_means[1]
        return replace(
            output,
            loss=share * output.loss + own_share * nll,
            effect=nll.detach(),
            token_loss=share * output.token_loss,
        )

    def count_anchors(self, part: Mapping[str, Any]) -> int:
        """The number that A is divided by, of one part of a batch: `anchor_labels` and `anchor_ids`, int64 [m]."""
        keep = part["anchor_labels"] != self.ignore_index
        return int(keep.sum()) if self.reduction == "token" else len(part["anchor_ids"][keep].unique())

    @property
    def scoring(self) -> PairLoss:
        """The loss of people's own texts in an evaluation, where there is no teacher: their likelihood."""
        names = ("reduction", "ignore_index", "softcap", "logit_scale", "impl", "chunk_bytes")
        return SFTLoss(**{name: getattr(self, name) for name in names})

    def extra_repr(self) -> str:
        """Return the settings that `repr` shows."""
        own = f"beta={self.objective.jsd_beta}" + (f", alpha={self.alpha}" if self.alpha else "")
        return f"{own}, reduction={self.reduction!r}, impl={self.impl!r}, chunk_bytes={self.chunk_bytes}"


def _share(name: str, value: float) -> float:
    checked = check_number(name, value, low=0.0)
    if checked > 1:
        raise ArgumentError(f"{name}: expected a number from 0 to 1, got {value!r}")
    return checked
