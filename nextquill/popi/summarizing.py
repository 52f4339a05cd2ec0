"""Summaries of many users by a trained inference model, and the signals that they are made of.

For use, a summary is of everything that is known of a user. To be judged, it is of what comes first, and its user's
later pairs are what it is judged on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nextquill.data import HistoryItem
from nextquill.errors import RecordError
from nextquill.evaluation.generation import Prompt
from nextquill.popi.prompts import InferencePrompts, tidy_summary
from nextquill.popi.roles import Role
from nextquill.popi.rollouts import ModelRollouts
from nextquill.popi.users import Draw, User, check_draw, held_out
from nextquill.storage.fingerprints import seed_of

#: A summary of a single signal repeats it; a user of whom no more is known is left out.
LEAST_SIGNALS = 2


@dataclass(frozen=True)
class HeldOut:
    """What users are evaluated on.

    Args:
        draws: by user, first signals and later pairs; every one has both.
        no_pairs, few_signals: users that are left out: without a pair, and with too few signals beside their pairs.
    """

    draws: tuple[Draw, ...]
    no_pairs: tuple[str, ...] = ()
    few_signals: tuple[str, ...] = ()

    @property
    def left_out(self) -> dict[str, int]:
        """How many users are left out, by the reason."""
        return {"no_pairs": len(self.no_pairs), "few_signals": len(self.few_signals)}

    def __str__(self) -> str:
        pairs = sum(len(draw.pairs) for draw in self.draws)
        parts = [f"{len(self.draws)} users, {pairs} pairs"]
        for ids, why in ((self.no_pairs, "without pairs"), (self.few_signals, "with too few signals")):
            if ids:
                parts.append(f"{len(ids)} left out {why}, such as {ids[0]!r}")
        return "; ".join(parts)


def hold_out(users: Sequence[User], *, num_signals: int, max_pairs: int | None = None) -> HeldOut:
    """`held_out` of every user who can be evaluated: with a pair, and two signals (one, where one is asked for).

    Raises:
        RecordError: nobody can; the message says why.
        ArgumentError: a number below 1.
    """
    least = min(LEAST_SIGNALS, num_signals)
    draws = [held_out(user, num_signals=num_signals, max_pairs=max_pairs) for user in users if user.pairs]
    found = HeldOut(
        tuple(draw for draw in draws if len(draw.signals) >= least),
        tuple(user.user_id for user in users if not user.pairs),
        tuple(draw.user_id for draw in draws if len(draw.signals) < least),
    )
    if not found.draws:
        raise RecordError(f"users: expected some with pairs and signals beside them, got none: {found}")
    for draw in found.draws:
        check_draw(draw)
    return found


def all_signals(user: User, *, num_signals: int) -> tuple[HistoryItem, ...]:
    """The newest of everything that is known of a user, pairs as items; these come last where times are unknown."""
    items = [*user.items, *(pair.as_item() for pair in user.pairs)]
    times = [item.timestamp for item in items if item.timestamp is not None]
    if len(times) == len(items):
        items = [items[place] for place in sorted(range(len(items)), key=times.__getitem__)]
    return tuple(items[-num_signals:])


class Written(NamedTuple):
    """A summary by the inference model.

    Args:
        user_id: whose it is.
        text: may be empty.
        tokens: how many it took.
        ended: whether it came to an end within its budget.
    """

    user_id: str
    text: str
    tokens: int
    ended: bool


def summarize(
    role: Role,
    prompts: InferencePrompts,
    signals: Mapping[str, Sequence[HistoryItem]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
) -> Iterator[Written]:
    """Yield each user's summary, in batches as they are written, longest prompts first.

    Args:
        role: the inference model; given back as it was.
        prompts: makes its prompts, with its tokenizer.
        signals: by user, oldest first.
        max_new_tokens: longest summary.
        temperature: 0 for the likeliest text; above, a sample whose seed follows from `seed` and the user alone.
        seed: of samples.
        batch_size: users at a time.

    Raises:
        BudgetError: not even the newest signal of a user fits into the prompt; found before any is written.
        ArgumentError: a number that cannot be.
    """
    rollouts = ModelRollouts(
        role.model,
        role.tokenizer,
        prompts.stop_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
    )
    users = list(signals)
    for user in users:
        prompts.check(user, signals[user])
    asked = [
        Prompt(place, prompts.ids(signals[user])[0], seed_of(seed, "summarize", user))
        for place, user in enumerate(users)
    ]
    asked.sort(key=lambda prompt: (-len(prompt.ids), prompt.index))
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        with role.active():
            samples = rollouts.sample(batch)
        for prompt, sample in zip(batch, samples, strict=True):
            tokens = len(sample.ids) - sample.ended
            yield Written(users[prompt.index], tidy_summary(sample.text), tokens, sample.ended)
