"""Divisions of records: nothing is lost or doubled, time runs forwards, and users stay on their side."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextquill.data import Record
from nextquill.data.splits import by_time, hold_out_users, leave_last_out
from nextquill.errors import ArgumentError, RecordError


def record(user: str, time: float | None = None, response: str = "r") -> Record:
    return Record(user, "q", response, timestamp=time)


def numbered(pairs: list[tuple[str, float | None]]) -> list[Record]:
    return [record(user, time, f"response {number}") for number, (user, time) in enumerate(pairs)]


def names(records: list[Record]) -> list[str]:
    return [each.response.removeprefix("response ") for each in records]


dated = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 6).map(float)), min_size=1, max_size=25).map(numbered)


@given(records=dated)
def test_leave_last_out_divides_all_records_and_time_runs_forwards(records: list[Record]) -> None:
    users: dict[str, list[Record]] = {}
    for each in records:
        users.setdefault(each.user_id, []).append(each)
    if all(len(own) < 3 for own in users.values()):
        with pytest.raises(RecordError, match="expected a user with at least 3 records"):
            leave_last_out(records)
        return
    splits = leave_last_out(records)
    assert splits.order == "timestamp"
    parts = (splits.train, splits.validation, splits.test)
    assert sorted(names([*parts[0], *parts[1], *parts[2]]), key=int) == list(map(str, range(len(records))))
    for user, own in users.items():
        train, validation, test = ([each for each in part if each.user_id == user] for part in parts)
        expected = (len(own) - 2, 1, 1) if len(own) >= 3 else (len(own), 0, 0)
        assert (len(train), len(validation), len(test)) == expected
        if test:
            assert max(each.timestamp for each in train) <= validation[0].timestamp <= test[0].timestamp


def test_leave_last_out_by_hand() -> None:
    records = numbered([("a", 3.0), ("b", 1.0), ("a", 1.0), ("a", 2.0), ("a", 3.0), ("b", 2.0)])
    splits = leave_last_out(records)
    assert (names(splits.train), names(splits.validation), names(splits.test)) == (["1", "2", "3", "5"], ["0"], ["4"])
    undated = leave_last_out(numbered([("a", None)] * 4))
    assert (names(undated.train), names(undated.validation), names(undated.test)) == (["0", "1"], ["2"], ["3"])
    assert undated.order == "file order"


def test_leave_last_out_needs_one_kind_of_order() -> None:
    with pytest.raises(RecordError, match=r"^record 2 \(user 'a'\): expected a timestamp, as other records have one"):
        leave_last_out(numbered([("a", 1.0), ("a", 2.0), ("a", None)]))
    with pytest.raises(ArgumentError, match=r"^least_records: expected at least 3, got 2"):
        leave_last_out([], least_records=2)


def test_by_time() -> None:
    records = numbered([("a", 3.0), ("b", 1.0), ("a", 2.0), ("a", 2.5)])
    splits = by_time(iter(records), 2.5)
    assert (names(splits.train), names(splits.validation), names(splits.test)) == (["1", "2"], [], ["0", "3"])
    splits = by_time(records, 2.5, validation_from=2.0)
    assert (names(splits.train), names(splits.validation), names(splits.test)) == (["1"], ["2"], ["0", "3"])
    assert splits.order == "timestamp"


@pytest.mark.parametrize(
    ("cutoff", "options", "error", "message"),
    [
        (9.0, {}, RecordError, "none for test"),
        (1.0, {}, RecordError, "none for train"),
        (3.0, {"validation_from": 2.9}, RecordError, "none for validation"),
        (2.0, {"validation_from": 2.0}, ArgumentError, "validation_from: expected a time before the cutoff 2.0"),
    ],
)  # fmt: skip
def test_by_time_leaves_no_part_empty(
    cutoff: float, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        by_time(numbered([("a", 1.0), ("a", 2.0), ("a", 3.0)]), cutoff, **options)


def test_by_time_needs_timestamps() -> None:
    with pytest.raises(RecordError, match=r"^record 1 \(user 'b'\): expected a timestamp, got none"):
        by_time(numbered([("a", 1.0), ("b", None)]), 1.0)


def crowd(count: int) -> list[Record]:
    return numbered([(f"user {number % count}", None) for number in range(2 * count)])


def test_held_out_users_are_whole_and_as_many_as_asked() -> None:
    splits = hold_out_users(crowd(50), 0.2, validation_share=0.1)
    users = [{each.user_id for each in part} for part in (splits.train, splits.validation, splits.test)]
    assert [len(each) for each in users] == [35, 5, 10]
    assert len(set.union(*users)) == 50
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [70, 10, 20]
    assert splits.order is None


def test_who_is_held_out_depends_on_the_seed_and_on_neither_order_nor_company() -> None:
    def held_out(records: list[Record], seed: int = 0) -> set[str]:
        return {each.user_id for each in hold_out_users(records, 0.2, seed).test}

    assert held_out(crowd(50)) == held_out(crowd(50)[::-1])
    assert held_out(crowd(50)) != held_out(crowd(50), seed=1)
    assert len(held_out(crowd(50)) - held_out(crowd(55))) <= 2


@pytest.mark.parametrize(
    ("share", "options", "message"),
    [
        (0.0, {}, "share: expected a share above 0, got 0"),
        (1.0, {}, r"share: expected a share in \[0, 1\), got 1.0"),
        (0.5, {"validation_share": -0.1}, r"validation_share: expected a share in \[0, 1\), got -0.1"),
        (0.5, {"validation_share": 0.5}, "share: expected users left for training, got 5 .* and 5 .* of 10"),
    ],
)  # fmt: skip
def test_shares_that_cannot_be(share: float, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{message}"):
        hold_out_users(crowd(10), share, **options)
