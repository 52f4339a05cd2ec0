"""The page is self-contained, escapes everything, and says in words what it says in colours."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest

from nextquill.report.data import (
    Cell,
    Column,
    Page,
    Picture,
    ResponseVariant,
    ResponseView,
    Table,
    TokenEffect,
)
from nextquill.report.html import render_page

EVIL = "<script>alert('x')</script>\"&"
VOID = {"meta", "link", "img", "source", "br"}


class _Reader(HTMLParser):
    """Collects start tags and checks that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: Page) -> _Reader:
    reader = _Reader()
    reader.feed(render_page(page))
    reader.close()
    assert reader.open == []
    return reader


def full_page(word: str) -> Page:
    tokens = [TokenEffect(word, 0.9, 0.1, 0.2, True), TokenEffect("b", 0.2, 0.6), TokenEffect("c", 0.5, 0.5)]
    return Page(
        title=word,
        lead=word,
        findings=[(word, word)],
        picture=Picture(png=b"light", alt=word, dark_png=b"dark", caption=word),
        tables=[Table(word, [Column(word, explanation=word), Column(word, word)], [[Cell(word), Cell(word, word)]])],
        table_notes=[word],
        responses=[ResponseView(word, [(word, word)], [ResponseVariant(word, tokens)])],
        responses_lead=word,
        footer=word,
    )


def test_every_text_is_escaped() -> None:
    reader = read(full_page(EVIL))
    assert [tag for tag, _ in reader.tags].count("script") == 1  # the page's own
    assert "alert" not in "".join(re.findall(r"<script>.*?</script>", render_page(full_page(EVIL)), flags=re.S))
    # Escaped once, not twice: what a reader sees is what was passed in.
    assert EVIL in "".join(reader.text)
    assert any(attributes.get("alt") == EVIL for _, attributes in reader.tags)


def test_nothing_is_fetched_from_a_network() -> None:
    html = render_page(full_page("word"))
    assert "http:" not in html
    assert "https:" not in html
    assert "//" not in re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", html)
    assert "@import" not in html


def test_tokens_carry_effect_probabilities_and_truth() -> None:
    reader = read(full_page("word"))
    tokens = [attributes for tag, attributes in reader.tags if "tok" in (attributes.get("class") or "").split()]
    assert [token["class"] for token in tokens] == ["tok helps personal", "tok hurts", "tok"]
    assert [token.get("style") for token in tokens] == ["--e:0.80", "--e:0.40", None]
    described = "“word”: p with history 90.0%, without 10.0%, with another user's 20.0%"
    assert tokens[0]["title"] == tokens[0]["aria-label"] == tokens[0]["data-tip"] == described
    assert all(token["tabindex"] == "0" for token in tokens)


@pytest.mark.parametrize(
    ("p_with", "said"), [(math.nan, "not measured"), (0.0, "0.0%"), (0.0004, "< 0.1%"), (1.0, "100.0%")]
)
def test_probabilities_in_words(p_with: float, said: str) -> None:
    page = Page("t", "l", responses=[ResponseView("r", [], [ResponseVariant("v", [TokenEffect("a", p_with, 0.0)])])])
    tip = next(attributes["title"] for _, attributes in read(page).tags if "data-tip" in attributes)
    assert tip == f"“a”: p with history {said}, without 0.0%"


def test_a_page_of_text_alone_has_no_empty_sections() -> None:
    reader = read(Page("title", "lead"))
    assert not {"script", "table", "figure", "section", "footer"} & {tag for tag, _ in reader.tags}


def test_dark_picture_is_offered_to_dark_screens_only() -> None:
    source = next(attributes for tag, attributes in read(full_page("word")).tags if tag == "source")
    assert source["media"] == "screen and (prefers-color-scheme: dark)"
