"""Hostile text is shown as text and has no effect."""

from __future__ import annotations

from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextquill.report.text import html, marked_html, plain

NAMED = {
    "override": ("a\u202eb", "a\\u202eb"),
    "isolate": ("\u2066x\u2069", "\\u2066x\\u2069"),
    "zero": ("\x00", "\\x00"),
    "escape": ("\x1b[31m", "\\x1b[31m"),
    "surrogate": ("\ud83d", "\\ud83d"),
    "carriage return alone": ("a\rb", "a\\rb"),
    "line breaks": ("a\r\nb\nc\td", "a\nb\nc\td"),
    "marks that scripts need": ("שלום\u200f \u200d👩\u200d👧", "שלום\u200f \u200d👩\u200d👧"),
}


@pytest.mark.parametrize(("text", "shown"), NAMED.values(), ids=NAMED.keys())
def test_invisible_characters_are_named(text: str, shown: str) -> None:
    assert plain(text) == shown


@given(st.text(st.characters()))
def test_any_text_is_escaped_once_and_can_be_written(text: str) -> None:
    escaped = html(text)
    escaped.encode()
    assert not set("<>\"'") & set(escaped)
    # As a reader of the page gets it; `unescape` itself maps nothing else, as controls are gone.
    assert unescape(escaped) == plain(text)


def test_a_long_text_is_cut_and_says_so() -> None:
    assert html("x" * 12_345, 5) == "xxxxx … [12,340 more characters]"
    assert html("&" * 5, 5) == "&amp;" * 5


@given(st.text(st.characters(), max_size=30), st.lists(st.integers(0, 30), max_size=6), st.integers(0, 30))
def test_marks_change_no_character(text: str, places: list[int], most: int) -> None:
    ends = sorted(min(place, len(text)) for place in places[: len(places) // 2 * 2])
    spans = list(zip(ends[::2], ends[1::2], strict=True))
    shown = marked_html(text, spans, most)
    if "\r" not in text:  # a break in two is named, not joined
        assert shown.replace("<mark>", "").replace("</mark>", "") == html(text, most)


def test_marks_are_escaped_and_cut() -> None:
    assert marked_html("a <b> & c", [(2, 5), (8, 9)]) == "a <mark>&lt;b&gt;</mark> &amp; <mark>c</mark>"
    assert marked_html("one two three", [(4, 13)], 7) == "one <mark>two</mark> … [6 more characters]"
    assert marked_html("one two", [(4, 7)], 3) == "one … [4 more characters]"
