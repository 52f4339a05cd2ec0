from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.data import HistoryItem, Record, assign_placebo_histories, stream_placebo_histories
from nextquill.data.placebo import COUNTERFACTUAL, EVALUATION
from nextquill.errors import RecordError


def _record(user_id: str, *texts: str, times: tuple[float, ...] = (), timestamp: float | None = None) -> Record:
    dates = times or (None,) * len(texts)
    items = tuple(HistoryItem(text, timestamp=time) for text, time in zip(texts, dates, strict=True))
    return Record(user_id, "query", "response", items, timestamp)


@settings(deadline=None)
@given(users=st.lists(st.sampled_from("abc"), min_size=1, max_size=12), seed=st.integers(0, 1000))
def test_every_history_is_another_users(users: list[str], seed: int) -> None:
    records = [_record(user, f"{user}{number}") for number, user in enumerate(users)]
    histories = assign_placebo_histories(records, seed)
    assert histories == assign_placebo_histories(records, seed)
    assert len(histories) == len(records)
    if len(set(users)) == 1:
        assert histories == [None] * len(records)
        return
    others = {user: {record.history for record in records if record.user_id != user} for user in users}
    assert all(history in others[user] for user, history in zip(users, histories, strict=True))


def test_no_records_have_no_histories() -> None:
    assert assign_placebo_histories([], seed=0) == []


def test_donors_are_spread_and_differ_by_seed() -> None:
    records = [_record(f"user{number}", f"text{number}") for number in range(100)]
    histories = assign_placebo_histories(records, seed=0)
    counts = Counter(history[0].text for history in histories if history)
    assert len(counts) > 50
    assert max(counts.values()) < 10
    assert assign_placebo_histories(records, seed=1) != histories


def test_a_user_who_owns_nearly_everything_still_gets_a_donor() -> None:
    records = [_record("ann", "mine")] * 3000 + [_record("bob", "his")]
    histories = assign_placebo_histories(records, seed=0)
    assert set(histories[:3000]) == {(HistoryItem("his"),)}
    assert histories[3000] == (HistoryItem("mine"),)


def test_a_donor_from_the_records_past_is_preferred() -> None:
    late = [_record(f"late{number}", "late", times=(9.0,)) for number in range(20)]
    records = [_record("ann", "own", timestamp=5.0), _record("bob", "early", times=(5.0,)), *late]
    for seed in range(20):
        assert assign_placebo_histories(records, seed)[0] == records[1].history


def test_a_later_donor_is_taken_where_there_is_no_earlier() -> None:
    records = [_record("ann", "own", times=(1.0,), timestamp=2.0), _record("bob", "late", times=(9.0,), timestamp=10.0)]
    assert assign_placebo_histories(records, seed=0) == [records[1].history, records[0].history]


def test_an_undated_donor_fits_any_record() -> None:
    records = [_record("ann", "own", timestamp=5.0), _record("bob", "undated"), _record("cy", "late", times=(9.0,))]
    assert {assign_placebo_histories(records, seed)[0] for seed in range(10)} == {records[1].history}


def test_an_empty_history_is_donated_only_if_there_is_no_other() -> None:
    filled = [_record("ann", "own"), _record("bob"), _record("cy", "hers")]
    assert {assign_placebo_histories(filled, seed)[0] for seed in range(10)} == {filled[2].history}
    assert assign_placebo_histories([_record("ann", "own"), _record("bob")], seed=0) == [(), (HistoryItem("own"),)]


def test_each_purpose_draws_on_its_own() -> None:
    records = [_record(f"user{number}", f"text{number}") for number in range(60)]
    evaluation, trained = (assign_placebo_histories(records, 0, purpose) for purpose in (EVALUATION, COUNTERFACTUAL))
    assert sum(map(tuple.__eq__, evaluation, trained)) < 6  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    users=st.lists(st.sampled_from("abc"), min_size=1, max_size=30),
    seed=st.integers(0, 1000),
    pool=st.integers(2, 8),
)
def test_every_history_of_a_stream_is_another_users(users: list[str], seed: int, pool: int) -> None:
    records = [_record(user, f"{user}{number}") for number, user in enumerate(users)]
    purposes = (EVALUATION, COUNTERFACTUAL)
    if len(set(users[:pool])) < 2 and len(users) > pool:
        with pytest.raises(RecordError, match=f"expected a second user among the first {pool}"):
            list(stream_placebo_histories(records, seed, purposes, pool))
        return
    drawn = list(stream_placebo_histories(iter(records), seed, purposes, pool))
    assert drawn == list(stream_placebo_histories(records, seed, purposes, pool))
    assert [record for record, _ in drawn] == records
    if len(set(users)) == 1:
        assert {histories for _, histories in drawn} == {(None, None)}
        return
    read = {history: number for number, history in enumerate(record.history for record in records)}
    for number, (record, histories) in enumerate(drawn):
        for history in histories:
            assert history is not None
            assert history[0].text[0] != record.user_id
            assert read[history] <= number + pool, "a donor that has not been read yet"


def test_donors_of_a_stream_are_spread_over_what_was_read() -> None:
    records = [_record(f"user{number}", f"text{number}") for number in range(2000)]
    histories = [h[0] for _, h in stream_placebo_histories(records, 0, pool_size=200)]
    ages = [number - int(h[0].text[4:]) for number, h in enumerate(histories) if h]
    assert min(ages) < -100
    assert sum(age > 400 for age in ages) > 400, "donors of long ago are still among them"
    counts = Counter(h[0].text for h in histories if h)
    assert len(counts) > 300
    assert [h[0] for _, h in stream_placebo_histories(records, 1, pool_size=200)] != histories


def test_a_donor_from_the_records_past_is_preferred_in_a_stream() -> None:
    late = [_record(f"late{number}", "late", times=(9.0,)) for number in range(20)]
    records = [_record("ann", "own", timestamp=5.0), _record("bob", "early", times=(5.0,)), *late]
    for seed in range(10):
        assert next(stream_placebo_histories(records, seed))[1] == (records[1].history,)


def test_a_second_user_stays_among_the_donors_however_long_the_first_goes_on() -> None:
    records = [_record("bob", "his"), *[_record("ann", "mine")] * 3000]
    found = [histories[0] for _, histories in stream_placebo_histories(records, 0, pool_size=50)]
    assert set(found[1:]) == {records[0].history}


def test_histories_of_a_stream_may_all_be_empty() -> None:
    records = [_record("ann"), _record("bob")]
    assert [histories for _, histories in stream_placebo_histories(records, 0)] == [((),), ((),)]


def test_a_stream_is_read_no_further_than_the_pool() -> None:
    read: list[int] = []

    def source() -> Iterator[Record]:
        for number in range(1000):
            read.append(number)
            yield _record(f"user{number}", "text")

    stream = stream_placebo_histories(source(), 0, pool_size=30)
    for _ in range(5):
        next(stream)
    assert len(read) == 34
