"""Selects one set of past texts for all records of a user.

With `order="history_first"`, every prompt of the user begins alike, and a batch computes that beginning once. The set
may hold only items that precede all of the user's records; otherwise a prompt would show a text written after its
response. An item precedes a record if it is in the record's history or has an earlier date. So the candidates are

    items in the history of every record of the user, and
    items from any of these histories dated before the user's earliest record, if all items and records have dates

The newest `num_items` of them are kept.
"""

from __future__ import annotations

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
        """Choose every user's items. A second call replaces the choice of the first.

        Raises:
            RecordError: a record has a history item dated after it.
        """
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
            if item not in record.history and not _is_before(item, record):
                raise RecordError(
                    f"{describe(record)}: expected a record given to `fit`, got one that a text of the user's "
                    "fixed history does not precede"
                )
        return items


class _User:
    """The records and items seen for one user."""

    def __init__(self) -> None:
        self.records = 0
        self._common: dict[HistoryItem, None] = {}
        self._all: dict[HistoryItem, None] = {}
        self._earliest: Record | None = None
        self._dated = True

    def add(self, record: Record) -> None:
        own = dict.fromkeys(in_time_order(record.history))
        self._common = {item: None for item in self._common if item in own} if self.records else own
        self._all |= own
        self._dated = self._dated and record.timestamp is not None
        if self._earliest is None or (record.timestamp or 0.0) < (self._earliest.timestamp or 0.0):
            self._earliest = record
        self.records += 1

    def candidates(self) -> History:
        """The items that precede every record, oldest first."""
        common, earliest = self._common, self._earliest
        if earliest is None or not self._dated or any(item.timestamp is None for item in common):
            return list(common)
        return in_time_order(list(common | {item: None for item in self._all if _is_before(item, earliest)}))


def _is_before(item: HistoryItem, record: Record) -> bool:
    return item.timestamp is not None and record.timestamp is not None and item.timestamp < record.timestamp
