"""Numbers as tables and sentences show them: figures, intervals and p-values, in one form everywhere."""

from __future__ import annotations

import math


def number(value: float, *, sign: str = "", digits: int = 4) -> str:
    """A figure: `digits` after the point, and two from 10 on. `sign` is "+" to show that of a positive number too.

    Below a thousandth `digits` - 2 are significant, so that it does not read as 0.
    """
    if 1e-9 < abs(value) < 0.001:
        return f"{value:{sign}.{digits - 2}g}"
    digits = 2 if abs(value) >= 10 else digits
    return f"{round(value, digits) + 0.0:{sign},.{digits}f}"  # never -0.0000


def interval(low: float | None, high: float | None, *, digits: int = 4) -> str:
    """An interval in brackets; an empty text where there is none."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"[{number(low, digits=digits)}, {number(high, digits=digits)}]"


def with_interval(
    value: float, low: float | None, high: float | None, between: str = " ", *, sign: str = "", digits: int = 4
) -> str:
    """A figure and, after `between`, its interval if there is one."""
    bounds = interval(low, high, digits=digits)
    return f"{number(value, sign=sign, digits=digits)}{between if bounds else ''}{bounds}"


def p_value(value: float) -> str:
    """A p-value under a heading that says so."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def p_text(value: float) -> str:
    """A p-value in a text, as `p = 0.012`."""
    return f"p {p_value(value)}" if value < 0.001 else f"p = {p_value(value)}"
