"""Draw docs/frontier.svg from the study's results: `python -m benchmarks.study.picture`.

A method is a curve over the strength γ of guided decoding: to the right its texts are nearer to the person's own
(ROUGE-L), and further up a judge that no method was trained for finds the right person among eight more often. The
second panel judges what is left of a text without the phrases that it copies from the history. No library's version is
in the picture, so a test compares it with the committed results, byte by byte.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from html import escape
from statistics import mean

from benchmarks.measure import RESULTS
from benchmarks.study.methods import BASE, DETACHED, METHODS, PERCE, SFT
from benchmarks.study.tables import Result, Results
from nextquill.storage.atomic_files import write_whole

PICTURE = RESULTS.parent.parent / "docs" / "frontier.svg"
#: The curves that are drawn, with the class of their colour.
CURVES = {BASE: "base", SFT: "sft", DETACHED: "nextquill", PERCE: "perce"}
PANELS = {"right_person": "from the whole text", "right_person_uncopied": "from what is not copied"}
_CHANCE = 1 / 8
_WIDTH, _HEIGHT, _LEFT, _TOP, _SIDE, _GAP = 840, 520, 64, 110, 330, 84
_TICKS = (0.2, 0.4, 0.6, 0.8, 1.0)
_STYLE = """
text { font: 14px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328; }
.title { font-size: 18px; font-weight: 600; } .panel { font-weight: 600; } .note { font-size: 12px; fill: #57606a; }
.page { fill: #ffffff; stroke: #d0d7de; } .tick { stroke: #d8dee4; } .mark { stroke: #57606a; stroke-dasharray: 4 4; }
path.curve { fill: none !important; stroke-width: 2; } .name { font-size: 12px; font-weight: 600; }
.base { stroke: #6e7781; fill: #6e7781; } .sft { stroke: #0072b2; fill: #0072b2; }
.nextquill { stroke: #009e73; fill: #009e73; } .perce { stroke: #d55e00; fill: #d55e00; } text.name { stroke: none; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; } .note { fill: #9da7b1; } .page { fill: #0d1117; stroke: #30363d; } .tick { stroke: #30363d; }
.mark { stroke: #9da7b1; } .base { stroke: #9da7b1; fill: #9da7b1; } .sft { stroke: #56b4e9; fill: #56b4e9; }
.nextquill { stroke: #2cc295; fill: #2cc295; } .perce { stroke: #e69f00; fill: #e69f00; }
}
"""
Point = tuple[str, float, float]


def picture(results: Results) -> str:
    """The SVG of the first data set."""
    data = results.data[0]
    methods = {name: runs for name, runs in results.methods(data).items() if name in CURVES}
    curves = {panel: {name: points(runs, panel) for name, runs in methods.items()} for panel in PANELS}
    most = max(0.05, *(x for by_name in curves.values() for each in by_name.values() for _, x, _ in each))
    first = methods[BASE][0]
    parts = [_panel(place, panel, curves[panel], first, 1.1 * most) for place, panel in enumerate(PANELS)]
    users = first.raw["texts"]["users"]
    seeds = "; ".join(f"{METHODS[name].label}: {len(runs)}" for name, runs in methods.items() if name != BASE)
    legend, at = [], 24
    for name in methods:
        legend.append(
            f'<circle class="{CURVES[name]}" cx="{at + 5}" cy="86" r="5"/>'
            f'<text x="{at + 16}" y="91">{escape(METHODS[name].label)}</text>'
        )
        at += 40 + 8 * len(METHODS[name].label)
    foot = (
        f"{data}: {len(users)} greedy texts of {len(set(users))} people never trained on. Seeds: {seeds}.",
        "Dots: γ = 0 (large), ¼, ½, 1. Dashed: the same judge on the people's own texts, and chance.",
    )
    notes = "".join(
        f'<text class="note" x="24" y="{_HEIGHT - 32 + 18 * line}">{escape(note)}</text>'
        for line, note in enumerate(foot)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(said(curves))}">\n<style>{_STYLE}</style>\n'
        f'<rect class="page" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{_HEIGHT - 1}" rx="8"/>\n'
        '<text class="title" x="24" y="36">Whose text is it? The author found among eight, against ROUGE-L</text>\n'
        '<text class="note" x="24" y="60">Further up: more personal. Further right: more faithful. '
        "A curve is one model under guided decoding.</text>\n"
        + "\n".join(["".join(legend), *parts, notes])
        + "\n</svg>\n"
    )


def points(runs: Sequence[Result], measure: str) -> list[Point]:
    """A method's greedy texts by γ: the decoding, ROUGE-L and the measure, means over seeds."""
    found = []
    for decoding in runs[0].raw["texts"]["decodings"]:
        values = [[run.value(name, decoding) for run in runs] for name in ("rouge_l", measure)]
        known = [[value for value in each if value is not None] for each in values]
        if decoding.startswith("γ") and "T=" not in decoding and all(known):
            found.append((decoding, mean(known[0]), mean(known[1])))
    return found


def said(curves: dict[str, dict[str, list[Point]]]) -> str:
    """The picture in words."""
    parts = [
        f"{METHODS[name].label}, {PANELS[panel]}: "
        + ", ".join(f"{decoding} {x:.3f} and {y:.2f}" for decoding, x, y in each)
        for panel, by_name in curves.items()
        for name, each in by_name.items()
    ]
    return f"ROUGE-L and the share of texts whose author is found. {'; '.join(parts)}."


def _panel(place: int, measure: str, curves: dict[str, list[Point]], first: Result, most: float) -> str:
    left = _LEFT + place * (_SIDE + _GAP)
    bottom = _TOP + _SIDE - 20

    def x(value: float) -> float:
        return round(left + _SIDE * value / most, 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - _TOP - 24) * value, 1)

    parts = [f'<text class="panel" x="{left}" y="{_TOP + 6}">{PANELS[measure]}</text>']
    parts += [
        f'<path class="tick" d="M{left} {y(value)}H{left + _SIDE}"/>'
        f'<text class="note" x="{left - 8}" y="{y(value) + 4}" text-anchor="end">{value:g}</text>'
        for value in _TICKS
    ]
    parts += [
        f'<text class="note" x="{x(count / 20)}" y="{bottom + 18}" text-anchor="middle">{count / 20:.2f}</text>'
        for count in range(int(20 * most) + 1)
    ]
    parts.append(f'<text class="note" x="{left + _SIDE}" y="{bottom + 36}" text-anchor="end">ROUGE-L</text>')
    own = first.value(f"{measure}_reference", "γ=0")
    marks = [value for value in (own, _CHANCE) if value is not None]
    parts += [f'<path class="mark" d="M{left} {y(value)}H{left + _SIDE}"/>' for value in marks]
    for name, each in curves.items():
        colour = CURVES[name]
        line = "L".join(f"{x(a)} {y(b)}" for _, a, b in each)
        dots = "".join(
            f'<circle class="{colour}" cx="{x(a)}" cy="{y(b)}" r="{6 if at == 0 else 3.5}"/>'
            for at, (_, a, b) in enumerate(each)
        )
        parts.append(f'<path class="curve {colour}" d="M{line}"/>{dots}')
    return "".join(parts)


def main() -> int:
    """Write the picture."""
    write_whole(PICTURE, picture(Results(RESULTS / "study-cpu")))
    print(f"wrote {PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
