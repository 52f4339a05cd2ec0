"""How a query and a user's history become the words of a prompt; nothing here knows a tokenizer.

A prompt has up to three parts: the query, the history, and a closing cue after which the response is written.

    order="official"          query, history, cue     (the order of NextQuill's published code)
    order="history_first"     history, query, cue     (the queries of one user share the history as a prefix)

A user without history, and every counterfactual, gets the *empty history*. What that looks like decides what the
difference between the two passes means. The published code keeps the heading and writes `None` under it
(`counterfactual="none"`), so both passes have the same frame; `"removal"` takes heading and section away. With
`"placebo"` the counterfactual pass has the history of another user, so that only whose history it is differs between
the passes; a user without history is then shown as with `"none"`.

The published code lists past texts newest first; here they run oldest first, so that the newest stands nearest to the
response, and `newest_first=True` gives the published order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta, timezone
from typing import Literal

from nextquill.data._checks import check_instance, check_one_of
from nextquill.data.jinja_prompt import check_jinja, render_jinja
from nextquill.data.records import HistoryItem
from nextquill.errors import RecordError

#: The prompts of a record: with the user's own history, with none, with another user's.
BRANCHES = ("factual", "counterfactual", "placebo")

_ORDERS = ("official", "history_first")
_COUNTERFACTUALS = ("none", "removal", "placebo")
_SECTION_BREAK = "\n\n"
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

#: What a text written by a user goes through on its way into a prompt.
Clean = Callable[[str], str]


@dataclass(frozen=True)
class PromptTemplate:
    """The wording and the order of a prompt.

    Args:
        order: "official" (query, history, cue) or "history_first" (history, query, cue).
        counterfactual: what stands for no history: "none" keeps the heading with `empty_history` under it, "removal"
            drops the section, "placebo" puts another user's history there.
        system: a system message; put before everything else when there is no chat template.
        chat: None uses the tokenizer's chat template if it has one, True requires one, False never uses it.
        history_heading, query_heading: a line above each section; an empty one is left out.
        closing_cue: the last line before the response.
        title_label, text_label, date_label: what precedes the title, the text and the date of a past item.
        empty_history: the literal text of an empty history.
        newest_first: list the past texts from the newest to the oldest.
        show_dates: put the day above every past item that has a timestamp, as 2024-03-31 (UTC).
        prompt_jinja: a Jinja template that words the prompt instead of `order`, the headings, labels and cue; it gets
            `query`, `history` (items with `text`, `title`, `timestamp`) and `counterfactual`. See `jinja_prompt`.

    Raises:
        ArgumentError: `order` or `counterfactual` is not one of those named; or `prompt_jinja` is wrong, fails, shows
            no query, does not change with the history, or puts two texts side by side with nothing between them.
        ArgumentTypeError: an argument has the wrong type.
    """

    order: Literal["official", "history_first"] = "official"
    counterfactual: Literal["none", "removal", "placebo"] = "none"
    system: str | None = None
    chat: bool | None = None
    history_heading: str = "[User's past texts]:"
    query_heading: str = "[Request]:"
    closing_cue: str = "[Response]:"
    title_label: str = "[Title]: "
    text_label: str = "[Text]: "
    empty_history: str = "None"
    newest_first: bool = False
    date_label: str = "[Date]: "
    show_dates: bool = False
    prompt_jinja: str | None = None

    def __post_init__(self) -> None:
        check_one_of("order", self.order, _ORDERS)
        check_one_of("counterfactual", self.counterfactual, _COUNTERFACTUALS)
        for name in ("system", "prompt_jinja"):
            if getattr(self, name) is not None:
                check_instance(name, getattr(self, name), str, "a string or None")
        if self.chat is not None:
            check_instance("chat", self.chat, bool, "True, False or None")
        for each in fields(self):
            if each.type == "bool":
                check_instance(each.name, getattr(self, each.name), bool, "True or False")
            elif each.type == "str":
                check_instance(each.name, getattr(self, each.name), str, "a string")
        if self.prompt_jinja is not None:
            check_jinja(self.prompt_jinja, _day)

    def render(self, query: str, history: Sequence[HistoryItem] = (), clean: Clean = str) -> str:
        """Return the prompt's text, without system message and chat markers.

        Args:
            query: what is asked; an empty one has no section.
            history: past texts, oldest first; an empty one is rendered as the counterfactual.
            clean: applied to the query and to the titles and texts of the history; see `UserText`.

        Raises:
            RecordError: a date is to be shown and lies outside the years 1 to 9999.
            ArgumentError: `prompt_jinja` fails on these values.
        """
        items = history[::-1] if self.newest_first else history
        if self.prompt_jinja is not None:
            return render_jinja(self.prompt_jinja, query, items, _day, clean)
        sections = [self._query_section(clean(query)), self._history_section(items, clean)]
        if self.order == "history_first":
            sections.reverse()
        return _SECTION_BREAK.join(section for section in [*sections, self.closing_cue] if section)

    def render_item(self, item: HistoryItem, clean: Clean = str) -> str:
        """Return one past text as it stands in the history section."""
        lines = [f"{self.text_label}{clean(item.text)}"]
        if item.title is not None:
            lines.insert(0, f"{self.title_label}{clean(item.title)}")
        if self.show_dates and item.timestamp is not None:
            lines.insert(0, f"{self.date_label}{_day(item.timestamp)}")
        return "\n".join(lines)

    def _query_section(self, query: str) -> str:
        return _section(self.query_heading, query) if query else ""

    def _history_section(self, items: Sequence[HistoryItem], clean: Clean) -> str:
        if not items:
            return "" if self.counterfactual == "removal" else _section(self.history_heading, self.empty_history)
        return _section(self.history_heading, _SECTION_BREAK.join(self.render_item(item, clean) for item in items))


def _section(heading: str, text: str) -> str:
    return f"{heading}\n{text}" if heading else text


def _day(timestamp: float) -> str:
    try:
        return (_EPOCH + timedelta(seconds=timestamp)).date().isoformat()
    except OverflowError:
        raise RecordError(
            f"timestamp: expected seconds since 1970 of a year from 1 to 9999 for a date, got {timestamp}"
        ) from None
