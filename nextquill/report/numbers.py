"""Numbers as tables and sentences show them: figures, intervals and p-values, in one form everywhere."""

from __future__ import annotations

import math


def counted(number: int, one: str, more: str | None = None) -> str:
    """A number of things in words: `1 step`, `1,200 steps`."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def p_value(value: float) -> str:
    """A p-value under a heading that says so."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def p_text(value: float) -> str:
    """A p-value in a text, as `p = 0.012`."""
    return f"p {p_value(value)}" if value < 0.001 else f"p = {p_value(value)}"


def rounded(value: float, low: float | None = None, high: float | None = None, *, sign: str = "") -> tuple[str, str]:
    """A figure and its interval in brackets, to equally many places; an empty text where there is no interval.

    The largest of them has two significant digits below 1 and three from 1 on. A figure that would read as 0 and is not
    keeps one digit, so that an interval that excludes 0 does not seem to end there.
    """
    bounds = [] if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)) else [low, high]
    largest = max((abs(each) for each in (value, *bounds) if math.isfinite(each)), default=0.0)
    power = math.floor(math.log10(largest)) if largest > 1e-9 else 0
    places = max(0, (1 if power < 0 else 2) - power)

    def text(each: float, sign: str = "") -> str:
        if abs(each) > 1e-9 and (round(each, places) == 0 or places > 5):
            return f"{each:{sign}.{2 if places > 5 else 1}g}"
        return f"{round(each, places) + 0.0:{sign},.{places}f}"  # never -0.00

    return text(value, sign), f"[{text(bounds[0])}, {text(bounds[1])}]" if bounds else ""


def in_words(
    value: float, low: float | None = None, high: float | None = None, unit: str = "", *, sign: str = "", gap: str = " "
) -> str:
    """`rounded` in a sentence: `0.41 nats per token [0.33, 0.50]`; `gap` goes before the interval."""
    figure, bounds = rounded(value, low, high, sign=sign)
    return gap.join(filter(None, (" ".join(filter(None, (figure, unit))), bounds)))
