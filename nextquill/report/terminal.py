"""Tokens coloured by effect, and tables, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from nextquill.errors import ArgumentError
from nextquill.report.data import Table
from nextquill.report.text import plain

if TYPE_CHECKING:
    import rich.table
    from rich.text import Text

# From weak to strong. Text and ground are both set, to be legible on light and dark terminals. Colour-blind readers can
# tell blue from orange. With 16 colours both grounds are the same grey, and without colour there is none: there strong
# effects are bold, and lowered ones underlined.
_HELPS = ("", "black on #d6e8fa", "black on #9dc9f2", "bold black on #5aa5e8", "bold white on #1c62a8")
_HURTS = (
    "", "underline black on #fbe6cf", "underline black on #f6c48c", "bold underline black on #ee9a3f",
    "bold underline white on #9c4a06",
)  # fmt: skip
_COPIED = "underline black on #ffe08a"
# |effect| from which each step applies; below the first a token is left plain.
_STEPS = (0.05, 0.2, 0.4, 0.7)


def effect_text(tokens: Sequence[str], effects: Sequence[float]) -> Text:
    """Tokens on blue where the history raised their probability, on orange where it lowered it.

    Args:
        tokens: the pieces of the response, as they read when joined.
        effects: effect_prob of each token, in [-1, 1]; NaN (not measured) is left plain.

    Returns:
        A `rich.text.Text`; `.plain` is the joined tokens, with control characters written as `\\x1b`.

    Raises:
        ArgumentError: the two sequences differ in length.
    """
    from rich.text import Text

    if len(tokens) != len(effects):
        raise ArgumentError(f"effects: expected one for each of {len(tokens)} tokens, got {len(effects)}")
    # Plain, because an escape sequence would be obeyed.
    pieces = [Text(plain(token), effect_style(effect)) for token, effect in zip(tokens, effects, strict=True)]
    return Text().join(pieces)


def copied_text(text: str, spans: Sequence[Sequence[int]]) -> Text:
    """A text with the phrases that are copied from the history, at `spans` in order and apart, on yellow."""
    from rich.text import Text

    cuts = [0, *(place for span in spans for place in span), len(text)]
    pieces = (plain(text[first:last]) for first, last in pairwise(cuts))
    return Text.assemble(*((piece, _COPIED if at % 2 else "") for at, piece in enumerate(pieces)))


def copied_legend() -> Text:
    """One line that explains the mark."""
    from rich.text import Text

    return Text.assemble(("marked", _COPIED), " three or more words in a row of the history")


def effect_style(effect: float) -> str:
    """The rich style of an effect in probability; the empty string below 0.05 and for NaN."""
    return (_HELPS if effect > 0 else _HURTS)[sum(abs(effect) >= step for step in _STEPS)]


def effect_legend() -> Text:
    """One line that explains the colours."""
    from rich.text import Text

    steps = [(f" {value:+.2f} ", effect_style(value)) for value in (*(-step for step in reversed(_STEPS)), *_STEPS)]
    return Text.assemble("history lowered p (underlined) ", *steps, " raised p")


def results_table(table: Table) -> rich.table.Table:
    """A report table that fits 80 columns, without secondary columns and details, which only the page shows."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = [index for index, column in enumerate(table.columns) if not column.secondary]
    rendered = RichTable(
        title=Text(plain(table.title), "table.title"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        show_edge=False,
    )
    group = ""
    for index in shown:
        column = table.columns[index]
        # rich has no headings over several columns, so the first column of a group carries its name.
        above = column.group if column.group != group else ""
        group = column.group
        rendered.add_column(
            Text(plain(f"{above}\n{column.heading}")), justify="left" if index == 0 else "right", no_wrap=True
        )
    for row in table.rows:
        rendered.add_row(*(Text(plain(row[index].text)) for index in shown))
    return rendered
