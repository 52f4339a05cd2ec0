"""Curves and forest plots as inline SVG: crisp at any size, light and dark by the page's own colours, and small.

Colours are classes of the page's style. Points carry their values (`data-x`, `data-y`), so that the page's script can
read them out; without script, the title of each curve says where it begins and ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from nextquill.report.data import Charts, ForestMeasure, ForestRow, Panel, Series
from nextquill.report.numbers import rounded
from nextquill.report.text import html

COLOURS = 8
#: The most points of a curve; a longer one keeps the least and the greatest of each stretch, so that no peak is lost.
MOST_POINTS = 400

_WIDTH, _HEIGHT = 400, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 392, 8, 180


def charts_html(charts: Charts) -> str:
    """The legend and the panels, over one range of x; panels without a finite value are left out."""
    legend = "".join(
        f'<li><svg class="key" viewBox="0 0 34 10" aria-hidden="true"><path class="curve c{colour % COLOURS}" '
        f'd="M1 5H33"/></svg>{html(label)}</li>'
        for label, colour in charts.legend
    )
    drawn = [(panel, _drawn(panel)) for panel in charts.panels]
    xs = [x for _, curves in drawn for series in curves for x in series.x]
    panels = "".join(_panel(panel, curves, xs, charts.x_label) for panel, curves in drawn if curves)
    return f'<ul class="legend">{legend}</ul><div class="charts">{panels}</div>'


def forest_html(measures: Sequence[ForestMeasure]) -> str:
    """Each measure's figures with their intervals on one axis; rows without a finite value are left out.

    Places are percentages, so the plot takes any width and its texts keep their size.
    """
    return "".join(map(_measure, measures))


def _measure(measure: ForestMeasure) -> str:
    rows = [row for row in measure.rows if math.isfinite(row.value)]
    if not rows:
        return ""
    axis = forest_axis(rows, with_zero=measure.with_zero)
    ticks = axis.ticks(6)
    lines = "".join(_upright("zero" if tick == 0 and measure.with_zero else "grid", axis(tick)) for tick in ticks)
    labels = "".join(
        f'<text class="axis" x="{(at := axis(tick)):.1f}%" y="12" text-anchor="{_anchor(at)}">{_number(tick)}</text>'
        for tick in ticks
    )
    drawn = "".join(_row(row, axis, lines) for row in rows)
    return (
        f'<div class="forest"><h3>{html(measure.title)}</h3><p class="note">{html(measure.hint)}</p><ul>{drawn}'
        f'<li aria-hidden="true"><svg class="strip ticks">{labels}</svg></li></ul></div>'
    )


def _anchor(place: float) -> str:
    """Where a label at this percentage is fixed, so that it stays inside."""
    return "start" if place < 6 else "end" if place > 94 else "middle"


def forest_axis(rows: Sequence[ForestRow], *, with_zero: bool) -> _Axis:
    """An axis from 0 to 100 that holds all intervals, with a little room, and 0 if that is asked for."""
    ends = [end for row in rows for end in (row.value, row.low, row.high) if end is not None and math.isfinite(end)]
    low, high = min(ends + [0.0] * with_zero), max(ends + [0.0] * with_zero)
    room = (high - low) / 12
    return _Axis(low - room, high + room, 0, 100)


def _row(row: ForestRow, axis: _Axis, lines: str) -> str:
    colour, at = f"c{row.colour % COLOURS}", axis(row.value)
    figure, bounds = rounded(row.value, row.low, row.high)
    whisker = ""
    if bounds and row.low is not None and row.high is not None:
        whisker = (
            f'<line class="whisker {colour}" x1="{axis(row.low):.1f}%" x2="{axis(row.high):.1f}%" y1="11" y2="11"/>'
        )
    note = f"<small>{html(row.note)}</small>" if row.note else ""
    label = html(row.label).replace("_", "_<wbr>")  # a long name breaks there
    return (
        f'<li><b>{label}</b><svg class="strip" aria-hidden="true">{lines}{whisker}'
        f'<circle class="dot {colour}" cx="{at:.1f}%" cy="11" r="4.5"/></svg>'
        f"<span>{figure} {bounds}{note}</span></li>"
    )


def _upright(css_class: str, place: float) -> str:
    return f'<line class="{css_class}" x1="{place:.1f}%" x2="{place:.1f}%" y1="0" y2="100%"/>'


def _panel(panel: Panel, curves: Sequence[Series], xs: Sequence[float], x_label: str) -> str:
    x_axis, y_axis = _Axis(min(xs), max(xs), _LEFT, _RIGHT), _y_axis(panel, curves)
    lost = sum(not math.isfinite(y) for series in panel.series for y in series.y)
    hint = panel.hint + (f" ({lost} values that are not finite are left out)" if lost else "")
    said = "; ".join(f"{s.label}: {_number(s.y[0])} to {_number(s.y[-1])}" for s in curves)
    return (
        f'<figure class="chart"><figcaption><b>{html(panel.title)}</b> <span>{html(hint)}</span></figcaption>'
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" tabindex="0" data-x-label="{html(x_label)}" '
        f'aria-label="{html(f"{panel.title}, {hint}, over {x_label}. {said}")}">'
        f"{_grid(x_axis, y_axis, panel.x_ticks)}"
        f'<text class="axis" x="{_RIGHT}" y="{_HEIGHT - 3}" text-anchor="end">{html(x_label)}</text>'
        f'<path class="guide" d=""/>{"".join(_curve(s, x_axis, y_axis, panel.title) for s in curves)}</svg></figure>'
    )


class _Axis:
    """Places of values between `low` and `high` on a line from `start` to `end`."""

    def __init__(self, low: float, high: float, start: float, end: float, *, is_log: bool = False) -> None:
        room = (abs(low) / 2 or 0.5) if low == high else 0.0  # a flat curve runs through the middle
        self.low, self.high, self.start, self.end, self.is_log = low - room, high + room, start, end, is_log

    def __call__(self, value: float) -> float:
        scale: Callable[[float], float] = math.log if self.is_log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.start + min(1.05, max(-0.05, share)) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Round numbers inside the axis."""
        if self.is_log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
            inside = [tick for tick in ticks if self.low <= tick <= self.high]
            return inside[:: -(-len(inside) // most)] if inside else [self.low]
        raw = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """At most `most` points, 4 or more: the ends, and the least and greatest of each of equally long stretches.

    The points, of equally many x and y, stay unchanged and in order.
    """
    count = len(x)
    if count <= most:
        return list(x), list(y)
    stretches = (most - 2) // 2
    kept = {0, count - 1}
    for index in range(stretches):
        stretch = range(index * count // stretches, (index + 1) * count // stretches)
        kept |= {min(stretch, key=y.__getitem__), max(stretch, key=y.__getitem__)}
    order = sorted(kept)
    return [x[index] for index in order], [y[index] for index in order]


def _drawn(panel: Panel) -> list[Series]:
    """The curves that have a finite value: their finite points, and their colours."""
    found = (_finite(series, colour) for colour, series in enumerate(panel.series))
    return [series for series in found if series.y]


def _finite(series: Series, colour: int) -> Series:
    """The points of a series that can be drawn, thinned where there is no band; `colour` is that of its place."""
    bands = [] if series.low is None or series.high is None else [series.low, series.high]
    points = [row for row in zip(series.x, series.y, *bands, strict=True) if all(map(math.isfinite, row))]
    x, y, *edges = map(list, zip(*points, strict=True)) if points else ([], [])
    low, high = edges or (None, None)
    if low is None:
        x, y = thin(x, y)
    return replace(series, x=x, y=y, low=low, high=high, colour=colour if series.colour is None else series.colour)


def _y_axis(panel: Panel, curves: Sequence[Series]) -> _Axis:
    ys = [y for series in curves for values in (series.y, series.low or (), series.high or ()) for y in values]
    low, high = panel.y_limits or (min(ys), max(ys))
    if panel.with_zero and panel.y_limits is None:
        low, high = min(low, 0.0), max(high, 0.0) or float(low == 0)
    is_log = panel.log_scale and low > 0
    if panel.y_limits is None and not is_log:  # a little room, but not below 0 for what is never negative
        room = (high - low) / 20
        low, high = (0.0 if 0 <= low < 2 * room else low - room), (0.0 if high == 0 else high + room)
    return _Axis(low, high, _BOTTOM, _TOP, is_log=is_log)


def _curve(series: Series, x_axis: _Axis, y_axis: _Axis, title: str) -> str:
    points = [(x_axis(x), y_axis(y)) for x, y in zip(series.x, series.y, strict=True)]
    name, band = f"c{(series.colour or 0) % COLOURS}", ""
    if series.low is not None and series.high is not None:
        edge = [*zip(series.x, series.high, strict=True), *reversed([*zip(series.x, series.low, strict=True)])]
        corners = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in edge)
        band = f'<polygon class="band {name}" points="{corners}"/>'
    # A line of no length with round ends is a dot, and all dots are one path.
    dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points) if series.dots or len(points) == 1 else ""
    values = " ".join(map(_number, series.y))
    said = f"{title}, {series.label}: from {_number(series.y[0])} to {_number(series.y[-1])}"
    return (
        f'{band}<g><title>{html(said)}</title><polyline class="curve {name}{" dashed" if series.dashed else ""}" '
        f'points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" data-label="{html(series.label)}" '
        f'data-x="{" ".join(f"{x:g}" if x != int(x) else str(int(x)) for x in series.x)}" data-y="{values}"/>'
        + (f'<path class="dots {name}" d="{dots}"/>' if dots else "")
        + "</g>"
    )


def _grid(x_axis: _Axis, y_axis: _Axis, x_ticks: Sequence[float] | None) -> str:
    rows = "".join(
        f'<path class="grid" d="M{_LEFT} {y_axis(tick):.1f}H{_RIGHT}"/>'
        f'<text class="axis" x="{_LEFT - 6}" y="{y_axis(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        for tick in y_axis.ticks(5)
    )
    columns = "".join(
        f'<text class="axis" x="{x_axis(tick):.1f}" y="{_BOTTOM + 17}" text-anchor="middle">{_number(tick)}</text>'
        for tick in (x_axis.ticks(5) if x_ticks is None else x_ticks)
    )
    return f'{rows}<path class="base" d="M{_LEFT} {_BOTTOM}H{_RIGHT}"/>{columns}'


def _number(value: float) -> str:
    """Four digits, and thousands as k; small ones as 1.5e-4, for which there is room beside an axis."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    if 0 < abs(value) < 0.001:
        digits, power = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value + 0.0:.4g}"
