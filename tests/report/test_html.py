"""The page is self-contained, forbids network access, escapes everything, and gives a number for every colour."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import re
from html.parser import HTMLParser

import pytest

from nextquill.report.data import (
    Cell,
    Charts,
    Column,
    ForestMeasure,
    ForestRow,
    GeneratedText,
    LeftOutItem,
    Page,
    Panel,
    Picture,
    ResponseVariant,
    ResponseView,
    Series,
    Table,
    TokenEffect,
)
from nextquill.report.html import render_page
from nextquill.report.tokens import effect_class

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

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

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
    items = [LeftOutItem(word, word, [1.0, -0.5, 0.0]), LeftOutItem("", word, [0.25, 0.0, 0.0])]
    return Page(
        title=word,
        lead=word,
        verdict=[word],
        measures=[ForestMeasure(word, word, [ForestRow(word, 1.0, 0.5, 1.5, word)], with_zero=True)],
        measures_lead=word,
        folded=[Table(word, [Column(word)], [[Cell(word)]])],
        findings=[(word, word)],
        notices=[word],
        picture=Picture(png=b"light", alt=word, dark_png=b"dark", caption=word),
        charts=Charts([Panel(word, word, [Series(word, [0, 1], [2.0, 1.0])])], word, [(word, 0)], word),
        tables=[Table(word, [Column(word, explanation=word), Column(word, word)], [[Cell(word), Cell(word, word)]])],
        table_notes=[word],
        responses=[
            ResponseView(
                word,
                [(word, word)],
                [ResponseVariant(word, tokens, items=items)],
                [GeneratedText(word, word, word, [(0, len(word))])],
            )
        ],
        responses_lead=word,
        reading=[(word, word)],
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
    addresses = [
        value or "" for _, attributes in read(full_page("word")).tags for name, value in attributes.items()
        if name in ("src", "srcset", "href", "action", "data")
    ]  # fmt: skip
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "@import" not in html
    assert "url(" not in html


def test_the_page_allows_its_own_style_and_script_only() -> None:
    html = render_page(full_page("word"))
    policy = next(a["content"] or "" for tag, a in read(full_page("word")).tags if "http-equiv" in a)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    for name in ("style", "script"):
        (text,) = re.findall(rf"<{name}>(.*?)</{name}>", html, flags=re.S)
        assert rules[f"{name}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    # The policy rules these out, so none may be needed.
    assert not any(name == "style" or name.startswith("on") for _, a in read(full_page("word")).tags for name in a)


def test_tokens_carry_effect_probabilities_and_truth() -> None:
    reader = read(full_page("word"))
    tokens = [attributes for _, attributes in reader.tags if "data-p" in attributes]
    assert [token.get("class") for token in tokens] == ["p8 personal", "n4", None]
    assert [token["data-p"] for token in tokens] == ["90 10 20", "20 60", "50 50"]
    assert [token.get("tabindex") for token in tokens] == ["0", None, None], "one tab stop for each response"


def test_copied_phrases_are_marked_and_explained() -> None:
    page = full_page("<b>word")
    html = render_page(page)
    assert html.count("<mark>&lt;b&gt;word</mark>") == 1
    assert "<mark>marked</mark> three or more words in a row of the history" in html
    (view,) = page.responses
    plain = dataclasses.replace(view, texts=[GeneratedText("a", "b")])
    assert "<mark>" not in render_page(dataclasses.replace(page, responses=[plain]))


def test_items_carry_their_effects_and_totals() -> None:
    reader = read(full_page("word"))
    rows = [attributes["data-e"] for tag, attributes in reader.tags if tag == "li" and "data-e" in attributes]
    assert rows == ["1.000 -0.500 0.000", "0.250 0.000 0.000"]
    assert [word for word in reader.text if re.fullmatch(r"[+-]\d\.\d\d", word)][:2] == ["+0.50", "+0.25"]
    assert {"Item 2"} <= set(reader.text), "an item without a title has its number"
    cells = [attributes["class"] for tag, attributes in reader.tags if tag == "td" and "class" in attributes]
    assert cells == ["p10", "n5", "", "p3", "", ""]


def test_small_effects_of_items_look_small() -> None:
    items = [LeftOutItem("a", "b", [0.06, -0.001]), LeftOutItem("c", "d", [0.0, 0.0])]
    tokens = [TokenEffect("x", 0.5, 0.5)] * 2
    reader = read(Page("t", "l", responses=[ResponseView("r", [], [ResponseVariant("v", tokens, items=items)])]))
    assert [a["class"] for tag, a in reader.tags if tag == "td" and "class" in a] == ["p1", "", "", ""]
    bars = [a for tag, a in reader.tags if tag == "rect" and a["height"] == "10"]
    assert [float(a["width"] or 0) for a in bars] == pytest.approx([50 * 0.059, 0], abs=0.06)
    assert "-0.00" not in reader.text


def test_spaces_of_tokens_are_kept_outside_their_colour() -> None:
    tokens = [TokenEffect(text, 0.9, 0.1) for text in ("a", " b", "c", "  ", "\n", "")]
    html = render_page(Page("t", "l", responses=[ResponseView("r", [], [ResponseVariant("v", tokens, separator="")])]))
    shown = html.split('aria-label="v">')[1].split("</p>")[0]
    assert re.sub("<[^>]*>", "", shown) == "".join(token.text for token in tokens)
    assert "> b<" not in shown
    assert shown.count("<span") == len(tokens)


@pytest.mark.parametrize(
    ("effect", "name"),
    [(0.049, ""), (0.05, "p1"), (-0.05, "n1"), (0.149, "p1"), (1.0, "p10"), (-3.0, "n10"), (math.nan, ""), (0.0, "")],
)
def test_class_of_an_effect(effect: float, name: str) -> None:
    assert effect_class(effect) == name


def test_class_of_an_effect_on_another_scale() -> None:
    assert [effect_class(effect, 2.0) for effect in (2.0, 1.0, -0.2)] == ["p10", "p5", "n1"]
    assert effect_class(1.0, 0.0) == ""


def test_marked_cells_stand_out_and_others_do_not() -> None:
    reader = read(
        Page("t", "l", tables=[Table("t", [Column("a"), Column("b")], [[Cell("x"), Cell("1", marked=True)]])])
    )
    assert [tag for tag, _ in reader.tags].count("strong") == 1


@pytest.mark.parametrize("p_with", [math.nan, math.inf])
def test_what_was_not_measured_is_a_dash(p_with: float) -> None:
    page = Page("t", "l", responses=[ResponseView("r", [], [ResponseVariant("v", [TokenEffect("a", p_with, 0.0)])])])
    (token,) = [attributes for _, attributes in read(page).tags if "data-p" in attributes]
    assert token["data-p"] == "– 0"
    assert "class" not in token


def test_a_page_of_text_alone_has_no_empty_sections() -> None:
    reader = read(Page("title", "lead"))
    assert not {"script", "table", "figure", "section", "footer", "nav"} & {tag for tag, _ in reader.tags}


def test_dark_picture_is_offered_to_dark_screens_only() -> None:
    source = next(attributes for tag, attributes in read(full_page("word")).tags if tag == "source")
    assert source["media"] == "screen and (prefers-color-scheme: dark)"


def test_the_answer_comes_first_and_the_tables_are_folded() -> None:
    html = render_page(full_page("word"))
    assert html.index('class="verdict"') < html.index('class="lead"')
    sections = re.findall(r'<section id="(\w+)">', html)
    assert sections == ["measures", "results", "examples", "curves", "all", "reading"]
    folded = re.findall(r"<details>.*?</details>", html, flags=re.S)
    assert [part.count("<table>") for part in folded] == [1, 0]
    assert '<dl class="reading">' in folded[1]


def test_findings_stand_below_the_measures_and_once() -> None:
    html = render_page(full_page("word"))
    assert html.count('class="findings"') == 1
    assert html.index('class="forest"') < html.index('class="findings"')
    alone = render_page(Page("t", "l", findings=[("a", "b")]))
    assert alone.count('class="findings"') == 1
