"""Copies with small differences, and texts later than the pair that they would answer."""

from dataclasses import replace

import pytest

from nextquill.data import HistoryItem, Record
from nextquill.popi.users import Pair, User, gives_away, held_out, users_from_records

PAIR = Pair("What to read?", "A slow tale.", "A thriller.")
LONG = "She likes long and winding tales of the sea."


def record(query, chosen, rejected, **fields):
    extra = {} if chosen is None else {"chosen": chosen, "rejected": rejected}
    return Record("ann", query, chosen or "written", extra=extra, **fields)


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
def test_a_copy_that_was_cut_or_holds_unseen_signs_gives_an_answer_away(text):
    assert gives_away(HistoryItem(text), replace(PAIR, chosen=LONG))
    assert not gives_away(HistoryItem(LONG[:20]), replace(PAIR, chosen=LONG)), "too short to tell"


@pytest.mark.parametrize("text", ["> A slow tale.", ">> A slow tale.", "- A slow tale.", "So:\n• A slow tale."])
def test_a_quoted_or_listed_line_gives_an_answer_away(text):
    assert gives_away(HistoryItem(text), PAIR)
    assert not gives_away(HistoryItem("> A slow tale it was."), PAIR)


def test_quotation_marks_and_the_end_of_a_query_tell_nothing_apart():
    pair = Pair("Is it a 'tale'?", 'He said "it\'s so".', "no")
    assert gives_away(HistoryItem("He said “it’s so”."), pair)
    assert gives_away(HistoryItem("Something.", title="is it a ‘tale’"), pair)  # noqa: RUF001
    assert not gives_away(HistoryItem("Something.", title="Is it a tale"), pair)


def test_no_signal_is_later_than_any_evaluated_pair_of_which_some_have_no_time():
    pairs = (Pair("1", "a", "b", 1.0), Pair("2", "c", "d"), Pair("3", "e", "f", 3.0))
    user = User("ann", pairs, (HistoryItem("late", timestamp=9.0), HistoryItem("early", timestamp=0.0)))
    found = held_out(user, num_signals=3)
    assert "late" not in [item.text for item in found.signals]
    assert "early" in [item.text for item in found.signals]


@pytest.mark.parametrize("dated", [True, False])
def test_what_only_later_records_have_in_their_histories_is_no_signal_for_earlier_pairs(dated):
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
    assert user.since == (), "what a record without a pair has is of no time"
