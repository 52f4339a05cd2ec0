"""Users gathered from records, signals that give a pair away, and draws for training and evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.data import HistoryItem, Record, SkippedRecords
from nextquill.data.loaders import load
from nextquill.errors import ArgumentError, RecordError
from nextquill.popi.users import (
    Draw,
    Pair,
    User,
    check_draw,
    check_users,
    draw,
    gives_away,
    held_out,
    users_from_records,
)

PAIR = Pair("What to read?", "A slow tale.", "A thriller.")
LONG = "She likes long and winding tales of the sea."


def record(user: str = "ann", query: str = "q", chosen: str | None = "yes", rejected: str | None = "no", **fields: Any):
    extra = {name: value for name, value in (("chosen", chosen), ("rejected", rejected)) if value is not None}
    given_extra = fields.pop("extra", {})
    return Record(user, query, chosen or "written", extra={**extra, **given_extra}, **fields)


# ---- from records -----------------------------------------------------------------------------------


def test_records_are_gathered_by_user_in_the_order_of_their_first() -> None:
    users = users_from_records([record("bob", "1"), record("ann", "2"), record("bob", "3")])
    assert [(user.user_id, [pair.query for pair in user.pairs]) for user in users] == [
        ("bob", ["1", "3"]),
        ("ann", ["2"]),
    ]


def test_items_are_the_union_of_the_histories_and_the_responses_without_a_pair() -> None:
    sea, hill = HistoryItem("Sea.", timestamp=5.0), HistoryItem("Hill.", "walks", 2.0)
    (user,) = users_from_records(
        [
            record(query="1", history=(sea,)),
            record(query="2", history=(hill, sea)),
            record(query="3", chosen=None, rejected=None, timestamp=3.0),
        ]
    )
    assert user.items == (hill, HistoryItem("written", "3", 3.0), sea)
    assert [pair.query for pair in user.pairs] == ["1", "2"]


def test_pairs_rendered_in_histories_do_not_stand_beside_the_pairs_themselves() -> None:
    first, second = Pair("1", "a", "b"), Pair("2", "c", "d")
    (user,) = users_from_records(
        [
            record(query="1", chosen="a", rejected="b"),
            record(query="2", chosen="c", rejected="d", history=(replace(first.as_item(), timestamp=1.0),)),
        ]
    )
    assert (user.pairs, user.items) == ((first, second), ())


def test_pairs_rendered_by_the_loader_of_preferences_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"user_id": "u", "prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(5)]
    rows.append({"user_id": "u", "prompt": "", "chosen": "blank good", "rejected": "blank bad"})
    rows.append({"user_id": "u", "prompt": "last", "chosen": "x", "rejected": "y"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = list(load("preferences", path))
    assert any(item.text.startswith("Preferred: ") for one in records for item in one.history)
    (user,) = users_from_records(records)
    assert (len(user.pairs), user.items) == (7, ())


def test_pairs_with_timestamps_are_in_their_order_and_repeated_ones_are_kept_once() -> None:
    users = users_from_records(
        [record(query="late", timestamp=9.0), record(query="early", timestamp=1.0), record(query="late", timestamp=9.5)]
    )
    assert [pair.query for pair in users[0].pairs] == ["early", "late"]


def test_a_given_summary_is_kept() -> None:
    (user,) = users_from_records([record(extra={"summary": " Likes the sea. "}), record(query="2")])
    assert user.summary == "Likes the sea."


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record(rejected=None), r"^record 1 \(user 'ann'\): field 'rejected': expected both of a pair"),
        (record(chosen=None), r"field 'chosen': expected both of a pair or neither"),
        (record(chosen="same", rejected="same"), r"field 'rejected': expected another text than 'chosen'"),
        (record(chosen=" "), r"field 'chosen': expected some text, got a blank string"),
        (record(extra={"chosen": 3}), r"field 'chosen': expected a string, got int"),
        (record(extra={"summary": ["x"]}), r"field 'summary': expected a string, got list"),
        (record(extra={"summary": "other"}), r"field 'summary': expected one summary of a user"),
    ],
    ids=["no-rejected", "no-chosen", "equal", "blank", "number", "summary-list", "two-summaries"],
)
def test_a_bad_record_is_named_or_skipped(bad: Record, message: str) -> None:
    good = [record(query=str(i), extra={"summary": "one"}) for i in range(9)]
    with pytest.raises(RecordError, match=message):
        users_from_records([good[0], bad])
    skipped = SkippedRecords()
    assert users_from_records([*good, bad], skipped) == users_from_records(good)
    assert skipped.total == 1


@pytest.mark.parametrize("records", [[], [record(chosen=None, rejected=None)]], ids=["nothing", "no-pair"])
def test_records_without_any_pair_are_refused(records: list[Record]) -> None:
    with pytest.raises(RecordError, match=r"^records: expected some with 'chosen' and 'rejected', got \d users"):
        users_from_records(records)


# ---- signals that give a pair away ------------------------------------------------------------------

GIVING = {
    "query": HistoryItem("Anything.", title=" what  to READ?\n"),
    "itself": PAIR.as_item(),
    "swapped": HistoryItem("Preferred: A thriller.\nNot preferred: A slow tale."),
    "chosen": HistoryItem("a slow\ttale."),
    "rejected": HistoryItem("A THRILLER."),
    "line": HistoryItem("I said:\n  A slow tale.\nand meant it."),
    "line-separator": HistoryItem("I said:\u2028A slow tale.\u2029and meant it."),
    "label": HistoryItem("Preferred: A slow tale.\nNot preferred: something else"),
    "title": HistoryItem("Anything.", title="A slow tale."),
    "composed": HistoryItem("\uff21 slow tale."),
}


@pytest.mark.parametrize("item", GIVING.values(), ids=GIVING.keys())
def test_an_item_with_the_query_or_an_answer_gives_the_pair_away(item: HistoryItem) -> None:
    assert gives_away(item, PAIR)


@pytest.mark.parametrize(
    "item",
    [
        HistoryItem("Preferred: A quick tale.\nNot preferred: A thriller of sorts.", title="What to eat?"),
        HistoryItem("Not a slow tale. No."),
        HistoryItem("What to read?", title="a question"),
        HistoryItem(""),
    ],
    ids=["other-pair", "inside", "query-as-text", "empty"],
)
def test_other_items_do_not(item: HistoryItem) -> None:
    assert not gives_away(item, PAIR)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_long_answer_is_found_inside_a_text_and_over_its_lines(side: str) -> None:
    pair = replace(PAIR, **{side: LONG})
    assert gives_away(HistoryItem(f"5 stars. {LONG.upper()} Really."), pair)
    assert gives_away(HistoryItem(f"5 stars. {LONG.replace(' ', chr(10))}"), pair)
    assert not gives_away(HistoryItem(f"W{LONG[1:]}"), pair)


def test_a_short_answer_of_several_lines_is_found_as_lines() -> None:
    pair = replace(PAIR, chosen="One.\n\nTwo.")
    assert gives_away(HistoryItem("Preferred: One.\n\nTwo.\nNot preferred: Three."), pair)
    assert not gives_away(HistoryItem("One.\nThree.\nTwo."), pair)


def test_a_blank_query_or_answer_gives_nothing_away() -> None:
    assert not gives_away(HistoryItem("text", title=""), Pair("", "good", ""))
    assert not gives_away(HistoryItem("a\n\nb", title=" "), Pair(" ", "good", " "))


def test_an_answer_that_begins_like_a_label_is_found_behind_one() -> None:
    pair = replace(PAIR, chosen="Preferred: tea")
    assert gives_away(pair.as_item(), pair)


@pytest.mark.parametrize(
    "text",
    [
        LONG[:30],
        f"{LONG[:30]}...",
        f"... {LONG[4:34]} [...]",
        LONG[:20] + "\u200b" + LONG[20:],
        "I read: " + LONG.replace("long", "lo\u00adng"),
    ],
)
def test_a_copy_that_was_cut_or_holds_invisible_characters_gives_an_answer_away(text: str) -> None:
    assert gives_away(HistoryItem(text), replace(PAIR, chosen=LONG))
    assert not gives_away(HistoryItem(LONG[:20]), replace(PAIR, chosen=LONG)), "too short to tell"


@pytest.mark.parametrize("text", ["> A slow tale.", ">> A slow tale.", "- A slow tale.", "So:\n• A slow tale."])
def test_a_quoted_or_listed_line_gives_an_answer_away(text: str) -> None:
    assert gives_away(HistoryItem(text), PAIR)
    assert not gives_away(HistoryItem("> A slow tale it was."), PAIR)


def test_quotation_marks_and_the_end_of_a_query_make_no_difference() -> None:
    pair = Pair("Is it a 'tale'?", 'He said "it\'s so".', "no")
    assert gives_away(HistoryItem("He said “it’s so”."), pair)
    assert gives_away(HistoryItem("Something.", title="is it a ‘tale’"), pair)  # noqa: RUF001
    assert not gives_away(HistoryItem("Something.", title="Is it a tale"), pair)


# ---- draws ------------------------------------------------------------------------------------------

words = st.sampled_from(["", "yes", "no", "A tale.", "a  TALE.", LONG, f"So: {LONG}", "Preferred: yes", "x\ny", "y"])
pairs = st.builds(Pair, st.sampled_from(["", "q", "Q ", "r", "s", "t"]), words, words, st.none() | st.floats(0, 9))
items = st.builds(HistoryItem, words, st.none() | st.sampled_from(["q", "r", "other"]), st.none() | st.floats(0, 9))
users = st.builds(
    User, st.just("ann"), st.lists(pairs, min_size=1, max_size=6).map(tuple), st.lists(items, max_size=4).map(tuple)
)


@settings(deadline=None, max_examples=200)
@given(user=users, num_pairs=st.integers(1, 4), num_signals=st.integers(1, 5), seed=st.integers(0, 9))
def test_no_draw_holds_a_signal_that_gives_a_pair_away(user: User, num_pairs: int, num_signals: int, seed: int) -> None:
    everything = {*user.items, *(pair.as_item() for pair in user.pairs)}
    drawn = [
        draw(user, num_pairs=num_pairs, num_signals=num_signals, seed=seed),
        held_out(user, num_signals=num_signals, max_pairs=num_pairs),
        held_out(user, num_signals=num_signals),
    ]
    for one in drawn:
        check_draw(one)
        assert not any(gives_away(item, pair) for item in one.signals for pair in one.pairs)
        assert len(one.signals) <= num_signals
        assert len(one.pairs) >= 1
        assert set(one.signals) <= everything
        assert set(one.pairs) <= set(user.pairs)
    assert len(drawn[0].pairs) <= num_pairs
    assert len(drawn[1].pairs) <= num_pairs


@settings(deadline=None, max_examples=100)
@given(user=users, num_pairs=st.integers(1, 4), num_signals=st.integers(1, 5), seed=st.integers(0, 9))
def test_a_user_who_is_kept_has_two_signals_in_every_draw(
    user: User, num_pairs: int, num_signals: int, seed: int
) -> None:
    other = User("bob", (Pair("1", "a", "b"), Pair("2", "c", "d"), Pair("3", "e", "f")))
    counts = check_users([user, other], num_pairs=num_pairs, num_signals=num_signals)
    one = draw(user, num_pairs=num_pairs, num_signals=num_signals, seed=seed)
    assert (len(one.signals) >= min(2, num_signals)) == (user in counts.users)


def test_a_draw_follows_from_seed_and_user_alone(ann: User) -> None:
    numbers = {"num_pairs": 2, "num_signals": 3}
    # Fixed values, so that a change of the draws is noticed.
    assert [pair.query for pair in draw(ann, seed=0, **numbers).pairs] == ["query 5", "query 1"]
    assert draw(ann, seed=0, **numbers) == draw(ann, seed=0, **numbers)
    assert len({draw(ann, seed=seed, **numbers) for seed in range(10)}) > 5
    assert draw(replace(ann, user_id="bob"), seed=0, **numbers).pairs != draw(ann, seed=0, **numbers).pairs


def test_every_pair_is_drawn_as_often_as_any_other(ann: User) -> None:
    drawn = [pair for seed in range(600) for pair in draw(ann, num_pairs=2, num_signals=2, seed=seed).pairs]
    counts = [drawn.count(pair) for pair in ann.pairs]
    assert sum(counts) == 1200
    assert all(abs(count - 200) < 5 * 11.6 for count in counts)  # five standard deviations of a binomial count


def test_signals_are_the_other_pairs_and_items_in_their_order(ann: User) -> None:
    dated = User("ann", tuple(replace(pair, timestamp=float(i)) for i, pair in enumerate(ann.pairs)))
    dated = replace(dated, items=(HistoryItem("note", timestamp=2.5),))
    one = draw(dated, num_pairs=2, num_signals=9, seed=1)
    times = [item.timestamp for item in one.signals]
    assert len(times) == 5
    assert 2.5 in times
    assert times == sorted(times)
    for seed in range(10):
        times = [item.timestamp for item in draw(dated, num_pairs=2, num_signals=3, seed=seed).signals]
        assert times == sorted(times)


@pytest.mark.parametrize(("count", "expected"), [(1, (1, 0)), (2, (1, 1)), (3, (1, 2)), (4, (2, 2)), (6, (4, 2))])
def test_too_few_pairs_are_shared_out_with_two_signals_first(ann: User, count: int, expected: tuple[int, int]) -> None:
    one = draw(replace(ann, pairs=ann.pairs[:count]), num_pairs=4, num_signals=8, seed=3)
    assert (len(one.pairs), len(one.signals)) == expected


def test_the_first_pairs_are_signals_and_the_rest_is_evaluated(ann: User) -> None:
    one = held_out(ann, num_signals=2)
    assert one == Draw("ann", tuple(pair.as_item() for pair in ann.pairs[:2]), ann.pairs[2:])
    assert held_out(ann, num_signals=2, max_pairs=1) == replace(one, pairs=ann.pairs[2:3])
    assert held_out(ann, num_signals=99).pairs == ann.pairs[-1:]


def test_the_first_pairs_are_the_earliest_if_all_are_dated(ann: User) -> None:
    backwards = replace(ann, pairs=tuple(replace(pair, timestamp=-float(i)) for i, pair in enumerate(ann.pairs)))
    one = held_out(backwards, num_signals=2)
    assert [item.timestamp for item in one.signals] == [-5.0, -4.0]
    assert [pair.timestamp for pair in one.pairs] == [-3.0, -2.0, -1.0, 0.0]


def test_items_spare_pairs_and_none_is_later_than_an_evaluated_pair() -> None:
    pairs = tuple(Pair(f"q{i}", f"good {i}", f"bad {i}", float(i)) for i in range(5))
    items = tuple(HistoryItem(f"note {t}", timestamp=t) for t in (-1.0, 1.5, 9.0))
    one = held_out(User("ann", pairs, items), num_signals=3)
    assert [item.timestamp for item in one.signals] == [0.0, 1.0, 1.5]
    assert one.pairs == pairs[2:]


def test_no_signal_is_later_than_an_evaluated_pair_even_if_others_have_no_time() -> None:
    pairs = (Pair("1", "a", "b", 1.0), Pair("2", "c", "d"), Pair("3", "e", "f", 3.0))
    user = User("ann", pairs, (HistoryItem("late", timestamp=9.0), HistoryItem("early", timestamp=0.0)))
    found = held_out(user, num_signals=3)
    assert "late" not in [item.text for item in found.signals]
    assert "early" in [item.text for item in found.signals]


@pytest.mark.parametrize("dated", [True, False])
def test_an_item_of_later_histories_only_is_not_a_signal_for_earlier_pairs(dated: bool) -> None:
    notes = [HistoryItem(f"note {k}") for k in range(4)]
    records = [
        record(query=f"q{k}", chosen=f"c{k}", rejected=f"r{k}", history=tuple(notes[: k + 1]), timestamp=time)
        for k in range(4)
        for time in [float(k) if dated else None]
    ]
    for given_records in (records, records[::-1]) if dated else (records,):
        (user,) = users_from_records(given_records)
        found = held_out(user, num_signals=2)
        assert found.pairs[0].query == "q1"
        assert not {"note 2", "note 3"} & {item.text for item in found.signals}
    shared = [replace(each, history=tuple(notes)) for each in records]
    (user,) = users_from_records(shared)
    assert user.since == ()
    assert len(held_out(user, num_signals=4).pairs) == 4, "known from the start"
    (user,) = users_from_records([*records, record(query="5", chosen=None, rejected=None, history=tuple(notes))])
    assert user.since == (), "the history of a record without a pair is known from the start"


def test_a_draw_with_a_given_away_pair_is_refused() -> None:
    bad = Draw("ann", (HistoryItem("fine"), HistoryItem("Preferred: a slow tale.")), (PAIR,))
    with pytest.raises(RecordError, match=r"^user 'ann': .* got signals\[1\], which gives away .* 'What to read\?'$"):
        check_draw(bad)
    check_draw(replace(bad, signals=bad.signals[:1]))


def test_users_that_cannot_be_drawn_from_are_listed_and_counted(ann: User) -> None:
    nobody = User("no-pairs", (), (HistoryItem("a"), HistoryItem("b")))
    lonely = User("one-pair", ann.pairs[:1])
    single = User("one-signal", ann.pairs[:2])
    same = User("same-query", tuple(Pair("q", f"good {i}", f"bad {i}") for i in range(5)))
    counts = check_users([nobody, ann, lonely, single, same], num_pairs=4, num_signals=8)
    assert counts.users == (ann,)
    assert (counts.no_pairs, counts.few_signals, counts.short) == (
        ("no-pairs",),
        ("one-pair", "one-signal", "same-query"),
        ("ann",),
    )
    assert counts.skipped == 4
    assert str(counts) == (
        "1 of 5 users can be drawn from; 1 left out without pairs ('no-pairs'); 3 left out with too few signals "
        "('one-pair', 'one-signal', 'same-query'); 1 with fewer pairs or signals than asked for ('ann')"
    )
    assert check_users([single], num_pairs=4, num_signals=1).users == (single,)


def test_no_usable_user_is_an_error_that_says_why(ann: User) -> None:
    with pytest.raises(RecordError, match=r"^users: expected some with pairs and signals, got none: 0 of 1 .*'ann'"):
        check_users([replace(ann, pairs=())], num_pairs=1, num_signals=1)


def test_bad_numbers_and_users_are_refused(ann: User) -> None:
    with pytest.raises(ArgumentError, match=r"^num_pairs: expected at least 1, got 0"):
        draw(ann, num_pairs=0, num_signals=1, seed=0)
    with pytest.raises(ArgumentError, match=r"^num_signals: expected at least 1, got 0"):
        held_out(ann, num_signals=0)
    with pytest.raises(ArgumentError, match=r"^users: expected every user once"):
        check_users([ann, ann], num_pairs=1, num_signals=1)
    with pytest.raises(RecordError, match=r"^user 'ann': expected at least one pair, got none"):
        draw(replace(ann, pairs=()), num_pairs=1, num_signals=1, seed=0)


def test_users_may_have_no_pairs_if_none_is_needed() -> None:
    records = [Record("ann", "q", "r", (HistoryItem("a text"),))]
    (user,) = users_from_records(records, need_pairs=False)
    assert user.pairs == ()
    assert {item.text for item in user.items} == {"a text", "r"}
    with pytest.raises(RecordError, match="without any pair"):
        users_from_records(records)
    with pytest.raises(RecordError, match="got 0 users"):
        users_from_records([], need_pairs=False)
