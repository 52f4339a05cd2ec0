"""Measures on unseen users: every response is scored under its own history, under none, and under another user's.

    effect_prob         = p(token | own history) − p(token | no history)
    effect_logprob      = nll without history − nll with it
    the placebo         = the same with *another user's* history in place of none

No loss trains on another user's history, so the placebo cannot be gamed: a loss that makes the no-history pass wrong
shows a large effect on generic tokens, and none under the placebo.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from demos.kit.figures import Spread
from demos.losses.training import Batch, hidden_states, make_batch, with_own_histories
from demos.losses.world import Example, histories_of_others
from nextquill.functional import linear_token_nll
from nextquill.outputs import PairNLL
from nextquill.report.data import ResponseView

BASE = "Base"
EFFECT_THRESHOLD = 0.05


@dataclass(frozen=True)
class LossRow:
    """One method at one checkpoint of one seed; all figures are means over the response tokens of the test users.

    Args:
        learning_rate: None for the base.
        personal_nll, generic_nll: in nats, with the own history; `_other` with another user's, `_none` without.
        f1: of effect_prob > 0.05 against the true personal tokens.
        exact_match: share of responses that greedy decoding reproduces word for word.
        seconds_per_step: the median over the steps without the first, which also pays for the optimizer's state.
        time_vs_sft: the median of the ratios to SFT's step *on the same batch*: a busy machine disturbs it much less.
    """

    seed: int
    method: str
    learning_rate: float | None
    step: int
    personal_nll: float
    generic_nll: float
    personal_nll_other: float
    generic_nll_other: float
    personal_nll_none: float
    generic_nll_none: float
    f1: float
    exact_match: float
    seconds_per_step: float | None = None
    time_vs_sft: float | None = None

    @property
    def generic_effect(self) -> float:
        """Effect of the history on generic tokens, in nats. Their words do not depend on the user: the truth is 0."""
        return self.generic_nll_none - self.generic_nll

    @property
    def generic_effect_placebo(self) -> float:
        """The same with another user's history in place of none."""
        return self.generic_nll_other - self.generic_nll


@dataclass(frozen=True)
class LossRun:
    """One seed: what happened before phase C, the rows of phase C, and responses to show."""

    seed: int
    reading_steps: int
    reading_accuracy: float
    rows: Sequence[LossRow] = ()
    responses: Sequence[ResponseView] = ()


class RowTable:
    """Look-up of a run's rows: one value for each seed, in the order of the seeds."""

    def __init__(self, rows: Sequence[LossRow]) -> None:
        self._rows = rows
        self.methods = list(dict.fromkeys(row.method for row in rows if row.method != BASE))

    def values(self, method: str, step: int, metric: str) -> list[Any]:
        """A metric in each seed."""
        return [getattr(row, metric) for row in self._rows if (row.method, row.step) == (method, step)]

    def spread(self, method: str, step: int, metric: str) -> Spread:
        """The mean and the range of these."""
        return Spread.of(self.values(method, step, metric))


class UnseenUsers:
    """The test users' responses, encoded once under the three histories."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.own = with_own_histories(examples)
        self.none = make_batch(examples, [None] * len(examples))
        self.other = make_batch(examples, histories_of_others(examples))

    @torch.no_grad()
    def measure(self, model: Any) -> tuple[dict[str, float], Tensor]:
        """The figures of a model as in `LossRow`; and p(label) of each token, [3, N]: own history, none, another's."""
        weight, labels, personal = model.lm_head.weight, self.own.labels, self.own.personal
        hidden = [hidden_states(model, batch) for batch in (self.own, self.none, self.other)]
        own, none, other = nlls = [linear_token_nll(each, weight, labels) for each in hidden]
        figures = {
            f"{kind}_nll{suffix}": float(nll[mask].double().mean())
            for kind, mask in (("personal", personal), ("generic", ~personal))
            for suffix, nll in (("", own), ("_none", none), ("_other", other))
        }
        effect_prob = PairNLL(own, none, effect=None).effect_prob
        figures["f1"] = f1_score(effect_prob > EFFECT_THRESHOLD, personal)
        figures["exact_match"] = exact_match(hidden[0] @ weight.T, self.own)
        return figures, torch.exp(-torch.stack(nlls))


def f1_score(predicted: Tensor, truth: Tensor) -> float:
    """F1 = 2·TP / (predicted + true), over all tokens together; 0 where both are empty."""
    total = int(predicted.sum() + truth.sum())
    return 2 * int((predicted & truth).sum()) / total if total else 0.0


def exact_match(logits: Tensor, batch: Batch) -> float:
    """Share of responses that greedy decoding would reproduce word for word.

    No decoding is needed: greedy decoding writes the reference exactly if and only if, given each prefix of the
    reference, the most probable next token is the reference's.
    """
    mistakes = torch.bincount(batch.sequence_ids, (logits.argmax(-1) != batch.labels).double())
    return float((mistakes == 0).double().mean())


def step_times(seconds: Sequence[float], sft_seconds: Sequence[float]) -> dict[str, float]:
    """The cost of a step of phase C, as in `LossRow`."""
    ratios = [own / sft for own, sft in zip(seconds, sft_seconds, strict=True)]
    skip = min(1, len(ratios) - 1)
    return {"seconds_per_step": statistics.median(seconds[skip:]), "time_vs_sft": statistics.median(ratios[skip:])}
