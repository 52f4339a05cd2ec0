from __future__ import annotations

import json
from pathlib import Path

import pytest

from nextquill.data.loaders import load
from nextquill.errors import ArgumentError, RecordError


def test_reviews_are_worded_as_in_the_published_code(fixtures: Path) -> None:
    (record,) = load("amazon", fixtures / "amazon_reviews.jsonl", metadata=fixtures / "amazon_items.jsonl")
    assert record.query == (
        "[Item Title]: Rain\n[Item Description]: \n[Output Review Rating]: 4.0\n[Output Review Title]: Again"
    )
    assert (record.user_id, record.response, record.extra) == ("A1", "I read it again at once.", {"asin": "B3"})
    warm, thin = (item.text for item in record.history)
    assert warm == (
        "- [Item Title]: Soup\n- [Item Description]: A novel.\n- [Review Rating]: 5.0\n- [Review Title]: Warm\n"
        "- [Review Text]: A warm book."
    )
    assert thin == (
        "- [Item Title]: Fog\n- [Item Description]: Part one. Part two.\n- [Review Rating]: 2.0\n"
        "- [Review Title]: Thin\n- [Review Text]: The plot is thin."
    )


def test_milliseconds_become_seconds(fixtures: Path) -> None:
    (record,) = load("amazon", fixtures / "amazon_reviews.jsonl", metadata=fixtures / "amazon_items.jsonl")
    assert record.timestamp == 1400000000.0
    assert [item.timestamp for item in record.history] == [1200000000.0, 1300000000.5]


def test_the_wrong_unit_is_an_error_not_a_guess(fixtures: Path) -> None:
    with pytest.raises(
        RecordError, match=r"field 'profile\[0\].timestamp': expected seconds, got 1300000000500, which"
    ):
        list(
            load(
                "amazon",
                fixtures / "amazon_reviews.jsonl",
                metadata=fixtures / "amazon_items.jsonl",
                time_unit="s",
            )
        )


def test_metadata_are_required_and_have_to_know_every_item(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "amazon_reviews.jsonl"
    with pytest.raises(ArgumentError, match=r"^metadata: required by format 'amazon'"):
        load("amazon", source)
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"asin": "B3", "title": "Rain", "description": ""}))
    with pytest.raises(RecordError, match=r"line 1: field 'profile\[0\].asin': expected an item from the metadata"):
        list(load("amazon", source, metadata=items))
    items.write_text(json.dumps({"asin": "B3", "title": "Rain", "description": 3}))
    with pytest.raises(RecordError, match=r"items.jsonl line 1: field 'description': expected a string or a list"):
        load("amazon", source, metadata=items)
    with pytest.raises(ArgumentError, match=r"^metadata: expected a file ending in .*, got items"):
        load("amazon", source, metadata="items")
