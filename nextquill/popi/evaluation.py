"""Is a generator on the user's side, and does what it is told of the user make it so?

For a pair of responses y⁺ (chosen) and y⁻ (rejected) to a query x, and for each context c,

    r = [log p(y⁺ | x, c) − log p_ref(y⁺ | x)] − [log p(y⁻ | x, c) − log p_ref(y⁻ | x)]            (nats)

    none      c is empty                    what training taught about people in general
    signals   the user's raw signals        what there is to know, at its full length
    summary   the user's summary            what is left of it
    placebo   another user's summary        what any summary does; only what exceeds it is personal

Under an objective that averages, as IPO does, r is of means per token. p_ref is the generator before training, and sees
no context, unless it was trained against one that does. A pair is judged rightly where r > 0, and half so where r = 0.
The same is asked of log p(y⁺ | x, c) − log p(y⁻ | x, c), without a reference. A frozen model, to which summaries are
transferred, is its own reference, so that its r without context is 0.

What is evaluated is of `held_out`, and every draw is checked again: a pair is never among the signals.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextquill.data import Branch
from nextquill.errors import RecordError
from nextquill.evaluation.scoring import BranchScorer, pad_token
from nextquill.popi.objective import PairLosses, PreferenceLoss
from nextquill.popi.prompts import GeneratorPrompts
from nextquill.popi.roles import Role
from nextquill.popi.users import Draw, Pair, check_draw

CONTEXTS = ("none", "signals", "summary", "placebo")
#: `progress(things, total=..., desc=...)` is iterated instead of the things; `tqdm` fits.
Progress = Callable[..., Iterable[Any]]
# Pairs whose branches are scored in one call; users stay together, as their prompts begin alike.
_PAIRS_TOGETHER = 32
# Margins are compared after rounding: what is 0 but for the order of sums counts as 0.
_DECIMALS = 6


@dataclass(frozen=True)
class PairScore:
    """One pair under one context.

    Args:
        user_id: whose pair it is.
        index: its place among the user's evaluated pairs.
        margin: r, in nats, or nats a token where the objective averages, as IPO does.
        logprob_margin: the same without reference, in nats.
        loss: of the run's objective.
        context_tokens: what the context adds to the prompt.
    """

    user_id: str
    index: int
    margin: float
    logprob_margin: float
    loss: float
    context_tokens: int

    @property
    def accuracy(self) -> float:
        """1 where the margin is on the user's side, 0 where it is not, a half where it is 0."""
        return _side(self.margin)

    @property
    def logprob_accuracy(self) -> float:
        """The same without reference."""
        return _side(self.logprob_margin)


