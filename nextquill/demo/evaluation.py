"""What is measured on unseen users: every response under its own history, under none, and under another user's.

    effect_prob         = p(token | own history) − p(token | no history)
    effect_logprob      = nll without history − nll with it
    the placebo         = the same with *another user's* history in place of none

No loss trains on another user's history, so the placebo cannot be gamed: a loss that makes the no-history pass wrong
shows a large effect on generic tokens, and none under the placebo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nextquill.demo.training import Batch, hidden_states, make_batch
from nextquill.demo.world import World, histories_of_others
from nextquill.functional import linear_token_nll
from nextquill.outputs import PairNLL

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

EFFECT_THRESHOLD = 0.05


@dataclass(frozen=True)
class Metrics:
    """Means over the response tokens of the test users, in nats; `f1` and `exact_match` are fractions."""

    personal_nll: float
    generic_nll: float
    personal_nll_other: float
    generic_nll_other: float
    personal_nll_none: float
    generic_nll_none: float
    f1: float
    exact_match: float


@dataclass(frozen=True)
class TokenProbabilities:
    """p(label) for each response token, [N]: under the own history, none, and another user's."""

    own: Tensor
    none: Tensor
    other: Tensor


class TestSet:
    """The test users' responses, encoded once under the three histories."""

    __test__ = False  # not a test class, whatever its name

    def __init__(self, world: World) -> None:
        vocabulary, examples = world.vocabulary, world.test
        self.examples = examples
        self.own = make_batch(vocabulary, examples, [example.history for example in examples])
        self.none = make_batch(vocabulary, examples, [None] * len(examples))
        self.other = make_batch(vocabulary, examples, histories_of_others(examples))

    @torch.no_grad()
    def evaluate(self, model: LlamaForCausalLM) -> tuple[Metrics, TokenProbabilities]:
        """The figures of one model, and the probabilities of each token they come from."""
        batch, weight = self.own, model.lm_head.weight
        hidden_own = hidden_states(model, self.own)
        own = linear_token_nll(hidden_own, weight, batch.labels)
        none = linear_token_nll(hidden_states(model, self.none), weight, batch.labels)
        other = linear_token_nll(hidden_states(model, self.other), weight, batch.labels)
        effect_prob = PairNLL(own, none, effect=None).effect_prob
        personal = batch.personal
        metrics = Metrics(
            personal_nll=_mean(own[personal]),
            generic_nll=_mean(own[~personal]),
            personal_nll_other=_mean(other[personal]),
            generic_nll_other=_mean(other[~personal]),
            personal_nll_none=_mean(none[personal]),
            generic_nll_none=_mean(none[~personal]),
            f1=f1_score(effect_prob > EFFECT_THRESHOLD, personal),
            exact_match=exact_match(hidden_own @ weight.T, batch),
        )
        return metrics, TokenProbabilities(torch.exp(-own), torch.exp(-none), torch.exp(-other))


def f1_score(predicted: Tensor, truth: Tensor) -> float:
    """F1 = 2·TP / (predicted + true), over all tokens together; 0 where both are empty."""
    both = int((predicted & truth).sum())
    total = int(predicted.sum()) + int(truth.sum())
    return 2 * both / total if total else 0.0


def exact_match(logits: Tensor, batch: Batch) -> float:
    """Share of responses that greedy decoding would reproduce word for word.

    No decoding is needed: greedy decoding writes the reference exactly if and only if, given each prefix of the
    reference, the most probable next token is the reference's.
    """
    wrong = (logits.argmax(-1) != batch.labels).long()
    responses = int(batch.sequence_ids.max()) + 1
    mistakes = torch.zeros(responses, dtype=torch.long).index_add_(0, batch.sequence_ids, wrong)
    return float((mistakes == 0).double().mean())


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
