"""The values that this package renders. They hold the content of a page, and nothing about its origin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenEffect:
    """One response token with its probability with and without the user's history.

    `p_placebo` is its probability under another user's history, if that was measured. `personal` is whether it truly is
    a personal token, if that is known.
    """

    text: str
    p_with: float
    p_without: float
    p_placebo: float | None = None
    personal: bool | None = None

    @property
    def effect_prob(self) -> float:
        """How much the history raised the token's probability, in [-1, 1]."""
        return self.p_with - self.p_without


@dataclass(frozen=True)
class LeftOutItem:
    """An item of the history, and the effect of leaving it out on each token of a response.

    `effects` are in nats, one for each token: nll without the item minus nll with all items.
    """

    title: str
    text: str
    effects: Sequence[float]


@dataclass(frozen=True)
class ResponseVariant:
    """One response as one model sees it.

    `separator` goes between tokens that do not carry their own spaces. `items`, if they were measured, are the history
    that the model read, oldest first. `against_other` colours tokens by the difference to another user's history, which
    every token then has, rather than to none.
    """

    label: str
    tokens: Sequence[TokenEffect]
    separator: str = " "
    items: Sequence[LeftOutItem] = ()
    against_other: bool = False


@dataclass(frozen=True)
class GeneratedText:
    """A text among others: a label, the text, and its scores in a few words.

    `copied` are the places of phrases that are copied from the history: first character and the one after the last.
    """

    label: str
    text: str
    detail: str = ""
    copied: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class ResponseView:
    """One response, the `context` it was written in (names and texts), its variants, and texts side by side."""

    title: str
    context: Sequence[tuple[str, str]]
    variants: Sequence[ResponseVariant]
    texts: Sequence[GeneratedText] = ()


@dataclass(frozen=True)
class Column:
    """A column's heading, the `group` heading that it shares with its neighbours, and a sentence of explanation.

    A `secondary` column is left out where space is short, as in a terminal of 80 columns.
    """

    heading: str
    group: str = ""
    explanation: str = ""
    secondary: bool = False


@dataclass(frozen=True)
class Cell:
    """A figure and, smaller, its range. A `marked` one stands out."""

    text: str
    detail: str = ""
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """`rows` hold one cell for each column; the first column names the row."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class ForestRow:
    """A row of a `ForestMeasure`: a figure with its interval, if there is one, and a `note` in a few words.

    `colour` is its place in the palette.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""
    colour: int = 0


@dataclass(frozen=True)
class ForestMeasure:
    """One measure of a forest plot. `hint` says its unit and which way is good; `with_zero` draws a line at 0."""

    title: str
    hint: str
    rows: Sequence[ForestRow]
    with_zero: bool = False


@dataclass(frozen=True)
class Picture:
    """A PNG, perhaps a second one for dark pages, and the text for readers who do not see it."""

    png: bytes
    alt: str
    dark_png: bytes | None = None
    caption: str = ""


@dataclass(frozen=True)
class Series:
    """A curve, with a band between `low` and `high` if they are given.

    `colour` is its place in the palette, by default its place in the panel; `dots` marks its points.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False
    colour: int | None = None
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    """One small plot. `hint` says in a few words which way is good; `x_ticks` are chosen to fit by default.

    `with_zero` makes the axis reach 0, for quantities that are read as a distance from 0.
    """

    title: str
    hint: str
    series: Sequence[Series]
    log_scale: bool = False
    y_limits: tuple[float, float] | None = None
    x_ticks: Sequence[float] | None = None
    with_zero: bool = False


@dataclass(frozen=True)
class Charts:
    """Panels side by side over one quantity, under one legend of (label, place in the palette)."""

    panels: Sequence[Panel]
    x_label: str
    legend: Sequence[tuple[str, int]]
    lead: str = ""


@dataclass(frozen=True)
class Page:
    """A report from top to bottom, its answer first.

    `findings`, and `reading` on how to read it, are pairs of heading and text. `folded` tables are shown on demand.
    """

    title: str
    lead: str
    verdict: Sequence[str] = ()
    findings: Sequence[tuple[str, str]] = ()
    notices: Sequence[str] = ()
    picture: Picture | None = None
    measures: Sequence[ForestMeasure] = ()
    measures_lead: str = ""
    tables: Sequence[Table] = ()
    table_notes: Sequence[str] = ()
    responses: Sequence[ResponseView] = ()
    responses_lead: str = ""
    charts: Charts | None = None
    folded: Sequence[Table] = ()
    reading: Sequence[tuple[str, str]] = ()
    footer: str = ""
