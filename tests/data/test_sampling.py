"""The order of examples: a permutation with runs of one user's examples, the same on every rank."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.data import UserGroupSampler
from nextquill.errors import ArgumentError, ArgumentTypeError

USERS = st.lists(st.sampled_from("abcde"), min_size=1, max_size=40)
SIZES = st.integers(1, 5)


def runs(sampler: UserGroupSampler) -> list[list[str]]:
    """The users of each run, which batches of this size would hold."""
    users = [sampler.user_ids[index] for index in sampler]
    return [users[i : i + sampler.examples_per_user] for i in range(0, len(users), sampler.examples_per_user)]


@settings(deadline=None)
@given(users=USERS, size=SIZES, seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_every_example_comes_once(users: list[str], size: int, seed: int, epoch: int) -> None:
    sampler = UserGroupSampler(users, size, seed)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(len(users)))
    assert len(sampler) == len(users)


@settings(deadline=None)
@given(users=USERS, size=SIZES)
def test_as_many_runs_as_there_can_be_are_of_one_user(users: list[str], size: int) -> None:
    """They begin at multiples of their length, so that no batch of whole runs cuts one."""
    whole = [run[0] for run in runs(UserGroupSampler(users, size)) if len(run) == size and len(set(run)) == 1]
    got = Counter(whole)
    for user, count in Counter(users).items():
        assert got[user] >= count // size, f"runs of {user}"


@settings(deadline=None)
@given(users=USERS, size=SIZES)
def test_what_a_user_has_left_over_stays_together(users: list[str], size: int) -> None:
    """In the order of the remaining examples, those of one user are neighbours."""
    order = [users[index] for index in UserGroupSampler(users, size)]
    taken: Counter[str] = Counter()
    left = []
    for run in (order[i : i + size] for i in range(0, len(order), size)):
        if len(run) == size and len(set(run)) == 1 and taken[run[0]] < Counter(users)[run[0]] // size:
            taken[run[0]] += 1
        else:
            left.append(run)
    assert all(sum(user in run for run in left) <= 2 for user in set(users)), (
        f"a user's left-over examples are in more than two runs: {left}"
    )


def test_the_order_follows_from_seed_and_epoch() -> None:
    users = [f"u{i % 7}" for i in range(60)]
    sampler = UserGroupSampler(users, 4, seed=1)
    first = list(sampler)
    assert list(sampler) == first, "reading it twice"
    assert list(UserGroupSampler(users, 4, seed=1)) == first, "another rank"
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert list(UserGroupSampler(users, 4, seed=2)) not in (first, second), "another seed"
    sampler.set_epoch(0)
    assert list(sampler) == first, "back at the first epoch"


def test_nothing_depends_on_the_global_random_state() -> None:
    import random

    users = [f"u{i % 7}" for i in range(60)]
    state = random.getstate()
    first = list(UserGroupSampler(users, 4))
    assert random.getstate() == state, "random numbers of others were used"
    random.seed(99)
    assert list(UserGroupSampler(users, 4)) == first


def test_epochs_mix_users_and_examples() -> None:
    """Runs are shuffled, and a user's examples meet in new combinations."""
    sampler = UserGroupSampler([f"u{i % 5}" for i in range(50)], 5)
    orders, meetings = set(), set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        order = list(sampler)
        orders.add(tuple(run[0] for run in runs(sampler)))
        meetings.add(frozenset(next(order[i : i + 5] for i in range(0, 50, 5) if 0 in order[i : i + 5])))
    assert len(orders) > 15, "orders of users over 20 epochs"
    assert len(meetings) > 15, "examples that met the first one over 20 epochs"


@pytest.mark.parametrize(
    ("users", "size", "expected"),
    [
        (["a"] * 7, 3, [("a", "a", "a")] * 2 + [("a",)]),
        (["a"] * 6, 3, [("a", "a", "a")] * 2),
        (["a"], 4, [("a",)]),
        (["a", "b"] * 4, 4, [("a",) * 4, ("b",) * 4]),
    ],
    ids=["one user", "one user without a rest", "one example", "two users"],
)
def test_runs_of_small_sets(users: list[str], size: int, expected: list[Any]) -> None:
    assert sorted(map(tuple, runs(UserGroupSampler(users, size)))) == sorted(expected)


def test_users_with_too_few_examples_fill_runs_together() -> None:
    found = runs(UserGroupSampler(["a", "b", "c", "d", "e"], 2))
    assert [len(run) for run in found] == [2, 2, 1], "the incomplete run comes last"


def test_runs_of_one_are_a_plain_shuffle() -> None:
    """Without grouping, neighbours have the same user only by chance, 1 in 5."""
    users = [f"u{i % 5}" for i in range(500)]
    order = [users[index] for index in UserGroupSampler(users, 1)]
    same = sum(a == b for a, b in pairwise(order)) / 499
    assert 0.1 < same < 0.3


@pytest.mark.parametrize(
    ("users", "size", "error", "message"),
    [
        ([], 2, ArgumentError, "user_ids: expected at least one example, got none"),
        (["a"], 0, ArgumentError, "examples_per_user: expected at least 1, got 0"),
        (["a"], 2.0, ArgumentTypeError, "examples_per_user: expected an integer, got 2.0"),
        (["a"], True, ArgumentTypeError, "examples_per_user: expected an integer, got True"),
    ],
    ids=["none", "zero", "float", "bool"],
)
def test_a_bad_argument_is_named(users: list[str], size: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        UserGroupSampler(users, size)
    assert str(caught.value) == message
