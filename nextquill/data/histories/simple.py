"""Selectors that read no text: the newest items, and random ones."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from nextquill.data.histories.base import History, RankedSelector, TokenBudget
from nextquill.data.records import Record


class RecencySelector(RankedSelector):
    """The newest items; without any limit all of them."""

    contiguous = True

    def _ranked(self, record: Record, history: History) -> Sequence[int]:
        return range(len(history) - 1, -1, -1)


class RandomSelector(RankedSelector):
    """Items drawn at random, from a seed and the record itself: no order of records changes what one of them gets."""

    def __init__(self, num_items: int | None, budget: TokenBudget | None, seed: int) -> None:
        super().__init__(num_items, budget)
        self.seed = seed

    def _ranked(self, record: Record, history: History) -> Sequence[int]:
        key = repr((self.seed, record.user_id, record.query, record.response, record.timestamp))
        rng = random.Random(hashlib.blake2b(key.encode(), digest_size=8).digest())
        return rng.sample(range(len(history)), len(history))
