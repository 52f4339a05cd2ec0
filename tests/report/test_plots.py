"""The picture is a PNG of the promised size and leaves matplotlib as it was."""

from __future__ import annotations

import struct
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from nextquill.report.data import Charts, Estimate, Measure, Panel, Series
from nextquill.report.plots import DPI, FileFormat, Theme, draw_panels, draw_report

pytest.importorskip("matplotlib")


def panels(count: int) -> list[Panel]:
    series = [
        Series("a", [0, 1, 2], [2.0, 1.0, 0.5], [1.9, 0.9, 0.4], [2.1, 1.1, 0.6]),
        Series("b", [0, 1, 2], [2.0, 0.8, 0.2], dashed=True),
    ]
    return [Panel(f"panel {index}", "hint", series, log_scale=index % 2 == 0) for index in range(count)]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("count", [1, 4])
def test_png_has_the_promised_width(count: int, theme: Theme) -> None:
    png = draw_panels(panels(count), x_label="steps", theme=theme)
    assert png.startswith(b"\x89PNG")
    width, _ = struct.unpack(">II", png[16:24])
    assert width == 9 * DPI


def test_same_panels_give_the_same_bytes() -> None:
    assert draw_panels(panels(2), x_label="steps") == draw_panels(panels(2), x_label="steps")


def test_no_pyplot_and_no_changed_settings() -> None:
    # Not `dict(rcParams)`: reading the back end that way resolves it, which imports pyplot.
    code = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy()\n"
        "from nextquill.report.data import Panel, Series\n"
        "from nextquill.report.plots import draw_panels\n"
        "draw_panels([Panel('t', 'h', [Series('a', [0, 1], [1, 2])])], x_label='x')\n"
        "assert 'matplotlib.pyplot' not in sys.modules and matplotlib.rcParams.copy() == before\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def report(file_format: FileFormat) -> bytes:
    measures = [Measure("$x$ & <b>", "hint", [Estimate("a_$1$", 0.4, 0.3, 0.5), Estimate("b", 0.1)], with_zero=True)]
    return draw_report("title", measures, Charts(panels(3), "steps", [("a", 0), ("b", 1)]), file_format)


@pytest.mark.parametrize("file_format", ["png", "svg"])
def test_a_report_is_a_picture_with_the_same_bytes_each_time(file_format: FileFormat) -> None:
    assert report(file_format) == report(file_format)


def test_a_report_s_figures_and_labels_are_text_as_they_read() -> None:
    root = ElementTree.fromstring(report("svg"))
    texts = {"".join(each.itertext()).strip() for each in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"title", "$x$ & <b>", "a_$1$", "b", "0.40 [0.30, 0.50]", "panel 2", "steps"} <= texts


def test_a_report_of_measures_alone_has_no_curves() -> None:
    png = draw_report("t", [Measure("m", "h", [Estimate("a", 1.0)])], None, "png")
    assert struct.unpack(">II", png[16:24])[0] == 9 * DPI
