from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextquill.data import HistoryItem, SkippedRecords
from nextquill.data.loaders import load
from nextquill.errors import ArgumentError, RecordError

EVENT = {"user_id": "u", "timestamp": 1, "text": "a", "query": "q"}


def test_each_text_becomes_a_record_with_the_users_strictly_earlier_texts(fixtures: Path) -> None:
    records = list(load("events", fixtures / "events.jsonl", query="Write the post {title} from the {place}."))
    assert [(record.user_id, record.response) for record in records] == [
        ("ann", "One."),
        ("ann", "Two a."),
        ("ann", "Two b."),
        ("ann", "Three."),
        ("bob", "Hello."),
    ]
    assert records[0].query == "Write the post First from the attic."
    assert records[3].history == (
        HistoryItem("One.", "First", 100.0),
        HistoryItem("Two a.", "Second a", 200.0),
        HistoryItem("Two b.", "Second b", 200.0),
    )
    assert records[1].history == records[2].history == (HistoryItem("One.", "First", 100.0),), "ties are no history"
    assert records[3].extra == {"place": "attic", "title": "Third"}


def test_enough_history_is_asked_for_and_only_the_latest_kept(fixtures: Path) -> None:
    records = list(load("events", fixtures / "events.jsonl", query="Write", min_history=1, max_history=1))
    assert [(record.response, [item.text for item in record.history]) for record in records] == [
        ("Two a.", ["One."]),
        ("Two b.", ["One."]),
        ("Three.", ["Two b."]),
    ]


@given(
    log=st.lists(st.tuples(st.sampled_from("ab\0é"), st.integers(0, 5)), min_size=1, max_size=20),
    most=st.none() | st.integers(0, 6),
)
def test_a_history_is_every_earlier_text_and_no_other(log: list[tuple[str, int]], most: int | None) -> None:
    rows = [{**EVENT, "user_id": user, "timestamp": time, "text": str(i)} for i, (user, time) in enumerate(log)]
    records = {record.response: record for record in load("events", rows, max_history=most)}
    assert len(records) == len(log)
    for i, (user, time) in enumerate(log):
        earlier = sorted((then, j) for j, (other, then) in enumerate(log) if other == user and then < time)
        latest = earlier if most is None else earlier[max(0, len(earlier) - most) :]
        assert [item.text for item in records[str(i)].history] == [str(j) for _, j in latest]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "time": ({"timestamp": None}, "field 'timestamp': required, but missing: histories follow from the order"),
    "time-text": ({"timestamp": "noon"}, "field 'timestamp': expected a number or an ISO 8601 time, got 'noon'"),
    "text": ({"text": ""}, "field 'text': expected some text, got a blank string"),
    "query": ({"query": None}, "field 'query': required, but null; there are text, timestamp, user_id"),
    "response": ({"response": "b"}, "field 'response': expected a row without it, as the record's own comes"),
    "history": ({"history": []}, "field 'history': expected a row without it, as the record's own comes"),
    "extra": ({"score": float("inf")}, "field 'score': expected a finite number, got inf"),
    "extra-surrogate": ({"tags": ["a", "\udfff"]}, "field 'tags[1]': expected valid Unicode, got a lone surrogate"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_event_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError) as caught:
        list(load("events", [{**EVENT, **change}]))
    assert str(caught.value).startswith(f"record 0: {message}")


def test_a_column_of_the_sentence_that_is_not_there_is_named() -> None:
    with pytest.raises(RecordError, match=r"^record 0: field 'title': required, but missing"):
        list(load("events", [EVENT], query="Write {title}"))


@pytest.mark.parametrize("query", ["{", "{}", "{title.upper}", "{title[0]}", "{title!r}", "{title:>3}", "{text}"])
def test_only_names_stand_in_the_braces_of_the_sentence(query: str) -> None:
    with pytest.raises(ArgumentError, match=r"^query: expected "):
        load("events", [EVENT], query=query)


def test_doubled_braces_are_braces() -> None:
    (record,) = load("events", [EVENT], query="{{x}} {user_id}")
    assert record.query == f"{{x}} {EVENT['user_id']}"


def test_a_column_that_records_have_may_be_empty_or_renamed() -> None:
    (record,) = load("events", [{**EVENT, "response": None}], query="q")
    assert record.extra == {}
    (record,) = load("events", [{**EVENT, "response": "b"}], query="q", columns={"reply": "response"})
    assert record.extra == {"reply": "b"}


def test_the_share_of_bad_events_is_one_of_all_events() -> None:
    rows = [{**EVENT, "timestamp": time, "text": str(time)} for time in range(9)]
    skipped = SkippedRecords()
    assert len(list(load("events", [*rows, {}], query="q", min_history=8, skipped=skipped))) == 1
    assert (skipped.total, skipped.accepted) == (1, 9)


def test_an_event_that_is_there_twice_is_once_in_histories() -> None:
    rows = [{**EVENT, "timestamp": time, "text": text} for time, text in [(1, "a"), (1, "a"), (2, "a"), (3, "b")]]
    *_, last = load("events", rows, query="q", skipped=SkippedRecords(max_share=0.5))
    assert [(item.text, item.timestamp) for item in last.history] == [("a", 1.0), ("a", 2.0)]


def test_bad_events_are_skipped_and_are_no_history() -> None:
    rows = [{**EVENT, "timestamp": time, "text": text} for time, text in [(1, "a"), (2, " "), (3, "c")]]
    skipped = SkippedRecords(max_share=0.5)
    records = list(load("events", rows, skipped=skipped))
    assert [len(record.history) for record in records] == [0, 1]
    assert (skipped.total, skipped.accepted) == (1, 2)
