"""Reads rows that are records already, except for the names of columns: JSONL, JSON lists, CSV, Parquet, the hub.

A row has `user_id`, `query`, `response`, `history` and optionally `timestamp`. All other columns become `extra`.
`columns` renames columns. `history` is a list of strings or of {text, title, timestamp}; a CSV cell holds it as JSON. A
table without histories is a log, and format "events" makes its histories.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nextquill.data.lines import parsed_json
from nextquill.data.loaders.row import Row
from nextquill.data.loaders.source import Source
from nextquill.data.records import RECORD_FIELDS, Record


def load_table(source: Source) -> Iterator[tuple[str, Record]]:
    """Yield the rows as records."""
    return source.each(_record)


def _record(row: Row) -> Record:
    row.read.update(RECORD_FIELDS)  # `parse_record` checks them
    given = {name: row.values.get(name) for name in ("user_id", "query", "response")}
    return row.record(**given, history=history_of(row), timestamp=row.seconds("timestamp"))


def history_of(row: Row) -> object:
    """The row's own history as `parse_record` takes it: a list, or JSON in a CSV cell, with times in seconds."""
    if not row.has("history"):
        raise row.error("history", f"required, but missing; format 'events' makes histories; there are {row.keys()}")
    value = row.values["history"]
    row.read.add("history")
    if isinstance(value, str):
        value = parsed_json(row.where, value, "history") if value.strip() else []
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return value  # `parse_record` refuses it
    texts = [{"text": item} if isinstance(item, str) else item for item in value]
    items = Row({"history": texts}, row.where, row.clock).rows("history")
    return [dict(item.values) | {"timestamp": item.seconds("timestamp")} for item in items]
