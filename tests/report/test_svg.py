"""Curves: points are in the right places, thinning keeps all peaks, and unusual values are no problem."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextquill.report.data import Charts, Estimate, Measure, Panel, Series
from nextquill.report.svg import MOST_POINTS, charts_html, forest_html, thin


def svg(panel: Panel) -> str:
    return charts_html(Charts([panel], "steps", []))


def drawn(panel: Panel) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{svg(panel)}</div>")


def lines(panel: Panel) -> list[tuple[list[list[float]], dict[str, str]]]:
    """The points and the attributes of each curve."""
    found = drawn(panel).iter("polyline")
    return [
        ([[float(v) for v in pair.split(",")] for pair in line.attrib["points"].split()], line.attrib) for line in found
    ]


def test_points_lie_where_their_values_are() -> None:
    ((points, attributes),) = lines(Panel("t", "h", [Series("a", [0, 5, 10], [1.0, 3.0, 2.0])], y_limits=(1.0, 3.0)))
    assert points == [[62.0, 180.0], [227.0, 8.0], [392.0, 94.0]]
    assert attributes["data-x"] == "0 5 10"
    assert attributes["data-y"] == "1 3 2"
    assert attributes["class"] == "curve c0"


def test_a_logarithmic_axis_halves_between_decades() -> None:
    ((points, _),) = lines(Panel("t", "h", [Series("a", [0, 1, 2], [1.0, 10.0, 100.0])], log_scale=True))
    assert [y for _, y in points] == [180.0, 94.0, 8.0]


def test_colours_are_of_the_run_not_of_the_place() -> None:
    panel = Panel("t", "h", [Series("a", [0, 1], [1, 2], colour=5), Series("b", [0, 1], [1, 3], dashed=True)])
    assert [attributes["class"] for _, attributes in lines(panel)] == ["curve c5", "curve c1 dashed"]


def test_bands_and_dots_are_drawn_where_they_are_asked_for() -> None:
    panel = Panel("t", "h", [Series("a", [0, 1], [1, 2], [0, 1], [2, 3]), Series("b", [0, 1], [1, 2], dots=True)])
    assert [each.attrib["class"] for each in drawn(panel).iter("polygon")] == ["band c0"]
    (dots,) = [each for each in drawn(panel).iter("path") if each.attrib["class"].startswith("dots")]
    assert dots.attrib["d"].count("M") == 2


def test_panels_of_one_page_share_their_steps() -> None:
    """A single evaluation at the last step stands at the right end, as in the other panels."""
    curve, point = Series("a", [0, 40], [1, 2]), Series("b", [40], [3.0])
    html = charts_html(Charts([Panel("long", "h", [curve]), Panel("short", "h", [point])], "steps", []))
    assert re.findall(r'points="([^"]*)"', html)[1].startswith("392.0,")


def test_an_axis_reaches_zero_where_it_is_asked_to() -> None:
    def values(panel: Panel) -> list[str | None]:
        return [text.text for text in drawn(panel).iter("text") if text.attrib["x"] == "56"]

    series = [Series("a", [0, 1], [-0.003, -0.0025])]
    assert values(Panel("t", "h", series)) == ["-0.003", "-0.0028", "-0.0026"]
    assert values(Panel("t", "h", series, with_zero=True)) == ["-0.003", "-0.002", "-0.001", "0"]
    flat = values(Panel("t", "h", [Series("a", [0, 1], [0.0, 0.0])], with_zero=True))
    assert flat[0] == "0", "a share is not below 0"


def test_small_ticks_fit_beside_the_axis() -> None:
    panel = drawn(Panel("t", "h", [Series("a", [0, 1], [0.0, 1.7e-4])]))
    ticks = [text.text for text in panel.iter("text") if text.attrib["x"] == "56"]
    assert ticks == ["0", "5e-5", "1e-4", "1.5e-4"]


def test_a_single_point_is_a_dot() -> None:
    html = svg(Panel("t", "h", [Series("a", [3], [2.5])]))
    assert re.search(r'class="dots c0" d="M\d', html)


def test_values_that_are_not_finite_are_left_out_and_counted() -> None:
    panel = Panel("t", "h", [Series("a", [0, 1, 2, 3], [1.0, math.nan, math.inf, 2.0]), Series("b", [0], [math.nan])])
    ((_, attributes),) = lines(panel)
    assert attributes["data-x"] == "0 3"
    assert "3 values that are not finite are left out" in svg(panel)


def test_a_panel_without_a_finite_value_is_left_out() -> None:
    charts = Charts(
        [Panel("none", "h", [Series("a", [0], [math.nan])]), Panel("some", "h", [Series("a", [0], [1])])], "x", []
    )
    html = charts_html(charts)
    assert "some" in html
    assert "none" not in html


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=40),
    st.booleans(),
)
def test_any_values_give_a_plot_inside_its_frame(ys: list[float], log_scale: bool) -> None:
    panel = Panel("t", "h", [Series("a", list(range(len(ys))), ys)], log_scale=log_scale)
    if not any(map(math.isfinite, ys)):
        assert "<polyline" not in svg(panel)
        return
    ((points, _),) = lines(panel)
    assert all(0 <= x <= 400 and 0 <= y <= 216 for x, y in points)
    ticks = [each for each in drawn(panel).iter("text") if each.attrib["text-anchor"] == "end"]
    assert 1 <= len(ticks) <= 8


@given(st.lists(st.integers(-50, 50), max_size=300), st.integers(4, 60))
def test_thinning_keeps_ends_peaks_and_order(ys: list[int], most: int) -> None:
    x, y = thin(range(len(ys)), ys, most)
    assert len(x) <= max(most, 4)
    assert x == sorted(set(x))
    assert y == [ys[int(at)] for at in x]
    if ys:
        assert (x[0], x[-1]) == (0, len(ys) - 1)
        assert (min(y), max(y)) == (min(ys), max(ys))


def test_a_long_log_is_thinned() -> None:
    ys = [math.sin(step / 100) for step in range(20_000)]
    ys[7_777] = 9.0
    ((points, attributes),) = lines(Panel("t", "h", [Series("a", list(range(20_000)), ys)]))
    assert len(points) <= MOST_POINTS
    assert "9" in attributes["data-y"].split()


@pytest.mark.parametrize("value", [0.0, -3.0, 2.5, 1e-9, 1e12])
def test_a_flat_curve_runs_through_the_middle(value: float) -> None:
    ((points, _),) = lines(Panel("t", "h", [Series("a", [0, 1], [value, value])]))
    assert [y for _, y in points] == [94.0, 94.0]


def test_a_forest_plot_has_its_figures_in_place() -> None:
    rows = [Estimate("a", 6.0, 0.0, 12.0), Estimate("b", 3.0, colour=9), Estimate("c", math.nan)]
    html = forest_html([Measure("t", "h", rows, with_zero=True)])
    root = ElementTree.fromstring(f"<div>{html}</div>")
    # The axis runs from -1 to 13, 12 and a twelfth of that on either side.
    dots = [(dot.attrib["class"], float(dot.attrib["cx"].rstrip("%"))) for dot in root.iter("circle")]
    assert dots == [("dot c0", 50.0), ("dot c1", pytest.approx(400 / 14, abs=0.06))]
    (whisker,) = [line for line in root.iter("line") if line.attrib["class"].startswith("whisker")]
    places = [float(whisker.attrib[end].rstrip("%")) for end in ("x1", "x2")]
    assert places == pytest.approx([100 / 14, 1300 / 14], abs=0.06)
    assert {line.attrib["x1"] for line in root.iter("line") if line.attrib["class"] == "zero"} == {whisker.attrib["x1"]}
    assert "6.00 [0.00, 12.0]" not in html
    assert "6.0 [0.0, 12.0]" in html


def test_a_measure_without_a_finite_value_is_left_out() -> None:
    assert forest_html([Measure("t", "h", [Estimate("a", math.nan)])]) == ""


@given(st.floats(allow_nan=False, allow_infinity=False, width=32), st.booleans())
def test_any_single_figure_has_a_place_on_the_axis(value: float, with_zero: bool) -> None:
    html = forest_html([Measure("t", "h", [Estimate("a", value)], with_zero=with_zero)])
    (dot,) = ElementTree.fromstring(f"<div>{html}</div>").iter("circle")
    assert 0 <= float(dot.attrib["cx"].rstrip("%")) <= 100
