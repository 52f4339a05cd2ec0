"""MIRROR's loss: the divergence of the student from the teacher on the student's own responses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.functional import linear_pair_jsd, linear_pair_nll
from nextquill.losses import PairLoss, SFTLoss
from nextquill.outputs import PreferenceLossOutput
from nextquill.vocabulary_shard import VocabularyShard
from nextquill.weighting import UniformWeighting, check_number


class MirrorLoss(PairLoss):
    """The generalised Jensen-Shannon divergence of teacher and student (MIRROR, arXiv 2610.09795).

    With p1 the student's distribution, p0 the teacher's, a constant, and m = beta·p0 + (1 - beta)·p1, per token

        jsd = beta·KL(p0 ‖ m) + (1 - beta)·KL(p1 ‖ m)

    and its mean over a response, then over responses. The labels are the sampled responses: they say which rows count,
    and the likelihoods among the diagnostics are theirs. `factual` is the student, `counterfactual` the teacher.

    Args:
        beta: weight of the teacher in the mixture, in [0, 1]; 0 is KL(p0 ‖ p1), 1 is KL(p1 ‖ p0).
        options: reduction ("sequence" or "token"), ignore_index, softcap, logit_scale, impl, chunk_bytes, as in
            `PairLoss`.

    Raises:
        ArgumentError, ArgumentTypeError: an argument does not fit; the message names it.
    """

    #: Student and teacher begin with the same history and query, which are most of their tokens.
    joins_forwards = True

    def __init__(self, beta: float = 0.5, **options: Any) -> None:
        super().__init__(UniformWeighting(), detach_counterfactual=True, **options)
        if self.reduction == "micro_batch":
            raise ArgumentError("reduction: expected 'sequence' or 'token', got 'micro_batch'")
        self.beta = check_number("beta", beta, low=0.0)
        if self.beta > 1:
            raise ArgumentError(f"beta: expected a number from 0 to 1, got {beta!r}")

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """Return the loss of a batch, a float32 (float64) scalar in nats; arguments as in `PairLoss.forward`."""
        return self.compute(*arguments, **options).loss

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
        """Compute the loss, and the likelihoods of the sampled tokens under student and teacher.

        Args:
            hidden_factual, hidden_counterfactual: [N, D], final hidden states of student and teacher at the predicting
                positions; the second gets no gradient.
            lm_head_weight, labels, bias, sequence_ids, num_items_in_batch: as in `PairLoss.forward`, with labels [N].
            token_weights: None (of no shape or dtype); the divergence has no token weights.
            effect_nll: compute `pair_nll.effect`.
        """
        if hidden_counterfactual is None:
            raise ArgumentTypeError("hidden_counterfactual: MirrorLoss expects the teacher's hidden states, got None")
        if token_weights is not None:
            raise ArgumentError("token_weights: expected None, as the divergence has no token weights")
        teacher = hidden_counterfactual.detach()
        options: dict[str, Any] = {
            "bias": bias,
            "ignore_index": self.ignore_index,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "impl": self.impl,
            "chunk_bytes": self.chunk_bytes,
        }
        jsd = linear_pair_jsd(hidden_factual, teacher, lm_head_weight, labels, beta=self.beta, **options)
        with torch.no_grad():
            pair = linear_pair_nll(hidden_factual, teacher, lm_head_weight, labels, **options)
        keep = labels != self.ignore_index
        count = int(keep.sum())
        ids = torch.zeros_like(labels) if sequence_ids is None else sequence_ids
        _, inverse, sizes = ids[keep].unique(return_inverse=True, return_counts=True)
        share = jsd.new_zeros(labels.shape)
        if self.reduction == "token":
            share[keep] = 1.0 / (count if num_items_in_batch is None else num_items_in_batch)
        else:
            items = len(sizes) if num_items_in_batch is None else num_items_in_batch
            share[keep] = 1.0 / (sizes[inverse].to(jsd.dtype) * items)
        loss = (jsd * share).sum()
        zero, token_loss = loss.new_zeros(()), (jsd * share).detach()
        return PreferenceLossOutput(
            loss=loss,
            factual=loss.detach(),
            effect=zero,
            counterfactual=zero,
            token_weights=keep.to(jsd.dtype),
            token_loss=token_loss,
            pair_nll=pair if effect_nll else pair._replace(effect=None),
            mean_effect_logprob=pair.effect_logprob.sum() / max(1, count),
            mean_effect_prob=pair.effect_prob.sum() / max(1, count),
            share_above_threshold=((pair.effect_prob > self.threshold) & keep).sum() / max(1, count),
            weight_sum=keep.sum().to(jsd.dtype),
            num_tokens=count,
            num_sequences=len(sizes),
        )

    @property
    def scoring(self) -> PairLoss:
        """The loss of people's own texts in an evaluation, where there is no teacher: their likelihood."""
        names = ("reduction", "ignore_index", "softcap", "logit_scale", "impl", "chunk_bytes")
        return SFTLoss(**{name: getattr(self, name) for name in names})

    def extra_repr(self) -> str:
        """Return the settings that `repr` shows."""
        return f"beta={self.beta}, reduction={self.reduction!r}, impl={self.impl!r}, chunk_bytes={self.chunk_bytes}"
