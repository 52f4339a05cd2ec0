"""Selects one set of past texts for all records of a user.

With `order="history_first"`, every prompt of the user begins alike, and a batch computes that beginning once. The set
may hold only items that precede all of the user's records; otherwise a prompt would show a text written after its
response. An item precedes a record if it is in the record's history or has an earlier date. So the candidates are

    items in the history of every record of the user, and
    items from any of these histories dated before the user's earliest record, if all items and records have dates

The newest `num_items` of them are kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from nextquill.data.histories.base import History, Selector, TokenBudget, describe
from nextquill.data.records import HistoryItem, Record, check_times, in_time_order
from nextquill.errors import RecordError


class FixedSelector(Selector):
    """Keeps the same items for every record of a user; `fit` must first see all records of all splits.

    Attributes:
        users_without_history: users for whom no item precedes all records, so their records get no history.
        records_without_history: the number of records of these users.
    """

    contiguous = True

    def __init__(self, num_items: int | None, budget: TokenBudget | None) -> None:
        super().__init__(num_items, budget)
        self.users_without_history: tuple[str, ...] = ()
        self.records_without_history = 0
        self._items: dict[str, tuple[HistoryItem, ...]] = {}

    def fit(self, records: Iterable[Record]) -> None:
        """Choose every user's items, and check times; a second call replaces the choice of the first."""
        users, self._items = dict[str, _User](), {}
        for record in records:
            check_times(record.history, record.timestamp, describe(record))
            users.setdefault(record.user_id, _User()).add(record)
        for name, user in users.items():
            candidates = user.candidates()
            self._items[name] = self._within_limits(candidates, range(len(candidates) - 1, -1, -1))
        self.users_without_history = tuple(name for name, items in self._items.items() if not items)
        self.records_without_history = sum(users[name].records for name in self.users_without_history)

    def _chosen(self, record: Record) -> tuple[HistoryItem, ...]:
        items = self._items.get(record.user_id)
        if items is None:
            raise RecordError(f"{describe(record)}: expected a user from the records given to `fit`, got a new one")
        for item in items:
            if item not in record.history and not _is_before(item, record.timestamp):
                raise RecordError(
                    f"{describe(record)}: expected a record given to `fit`, got one that a text of the user's "
                    "fixed history does not precede"
                )
        return items


class _User:
    """The records of one user: their number, the time of the first, and how many of them hold each item."""

    def __init__(self) -> None:
        self.records = 0
        self._earliest: float | None = math.inf  # None if a record has no time
        self._holding = Counter[HistoryItem]()

    def add(self, record: Record) -> None:
        self.records += 1
        self._holding.update(dict.fromkeys(in_time_order(record.history)).keys())
        if self._earliest is None or record.timestamp is None:
            self._earliest = None
        else:
            self._earliest = min(self._earliest, record.timestamp)

    def candidates(self) -> History:
        """The items that precede every record, oldest first."""
        common = [item for item, count in self._holding.items() if count == self.records]
        if any(item.timestamp is None for item in common):
            return common
        others = [item for item, count in self._holding.items() if count < self.records]
        return [*in_time_order(common + [item for item in others if _is_before(item, self._earliest)])]


def _is_before(item: HistoryItem, time: float | None) -> bool:
    return item.timestamp is not None and time is not None and item.timestamp < time
