"""Curves as small multiples, and a forest plot above them, drawn by matplotlib without its global state.

`matplotlib.pyplot` is never imported: a `Figure` with its own Agg canvas leaves no open figure, no chosen back end and
no changed settings behind in a program that also plots.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from nextquill.report.data import Charts, ForestMeasure, Panel, Series
from nextquill.report.numbers import rounded
from nextquill.report.svg import COLOURS, forest_axis
from nextquill.report.text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Theme = Literal["light", "dark"]
FileFormat = Literal["png", "svg"]
DPI = 160
COLUMNS = 2


@dataclass(frozen=True)
class _Look:
    ground: str
    ink: str
    faint: str
    colours: tuple[str, ...]


# Okabe and Ito's palette, which colour-blind readers can tell apart, lightened on dark pages. The baselines are grey.
_LOOKS: dict[Theme, _Look] = {
    "light": _Look("#ffffff", "#1f2328", "#d8dde3", ("#6b7280", "#6b7280", "#009e73", "#d55e00", "#0072b2", "#b07aa1")),
    "dark": _Look("#0f1419", "#e6e9ed", "#343b44", ("#9aa3af", "#9aa3af", "#2fc79a", "#ff8a3c", "#5ab4ec", "#d3a3c6")),
}

# The palette of the pages' style, in which a run keeps its place.
_RUNS = ("#0072b2", "#c94f00", "#00805f", "#a3508c", "#8a6a00", "#3d8fbd", "#57606a", "#1b1f24")
assert len(_RUNS) == COLOURS


def draw_report(title: str, measures: Sequence[ForestMeasure], charts: Charts | None, file_format: FileFormat) -> bytes:
    """The measures as a forest plot and the curves below, 9 inches wide, as a PNG or an SVG on white.

    Equal contents give equal bytes. A label is drawn as it reads: nothing in it is taken for a formula.
    """
    from matplotlib import rc_context
    from matplotlib.lines import Line2D

    look = replace(_LOOKS["light"], colours=_RUNS)
    panels = charts.panels if charts is not None else ()
    heights = [0.95 + 0.28 * len(measure.rows) for measure in measures] + [2.75] * -(-len(panels) // COLUMNS)
    figure = _figure(0.9 + sum(heights), look)
    figure.suptitle(_literal(title), color=look.ink, fontsize=12, fontweight="bold", x=0.01, ha="left")
    grid = figure.add_gridspec(len(heights), COLUMNS, height_ratios=heights)
    for row, measure in enumerate(measures):
        _draw_measure(figure.add_subplot(grid[row, :]), measure, look)
    for place, panel in enumerate(panels):
        axis = figure.add_subplot(grid[len(measures) + place // COLUMNS, place % COLUMNS])
        _draw_panel(axis, panel, look)
        axis.set_xlabel(charts.x_label if charts is not None else "", color=look.ink, fontsize=9)
    if charts is not None:
        keys = [
            Line2D([], [], color=look.colours[colour % COLOURS], label=_literal(label))
            for label, colour in charts.legend
        ]
        figure.legend(handles=keys, loc="outside lower left", ncols=3, frameon=False, fontsize=10, labelcolor=look.ink)
    with rc_context({"svg.hashsalt": "nextquill", "svg.fonttype": "none"}):
        return _to_bytes(figure, file_format)


def _draw_measure(axis: Axes, measure: ForestMeasure, look: _Look) -> None:
    span = forest_axis(measure.rows, with_zero=measure.with_zero)
    count = len(measure.rows)
    beside = axis.get_yaxis_transform()  # x is a share of the width, y a row
    for at, row in enumerate(measure.rows):
        colour, (figure, bounds) = look.colours[row.colour % COLOURS], rounded(row.value, row.low, row.high)
        if bounds and row.low is not None and row.high is not None:
            axis.plot([row.low, row.high], [at, at], color=colour, linewidth=2.2, solid_capstyle="round")
        axis.plot([row.value], [at], "o", color=colour, markersize=6)
        axis.text(1.02, at, f"{figure} {bounds}", transform=beside, color=look.ink, fontsize=9, va="center")
    axis.set_xlim(span.low, span.high)
    axis.set_ylim(count - 0.4, -0.6)
    axis.set_yticks(range(count), [_literal(row.label) for row in measure.rows])
    _dress(axis, _literal(measure.title), _literal(measure.hint), "x", look)
    if measure.with_zero:
        axis.axvline(0, color=look.ink, linewidth=0.9)


def _literal(text: str) -> str:
    return plain(text).replace("$", r"\$")


def draw_panels(panels: Sequence[Panel], *, x_label: str, theme: Theme = "light") -> bytes:
    """A PNG of the panels in two columns under one legend, 9 inches wide.

    Series of the same position in each panel share a colour; the legend is taken from the first panel.
    """
    look = _LOOKS[theme]
    rows = -(-len(panels) // COLUMNS)
    figure = _figure(0.75 + 2.75 * rows, look)
    for place, panel in enumerate(panels, start=1):
        axis = figure.add_subplot(rows, COLUMNS, place)
        _draw_panel(axis, panel, look)
        if place > len(panels) - COLUMNS:
            axis.set_xlabel(x_label, color=look.ink, fontsize=10)
    style: dict[str, Any] = {"frameon": False, "fontsize": 10, "labelcolor": look.ink, "handlelength": 2.2}
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, **style)
    return _to_bytes(figure, "png")


def _figure(height: float, look: _Look) -> Figure:
    """An empty figure, 9 inches wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), dpi=DPI, facecolor=look.ground, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_panel(axis: Axes, panel: Panel, look: _Look) -> None:
    for index, series in enumerate(panel.series):
        colour = index if series.colour is None else series.colour
        _draw_series(axis, series, look.colours[colour % len(look.colours)], z_order=3 + index)
    if panel.log_scale:
        _set_log_scale(axis)
    if panel.y_limits is not None:
        axis.set_ylim(*panel.y_limits)
    if panel.x_ticks is not None:
        axis.set_xticks(panel.x_ticks)
    _dress(axis, panel.title, panel.hint, "y", look)
    axis.margins(x=0.02)


