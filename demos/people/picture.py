"""Draw docs/people.svg from demos/people/results.json: `python -m demos.people.picture`.

Texts with large and middling effects, word by word, and one question answered for two people. Every word
has the width that is computed here, so that the boxes fit whatever font the reader has.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from demos.people.measuring import (
    Answer,
    People,
    PeopleRecipe,
    ReadText,
    by_effect,
    copied_share,
    effect,
    sample,
    strongest,
)
from nextquill.data import Record
from nextquill.report.examples import LARGEST, MIDDLE, SMALLEST
from nextquill.report.text import plain
from nextquill.report.tokens import effect_class
from nextquill.storage.atomic_files import write_whole

RESULTS = Path(__file__).with_name("results.json")
PICTURE = Path(__file__).parents[2] / "docs" / "people.svg"
_WIDTH, _LEFT, _LINE = 840, 24, 26
_NARROW, _WIDE = frozenset("iljtfrI.,'!|:;()[] "), frozenset("mwMW@%")
# The picture brings its background, so that it can be read wherever the page's theme is not the system's.
_STYLE = """
text { font: 15px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328; }
.title { font-size: 19px; font-weight: 600; } .who { font-weight: 600; }
.note, .past { font-size: 13px; fill: #57606a; } .past { font-style: italic; }
.page { fill: #ffffff; stroke: #d0d7de; } .rule { stroke: #d8dee4; } .leans { stroke: #1f2328; stroke-width: 2; }
.helps { fill: #5aa5e8; } .hurts { fill: #ee9a3f; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; } .note, .past { fill: #9da7b1; } .page { fill: #0d1117; stroke: #30363d; }
.rule { stroke: #30363d; } .leans { stroke: #e6edf3; } .helps { fill: #2168b0; } .hurts { fill: #a6540c; }
}
"""


def picture(people: People, records: Sequence[Record]) -> str:
    """The SVG of a run's results."""
    parts, place = list[str](), 96
    for text in _chosen(people):
        place = _read(parts, text, records[text.index], place)
    parts.append(f'<path class="rule" d="M{_LEFT} {place - 18}H{_WIDTH - _LEFT}"/>')
    place = _answered(parts, people.answers[:2], records, place + 10)
    count = f"{len(people.texts)} texts of {len({text.user for text in people.texts})} people"
    shares = ", ".join(
        f"{copied_share([(answer.written[key], answer) for answer in people.answers], records):.0%} at γ = {key}"
        for key in people.answers[0].written
    )
    notes = (
        f"{people.model}, not trained on these people; {count}. Greedy answers; γ: guidance.",
        f"Of the answers' three-word sequences, {shares} stand in the person's history.",
        "Texts: a sample of UKPConvArg1 (Habernal and Gurevych, ACL 2016), CC BY 4.0.",
    )
    for note in notes:
        _put(parts, note, _LEFT, place, "note")
        place += 18
    said = "; ".join("".join(text.words).strip() for text in _chosen(people))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{place}" viewBox="0 0 {_WIDTH} {place}" '
        f'role="img" aria-label="Real sentences, coloured by what the writer\'s own history adds: '
        f'{escape(plain(said))}">\n<style>{_STYLE}</style>\n'
        f'<rect class="page" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{place - 1}" rx="8"/>\n'
        f'<text class="title" x="{_LEFT}" y="36">What a model takes from a person\'s own earlier words</text>\n'
        f"{_legend()}\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _chosen(people: People) -> list[ReadText]:
    """One text with a large, one with a middle and one with a small effect, so that the picture does not flatter."""
    found = {text.why: text for text in reversed(by_effect(people))}
    return [found[why] for why in (LARGEST, MIDDLE, SMALLEST) if why in found]


def _legend() -> str:
    return (
        f'<rect class="helps" x="{_LEFT}" y="50" width="16" height="14" rx="3"/>'
        f'<text class="note" x="{_LEFT + 22}" y="62">more likely under the writer\'s own history than under another '
        f'person\'s</text><rect class="hurts" x="540" y="50" width="16" height="14" rx="3"/>'
        '<text class="note" x="562" y="62">less likely</text>'
    )


def _read(parts: list[str], text: ReadText, record: Record, place: int) -> int:
    """A text with coloured words and the past text that its strongest word leans on; returns the next place."""
    _put(parts, f"{text.user} wrote ({text.why})", _LEFT, place, "note")
    place += _LINE
    leaning = strongest(text)
    changes = effect(text)
    for at, (word, x, y) in enumerate(_flow([word.strip() for word in text.words], _LEFT, _WIDTH - _LEFT, place)):
        width, name = _width(word), effect_class(changes[at])
        if name:
            colour, share = ("helps" if name[0] == "p" else "hurts"), int(name[1:]) / 10
            parts.append(
                f'<rect class="{colour}" fill-opacity="{share:g}" x="{x - 2:g}" y="{y - 16}" width="{width + 4:g}" '
                'height="22" rx="3"/>'
            )
        if leaning is not None and at == leaning[1]:
            parts.append(f'<path class="leans" d="M{x:g} {y + 5}h{width:g}"/>')
        fitted = f'textLength="{width:g}" lengthAdjust="spacingAndGlyphs"'
        parts.append(f'<text x="{x:g}" y="{y}" {fitted}>{escape(plain(word))}</text>')
        place = y
    if leaning is not None:
        item, at, nats = leaning
        word, past = text.words[at].strip(), record.history[item].text
        for line in _wrapped(f"“{word}” leans on an earlier text of theirs (+{nats:.1f} nats): “{past}”", 13):
            place += 22
            _put(parts, line, _LEFT, place, "past")
    return place + 40


def _answered(parts: list[str], answers: Sequence[Answer], records: Sequence[Record], place: int) -> int:
    """Two people's answers in two columns; returns the next place."""
    debate = records[answers[0].index].query.splitlines()[0].partition(" Stance:")[0]
    _put(parts, _wrapped(f"The same model answers one question for two people. {debate}", 13)[0], _LEFT, place, "note")
    ends, column = [], (_WIDTH - 3 * _LEFT) // 2
    for number, answer in enumerate(answers):
        x, y = _LEFT + number * (column + _LEFT), place + 28
        _put(parts, f"as {answer.user}", x, y, "who")
        for guidance, text in answer.written.items():
            y += 24
            _put(parts, f"γ = {guidance}", x, y, "note")
            lines = _wrapped(text, 15, column - 84)
            for line in lines if len(lines) < 3 else [lines[0], f"{lines[1]} …"]:
                _put(parts, line, x + 58, y, "")
                y += 21
            y -= 15
        ends.append(y)
    return max(ends) + 42


def _flow(words: Sequence[str], left: float, right: float, place: int) -> Iterator[tuple[str, float, int]]:
    """Each word with its place, in lines from left to right."""
    x = left
    for word in words:
        if x > left and x + _width(word) > right:
            x, place = left, place + _LINE
        yield word, x, place
        x += _width(word) + 7


def _wrapped(text: str, size: int, room: float = _WIDTH - 2 * _LEFT) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _width(longer, size) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _width(text: str, size: int = 15) -> float:
    """About the width of a text in pixels."""
    shares = (0.34 if c in _NARROW else 0.87 if c in _WIDE else 0.68 if c.isupper() else 0.57 for c in text)
    return round(size * math.fsum(shares), 1)  # sum rounds otherwise before Python 3.12


def _put(parts: list[str], text: str, x: float, y: float, css_class: str) -> None:
    name = f' class="{css_class}"' if css_class else ""
    parts.append(f'<text{name} x="{x:g}" y="{y:g}">{escape(plain(text))}</text>')


def main() -> int:
    """Write the picture."""
    people = People.from_json(RESULTS.read_text(encoding="utf-8"))
    write_whole(PICTURE, picture(people, sample(PeopleRecipe())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
