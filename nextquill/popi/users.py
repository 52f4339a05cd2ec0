"""Users with their preference pairs, and what of a user is shown where.

A summary is made from a user's *signals* and judged on *pairs* of the same user. A signal is an item of the user's own:
a past text, or another pair rendered as text. What stands in the signals must not answer the pairs, so every draw
leaves out the signals that give one of its pairs away:

    the query       the signal is about the pair's own query
    an answer       one of the pair's two texts is the signal, or stands in it as lines of its own, behind the label of
                    a rendered pair or without; a text of 24 characters or more is found anywhere in it, and a signal
                    of as many, such as a copy that was cut, anywhere in the answer

all but for case, white space, quotation marks and how characters are composed. Short answers ("yes") that many pairs
share therefore rule each other out. A draw is made from one `User` alone, so nothing of another user's can be in it.

Training draws pairs and signals at random (`draw`); evaluation shows what came first and asks about the rest
(`held_out`).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from nextquill.data._checks import check_integer
from nextquill.data.records import HistoryItem, Record, check_response, check_text
from nextquill.data.skipped import PlacedError, SkippedRecords, skip_or_raise
from nextquill.errors import ArgumentError, RecordError
from nextquill.popi.text_overlap import folded, holds

#: A summary of a single signal repeats it; a user of whom no more is known is left out.
_LEAST_SIGNALS = 2
_SHOWN = 5
# A query with and without these is the same.
_ENDS = " .:?!"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one query, and which of them the user prefers.

    Args:
        query: what was asked; may be empty.
        chosen, rejected: the answer that the user prefers, and the other one.
        timestamp: seconds since the epoch, or None where unknown.
    """

    query: str
    chosen: str
    rejected: str
    timestamp: float | None = None

    def as_item(self) -> HistoryItem:
        """The pair as a past text, worded as the loader of preferences words it."""
        text = f"Preferred: {self.chosen}\nNot preferred: {self.rejected}"
        return HistoryItem(text, title=self.query or None, timestamp=self.timestamp)


