"""Figures keep digits where they matter, and never read as 0 unless they are."""

from __future__ import annotations

import math

import pytest

from nextquill.report.numbers import interval, number, p_text, p_value, with_interval


@pytest.mark.parametrize(
    ("value", "text", "short"),
    [
        (0.0, "0.0000", "0.000"),
        (-1e-17, "0.0000", "0.000"),
        (-0.12345, "-0.1235", "-0.123"),
        (0.00086, "0.00086", "0.0009"),
        (-4.84e-5, "-4.8e-05", "-5e-05"),
        (12.3456, "12.35", "12.35"),
        (-12345.6, "-12,345.60", "-12,345.60"),
    ],
)
def test_a_figure_never_reads_as_nothing_unless_it_is(value: float, text: str, short: str) -> None:
    assert number(value) == text
    assert number(value, digits=3) == short
    assert number(value, sign="+") == (text if text.startswith("-") else f"+{text}")


def test_an_interval_that_is_not_known_is_left_out() -> None:
    assert interval(1.2e-5, 12.0) == "[1.2e-05, 12.00]"
    assert interval(-math.inf, math.inf) == interval(None, 1.0) == ""
    assert with_interval(0.5, 0.25, 0.75, "\n", sign="+", digits=3) == "+0.500\n[0.250, 0.750]"
    assert with_interval(0.5, None, None) == "0.5000"


def test_small_p_values_are_bounded() -> None:
    assert [p_value(each) for each in (0.0004, 0.012, 1.0)] == ["< 0.001", "0.012", "1.000"]
    assert [p_text(each) for each in (0.0004, 0.012)] == ["p < 0.001", "p = 0.012"]
