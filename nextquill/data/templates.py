"""Words a query and a user's history as a prompt, without a tokenizer.

A prompt has up to three parts: the query, the history, and a closing cue, which the response follows.

    order="official"          query, history, cue     (the order of NextQuill's published code)
    order="history_first"     history, query, cue     (the queries of one user share the history as a prefix)

A user without history, and every counterfactual, gets the *empty history*. Its wording decides the meaning of the
difference between the two passes:

    counterfactual="none"     keeps the heading and writes `None` under it, as the published code does, so that both
                              passes have the same frame
    counterfactual="removal"  drops heading and section
    counterfactual="placebo"  shows another user's history, so that the passes differ only in whose history it is; a
                              user without history is shown as with "none"

The published code lists past texts newest first. Here they run oldest first, so that the newest is nearest to the
response; `newest_first=True` gives the published order.
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

#: The prompts of a record: with the user's own history, without history, and with another user's history.
BRANCHES = ("factual", "counterfactual", "placebo")

_ORDERS = ("official", "history_first")
_COUNTERFACTUALS = ("none", "removal", "placebo")
_SECTION_BREAK = "\n\n"
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

#: Changes a user's text before it goes into a prompt.
Clean = Callable[[str], str]


@dataclass(frozen=True)
class PromptTemplate:
    """The wording and the order of a prompt.

    Args:
        order: "official" (query, history, cue) or "history_first" (history, query, cue).
        counterfactual: the prompt without history: "none" keeps the heading with `empty_history` under it, "removal"
            drops the section, "placebo" shows another user's history.
        system: a system message; without a chat template it stands before everything else.
        chat: None uses the tokenizer's chat template if it has one, True requires one, False never uses it.
        history_heading, query_heading: a line above each section; an empty one is left out.
        closing_cue: the last line before the response.
        title_label, text_label, date_label: the words before the title, the text and the date of a past item.
        empty_history: the literal text of an empty history.
        newest_first: list the past texts from the newest to the oldest.
        show_dates: put the day above every past item that has a timestamp, as 2024-03-31 (UTC).
        prompt_jinja: a Jinja template that replaces `order`, the headings, labels and cue; it gets `query`, `history`
            (items with `text`, `title`, `timestamp`) and `counterfactual`. See `jinja_prompt`.

    Raises:
        ArgumentError: `order` or `counterfactual` has another value; or `prompt_jinja` is malformed, fails, does not
            show the query, does not change with the history, or puts two texts next to each other.
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
            query: the request; an empty one has no section.
            history: past texts, oldest first; without any, the prompt is the counterfactual.
            clean: applied to the query and to the titles and texts of the history; see `UserText`.

        Raises:
            RecordError: a shown date lies outside the years 1 to 9999.
            ArgumentError: `prompt_jinja` fails on these values.
        """
        items = history[::-1] if self.newest_first else history
        if self.prompt_jinja is not None:
            return render_jinja(self.prompt_jinja, query, items, _day, clean)
        asked = clean(query)
        sections = [_section(self.query_heading, asked) if asked else "", self._history_section(items, clean)]
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
            f"timestamp: expected seconds since 1970 for a date in the years 1 to 9999, got {timestamp}"
        ) from None
