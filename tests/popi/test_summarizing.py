"""Summaries are made from the right signals and users, and do not depend on the other users in a batch."""

from __future__ import annotations

import pytest

from nextquill.data import HistoryItem
from nextquill.errors import BudgetError, RecordError
from nextquill.models.tiny_models import ScratchSize, build_model
from nextquill.popi.prompts import InferencePrompts
from nextquill.popi.roles import Role
from nextquill.popi.summarizing import all_signals, hold_out, summarize
from nextquill.popi.users import Pair, User, check_draw

SIZE = ScratchSize(vocabulary=260, hidden_size=32, layers=1, heads=1, intermediate_size=48, positions=2048)


def pair(k, timestamp=None):
    return Pair(f"Question {k} of many?", f"Answer {k}, gladly.", f"Reply {k}, never.", timestamp)


def user(name, pairs=4, items=1):
    return User(name, tuple(map(pair, range(pairs))), tuple(HistoryItem(f"Past text {k}.") for k in range(items)))


def test_all_that_is_known_counts_and_the_newest_stays():
    someone = user("a", pairs=2, items=2)
    known = [*someone.items, *(each.as_item() for each in someone.pairs)]
    assert all_signals(someone, num_signals=9) == tuple(known)
    assert all_signals(someone, num_signals=3) == tuple(known[1:])
    dated = User("b", (pair(0, 1.0), pair(1, 9.0)), (HistoryItem("Between.", timestamp=5.0),))
    assert [item.timestamp for item in all_signals(dated, num_signals=2)] == [5.0, 9.0]


def test_users_who_cannot_be_judged_are_named():
    found = hold_out([user("a"), user("b", pairs=0), user("c", pairs=1), user("d", pairs=1, items=0)], num_signals=3)
    assert [draw.user_id for draw in found.draws] == ["a"]
    assert (found.no_pairs, found.few_signals) == (("b",), ("c", "d"))
    assert found.left_out == {"no_pairs": 1, "few_signals": 2}
    assert str(found) == (
        "1 users, 2 pairs; 1 left out without pairs, such as 'b'; 2 left out with too few signals, such as 'c'"
    )
    for draw in found.draws:
        check_draw(draw)
    with pytest.raises(RecordError, match="1 left out with too few signals"):
        hold_out([user("d", pairs=1)], num_signals=3)
    assert len(hold_out([user("c", pairs=1)], num_signals=1).draws) == 1


@pytest.fixture(scope="module")
def role(tokenizer):
    return Role("inference", build_model(SIZE, 0).eval(), tokenizer, None, None, frozen=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_summary_is_the_same_whoever_is_beside_it(role, tokenizer, temperature):
    prompts = InferencePrompts(tokenizer)
    signals = {f"u{k}": all_signals(user(f"u{k}", items=1 + k), num_signals=9) for k in range(4)}
    options = {"max_new_tokens": 8, "temperature": temperature}
    found = {each.user_id: each for each in summarize(role, prompts, signals, batch_size=3, **options)}
    assert found.keys() == signals.keys()
    for name, own in signals.items():
        (alone,) = summarize(role, prompts, {name: own}, **options)
        assert alone == found[name]
        assert alone.tokens <= 8
    if temperature:
        again = {each.user_id: each for each in summarize(role, prompts, signals, seed=1, **options)}
        assert again != found


def test_a_signal_that_does_not_fit_is_found_before_any_summary(role, tokenizer):
    prompts = InferencePrompts(tokenizer, max_prompt_tokens=400)
    signals = {"a": (HistoryItem("Short."),), "b": (HistoryItem("long " * 200),)}
    with pytest.raises(BudgetError, match="user 'b'"):
        next(summarize(role, prompts, signals))