def placebo_summaries(summaries: Mapping[str, str], seed: int = 0) -> dict[str, str]:
    """For every user the summary of another, each non-empty summary serving once among those that have one.

    Args:
        summaries: by user; empty ones are nobody's placebo.
        seed: same seed, same users: same placebos.

    Returns:
        By user; empty where fewer than two users have a summary.
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
    """Score every pair of the draws under every context there is.

    Args:
        generator: what judges the pairs; given back as it was.
        prompts: makes its prompts, with its tokenizer.
        draws: of `held_out`, one a user.
        summaries: the users' summaries; without, only "none" and "signals" are scored. "placebo" needs two users.
        loss: the run's objective; DPO with β = 0.1 where none is given.
        reference_sees_context: whether the reference has the context too.
        seed: decides whose summary serves as placebo.
        attention, max_tokens: see `BranchScorer`.
        progress: iterated in place of what takes time.

    Returns:
        By context, in the order of `CONTEXTS`, the scores of all pairs, in the draws' order.

    Raises:
        RecordError: there is no pair, a user comes twice or lacks a summary, a signal gives a pair away, or a
            log-probability is no finite number.
        BudgetError: a pair does not fit into a prompt.
    """
    contexts = _contexts(draws, summaries, seed)
    blocks = list(_blocks(draws))
    policy = {name: [_branches(prompts, block, context) for block in blocks] for name, context in contexts.items()}
    seen = policy if reference_sees_context else {"none": policy["none"]}
    steps = (len(policy) + len(seen)) * sum(len(draw.pairs) for draw in draws)
    shown = _Shown(progress, steps)

    def scored(state: AbstractContextManager[Any], wanted: Mapping[str, list[list[Branch]]]) -> dict[str, Tensor]:
        pad = pad_token(generator.tokenizer)
        with state as model, BranchScorer(model, pad, attention=attention, max_tokens=max_tokens) as scorer:
            return {
                name: torch.cat([shown(_log_probs(scorer, part)) for part in parts]) for name, parts in wanted.items()
            }

    # Contexts are scored in calls of their own, alike for policy and reference: where the two are the same model, their
    # margins are the same to the last bit.
    with shown:
        found = scored(generator.active(), policy)
        reference = scored(generator.initial(), seen)
    places = [(draw.user_id, index) for draw in draws for index in range(len(draw.pairs))]
    for name, values in (*found.items(), *reference.items()):
        _check_finite(values, name, places)
    bare = _prompt_lengths(policy["none"])
    lengths = torch.tensor([branch.response_length for part in policy["none"] for branch in part]).view(-1, 2)
    result: dict[str, list[PairScore]] = {}
    for name in contexts:
        base = reference[name if reference_sees_context else "none"]
        judged = (loss or PreferenceLoss())(found[name], base, lengths)
        tokens = [own - without for own, without in zip(_prompt_lengths(policy[name]), bare, strict=True)]
        result[name] = _scores(places, found[name], judged, tokens)
    return result


@dataclass(frozen=True)
class _Context:
    """What the generator is told of each user: signals, or a text, or neither."""

    signals: bool = False
    texts: Mapping[str, str] | None = None

    def of(self, draw: Draw) -> dict[str, Any]:
        """The arguments of `GeneratorPrompts` that say it."""
        if self.signals:
            return {"signals": draw.signals}
        text = "" if self.texts is None else self.texts[draw.user_id]
        return {"summary": text} if text.strip() else {}


def _contexts(draws: Sequence[Draw], summaries: Mapping[str, str] | None, seed: int) -> dict[str, _Context]:
    users = [draw.user_id for draw in draws]
    if not any(draw.pairs for draw in draws):
        raise RecordError("draws: expected at least one pair to evaluate, got none")
    if len(set(users)) < len(users):
        twice = next(user for user in users if users.count(user) > 1)
        raise RecordError(f"draws: expected every user once, got {twice!r} more often")
    for draw in draws:
        check_draw(draw)
    contexts = {"none": _Context(), "signals": _Context(signals=True)}
    if summaries is None:
        return contexts
    missing = [user for user in users if user not in summaries]
    if missing:
        raise RecordError(
            f"summaries: expected one for every user, got none for {len(missing)}, such as {missing[0]!r}"
        )
    own = {user: summaries[user] for user in users}
    contexts["summary"] = _Context(texts=own)
    others = placebo_summaries(own, seed)
    return contexts | {"placebo": _Context(texts=others)} if others else contexts


def _blocks(draws: Sequence[Draw]) -> Iterator[list[Draw]]:
    """Users to score together; what is computed together follows from the draws alone."""
    block: list[Draw] = []
    for draw in draws:
        if block and sum(len(each.pairs) for each in [*block, draw]) > _PAIRS_TOGETHER:
            yield block
            block = []
        block.append(draw)
    yield block


def _branches(prompts: GeneratorPrompts, block: Sequence[Draw], context: _Context) -> list[Branch]:
    pairs: list[tuple[Draw, Pair]] = [(draw, pair) for draw in block for pair in draw.pairs]
    return [branch for draw, pair in pairs for branch in prompts.branches(pair, **context.of(draw))]


def _log_probs(scorer: BranchScorer, branches: Sequence[Branch]) -> Tensor:
    """float64 [pairs, 2], log p of chosen and rejected, of branches that stand in pairs."""
    return torch.stack([-nll.double().sum() for nll in scorer(branches)]).view(-1, 2)


def _check_finite(log_probs: Tensor, context: str, places: Sequence[tuple[str, int]]) -> None:
    """Refuse what would count as a wrong answer: precision that overflowed, or damaged weights."""
    broken = (~log_probs.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if broken:
        user, index = places[broken[0]]
        raise RecordError(
            f"user {user!r}: expected finite log-probabilities of pairs[{index}] under {context!r}, got "
            f"{log_probs[broken[0]].tolist()}; so it is with {len(broken)} of {len(places)} pairs"
        )


def _prompt_lengths(parts: Sequence[Sequence[Branch]]) -> list[int]:
    """Tokens of each pair's prompt."""
    return [branch.prompt_length for part in parts for branch in part[::2]]


def _scores(
    places: Sequence[tuple[str, int]], policy: Tensor, judged: PairLosses, tokens: Sequence[int]
) -> list[PairScore]:
    columns = [_rounded(values) for values in (judged.margin, policy[:, 0] - policy[:, 1], judged.loss)]
    return [PairScore(*place, *rest) for place, *rest in zip(places, *columns, tokens, strict=True)]


def _rounded(values: Tensor) -> list[float]:
    return [round(value, _DECIMALS) + 0.0 for value in values.tolist()]  # never -0.0


def _side(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


class _Shown:
    """Counts pairs under contexts on a progress bar, or on none."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._steps = None if progress is None else iter(progress(range(total), total=total, desc="Comparing pairs"))

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *error: object) -> None:
        if self._steps is not None:
            next(self._steps, None)  # lets a bar close itself

    def __call__(self, scored: Tensor) -> Tensor:
        if self._steps is not None:
            for _ in range(len(scored)):
                next(self._steps)
        return scored
