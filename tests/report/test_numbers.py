"""Figures keep digits where they matter, and never read as 0 unless they are."""

from __future__ import annotations

import math

import pytest

from nextquill.report.numbers import interval, number, p_text, p_value, rounded, with_interval


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
