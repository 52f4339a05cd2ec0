"""How a query and a user's history become the words of a prompt; nothing here knows a tokenizer.

A prompt has up to three parts: the query, the history, and a closing cue after which the response is written.

    order="official"          query, history, cue     (the order of NextQuill's published code)
    order="history_first"     history, query, cue     (the queries of one user share the history as a prefix)

A user without history, and every counterfactual, gets the *empty history*. What that looks like decides what the
difference between the two passes means. The published code keeps the heading and writes `None` under it
(`counterfactual="none"`), so both passes have the same frame; `"removal"` takes heading and section away.

The published code lists past texts newest first; here they run oldest first, so that the newest stands nearest to the
response, and `newest_first=True` gives the published order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nextquill.data._checks import check_instance, check_one_of
from nextquill.data.records import HistoryItem

_ORDERS = ("official", "history_first")
_COUNTERFACTUALS = ("none", "removal")
_TEXT_FIELDS = ("history_heading", "query_heading", "closing_cue", "title_label", "text_label", "empty_history")
_SECTION_BREAK = "\n\n"


@dataclass(frozen=True)
class PromptTemplate:
    """The wording and the order of a prompt.

    Args:
        order: "official" (query, history, cue) or "history_first" (history, query, cue).
        counterfactual: what an empty history looks like: "none" keeps the heading with `empty_history` under it,
            "removal" drops the section.
        system: a system message; put before everything else when there is no chat template.
        chat: None uses the tokenizer's chat template if it has one, True requires one, False never uses it.
        history_heading, query_heading: a line above each section; an empty one is left out.
        closing_cue: the last line before the response.
        title_label, text_label: what precedes the title and the text of a past item.
        empty_history: the literal text of an empty history.
        newest_first: list the past texts from the newest to the oldest.

    Raises:
        ArgumentError: `order` or `counterfactual` is not one of those named.
        ArgumentTypeError: an argument has the wrong type.
    """

    order: Literal["official", "history_first"] = "official"
    counterfactual: Literal["none", "removal"] = "none"
    system: str | None = None
    chat: bool | None = None
    history_heading: str = "[User's past texts]:"
    query_heading: str = "[Request]:"
    closing_cue: str = "[Response]:"
    title_label: str = "[Title]: "
    text_label: str = "[Text]: "
    empty_history: str = "None"
    newest_first: bool = False

    def __post_init__(self) -> None:
        check_one_of("order", self.order, _ORDERS)
        check_one_of("counterfactual", self.counterfactual, _COUNTERFACTUALS)
        if self.system is not None:
            check_instance("system", self.system, str, "a string or None")
        if self.chat is not None:
            check_instance("chat", self.chat, bool, "True, False or None")
        check_instance("newest_first", self.newest_first, bool, "True or False")
        for name in _TEXT_FIELDS:
            check_instance(name, getattr(self, name), str, "a string")

    def render(self, query: str, history: Sequence[HistoryItem] = ()) -> str:
        """Return the prompt's text, without system message and chat markers.

        Args:
            query: what is asked; an empty one has no section.
            history: past texts, oldest first; an empty one is rendered as the counterfactual.
        """
        sections = [self._query_section(query), self._history_section(history)]
        if self.order == "history_first":
            sections.reverse()
        return _SECTION_BREAK.join(section for section in [*sections, self.closing_cue] if section)

    def render_item(self, item: HistoryItem) -> str:
        """Return one past text as it stands in the history section."""
        title = "" if item.title is None else f"{self.title_label}{item.title}\n"
        return f"{title}{self.text_label}{item.text}"

    def _query_section(self, query: str) -> str:
        return _section(self.query_heading, query) if query else ""

    def _history_section(self, history: Sequence[HistoryItem]) -> str:
        if not history:
            return "" if self.counterfactual == "removal" else _section(self.history_heading, self.empty_history)
        items = reversed(history) if self.newest_first else history
        return _section(self.history_heading, _SECTION_BREAK.join(self.render_item(item) for item in items))


def _section(heading: str, text: str) -> str:
    return f"{heading}\n{text}" if heading else text
