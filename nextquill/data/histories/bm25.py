"""Selects past texts that share words with the query, weighted by the rarity of the words in the user's history.

    score(d) = Σ over words w of the query   idf(w) · tf(w, d) / (tf(w, d) + k1 · (1 − b + b · |d| / mean |d|))
    idf(w)   = ln(1 + (n − df(w) + 0.5) / (df(w) + 0.5))

Here tf is the count of w in d, df the number of items with w, n the number of items, |d| the number of words, k1 = 1.5
and b = 0.75. This is Lucene's form, whose idf stays positive in histories of a few items (Kamphuis et al. 2020, "Which
BM25 do you mean?"). Rarity and lengths come from the record's own history, so nothing from a user's future takes part.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from nextquill.data._checks import needed_package
from nextquill.data.histories.base import History, RankedSelector, TokenBudget, best_first, item_text
from nextquill.data.records import HistoryItem, Record

K1, B = 1.5, 0.75

# Thai and Lao, kana, CJK ideographs: scripts without spaces between words, in which each character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


@functools.lru_cache(maxsize=16_384)
def words(text: str) -> tuple[str, ...]:
    """The words of a text, in lower case."""
    return tuple(_WORD.findall(text.lower()))


class BM25Selector(RankedSelector):
    """Keeps the items with the highest BM25 score for the query; with equal scores, the more recent."""

    def __init__(self, num_items: int | None, budget: TokenBudget | None) -> None:
        super().__init__(num_items, budget)
        with needed_package("name: 'bm25' needs bm25s", "cli"):
            import bm25s  # noqa: F401

    def _ranked(self, record: Record, history: History) -> Sequence[int]:
        return best_first(scores(record.query, tuple(history)))


def scores(query: str, history: tuple[HistoryItem, ...]) -> list[float]:
    """The score of every item in `history`, in order."""
    asked = list(words(query))
    index = _index(history) if asked else None
    return [0.0] * len(history) if index is None else index.get_scores(asked).tolist()


@functools.lru_cache(maxsize=64)  # the records of a user often share a history and mostly stand together
def _index(history: tuple[HistoryItem, ...]) -> Any:
    """An index of these items; None if they hold no word."""
    import bm25s

    documents = [list(words(item_text(item))) for item in history]
    if not any(documents):
        return None
    # In single precision, texts with nearly equal scores could change places.
    index = bm25s.BM25(method="lucene", k1=K1, b=B, dtype="float64")
    index.index(documents, show_progress=False)
    return index
