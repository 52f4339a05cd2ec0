"""Which other user's history each record is scored against.

A loss that trains through the counterfactual can make `nll without - nll with` large by spoiling the pass without
history. The same response under *another user's* history is trained on by no loss, so the difference to it can be
believed.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence

from nextquill.data.records import HistoryItem, Record

# Rejections of a random donor before all are searched. With two users of equal size one draw in two is rejected, so
# the search is reached about once in 10^19 records; it is there for data in which one user owns nearly everything.
_DRAWS = 64


def assign_placebo_histories(records: Sequence[Record], seed: int) -> list[tuple[HistoryItem, ...] | None]:
    """Draw for every record the history of a record of another user.

    Donors are drawn uniformly and independently. A donor whose newest history item is no later than the record is
    preferred, since a text from after the record's time would differ by its period as well as by its author; undated
    histories and records count as fitting. If no such donor exists (typically for the earliest records), any other
    user's history is drawn. Empty histories are donated only if all other users' are empty.

    Args:
        records: the records, of one or more users.
        seed: same seed, same records: same histories.

    Returns:
        One history per record, never of its own user; None for every record if there is only one user.
    """
    if len({record.user_id for record in records}) < 2:
        return [None] * len(records)
    rng = random.Random(seed)
    donors = sorted((record for record in records if record.history), key=_newest)
    newest = [_newest(record) for record in donors]
    return [_draw_history(record, donors, newest, rng) for record in records]


def _draw_history(
    record: Record, donors: list[Record], newest: list[float], rng: random.Random
) -> tuple[HistoryItem, ...]:
    until = len(donors) if record.timestamp is None else bisect_right(newest, record.timestamp)
    donor = _draw_other_user(record.user_id, donors, until, rng)
    if donor is None:
        donor = _draw_other_user(record.user_id, donors, len(donors), rng)
    return () if donor is None else donor.history


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
