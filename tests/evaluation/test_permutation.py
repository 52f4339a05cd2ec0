"""p-values, against a loop over all exchanges and for equal methods, and Holm's correction."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextquill.errors import ArgumentError
from nextquill.evaluation import permutation
from nextquill.evaluation.bootstrap import paired_difference
from nextquill.evaluation.permutation import holm

WHOLE = st.integers(-3, 3)


def every_exchange(a, b, users):
    """The p-value from a loop over all signs of all users, in whole numbers."""
    names = sorted(set(users))
    sums = [sum(x - y for x, y, user in zip(a, b, users, strict=True) if user == name) for name in names]
    signs = itertools.product((1, -1), repeat=len(names))
    reached = [abs(sum(s * d for s, d in zip(each, sums, strict=True))) >= abs(sum(sums)) for each in signs]
    return sum(reached) / len(reached)


@settings(max_examples=80)
@given(st.lists(st.tuples(WHOLE, WHOLE, st.sampled_from("abcdef")), min_size=1, max_size=14))
def test_few_users_are_exchanged_in_every_way(rows):
    a, b, users = zip(*rows, strict=True)
    assert paired_difference(a, b, users, resamples=1).p_value == every_exchange(a, b, users)


@settings(max_examples=30)
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=10), st.floats(0.001, 1e6))
def test_ties_do_not_hang_on_rounding(values, scale):
    scaled = [value * scale / 3 for value in values]
    zeros = [0] * len(values)
    assert paired_difference(scaled, zeros).p_value == every_exchange(values, zeros, range(len(values)))


def test_drawn_exchanges_come_near_to_all(monkeypatch):
    rng = np.random.default_rng(3)
    a, b = rng.normal(1, 1, size=10), np.zeros(10)
    exact = paired_difference(a, b).p_value
    monkeypatch.setattr(permutation, "EXACT", 0)
    drawn = paired_difference(a, b, resamples=20_000).p_value
    assert drawn == pytest.approx(exact, abs=0.012)
    assert 0.02 < exact < 0.5


def test_drawn_p_value_is_never_0():
    assert paired_difference(np.ones(50), np.zeros(50), resamples=99).p_value == 0.01


@pytest.mark.parametrize("num", [8, 30], ids=["exact", "drawn"])
def test_p_values_are_uniform_where_nothing_differs(num):
    rng = np.random.default_rng(11)
    # Skewed and shared between the sides: what exchanges must not mind.
    values = [rng.exponential(size=num) + rng.exponential(size=(2, num)) for _ in range(400)]
    p_values = [paired_difference(a, b, resamples=199, seed=k).p_value for k, (a, b) in enumerate(values)]
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        share = statistics.mean(p <= level for p in p_values)
        assert share == pytest.approx(level, abs=3.5 * (level * (1 - level) / 400) ** 0.5 + 1 / 128)


# ---- Holm --------------------------------------------------------------------------------------


def test_holm_by_hand():
    # Sorted .005, .01, .03, .04: 4 × .005, 3 × .01, 2 × .03, and .04 raised to the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.7, 0.9]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_none_and_bonferroni_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1, len(p_values) * p)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)


@pytest.mark.parametrize(
    ("p_values", "message"),
    [
        ([0.5, 1.5], r"p_values\[1\]: expected a number from 0 to 1, got 1.5"),
        ([float("nan")], r"p_values\[0\]: expected"),
    ],
)
def test_numbers_other_than_p_values_are_named(p_values, message):
    with pytest.raises(ArgumentError, match=message):
        holm(p_values)
