"""Users with their preference pairs, and draws: the signals to summarise and the pairs to judge the summary by.

A summary is written from a user's *signals* and judged on *pairs* of the same user. A signal is a past text of the
user, or another pair rendered as text. Signals must not contain the answers to the pairs, so every draw leaves out the
signals that give one of its pairs away:

    by the query     the signal's title is the pair's query
    by an answer     the signal contains one of the pair's two answers, or is a part of one, see `holds`

Differences of case, white space, quotation marks and the composition of characters are ignored. So pairs that share a
short answer, such as "yes", exclude each other. A draw is made from one `User` alone, so it contains nothing of others.

Training draws pairs and signals at random (`draw`). Evaluation takes the first pairs as signals and judges the later
ones (`held_out`).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from nextquill.data._checks import check_integer
from nextquill.data.leaks import folded, holds
from nextquill.data.records import HistoryItem, Record, check_response, check_text
from nextquill.data.skipped import PlacedError, SkippedRecords, skip_or_raise
from nextquill.errors import ArgumentError, RecordError

#: A user with fewer signals is left out, as a summary of a single signal repeats it.
LEAST_SIGNALS = 2
_SHOWN = 5
# Ignored at the ends of a query.
_ENDS = " .:?!"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one query, and which of them the user prefers.

    Args:
        query: the question; may be empty.
        chosen, rejected: the answer that the user prefers, and the other one.
        timestamp: seconds since the epoch, or None if unknown.
    """

    query: str
    chosen: str
    rejected: str
    timestamp: float | None = None

    def as_item(self) -> HistoryItem:
        """The pair as a past text, in the wording of the loader of preferences."""
        text = f"Preferred: {self.chosen}\nNot preferred: {self.rejected}"
        return HistoryItem(text, title=self.query or None, timestamp=self.timestamp)


