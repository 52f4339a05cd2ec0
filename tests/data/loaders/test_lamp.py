from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nextquill.data import HistoryItem, SkippedRecords
from nextquill.data.loaders import load
from nextquill.errors import ArgumentError, RecordError

QUESTION = {"id": "1", "input": "Write a title: a pond", "output": "Pond", "profile": []}


def _item(**item: Any) -> HistoryItem:
    return next(iter(load("lamp", [{**QUESTION, "profile": [item]}]))).history[0]


def test_questions_meet_their_outputs_and_keep_what_predictions_are_written_back_with(fixtures: Path) -> None:
    records = list(load("lamp", fixtures / "lamp_2_questions.json", outputs=fixtures / "lamp_2_outputs.json"))
    assert [(record.user_id, record.response) for record in records] == [("110", "sci-fi"), ("111", "comedy")]
    assert records[0].query.endswith("A lighthouse keeper befriends a comet.")
    assert records[0].extra == {"id": "110", "task": "LaMP_2"}
    assert [item.text for item in records[0].history] == [
        'the tag for the movie: "A clock that runs on fog." is "sci-fi"',
        'the tag for the movie: "Two ferrymen lose their ferry." is "comedy"',
    ]


def test_time_based_release_has_users_and_dates_and_its_items_are_sorted(fixtures: Path) -> None:
    source = fixtures / "lamp_3_time_questions.json"
    (record,) = load("lamp", source, outputs=fixtures / "lamp_3_time_outputs.json")
    assert (record.user_id, record.extra["id"], record.timestamp) == ("31", "310", 1398988800.0)
    assert record.history == (
        HistoryItem('2 is the score for "The lid does not fit."', None, 1325980800.0),
        HistoryItem('5 is the score for "A fine broom."', None, 1385769600.0),
    )


ITEMS = {
    "1-and-5": ({"id": "9", "title": "On Ropes", "abstract": "We pull."}, HistoryItem("We pull.", "On Ropes")),
    "1-without-abstract": ({"id": "9", "title": "On Ropes", "abstract": None}, HistoryItem("", "On Ropes")),
    "2-news": (
        {"id": "9", "title": "Storm", "text": "It blew.", "category": "weather"},
        HistoryItem('the category for the article: "It blew." is "weather"', "Storm"),
    ),
    "4": ({"id": "9", "title": "Storm", "text": "It blew."}, HistoryItem("It blew.", "Storm")),
    "6-title": ({"id": "9", "title": "Lunch", "text": "At one?"}, HistoryItem("At one?", "Lunch")),
    "6-subject": ({"id": "9", "subject": "Lunch", "text": "At one?"}, HistoryItem("At one?", "Lunch")),
    "7": ({"id": "9", "text": "what a day"}, HistoryItem("what a day")),
    "year": ({"id": "9", "text": "x", "date": 1971}, HistoryItem("x", None, 31536000.0)),
    "year-text": ({"id": "9", "text": "x", "date": "1971"}, HistoryItem("x", None, 31536000.0)),
}


@pytest.mark.parametrize(("item", "expected"), ITEMS.values(), ids=ITEMS.keys())
def test_a_past_item_of_each_task_becomes_text(item: dict[str, Any], expected: HistoryItem) -> None:
    assert _item(**item) == expected


BAD = {
    "unknown-keys": (
        {"profile": [{"text": "a"}, {"id": "3", "colour": "red"}]},
        "field 'profile[1]': expected tag and description, text (with score or category), or title and abstract, got c",
    ),
    "text-type": ({"profile": [{"text": 3}]}, "field 'profile[0].text': expected a string, got int"),
    "score-nan": (
        {"profile": [{"text": "a", "score": float("nan")}]},
        "field 'profile[0].score': expected a finite number, got nan",
    ),
    "profile-missing": ({"profile": None}, "field 'profile': required, but null; there are id, input, output"),
    "profile-text": ({"profile": "a"}, "field 'profile': expected a list of objects, got str"),
    "item-text": ({"profile": ["a"]}, "field 'profile[0]': expected an object with named fields, got str"),
    "input-surrogate": (
        {"input": "\ud800"},
        "field 'input': expected valid Unicode, got a lone surrogate at character 0",
    ),
    "no-output": ({"output": None}, "field 'output': required (or response), but null"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_question_is_named_by_place_and_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError) as caught:
        list(load("lamp", [{**QUESTION, **change}]))
    assert str(caught.value).startswith(f"record 0: {message}")


def test_a_question_without_gold_is_named_and_can_be_skipped(fixtures: Path, write: Any) -> None:
    outputs = write("outputs.json", {"task": "LaMP_2", "golds": [{"id": "111", "output": "comedy"}]})
    source = fixtures / "lamp_2_questions.json"
    with pytest.raises(RecordError, match=r"line 1 item 0: field 'id': expected an id from the outputs, got '110'$"):
        list(load("lamp", source, outputs=outputs))
    skipped = SkippedRecords(max_share=0.5)
    assert [record.user_id for record in load("lamp", source, outputs=outputs, skipped=skipped)] == ["111"]
    assert skipped.counts == {"outputs": 1}


def test_the_public_files_of_task_6_hold_no_texts(write: Any) -> None:
    outputs = write("outputs.json", {"task": "LaMP_6", "golds": [{"id": "1", "output": "031-000018-EM"}]})
    with pytest.raises(RecordError, match=r"field 'input': expected an e-mail, got the id '031-000017-EM'"):
        list(load("lamp", [{"id": "1", "input": "031-000017-EM", "profile": []}], outputs=outputs))


def test_a_review_without_its_score_is_named_where_the_task_is_about_it() -> None:
    question = {**QUESTION, "profile": [{"text": "A fine broom."}]}
    with pytest.raises(RecordError, match=r"field 'profile\[0\]\.score': expected the review's score"):
        list(load("lamp", [question], task="LaMP_3"))
    (record,) = load("lamp", [question], task="LaMP_5")
    assert record.history[0].text == "A fine broom."


BAD_OUTPUTS = {
    "not-json": (b"{", "not valid JSON: "),
    "list": (b"[]", "expected an object with a list 'golds'"),
    "no-golds": (b"{}", "expected an object with a list 'golds'"),
    "twice": (
        b'{"golds": [{"id": "1", "output": "a"}, {"id": "1", "output": "b"}]}',
        "field 'golds[1].id': expected every id once, got '1' again",
    ),
    "type": (b'{"golds": [{"id": "1", "output": 1}]}', "field 'golds[0].output': expected a string, got int"),
}


@pytest.mark.parametrize(("content", "message"), BAD_OUTPUTS.values(), ids=BAD_OUTPUTS.keys())
def test_a_bad_file_of_outputs_is_named(write: Any, content: bytes, message: str) -> None:
    outputs = write("outputs.json", content)
    with pytest.raises(RecordError) as caught:
        list(load("lamp", [QUESTION], outputs=outputs))
    assert str(caught.value).startswith(f"{outputs}: {message}")


def test_outputs_on_the_hub_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^outputs: expected a file, got hf://a/b$"):
        load("lamp", [QUESTION], outputs="hf://a/b")
