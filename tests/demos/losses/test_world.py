"""The world's ground truth holds: personal tokens are the user's, shown in the history, and test users are unseen."""

from __future__ import annotations

import pytest

from demos.losses.world import (
    BOS,
    FACTS,
    NEW_ITEMS,
    OLD_ITEMS,
    SHOW_PROBABILITY,
    SLOTS,
    VOCABULARY,
    LossWorld,
    encode,
    histories_of_others,
    prompt_words,
)


@pytest.fixture(scope="module")
def world() -> LossWorld:
    return LossWorld(3, dev_users=20, test_users=100)


def test_no_word_has_two_roles() -> None:
    groups = [*SLOTS.values(), *FACTS.values(), OLD_ITEMS, NEW_ITEMS]
    words = [word for group in groups for word in group]
    # "and" is both a connector's plain word and in the template; nobody's habit either way.
    assert len(words) == len(set(words))
    habits = {word for group in SLOTS.values() for word in group[1:]}
    assert not habits & {"my", "new", "from", "three", "it", "is", "the", "out", "and", "shipped", "pleases"}


def test_vocabulary_encodes_every_word_once() -> None:
    words = list(VOCABULARY)
    assert list(VOCABULARY.values()) == list(range(len(words)))
    assert 200 < len(words) < 320
    assert [words[i] for i in encode([BOS, "none", "kettle"])] == [BOS, "none", "kettle"]


def test_personal_tokens_are_the_habits_and_the_history_shows_each(world: LossWorld) -> None:
    for example in world.test:
        personal = tuple(word for word, mark in zip(example.response, example.personal, strict=True) if mark)
        assert sorted(personal) == sorted(example.habits)
        assert set(personal) <= set(example.history)


def test_a_habit_is_shown_about_as_often_as_said(world: LossWorld) -> None:
    shown = sum(example.history.count(habit) for example in world.test for habit in example.habits)
    possible = 3 * len(SLOTS) * len(world.test)
    # A habit that no review happened to show is put into one: + (1 - p)^3 / 3 in the mean.
    assert shown / possible == pytest.approx(SHOW_PROBABILITY + (1 - SHOW_PROBABILITY) ** 3 / 3, abs=0.03)


def test_test_users_are_seen_nowhere_else_and_review_new_items(world: LossWorld) -> None:
    held_out = {example.habits for example in world.test} | {example.habits for example in world.dev}
    assert len(held_out) == len(world.test) + len(world.dev)
    training = world.training_examples(500, world.old_items)
    assert not held_out & {example.habits for example in training}
    assert {example.item.name for example in training} <= set(OLD_ITEMS)
    assert {example.item.name for example in world.test} <= set(NEW_ITEMS)


def test_bland_responses_often_use_the_plain_word(world: LossWorld) -> None:
    plain = {words[0] for words in SLOTS.values()}
    words = [
        word
        for example in world.training_examples(300, world.old_items, habit_probability=0.25)
        for word, mark in zip(example.response, example.personal, strict=True)
        if mark
    ]
    assert sum(word in plain for word in words) / len(words) == pytest.approx(0.75, abs=0.04)


def test_the_missing_history_is_the_literal_none(world: LossWorld) -> None:
    example = world.test[0]
    without, with_history = prompt_words(example.item, None), prompt_words(example.item, example.history)
    assert without.count("none") == 1
    assert [word for word in with_history if word in example.habits]
    assert not [word for word in without if word in example.habits]


def test_the_placebo_is_somebody_elses_history(world: LossWorld) -> None:
    others = histories_of_others(world.test)
    assert all(other != example.history for other, example in zip(others, world.test, strict=True))
    assert sorted(others) == sorted(example.history for example in world.test)


def test_a_seed_is_a_world() -> None:
    first, again, other = (LossWorld(seed, dev_users=3, test_users=3) for seed in (5, 5, 6))
    assert first.test == again.test
    assert first.training_examples(4, first.new_items) == again.training_examples(4, again.new_items)
    assert first.test != other.test
