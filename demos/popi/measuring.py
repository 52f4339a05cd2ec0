"""Measures on unseen users, and their results over all seeds.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from demos.kit.progress import Progress
from demos.popi.recipe import PopiRecipe
from demos.popi.training import SUMMARY_TOKENS, Prompts, popi_config, train_base, train_on_signals, train_popi
from demos.popi.world import PreferenceWorld, stated_share, write_summary
from nextquill.evaluation.bootstrap import PairedResult, bootstrap_interval, paired_difference
from nextquill.popi.evaluation import PairScore, placebo_summaries, score_pairs
from nextquill.popi.roles import GENERATOR, INFERENCE, Role
from nextquill.popi.summaries import summarize
from nextquill.popi.users import Draw, held_out

CONTEXTS = NONE, SIGNALS, UNUSED, BEFORE, SUMMARY, PLACEBO, TRUTH = (
    "no context",
    "raw signals",
    "raw signals, same generator",
    "summary before training",
    "summary",
    "another user's summary",
    "true preferences",
)
#: Contexts that are summaries by a model.
WRITTEN = (BEFORE, SUMMARY, PLACEBO)


@dataclass(frozen=True)
class SummarizedUser:
    """A test user: the preferences that only the world knows, and a summary in each of the contexts that have one."""

    user_id: str
    preferences: tuple[str, ...]
    summaries: Mapping[str, str]


@dataclass(frozen=True)
class PopiRun:
    """One seed: the scores of all pairs by context, in one order, the users, and what training logged at each step."""

    seed: int
    scores: Mapping[str, Sequence[PairScore]]
    users: Sequence[SummarizedUser]
    history: Sequence[Mapping[str, float]]

    def stated(self, context: str) -> list[float]:
        """By user, the share of the preferences that the context's summary states."""
        return [stated_share(user.summaries[context], user.preferences) for user in self.users]


@dataclass(frozen=True)
class Share:
    """A share over the users of all seeds with its interval of 95%, and in each seed."""

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...]

    @classmethod
    def of(cls, by_seed: Sequence[Sequence[float]], users: Sequence[str] | None = None) -> Share:
        """The share from each seed's values; `users` are their users, by default one for each value."""
        return cls(*bootstrap_interval(list(chain(*by_seed)), users), tuple(statistics.fmean(each) for each in by_seed))


@dataclass(frozen=True)
class ContextResult:
    """One context over all seeds: the share of pairs judged rightly, and the mean tokens that it adds to a prompt."""

    accuracy: Share
    context_tokens: float


@dataclass(frozen=True)
class PopiFigures:
    """The results over all seeds.

    Args:
        contexts: by name, in the order of `CONTEXTS`.
        summary_minus: the lead of the trained summary in accuracy over each other context, on the same pairs.
        stated: of each context that is a model's summary, the share of the users' preferences that it states.
        stated_gain: the share that the trained summary states minus the share before training.
    """

    contexts: Mapping[str, ContextResult]
    summary_minus: Mapping[str, PairedResult]
    stated: Mapping[str, Share]
    stated_gain: PairedResult


def measure(recipe: PopiRecipe, seed: int, progress: Progress) -> PopiRun:
    """Train the models of one seed, and score the pairs of users whom none has seen under every context."""
    world, prompts = PreferenceWorld(seed, recipe), Prompts()
    base = train_base(world, prompts, recipe, seed, progress)
    roles, history = train_popi(base, world, prompts, recipe, seed, progress)
    on_signals = train_on_signals(base, world, prompts, recipe, seed, progress)
    draws = [held_out(each.user, num_signals=recipe.signals) for each in world.test]
    loss = popi_config(recipe).loss

    def score(generator: Role, summaries: Mapping[str, str] | None) -> dict[str, list[PairScore]]:
        return score_pairs(generator, prompts.generator, draws, summaries, loss=loss, seed=seed)

    before = _summaries(Role.untrained(INFERENCE, base, prompts.tokenizer), prompts, draws)
    after = _summaries(roles.inference, prompts, draws)
    truth = {each.user.user_id: write_summary(tuple(each.preferences.values())) for each in world.test}
    reader = Role(GENERATOR, on_signals, prompts.tokenizer, None, base, frozen=True)
    trained = score(roles.generator, after)
    scores = {
        NONE: trained["none"],
        SIGNALS: score(reader, None)["signals"],
        UNUSED: trained["signals"],
        BEFORE: score(roles.generator, before)["summary"],
        SUMMARY: trained["summary"],
        # Where no summary says anything, another user's says no more than none.
        PLACEBO: trained.get("placebo", trained["none"]),
        TRUTH: score(roles.generator, truth)["summary"],
    }
    others = placebo_summaries(after, seed)
    users = [
        SummarizedUser(
            (name := each.user.user_id),
            tuple(each.preferences.values()),
            {BEFORE: before[name], SUMMARY: after[name], PLACEBO: others.get(name, "")},
        )
        for each in world.test
    ]
    return PopiRun(seed, scores, users, history)


def _summaries(role: Role, prompts: Prompts, draws: Sequence[Draw]) -> dict[str, str]:
    signals = {draw.user_id: draw.signals for draw in draws}
    written = summarize(role, prompts.inference, signals, max_new_tokens=SUMMARY_TOKENS, batch_size=64)
    return {each.user_id: each.text for each in written}


def figures(runs: Sequence[PopiRun]) -> PopiFigures:
    """Compute the results over all seeds."""
    users = [score.user_id for run in runs for score in run.scores[SUMMARY]]
    right = {name: [[score.accuracy for score in run.scores[name]] for run in runs] for name in CONTEXTS}
    stated = {name: [run.stated(name) for run in runs] for name in WRITTEN}
    tokens = {name: [score.context_tokens for run in runs for score in run.scores[name]] for name in CONTEXTS}

    def ahead(own: Sequence[Sequence[float]], other: Sequence[Sequence[float]], users: Any = None) -> PairedResult:
        return paired_difference(list(chain(*own)), list(chain(*other)), users)

    return PopiFigures(
        {name: ContextResult(Share.of(right[name], users), statistics.fmean(tokens[name])) for name in CONTEXTS},
        {name: ahead(right[SUMMARY], right[name], users) for name in CONTEXTS if name != SUMMARY},
        {name: Share.of(stated[name]) for name in WRITTEN},
        ahead(stated[SUMMARY], stated[BEFORE]),
    )
