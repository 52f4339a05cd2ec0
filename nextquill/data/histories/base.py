"""The base of all selectors, and the two that read no text: the newest items, and random ones.

A selector checks times, ranks the items, keeps those that fit, and puts them back into the order of time.
"""

from __future__ import annotations

import functools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from nextquill.data.records import HistoryItem, Record, check_times, in_time_order
from nextquill.storage.fingerprints import digest_of

History = Sequence[HistoryItem]

_CACHED_COUNTS = 200_000


def item_text(item: HistoryItem) -> str:
    """The text of an item that is searched, embedded and counted: the title, if there is one, and the text."""
    return item.text if item.title is None else f"{item.title}\n{item.text}"


class TokenBudget:
    """Limits a history to a number of tokens. Counts of items are cached, as a user's histories repeat."""

    def __init__(self, max_tokens: int, count_tokens: Callable[[str], int]) -> None:
        self.max_tokens = max_tokens
        self.count = functools.lru_cache(_CACHED_COUNTS)(lambda item: count_tokens(item_text(item)))


class Selector(ABC):
    """Chooses items of a record's history; made by `make_selector`. None stands for no limit."""

    #: Whether the first item that does not fit ends the history, instead of being skipped.
    contiguous = False

    def __init__(self, num_items: int | None, budget: TokenBudget | None) -> None:
        self.num_items = num_items
        self.budget = budget

    def fit(self, records: Iterable[Record]) -> None:  # noqa: B027 - most selectors do not need it
        """Look at all records before the first `select`. Only "fixed" needs this, and it makes "dense" faster.

        Raises:
            RecordError: a record has a history item dated after it.
        """

    def select(self, record: Record) -> Record:
        """Return the record with the chosen part of its history, oldest first.

        Raises:
            RecordError: a history item is dated after the record, or "fixed" has not seen the user in `fit`.
        """
        check_times(record.history, record.timestamp, describe(record))
        return replace(record, history=self._chosen(record))

    @abstractmethod
    def _chosen(self, record: Record) -> tuple[HistoryItem, ...]:
        """The items that the record keeps, oldest first."""

    def _within_limits(self, history: History, ranked: Iterable[int]) -> tuple[HistoryItem, ...]:
        kept: list[int] = []
        room = 0 if self.budget is None else self.budget.max_tokens
        for position in ranked:
            if len(kept) == self.num_items:
                break
            if self.budget is not None:
                tokens = self.budget.count(history[position])
                if tokens > room:
                    if self.contiguous:
                        break
                    continue
                room -= tokens
            kept.append(position)
        return tuple(history[position] for position in sorted(kept))


class RankedSelector(Selector):
    """A selector that ranks the items of each record's history."""

    def _chosen(self, record: Record) -> tuple[HistoryItem, ...]:
        history = in_time_order(record.history)
        return self._within_limits(history, self._ranked(record, history)) if history else ()

    @abstractmethod
    def _ranked(self, record: Record, history: History) -> Sequence[int]:
        """Positions in `history`, the best first. The history is not empty and starts with the oldest item."""


class RecencySelector(RankedSelector):
    """Keeps the newest items; without any limit all of them."""

    contiguous = True

    def _ranked(self, record: Record, history: History) -> Sequence[int]:
        return range(len(history) - 1, -1, -1)


class RandomSelector(RankedSelector):
    """Keeps random items, drawn from a seed and the record. So the order of records does not change the result."""

    def __init__(self, num_items: int | None, budget: TokenBudget | None, seed: int) -> None:
        super().__init__(num_items, budget)
        self.seed = seed

    def _ranked(self, record: Record, history: History) -> Sequence[int]:
        key = repr((self.seed, record.user_id, record.query, record.response, record.timestamp))
        return random.Random(digest_of(key)).sample(range(len(history)), len(history))


def describe(record: Record) -> str:
    """The user of a record and the beginning of its query, for errors."""
    query = record.query if len(record.query) <= 40 else f"{record.query[:40]}..."
    return f"record of user {record.user_id!r} with query {query!r}"


def best_first(scores: Sequence[float]) -> list[int]:
    """Positions sorted by score, the best first; with equal scores, the more recent first."""
    return sorted(range(len(scores)), key=lambda position: (-scores[position], -position))
