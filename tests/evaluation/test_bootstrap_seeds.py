"""Two methods with several seeds each."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nextquill.errors import ArgumentError
from nextquill.evaluation.bootstrap import paired_difference, paired_over_seeds
from nextquill.evaluation.metrics import compute

RNG = np.random.default_rng(0)
USERS = RNG.normal(size=40)


def runs(*shifts):
    """Runs on 40 users that differ mainly by a shift."""
    return [USERS + shift + 0.01 * np.random.default_rng(k).normal(size=40) for k, shift in enumerate(shifts)]


def test_one_seed_a_side_is_a_paired_difference():
    a, b = RNG.normal(size=(2, 40))
    one, plain = paired_over_seeds([a], [b]), paired_difference(a, b)
    assert (one.difference, one.low, one.high, one.p_value) == pytest.approx(
        (plain.difference, plain.low, plain.high, plain.p_value)
    )
    assert (one.p_users, one.seeds, one.num) == (one.p_value, (1, 1), 40)


def test_difference_is_that_of_the_means_of_runs():
    result = paired_over_seeds(runs(1, 2, 6), runs(0, 1))
    assert result.difference == pytest.approx(2.5, abs=0.01)
    assert result.seeds == (3, 2)


def test_seeds_that_disagree_widen_the_interval_and_bound_the_p_value():
    agreeing = paired_over_seeds(runs(1, 1, 1), runs(0, 0, 0))
    disagreeing = paired_over_seeds(runs(3, 0, 0), runs(0, 0, 0))
    assert agreeing.low > 0.9
    assert disagreeing.low < 0 < 1 < disagreeing.high
    assert agreeing.p_users == disagreeing.p_users == pytest.approx(1 / 2001)
    assert agreeing.p_value < 0.01
    assert disagreeing.p_value > 0.1


def test_one_run_a_side_cannot_see_what_its_seed_did():
    assert paired_over_seeds(runs(3), runs(0)).low > 2.9


def test_what_a_matched_seed_did_to_both_sides_cancels():
    a, b = runs(1, 6, 12), runs(0, 5, 11)
    apart, matched = paired_over_seeds(a, b), paired_over_seeds(a, b, matched=True)
    assert apart.low < 0 < apart.high
    assert apart.p_value > 0.5
    assert (matched.low, matched.high) == pytest.approx((1, 1), abs=0.05)
    assert matched.p_value < 0.01


@pytest.mark.parametrize(("shifts", "t"), [((0, 1), 12.706), ((0, 1, 2), 4.303), ((0, 1, 2, 3, 4), 2.776)])
def test_the_spread_over_seeds_is_students(shifts, t):
    """Users add almost nothing here, so the half-width is t · s / √n with n − 1 degrees of freedom, t from a table."""
    result = paired_over_seeds([np.full(40, float(shift)) for shift in shifts], [np.zeros(40)], resamples=20_000)
    width = t * np.std(shifts, ddof=1) / len(shifts) ** 0.5
    assert (result.high - result.low) / 2 == pytest.approx(width, rel=0.06)
    assert (result.high + result.low) / 2 == pytest.approx(np.mean(shifts), abs=0.06 * width)


def test_measures_of_a_corpus_are_averaged_over_seeds():
    references = ["the cat sat on the mat", "it slept in the warm sun", "the dog ran by all day"]
    good = [compute(["bleu"], references, references)["bleu"]] * 2
    poor = compute(["bleu"], references, [text.replace("the", "a") for text in references])["bleu"]
    result = paired_over_seeds(good, [poor])
    assert result.difference == pytest.approx(100 - poor.value)
    assert result.p_users == 2 / 2**3


def test_runs_of_a_side_weigh_as_much_as_those_of_the_other():
    rng = np.random.default_rng(4)
    a, b = rng.normal(0.3, 1, size=(3, 10)), rng.normal(size=10)
    plain = paired_difference(a.mean(axis=0), b)
    assert paired_over_seeds(list(a), [b]).p_users == plain.p_value
    assert 0.05 < plain.p_value < 0.9


def test_p_value_agrees_with_the_interval():
    rng = np.random.default_rng(0)
    for k in range(40):
        a, b = rng.normal(0.1, 1, size=(5, 20)), rng.normal(size=(5, 20))
        result = paired_over_seeds(list(a), list(b), resamples=200, seed=k)
        assert result.p_value > 0.05 or result.excludes_zero
        assert result.p_value >= result.p_users


@pytest.mark.parametrize(
    ("a", "b", "matched", "message"),
    [
        ([], [[1.0]], False, "a: expected the scores of at least one run, got none"),
        ([[1.0]], [[1.0], [1.0, 2.0]], False, r"b\[1\]: expected scores of the same measure and examples as a\[0\]"),
        ([[1.0]], [[1.0], [math.inf]], False, r"b\[1\]\[0\]: expected a finite number, got inf"),
        ([[1.0]], [[1.0], [1.0]], True, "b: expected 1 runs, each matched to one of a, got 2"),
    ],
)
def test_unusable_runs_are_named(a, b, matched, message):
    with pytest.raises(ArgumentError, match=message):
        paired_over_seeds(a, b, matched=matched)


def simulate(num_seeds, comparisons, resamples):
    """The shares of comparisons of equal methods with 0 in the interval, and with a p-value of at most 0.05."""
    rng, held, rejected = np.random.default_rng(7), 0, 0
    for k in range(comparisons):
        seeds, users = rng.normal(scale=0.3, size=(2, num_seeds, 1)), rng.normal(size=(1, 1, 50))
        noise = rng.normal(scale=0.5, size=(2, 1, 50)) + rng.normal(scale=0.5, size=(2, num_seeds, 50))
        a, b = seeds + users + noise
        result = paired_over_seeds(list(a), list(b), resamples=resamples, seed=k)
        held += result.low <= 0 <= result.high
        rejected += result.p_value <= 0.05
    return held / comparisons, rejected / comparisons


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_equal_methods_rarely_differ(num_seeds):
    held, rejected = simulate(num_seeds, 120, 200)
    assert held >= 0.9
    assert rejected <= 0.075


def test_single_runs_compare_the_runs_and_not_the_methods():
    assert simulate(1, 60, 200)[1] > 0.3


@pytest.mark.slow
@pytest.mark.parametrize(("num_seeds", "expected"), [(1, 0.53), (2, 0.002), (3, 0.016), (5, 0.02)])
def test_false_findings_are_as_documented(num_seeds, expected):
    held, rejected = simulate(num_seeds, 1000, 500)
    assert rejected == pytest.approx(expected, abs=0.025)
    assert num_seeds == 1 or held >= 0.94
