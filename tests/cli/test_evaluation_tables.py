"""The words beside a difference: never better for what is worse, nothing where it is not clear."""

import pytest

from nextquill.cli.evaluation_tables import _verdict, warn_of_few
from nextquill.evaluation.bootstrap import PairedResult
from nextquill.evaluation.results import MetricValue


@pytest.mark.parametrize(
    ("difference", "p", "higher_is_better", "word"),
    [
        (0.2, 0.01, True, "better"),
        (-0.2, 0.01, True, "worse"),
        (-0.2, 0.01, False, "better"),
        (0.2, 0.01, False, "worse"),
        (0.2, 0.01, None, "higher"),
        (-0.2, 0.01, None, "lower"),
        (0.2, 0.06, True, ""),  # the interval excludes 0, the test disagrees
        (0.05, 0.01, True, ""),  # the other way round
    ],
)
def test_the_verdict_of_a_difference(difference, p, higher_is_better, word):
    found = PairedResult(difference, difference - 0.1, difference + 0.1, p, 30)
    assert _verdict(found, MetricValue("m", 1.0, higher_is_better=higher_is_better), 0.95) == word


@pytest.mark.parametrize(("users", "word"), [(1, "no intervals"), (19, "Only 19 people"), (20, None)])
def test_few_users_are_warned_of(capsys, users, word):
    warn_of_few(users)
    out = capsys.readouterr().out
    assert (word in out) if word else out == ""
