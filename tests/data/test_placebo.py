from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.data import HistoryItem, Record, assign_placebo_histories


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
