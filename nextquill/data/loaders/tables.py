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
from nextquill.data.records import Record, parse_record

_FIELDS = ("user_id", "query", "response", "history", "timestamp")


def load_table(source: Source) -> Iterator[tuple[str, Record]]:
    """Yield the rows as records."""
    return source.each(_record)


def _record(row: Row) -> Record:
    raw = {
        **row.others(_FIELDS),
        "user_id": row.values.get("user_id"),
        "query": row.values.get("query"),
        "response": row.values.get("response"),
        "history": _history(row),
        "timestamp": row.seconds("timestamp"),
    }
    return parse_record(raw, row.where)


def _history(row: Row) -> object:
    if not row.has("history"):
        raise row.error("history", f"required, but missing; format 'events' makes histories; there are {row.keys()}")
    value = row.values["history"]
    if isinstance(value, str):
        value = parsed_json(row.where, value, "history") if value.strip() else []
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return value  # `parse_record` refuses it
    if all(isinstance(item, str) for item in value):
        return value
    items = Row({"history": value}, row.where, row.clock).rows("history")
    return [dict(item.values) | {"timestamp": item.seconds("timestamp")} for item in items]
