"""The words beside a difference: never better for what is worse, nothing where it is not clear."""

import re

import pytest

from nextquill.cli.evaluation_tables import _verdict, print_evaluation, warn_of_few
from nextquill.evaluation.bootstrap import PairedResult
from nextquill.evaluation.results import Evaluation, MetricValue
from nextquill.evaluation.token_measures import SUM_MEASURES


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


def test_measures_of_tokens_have_their_tables_in_80_columns(capsys):
    counts = {name: MetricValue(name, 40.0) for name in ("examples", "users", "tokens")}
    values = {name: 0.1 + at / 100 for at, name in enumerate(SUM_MEASURES)}
    measured = {name: MetricValue(name, value, value - 0.0999, value + 0.5) for name, value in values.items()}
    print_evaluation(Evaluation("m", "digest", 40, metrics={**measured, **counts}))
    out = capsys.readouterr().out
    for heading in ("calibration", "tokens of --personal_from", "known personal tokens"):
        assert f"  {heading}  " in out
    shown = [float(word) for line in out.splitlines() for word in line.split() if re.fullmatch(r"0\.\d+", word)]
    assert sorted(shown) == pytest.approx(sorted(values.values()), abs=1e-4)
    assert max(map(len, out.splitlines())) <= 80
