"""Intervals and paired differences: closed forms, coverage, whole users, and sacreBLEU's own tests."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.significance import PairedTest

from nextquill.errors import ArgumentError, ArgumentTypeError
from nextquill.evaluation.bootstrap import Interval, bootstrap_interval, paired_difference
from nextquill.evaluation.metrics import compute

NUMBERS = st.lists(st.floats(-100, 100), min_size=1, max_size=12)
WORDS = "the cat sat on a mat and slept in warm sun all day".split()


def corpora(num, *shares):
    """References, and predictions that keep the given shares of their words."""
    rng = np.random.default_rng(5)
    references = [" ".join(rng.choice(WORDS, 12)) for _ in range(num)]
    return references, *(
        [" ".join(word if rng.random() < share else "dog" for word in text.split()) for text in references]
        for share in shares
    )


# ---- intervals ---------------------------------------------------------------------------------


def test_two_users_by_hand():
    # Means of two draws are 0, 1/2 and 1, with probabilities 1/4, 1/2 and 1/4.
    assert bootstrap_interval([0.0, 1.0]) == Interval(0.5, 0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], level=0.4) == Interval(0.5, 0.5, 0.5)


def test_many_examples_give_the_normal_interval():
    values = np.random.default_rng(0).exponential(size=4000)
    value, low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert value == pytest.approx(values.mean())
    assert (value - low, high - value) == pytest.approx((half, half), rel=0.06)


@settings(max_examples=40)
@given(NUMBERS, st.integers(2, 4))
def test_copies_of_a_users_examples_add_nothing(values, times):
    """Copies add no evidence: with users as groups, the interval is that of the single examples."""
    users = [f"{i:02d}" for i in range(len(values))]
    one = bootstrap_interval(values, users, resamples=50)
    copies = bootstrap_interval(values * times, users * times, resamples=50)
    assert copies == pytest.approx(one, abs=1e-9)


def test_copies_without_their_users_pretend_to_be_evidence():
    values = np.random.default_rng(0).normal(size=50).tolist()
    _, low, high = bootstrap_interval(values)
    _, nearer_low, nearer_high = bootstrap_interval(values * 9)
    assert (high - low) / (nearer_high - nearer_low) == pytest.approx(3, rel=0.15)


@given(NUMBERS, st.randoms())
@settings(max_examples=40)
def test_order_of_examples_does_not_matter(values, random):
    users = [f"user {i % 4}" for i in range(len(values))]
    order = random.sample(range(len(values)), len(values))
    one = bootstrap_interval(values, users, resamples=50)
    other = bootstrap_interval([values[i] for i in order], [users[i] for i in order], resamples=50)
    assert one == pytest.approx(other, abs=1e-9)


def test_single_user_says_nothing_about_others():
    assert bootstrap_interval([1.0, 3.0], ["ann", "ann"]) == (2.0, -math.inf, math.inf)


def test_equal_values_leave_no_doubt():
    assert bootstrap_interval([0.1] * 7) == pytest.approx((0.1, 0.1, 0.1))


def test_same_seed_gives_the_same_interval():
    values = list(range(9))
    assert bootstrap_interval(values) == bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_many_examples_are_drawn_in_blocks(monkeypatch):
    values = np.random.default_rng(1).normal(size=300)
    whole = bootstrap_interval(values, resamples=400)
    monkeypatch.setattr("nextquill.evaluation.bootstrap._BLOCK", 1000)
    blocks = bootstrap_interval(values, resamples=400)
    assert blocks == pytest.approx(whole, abs=0.02)
    assert blocks.value == whole.value


def coverage(sets, users, resamples, clustered):
    """The share of intervals that contain the true mean, 0, for users with four examples each."""
    rng, hits = np.random.default_rng(7), 0
    groups = [f"{i}" for i in range(users) for _ in range(4)] if clustered else None
    for k in range(sets):
        values = (rng.normal(size=(users, 1)) + rng.normal(size=(users, 4))).ravel()
        _, low, high = bootstrap_interval(values, groups, resamples=resamples, seed=k)
        hits += low <= 0 <= high
    return hits / sets


def test_intervals_hold_the_truth_as_often_as_they_say():
    assert 0.91 <= coverage(300, 50, 300, clustered=True) <= 0.98
    assert coverage(300, 50, 300, clustered=False) < 0.85


@pytest.mark.slow
@pytest.mark.parametrize(("users", "expected"), [(10, 0.90), (20, 0.92), (50, 0.95), (200, 0.95)])
def test_coverage_is_as_documented(users, expected):
    assert coverage(2000, users, 1000, clustered=True) == pytest.approx(expected, abs=0.015)
    assert 0.74 <= coverage(2000, users, 1000, clustered=False) <= 0.80


# ---- paired differences ------------------------------------------------------------------------


def test_shared_differences_change_neither_interval_nor_p_value():
    rng = np.random.default_rng(0)
    shared = 100 * rng.normal(size=200)
    a, b = shared + rng.normal(0.5, 1, size=200), shared + rng.normal(0, 1, size=200)
    result = paired_difference(a, b)
    half = 1.96 * (a - b).std() / math.sqrt(200)
    assert (result.low, result.high) == pytest.approx((result.difference - half, result.difference + half), abs=0.03)
    assert result.difference == pytest.approx((a - b).mean())
    assert (result.p_value < 0.001, result.excludes_zero, result.num) == (True, True, 200)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=9))
def test_swapping_sides_turns_the_difference_round(pairs):
    a, b = zip(*pairs, strict=True)
    one, other = paired_difference(a, b, resamples=100), paired_difference(b, a, resamples=100)
    assert (one.difference, one.low, one.high) == pytest.approx((-other.difference, -other.high, -other.low), abs=1e-9)
    assert one.p_value == other.p_value
    assert 0 < one.p_value <= 1


@pytest.mark.parametrize("num", [3, 40])
def test_same_scores_do_not_differ(num):
    values = np.random.default_rng(0).normal(size=num)
    result = paired_difference(values, values)
    assert (result.difference, result.low, result.high, result.p_value) == (0, 0, 0, 1)
    assert not result.excludes_zero


def test_a_single_users_difference_is_not_evidence():
    result = paired_difference([1.0, 2.0], [0.0, 0.0], ["ann", "ann"])
    assert (result.low, result.high, result.p_value) == (-math.inf, math.inf, 1.0)
    assert not result.excludes_zero


def test_users_are_the_evidence_not_their_examples():
    rng = np.random.default_rng(2)
    difference = np.repeat(rng.normal(0.3, 1, size=20), 30)
    users = [f"{i // 30}" for i in range(600)]
    zeros = np.zeros(600)
    assert paired_difference(difference, zeros, users).p_value > 0.05
    assert paired_difference(difference, zeros).p_value < 0.001


def test_bleu_agrees_with_sacrebleus_paired_tests(monkeypatch):
    references, b, a = corpora(40, 0.62, 0.72)
    scores_a, scores_b = (compute(["bleu"], references, each)["bleu"] for each in (a, b))
    ours = paired_difference(scores_a, scores_b, resamples=2000)
    monkeypatch.setenv("SACREBLEU_SEED", "1")
    _, exchanged = PairedTest([("b", b), ("a", a)], {"BLEU": sacrebleu.BLEU()}, [references], "ar", 2000)()
    baseline, system = exchanged["BLEU"][:2]
    assert ours.difference == pytest.approx(system.score - baseline.score)
    assert 0.01 < system.p_value < 0.5  # so that agreement means something
    assert ours.p_value == pytest.approx(system.p_value, abs=4 * math.sqrt(2 * 0.25 / 2000))
    _, drawn = PairedTest([("b", b), ("a", a)], {"BLEU": sacrebleu.BLEU()}, [references], "bs", 1000)()
    _, low, high = bootstrap_interval(scores_a)
    assert (high - low) / 2 == pytest.approx(drawn["BLEU"][1].ci, rel=0.1)


TRUTH = ["1", "2", "3", "4", "5", "3"]
NEAR, FAR = ["1", "2", "3", "4", "4", "3"], ["5", "5", "1", "1", "1", "5"]


@pytest.mark.parametrize(
    ("name", "references", "a", "b"),
    [("rmse", TRUTH, NEAR, FAR), ("f1_macro", TRUTH, NEAR, FAR), ("bleu", *corpora(6, 0.9, 0.5))],
    ids=["rmse", "f1_macro", "bleu"],
)
def test_exchanged_sums_are_those_of_exchanged_texts(name, references, a, b):
    """The p-value of a measure that is not a mean, from scoring every exchange of texts."""

    def difference(swaps):
        sides = zip(*[(y, x) if swap else (x, y) for x, y, swap in zip(a, b, swaps, strict=True)], strict=True)
        first, second = (compute([name], references, side)[name].value for side in sides)
        return first - second

    differences = [difference(swaps) for swaps in itertools.product((False, True), repeat=6)]
    reached = [abs(each) >= abs(differences[0]) - 1e-9 for each in differences]
    result = paired_difference(*(compute([name], references, each)[name] for each in (a, b)))
    assert result.difference == pytest.approx(differences[0])
    assert result.p_value == sum(reached) / 64 < 0.2
    assert result.excludes_zero


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"level": 1.0}, ArgumentError, "level: expected a share between 0 and 1, got 1.0"),
        ({"resamples": 0}, ArgumentError, "resamples: expected at least 1, got 0"),
        ({"resamples": 9.5}, ArgumentTypeError, "resamples: expected an integer, got 9.5"),
        ({"seed": -1}, ArgumentError, "seed: expected at least 0, got -1"),
        ({"groups": ["ann"]}, ArgumentError, "groups: expected 2, one for each example, got 1"),
        ({"groups": ["ann", 3]}, ArgumentTypeError, r"groups\[1\]: expected a string, got 3"),
        ({"b": [1.0]}, ArgumentError, r"b: expected scores of the same measure and examples as a, .*\[2, 2\]"),
        ({"b": [1.0, math.nan]}, ArgumentError, r"b\[1\]: expected a finite number, got nan"),
        ({"a": [], "b": []}, ArgumentError, "a: expected at least one number in a row"),
        ({"a": ["x", "y"]}, ArgumentTypeError, "a: expected numbers, got"),
    ],
)
def test_unusable_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        paired_difference(**{"a": [1.0, 2.0], "b": [0.0, 1.0], **arguments})
