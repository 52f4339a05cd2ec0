"""The README's picture shows the committed results, all of them inside its frame."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from benchmarks import step_picture


def test_picture_is_that_of_the_committed_results():
    drawn = step_picture.picture()
    assert step_picture.PICTURE.read_text(encoding="utf-8") == drawn, "run python -m benchmarks.step_picture"


def test_other_results_give_another_picture(monkeypatch):
    rows = step_picture.read("step-cpu-amd-epyc.csv")
    for row in rows:
        if (row["loss"], row["provider"], row["metric"]) == ("PerCE", "ours, K=8", "time"):
            row["value"] = "1.5"
    monkeypatch.setattr(step_picture, "read", lambda name: rows)
    drawn = step_picture.picture()
    assert "1.5×</text>" in drawn
    assert drawn != step_picture.PICTURE.read_text(encoding="utf-8")


def test_everything_lies_inside_the_frame():
    root = ET.fromstring(step_picture.PICTURE.read_text(encoding="utf-8"))
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    dots = [each.attrib for each in root if each.tag.endswith("circle")]
    assert len(dots) == sum(len(shown) for _, shown in step_picture.GROUPS)
    assert all(step_picture._LEFT <= float(dot["cx"]) < width and float(dot["cy"]) < height for dot in dots)


def test_dark_pages_change_every_colour():
    light, _, dark = step_picture._STYLE.partition("@media (prefers-color-scheme: dark)")
    for style in (light, dark):
        assert set(re.findall(r"\.(\w+) \{ (?:fill|stroke)", style)) >= {"page", "tick", "one", "sft", "ours", "others"}
