"""MIRROR's loss: student's divergence from the teacher on the student's own responses; and MIRROR-F's anchor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.functional import linear_pair_jsd_nll, linear_pair_nll, linear_token_nll
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
        self.beta, self.alpha = _share("beta", beta), _share("alpha", alpha)
        self.needs_anchor = self.alpha > 0
        self.term_means = (1.0, 1.0)
        self.num_anchors: float | None = None

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """Return the loss of a batch, a float32 (float64) scalar in nats; other arguments as in `compute`."""
        return self.compute(*arguments, effect_nll=False, **options).loss

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

        Among the results, `factual` is J, `effect` is A, and `token_loss` the divergence's part of the loss.

        Args:
            hidden_factual, hidden_counterfactual: [N, D], final hidden states of student and teacher at the predicting
                positions; the second gets no gradient.
            lm_head_weight, labels, bias, sequence_ids, num_items_in_batch: as in `PairLoss.forward`, with labels [N].
            token_weights: None (of no shape or dtype); the divergence has no token weights.
            effect_nll: compute `pair_nll.effect` too, at two matrix products more.
            anchor: the rows of the users' own responses; expected with alpha above 0, and not without.
        """
        if hidden_counterfactual is None:
            raise ArgumentTypeError("hidden_counterfactual: MirrorLoss expects the teacher's hidden states, got None")
        if token_weights is not None:
            raise ArgumentError("token_weights: expected None, as the divergence has no token weights")
        if (anchor is not None) is not self.needs_anchor:
            got, needs = "None" if anchor is None else "some", "rows" if self.needs_anchor else "None"
            raise ArgumentError(f"anchor: expected {needs} with alpha={self.alpha:g}, got {got}")
        teacher = hidden_counterfactual.detach()
        options: dict[str, Any] = {
            "bias": bias,
            "ignore_index": self.ignore_index,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "impl": self.impl,
            "chunk_bytes": self.chunk_bytes,
        }
        jsd, pair = linear_pair_jsd_nll(hidden_factual, teacher, lm_head_weight, labels, beta=self.beta, **options)
        if effect_nll:
            with torch.no_grad():
                pair = linear_pair_nll(hidden_factual, teacher, lm_head_weight, labels, **options)
        shares, num_tokens, num_sequences = self._shares(labels, sequence_ids, num_items_in_batch, jsd)
        divergence, weight = (jsd * shares).sum(), 1.0
        loss, anchored = divergence, divergence.new_zeros(())
        if anchor is not None:
            rows, anchor_labels, anchor_ids = anchor
            nll = linear_token_nll(rows, lm_head_weight, anchor_labels, **options)
            anchored = (nll * self._shares(anchor_labels, anchor_ids, self.num_anchors, nll)[0]).sum()
            weight = (1 - self.alpha) / self.term_means[0]
            loss = weight * divergence + self.alpha / self.term_means[1] * anchored
        keep, count = labels != self.ignore_index, max(1, num_tokens)
        return PreferenceLossOutput(
            loss=loss,
            factual=divergence.detach(),
            effect=anchored.detach(),
            counterfactual=loss.new_zeros(()),
            token_weights=keep.to(jsd.dtype),
            token_loss=(weight * jsd * shares).detach(),
            pair_nll=pair,
            mean_effect_logprob=pair.effect_logprob.sum() / count,
            mean_effect_prob=pair.effect_prob.sum() / count,
            share_above_threshold=((pair.effect_prob > self.threshold) & keep).sum() / count,
            weight_sum=keep.sum().to(jsd.dtype),
            num_tokens=num_tokens,
            num_sequences=num_sequences,
        )

    def _shares(
        self, labels: Tensor, ids: Tensor | None, items: float | Tensor | None, like: Tensor
    ) -> tuple[Tensor, int, int]:
        """Each row's factor in the mean, like `like` [n], and the numbers of rows and of sequences that count."""
        keep = labels != self.ignore_index
        ids = torch.zeros_like(labels) if ids is None else ids
        _, inverse, sizes = ids[keep].unique(return_inverse=True, return_counts=True)
        shares, count = like.new_zeros(labels.shape), int(keep.sum())
        if self.reduction == "token":
            shares[keep] = 1.0 / (count if items is None else items)
        else:
            shares[keep] = 1.0 / (sizes[inverse].to(like.dtype) * (len(sizes) if items is None else items))
        return shares, count, len(sizes)

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
        own = f"beta={self.beta}" + (f", alpha={self.alpha}" if self.alpha else "")
        return f"{own}, reduction={self.reduction!r}, impl={self.impl!r}, chunk_bytes={self.chunk_bytes}"


def _share(name: str, value: float) -> float:
    checked = check_number(name, value, low=0.0)
    if checked > 1:
        raise ArgumentError(f"{name}: expected a number from 0 to 1, got {value!r}")
    return checked
