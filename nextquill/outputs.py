"""The results of operators and losses: plain records of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class PairNLL(NamedTuple):
    """Per-token negative log-likelihoods of a factual / counterfactual pair of passes.

    In nats, with logits `z1` (with the user's history), `z0` (without) and label `y`; float32 or float64, in the shape
    of the labels, exactly 0 where the label is ignored:

        factual        = logsumexp(z1) - z1[y]
        counterfactual = logsumexp(z0) - z0[y]
        effect         = logsumexp(z1 - z0) - (z1 - z0)[y]

    A field that was not computed is `None`: a loss of one stream has no counterfactual, and a loss without an effect
    term computes `effect` only if `compute()` is asked for it.
    """

    factual: Tensor
    counterfactual: Tensor | None
    effect: Tensor | None

    @property
    def effect_logprob(self) -> Tensor:
        """log p(y | history) - log p(y), the pointwise information PerCE calls PIR; labels' shape, in nats."""
        return self._counterfactual() - self.factual

    @property
    def effect_prob(self) -> Tensor:
        """p(y | history) - p(y), NextQuill's causal effect of the history on the token; labels' shape, in [-1, 1]."""
        return (-self.factual).exp() - (-self._counterfactual()).exp()

    def _counterfactual(self) -> Tensor:
        if self.counterfactual is None:
            raise AttributeError("this PairNLL has no counterfactual: it was computed from one stream only")
        return self.counterfactual


class PairStats(NamedTuple):
    """Per token: the pair's likelihoods, how far the history moves the distribution, and how sure the model is.

    kl = KL(p1 ‖ p0)        entropy = - Σ p1 log p1        (nats)

    All are float32 or float64, in the labels' shape, and 0 where the label is ignored.
    """

    pair_nll: PairNLL
    kl: Tensor
    entropy: Tensor


class AnchorRows(NamedTuple):
    """The rows of a response of its own beside a loss's pairs, for a likelihood term on them.

    Attributes:
        hidden_states: [m, D], floating, at the predicting positions.
        labels: [m], integers; a row with the loss's `ignore_index` does not count.
        sequence_ids: [m], integers, the sequence of each row, numbered as those of the pairs.
    """

    hidden_states: Tensor
    labels: Tensor
    sequence_ids: Tensor


@dataclass(frozen=True)
class PreferenceLossOutput:
    """A loss, its terms, and diagnostics to watch during training.

    Tensors are float32, or float64 for float64 inputs. Only `loss` carries a gradient. The terms add up under the
    loss's own reduction:

        loss = factual + alpha * effect + anchor * counterfactual

    Attributes:
        loss: scalar, the training objective, in nats like each of its terms.
        factual: scalar, the (weighted) cross-entropy with the history.
        effect: scalar, the cross-entropy of the effect logits before `alpha`; 0 when the loss has no such term.
        counterfactual: scalar, the mean nll without history before `anchor`; 0 when there is no counterfactual. If it
            rises during training, the no-history pass is being made wrong.
        token_weights: the weights, labels' shape, 0 where ignored, no gradient; no unit.
        token_loss: each token's share of `loss`, labels' shape; sums to `loss`.
        pair_nll: per-token NLLs, labels' shape, in nats.
        mean_effect_logprob: scalar, mean of `effect_logprob` over supervised tokens, in nats.
        mean_effect_prob: scalar, mean of `effect_prob` over supervised tokens.
        share_above_threshold: scalar, share of supervised tokens whose `effect_prob` exceeds the loss's threshold.
        weight_sum: scalar, sum of the token weights.
        num_tokens: supervised tokens in this call.
        num_sequences: sequences with at least one supervised token in this call; 1 under reduction="micro_batch".
    """

    loss: Tensor
    factual: Tensor
    effect: Tensor
    counterfactual: Tensor
    token_weights: Tensor
    token_loss: Tensor
    pair_nll: PairNLL
    mean_effect_logprob: Tensor
    mean_effect_prob: Tensor
    share_above_threshold: Tensor
    weight_sum: Tensor
    num_tokens: int
    num_sequences: int
