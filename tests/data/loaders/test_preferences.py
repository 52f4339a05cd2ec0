from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nextquill.data import HistoryItem
from nextquill.data.loaders import load
from nextquill.errors import ArgumentError, RecordError


def _text(chosen: str, rejected: str) -> str:
    return f"Preferred: {chosen}\nNot preferred: {rejected}"


def test_elix_takes_the_labelled_response_and_the_users_other_pairs(fixtures: Path) -> None:
    records = list(load("preferences", fixtures / "elix.jsonl"))
    assert [record.user_id for record in records] == ["child", "child", "child", "expert", "child"]
    first, again, rain, other, snow = records
    assert (first.query, first.response) == ("Why is the sky blue?", "Because it likes to be.")
    pair = {"chosen": "Because it likes to be.", "rejected": "Because of scattering."}
    assert first.extra == {**pair, "level_x": "expert", "level_y": "child"}
    assert first.history == () == other.history
    assert again.history == (), "a pair with the same prompt would give the answer away"
    sky = [
        HistoryItem(_text("Because it likes to be.", "Because of scattering."), "Why is the sky blue?"),
        HistoryItem(_text("It is a big blue blanket.", "Short waves scatter more."), "Why is the sky blue?"),
    ]
    assert list(rain.history) == sky
    assert list(snow.history) == [
        *sky,
        HistoryItem(_text("Clouds that are full.", "Condensed water."), "What is rain?"),
    ]


@pytest.mark.parametrize("max_pairs", [0, 1, 5, 8])
@pytest.mark.parametrize("rows", [1, 4, 7, 30])
def test_the_latest_pairs_are_kept(max_pairs: int, rows: int) -> None:
    pairs = [{"user_id": "u", "prompt": f"p{i}", "chosen": f"c{i}", "rejected": "r"} for i in range(rows)]
    *_, last = load("preferences", pairs, max_pairs=max_pairs)
    assert [item.title for item in last.history] == [f"p{i}" for i in range(max(0, rows - 1 - max_pairs), rows - 1)]


def test_roleplay_has_its_own_spelling(fixtures: Path) -> None:
    june, may = load("preferences", fixtures / "roleplay.jsonl")
    assert (june.user_id, june.query, june.response) == ("persona-1", "Where to in June?", "To the coast, early.")
    assert may.history == (HistoryItem(_text("To the coast, early.", "Anywhere."), "Where to in June?"),)


def test_alignx_has_the_history_in_the_row(fixtures: Path) -> None:
    tomatoes, moss = load("preferences", fixtures / "alignx.json")
    assert tomatoes.history == (
        HistoryItem("Mine are always late, and worth it.", "My beans are late."),
        HistoryItem(_text("Put out a saucer of beer.", "Salt."), "Slugs!"),
    )
    assert tomatoes.extra["rejected"] == "Buy others."
    assert tomatoes.extra["Demographic Information"] == "A gardener in the north."
    assert moss.history == ()
    assert tomatoes.user_id.startswith("row-")
    assert tomatoes.user_id != moss.user_id


def test_a_pair_whose_chosen_text_is_the_response_is_left_out() -> None:
    rows = [{"user_id": "u", "prompt": f"p{i}", "chosen": chosen, "rejected": "r"} for i, chosen in enumerate("aba")]
    *_, last = load("preferences", rows)
    assert [item.title for item in last.history] == ["p1"]


def test_an_answer_that_stands_in_a_pair_as_the_rejected_text_is_left_out() -> None:
    rows = [
        {"user_id": "u", "prompt": f"p{i}", "chosen": chosen, "rejected": rejected}
        for i, (chosen, rejected) in enumerate(["ba", "cd", "ae"])
    ]
    *_, last = load("preferences", rows)
    assert [item.title for item in last.history] == ["p1"]


def test_the_rows_own_history_does_not_give_its_answer_away() -> None:
    pairs = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in ["pxy", "qay", "qxa", "rxy"]
    ]
    comments = [{"prompt": prompt, "comment": text} for prompt, text in ["px", "sa", "tx"]]
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "Pair-wise Comparative Feedback": pairs}
    (record,) = load("preferences", [row | {"User-Generated Content": comments}])
    assert [item.title for item in record.history] == ["t", "r"]


