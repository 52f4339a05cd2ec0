"""Draws another user's history for each record, as a placebo.

A loss that trains through the counterfactual can make `nll without - nll with` large by spoiling the pass without
history. No loss trains on the response under *another user's* history, so the difference to that NLL can be trusted.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from nextquill.data.records import HistoryItem, Record
from nextquill.errors import RecordError

History = tuple[HistoryItem, ...]
#: The purposes of a draw. Each has its own random numbers, so that the two seldom agree on a donor.
EVALUATION, COUNTERFACTUAL = "evaluation", "counterfactual"

# Rejected draws before all donors are searched. With two users of equal size one draw in two is rejected, so the search
# is reached about once in 10^19 records. It is meant for data in which one user owns nearly everything.
_DRAWS = 64
#: The most records that donors of a stream are drawn from, and that are read ahead.
POOL_SIZE = 2048


def assign_placebo_histories(
    records: Sequence[Record], seed: int, purpose: str = EVALUATION
) -> list[tuple[HistoryItem, ...] | None]:
    """Draw another user's history for every record.

    Donors are drawn uniformly and independently. A donor whose newest history item is no later than the record is
    preferred: a later text would differ in its period as well as in its author. Undated histories and records always
    fit. If no donor fits, as for the earliest records, any other user's history is drawn. An empty history is drawn
    only if the histories of all other users are empty.

    Args:
        records: the records of one or more users.
        seed: decides the histories, together with the records.
        purpose: `EVALUATION` or `COUNTERFACTUAL`; each has its own random numbers.

    Returns:
        One history per record, never its own user's; None for every record if there is only one user.
    """
    if len({record.user_id for record in records}) < 2:
        return [None] * len(records)
    rng = _random(seed, purpose)
    donors = sorted((record for record in records if record.history), key=_newest)
    newest = [_newest(record) for record in donors]
    return [_draw_history(record, donors, newest, rng) for record in records]


def stream_placebo_histories(
    records: Iterable[Record], seed: int, purposes: Sequence[str] = (EVALUATION,), pool_size: int = POOL_SIZE
) -> Iterator[tuple[Record, tuple[History | None, ...]]]:
    """Draw as `assign_placebo_histories` does, but from a sample of the records, for sources larger than memory.

    Donors are a uniform sample of the records read so far, with `pool_size` records read ahead. They depend only on
    the seed and the records, and differ from those of `assign_placebo_histories`.

    Args:
        records: read once, in order.
        seed: decides the histories, together with the records.
        purposes: the purposes of the draws; each record gets one history for each.
        pool_size: the most donors, and the most records read ahead.

    Yields:
        Every record, with a history for each purpose, never its own user's; None if there is only one user.

    Raises:
        RecordError: all donors belong to one user, and records are left. Then the source is sorted by user, and the
            first user has more records than the pool.
    """
    source, pool = iter(records), _DonorPool(pool_size, random.Random(f"{seed}/pool"))
    draws = [_random(seed, purpose) for purpose in purposes]
    ahead = deque[Record]()
    while True:
        for record in islice(source, 1 if ahead else pool_size):
            pool.add(record)
            ahead.append(record)
        if not ahead:
            return
        record = ahead.popleft()
        if not pool.has_several_users:
            if (later := next(source, None)) is not None:
                raise RecordError(
                    f"records: expected a second user among the first {pool_size}, as each record needs another "
                    f"user's history, got only {record.user_id!r}; shuffle the records, the next is by "
                    f"{later.user_id!r}"
                )
            yield record, (None,) * len(draws)
            continue
        yield record, tuple(_draw_history(record, pool.donors, pool.newest, rng) for rng in draws)


class _DonorPool:
    """A uniform sample of records with a history (reservoir sampling), sorted by their newest item.

    Once the sample holds two users, it always does: if only two are left, the last record of either is never replaced
    by one of the other.
    """

    def __init__(self, size: int, rng: random.Random) -> None:
        self._size, self._rng, self._seen = size, rng, 0
        self.donors: list[Record] = []
        self.newest: list[float] = []
        self._donors_of: dict[str, int] = {}
        self._first_user: str | None = None
        self.has_several_users = False

    def add(self, record: Record) -> None:
        """Add the record to the sample, or leave it out."""
        self._first_user = self._first_user or record.user_id
        self.has_several_users |= record.user_id != self._first_user
        if not record.history:
            return
        self._seen += 1
        if len(self.donors) == self._size:
            place = self._rng.randrange(self._seen)
            if place >= self._size or not self._may_replace(self.donors[place].user_id, record.user_id):
                return
            self._remove(place)
        newest = _newest(record)
        at = bisect_right(self.newest, newest)
        self.newest.insert(at, newest)
        self.donors.insert(at, record)
        self._donors_of[record.user_id] = self._donors_of.get(record.user_id, 0) + 1

    def _may_replace(self, leaving: str, coming: str) -> bool:
        return self._donors_of[leaving] > 1 or len(self._donors_of) > 2 or coming not in self._donors_of

    def _remove(self, place: int) -> None:
        del self.newest[place]
        user = self.donors.pop(place).user_id
        self._donors_of[user] -= 1
        if not self._donors_of[user]:
            del self._donors_of[user]


def _random(seed: int, purpose: str) -> random.Random:
    return random.Random(seed if purpose == EVALUATION else f"{seed}/{purpose}")


def _draw_history(record: Record, donors: list[Record], newest: list[float], rng: random.Random) -> History:
    until = len(donors) if record.timestamp is None else bisect_right(newest, record.timestamp)
    found = _draw_other_user(record.user_id, donors, until, rng)
    found = found or _draw_other_user(record.user_id, donors, len(donors), rng)
    return found.history if found else ()


def _draw_other_user(user_id: str, donors: list[Record], until: int, rng: random.Random) -> Record | None:
    if until == 0:
        return None
    for _ in range(_DRAWS):
        donor = donors[rng.randrange(until)]
        if donor.user_id != user_id:
            return donor
    others = [donor for donor in donors[:until] if donor.user_id != user_id]
    return rng.choice(others) if others else None


def _newest(record: Record) -> float:
    return max((item.timestamp for item in record.history if item.timestamp is not None), default=-math.inf)
