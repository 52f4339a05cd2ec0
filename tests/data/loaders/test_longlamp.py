from __future__ import annotations

from pathlib import Path

import pytest

from nextquill.data import HistoryItem
from nextquill.data.loaders import load
from nextquill.errors import RecordError


@pytest.mark.parametrize("name", ["longlamp_topics", "longlamp_topics_own_keys"])
def test_topics_are_read_in_both_spellings(fixtures: Path, name: str) -> None:
    (record,) = load("longlamp", fixtures / f"{name}.jsonl")
    assert record.user_id == "mossy_bench"
    assert record.query == "Generate the content for a reddit post: a bench that hums."
    assert record.response == "There is a bench by the pond, and it hums in the evening."
    text = "Our gate has opinions. It will not close on Tuesdays."
    assert record.history == (HistoryItem(text, "A gate that will not close."),)


def test_reviews_keep_rating_and_summary_in_the_text(fixtures: Path) -> None:
    (record,) = load("longlamp", fixtures / "longlamp_reviews.jsonl")
    assert record.user_id == "R1"
    assert record.history[0].text == (
        '"4.0" is a rating for the product with description "A watering can.". '
        '"Pours." is summary for "It pours where I point it."'
    )


def test_abstracts_are_sorted_by_year_and_may_be_missing(fixtures: Path) -> None:
    (record,) = load("longlamp", fixtures / "longlamp_abstracts.jsonl")
    assert record.history == (
        HistoryItem("", "On Threads", 1293840000.0),
        HistoryItem("We measure ropes.", "On Ropes", 1420070400.0),
    )


def test_an_item_of_unknown_keys_is_named_with_those_it_has() -> None:
    row = {"author": "a", "input": "b", "output": "c", "profile": [{"content": "d"}, {"body": "e", "id": 1}]}
    with pytest.raises(RecordError, match=r"^record 0: field 'profile\[1\]': expected .*, got body, id$"):
        list(load("longlamp", [row]))


def test_a_row_without_any_users_name_lists_the_spellings() -> None:
    message = r"field 'user_id': required \(or name, reviewerId, reviewerID, author\), but missing; there are input"
    with pytest.raises(RecordError, match=message):
        list(load("longlamp", [{"input": "b"}]))


def test_a_profile_by_columns_is_a_profile_by_items() -> None:
    by_items = {"author": "a", "input": "b", "output": "c", "profile": [{"content": "d", "summary": "e"}] * 2}
    by_columns = {**by_items, "profile": {"content": ["d", "d"], "summary": ["e", "e"]}}
    assert list(load("longlamp", [by_items])) == list(load("longlamp", [by_columns]))
    ragged = {**by_items, "profile": {"content": ["d", "d"], "summary": ["e"]}}
    with pytest.raises(RecordError, match=r"field 'profile': expected columns of one length, got"):
        list(load("longlamp", [ragged]))
