"""Measures how often a generator prefers its user's choice, and how much of that is due to the context it is given.

For a pair of responses y⁺ (chosen) and y⁻ (rejected) to a query x, and for each context c,

    r = [log p(y⁺ | x, c) − log p_ref(y⁺ | x)] − [log p(y⁻ | x, c) − log p_ref(y⁻ | x)]            (nats)

    none      c is empty                    the effect of training on people in general
    signals   the user's raw signals        all that is known about the user, at full length
    summary   the user's summary            the part of it that the summary keeps
    placebo   another user's summary        the effect of any summary; only an effect beyond it is personal

An objective that averages, as IPO does, takes the mean log-probability per token. p_ref is the generator before
training. It sees no context, unless the generator was trained against a reference that does. A pair counts as right if
r > 0, and as half right if r = 0. The same is measured for log p(y⁺ | x, c) − log p(y⁻ | x, c), without a reference. A
frozen model that reads the summaries (transfer) is its own reference, so its r without context is 0.

Pairs and signals come from `held_out`. Every draw is checked again: no signal may give a pair away. Intervals draw
whole users, and differences are paired: the same pairs under both contexts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from nextquill.data import Branch
from nextquill.errors import RecordError
from nextquill.evaluation.bootstrap import Interval, PairedResult, bootstrap_interval, paired_difference
from nextquill.evaluation.results import finite
from nextquill.evaluation.scoring import pad_token
from nextquill.popi.objective import PairLosses, PreferenceLoss
from nextquill.popi.passes import BranchPasses
from nextquill.popi.prompts import GeneratorPrompts
from nextquill.popi.roles import Role
from nextquill.popi.users import Draw, check_draw
from nextquill.ranks import deal
from nextquill.storage.manifests import with_digest

CONTEXTS = ("none", "signals", "summary", "placebo")
MEASURES = ("accuracy", "logprob_accuracy", "margin", "loss")
#: `progress(things, total=..., desc=...)` is iterated in place of the things, as `tqdm` is.
Progress = Callable[..., Iterable[Any]]
_Context = Mapping[str, Mapping[str, Any]]
# Pairs whose branches are scored in one call; users stay together, as their prompts begin alike.
_PAIRS_TOGETHER = 32
# Margins are compared after rounding: one that differs from 0 only by the order of sums counts as 0.
_DECIMALS = 6


@dataclass(frozen=True)
class PairScore:
    """One pair under one context.

    Args:
        index: its place among the user's evaluated pairs.
        margin: r, in nats, or in nats per token under an objective that averages, as IPO does.
        logprob_margin: the same without reference, in nats.
        loss: the loss of the run's objective.
        context_tokens: the number of tokens that the context adds to the prompt.
    """

    user_id: str
    index: int
    margin: float
    logprob_margin: float
    loss: float
    context_tokens: int

    @property
    def accuracy(self) -> float:
        """1 if the margin is above 0, one half if it is 0, else 0."""
        return _side(self.margin)

    @property
    def logprob_accuracy(self) -> float:
        """The same for the margin without reference."""
        return _side(self.logprob_margin)


def placebo_summaries(summaries: Mapping[str, str], seed: int = 0) -> dict[str, str]:
    """Return for every user the summary of another. Among users with a summary, each summary is used once.

    An empty summary is not used as a placebo. With fewer than two users who have a summary, there are no placebos.
    """
    donors = sorted(user for user, text in summaries.items() if text.strip())
    if len(donors) < 2:
        return {}
    random.Random(f"{seed}/popi placebo").shuffle(donors)
    found = {user: summaries[other] for user, other in zip(donors, donors[1:] + donors[:1], strict=True)}
    for place, user in enumerate(sorted(summaries.keys() - found.keys())):
        found[user] = summaries[donors[place % len(donors)]]
    return found


def score_pairs(
    generator: Role,
    prompts: GeneratorPrompts,
    draws: Sequence[Draw],
    summaries: Mapping[str, str] | None = None,
    *,
    loss: PreferenceLoss | None = None,
    reference_sees_context: bool = False,
    seed: int = 0,
    attention: str = "auto",
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[str, list[PairScore]]:
    """Score every pair under every context.

    Args:
        generator: the model that judges the pairs; it is left as it was.
        draws: one for each user, from `held_out`.
        summaries: the users' summaries; by default only "none" and "signals" are scored. "placebo" needs two users.
        loss: the run's objective; by default DPO with β = 0.1.
        seed: decides whose summary is the placebo.
        attention, max_tokens: see `BranchScorer`.

    Returns:
        The scores of all pairs in the draws' order, by context in the order of `CONTEXTS`.

    Raises:
        RecordError: there is no pair, a user comes twice or lacks a summary, a signal gives a pair away, or a
            log-probability is not finite.
        BudgetError: a pair does not fit into a prompt.
    """
    contexts = _contexts(draws, summaries, seed)
    blocks = list(_blocks(draws))
    policy = {name: [_branches(prompts, block, context) for block in blocks] for name, context in contexts.items()}
    seen = policy if reference_sees_context else {"none": policy["none"]}
    steps = (len(policy) + len(seen)) * sum(len(draw.pairs) for draw in draws)
    shown = iter(range(steps) if progress is None else progress(range(steps), total=steps, desc="Comparing pairs"))

    def counted(pairs: Tensor) -> Tensor:
        for _ in pairs:
            next(shown)
        return pairs

    def scored(state: AbstractContextManager[Any], wanted: Mapping[str, list[list[Branch]]]) -> dict[str, Tensor]:
        options: dict[str, Any] = {"attention": attention, "max_tokens": max_tokens}
        with state as model, closing(BranchPasses(model, pad_token(generator.tokenizer), **options)) as passes:

            def pairs(part: list[Branch]) -> list[Tensor]:
                return [passes.log_probs(part).view(-1, 2)]

            return {name: torch.cat([*map(counted, deal(parts, pairs))]) for name, parts in wanted.items()}

    # Each context is scored in calls of its own, in the same way for policy and reference. So if the two are the same
    # model, their log-probabilities agree to the last bit.
    found = scored(generator.active(), policy)
    reference = scored(generator.initial(), seen)
    next(shown, None)  # lets a bar close itself
    places = [(draw.user_id, index) for draw in draws for index in range(len(draw.pairs))]
    for name, values in (*found.items(), *reference.items()):
        _check_finite(values, name, places)
    bare = list(chain(*policy["none"]))
    lengths = torch.tensor([branch.response_length for branch in bare]).view(-1, 2)
    result: dict[str, list[PairScore]] = {}
    for name in contexts:
        base = reference[name if reference_sees_context else "none"]
        judged = (loss or PreferenceLoss())(found[name], base, lengths)
        pairs = zip(chain(*policy[name]), bare, strict=True)
        tokens = [branch.prompt_length - without.prompt_length for branch, without in pairs]
        result[name] = _scores(places, found[name], judged, tokens[::2])
    return result


def _contexts(draws: Sequence[Draw], summaries: Mapping[str, str] | None, seed: int) -> dict[str, _Context]:
    """The context of every user, by the context's name, as arguments of `GeneratorPrompts.branches`."""
    users = [draw.user_id for draw in draws]
    if not any(draw.pairs for draw in draws):
        raise RecordError("draws: expected at least one pair to evaluate, got none")
    if len(set(users)) < len(users):
        twice = next(user for user in users if users.count(user) > 1)
        raise RecordError(f"draws: expected every user once, got {twice!r} more often")
    for draw in draws:
        check_draw(draw)
    contexts: dict[str, _Context] = {
        "none": {user: {} for user in users},
        "signals": {draw.user_id: {"signals": draw.signals} for draw in draws},
    }
    if summaries is None:
        return contexts
    missing = [user for user in users if user not in summaries]
    if missing:
        raise RecordError(
            f"summaries: expected one for every user, got none for {len(missing)}, such as {missing[0]!r}"
        )
    own = {user: summaries[user] for user in users}
    for name, texts in (("summary", own), ("placebo", placebo_summaries(own, seed))):
        if texts:
            contexts[name] = {user: {"summary": text} for user, text in texts.items()}
    return contexts