@dataclass(frozen=True, slots=True)
class User:
    """One user: pairs to learn from and to be measured on, and other texts.

    Args:
        user_id: who it is.
        pairs: the user's pairs, in their order.
        items: past texts that are no pairs of these, oldest first.
        summary: a summary that was given, for the supervised warm start, or None.
        since: for each item without a timestamp the index of the pair that it was known before, as its record's history
            has it, and -1 for what was always known; empty where all was.
    """

    user_id: str
    pairs: tuple[Pair, ...]
    items: tuple[HistoryItem, ...] = ()
    summary: str | None = None
    since: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Draw:
    """Pairs of one user, and signals of that user which give none of them away.

    Args:
        user_id: whose they are.
        signals: oldest first.
        pairs: what a summary of the signals is judged on.
    """

    user_id: str
    signals: tuple[HistoryItem, ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class UserCounts:
    """Which users can be drawn from; see `check_users`.

    Args:
        users: those that can, in their order.
        no_pairs: the ids of those without any pair, which are left out.
        few_signals: the ids of those with too few signals beside a pair, which are left out.
        short: the ids of those in `users` with fewer pairs or signals than were asked for.
    """

    users: tuple[User, ...]
    no_pairs: tuple[str, ...] = ()
    few_signals: tuple[str, ...] = ()
    short: tuple[str, ...] = ()

    @property
    def skipped(self) -> int:
        """How many users are left out."""
        return len(self.no_pairs) + len(self.few_signals)

    def __str__(self) -> str:
        parts = [f"{len(self.users)} of {len(self.users) + self.skipped} users can be drawn from"]
        if self.no_pairs:
            parts.append(f"{len(self.no_pairs)} left out without pairs ({_listed(self.no_pairs)})")
        if self.few_signals:
            parts.append(f"{len(self.few_signals)} left out with too few signals ({_listed(self.few_signals)})")
        if self.short:
            parts.append(f"{len(self.short)} with fewer pairs or signals than asked for ({_listed(self.short)})")
        return "; ".join(parts)


# ---- from records -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Gathered:
    pairs: dict[tuple[str, str, str], Pair] = field(default_factory=dict)
    places: dict[tuple[str, str, str], int] = field(default_factory=dict)
    items: dict[tuple[str | None, str], HistoryItem] = field(default_factory=dict)
    before: dict[tuple[str | None, str], list[int]] = field(default_factory=dict)  # the pairs that have it as history
    summary: str | None = None


def users_from_records(
    records: Iterable[Record], skipped: SkippedRecords | None = None, *, need_pairs: bool = True
) -> list[User]:
    """Gather the records of each user.

    A record with `chosen` and `rejected` in its `extra` is a pair; the response of one without is an item. The items of
    a user are the union of the histories of all their records and these. Pairs and items that repeat are kept once, and
    an item that renders one of the user's pairs is left out, as the pair stands for it. Where all have timestamps, both
    are sorted by them.

    Args:
        records: as `load_records` returns them.
        skipped: takes note of bad records, which are left out; None makes the first of them an error.
        need_pairs: whether there has to be a pair; to be summarised, a user needs none.

    Returns:
        The users, in the order in which their first records stand; some may be without pairs.

    Raises:
        RecordError: a record has half a pair, two equal texts for one, a pair or summary that is no text, or a summary
            other than the user's before; or there is no pair at all, where one is needed, or no record.
    """
    gathered: dict[str, _Gathered] = {}
    for position, record in enumerate(records):
        try:
            where = f"record {position} (user {record.user_id!r})"
            pair, summary = _pair(record, where), _summary(record, where)
            known = gathered.get(record.user_id)
            if summary is not None and known is not None and known.summary not in (None, summary):
                raise PlacedError(where, "expected one summary of a user, got another than before", "summary")
        except RecordError as error:
            skip_or_raise(error, skipped)
            continue
        if skipped is not None:
            skipped.accept()
        own = gathered.setdefault(record.user_id, _Gathered())
        own.summary = own.summary or summary
        items, index = record.history, -1
        if pair is not None:
            key = (pair.query, pair.chosen, pair.rejected)
            own.pairs.setdefault(key, pair)
            index = own.places.setdefault(key, len(own.places))
        else:
            items = (*items, HistoryItem(record.response, record.query or None, record.timestamp))
        for item in items:
            own.items.setdefault((item.title or None, item.text), item)
            own.before.setdefault((item.title or None, item.text), []).append(index)
    if skipped is not None:
        skipped.check("records")
    if not gathered or (need_pairs and not any(own.pairs for own in gathered.values())):
        raise RecordError(
            f"records: expected some with 'chosen' and 'rejected', got {len(gathered)} users without any pair"
        )
    return [_user(user_id, own) for user_id, own in gathered.items()]


def _pair(record: Record, where: str) -> Pair | None:
    chosen, rejected = record.extra.get("chosen"), record.extra.get("rejected")
    if chosen is None and rejected is None:
        return None
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if value is None:
            raise PlacedError(where, "expected both of a pair or neither, got one", name)
    pair = Pair(
        record.query,
        check_response(chosen, where, "chosen"),
        check_text(rejected, where, "rejected"),
        record.timestamp,
    )
    if pair.chosen == pair.rejected:
        raise PlacedError(where, "expected another text than 'chosen', got the same", "rejected")
    return pair


def _summary(record: Record, where: str) -> str | None:
    value = record.extra.get("summary")
    return None if value is None else check_text(value, where, "summary").strip() or None


def _user(user_id: str, own: _Gathered) -> User:
    pairs = tuple(own.pairs.values())
    rendered = {(item.title, item.text) for item in (pair.as_item() for pair in pairs)}
    keys = [key for key in own.items if key not in rendered]
    items = [own.items[key] for key in keys]
    order, items_order = _in_time(pairs), _in_time(items)
    place = {-1: -1, **{index: place for place, index in enumerate(order)}}
    since = tuple(
        -1 if items[i].timestamp is not None else min(place[index] for index in own.before[keys[i]])
        for i in items_order
    )
    return User(
        user_id,
        tuple(pairs[i] for i in order),
        tuple(items[i] for i in items_order),
        own.summary,
        since if any(index > 0 for index in since) else (),
    )


def _in_time(dated: Sequence[Pair | HistoryItem]) -> list[int]:
    """The places of these by their timestamps where all have one, else in their order."""
    times = [each.timestamp for each in dated if each.timestamp is not None]
    return sorted(range(len(dated)), key=times.__getitem__) if len(times) == len(dated) else list(range(len(dated)))


# ---- what gives what away ---------------------------------------------------------------------------


@functools.lru_cache(maxsize=65_536)
def gives_away(item: HistoryItem, pair: Pair) -> bool:
    """Whether an item is about the pair's query, or holds one of its texts; see the module for what counts as that."""
    query = folded(pair.query).strip(_ENDS)
    if query and item.title is not None and folded(item.title).strip(_ENDS) == query:
        return True
    texts = [item.text] if item.title is None else [item.title, item.text]
    return any(holds(text, answer) for text in texts for answer in (pair.chosen, pair.rejected))


def check_draw(draw: Draw) -> None:
    """Refuse a draw in which a signal gives a pair away, however it came about.

    Raises:
        RecordError: one does; the message names the user, the signal and the query.
    """
    for place, item in enumerate(draw.signals):
        for pair in draw.pairs:
            if gives_away(item, pair):
                raise RecordError(
                    f"user {draw.user_id!r}: expected signals that do not answer the pairs, got signals[{place}], "
                    f"which gives away the pair of query {pair.query[:60]!r}"
                )


# ---- draws ------------------------------------------------------------------------------------------


def draw(user: User, *, num_pairs: int, num_signals: int, seed: int) -> Draw:
    """Draw pairs to train on, and signals from everything else of the user's.

    The same user, numbers and seed give the same draw, on every machine and whoever else is in the data. Where the user
    has too few pairs for both, fewer are drawn, down to one, until two signals are left (or one, where one is asked
    for); if no choice leaves so many, the one with the most.

    Args:
        user: the user.
        num_pairs: most pairs.
        num_signals: most signals, which keep their order in time.
        seed: of the draw; a trainer makes a new one for every step.

    Raises:
        RecordError: the user has no pairs.
        ArgumentError: a number below 1.
    """
    _check_numbers(num_pairs, num_signals)
    _check_has_pairs(user)
    rng = random.Random(f"{seed}/{user.user_id}")
    order = rng.sample(range(len(user.pairs)), len(user.pairs))
    candidates = _Candidates(user)
    least = min(_LEAST_SIGNALS, num_signals)
    targets, signals = _first_with(_target_choices(order, num_pairs), candidates, least)
    if len(signals) > num_signals:
        signals = [signals[place] for place in sorted(rng.sample(range(len(signals)), num_signals))]
    return Draw(user.user_id, tuple(signals), tuple(user.pairs[index] for index in targets))


def held_out(user: User, *, num_signals: int, max_pairs: int | None = None) -> Draw:
    """The user's first pairs as signals, and the later ones to be evaluated.

    As few pairs are put aside as are needed, together with the user's items, for `num_signals` signals; at least one is
    evaluated. No signal is later than an evaluated pair, where both are dated; nor is an undated item one that only
    later pairs have in their histories. Of more signals than asked for, the newest are kept.

    Args:
        user: the user.
        num_signals: most signals.
        max_pairs: most evaluated pairs, the earliest of them; None for all.

    Raises:
        RecordError: the user has no pairs.
        ArgumentError: a number below 1.
    """
    _check_numbers(1 if max_pairs is None else max_pairs, num_signals)
    _check_has_pairs(user)
    order, candidates = _in_time(user.pairs), _Candidates(user)
    until = len(order) if max_pairs is None else max_pairs
    first = min(max(num_signals - len(user.items), 0), len(order) - 1)
    choices = (order[aside : aside + until] for aside in range(first, len(order)))
    targets, signals = _first_with(choices, candidates, num_signals, from_the_past=order)
    return Draw(user.user_id, tuple(signals[-num_signals:]), tuple(user.pairs[index] for index in targets))


def check_users(users: Sequence[User], *, num_pairs: int, num_signals: int) -> UserCounts:
    """Which users `draw` can draw from: with a pair, and beside it two signals, or one where one is asked for.

    Raises:
        RecordError: none can; the message says why.
        ArgumentError: a number below 1, or two users of one id.
    """
    _check_numbers(num_pairs, num_signals)
    if len({user.user_id for user in users}) < len(users):
        raise ArgumentError("users: expected every user once, got one twice")
    no_pairs, few_signals, short, kept = list[str](), list[str](), list[str](), list[User]()
    for user in users:
        if not user.pairs:
            no_pairs.append(user.user_id)
            continue
        least, candidates = min(_LEAST_SIGNALS, num_signals), _Candidates(user)
        if not any(len(candidates.beside([index])) >= least for index in range(len(user.pairs))):
            few_signals.append(user.user_id)
            continue
        kept.append(user)
        if len(user.pairs) < num_pairs or len(user.pairs) + len(user.items) < num_pairs + num_signals:
            short.append(user.user_id)
    counts = UserCounts(tuple(kept), tuple(no_pairs), tuple(few_signals), tuple(short))
    if not kept:
        raise RecordError(f"users: expected some with pairs and signals, got none: {counts}")
    return counts


class _Candidates:
    """All that could be a signal: the user's items and rendered pairs, oldest first."""

    def __init__(self, user: User) -> None:
        self.pairs = user.pairs
        known = user.since or (-1,) * len(user.items)
        everything = [(item, -1, since) for item, since in zip(user.items, known, strict=True)]
        everything += [(pair.as_item(), index, -1) for index, pair in enumerate(user.pairs)]
        self._all = [everything[place] for place in _in_time([item for item, *_ in everything])]

    def beside(self, targets: Sequence[int], past: Sequence[int] | None = None) -> list[HistoryItem]:
        """Those that give no target away; with `past`, of the pairs these only, and nothing later than a target."""
        pairs = [self.pairs[index] for index in targets]
        allowed = set(range(-1, len(self.pairs)) if past is None else (-1, *past)) - set(targets)
        until = min((pair.timestamp for pair in pairs if pair.timestamp is not None), default=None)
        known = None if past is None else {-1, *past, targets[0]}
        return [
            item
            for item, index, since in self._all
            if index in allowed
            and (known is None or (since in known and _is_by(item.timestamp, until)))
            and not any(gives_away(item, pair) for pair in pairs)
        ]


def _is_by(timestamp: float | None, until: float | None) -> bool:
    return until is None or timestamp is None or timestamp <= until


def _target_choices(order: list[int], num_pairs: int) -> Iterator[list[int]]:
    """As many as asked for, then fewer, and at last each pair alone."""
    for count in range(min(num_pairs, len(order)), 1, -1):
        yield order[:count]
    for index in order:
        yield [index]


def _first_with(
    choices: Iterable[list[int]], candidates: _Candidates, least: int, from_the_past: list[int] | None = None
) -> tuple[list[int], list[HistoryItem]]:
    """The first choice of targets that leaves `least` signals, or else the first of those that leave the most."""
    best: tuple[list[int], list[HistoryItem]] | None = None
    for targets in choices:
        past = None if from_the_past is None else from_the_past[: from_the_past.index(targets[0])]
        signals = candidates.beside(targets, past)
        if best is None or len(signals) > len(best[1]):
            best = targets, signals
        if len(signals) >= least:
            break
    assert best is not None
    return best


def _check_numbers(num_pairs: int, num_signals: int) -> None:
    check_integer("num_pairs", num_pairs, least=1)
    check_integer("num_signals", num_signals, least=1)


def _check_has_pairs(user: User) -> None:
    if not user.pairs:
        raise RecordError(f"user {user.user_id!r}: expected at least one pair, got none")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
