"""Hostile text is shown as text and has no effect."""

from __future__ import annotations

from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextquill.report.text import html, plain

NAMED = {
    "override": ("a\u202eb", "a[U+202E]b"),
    "isolate": ("\u2066x\u2069", "[U+2066]x[U+2069]"),
    "zero": ("\x00", "[U+0000]"),
    "escape": ("\x1b[31m", "[U+001B][31m"),
    "surrogate": ("\ud83d", "[U+D83D]"),
    "carriage return alone": ("a\rb", "a[U+000D]b"),
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