def _blocks(draws: Sequence[Draw]) -> Iterator[list[Draw]]:
    """Yield the users to score together. The blocks depend on the draws alone, so results do not vary with contexts."""
    block: list[Draw] = []
    for draw in draws:
        if block and sum(len(each.pairs) for each in [*block, draw]) > _PAIRS_TOGETHER:
            yield block
            block = []
        block.append(draw)
    yield block


def _branches(prompts: GeneratorPrompts, block: Sequence[Draw], context: _Context) -> list[Branch]:
    pairs = [(draw.user_id, pair) for draw in block for pair in draw.pairs]
    return [branch for user, pair in pairs for branch in prompts.branches(pair, **context[user])]


def _check_finite(log_probs: Tensor, context: str, places: Sequence[tuple[str, int]]) -> None:
    """Raise RecordError for overflow or damaged weights, which would otherwise count as a wrong answer."""
    broken = (~log_probs.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if broken:
        user, index = places[broken[0]]
        raise RecordError(
            f"user {user!r}: expected finite log-probabilities of pairs[{index}] under {context!r}, got "
            f"{log_probs[broken[0]].tolist()}; {len(broken)} of {len(places)} pairs are affected"
        )


def _scores(
    places: Sequence[tuple[str, int]], policy: Tensor, judged: PairLosses, tokens: Sequence[int]
) -> list[PairScore]:
    columns = [_rounded(values) for values in (judged.margin, policy[:, 0] - policy[:, 1], judged.loss)]
    return [PairScore(*place, *rest) for place, *rest in zip(places, *columns, tokens, strict=True)]


def _rounded(values: Tensor) -> list[float]:
    return [round(value, _DECIMALS) + 0.0 for value in values.tolist()]  # never -0.0


def _side(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


# ---- measures with intervals ------------------------------------------------------------------------


@dataclass(frozen=True)
class ContextMeasures:
    """The measures of all pairs under one context.

    Args:
        measures: each of `MEASURES` with its interval: accuracy (the share of pairs with r above 0; r = 0 counts half),
            the same for log-probabilities without reference, the margin r (nats) and the objective's loss.
        context_tokens: the mean number of tokens that the context adds to a prompt.
    """

    measures: Mapping[str, Interval]
    context_tokens: float


@dataclass(frozen=True)
class PairMeasures:
    """The measures of one generator on the pairs of some users.

    Args:
        contexts: the measures by context, in the order of `CONTEXTS`.
        differences: accuracy and margin under the summary minus those under another context, by that context's name.
        token_ratio: the mean tokens of signals divided by the mean tokens of summaries; None if summaries add none.
    """

    pairs: int
    users: int
    contexts: Mapping[str, ContextMeasures]
    differences: Mapping[str, Mapping[str, PairedResult]]
    token_ratio: float | None

    def to_dict(self) -> dict[str, Any]:
        """The measures, ready for JSON; a bound is None if there is only one user."""
        return {
            "pairs": self.pairs,
            "users": self.users,
            "contexts": {
                name: {
                    **{measure: _bounds(value._asdict()) for measure, value in each.measures.items()},
                    "context_tokens": each.context_tokens,
                }
                for name, each in self.contexts.items()
            },
            "summary_minus": {
                name: {measure: _bounds(asdict(value)) for measure, value in each.items()}
                for name, each in self.differences.items()
            },
            "signals_tokens_by_summary_tokens": self.token_ratio,
        }


@dataclass(frozen=True, kw_only=True)
class PairEvaluation:
    """The result of `nextquill popi evaluate`: the run's folder, counts, and the measures of its generator.

    Args:
        left_out: the number of users that were left out, by reason.
        new_users: the number of users who were never trained on; None if it is not known.
        transfer: the measures of other, frozen generators that read the same summaries, by name.
    """

    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    new_users: int | None = None
    empty_summaries: int = 0
    generator: PairMeasures
    transfer: dict[str, PairMeasures] = field(default_factory=dict)

    def to_json(self) -> str:
        """The result as JSON, in the order of the fields, and a digest of it."""
        transfer = {name: each.to_dict() for name, each in self.transfer.items()}
        content = {**vars(self), "generator": self.generator.to_dict(), "transfer": transfer}
        return json.dumps(with_digest(content), indent=2, ensure_ascii=False) + "\n"


def measure(
    scores: Mapping[str, Sequence[PairScore]], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> PairMeasures:
    """Compute the measures from the scores of `score_pairs`, with intervals of `bootstrap_interval`.

    ArgumentError if there are no scores, or the contexts have different pairs.
    """
    options: dict[str, Any] = {"level": level, "resamples": resamples, "seed": seed}
    users = [score.user_id for score in next(iter(scores.values()))]

    def column(context: str, name: str) -> list[float]:
        return [getattr(score, name) for score in scores[context]]

    contexts = {
        context: ContextMeasures(
            {name: bootstrap_interval(column(context, name), users, **options) for name in MEASURES},
            sum(column(context, "context_tokens")) / len(users),
        )
        for context in scores
    }
    differences = {
        other: {
            name: paired_difference(column("summary", name), column(other, name), users, **options)
            for name in ("accuracy", "margin")
        }
        for other in scores
        if "summary" in scores and other != "summary"
    }
    return PairMeasures(len(users), len(set(users)), contexts, differences, _token_ratio(contexts))


def _token_ratio(contexts: Mapping[str, ContextMeasures]) -> float | None:
    if not {"signals", "summary"} <= contexts.keys() or not contexts["summary"].context_tokens:
        return None
    return contexts["signals"].context_tokens / contexts["summary"].context_tokens


def _bounds(values: dict[str, Any]) -> dict[str, Any]:
    return {name: finite(value) if isinstance(value, float) else value for name, value in values.items()}
