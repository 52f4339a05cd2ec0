"""What is measured on unseen users, and what it comes to over all seeds.

Every user's first pairs are signals, the others are judged. For each context that a generator is given, a pair counts
as judged rightly where the log-ratio margin against the base without context is on the user's side:

    NONE       no context                                             POPI's generator
    SIGNALS    the raw signals                                        a generator that was trained on them
    UNUSED     the raw signals                                        POPI's generator, which never saw any in training
    BEFORE     a summary by the inference model before training       POPI's generator
    SUMMARY    a summary by the trained inference model               POPI's generator
    PLACEBO    another user's summary by it                           POPI's generator
    TRUTH      the preferences themselves, worded as a summary        POPI's generator

Summaries are the inference model's likeliest text. What share of a user's hidden preferences they state is counted.
Intervals draw whole users, of all seeds together.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nextquill.evaluation.bootstrap import Interval, PairedResult, bootstrap_interval, paired_difference
from nextquill.popi.demo.recipe import Recipe
from nextquill.popi.demo.training import SUMMARY_TOKENS, Prompts, popi_config
from nextquill.popi.demo.world import DemoUser, stated_share, write_summary
from nextquill.popi.evaluation import PairScore, placebo_summaries, score_pairs
from nextquill.popi.roles import INFERENCE, Role, Roles
from nextquill.popi.summarizing import summarize
from nextquill.popi.users import Draw, held_out

NONE, SIGNALS, UNUSED, BEFORE, SUMMARY, PLACEBO, TRUTH = (
    "no context",
    "raw signals",
    "raw signals, same generator",
    "summary before training",
    "summary",
    "another user's summary",
    "true preferences",
)
CONTEXTS = (NONE, SIGNALS, UNUSED, BEFORE, SUMMARY, PLACEBO, TRUTH)
#: Contexts that are summaries by a model.
WRITTEN = (BEFORE, SUMMARY, PLACEBO)


@dataclass(frozen=True)
class TestUser:
    """A test user: the preferences that only the world knows, and a summary in each of the contexts that have one."""

    __test__ = False  # not a test class, whatever its name

    user_id: str
    preferences: tuple[str, ...]
    summaries: Mapping[str, str]


@dataclass(frozen=True)
class SeedRun:
    """One seed: the scores of all pairs by context, in one order, the users, and what training logged at each step."""

    seed: int
    scores: Mapping[str, Sequence[PairScore]]
    users: Sequence[TestUser]
    history: Sequence[Mapping[str, float]]

    def stated(self, context: str) -> list[float]:
        """By user, the share of the preferences that the context's summary states."""
        return [stated_share(user.summaries[context], user.preferences) for user in self.users]


@dataclass(frozen=True)
class Share:
    """A share over the users of all seeds with its interval of 95%, and in each seed."""

    all: Interval
    by_seed: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**self.all._asdict(), "by_seed": list(self.by_seed)}


@dataclass(frozen=True)
class ContextResult:
    """One context over all seeds.

    Args:
        accuracy: share of pairs judged rightly.
        context_tokens: mean tokens that it adds to a prompt.
    """

    accuracy: Share
    context_tokens: float


@dataclass(frozen=True)
class Measured:
    """What all seeds come to.

    Args:
        contexts: by name, in the order of `CONTEXTS`.
        summary_minus: what the trained summary is ahead of each other context in accuracy, on the same pairs.
        stated: of each context that is a model's summary, the share of the users' preferences that it states.
        stated_gain: that of the trained summary minus that before training.
    """

    contexts: Mapping[str, ContextResult]
    summary_minus: Mapping[str, PairedResult]
    stated: Mapping[str, Share]
    stated_gain: PairedResult

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {
            "contexts": {
                name: {"accuracy": each.accuracy.to_dict(), "context_tokens": each.context_tokens}
                for name, each in self.contexts.items()
            },
            "summary_minus": {name: asdict(each) for name, each in self.summary_minus.items()},
            "stated": {name: each.to_dict() for name, each in self.stated.items()},
            "stated_gain": asdict(self.stated_gain),
        }


