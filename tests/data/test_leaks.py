"""Every leak from a test record to the training is found and named, and nothing else is."""

from __future__ import annotations

import time
from typing import Any

import pytest

from nextquill.data import HistoryItem, Record
from nextquill.data.leaks import check_no_leaks, find_leaks
from nextquill.errors import ArgumentError, RecordError


def record(user: str, response: str, *history: str, at: float | None = None) -> Record:
    return Record(user, "q", response, tuple(map(HistoryItem, history)), at)


TEST = [record("ann", "A slow sea.", "an old text", at=5.0), record("bob", "A thin plot.", at=5.0)]
CLEAN = [record("ann", "Something else.", "an old text", at=4.0), record("eve", "A slow hill.", at=9.0)]

LEAKS: dict[str, tuple[list[Record], list[Record], dict[str, Any], str]] = {
    "response": (
        [*CLEAN, record("eve", "A slow sea.", at=1.0)], TEST, {},
        "test record 0 (user 'ann'): its response is the response of train record 2 (user 'eve'), word for word",
    ),
    "history": (
        [*CLEAN, record("eve", "x", "y", "A thin plot.", at=1.0)], TEST, {},
        "test record 1 (user 'bob'): its response is history[1] of train record 2 (user 'eve'), word for word",
    ),
    "normalised": (
        [record("eve", "x", "a  SLOW\nsea. ")], TEST, {},
        (
            "test record 0 (user 'ann'): its response is history[0] of train record 0 (user 'eve'), "
            "ignoring case and white space"
        ),
    ),
    "own-history-of-test": (
        CLEAN, [record("ann", "Good.", "x", " good. ")], {},
        "test record 0 (user 'ann'): its own response is its history[1]",
    ),
    "own-history-of-train": (
        [*CLEAN, record("ann", "Good.", "Good.")], TEST, {},
        "train record 2 (user 'ann'): its own response is its history[0]",
    ),
    "user": (
        CLEAN, TEST, {"split": "users"},
        "test record 0 (user 'ann'): expected a user who is not trained on, got that of train record 0 (user 'ann')",
    ),
    "time": (
        [record("ann", "x", at=5.5), record("ann", "z", at=6.0), record("bob", "y", at=5.0)], TEST, {"split": "time"},
        "test record 0 (user 'ann'), at 5.0, is earlier than train record 0 (user 'ann'), at 5.5",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("train", "test", "options", "message"), LEAKS.values(), ids=LEAKS.keys())
def test_a_leak_is_named_once(train: list[Record], test: list[Record], options: dict[str, Any], message: str) -> None:
    assert [leak.message for leak in find_leaks(iter(train), test, **options)] == [message]
    with pytest.raises(RecordError) as caught:
        check_no_leaks(train, test, **options)
    assert str(caught.value) == f"1 leak from test to train: {message}"


LONG = "This one is a slow sea with a thin plot."
WORDED = [
    f'"2" is a rating. "Sea" is summary for "{LONG}"',
    f"- [Review Text]: {LONG.upper()}",
    f"Preferred: {LONG}\nNo: x",
]


@pytest.mark.parametrize("text", WORDED, ids=["quoted", "labelled", "pair"])
def test_a_long_response_is_found_within_the_wording_of_a_past_text(text: str) -> None:
    test = [record("ann", LONG), record("bob", LONG)]
    assert [leak.message for leak in find_leaks([record("eve", "x", "y", text)], test)] == [
        f"test record {i} (user {user!r}): its response stands in history[1] of train record 0 (user 'eve')"
        for i, user in enumerate(["ann", "bob"])
    ]
    (leak,) = find_leaks([], [record("ann", LONG, "y", text)])
    assert leak.message == "test record 0 (user 'ann'): its own response stands in its history[1]"


def test_a_text_that_only_shares_words_with_a_response_is_no_leak() -> None:
    others = ["This one is a slow sea with a thin plan.", LONG[:-6], "a thin plot.", f"The {LONG[5:]}"]
    assert find_leaks([record("eve", "x", *others)], [record("ann", LONG), record("bob", "thin plot.")]) == []


def test_what_is_no_leak() -> None:
    check_no_leaks(CLEAN, TEST)
    check_no_leaks(CLEAN, TEST, split="time")
    check_no_leaks([record("eve", "x", "an old text")], TEST, split="users")
    later = record("ann", "x", "A slow hill.")  # a training response in a test record's history is how it should be
    check_no_leaks([record("ann", "A slow hill.")], [later])


def test_two_test_records_with_one_leaked_response_are_both_named() -> None:
    leaks = find_leaks([record("eve", "yes")], [record("ann", "Yes"), record("bob", "yes")])
    assert [leak.message[:13] for leak in leaks] == ["test record 0", "test record 1"]
    assert find_leaks([record("eve", "yes", "yes")], [record("ann", "Yes", "yes")], least_characters=4) == []


def test_a_response_that_leaks_twice_is_reported_once() -> None:
    (leak,) = find_leaks([record("eve", "YES"), record("eve", "no", "yes")], [record("ann", "yes")])
    assert leak.kind == "answer"
    assert "the response of train record 0" in leak.message


def test_many_leaks_are_counted() -> None:
    records = [record("ann", f"response {i}") for i in range(12)]
    with pytest.raises(RecordError, match=r"^12 leaks from test to train: .*; and 7 more$"):
        check_no_leaks(records, records)


def test_what_cannot_be_checked_is_an_error() -> None:
    with pytest.raises(
        RecordError, match=r"^train record 0 \(user 'eve'\): expected a timestamp to check the order by"
    ):
        check_no_leaks([record("eve", "x")], TEST, split="time")
    with pytest.raises(ArgumentError, match=r"^split: expected one of 'users', 'time', got 'random'"):
        check_no_leaks(CLEAN, TEST, split="random")
    with pytest.raises(ArgumentError, match=r"^least_characters: expected at least 1, got 0"):
        check_no_leaks(CLEAN, TEST, least_characters=0)


def test_the_time_grows_with_the_number_of_records_and_not_with_its_square() -> None:
    def seconds(count: int) -> float:
        texts = [f"text number {i} of this user" for i in range(count + 20)]
        train = [record("ann", texts[i + 10], *texts[i : i + 10]) for i in range(count)]
        test = [record("bob", f"answer {i}") for i in range(count)]
        start = time.process_time()
        assert find_leaks(train, test) == []
        return time.process_time() - start

    few = min(seconds(500) for _ in range(3))
    assert seconds(8000) < 100 * few, "16 times as much; a comparison of all pairs would take 256 times as long"