@dataclass(frozen=True, slots=True)
class User:
    """One user: pairs to train and to evaluate on, and past texts.

    Args:
        pairs: the user's pairs, in their order.
        items: past texts other than these pairs, oldest first.
        summary: a given summary for the supervised warm start, or None.
        since: for each item without a timestamp, the index of the first pair whose history holds it; -1 for an item
            with a timestamp, or known from the start. Empty if all items are known from the start.
    """

    user_id: str
    pairs: tuple[Pair, ...]
    items: tuple[HistoryItem, ...] = ()
    summary: str | None = None
    since: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Draw:
    """Pairs of one user, and signals of that user that give no pair away.

    Args:
        signals: the signals, oldest first.
        pairs: the pairs that a summary of the signals is judged on.
    """

    user_id: str
    signals: tuple[HistoryItem, ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class UserCounts:
    """The users that can be drawn from, and the ids of those that are left out; see `check_users`.

    Args:
        few_signals: users with too few signals beside a pair.
        short: those in `users` with fewer pairs or signals than were asked for.
    """

    users: tuple[User, ...]
    no_pairs: tuple[str, ...] = ()
    few_signals: tuple[str, ...] = ()
    short: tuple[str, ...] = ()

    @property
    def skipped(self) -> int:
        """The number of users that are left out."""
        return len(self.no_pairs) + len(self.few_signals)

    def __str__(self) -> str:
        whole = f"{len(self.users)} of {len(self.users) + self.skipped} users can be drawn from"
        parts = [
            (self.no_pairs, "left out without pairs"),
            (self.few_signals, "left out with too few signals"),
            (self.short, "with fewer pairs or signals than asked for"),
        ]
        return "; ".join([whole, *(f"{len(ids)} {why} ({_listed(ids)})" for ids, why in parts if ids)])


# ---- from records -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Gathered:
    """A user's pairs with their places, items with the places of the pairs that have them as history, and summary."""

    pairs: dict[tuple[str, str, str], tuple[int, Pair]] = field(default_factory=dict)
    items: dict[tuple[str | None, str], tuple[HistoryItem, list[int]]] = field(default_factory=dict)
    summary: str | None = None


def users_from_records(
    records: Iterable[Record], skipped: SkippedRecords | None = None, *, need_pairs: bool = True
) -> list[User]:
    """Gather the records of each user.

    A record with `chosen` and `rejected` in its `extra` is a pair. The response of any other record is an item, and so
    is every item of a record's history. Repeated pairs and items are kept once. An item that renders one of the user's
    pairs is left out. Pairs are sorted by time if all have timestamps, and so are items.

    Args:
        records: as `load_records` returns them.
        skipped: counts bad records, which are left out; with None the first one is an error.
        need_pairs: whether there must be a pair; summaries can be written without.

    Returns:
        The users, in the order of their first records; some may have no pairs.

    Raises:
        RecordError: a record has half a pair, a pair of equal texts, a pair or summary that is not a text, or another
            summary than the user's earlier records; or there is no record, or no pair although one is needed.
    """
    gathered: dict[str, _Gathered] = {}
    for position, record in enumerate(records):
        try:
            where = f"record {position} (user {record.user_id!r})"
            pair, summary = _pair(record, where), _summary(record, where)
            known = gathered.get(record.user_id)
            if summary is not None and known is not None and known.summary not in (None, summary):
                raise PlacedError(where, "expected one summary of a user, got a different second one", "summary")
        except RecordError as error:
            skip_or_raise(error, skipped)
            continue
        if skipped is not None:
            skipped.accept()
        own = gathered.setdefault(record.user_id, _Gathered())
        own.summary = own.summary or summary
        items, index = record.history, -1
        if pair is not None:
            index, _ = own.pairs.setdefault((pair.query, pair.chosen, pair.rejected), (len(own.pairs), pair))
        else:
            items = (*items, HistoryItem(record.response, record.query or None, record.timestamp))
        for item in items:
            own.items.setdefault((item.title or None, item.text), (item, []))[1].append(index)
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
    pairs = [pair for _, pair in own.pairs.values()]
    rendered = {(item.title, item.text) for item in (pair.as_item() for pair in pairs)}
    found = [each for key, each in own.items.items() if key not in rendered]
    order = in_time(pairs)
    place = {-1: -1, **{index: place for place, index in enumerate(order)}}
    items = [found[i] for i in in_time([item for item, _ in found])]
    since = tuple(-1 if item.timestamp is not None else min(place[i] for i in before) for item, before in items)
    return User(
        user_id,
        tuple(pairs[i] for i in order),
        tuple(item for item, _ in items),
        own.summary,
        since if any(index > 0 for index in since) else (),
    )


def in_time(dated: Sequence[Pair | HistoryItem]) -> list[int]:
    """Return the places of pairs or items, sorted by time if all have timestamps, else in their order."""
    times = [each.timestamp for each in dated if each.timestamp is not None]
    return sorted(range(len(dated)), key=times.__getitem__) if len(times) == len(dated) else list(range(len(dated)))


# ---- signals that give a pair away ------------------------------------------------------------------


@functools.lru_cache(maxsize=65_536)
def gives_away(item: HistoryItem, pair: Pair) -> bool:
    """Whether an item's title is the pair's query, or its text or title holds one of the pair's answers."""
    query = folded(pair.query).strip(_ENDS)
    if query and item.title is not None and folded(item.title).strip(_ENDS) == query:
        return True
    texts = [item.text] if item.title is None else [item.title, item.text]
    return any(holds(text, answer) for text in texts for answer in (pair.chosen, pair.rejected))


def check_draw(draw: Draw) -> None:
    """Raise RecordError if a signal gives a pair away; the message names the user, the signal and the query."""
    for place, item in enumerate(draw.signals):
        for pair in draw.pairs:
            if gives_away(item, pair):
                raise RecordError(
                    f"user {draw.user_id!r}: expected signals that do not answer the pairs, got signals[{place}], "
                    f"which gives away the pair of query {pair.query[:60]!r}"
                )


# ---- draws ------------------------------------------------------------------------------------------


def draw(user: User, *, num_pairs: int, num_signals: int, seed: int) -> Draw:
    """Draw pairs to train on, and signals from everything else that is known about the user.

    The same user, numbers and seed give the same draw, on every machine and with any other users. If too few signals
    are left, fewer pairs are drawn, down to one, until there are two signals (one if `num_signals` is 1). If no choice
    leaves so many, the choice with the most signals is taken.

    Args:
        num_pairs: the most pairs.
        num_signals: the most signals; they keep their order in time.
        seed: the seed of the draw; a trainer uses a new one for every step.

    Raises:
        RecordError: the user has no pairs.
        ArgumentError: a number is below 1.
    """
    _check(num_pairs, num_signals, user)
    rng = random.Random(f"{seed}/{user.user_id}")
    order = rng.sample(range(len(user.pairs)), len(user.pairs))
    candidates = _Candidates(user)
    least = min(LEAST_SIGNALS, num_signals)
    targets, signals = _first_with(_target_choices(order, num_pairs), candidates, least)
    if len(signals) > num_signals:
        signals = [signals[place] for place in sorted(rng.sample(range(len(signals)), num_signals))]
    return Draw(user.user_id, tuple(signals), tuple(user.pairs[index] for index in targets))


def held_out(user: User, *, num_signals: int, max_pairs: int | None = None) -> Draw:
    """Take the user's first pairs as signals, and hold out the later ones for evaluation.

    As few pairs become signals as are needed, together with the user's items, for `num_signals` signals. At least one
    pair is held out. No dated signal is later than a held-out pair, and no undated item first appears in the history of
    a later pair. If there are more signals than asked for, the newest are kept.

    Args:
        num_signals: the most signals.
        max_pairs: the most held-out pairs, the earliest ones; None for all.

    Raises:
        RecordError: the user has no pairs.
        ArgumentError: a number is below 1.
    """
    _check(1 if max_pairs is None else max_pairs, num_signals, user)
    order, candidates = in_time(user.pairs), _Candidates(user)
    until = len(order) if max_pairs is None else max_pairs
    first = min(max(num_signals - len(user.items), 0), len(order) - 1)
    choices = (order[aside : aside + until] for aside in range(first, len(order)))
    targets, signals = _first_with(choices, candidates, num_signals, from_the_past=order)
    return Draw(user.user_id, tuple(signals[-num_signals:]), tuple(user.pairs[index] for index in targets))


def check_users(users: Sequence[User], *, num_pairs: int, num_signals: int) -> UserCounts:
    """Find the users that `draw` can draw from: with a pair and two further signals (one if `num_signals` is 1).

    Raises:
        RecordError: no user can be drawn from; the message says why.
        ArgumentError: a number is below 1, or two users have the same id.
    """
    _check(num_pairs, num_signals)
    if len({user.user_id for user in users}) < len(users):
        raise ArgumentError("users: expected every user once, got one twice")
    no_pairs, few_signals, short, kept = list[str](), list[str](), list[str](), list[User]()
    for user in users:
        if not user.pairs:
            no_pairs.append(user.user_id)
            continue
        least, candidates = min(LEAST_SIGNALS, num_signals), _Candidates(user)
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
    """All possible signals of a user: items and rendered pairs, oldest first."""

    def __init__(self, user: User) -> None:
        self.pairs = user.pairs
        known = user.since or (-1,) * len(user.items)
        everything = [(item, -1, since) for item, since in zip(user.items, known, strict=True)]
        everything += [(pair.as_item(), index, -1) for index, pair in enumerate(user.pairs)]
        self._all = [everything[place] for place in in_time([item for item, *_ in everything])]

    def beside(self, targets: Sequence[int], past: Sequence[int] | None = None) -> list[HistoryItem]:
        """The signals that give no target away; with `past`, only those pairs, and nothing later than a target."""
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
    """Yield as many pairs as asked for, then fewer, and at last each pair alone."""
    for count in range(min(num_pairs, len(order)), 1, -1):
        yield order[:count]
    for index in order:
        yield [index]


def _first_with(
    choices: Iterable[list[int]], candidates: _Candidates, least: int, from_the_past: list[int] | None = None
) -> tuple[list[int], list[HistoryItem]]:
    """The first choice of targets that leaves `least` signals, else the first that leaves the most."""
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


def _check(num_pairs: int, num_signals: int, user: User | None = None) -> None:
    check_integer("num_pairs", num_pairs, least=1)
    check_integer("num_signals", num_signals, least=1)
    if user is not None and not user.pairs:
        raise RecordError(f"user {user.user_id!r}: expected at least one pair, got none")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