@dataclass(frozen=True)
class _TrainedFrom:
    """A generator and the base that it was trained from, as `score_pairs` takes them."""

    model: Any
    base: Any
    tokenizer: Any

    @contextmanager
    def active(self) -> Iterator[Any]:
        yield self.model

    @contextmanager
    def initial(self) -> Iterator[Any]:
        with torch.no_grad():
            yield self.base


def measure_seed(
    seed: int,
    test: Sequence[DemoUser],
    prompts: Prompts,
    recipe: Recipe,
    base: Any,
    roles: Roles,
    on_signals: Any,
    history: Sequence[Mapping[str, float]],
) -> SeedRun:
    """Score the test users' pairs under every context.

    Args:
        test: users whom no model has seen.
        base: the model that all others were trained from.
        roles: what POPI made of it.
        on_signals: the generator that was trained on raw signals.
        history: what POPI logged.
    """
    draws = [held_out(each.user, num_signals=recipe.signals) for each in test]
    loss = popi_config(recipe).loss

    def score(generator: Any, summaries: Mapping[str, str] | None) -> dict[str, list[PairScore]]:
        return score_pairs(generator, prompts.generator, draws, summaries, loss=loss, seed=seed)

    before = _summaries(Role(INFERENCE, base, prompts.tokenizer, None, None, frozen=True), prompts, draws)
    after = _summaries(roles.inference, prompts, draws)
    truth = {each.user.user_id: write_summary(tuple(each.preferences.values())) for each in test}
    trained = score(roles.generator, after)
    scores = {
        NONE: trained["none"],
        SIGNALS: score(_TrainedFrom(on_signals, base, prompts.tokenizer), None)["signals"],
        UNUSED: trained["signals"],
        BEFORE: score(roles.generator, before)["summary"],
        SUMMARY: trained["summary"],
        # Where no summary says anything, another user's says no more than none.
        PLACEBO: trained.get("placebo", trained["none"]),
        TRUTH: score(roles.generator, truth)["summary"],
    }
    others = placebo_summaries(after, seed)
    users = [
        TestUser(
            (name := each.user.user_id),
            tuple(each.preferences.values()),
            {BEFORE: before[name], SUMMARY: after[name], PLACEBO: others.get(name, "")},
        )
        for each in test
    ]
    return SeedRun(seed, scores, users, history)


def _summaries(role: Role, prompts: Prompts, draws: Sequence[Draw]) -> dict[str, str]:
    signals = {draw.user_id: draw.signals for draw in draws}
    written = summarize(role, prompts.inference, signals, max_new_tokens=SUMMARY_TOKENS, batch_size=64)
    return {each.user_id: each.text for each in written}


def measure(runs: Sequence[SeedRun]) -> Measured:
    """What all seeds come to."""
    pairs = [score.user_id for run in runs for score in run.scores[SUMMARY]]
    right = {name: [score.accuracy for run in runs for score in run.scores[name]] for name in CONTEXTS}
    stated = {name: [share for run in runs for share in run.stated(name)] for name in WRITTEN}
    contexts = {
        name: ContextResult(
            Share(
                bootstrap_interval(right[name], pairs),
                tuple(statistics.fmean(score.accuracy for score in run.scores[name]) for run in runs),
            ),
            statistics.fmean(score.context_tokens for run in runs for score in run.scores[name]),
        )
        for name in CONTEXTS
    }
    shares = {
        name: Share(bootstrap_interval(stated[name]), tuple(statistics.fmean(run.stated(name)) for run in runs))
        for name in WRITTEN
    }
    minus = {name: paired_difference(right[SUMMARY], right[name], pairs) for name in CONTEXTS if name != SUMMARY}
    return Measured(contexts, minus, shares, paired_difference(stated[SUMMARY], stated[BEFORE]))