def _dress(axis: Axes, title: str, hint: str, lines: Literal["x", "y"], look: _Look) -> None:
    """The title, the hint below it, and faint lines across one of the axes."""
    axis.set_title(title, loc="left", color=look.ink, fontsize=11, fontweight="bold", pad=18)
    axis.text(0, 1.025, hint, transform=axis.transAxes, color=look.ink, fontsize=9, alpha=0.8, va="bottom")
    axis.set_facecolor(look.ground)
    axis.grid(axis=lines, color=look.faint, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(which="both", colors=look.ink, labelsize=9, length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(look.faint)


def _draw_series(axis: Axes, series: Series, colour: str, *, z_order: int) -> None:
    style: dict[str, Any] = {"linestyle": (0, (3, 1.6)) if series.dashed else "-", "linewidth": 2.0}
    if series.dots:
        style |= {"marker": "o", "markersize": 4}
    axis.plot(series.x, series.y, color=colour, label=series.label, zorder=z_order, solid_capstyle="round", **style)
    if series.low is not None and series.high is not None:
        axis.fill_between(
            series.x, series.low, series.high, color=colour, alpha=0.16, linewidth=0, zorder=z_order - 0.5
        )


def _set_log_scale(axis: Axes) -> None:
    """A logarithmic axis with plain numbers at 1, 2, 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _to_bytes(figure: Figure, file_format: FileFormat) -> bytes:
    buffer = io.BytesIO()
    # A Software entry, or a date, would change the bytes with matplotlib's version or with the day.
    metadata = {"Software": None} if file_format == "png" else {"Date": None, "Creator": None}
    figure.savefig(buffer, format=file_format, facecolor=figure.get_facecolor(), metadata=metadata)
    return buffer.getvalue()
