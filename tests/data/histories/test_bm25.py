"""BM25 against its formula in double precision, the order of ties, and indexes that are used again."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.data import HistoryItem, Record
from nextquill.data.histories import bm25, make_selector
from nextquill.data.histories.bm25 import words

K1, B = 1.5, 0.75


def formula(query: str, texts: list[str]) -> list[float]:
    documents = [words(text) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        counts, score = Counter(document), 0.0
        for word in words(query):
            holding = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            if counts[word]:
                score += idf * counts[word] / (counts[word] + K1 * (1 - B + B * len(document) / mean))
        scores.append(score)
    return scores


def record(query: str, texts: list[str], user_id: str = "ann") -> Record:
    return Record(user_id, query, "Good.", tuple(map(HistoryItem, texts)))


sentences = st.lists(st.sampled_from("sea hill wave of the slow Sea 東京 naïve ! ,".split()), max_size=6).map(" ".join)


@settings(deadline=None)
@given(query=sentences, texts=st.lists(sentences, min_size=1, max_size=8))
def test_scores_are_those_of_the_formula(query: str, texts: list[str]) -> None:
    given = record(query, texts)
    assert bm25.scores(query, given.history) == pytest.approx(formula(query, texts), rel=1e-12, abs=1e-15)


def test_ties_go_to_the_more_recent() -> None:
    selected = make_selector("bm25", num_items=2).select(record("sea", ["a sea", "x y", "a sea", "a sea", "no"]))
    assert selected.history == (HistoryItem("a sea"),) * 2
    dated = Record("ann", "none of it", "Good.", tuple(HistoryItem("same", timestamp=float(i)) for i in range(5)))
    newest = make_selector("bm25", num_items=2).select(dated)
    assert [item.timestamp for item in newest.history] == [3.0, 4.0]


@pytest.mark.parametrize(("query", "texts"), [("", ["a", "b"]), ("?!", ["a", "b"]), ("sea", ["", "!"])])
def test_nothing_to_search_for_or_in_is_recency(query: str, texts: list[str]) -> None:
    selected = make_selector("bm25", num_items=1).select(record(query, texts))
    assert selected.history == (HistoryItem(texts[-1]),)


def test_an_index_serves_the_same_history_again() -> None:
    bm25._index.cache_clear()
    selector = make_selector("bm25", num_items=1)
    for query in ("sea", "hill"):
        assert selector.select(record(query, ["a sea", "a hill"])).history == (HistoryItem(f"a {query}"),)
        selector.select(record(query, ["x"], user_id="bob"))
    assert bm25._index.cache_info()[:2] == (2, 2), "two histories, each of them asked for twice"
    assert selector.select(record("sea", ["a sea", "a hill", "sea sea"])).history == (HistoryItem("sea sea"),)
    assert bm25._index.cache_info().misses == 3
    for number in range(100):
        selector.select(record("sea", [f"a sea {number}"]))
    assert bm25._index.cache_info().currsize <= 64


def test_words_of_every_script() -> None:
    assert words("It's NAÏVE, Œuvre_2 東京です") == ("it", "s", "naïve", "œuvre", "2", "東", "京", "で", "す")