def test_a_history_in_the_row_stands_in_place_of_the_earlier_pairs() -> None:
    pair = {"user_id": "u", "prompt": "p", "chosen": "a", "rejected": "b"}
    own = ["one", {"title": "t", "text": "two", "timestamp": "2020-01-01T00:00:00Z"}, {"title": "p", "text": "x"}, "a"]
    rows = [pair, {**pair, "prompt": "q", "chosen": "c"}, {**pair, "prompt": "p", "rejected": "d", "history": own}]
    _, by_pairs, by_row = load("preferences", rows)
    assert [item.title for item in by_pairs.history] == ["p"]
    assert by_row.history == (HistoryItem("one"), HistoryItem("two", "t", 1577836800.0)), "two would give it away"
    assert next(iter(load("preferences", [{**pair, "history": '["one"]'}]))).history == (HistoryItem("one"),)
    with pytest.raises(RecordError, match=r"^record 0: field 'history': expected a list of strings or of objects"):
        list(load("preferences", [{**pair, "history": 3}]))


def test_a_pair_of_the_same_moment_or_later_is_no_history() -> None:
    rows = [
        {"user_id": "u", "prompt": f"p{i}", "chosen": f"c{i}", "rejected": "r", "timestamp": time}
        for i, time in enumerate([5, 3, 4, 4, None])
    ]
    records = list(load("preferences", rows))
    assert [record.timestamp for record in records] == [5, 3, 4, 4, None]
    titles = [[item.title for item in record.history] for record in records]
    assert titles == [[], [], ["p1"], ["p1"], ["p1", "p2", "p3", "p0"]]
    assert records[3].history[0].timestamp == 3


def test_pairs_of_one_preferred_and_several_other_responses_are_no_duplicates() -> None:
    row = {"user_id": "u", "prompt": "p", "chosen": "a", "rejected": "b"}
    assert len(list(load("preferences", [row, {**row, "rejected": "c"}]))) == 2
    with pytest.raises(RecordError, match=r"^record 1: the same user, query, response and time as record 0$"):
        list(load("preferences", [row, row]))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "label": (
        {"prompt": "a", "response_x": "b", "response_y": "c", "label": 2, "user_id": "u"},
        "field 'label': expected 0 for response_x or 1 for response_y, got '2'",
    ),
    "one-response": (
        {"prompt": "a", "response_x": "b", "label": 1, "user_id": "u"},
        "field 'response_y': required, but missing; there are label, prompt, response_x, user_id",
    ),
    "user": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "field 'user_id': required (or scorer_level, level), but missing; there are chosen, prompt, rejected",
    ),
    "blank": (
        {"prompt": "a", "chosen": " ", "rejected": "c"},
        "field 'chosen': expected some text, got a blank string",
    ),
    "comment": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "User-Generated Content": [{"prompt": "d"}]},
        "field 'User-Generated Content[0].comment': required, but missing; there are prompt",
    ),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_pair_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError) as caught:
        list(load("preferences", [row]))
    assert str(caught.value) == f"record 0: {message}"


def test_a_bad_number_of_pairs_is_refused_at_once() -> None:
    with pytest.raises(ArgumentError, match=r"^max_pairs: expected at least 0, got -1$"):
        load("preferences", [{}], max_pairs=-1)


def test_alignx_rows_of_one_person_are_one_user_in_every_file() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "Pair-wise Comparative Feedback": [],
           "User-Generated Content": [{"prompt": "Slugs!", "comment": "Put out a saucer of beer."}]}  # fmt: skip
    other = {**row, "User-Generated Content": [{"prompt": "Slugs!", "comment": "Salt."}]}
    nothing = [{**row, "prompt": prompt, "User-Generated Content": []} for prompt in ("p", "q")]
    first = [record.user_id for record in load("preferences", [row, other, *nothing])]
    second = [record.user_id for record in load("preferences", [other, {**row, "prompt": "q"}])]
    assert len(set(first)) == 4  # two of which nothing is known are not taken for one
    assert second == [first[1], first[0]]


def test_a_row_may_name_its_prompt_twice_but_not_two_prompts() -> None:
    row = {"user_id": "u", "prompt": "p", "chosen": "a", "rejected": "b", "history": ["t"]}
    (record,) = load("preferences", [{**row, "query": "p"}])
    assert record == next(load("preferences", [row]))
    with pytest.raises(RecordError, match="field 'query': expected the text of the prompt, or no query"):
        list(load("preferences", [{**row, "query": "another"}]))
