"""Values over seeds as curves with a band, and curves as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nextquill.report.data import Panel, Picture, Series


@dataclass(frozen=True)
class Spread:
    """Mean, lowest and highest value over the seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one value per seed."""
        return cls(statistics.fmean(values), min(values), max(values))


def curve(label: str, x: Sequence[float], values: Sequence[Sequence[float]], **options: Any) -> Series:
    """A curve of means with a band over several seeds; `values` hold, for each x, one value per seed."""
    if len(values[0]) > 1:
        options |= {"low": list(map(min, values)), "high": list(map(max, values))}
    return Series(label, x, list(map(statistics.fmean, values)), **options)


def picture(panels: Sequence[Panel], x_label: str, *, alt: str, caption: str) -> Picture:
    """The panels drawn for light and for dark pages, with a text that stands for them."""
    from nextquill.report.plots import draw_panels

    light, dark = (draw_panels(panels, x_label=x_label, theme=theme) for theme in ("light", "dark"))
    return Picture(png=light, dark_png=dark, alt=alt, caption=caption)
