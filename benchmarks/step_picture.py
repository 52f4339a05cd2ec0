"""Draw docs/step.svg, the README's picture, from suite `step`: `python -m benchmarks.step_picture`.

A dot is the time per training example as a multiple of plain fine-tuning's in the same run. The picture is text without
any library's version in it, so a test compares the committed one with the committed results, byte by byte.
"""

from __future__ import annotations

import math
import os
import sys
from html import escape

from benchmarks.measure import RESULTS, short_name
from benchmarks.table import read

PICTURE = RESULTS.parent.parent / "docs" / "step.svg"
#: What is shown, from the top: a heading, and (loss, provider, label, class of its colour) for each row below it.
GROUPS = (
    (
        "Every example by itself",
        (
            ("SFT", "unpadded", "Plain fine-tuning (SFT)", "sft"),
            ("NextQuill detached", "ours, K=1", "NextQuill detached, this library", "ours"),
            ("PerCE", "ours, K=1", "PerCE, this library", "ours"),
            ("NextQuill", "ours, K=1", "NextQuill, this library", "ours"),
            ("NextQuill", "two passes", "NextQuill, two unpadded passes", "others"),
            ("NextQuill", "official", "NextQuill as published, padded", "others"),
        ),
    ),
    (
        "Eight examples share one history",
        (
            ("SFT", "ours, K=8", "Plain fine-tuning (SFT)", "sft"),
            ("NextQuill detached", "ours, K=8", "NextQuill detached, this library", "ours"),
            ("PerCE", "ours, K=8", "PerCE, this library", "ours"),
            ("NextQuill", "ours, K=8", "NextQuill, this library", "ours"),
        ),
    ),
)
_TICKS = {0.5: "½×", 1: "1×", 2: "2×", 5: "5×", 10: "10×", 20: "20×"}
_FIRST, _LAST = 0.42, 25.0
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 840, 330, 770, 100, 27
# The picture brings its background, so that it can be read wherever the page's theme is not the system's.
_STYLE = """
text { font: 14px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328; }
.title { font-size: 18px; font-weight: 600; } .group { font-weight: 600; }
.value { font-weight: 600; paint-order: stroke; stroke: #ffffff; stroke-width: 4px; }
.note { font-size: 12px; fill: #57606a; }
.page { fill: #ffffff; stroke: #d0d7de; } .tick { stroke: #d8dee4; } .one { stroke: #57606a; stroke-width: 1.5; }
.sft { fill: #6e7781; } .ours { fill: #0072b2; } .others { fill: #d55e00; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; } .note { fill: #9da7b1; } .value { stroke: #0d1117; }
.page { fill: #0d1117; stroke: #30363d; } .tick { stroke: #30363d; } .one { stroke: #9da7b1; }
.sft { fill: #9da7b1; } .ours { fill: #56b4e9; } .others { fill: #e69f00; }
}
"""


def picture() -> str:
    """The SVG of the first CPU's results, the same machine as the first of the README's table."""
    rows = {
        (row["loss"], row["provider"]): row
        for row in read(min(RESULTS.glob("step-cpu-*.csv")).name)
        if row["metric"] == "time"
    }
    parts, place = [], _TOP
    for heading, shown in GROUPS:
        parts.append(f'<text class="group" x="24" y="{place + 5}">{escape(heading)}</text>')
        for loss, provider, label, colour in shown:
            place += _ROW
            parts.append(_dot(rows[loss, provider], label, colour, place))
        place += _ROW + 12
    bottom = place - _ROW
    first = next(iter(rows.values()))
    machine = f"{short_name(first['device'])}, {first['threads']} threads, torch {first['torch']}, {first['dtype']}"
    notes = (
        f"{first['case']}; {machine}, {first['time'][:10]}.",
        f"Median of {first['rounds']} rounds in one run, on a CPU.",
    )
    axis = "".join(
        f'<path class="{"one" if value == 1 else "tick"}" d="M{_x(value)} {_TOP - 12}V{bottom}"/>'
        f'<text class="note" x="{_x(value)}" y="{bottom + 18}" text-anchor="middle">{name}</text>'
        for value, name in _TICKS.items()
    )
    foot = "".join(
        f'<text class="note" x="24" y="{bottom + 46 + 18 * line}">{escape(note)}</text>'
        for line, note in enumerate(notes)
    )
    height = bottom + 80
    said = "; ".join(
        f"{label}: {float(rows[loss, provider]['value']):.3g}"
        for _, shown in GROUPS
        for loss, provider, label, _ in shown
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        f'role="img" aria-label="Time per training example as a multiple of plain fine-tuning. {escape(said)}">\n'
        f"<style>{_STYLE}</style>\n"
        f'<rect class="page" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="8"/>\n'
        '<text class="title" x="24" y="36">Time per training example, as a multiple of plain fine-tuning</text>\n'
        '<text class="note" x="24" y="58">Left of 1× is faster than plain fine-tuning, right of it slower. '
        "The scale is logarithmic.</text>\n"
        f"{axis}\n" + "\n".join(parts) + f"\n{foot}\n</svg>\n"
    )


def _dot(row: dict[str, str], label: str, colour: str, place: int) -> str:
    value = float(row["value"])
    aside, anchor = (-13, "end") if value < 1 else (13, "start")  # clear of the line at 1
    return (
        f'<text x="40" y="{place + 5}">{escape(label)}</text>'
        f'<circle class="{colour}" cx="{_x(value)}" cy="{place}" r="6"/>'
        f'<text class="value" x="{_x(value) + aside:g}" y="{place + 5}" text-anchor="{anchor}">{value:.3g}×</text>'
    )


def _x(value: float) -> float:
    """The place of a multiple."""
    share = math.log(value / _FIRST) / math.log(_LAST / _FIRST)
    return round(_LEFT + share * (_RIGHT - _LEFT), 1)


def main() -> int:
    """Write the picture."""
    temporary = PICTURE.with_name(f".{PICTURE.name}.tmp")
    temporary.write_text(picture(), encoding="utf-8")
    os.replace(temporary, PICTURE)
    print(f"wrote {PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
