"""Reads event logs: rows {user_id, timestamp, text} with an optional title and query, one text each, in any order.

Each text becomes a record: the text is its response, and the user's strictly earlier texts are its history. Texts of
the same moment are not each other's history. The query is the column `query`, or one sentence for all, such as "Write
the next post titled {title}", in which {column} stands for the row's value.
"""

from __future__ import annotations

import string
from collections.abc import Iterator

from nextquill.data._checks import check_integer
from nextquill.data.loaders.by_user import Entry, records_of
from nextquill.data.loaders.row import Row
from nextquill.data.loaders.source import Source
from nextquill.data.records import Record
from nextquill.errors import ArgumentError


def load_events(
    source: Source, *, query: str | None = None, min_history: int = 0, max_history: int | None = None
) -> Iterator[tuple[str, Record]]:
    """Yield a record for every text; without `max_history`, n texts of a user become n²/2 history items.

    Raises:
        ArgumentError: the sentence is malformed or shows the text, which is the answer, or a number is negative.
    """
    parts = None if query is None else _parsed(query)
    check_integer("min_history", min_history, 0)
    check_integer("max_history", max_history, min_history, or_none=True)
    return records_of(source, lambda row: _entry(row, parts), min_history=min_history, max_history=max_history)


def _entry(row: Row, parts: list[tuple[str, str | None]] | None) -> Entry:
    user, time, text = row.user_id("user_id"), row.seconds("timestamp"), row.response("text")
    if time is None:
        raise row.error("timestamp", "required, but missing: histories follow from the order of events")
    row.read.add("query")
    extra = row.with_others({})  # with title, and the columns that a sentence shows
    asked = (
        row.text("query")
        if parts is None
        else "".join(word + (row.label(name) if name else "") for word, name in parts)
    )
    content = {"text": text, "response": text, "query": asked, "title": row.optional_text("title"), "extra": extra}
    return Entry(user, time, row.where, content)


def _parsed(query: str) -> list[tuple[str, str | None]]:
    """Split a sentence into pieces of text, each with the column that follows; braces may only hold plain names."""
    try:
        pieces = list(string.Formatter().parse(query))
    except ValueError as error:
        raise ArgumentError(f"query: expected a sentence with {{columns}} in braces, got {query!r}: {error}") from error
    for _, name, form, conversion in pieces:
        if name is not None and (not name or form or conversion or set(".[]") & set(name)):
            raise ArgumentError(f"query: expected the name of a column in braces, got {{{name}}} in {query!r}")
        if name == "text":
            raise ArgumentError(f"query: expected a sentence without {{text}}, which is the response, got {query!r}")
    return [(text, name) for text, name, _, _ in pieces]
