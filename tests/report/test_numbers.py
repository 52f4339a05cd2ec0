"""Figures keep digits where they matter, and never read as 0 unless they are."""

from __future__ import annotations

import math

import pytest

from nextquill.report.numbers import counted, in_words, p_text, p_value, rounded


def test_an_interval_that_is_not_known_is_left_out() -> None:
    assert in_words(0.5, 0.25, 0.75, "nats", sign="+") == "+0.50 nats [0.25, 0.75]"
    assert in_words(0.5, 0.25, 0.75, gap="\n") == "0.50\n[0.25, 0.75]"
    assert in_words(0.5, None, 1.0) == in_words(0.5, -math.inf, math.inf) == "0.50"


def test_things_are_counted_in_words() -> None:
    assert [counted(each, "step") for each in (0, 1, 1200)] == ["0 steps", "1 step", "1,200 steps"]
    assert [counted(each, "person", "people") for each in (1, 2)] == ["1 person", "2 people"]


def test_small_p_values_are_bounded() -> None:
    assert [p_value(each) for each in (0.0004, 0.012, 1.0)] == ["< 0.001", "0.012", "1.000"]
    assert [p_text(each) for each in (0.0004, 0.012)] == ["p < 0.001", "p = 0.012"]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ((0.4123, 0.331, 0.502), ("+0.41", "[0.33, 0.50]")),
        ((2.944, 2.8, 3.1), ("+2.94", "[2.80, 3.10]")),
        ((12.34, 11.0, 13.4), ("+12.3", "[11.0, 13.4]")),
        ((1234.5, None, None), ("+1,234", "")),
        ((-0.0123, -0.031, 0.0041), ("-0.012", "[-0.031, 0.004]")),
        ((0.25, 0.00004, 0.5), ("+0.25", "[4e-05, 0.50]")),
        ((3e-7, -math.inf, math.inf), ("+3e-07", "")),
        ((-1e-17, 0.0, 0.0), ("+0.00", "[0.00, 0.00]")),
    ],
)
def test_a_figure_and_its_interval_have_the_same_places(
    values: tuple[float, float | None, float | None], texts: tuple[str, str]
) -> None:
    assert rounded(*values, sign="+") == texts
