"""Measures of preferences from pairs of scores."""

from __future__ import annotations

import math

import pytest

from nextquill.errors import ArgumentError
from nextquill.evaluation.metrics import preference_accuracy


def test_ties_count_half():
    scores = preference_accuracy([-1.0, -3.0, -2.0, 0.0], [-2.0, -1.0, -2.0, -math.inf])
    assert scores.per_example.tolist() == [1, 0, 0.5, 1]
    assert scores.value == 0.625


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ([1.0, math.nan], [1.0, 1.0], r"chosen\[1\]: expected a score, got nan"),
        ([1.0], [math.nan], r"rejected\[0\]: expected a score, got nan"),
        ([1.0], [], r"rejected: expected a score for each of chosen, and at least one, got shapes \[1\] and \[0\]"),
        ([], [], "rejected: expected a score for each of chosen"),
    ],
)
def test_unusable_scores_are_named(chosen, rejected, message):
    with pytest.raises(ArgumentError, match=message):
        preference_accuracy(chosen, rejected)
