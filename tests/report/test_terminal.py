"""Tokens coloured by effect, and a table of 80 columns."""

from __future__ import annotations

import io
import math

import pytest

from nextquill.errors import ArgumentError
from nextquill.report.data import Cell, Column, Table
from nextquill.report.terminal import (
    copied_legend,
    copied_text,
    effect_legend,
    effect_style,
    effect_text,
    results_table,
)

rich_console = pytest.importorskip("rich.console")


def test_effect_text_keeps_the_text_and_colours_by_sign() -> None:
    text = effect_text(["Hey", ",", " you"], [0.8, 0.01, -0.3])
    assert text.plain == "Hey, you"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["Hey"] == effect_style(0.8)
    assert styles[" you"] == effect_style(-0.3)
    assert styles.get(",", "") == ""
    assert effect_style(0.8) != effect_style(-0.8)


def test_no_tokens_are_an_empty_text() -> None:
    assert effect_text([], []).plain == ""


@pytest.mark.parametrize("effect", [0.0, 0.049, -0.049, math.nan])
def test_small_or_unmeasured_effects_are_plain(effect: float) -> None:
    assert effect_style(effect) == ""


def test_stronger_effects_get_other_styles() -> None:
    for sign in (1, -1):
        assert len({effect_style(sign * value) for value in (0.05, 0.2, 0.4, 0.7, 1.0)}) == 4


@pytest.mark.parametrize("colours", ["truecolor", "256", "standard"])
def test_the_sign_is_seen_with_any_number_of_colours(colours: str) -> None:
    """rich turns both pale grounds into the same grey where there are 16 colours."""
    for size in (0.05, 0.2, 0.4, 0.7):
        drawn = []
        for effect in (size, -size):
            console = rich_console.Console(file=io.StringIO(), force_terminal=True, color_system=colours)
            console.print(effect_text(["word"], [effect]))
            drawn.append(console.file.getvalue())
        assert drawn[0] != drawn[1]


@pytest.mark.parametrize("size", [0.05, 0.2, 0.4, 0.7])
def test_what_the_history_raised_is_blue_and_what_it_lowered_orange(size: float) -> None:
    """The colours are those of the page and of the legend."""
    for effect, is_blue in ((size, True), (-size, False)):
        ground = effect_style(effect).partition("#")[2]
        red, blue = int(ground[:2], 16), int(ground[4:], 16)
        assert (blue > red) is is_blue


def test_effect_text_refuses_unequal_lengths() -> None:
    with pytest.raises(ArgumentError, match="effects: expected one for each of 2 tokens, got 1"):
        effect_text(["a", "b"], [0.1])


def test_a_terminal_obeys_nothing_in_a_token() -> None:
    assert effect_text(["a\x1b[2J", "b\n"], [0.5, 0.0]).plain == "a\\x1b[2Jb\n"


def test_markup_in_tokens_is_text() -> None:
    assert effect_text(["[bold]"], [0.5]).plain == "[bold]"


def test_legend_names_both_directions() -> None:
    assert "lowered" in effect_legend().plain
    assert "+0.70" in effect_legend().plain


def test_table_leaves_out_secondary_columns_and_ranges() -> None:
    columns = [Column("method"), Column("own", "nll"), Column("none", "nll"), Column("ms", secondary=True)]
    table = Table("title", columns, [[Cell("SFT"), Cell("0.1", "0.0-0.2"), Cell("0.3"), Cell("25")]])
    output = io.StringIO()
    rich_console.Console(file=output, width=80).print(results_table(table))
    printed = output.getvalue()
    assert "0.1" in printed
    assert printed.count("nll") == 1
    assert "0.0-0.2" not in printed
    assert "ms" not in printed


def test_copied_phrases_are_marked_and_nothing_else() -> None:
    text = copied_text("one two\x1b three", [(4, 8), (9, 14)])
    assert text.plain == "one two\\x1b three"
    (style,) = {str(span.style) for span in text.spans if str(span.style)}
    assert [text.plain[span.start : span.end] for span in text.spans if str(span.style)] == ["two\\x1b", "three"]
    assert style in {str(span.style) for span in copied_legend().spans}
