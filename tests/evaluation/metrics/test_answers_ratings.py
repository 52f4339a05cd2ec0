"""Errors of ratings, as in LaMP-3."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextquill.errors import ArgumentError
from nextquill.evaluation.metrics import compute


def value(name, references, predictions):
    return compute([name], references, predictions)[name].value


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=9))
def test_errors_by_their_definition(pairs):
    truth, ratings = ([str(each) for each in side] for side in zip(*pairs, strict=True))
    errors = [b - a for a, b in pairs]
    assert value("mae", truth, ratings) == pytest.approx(sum(map(abs, errors)) / len(errors))
    assert value("rmse", truth, ratings) == pytest.approx(math.sqrt(sum(e * e for e in errors) / len(errors)))


@pytest.mark.parametrize(("truth", "error"), [("1", 4), ("2", 3), ("3", 2), ("4", 3), ("5", 4)])
@pytest.mark.parametrize("prediction", ["", "great", "4 stars", "nan", "inf", "4/5"])
def test_an_answer_without_a_number_gets_the_largest_error(truth, prediction, error):
    assert value("mae", [truth], [prediction]) == error


def test_number_is_taken_as_it_is():
    assert value("mae", ["4", "4", "4"], [" 4\n", "4.5", "10"]) == pytest.approx((0 + 0.5 + 6) / 3)


def test_rmse_is_not_a_mean_of_examples():
    assert compute(["rmse"], ["1"], ["2"])["rmse"].per_example is None


def test_reference_other_than_a_rating_is_named():
    with pytest.raises(ArgumentError, match=r"references\[1\]: expected a rating such as '4', got 'good'"):
        compute(["mae"], ["1", "good"], ["1", "1"])


def test_several_references_are_refused():
    with pytest.raises(ArgumentError, match="takes one reference an example, got 2"):
        compute(["rmse"], [["1", "2"]], ["1"])
